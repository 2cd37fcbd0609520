// Purpose: the backward of attention with wgmma for more than 128 tokens; attention_wgmma.cuh.
//
// Two kernels, which both compute the scores again: dQ, and delta, for a block's queries, dK and dV
// for a block's keys, by blocks that stay (attention_wgmma_ring.cuh). In the first a warpgroup's
// score tiles have queries as rows, in the second keys, so that in both the gradients of the
// scores, and the probabilities, are left operands in registers of the products that they go into.
// No two blocks write the same element. Where there is room the dropout's bits are drawn for both
// by a kernel before them, which does so at the rate of its instructions; in theirs it would stand
// between products.
#include "attention/attention_wgmma.cuh"
#include "attention/attention_wgmma_ring.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

// Where a kernel has the dropout's bits from, if there is one: it draws them, or reads what another
// one has kept.
enum class KeysFrom { kNone, kDrawn, kKept };

// Which of a launch's probabilities are kept: a row of words a query, two for every tile of keys
// (DrawCall).
struct KeptRows {
  uint32_t* words;  // of the head's first query; where p.kept is
  int row_words;

  __device__ __forceinline__ KeptRows(const AttentionParams& p, const Head& h)
      : words(p.kept), row_words(2 * static_cast<int>((p.seq + kTile - 1) / kTile)) {
    words += h.index * (row_words / 2 * kTile) * row_words;
  }
  __device__ __forceinline__ uint32_t* Row(int query) const {
    return words + static_cast<int64_t>(query) * row_words;
  }
  // By calls, each of which has a thread's keys in score tiles whose rows are queries.
  __device__ __forceinline__ uint16_t* Calls(int query) const {
    return reinterpret_cast<uint16_t*>(Row(query));
  }
};

constexpr int kQuerySlots = 6;

template <typename T, int kDim>
struct QueryGradShared {
  // A warpgroup's tile of queries, of dout or of out; or keys and their values.
  HeadTile<T, kDim> slots[kQuerySlots][Shape<kDim>::kGroups];
  float bias[kQuerySlots][kTile];
  // Of dq, each half of its columns.
  WarpSums sums[Shape<kDim>::kHalves][Shape<kDim>::kComputing / 32];
  Ring<kQuerySlots, kDim> ring;
};

template <typename T, int kDim>
__device__ __forceinline__ void CopyForQueries(const AttentionParams& p,
                                               QueryGradShared<T, kDim>& shared,
                                               BlocksInTurn<kDim> blocks) {
  const int64_t stride = 3 * p.width;
  const TileCopies<kDim> copies(static_cast<int>(p.head_dim));
  RingPlace<kQuerySlots> place;
  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.template At<BlockRows::kQueries>(p);
    if (h.first >= h.length) continue;
    const auto start_rows = [&](const void* src, int64_t step) {
      const T* from = static_cast<const T*>(src) + h.token * step + h.column;
      shared.ring.WaitEmpty(place);
#pragma unroll
      for (int i = 0; i < Shape<kDim>::kGroups; ++i) {
        const int first = h.first + i * kTile;
        copies.template Start<TileOrder::kPlain>(shared.slots[place.slot][i],
                                                 from + min(first, h.length - 1) * step, step,
                                                 h.length - first);
      }
      shared.ring.Fill(place);
      place.Advance();
    };
    start_rows(p.qkv, stride);
    start_rows(p.dout, p.width);
    start_rows(p.out, p.width);
    const T* next = static_cast<const T*>(p.qkv) + h.token * stride + h.column + p.width;
    CopyKeys(p, h, copies, next, shared, place);
  }
}

template <typename T, int kDim, KeysFrom kFrom>
__device__ __forceinline__ void ComputeQueryGrads(const AttentionParams& p,
                                                  QueryGradShared<T, kDim>& shared,
                                                  BlocksInTurn<kDim> blocks) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp_row = (tid & (kWarpgroup - 1)) / 32 * 16;  // within the group's tile
  RngState rng{};
  if (kFrom == KeysFrom::kDrawn) rng = UniformState(p.dropout.rng);
  RingPlace<kQuerySlots> place;
  const float factor = p.scale * p.dropout.scale;

  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.template At<BlockRows::kQueries>(p);
    const auto block_sums = [&] {
      const int64_t slice = h.batch * blocks.per_head + h.first / Shape<kDim>::kRows;
      return p.sums + 3 * slice * p.width + h.column;
    };
    if (h.first >= h.length) {
      if (p.sums != nullptr && tid < head_dim) block_sums()[tid] = 0.0f;
      continue;
    }
    const int group_query = h.first + group * kTile;
    const int query = group_query + warp_row + (lane >> 2);  // of row g
    RowPair rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = query + 8 * half;
      rows.softmax[half] = i < h.length ? p.softmax[h.row + i] : SoftmaxRow{INFINITY, 0.0f};
    }
    uint32_t q[kDim / 16][4], dout[kDim / 16][4];
    shared.ring.WaitFull(place);
    LoadRowFragments(q, shared.slots[place.slot][group], warp_row);
    shared.ring.Release(place.slot);
    place.Advance();
    shared.ring.WaitFull(place);
    LoadRowFragments(dout, shared.slots[place.slot][group], warp_row);
    shared.ring.Release(place.slot);
    place.Advance();
    shared.ring.WaitFull(place);
    rows.delta[0] = rows.delta[1] = 0.0f;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t out[4];
      LoadRowFragment(out, shared.slots[place.slot][group], warp_row, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = UnpackPair<T>(out[i]), y = UnpackPair<T>(dout[k][i]);
        rows.delta[i & 1] += x.x * y.x + x.y * y.y;
      }
    }
    shared.ring.Release(place.slot);
    place.Advance();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = rows.delta[half];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
      const int i = query + 8 * half;
      if ((lane & 3) == 0 && i < h.length) p.delta[h.row + i] = sum;
      sum *= KeepProbability(p.dropout);
    }

    const KeptRows kept_rows(p, h);
    float dq[kDim / 8][4] = {};
    float s[8][4];
    const int tiles = (h.keys + kTile - 1) / kTile;
    // Of this warpgroup: what a causal block's first queries do not see is left out, and all where
    // it has no query.
    const int keys = p.causal ? min(h.keys, group_query + kTile) : h.keys;
    const int group_tiles = group_query < h.length ? (keys + kTile - 1) / kTile : 0;

    // The scores' products are there.
    const auto step = [&](int tile, auto last) {
      const int key0 = tile * kTile;
      auto& slot = shared.slots[place.slot];
      float dp[8][4];
      BeginProducts();
      MultiplyRowsOfHeadTile<T>(dp, dout, DescribeTile(&slot[1]));
      CommitProducts();
      KeptPairs kept{};
      if constexpr (kFrom == KeysFrom::kKept) {
        const auto at = [&](int half) {
          return uint32_t{
              kept_rows.Calls(min(query + 8 * half, h.length - 1))[4 * tile + (lane & 3)]};
        };
        kept.word = __byte_perm(at(0), at(1), 0x5140);
      } else if constexpr (kFrom == KeysFrom::kDrawn) {
        kept = DrawPairs(p.dropout, rng, h.row + query, tile);
      }
      const bool cut = p.causal && key0 + kTile - 1 > group_query + warp_row;
      const bool plain = p.mask == nullptr && key0 + kTile <= h.keys && !cut;
      if (!plain) {
        MaskScores(s, p.scale, p.mask != nullptr ? shared.bias[place.slot] : nullptr, h.keys - key0,
                   cut, query - key0);
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
      const int now = place.slot;
      place.Advance();
      if constexpr (!last) shared.ring.WaitFull(place);
      BeginProducts();
      MultiplyTile<T>(dq, ds, DescribeColumns(slot[0]));
      if constexpr (!last) {
        MultiplyRowsOfHeadTile<T>(s, q, DescribeTile(&shared.slots[place.slot][0]));
      }
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(dq);
      if constexpr (!last) PinProduct(s);
      shared.ring.Release(now);
    };
    if (group_tiles > 0) {
      shared.ring.WaitFull(place);
      BeginProducts();
      MultiplyRowsOfHeadTile<T>(s, q, DescribeTile(&shared.slots[place.slot][0]));
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(s);
#pragma unroll 1
      for (int tile = 0; tile < group_tiles - 1; ++tile) step(tile, std::false_type{});
      step(group_tiles - 1, std::true_type{});
    }
#pragma unroll 1
    for (int tile = group_tiles; tile < tiles; ++tile) {
      shared.ring.WaitFull(place);
      shared.ring.Release(place.slot);
      place.Advance();
    }

    int row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = query + 8 * half < h.length ? query + 8 * half : -1;
    }
    StoreHeadRows(static_cast<T*>(p.dqkv) + h.token * stride + h.column, stride, row, head_dim, dq,
                  factor, factor);
    if (p.sums == nullptr) continue;
    // The sums of the block before have been read.
    ComputingBarrier<kDim>();
#pragma unroll
    for (int half = 0; half < Shape<kDim>::kHalves; ++half) {
      shared.sums[half][tid / 32].pairs[lane] = ColumnSums(HalfOf(dq, half));
    }
    ComputingBarrier<kDim>();
    if (tid < head_dim) {
      block_sums()[tid] =
          AddWarpSums(shared.sums[tid / 64], Shape<kDim>::kComputing / 32, factor, tid % 64);
    }
  }
}

template <typename T, int kDim, KeysFrom kFrom>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    QueryGradKernel(const AttentionParams p, unsigned number, unsigned per_head) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<QueryGradShared<T, kDim>*>(shared_bytes);
  if (threadIdx.x == 0) shared.ring.Start();
  __syncthreads();
  const BlocksInTurn<kDim> blocks(number, per_head);
  CopyOrCompute<kDim>([&] { CopyForQueries(p, shared, blocks); },
                      [&] { ComputeQueryGrads<T, kDim, kFrom>(p, shared, blocks); });
}

constexpr int kKeySlots = 4;
// Tiles of queries on their way before the keys, which wait for those before them to be done with.
constexpr int kEarlyTiles = 2;
static_assert(kEarlyTiles < kKeySlots, "or the slots wait for the keys");
constexpr int kStatThreads = kTile;  // that copy what a query has beside its rows

template <typename T, int kDim>
struct KeyGradShared {
  static constexpr int kWords = Shape<kDim>::kRows / 32;
  HeadTile<T, kDim> k[Shape<kDim>::kGroups], v[Shape<kDim>::kGroups];
  struct Slot {
    HeadTile<T, kDim> q, dout;
  };
  Slot slots[kKeySlots];
  SoftmaxRow softmax[kKeySlots][kTile];
  float shift[kKeySlots][kTile];
  float delta[kKeySlots][kTile];
  union {
    uint32_t kept[kKeySlots][kWords][kTile];              // [word of the block's keys][query]
    uint32_t drawn[Shape<kDim>::kComputing / 32][kTile];  // the same, of each warp's keys
  };
  // Of dk and dv, each half of their columns.
  WarpSums sums[2][Shape<kDim>::kHalves][Shape<kDim>::kComputing / 32];
  Ring<kKeySlots, kDim> ring;
  uint64_t keys_full, keys_empty;
};

// The first query that a block of keys is to see, and how many tiles of them there are.
struct SeenQueries {
  int first, tiles;

  __device__ __forceinline__ SeenQueries(const AttentionParams& p, const Head& h)
      // Queries before the block's first key see none of its keys; those of a block whose keys are
      // all cut off see none at all.
      : first(p.causal ? h.first : 0),
        tiles(h.first < h.keys ? (h.length - first + kTile - 1) / kTile : 0) {}
};

template <typename T, int kDim, KeysFrom kFrom>
__device__ __forceinline__ void CopyForKeys(const AttentionParams& p,
                                            KeyGradShared<T, kDim>& shared,
                                            BlocksInTurn<kDim> blocks) {
  const int64_t stride = 3 * p.width;
  const TileCopies<kDim> copies(static_cast<int>(p.head_dim));
  const int tid = static_cast<int>(threadIdx.x) % kWarpgroup;
  RingPlace<kKeySlots> place;
  RingPlace<1> keys_place;
  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.template At<BlockRows::kKeys>(p);
    if (h.first >= h.length) continue;
    const SeenQueries seen(p, h);
    const T* qkv = static_cast<const T*>(p.qkv) + h.token * stride + h.column;
    const T* next_q = qkv + seen.first * stride;
    const T* next_dout =
        static_cast<const T*>(p.dout) + (h.token + seen.first) * p.width + h.column;
    for (int tile = 0; tile < seen.tiles; ++tile) {
      const int query0 = seen.first + tile * kTile;
      const int rows = h.length - query0;
      SoftmaxRow softmax{INFINITY, 0.0f};
      float delta = 0.0f;
      if (tid < min(rows, kTile)) {
        softmax = p.softmax[h.row + query0 + tid];
        delta = p.delta[h.row + query0 + tid];
      }
      shared.ring.WaitEmpty(place);
      auto& slot = shared.slots[place.slot];
      copies.template Start<TileOrder::kPlain>(slot.q, next_q, stride, rows);
      copies.template Start<TileOrder::kPlain>(slot.dout, next_dout, p.width, rows);
      if constexpr (kFrom == KeysFrom::kKept) {
        const KeptRows kept(p, h);
        constexpr int kWords = KeyGradShared<T, kDim>::kWords;
#pragma unroll
        for (int i = 0; i < kTile * kWords / kWarpgroup; ++i) {
          const int word = (tid + i * kWarpgroup) % kWords;
          const int row = (tid + i * kWarpgroup) / kWords;
          const bool inside = h.first / 32 + word < kept.row_words;
          CopyAsyncSmall<4>(&shared.kept[place.slot][word][row],
                            kept.Row(query0 + row) + (inside ? h.first / 32 + word : 0), inside);
        }
      }
      shared.ring.Fill(place);
      if (tid < kStatThreads) {
        shared.softmax[place.slot][tid] = softmax;
        shared.shift[place.slot][tid] = ShiftOf(softmax);
        shared.delta[place.slot][tid] = delta;
        // Each thread for itself: see ArriveByWarp.
        Arrive(&shared.ring.full[place.slot]);
      }
      place.Advance();
      next_q += kTile * stride;
      next_dout += kTile * p.width;
      if (tile != min(kEarlyTiles, seen.tiles) - 1) continue;
      WaitForPhase(&shared.keys_empty, keys_place.parity ^ 1);
#pragma unroll
      for (int i = 0; i < Shape<kDim>::kGroups; ++i) {
        const int first = h.first + i * kTile;
        const T* keys = qkv + p.width + min(first, h.length - 1) * stride;
        copies.template Start<TileOrder::kPlain>(shared.k[i], keys, stride, h.keys - first);
        copies.template Start<TileOrder::kPlain>(shared.v[i], keys + p.width, stride,
                                                 h.keys - first);
      }
      ArriveAfterCopies(&shared.keys_full);
      keys_place.Advance();
    }
  }
}

template <typename T, int kDim, KeysFrom kFrom>
__device__ __forceinline__ void ComputeKeyGrads(const AttentionParams& p,
                                                KeyGradShared<T, kDim>& shared,
                                                BlocksInTurn<kDim> blocks) {
  constexpr bool kDropout = kFrom != KeysFrom::kNone;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp = __shfl_sync(0xFFFFFFFFu, tid / 32, 0);
  const int warp_row = warp % 4 * 16;  // within the group's tile
  RngState rng{};
  if (kFrom == KeysFrom::kDrawn) rng = UniformState(p.dropout.rng);
  const uint64_t k_tile = DescribeTile(&shared.k[group]);
  const uint64_t v_tile = DescribeTile(&shared.v[group]);
  RingPlace<kKeySlots> place;
  RingPlace<1> keys_place;

  for (; blocks.Any(); blocks.Next()) {
    const Head h = blocks.template At<BlockRows::kKeys>(p);
    const auto block_sums = [&] {
      const int64_t slice = h.batch * blocks.per_head + h.first / Shape<kDim>::kRows;
      return p.sums + (3 * slice + 1) * p.width + h.column;
    };
    if (h.first >= h.length) {
      if (p.sums != nullptr && tid < head_dim) {
        block_sums()[tid] = block_sums()[p.width + tid] = 0.0f;
      }
      continue;
    }
    const SeenQueries seen(p, h);
    const int key0 = h.first + group * kTile;  // of this warpgroup
    // A warpgroup whose keys are cut off, or not seen by the first queries.
    const int skipped = key0 < h.keys ? min(p.causal ? group : 0, seen.tiles) : seen.tiles;
    const KeyTile keys(p, h, key0, warp_row);
    float dk[kDim / 8][4] = {};
    float dv[kDim / 8][4] = {};
    float s[8][4];

    // The scores' products are there.
    const auto step = [&](int tile, auto last) {
      const int query0 = seen.first + tile * kTile;
      auto& slot = shared.slots[place.slot];
      QueryTile queries{shared.softmax[place.slot], shared.shift[place.slot],
                        shared.delta[place.slot], nullptr};
      if constexpr (kFrom == KeysFrom::kKept) {
        queries.kept = shared.kept[place.slot][2 * group + KeptWord(warp)];
      } else if constexpr (kFrom == KeysFrom::kDrawn) {
        queries.kept = shared.drawn[warp];
        DrawKeyRows(p.dropout, rng, h.row + query0, key0 / kTile, shared.drawn[warp]);
      }
      uint32_t probs[4][4];
      keys.Probabilities<T, kDropout>(s, probs, p, queries, query0);
      float dp[8][4];
      BeginProducts();
      MultiplyTile<T>(dv, probs, DescribeColumns(slot.dout));
      MultiplyRowsOfHeadTiles<T, kDim>(dp, v_tile, DescribeTile(&slot.dout));
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(dv);
      PinProduct(dp);
      if constexpr (last) {
        __syncwarp();
        if (lane == 0) Arrive(&shared.keys_empty);
      }
      uint32_t ds[4][4];
      keys.ScoreGrads<T, kDropout>(s, dp, ds, p, queries);
      const int now = place.slot;
      place.Advance();
      if constexpr (!last) shared.ring.WaitFull(place);
      BeginProducts();
      MultiplyTile<T>(dk, ds, DescribeColumns(slot.q));
      if constexpr (!last) {
        MultiplyRowsOfHeadTiles<T, kDim>(s, k_tile, DescribeTile(&shared.slots[place.slot].q));
      }
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(dv);
      PinProduct(dk);
      if constexpr (!last) PinProduct(s);
      shared.ring.Release(now);
    };
    if (seen.tiles > 0) {
#pragma unroll 1
      for (int tile = 0; tile < skipped; ++tile) {
        shared.ring.WaitFull(place);
        shared.ring.Release(place.slot);
        place.Advance();
      }
      WaitForPhase(&shared.keys_full, keys_place.parity);
      keys_place.Advance();
      if (skipped < seen.tiles) {
        shared.ring.WaitFull(place);
        BeginProducts();
        MultiplyRowsOfHeadTiles<T, kDim>(s, k_tile, DescribeTile(&shared.slots[place.slot].q));
        CommitProducts();
        WaitForProducts<0>();
        PinProduct(s);
#pragma unroll 1
        for (int tile = skipped; tile < seen.tiles - 1; ++tile) step(tile, std::false_type{});
        step(seen.tiles - 1, std::true_type{});
      } else {
        __syncwarp();
        if (lane == 0) Arrive(&shared.keys_empty);
      }
    }

    int row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = keys.Row(half) < h.length ? keys.Row(half) : -1;
    }
    T* dst = static_cast<T*>(p.dqkv) + h.token * stride + h.column;
    StoreHeadRows(dst + p.width, stride, row, head_dim, dk, p.scale, p.scale);
    StoreHeadRows(dst + 2 * p.width, stride, row, head_dim, dv, p.dropout.scale, p.dropout.scale);
    if (p.sums == nullptr) continue;
    // The sums of the block before have been read.
    ComputingBarrier<kDim>();
#pragma unroll
    for (int half = 0; half < Shape<kDim>::kHalves; ++half) {
      shared.sums[0][half][warp].pairs[lane] = ColumnSums(HalfOf(dk, half));
      shared.sums[1][half][warp].pairs[lane] = ColumnSums(HalfOf(dv, half));
    }
    ComputingBarrier<kDim>();
    const int part = tid / kDim;
    const int column = tid % kDim;
    if (part < 2 && column < head_dim) {
      block_sums()[part * p.width + column] =
          AddWarpSums(shared.sums[part][column / 64], Shape<kDim>::kComputing / 32,
                      part == 0 ? p.scale : p.dropout.scale, column % 64);
    }
  }
}

template <typename T, int kDim, KeysFrom kFrom>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    KeyGradKernel(const AttentionParams p, unsigned number, unsigned per_head) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<KeyGradShared<T, kDim>*>(shared_bytes);
  if (threadIdx.x == 0) {
    shared.ring.Start(kStatThreads);
    StartBarrier(&shared.keys_full, kWarpgroup);
    StartBarrier(&shared.keys_empty, Shape<kDim>::kComputing / 32);
  }
  __syncthreads();
  const BlocksInTurn<kDim> blocks(number, per_head);
  CopyOrCompute<kDim>([&] { CopyForKeys<T, kDim, kFrom>(p, shared, blocks); },
                      [&] { ComputeKeyGrads<T, kDim, kFrom>(p, shared, blocks); });
}

constexpr int kDrawThreads = kWarpgroup;
constexpr int kDrawCalls = 32;  // neighbouring ones, of neighbouring threads

// The words of a tile of queries.
__global__ void __launch_bounds__(kDrawThreads) DrawRowsKernel(const AttentionParams p) {
  const Head h = HeadOfBlock<kTile, BlockRows::kQueries>(p);
  if (h.first >= h.length) return;
  const RngState rng = UniformState(p.dropout.rng);
  const KeptRows kept_rows(p, h);
  const int calls = (h.keys + kTile - 1) / kTile * 4;
  for (int i = static_cast<int>(threadIdx.x) / kDrawCalls; i < kTile;
       i += kDrawThreads / kDrawCalls) {
    const int query = h.first + i;
    for (int call = static_cast<int>(threadIdx.x) % kDrawCalls; call < calls; call += kDrawCalls) {
      kept_rows.Calls(query)[call] =
          DrawCall(p.dropout, rng, h.row + query, static_cast<uint32_t>(call));
    }
  }
}

// Both kernels over heads [p.first_head, + p.head_count).
template <typename T, int kDim, KeysFrom kFrom>
cudaError_t OverHeads(const AttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = LaunchBlocks<kDim>(QueryGradKernel<T, kDim, kFrom>,
                                               sizeof(QueryGradShared<T, kDim>), p, stream);
  if (error != cudaSuccess) return error;
  return LaunchBlocks<kDim>(KeyGradKernel<T, kDim, kFrom>, sizeof(KeyGradShared<T, kDim>), p,
                            stream);
}

template <typename T, int kDim, bool kDropout>
cudaError_t Backward(AttentionParams p, cudaStream_t stream) {
  const int64_t heads = p.batch * p.heads;
  const size_t head_bytes = KeptBitsBytes(p.seq);
  const int64_t at_once = p.kept != nullptr ? static_cast<int64_t>(p.kept_bytes / head_bytes) : 0;
  cudaError_t error = cudaSuccess;
  if (!kDropout) {
    error = OverHeads<T, kDim, KeysFrom::kNone>(p, stream);
  } else if (at_once == 0) {
    error = OverHeads<T, kDim, KeysFrom::kDrawn>(p, stream);
  } else {
    // Parts of one size, so that none is a small rest.
    const int64_t parts = (heads + at_once - 1) / at_once;
    for (int64_t part = 0; part < parts && error == cudaSuccess; ++part) {
      p.first_head = heads * part / parts;
      p.head_count = heads * (part + 1) / parts - p.first_head;
      error = LaunchRows<kTile>(DrawRowsKernel, kDrawThreads, 0, p, stream);
      if (error == cudaSuccess) error = OverHeads<T, kDim, KeysFrom::kKept>(p, stream);
    }
  }
  return error;
}

}  // namespace

cudaError_t LaunchAttentionWgmmaBackward(const AttentionParams& p, cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    using T = typename decltype(tag)::type;
    return p.head_dim <= 64 ? Backward<T, 64, dropout.value>(p, stream)
                            : Backward<T, 128, dropout.value>(p, stream);
  });
}

}  // namespace lamina::cuda
