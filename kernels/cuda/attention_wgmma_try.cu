// Purpose: the forward of attention with wgmma, in the manner of FlashAttention-2 and -3 (Dao,
// 2023; Shah et al., 2024); attention_wgmma.cuh.
//
// A block is two warpgroups of 64 queries each. Their keys pass through a ring of tiles in shared
// memory, which all threads fill and each warpgroup empties at its own pace: while one computes
// exponentials, the other's products run. The products of a tile with V are waited for when those
// of the next tile with Q have been started.
#include <algorithm>

#include "attention_wgmma.cuh"
#include "attention_wgmma_ring.cuh"
#include "attention_wgmma_tiles.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kGroups = 2;
constexpr int kThreads = kGroups * kWarpgroup;
constexpr int kRows = kGroups * kTile;  // queries of a block
constexpr int kStages = 4;
constexpr int kAhead = 2;  // tiles on their way; one stage is being emptied, one computed on

template <typename T>
struct ForwardShared {
  struct Stage {
    SwizzledTile<T> k, v;
  };
  Stage stages[kStages];
  float bias[kStages][kTile];
  uint64_t full[kStages], empty[kStages];
};

// Drops from a tile's probabilities, as Take leaves them, what is not kept of softmax rows `row`
// and `row` + 8 and the tile of keys `tile`.
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

// A warp's 16 rows of the scores of a tile once more, without a warpgroup.
template <typename T>
__device__ __forceinline__ void RepeatScores(float (&s)[8][4], const uint32_t (&q)[4][4],
                                             const SwizzledTile<T>& keys) {
  // Not known before, so that no register holds for all tiles what is worked out of it.
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  const char* bytes = reinterpret_cast<const char*>(keys.rows);
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = s[n + 1][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t b[4];
      LoadMatrices(
          b, bytes + Swizzled(8 * n + (lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
      MultiplyAdd<T>(s[n], q[k], b[0], b[1]);
      MultiplyAdd<T>(s[n + 1], q[k], b[2], b[3]);
    }
  }
}

// What is tried: how dropout is drawn, and whether the warpgroups take turns.
enum class Draw { kBits, kBitsFirst, kPairs };

template <typename T, bool kDropout, Draw kDraw, bool kTurns, bool kOptimistic, bool kLag = false>
__global__ void __launch_bounds__(kThreads, 2) AttentionWgmmaTryKernel(const AttentionParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<T>*>(shared_bytes);
  if (kLag) {
    // The second of a multiprocessor's first two blocks: one computes while the other loads.
    const auto mps = static_cast<unsigned>(p.multiprocessors);
    if (blockIdx.x >= mps && blockIdx.x < 2 * mps && gridDim.x >= 6 * mps) {
      const int64_t begin = clock64();
      while (clock64() - begin < 4000) {
      }
    }
  }
  const Head h = HeadOfBlock<kRows, BlockRows::kQueries>(p);
  if (h.first >= h.length) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const T* qkv = static_cast<const T*>(p.qkv) + h.token * stride + h.column;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp_row = (tid & (kWarpgroup - 1)) / 32 * 16;  // within the group's tile
  const int group_query = h.first + group * kTile;
  const int query = group_query + warp_row + (lane >> 2);  // of row g
  RngState rng{};
  if (kDropout) rng = UniformState(p.dropout.rng);

  const int tiles = (h.keys + kTile - 1) / kTile;
  const TilePart<kThreads, TileOrder::kKeys> copies(head_dim);
  const T* next_keys = qkv + p.width + copies.Source(stride);
  const auto start = [&](int tile) {
    const int key0 = tile * kTile;
    auto& stage = shared.stages[tile % kStages];
    copies.Start(stage.k, next_keys, stride, h.keys - key0);
    copies.Start(stage.v, next_keys + p.width, stride, h.keys - key0);
    next_keys += kTile * stride;
    if (p.mask != nullptr && tid < kTile) {
      const bool inside = key0 + tid < h.keys;
      CopyAsyncSmall<4>(&shared.bias[tile % kStages][tid],
                        p.mask + h.batch * p.seq + (inside ? key0 + tid : 0), inside);
    }
    ArriveAfterCopies(&shared.full[tile % kStages]);
  };

  if (tid == 0) StartRing<kThreads>(shared.full, shared.empty);
  // The queries pass through the last stage into registers.
  auto& last = shared.stages[kStages - 1];
  StartSwizzledTile<kThreads, TileOrder::kPlain>(last.k, qkv + h.first * stride, stride,
                                                 h.length - h.first, head_dim);
  if (h.first + kTile < h.length) {
    StartSwizzledTile<kThreads, TileOrder::kPlain>(last.v, qkv + (h.first + kTile) * stride, stride,
                                                   h.length - h.first - kTile, head_dim);
  }
  CommitCopies();
  __syncthreads();
  static_assert(kAhead < kStages, "the first tiles leave the last stage to the queries");
#pragma unroll
  for (int tile = 0; tile < kAhead; ++tile) {
    if (tile < tiles) start(tile);
  }
  WaitForCopies<0>();
  __syncthreads();
  uint32_t q[4][4];
  LoadRowFragments(q, group == 0 ? last.k : last.v, warp_row);
  __syncthreads();

  float o[8][4] = {};
  uint32_t probs[4][4];  // of the tile before
  float reference[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};
  RunningSoftmax softmax{reference, row_sum};
  const float scale_log2 = p.scale * kLog2E;
  // Of this warpgroup: what a causal block's first queries do not see is left out.
  const int keys = p.causal ? min(h.keys, group_query + kTile) : h.keys;
  const int group_tiles = (keys + kTile - 1) / kTile;
  // Literal numbers, so that the block takes three barriers and not all.
  const auto begin_turn = [&] {
    if (!kTurns) return;
    if (group == 0) {
      asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
    } else {
      asm volatile("bar.sync 2, %0;" ::"n"(kThreads) : "memory");
    }
  };
  const auto end_turn = [&] {
    if (!kTurns) return;
    if (group == 0) {
      asm volatile("bar.arrive 2, %0;" ::"n"(kThreads) : "memory");
    } else {
      asm volatile("bar.arrive 1, %0;" ::"n"(kThreads) : "memory");
    }
  };
  if (kTurns && group == kGroups - 1) end_turn();
  const auto step = [&](int tile, auto first) {
    const int key0 = tile * kTile;
    auto& stage = shared.stages[tile % kStages];
    WaitForPhase(&shared.full[tile % kStages], (tile / kStages) & 1);
    ShareWithEngines();
    float s[8][4];
    begin_turn();
    BeginProducts();
    MultiplyRowsOfTile<T>(s, q, DescribeTile(&stage.k));
    CommitProducts();
    const auto copy = [&] {
      if (tile + kAhead < tiles) {
        const int next = tile + kAhead;
        WaitForPhase(&shared.empty[next % kStages], ((next / kStages) & 1) ^ 1);
        start(next);
      }
    };
    constexpr bool kPairs = !first && kDropout && kDraw == Draw::kPairs;
    if constexpr (!first) {
      if constexpr (kPairs) {
        end_turn();
        // Drawn while the products run. The copies come first as ptxas draws before the products
        // unless there is a branch between.
        copy();
        DropTile<T>(p.dropout, rng, h.row + query, tile - 1, probs);
        BeginProducts();
      }
      MultiplyTile<T>(o, probs, DescribeTile(&shared.stages[(tile - 1) % kStages].v));
      CommitProducts();
    }
    if constexpr (!kPairs) {
      end_turn();
      copy();
    }
    KeptPairs kept{};
    if (kDropout && kDraw != Draw::kPairs) {
      // Drawn while the products run.
      kept = DrawPairs(p.dropout, rng, h.row + query, tile);
      if (kDraw == Draw::kBitsFirst) DoFirst(kept.word);
    }
    WaitForProducts<first ? 0 : 1>();
    PinProduct(s);

    const bool cut = p.causal && key0 + kTile - 1 > group_query + warp_row;
    const bool plain = p.mask == nullptr && p.scale > 0.0f && key0 + kTile <= h.keys && !cut;
    float factor[2] = {1.0f, 1.0f};
    float tile_sum[2];
    bool above = false;
    const auto sum_up = [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float two[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) two[e] += s[n][2 * half + e];
        }
        tile_sum[half] = two[0] + two[1];
      }
    };
    // Without a look at the maximum: the first tile's, or what has taken its place, will do unless
    // a sum says otherwise, which is rare.
    bool look = first || !kOptimistic || !plain;
    if (!look) {
      float shift[2];
      // Of a reference of -infinity infinite ones, which are looked at.
#pragma unroll
      for (int half = 0; half < 2; ++half) shift[half] = reference[half] * kLog2E;
      ShiftedExponentials(s, scale_log2, shift);
      sum_up();
      constexpr float kMost = 4096.0f;
      look = __any_sync(0xFFFFFFFFu, !(fmaxf(tile_sum[0], tile_sum[1]) <= kMost));
      if (look) RepeatScores<T>(s, q, stage.k);
    }
    if (look) {
      if (!plain) {
        MaskScores(s, p.scale, p.mask != nullptr ? shared.bias[tile % kStages] : nullptr,
                   h.keys - key0, cut, query - key0);
      }
      above = softmax.Exponentials(s, plain, p.scale, scale_log2, factor);
      if (kOptimistic) sum_up();
    }
    if constexpr (!first) {
      WaitForProducts<0>();
      PinProduct(o);
      if (lane == 0) Arrive(&shared.empty[(tile - 1) % kStages]);
      if (__any_sync(0xFFFFFFFFu, above)) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) o[n][i] *= factor[i >> 1];
        }
      }
    }
    if constexpr (kOptimistic) {
#pragma unroll
      for (int half = 0; half < 2; ++half) row_sum[half] += tile_sum[half];
#pragma unroll
      for (int k = 0; k < 4; ++k) PackA<T>(probs[k], s[2 * k], s[2 * k + 1]);
    } else {
      softmax.Take<T, kDropout && kDraw != Draw::kPairs>(s, kept, probs);
    }
  };
  if (group_tiles > 0) {
    step(0, std::true_type{});
#pragma unroll 1
    for (int tile = 1; tile < group_tiles; ++tile) step(tile, std::false_type{});
    if constexpr (kDropout && kDraw == Draw::kPairs) {
      DropTile<T>(p.dropout, rng, h.row + query, group_tiles - 1, probs);
    }
    BeginProducts();
    MultiplyTile<T>(o, probs, DescribeTile(&shared.stages[(group_tiles - 1) % kStages].v));
    CommitProducts();
    WaitForProducts<0>();
    PinProduct(o);
  }
  if (kTurns) {
    for (int tile = group_tiles; tile < tiles; ++tile) {
      begin_turn();
      end_turn();
    }
  }

  float factor[2];
  int row[2];
  softmax.Finish<T, kDropout>(p, h, query, factor, row);
  StoreRows(static_cast<T*>(p.out) + h.token * p.width + h.column, p.width, row, head_dim, o,
            factor);
}

template <typename T, bool kDropout, Draw kDraw, bool kTurns, bool kOptimistic, bool kLag = false>
cudaError_t Forward(const AttentionParams& p, cudaStream_t stream) {
  return LaunchRows<kRows>(AttentionWgmmaTryKernel<T, kDropout, kDraw, kTurns, kOptimistic, kLag>,
                           kThreads, sizeof(ForwardShared<T>), p, stream);
}

// Sequences of up to 128 tokens: blocks that stay and take head after head, the next one's tiles
// being copied while this one's are computed with.
template <typename T>
struct HeadShared {
  struct Buffer {
    SwizzledTile<T> q[2], k[2], v[2];
  };
  Buffer buffers[2];
  float bias[2][kRows];
  Head heads[3];  // the one before, this one and the next one, in turn
};

template <typename T, bool kDropout>
__global__ void __launch_bounds__(kThreads, 2) HeadForwardKernel(const AttentionParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<HeadShared<T>*>(shared_bytes);
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp_row = (tid & (kWarpgroup - 1)) / 32 * 16;  // within a tile
  const int group_query = group * kTile;
  const int query = group_query + warp_row + (lane >> 2);  // of row g
  RngState rng{};
  if (kDropout) rng = UniformState(p.dropout.rng);
  const float scale_log2 = p.scale * kLog2E;

  // Tiles beyond a sequence's end are neither filled nor read.
  const auto start = [&](const Head& h, int buffer) {
    auto& tiles = shared.buffers[buffer];
    // Asked for anew, so that what is worked out of it takes no registers until the next head.
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    const TilePart<kThreads, TileOrder::kPlain> queries(head_dim, thread);
    const TilePart<kThreads, TileOrder::kKeys> keys(head_dim, thread);
    const T* from =
        static_cast<const T*>(p.qkv) + h.token * stride + h.column + queries.Source(stride);
    const int length = h.length;
    const int key_count = h.keys;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* src = from + i * kTile * stride;
      if (i * kTile < length) queries.Start(tiles.q[i], src, stride, length - i * kTile);
      if (i * kTile < key_count) {
        keys.Start(tiles.k[i], src + p.width, stride, key_count - i * kTile);
        keys.Start(tiles.v[i], src + 2 * p.width, stride, key_count - i * kTile);
      }
    }
    if (p.mask != nullptr && tid < key_count) {
      CopyAsyncSmall<4>(&shared.bias[buffer][tid], p.mask + h.batch * p.seq + tid, true);
    }
  };
  const auto head_at = [&](unsigned index) {
    const auto heads = static_cast<unsigned>(p.heads);
    const unsigned batch = index / heads;
    return HeadAt<kRows, BlockRows::kQueries>(p, index, batch, index - batch * heads, 0);
  };

  const auto number = static_cast<unsigned>(p.batch * p.heads);
  if (tid < 2 && blockIdx.x + tid * gridDim.x < number) {
    shared.heads[tid] = head_at(blockIdx.x + tid * gridDim.x);
  }
  __syncthreads();
  start(shared.heads[0], 0);
  CommitCopies();
  int slot = 0;  // of this head in `heads`
  int buffer = 0;
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < number; index += gridDim.x) {
    const Head& h = shared.heads[slot];
    const int after = slot == 2 ? 0 : slot + 1;
    const int before = slot == 0 ? 2 : slot - 1;
    WaitForCopies<0>();
    ShareWithEngines();
    __syncthreads();
    if (number - index > gridDim.x) start(shared.heads[after], buffer ^ 1);
    CommitCopies();
    if (tid == kThreads - 1 && number - index > 2 * gridDim.x) {
      shared.heads[before] = head_at(index + 2 * gridDim.x);
    }
    auto& tiles = shared.buffers[buffer];
    const int length = Uniform(h.length);
    const int keys = Uniform(p.causal ? min(h.keys, group_query + kTile) : h.keys);
    if (group_query < length) {
      uint32_t q[4][4];
      LoadRowFragments(q, tiles.q[group], warp_row);
      float o[8][4] = {};
      uint32_t probs[4][4];  // of the tile before
      float reference[2] = {-INFINITY, -INFINITY};
      float row_sum[2] = {0.0f, 0.0f};
      RunningSoftmax softmax{reference, row_sum};
      const auto drop = [&](int tile) {
        // Read where it is wanted, so that ptxas does not draw before the products.
        const int64_t row = *const_cast<const volatile int64_t*>(&h.row);
        DropTile<T>(p.dropout, rng, row + query, tile, probs);
      };
      const auto step = [&](int tile, auto first) {
        const int key0 = tile * kTile;
        float s[8][4];
        BeginProducts();
        MultiplyRowsOfTile<T>(s, q, DescribeTile(&tiles.k[tile]));
        CommitProducts();
        if constexpr (!first) {
          if constexpr (kDropout) {
            drop(tile - 1);
            BeginProducts();
          }
          MultiplyTile<T>(o, probs, DescribeTile(&tiles.v[tile - 1]));
          CommitProducts();
        }
        WaitForProducts<first ? 0 : 1>();
        PinProduct(s);
        const bool cut = p.causal && key0 + kTile - 1 > group_query + warp_row;
        const bool plain = p.mask == nullptr && p.scale > 0.0f && key0 + kTile <= keys && !cut;
        if (!plain) {
          MaskScores(s, p.scale, p.mask != nullptr ? shared.bias[buffer] + key0 : nullptr,
                     keys - key0, cut, query - key0);
        }
        float factor[2];
        const bool above = softmax.Exponentials(s, plain, p.scale, scale_log2, factor);
        if constexpr (!first) {
          WaitForProducts<0>();
          PinProduct(o);
          if (__any_sync(0xFFFFFFFFu, above)) {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) o[n][i] *= factor[i >> 1];
            }
          }
        }
        softmax.Take<T, false>(s, KeptPairs{}, probs);
      };
      const auto last = [&](int tile) {
        if constexpr (kDropout) drop(tile);
        BeginProducts();
        MultiplyTile<T>(o, probs, DescribeTile(&tiles.v[tile]));
        CommitProducts();
        WaitForProducts<0>();
        PinProduct(o);
      };
      if (keys > 0) step(0, std::true_type{});
      if (keys > kTile) step(1, std::false_type{});
      if (keys > 0) last(keys > kTile ? 1 : 0);
      float factor[2];
      int row[2];
      softmax.Finish<T, kDropout>(p, h, query, factor, row);
      StoreRows(static_cast<T*>(p.out) + h.token * p.width + h.column, p.width, row, head_dim, o,
                factor);
    }
    slot = after;
    buffer ^= 1;
  }
}

template <typename T, bool kDropout>
cudaError_t HeadForward(const AttentionParams& p, cudaStream_t stream) {
  const int64_t number = p.batch * p.heads;
  if (number > 0x7FFFFFFF) return cudaErrorInvalidValue;
  constexpr int kShared = sizeof(HeadShared<T>);
  const cudaError_t error = cudaFuncSetAttribute(
      HeadForwardKernel<T, kDropout>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>(number, 2 * p.multiprocessors);
  HeadForwardKernel<T, kDropout><<<static_cast<unsigned>(blocks), kThreads, kShared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAttentionWgmmaTry(const AttentionParams& p, int which, cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    using T = typename decltype(tag)::type;
    constexpr bool kDropout = dropout.value;
    switch (which) {
      case 1:
        return Forward<T, kDropout, Draw::kBitsFirst, false, false>(p, stream);
      case 2:
        return Forward<T, kDropout, Draw::kPairs, false, false>(p, stream);
      case 3:
        return Forward<T, kDropout, Draw::kPairs, true, false>(p, stream);
      case 4:
        return Forward<T, kDropout, Draw::kPairs, false, true>(p, stream);
      case 5:
        return Forward<T, kDropout, Draw::kPairs, true, true>(p, stream);
      case 6:
        if (p.seq <= kRows) return HeadForward<T, kDropout>(p, stream);
        return Forward<T, kDropout, Draw::kPairs, false, true>(p, stream);
      case 7:
        return Forward<T, kDropout, Draw::kPairs, false, false, true>(p, stream);
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace lamina::cuda
