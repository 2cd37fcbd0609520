// The class only dispatches; each op is in its own file.
#include "cpu_backend.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "attention.h"
#include "cast.h"
#include "context.h"
#include "gelu.h"
#include "linear.h"
#include "machine.h"
#include "memory.h"
#include "norm.h"
#include "optimizer.h"
#include "products.h"

namespace lamina {
namespace {

class CpuSizes final : public OpSizes {
 public:
  explicit CpuSizes(int threads) : threads_(threads) {}

  size_t AttentionSavedBytes(const LayerDims& dims) const override {
    return cpu::AttentionSaved(dims);
  }
  size_t WorkspaceBytes(const LayerDims& dims) const override {
    return std::max({cpu::LinearWorkspaceBytes(dims), cpu::GeluWorkspaceBytes(dims),
                     cpu::NormWorkspaceBytes(dims, threads_),
                     cpu::AttentionWorkspaceBytes(dims, threads_),
                     cpu::GradientStatsWorkspaceBytes(), cpu::LambWorkspaceBytes()});
  }
  bool host_memory() const override { return true; }
  // One path for every shape, and it keeps no matrix [S, S].
  bool FusedAttention(const LayerDims&) const override { return true; }
  size_t StepCacheBytes() const override { return 0; }

 private:
  const int threads_;
};

// The worker threads that `threads`, 0 for one a core, asks for.
absl::StatusOr<int> WorkerThreads(int threads) {
  constexpr int kMostThreads = 1024;
  if (threads < 0 || threads > kMostThreads)
    return absl::InvalidArgumentError(absl::StrCat("threads is ", threads, "; it must be in [0, ",
                                                   kMostThreads, "], 0 for one a core"));
  return threads > 0 ? threads : std::min(cpu::AvailableCores(), kMostThreads);
}

// Workspace::unordered changes nothing here: adding the chunks' sums in order costs no more than in
// any other.
//
// Ops run on the calling thread and its OpenMP team, and are done when they return: a stream's
// order comes by itself.
class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads)
      : sizes_(threads), products_(threads), context_{threads, cpu::SelectKernels(), products_} {
    info_.kind = "cpu";
    info_.name = cpu::ProcessorName();
    info_.total_bytes = cpu::TotalMemory();
    info_.threads = threads;
    info_.host_memory = true;
  }

  absl::StatusOr<void*> Allocate(size_t bytes) override { return pages_.Allocate(bytes); }
  void Free(void* data) override { pages_.Free(data); }
  absl::StatusOr<size_t> FreeBytes() const override { return cpu::AvailableMemory(); }
  absl::Status RegisterHost(void*, size_t) override { return absl::OkStatus(); }
  void UnregisterHost(void*) override {}

  absl::Status CopyIn(void* device_dst, const void* host_src, size_t bytes) override {
    return Copy(device_dst, host_src, bytes);
  }
  absl::Status CopyOut(void* host_dst, const void* device_src, size_t bytes) override {
    return Copy(host_dst, device_src, bytes);
  }
  absl::Status CopyWithin(void* device_dst, const void* device_src, size_t bytes) override {
    return Copy(device_dst, device_src, bytes);
  }
  absl::Status SetZero(void* data, size_t bytes) override {
    if (bytes > 0) std::memset(data, 0, bytes);
    return absl::OkStatus();
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

  absl::Status RecordMark(int mark) override {
    if (mark < 0 || mark >= kMarks) return BadMark(mark);
    marks_[static_cast<size_t>(mark)] = std::chrono::steady_clock::now();
    return absl::OkStatus();
  }
  absl::StatusOr<double> SecondsBetween(int begin, int end) override {
    for (int mark : {begin, end}) {
      if (mark < 0 || mark >= kMarks) return BadMark(mark);
      if (!marks_[static_cast<size_t>(mark)])
        return absl::FailedPreconditionError(absl::StrCat("mark ", mark, " was never recorded"));
    }
    return std::chrono::duration<double>(*marks_[static_cast<size_t>(end)] -
                                         *marks_[static_cast<size_t>(begin)])
        .count();
  }

  const OpSizes& sizes() const override { return sizes_; }

 private:
  static absl::Status Copy(void* dst, const void* src, size_t bytes) {
    // Source and destination may be one region of a client's: memmove.
    if (bytes > 0 && dst != src) std::memmove(dst, src, bytes);
    return absl::OkStatus();
  }
  static absl::Status BadMark(int mark) {
    return absl::InvalidArgumentError(
        absl::StrCat("mark is ", mark, "; it must be in [0, ", kMarks, ")"));
  }

  absl::Status DoLinear(const Workspace& ws, const LinearArgs& a) override {
    return cpu::Linear(context_, ws, a);
  }
  absl::Status DoLinearInputGrad(const Workspace& ws, const LinearInputGradArgs& a) override {
    absl::Status status = cpu::LinearInputGrad(context_, ws, a);
    if (!status.ok() || !a.apply_gelu) return status;
    return cpu::GeluBackward(context_, ws,
                             {.slope = a.slope,
                              .x = a.pre,
                              .y_again = a.y_again,
                              .dy = a.dx,
                              .dx = a.dx,
                              .dbias = a.dbias,
                              .gelu = a.gelu});
  }
  absl::Status DoLinearWeightGrad(const Workspace& ws, const LinearWeightGradArgs& a) override {
    return cpu::LinearWeightGrad(context_, ws, a);
  }
  absl::Status DoGelu(const Workspace&, const GeluArgs& a) override {
    return cpu::Gelu(context_, a);
  }
  absl::Status DoGeluBackward(const Workspace& ws, const GeluBackwardArgs& a) override {
    return cpu::GeluBackward(context_, ws, a);
  }
  absl::Status DoLayerNorm(const Workspace& ws, const LayerNormArgs& a) override {
    return cpu::LayerNorm(context_, ws, a);
  }
  absl::Status DoLayerNormBackward(const Workspace& ws, const LayerNormBackwardArgs& a) override {
    return cpu::LayerNormBackward(context_, ws, a);
  }
  absl::Status DoDropoutAddNorm(const Workspace& ws, const DropoutAddNormArgs& a) override {
    return cpu::DropoutAddNorm(context_, ws, a);
  }
  absl::Status DoDropoutAddNormBackward(const Workspace& ws,
                                        const DropoutAddNormBackwardArgs& a) override {
    return cpu::DropoutAddNormBackward(context_, ws, a);
  }
  absl::Status DoAttention(const Workspace& ws, const AttentionArgs& a) override {
    return cpu::Attention(context_, ws, a);
  }
  absl::Status DoAttentionBackward(const Workspace& ws, const AttentionBackwardArgs& a) override {
    return cpu::AttentionBackward(context_, ws, a);
  }
  absl::Status DoCast(const Workspace&, const CastArgs& a) override {
    return cpu::Cast(context_, a);
  }
  absl::Status DoGradientStats(const Workspace& ws, const GradientStatsArgs& a) override {
    return cpu::GradientStats(context_, ws, a);
  }
  absl::Status DoAdamW(const Workspace&, const AdamWArgs& a) override {
    return cpu::AdamW(context_, a);
  }
  absl::Status DoLamb(const Workspace& ws, const LambArgs& a) override {
    return cpu::Lamb(context_, ws, a);
  }

  const CpuSizes sizes_;
  cpu::PageAllocator pages_;
  cpu::Products products_;
  cpu::Context context_;
  std::array<std::optional<std::chrono::steady_clock::time_point>, kMarks> marks_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(int threads) {
  const absl::StatusOr<int> workers = WorkerThreads(threads);
  if (!workers.ok()) return workers.status();
  return std::make_unique<CpuBackend>(*workers);
}

absl::StatusOr<std::unique_ptr<const OpSizes>> CreateCpuSizes(int threads) {
  const absl::StatusOr<int> workers = WorkerThreads(threads);
  if (!workers.ok()) return workers.status();
  return std::make_unique<const CpuSizes>(*workers);
}

}  // namespace lamina
