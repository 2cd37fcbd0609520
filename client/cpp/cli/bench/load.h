// Several clients that drive one stack at once, and what each call cost them.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "cli/bench/samples.h"
#include "lamina/client.h"

namespace lamina::cli {

struct LoadOptions {
  std::string stack;
  client::TransportPolicy transport = client::TransportPolicy::kRegions;
  client::Shape shape;    // [B, S, H]
  bool train = true;      // a step is a Forward and its Backward; else an evaluation
  int concurrency = 1;    // clients, each with a thread, a connection and a session of its own
  bool pipeline = false;  // calls on an Execute stream, else unary ones
  int depth = 32;         // of a pipeline: calls under way at most, 1..63
  double seconds = 5;
  int64_t warmup = 3;  // steps of each client that are not counted, before the time begins
  double rate = 0;     // open loop: steps a second of all clients together; 0: closed loop
  uint64_t seed = 1;   // of the arrivals
  std::chrono::milliseconds timeout{0};  // of a call; 0: none
};

struct LoadResult {
  Samples forward, backward;
  // From when a step was to begin until its last call was answered; whole ones alone.
  Samples step;
  double seconds = 0;  // from the start until the last answer, and at least LoadOptions::seconds
  int64_t not_started = 0;  // open loop: steps that found no free client before the time was over
};

using ConnectFunction = std::function<absl::StatusOr<client::Client>()>;

// Generates the load. Statuses that a busy daemon answers (RESOURCE_EXHAUSTED: queue or contexts;
// DEADLINE_EXCEEDED; ABORTED; CANCELLED; and FAILED_PRECONDITION of what a pipeline had sent behind
// such a call) are counted. Any other ends the run and is returned. Gradients are zeroed at the
// end.
absl::StatusOr<LoadResult> GenerateLoad(const ConnectFunction& connect, const LoadOptions& options);

}  // namespace lamina::cli
