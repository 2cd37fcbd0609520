#include "cuda_sizes.h"

#include <algorithm>
#include <cstddef>

#include "kernel_limits.h"

namespace lamina {
namespace {

constexpr size_t kAlignment = 256;

constexpr size_t RoundUp(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// A call's slices are within those that the plan has for its tokens.
static_assert([] {
  for (int64_t batch = 1; batch < 40; ++batch) {
    for (const int64_t seq : {1, 31, 32, 33, 128, 129, 192, 193, 384, 385, 1000}) {
      for (const int64_t tokens : {batch, batch * 32 - 1, batch * 32, batch * seq}) {
        for (const int64_t rows : {cuda::kPassKeys, cuda::WgmmaBlockRows(64)}) {
          if (cuda::BiasSlices(tokens, batch, seq, rows) > cuda::MostBiasSlices(tokens))
            return false;
        }
      }
    }
  }
  return true;
}());

class Sizes final : public OpSizes {
 public:
  explicit Sizes(int multiprocessors) : multiprocessors_(static_cast<size_t>(multiprocessors)) {}

  size_t AttentionSavedBytes(const LayerDims& dims) const override {
    return AttentionRows(dims) * cuda::kSoftmaxRowBytes;
  }

  size_t WorkspaceBytes(const LayerDims& dims) const override {
    // Ops run one after another on one stream, so each may have all of it.
    size_t attention = AttentionRows(dims) * sizeof(float) +
                       cuda::BiasSliceBytes(cuda::MostBiasSlices(dims.tokens()), dims.hidden);
    const auto multiprocessors = static_cast<int64_t>(multiprocessors_);
    if (FusedAttention(dims) &&
        cuda::HasOnePassBackward(dims.dtype, dims.seq, dims.head_dim(), multiprocessors)) {
      attention = RoundUp(attention) + cuda::PassTurnBytes(multiprocessors) +
                  cuda::PassSumBytes(multiprocessors);
    } else if (dims.packed_tokens == 0) {
      // A packed call's sequences are of any lengths: their bits have no bound but the whole.
      const size_t kept = cuda::KeptBitsBytes(dims.seq, dims.batch * dims.heads);
      if (kept > 0) attention = RoundUp(attention) + kept;
    }
    // Slices times columns is bounded: so many blocks a multiprocessor, so many columns each, plus
    // what rounding adds to the slices and to the columns.
    const size_t wide_columns =
        static_cast<size_t>(std::max(3 * dims.hidden, dims.intermediate)) * sizeof(float);
    const size_t column_sums =
        multiprocessors_ * cuda::kColumnSumBlocks * cuda::kColumnSumWidth * sizeof(float) +
        2 * wide_columns;
    const size_t norms = multiprocessors_ * cuda::kRowNormBackwardBlocks *
                         cuda::kRowNormBackwardArrays * static_cast<size_t>(dims.hidden) *
                         sizeof(float);
    const size_t gelu = cuda::GeluProductWorkspaceBytes(dims.tokens(), dims.intermediate);
    return RoundUp(std::max({cuda::kProductWorkspaceBytes, attention, column_sums, norms, gelu,
                             cuda::kGradientStatsWorkspaceBytes, cuda::kLambWorkspaceBytes}));
  }

  size_t PendingSumBytes(const LayerDims& dims) const override {
    const auto blocks = static_cast<int64_t>(multiprocessors_) * cuda::kRowNormBackwardBlocks;
    return cuda::kPendingNormArrays * PendingSums::RoomFor(1, blocks, dims.hidden) +
           PendingSums::RoomFor(1, cuda::MostBiasSlices(dims.tokens()), 3 * dims.hidden) +
           PendingSums::RoomFor(1, cuda::GeluProductSlices(dims.tokens()), dims.intermediate);
  }

  bool host_memory() const override { return false; }

  bool FusedAttention(const LayerDims& dims) const override {
    return dims.heads > 0 && dims.hidden % dims.heads == 0 &&
           cuda::HasTensorCoreAttention(dims.dtype, dims.head_dim());
  }

  size_t StepCacheBytes() const override { return cuda::kGraphBytes; }

 private:
  // Softmax rows: each head of each token has one.
  static size_t AttentionRows(const LayerDims& dims) {
    return static_cast<size_t>(dims.tokens()) * static_cast<size_t>(dims.heads);
  }

  size_t multiprocessors_;
};

}  // namespace

std::unique_ptr<const OpSizes> CudaOpSizes(int multiprocessors) {
  return std::make_unique<const Sizes>(std::max(multiprocessors, 1));
}

}  // namespace lamina
