// Purpose: the forward of attention with wgmma, in the manner of FlashAttention-2 and -3 (Dao,
// 2023; Shah et al., 2024); attention_wgmma.cuh.
//
// A block is two warpgroups of 64 queries each. Their keys pass through a ring of tiles in shared
// memory, which all threads fill and each warpgroup empties at its own pace: while one computes
// exponentials, the other's products run. The products of a tile with V are waited for when those
// of the next tile with Q have been started, and between the two a warp draws what dropout leaves
// of the tile: by then the products with Q are done, and it has waited for nothing.
#include <algorithm>

#include "attention/attention_wgmma.cuh"
#include "attention/attention_wgmma_tiles.cuh"
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

template <typename T, bool kDropout>
__global__ void __launch_bounds__(kThreads, 2) AttentionWgmmaKernel(const AttentionParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<T>*>(shared_bytes);
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

  // Where dropout is drawn in between, the warpgroups need no order.
  constexpr bool kTurns = !kDropout;
  if (kTurns && group == 1) Turns::End(group);
  const auto start_after = [&](int tile) {
    if (tile + kAhead < tiles) {
      const int next = tile + kAhead;
      WaitForPhase(&shared.empty[next % kStages], ((next / kStages) & 1) ^ 1);
      start(next);
    }
  };
  // A warpgroup beyond the sequence's end only copies.
  if (group_query >= h.length) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      if (kTurns) Turns::Begin(group);
      if (kTurns) Turns::End(group);
      start_after(tile);
      ArriveByWarp(&shared.empty[tile % kStages]);
    }
    CommitCopies();
    WaitForCopies<0>();
    return;
  }
  const auto step = [&](int tile, auto first) {
    const int key0 = tile * kTile;
    auto& stage = shared.stages[tile % kStages];
    WaitForPhase(&shared.full[tile % kStages], (tile / kStages) & 1);
    ShareWithEngines();
    float s[8][4];
    if (kTurns) Turns::Begin(group);
    BeginProducts();
    MultiplyRowsOfTile<T>(s, q, DescribeTile(&stage.k));
    CommitProducts();
    const auto multiply_values = [&] {
      MultiplyTile<T>(o, probs, DescribeTile(&shared.stages[(tile - 1) % kStages].v));
      CommitProducts();
    };
    if constexpr (!first && kDropout) {
      // Copies come first as without a branch in between ptxas draws before the products.
      start_after(tile);
      DropTile<T>(p.dropout, rng, h.row + query, tile - 1, probs);
      BeginProducts();
      multiply_values();
    } else {
      if constexpr (!first) multiply_values();
      if (kTurns) Turns::End(group);
      start_after(tile);
    }
    WaitForProducts<first ? 0 : 1>();
    PinProduct(s);

    const bool cut = p.causal && key0 + kTile - 1 > group_query + warp_row;
    const bool plain = p.mask == nullptr && p.scale > 0.0f && key0 + kTile <= h.keys && !cut;
    float factor[2];
    const bool above = softmax.Take<first>(
        s, plain, p.scale, scale_log2, factor,
        [&] {
          MaskScores(s, p.scale, p.mask != nullptr ? shared.bias[tile % kStages] : nullptr,
                     h.keys - key0, cut, query - key0);
        },
        [&] {
          SetZero(s);
          AddRowsOfTile(s, q, stage.k);
        });
    if constexpr (!first) {
      WaitForProducts<0>();
      PinProduct(o);
      if (lane == 0) Arrive(&shared.empty[(tile - 1) % kStages]);
      RescaleRows(o, factor, above);
    }
    PackTile<T>(s, probs);
  };
  if (group_tiles > 0) {
    step(0, std::true_type{});
#pragma unroll 1
    for (int tile = 1; tile < group_tiles; ++tile) step(tile, std::false_type{});
    if constexpr (kDropout) {
      DropTile<T>(p.dropout, rng, h.row + query, group_tiles - 1, probs);
    }
    BeginProducts();
    MultiplyTile<T>(o, probs, DescribeTile(&shared.stages[(group_tiles - 1) % kStages].v));
    CommitProducts();
    WaitForProducts<0>();
    PinProduct(o);
  }
  if constexpr (kTurns) {
    for (int tile = group_tiles; tile < tiles; ++tile) {
      Turns::Begin(group);
      Turns::End(group);
    }
  }

  float factor[2];
  int row[2];
  softmax.Finish<T, kDropout>(p, h, query, factor, row);
  StoreRows(static_cast<T*>(p.out) + h.token * p.width + h.column, p.width, row, head_dim, o,
            factor);
}

template <typename T, bool kDropout>
cudaError_t Forward(const AttentionParams& p, cudaStream_t stream) {
  return LaunchRows<kRows>(AttentionWgmmaKernel<T, kDropout>, kThreads, sizeof(ForwardShared<T>), p,
                           stream);
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
        float factor[2];
        // The maximum is looked for: there is one tile at most that could do without.
        const bool above = softmax.Take<true>(
            s, plain, p.scale, scale_log2, factor,
            [&] {
              MaskScores(s, p.scale, p.mask != nullptr ? shared.bias[buffer] + key0 : nullptr,
                         keys - key0, cut, query - key0);
            },
            [] {});
        if constexpr (!first) {
          WaitForProducts<0>();
          PinProduct(o);
          RescaleRows(o, factor, above);
        }
        PackTile<T>(s, probs);
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

cudaError_t LaunchAttentionWgmma(const AttentionParams& p, cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    using T = typename decltype(tag)::type;
    // Without dropout a block a head is the faster one: 31 us against 32 at (64, 128) and 16 heads.
    if constexpr (dropout.value) {
      if (p.seq <= kRows) return HeadForward<T, true>(p, stream);
    }
    return Forward<T, dropout.value>(p, stream);
  });
}

}  // namespace lamina::cuda
