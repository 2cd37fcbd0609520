// Numbers, as far as they can be judged without another implementation: gradients against central
// differences of the daemon's own Forward, one way of calling against another, dropout against its
// definition, the optimizer's first step against its formula.
//
// Bounds. fp32 rounds to u = 2^-24, each time anew. Errors of n roundings in a row stay below
// lambda sqrt(n) u of the values' size, but for a chance of 2 n exp(-lambda^2 / 2) (Higham and
// Mary, SIAM J. Sci. Comput. 41, 2019); with lambda = 6 that is one in ten thousand billions for
// each. The weights' deviation, 1 / sqrt(H), makes the layers' products neither grow nor shrink
// what they are given, so no error is amplified much on its way.
#include <algorithm>
#include <cmath>
#include <functional>

#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kLambda = 6;

v1::StackConfig NumericsConfig(bool pre_layer_norm = true) {
  v1::StackConfig config = SmallConfig();
  config.set_pre_layer_norm(pre_layer_norm);
  config.set_initializer_range(0.25);  // 1 / sqrt(H)
  config.set_adjust_init_range(false);
  return config;
}

// Roundings in a row between a stack's input and its output. In each layer: two norms, each with a
// mean and a variance over H; the products that sum over H three times (q k v, attention's output,
// the intermediate), and over I, D and S; softmax's sum over S; and some for what is done to each
// element.
double Roundings(const v1::StackConfig& config) {
  const auto h = static_cast<double>(config.hidden_size());
  const double head = h / static_cast<double>(config.heads());
  const auto seq = static_cast<double>(config.max_seq_length());
  constexpr double kElementwise = 24;
  const double layer = 4 * h + 3 * h + static_cast<double>(config.intermediate_size()) + head +
                       2 * seq + kElementwise;
  return layer * static_cast<double>(config.num_hidden_layers());
}

double MaxAbs(const Floats& values) {
  double most = 0;
  for (const float value : values) most = std::max(most, std::abs(double{value}));
  return most;
}

// How far a computed output is from the exact one, at most. A norm's values are up to sqrt(H).
double OutputError(const v1::StackConfig& config, const Floats& output) {
  const double size =
      std::max(MaxAbs(output), std::sqrt(static_cast<double>(config.hidden_size())));
  return kLambda * std::sqrt(Roundings(config)) * kUnit * size;
}

// The same of an input's gradient, which comes from a Forward and a Backward of twice its length.
double GradientError(const v1::StackConfig& config, const Floats& gradient) {
  const double size = MaxAbs(gradient) * std::sqrt(static_cast<double>(config.hidden_size()));
  return kLambda * std::sqrt(3 * Roundings(config)) * kUnit * size;
}

void RequireClose(const char* what, const Floats& a, const Floats& b, double bound) {
  Require(a.size() == b.size(), what, ": ", a.size(), " values against ", b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    Require(difference <= bound, what, ": value ", i, " is ", a[i], " against ", b[i],
            "; rounding explains ", bound);
  }
}

double InnerProduct(const Floats& a, const Floats& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

Floats Abs(Floats values) {
  for (float& value : values) value = std::abs(value);
  return values;
}

double L2(const Floats& values) { return std::sqrt(InnerProduct(values, values)); }

// Directions to differentiate along, of a length up to 4: random signs, and the gradient's own,
// along which nothing cancels out.
std::vector<Floats> Directions(const Floats& gradient, uint32_t seed) {
  float size = 1;
  while (static_cast<float>(gradient.size()) * size * size > 16) size /= 2;
  Floats random = Values(static_cast<int64_t>(gradient.size()), seed), along = gradient;
  for (Floats* direction : {&random, &along})
    for (float& value : *direction) value = value < 0 ? -size : size;
  return {random, along};
}

// That `gradient` is the derivative at `at` of a loss, along some directions.
//
// The derivative is taken by central differences of fourth order, with steps h and h / 2. What the
// Taylor series leaves is 16 times as much with h as with h / 2, so the two results' difference is
// 15 times what the second leaves, and bounds it. An error e of the loss becomes at most 1.5 e / (h
// / 2).
void RequireGradient(const std::string& what, const Floats& at, const Floats& gradient,
                     double loss_error, double rounding_of_gradient,
                     const std::function<double(const Floats&)>& loss) {
  constexpr double kStep = 1.0 / 32;
  for (const Floats& direction : Directions(gradient, /*seed=*/3)) {
    const auto moved = [&](double by) {
      Floats there = at;
      for (size_t i = 0; i < there.size(); ++i) there[i] += static_cast<float>(by) * direction[i];
      return loss(there);
    };
    const double half = moved(kStep / 2) - moved(-kStep / 2);
    const double one = moved(kStep) - moved(-kStep);
    const double two = moved(2 * kStep) - moved(-2 * kStep);
    const double coarse = (8 * one - two) / (12 * kStep);
    const double fine = (8 * half - one) / (6 * kStep);
    const double got = InnerProduct(gradient, direction);
    double step_error = 0;  // of the places themselves, which are fp32 too
    for (size_t i = 0; i < at.size(); ++i)
      step_error += kUnit * (std::abs(double{at[i]}) + 1) * std::abs(double{gradient[i]});
    const double bound = std::abs(fine - coarse) + 3 * (loss_error + step_error) / kStep +
                         rounding_of_gradient * InnerProduct(Abs(gradient), Abs(direction));
    Require(std::abs(got - fine) <= bound, what, ": the gradient says ", got,
            " along a direction, differences of Forward say ", fine, "; their errors explain ",
            bound);
  }
}

// The gradient check of a whole stack: of its input and of each of its parameters. `prepare` makes
// a Forward what it shall be: its input, its mask.
void ChecksGradients(Daemon& daemon, const v1::StackConfig& config,
                     const std::vector<int64_t>& shape,
                     const std::function<void(v1::ForwardRequest*)>& prepare) {
  Rig rig(daemon, config);
  const v1::StackConfig& filled = rig.stack.config();
  const Floats x = Values(Elements(shape), 1), weights = Values(Elements(shape), 2);
  const auto evaluate = [&](const Floats& input) {
    v1::ForwardRequest request = rig.Evaluate(Inline(shape, input));
    prepare(&request);
    return FloatsOf(daemon.Ok(request).output());
  };
  v1::ForwardRequest train = rig.Train();
  *train.mutable_input() = Inline(shape, x);
  prepare(&train);
  const auto forward = rig.Mutate(train);
  v1::BackwardRequest backward = rig.Backward(forward.context_id());
  *backward.mutable_output_grad() = Inline(shape, weights);
  const Floats input_grad = FloatsOf(rig.Mutate(backward).input_grad());
  const auto gradients = daemon.Ok(rig.Gradients());
  const auto parameters = daemon.Ok(rig.Parameters());

  const Floats output = FloatsOf(forward.output());
  const double output_error = OutputError(filled, output);
  RequireClose("without dropout, training's output against evaluation's", output, evaluate(x),
               2 * output_error);
  // The outputs' errors are as independent as their roundings.
  const double loss_error = output_error * L2(weights);
  const double rounding = kLambda * std::sqrt(3 * Roundings(filled)) * kUnit;

  Cases cases;
  cases.Try("input_grad", [&] {
    RequireGradient("input_grad", x, input_grad, loss_error, rounding,
                    [&](const Floats& there) { return InnerProduct(weights, evaluate(there)); });
  });
  for (int i = 0; i < parameters.tensors_size(); ++i) {
    const std::string& name = parameters.tensors(i).name();
    const v1::Tensor& values = parameters.tensors(i).tensor();
    const std::vector<int64_t> extents(values.shape().begin(), values.shape().end());
    cases.Try(name, [&] {
      RequireGradient(name, FloatsOf(values), FloatsOf(gradients.tensors(i).tensor()), loss_error,
                      rounding, [&](const Floats& there) {
                        rig.Mutate(rig.Set(name, Inline(extents, there)));
                        return InnerProduct(weights, evaluate(x));
                      });
      rig.Mutate(rig.Set(name, values));
    });
  }
  cases.Done();
}

void ChecksDenseGradients(Daemon& daemon, bool pre_layer_norm) {
  const v1::StackConfig config = NumericsConfig(pre_layer_norm);
  ChecksGradients(daemon, config, ActivationShape(config), [](v1::ForwardRequest*) {});
}

const std::vector<int32_t> kLengths = {5, 2, 4};
const std::vector<int32_t> kCumulative = {0, 5, 7, 11};

void ChecksPackedGradients(Daemon& daemon) {
  v1::StackConfig config = NumericsConfig();
  config.set_causal(true);
  config.set_gelu(v1::GELU_TANH);
  ChecksGradients(daemon, config, {11, 16}, [](v1::ForwardRequest* request) {
    *request->mutable_cumulative_lengths() = Inline({4}, kCumulative);
  });
}

// With dropout a Forward of the same counter draws the same masks: on a fresh stack each.
void ChecksGradientsWithDropout(Daemon& daemon) {
  v1::StackConfig config = NumericsConfig();
  config.set_attn_dropout_ratio(0.25);
  config.set_hidden_dropout_ratio(0.25);
  Rig rig(daemon, config);
  const Floats x = FloatsOf(rig.x), weights = FloatsOf(rig.dy);
  const auto forward = rig.Mutate(rig.Train());
  const Floats gradient = FloatsOf(rig.Mutate(rig.Backward(forward.context_id())).input_grad());
  // What is kept grows by 1 / (1 - p), in each of the two sub-layers and in attention.
  const double output_error = OutputError(rig.stack.config(), FloatsOf(forward.output()));
  RequireGradient("input_grad with dropout", x, gradient, output_error * L2(weights),
                  kLambda * std::sqrt(3 * Roundings(rig.stack.config())) * kUnit,
                  [&](const Floats& there) {
                    Rig fresh(daemon, config);
                    v1::ForwardRequest request = fresh.Train();
                    *request.mutable_input() = Inline(fresh.shape, there);
                    return InnerProduct(weights, FloatsOf(fresh.Mutate(request).output()));
                  });
}

void RepeatsDropout(Daemon& daemon) {
  v1::StackConfig config = NumericsConfig();
  config.set_attn_dropout_ratio(0.25);
  config.set_hidden_dropout_ratio(0.25);
  const auto run = [&](const v1::StackConfig& of) {
    Rig rig(daemon, of);
    std::vector<std::string> seen;
    for (int i = 0; i < 2; ++i) {
      const auto forward = rig.Mutate(rig.Train());
      seen.push_back(forward.output().inline_data());
      seen.push_back(rig.Mutate(rig.Backward(forward.context_id())).input_grad().inline_data());
    }
    seen.push_back(Bytes(daemon.Ok(rig.Gradients())));
    return seen;
  };
  const auto first = run(config);
  Require(run(config) == first, "a fresh stack of the same seed and counters gives other values");
  Require(first[0] != first[2], "the second training Forward draws the first one's masks");
  config.set_seed(8);
  Require(run(config)[0] != first[0], "another seed draws the same masks and weights");
}

// A layer that adds a constant to what it is given, but for dropout: each element shows its mask.
void DropsItsShare(Daemon& daemon) {
  v1::StackConfig config = SmallConfig();
  config.set_batch_size(8);
  config.set_max_seq_length(32);
  config.set_num_hidden_layers(1);
  constexpr double kRatio = 0.25;
  config.set_hidden_dropout_ratio(kRatio);
  Rig rig(daemon, config);
  const auto constant = [&](const char* name, const std::vector<int64_t>& shape, float value) {
    rig.Mutate(rig.Set(absl::StrCat("layers.0.", name),
                       Inline(shape, Floats(static_cast<size_t>(Elements(shape)), value))));
  };
  constant("attn_ow", {16, 16}, 0);
  constant("attn_ob", {16}, 3);
  constant("output_w", {16, 24}, 0);
  constant("output_b", {16}, 0);
  const Floats x = FloatsOf(rig.x), y = FloatsOf(rig.Mutate(rig.Train()).output());
  // A mask's threshold has 16 bits at least; x + 4 is rounded once more.
  const double kept_value = 3 / (1 - kRatio), tolerance = kept_value * 0x1p-15 + 8 * kUnit;
  double dropped = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double added = double{y[i]} - double{x[i]};
    if (std::abs(added) <= tolerance) {
      ++dropped;
    } else {
      Require(std::abs(added - kept_value) <= tolerance, "element ", i, " of 3 became ", added,
              "; it must be 0 or ", kept_value);
    }
  }
  const auto count = static_cast<double>(x.size());
  const double deviation = std::sqrt(count * kRatio * (1 - kRatio));
  Require(std::abs(dropped - kRatio * count) <= kLambda * deviation, dropped, " of ", count,
          " elements are dropped; p is ", kRatio);
  for (const float value : FloatsOf(daemon.Ok(rig.Evaluate()).output()))
    Require(std::isfinite(value), "an evaluation gives a value that is not finite");
  const Floats evaluated = FloatsOf(daemon.Ok(rig.Evaluate()).output());
  for (size_t i = 0; i < x.size(); ++i)
    Require(std::abs(double{evaluated[i]} - double{x[i]} - 3) <= 8 * kUnit,
            "an evaluation drops or scales element ", i);
}

void RangesComposeToTheWhole(Daemon& daemon) {
  for (const bool pre_layer_norm : {true, false}) {
    Rig rig(daemon, NumericsConfig(pre_layer_norm));
    const v1::StackConfig& config = rig.stack.config();
    const auto whole = rig.Mutate(rig.Train());
    const auto range = [&](int64_t begin, const v1::Tensor& input) {
      v1::ForwardRequest request = rig.Train();
      *request.mutable_input() = input;
      request.mutable_layers()->set_begin(begin);
      request.mutable_layers()->set_end(begin + 1);
      return rig.Mutate(request);
    };
    const Floats whole_grad = FloatsOf(rig.Mutate(rig.Backward(whole.context_id())).input_grad());
    const auto first = range(0, rig.x);
    const auto second = range(1, first.output());
    const Floats output = FloatsOf(whole.output());
    RequireClose("layers 0 and 1 one after another, against both at once", output,
                 FloatsOf(second.output()), 2 * OutputError(config, output));
    const auto between = rig.Mutate(rig.Backward(second.context_id()));
    v1::BackwardRequest last = rig.Backward(first.context_id());
    *last.mutable_output_grad() = between.input_grad();
    RequireClose("Backward of layers 1 and 0, against both at once", whole_grad,
                 FloatsOf(rig.Mutate(last).input_grad()), 2 * GradientError(config, whole_grad));
  }
}

// Rows of the valid tokens of [3, 5, 16].
Floats ValidRows(const Floats& padded) {
  Floats rows;
  for (size_t b = 0; b < kLengths.size(); ++b) {
    const auto begin = padded.begin() + static_cast<std::ptrdiff_t>(b * 5 * 16);
    rows.insert(rows.end(), begin, begin + std::ptrdiff_t{kLengths[b]} * 16);
  }
  return rows;
}

void PackedEqualsPadded(Daemon& daemon) {
  for (const bool causal : {false, true}) {
    v1::StackConfig config = NumericsConfig();
    config.set_causal(causal);
    Rig rig(daemon, config);
    // No gradient comes from what is padding.
    Floats dy = FloatsOf(rig.dy);
    for (size_t b = 0; b < kLengths.size(); ++b)
      std::fill(
          dy.begin() + static_cast<std::ptrdiff_t>((b * 5 + static_cast<size_t>(kLengths[b])) * 16),
          dy.begin() + static_cast<std::ptrdiff_t>((b + 1) * 5 * 16), 0.0f);
    const auto run = [&](const v1::Tensor& input, const v1::Tensor& output_grad,
                         const std::function<void(v1::ForwardRequest*)>& attend) {
      v1::ForwardRequest request = rig.Train();
      *request.mutable_input() = input;
      attend(&request);
      const auto forward = rig.Mutate(request);
      v1::BackwardRequest backward = rig.Backward(forward.context_id());
      *backward.mutable_output_grad() = output_grad;
      return std::pair(FloatsOf(forward.output()), FloatsOf(rig.Mutate(backward).input_grad()));
    };
    const v1::Tensor padded_dy = Inline(rig.shape, dy);
    const auto by_lengths = run(rig.x, padded_dy, [](v1::ForwardRequest* request) {
      *request->mutable_lengths() = Inline({3}, kLengths);
    });
    Floats mask(15, 0.0f);
    for (size_t b = 0; b < 3; ++b)
      for (size_t s = static_cast<size_t>(kLengths[b]); s < 5; ++s) mask[b * 5 + s] = -INFINITY;
    const auto by_mask = run(rig.x, padded_dy, [&](v1::ForwardRequest* request) {
      *request->mutable_mask() = Inline({3, 1, 1, 5}, mask);
    });
    const auto packed = run(Inline({11, 16}, ValidRows(FloatsOf(rig.x))),
                            Inline({11, 16}, ValidRows(dy)), [](v1::ForwardRequest* request) {
                              *request->mutable_cumulative_lengths() = Inline({4}, kCumulative);
                            });
    const v1::StackConfig& filled = rig.stack.config();
    const double output_bound = 2 * OutputError(filled, packed.first);
    const double gradient_bound = 2 * GradientError(filled, packed.second);
    RequireClose("outputs, by lengths against packed", ValidRows(by_lengths.first), packed.first,
                 output_bound);
    RequireClose("outputs, by mask against packed", ValidRows(by_mask.first), packed.first,
                 output_bound);
    RequireClose("input_grad, by lengths against packed", ValidRows(by_lengths.second),
                 packed.second, gradient_bound);
    RequireClose("input_grad, by mask against packed", ValidRows(by_mask.second), packed.second,
                 gradient_bound);
    rig.Mutate(rig.Zero());
  }
}

void CausalSeesNoLaterToken(Daemon& daemon) {
  v1::StackConfig config = NumericsConfig();
  config.set_causal(true);
  Rig rig(daemon, config);
  Floats later = FloatsOf(rig.x);
  for (size_t b = 0; b < 3; ++b)
    for (size_t i = (b * 5 + 3) * 16; i < (b + 1) * 5 * 16; ++i) later[i] = -later[i];
  const Floats a = FloatsOf(daemon.Ok(rig.Evaluate()).output());
  const Floats c = FloatsOf(daemon.Ok(rig.Evaluate(Inline(rig.shape, later))).output());
  const double bound = 2 * OutputError(rig.stack.config(), a);
  for (size_t i = 0; i < a.size(); ++i) {
    const bool changed = i / 16 % 5 >= 3;
    Require(changed || std::abs(double{a[i]} - double{c[i]}) <= bound, "the output of token ",
            i / 16 % 5, " depends on tokens after it");
  }
}

// One AdamW step by its formula, in fp64 from the gradients that the daemon tells.
void FirstStepOfAdamW(Daemon& daemon) {
  constexpr double kRate = 0.01, kDecay = 0.1, kEpsilon = 1e-8;
  Rig rig(daemon, NumericsConfig());
  rig.Mutate(rig.Backward(rig.Context()));
  const auto gradients = daemon.Ok(rig.Gradients());
  const auto before = daemon.Ok(rig.Parameters());
  double squares = 0, values = 0;
  for (const auto& named : gradients.tensors()) {
    const Floats g = FloatsOf(named.tensor());
    squares += InnerProduct(g, g);
    values += static_cast<double>(g.size());
  }
  const double norm = std::sqrt(squares), clip = norm / 2, scale = 4;
  auto apply = rig.Apply(kRate);
  apply.set_weight_decay(kDecay);
  apply.set_loss_scale(scale);
  apply.set_max_grad_norm(clip / scale);
  const auto answer = rig.Mutate(apply);
  Require(answer.applied() && answer.step() == 1, "the step is not applied");
  Require(answer.loss_scale() == scale, "loss_scale is ", answer.loss_scale());
  const double norm_error = kLambda * std::sqrt(values) * kUnit;
  Require(std::abs(answer.grad_norm() - norm / scale) <= norm_error * norm / scale, "grad_norm is ",
          answer.grad_norm(), "; the gradients divided by loss_scale have ", norm / scale);
  const auto after = daemon.Ok(rig.Parameters());
  for (int i = 0; i < before.tensors_size(); ++i) {
    const std::string& name = before.tensors(i).name();
    const bool decays = before.tensors(i).tensor().shape_size() == 2;  // no bias, no norm
    const Floats p = FloatsOf(before.tensors(i).tensor());
    const Floats g = FloatsOf(gradients.tensors(i).tensor());
    const Floats q = FloatsOf(after.tensors(i).tensor());
    for (size_t j = 0; j < p.size(); ++j) {
      // After one step the corrected moments are the gradient and its square.
      const double gradient = double{g[j]} / scale * (clip / norm);
      const double direction =
          gradient / (std::abs(gradient) + kEpsilon) + (decays ? kDecay * double{p[j]} : 0);
      const double expected = double{p[j]} - kRate * direction;
      // Some twenty roundings of the update, and one of the sum. A gradient near epsilon passes its
      // own error, the norm's, on to the direction; far above it none is left.
      const double error = 20 * kUnit * kRate * (1 + std::abs(direction)) +
                           kRate * norm_error * kEpsilon / (std::abs(gradient) + kEpsilon) +
                           kUnit * std::abs(expected);
      Require(std::abs(double{q[j]} - expected) <= error, name, "[", j, "] is ", q[j],
              " after the step; the formula says ", expected, " within ", error);
    }
  }
}

void TrainingLowersALoss(Daemon& daemon) {
  Cases cases;
  for (const v1::OptimizerKind optimizer : {v1::OPTIMIZER_KIND_ADAMW, v1::OPTIMIZER_KIND_LAMB}) {
    for (const bool pre_layer_norm : {true, false}) {
      cases.Try(absl::StrCat(v1::OptimizerKind_Name(optimizer),
                             pre_layer_norm ? ", Pre-LN" : ", Post-LN"),
                [&] {
                  Rig rig(daemon, NumericsConfig(pre_layer_norm));
                  const Floats target = Values(Elements(rig.shape), 9);
                  double first = 0, last = 0;
                  for (int step = 0; step < 20; ++step) {
                    const auto forward = rig.Mutate(rig.Train());
                    Floats dy = FloatsOf(forward.output());
                    last = 0;
                    for (size_t i = 0; i < dy.size(); ++i) {
                      const float difference = dy[i] - target[i];
                      last += double{difference} * double{difference};
                      dy[i] = 2 * difference;
                    }
                    if (step == 0) first = last;
                    v1::BackwardRequest backward = rig.Backward(forward.context_id());
                    *backward.mutable_output_grad() = Inline(rig.shape, dy);
                    rig.Mutate(backward);
                    auto apply = rig.Apply(0.01);
                    apply.set_optimizer(optimizer);
                    apply.set_zero_gradients(true);
                    Require(rig.Mutate(apply).applied(), "step ", step, " is not applied");
                  }
                  Require(last < first, "the squared error is ", first, " at first and ", last,
                          " after 20 steps");
                });
    }
  }
  cases.Done();
}

}  // namespace

Group NumericsChecks() {
  return {
      "numerics",
      "Numbers, in fp32",
      {
          {"numerics.gradient-pre",
           "Backward's gradients are those of Forward, by central differences: Pre-LN",
           [](Daemon& daemon) { ChecksDenseGradients(daemon, true); }},
          {"numerics.gradient-post",
           "Backward's gradients are those of Forward, by central differences: Post-LN",
           [](Daemon& daemon) { ChecksDenseGradients(daemon, false); }},
          {"numerics.gradient-packed",
           "Backward's gradients are those of Forward: a packed causal batch, GELU by tanh",
           ChecksPackedGradients},
          {"numerics.gradient-dropout", "Backward uses the masks that its Forward drew",
           ChecksGradientsWithDropout},
          {"numerics.dropout-repeats",
           "A fresh stack of the same seed and counters gives the same bits; the next Forward "
           "draws other masks",
           RepeatsDropout},
          {"numerics.dropout-share",
           "Dropout zeroes a share p of the elements and scales the others by 1 / (1 - p), in "
           "training alone",
           DropsItsShare},
          {"numerics.layer-ranges", "Layers one after another give what they give at once",
           RangesComposeToTheWhole},
          {"numerics.packed",
           "A packed batch gives what the padded one gives, by lengths and by mask",
           PackedEqualsPadded},
          {"numerics.causal", "With causal no token attends to a later one",
           CausalSeesNoLaterToken},
          {"numerics.adamw",
           "ApplyGradients unscales, clips and steps as AdamW does, and tells the norm",
           FirstStepOfAdamW},
          {"numerics.training", "Twenty steps of AdamW or LAMB lower a loss", TrainingLowersALoss},
      }};
}

}  // namespace lamina::conformance
