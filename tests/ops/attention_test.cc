// Attention and AttentionBackward against the oracle: dense and packed batches, causal or not.
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

// The lengths of a packed batch's sequences.
struct Packing {
  const char* name;
  std::vector<int32_t> lengths;
};

struct AttentionCase {
  LayerShape shape;  // of a packed batch: how many sequences, and the longest one's length
  KeyKind keys;
  float ratio;
  int64_t offset = 0;
  bool causal = false;
  Packing packing = {"", {}};  // no lengths: not packed
  bool many_blocks = false;
  std::string Name() const {
    return absl::StrCat(shape.Name(), "_", ::lamina::testing::Name(keys), "_p",
                        std::lround(1000 * ratio), causal ? "_causal" : "",
                        packing.lengths.empty() ? "" : "_packed_", packing.name,
                        offset != 0 ? "_unaligned" : "");
  }
};

AttentionCase Packed(const Packing& packing, int64_t heads, int64_t head_dim, float ratio,
                     bool causal, int64_t offset = 0) {
  const auto batch = static_cast<int64_t>(packing.lengths.size());
  const int64_t longest = *std::max_element(packing.lengths.begin(), packing.lengths.end());
  return {.shape = {batch, longest, heads * head_dim, heads, 8},
          .keys = KeyKind::kNone,
          .ratio = ratio,
          .offset = offset,
          .causal = causal,
          .packing = packing};
}

std::vector<AttentionCase> AttentionCases() {
  constexpr KeyKind kKinds[] = {KeyKind::kNone,     KeyKind::kLengths, KeyKind::kMinus10000,
                                KeyKind::kInfinite, KeyKind::kLowest,  KeyKind::kBias};
  constexpr float kRatios[] = {0.1f, 0.0f, 0.5f, 0.999f};
  // Those that the fused kernels are said to have, and odd ones.
  constexpr int64_t kHeadDims[] = {8, 32, 40, 64, 80, 96, 128, 5, 33};
  std::vector<AttentionCase> cases;
  // Every shape, with kinds of keys and ratios in turn.
  size_t i = 0;
  for (const LayerShape& s : kOpShapes) {
    cases.push_back({s, kKinds[i % 6], kRatios[i % 4]});
    ++i;
  }
  // Every kind of keys with and without dropout, causal or not, and every ratio, on shapes of
  // several samples: one whose rows suit vectors and one whose rows do not.
  for (const bool causal : {false, true}) {
    for (const KeyKind kind : kKinds)
      for (const float ratio : {0.0f, 0.1f}) {
        cases.push_back({{3, 37, 64, 1, 8}, kind, ratio, 0, causal});
        cases.push_back({{3, 11, 15, 3, 8}, kind, ratio, 0, causal});
      }
    for (const float ratio : kRatios) {
      cases.push_back({{2, 65, 128, 2, 8}, KeyKind::kLengths, ratio, 0, causal});
      cases.push_back({{2, 9, 34, 2, 8}, KeyKind::kInfinite, ratio, 1, causal});
    }
  }
  // Every head dim, and sequences that end at a tile, before it and after it.
  for (const int64_t d : kHeadDims) {
    cases.push_back({{1, 65, 2 * d, 2, 8}, KeyKind::kBias, 0.1f, 0, true});
    cases.push_back({{1, 129, d, 1, 8}, KeyKind::kLengths, 0.0f, 0, d % 16 == 0});
  }
  for (const int64_t seq : {1, 2, 16, 17, 31, 32, 33, 63, 64, 127, 128, 129}) {
    cases.push_back({{1, seq, 64, 1, 8}, KeyKind::kNone, 0.1f, 0, true});
    cases.push_back({{2, seq, 32, 1, 8}, KeyKind::kBias, 0.0f, 0, false});
  }
  // DeepSpeed's sequences.
  for (const int64_t seq : {24, 53, 54, 56, 119, 120})
    cases.push_back({{1, seq, 64, 1, 8}, kKinds[i++ % 6], 0.1f});
  for (const int64_t seq : {381, 384, 511, 512})
    cases.push_back({{1, seq, 32, 1, 8}, kKinds[i++ % 6], 0.1f, 0, seq == 512});
  // Sequences of several blocks, causal or not, with every kind of keys.
  const auto add_many_blocks = [&](AttentionCase c) {
    c.many_blocks = true;
    cases.push_back(std::move(c));
  };
  for (const int64_t seq : {192, 257, 300, 512}) {
    for (const bool causal : {false, true}) {
      add_many_blocks({{2, seq, 128, 2, 8}, kKinds[i++ % 6], 0.1f, 0, causal});
      add_many_blocks({{2, seq, 64, 1, 8}, kKinds[i++ % 6], 0.0f, 0, causal});
      cases.push_back({{1, seq, 40, 1, 8}, kKinds[i++ % 6], 0.5f, 0, causal});
    }
  }
  // More heads than a device computes at once.
  add_many_blocks({{110, 70, 48, 3, 8}, KeyKind::kLengths, 0.1f, 0, false});
  add_many_blocks({{150, 66, 80, 2, 8}, KeyKind::kBias, 0.1f, 0, true});
  add_many_blocks({{70, 200, 32, 1, 8}, KeyKind::kLengths, 0.1f, 0, true});
  add_many_blocks({{140, 130, 16, 1, 8}, KeyKind::kInfinite, 0.1f, 0, false});
  Packing many{"many", {}};
  for (int32_t b = 0; b < 300; ++b) many.lengths.push_back(b * 37 % 128 + 1);
  add_many_blocks(Packed(many, 1, 16, 0.1f, false));
  add_many_blocks(Packed(many, 3, 8, 0.0f, true));
  // The same for heads wider than 64.
  constexpr int64_t kWideDims[] = {128, 80, 112, 96, 72};
  for (const int64_t seq : {66, 128, 130, 192, 257, 300, 512}) {
    for (const bool causal : {false, true}) {
      add_many_blocks({{2, seq, 256, 2, 8}, kKinds[i++ % 6], 0.1f, 0, causal});
      add_many_blocks({{2, seq, kWideDims[i % 5], 1, 8}, kKinds[i++ % 6], 0.0f, 0, causal});
    }
  }
  for (const KeyKind kind : kKinds) add_many_blocks({{3, 190, 128, 1, 8}, kind, 0.1f, 0, true});
  add_many_blocks({{70, 130, 72, 1, 8}, KeyKind::kLengths, 0.1f, 0, false});
  add_many_blocks({{67, 130, 80, 1, 8}, KeyKind::kBias, 0.1f, 0, true});
  add_many_blocks(Packed(many, 1, 72, 0.1f, true));
  // Packed batches.
  const Packing mixed{"mixed", {1, 2, 7, 64, 65, 130}};
  for (const Packing& packing :
       {mixed, Packing{"one", {37}}, Packing{"ones", std::vector<int32_t>(300, 1)},
        Packing{"equal", {33, 33, 33}}, Packing{"falling", {130, 65, 1, 1, 3}},
        Packing{"long", {200, 5, 321, 129}}})
    for (const bool causal : {false, true}) {
      cases.push_back(Packed(packing, 1, 64, 0.0f, causal));
      cases.push_back(Packed(packing, 2, 40, 0.1f, causal));
      cases.push_back(Packed(packing, 3, 5, 0.5f, causal, 1));
      add_many_blocks(Packed(packing, 2, 128, 0.1f, causal));
    }
  for (const int64_t d : kHeadDims) {
    cases.push_back(Packed({"tiles", {31, 1, 33, 64, 66}}, 2, d, 0.1f, d % 16 != 0));
    cases.push_back(Packed({"short", {3, 17, 2}}, 3, d, 0.0f, d % 16 == 0));
  }
  return cases;
}

struct Bounds {
  Vec out, dqkv;
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
Bounds BoundsOf(DType act, const ref::AttentionShape& shape, const ref::Keys& keys,
                const ref::Mask& mask, const Vec& qkv, const Vec& out, const Vec& dout,
                const Vec& dqkv) {
  const auto hidden = static_cast<size_t>(shape.hidden), heads = static_cast<size_t>(shape.heads);
  const size_t d = hidden / heads;
  const double u = UnitRoundoff(act), scale = shape.scale;
  const double least = act == DType::kF16 ? 0x1p-25 : 0.0;
  const double d_growth = Growth(static_cast<int64_t>(d));
  const Vec all_factors =
      ref::DropoutFactors(mask, ref::Tokens(shape, keys) * shape.heads, shape.seq);
  Bounds bounds{Vec(out.size(), 0.0), Vec(dqkv.size(), 0.0)};
  // Per element of dk and dv, and of dq and out: the sums of squared terms that rounding to act
  // blurs.
  Vec dqkv_squares(dqkv.size(), 0.0), out_squares(out.size(), 0.0);
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t head = 0; head < shape.heads; ++head) {
      const auto a = static_cast<size_t>(head);
      const ref::Sequence sequence = ref::SequenceOf(shape, keys, b);
      const auto first = static_cast<size_t>(sequence.first);
      const auto length = static_cast<size_t>(sequence.length);
      const double s_growth = Growth(sequence.length);
      const auto factor_row = static_cast<size_t>(ref::FirstDropoutRow(shape, keys, b, head));
      const Vec probs = ref::AttentionProbs(shape, qkv, keys, b, head);
      Vec e(length), rel(length), dprob(length), dprob_error(length);
      for (size_t i = 0; i < length; ++i) {
        const size_t q_row = (first + i) * 3 * hidden + a * d, o_row = (first + i) * hidden + a * d;
        const double* p = &probs[i * length];
        const double* f = &all_factors[(factor_row + i) * static_cast<size_t>(shape.seq)];
        double average_e = 0, log_sum = 0;
        for (size_t j = 0; j < length; ++j) {
          e[j] = 0.0;
          if (p[j] == 0.0) continue;
          const size_t k_row = (first + j) * 3 * hidden + hidden + a * d;
          double dot = 0, abs_dot = 0;
          for (size_t c = 0; c < d; ++c) {
            const double term = qkv[q_row + c] * qkv[k_row + c] * scale;
            dot += term;
            abs_dot += std::abs(term);
          }
          const double added = keys.mask.empty() ? 0.0 : keys.mask[first + j];
          e[j] = d_growth * abs_dot + 4 * kF32Roundoff * (std::abs(dot) + std::abs(added));
          average_e += p[j] * e[j];
          log_sum = std::max(log_sum, std::abs(dot + added - std::log(p[j])));
        }
        double row_dot = 0, row_squares = 0, row_error = 0;
        for (size_t c = 0; c < d; ++c) {
          const double term = dout[o_row + c] * out[o_row + c];
          row_dot += term;
          row_squares += term * term;
          row_error += d_growth * std::abs(term);
        }
        row_error += 4 * u * std::sqrt(row_squares);
        for (size_t j = 0; j < length; ++j) {
          const size_t v_row = (first + j) * 3 * hidden + 2 * hidden + a * d;
          rel[j] = e[j] + average_e + s_growth + 4 * kF32Roundoff * (1 + log_sum);
          double abs_dprob = 0;
          dprob[j] = 0;
          for (size_t c = 0; c < d; ++c) {
            const double term = f[j] * dout[o_row + c] * qkv[v_row + c];
            dprob[j] += term;
            abs_dprob += std::abs(term);
          }
          dprob_error[j] = d_growth * abs_dprob;
          row_error += p[j] * (rel[j] * std::abs(dprob[j]) + dprob_error[j]);
        }
        for (size_t j = 0; j < length; ++j) {
          const size_t k_row = (first + j) * 3 * hidden + hidden + a * d, v_row = k_row + hidden;
          const double pd = p[j] * f[j];
          const double ds = p[j] * (dprob[j] - row_dot);
          const double ds_error = p[j] * (dprob_error[j] + row_error) + std::abs(ds) * rel[j] +
                                  (p[j] > 0 ? least : 0.0);
          const double p_error = pd * (rel[j] + s_growth) + f[j] * least;
          const double s_error = ds_error + s_growth * std::abs(ds);
          for (size_t c = 0; c < d; ++c) {
            const double v = std::abs(qkv[v_row + c]), k = std::abs(qkv[k_row + c]);
            const double q = std::abs(qkv[q_row + c]), dy = std::abs(dout[o_row + c]);
            bounds.out[o_row + c] += p_error * v;
            out_squares[o_row + c] += pd * v * pd * v;
            bounds.dqkv[v_row + c] += p_error * dy;
            dqkv_squares[v_row + c] += pd * dy * pd * dy;
            bounds.dqkv[q_row + c] += scale * s_error * k;
            dqkv_squares[q_row + c] += (scale * ds * k) * (scale * ds * k);
            bounds.dqkv[k_row + c] += scale * s_error * q;
            dqkv_squares[k_row + c] += (scale * ds * q) * (scale * ds * q);
          }
        }
      }
    }
  for (size_t i = 0; i < out.size(); ++i)
    bounds.out[i] += u * std::abs(out[i]) + 4 * u * std::sqrt(out_squares[i]) + Tiny(act);
  for (size_t i = 0; i < dqkv.size(); ++i)
    bounds.dqkv[i] += u * std::abs(dqkv[i]) + 4 * u * std::sqrt(dqkv_squares[i]) + Tiny(act);
  return bounds;
}

// One call's inputs on the host.
struct AttentionCall {
  LayerDims dims;
  ref::Keys keys;
  ref::Mask mask;
  Vec qkv, dout;

  ref::AttentionShape Shape() const {
    return {dims.batch, dims.seq, dims.hidden, dims.heads, static_cast<double>(Scale())};
  }
  float Scale() const {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(dims.head_dim())));
  }
};

// What dbias is added to.
Vec BiasBefore(const LayerDims& dims) { return Noise(DType::kF32, 57, 3 * dims.hidden, 3.0); }

// dbias against the sums of the dqkv that came with it, whose elements were summed as they are or
// as they were before they were rounded.
void ExpectSums(const LayerDims& dims, const Results& results) {
  const Vec dqkv = results.Values("dqkv", dims.dtype);
  const Bounded sums =
      ColumnSumsAddedTo(BiasBefore(dims), dims.dtype, dqkv, Vec(dqkv.size(), Tiny(dims.dtype)));
  ExpectWithin("dbias", results.Values("dbias", DType::kF32), sums.want, sums.bound);
}

// Attention without what it saves: as in evaluation.
absl::Status Evaluate(OpRun& run, const AttentionCall& call) {
  const LayerDims& dims = call.dims;
  const auto ints = [&](const std::vector<int32_t>& values) {
    return values.empty() ? TensorView{} : run.In(values);
  };
  AttentionArgs args{.dims = dims};
  args.qkv = run.In(dims.dtype, {dims.tokens(), 3 * dims.hidden}, call.qkv);
  if (!call.keys.mask.empty())
    args.mask = run.In(DType::kF32, {dims.batch, dims.seq}, call.keys.mask);
  args.lengths = ints(call.keys.lengths);
  args.cu_seqlens = ints(call.keys.cu_seqlens);
  args.causal = call.keys.causal;
  args.scale = call.Scale();
  if (call.mask.ratio > 0.0f)
    args.dropout = {call.mask.ratio, run.Rng(call.mask.rng), call.mask.stream};
  args.out = run.Out("out", dims.dtype, {dims.tokens(), dims.hidden});
  return run.backend().Attention(run.WorkspaceFor(dims), args);
}

// Attention, then AttentionBackward, which is given what Forward left, as in a stack.
// Its workspace is at most `most_workspace` bytes.
absl::Status Train(OpRun& run, const AttentionCall& call, bool dbias = true,
                   size_t most_workspace = std::numeric_limits<size_t>::max()) {
  const LayerDims& dims = call.dims;
  const auto ints = [&](const std::vector<int32_t>& values) {
    return values.empty() ? TensorView{} : run.In(values);
  };
  Workspace workspace = run.WorkspaceFor(dims);
  workspace.bytes = std::min(workspace.bytes, most_workspace);
  AttentionBackwardArgs args{.dims = dims};
  args.qkv = run.In(dims.dtype, {dims.tokens(), 3 * dims.hidden}, call.qkv);
  if (!call.keys.mask.empty())
    args.mask = run.In(DType::kF32, {dims.batch, dims.seq}, call.keys.mask);
  args.lengths = ints(call.keys.lengths);
  args.cu_seqlens = ints(call.keys.cu_seqlens);
  args.causal = call.keys.causal;
  args.scale = call.Scale();
  if (call.mask.ratio > 0.0f)
    args.dropout = {call.mask.ratio, run.Rng(call.mask.rng), call.mask.stream};
  args.out = run.Out("out", dims.dtype, {dims.tokens(), dims.hidden});
  const size_t saved_bytes = run.backend().AttentionSavedBytes(dims);
  if (saved_bytes > 0)
    args.saved = run.Out("saved", DType::kU8, {static_cast<int64_t>(saved_bytes)});
  const absl::Status status = run.backend().Attention(workspace, {.dims = dims,
                                                                  .qkv = args.qkv,
                                                                  .mask = args.mask,
                                                                  .lengths = args.lengths,
                                                                  .cu_seqlens = args.cu_seqlens,
                                                                  .causal = args.causal,
                                                                  .scale = args.scale,
                                                                  .dropout = args.dropout,
                                                                  .out = args.out,
                                                                  .saved = args.saved});
  if (!status.ok()) return status;
  args.dout = run.In(dims.dtype, {dims.tokens(), dims.hidden}, call.dout);
  args.dqkv = run.Out("dqkv", dims.dtype, {dims.tokens(), 3 * dims.hidden});
  if (dbias) args.dbias = run.InOut("dbias", DType::kF32, {3 * dims.hidden}, BiasBefore(dims));
  return run.backend().AttentionBackward(workspace, args);
}

ref::Mask DropoutOf(float ratio) {
  return ref::Mask{ratio, RngState{0x0123456789ABCDEFu, (uint64_t{1} << 32) + 5},
                   DropoutStream(11, DropoutSite::kAttentionProbs)};
}

class AttentionTest : public OpTest<AttentionCase> {
 protected:
  const LayerShape& s() const { return param().shape; }

  AttentionCall Call() const {
    AttentionCall call{.dims = s().Dims(act()), .keys = Keys(), .mask = DropoutOf(param().ratio)};
    if (!call.keys.cu_seqlens.empty()) call.dims.packed_tokens = call.keys.cu_seqlens.back();
    const int64_t elements = call.dims.tokens() * s().hidden;
    // Scores of a few units: the softmax has both peaks and tails.
    call.qkv = Noise(act(), 51, 3 * elements, 1.8);
    call.dout = Noise(act(), 53, elements);
    return call;
  }

  ref::Keys Keys() const {
    ref::Keys keys{.causal = param().causal};
    if (!param().packing.lengths.empty()) {
      keys.cu_seqlens.push_back(0);
      for (const int32_t length : param().packing.lengths)
        keys.cu_seqlens.push_back(keys.cu_seqlens.back() + length);
      return keys;
    }
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
};

TEST_P(AttentionTest, ForwardAndBackward) {
  const AttentionCall call = Call();
  const Vec out = ref::Attention(call.Shape(), call.qkv, call.keys, call.mask);
  const Vec dqkv = ref::AttentionBackward(call.Shape(), call.qkv, call.keys, call.mask, call.dout);
  const Bounds bounds =
      BoundsOf(act(), call.Shape(), call.keys, call.mask, call.qkv, out, call.dout, dqkv);
  const auto train = [&](OpRun& run) { return Train(run, call); };
  for (const bool any_order : {false, true}) {
    SCOPED_TRACE(any_order ? "in any order" : "deterministic");
    const Results results = any_order ? RunInAnyOrder(backend(), train, param().offset)
                                      : RunTwice(backend(), train, param().offset);
    ExpectWithin("out", results.Values("out", act()), out, bounds.out);
    ExpectWithin("dqkv", results.Values("dqkv", act()), dqkv, bounds.dqkv);
    ExpectSums(call.dims, results);
    if (any_order) continue;
    const Results without = RunTwice(
        backend(), [&](OpRun& run) { return Train(run, call, /*dbias=*/false); }, param().offset);
    EXPECT_TRUE(without.Bytes("dqkv") == results.Bytes("dqkv")) << "dbias changes dqkv";
  }
  // Evaluation saves nothing.
  const Results evaluation = RunTwice(
      backend(), [&](OpRun& run) { return Evaluate(run, call); }, param().offset);
  ExpectWithin("out without saved", evaluation.Values("out", act()), out, bounds.out);
}

LAMINA_OP_SUITE(AttentionTest, AttentionCases());

// Scores that grow from one tile of keys to the next, so that every row's greatest one so far is
// soon far exceeded, which it is in few of the rows above.
class RisingAttentionTest : public AttentionTest {};

TEST_P(RisingAttentionTest, ForwardAndBackward) {
  const auto hidden = static_cast<size_t>(s().hidden);
  const auto d = hidden / static_cast<size_t>(s().heads);
  // By so much a tile of 64 keys: within what fp16 holds of an exponential, and far beyond it.
  for (const double rise : {3.0, 100.0}) {
    SCOPED_TRACE(rise);
    AttentionCall call = Call();
    for (size_t row = 0; row < call.qkv.size() / (3 * hidden); ++row)
      for (size_t c = 0; c < hidden; c += d) {
        double* q = &call.qkv[row * 3 * hidden + c];
        q[0] = 8.0;  // these and the keys' are exact in act; the scale of heads of 64 is 1 / 8
        q[hidden] = rise * static_cast<double>(row % static_cast<size_t>(s().seq) / 64);
      }
    const Vec out = ref::Attention(call.Shape(), call.qkv, call.keys, call.mask);
    const Vec dqkv =
        ref::AttentionBackward(call.Shape(), call.qkv, call.keys, call.mask, call.dout);
    const Bounds bounds =
        BoundsOf(act(), call.Shape(), call.keys, call.mask, call.qkv, out, call.dout, dqkv);
    const Results results = RunTwice(backend(), [&](OpRun& run) { return Train(run, call); });
    ExpectWithin("out", results.Values("out", act()), out, bounds.out);
    ExpectWithin("dqkv", results.Values("dqkv", act()), dqkv, bounds.dqkv);
  }
}

std::vector<AttentionCase> OfSeveralTiles() {
  std::vector<AttentionCase> cases;
  for (const bool causal : {false, true})
    for (const float ratio : {0.0f, 0.1f})
      for (const LayerShape& s : {LayerShape{1, 128, 64, 1, 8}, LayerShape{1, 300, 64, 1, 8},
                                  LayerShape{1, 200, 128, 1, 8}})
        cases.push_back({s, KeyKind::kNone, ratio, 0, causal});
  return cases;
}

LAMINA_OP_SUITE(RisingAttentionTest, OfSeveralTiles());

// A packed batch of equal lengths is the dense batch, to the bit: the masks' rows, and what is
// saved, too.
class PackedAttentionTest : public AttentionTest {};

TEST_P(PackedAttentionTest, EqualLengthsAreTheDenseBatch) {
  const AttentionCall dense = Call();
  AttentionCall packed = dense;
  packed.dims.packed_tokens = dense.dims.tokens();
  for (int64_t b = 0; b <= dense.dims.batch; ++b)
    packed.keys.cu_seqlens.push_back(static_cast<int32_t>(b * dense.dims.seq));
  ASSERT_EQ(backend().AttentionSavedBytes(packed.dims), backend().AttentionSavedBytes(dense.dims));
  const Results want = RunTwice(backend(), [&](OpRun& run) { return Train(run, dense); });
  const Results got = RunTwice(backend(), [&](OpRun& run) { return Train(run, packed); });
  std::vector<const char*> names = {"out", "dqkv", "dbias"};
  if (backend().AttentionSavedBytes(dense.dims) > 0) names.push_back("saved");
  for (const char* name : names) EXPECT_TRUE(got.Bytes(name) == want.Bytes(name)) << name;
}

std::vector<AttentionCase> EqualLengths() {
  std::vector<AttentionCase> cases;
  for (const bool causal : {false, true})
    for (const float ratio : {0.0f, 0.1f})
      for (const LayerShape& s :
           {LayerShape{3, 33, 64, 1, 8}, LayerShape{2, 130, 128, 2, 8},
            LayerShape{4, 64, 160, 2, 8}, LayerShape{5, 7, 15, 3, 8}, LayerShape{40, 1, 16, 2, 8},
            LayerShape{1, 300, 256, 2, 8}, LayerShape{2, 140, 112, 1, 8}})
        cases.push_back({s, KeyKind::kNone, ratio, 0, causal});
  return cases;
}

LAMINA_OP_SUITE(PackedAttentionTest, EqualLengths());

// What is kept in a workspace that has room for it, for all heads or for some at a time, is
// computed otherwise: the bits are the same as long as the op does not refuse.
class WorkspaceTest : public AttentionTest {};

TEST_P(WorkspaceTest, AnyThatIsEnoughGivesTheSameBits) {
  const AttentionCall call = Call();
  const Results want = RunTwice(backend(), [&](OpRun& run) { return Train(run, call); });
  size_t bytes = backend().WorkspaceBytes(call.dims);
  for (; bytes > 0; bytes -= bytes / 8 + 1) {
    OpRun run(backend(), 0, 0);
    const absl::Status status = Train(run, call, /*dbias=*/true, bytes);
    const Results got = run.Finish();
    if (!status.ok()) {
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
      break;
    }
    for (const char* name : {"out", "dqkv", "dbias"}) {
      // CUDA's fp32 has it from a pass over dqkv that is cut up by the workspace.
      if (std::string(name) == "dbias" && act() == DType::kF32) continue;
      ASSERT_TRUE(got.Bytes(name) == want.Bytes(name)) << name << " with " << bytes << " bytes";
    }
  }
  EXPECT_LT(bytes, backend().WorkspaceBytes(call.dims));
}

std::vector<AttentionCase> OfSeveralHeads() {
  std::vector<AttentionCase> cases;
  for (const bool causal : {false, true})
    for (const int64_t hidden : {128, 256})
      cases.push_back({LayerShape{2, 300, hidden, 2, 8}, KeyKind::kLengths, 0.1f, 0, causal});
  return cases;
}

LAMINA_OP_SUITE(WorkspaceTest, OfSeveralHeads());

// Sequences whose matrix [S, S] no oracle here can hold: by what must be true of them.
struct LongCase {
  int64_t seq;
  std::string Name() const { return absl::StrCat("S", seq); }
};
constexpr LongCase kLong[] = {{8192}};

class LongAttentionTest : public OpTest<LongCase> {
 protected:
  LayerDims Dims(int64_t seq) const { return LayerShape{1, seq, 32, 1, 8}.Dims(act()); }
};

// The first tokens of a causal sequence are what they would be alone; and where the rest has no
// gradient, so are theirs.
TEST_P(LongAttentionTest, CausalBeginningStandsAlone) {
  constexpr int64_t kFirst = 130;
  AttentionCall all{.dims = Dims(param().seq), .keys = {.causal = true}, .mask = DropoutOf(0.1f)};
  all.qkv = Noise(act(), 54, param().seq * 96, 1.8);
  all.dout = Noise(act(), 55, param().seq * 32);
  std::fill(all.dout.begin() + kFirst * 32, all.dout.end(), 0.0);
  AttentionCall first = all;
  first.dims = Dims(kFirst);
  first.qkv.resize(kFirst * 96);
  first.dout.resize(kFirst * 32);
  const Vec out = ref::Attention(first.Shape(), first.qkv, first.keys, first.mask);
  const Vec dqkv =
      ref::AttentionBackward(first.Shape(), first.qkv, first.keys, first.mask, first.dout);
  const Bounds bounds =
      BoundsOf(act(), first.Shape(), first.keys, first.mask, first.qkv, out, first.dout, dqkv);
  const Results results = RunTwice(backend(), [&](OpRun& run) { return Train(run, all); });
  ExpectSums(all.dims, results);
  Vec got = results.Values("out", act());
  got.resize(out.size());
  ExpectWithin("out", got, out, bounds.out);
  got = results.Values("dqkv", act());
  for (size_t i = dqkv.size(); i < got.size(); ++i)
    ASSERT_EQ(got[i], 0.0) << "dqkv of token " << i / 96;
  got.resize(dqkv.size());
  ExpectWithin("dqkv", got, dqkv, bounds.dqkv);
}

// Probabilities add up to one: values that are all the same come out as they are, whatever the
// probabilities, whose errors the division by their sum takes away.
TEST_P(LongAttentionTest, EqualValuesComeThrough) {
  AttentionCall call{.dims = Dims(param().seq)};
  call.qkv = Noise(act(), 56, param().seq * 96, 1.8);
  Vec want(static_cast<size_t>(param().seq) * 32), bound(want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = call.qkv[i / 32 * 96 + 64 + i % 32] = call.qkv[64 + i % 32];
    bound[i] = (5 * UnitRoundoff(act()) + Growth(param().seq)) * std::abs(want[i]) + Tiny(act());
  }
  const Results results = RunTwice(backend(), [&](OpRun& run) { return Evaluate(run, call); });
  ExpectWithin("out", results.Values("out", act()), want, bound);
}

LAMINA_OP_SUITE(LongAttentionTest, kLong);

}  // namespace
}  // namespace lamina::testing
