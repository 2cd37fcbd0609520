#include "server/engine/device_queue.h"

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/metrics/metrics.h"

namespace lamina {

struct DeviceQueue::Call {
  absl::FunctionRef<absl::Status(Clock::time_point)> work;
  const CallControl& control;
  Clock::time_point admitted;
  std::condition_variable done;
  State state = State::kWaiting;  // guarded by the queue's mutex_
  absl::Status status;            // set before kDone
};

DeviceQueue::DeviceQueue(int capacity, MetricSet* metrics)
    : capacity_(capacity), metrics_(metrics), thread_([this] { Loop(); }) {}

DeviceQueue::~DeviceQueue() {
  Drain();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  arrived_.notify_one();
  thread_.join();
}

absl::Status DeviceQueue::Run(const CallControl& control, Admission admission,
                              absl::FunctionRef<absl::Status(Clock::time_point admitted)> work) {
  Call call{.work = work, .control = control, .admitted = Clock::now()};
  if (control.has_turn || std::this_thread::get_id() == thread_.get_id()) return Execute(call);
  std::unique_lock<std::mutex> lock(mutex_);
  if (draining_ && admission != Admission::kAlways) {
    metrics_->Rejected(Rejection::kDraining);
    return absl::UnavailableError("the daemon is draining and takes no new calls");
  }
  if (admission == Admission::kCall && waiting_.size() >= static_cast<size_t>(capacity_)) {
    metrics_->Rejected(Rejection::kQueueFull);
    return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", waiting_.size(),
                                                     " calls wait and ", capacity_,
                                                     " may; try again later"));
  }
  waiting_.push_back(&call);
  metrics_->SetQueueDepth(static_cast<int64_t>(waiting_.size()));
  arrived_.notify_one();

  const bool forever = control.deadline == absl::InfiniteFuture();
  while (call.state == State::kWaiting && !forever) {
    if (call.done.wait_until(lock, absl::ToChronoTime(control.deadline)) ==
            std::cv_status::timeout &&
        call.state == State::kWaiting) {
      waiting_.erase(std::find(waiting_.begin(), waiting_.end(), &call));
      metrics_->SetQueueDepth(static_cast<int64_t>(waiting_.size()));
      metrics_->Rejected(Rejection::kDeadline);
      if (waiting_.empty() && !running_) idle_.notify_all();
      return absl::DeadlineExceededError(
          "the deadline passed before the device began the call; nothing has changed");
    }
  }
  call.done.wait(lock, [&] { return call.state == State::kDone; });
  return call.status;
}

DeviceTurn DeviceQueue::TryTurn() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (draining_ || running_ || !waiting_.empty()) return {};
  running_ = true;
  return DeviceTurn([this] {
    std::lock_guard<std::mutex> relock(mutex_);
    EndTurn();
    if (!waiting_.empty()) arrived_.notify_one();
  });
}

bool DeviceQueue::TryPost(std::function<void()> task) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (draining_ || running_ || !waiting_.empty()) return false;
  running_ = true;
  posted_ = std::move(task);
  arrived_.notify_one();
  return true;
}

bool DeviceQueue::TurnIsWanted() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return draining_ || !waiting_.empty();
}

void DeviceQueue::EndTurn() {
  running_ = false;
  if (waiting_.empty()) idle_.notify_all();
}

absl::Status DeviceQueue::Execute(const Call& call) {
  if (call.control.cancelled && call.control.cancelled()) {
    metrics_->Rejected(Rejection::kCancelled);
    return absl::CancelledError("cancelled before the device began the call; nothing has changed");
  }
  if (absl::Now() >= call.control.deadline) {
    metrics_->Rejected(Rejection::kDeadline);
    return absl::DeadlineExceededError(
        "the deadline passed before the device began the call; nothing has changed");
  }
  try {
    return call.work(call.admitted);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("the daemon ran out of host memory during the call");
  }
}

void DeviceQueue::Loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    arrived_.wait(lock, [this] { return posted_ || (!running_ && (stop_ || !waiting_.empty())); });
    if (posted_) {
      const std::function<void()> task = std::exchange(posted_, nullptr);
      lock.unlock();
      task();
      lock.lock();
      EndTurn();
      continue;
    }
    if (waiting_.empty()) return;  // stopped, and nothing is left
    Call* const call = waiting_.front();
    waiting_.pop_front();
    metrics_->SetQueueDepth(static_cast<int64_t>(waiting_.size()));
    call->state = State::kStarted;
    running_ = true;
    lock.unlock();
    absl::Status status = Execute(*call);
    lock.lock();
    call->status = std::move(status);
    call->state = State::kDone;
    call->done.notify_one();  // with the lock held: the call is gone as soon as its caller sees it
    EndTurn();
  }
}

void DeviceQueue::Drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  draining_ = true;
  idle_.wait(lock, [this] { return waiting_.empty() && !running_; });
  drained_ = true;
}

bool DeviceQueue::drained() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return drained_;
}

}  // namespace lamina
