// The one thread that touches the device, and the bounded queue of calls that wait for it.
//
// A call blocks its caller until it was done or dropped, so a call's state lives on its caller's
// stack and nothing is allocated for it. Calls run in the order in which they were admitted.
//
// Threads: all methods from any thread but the queue's own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "server/engine/engine.h"

namespace lamina {

class DeviceQueue {
 public:
  using Clock = std::chrono::steady_clock;

  enum class Admission : uint8_t {
    kCall,     // refused by a full queue and while draining
    kRelease,  // gives something back: refused while draining only
    kAlways,   // the engine's own
  };

  // `capacity`: calls that may wait, the running one not counted. `metrics` outlives the queue.
  DeviceQueue(int capacity, MetricSet* metrics);
  ~DeviceQueue();  // drains, then joins the thread

  // Runs `work` on the device thread; it is given the moment of admission. Its status is returned.
  //   RESOURCE_EXHAUSTED: the queue is full. UNAVAILABLE: draining.
  //   DEADLINE_EXCEEDED, CANCELLED: as `control` says, while the call waited.
  // In these four cases `work` did not run and never will. Memory that ran out inside `work` is
  // RESOURCE_EXHAUSTED too.
  absl::Status Run(const CallControl& control, Admission admission,
                   absl::FunctionRef<absl::Status(Clock::time_point admitted)> work);

  // Refuses what comes from now on; returns when all that waited has run. Idempotent.
  void Drain();
  // Whether Drain has returned.
  bool drained() const;

 private:
  enum class State : uint8_t { kWaiting, kStarted, kDone };
  struct Call;

  void Loop();
  absl::Status Execute(Call& call);

  const int capacity_;
  MetricSet* const metrics_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;  // the device thread waits on it
  std::condition_variable idle_;     // Drain waits on it
  std::deque<Call*> waiting_;        // guarded by mutex_
  bool running_ = false;             // guarded by mutex_: a call is on the device thread
  bool draining_ = false;            // guarded by mutex_
  bool drained_ = false;             // guarded by mutex_
  bool stop_ = false;                // guarded by mutex_
  std::thread thread_;               // last: it uses the rest
};

}  // namespace lamina
