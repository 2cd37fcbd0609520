// What the tests of this folder share: a session manager whose hooks write down what they were
// called for.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/session/session_manager.h"
#include "tests/support/status.h"
#include "tests/support/wait.h"

namespace lamina::testing {

class SessionRig {
 public:
  explicit SessionRig(const SessionOptions& options = {}, bool registers = false) {
    SessionHooks hooks;
    hooks.ended = [this](uint64_t key, const std::string& reason) {
      Note("ended " + std::to_string(key) + " " + reason);
    };
    if (registers) {
      hooks.register_host = [this](void*, size_t) {
        Note("register");
        return register_status;
      };
      hooks.unregister_host = [this](void*) { Note("unregister"); };
    }
    manager = SessionManager::Create(options, std::move(hooks));
  }

  // What the hooks were called for, in order.
  std::vector<std::string> events() {
    std::lock_guard<std::mutex> lock(mutex_);
    return events_;
  }

  absl::Status register_status;  // what registering answers

 private:
  void Note(std::string event) {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back(std::move(event));
  }

  std::mutex mutex_;
  std::vector<std::string> events_;  // guarded by mutex_

 public:
  std::unique_ptr<SessionManager> manager;  // last: its end calls the hooks
};

}  // namespace lamina::testing
