// Purpose: y[row] = bias for every row. Used where the product's own bias epilogue can't be (odd
// widths, unaligned biases): the product then accumulates onto it, and rounds once, as the epilogue
// does.
#include <algorithm>

#include "elementwise/bias.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 256;

// Bits are copied, so the element type is only its size.
template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    BroadcastBiasKernel(const Bits* bias, Bits* y, int64_t elements, int64_t cols) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < elements; i += stride) {
    y[i] = bias[i % cols];
  }
}

}  // namespace

cudaError_t LaunchBroadcastBias(const BroadcastBiasParams& p, cudaStream_t stream) {
  const int64_t elements = p.rows * p.cols;
  if (elements == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>((elements + kThreads - 1) / kThreads, int64_t{1} << 30));
  if (SizeOf(p.dtype) == 4) {
    BroadcastBiasKernel<<<blocks, kThreads, 0, stream>>>(
        static_cast<const uint32_t*>(p.bias), static_cast<uint32_t*>(p.y), elements, p.cols);
  } else {
    BroadcastBiasKernel<<<blocks, kThreads, 0, stream>>>(
        static_cast<const uint16_t*>(p.bias), static_cast<uint16_t*>(p.y), elements, p.cols);
  }
  return cudaGetLastError();
}

}  // namespace lamina::cuda
