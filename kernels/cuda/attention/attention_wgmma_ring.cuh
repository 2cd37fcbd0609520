// Purpose: what warpgroup kernels have in common whose tiles a warpgroup copies and others compute
// with: tiles of up to 128 columns, the ring that they pass through, the blocks of rows that a
// block does in turn, score tiles whose rows are keys.
//
// A multiprocessor has one block. It stays and does one block of rows after another, and what
// copies is ahead of what computes, across their bounds. What computes has nearly all registers: a
// thread's share of a sum over 128 columns is 64 of them, and a backward has two such sums.
#pragma once

#include <cstdint>

#include "attention/attention_head.cuh"
#include "attention/attention_wgmma_tiles.cuh"
#include "common/copy_async.cuh"
#include "common/mbarrier.cuh"
#include "common/wgmma.cuh"

namespace lamina::cuda {

// Of kernels for head dims up to kDim.
template <int kDim>
struct Shape {
  static constexpr int kGroups = kDim == 64 ? 3 : 2;  // that compute
  static constexpr int kComputing = kGroups * kWarpgroup;
  static constexpr int kThreads = kComputing + kWarpgroup;
  static constexpr int kRows = kGroups * kTile;  // of a block
  static constexpr int kHalves = kDim / 64;
  static_assert(kRows == WgmmaBlockRows(kDim), "what the sums are counted by");
  // Registers of a thread that copies, and of one that computes: of 65536 for 512 threads, of 64512
  // for 384.
  static constexpr int kCopyRegisters = kDim == 64 ? 32 : 56;
  static constexpr int kComputeRegisters = kDim == 64 ? 160 : 224;
};

// 64 rows of a head, by 64 columns.
template <typename T, int kDim>
struct HeadTile {
  SwizzledTile<T> halves[kDim / 64];
};

constexpr uint64_t kNextHalf = kSwizzledBytes >> 4;  // in a description

// A tile whose columns are those of an operand.
template <typename T, int kDim>
__device__ __forceinline__ uint64_t DescribeColumns(const HeadTile<T, kDim>& tile) {
  return DescribeTile(&tile, kSwizzledBytes);
}

// c = a b^T over a depth of 16 kSteps, a in registers.
template <typename T, int kSteps>
__device__ __forceinline__ void MultiplyRowsOfHeadTile(float (&c)[8][4],
                                                       const uint32_t (&a)[kSteps][4], uint64_t b) {
  ProductStep<T, false, false>(c, a[0], b);
#pragma unroll
  for (int k = 1; k < kSteps; ++k) {
    ProductStep<T, true, false>(c, a[k], b + k / 4 * kNextHalf + k % 4 * kStepAlongRow);
  }
}

// The same, both tiles.
template <typename T, int kDim>
__device__ __forceinline__ void MultiplyRowsOfHeadTiles(float (&c)[8][4], uint64_t a, uint64_t b) {
  ProductStep<T, false, false, false>(c, a, b);
#pragma unroll
  for (int k = 1; k < kDim / 16; ++k) {
    const uint64_t step = k / 4 * kNextHalf + k % 4 * kStepAlongRow;
    ProductStep<T, true, false, false>(c, a + step, b + step);
  }
}

// c += a b, a in registers, its columns the tile's rows; b as of DescribeColumns.
template <typename T>
__device__ __forceinline__ void MultiplyTile(float (&c)[16][4], const uint32_t (&a)[4][4],
                                             uint64_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) ProductStep<T>(c, a[k], b + k * kStepAlongColumn);
}

// A of products over a tile's columns: rows [row, row + 16), columns [16 k, 16 k + 16).
template <typename T, int kDim>
__device__ __forceinline__ void LoadRowFragment(uint32_t (&a)[4], const HeadTile<T, kDim>& tile,
                                                int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  LoadMatrices(a, reinterpret_cast<const char*>(tile.halves[k / 4].rows) +
                      Swizzled(row + (lane & 15), 2 * (k % 4) + (lane >> 4)));
}
// All columns.
template <typename T, int kDim>
__device__ __forceinline__ void LoadRowFragments(uint32_t (&a)[kDim / 16][4],
                                                 const HeadTile<T, kDim>& tile, int row) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) LoadRowFragment(a[k], tile, row, k);
}

// A barrier of the threads that compute.
template <int kDim>
__device__ __forceinline__ void ComputingBarrier() {
  asm volatile("bar.sync 4, %0;" ::"n"(Shape<kDim>::kComputing) : "memory");
}

// Has `value` computed here. Left to itself ptxas moves what does not depend on products to behind
// the wait for them, across branches too; a sleep that may depend on it it leaves where it is.
__device__ __forceinline__ void DoFirst(uint32_t value) {
  asm volatile(
      "{\n.reg .pred never;\n"
      "setp.eq.u32 never, %0, 0x5A17C3E9;\n"
      "@never nanosleep.u32 0;\n}" ::"r"(value)
      : "memory");
}

// 64 columns of a sum.
template <int kTiles>
__device__ __forceinline__ float (&HalfOf(float (&c)[kTiles][4], int half))[8][4] {
  return reinterpret_cast<float(&)[8][4]>(c[8 * half]);
}

// StoreRows of all columns.
template <typename T, int kTiles>
__device__ __forceinline__ void StoreHeadRows(T* dst, int64_t stride, const int (&row)[2],
                                              int head_dim, float (&c)[kTiles][4], float factor0,
                                              float factor1) {
  const float factor[2] = {factor0, factor1};
#pragma unroll
  for (int half = 0; half < kTiles / 8; ++half) {
    StoreRows(dst + 64 * half, stride, row, head_dim - 64 * half, HalfOf(c, half), factor);
  }
}

// The part in copying tiles that a thread of the copying warpgroup has: a chunk of eight columns,
// and every kStep-th row.
template <int kDim>
struct TileCopies {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kStep = kWarpgroup / kChunks;
  int row, chunk;
  bool inside;  // of the head's columns

  __device__ __forceinline__ explicit TileCopies(int head_dim)
      : row(static_cast<int>(threadIdx.x) % kWarpgroup / kChunks),
        chunk(static_cast<int>(threadIdx.x) % kChunks),
        inside(chunk * 8 < head_dim) {}

  // Starts to copy `rows` rows from `src` on, the head's first column of the first one, and writes
  // zeros where the tile has more. Where there is no row at all `src` may be anything.
  template <TileOrder kOrder, typename T>
  __device__ __forceinline__ void Start(HeadTile<T, kDim>& tile, const T* src, int64_t stride,
                                        int rows) const {
    char* dst = reinterpret_cast<char*>(tile.halves[chunk / 8].rows);
    const T* from = src + row * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < kTile / kStep; ++i) {
      const int r = row + kStep * i;
      CopyAsync16(dst + Swizzled(kOrder == TileOrder::kKeys ? Reordered(r) : r, chunk % 8),
                  from + i * kStep * stride, inside && r < rows);
    }
  }
};

// Whether probabilities are kept, for kernels whose score tiles have keys as rows: of a query and a
// tile of keys two words, of calls 0 and 1 and of calls 2 and 3, each call's DrawEightPairs in 16
// bits. The keys of a warp, two rows of eight, are in one of them.
__device__ __forceinline__ uint16_t DrawCall(const DropoutParams& dropout, const RngState& rng,
                                             int64_t row, uint32_t call) {
  return static_cast<uint16_t>(__byte_perm(DrawEightPairs(dropout, rng, row, call), 0, 0x4420));
}
__device__ __forceinline__ int KeptWord(int warp) { return warp % 2; }
// Of a thread's key g; that of key g + 8 is 16 above.
__device__ __forceinline__ uint32_t KeptBit(int warp) {
  const int g = (static_cast<int>(threadIdx.x) & 31) / 4;
  return 1u << (8 * (g % 2) + 7 - warp % 4 / 2 * 4 - g / 2);
}

// Draws the words of a warp and the tile of keys `tile`, for the tile of queries whose first
// softmax row is `row`.
__device__ __forceinline__ void DrawKeyRows(const DropoutParams& dropout, const RngState& rng,
                                            int64_t row, int tile, uint32_t (&words)[kTile]) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int word = KeptWord(static_cast<int>(threadIdx.x) / 32);
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < kTile; i += 32) {
    const auto call = static_cast<uint32_t>(4 * tile + 2 * word);
    words[i] = DrawCall(dropout, rng, row + i, call) |
               static_cast<uint32_t>(DrawCall(dropout, rng, row + i, call + 1)) << 16;
  }
  __syncwarp();
}

// Two elements as PackPair, 0 where they are negative.
template <typename T>
__device__ __forceinline__ uint32_t PackPositive(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// What shared memory has of a tile of queries beside their rows.
struct QueryTile {
  const SoftmaxRow* softmax;
  const float* shift;  // max * log2 e - log2 inverse_sum
  const float* delta;
  const uint32_t* kept;  // as DrawKeyRows leaves them; null: no dropout
};

__device__ __forceinline__ float ShiftOf(const SoftmaxRow& row) {
  return row.max * kLog2E - __log2f(row.inverse_sum);
}

// A warp's part of a tile of keys that are the rows of score tiles: 16 keys, of which a thread has
// those of its rows g and g + 8. Columns are 64 queries.
struct KeyTile {
  int first;      // of the warp
  bool whole;     // no key of the tile is cut off
  float bias[2];  // of a thread's keys

  // `row`: of the warp in the tile, whose first key is `key0`.
  __device__ __forceinline__ KeyTile(const AttentionParams& p, const Head& h, int key0, int row)
      : first(key0 + row), whole(key0 + kTile <= h.keys) {
    bias[0] = bias[1] = 0.0f;
    if (p.mask == nullptr && whole) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) bias[half] = KeyBias(p, h, Row(half));
  }
  __device__ __forceinline__ int Row(int half) const {
    return first + (static_cast<int>(threadIdx.x) & 31) / 4 + 8 * half;
  }

  // The probabilities of products `s` with queries `query0` and on, in s, and after dropout,
  // without its scale, as left operands of products over the queries. One that is dropped is
  // negative in s.
  template <typename T, bool kDropout>
  __device__ __forceinline__ void Probabilities(float (&s)[8][4], uint32_t (&probs)[4][4],
                                                const AttentionParams& p, const QueryTile& queries,
                                                int query0) const {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const int t2 = lane % 4 * 2;
    const bool cut = p.causal && query0 < first + 15;
    if (p.mask == nullptr && whole && !cut) {
      const float scale_log2 = p.scale * kLog2E;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 shift = *reinterpret_cast<const float2*>(&queries.shift[8 * n + t2]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] = Exp2(fmaf(s[n][i], scale_log2, (i & 1) == 0 ? -shift.x : -shift.y));
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float4 rows = *reinterpret_cast<const float4*>(&queries.softmax[8 * n + t2]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float score = s[n][i] * p.scale + bias[i >> 1];
          if (cut && Row(i >> 1) > query0 + 8 * n + t2 + (i & 1)) score = -INFINITY;
          // The difference first: a score near the lowest fp32 number has no multiple.
          s[n][i] = (i & 1) == 0 ? Exp2((score - rows.x) * kLog2E) * rows.y
                                 : Exp2((score - rows.z) * kLog2E) * rows.w;
        }
      }
    }
    [[maybe_unused]] const uint32_t bit = KeptBit(static_cast<int>(threadIdx.x) / 32);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if constexpr (kDropout) {
        const uint2 kept = *reinterpret_cast<const uint2*>(&queries.kept[8 * n + t2]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool keep = (((i & 1) == 0 ? kept.x : kept.y) & bit << 16 * (i >> 1)) != 0;
          s[n][i] = keep ? s[n][i] : -s[n][i];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        probs[n / 2][half + 2 * (n & 1)] = kDropout
                                               ? PackPositive<T>(s[n][2 * half], s[n][2 * half + 1])
                                               : PackPair<T>(s[n][2 * half], s[n][2 * half + 1]);
      }
    }
  }

  // From these and the gradients `dp` of the probabilities those of the scores, without their
  // scale, as left operands of products over the queries. dp is used up.
  template <typename T, bool kDropout>
  __device__ __forceinline__ void ScoreGrads(const float (&s)[8][4], float (&dp)[8][4],
                                             uint32_t (&ds)[4][4], const AttentionParams& p,
                                             const QueryTile& queries) const {
    const int t2 = (static_cast<int>(threadIdx.x) & 3) * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(&queries.delta[8 * n + t2]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float row_delta = (i & 1) == 0 ? delta.x : delta.y;
        if constexpr (kDropout) {
          const float difference = fmaf(dp[n][i], p.dropout.scale, -row_delta);
          dp[n][i] = fabsf(s[n][i]) * (s[n][i] < 0.0f ? -row_delta : difference);
        } else {
          dp[n][i] = s[n][i] * (dp[n][i] - row_delta);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ds[n / 2][half + 2 * (n & 1)] = PackPair<T>(dp[n][2 * half], dp[n][2 * half + 1]);
      }
    }
  }
};

// Where in a ring of slots a warpgroup is.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// What the copying warpgroup fills and the warps of the others empty.
template <int kSlots, int kDim>
struct Ring {
  uint64_t full[kSlots], empty[kSlots];

  // One thread calls this; a block's barrier makes it known to the others. `others`: how often a
  // slot is arrived at beside each copying thread's copies.
  __device__ __forceinline__ void Start(int others = 0) {
    for (int i = 0; i < kSlots; ++i) {
      StartBarrier(&full[i], kWarpgroup + others);
      StartBarrier(&empty[i], Shape<kDim>::kComputing / 32);
    }
  }
  // Until the slot may be filled. What has been copied into it is told by Fill.
  __device__ __forceinline__ void WaitEmpty(const RingPlace<kSlots>& place) {
    WaitForPhase(&empty[place.slot], place.parity ^ 1);
  }
  __device__ __forceinline__ void Fill(const RingPlace<kSlots>& place) {
    ArriveAfterCopies(&full[place.slot]);
  }
  // Until the slot has been filled, for products too.
  __device__ __forceinline__ void WaitFull(const RingPlace<kSlots>& place) {
    WaitForPhase(&full[place.slot], place.parity);
    ShareWithEngines();
  }
  // Of a warp that needs it no more.
  __device__ __forceinline__ void Release(int slot) { ArriveByWarp(&empty[slot]); }
};

// Fills the ring with a head's keys and values, a tile of each a slot, and the keys' masks.
template <typename Shared, typename T, int kSlots, int kDim>
__device__ __forceinline__ void CopyKeys(const AttentionParams& p, const Head& h,
                                         const TileCopies<kDim>& copies, const T* keys,
                                         Shared& shared, RingPlace<kSlots>& place) {
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x) % kWarpgroup;
  for (int key0 = 0; key0 < h.keys; key0 += kTile) {
    shared.ring.WaitEmpty(place);
    auto& slot = shared.slots[place.slot];
    copies.template Start<TileOrder::kKeys>(slot[0], keys, stride, h.keys - key0);
    copies.template Start<TileOrder::kKeys>(slot[1], keys + p.width, stride, h.keys - key0);
    if (p.mask != nullptr && tid < kTile) {
      const bool inside = key0 + tid < h.keys;
      CopyAsyncSmall<4>(&shared.bias[place.slot][tid],
                        p.mask + h.batch * p.seq + (inside ? key0 + tid : 0), inside);
    }
    shared.ring.Fill(place);
    place.Advance();
    keys += kTile * stride;
  }
}

// The blocks of rows of a launch, `number` in all and `per_head` a head, that one block does: every
// gridDim.x-th, there and back, so that long and short ones come in turn.
template <int kDim>
struct BlocksInTurn {
  unsigned number, per_head;
  unsigned first = 0;  // of the round

  __device__ __forceinline__ BlocksInTurn(unsigned number, unsigned per_head)
      : number(number), per_head(per_head) {}
  __device__ __forceinline__ unsigned Index() const {
    const bool back = (first / gridDim.x & 1u) != 0;
    return first + (back ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
  __device__ __forceinline__ bool Any() const { return Index() < number; }
  __device__ __forceinline__ void Next() { first += gridDim.x; }

  template <BlockRows kBlockRows>
  __device__ __forceinline__ Head At(const AttentionParams& p) const {
    const unsigned block_index = Index();
    const unsigned index = block_index / per_head;
    unsigned block = block_index - index * per_head;
    // As HeadOfBlock has them.
    if (kBlockRows == BlockRows::kQueries && p.causal) block = per_head - 1 - block;
    const unsigned all = static_cast<unsigned>(p.first_head) + index;
    const unsigned heads = static_cast<unsigned>(p.heads);
    const unsigned batch = all / heads;
    return HeadAt<Shape<kDim>::kRows, kBlockRows>(p, index, batch, all - batch * heads, block);
  }
};

// What a kernel's warpgroups do for all of their time: the last one copy(), the others compute().
template <int kDim, typename Copy, typename Compute>
__device__ __forceinline__ void CopyOrCompute(const Copy& copy, const Compute& compute) {
  if (threadIdx.x >= Shape<kDim>::kComputing) {
    GiveRegisters<Shape<kDim>::kCopyRegisters>();
    copy();
  } else {
    TakeRegisters<Shape<kDim>::kComputeRegisters>();
    compute();
  }
}

// Launches `kernel`(p, number of blocks of rows, of a head) over the heads of the launch.
template <int kDim, typename Kernel>
cudaError_t LaunchBlocks(Kernel kernel, size_t shared, const AttentionParams& p,
                         cudaStream_t stream) {
  const int64_t heads = p.head_count > 0 ? p.head_count : p.batch * p.heads;
  const int64_t per_head = (p.seq + Shape<kDim>::kRows - 1) / Shape<kDim>::kRows;
  const int64_t number = heads * per_head;
  // Half of what an index may be, as the last round goes beyond it.
  if (number > 0x7FFFFFFF || p.batch * p.heads > 0x7FFFFFFF) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  const int64_t blocks = number < p.multiprocessors ? number : p.multiprocessors;
  kernel<<<static_cast<unsigned>(blocks), Shape<kDim>::kThreads, shared, stream>>>(
      p, static_cast<unsigned>(number), static_cast<unsigned>(per_head));
  return cudaGetLastError();
}

}  // namespace lamina::cuda
