#include "server/service/workers.h"

#include <system_error>
#include <utility>

namespace lamina {

Workers::~Workers() {
  std::unique_lock<std::mutex> lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
  ended_.wait(lock, [this] { return threads_ == 0; });
}

void Workers::Run(std::function<void()> task) {
  std::lock_guard<std::mutex> lock(mutex_);
  tasks_.push_back(std::move(task));
  if (static_cast<size_t>(idle_) >= tasks_.size()) {
    changed_.notify_one();
    return;
  }
  try {
    std::thread([this] { Work(); }).detach();  // the destructor waits for its end
    ++threads_;
  } catch (const std::system_error&) {
    if (threads_ == 0) throw;  // nobody would ever run it
  }
}

void Workers::Work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (tasks_.empty()) {
      if (stopping_ || idle_ >= kKept) break;
      ++idle_;
      changed_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      --idle_;
      continue;
    }
    const std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    lock.lock();
  }
  --threads_;
  if (threads_ == 0) ended_.notify_all();  // with the lock held: this may be gone after it
}

}  // namespace lamina
