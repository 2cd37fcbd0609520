// Whose turn on the device it is: a thread that runs calls, and the bounded queue of those that
// wait for it.
//
// A call blocks its caller until it was done or dropped, so a call's state lives on its caller's
// stack and nothing is allocated for it. Calls run one at a time, in the order in which they were
// admitted. Who finds nothing before it need not block: it may take the turn itself (for a call of
// microseconds two changes of threads would cost more than it does), or leave to the device thread
// what is to be done in it.
//
// Threads: all methods from any thread but the queue's own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "server/engine/engine.h"

namespace lamina {

class DeviceQueue {
 public:
  using Clock = std::chrono::steady_clock;
  using Turn = DeviceTurn;

  enum class Admission : uint8_t {
    kCall,     // refused by a full queue and while draining
    kRelease,  // gives something back: refused while draining only
    kAlways,   // the engine's own
  };

  // `capacity`: calls that may wait, the running one not counted. `metrics` outlives the queue.
  DeviceQueue(int capacity, MetricSet* metrics);
  ~DeviceQueue();  // drains, then joins the thread

  // Runs `work` on the device thread, or here where the caller has the turn, as `control` says or
  // as it is the device thread; it is given the moment of admission. Its status is returned.
  //   RESOURCE_EXHAUSTED: the queue is full. UNAVAILABLE: draining.
  //   DEADLINE_EXCEEDED, CANCELLED: as `control` says, while the call waited.
  // In these four cases `work` did not run and never will. Memory that ran out inside `work` is
  // RESOURCE_EXHAUSTED too.
  absl::Status Run(const CallControl& control, Admission admission,
                   absl::FunctionRef<absl::Status(Clock::time_point admitted)> work);

  // The turn, for the calling thread, where nothing runs or waits and the queue doesn't drain. What
  // comes meanwhile waits until the Turn is gone.
  Turn TryTurn();

  // Has the device thread run `task` in its turn, where nothing runs or waits and the queue doesn't
  // drain; false: it does not. The task throws nothing, and waits for no other call.
  bool TryPost(std::function<void()> task);
  // Whether the holder of the turn had better give it back soon.
  bool TurnIsWanted() const;

  // Refuses what comes from now on; returns when all that waited has run. Idempotent.
  void Drain();
  // Whether Drain has returned.
  bool drained() const;

 private:
  enum class State : uint8_t { kWaiting, kStarted, kDone };
  struct Call;

  void Loop();
  absl::Status Execute(const Call& call);
  void EndTurn();  // needs mutex_

  const int capacity_;
  MetricSet* const metrics_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;  // the device thread waits on it
  std::condition_variable idle_;     // Drain waits on it
  std::deque<Call*> waiting_;        // guarded by mutex_
  std::function<void()> posted_;     // guarded by mutex_; has the turn already
  bool running_ = false;             // guarded by mutex_: somebody has the turn
  bool draining_ = false;            // guarded by mutex_
  bool drained_ = false;             // guarded by mutex_
  bool stop_ = false;                // guarded by mutex_
  std::thread thread_;               // last: it uses the rest
};

}  // namespace lamina
