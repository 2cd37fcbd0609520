// Purpose: row_norm_ring.cuh.
//
// A block stays on its multiprocessor, and a warp of it takes one row after another. The warp's
// next rows are on their way to shared memory by bulk copies while it computes one, so that enough
// bytes are under way without a register held for them, and no warp waits for another before the
// end. In the backward each lane keeps the column sums of its 32 columns in registers over all of
// its warp's rows; then the block's warps are added up in order.
//
// A lane has both halves of a dropout's call, 16 columns, so that no draw is thrown away. Lanes of
// every other four begin with the second half: the eight lanes that shared memory serves at once
// then meet all of its banks.
#include <algorithm>

#include "common/convert.cuh"
#include "common/copy_async.cuh"
#include "common/dispatch.cuh"
#include "common/dropout.cuh"
#include "common/mbarrier.cuh"
#include "common/norm_math.cuh"
#include "common/reduce.cuh"
#include "norms/row_norm_ring.cuh"

namespace lamina::cuda {
namespace {

constexpr int kCallCols = 16;              // of a lane's call
constexpr int kPairCols = 32 * kCallCols;  // of a warp's, a call a lane
constexpr int kMaxCols = 2 * kPairCols;

// Where a lane's columns are: chunk c = 2 * pair + k is eight of them from Col(c) on.
class LaneColumns {
 public:
  __device__ __forceinline__ LaneColumns()
      : lane_(threadIdx.x % 32), swapped_(((lane_ >> 2) & 1u) != 0) {}
  __device__ __forceinline__ uint32_t Call(int pair) const { return lane_ + 32u * pair; }
  __device__ __forceinline__ bool Second(int k) const { return (k == 1) != swapped_; }
  __device__ __forceinline__ int Col(int pair, int k) const {
    return static_cast<int>((lane_ / 4) * 64 + (lane_ % 4) * 8 + (Second(k) ? 32 : 0)) +
           kPairCols * pair;
  }

 private:
  uint32_t lane_;
  bool swapped_;
};

// A warp's rows: kStages of them in shared memory, kTensors tensors each of kCols columns, of which
// those beyond the row's are zero.
template <typename T, int kWarps, int kStages, int kTensors, int kCols>
class Ring {
 public:
  static constexpr size_t kRowBytes = sizeof(T) * kTensors * kCols;
  static constexpr size_t kBytes = kRowBytes * kStages * kWarps;

  // All threads of the block; `full` has kWarps * kStages barriers. Its end is a barrier.
  // source(t) is tensor t; one that is null is all zeros.
  template <typename Source>
  __device__ __forceinline__ Ring(unsigned char* memory, uint64_t* full, Source&& source, int cols)
      : rows_(SharedAddress(memory) +
              static_cast<uint32_t>(kRowBytes) * kStages * (threadIdx.x / 32)),
        full_(SharedAddress(full + kStages * (threadIdx.x / 32))) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane == 0) {
      for (int stage = 0; stage < kStages; ++stage)
        StartBarrier(full + kStages * (threadIdx.x / 32) + stage, 1);
    }
    T* const own = reinterpret_cast<T*>(memory + kRowBytes * kStages * (threadIdx.x / 32));
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      const int begin = source(t) != nullptr ? cols : 0;
#pragma unroll 1
      for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll 1
        for (int col = begin + 8 * static_cast<int>(lane); col < kCols; col += 8 * 32)
          *reinterpret_cast<uint4*>(own + (stage * kTensors + t) * kCols + col) =
              make_uint4(0, 0, 0, 0);
      }
    }
    ShareWithEngines();
    __syncthreads();
  }

  // One lane's: starts to bring a row of each tensor that is there.
  template <typename Source>
  __device__ __forceinline__ void Fetch(int stage, Source&& source, int64_t offset, int cols) {
    const auto bytes = static_cast<uint32_t>(cols * sizeof(T));
    uint32_t count = 0;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) count += source(t) != nullptr ? 1 : 0;
    ArriveAndExpect(full_ + 8 * stage, count * bytes);
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      if (source(t) != nullptr)
        CopyBulk(Row(stage, t, 0), source(t) + offset, bytes, full_ + 8 * stage);
    }
  }
  __device__ __forceinline__ void Wait(int stage, uint32_t parity) {
    WaitForPhase(full_ + 8 * stage, parity);
  }
  // Where shared memory has a row's tensor from column `col` on.
  __device__ __forceinline__ uint32_t Row(int stage, int tensor, int col) const {
    return rows_ + static_cast<uint32_t>(((stage * kTensors + tensor) * kCols + col) * 2);
  }

 private:
  uint32_t rows_;
  uint32_t full_;
};

// Eight elements of shared memory, read here and neither earlier nor kept from before: registers
// are full of column sums.
template <typename T>
__device__ __forceinline__ void LoadShared8(uint32_t address, float (&v)[8]) {
  Raw8<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.words[i].x), "=r"(raw.words[i].y), "=r"(raw.words[i].z),
                   "=r"(raw.words[i].w)
                 : "r"(address + 16 * i));
  }
  Unpack8(raw, v);
}

// The same for a dropout's state.
__device__ __forceinline__ RngState LoadSharedRng(const RngState* p) {
  uint32_t words[4];
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(SharedAddress(p)));
  return {words[0] | uint64_t{words[1]} << 32, words[2] | uint64_t{words[3]} << 32};
}

// A vector's kCols columns into shared memory; `pad` beyond those that there are, and where there
// is no vector. All threads of the block.
template <typename T, int kCols>
__device__ __forceinline__ void KeepVector(const void* vector, int cols, float pad, T* kept) {
  for (int col = static_cast<int>(threadIdx.x) * 8; col < kCols;
       col += static_cast<int>(blockDim.x) * 8) {
    float v[8];
    if (vector != nullptr && col < cols) {
      Load8(static_cast<const T*>(vector) + col, v);
    } else {
#pragma unroll
      for (float& value : v) value = pad;
    }
    Store8(kept + col, v);
  }
}

// Rows go round the blocks first and then round their warps, so that each multiprocessor has as
// many.
struct RowSteps {
  uint32_t first, step;
};
__device__ __forceinline__ RowSteps RowsOfWarp() {
  return {threadIdx.x / 32 * gridDim.x + blockIdx.x, blockDim.x / 32 * gridDim.x};
}

template <int kWarps_, int kStages_>
struct Form {
  static constexpr int kWarps = kWarps_, kStages = kStages_;
};

template <typename T, typename F, int kPairs, bool kResidual>
__global__ void __launch_bounds__(F::kWarps * 32, 1) RingNormKernel(RowNormParams p) {
  constexpr int kCols = kPairs * kPairCols, kTensors = kResidual ? 2 : 1;
  using Rows = Ring<T, F::kWarps, F::kStages, kTensors, kCols>;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t full[F::kWarps * F::kStages];
  T* const gammas = reinterpret_cast<T*>(memory + Rows::kBytes);
  T* const betas = gammas + kCols;
  T* const biases = betas + kCols;
  const int cols = static_cast<int>(p.cols);
  const bool leader = threadIdx.x % 32 == 0;
  const LaneColumns columns;
  const RowSteps own = RowsOfWarp();
  const uint32_t first = own.first, step = own.step;
  const auto source = [&](int t) { return static_cast<const T*>(t == 0 ? p.x : p.residual); };
  Rows rows(memory, full, source, cols);
  const auto fetch = [&](int stage, uint32_t row) {
    if (row < p.rows) rows.Fetch(stage, source, int64_t{row} * cols, cols);
  };
  if (leader) {
    for (int stage = 0; stage < F::kStages; ++stage) fetch(stage, first + stage * step);
  }
  RngState rng{};
  if (kResidual && p.dropout.rng != nullptr) rng = *p.dropout.rng;
  KeepVector<T, kCols>(p.gamma, cols, 0.0f, gammas);
  KeepVector<T, kCols>(p.beta, cols, 0.0f, betas);
  if (kResidual) KeepVector<T, kCols>(p.bias, cols, 0.0f, biases);
  __syncthreads();

  const float inv_cols = 1.0f / static_cast<float>(cols);
  int stage = 0;
  uint32_t parity = 0;
  for (uint32_t row = first; row < p.rows; row += step) {
    const int64_t offset = int64_t{row} * cols;
    rows.Wait(stage, parity);
    float v[2 * kPairs][8];
    float total = 0.0f;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const CallDropout dropout =
          kResidual ? CallDropout(p.dropout, rng, row, columns.Call(pair)) : CallDropout();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int col = columns.Col(pair, k);
        float(&values)[8] = v[2 * pair + k];
        LoadShared8<T>(rows.Row(stage, 0, col), values);
        if constexpr (!kResidual) continue;
        float other[8];
        LoadShared8<T>(SharedAddress(biases + col), other);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = __fadd_rn(values[i], other[i]);
        dropout.Apply(columns.Second(k), values);
        LoadShared8<T>(rows.Row(stage, kTensors - 1, col), other);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = __fadd_rn(values[i], other[i]);
        const Raw8<T> rounded = Pack8<T>(values);
        if (p.sum != nullptr && col < cols)
          StoreRaw8(static_cast<T*>(p.sum) + offset + col, rounded);
        Unpack8(rounded, values);
      }
    }
    // The row is in registers: its place is free.
    ShareWithEngines();
    __syncwarp();
    if (leader) fetch(stage, row + F::kStages * step);
    if (++stage == F::kStages) {
      stage = 0;
      parity ^= 1;
    }

#pragma unroll
    for (int c = 0; c < 2 * kPairs; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) total += v[c][i];
    }
    const float mean = WarpSum(total) * inv_cols;
    total = 0.0f;
#pragma unroll
    for (int c = 0; c < 2 * kPairs; ++c) {
      if (columns.Col(c / 2, c % 2) < cols) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float difference = __fsub_rn(v[c][i], mean);
          total = __fmaf_rn(difference, difference, total);
        }
      }
    }
    const float rstd = rsqrtf(WarpSum(total) * inv_cols + p.eps);
#pragma unroll
    for (int c = 0; c < 2 * kPairs; ++c) {
      const int col = columns.Col(c / 2, c % 2);
      float gamma[8], beta[8];
      LoadShared8<T>(SharedAddress(gammas + col), gamma);
      LoadShared8<T>(SharedAddress(betas + col), beta);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        v[c][i] = NormOutput(Normalised(v[c][i], mean, rstd), gamma[i], beta[i]);
      if (col < cols) Store8(static_cast<T*>(p.y) + offset + col, v[c]);
    }
    if (leader) {
      if (p.mean != nullptr) p.mean[row] = mean;
      if (p.rstd != nullptr) p.rstd[row] = rstd;
    }
  }
}

// kNorm: there is dy; else only dsum. kFromOutput: y and beta
// are there, not sum. Every one of them has the same rows in the same warps and adds in the same
// order, each operation with a rounding of its own: a norm and the sum below it have the same bits
// by one of these kernels as by two.
template <typename T, typename F, int kPairs, bool kNorm, bool kFromOutput>
__global__ void __launch_bounds__(F::kWarps * 32, 1)
    RingNormBackwardKernel(RowNormBackwardParams p, float* partials) {
  constexpr int kCols = kPairs * kPairCols, kTensors = kNorm ? 3 : 1;
  constexpr int kArrays = kNorm ? 3 : 1;
  using Rows = Ring<T, F::kWarps, F::kStages, kTensors, kCols>;
  static_assert(sizeof(float) * kArrays * kCols * F::kWarps <= Rows::kBytes, "the sums' place");
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t full[F::kWarps * F::kStages];
  __shared__ __align__(16) RngState rng;
  T* const gammas = reinterpret_cast<T*>(memory + Rows::kBytes);
  T* const betas = gammas + kCols;
  auto* const inverses = reinterpret_cast<float*>(betas + kCols);  // of gammas; with kFromOutput
  const int cols = static_cast<int>(p.cols);
  const bool leader = threadIdx.x % 32 == 0;
  const LaneColumns columns;
  const RowSteps own = RowsOfWarp();
  const uint32_t first = own.first, step = own.step;
  const auto source = [&](int t) {
    const void* const saved = kFromOutput ? p.y : p.sum;
    return static_cast<const T*>(t == kTensors - 1 ? p.dsum : t == 0 ? p.dy : saved);
  };
  Rows rows(memory, full, source, cols);
  const auto fetch = [&](int stage, uint32_t row) {
    if (row < p.rows) rows.Fetch(stage, source, int64_t{row} * cols, cols);
  };
  if (leader) {
    for (int stage = 0; stage < F::kStages; ++stage) fetch(stage, first + stage * step);
  }
  if (threadIdx.x == 0 && p.dropout.rng != nullptr) rng = *p.dropout.rng;
  float next_mean = 0.0f, next_rstd = 0.0f;  // a row ahead
  const auto statistics = [&](uint32_t row) {
    if (!kNorm || row >= p.rows) return;
    if constexpr (!kFromOutput) next_mean = p.mean[row];
    next_rstd = p.rstd[row];
  };
  if constexpr (kNorm) {
    // Beyond the columns that there are, normalised values of zero must come out of any source.
    KeepVector<T, kCols>(p.gamma, cols, 1.0f, gammas);
    KeepVector<T, kCols>(p.beta, cols, 0.0f, betas);
    statistics(first);
    if constexpr (kFromOutput) {
      __syncthreads();
      for (int col = static_cast<int>(threadIdx.x); col < kCols; col += F::kWarps * 32)
        inverses[col] = 1.0f / ToFloat(gammas[col]);
    }
  }
  __syncthreads();

  // Columns to store: none of a tensor that is not wanted.
  const int y_cols = p.y_again != nullptr ? cols : 0;
  const int ds_cols = p.dsum_out != nullptr ? cols : 0;
  const int dx_cols = p.dx != nullptr ? cols : 0;
  const float inv_cols = 1.0f / static_cast<float>(cols);
  float sums[kArrays][2 * kPairs][8] = {};  // dgamma, dbeta; dbias
  int stage = 0;
  uint32_t parity = 0;
  for (uint32_t row = first; row < p.rows; row += step) {
    const int64_t offset = int64_t{row} * cols;
    const float mean = next_mean, rstd = next_rstd;
    statistics(row + step);
    rows.Wait(stage, parity);
    const auto load_normalised = [&](int col, float(&normalised)[8]) {
      LoadShared8<T>(rows.Row(stage, 1, col), normalised);
      if constexpr (kFromOutput) {
        float beta[8], inverse[8];
        LoadShared8<T>(SharedAddress(betas + col), beta);
        LoadShared8<float>(SharedAddress(inverses + col), inverse);
#pragma unroll
        // Two ulp beside what y lost when it was rounded.
        for (int i = 0; i < 8; ++i)
          normalised[i] = __fmul_rn(__fsub_rn(normalised[i], beta[i]), inverse[i]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) normalised[i] = Normalised(normalised[i], mean, rstd);
      }
    };

    float mean_g = 0.0f, mean_gn = 0.0f;  // of g and of g * normalised, g = dy * gamma
    if constexpr (kNorm) {
#pragma unroll
      for (int c = 0; c < 2 * kPairs; ++c) {
        const int col = columns.Col(c / 2, c % 2);
        float dy[8], normalised[8], gamma[8];
        LoadShared8<T>(rows.Row(stage, 0, col), dy);
        LoadShared8<T>(SharedAddress(gammas + col), gamma);
        load_normalised(col, normalised);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[0][c][i] = __fmaf_rn(dy[i], normalised[i], sums[0][c][i]);
          sums[1][c][i] = __fadd_rn(sums[1][c][i], dy[i]);
          const float g = __fmul_rn(dy[i], gamma[i]);
          mean_g = __fadd_rn(mean_g, g);
          mean_gn = __fmaf_rn(g, normalised[i], mean_gn);
        }
        if constexpr (!kFromOutput) {
          float y[8];
          LoadShared8<T>(SharedAddress(betas + col), y);
#pragma unroll
          for (int i = 0; i < 8; ++i) y[i] = NormOutput(normalised[i], gamma[i], y[i]);
          if (col < y_cols) Store8(static_cast<T*>(p.y_again) + offset + col, y);
        }
      }
      mean_g = WarpSum(mean_g) * inv_cols;
      mean_gn = WarpSum(mean_gn) * inv_cols;
    }

    // Values are read and normalised once more rather than held, for which there are no registers.
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const CallDropout dropout(p.dropout, LoadSharedRng(&rng), row, columns.Call(pair));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int col = columns.Col(pair, k);
        float ds[8];
        if constexpr (kNorm) {
          float other[8];
          LoadShared8<T>(rows.Row(stage, 0, col), ds);
          LoadShared8<T>(SharedAddress(gammas + col), other);
#pragma unroll
          for (int i = 0; i < 8; ++i) ds[i] = __fsub_rn(__fmul_rn(ds[i], other[i]), mean_g);
          load_normalised(col, other);
#pragma unroll
          for (int i = 0; i < 8; ++i) ds[i] = __fmaf_rn(other[i], -mean_gn, ds[i]);
          LoadShared8<T>(rows.Row(stage, kTensors - 1, col), other);
#pragma unroll
          for (int i = 0; i < 8; ++i) ds[i] = __fmaf_rn(rstd, ds[i], other[i]);
        } else {
          LoadShared8<T>(rows.Row(stage, kTensors - 1, col), ds);
        }
        // dx is of ds as it is stored, whether it is or not.
        const Raw8<T> rounded = Pack8<T>(ds);
        if (col < ds_cols) StoreRaw8(static_cast<T*>(p.dsum_out) + offset + col, rounded);
        Unpack8(rounded, ds);
        dropout.Apply(columns.Second(k), ds);
        if (col < dx_cols) Store8(static_cast<T*>(p.dx) + offset + col, ds);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& sum = sums[kArrays - 1][2 * pair + k][i];
          sum = __fadd_rn(sum, ds[i]);
        }
      }
    }
    ShareWithEngines();
    __syncwarp();
    if (leader) fetch(stage, row + F::kStages * step);
    if (++stage == F::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // Every row that was fetched has been waited for, so that the ring is free.
  __syncthreads();
  float* const places = reinterpret_cast<float*>(memory);  // [warp][array][kCols]
#pragma unroll
  for (int array = 0; array < kArrays; ++array) {
#pragma unroll
    for (int c = 0; c < 2 * kPairs; ++c) {
      const float(&v)[8] = sums[array][c];
      auto* const place = reinterpret_cast<float4*>(
          places + (static_cast<int>(threadIdx.x / 32) * kArrays + array) * kCols +
          columns.Col(c / 2, c % 2));
      place[0] = make_float4(v[0], v[1], v[2], v[3]);
      place[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) * 4; i < kArrays * kCols; i += F::kWarps * 32 * 4) {
    const int array = i / kCols, col = i % kCols;
    if (col >= cols || (array == kArrays - 1 && p.dx == nullptr)) continue;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < F::kWarps; ++w) {
      const float4 v = *reinterpret_cast<const float4*>(places + w * kArrays * kCols + i);
      total.x += v.x;
      total.y += v.y;
      total.z += v.z;
      total.w += v.w;
    }
    *reinterpret_cast<float4*>(partials + (int64_t{array} * gridDim.x + blockIdx.x) * cols + col) =
        total;
  }
}

template <typename Kernel, typename... Args>
cudaError_t Start(Kernel* kernel, int64_t blocks, int warps, size_t shared, cudaStream_t stream,
                  const Args&... args) {
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(warps * 32), shared, stream>>>(
      args...);
  return cudaGetLastError();
}

template <typename T, int kPairs, bool kResidual>
cudaError_t LaunchForward(const RowNormParams& p, cudaStream_t stream) {
  using F = Form<16, kResidual ? 3 : 4>;
  constexpr size_t kVector = sizeof(T) * kPairs * kPairCols;
  constexpr size_t kShared = (F::kWarps * F::kStages * (kResidual ? 2 : 1) + 3) * kVector;
  const int64_t blocks = std::min(p.rows, int64_t{p.multiprocessors});
  return Start(RingNormKernel<T, F, kPairs, kResidual>, blocks, F::kWarps, kShared, stream, p);
}

template <typename T, int kPairs, bool kNorm, bool kFromOutput>
cudaError_t LaunchBackward(const RowNormBackwardParams& p, int64_t blocks, cudaStream_t stream) {
  using F = Form<12, 3>;  // of all of them: as many warps as have registers
  constexpr size_t kVector = sizeof(T) * kPairs * kPairCols;
  constexpr size_t kVectors = !kNorm ? 0 : kFromOutput ? 4 : 2;  // the inverses are fp32
  constexpr size_t kShared = (F::kWarps * F::kStages * (kNorm ? 3 : 1) + kVectors) * kVector;
  return Start(RingNormBackwardKernel<T, F, kPairs, kNorm, kFromOutput>, blocks, F::kWarps, kShared,
               stream, p, static_cast<float*>(p.workspace));
}

}  // namespace

bool HasRingRowNorm(const RowNormParams& p) {
  return (p.dtype == DType::kBF16 || p.dtype == DType::kF16) && p.gamma != nullptr &&
         (p.residual != nullptr || p.sum == nullptr) && p.cols % 8 == 0 && p.cols <= kMaxCols &&
         Aligned16(p.x, p.bias, p.residual, p.sum, p.gamma, p.beta, p.y);
}

bool HasRingRowNormBackward(const RowNormBackwardParams& p) {
  return (p.dtype == DType::kBF16 || p.dtype == DType::kF16) &&
         (p.dy != nullptr || (p.dsum != nullptr && p.dx != nullptr)) && p.cols % 8 == 0 &&
         p.cols <= kMaxCols && (p.dx != nullptr || p.dbias == nullptr) &&
         Aligned16(p.dy, p.dsum, p.sum, p.y, p.beta, p.y_again, p.gamma, p.dsum_out, p.dx);
}

cudaError_t LaunchRingRowNorm(const RowNormParams& p, cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.residual != nullptr, [&](auto tag, auto residual) {
    using T = typename decltype(tag)::type;
    return p.cols <= kPairCols ? LaunchForward<T, 1, residual.value>(p, stream)
                               : LaunchForward<T, 2, residual.value>(p, stream);
  });
}

cudaError_t LaunchRingRowNormBackward(const RowNormBackwardParams& p, int64_t blocks,
                                      cudaStream_t stream) {
  return DispatchHalf(p.dtype, p.y != nullptr, [&](auto tag, auto from_output) {
    using T = typename decltype(tag)::type;
    const auto launch = [&](auto pairs) {
      constexpr int kPairs = pairs.value;
      return p.dy == nullptr
                 ? LaunchBackward<T, kPairs, false, false>(p, blocks, stream)
                 : LaunchBackward<T, kPairs, true, from_output.value>(p, blocks, stream);
    };
    return p.cols <= kPairCols ? launch(std::integral_constant<int, 1>{})
                               : launch(std::integral_constant<int, 2>{});
  });
}

}  // namespace lamina::cuda
