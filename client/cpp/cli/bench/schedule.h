// When steps are to begin.
//
// Closed loop: a client begins its next step when it is done with its last one. Open loop: steps
// arrive on their own, as a Poisson process, however busy the clients are; one that finds none free
// waits, and its latency counts from its arrival, so that a slow daemon cannot hide the queue by
// slowing its clients down (coordinated omission).
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <random>

namespace lamina::cli {

// A Poisson process's arrivals, in seconds from its start, ascending. The same seed gives the same.
class Arrivals {
 public:
  Arrivals(double per_second, uint64_t seed) : gaps_(per_second), random_(seed) {}
  double Next() { return at_ += gaps_(random_); }

 private:
  std::exponential_distribution<double> gaps_;
  std::mt19937_64 random_;
  double at_ = 0;
};

// Threads: any, after Start.
class Schedule {
 public:
  using Clock = std::chrono::steady_clock;

  // `rate`: arrivals a second, of all clients together; 0: a closed loop. It lasts `seconds`.
  Schedule(double rate, uint64_t seed, double seconds);

  void Start(Clock::time_point now);
  // Waits until a step of the caller's is to begin and returns from when its latency counts. None:
  // the time is over, or Stop was called.
  std::optional<Clock::time_point> Next();
  void Stop();

  // Arrivals within the time that no client came to begin, after all have finished; 0 of a closed
  // loop. Call it once.
  int64_t NotStarted();

 private:
  Clock::time_point At(double seconds) const;

  const double seconds_;
  std::mutex mutex_;
  std::condition_variable stopping_;
  bool stopped_ = false;              // guarded by mutex_
  std::optional<Arrivals> arrivals_;  // guarded by mutex_
  double upcoming_ = 0;               // guarded by mutex_: the next arrival
  int64_t not_started_ = 0;           // guarded by mutex_
  Clock::time_point start_, end_;
};

}  // namespace lamina::cli
