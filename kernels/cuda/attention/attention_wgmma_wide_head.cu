// Purpose: the backward of attention with wgmma for head dims above 64 and sequences of up to 128
// tokens, a head at a time; attention_wgmma.cuh.
//
// All of a head lies in shared memory: two tiles each of Q, K, V, dout and out. A warpgroup has a
// tile of keys, computes the scores with each tile of queries once, where the kernels for longer
// sequences (attention_wgmma_backward.cu) do so twice, and multiplies dV and dK of its keys.
// It leaves the gradients of the scores in shared memory; when all are there it multiplies dQ of a
// tile of queries. The block stays and does one head after another
// (attention_wgmma_ring.cuh): whatever has been used for the last time makes room for the
// next head's at once. What such a head takes is its way to and from memory. No two blocks write
// the same element, so the order of every sum is fixed.
#include "attention/attention_wgmma.cuh"
#include "attention/attention_wgmma_ring.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kTiles = 2;  // of queries, and of keys
constexpr int kDim = 128;
constexpr int kComputing = Shape<kDim>::kComputing;
static_assert(kTiles * kTile == kWgmmaHeadRows && kTiles == Shape<kDim>::kGroups,
              "a warpgroup a tile");

// What is copied by itself, in this order.
enum Part { kOut, kV, kRows, kK, kParts };

template <typename T>
struct HeadGradShared {
  HeadTile<T, kDim> q[kTiles], k[kTiles], v[kTiles], dout[kTiles], out[kTiles];
  SwizzledTile<T> ds[kTiles][kTiles];  // [tile of keys][of queries], as [key][query]
  SoftmaxRow softmax[kTiles][kTile];
  float shift[kTiles][kTile];
  float delta[kTiles][kTile];
  uint32_t drawn[kComputing / 32][kTile];
  WarpSums sums[3][2][kComputing / 32];  // of dq, dk and dv, each half of their columns
  uint64_t full[kParts], empty[kParts];
};

// Tiles beyond a sequence's end are neither filled nor read.
__device__ __forceinline__ int TilesOf(const Head& h) { return (h.length + kTile - 1) / kTile; }

template <typename T>
__device__ __forceinline__ void CopyHeads(const AttentionParams& p, HeadGradShared<T>& shared,
                                          BlocksInTurn<kDim> blocks) {
  const int64_t stride = 3 * p.width;
  const TileCopies<kDim> copies(static_cast<int>(p.head_dim));
  const int tid = static_cast<int>(threadIdx.x) % kWarpgroup;
  uint32_t parity = 0;
  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.At<BlockRows::kKeys>(p);
    if (h.length == 0) continue;
    const int tiles = TilesOf(h);
    const auto start = [&](HeadTile<T, kDim>(&to)[kTiles], const void* src, int64_t step,
                           int rows) {
      const T* from = static_cast<const T*>(src) + h.token * step + h.column;
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        copies.Start<TileOrder::kPlain>(to[i], from + i * kTile * step, step, rows - i * kTile);
      }
    };
    SoftmaxRow softmax{INFINITY, 0.0f};
    if (tid < h.length) softmax = p.softmax[h.row + tid];
    const T* qkv = static_cast<const T*>(p.qkv);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      WaitForPhase(&shared.empty[part], parity ^ 1);
      switch (part) {
        case kOut:
          start(shared.out, p.out, p.width, h.length);
          break;
        case kV:
          start(shared.v, qkv + 2 * p.width, stride, h.keys);
          break;
        case kRows:
          start(shared.q, qkv, stride, h.length);
          start(shared.dout, p.dout, p.width, h.length);
          (&shared.softmax[0][0])[tid] = softmax;
          (&shared.shift[0][0])[tid] = ShiftOf(softmax);
          Arrive(&shared.full[part]);
          break;
        default:
          start(shared.k, qkv + p.width, stride, h.keys);
      }
      ArriveAfterCopies(&shared.full[part]);
    }
    parity ^= 1;
  }
}

template <typename T, bool kDropout>
__device__ __forceinline__ void ComputeHeads(const AttentionParams& p, HeadGradShared<T>& shared,
                                             BlocksInTurn<kDim> blocks) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp = __shfl_sync(0xFFFFFFFFu, tid / 32, 0);
  const int warp_row = warp % 4 * 16;  // within the group's tile
  RngState rng{};
  if (kDropout) rng = UniformState(p.dropout.rng);
  const uint64_t k_tile = DescribeTile(&shared.k[group]);
  const uint64_t v_tile = DescribeTile(&shared.v[group]);
  uint32_t parity = 0;
  const auto release = [&](Part part) { ArriveByWarp(&shared.empty[part]); };

  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.At<BlockRows::kKeys>(p);
    const auto sums_of = [&](int part) {
      return p.sums + (3 * h.batch + part) * p.width + h.column;
    };
    if (h.length == 0) {
      if (p.sums != nullptr && tid < head_dim) {
        for (int part = 0; part < 3; ++part) sums_of(part)[tid] = 0.0f;
      }
      continue;
    }
    const int tiles = TilesOf(h);
    const int key_tiles = (h.keys + kTile - 1) / kTile;

    WaitForPhase(&shared.full[kOut], parity);
    WaitForPhase(&shared.full[kRows], parity);
    {
      // Two neighbouring lanes sum up a query's delta.
      const int query = tid / 2;
      float sum = 0.0f;
      if (query < h.length) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int c = 2 * i + (lane & 1);
          const int offset = Swizzled(query % kTile, c % 8);
          const auto row = [&](const HeadTile<T, kDim>(&of)[kTiles]) {
            return reinterpret_cast<const T*>(
                reinterpret_cast<const char*>(of[query / kTile].halves[c / 8].rows) + offset);
          };
          float x[8], y[8];
          Load8(row(shared.out), x);
          Load8(row(shared.dout), y);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
        }
      }
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      if ((lane & 1) == 0) (&shared.delta[0][0])[query] = sum;
    }
    release(kOut);
    WaitForPhase(&shared.full[kV], parity);
    WaitForPhase(&shared.full[kK], parity);
    ShareWithEngines();
    // delta is there, and what was left of the head before has been read.
    ComputingBarrier<kDim>();

    const KeyTile keys(p, h, group * kTile, warp_row);
    float dk[16][4] = {};
    float dv[16][4] = {};
    // Of the tiles of queries those that see a key of the group's.
    const int first = group < key_tiles ? (p.causal ? group : 0) : tiles;
#pragma unroll 1
    for (int tile = first; tile < tiles; ++tile) {
      float s[8][4], dp[8][4];
      BeginProducts();
      MultiplyRowsOfHeadTiles<T, kDim>(s, k_tile, DescribeTile(&shared.q[tile]));
      CommitProducts();
      const QueryTile queries{shared.softmax[tile], shared.shift[tile], shared.delta[tile],
                              shared.drawn[warp]};
      if (kDropout) {
        DrawKeyRows(p.dropout, rng, h.row + tile * kTile, group, shared.drawn[warp]);
      }
      WaitForProducts<0>();
      PinProduct(s);
      uint32_t probs[4][4], ds[4][4];
      keys.Probabilities<T, kDropout>(s, probs, p, queries, tile * kTile);
      BeginProducts();
      MultiplyTile<T>(dv, probs, DescribeColumns(shared.dout[tile]));
      MultiplyRowsOfHeadTiles<T, kDim>(dp, v_tile, DescribeTile(&shared.dout[tile]));
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(dv);
      PinProduct(dp);
      keys.ScoreGrads<T, kDropout>(s, dp, ds, p, queries);
      BeginProducts();
      MultiplyTile<T>(dk, ds, DescribeColumns(shared.q[tile]));
      CommitProducts();
#pragma unroll
      for (int k = 0; k < 4; ++k) StoreFragment(shared.ds[group][tile], warp_row, k, ds[k]);
      WaitForProducts<0>();
      PinProduct(dk);
    }
    release(kV);
    release(kRows);
    ShareWithEngines();
    ComputingBarrier<kDim>();

    float dq[16][4] = {};
    // Of the tiles of keys those that the group's queries see.
    const int seen = group < tiles ? (p.causal ? min(key_tiles, group + 1) : key_tiles) : 0;
    T* dst = static_cast<T*>(p.dqkv) + h.token * stride + h.column;
    BeginProducts();
#pragma unroll 1
    for (int tile = 0; tile < seen; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        MultiplyTransposedTile<T>(HalfOf(dq, half), DescribeTile(&shared.ds[tile][group]),
                                  DescribeTile(&shared.k[tile].halves[half]));
      }
    }
    CommitProducts();
    WaitForProducts<0>();
    PinProduct(dq);
    release(kK);
    parity ^= 1;

    int row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = keys.Row(half) < h.length ? keys.Row(half) : -1;
    }
    // Queries lie in a tile as keys do.
    StoreHeadRows(dst, stride, row, head_dim, dq, p.scale, p.scale);
    StoreHeadRows(dst + p.width, stride, row, head_dim, dk, p.scale, p.scale);
    StoreHeadRows(dst + 2 * p.width, stride, row, head_dim, dv, p.dropout.scale, p.dropout.scale);
    if (p.sums == nullptr) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shared.sums[0][half][warp].pairs[lane] = ColumnSums(HalfOf(dq, half));
      shared.sums[1][half][warp].pairs[lane] = ColumnSums(HalfOf(dk, half));
      shared.sums[2][half][warp].pairs[lane] = ColumnSums(HalfOf(dv, half));
    }
    ComputingBarrier<kDim>();
    for (int i = tid; i < 3 * 128; i += kComputing) {
      const int part = i / 128;
      const int column = i % 128;
      if (column >= head_dim) continue;
      sums_of(part)[column] = AddWarpSums(shared.sums[part][column / 64], kComputing / 32,
                                          part == 2 ? p.dropout.scale : p.scale, column % 64);
    }
  }
}

template <typename T, bool kDropout>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    WideHeadGradKernel(const AttentionParams p, unsigned number, unsigned per_head) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<HeadGradShared<T>*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int part = 0; part < kParts; ++part) {
      // Of the rows the threads tell what they have stored, too.
      StartBarrier(&shared.full[part], part == kRows ? 2 * kWarpgroup : kWarpgroup);
      StartBarrier(&shared.empty[part], kComputing / 32);
    }
  }
  __syncthreads();
  const BlocksInTurn<kDim> blocks(number, per_head);
  CopyOrCompute<kDim>([&] { CopyHeads(p, shared, blocks); },
                      [&] { ComputeHeads<T, kDropout>(p, shared, blocks); });
}

}  // namespace

cudaError_t LaunchAttentionWgmmaWideHeadBackward(const AttentionParams& p, cudaStream_t stream) {
  if (p.seq > kWgmmaHeadRows) return cudaErrorInvalidValue;
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    using T = typename decltype(tag)::type;
    return LaunchBlocks<kDim>(WideHeadGradKernel<T, dropout.value>, sizeof(HeadGradShared<T>), p,
                              stream);
  });
}

}  // namespace lamina::cuda
