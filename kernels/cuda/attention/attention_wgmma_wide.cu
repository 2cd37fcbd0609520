// Purpose: the forward of attention with wgmma for head dims above 64; attention_wgmma.cuh.
//
// As attention_wgmma.cu, by blocks that stay (attention_wgmma_ring.cuh). The queries pass through
// the ring too, into registers. While one warpgroup computes exponentials, the other's products
// run: they take turns in starting them.
#include "attention/attention_wgmma.cuh"
#include "attention/attention_wgmma_ring.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kDim = 128;
constexpr int kSlots = 6;

template <typename T>
struct ForwardShared {
  // A tile of queries a warpgroup; or keys and their values.
  HeadTile<T, kDim> slots[kSlots][Shape<kDim>::kGroups];
  float bias[kSlots][kTile];
  Ring<kSlots, kDim> ring;
};

template <typename T>
__device__ __forceinline__ void Copy(const AttentionParams& p, ForwardShared<T>& shared,
                                     BlocksInTurn<kDim> blocks) {
  const int64_t stride = 3 * p.width;
  const TileCopies<kDim> copies(static_cast<int>(p.head_dim));
  RingPlace<kSlots> place;
  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.At<BlockRows::kQueries>(p);
    if (h.first >= h.length) continue;
    const T* next = static_cast<const T*>(p.qkv) + h.token * stride + h.column;
    shared.ring.WaitEmpty(place);
#pragma unroll
    for (int i = 0; i < Shape<kDim>::kGroups; ++i) {
      const int first = h.first + i * kTile;
      copies.Start<TileOrder::kPlain>(shared.slots[place.slot][i],
                                      next + min(first, h.length - 1) * stride, stride,
                                      h.length - first);
    }
    shared.ring.Fill(place);
    place.Advance();
    next += p.width;
    CopyKeys(p, h, copies, next, shared, place);
  }
}

template <typename T, bool kDropout>
__device__ __forceinline__ void Compute(const AttentionParams& p, ForwardShared<T>& shared,
                                        BlocksInTurn<kDim> blocks) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp_row = (tid & (kWarpgroup - 1)) / 32 * 16;  // within the group's tile
  const float scale_log2 = p.scale * kLog2E;
  RngState rng{};
  if (kDropout) rng = UniformState(p.dropout.rng);
  RingPlace<kSlots> place;
  if (group == 1) Turns::End(group);

  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.At<BlockRows::kQueries>(p);
    if (h.first >= h.length) continue;
    const int group_query = h.first + group * kTile;
    const int query = group_query + warp_row + (lane >> 2);  // of row g
    uint32_t q[kDim / 16][4];
    shared.ring.WaitFull(place);
    LoadRowFragments(q, shared.slots[place.slot][group], warp_row);
    shared.ring.Release(place.slot);
    place.Advance();

    float o[kDim / 8][4] = {};
    uint32_t probs[4][4];  // of the tile before
    float reference[2] = {-INFINITY, -INFINITY};
    float row_sum[2] = {0.0f, 0.0f};
    RunningSoftmax softmax{reference, row_sum};
    const int tiles = (h.keys + kTile - 1) / kTile;
    // Of this warpgroup: what a causal block's first queries do not see is left out, and all where
    // it has no query.
    const int keys = p.causal ? min(h.keys, group_query + kTile) : h.keys;
    const int group_tiles = group_query < h.length ? (keys + kTile - 1) / kTile : 0;
    int before = 0;  // the slot of the tile before

    const auto step = [&](int tile, auto first) {
      const int key0 = tile * kTile;
      shared.ring.WaitFull(place);
      auto& slot = shared.slots[place.slot];
      float s[8][4];
      Turns::Begin(group);
      BeginProducts();
      MultiplyRowsOfHeadTile<T>(s, q, DescribeTile(&slot[0]));
      CommitProducts();
      if constexpr (!first) {
        MultiplyTile<T>(o, probs, DescribeColumns(shared.slots[before][1]));
        CommitProducts();
      }
      Turns::End(group);
      KeptPairs kept{};
      if (kDropout) {
        kept = DrawPairs(p.dropout, rng, h.row + query, tile);
        DoFirst(kept.word);
      }
      WaitForProducts<first ? 0 : 1>();
      PinProduct(s);

      const bool cut = p.causal && key0 + kTile - 1 > group_query + warp_row;
      const bool plain = p.mask == nullptr && p.scale > 0.0f && key0 + kTile <= h.keys && !cut;
      float factor[2];
      // Each tile's maximum is looked for, as for the first one's: what to do without it gains here
      // has not been measured.
      const bool above = softmax.Take<true>(
          s, plain, p.scale, scale_log2, factor,
          [&] {
            MaskScores(s, p.scale, p.mask != nullptr ? shared.bias[place.slot] : nullptr,
                       h.keys - key0, cut, query - key0);
          },
          [] {});
      if constexpr (!first) {
        WaitForProducts<0>();
        PinProduct(o);
        shared.ring.Release(before);
        RescaleRows(o, factor, above);
      }
      PackTile<T>(s, probs);
      if constexpr (kDropout) DropTile<T>(kept, probs);
      before = place.slot;
      place.Advance();
    };
    if (group_tiles > 0) {
      step(0, std::true_type{});
#pragma unroll 1
      for (int tile = 1; tile < group_tiles; ++tile) step(tile, std::false_type{});
      BeginProducts();
      MultiplyTile<T>(o, probs, DescribeColumns(shared.slots[before][1]));
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(o);
      shared.ring.Release(before);
    }
    for (int tile = group_tiles; tile < tiles; ++tile) {
      shared.ring.WaitFull(place);
      Turns::Begin(group);
      Turns::End(group);
      shared.ring.Release(place.slot);
      place.Advance();
    }

    float factor[2];
    int row[2];
    softmax.Finish<T, kDropout>(p, h, query, factor, row);
    StoreHeadRows(static_cast<T*>(p.out) + h.token * p.width + h.column, p.width, row, head_dim, o,
                  factor[0], factor[1]);
  }
}

template <typename T, bool kDropout>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    AttentionWgmmaWideKernel(const AttentionParams p, unsigned number, unsigned per_head) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<T>*>(shared_bytes);
  if (threadIdx.x == 0) shared.ring.Start();
  __syncthreads();
  const BlocksInTurn<kDim> blocks(number, per_head);
  CopyOrCompute<kDim>([&] { Copy(p, shared, blocks); },
                      [&] { Compute<T, kDropout>(p, shared, blocks); });
}

}  // namespace

cudaError_t LaunchAttentionWgmmaWide(const AttentionParams& p, cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    using T = typename decltype(tag)::type;
    return LaunchBlocks<kDim>(AttentionWgmmaWideKernel<T, dropout.value>, sizeof(ForwardShared<T>),
                              p, stream);
  });
}

}  // namespace lamina::cuda
