// What the handlers share: the rooms below, the gate that draining closes, and the sessions'
// mutation logs.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/access/access.h"
#include "server/engine/engine.h"
#include "server/engine/mutation_log.h"
#include "server/metrics/metrics.h"
#include "server/session/session_manager.h"

namespace lamina {

// Lets calls in until it is closed, and knows when the last one has left. Threads: any.
class Gate {
 public:
  // Held by a handler while it runs.
  class Pass {
   public:
    explicit Pass(Gate& gate) : gate_(gate), status_(gate.Enter()) {}
    ~Pass() {
      if (status_.ok()) gate_.Leave();
    }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;
    const absl::Status& status() const { return status_; }  // UNAVAILABLE: closed

   private:
    Gate& gate_;
    const absl::Status status_;
  };

  // From now on nobody enters; returns whether all have left by the deadline.
  bool Close(absl::Time deadline);
  bool closed() const;

 private:
  absl::Status Enter();
  void Leave();

  mutable std::mutex mutex_;
  std::condition_variable left_;
  bool closed_ = false;  // guarded by mutex_
  int64_t inside_ = 0;   // guarded by mutex_
};

// One log a session. Threads: any.
class MutationLogs {
 public:
  std::shared_ptr<MutationLog> For(SessionKey session);
  void Forget(SessionKey session);

 private:
  std::mutex mutex_;
  std::map<SessionKey, std::shared_ptr<MutationLog>> logs_;  // guarded by mutex_
};

struct SharedState {
  Engine& engine;
  SessionManager& sessions;
  Access& access;
  MetricSet& metrics;
  MutationLogs& mutations;
  Gate& gate;
  std::string broker_path;
  std::string metrics_address;  // empty: none
  std::string version;
  std::string commit;
  absl::Time started;
};

}  // namespace lamina
