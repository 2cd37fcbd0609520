// LayerService's calls one by one: what they answer, and what they refuse.
#include <cmath>
#include <functional>
#include <limits>

#include "cli/conformance/busy.h"
#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

constexpr double kNoNumber = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinite = std::numeric_limits<double>::infinity();

template <class Request>
struct BadRequest {
  const char* what;
  Code code;
  const char* word;  // that the message must have
  std::function<void(Request*)> spoil;
};

// Each of them is refused, and nothing has changed.
template <class Request>
void RefusesEach(const Rig& rig, const Request& good, const std::vector<BadRequest<Request>>& all) {
  const StackState before = rig.State();
  Cases cases;
  for (const auto& bad : all) {
    cases.Try(bad.what, [&] {
      Request request = good;
      bad.spoil(&request);
      rig.daemon.Refuses(request, bad.code, {bad.word});
      rig.RequireUnchanged(before, "the refused call");
    });
  }
  cases.Done();
}

void SetShape(v1::Tensor* tensor, const std::vector<int64_t>& shape) {
  tensor->clear_shape();
  for (const int64_t extent : shape) tensor->add_shape(extent);
}

v1::Tensor Zeros(const std::vector<int64_t>& shape) {
  return Inline(shape, Floats(static_cast<size_t>(Elements(shape)), 0.0f));
}

v1::Tensor Integers(const std::vector<int32_t>& values) {
  return Inline({static_cast<int64_t>(values.size())}, values);
}

void EvaluatesWithoutTrace(Daemon& daemon) {
  const Rig rig(daemon);
  const StackState before = rig.State();
  const auto answer = daemon.Ok(rig.Evaluate());
  const auto& shape = answer.output().shape();
  Require(std::vector<int64_t>(shape.begin(), shape.end()) == rig.shape,
          "the output has another shape than the input");
  for (const float value : FloatsOf(answer.output()))
    Require(std::isfinite(value), "the output has a value that is not finite");
  Require(answer.context_id().empty(), "an evaluation has a context_id");
  Require(answer.input_transport() == v1::TRANSPORT_INLINE &&
              answer.output_transport() == v1::TRANSPORT_INLINE,
          "inline tensors are not reported as INLINE");
  Require(answer.attention_path() != v1::ATTENTION_PATH_UNSPECIFIED, "attention_path is not set");
  const v1::StepTiming& timing = answer.timing();
  Require(timing.compute_seconds() > 0 && timing.queue_seconds() >= 0 &&
              timing.input_seconds() >= 0 && timing.output_seconds() >= 0,
          "the timing has no compute_seconds or a time below 0");
  Require(Bytes(daemon.Ok(rig.Evaluate()).output()) == Bytes(answer.output()),
          "the same evaluation again has another output");
  rig.RequireUnchanged(before, "an evaluation");
}

void TrainsWithContext(Daemon& daemon) {
  Rig rig(daemon);
  const auto answer = rig.Mutate(rig.Train());
  Require(!answer.context_id().empty(), "a training Forward has no context_id");
  v1::Stack now = rig.stack.Describe();
  Require(now.forward_count() == 1 && now.outstanding_contexts() == 1, "forward_count is ",
          now.forward_count(), " and outstanding_contexts ", now.outstanding_contexts(),
          "; both must be 1");
  const auto backward = rig.Mutate(rig.Backward(answer.context_id()));
  for (const float value : FloatsOf(backward.input_grad()))
    Require(std::isfinite(value), "the input's gradient has a value that is not finite");
  Require(rig.stack.Describe().outstanding_contexts() == 0,
          "the context is outstanding after its Backward");
  daemon.Refuses(rig.Backward(answer.context_id()), Code::NOT_FOUND, {"context_id"});
  daemon.Refuses(rig.Release(answer.context_id()), Code::NOT_FOUND, {"context_id"});
}

void RefusesBadForwards(Daemon& daemon) {
  const Rig rig(daemon);
  const auto input_shape = [&](const std::vector<int64_t>& shape) {
    return [shape](v1::ForwardRequest* f) { *f->mutable_input() = Zeros(shape); };
  };
  const auto layers = [](int64_t begin, int64_t end) {
    return [begin, end](v1::ForwardRequest* f) {
      f->mutable_layers()->set_begin(begin);
      f->mutable_layers()->set_end(end);
    };
  };
  const auto lengths = [](const std::vector<int32_t>& values) {
    return [values](v1::ForwardRequest* f) { *f->mutable_lengths() = Integers(values); };
  };
  const auto packed = [](const std::vector<int32_t>& values) {
    return [values](v1::ForwardRequest* f) {
      *f->mutable_input() = Zeros({6, 16});
      *f->mutable_cumulative_lengths() = Integers(values);
    };
  };
  constexpr Code kInvalid = Code::INVALID_ARGUMENT;
  RefusesEach<v1::ForwardRequest>(
      rig, rig.Evaluate(),
      {
          {"no input", kInvalid, "input", [](auto* f) { f->clear_input(); }},
          {"no dtype", kInvalid, "input.dtype", [](auto* f) { f->mutable_input()->clear_dtype(); }},
          {"a dtype that is none", kInvalid, "input.dtype",
           [](auto* f) { f->mutable_input()->set_dtype(static_cast<v1::DataType>(77)); }},
          {"another dtype than the stack's", kInvalid, "input",
           [](auto* f) { f->mutable_input()->set_dtype(v1::DATA_TYPE_INT32); }},
          {"no values", kInvalid, "input", [](auto* f) { f->mutable_input()->clear_storage(); }},
          {"a byte too few", kInvalid, "input.inline_data",
           [](auto* f) { f->mutable_input()->mutable_inline_data()->pop_back(); }},
          {"a byte too many", kInvalid, "input.inline_data",
           [](auto* f) { f->mutable_input()->mutable_inline_data()->push_back('x'); }},
          {"no extent", kInvalid, "input.shape", [](auto* f) { SetShape(f->mutable_input(), {}); }},
          {"five extents", kInvalid, "input.shape",
           [](auto* f) {
             SetShape(f->mutable_input(), {1, 1, 3, 5, 16});
           }},
          {"an extent of 0", kInvalid, "input.shape",
           [](auto* f) {
             SetShape(f->mutable_input(), {3, 0, 16});
           }},
          {"an extent below 0", kInvalid, "input.shape",
           [](auto* f) {
             SetShape(f->mutable_input(), {-3, -5, 16});
           }},
          {"a size that overflows", kInvalid, "input.shape",
           [](auto* f) {
             SetShape(f->mutable_input(), {int64_t{1} << 62, 4, 16});
           }},
          {"two extents without cumulative lengths", kInvalid, "input.shape",
           input_shape({15, 16})},
          {"B above the stack's", kInvalid, "input.shape", input_shape({4, 5, 16})},
          {"S above the stack's", kInvalid, "input.shape", input_shape({3, 6, 16})},
          {"another H", kInvalid, "input.shape", input_shape({3, 5, 15})},
          {"layers below 0", kInvalid, "layers", layers(-1, 1)},
          {"layers past the last", kInvalid, "layers", layers(0, 3)},
          {"no layer", kInvalid, "layers", layers(1, 1)},
          {"layers backwards", kInvalid, "layers", layers(2, 1)},
          {"a mask of another dtype", kInvalid, "mask",
           [](auto* f) {
             *f->mutable_mask() = Inline({3, 5}, std::vector<int32_t>(15, 0));
           }},
          {"a mask of another shape", kInvalid, "mask.shape",
           [](auto* f) {
             *f->mutable_mask() = Zeros({3, 4});
           }},
          {"a mask for each head", kInvalid, "mask.shape",
           [](auto* f) {
             *f->mutable_mask() = Zeros({3, 2, 1, 5});
           }},
          {"lengths of another dtype", kInvalid, "lengths",
           [](auto* f) { *f->mutable_lengths() = Zeros({3}); }},
          {"too few lengths", kInvalid, "lengths", lengths({5, 5})},
          {"a length of 0", kInvalid, "lengths[1]", lengths({5, 0, 5})},
          {"a length above S", kInvalid, "lengths[2]", lengths({5, 5, 6})},
          {"a length below 0", kInvalid, "lengths[0]", lengths({-1, 5, 5})},
          {"cumulative lengths that do not begin with 0", kInvalid, "cumulative_lengths[0]",
           packed({1, 4, 6})},
          {"cumulative lengths that fall", kInvalid, "cumulative_lengths[2]", packed({0, 4, 3, 6})},
          {"cumulative lengths that stand still", kInvalid, "cumulative_lengths[2]",
           packed({0, 4, 4, 6})},
          {"cumulative lengths with a sequence above S", kInvalid, "cumulative_lengths[1]",
           packed({0, 6})},
          {"cumulative lengths that end before T", kInvalid, "cumulative_lengths[2]",
           packed({0, 3, 5})},
          {"cumulative lengths that end after T", kInvalid, "cumulative_lengths[2]",
           packed({0, 3, 7})},
          {"one cumulative length", kInvalid, "cumulative_lengths", packed({0})},
          {"more tokens than batch_size * max_seq_length", kInvalid, "input.shape",
           [](auto* f) {
             *f->mutable_input() = Zeros({16, 16});
             *f->mutable_cumulative_lengths() = Integers({0, 4, 8, 12, 16});
           }},
          {"an evaluation with a sequence", kInvalid, "mutation",
           [&](auto* f) { *f->mutable_mutation() = rig.session.Next(); }},
          {"a stack that is none", Code::NOT_FOUND, "no-such-stack",
           [](auto* f) { f->set_stack("no-such-stack"); }},
          {"a session that is none", Code::NOT_FOUND, "session",
           [](auto* f) { f->set_session_id(std::string(32, '0')); }},
          {"an output region that is none", Code::NOT_FOUND, "region",
           [](auto* f) {
             f->mutable_output()->mutable_slice()->set_region_id(std::string(32, '0'));
           }},
      });
  RefusesEach<v1::ForwardRequest>(
      rig, rig.Train(),
      {
          {"training without a mutation", kInvalid, "mutation",
           [](auto* f) { f->clear_mutation(); }},
          {"sequence 0", kInvalid, "mutation.sequence",
           [](auto* f) { f->mutable_mutation()->set_sequence(0); }},
          {"another session's mutation", kInvalid, "mutation.session_id",
           [](auto* f) { f->mutable_mutation()->set_session_id(std::string(32, '0')); }},
          {"training with a bad input", kInvalid, "input.shape", input_shape({3, 5, 15})},
          {"training with bad layers", kInvalid, "layers", layers(0, 3)},
          {"training of a stack that is none", Code::NOT_FOUND, "no-such-stack",
           [](auto* f) { f->set_stack("no-such-stack"); }},
      });
}

void CapsInlineTensors(Daemon& daemon) {
  const uint64_t cap = daemon.info().inline_cap_bytes();
  if (cap > uint64_t{64} << 20)
    Skip("the inline cap is ", cap, " bytes: the message would be large");
  const Rig rig(daemon);
  // The size is right, so that only the cap is wrong with it.
  const auto tokens = static_cast<int64_t>(cap / 64) + 1;
  v1::ForwardRequest request = rig.Evaluate();
  request.mutable_input()->set_inline_data(std::string(static_cast<size_t>(tokens) * 64, '\0'));
  SetShape(request.mutable_input(), {1, tokens, 16});
  daemon.Refuses(request, Code::INVALID_ARGUMENT, {"input", std::to_string(cap)});
  // And what passes the largest message never gets to the call.
  request.mutable_input()->set_inline_data(std::string(cap + (size_t{2} << 20), '\0'));
  daemon.Refuses(request, Code::RESOURCE_EXHAUSTED);
}

void TrainingOffRefusesTraining(Daemon& daemon) {
  v1::StackConfig config = SmallConfig();
  config.set_training(false);
  const Rig rig(daemon, config);
  daemon.Refuses(rig.Train(), Code::FAILED_PRECONDITION, {"training"});
  daemon.Refuses(rig.Apply(), Code::FAILED_PRECONDITION, {"training"});
  daemon.Refuses(rig.Zero(), Code::FAILED_PRECONDITION, {"training"});
  v1::ForwardRequest as_the_stack = rig.Evaluate();
  as_the_stack.clear_training();
  Require(daemon.Ok(as_the_stack).context_id().empty(),
          "without `training` a stack whose training is off makes a context");
}

void FollowsTheStacksTraining(Daemon& daemon) {
  Rig rig(daemon);
  v1::ForwardRequest request = rig.Train();
  request.clear_training();
  Require(!rig.Mutate(request).context_id().empty(),
          "without `training` a stack whose training is on makes no context");
}

void CapsContexts(Daemon& daemon) {
  v1::StackConfig config = SmallConfig();
  config.set_max_contexts(1);
  Rig rig(daemon, config);
  const std::string context = rig.Context();
  const StackState before = rig.State();
  daemon.Refuses(rig.Train(), Code::RESOURCE_EXHAUSTED, {"bytes", "context"});
  rig.RequireUnchanged(before, "the refused Forward");
  daemon.Ok(rig.Evaluate());
  daemon.Ok(rig.Release(context));
  daemon.Ok(rig.Release(rig.Context()));
}

void SeveralContextsAtOnce(Daemon& daemon) {
  v1::StackConfig config = SmallConfig();
  config.set_max_contexts(3);
  Rig rig(daemon, config);
  const std::string a = rig.Context(), b = rig.Context(), c = rig.Context();
  Require(rig.stack.Describe().outstanding_contexts() == 3, "three contexts are not outstanding");
  rig.Mutate(rig.Backward(b));
  daemon.Ok(rig.Release(a));
  rig.Mutate(rig.Backward(c));
  Require(rig.stack.Describe().outstanding_contexts() == 0, "contexts are left");
}

void RefusesGammaOfZero(Daemon& daemon) {
  v1::StackConfig config = SmallConfig();
  config.set_normalize_invertible(true);
  Rig rig(daemon, config);
  daemon.Ok(rig.Release(rig.Context()));
  rig.Mutate(rig.Set("layers.1.norm_w", Zeros({16})));
  const StackState before = rig.State();
  daemon.Refuses(rig.Train(), Code::FAILED_PRECONDITION, {"normalize_invertible", "norm_w"});
  rig.RequireUnchanged(before, "the refused Forward");
}

void RefusesBadBackwards(Daemon& daemon) {
  Rig rig(daemon);
  const std::string context = rig.Context();
  const auto other_size = [](v1::BackwardRequest* b) {
    *b->mutable_output_grad() = Zeros({2, 5, 16});
  };
  constexpr Code kInvalid = Code::INVALID_ARGUMENT;
  RefusesEach<v1::BackwardRequest>(
      rig, rig.Backward(context),
      {
          {"no output_grad", kInvalid, "output_grad", [](auto* b) { b->clear_output_grad(); }},
          {"an output_grad of another shape", kInvalid, "output_grad.shape", other_size},
          {"an output_grad of another dtype", kInvalid, "output_grad",
           [](auto* b) { b->mutable_output_grad()->set_dtype(v1::DATA_TYPE_INT32); }},
          {"an output_grad with a byte too few", kInvalid, "output_grad.inline_data",
           [](auto* b) { b->mutable_output_grad()->mutable_inline_data()->pop_back(); }},
          {"an output_grad region that is none", Code::NOT_FOUND, "region",
           [](auto* b) {
             v1::Slice* slice = b->mutable_output_grad()->mutable_slice();
             slice->set_region_id(std::string(32, '0'));
             slice->set_size_bytes(3 * 5 * 16 * 4);
           }},
          {"an input_grad region that is none", Code::NOT_FOUND, "region",
           [](auto* b) {
             b->mutable_input_grad()->mutable_slice()->set_region_id(std::string(32, '0'));
           }},
          {"no mutation", kInvalid, "mutation", [](auto* b) { b->clear_mutation(); }},
          {"a context that is none", Code::NOT_FOUND, "context_id",
           [](auto* b) { b->set_context_id("987654321"); }},
          {"a context id that is no number", Code::NOT_FOUND, "context_id",
           [](auto* b) { b->set_context_id("x"); }},
          {"no context id", Code::FAILED_PRECONDITION, "context_id",
           [](auto* b) { b->clear_context_id(); }},
          {"a stack that is none", Code::NOT_FOUND, "no-such-stack",
           [](auto* b) { b->set_stack("no-such-stack"); }},
          {"a session that is none", Code::NOT_FOUND, "session",
           [](auto* b) { b->mutable_mutation()->set_session_id(std::string(32, '0')); }},
      });
  rig.Mutate(rig.Backward(context));  // unspent through all of that
}

void KeepsContextsToTheirSession(Daemon& daemon) {
  Rig rig(daemon);
  const std::string context = rig.Context();
  OwnSession other(daemon);
  v1::ForwardRequest train = rig.Train();
  train.set_session_id(other.id());
  *train.mutable_mutation() = other.Next();
  daemon.Ok(train);
  other.Applied();
  v1::BackwardRequest backward = rig.Backward(context);
  *backward.mutable_mutation() = other.Next();
  daemon.Refuses(backward, Code::NOT_FOUND, {"context_id"});
  v1::ReleaseContextRequest release = rig.Release(context);
  release.set_session_id(other.id());
  daemon.Refuses(release, Code::NOT_FOUND, {"context_id"});
  rig.Mutate(rig.Backward(context));
}

void NeedsAForwardFirst(Daemon& daemon) {
  const Rig rig(daemon);
  daemon.Refuses(rig.Backward("18446744073709551615"), Code::FAILED_PRECONDITION, {"Forward"});
  daemon.Refuses(rig.Backward(""), Code::FAILED_PRECONDITION, {"Forward"});
}

void InputGradOnlyWhereWanted(Daemon& daemon) {
  Rig rig(daemon);
  v1::BackwardRequest backward = rig.Backward(rig.Context());
  backward.clear_input_grad();
  const auto answer = rig.Mutate(backward);
  Require(!answer.has_input_grad(), "an input_grad that was not wanted is in the answer");
  Require(answer.output_transport() == v1::TRANSPORT_UNSPECIFIED &&
              answer.input_transport() == v1::TRANSPORT_INLINE,
          "the transports are not INLINE for output_grad and unspecified for no input_grad");
}

void BackwardNeedsTheForwardsWeights(Daemon& daemon) {
  Cases cases;
  for (const bool checkpointing : {true, false}) {
    cases.Try(checkpointing ? "activation_checkpointing" : "normalize_invertible", [&] {
      v1::StackConfig config = SmallConfig();
      config.set_activation_checkpointing(checkpointing);
      config.set_normalize_invertible(!checkpointing);
      Rig rig(daemon, config);
      const std::string context = rig.Context();
      rig.Mutate(rig.Set("layers.0.norm_w", Inline({16}, Floats(16, 0.5f))));
      const StackState before = rig.State();
      daemon.Refuses(rig.Backward(context), Code::FAILED_PRECONDITION, {"weights"});
      rig.RequireUnchanged(before, "the refused Backward");
    });
  }
  cases.Done();
}

void RefusesBadHyperparameters(Daemon& daemon) {
  Rig rig(daemon);
  rig.Mutate(rig.Backward(rig.Context()));
  constexpr Code kInvalid = Code::INVALID_ARGUMENT;
  const auto lamb = [](auto set) {
    return [set](v1::ApplyGradientsRequest* a) {
      a->set_optimizer(v1::OPTIMIZER_KIND_LAMB);
      set(a);
    };
  };
  RefusesEach<v1::ApplyGradientsRequest>(
      rig, rig.Apply(),
      {
          {"learning_rate -1", kInvalid, "learning_rate",
           [](auto* a) { a->set_learning_rate(-1); }},
          {"learning_rate NaN", kInvalid, "learning_rate",
           [](auto* a) { a->set_learning_rate(kNoNumber); }},
          {"learning_rate infinite", kInvalid, "learning_rate",
           [](auto* a) { a->set_learning_rate(kInfinite); }},
          {"beta1 1", kInvalid, "beta1", [](auto* a) { a->set_beta1(1); }},
          {"beta1 -0.1", kInvalid, "beta1", [](auto* a) { a->set_beta1(-0.1); }},
          {"beta2 1", kInvalid, "beta2", [](auto* a) { a->set_beta2(1); }},
          {"epsilon 0", kInvalid, "epsilon", [](auto* a) { a->set_epsilon(0); }},
          {"weight_decay -1", kInvalid, "weight_decay", [](auto* a) { a->set_weight_decay(-1); }},
          {"max_grad_norm -1", kInvalid, "max_grad_norm",
           [](auto* a) { a->set_max_grad_norm(-1); }},
          {"max_grad_norm NaN", kInvalid, "max_grad_norm",
           [](auto* a) { a->set_max_grad_norm(kNoNumber); }},
          {"loss_scale 0", kInvalid, "loss_scale", [](auto* a) { a->set_loss_scale(0); }},
          {"loss_scale infinite", kInvalid, "loss_scale",
           [](auto* a) { a->set_loss_scale(kInfinite); }},
          {"optimizer 9", kInvalid, "optimizer",
           [](auto* a) { a->set_optimizer(static_cast<v1::OptimizerKind>(9)); }},
          {"adapt_biases_and_norms of AdamW", kInvalid, "adapt_biases_and_norms",
           [](auto* a) { a->set_adapt_biases_and_norms(true); }},
          {"min_trust_ratio of AdamW", kInvalid, "min_trust_ratio",
           [](auto* a) { a->set_min_trust_ratio(0.1); }},
          {"max_trust_ratio of AdamW", kInvalid, "max_trust_ratio",
           [](auto* a) { a->set_max_trust_ratio(10); }},
          {"min_trust_ratio -1", kInvalid, "min_trust_ratio",
           lamb([](auto* a) { a->set_min_trust_ratio(-1); })},
          {"max_trust_ratio 0", kInvalid, "max_trust_ratio",
           lamb([](auto* a) { a->set_max_trust_ratio(0); })},
          {"max_trust_ratio below min_trust_ratio", kInvalid, "max_trust_ratio", lamb([](auto* a) {
             a->set_min_trust_ratio(2);
             a->set_max_trust_ratio(1);
           })},
          {"no mutation", kInvalid, "mutation", [](auto* a) { a->clear_mutation(); }},
          {"a session that is none", Code::NOT_FOUND, "session",
           [](auto* a) { a->mutable_mutation()->set_session_id(std::string(32, '0')); }},
          {"a stack that is none", Code::NOT_FOUND, "no-such-stack",
           [](auto* a) { a->set_stack("no-such-stack"); }},
      });
  RefusesEach<v1::ZeroGradientsRequest>(
      rig, rig.Zero(),
      {
          {"no mutation", kInvalid, "mutation", [](auto* z) { z->clear_mutation(); }},
          {"a session that is none", Code::NOT_FOUND, "session",
           [](auto* z) { z->mutable_mutation()->set_session_id(std::string(32, '0')); }},
          {"a stack that is none", Code::NOT_FOUND, "no-such-stack",
           [](auto* z) { z->set_stack("no-such-stack"); }},
      });
}

void ZeroesGradients(Daemon& daemon) {
  Rig rig(daemon);
  const auto at_first = daemon.Ok(rig.Gradients());
  const std::string fresh = Bytes(at_first);
  for (const auto& named : at_first.tensors())
    for (const float value : FloatsOf(named.tensor()))
      Require(value == 0, "a new stack's gradient of ", named.name(), " is not 0");
  rig.Mutate(rig.Backward(rig.Context()));
  Require(Bytes(daemon.Ok(rig.Gradients())) != fresh, "Backward has added no gradient");
  rig.Mutate(rig.Zero());
  Require(Bytes(daemon.Ok(rig.Gradients())) == fresh, "gradients are left after ZeroGradients");
  rig.Mutate(rig.Backward(rig.Context()));
  rig.Mutate(rig.Apply());
  Require(Bytes(daemon.Ok(rig.Gradients())) != fresh,
          "ApplyGradients without zero_gradients has zeroed the gradients");
  auto apply = rig.Apply();
  apply.set_zero_gradients(true);
  Require(rig.Mutate(apply).step() == 2, "the second ApplyGradients is not step 2");
  Require(Bytes(daemon.Ok(rig.Gradients())) == fresh, "gradients are left after zero_gradients");
}

void SkipsInfiniteGradients(Daemon& daemon) {
  Rig rig(daemon);
  v1::BackwardRequest backward = rig.Backward(rig.Context());
  Floats values = Values(Elements(rig.shape), 2);
  values[7] = std::numeric_limits<float>::infinity();
  *backward.mutable_output_grad() = Inline(rig.shape, values);
  rig.Mutate(backward);
  StackState expected = rig.State();
  const auto answer = rig.Mutate(rig.Apply());
  Require(!answer.applied() && answer.step() == 0, "applied is ", answer.applied(), ", step ",
          answer.step(), "; the step must be skipped");
  ++expected.skipped_steps;
  rig.RequireUnchanged(expected, "a skipped step (but for skipped_steps, 1 more)");
  auto zero = rig.Apply();
  zero.set_zero_gradients(true);
  rig.Mutate(zero);
  rig.Mutate(rig.Backward(rig.Context()));
  Require(rig.Mutate(rig.Apply()).applied(), "the step after a skipped one is not applied");
}

void RefusesBadReleases(Daemon& daemon) {
  Rig rig(daemon);
  const std::string context = rig.Context();
  RefusesEach<v1::ReleaseContextRequest>(
      rig, rig.Release(context),
      {
          {"a context that is none", Code::NOT_FOUND, "context_id",
           [](auto* r) { r->set_context_id("987654321"); }},
          {"a session that is none", Code::NOT_FOUND, "session",
           [](auto* r) { r->set_session_id(std::string(32, '0')); }},
      });
  daemon.Ok(rig.Release(context));
  Require(rig.stack.Describe().outstanding_contexts() == 0, "the context is still outstanding");
  daemon.Refuses(rig.Release(context), Code::NOT_FOUND, {"context_id"});
  daemon.Refuses(rig.Backward(context), Code::NOT_FOUND, {"context_id"});
}

// A mutation that has to wait and is given up meanwhile has not run, and has not used its sequence.
void GivenUpHasNotRun(Daemon& daemon, Code code) {
  Rig rig(daemon);
  rig.Mutate(rig.Backward(rig.Context()));
  const StackState before = rig.State();
  Busy busy(daemon);
  constexpr Milliseconds kPatience(60);
  // Long enough that a call behind it is given up before its turn, also on a slow machine.
  busy.Start(kPatience * 5);
  grpc::ClientContext context;
  if (code == Code::DEADLINE_EXCEEDED) {
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
  }
  struct Waiting {
    std::mutex mutex;
    std::condition_variable answered;
    bool done = false;
    grpc::Status status;
  } waiting;
  const v1::ApplyGradientsRequest request = rig.Apply();
  v1::ApplyGradientsResponse response;
  daemon.layers().async()->ApplyGradients(&context, &request, &response,
                                          [&waiting](grpc::Status status) {
                                            std::lock_guard<std::mutex> lock(waiting.mutex);
                                            waiting.status = std::move(status);
                                            waiting.done = true;
                                            waiting.answered.notify_all();
                                          });
  std::unique_lock<std::mutex> lock(waiting.mutex);
  if (code == Code::CANCELLED &&
      !waiting.answered.wait_for(lock, kPatience, [&] { return waiting.done; })) {
    context.TryCancel();
  }
  waiting.answered.wait(lock, [&] { return waiting.done; });
  busy.Join();
  daemon.Count(v1::LayerService::service_full_name(), "ApplyGradients", waiting.status);
  Daemon::Refused("a call that waited behind others", waiting.status, code);
  rig.RequireUnchanged(before, "the call that was given up");
  // Another body: the sequence is free.
  Require(rig.Mutate(rig.Apply(0.5)).step() == 1, "the next ApplyGradients is not step 1");
}

}  // namespace

Group StepChecks() {
  return {
      "steps",
      "Forward, Backward, ApplyGradients, ZeroGradients, ReleaseContext",
      {
          {"steps.evaluate",
           "An evaluation answers with an output like its input, and leaves no trace on the stack",
           EvaluatesWithoutTrace},
          {"steps.train", "A training Forward makes a context, and its one Backward spends it",
           TrainsWithContext},
          {"steps.training-default",
           "Without `training` a Forward does as the stack's training says",
           FollowsTheStacksTraining},
          {"steps.training-off",
           "Training, ApplyGradients and ZeroGradients are FAILED_PRECONDITION where training is "
           "off",
           TrainingOffRefusesTraining},
          {"steps.forward-errors",
           "A Forward with a bad field is refused, names the field, and changes nothing",
           RefusesBadForwards},
          {"steps.inline-cap",
           "A tensor above the inline cap is INVALID_ARGUMENT with the cap's size",
           CapsInlineTensors},
          {"steps.contexts", "Several contexts may be outstanding, and end in any order",
           SeveralContextsAtOnce},
          {"steps.contexts-cap",
           "A Forward without room for its context is RESOURCE_EXHAUSTED with the bytes, and "
           "changes nothing",
           CapsContexts},
          {"steps.gamma-of-zero",
           "With normalize_invertible a gamma too small to divide by is FAILED_PRECONDITION",
           RefusesGammaOfZero},
          {"steps.backward-errors",
           "A Backward that is refused says why, and leaves gradients and context as they were",
           RefusesBadBackwards},
          {"steps.backward-session", "A context is its session's: NOT_FOUND for every other",
           KeepsContextsToTheirSession},
          {"steps.backward-first",
           "Backward of a session that ran no Forward is FAILED_PRECONDITION", NeedsAForwardFirst},
          {"steps.backward-input-grad", "The input's gradient comes only where it is wanted",
           InputGradOnlyWhereWanted},
          {"steps.backward-weights",
           "Backward that must recompute is FAILED_PRECONDITION once weights have changed",
           BackwardNeedsTheForwardsWeights},
          {"steps.apply-errors",
           "A hyper-parameter outside its range is INVALID_ARGUMENT, is named, and nothing changes",
           RefusesBadHyperparameters},
          {"steps.apply-not-finite",
           "A gradient that is not finite skips the step: applied is false, weights and step stay",
           SkipsInfiniteGradients},
          {"steps.zero", "ZeroGradients and zero_gradients zero all gradients; nothing else does",
           ZeroesGradients},
          {"steps.release", "ReleaseContext frees a context once; then it is NOT_FOUND",
           RefusesBadReleases},
          {"steps.deadline",
           "A call whose deadline passes before the device began it is DEADLINE_EXCEEDED and has "
           "not run",
           [](Daemon& daemon) { GivenUpHasNotRun(daemon, Code::DEADLINE_EXCEEDED); }},
          {"steps.cancel",
           "A call that is cancelled before the device began it is CANCELLED and has not run",
           [](Daemon& daemon) { GivenUpHasNotRun(daemon, Code::CANCELLED); }},
      }};
}

}  // namespace lamina::conformance
