#include "server/service/layer_calls.h"

#include <utility>

#include "server/service/calls.h"
#include "server/service/conversions.h"
#include "server/service/tensors.h"

namespace lamina {
namespace {

absl::StatusOr<ForwardCall> ToCall(const v1::ForwardRequest& request, Session& session,
                                   size_t inline_cap) {
  ForwardCall call;
  call.stack = request.stack();
  call.session = session.key();
  if (request.has_layers())
    call.layers = LayerRange{request.layers().begin(), request.layers().end()};
  auto input = ResolveInput("input", request.input(), inline_cap, session);
  if (!input.ok()) return input.status();
  call.input = *std::move(input);
  if (request.has_mask()) {
    auto mask = ResolveInput("mask", request.mask(), inline_cap, session);
    if (!mask.ok()) return mask.status();
    call.mask = *std::move(mask);
  } else if (request.has_lengths()) {
    auto lengths = ResolveInput("lengths", request.lengths(), inline_cap, session);
    if (!lengths.ok()) return lengths.status();
    call.lengths = *std::move(lengths);
  } else if (request.has_cumulative_lengths()) {
    auto lengths =
        ResolveInput("cumulative_lengths", request.cumulative_lengths(), inline_cap, session);
    if (!lengths.ok()) return lengths.status();
    call.cumulative_lengths = *std::move(lengths);
  }
  auto output = ResolveTarget("output", request.output(), call.input.dtype, call.input.shape,
                              inline_cap, session);
  if (!output.ok()) return output.status();
  call.output = *std::move(output);
  auto done = ResolveFence("done", request.has_done(), request.done(), session);
  if (!done.ok()) return done.status();
  call.done = *std::move(done);
  return call;
}

absl::Status RunForward(SharedState& state, const v1::ForwardRequest& request, Session& session,
                        bool training, const CallControl& given, v1::ForwardResponse* response) {
  auto call = ToCall(request, session, state.engine.options().inline_cap_bytes);
  if (!call.ok()) return call.status();
  call->training = training;
  const auto control = WithReady(request, given, session);
  if (!control.ok()) return control.status();
  auto outcome = state.engine.Forward(*call, *control);
  if (!outcome.ok()) return outcome.status();
  FillResult(request.output(), call->output, std::move(outcome->inline_output),
             response->mutable_output());
  response->set_context_id(outcome->context_id);
  *response->mutable_timing() = ToProto(outcome->times);
  response->set_input_transport(ToProto(call->input.transport));
  response->set_output_transport(ToProto(call->output.transport));
  response->set_attention_path(AttentionPathOf(*outcome));
  return absl::OkStatus();
}

absl::Status CheckAndRunForward(SharedState& state, const v1::ForwardRequest& request,
                                const CallControl& control, v1::ForwardResponse* response) {
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  const auto trains = [&]() -> absl::StatusOr<bool> {
    if (request.has_training()) return request.training();
    auto info = state.engine.GetStack(request.stack());
    if (!info.ok()) return info.status();
    return info->config.training;
  };
  if (!request.has_mutation()) {
    const auto training = trains();
    if (!training.ok()) return training.status();
    if (*training) return MutatingSession(state, false, request.mutation(), control).status();
    return RunForward(state, request, **session, false, control, response);
  }
  if (request.mutation().session_id() != request.session_id()) {
    return absl::InvalidArgumentError("mutation.session_id: must be the same as session_id");
  }
  auto mutating = MutatingSession(state, true, request.mutation(), control);
  if (!mutating.ok()) return mutating.status();
  // What the stack says is asked inside: a repeat is answered as at first, whatever became of it.
  return RunOnce(state, **session, request, control, response, [&]() -> absl::Status {
    const auto training = trains();
    if (!training.ok()) return training.status();
    if (!*training) {
      return absl::InvalidArgumentError(
          "mutation: an evaluation changes nothing and takes no sequence; leave it out or set "
          "training");
    }
    return RunForward(state, request, **session, true, control, response);
  });
}

absl::Status RunBackward(SharedState& state, const v1::BackwardRequest& request, Session& session,
                         const CallControl& given, v1::BackwardResponse* response) {
  const size_t inline_cap = state.engine.options().inline_cap_bytes;
  BackwardCall call;
  call.stack = request.stack();
  call.session = session.key();
  call.context_id = request.context_id();
  call.want_input_grad = request.has_input_grad();
  auto output_grad = ResolveInput("output_grad", request.output_grad(), inline_cap, session);
  if (!output_grad.ok()) return output_grad.status();
  call.output_grad = *std::move(output_grad);
  if (call.want_input_grad) {
    auto target = ResolveTarget("input_grad", request.input_grad(), call.output_grad.dtype,
                                call.output_grad.shape, inline_cap, session);
    if (!target.ok()) return target.status();
    call.input_grad = *std::move(target);
  }
  auto done = ResolveFence("done", request.has_done(), request.done(), session);
  if (!done.ok()) return done.status();
  call.done = *std::move(done);
  const auto control = WithReady(request, given, session);
  if (!control.ok()) return control.status();
  auto outcome = state.engine.Backward(call, *control);
  if (!outcome.ok()) return outcome.status();
  if (call.want_input_grad) {
    FillResult(request.input_grad(), call.input_grad, std::move(outcome->inline_input_grad),
               response->mutable_input_grad());
    response->set_output_transport(ToProto(call.input_grad.transport));
  }
  *response->mutable_timing() = ToProto(outcome->times);
  response->set_input_transport(ToProto(call.output_grad.transport));
  return absl::OkStatus();
}

absl::Status RunApply(SharedState& state, const v1::ApplyGradientsRequest& request,
                      const CallControl& control, v1::ApplyGradientsResponse* response) {
  const auto options = FromProto(request);
  if (!options.ok()) return options.status();
  auto outcome =
      state.engine.ApplyGradients(request.stack(), *options, request.zero_gradients(), control);
  if (!outcome.ok()) return outcome.status();
  response->set_applied(outcome->result.applied);
  response->set_grad_norm(outcome->result.grad_norm);
  response->set_step(outcome->result.step);
  response->set_loss_scale(outcome->result.loss_scale);
  response->set_next_loss_scale(outcome->result.next_loss_scale);
  *response->mutable_timing() = ToProto(outcome->times);
  return absl::OkStatus();
}

// Runs a mutation once, for the session that it names.
template <typename Request, typename Response, typename Run>
absl::Status Mutate(SharedState& state, const Request& request, const CallControl& control,
                    Response* response, Run run) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto session = MutatingSession(state, request.has_mutation(), request.mutation(), control);
  if (!session.ok()) return session.status();
  return RunOnce(state, **session, request, control, response, [&] { return run(**session); });
}

}  // namespace

absl::Status RunCall(SharedState& state, const v1::ForwardRequest& request,
                     const CallControl& control, v1::ForwardResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  return CheckAndRunForward(state, request, control, response);
}

absl::Status RunCall(SharedState& state, const v1::BackwardRequest& request,
                     const CallControl& control, v1::BackwardResponse* response) {
  return Mutate(state, request, control, response, [&](Session& session) {
    return RunBackward(state, request, session, control, response);
  });
}

absl::Status RunCall(SharedState& state, const v1::ApplyGradientsRequest& request,
                     const CallControl& control, v1::ApplyGradientsResponse* response) {
  return Mutate(state, request, control, response,
                [&](Session&) { return RunApply(state, request, control, response); });
}

absl::Status RunCall(SharedState& state, const v1::ZeroGradientsRequest& request,
                     const CallControl& control, v1::ZeroGradientsResponse* response) {
  return Mutate(state, request, control, response,
                [&](Session&) { return state.engine.ZeroGradients(request.stack(), control); });
}

absl::Status RunCall(SharedState& state, const v1::ReleaseContextRequest& request,
                     const CallControl& control, v1::ReleaseContextResponse*) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  return state.engine.ReleaseContext(request.stack(), (*session)->key(), request.context_id(),
                                     control);
}

// --- at once ---

namespace {

// To read or write more takes longer than a change of threads.
constexpr size_t kShort = 4096;

double Elements(const v1::Tensor& tensor) {
  double elements = 1;
  for (const int64_t extent : tensor.shape()) elements *= static_cast<double>(extent);
  return elements;
}

// Whether a result of so many elements leaves the answer short.
bool LeavesShort(const v1::TensorTarget& target, double elements) {
  return target.has_slice() || elements * sizeof(float) <= kShort;
}

template <typename Request, typename Response>
bool TryIt(SharedState& state, const Request& request, const std::string& session_id, Effort effort,
           double elements, CallControl control, Response* response, absl::Status* status) {
  if (!IsShort(request)) return false;
  if (!state.engine.IsLight(request.stack(), effort, elements)) return false;
  // Whoever lets go of an ended session last waits for the device: that must not be while the turn
  // is held.
  const auto session = state.sessions.Find(session_id, control.caller);
  if (!session.ok()) return false;
  const DeviceTurn turn = state.engine.TryTurn();
  if (!turn) return false;
  control.has_turn = true;
  *status = Guarded([&] { return RunCall(state, request, control, response); });
  if (!IsNotNow(*status)) return true;
  response->Clear();
  return false;
}

}  // namespace

bool IsShort(const v1::ForwardRequest& request) {
  return request.ByteSizeLong() <= kShort &&
         LeavesShort(request.output(), Elements(request.input()));
}

bool IsShort(const v1::BackwardRequest& request) {
  return request.ByteSizeLong() <= kShort &&
         (!request.has_input_grad() ||
          LeavesShort(request.input_grad(), Elements(request.output_grad())));
}

bool IsShort(const v1::ApplyGradientsRequest& request) { return request.ByteSizeLong() <= kShort; }
bool IsShort(const v1::ZeroGradientsRequest& request) { return request.ByteSizeLong() <= kShort; }
bool IsShort(const v1::ReleaseContextRequest& request) { return request.ByteSizeLong() <= kShort; }

bool TryCall(SharedState& state, const v1::ForwardRequest& request, CallControl control,
             v1::ForwardResponse* response, absl::Status* status) {
  return TryIt(state, request, request.session_id(), Effort::kForward, Elements(request.input()),
               std::move(control), response, status);
}

bool TryCall(SharedState& state, const v1::BackwardRequest& request, CallControl control,
             v1::BackwardResponse* response, absl::Status* status) {
  return TryIt(state, request, request.mutation().session_id(), Effort::kBackward,
               Elements(request.output_grad()), std::move(control), response, status);
}

bool TryCall(SharedState& state, const v1::ApplyGradientsRequest& request, CallControl control,
             v1::ApplyGradientsResponse* response, absl::Status* status) {
  return TryIt(state, request, request.mutation().session_id(), Effort::kParameters, 0,
               std::move(control), response, status);
}

bool TryCall(SharedState& state, const v1::ZeroGradientsRequest& request, CallControl control,
             v1::ZeroGradientsResponse* response, absl::Status* status) {
  return TryIt(state, request, request.mutation().session_id(), Effort::kParameters, 0,
               std::move(control), response, status);
}

bool TryCall(SharedState& state, const v1::ReleaseContextRequest& request, CallControl control,
             v1::ReleaseContextResponse* response, absl::Status* status) {
  return TryIt(state, request, request.session_id(), Effort::kNone, 0, std::move(control), response,
               status);
}

}  // namespace lamina
