#include "server/engine/steps_in_flight.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "server/engine/call_checks.h"
#include "server/engine/status_macros.h"

namespace lamina {

absl::Status ReadMarks(Backend& backend, int first, StepTimes& times) {
  ENGINE_ASSIGN_OR_RETURN(times.input_seconds,
                          backend.SecondsBetween(first + kBegin, first + kInputDone));
  ENGINE_ASSIGN_OR_RETURN(times.compute_seconds,
                          backend.SecondsBetween(first + kInputDone, first + kComputeDone));
  ENGINE_ASSIGN_OR_RETURN(times.output_seconds,
                          backend.SecondsBetween(first + kComputeDone, first + kOutputDone));
  return absl::OkStatus();
}

void CountWait(double total_seconds, StepTimes& times) {
  times.queue_seconds =
      std::max(times.queue_seconds,
               total_seconds - times.input_seconds - times.compute_seconds - times.output_seconds);
}

class StepsInFlight::Step final : public RunningStep {
 public:
  Step(StepsInFlight& steps, const CallControl& control, const std::string& stack)
      : steps_(steps),
        stack_(stack),
        request_id_(control.request_id),
        trace_id_(control.trace_id) {}
  // Nobody may take its memory for free while the device uses it.
  ~Step() override { (void)Wait(); }

  void Begin(Parts parts) {
    std::lock_guard<std::mutex> lock(mutex_);
    parts_ = std::move(parts);
    parts_.sample.stack = stack_;
    parts_.sample.request_id = request_id_;
    parts_.sample.trace_id = trace_id_;
    over_.store(false, std::memory_order_release);
  }

  absl::StatusOr<StepTimes> Wait() override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!over()) {
      status_ = steps_.ended_(Finish());
      if (status_.ok()) Observe();
      parts_.keep = {};
      over_.store(true, std::memory_order_release);
    }
    if (!status_.ok()) return status_;
    return parts_.times;
  }

  bool over() const { return over_.load(std::memory_order_acquire); }
  const CallTensor& result() const { return parts_.result; }  // for who has the turn

 private:
  absl::Status Finish() {
    Backend& backend = steps_.backend_;
    ENGINE_RETURN_IF_ERROR(backend.WaitMark(parts_.marks + kOutputDone));
    // Its memory is another call's: that may be refused, and answered behind this one.
    if (parts_.reads_ahead) ENGINE_RETURN_IF_ERROR(backend.WaitMark(parts_.marks + kNextInputDone));
    return ReadMarks(backend, parts_.marks, parts_.times);
  }

  void Observe() {
    StepTimes& times = parts_.times;
    StepSample& sample = parts_.sample;
    sample.total_seconds = Seconds(Clock::now() - parts_.admitted);
    CountWait(sample.total_seconds, times);
    sample.queue_seconds = times.queue_seconds;
    sample.input_seconds = times.input_seconds;
    sample.compute_seconds = times.compute_seconds;
    sample.output_seconds = times.output_seconds;
    steps_.metrics_.StepDone(parts_.direction, sample);
  }

  StepsInFlight& steps_;
  const std::string stack_, request_id_, trace_id_;
  std::mutex mutex_;
  Parts parts_;                   // guarded by mutex_; `result` is changed no more
  absl::Status status_;           // guarded by mutex_
  std::atomic<bool> over_{true};  // or not begun
};

StepsInFlight::StepsInFlight(Backend& backend, MetricSet& metrics,
                             std::function<absl::Status(absl::Status)> ended)
    : backend_(backend), metrics_(metrics), ended_(std::move(ended)) {}

int StepsInFlight::TakeMarks() {
  last_ = 0;
  for (size_t i = 0; i < places_.size(); ++i) {
    if (places_[i].step == nullptr || places_[i].step->over()) {
      last_ = i;
      break;
    }
    if (places_[i].number < places_[last_].number) last_ = i;
  }
  Place& place = places_[last_];
  if (place.step != nullptr) (void)place.step->Wait();  // whoever answers its call hears the same
  place.step.reset();
  return static_cast<int>(last_) * kStepMarks;
}

std::shared_ptr<StepsInFlight::Step> StepsInFlight::Prepare(const CallControl& control,
                                                            const std::string& stack) {
  return std::make_shared<Step>(*this, control, stack);
}

void StepsInFlight::Leave(const std::shared_ptr<Step>& step, Parts parts, Left& left) {
  parts.result.keep = nullptr;
  step->Begin(std::move(parts));
  places_[last_] = {.step = step, .number = ++left_};
  left.step = step;
}

bool StepsInFlight::empty() const {
  return std::all_of(places_.begin(), places_.end(), [](const Place& place) {
    return place.step == nullptr || place.step->over();
  });
}

bool StepsInFlight::Writes(const CallTensor& tensor) const {
  return std::any_of(places_.begin(), places_.end(), [&](const Place& place) {
    return place.step != nullptr && !place.step->over() && Overlap(place.step->result(), tensor);
  });
}

void StepsInFlight::Settle() {
  for (Place& place : places_) {
    if (place.step != nullptr) (void)place.step->Wait();
    place.step.reset();
  }
}

}  // namespace lamina
