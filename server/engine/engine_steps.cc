#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/engine/call_checks.h"
#include "server/engine/device_peak.h"
#include "server/engine/engine_impl.h"
#include "server/engine/status_macros.h"
#include "server/engine/steps_in_flight.h"

namespace lamina {
namespace {

// As Backend::Allocate aligns, which is what kernels are written for.
constexpr size_t kKernelAlignment = 256;

// Whether kernels take the tensor where it is.
bool InPlace(const Backend& backend, const CallTensor& tensor) {
  if (backend.info().host_memory) return true;
  return tensor.memory == Memory::kDevice &&
         reinterpret_cast<uintptr_t>(tensor.data) % kKernelAlignment == 0;
}

// Whether the memory outlives the call for whoever keeps it. So does what is absent.
bool CanStay(const CallTensor& tensor) {
  return !tensor || tensor.transport == TensorTransport::kMemfd ||
         tensor.transport == TensorTransport::kDevice;
}

TensorCarrier CarrierOf(TensorTransport transport) {
  switch (transport) {
    case TensorTransport::kMemfd:
      return TensorCarrier::kMemfd;
    case TensorTransport::kDevice:
      return TensorCarrier::kDevice;
    default:
      return TensorCarrier::kInline;
  }
}

StepSample Sample(const StepTimes& times, DeviceQueue::Clock::time_point admitted,
                  const CallSize& size, const StackInfo& stack, SessionKey session,
                  const CallControl& control) {
  return StepSample{.samples = static_cast<double>(size.sequences),
                    .tokens = static_cast<double>(size.tokens),
                    .padding_tokens = static_cast<double>(size.padding),
                    .type = ComputeTypeOf(stack.config.dtype),
                    .queue_seconds = times.queue_seconds,
                    .input_seconds = times.input_seconds,
                    .compute_seconds = times.compute_seconds,
                    .output_seconds = times.output_seconds,
                    .total_seconds = Seconds(DeviceQueue::Clock::now() - admitted),
                    .stack = stack.name,
                    .session = session,
                    .request_id = control.request_id,
                    .trace_id = control.trace_id,
                    .request_item = control.request_item};
}

int64_t Padding(const std::vector<int32_t>& lengths, int64_t tokens) {
  return tokens - std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

// Of a mask that is added to scores: whoever hides a key writes -10000 or less, or what -infinity
// is in the type. The client may write to it meanwhile; then the count is what was met. Of a mask
// in the device's memory nothing is known.
int64_t Padding(const CallTensor& mask) {
  if (mask.memory != Memory::kHost) return 0;
  constexpr float kHidden = -1000;
  const float* const values = static_cast<const float*>(mask.data);
  const int64_t count = mask.shape.elements();
  int64_t hidden = 0;
  for (int64_t i = 0; i < count; ++i) hidden += values[i] <= kHidden ? 1 : 0;
  return hidden;
}

double ForwardFlops(const StackConfig& config, const LayerRange& layers, const CallSize& size) {
  return Stack::ForwardFlops(config, layers.end - layers.begin, size.tokens,
                             size.sum_of_squared_lengths);
}

}  // namespace

void EngineImpl::CountTensor(const CallTensor& tensor, TensorRole role) {
  if (!tensor || tensor.transport == TensorTransport::kNone) return;
  metrics_->TensorMoved(CarrierOf(tensor.transport), role, tensor.bytes());
}

void EngineImpl::CountInline(size_t bytes) {
  metrics_->TensorMoved(TensorCarrier::kInline, TensorRole::kOutput, bytes);
}

// A step of microseconds is over sooner than another thread hears of it.
constexpr std::chrono::microseconds kSoon{200};

absl::StatusOr<int> EngineImpl::NewMarks() {
  const int marks = in_flight_.TakeMarks();
  ENGINE_RETURN_IF_ERROR(CheckDevice());  // it may have failed in a step before
  return marks;
}

bool EngineImpl::IsLeft(int marks) const {
  if (!in_flight_.empty()) return true;  // it is behind others
  const Clock::time_point until = Clock::now() + kSoon;
  do {
    const absl::StatusOr<bool> passed = backend_->MarkPassed(marks + kOutputDone);
    if (!passed.ok() || *passed) return false;  // who waits for it says what is wrong
    if (queue_.TurnIsWanted()) return true;
  } while (Clock::now() < until);
  return true;
}

absl::Status EngineImpl::FinishStep(int marks, Clock::time_point admitted, StepTimes& times) {
  const bool behind_others = !in_flight_.empty();
  ENGINE_RETURN_IF_ERROR(backend_->Synchronize());
  ENGINE_RETURN_IF_ERROR(ReadMarks(*backend_, marks, times));
  if (behind_others) CountWait(Seconds(Clock::now() - admitted), times);
  return absl::OkStatus();
}

// --- tensors on their way ---

absl::StatusOr<TensorView> EngineImpl::InputView(Stack& stack, Stack::Staging slot,
                                                 const CallTensor& tensor, const Shape& shape) {
  if (InPlace(*backend_, tensor)) return TensorView{tensor.data, tensor.dtype, shape};
  ENGINE_ASSIGN_OR_RETURN(const TensorView view, stack.StagingView(slot, tensor.dtype, shape));
  // It may be a result that is still being copied out.
  if (in_flight_.Writes(tensor)) ENGINE_RETURN_IF_ERROR(backend_->JoinBehind());
  ENGINE_RETURN_IF_ERROR(tensor.memory == Memory::kDevice
                             ? backend_->CopyWithin(view.data, tensor.data, view.bytes())
                             : backend_->CopyIn(view.data, tensor.data, view.bytes()));
  return view;
}

absl::StatusOr<TensorView> EngineImpl::MainInputView(Stack& stack, const CallTensor& tensor,
                                                     const Shape& shape, uint64_t ticket) {
  const Ahead ahead = ahead_;
  if (ticket == 0 || ahead.ticket != ticket) {
    return InputView(stack, Stack::Staging::kInput, tensor, shape);
  }
  ahead_ = {};
  if (ahead.stack != &stack || ahead.bytes != tensor.bytes()) {
    return InputView(stack, Stack::Staging::kInput, tensor, shape);
  }
  // Brought to where it always is: a step that comes back has the same addresses.
  ENGINE_ASSIGN_OR_RETURN(const TensorView view,
                          stack.StagingView(Stack::Staging::kInput, tensor.dtype, shape));
  ENGINE_ASSIGN_OR_RETURN(const TensorView from,
                          stack.StagingView(Stack::Staging::kInputAhead, tensor.dtype, shape));
  ENGINE_RETURN_IF_ERROR(backend_->TakeAhead(view.data, from.data, view.bytes()));
  return view;
}

absl::StatusOr<bool> EngineImpl::CopyAhead(const NextInput& next, const CallTensor& output,
                                           int mark) {
  if (next.ticket == 0 || backend_->info().host_memory || Overlap(next.input, output) ||
      in_flight_.Writes(next.input))
    return false;
  // The call itself says what is wrong with it.
  const absl::StatusOr<Entry*> entry = Find(next.stack);
  if (!entry.ok()) return false;
  Stack& stack = *(*entry)->stack;
  const absl::StatusOr<TensorView> to =
      stack.StagingView(Stack::Staging::kInputAhead, next.input.dtype, next.input.shape);
  if (!to.ok()) return false;
  ahead_ = {.ticket = next.ticket, .stack = &stack, .bytes = to->bytes()};
  ENGINE_RETURN_IF_ERROR(backend_->CopyInAhead(to->data, next.input.data, to->bytes(), mark));
  return true;
}

absl::StatusOr<TensorView> EngineImpl::OutputView(Stack& stack, const CallTensor& target) {
  if (InPlace(*backend_, target)) return TensorView{target.data, target.dtype, target.shape};
  return stack.StagingView(Stack::Staging::kOutput, target.dtype, target.shape);
}

absl::Status EngineImpl::Deliver(Stack& stack, const TensorView& view, const CallTensor& target,
                                 const Fence& done, bool beside, int mark) {
  // Less is copied in no more time than it takes to do so beside.
  constexpr size_t kWorthIt = size_t{1} << 20;
  const bool moves = target && view.data != target.data;
  if (moves && target.memory == Memory::kHost && beside && !done && view.bytes() >= kWorthIt) {
    ENGINE_ASSIGN_OR_RETURN(
        const TensorView behind,
        stack.StagingView(Stack::Staging::kOutputBehind, view.dtype, view.shape));
    return backend_->CopyOutBehind(target.data, behind.data, view.data, view.bytes(), mark);
  }
  if (moves && target.memory == Memory::kDevice) {
    ENGINE_RETURN_IF_ERROR(backend_->CopyWithin(target.data, view.data, view.bytes()));
  } else if (moves) {
    ENGINE_RETURN_IF_ERROR(backend_->JoinBehind());  // one may be on its way to the same bytes
    ENGINE_RETURN_IF_ERROR(backend_->CopyOut(target.data, view.data, view.bytes()));
  }
  if (done) ENGINE_RETURN_IF_ERROR(backend_->Signal(done.at, done.value));
  return backend_->RecordMark(mark);
}

// --- Forward ---

absl::StatusOr<ForwardOutcome> EngineImpl::Forward(const ForwardCall& call,
                                                   const CallControl& control) {
  ForwardOutcome outcome;
  ENGINE_RETURN_IF_ERROR(
      RunBehind(control, Admission::kCall, [&](Clock::time_point admitted) -> absl::Status {
        return RunForward(call, control, admitted, outcome);
      }));
  return outcome;
}

absl::Status EngineImpl::RunForward(const ForwardCall& call, const CallControl& control,
                                    Clock::time_point admitted, ForwardOutcome& outcome) {
  outcome.times.queue_seconds = Seconds(Clock::now() - admitted);
  ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(call.stack));
  Stack& stack = *entry->stack;
  const StackConfig& config = stack.config();

  // Everything is checked before anything is changed.
  const LayerRange layers = call.layers.value_or(LayerRange{0, config.num_hidden_layers});
  ENGINE_RETURN_IF_ERROR(CheckLayers(layers, config));
  const bool training = call.training.value_or(config.training);
  if (training && !config.training)
    return absl::FailedPreconditionError(
        absl::StrCat("training: is asked for, and stack \"", call.stack,
                     "\" keeps no gradients; turn its training on first"));
  if (training && contexts_.ended(call.session))
    return absl::NotFoundError("mutation.session_id: the session has ended");
  if ((call.mask ? 1 : 0) + (call.lengths ? 1 : 0) + (call.cumulative_lengths ? 1 : 0) > 1)
    return absl::InvalidArgumentError(
        "mask, lengths, cumulative_lengths: more than one is given; give one of them");
  const bool packed{call.cumulative_lengths};
  ENGINE_RETURN_IF_ERROR(CheckActivation("input", call.input, config, packed));
  const Shape shape = call.input.shape;
  const auto copy_in = [&](void* to, const CallTensor& from, size_t bytes) -> absl::Status {
    if (from.memory == Memory::kHost) {
      std::memcpy(to, from.data, bytes);
      return absl::OkStatus();
    }
    return OnDevice([&]() -> absl::Status {
      ENGINE_RETURN_IF_ERROR(backend_->CopyOut(to, from.data, bytes));
      return backend_->Synchronize();
    });
  };
  // Lengths are read here and now.
  if (in_flight_.Writes(call.lengths) || in_flight_.Writes(call.cumulative_lengths))
    in_flight_.Settle();
  CallSize size;
  int64_t seq = 0;  // the longest sequence
  if (packed) {
    ENGINE_ASSIGN_OR_RETURN(const PackedSize lengths,
                            CopyCumulativeLengths(call.cumulative_lengths, shape[0],
                                                  config.max_seq_length, copy_in, lengths_));
    seq = lengths.longest;
    size = {.sequences = lengths.sequences,
            .tokens = shape[0],
            .sum_of_squared_lengths = lengths.sum_of_squared_lengths};
  } else {
    seq = shape[1];
    size = {.sequences = shape[0],
            .tokens = shape[0] * seq,
            .sum_of_squared_lengths = static_cast<double>(shape[0] * seq * seq)};
    if (call.mask) ENGINE_RETURN_IF_ERROR(CheckMask(call.mask, shape[0], seq));
    if (call.lengths) {
      ENGINE_RETURN_IF_ERROR(CopyLengths(call.lengths, shape[0], seq, copy_in, lengths_));
      size.padding = Padding(lengths_, size.tokens);
    }
  }
  const size_t bytes = call.input.bytes();
  ENGINE_RETURN_IF_ERROR(
      CheckTarget("output", call.output, bytes, SizeOf(config.dtype), options_.inline_cap_bytes));
  if (Overlap(call.output, call.input))
    return absl::InvalidArgumentError("output: overlaps input; give it bytes of its own");
  if (Overlap(call.output, call.mask))
    return absl::InvalidArgumentError("output: overlaps mask; give it bytes of its own");
  if (Overlap(call.output, call.lengths))
    return absl::InvalidArgumentError("output: overlaps lengths; give it bytes of its own");
  if (Overlap(call.output, call.cumulative_lengths))
    return absl::InvalidArgumentError(
        "output: overlaps cumulative_lengths; give it bytes of its own");
  CallTensor output = call.output;
  if (!output) {
    outcome.inline_output.resize(bytes);
    output = {.data = outcome.inline_output.data(), .dtype = config.dtype, .shape = shape};
  }

  const Shape mask_shape{size.sequences, seq};
  const Shape lengths_shape{static_cast<int64_t>(lengths_.size())};
  std::unique_ptr<Context> context;
  std::shared_ptr<StepsInFlight::Step> step;
  if (control.left != nullptr && WorksBeside() && CanStay(call.input) && call.output &&
      CanStay(call.output) && CanStay(call.mask))
    step = in_flight_.Prepare(control, call.stack);
  bool is_left = false, copies_ahead = false;
  ENGINE_ASSIGN_OR_RETURN(const int marks, NewMarks());
  const absl::Status done = OnDevice([&]() -> absl::Status {
    const ProfilerRange range(*backend_, training ? "forward_training" : "forward_eval");
    ProfilerRange phase(*backend_, "input");
    ForwardArgs args{.layers = layers};
    if (packed) args.longest = seq;
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kBegin));
    using S = Stack::Staging;
    ENGINE_ASSIGN_OR_RETURN(args.input, MainInputView(stack, call.input, shape, control.ticket));
    if (call.mask) {
      ENGINE_ASSIGN_OR_RETURN(args.mask, InputView(stack, S::kMask, call.mask, mask_shape));
    }
    // The copy that was checked, not what the client may have changed since.
    const CallTensor lengths{.data = lengths_.data(), .dtype = DType::kI32, .shape = lengths_shape};
    if (call.lengths) {
      ENGINE_ASSIGN_OR_RETURN(args.lengths, InputView(stack, S::kLengths, lengths, lengths_shape));
    }
    if (packed) {
      ENGINE_ASSIGN_OR_RETURN(args.cu_seqlens,
                              InputView(stack, S::kCuSeqlens, lengths, lengths_shape));
    }
    ENGINE_ASSIGN_OR_RETURN(args.output, OutputView(stack, output));
    ENGINE_ASSIGN_OR_RETURN(copies_ahead, CopyAhead(control.next, output, marks + kNextInputDone));
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kInputDone));
    phase.Next("compute");
    if (training) {
      ENGINE_ASSIGN_OR_RETURN(context, stack.ForwardTraining(args));
    } else {
      ENGINE_RETURN_IF_ERROR(stack.ForwardEval(args));
    }
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kComputeDone));
    phase.Next("output");
    ENGINE_RETURN_IF_ERROR(
        Deliver(stack, args.output, output, call.done, step != nullptr, marks + kOutputDone));
    if (call.mask) size.padding = Padding(call.mask);  // while a card still works
    is_left = step != nullptr && IsLeft(marks);
    return is_left ? absl::OkStatus() : FinishStep(marks, admitted, outcome.times);
  });
  if (absl::IsResourceExhausted(done)) metrics_->Rejected(Rejection::kContextMemory);
  ENGINE_RETURN_IF_ERROR(done);

  const StepDirection direction =
      training ? StepDirection::kForwardTraining : StepDirection::kForwardEval;
  StepSample sample = Sample(outcome.times, admitted, size, entry->info, call.session, control);
  sample.flops = ForwardFlops(config, layers, size);
  if (is_left) {
    in_flight_.Leave(step,
                     {.marks = marks,
                      .times = outcome.times,
                      .direction = direction,
                      .sample = sample,
                      .admitted = admitted,
                      .result = call.output,
                      .keep = {call.input.keep, call.mask.keep, call.output.keep, call.done.keep,
                               control.next.input.keep},
                      .reads_ahead = copies_ahead},
                     *control.left);
  }
  if (training)
    outcome.context_id = contexts_.Add(call.session, call.stack, std::move(context), size);
  outcome.output_shape = shape;
  outcome.output_dtype = config.dtype;
  outcome.fused_attention = stack.FusedAttention(seq);
  Publish(call.stack, *entry, call.session);
  CountTensor(call.input, TensorRole::kInput);
  CountTensor(call.mask, TensorRole::kInput);
  CountTensor(call.lengths, TensorRole::kInput);
  CountTensor(call.cumulative_lengths, TensorRole::kInput);
  CountTensor(call.output, TensorRole::kOutput);
  if (!call.output) CountInline(bytes);
  if (!is_left) metrics_->StepDone(direction, sample);
  return absl::OkStatus();
}

// --- Backward ---

absl::StatusOr<BackwardOutcome> EngineImpl::Backward(const BackwardCall& call,
                                                     const CallControl& control) {
  BackwardOutcome outcome;
  ENGINE_RETURN_IF_ERROR(
      RunBehind(control, Admission::kCall, [&](Clock::time_point admitted) -> absl::Status {
        return RunBackward(call, control, admitted, outcome);
      }));
  return outcome;
}

absl::Status EngineImpl::RunBackward(const BackwardCall& call, const CallControl& control,
                                     Clock::time_point admitted, BackwardOutcome& outcome) {
  outcome.times.queue_seconds = Seconds(Clock::now() - admitted);
  // The context first: of a deleted stack it says more than the stack's absence.
  const absl::StatusOr<const ContextTable::Record*> found =
      contexts_.Find(call.session, call.stack, call.context_id);
  if (absl::IsFailedPrecondition(found.status()) && !call.context_id.empty()) return found.status();
  ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(call.stack));
  ENGINE_RETURN_IF_ERROR(found.status());
  Context& context = *(*found)->context;
  Stack& stack = *entry->stack;
  const StackConfig& config = stack.config();

  const Shape shape = context.activation_shape();
  ENGINE_RETURN_IF_ERROR(CheckTensor("output_grad", call.output_grad, config.dtype, shape));
  const size_t bytes = call.output_grad.bytes();
  const bool wanted = call.want_input_grad || call.input_grad;
  if (wanted)
    ENGINE_RETURN_IF_ERROR(CheckTarget("input_grad", call.input_grad, bytes, SizeOf(config.dtype),
                                       options_.inline_cap_bytes));
  if (Overlap(call.input_grad, call.output_grad))
    return absl::InvalidArgumentError("input_grad: overlaps output_grad; give it bytes of its own");
  CallTensor target = call.input_grad;
  if (wanted && !target) {
    outcome.inline_input_grad.resize(bytes);
    target = {.data = outcome.inline_input_grad.data(), .dtype = config.dtype, .shape = shape};
  }

  std::shared_ptr<StepsInFlight::Step> step;
  if (control.left != nullptr && WorksBeside() && CanStay(call.output_grad) &&
      (!wanted || call.input_grad) && CanStay(call.input_grad))
    step = in_flight_.Prepare(control, call.stack);
  bool is_left = false, copies_ahead = false;
  ENGINE_ASSIGN_OR_RETURN(const int marks, NewMarks());
  ENGINE_RETURN_IF_ERROR(OnDevice([&]() -> absl::Status {
    const ProfilerRange range(*backend_, "backward");
    ProfilerRange phase(*backend_, "input");
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kBegin));
    ENGINE_ASSIGN_OR_RETURN(const TensorView output_grad,
                            MainInputView(stack, call.output_grad, shape, control.ticket));
    TensorView input_grad;
    if (wanted) {
      ENGINE_ASSIGN_OR_RETURN(input_grad, OutputView(stack, target));
    }
    ENGINE_ASSIGN_OR_RETURN(copies_ahead, CopyAhead(control.next, target, marks + kNextInputDone));
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kInputDone));
    phase.Next("compute");
    ENGINE_RETURN_IF_ERROR(stack.Backward(context, output_grad, input_grad));
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kComputeDone));
    phase.Next("output");
    ENGINE_RETURN_IF_ERROR(
        Deliver(stack, input_grad, target, call.done, step != nullptr, marks + kOutputDone));
    is_left = step != nullptr && IsLeft(marks);
    return is_left ? absl::OkStatus() : FinishStep(marks, admitted, outcome.times);
  }));

  const LayerRange layers = context.layers();
  const CallSize size = (*found)->size;
  StepSample sample = Sample(outcome.times, admitted, size, entry->info, call.session, control);
  sample.flops = 2 * ForwardFlops(config, layers, size);
  if (is_left) {
    in_flight_.Leave(step,
                     {.marks = marks,
                      .times = outcome.times,
                      .direction = StepDirection::kBackward,
                      .sample = sample,
                      .admitted = admitted,
                      .result = call.input_grad,
                      .keep = {call.output_grad.keep, call.input_grad.keep, call.done.keep,
                               control.next.input.keep},
                      .reads_ahead = copies_ahead},
                     *control.left);
  }
  contexts_.Erase(call.session, call.context_id);  // what is enqueued next may have its memory
  if (wanted) {
    outcome.shape = shape;
    outcome.dtype = config.dtype;
  }
  Publish(call.stack, *entry, call.session);
  CountTensor(call.output_grad, TensorRole::kInput);
  CountTensor(call.input_grad, TensorRole::kOutput);
  if (wanted && !call.input_grad) CountInline(bytes);
  if (!is_left) metrics_->StepDone(StepDirection::kBackward, sample);
  return absl::OkStatus();
}

absl::Status EngineImpl::ReleaseContext(const std::string& stack, SessionKey session,
                                        const std::string& context_id, const CallControl& control) {
  const CallControl own{.has_turn = control.has_turn};
  return RunBehind(own, Admission::kRelease, [&](Clock::time_point) -> absl::Status {
    const absl::Status found = contexts_.Find(session, stack, context_id).status();
    if (absl::IsFailedPrecondition(found) && !context_id.empty()) return found;
    ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
    ENGINE_RETURN_IF_ERROR(found);
    contexts_.Erase(session, context_id);
    Publish(stack, *entry, session);
    return absl::OkStatus();
  });
}

// --- the optimizer ---

absl::StatusOr<ApplyOutcome> EngineImpl::ApplyGradients(const std::string& stack,
                                                        const OptimizerOptions& options,
                                                        bool zero_gradients,
                                                        const CallControl& control) {
  ApplyOutcome outcome;
  ENGINE_RETURN_IF_ERROR(
      RunBehind(control, Admission::kCall, [&](Clock::time_point admitted) -> absl::Status {
        outcome.times.queue_seconds = Seconds(Clock::now() - admitted);
        ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
        const double scale_before = entry->stack->loss_scale();
        const bool behind_others = !in_flight_.empty();
        ENGINE_ASSIGN_OR_RETURN(const int marks, NewMarks());
        ENGINE_RETURN_IF_ERROR(OnDevice([&]() -> absl::Status {
          const ProfilerRange range(*backend_, "apply");
          ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kBegin));
          ENGINE_ASSIGN_OR_RETURN(outcome.result, entry->stack->ApplyGradients(options));
          if (zero_gradients) ENGINE_RETURN_IF_ERROR(entry->stack->ZeroGradients());
          ENGINE_RETURN_IF_ERROR(backend_->RecordMark(marks + kComputeDone));
          ENGINE_RETURN_IF_ERROR(backend_->Synchronize());
          ENGINE_ASSIGN_OR_RETURN(outcome.times.compute_seconds,
                                  backend_->SecondsBetween(marks + kBegin, marks + kComputeDone));
          return absl::OkStatus();
        }));
        if (behind_others) CountWait(Seconds(Clock::now() - admitted), outcome.times);
        Publish(stack, *entry);
        const ApplyResult& result = outcome.result;
        metrics_->GradientsApplied({.skipped = !result.applied,
                                    .norm = result.grad_norm,
                                    .next_loss_scale = result.next_loss_scale,
                                    .scale_grew = entry->stack->loss_scale() > scale_before,
                                    .scale_backed_off = entry->stack->loss_scale() < scale_before});
        metrics_->StepDone(StepDirection::kApply,
                           Sample(outcome.times, admitted, {}, entry->info, 0, control));
        return absl::OkStatus();
      }));
  return outcome;
}

absl::Status EngineImpl::ZeroGradients(const std::string& stack, const CallControl& control) {
  return RunBehind(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
    return OnDevice([&]() -> absl::Status {
      ENGINE_RETURN_IF_ERROR(entry->stack->ZeroGradients());
      return backend_->Synchronize();
    });
  });
}

}  // namespace lamina
