// Purpose: the backward of attention with wgmma; attention_wgmma.cuh.
//
// Two kernels, which both compute the scores again: dQ for two tiles of queries a block, which also
// computes delta, and dK and dV for kKeyGroups tiles of keys. In both a warpgroup has score tiles
// whose rows are queries. dV = p^T dout and dK = ds^T q take p and ds through shared memory, where
// the tensor cores read them transposed. No two blocks write the same element. Where there is room
// the dropout's bits are drawn for both by a kernel before them, which does so at the rate of its
// instructions; in theirs it would stand between products.
#include "attention_wgmma.cuh"
#include "attention_wgmma_tiles.cuh"
#include "column_sum.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kQueryGroups = 2;
constexpr int kQueryThreads = kQueryGroups * kWarpgroup;
constexpr int kQueryRows = kQueryGroups * kTile;
static_assert(kQueryRows == kWgmmaQueryRows, "what the sums are counted by");
constexpr int kQueryStages = 4;
constexpr int kQueryAhead = 2;

template <typename T>
struct QueryGradShared {
  SwizzledTile<T> q[kQueryGroups], dout[kQueryGroups];
  struct Stage {
    SwizzledTile<T> k, v;
  };
  Stage stages[kQueryStages];
  float bias[kQueryStages][kTile];
  float delta[kQueryRows];
  WarpSums sums[kQueryThreads / 32];  // of dq
  float* block_sums;                  // where their sum goes
  uint64_t full[kQueryStages], empty[kQueryStages];
};

template <typename T, KeysFrom kFrom>
__global__ void __launch_bounds__(kQueryThreads, 2) QueryGradKernel(const AttentionParams p) {
  constexpr int kStages = kQueryStages;
  constexpr int kThreads = kQueryThreads;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<QueryGradShared<T>*>(shared_bytes);
  const Head h = HeadOfBlock<kQueryRows, BlockRows::kQueries>(p);
  if (threadIdx.x == 0 && p.sums != nullptr) {
    const int64_t slice = h.batch * ((p.seq + kQueryRows - 1) / kQueryRows) + h.first / kQueryRows;
    shared.block_sums = p.sums + slice * p.width + h.column;
  }
  const auto store_sums = [&](int warps) {
    if (p.sums == nullptr) return;
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    if (column >= p.head_dim) return;
    shared.block_sums[column] = AddWarpSums(shared.sums, warps, p.scale * p.dropout.scale, column);
  };
  if (h.first >= h.length) {
    store_sums(0);
    return;
  }
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const T* qkv = static_cast<const T*>(p.qkv) + h.token * stride + h.column;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp_row = (tid & (kWarpgroup - 1)) / 32 * 16;
  const int group_query = h.first + group * kTile;
  const int query = group_query + warp_row + (lane >> 2);
  RngState rng{};
  if (kFrom == KeysFrom::kDrawn) rng = UniformState(p.dropout.rng);

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
  const int64_t first = h.token + h.first;
  const T* dout = static_cast<const T*>(p.dout) + first * p.width + h.column;
#pragma unroll
  for (int i = 0; i < kQueryGroups; ++i) {
    const int rows = h.length - h.first - i * kTile;
    // Beyond the end a tile of zeros, whose address is that of the first rows.
    const int64_t row = rows > 0 ? i * kTile : 0;
    StartSwizzledTile<kThreads, TileOrder::kPlain>(shared.q[i], qkv + (h.first + row) * stride,
                                                   stride, rows, head_dim);
    StartSwizzledTile<kThreads, TileOrder::kPlain>(shared.dout[i], dout + row * p.width, p.width,
                                                   rows, head_dim);
  }
  CommitCopies();
  // Two threads a query sum up its delta.
  const int own = tid / 2;
  Raw8<T> out[4];
  {
    const T* src = static_cast<const T*>(p.out) +
                   (first + min(own, h.length - h.first - 1)) * p.width + h.column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 2 * i + (tid & 1);
      if (c * 8 < head_dim) out[i] = LoadRaw8(src + c * 8);
    }
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < kQueryAhead; ++tile) {
    if (tile < tiles) start(tile);
  }
  WaitForCopies<0>();
  ShareWithEngines();
  __syncthreads();
  {
    const char* rows = reinterpret_cast<const char*>(shared.dout[own / kTile].rows);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 2 * i + (tid & 1);
      if (c * 8 >= head_dim) continue;
      float x[8], y[8];
      Unpack8(out[i], x);
      Load8(reinterpret_cast<const T*>(rows + Swizzled(own % kTile, c)), y);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
    }
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    if ((tid & 1) == 0) {
      shared.delta[own] = sum;
      if (h.first + own < h.length) p.delta[h.row + h.first + own] = sum;
    }
  }
  __syncthreads();

  RowPair rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = query + 8 * half;
    rows.softmax[half] = i < h.length ? p.softmax[h.row + i] : SoftmaxRow{INFINITY, 0.0f};
    rows.delta[half] = shared.delta[i - h.first] * KeepProbability(p.dropout);
  }

  const KeptTiles kept_tiles(p, h);
  float dq[8][4] = {};
  const int keys = p.causal ? min(h.keys, group_query + kTile) : h.keys;
  const int group_tiles = (keys + kTile - 1) / kTile;
  const uint64_t q_tile = DescribeTile(&shared.q[group]);
  const uint64_t dout_tile = DescribeTile(&shared.dout[group]);
  for (int tile = 0; tile < group_tiles; ++tile) {
    const int key0 = tile * kTile;
    auto& stage = shared.stages[tile % kStages];
    WaitForPhase(&shared.full[tile % kStages], (tile / kStages) & 1);
    ShareWithEngines();
    float s[8][4], dp[8][4];
    BeginProducts();
    MultiplyRowsOfTiles<T>(s, q_tile, DescribeTile(&stage.k));
    CommitProducts();
    MultiplyRowsOfTiles<T>(dp, dout_tile, DescribeTile(&stage.v));
    CommitProducts();
    if (tile + kQueryAhead < tiles) {
      const int next = tile + kQueryAhead;
      WaitForPhase(&shared.empty[next % kStages], ((next / kStages) & 1) ^ 1);
      start(next);
    }
    const KeptPairs kept =
        PairsOfTile<kFrom>(p.dropout, rng, h.row + query, kept_tiles, group_query / kTile, tile);
    WaitForProducts<1>();
    PinProduct(s);
    const bool cut = p.causal && key0 + kTile - 1 > group_query + warp_row;
    const bool plain = p.mask == nullptr && key0 + kTile <= h.keys && !cut;
    if (!plain) {
      MaskScores(s, p.scale, p.mask != nullptr ? shared.bias[tile % kStages] : nullptr,
                 h.keys - key0, cut, query - key0);
    }
    Probabilities(s, plain, p.scale, rows.softmax);
    WaitForProducts<0>();
    PinProduct(dp);
    uint32_t ds[4][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t dropped[4], grads[4];
        DropGrads<T, kFrom != KeysFrom::kNone>(s, dp, part, half, kept, rows.delta[half], dropped,
                                               grads);
#pragma unroll
        for (int m = 0; m < 4; ++m) ds[2 * part + m / 2][half + 2 * (m & 1)] = grads[m];
      }
    }
    BeginProducts();
    MultiplyTile<T>(dq, ds, DescribeTile(&stage.k));
    CommitProducts();
    WaitForProducts<0>();
    PinProduct(dq);
    if (lane == 0) Arrive(&shared.empty[tile % kStages]);
  }

  int row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    row[half] = query + 8 * half < h.length ? query + 8 * half : -1;
  const float grad_factor = p.scale * p.dropout.scale;
  const float factor[2] = {grad_factor, grad_factor};
  StoreRows(static_cast<T*>(p.dqkv) + h.token * stride + h.column, stride, row, head_dim, dq,
            factor);
  if (p.sums != nullptr) shared.sums[threadIdx.x / 32].pairs[threadIdx.x % 32] = ColumnSums(dq);
  store_sums(kThreads / 32);
}

constexpr int kKeyStages = 4;
constexpr int kKeyAhead = 1;

template <typename T, int kGroups>
struct KeyGradShared {
  SwizzledTile<T> k[kGroups], v[kGroups];
  struct Stage {
    SwizzledTile<T> q, dout;
  };
  Stage stages[kKeyStages];
  struct Exchanged {
    SwizzledTile<T> probs, ds;  // [query][key]
  };
  Exchanged exchanged[kGroups][2];
  SoftmaxRow softmax[kKeyStages][kTile];
  float delta[kKeyStages][kTile];
  float bias[kGroups][kTile];
  WarpSums sums[2][4 * kGroups];  // of dk and dv
  float* block_sums;              // where their sums go
  uint64_t full[kKeyStages], empty[kKeyStages];
};

template <typename T, KeysFrom kFrom, int kGroups>
__global__ void __launch_bounds__(kGroups* kWarpgroup, 1) KeyGradKernel(const AttentionParams p) {
  constexpr int kStages = kKeyStages;
  constexpr int kThreads = kGroups * kWarpgroup;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<KeyGradShared<T, kGroups>*>(shared_bytes);
  constexpr int kRows = kGroups * kTile;
  const Head h = HeadOfBlock<kRows, BlockRows::kKeys>(p);
  if (threadIdx.x == 0 && p.sums != nullptr) {
    // After those of dq.
    const int64_t first = p.batch * ((p.seq + kWgmmaQueryRows - 1) / kWgmmaQueryRows);
    const int64_t slice = h.batch * ((p.seq + kRows - 1) / kRows) + h.first / kRows;
    shared.block_sums = p.sums + (first + 2 * slice) * p.width + h.column;
  }
  const float k_factor = p.scale * p.dropout.scale;
  const float v_factor = KeptScale<T, kFrom != KeysFrom::kNone>(p.dropout);
  const auto store_sums = [&](int warps) {
    if (p.sums == nullptr) return;
    __syncthreads();
    const int part = static_cast<int>(threadIdx.x) / 64;
    const int column = static_cast<int>(threadIdx.x) % 64;
    if (part >= 2 || column >= p.head_dim) return;
    shared.block_sums[part * p.width + column] =
        AddWarpSums(shared.sums[part], warps, part == 0 ? k_factor : v_factor, column);
  };
  if (h.first >= h.length) {
    store_sums(0);
    return;
  }
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const T* qkv = static_cast<const T*>(p.qkv) + h.token * stride + h.column;
  const T* all_dout = static_cast<const T*>(p.dout) + h.token * p.width + h.column;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp_row = (tid & (kWarpgroup - 1)) / 32 * 16;
  const int key0 = h.first + group * kTile;  // of this warpgroup
  RngState rng{};
  if (kFrom == KeysFrom::kDrawn) rng = UniformState(p.dropout.rng);
  const KeptTiles kept_tiles(p, h);

  // Queries before the block's first key see none of its keys; those of a block whose keys are all
  // cut off see none at all.
  const int first_query = p.causal ? h.first : 0;
  const int tiles = h.first < h.keys ? (h.length - first_query + kTile - 1) / kTile : 0;
  const TilePart<kThreads, TileOrder::kPlain> copies(head_dim);
  const T* next_q = qkv + first_query * stride + copies.Source(stride);
  const T* next_dout = all_dout + first_query * p.width + copies.Source(p.width);
  const auto start = [&](int tile) {
    const int query0 = first_query + tile * kTile;
    const int rows = h.length - query0;
    auto& stage = shared.stages[tile % kStages];
    copies.Start(stage.q, next_q, stride, rows);
    copies.Start(stage.dout, next_dout, p.width, rows);
    next_q += kTile * stride;
    next_dout += kTile * p.width;
    if (tid < kTile) {
      const bool inside = tid < rows;
      const int64_t row = h.row + query0 + (inside ? tid : 0);
      CopyAsyncSmall<8>(&shared.softmax[tile % kStages][tid], p.softmax + row, inside);
      CopyAsyncSmall<4>(&shared.delta[tile % kStages][tid], p.delta + row, inside);
    }
    ArriveAfterCopies(&shared.full[tile % kStages]);
  };

  if (tid == 0) StartRing<kThreads>(shared.full, shared.empty);
  if (tiles > 0) {
    const T* keys = qkv + p.width + h.first * stride;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int rows = h.keys - h.first - i * kTile;
      const T* src = keys + (rows > 0 ? i * kTile : 0) * stride;
      StartSwizzledTile<kThreads, TileOrder::kKeys>(shared.k[i], src, stride, rows, head_dim);
      StartSwizzledTile<kThreads, TileOrder::kKeys>(shared.v[i], src + p.width, stride, rows,
                                                    head_dim);
    }
  }
  CommitCopies();
  if (tid < kGroups * kTile) (&shared.bias[0][0])[tid] = KeyBias(p, h, h.first + tid);
  {
    // What the first tile's products find of a tile before it.
    auto* words = reinterpret_cast<uint4*>(&shared.exchanged[group][1]);
    for (int i = tid & (kWarpgroup - 1); i < static_cast<int>(sizeof(shared.exchanged[0][0]) / 16);
         i += kWarpgroup) {
      words[i] = make_uint4(0, 0, 0, 0);
    }
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < kKeyAhead; ++tile) {
    if (tile < tiles) start(tile);
  }
  WaitForCopies<0>();
  ShareWithEngines();
  __syncthreads();

  float dk[8][4] = {};
  float dv[8][4] = {};
  const uint64_t k_tile = DescribeTile(&shared.k[group]);
  const uint64_t v_tile = DescribeTile(&shared.v[group]);
  // A warpgroup whose keys are cut off, or not seen by the first queries, only fills the ring.
  const int skipped = key0 < h.keys ? (p.causal ? group : 0) : tiles;
  for (int tile = 0; tile < min(skipped, tiles); ++tile) {
    __syncwarp();
    if (lane == 0) Arrive(&shared.empty[tile % kStages]);
    if (tile + kKeyAhead < tiles) {
      const int next = tile + kKeyAhead;
      WaitForPhase(&shared.empty[next % kStages], ((next / kStages) & 1) ^ 1);
      start(next);
    }
  }
  for (int tile = skipped; tile < tiles; ++tile) {
    const int query0 = first_query + tile * kTile;
    auto& stage = shared.stages[tile % kStages];
    auto& exchanged = shared.exchanged[group][(tile - skipped) & 1];
    WaitForPhase(&shared.full[tile % kStages], (tile / kStages) & 1);
    ShareWithEngines();
    float s[8][4], dp[8][4];
    BeginProducts();
    MultiplyRowsOfTiles<T>(s, DescribeTile(&stage.q), k_tile);
    CommitProducts();
    MultiplyRowsOfTiles<T>(dp, DescribeTile(&stage.dout), v_tile);
    CommitProducts();
    {
      auto& before = shared.stages[max(tile - 1, skipped) % kStages];
      auto& left = shared.exchanged[group][(tile - skipped + 1) & 1];
      MultiplyTransposedTile<T>(dv, DescribeTile(&left.probs), DescribeTile(&before.dout));
      MultiplyTransposedTile<T>(dk, DescribeTile(&left.ds), DescribeTile(&before.q));
    }
    CommitProducts();
    if (tile + kKeyAhead < tiles) {
      const int next = tile + kKeyAhead;
      WaitForPhase(&shared.empty[next % kStages], ((next / kStages) & 1) ^ 1);
      start(next);
    }
    RowPair rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = warp_row + (lane >> 2) + 8 * half;
      rows.softmax[half] = shared.softmax[tile % kStages][i];
      if (query0 + i >= h.length) rows.softmax[half].max = INFINITY;
      rows.delta[half] = shared.delta[tile % kStages][i] * KeepProbability(p.dropout);
    }
    const KeptPairs kept =
        PairsOfTile<kFrom>(p.dropout, rng, h.row + query0 + warp_row + (lane >> 2), kept_tiles,
                           query0 / kTile, key0 / kTile);
    WaitForProducts<2>();
    PinProduct(s);
    const bool cut = p.causal && query0 + warp_row < key0 + kTile - 1;
    const bool plain = p.mask == nullptr && key0 + kTile <= h.keys && !cut;
    if (!plain) {
      MaskScores(s, p.scale, shared.bias[group], kTile, cut,
                 query0 + warp_row + (lane >> 2) - key0);
    }
    Probabilities(s, plain, p.scale, rows.softmax);
    WaitForProducts<1>();
    PinProduct(dp);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t probs_part[2][4], ds_part[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t dropped[4], grads[4];
        DropGrads<T, kFrom != KeysFrom::kNone>(s, dp, part, half, kept, rows.delta[half], dropped,
                                               grads);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          probs_part[m / 2][half + 2 * (m & 1)] = dropped[m];
          ds_part[m / 2][half + 2 * (m & 1)] = grads[m];
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        StoreFragment(exchanged.probs, warp_row, 2 * part + i, probs_part[i]);
        StoreFragment(exchanged.ds, warp_row, 2 * part + i, ds_part[i]);
      }
    }
    WaitForProducts<0>();
    PinProduct(dv);
    PinProduct(dk);
    if (tile > skipped && lane == 0) Arrive(&shared.empty[(tile - 1) % kStages]);
    ShareWithEngines();
    WarpgroupBarrier();
  }
  if (skipped < tiles) {
    auto& before = shared.stages[(tiles - 1) % kStages];
    auto& left = shared.exchanged[group][(tiles - 1 - skipped) & 1];
    BeginProducts();
    MultiplyTransposedTile<T>(dv, DescribeTile(&left.probs), DescribeTile(&before.dout));
    MultiplyTransposedTile<T>(dk, DescribeTile(&left.ds), DescribeTile(&before.q));
    CommitProducts();
    WaitForProducts<0>();
    PinProduct(dv);
    PinProduct(dk);
  }

  int row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = key0 + Reordered(warp_row + (lane >> 2) + 8 * half);
    row[half] = key < h.length ? key : -1;
  }
  T* dst = static_cast<T*>(p.dqkv) + h.token * stride + h.column;
  const float k_factors[2] = {k_factor, k_factor};
  const float v_factors[2] = {v_factor, v_factor};
  StoreRows(dst + p.width, stride, row, head_dim, dk, k_factors);
  StoreRows(dst + 2 * p.width, stride, row, head_dim, dv, v_factors);
  if (p.sums != nullptr) {
    shared.sums[0][threadIdx.x / 32].pairs[threadIdx.x % 32] = ColumnSums(dk);
    shared.sums[1][threadIdx.x / 32].pairs[threadIdx.x % 32] = ColumnSums(dv);
  }
  store_sums(kThreads / 32);
}

constexpr int kKeyGroups = 3;  // as many as registers allow
static_assert(kKeyGroups * kTile == kWgmmaKeyRows, "what the sums are counted by");

constexpr int kDrawThreads = kWarpgroup;

// The bits of a tile of queries, for all of its tiles of keys.
__global__ void __launch_bounds__(kDrawThreads) DrawKernel(const AttentionParams p) {
  const Head h = HeadOfBlock<kTile, BlockRows::kQueries>(p);
  if (h.first >= h.length) return;
  const RngState rng = UniformState(p.dropout.rng);
  const KeptTiles kept_tiles(p, h);
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t row = h.row + h.first + static_cast<int>(threadIdx.x) / 32 * 16 + (lane >> 2);
  const int tiles = (h.keys + kTile - 1) / kTile;
  for (int tile = 0; tile < tiles; ++tile) {
    kept_tiles.Word(h.first / kTile, tile) = DrawPairs(p.dropout, rng, row, tile).word;
  }
}

// Both kernels over heads [p.first_head, + p.head_count).
template <typename T, KeysFrom kFrom>
cudaError_t OverHeads(const AttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = LaunchRows<kQueryRows>(QueryGradKernel<T, kFrom>, kQueryThreads,
                                                   sizeof(QueryGradShared<T>), p, stream);
  if (error != cudaSuccess) return error;
  return LaunchRows<kKeyGroups * kTile>(KeyGradKernel<T, kFrom, kKeyGroups>,
                                        kKeyGroups * kWarpgroup,
                                        sizeof(KeyGradShared<T, kKeyGroups>), p, stream);
}

template <typename T, bool kDropout>
cudaError_t Backward(AttentionParams p, cudaStream_t stream) {
  const int64_t heads = p.batch * p.heads;
  const size_t head_bytes = KeptBitsBytes(p.seq);
  const int64_t at_once = p.kept != nullptr ? static_cast<int64_t>(p.kept_bytes / head_bytes) : 0;
  cudaError_t error = cudaSuccess;
  if (!kDropout) {
    error = OverHeads<T, KeysFrom::kNone>(p, stream);
  } else if (at_once == 0) {
    error = OverHeads<T, KeysFrom::kDrawn>(p, stream);
  } else {
    // Parts of one size, so that none is a small rest.
    const int64_t parts = (heads + at_once - 1) / at_once;
    for (int64_t part = 0; part < parts && error == cudaSuccess; ++part) {
      p.first_head = heads * part / parts;
      p.head_count = heads * (part + 1) / parts - p.first_head;
      error = LaunchRows<kTile>(DrawKernel, kDrawThreads, 0, p, stream);
      if (error == cudaSuccess) error = OverHeads<T, KeysFrom::kKept>(p, stream);
    }
  }
  if (error != cudaSuccess || p.sums == nullptr) return error;
  const BiasSlices slices = BiasSlicesOf(p.tokens, p.batch, p.seq, p.head_dim);
  error = LaunchFinishColumnSum({p.sums, slices.q, p.width, {p.dbias}}, stream);
  if (error != cudaSuccess) return error;
  return LaunchFinishColumnSum(
      {p.sums + slices.q * p.width, slices.kv, 2 * p.width, {p.dbias + p.width}}, stream);
}

}  // namespace

cudaError_t LaunchAttentionWgmmaBackward(const AttentionParams& p, cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    return Backward<typename decltype(tag)::type, dropout.value>(p, stream);
  });
}

}  // namespace lamina::cuda
