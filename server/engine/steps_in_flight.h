// Steps that the device still runs although their calls have returned: while one runs, the next is
// enqueued behind it, and the device never waits for its thread.
//
// What such a step uses stays where it is until the step is over: the marks that tell its times,
// and the memory that it reads and writes. It is over for everybody once somebody has waited for
// it: the one who is to answer its call, or the device's thread that needs its marks, or needs the
// device to be still.
//
// Threads: a step is waited for by any; the rest belongs to who has the device's turn.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"
#include "server/engine/device_queue.h"
#include "server/engine/engine.h"
#include "server/metrics/metrics.h"

namespace lamina {

inline double Seconds(DeviceQueue::Clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

// A step's marks on the device, from its first one on.
enum Mark : int { kBegin = 0, kInputDone, kComputeDone, kOutputDone, kNextInputDone };
inline constexpr int kStepMarks = 5;

// Seconds between the first four marks of a step, which have passed, into `times`.
absl::Status ReadMarks(Backend& backend, int first, StepTimes& times);
// Of a step that was enqueued behind others: it was in a queue on the device too.
void CountWait(double total_seconds, StepTimes& times);

class StepsInFlight {
 public:
  using Clock = DeviceQueue::Clock;
  // So many may have been left and not be over, or be about to begin.
  static constexpr int kMost = Backend::kMarks / kStepMarks;

  // What is known of a step when it has been enqueued.
  struct Parts {
    int marks = 0;
    StepTimes times;  // the queue's is known
    StepDirection direction = StepDirection::kForwardEval;
    StepSample sample;
    Clock::time_point admitted;
    CallTensor result;                                // where it writes, if anywhere; keeps nothing
    std::array<std::shared_ptr<const void>, 5> keep;  // memory that it uses
    bool reads_ahead = false;                         // kNextInputDone is recorded
  };
  class Step;

  // `ended` is told what came of a step on the device, and says what to answer of it. All outlive
  // this.
  StepsInFlight(Backend& backend, MetricSet& metrics,
                std::function<absl::Status(absl::Status)> ended);

  // Marks for a step that begins: the first's number. Where others have all there are, it waits for
  // the one that began first.
  int TakeMarks();
  // For a step that is about to be enqueued, so that nothing can fail once it is. What the sample's
  // texts say is copied.
  std::shared_ptr<Step> Prepare(const CallControl& control, const std::string& stack);
  // It has been enqueued, with the marks that were taken last. Throws nothing.
  void Leave(const std::shared_ptr<Step>& step, Parts parts, Left& left);
  // Whether every step that was left is over.
  bool empty() const;
  // Whether one that may still run writes to any of these bytes.
  bool Writes(const CallTensor& tensor) const;
  // Waits for all of them.
  void Settle();

 private:
  Backend& backend_;
  MetricSet& metrics_;
  const std::function<absl::Status(absl::Status)> ended_;
  // By their marks.
  struct Place {
    std::shared_ptr<Step> step;  // null: none was left with these
    uint64_t number = 0;         // in the order in which they were left
  };
  std::array<Place, kMost> places_;
  size_t last_ = 0;    // whose marks were taken last
  uint64_t left_ = 0;  // so far
};

}  // namespace lamina
