// Purpose: what the warpgroup attention kernels have in common: the order of keys in tiles, tiles
// on their way to shared memory, masks and dropout in fragments of scores.
//
// Scores come in tiles of 64 queries and 64 keys, a warpgroup a tile. In the fragments of a score
// tile a thread has columns 8 n + 2 t + e, e < 2, of its two rows (mma.cuh), but one Philox call
// covers 8 neighbouring keys of either half of the tile. So tiles hold their keys in another order:
// within 32 of them, key 8 t + 2 m + e lies at row 8 m + 2 t + e, and a thread's columns of four
// neighbouring column tiles are 8 neighbouring keys. It draws its own bits, of a row by one call,
// and exchanges none. Exchanging t and m again gives back the key.
#pragma once

#include <cstdint>

#include "attention/attention_head.cuh"
#include "attention/attention_tiles.cuh"
#include "common/convert.cuh"
#include "common/copy_async.cuh"
#include "common/dropout.cuh"
#include "common/mbarrier.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"

namespace lamina::cuda {

constexpr int kTile = kSwizzledRows;  // queries or keys of a tile; its rows are a head dim of 64

template <typename T>
struct alignas(1024) SwizzledTile {
  T rows[kTile * 64];
};

// Where a tile has a key; and which key a tile has somewhere.
__device__ __forceinline__ int Reordered(int key) {
  return (key & ~0x1E) | ((key & 0x06) << 2) | ((key & 0x18) >> 2);
}

enum class TileOrder { kPlain, kKeys };

// Starts to copy rows [0, 64) of `src` into `tile`, with zeros from row `rows` and from column
// `head_dim` on; row 0 must exist.
template <int kThreads, TileOrder kOrder, typename T>
__device__ __forceinline__ void StartSwizzledTile(SwizzledTile<T>& tile, const T* src,
                                                  int64_t stride, int rows, int head_dim) {
  constexpr int kChunks = kTile * 8;
  const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < (kChunks + kThreads - 1) / kThreads; ++i) {
    const int e = tid + i * kThreads;
    if (kChunks % kThreads != 0 && e >= kChunks) break;
    const int r = e >> 3;
    const int c = e & 7;
    const bool inside = r < rows && c * 8 < head_dim;
    const int row = kOrder == TileOrder::kKeys ? Reordered(r) : r;
    CopyAsync16(reinterpret_cast<char*>(tile.rows) + Swizzled(row, c),
                src + (inside ? r * stride + c * 8 : 0), inside);
  }
}

// The same for tiles that follow each other, with what a thread needs to know of its part worked
// out once: its first chunk's row and where a tile has it.
template <int kThreads, TileOrder kOrder>
struct TilePart {
  static constexpr int kStep = kThreads / 8;  // rows from one chunk of a thread to its next
  static_assert(kStep == 32 || (kStep % 8 == 0 && kOrder == TileOrder::kPlain),
                "rows a step apart lie a step apart");
  int row, chunk, offset;
  bool inside;  // of the head's columns

  __device__ __forceinline__ explicit TilePart(int head_dim,
                                               int thread = static_cast<int>(threadIdx.x))
      : row(thread >> 3),
        chunk(thread & 7),
        offset(Swizzled(kOrder == TileOrder::kKeys ? Reordered(row) : row, chunk)),
        inside(chunk * 8 < head_dim) {}
  // From a tile's first element to this thread's.
  __device__ __forceinline__ int64_t Source(int64_t stride) const {
    return row * stride + chunk * 8;
  }
  // `src`: this thread's first element; the tile has `rows` rows.
  template <typename T>
  __device__ __forceinline__ void Start(SwizzledTile<T>& tile, const T* src, int64_t stride,
                                        int rows) const {
#pragma unroll
    for (int i = 0; i * kStep < kTile; ++i) {
      if (kTile % kStep != 0 && (i + 1) * kStep > kTile && row + i * kStep >= kTile) break;
      CopyAsync16(reinterpret_cast<char*>(tile.rows) + offset + i * kStep * 128,
                  src + i * kStep * stride, inside && row + i * kStep < rows);
    }
  }
};

// The barriers of a ring of stages, which kThreads threads fill and whose warps empty it. One
// thread calls this; a block's barrier makes it known to the others.
template <int kThreads, int kStages>
__device__ __forceinline__ void StartRing(uint64_t (&full)[kStages], uint64_t (&empty)[kStages]) {
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    StartBarrier(&full[i], kThreads);
    StartBarrier(&empty[i], kThreads / 32);
  }
}

// A of products over a tile's columns: rows [row, row + 16).
template <typename T>
__device__ __forceinline__ void LoadRowFragments(uint32_t (&a)[4][4], const SwizzledTile<T>& tile,
                                                 int row) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const char* bytes = reinterpret_cast<const char*>(tile.rows);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    LoadMatrices(a[k], bytes + Swizzled(row + (lane & 15), 2 * k + (lane >> 4)));
  }
}

// Rows [row, row + 16) and columns [16 k, 16 k + 16) of a tile from A of a product.
template <typename T>
__device__ __forceinline__ void StoreFragment(SwizzledTile<T>& tile, int row, int k,
                                              const uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const uint32_t address = SharedAddress(reinterpret_cast<char*>(tile.rows) +
                                         Swizzled(row + (lane & 15), 2 * k + (lane >> 4)));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
}

__device__ __forceinline__ void SetZero(float (&c)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
  }
}

// What is summed up before the references change, by this lane's rows g and g + 8: o * factor,
// where one of the warp's factors is not 1. `above`: whether one of this lane's is not.
template <int kTiles>
__device__ __forceinline__ void RescaleRows(float (&o)[kTiles][4], const float (&factor)[2],
                                            bool above) {
  if (!__any_sync(0xFFFFFFFFu, above)) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o[n][i] *= factor[i >> 1];
  }
}

// Writes c * factor to this lane's rows g and g + 8: of half h to dst + row[h] * stride, unless
// row[h] is -1.
template <typename T>
__device__ __forceinline__ void StoreRows(T* dst, int64_t stride, const int (&row)[2], int head_dim,
                                          const float (&c)[8][4], const float (&factor)[2]) {
  const int t = static_cast<int>(threadIdx.x) & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t w[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* pair = &c[4 * part + m][2 * half];
        w[m] = PackPair<T>(pair[0] * factor[half], pair[1] * factor[half]);
      }
      // Afterwards a lane has 8 neighbouring columns.
      QuadTranspose(w);
      const int column = 32 * part + 8 * t;
      if (row[half] < 0 || column >= head_dim) continue;
      *reinterpret_cast<uint4*>(dst + row[half] * stride + column) =
          make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

// The key, counted from the tile's first, of column tile n, element e of a pair.
__device__ __forceinline__ int KeyOfColumn(int n, int e) {
  return 32 * (n / 4) + 8 * (static_cast<int>(threadIdx.x) & 3) + 2 * (n % 4) + e;
}

// The scores of a tile from its products, where there is more to it than their scale: a mask, whose
// values for the tile's keys are `bias` if it is not null; keys cut off from `keys` on; causality,
// `query` being the query of row g and both counted from the tile's first key.
__device__ __forceinline__ void MaskScores(float (&s)[8][4], float scale, const float* bias,
                                           int keys, bool causal, int query) {
  const int t = static_cast<int>(threadIdx.x) & 3;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    float added[8] = {};
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(bias + 32 * part + 8 * t + 4 * i);
        added[4 * i] = four.x;
        added[4 * i + 1] = four.y;
        added[4 * i + 2] = four.z;
        added[4 * i + 3] = four.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = 4 * part + i / 2;
      const int key = KeyOfColumn(n, i & 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& score = s[n][2 * half + (i & 1)];
        score = score * scale + added[i];
        if (key >= keys || (causal && key > query + 8 * half)) score = -INFINITY;
      }
    }
  }
}

// What every lane has, by the compiler's account too, which may then keep it in a uniform register.
template <typename T>
__device__ __forceinline__ T Uniform(T value) {
  return __shfl_sync(0xFFFFFFFFu, value, 0);
}

// So the keys of all of Philox's rounds are in uniform registers.
__device__ __forceinline__ RngState UniformState(const RngState* state) {
  return {Uniform(state->seed), Uniform(state->counter)};
}

// Which of a thread's probabilities of a tile are kept, a bit each: of row half `half`, columns
// `part` * 32 and on, the pair 2 m and 2 m + 1 has bits 8 half + 7 - 4 part - m and 16 above.
struct KeptPairs {
  uint32_t word;

  // 1 where kept, else 0, as a pair of fp16
  __device__ __forceinline__ uint32_t Pair(int half, int part, int m) const {
    const uint32_t bits = half == 0 ? word : word >> 8;
    return IsAbove((bits & (0x10001u << (7 - 4 * part - m))) | kBytePair, kBytePair);
  }
};

// Which of a call's 16 elements are kept: bit 7 - i of byte 0 is the first of pair i, bit 7 - i of
// byte 2 the second.
__device__ __forceinline__ uint32_t DrawEightPairs(const DropoutParams& dropout,
                                                   const RngState& rng, int64_t row,
                                                   uint32_t call) {
  const Philox4 bytes = DropoutBytes(rng, dropout.stream, static_cast<uint64_t>(row), call);
  const KeepLimits limits(bytes, dropout.threshold);
  // Doubled 8 times, 4 is the 1024 above a byte.
  uint32_t sum = kHalfFours;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum = MultiplyAddPairs(sum, kHalfTwos, limits.Kept(bytes.word[i / 2], i % 2));
  }
  return sum;
}

// Of softmax rows `row` and `row` + 8 and the tile of keys `tile`, counted from the sequence's
// first.
__device__ __forceinline__ KeptPairs DrawPairs(const DropoutParams& dropout, const RngState& rng,
                                               int64_t row, int tile) {
  uint32_t eight_pairs[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    eight_pairs[half] = DrawEightPairs(dropout, rng, row + 8 * half,
                                       static_cast<uint32_t>(tile) * 4u + (threadIdx.x & 3u));
  }
  return {__byte_perm(eight_pairs[0], eight_pairs[1], 0x6240)};
}

// A pair of probabilities times one of KeptPairs: what is kept comes out 1 / kMaskScale times as
// large, which is exact, as the bits of fp16's 1 are 2^-7 in bf16.
template <typename T>
__device__ __forceinline__ uint32_t DropPair(uint32_t pair, uint32_t kept);
template <>
__device__ __forceinline__ uint32_t DropPair<__half>(uint32_t pair, uint32_t kept) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(pair), "r"(kept));
  return y;
}
template <>
__device__ __forceinline__ uint32_t DropPair<__nv_bfloat16>(uint32_t pair, uint32_t kept) {
  uint32_t y;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(pair), "r"(kept));
  return y;
}
template <typename T>
constexpr float kMaskScale = 1.0f;
template <>
inline constexpr float kMaskScale<__nv_bfloat16> = 128.0f;

// Drops from a tile's probabilities, left operands of products over its keys, what is not kept of
// softmax rows `row` and `row` + 8 and the tile of keys `tile`. Without bits in between, which are
// made only where they are needed elsewhere: a pair takes three instructions instead of six.
template <typename T>
__device__ __forceinline__ void DropTile(const DropoutParams& dropout, const RngState& rng,
                                         int64_t row, int tile, uint32_t (&probs)[4][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Philox4 bytes = DropoutBytes(rng, dropout.stream, static_cast<uint64_t>(row + 8 * half),
                                       static_cast<uint32_t>(tile) * 4u + (threadIdx.x & 3u));
    const KeepLimits limits(bytes, dropout.threshold);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& word = probs[i / 2][half + 2 * (i & 1)];
      word = DropPair<T>(word, limits.Kept(bytes.word[i / 2], i % 2));
    }
  }
}

// The same by bits that have been drawn.
template <typename T>
__device__ __forceinline__ void DropTile(KeptPairs kept, uint32_t (&probs)[4][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& word = probs[i / 2][half + 2 * (i & 1)];
      word = DropPair<T>(word, kept.Pair(half, i / 4, i % 4));
    }
  }
}

__device__ __forceinline__ float KeepProbability(const DropoutParams& dropout) {
  return static_cast<float>(dropout.threshold) * (1.0f / 65536.0f);
}

// What sums of products with dropped probabilities must be multiplied by.
template <typename T, bool kDropout>
__device__ __forceinline__ float KeptScale(const DropoutParams& dropout) {
  return kDropout ? dropout.scale * kMaskScale<T> : 1.0f;
}

// What a thread needs to know of its rows g and g + 8 of a score tile.
struct RowPair {
  SoftmaxRow softmax[2];
  float delta[2];  // times the probability of keeping
};

// From probabilities `s` before dropout and the gradients `dp` of those after it, of columns
// `part` * 32 and on of row half `half`: the probabilities after it, 1 / KeptScale times as large,
// and the gradients of the scores, without their scale and the dropout's. So `delta` is as many
// times smaller.
template <typename T, bool kDropout>
__device__ __forceinline__ void DropGrads(const float (&s)[8][4], const float (&dp)[8][4], int part,
                                          int half, KeptPairs kept, float delta,
                                          uint32_t (&probs)[4], uint32_t (&ds)[4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float* prob = &s[4 * part + m][2 * half];
    const float* grad = &dp[4 * part + m][2 * half];
    probs[m] = PackPair<T>(prob[0], prob[1]);
    float2 difference = make_float2(grad[0] - delta, grad[1] - delta);
    if constexpr (kDropout) {
      const uint32_t mask = kept.Pair(half, part, m);
      const float2 factor = PairToFloats(mask);
      difference = make_float2(fmaf(grad[0], factor.x, -delta), fmaf(grad[1], factor.y, -delta));
      probs[m] = DropPair<T>(probs[m], mask);
    }
    ds[m] = PackPair<T>(prob[0] * difference.x, prob[1] * difference.y);
  }
}

// s = 2^(s * scale_log2 - shift), `shift` being that of the row
__device__ __forceinline__ void ShiftedExponentials(float (&s)[8][4], float scale_log2,
                                                    const float (&shift)[2]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = Exp2(fmaf(s[n][i], scale_log2, -shift[i >> 1]));
  }
}

// s = exp(s - max) * inverse_sum, of products without their scale where `plain`, otherwise of
// scores as MaskScores leaves them.
__device__ __forceinline__ void Probabilities(float (&s)[8][4], bool plain, float scale,
                                              const SoftmaxRow (&rows)[2]) {
  if (plain) {
    // In one step; where max is no mask's value its sum with a logarithm loses nothing.
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shift[half] = rows[half].max * kLog2E - __log2f(rows[half].inverse_sum);
    }
    ShiftedExponentials(s, scale * kLog2E, shift);
  } else {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SoftmaxRow& row = rows[i >> 1];
        s[n][i] = Exp2((s[n][i] - row.max) * kLog2E) * row.inverse_sum;
      }
    }
  }
}

// Left operands of products over a tile's keys.
template <typename T>
__device__ __forceinline__ void PackTile(const float (&s)[8][4], uint32_t (&probs)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) PackA<T>(probs[k], s[2 * k], s[2 * k + 1]);
}

// A warp's 16 rows of c = q k^T once more, without its warpgroup, and added to what c is; `keys` is
// a tile of 64 columns.
template <typename T>
__device__ __forceinline__ void AddRowsOfTile(float (&c)[8][4], const uint32_t (*q)[4],
                                              const SwizzledTile<T>& keys) {
  // Asked for anew, so that what is worked out of it, which is rarely needed, takes no registers
  // from tile to tile.
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  const char* bytes = reinterpret_cast<const char*>(keys.rows);
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t b[4];
      LoadMatrices(
          b, bytes + Swizzled(8 * n + (lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
      MultiplyAdd<T>(c[n], q[k], b[0], b[1]);
      MultiplyAdd<T>(c[n + 1], q[k], b[2], b[3]);
    }
  }
}

// The softmax of a thread's rows g and g + 8 over tiles of keys that come one after another.
//
// Probabilities are taken against a reference, the greatest score of the first tile, without a look
// at a later tile's: that looks for a maximum in 35 instructions, two exchanges between lanes, and
// a wait for both before the first exponential. Whether the reference will do is seen afterwards,
// from sums that are needed anyway. Where one of a lane's 16 probabilities exceeds kMost, so does
// their sum; then the scores are computed again and the reference becomes what it should have been.
// So probabilities are at most kMost, which fp16 can hold, and no sum of the rows or products is
// lost to overflow. A greater reference than need be costs what it always does: what is less than
// its 2^-24th may vanish in fp16, and it was some key's.
struct RunningSoftmax {
  static constexpr float kMost = 4096.0f;
  // What a reference may be below a tile's maximum, where one is looked for, without being raised.
  static constexpr float kMaxLag = 5.5f;
  // The kernel's, which sets them where it sets its sums: to -infinity and 0.
  float (&reference)[2];
  float (&row_sum)[2];  // this lane's columns only, until the end

  // s: from a tile's products without their scale to probabilities without their sums, which are
  // added to the rows'. Where not `plain` mask() makes scores of them, as MaskScores does. repeat()
  // makes s the products that it was. What was summed up before is to be multiplied by `factor`;
  // whether one of this thread's is not 1. `scale_log2` is the scale times log2 e, kFirst says that
  // there was no tile before.
  template <bool kFirst, typename Mask, typename Repeat>
  __device__ __forceinline__ bool Take(float (&s)[8][4], bool plain, float scale, float scale_log2,
                                       float (&factor)[2], const Mask& mask, const Repeat& repeat) {
    float tile_sum[2];
    bool above = false;
    factor[0] = factor[1] = 1.0f;
    // A mask's values may be anything: there the maximum is looked for.
    bool look = kFirst || !plain;
    if (!look) {
      float shift[2];
      // A reference of -infinity makes infinities or no numbers, which are looked at.
#pragma unroll
      for (int half = 0; half < 2; ++half) shift[half] = reference[half] * kLog2E;
      ShiftedExponentials(s, scale_log2, shift);
      SumRows(s, tile_sum);
      look = __any_sync(0xFFFFFFFFu, !(tile_sum[0] <= kMost && tile_sum[1] <= kMost));
      if (look) repeat();
    }
    if (look) {
      if (!plain) mask();
      above = Exponentials(s, plain, scale, scale_log2, factor);
      SumRows(s, tile_sum);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sum[half] += tile_sum[half];
    return above;
  }

  // At the end: what the products' sums are to be multiplied by, and the rows where they go, -1
  // beyond the sequence's end, for StoreRows; and stores what a backward needs to know of the rows.
  // `query` is that of row g.
  template <typename T, bool kDropout>
  __device__ __forceinline__ void Finish(const AttentionParams& p, const Head& h, int query,
                                         float (&factor)[2], int (&row)[2]) const {
    const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[half];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      factor[half] = inverse * KeptScale<T, kDropout>(p.dropout);
      const bool inside = query + 8 * half < h.length;
      row[half] = inside ? query + 8 * half : -1;
      if (p.softmax != nullptr && (lane & 3) == 0 && inside) {
        p.softmax[h.row + query + 8 * half] =
            SoftmaxRow{sum > 0.0f ? reference[half] : INFINITY, inverse};
      }
    }
  }

 private:
  static __device__ __forceinline__ void SumRows(const float (&s)[8][4], float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two sums, so that an addition waits for the one before the last.
      float two[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) two[e] += s[n][2 * half + e];
      }
      sum[half] = two[0] + two[1];
    }
  }

  // Of products where `plain`, otherwise of scores as MaskScores leaves them, with a look at the
  // maximum.
  __device__ __forceinline__ bool Exponentials(float (&s)[8][4], bool plain, float scale,
                                               float scale_log2, float (&factor)[2]) {
    float tile_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile_max[i >> 1] = fmaxf(tile_max[i >> 1], s[n][i]);
    }
    bool above = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = tile_max[half];
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 2));
      m = plain ? m * scale : m;
      if (m > reference[half] + kMaxLag) {
        above = true;
        factor[half] = Exp2((reference[half] - m) * kLog2E);
        reference[half] = m;
        row_sum[half] *= factor[half];
      }
    }
    // Nothing seen but -inf: any finite reference gives exp(-inf) = 0 rather than NaN.
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shift[half] = reference[half] == -INFINITY ? 0.0f : reference[half];
    }
    if (plain) {
#pragma unroll
      for (int half = 0; half < 2; ++half) shift[half] *= kLog2E;
      ShiftedExponentials(s, scale_log2, shift);
    } else {
      // The difference first: a score near the lowest fp32 number has no multiple.
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = Exp2((s[n][i] - shift[i >> 1]) * kLog2E);
      }
    }
    return above;
  }
};

// Turns of two warpgroups: while one's products run that it has started in its turn, the other has
// its own of the time between products. Left to themselves they start theirs together and then
// wait for each other. The barriers' numbers are literal, as the block takes all of them otherwise.
struct Turns {
  // The second one's turn is to be ended before the first one's begins.
  static __device__ __forceinline__ void Begin(int group) {
    if (group == 0) {
      asm volatile("bar.sync 1, %0;" ::"n"(2 * kWarpgroup) : "memory");
    } else {
      asm volatile("bar.sync 2, %0;" ::"n"(2 * kWarpgroup) : "memory");
    }
  }
  static __device__ __forceinline__ void End(int group) {
    if (group == 0) {
      asm volatile("bar.arrive 2, %0;" ::"n"(2 * kWarpgroup) : "memory");
    } else {
      asm volatile("bar.arrive 1, %0;" ::"n"(2 * kWarpgroup) : "memory");
    }
  }
};

// The sums of c's columns over a warp's 16 rows: lane i has those of columns 2 i and 2 i + 1.
__device__ __forceinline__ float2 ColumnSums(const float (&c)[8][4]) {
  float sixteen[16], two[2];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) sixteen[2 * n + e] = c[n][e] + c[n][2 + e];
  }
  SumOverRows(sixteen, two);
  return make_float2(two[0], two[1]);
}

// A warp's ColumnSums in shared memory.
struct WarpSums {
  float2 pairs[32];
};

// Column `column` of what `warps` warps have summed up, in their order, times `factor`.
__device__ __forceinline__ float AddWarpSums(const WarpSums* sums, int warps, float factor,
                                             int column) {
  float sum = 0.0f;
  for (int i = 0; i < warps; ++i) {
    const float2 pair = sums[i].pairs[column / 2];
    sum += column % 2 == 0 ? pair.x : pair.y;
  }
  return sum * factor;
}

// A block for every kRows rows of a head of the launch.
template <int kRows, typename Kernel>
cudaError_t LaunchRows(Kernel kernel, int threads, size_t shared, const AttentionParams& p,
                       cudaStream_t stream) {
  const int64_t heads = p.head_count > 0 ? p.head_count : p.batch * p.heads;
  const int64_t blocks = heads * ((p.seq + kRows - 1) / kRows);
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace lamina::cuda
