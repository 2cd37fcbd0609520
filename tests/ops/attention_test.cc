// Attention and AttentionBackward against the oracle.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "op_rig.h"

namespace lamina::testing {
namespace {

enum class KeyKind {
  kNone,
  kLengths,     // valid lengths, 1 and S among them
  kMinus10000,  // a mask of 0 and -10000, as BERT's users pass it
  kInfinite,    // a mask of 0 and -inf; in the last sample every key is masked out
  kLowest,      // a mask of 0 and the lowest fp32 number
  kBias,        // any numbers
};
const char* Name(KeyKind kind) {
  switch (kind) {
    case KeyKind::kNone:
      return "none";
    case KeyKind::kLengths:
      return "lengths";
    case KeyKind::kMinus10000:
      return "minus10000";
    case KeyKind::kInfinite:
      return "infinite";
    case KeyKind::kLowest:
      return "lowest";
    case KeyKind::kBias:
      return "bias";
  }
  return "";
}

struct AttentionCase {
  LayerShape shape;
  KeyKind keys;
  float ratio;
  int64_t offset = 0;
  std::string Name() const {
    return absl::StrCat(shape.Name(), "_", ::lamina::testing::Name(keys), "_p",
                        std::lround(1000 * ratio), offset != 0 ? "_unaligned" : "");
  }
};

std::vector<AttentionCase> AttentionCases() {
  constexpr KeyKind kKinds[] = {KeyKind::kNone,     KeyKind::kLengths, KeyKind::kMinus10000,
                                KeyKind::kInfinite, KeyKind::kLowest,  KeyKind::kBias};
  constexpr float kRatios[] = {0.1f, 0.0f, 0.5f, 0.999f};
  std::vector<AttentionCase> cases;
  // Every shape, with kinds of keys and ratios in turn.
  size_t i = 0;
  for (const LayerShape& s : kOpShapes) {
    cases.push_back({s, kKinds[i % 6], kRatios[i % 4]});
    ++i;
  }
  // Every kind of keys with and without dropout, and every ratio, on shapes of several samples: one
  // whose rows suit vectors and one whose rows do not.
  for (const KeyKind kind : kKinds)
    for (const float ratio : {0.0f, 0.1f}) {
      cases.push_back({{3, 37, 64, 1, 8}, kind, ratio});
      cases.push_back({{3, 11, 15, 3, 8}, kind, ratio});
    }
  for (const float ratio : kRatios) {
    cases.push_back({{2, 65, 128, 2, 8}, KeyKind::kLengths, ratio});
    cases.push_back({{2, 9, 34, 2, 8}, KeyKind::kInfinite, ratio, 1});
  }
  return cases;
}

class AttentionTest : public OpTest<AttentionCase> {
 protected:
  const LayerShape& s() const { return param().shape; }
  LayerDims Dims() const { return s().Dims(act()); }
  float Scale() const {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(s().head_dim())));
  }
  ref::AttentionShape RefShape() const {
    return {s().batch, s().seq, s().hidden, s().heads, static_cast<double>(Scale())};
  }
  ref::Mask HostMask() const {
    return ref::Mask{param().ratio, RngState{0x0123456789ABCDEFu, (uint64_t{1} << 32) + 5},
                     DropoutStream(11, DropoutSite::kAttentionProbs)};
  }
  Dropout DeviceMask(OpRun& run) const {
    if (param().ratio == 0.0f) return Dropout{};
    const ref::Mask mask = HostMask();
    return Dropout{mask.ratio, run.Rng(mask.rng), mask.stream};
  }
  // Scores of a few units: the softmax has both peaks and tails.
  Vec Qkv() const { return Noise(act(), 51, s().tokens() * 3 * s().hidden, 1.8); }

  ref::Keys Keys() const {
    ref::Keys keys;
    const auto batch = static_cast<size_t>(s().batch), seq = static_cast<size_t>(s().seq);
    if (param().keys == KeyKind::kNone) return keys;
    if (param().keys == KeyKind::kLengths) {
      for (size_t b = 0; b < batch; ++b)
        keys.lengths.push_back(static_cast<int32_t>(b == 0 ? (seq + 1) / 2 : b == 1 ? 1 : seq));
      return keys;
    }
    keys.mask = Noise(DType::kF32, 52, s().batch * s().seq, 3.0);
    if (param().keys == KeyKind::kBias) return keys;
    const double out = param().keys == KeyKind::kInfinite ? -std::numeric_limits<double>::infinity()
                       : param().keys == KeyKind::kLowest
                           ? static_cast<double>(std::numeric_limits<float>::lowest())
                           : -10000.0;
    for (size_t i = 0; i < keys.mask.size(); ++i) {
      const bool masked = keys.mask[i] < 0.5 && i % seq != seq / 2;  // one key stays
      const bool whole_sample = param().keys == KeyKind::kInfinite && i / seq == batch - 1;
      keys.mask[i] = masked || whole_sample ? out : 0.0;
    }
    return keys;
  }
  TensorView DeviceKeyMask(OpRun& run, const ref::Keys& keys) const {
    return keys.mask.empty() ? TensorView{} : run.In(DType::kF32, {s().batch, s().seq}, keys.mask);
  }
  TensorView DeviceLengths(OpRun& run, const ref::Keys& keys) const {
    return keys.lengths.empty() ? TensorView{} : run.In(keys.lengths);
  }

  struct Bounds {
    Vec out, dqkv;
  };
  Bounds BoundsOf(const Vec& qkv, const ref::Keys& keys, const Vec& out, const Vec& dout,
                  const Vec& dqkv) const;
};

// How far out and dqkv may be off. Per head, with P = softmax(s), f the dropout factors, and u the
// unit roundoff of act:
//  - A score is off by e_ij = Growth(D) scale sum |q k| + a few ulps of the score and its mask
//    (which also covers an exponential through base 2), so P_ij is off by the relative
//    rel_ij = e_ij + sum_j P_ij e_ij + Growth(S) + ulps of the row's log-sum. Keys of P = 0 add
//    nothing.
//  - P and dS may be rounded to act before the products that tensor cores do: independent errors of
//    u a term, so 4 u sqrt(sum of squared terms) (each is uniform within u: seven deviations), and
//    in fp16 at least half the subnormals' spacing each.
//  - sum_j P dP is the same as dout . out, for which the stored, rounded out may be used.
AttentionTest::Bounds AttentionTest::BoundsOf(const Vec& qkv, const ref::Keys& keys, const Vec& out,
                                              const Vec& dout, const Vec& dqkv) const {
  const ref::AttentionShape shape = RefShape();
  const auto seq = static_cast<size_t>(s().seq), hidden = static_cast<size_t>(s().hidden);
  const auto heads = static_cast<size_t>(s().heads), d = hidden / heads;
  const double u = UnitRoundoff(act()), scale = shape.scale;
  const double least = act() == DType::kF16 ? 0x1p-25 : 0.0;
  const Vec all_factors =
      ref::DropoutFactors(HostMask(), shape.batch * shape.heads * shape.seq, shape.seq);
  Bounds bounds{Vec(out.size(), 0.0), Vec(dqkv.size(), 0.0)};
  Vec e(seq), rel(seq), dprob(seq), dprob_error(seq);
  // Per element of dk and dv, and of dq and out: the sums of squared terms that rounding to act
  // blurs.
  Vec dqkv_squares(dqkv.size(), 0.0), out_squares(out.size(), 0.0);
  for (size_t b = 0; b < static_cast<size_t>(s().batch); ++b)
    for (size_t a = 0; a < heads; ++a) {
      const Vec probs =
          ref::AttentionProbs(shape, qkv, keys, static_cast<int64_t>(b), static_cast<int64_t>(a));
      for (size_t i = 0; i < seq; ++i) {
        const size_t q_row = (b * seq + i) * 3 * hidden + a * d,
                     o_row = (b * seq + i) * hidden + a * d;
        const double* p = &probs[i * seq];
        const double* f = &all_factors[((b * heads + a) * seq + i) * seq];
        double average_e = 0, log_sum = 0;
        for (size_t j = 0; j < seq; ++j) {
          const size_t k_row = (b * seq + j) * 3 * hidden + hidden + a * d;
          double dot = 0, abs_dot = 0;
          for (size_t c = 0; c < d; ++c) {
            dot += qkv[q_row + c] * qkv[k_row + c] * scale;
            abs_dot += std::abs(qkv[q_row + c] * qkv[k_row + c]) * scale;
          }
          const double mask = keys.mask.empty() ? 0.0 : keys.mask[b * seq + j];
          e[j] = 0.0;
          if (p[j] == 0.0) continue;
          e[j] = Growth(s().head_dim()) * abs_dot +
                 4 * kF32Roundoff * (std::abs(dot) + std::abs(mask));
          average_e += p[j] * e[j];
          log_sum = std::max(log_sum, std::abs(dot + mask - std::log(p[j])));
        }
        double row_dot = 0, row_squares = 0, row_error = 0;
        for (size_t c = 0; c < d; ++c) {
          const double term = dout[o_row + c] * out[o_row + c];
          row_dot += term;
          row_squares += term * term;
          row_error += Growth(s().head_dim()) * std::abs(term);
        }
        row_error += 4 * u * std::sqrt(row_squares);
        for (size_t j = 0; j < seq; ++j) {
          const size_t v_row = (b * seq + j) * 3 * hidden + 2 * hidden + a * d;
          rel[j] = e[j] + average_e + Growth(s().seq) + 4 * kF32Roundoff * (1 + log_sum);
          double abs_dprob = 0;
          dprob[j] = 0;
          for (size_t c = 0; c < d; ++c) {
            const double term = f[j] * dout[o_row + c] * qkv[v_row + c];
            dprob[j] += term;
            abs_dprob += std::abs(term);
          }
          dprob_error[j] = Growth(s().head_dim()) * abs_dprob;
          row_error += p[j] * (rel[j] * std::abs(dprob[j]) + dprob_error[j]);
        }
        for (size_t j = 0; j < seq; ++j) {
          const size_t k_row = (b * seq + j) * 3 * hidden + hidden + a * d, v_row = k_row + hidden;
          const double pd = p[j] * f[j];
          const double ds = p[j] * (dprob[j] - row_dot);
          const double ds_error = p[j] * (dprob_error[j] + row_error) + std::abs(ds) * rel[j] +
                                  (p[j] > 0 ? least : 0.0);
          for (size_t c = 0; c < d; ++c) {
            const double v = std::abs(qkv[v_row + c]), k = std::abs(qkv[k_row + c]);
            const double q = std::abs(qkv[q_row + c]), dy = std::abs(dout[o_row + c]);
            const double p_error = pd * (rel[j] + Growth(s().seq)) + f[j] * least;
            bounds.out[o_row + c] += p_error * v;
            out_squares[o_row + c] += pd * v * pd * v;
            bounds.dqkv[v_row + c] += p_error * dy;
            dqkv_squares[v_row + c] += pd * dy * pd * dy;
            const double s_error = ds_error + Growth(s().seq) * std::abs(ds);
            bounds.dqkv[q_row + c] += scale * s_error * k;
            dqkv_squares[q_row + c] += std::pow(scale * ds * k, 2);
            bounds.dqkv[k_row + c] += scale * s_error * q;
            dqkv_squares[k_row + c] += std::pow(scale * ds * q, 2);
          }
        }
      }
    }
  for (size_t i = 0; i < out.size(); ++i)
    bounds.out[i] += u * std::abs(out[i]) + 4 * u * std::sqrt(out_squares[i]) + Tiny(act());
  for (size_t i = 0; i < dqkv.size(); ++i)
    bounds.dqkv[i] += u * std::abs(dqkv[i]) + 4 * u * std::sqrt(dqkv_squares[i]) + Tiny(act());
  return bounds;
}

TEST_P(AttentionTest, ForwardAndBackward) {
  const Shape act_shape{s().tokens(), s().hidden};
  const Vec qkv = Qkv(), dout = Noise(act(), 53, s().tokens() * s().hidden);
  const ref::Keys keys = Keys();
  // Backward is given what Forward left, as a stack does; so both run in one go.
  const Results results = RunTwice(
      backend(),
      [&](OpRun& run) {
        const Workspace workspace = run.WorkspaceFor(Dims());
        const TensorView qkv_view = run.In(act(), {s().tokens(), 3 * s().hidden}, qkv);
        const TensorView mask = DeviceKeyMask(run, keys), lengths = DeviceLengths(run, keys);
        const Dropout dropout = DeviceMask(run);
        const TensorView out = run.Out("out", act(), act_shape);
        const size_t saved_bytes = backend().AttentionSavedBytes(Dims());
        const TensorView saved =
            saved_bytes == 0 ? TensorView{}
                             : run.Out("saved", DType::kU8, {static_cast<int64_t>(saved_bytes)});
        absl::Status status = backend().Attention(workspace, {.dims = Dims(),
                                                              .qkv = qkv_view,
                                                              .mask = mask,
                                                              .lengths = lengths,
                                                              .scale = Scale(),
                                                              .dropout = dropout,
                                                              .out = out,
                                                              .saved = saved});
        if (!status.ok()) return status;
        return backend().AttentionBackward(
            workspace, {.dims = Dims(),
                        .qkv = qkv_view,
                        .mask = mask,
                        .lengths = lengths,
                        .scale = Scale(),
                        .dropout = dropout,
                        .out = out,
                        .saved = saved,
                        .dout = run.In(act(), act_shape, dout),
                        .dqkv = run.Out("dqkv", act(), {s().tokens(), 3 * s().hidden})});
      },
      param().offset);
  const Vec out = ref::Attention(RefShape(), qkv, keys, HostMask());
  const Vec dqkv = ref::AttentionBackward(RefShape(), qkv, keys, HostMask(), dout);
  const Bounds bounds = BoundsOf(qkv, keys, out, dout, dqkv);
  ExpectWithin("out", results.Values("out", act()), out, bounds.out);
  ExpectWithin("dqkv", results.Values("dqkv", act()), dqkv, bounds.dqkv);

  // Evaluation saves nothing.
  const Results evaluation = RunTwice(
      backend(),
      [&](OpRun& run) {
        return backend().Attention(run.WorkspaceFor(Dims()),
                                   {.dims = Dims(),
                                    .qkv = run.In(act(), {s().tokens(), 3 * s().hidden}, qkv),
                                    .mask = DeviceKeyMask(run, keys),
                                    .lengths = DeviceLengths(run, keys),
                                    .scale = Scale(),
                                    .dropout = DeviceMask(run),
                                    .out = run.Out("out", act(), act_shape)});
      },
      param().offset);
  ExpectWithin("out without saved", evaluation.Values("out", act()), out, bounds.out);
}

LAMINA_OP_SUITE(AttentionTest, AttentionCases());

}  // namespace
}  // namespace lamina::testing
