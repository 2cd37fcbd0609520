#include "cli/bench/schedule.h"

namespace lamina::cli {

Schedule::Schedule(double rate, uint64_t seed, double seconds) : seconds_(seconds) {
  if (rate <= 0) return;
  arrivals_.emplace(rate, seed);
  upcoming_ = arrivals_->Next();
}

Schedule::Clock::time_point Schedule::At(double seconds) const {
  return start_ +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

void Schedule::Start(Clock::time_point now) {
  start_ = now;
  end_ = At(seconds_);
}

std::optional<Schedule::Clock::time_point> Schedule::Next() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (stopped_) return std::nullopt;
  if (!arrivals_.has_value()) {
    const Clock::time_point now = Clock::now();
    if (now >= end_) return std::nullopt;
    return now;
  }
  if (upcoming_ >= seconds_) return std::nullopt;
  const Clock::time_point intended = At(upcoming_);
  upcoming_ = arrivals_->Next();
  if (stopping_.wait_until(lock, intended, [this] { return stopped_; })) return std::nullopt;
  if (Clock::now() >= end_) {  // it had waited for a free client until the time was over
    ++not_started_;
    return std::nullopt;
  }
  return intended;
}

void Schedule::Stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  stopping_.notify_all();
}

int64_t Schedule::NotStarted() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!arrivals_.has_value()) return 0;
  for (; upcoming_ < seconds_; upcoming_ = arrivals_->Next()) ++not_started_;
  return not_started_;
}

}  // namespace lamina::cli
