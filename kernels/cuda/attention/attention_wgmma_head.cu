// Purpose: the backward of attention with wgmma for sequences of up to 128 tokens, a block a head;
// attention_wgmma.cuh.
//
// All of a head lies in shared memory: two tiles each of Q, K, V, dout. A warpgroup has a tile of
// queries. Of each tile of keys it computes the scores, once, where the kernels for longer
// sequences (attention_wgmma_backward.cu) do so twice; then, with all queries' probabilities and
// gradients of scores in shared memory, one warpgroup multiplies dV of the tile, the other dK. At
// the end each has dQ of its queries. Two blocks a multiprocessor take head after head: the next
// one's tiles are on their way as soon as this one's are multiplied, while its results are stored
// and the other block computes. No two blocks write the same element, so the order of every sum is
// fixed.
#include <algorithm>

#include "attention/attention_wgmma.cuh"
#include "attention/attention_wgmma_tiles.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kTiles = 2;  // of queries, and of keys
constexpr int kRows = kTiles * kTile;
constexpr int kThreads = kTiles * kWarpgroup;
constexpr int kBlocks = 2;  // of a multiprocessor
// The second of them begins so many cycles after the first, that one computes while the other
// loads. From so many heads a block on, that this is less than what it saves.
constexpr int kLagCycles = 5000;
constexpr unsigned kLagHeads = 3;
static_assert(kRows == kWgmmaHeadRows, "what the launcher goes by");

template <typename T>
struct HeadGradShared {
  SwizzledTile<T> q[kTiles], k[kTiles], v[kTiles], dout[kTiles];
  union {
    SwizzledTile<T> probs[kTiles];    // [query][key], of one tile of keys
    WarpSums sums[2][kThreads / 32];  // after the last tile: of dv or dk, and of dq
  };
  SwizzledTile<T> ds[kTiles][kTiles];  // the same, of each tile of keys
  float bias[kRows];
  Head heads[3];  // the one before, this one and the next one, in turn
};

template <typename T, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocks) HeadGradKernel(const AttentionParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<HeadGradShared<T>*>(shared_bytes);
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp_row = (tid & (kWarpgroup - 1)) / 32 * 16;   // within a tile
  const int query = group * kTile + warp_row + (lane >> 2);  // of row g
  RngState rng{};
  if (kDropout) rng = UniformState(p.dropout.rng);

  const float k_factor = p.scale * p.dropout.scale;  // of dq too
  const float v_factor = KeptScale<T, kDropout>(p.dropout);

  // Tiles beyond a sequence's end are neither filled nor read.
  const auto start_queries = [&](SwizzledTile<T>(&tiles)[kTiles], const void* src, int64_t step,
                                 const Head& h) {
    const TilePart<kThreads, TileOrder::kPlain> query_copies(head_dim);
    const T* from =
        static_cast<const T*>(src) + h.token * step + h.column + query_copies.Source(step);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i * kTile < h.length) {
        query_copies.Start(tiles[i], from + i * kTile * step, step, h.length - i * kTile);
      }
    }
  };
  const auto start_keys = [&](SwizzledTile<T>(&tiles)[kTiles], int64_t part, const Head& h) {
    const TilePart<kThreads, TileOrder::kKeys> key_copies(head_dim);
    const T* from = static_cast<const T*>(p.qkv) + h.token * stride + h.column + part * p.width +
                    key_copies.Source(stride);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i * kTile < h.length) {
        key_copies.Start(tiles[i], from + i * kTile * stride, stride, h.keys - i * kTile);
      }
    }
  };
  const auto start = [&](const Head& h) {
    start_queries(shared.q, p.qkv, stride, h);
    start_keys(shared.k, 1, h);
    start_queries(shared.dout, p.dout, p.width, h);
    if (p.mask != nullptr && tid < h.keys) {
      CopyAsyncSmall<4>(&shared.bias[tid], p.mask + h.batch * p.seq + tid, true);
    }
    CommitCopies();
  };
  SoftmaxRow softmax[2];
  Raw8<T> out[4];  // of the row that a lane and its neighbour sum up delta of
  // Of a head, or nothing: either way they need no registers in between.
  const auto load_rows = [&](const Head& h, bool any) {
    const int length = any ? h.length : 0;
    const int own = tid / 2;
    const T* from = static_cast<const T*>(p.out) + (h.token + own) * p.width + h.column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 2 * i + (lane & 1);
      out[i] = own < length && c * 8 < head_dim ? LoadRaw8(from + c * 8) : Raw8<T>{};
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = query + 8 * half;
      softmax[half] = i < length ? p.softmax[h.row + i] : SoftmaxRow{INFINITY, 0.0f};
    }
  };

  const auto number = static_cast<unsigned>(p.batch * p.heads);
  if (blockIdx.x >= gridDim.x / kBlocks && number / gridDim.x >= kLagHeads) {
    const int64_t begin = clock64();
    while (clock64() - begin < kLagCycles) {
    }
  }
  if (tid < 2 && blockIdx.x + tid * gridDim.x < number) {
    shared.heads[tid] = HeadOfBlock<kRows, BlockRows::kKeys>(p, blockIdx.x + tid * gridDim.x);
  }
  __syncthreads();
  start_keys(shared.v, 2, shared.heads[0]);
  start(shared.heads[0]);
  load_rows(shared.heads[0], true);

  int slot = 0;  // of this head in `heads`
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < number; index += gridDim.x) {
    const Head& h = shared.heads[slot];
    const int after = slot == 2 ? 0 : slot + 1;
    const int before = slot == 0 ? 2 : slot - 1;
    const int length = Uniform(h.length);
    const int keys = Uniform(h.keys);
    const int64_t first_row = Uniform(h.row);
    const int tiles = (length + kTile - 1) / kTile;
    const int key_tiles = (keys + kTile - 1) / kTile;
    const bool next = number - index > gridDim.x;
    // V is done with before the last products.
    const bool early = next && tiles > 0 && key_tiles == tiles;
    WaitForCopies<0>();
    ShareWithEngines();
    __syncthreads();
    if (tid == 0 && number - index > 2 * gridDim.x) {
      shared.heads[before] = HeadOfBlock<kRows, BlockRows::kKeys>(p, index + 2 * gridDim.x);
    }

    RowPair rows;
    {
      // Two neighbouring lanes sum up a query's delta; a warp has those of its own rows.
      float sum = 0.0f;
      if (group < tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = 2 * i + (lane & 1);
          float x[8], y[8];
          Unpack8(out[i], x);
          Load8(reinterpret_cast<const T*>(reinterpret_cast<const char*>(shared.dout[group].rows) +
                                           Swizzled(warp_row + lane / 2, c)),
                y);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
        }
      }
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.delta[half] = __shfl_sync(0xFFFFFFFFu, sum, 2 * ((lane >> 2) + 8 * half)) *
                           KeepProbability(p.dropout);
        rows.softmax[half] = softmax[half];
      }
    }

    float grad[8][4];  // of V or of K
    float2 grad_sums = make_float2(0.0f, 0.0f);
    const auto store_grad = [&](int tile) {
      int row[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = tile * kTile + Reordered(warp_row + (lane >> 2) + 8 * half);
        row[half] = key < length ? key : -1;
      }
      const float grad_factor = group == 0 ? v_factor : k_factor;
      const float factors[2] = {grad_factor, grad_factor};
      T* dst = static_cast<T*>(p.dqkv) + h.token * stride + h.column;
      StoreRows(dst + (group == 0 ? 2 : 1) * p.width, stride, row, head_dim, grad, factors);
      if (p.sums == nullptr) return;
      const float2 sums = ColumnSums(grad);
      grad_sums.x += sums.x;
      grad_sums.y += sums.y;
    };
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile > 0) {
        store_grad(tile - 1);
        // The products with what the tile before left are done.
        __syncthreads();
      }
      if (tile >= key_tiles) {
        SetZero(grad);
        continue;
      }
      const int key0 = tile * kTile;
      // Without causality every query sees every tile, with it those of its tile and later ones.
      const int first = p.causal ? tile : 0;
      const bool any = group >= first && group < tiles;
      if (any) {
        float s[8][4], dp[8][4];
        BeginProducts();
        MultiplyRowsOfTiles<T>(s, DescribeTile(&shared.q[group]), DescribeTile(&shared.k[tile]));
        CommitProducts();
        MultiplyRowsOfTiles<T>(dp, DescribeTile(&shared.dout[group]),
                               DescribeTile(&shared.v[tile]));
        CommitProducts();
        // Drawn while the products run.
        KeptPairs kept{};
        if (kDropout) kept = DrawPairs(p.dropout, rng, first_row + query, tile);
        WaitForProducts<1>();
        PinProduct(s);
        const bool cut = p.causal && key0 + kTile - 1 > group * kTile + warp_row;
        const bool plain = p.mask == nullptr && key0 + kTile <= keys && !cut;
        if (!plain) {
          MaskScores(s, p.scale, p.mask != nullptr ? shared.bias + key0 : nullptr, keys - key0, cut,
                     query - key0);
        }
        Probabilities(s, plain, p.scale, rows.softmax);
        WaitForProducts<0>();
        PinProduct(dp);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          uint32_t probs[2][4], ds[2][4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t dropped[4], grads[4];
            DropGrads<T, kDropout>(s, dp, part, half, kept, rows.delta[half], dropped, grads);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              probs[m / 2][half + 2 * (m & 1)] = dropped[m];
              ds[m / 2][half + 2 * (m & 1)] = grads[m];
            }
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            StoreFragment(shared.probs[group], warp_row, 2 * part + i, probs[i]);
            StoreFragment(shared.ds[tile][group], warp_row, 2 * part + i, ds[i]);
          }
        }
        ShareWithEngines();
      }
      __syncthreads();
      if (early && tile + 1 == tiles) start_keys(shared.v, 2, shared.heads[after]);
      const auto* left = group == 0 ? shared.probs : shared.ds[tile];
      const auto* right = group == 0 ? shared.dout : shared.q;
      BeginProducts();
      MultiplyTransposedTile<T, false>(grad, DescribeTile(left + first),
                                       DescribeTile(right + first));
      if (first + 1 < tiles) {
        MultiplyTransposedTile<T>(grad, DescribeTile(left + 1), DescribeTile(right + 1));
      }
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(grad);
    }
    // Of each tile of keys that the group's queries see.
    const int seen = group < tiles ? (p.causal ? min(key_tiles, group + 1) : key_tiles) : 0;
    float dq[8][4];
    if (seen > 0) {
      BeginProducts();
      MultiplyTiles<T, false>(dq, DescribeTile(&shared.ds[0][group]), DescribeTile(&shared.k[0]));
      if (seen > 1) {
        MultiplyTiles<T, true>(dq, DescribeTile(&shared.ds[1][group]), DescribeTile(&shared.k[1]));
      }
      CommitProducts();
      WaitForProducts<0>();
      PinProduct(dq);
    } else {
      SetZero(dq);
    }
    __syncthreads();
    if (next) {
      if (!early) start_keys(shared.v, 2, shared.heads[after]);
      start(shared.heads[after]);
    }
    load_rows(shared.heads[after], next);
    if (tiles > 0) store_grad(tiles - 1);
    if (group < tiles) {
      int row[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row[half] = query + 8 * half < length ? query + 8 * half : -1;
      }
      const float factors[2] = {k_factor, k_factor};
      T* dst = static_cast<T*>(p.dqkv) + h.token * stride + h.column;
      StoreRows(dst, stride, row, head_dim, dq, factors);
    }
    if (p.sums != nullptr) {
      shared.sums[0][tid / 32].pairs[lane] = grad_sums;
      shared.sums[1][tid / 32].pairs[lane] = ColumnSums(dq);
      __syncthreads();
      // dq is all warps', dk the second warpgroup's, dv the first one's.
      constexpr int kWarps = kWarpgroup / 32;
      const int part = tid / 64;
      const int column = tid % 64;
      if (part < 3 && column < head_dim) {
        p.sums[(3 * h.batch + part) * p.width + h.column + column] = AddWarpSums(
            shared.sums[part == 0 ? 1 : 0] + (part == 1 ? kWarps : 0),
            part == 0 ? kThreads / 32 : kWarps, part == 2 ? v_factor : k_factor, column);
      }
    }
    slot = after;
  }
}

template <typename T, bool kDropout>
cudaError_t HeadBackward(const AttentionParams& p, cudaStream_t stream) {
  const int64_t number = p.batch * p.heads;
  if (number > 0x7FFFFFFF) return cudaErrorInvalidValue;
  constexpr int kShared = sizeof(HeadGradShared<T>);
  cudaError_t error = cudaFuncSetAttribute(HeadGradKernel<T, kDropout>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>(number, kBlocks * p.multiprocessors);
  HeadGradKernel<T, kDropout><<<static_cast<unsigned>(blocks), kThreads, kShared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAttentionWgmmaHeadBackward(const AttentionParams& p, cudaStream_t stream) {
  if (p.seq > kWgmmaHeadRows) return cudaErrorInvalidValue;
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    return HeadBackward<typename decltype(tag)::type, dropout.value>(p, stream);
  });
}

}  // namespace lamina::cuda
