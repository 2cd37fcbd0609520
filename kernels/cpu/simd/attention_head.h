// One head of attention: scores of a block of queries against all keys, softmax, dropout, and the
// product with the values; backward recomputes the probabilities from what Forward saved, with the
// same bits.
//
// Causal: a block of queries works on the keys up to its last query alone, so half of the work is
// never done; within the block each row ends at its own key, with zeros up to the block's.
//
// Scratch, in fp32: scores [block, S]; the head's keys and values transposed in panels of 64 keys
// (so that scores come in vectors of keys) or row by row, padded with zeros to 16 columns.
#pragma once

#include "simd/dropout_lanes.h"
#include "simd/math.h"
#include "simd/small_product.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

constexpr int64_t Up16(int64_t n) { return (n + 15) / 16 * 16; }
// Scores of one query; not a power of two, so that the columns of a block spread over the cache.
constexpr int64_t ScoreRow(int64_t s) { return Padded(s) + 16; }

// dst [rows, Up16(d)] = src, with zeros beyond d.
template <typename E>
void PackRows(const E* src, int64_t stride, int64_t rows, int64_t d, float* dst) {
  const int64_t dp = Up16(d);
  for (int64_t r = 0; r < rows; ++r, src += stride, dst += dp) {
    Lanes(d, [&](int64_t j, auto part) { Store(dst + j, Load(src + j, part), part); });
    for (int64_t j = d; j < dp; ++j) dst[j] = 0.0f;
  }
}

// dst: panels of 64 keys, each [d, 64]; zeros beyond the last key up to a multiple of 16.
template <typename E>
void PackTransposed(const E* src, int64_t stride, int64_t keys, int64_t d, float* dst) {
  constexpr int kBlock = 16;
  for (int64_t key = 0; key < Up16(keys); key += kBlock) {
    float* panel = dst + key / kPanel * kPanel * d + key % kPanel;
    const int64_t rows = keys - key < kBlock ? keys - key : kBlock;
    for (int64_t j = 0; j < d; j += kLanes) {
      const int64_t columns = d - j < kLanes ? d - j : kLanes;
      float block[kBlock][kLanes];
      for (int64_t i = 0; i < rows; ++i) {
        const E* p = src + (key + i) * stride + j;
        Store(block[i], columns == kLanes ? Load(p) : Load(p, Part{columns}));
      }
      for (int64_t i = rows; i < kBlock; ++i) Store(block[i], F{});
      for (int64_t c = 0; c < columns; ++c) {
        float* out = panel + (j + c) * kPanel;
        LAMINA_UNROLL
        for (int i = 0; i < kBlock; ++i) out[i] = block[i][c];
      }
    }
  }
}

// dst [rows, d] = src [rows, Up16(d)], each row times its factor.
template <typename E>
void UnpackRows(const float* src, int64_t rows, int64_t d, const float* factor, E* dst,
                int64_t stride) {
  const int64_t sp = Up16(d);
  for (int64_t r = 0; r < rows; ++r) {
    const float f = factor != nullptr ? factor[r] : 1.0f;
    Lanes(d, [&](int64_t j, auto part) {
      Store(dst + r * stride + j, Load(src + r * sp + j, part) * f, part);
    });
  }
}

struct SoftmaxRow {
  float largest;      // 0 where every key is masked out
  float inverse_sum;  // 0 where every key is masked out
};

// row [keys] = e^(row * scale + mask - largest).
LAMINA_INLINE SoftmaxRow ExponentiateRow(float* row, int64_t keys, float scale, const float* mask) {
  F top = Splat(-__builtin_inff());
  Lanes(keys, [&](int64_t j, auto part) {
    F v = Load(row + j, part) * scale;
    if (mask != nullptr) v += Load(mask + j, part);
    Store(row + j, v, part);
    top = Max(Keep(v, -__builtin_inff(), part), top);
  });
  SoftmaxRow result{Largest(top), 0.0f};
  // No key at all, or only NaN and -inf. NaN must come through; -inf - 0 gives zeros.
  if (result.largest == -__builtin_inff()) result.largest = 0.0f;
  F total{};
  Lanes(keys, [&](int64_t j, auto part) {
    const F v = Exp(Load(row + j, part) - result.largest);
    Store(row + j, v, part);
    total += Keep(v, 0.0f, part);
  });
  const float sum = Sum(total);
  result.inverse_sum = sum == 0.0f ? 0.0f : 1.0f / sum;
  return result;
}

// The keys that some query of [q, q + rows) sees, and those that one query sees.
LAMINA_INLINE int64_t KeysOfBlock(const AttentionHead& a, int64_t q, int64_t rows) {
  return a.causal && q + rows < a.keys ? q + rows : a.keys;
}
LAMINA_INLINE int64_t KeysOfQuery(const AttentionHead& a, int64_t q) {
  return KeysOfBlock(a, q, 1);
}

LAMINA_INLINE void Zero(float* row, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) row[j] = 0.0f;
}

template <typename E>
void AttentionForward(const AttentionHead& a, int64_t begin, int64_t end, bool pack) {
  const int64_t dp = Up16(a.d), row_stride = ScoreRow(a.s);
  float* keys = a.scratch;  // transposed
  float* values = keys + Padded(a.s) * Padded(a.d);
  float* scores = values + Padded(a.s) * Padded(a.d);
  float* queries = scores + kQueryBlock * row_stride;
  float* out = queries + kQueryBlock * Padded(a.d);
  float* factors = out + kQueryBlock * Padded(a.d);
  if (pack) {
    PackTransposed(static_cast<const E*>(a.k), a.qkv_stride, a.keys, a.d, keys);
    PackRows(static_cast<const E*>(a.v), a.qkv_stride, a.keys, a.d, values);
  }
  for (int64_t q = begin; q < end; q += kQueryBlock) {
    const int64_t rows = end - q < kQueryBlock ? end - q : kQueryBlock;
    const int64_t block_keys = KeysOfBlock(a, q, rows);
    PackRows(static_cast<const E*>(a.q) + q * a.qkv_stride, a.qkv_stride, rows, a.d, queries);
    Multiply({.m = rows,
              .n = Up16(block_keys),
              .k = a.d,
              .a = queries,
              .a_row = dp,
              .b = keys,
              .b_row = kPanel,
              .b_panel = kPanel * a.d,
              .c = scores,
              .c_row = row_stride});
    float normalise[kQueryBlock];
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * row_stride;
      const int64_t row_keys = KeysOfQuery(a, q + r);
      const SoftmaxRow softmax = ExponentiateRow(row, row_keys, a.scale, a.mask);
      Zero(row, row_keys, block_keys);
      normalise[r] = softmax.inverse_sum;
      if (a.saved != nullptr) {
        a.saved[2 * (q + r)] = softmax.largest;
        a.saved[2 * (q + r) + 1] = softmax.inverse_sum;
      }
      if (!a.dropout.on) continue;
      FactorRow(a.dropout, a.first_row + static_cast<uint64_t>(q + r), row_keys, factors);
      Lanes(row_keys, [&](int64_t j, auto part) {
        Store(row + j, Load(row + j, part) * Load(factors + j, part), part);
      });
    }
    Multiply({.m = rows,
              .n = dp,
              .k = block_keys,
              .a = scores,
              .a_row = row_stride,
              .b = values,
              .b_row = dp,
              .c = out,
              .c_row = dp});
    UnpackRows(out, rows, a.d, normalise, static_cast<E*>(a.out) + q * a.out_stride, a.out_stride);
  }
}

template <typename E>
void AttentionBackward(const AttentionHead& a) {
  const int64_t dp = Up16(a.d), row_stride = ScoreRow(a.s), head = Padded(a.s) * Padded(a.d);
  const int64_t block = kQueryBlock * Padded(a.d), scores = kQueryBlock * row_stride;
  float* keys_t = a.scratch;  // transposed
  float* values_t = keys_t + head;
  float* keys = values_t + head;
  float* dk = keys + head;
  float* dv = dk + head;
  float* probs = dv + head;          // P, then the gradient of the scores
  float* dprobs = probs + scores;    // gradient of the dropped probabilities
  float* dropped = dprobs + scores;  // P after dropout
  float* queries = dropped + scores;
  float* dout = queries + block;
  float* dq = dout + block;
  float* factors = dq + block;
  PackTransposed(static_cast<const E*>(a.k), a.qkv_stride, a.keys, a.d, keys_t);
  PackTransposed(static_cast<const E*>(a.v), a.qkv_stride, a.keys, a.d, values_t);
  PackRows(static_cast<const E*>(a.k), a.qkv_stride, a.keys, a.d, keys);
  Zero(dk, 0, a.keys * dp);
  Zero(dv, 0, a.keys * dp);
  for (int64_t q = 0; q < a.s; q += kQueryBlock) {
    const int64_t rows = a.s - q < kQueryBlock ? a.s - q : kQueryBlock;
    const int64_t block_keys = KeysOfBlock(a, q, rows);
    PackRows(static_cast<const E*>(a.q) + q * a.qkv_stride, a.qkv_stride, rows, a.d, queries);
    PackRows(static_cast<const E*>(a.dout) + q * a.out_stride, a.out_stride, rows, a.d, dout);
    // scores = q k^T;  dprobs = dout v^T
    SmallProduct by_keys{.m = rows,
                         .n = Up16(block_keys),
                         .k = a.d,
                         .a = queries,
                         .a_row = dp,
                         .b = keys_t,
                         .b_row = kPanel,
                         .b_panel = kPanel * a.d,
                         .c = probs,
                         .c_row = row_stride};
    Multiply(by_keys);
    by_keys.a = dout;
    by_keys.b = values_t;
    by_keys.c = dprobs;
    Multiply(by_keys);
    for (int64_t r = 0; r < rows; ++r) {
      float* p_row = probs + r * row_stride;
      float* dp_row = dprobs + r * row_stride;
      float* dropped_row = dropped + r * row_stride;
      const float largest = a.saved[2 * (q + r)], inverse_sum = a.saved[2 * (q + r) + 1];
      const int64_t row_keys = KeysOfQuery(a, q + r);
      if (a.dropout.on)
        FactorRow(a.dropout, a.first_row + static_cast<uint64_t>(q + r), row_keys, factors);
      F dot{};  // sum of prob * dprob
      Lanes(row_keys, [&](int64_t j, auto part) {
        F v = Load(p_row + j, part) * a.scale;
        if (a.mask != nullptr) v += Load(a.mask + j, part);
        const F p = Exp(v - largest) * inverse_sum;
        F d = Load(dp_row + j, part), kept = p;
        if (a.dropout.on) {
          const F f = Load(factors + j, part);
          kept *= f;
          d *= f;
          Store(dp_row + j, d, part);
        }
        Store(p_row + j, p, part);
        Store(dropped_row + j, kept, part);
        dot += Keep(p * d, 0.0f, part);
      });
      // prob = softmax(score): dscore = prob * (dprob - dot)
      const float sum = Sum(dot);
      Lanes(row_keys, [&](int64_t j, auto part) {
        Store(p_row + j, Load(p_row + j, part) * (Load(dp_row + j, part) - sum) * a.scale, part);
      });
      Zero(p_row, row_keys, block_keys);
      Zero(dropped_row, row_keys, block_keys);
    }
    // dv += dropped^T dout;  dk += dscores^T q
    SmallProduct to_keys{.m = block_keys,
                         .n = dp,
                         .k = rows,
                         .a = dropped,
                         .a_row = 1,
                         .a_column = row_stride,
                         .b = dout,
                         .b_row = dp,
                         .c = dv,
                         .c_row = dp,
                         .accumulate = true};
    Multiply(to_keys);
    to_keys.a = probs;
    to_keys.b = queries;
    to_keys.c = dk;
    Multiply(to_keys);
    // dq = dscores k
    Multiply({.m = rows,
              .n = dp,
              .k = block_keys,
              .a = probs,
              .a_row = row_stride,
              .b = keys,
              .b_row = dp,
              .c = dq,
              .c_row = dp});
    UnpackRows(dq, rows, a.d, nullptr, static_cast<E*>(a.dq) + q * a.qkv_stride, a.qkv_stride);
  }
  UnpackRows(dk, a.keys, a.d, nullptr, static_cast<E*>(a.dk), a.qkv_stride);
  UnpackRows(dv, a.keys, a.d, nullptr, static_cast<E*>(a.dv), a.qkv_stride);
  for (int64_t key = a.keys; key < a.s; ++key) {  // no query sees it
    E* dk_row = static_cast<E*>(a.dk) + key * a.qkv_stride;
    E* dv_row = static_cast<E*>(a.dv) + key * a.qkv_stride;
    Lanes(a.d, [&](int64_t j, auto part) {
      Store(dk_row + j, F{}, part);
      Store(dv_row + j, F{}, part);
    });
  }
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
