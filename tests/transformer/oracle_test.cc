// Layer and stack against the oracle in double precision: stacks of two layers, with and without
// dropout, every gradient. The oracle reads the weights and the call's tensors as rounded to the
// stack's dtype, and draws the masks from the stack's seed and counter.
//
// The bound is a first-order one, measured instead of guessed: see ErringLayer and Bounds.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ref/layer.h"
#include "rig.h"
#include "support/shapes.h"

namespace lamina::testing {
namespace {

using ref::LayerConfig;
using ref::LayerGradients;
using ref::LayerParameters;
using ref::LayerValues;
using ref::Vec;

// Noise of neighbouring seeds is one sequence, shifted by one: seeds that are further apart than
// any tensor is long give independent noise.
constexpr uint64_t kNoiseApart = uint64_t{1} << 24;

// --- cases ---

enum class KeyKind { kNone, kMask, kLengths, kPacked };

struct OracleCase {
  LayerShape shape;
  bool pre_layer_norm;
  GeluKind gelu;
  KeyKind keys;
  double attn_dropout, hidden_dropout;
  bool causal = false;
  bool normalize_invertible = false;

  std::string Name() const {
    constexpr const char* kKeyNames[] = {"none", "mask", "lengths", "packed"};
    return absl::StrCat(shape.Name(), pre_layer_norm ? "_pre" : "_post",
                        gelu == GeluKind::kErf ? "_erf_" : "_tanh_",
                        kKeyNames[static_cast<int>(keys)], "_p", std::lround(100 * attn_dropout),
                        "_", std::lround(100 * hidden_dropout), causal ? "_causal" : "",
                        normalize_invertible ? "_invertible" : "");
  }
};

std::vector<OracleCase> Cases() {
  constexpr KeyKind kKeys[] = {KeyKind::kMask, KeyKind::kLengths, KeyKind::kNone};
  constexpr GeluKind kGelus[] = {GeluKind::kErf, GeluKind::kTanh};
  constexpr std::pair<double, double> kDropouts[] = {{0.2, 0.1}, {0.37, 0.37}, {0.0, 0.0}};
  std::vector<OracleCase> cases;
  // Every combination where it costs little.
  for (const bool pre : {true, false})
    for (const GeluKind gelu : kGelus)
      for (const KeyKind keys : kKeys)
        for (const auto& [attn, hidden] : kDropouts)
          cases.push_back({{3, 7, 24, 3, 40}, pre, gelu, keys, attn, hidden});
  // Packed, causal, and with the norms inverted.
  constexpr LayerShape kSmall{3, 7, 24, 3, 40}, kOddSeq{2, 51, 64, 4, 96};
  for (const bool pre : {true, false}) {
    const GeluKind gelu = kGelus[pre ? 0 : 1];
    const auto add = [&](const LayerShape& shape, KeyKind keys, double attn, double hidden,
                         bool causal, bool invertible) {
      cases.push_back({shape, pre, gelu, keys, attn, hidden, causal, invertible});
    };
    add(kSmall, KeyKind::kPacked, 0.2, 0.1, false, false);
    add(kSmall, KeyKind::kPacked, 0.0, 0.0, true, false);
    add(kSmall, KeyKind::kMask, 0.2, 0.1, true, false);
    add(kSmall, KeyKind::kNone, 0.0, 0.0, true, false);
    add(kSmall, KeyKind::kLengths, 0.2, 0.1, false, true);
    add(kSmall, KeyKind::kPacked, 0.37, 0.37, true, true);
    add(kOddSeq, KeyKind::kPacked, 0.2, 0.1, true, !pre);
  }
  // On the other shapes so many of them, in turn.
  constexpr std::pair<LayerShape, int> kShapes[] = {
      {{2, 3, 5, 1, 7}, 8},        // all prime
      {{1, 17, 100, 25, 36}, 6},   // D 4
      {{2, 51, 64, 4, 96}, 4},     // odd S
      {{1, 130, 128, 2, 512}, 2},  // D 64, and S just over a tile of 128
  };
  size_t turn = 0;
  for (const auto& [shape, count] : kShapes)
    for (int i = 0; i < count; ++i, ++turn) {
      const auto& [attn, hidden] = kDropouts[turn % 3];
      cases.push_back(
          {shape, turn % 2 == 0, kGelus[turn / 2 % 2], kKeys[(turn / 3 + turn) % 3], attn, hidden});
    }
  return cases;
}

StackConfig ConfigOf(const OracleCase& c, DType dtype) {
  StackConfig config;
  // Larger than the call, as any call may be smaller than what was configured.
  config.batch_size = c.shape.batch + 1;
  config.max_seq_length = c.shape.seq + 3;
  config.hidden_size = c.shape.hidden;
  config.heads = c.shape.heads;
  config.intermediate_size = c.shape.intermediate;
  config.num_hidden_layers = 2;
  config.attn_dropout_ratio = c.attn_dropout;
  config.hidden_dropout_ratio = c.hidden_dropout;
  config.pre_layer_norm = c.pre_layer_norm;
  config.gelu = c.gelu;
  config.causal = c.causal;
  config.normalize_invertible = c.normalize_invertible;
  config.dtype = dtype;
  config.max_contexts = 1;
  config.seed = 0x123456789ABCDEF;  // both words of the masks' key
  return config;
}

CallData CallOf(const OracleCase& c, const StackConfig& config) {
  if (c.keys == KeyKind::kPacked) {
    std::vector<int32_t> lengths;
    const auto longest = static_cast<int32_t>(c.shape.seq);
    for (int64_t b = 0; b < c.shape.batch; ++b)
      lengths.push_back(b == 0 ? (longest + 1) / 2 : b == 1 ? longest : 1);
    return NoisePackedCall(config, lengths, 104 * kNoiseApart);
  }
  const int64_t count = c.shape.tokens() * config.hidden_size;
  CallData data{.batch = c.shape.batch,
                .seq = c.shape.seq,
                .input = Noise(101 * kNoiseApart, count),
                .output_grad = Noise(102 * kNoiseApart, count)};
  const auto batch = static_cast<size_t>(c.shape.batch), seq = static_cast<size_t>(c.shape.seq);
  if (c.keys == KeyKind::kLengths)
    for (size_t b = 0; b < batch; ++b)
      data.lengths.push_back(static_cast<int32_t>(b == 0 ? (seq + 1) / 2 : b == 1 ? 1 : seq));
  if (c.keys == KeyKind::kMask) {
    data.mask = Noise(103 * kNoiseApart, c.shape.tokens());
    for (size_t i = 0; i < data.mask.size(); ++i) {
      const bool key = data.mask[i] < -0.3f && i % seq != seq / 2;  // one key stays
      const bool sample = batch > 1 && i / seq == batch - 1;        // here none does
      if (key || sample) data.mask[i] = -std::numeric_limits<float>::infinity();
    }
  }
  return data;
}

// --- the oracle ---

struct Named {
  const char* name;
  Vec LayerParameters::*member;
};
constexpr Named kParameters[] = {
    {"attn_qkvw", &LayerParameters::qkv_w},     {"attn_qkvb", &LayerParameters::qkv_b},
    {"attn_ow", &LayerParameters::o_w},         {"attn_ob", &LayerParameters::o_b},
    {"attn_nw", &LayerParameters::attn_norm_w}, {"attn_nb", &LayerParameters::attn_norm_b},
    {"inter_w", &LayerParameters::inter_w},     {"inter_b", &LayerParameters::inter_b},
    {"output_w", &LayerParameters::output_w},   {"output_b", &LayerParameters::output_b},
    {"norm_w", &LayerParameters::norm_w},       {"norm_b", &LayerParameters::norm_b}};

std::string ParameterName(size_t layer, const Named& parameter) {
  return absl::StrCat("layers.", layer, ".", parameter.name);
}

// A training step as the oracle reads it.
struct Problem {
  std::vector<LayerConfig> configs;         // one a layer
  std::vector<LayerParameters> parameters;  // one a layer
  ref::Keys keys;
  Vec input, output_grad;
  bool normalize_invertible = false;  // Backward reads the norms' outputs: more errors, one truth
};

// What a step gives: "output", "input_grad", and each parameter's gradient by the parameter's name.
using Tensors = std::map<std::string, Vec>;

Vec ToVec(const std::vector<float>& values) { return Vec(values.begin(), values.end()); }

// The stack's next training step.
Problem ProblemOf(Stack& stack, const CallData& data) {
  const StackConfig& config = stack.config();
  Problem problem;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    problem.configs.push_back(
        {.batch = data.batch,
         .seq = data.seq,
         .hidden = config.hidden_size,
         .heads = config.heads,
         .intermediate = config.intermediate_size,
         .pre_layer_norm = config.pre_layer_norm,
         .eps = config.layer_norm_eps,
         .gelu = config.gelu,
         .attn_dropout_ratio = static_cast<float>(config.attn_dropout_ratio),
         .hidden_dropout_ratio = static_cast<float>(config.hidden_dropout_ratio),
         .rng = {static_cast<uint64_t>(config.seed), stack.counters().rng_counter},
         .layer_index = static_cast<uint32_t>(layer)});
    LayerParameters& p = problem.parameters.emplace_back();
    for (const Named& named : kParameters) {
      const std::string name = ParameterName(problem.parameters.size() - 1, named);
      p.*named.member = Round(config.dtype, ToVec(ReadFloats(stack, name, ParameterPart::kMaster)));
    }
  }
  problem.keys = {.mask = ToVec(data.mask),
                  .lengths = data.lengths,
                  .cu_seqlens = data.cu_seqlens,
                  .causal = config.causal};
  problem.normalize_invertible = config.normalize_invertible;
  problem.input = Round(config.dtype, ToVec(data.input));
  problem.output_grad = Round(config.dtype, ToVec(data.output_grad));
  return problem;
}

// Chains the layers. `forward` is (config, parameters, x, keys), `backward` is (config, parameters,
// values, keys, dy).
template <typename Forward, typename Backward>
Tensors Chain(const Problem& problem, const Forward& forward, const Backward& backward) {
  const size_t layers = problem.configs.size();
  std::vector<LayerValues> values;
  for (size_t i = 0; i < layers; ++i)
    values.push_back(forward(problem.configs[i], problem.parameters[i],
                             i == 0 ? problem.input : values[i - 1].y, problem.keys));
  Tensors tensors{{"output", values.back().y}};
  Vec dy = problem.output_grad;
  for (size_t i = layers; i-- > 0;) {
    const LayerGradients g =
        backward(problem.configs[i], problem.parameters[i], values[i], problem.keys, dy);
    dy = g.dx;
    for (const Named& named : kParameters)
      tensors[ParameterName(i, named)] = g.parameters.*named.member;
  }
  tensors["input_grad"] = dy;
  return tensors;
}

Tensors Oracle(const Problem& problem) {
  return Chain(problem, ref::LayerForward, ref::LayerBackward);
}

// --- the bound ---

// Multiplies each element by 1 + e, every e an independent draw from (-size, size).
class Errors {
 public:
  Errors(double size, uint64_t seed) : size_(size), seed_(seed << 40) {}

  // `times` sizes the error: of n independent roundings it is sqrt(n).
  Vec operator()(Vec values, double times = 1) {
    const std::vector<float> noise =
        Noise(seed_ += kNoiseApart, static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); ++i)
      values[i] *= 1 + times * size_ * static_cast<double>(noise[i]);
    return values;
  }

 private:
  double size_;
  uint64_t seed_;
};

// The oracle's layer with an error in each tensor that the layer stores in the stack's dtype, in
// the order of kernels/transformer/layer.cc. With errors of size 0 it is the oracle, bit for bit.
class ErringLayer {
 public:
  ErringLayer(const LayerConfig& config, const LayerParameters& parameters, const ref::Keys& keys,
              bool normalize_invertible, Errors& errors)
      : c_(config),
        p_(parameters),
        keys_(keys),
        invertible_(normalize_invertible),
        stored_(errors) {}

  LayerValues Forward(const Vec& x) {
    LayerValues v;
    v.x = x;
    if (c_.pre_layer_norm) v.norm = Norm(x, p_.norm_w, p_.norm_b);
    v.n = c_.pre_layer_norm ? v.norm.y : x;
    v.qkv = stored_(ref::Linear(qkv_, v.n, p_.qkv_w, p_.qkv_b));
    v.attention =
        stored_(ref::Attention(attention_, v.qkv, keys_, MaskOf(DropoutSite::kAttentionProbs)),
                kInsideAttention);
    v.attn_sum = stored_(ref::DropoutAdd(stored_(ref::Linear(o_, v.attention, p_.o_w, {})), p_.o_b,
                                         x, MaskOf(DropoutSite::kAttentionOutput), t_, h_));
    v.attn_norm = Norm(v.attn_sum, p_.attn_norm_w, p_.attn_norm_b);
    v.inter_pre = stored_(ref::Linear(inter_, v.attn_norm.y, p_.inter_w, p_.inter_b));
    v.inter = v.inter_pre;
    for (double& e : v.inter) e = ref::Gelu(c_.gelu, e);
    v.inter = stored_(v.inter);
    v.output_sum = stored_(ref::DropoutAdd(
        stored_(ref::Linear(output_, v.inter, p_.output_w, {})), p_.output_b,
        c_.pre_layer_norm ? v.attn_sum : v.attn_norm.y, MaskOf(DropoutSite::kFeedForward), t_, h_));
    if (!c_.pre_layer_norm) v.norm = Norm(v.output_sum, p_.norm_w, p_.norm_b);
    v.y = c_.pre_layer_norm ? v.output_sum : v.norm.y;
    return v;
  }

  LayerGradients Backward(const LayerValues& v, const Vec& dy) {
    LayerGradients g;
    LayerParameters& d = g.parameters;
    Vec doutput_sum = dy;
    if (!c_.pre_layer_norm)
      doutput_sum =
          NormBackward(dy, v.output_sum, v.norm, p_.norm_w, p_.norm_b, {}, d.norm_w, d.norm_b);

    const Vec doutput = DropBackward(doutput_sum, DropoutSite::kFeedForward);
    d.output_w = ref::LinearWeightGrad(output_, doutput, v.inter);
    d.output_b = ref::ColumnSums(doutput, t_, h_);
    Vec slope = v.inter_pre;  // which Forward has stored
    for (double& e : slope) e = ref::GeluDerivative(c_.gelu, e);
    slope = stored_(slope);
    Vec dinter = stored_(ref::LinearInputGrad(output_, doutput, p_.output_w));
    for (size_t i = 0; i < dinter.size(); ++i) dinter[i] *= slope[i];
    dinter = stored_(dinter);
    d.inter_w = ref::LinearWeightGrad(inter_, dinter, v.attn_norm.y);
    d.inter_b = ref::ColumnSums(dinter, t_, c_.intermediate);
    Vec dffn_in = stored_(ref::LinearInputGrad(inter_, dinter, p_.inter_w));
    if (!c_.pre_layer_norm) dffn_in = stored_(Sum(dffn_in, doutput_sum));

    const Vec dattn_sum =
        NormBackward(dffn_in, v.attn_sum, v.attn_norm, p_.attn_norm_w, p_.attn_norm_b,
                     c_.pre_layer_norm ? doutput_sum : Vec{}, d.attn_norm_w, d.attn_norm_b);
    const Vec doproduct = DropBackward(dattn_sum, DropoutSite::kAttentionOutput);
    d.o_w = ref::LinearWeightGrad(o_, doproduct, v.attention);
    d.o_b = ref::ColumnSums(doproduct, t_, h_);
    const Vec dattention = stored_(ref::LinearInputGrad(o_, doproduct, p_.o_w));
    const Vec dqkv =
        stored_(ref::AttentionBackward(attention_, v.qkv, keys_,
                                       MaskOf(DropoutSite::kAttentionProbs), dattention),
                kInsideAttention);
    d.qkv_w = ref::LinearWeightGrad(qkv_, dqkv, v.n);
    d.qkv_b = ref::ColumnSums(dqkv, t_, 3 * h_);
    const Vec dn = stored_(ref::LinearInputGrad(qkv_, dqkv, p_.qkv_w));
    g.dx = c_.pre_layer_norm
               ? NormBackward(dn, v.x, v.norm, p_.norm_w, p_.norm_b, dattn_sum, d.norm_w, d.norm_b)
               : stored_(Sum(dn, dattn_sum));
    return g;
  }

 private:
  // Besides its own result attention may round the probabilities, and in Backward the scores'
  // gradients and the output that the row sums come from: three errors like one more rounding of
  // the result each. sqrt(1 + 3).
  static constexpr double kInsideAttention = 2;

  ref::Mask MaskOf(DropoutSite site) const {
    const bool probs = site == DropoutSite::kAttentionProbs;
    return {probs ? c_.attn_dropout_ratio : c_.hidden_dropout_ratio, c_.rng,
            DropoutStream(c_.layer_index, site)};
  }
  static Vec Sum(Vec a, const Vec& b) {
    for (size_t i = 0; i < b.size(); ++i) a[i] += b[i];
    return a;
  }
  ref::NormResult Norm(const Vec& x, const Vec& gamma, const Vec& beta) {
    ref::NormResult norm = ref::LayerNorm(x, gamma, beta, c_.eps, t_, h_);
    norm.y = stored_(norm.y);
    return norm;
  }
  // The gradient of the norm's input, which `residual_grad` (or nothing) is added to.
  Vec NormBackward(const Vec& dy, const Vec& x, const ref::NormResult& norm, const Vec& gamma,
                   const Vec& beta, const Vec& residual_grad, Vec& dgamma, Vec& dbeta) {
    ref::NormGradients g =
        invertible_ ? ref::LayerNormBackwardFromOutput(dy, norm.y, beta, gamma, norm.rstd, t_, h_)
                    : ref::LayerNormBackward(dy, x, gamma, norm.mean, norm.rstd, t_, h_);
    dgamma = std::move(g.dgamma);
    dbeta = std::move(g.dbeta);
    return stored_(Sum(std::move(g.dx), residual_grad));
  }
  Vec DropBackward(const Vec& dsum, DropoutSite site) {
    return stored_(ref::DropoutAddBackward(dsum, MaskOf(site), t_, h_));
  }

  const LayerConfig& c_;
  const LayerParameters& p_;
  const ref::Keys& keys_;
  const bool invertible_;
  Errors& stored_;
  const int64_t h_ = c_.hidden, head_dim_ = h_ / c_.heads;
  const ref::AttentionShape attention_{c_.batch, c_.seq, h_, c_.heads,
                                       1.0 / std::sqrt(static_cast<double>(head_dim_))};
  const int64_t t_ = ref::Tokens(attention_, keys_);
  const ref::ProductShape qkv_{t_, h_, 3 * h_}, o_{t_, h_, h_}, inter_{t_, h_, c_.intermediate},
      output_{t_, c_.intermediate, h_};
};

Tensors ErringOracle(Problem problem, double size, uint64_t seed) {
  Errors errors(size, seed);
  // The call's tensors are exact, but the fp32 sums that read them are not.
  problem.input = errors(problem.input);
  problem.output_grad = errors(problem.output_grad);
  return Chain(
      problem,
      [&](const LayerConfig& c, const LayerParameters& p, const Vec& x, const ref::Keys& keys) {
        return ErringLayer(c, p, keys, problem.normalize_invertible, errors).Forward(x);
      },
      [&](const LayerConfig& c, const LayerParameters& p, const LayerValues& values,
          const ref::Keys& keys, const Vec& dy) {
        return ErringLayer(c, p, keys, problem.normalize_invertible, errors).Backward(values, dy);
      });
}

// How far apart two tensors are.
struct Distance {
  double norm = 0;     // L2 norm of the difference
  double largest = 0;  // largest difference of two elements: one wrong element shows here
};

Distance Between(const Vec& a, const Vec& b) {
  if (a.size() != b.size()) return {HUGE_VAL, HUGE_VAL};
  double squares = 0, largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(a[i] - b[i]);
    if (!std::isfinite(difference)) return {HUGE_VAL, HUGE_VAL};
    squares += difference * difference;
    largest = std::max(largest, difference);
  }
  return {std::sqrt(squares), largest};
}

// What a stack may be off by, tensor by tensor.
//
// With u the unit roundoff, each stored tensor's elements are off by u(dtype), relatively, when
// they are stored; and by sqrt(n) u(fp32) for the fp32 sums of up to n terms that they go into:
// such a sum is the exact sum of terms that are off by so much (Higham and Mary, "A New Approach to
// Probabilistic Rounding Error Analysis", 2019). How large the results' errors become by that is
// measured, as Monte Carlo arithmetic does (Parker, "Monte Carlo Arithmetic", 1997): the oracle
// runs again and again with random errors of this size in each of the tensors that a layer stores,
// eleven in Forward and ten (Pre-LN) or twelve (Post-LN) in Backward. So the layer's own formulas
// say how errors grow in norms and softmax, and how they cancel in sums.
//
// The bound is kMargin times the largest of kDraws runs' errors. Over many elements an error's norm
// hardly varies, and one run is as good as many; where a single rounding decides, the largest of
// eight is 1.7 deviations in the median, which makes the bound 5. Real roundings are smaller,
// besides: errors uniform in (-u, u) have deviation 0.58 u, those of rounding about 0.4 u.
// Subnormals of fp16 are too small to show in any of these tensors.
class Bounds {
 public:
  // Errors are linear in u to first order, so one size serves every dtype. It is bf16's, the only
  // one that is large enough for more than first order.
  Bounds(const Problem& problem, const Tensors& truth) {
    for (uint64_t seed = 1; seed <= kDraws; ++seed)
      for (const auto& [name, values] : ErringOracle(problem, kSize, seed)) {
        const Distance d = Between(values, truth.at(name));
        Distance& drawn = drawn_[name];
        drawn = {std::max(drawn.norm, d.norm), std::max(drawn.largest, d.largest)};
      }
    const LayerConfig& c = problem.configs[0];
    const int64_t tokens = static_cast<int64_t>(problem.input.size()) / c.hidden;
    longest_sum_ = static_cast<double>(std::max({tokens, 3 * c.hidden, c.intermediate}));
  }

  // The error of tensor `name`, in units of its bound: above 1 it is too large.
  double Ratio(const std::string& name, DType dtype, const Vec& got, const Vec& want) const {
    const double size = UnitRoundoff(dtype) + std::sqrt(longest_sum_) * UnitRoundoff(DType::kF32);
    const double scale = kMargin * size / kSize;
    const Distance error = Between(got, want), &drawn = drawn_.at(name);
    const auto ratio = [&](double off, double bound) { return off == 0 ? 0 : off / bound; };
    return std::max(ratio(error.norm, scale * drawn.norm),
                    ratio(error.largest, scale * drawn.largest));
  }

  // The tensor that is worst off, and its ratio.
  std::pair<std::string, double> Worst(DType dtype, const Tensors& got, const Tensors& want) const {
    std::pair<std::string, double> worst{"", 0};
    for (const auto& [name, values] : want) {
      const double ratio = Ratio(name, dtype, got.at(name), values);
      if (ratio > worst.second) worst = {name, ratio};
    }
    return worst;
  }

 private:
  static constexpr uint64_t kDraws = 8;
  static constexpr double kMargin = 3;
  static constexpr double kSize = 0x1p-8;
  std::map<std::string, Distance> drawn_;
  double longest_sum_ = 0;
};

// --- the stack ---

// A stack whose weights are far from the trivial ones: products keep their inputs' size, and biases
// are as large as what they are added to, so that a forgotten one shows.
std::unique_ptr<Stack> Make(Backend& backend, const StackConfig& config) {
  std::unique_ptr<Stack> stack =
      Value(Stack::Create(backend, Value(Resolve(config, backend.info().ordinal))));
  uint64_t seed = 0;
  for (const ParameterInfo& p : stack->parameters()) {
    std::vector<float> values = Noise(seed += kNoiseApart, p.shape.elements());
    const bool gamma = absl::EndsWith(p.name, "attn_nw") || absl::EndsWith(p.name, "norm_w");
    for (float& value : values) {
      if (gamma) value = 1 + 0.5f * value;
      // Uniform noise has deviation 1/sqrt(3).
      if (p.shape.rank() == 2) value *= std::sqrt(3.0f / static_cast<float>(p.shape[1]));
    }
    WriteFloats(*stack, p.name, ParameterPart::kMaster, values);
  }
  return stack;
}

// One training step from gradients of zero.
Tensors Step(Backend& backend, Stack& stack, const CallData& data) {
  const absl::Status zeroed = stack.ZeroGradients();
  if (!zeroed.ok()) throw std::runtime_error(zeroed.ToString());
  const CallResult result =
      RunTraining(backend, stack, data, {0, stack.config().num_hidden_layers});
  Tensors tensors{{"output", ToVec(result.output)}, {"input_grad", ToVec(result.input_grad)}};
  for (const auto& [name, g] : ReadAll(stack, ParameterPart::kGradient)) tensors[name] = ToVec(g);
  return tensors;
}

class OracleTest : public ::testing::TestWithParam<std::tuple<const char*, OracleCase>> {};

TEST_P(OracleTest, TrainingStep) {
  const auto& [device, c] = GetParam();
  std::string reason;
  const std::unique_ptr<Backend> backend = OpenDevice(device, &reason);
  if (backend == nullptr) GTEST_SKIP() << reason;
  std::unique_ptr<const Bounds> bounds;
  for (const DType dtype : kDTypes) {
    SCOPED_TRACE(Name(dtype));
    const StackConfig config = ConfigOf(c, dtype);
    const std::unique_ptr<Stack> stack = Make(*backend, config);
    const CallData data = CallOf(c, config);
    const Problem problem = ProblemOf(*stack, data);
    const Tensors want = Oracle(problem);
    if (bounds == nullptr) bounds = std::make_unique<Bounds>(problem, want);
    const Tensors got = Step(*backend, *stack, data);
    ASSERT_EQ(got.size(), want.size());
    for (const auto& [name, values] : want)
      EXPECT_LE(bounds->Ratio(name, dtype, got.at(name), values), 1) << name;
    if (c.attn_dropout > 0 || c.hidden_dropout > 0) continue;
    const Vec eval = ToVec(RunEval(*backend, *stack, data, {0, 2}));
    EXPECT_LE(bounds->Ratio("output", dtype, eval, want.at("output")), 1) << "evaluation";
  }
}

INSTANTIATE_TEST_SUITE_P(, OracleTest,
                         ::testing::Combine(::testing::ValuesIn(kDevices),
                                            ::testing::ValuesIn(Cases())),
                         [](const auto& instance) {
                           const bool cpu = std::string(std::get<0>(instance.param)) == "cpu";
                           return (cpu ? "cpu_" : "cuda_") + std::get<1>(instance.param).Name();
                         });

// --- which masks, and whether the bound sees a wrong one ---

class OracleMaskTest : public DeviceTest {};

// A ratio above this is a failure by a wide margin.
constexpr double kFarOut = 10;

TEST_P(OracleMaskTest, EachStepDrawsItsOwn) {
  for (const bool pre : {true, false}) {
    const OracleCase c{{3, 7, 24, 3, 40}, pre, GeluKind::kErf, KeyKind::kNone, 0.2, 0.1};
    for (const DType dtype : kDTypes) {
      const StackConfig config = ConfigOf(c, dtype);
      const std::unique_ptr<Stack> stack = Make(*backend_, config);
      const CallData data = CallOf(c, config);
      Tensors before;
      // The first two steps, and one whose counter fills both of its words.
      for (const uint64_t counter : {uint64_t{0}, uint64_t{1}, (uint64_t{5} << 32) + 7}) {
        SCOPED_TRACE(absl::StrCat(pre ? "Pre-LN " : "Post-LN ", Name(dtype), " ", counter));
        if (counter > 1) stack->set_counters({.rng_counter = counter});
        ASSERT_EQ(stack->counters().rng_counter, counter);
        const Problem problem = ProblemOf(*stack, data);
        const Tensors want = Oracle(problem);
        const Bounds bounds(problem, want);
        const Tensors got = Step(*backend_, *stack, data);
        const auto& [name, ratio] = bounds.Worst(dtype, got, want);
        EXPECT_LE(ratio, 1) << name;
        if (!before.empty()) {
          EXPECT_GT(bounds.Worst(dtype, got, before).second, kFarOut);
        }
        before = want;
      }
    }
  }
}

// With no errors ErringLayer is the oracle.
TEST(OracleBound, IsOfTheOraclesOwnFormulas) {
  std::string reason;
  const std::unique_ptr<Backend> backend = OpenDevice("cpu", &reason);
  ASSERT_NE(backend, nullptr) << reason;
  for (const bool pre : {true, false})
    for (const KeyKind keys : {KeyKind::kMask, KeyKind::kLengths}) {
      const OracleCase c{{3, 7, 24, 3, 40}, pre, GeluKind::kTanh, keys, 0.2, 0.1};
      const StackConfig config = ConfigOf(c, DType::kF32);
      const std::unique_ptr<Stack> stack = Make(*backend, config);
      const Problem problem = ProblemOf(*stack, CallOf(c, config));
      EXPECT_EQ(ErringOracle(problem, 0, 1), Oracle(problem));
    }
}

struct Fault {
  const char* what;
  std::function<void(Problem&)> commit;
};

void Scale(Vec& values, double factor) {
  for (double& e : values) e *= factor;
}

// The oracle of another layer than ours: the comparison must not only fail, but by far.
TEST_P(OracleMaskTest, TheBoundCanFail) {
  const std::vector<Fault> faults = {
      {"layer 1 draws layer 0's masks", [](Problem& p) { p.configs[1].layer_index = 0; }},
      {"layer 0 draws the next step's masks", [](Problem& p) { ++p.configs[0].rng.counter; }},
      {"layer 1 draws another seed's masks", [](Problem& p) { ++p.configs[1].rng.seed; }},
      {"layer 0 leaves attention's dropout out",
       [](Problem& p) { p.configs[0].attn_dropout_ratio = 0; }},
      {"layer 1 leaves the hidden dropouts out",
       [](Problem& p) { p.configs[1].hidden_dropout_ratio = 0; }},
      // A sub-layer's output without the factor 1/(1 - p).
      {"attention's output is not scaled up",
       [](Problem& p) {
         Scale(p.parameters[1].o_w, 1 - 0.37);
         Scale(p.parameters[1].o_b, 1 - 0.37);
       }},
      {"the feed-forward output is not scaled up",
       [](Problem& p) {
         Scale(p.parameters[1].output_w, 1 - 0.37);
         Scale(p.parameters[1].output_b, 1 - 0.37);
       }},
      {"the norms of layer 1 are swapped",
       [](Problem& p) {
         std::swap(p.parameters[1].norm_w, p.parameters[1].attn_norm_w);
         std::swap(p.parameters[1].norm_b, p.parameters[1].attn_norm_b);
       }},
      {"attn_ob is forgotten", [](Problem& p) { Scale(p.parameters[0].o_b, 0); }},
      {"inter_b is forgotten", [](Problem& p) { Scale(p.parameters[1].inter_b, 0); }},
      {"output_b is forgotten", [](Problem& p) { Scale(p.parameters[1].output_b, 0); }},
      {"attn_qkvb is forgotten", [](Problem& p) { Scale(p.parameters[0].qkv_b, 0); }},
      {"the key mask is forgotten", [](Problem& p) { p.keys = {}; }},
      // In Pre-LN the norm does not see the input's scale, and the residual is all that is lost.
      {"the residual of layer 0 is missing", [](Problem& p) { Scale(p.input, 0x1p-20); }},
  };
  for (const bool pre : {true, false})
    for (const DType dtype : kDTypes) {
      const OracleCase c{{3, 7, 24, 3, 40}, pre, GeluKind::kErf, KeyKind::kMask, 0.37, 0.37};
      const StackConfig config = ConfigOf(c, dtype);
      const std::unique_ptr<Stack> stack = Make(*backend_, config);
      const CallData data = CallOf(c, config);
      const Problem problem = ProblemOf(*stack, data);
      const Bounds bounds(problem, Oracle(problem));
      const Tensors got = Step(*backend_, *stack, data);
      for (const Fault& fault : faults) {
        Problem spoiled = problem;
        fault.commit(spoiled);
        Tensors wrong = Oracle(spoiled);
        wrong.erase("input_grad");  // an input that is scaled would show here in any case
        EXPECT_GT(bounds.Worst(dtype, got, wrong).second, kFarOut)
            << (pre ? "Pre-LN, " : "Post-LN, ") << Name(dtype) << ": " << fault.what;
      }
    }
}

INSTANTIATE_TEST_SUITE_P(, OracleMaskTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
