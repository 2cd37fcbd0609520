#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/engine/call_checks.h"
#include "server/engine/device_peak.h"
#include "server/engine/engine_impl.h"
#include "server/engine/status_macros.h"

namespace lamina {
namespace {

// Marks of a step on the backend's stream.
enum Mark : int { kBegin = 0, kInputDone = 1, kComputeDone = 2, kOutputDone = 3 };

double Seconds(std::chrono::steady_clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

TensorView View(const HostTensor& tensor) {
  return TensorView{tensor.data, tensor.dtype, tensor.shape};
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
// is in the type. The client may write to it meanwhile; then the count is what was met.
int64_t Padding(const HostTensor& mask) {
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

void EngineImpl::CountTensor(const HostTensor& tensor, TensorRole role) {
  if (!tensor || tensor.transport == TensorTransport::kNone) return;
  metrics_->TensorMoved(
      tensor.transport == TensorTransport::kMemfd ? TensorCarrier::kMemfd : TensorCarrier::kInline,
      role, tensor.bytes());
}

void EngineImpl::CountInline(size_t bytes) {
  metrics_->TensorMoved(TensorCarrier::kInline, TensorRole::kOutput, bytes);
}

absl::Status EngineImpl::ReadMarks(StepTimes& times) {
  ENGINE_ASSIGN_OR_RETURN(times.input_seconds, backend_->SecondsBetween(kBegin, kInputDone));
  ENGINE_ASSIGN_OR_RETURN(times.compute_seconds,
                          backend_->SecondsBetween(kInputDone, kComputeDone));
  ENGINE_ASSIGN_OR_RETURN(times.output_seconds,
                          backend_->SecondsBetween(kComputeDone, kOutputDone));
  return absl::OkStatus();
}

// --- Forward ---

absl::StatusOr<ForwardOutcome> EngineImpl::Forward(const ForwardCall& call,
                                                   const CallControl& control) {
  ForwardOutcome outcome;
  ENGINE_RETURN_IF_ERROR(
      Run(control, Admission::kCall, [&](Clock::time_point admitted) -> absl::Status {
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
  CallSize size;
  int64_t seq = 0;  // the longest sequence
  if (packed) {
    ENGINE_ASSIGN_OR_RETURN(
        const PackedSize lengths,
        CopyCumulativeLengths(call.cumulative_lengths, shape[0], config.max_seq_length, lengths_));
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
      ENGINE_RETURN_IF_ERROR(CopyLengths(call.lengths, shape[0], seq, lengths_));
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
  void* destination = call.output.data;
  if (destination == nullptr) {
    outcome.inline_output.resize(bytes);
    destination = outcome.inline_output.data();
  }

  const Shape mask_shape{size.sequences, seq};
  const Shape lengths_shape{static_cast<int64_t>(lengths_.size())};
  std::unique_ptr<Context> context;
  const absl::Status done = OnDevice([&]() -> absl::Status {
    const ProfilerRange range(*backend_, training ? "forward_training" : "forward_eval");
    ProfilerRange phase(*backend_, "input");
    ForwardArgs args{.layers = layers};
    if (packed) args.longest = seq;
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kBegin));
    if (backend_->info().host_memory) {
      args.input = View(call.input);
      if (call.mask) args.mask = View(call.mask).Reshaped(mask_shape);
      const TensorView lengths{lengths_.data(), DType::kI32, lengths_shape};
      if (call.lengths) args.lengths = lengths;
      if (packed) args.cu_seqlens = lengths;
      args.output = TensorView{destination, config.dtype, shape};
    } else {
      const auto stage = [&](Stack::Staging slot, DType dtype, const Shape& as, const void* from,
                             TensorView& view) -> absl::Status {
        ENGINE_ASSIGN_OR_RETURN(view, stack.StagingView(slot, dtype, as));
        return from == nullptr ? absl::OkStatus() : backend_->CopyIn(view.data, from, view.bytes());
      };
      using S = Stack::Staging;
      ENGINE_RETURN_IF_ERROR(stage(S::kInput, config.dtype, shape, call.input.data, args.input));
      if (call.mask)
        ENGINE_RETURN_IF_ERROR(stage(S::kMask, DType::kF32, mask_shape, call.mask.data, args.mask));
      if (call.lengths)
        ENGINE_RETURN_IF_ERROR(
            stage(S::kLengths, DType::kI32, lengths_shape, lengths_.data(), args.lengths));
      if (packed)
        ENGINE_RETURN_IF_ERROR(
            stage(S::kCuSeqlens, DType::kI32, lengths_shape, lengths_.data(), args.cu_seqlens));
      ENGINE_RETURN_IF_ERROR(stage(S::kOutput, config.dtype, shape, nullptr, args.output));
    }
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kInputDone));
    phase.Next("compute");
    if (training) {
      ENGINE_ASSIGN_OR_RETURN(context, stack.ForwardTraining(args));
    } else {
      ENGINE_RETURN_IF_ERROR(stack.ForwardEval(args));
    }
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kComputeDone));
    phase.Next("output");
    if (!backend_->info().host_memory)
      ENGINE_RETURN_IF_ERROR(backend_->CopyOut(destination, args.output.data, bytes));
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kOutputDone));
    if (call.mask) size.padding = Padding(call.mask);  // while a card still works
    ENGINE_RETURN_IF_ERROR(backend_->Synchronize());
    return ReadMarks(outcome.times);
  });
  if (absl::IsResourceExhausted(done)) metrics_->Rejected(Rejection::kContextMemory);
  ENGINE_RETURN_IF_ERROR(done);

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
  StepSample sample = Sample(outcome.times, admitted, size, entry->info, call.session, control);
  sample.flops = ForwardFlops(config, layers, size);
  metrics_->StepDone(training ? StepDirection::kForwardTraining : StepDirection::kForwardEval,
                     sample);
  return absl::OkStatus();
}

// --- Backward ---

absl::StatusOr<BackwardOutcome> EngineImpl::Backward(const BackwardCall& call,
                                                     const CallControl& control) {
  BackwardOutcome outcome;
  ENGINE_RETURN_IF_ERROR(
      Run(control, Admission::kCall, [&](Clock::time_point admitted) -> absl::Status {
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
  void* destination = call.input_grad.data;
  if (wanted && destination == nullptr) {
    outcome.inline_input_grad.resize(bytes);
    destination = outcome.inline_input_grad.data();
  }

  ENGINE_RETURN_IF_ERROR(OnDevice([&]() -> absl::Status {
    const ProfilerRange range(*backend_, "backward");
    ProfilerRange phase(*backend_, "input");
    TensorView output_grad = View(call.output_grad);
    TensorView input_grad;
    const bool direct = backend_->info().host_memory;
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kBegin));
    if (!direct) {
      ENGINE_ASSIGN_OR_RETURN(output_grad,
                              stack.StagingView(Stack::Staging::kInput, config.dtype, shape));
      ENGINE_RETURN_IF_ERROR(backend_->CopyIn(output_grad.data, call.output_grad.data, bytes));
    }
    if (wanted && direct) input_grad = TensorView{destination, config.dtype, shape};
    if (wanted && !direct) {
      ENGINE_ASSIGN_OR_RETURN(input_grad,
                              stack.StagingView(Stack::Staging::kOutput, config.dtype, shape));
    }
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kInputDone));
    phase.Next("compute");
    ENGINE_RETURN_IF_ERROR(stack.Backward(context, output_grad, input_grad));
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kComputeDone));
    phase.Next("output");
    if (wanted && !direct)
      ENGINE_RETURN_IF_ERROR(backend_->CopyOut(destination, input_grad.data, bytes));
    ENGINE_RETURN_IF_ERROR(backend_->RecordMark(kOutputDone));
    ENGINE_RETURN_IF_ERROR(backend_->Synchronize());
    return ReadMarks(outcome.times);
  }));

  const LayerRange layers = context.layers();
  const CallSize size = (*found)->size;
  contexts_.Erase(call.session, call.context_id);
  if (wanted) {
    outcome.shape = shape;
    outcome.dtype = config.dtype;
  }
  Publish(call.stack, *entry, call.session);
  CountTensor(call.output_grad, TensorRole::kInput);
  CountTensor(call.input_grad, TensorRole::kOutput);
  if (wanted && !call.input_grad) CountInline(bytes);
  StepSample sample = Sample(outcome.times, admitted, size, entry->info, call.session, control);
  sample.flops = 2 * ForwardFlops(config, layers, size);
  metrics_->StepDone(StepDirection::kBackward, sample);
  return absl::OkStatus();
}

absl::Status EngineImpl::ReleaseContext(const std::string& stack, SessionKey session,
                                        const std::string& context_id, const CallControl& control) {
  const CallControl own{.has_turn = control.has_turn};
  return Run(own, Admission::kRelease, [&](Clock::time_point) -> absl::Status {
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
      Run(control, Admission::kCall, [&](Clock::time_point admitted) -> absl::Status {
        const Clock::time_point begin = Clock::now();
        outcome.times.queue_seconds = Seconds(begin - admitted);
        ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
        const double scale_before = entry->stack->loss_scale();
        ENGINE_RETURN_IF_ERROR(OnDevice([&]() -> absl::Status {
          const ProfilerRange range(*backend_, "apply");
          ENGINE_ASSIGN_OR_RETURN(outcome.result, entry->stack->ApplyGradients(options));
          if (zero_gradients) ENGINE_RETURN_IF_ERROR(entry->stack->ZeroGradients());
          return backend_->Synchronize();
        }));
        outcome.times.compute_seconds = Seconds(Clock::now() - begin);
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
  return Run(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
    return OnDevice([&]() -> absl::Status {
      ENGINE_RETURN_IF_ERROR(entry->stack->ZeroGradients());
      return backend_->Synchronize();
    });
  });
}

}  // namespace lamina
