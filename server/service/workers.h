// Threads for calls that may wait: for the device, for another call, for a disk. gRPC's own few
// threads must not, or nothing else would be heard.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace lamina {

// As many threads as there are tasks at a time; some are kept for the next ones. Threads: Run from
// any.
class Workers {
 public:
  Workers() = default;
  ~Workers();  // returns when all tasks are done; none may come any more

  // Runs a task soon, on a thread of its own. Tasks throw nothing. Where no thread can be started,
  // it runs on the first that is free.
  void Run(std::function<void()> task);

 private:
  static constexpr int kKept = 8;  // idle threads above these end

  void Work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable ended_;
  std::deque<std::function<void()>> tasks_;  // guarded by mutex_
  int threads_ = 0;                          // guarded by mutex_
  int idle_ = 0;                             // guarded by mutex_: threads that wait for a task
  bool stopping_ = false;                    // guarded by mutex_
};

}  // namespace lamina
