// Purpose: row_norm_staged.cuh.
//
// A block goes over stages of eight rows. The next stage is on its way by bulk copies, one a
// tensor, while this one is computed, so that enough bytes are under way without a register held
// for them. First a warp has each row: its two sums need no barrier, and its gradients go out. Then
// a thread has each four columns, over the stage's rows: the column sums stay in its registers from
// the first stage to the last. The order of every sum is fixed by the shape and the device.
#include "common/convert.cuh"
#include "common/copy_async.cuh"
#include "common/dispatch.cuh"
#include "common/dropout.cuh"
#include "common/mbarrier.cuh"
#include "common/norm_math.cuh"
#include "common/reduce.cuh"
#include "norms/row_norm_staged.cuh"

namespace lamina::cuda {
namespace {

constexpr int kRows = kStagedRows;  // of a stage: one a warp
constexpr int kThreads = kRows * 32;
constexpr int kStages = 2;
constexpr int kMaxCols = 2048;

// The tensors of a stage, where they are there. The last one holds dx when its row is done.
enum Slot { kDy, kSaved, kDsum, kSlots };

struct Layout {
  int slot[kSlots];  // places of a stage, in tensors; -1: not there
  size_t tensor_bytes, stage_bytes;
};

Layout LayoutOf(const RowNormBackwardParams& p) {
  Layout layout{};
  int slots = 0;
  layout.slot[kDy] = p.dy != nullptr ? slots++ : -1;
  layout.slot[kSaved] = p.dy != nullptr ? slots++ : -1;
  layout.slot[kDsum] = p.dsum != nullptr || p.dbias != nullptr ? slots++ : -1;
  layout.tensor_bytes = static_cast<size_t>(p.cols) * kRows * 2;
  layout.stage_bytes = layout.tensor_bytes * static_cast<size_t>(slots);
  return layout;
}

struct Statistics {
  float mean, rstd;
};

// Four neighbouring elements.
template <typename T>
__device__ __forceinline__ void Store4(T* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(PackPair<T>(v[0], v[1]), PackPair<T>(v[2], v[3]));
}
template <typename T>
__device__ __forceinline__ void Load4(const T* p, float (&v)[4]) {
  const uint2 words = *reinterpret_cast<const uint2*>(p);
  const float2 low = UnpackPair<T>(words.x), high = UnpackPair<T>(words.y);
  v[0] = low.x;
  v[1] = low.y;
  v[2] = high.x;
  v[3] = high.y;
}

// What normalised values are made from: (sum - mean) * rstd, or (y - beta) / gamma.
template <bool kFromOutput, int kWidth>
__device__ __forceinline__ void Normalise(const Statistics& statistics,
                                          const float (&gamma)[kWidth], const float (&beta)[kWidth],
                                          float (&v)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    // Two ulp beside what y lost when it was rounded.
    v[i] = kFromOutput ? __fdividef(v[i] - beta[i], gamma[i])
                       : Normalised(v[i], statistics.mean, statistics.rstd);
  }
}

// kUnits: of four columns, a thread. Partial sums go to
// partials[(array * gridDim.x + block) * cols + col]: dgamma and dbeta where there is a norm, and
// then dbias.
template <typename T, int kUnits, bool kFromOutput>
__global__ void __launch_bounds__(kThreads, 2)
    StagedBackwardKernel(RowNormBackwardParams p, Layout layout, float* partials) {
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ uint64_t full[kStages];
  __shared__ Statistics row_statistics[kRows];
  const int cols = static_cast<int>(p.cols);
  const int chunks = cols / 8, units = cols / 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const float inv_cols = 1.0f / static_cast<float>(cols);
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;
  const auto tensor = [&](int stage, Slot slot) {
    return reinterpret_cast<T*>(stages + static_cast<size_t>(stage) * layout.stage_bytes +
                                layout.tensor_bytes * static_cast<size_t>(layout.slot[slot]));
  };

  // One thread's.
  const auto fetch = [&](int stage, int64_t row) {
    if (row >= p.rows) return;
    const int64_t rows = min(int64_t{kRows}, p.rows - row);
    const auto bytes = static_cast<uint32_t>(rows * cols * 2);
    uint32_t tensors = 0;
    const void* const sources[kSlots] = {p.dy, kFromOutput ? p.y : p.sum, p.dsum};
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (sources[slot] != nullptr && layout.slot[slot] >= 0) ++tensors;
    }
    ArriveAndExpect(&full[stage], tensors * bytes);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (sources[slot] == nullptr || layout.slot[slot] < 0) continue;
      CopyBulk(tensor(stage, static_cast<Slot>(slot)),
               static_cast<const T*>(sources[slot]) + row * cols, bytes, &full[stage]);
    }
  };
  const int64_t step = int64_t{gridDim.x} * kRows;
  const int64_t first = int64_t{blockIdx.x} * kRows;
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : full) StartBarrier(&barrier, 1);
    ShareWithEngines();
    for (int stage = 0; stage < kStages; ++stage) fetch(stage, first + stage * step);
  }
  // A warp's row's, a stage ahead.
  const auto statistics_of = [&](int64_t row) {
    Statistics s{0.0f, 0.0f};
    if (p.dy == nullptr || row >= p.rows) return s;
    if constexpr (!kFromOutput) s.mean = p.mean[row];
    s.rstd = p.rstd[row];
    return s;
  };
  Statistics next = statistics_of(first + warp);
  __syncthreads();

  // Index 0: dgamma, 1: dbeta, 2: dbias.
  float sums[kUnits][3][4] = {};
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t base = first; base < p.rows; base += step) {
    const int rows = static_cast<int>(min(int64_t{kRows}, p.rows - base));
    const Statistics statistics = next;
    next = statistics_of(base + step + warp);
    WaitForPhase(&full[stage], parity);
    const T* dy = tensor(stage, kDy);
    const T* saved = tensor(stage, kSaved);
    T* dsum = tensor(stage, kDsum);

    if (warp < rows) {
      const int64_t row = base + warp;
      float mean_g = 0.0f, mean_gn = 0.0f;  // of g and of g * normalised, g = dy * gamma
      const auto load = [&](int chunk, float(&g)[8], float(&normalised)[8]) {
        float gamma[8], beta[8] = {};
        Load8(static_cast<const T*>(p.gamma) + chunk * 8, gamma);
        if constexpr (kFromOutput) Load8(static_cast<const T*>(p.beta) + chunk * 8, beta);
        Load8(dy + warp * cols + chunk * 8, g);
        Load8(saved + warp * cols + chunk * 8, normalised);
        Normalise<kFromOutput>(statistics, gamma, beta, normalised);
#pragma unroll
        for (int i = 0; i < 8; ++i) g[i] *= gamma[i];
      };
      if (p.dy != nullptr) {
        if (lane == 0) row_statistics[warp] = statistics;
#pragma unroll 4
        for (int chunk = lane; chunk < chunks; chunk += 32) {
          float g[8], normalised[8];
          load(chunk, g, normalised);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            mean_g += g[i];
            mean_gn += g[i] * normalised[i];
          }
        }
        mean_g = WarpSum(mean_g) * inv_cols;
        mean_gn = WarpSum(mean_gn) * inv_cols;
      }
#pragma unroll 2
      for (int chunk = lane; chunk < chunks; chunk += 32) {
        float ds[8] = {};
        if (p.dy != nullptr) {
          float normalised[8];
          load(chunk, ds, normalised);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            ds[i] = statistics.rstd * (ds[i] - mean_g - normalised[i] * mean_gn);
          }
        }
        T* place = dsum + warp * cols + chunk * 8;
        if (p.dsum != nullptr) {
          float other[8];
          Load8(place, other);
#pragma unroll
          for (int i = 0; i < 8; ++i) ds[i] += other[i];
        }
        const int64_t offset = row * cols + chunk * 8;
        if (p.dsum_out != nullptr) StoreAndKeep8(static_cast<T*>(p.dsum_out) + offset, ds);
        if (p.dx == nullptr) continue;
        if (p.dropout.rng != nullptr) ApplyDropout<8>(p.dropout, rng, row, chunk * 8, ds);
        Store8(static_cast<T*>(p.dx) + offset, ds);
        if (p.dbias != nullptr) Store8(place, ds);
      }
    }
    __syncthreads();

#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = static_cast<int>(threadIdx.x) + u * kThreads;
      if (unit >= units) continue;
      const int col = unit * 4;
      float gamma[4] = {}, beta[4] = {};
      if (kFromOutput || p.y_again != nullptr) {
        Load4(static_cast<const T*>(p.gamma) + col, gamma);
        Load4(static_cast<const T*>(p.beta) + col, beta);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        if (p.dy != nullptr) {
          float g[4], normalised[4];
          Load4(dy + r * cols + col, g);
          Load4(saved + r * cols + col, normalised);
          Normalise<kFromOutput>(row_statistics[r], gamma, beta, normalised);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[u][0][i] += g[i] * normalised[i];
            sums[u][1][i] += g[i];
          }
          if constexpr (!kFromOutput) {
            if (p.y_again != nullptr) {
#pragma unroll
              for (int i = 0; i < 4; ++i) g[i] = NormOutput(normalised[i], gamma[i], beta[i]);
              Store4(static_cast<T*>(p.y_again) + (base + r) * cols + col, g);
            }
          }
        }
        if (p.dbias != nullptr) {
          float dx[4];
          Load4(dsum + r * cols + col, dx);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[u][2][i] += dx[i];
        }
      }
    }
    ShareWithEngines();
    __syncthreads();
    if (threadIdx.x == 0) fetch(stage, base + kStages * step);
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  float* const gradients[3] = {p.dgamma, p.dbeta, p.dbias};
#pragma unroll
  for (int array = 0; array < 3; ++array) {
    if (gradients[array] == nullptr) continue;
    const int place = p.dy != nullptr ? array : 0;
    float* out = partials + (place * int64_t{gridDim.x} + blockIdx.x) * cols;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = static_cast<int>(threadIdx.x) + u * kThreads;
      const float(&v)[4] = sums[u][array];
      if (unit < units)
        *reinterpret_cast<float4*>(out + unit * 4) = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
}

template <typename T, int kUnits, bool kFromOutput>
cudaError_t Launch(const RowNormBackwardParams& p, int64_t blocks, cudaStream_t stream) {
  const Layout layout = LayoutOf(p);
  const size_t shared = kStages * layout.stage_bytes;
  const auto kernel = StagedBackwardKernel<T, kUnits, kFromOutput>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(
      p, layout, static_cast<float*>(p.workspace));
  return cudaGetLastError();
}

}  // namespace

bool HasStagedRowNormBackward(const RowNormBackwardParams& p) {
  return (p.dtype == DType::kBF16 || p.dtype == DType::kF16) && p.cols % 8 == 0 &&
         p.cols <= kMaxCols &&
         Aligned16(p.dy, p.dsum, p.sum, p.y, p.beta, p.y_again, p.gamma, p.dsum_out, p.dx);
}

cudaError_t LaunchStagedRowNormBackward(const RowNormBackwardParams& p, int64_t blocks,
                                        cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.y != nullptr, [&](auto tag, auto from_output) {
    using T = typename decltype(tag)::type;
    return p.cols <= kThreads * 4 ? Launch<T, 1, from_output.value>(p, blocks, stream)
                                  : Launch<T, 2, from_output.value>(p, blocks, stream);
  });
}

}  // namespace lamina::cuda
