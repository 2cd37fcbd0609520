// A backend that hands everything to another one and keeps count: what is allocated, how many ops
// ran. It can fail on demand. A step whose key promises what another one enqueued, and which
// enqueues something else, fails with INTERNAL.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "lamina/kernels/backend.h"
#include "step_log.h"

namespace lamina::testing {

class CountingBackend final : public Backend {
 public:
  explicit CountingBackend(std::unique_ptr<Backend> inner)
      : inner_(std::move(inner)), op_sizes_(inner_->sizes()) {
    info_ = inner_->info();
    op_sizes_.claimed_host_memory = info_.host_memory;
  }

  // A test may look at these, and set them, while the engine's device thread runs ops.
  // --- counts ---
  std::atomic<size_t> live_bytes{0};         // allocated and not freed
  std::atomic<int64_t> allocations{0};       // so far
  std::atomic<int64_t> ops{0};               // so far
  std::atomic<int64_t> synchronizations{0};  // so far
  std::atomic<int64_t> unordered_ops{0};     // so far: whose workspace allowed any order
  std::atomic<int64_t> steps{0};             // so far
  std::atomic<int64_t> repeated_steps{0};    // so far: with a key that their cache knew
  std::atomic<int64_t> forgotten{0};         // so far: times that steps were to be forgotten
  // The other backend may keep steps, whose ops then count and fail here only while they are
  // captured. Looked at when a stack is created.
  std::atomic<bool> keep_steps{false};
  // --- faults ---
  static constexpr size_t kAsItIs = SIZE_MAX;
  std::atomic<size_t> free_bytes{kAsItIs};      // what FreeBytes answers; kAsItIs: the inner one's
  std::atomic<int64_t> fail_allocation{-1};     // this Allocate from now on fails; 0 is the next
  std::atomic<int64_t> failing_allocations{1};  // so many from that one on
  std::atomic<int64_t> fail_op{-1};             // this op from now on fails; 0 is the next
  std::atomic<int64_t> hold_op{-1};             // this op from now on waits; 0 is the next
  std::atomic<bool> holding{false};             // it does, until a test makes this false
  void set_host_memory(bool host_memory) {
    info_.host_memory = host_memory;
    op_sizes_.claimed_host_memory = host_memory;
  }

  absl::StatusOr<void*> Allocate(size_t bytes) override {
    if (fail_allocation == 0) {
      if (--failing_allocations == 0) {
        fail_allocation = -1;
        failing_allocations = 1;
      }
      return absl::ResourceExhaustedError("allocation failed on demand");
    }
    if (fail_allocation > 0) --fail_allocation;
    absl::StatusOr<void*> data = inner_->Allocate(bytes);
    if (data.ok()) {
      ++allocations;
      live_bytes += bytes;
      sizes_[*data] = bytes;
    }
    return data;
  }
  void Free(void* data) override {
    live_bytes -= sizes_.at(data);
    sizes_.erase(data);
    inner_->Free(data);
  }
  absl::StatusOr<size_t> FreeBytes() const override {
    const size_t claimed = free_bytes;
    return claimed == kAsItIs ? inner_->FreeBytes() : absl::StatusOr<size_t>(claimed);
  }
  absl::Status RegisterHost(void* data, size_t bytes) override {
    return inner_->RegisterHost(data, bytes);
  }
  void UnregisterHost(void* data) override { inner_->UnregisterHost(data); }
  absl::Status CopyIn(void* dst, const void* src, size_t bytes) override {
    return inner_->CopyIn(dst, src, bytes);
  }
  absl::Status CopyOut(void* dst, const void* src, size_t bytes) override {
    return inner_->CopyOut(dst, src, bytes);
  }
  absl::Status CopyWithin(void* dst, const void* src, size_t bytes) override {
    if (log_ != nullptr) log_->Copy(dst, src, bytes);
    return inner_->CopyWithin(dst, src, bytes);
  }
  absl::Status SetZero(void* data, size_t bytes) override { return inner_->SetZero(data, bytes); }
  absl::Status Synchronize() override {
    ++synchronizations;
    return inner_->Synchronize();
  }
  absl::Status RecordMark(int mark) override { return inner_->RecordMark(mark); }
  absl::StatusOr<double> SecondsBetween(int begin, int end) override {
    return inner_->SecondsBetween(begin, end);
  }
  // Ranges as a profiler would see them, "(name:index" and ")"; looked at only while no call is on
  // its way.
  std::string ranges;
  void BeginRange(const char* name, int64_t index) override {
    ranges += std::string("(") + name + (index < 0 ? "" : ":" + std::to_string(index));
  }
  void EndRange() override { ranges += ")"; }
  const OpSizes& sizes() const override { return op_sizes_; }
  std::unique_ptr<StepCache> MakeStepCache() override {
    return std::make_unique<CheckedSteps>(
        *this, keep_steps ? inner_->MakeStepCache() : std::make_unique<StepCache>());
  }

 private:
  // The other backend's, but for what set_host_memory claims.
  struct Sizes final : public OpSizes {
    explicit Sizes(const OpSizes& inner) : sizes(inner) {}
    size_t AttentionSavedBytes(const LayerDims& dims) const override {
      return sizes.AttentionSavedBytes(dims);
    }
    size_t WorkspaceBytes(const LayerDims& dims) const override {
      return sizes.WorkspaceBytes(dims);
    }
    bool host_memory() const override { return claimed_host_memory; }
    bool FusedAttention(const LayerDims& dims) const override { return sizes.FusedAttention(dims); }
    size_t StepCacheBytes() const override { return sizes.StepCacheBytes(); }
    const OpSizes& sizes;
    bool claimed_host_memory = false;
  };

  class CheckedSteps final : public StepCache {
   public:
    CheckedSteps(CountingBackend& backend, std::unique_ptr<StepCache> inner)
        : backend_(backend), inner_(std::move(inner)) {}
    absl::Status Run(const Key& key, absl::FunctionRef<absl::Status()> work) override {
      ++backend_.steps;
      const auto known = logs_.find(key);
      if (known != logs_.end()) ++backend_.repeated_steps;
      StepLog log;
      absl::Status status = inner_->Run(key, [&] {
        log.Clear();
        backend_.log_ = &log;
        absl::Status result = work();
        backend_.log_ = nullptr;
        return result;
      });
      if (!status.ok() || log.empty()) return status;
      if (known == logs_.end()) {
        logs_.emplace(key, std::move(log));
      } else if (!(known->second == log)) {
        return absl::InternalError("a step enqueued other work than one before with its key");
      }
      return status;
    }
    void Forget() override {
      ++backend_.forgotten;
      logs_.clear();
      inner_->Forget();
    }

   private:
    CountingBackend& backend_;
    std::unique_ptr<StepCache> inner_;
    std::map<Key, StepLog> logs_;
  };

  template <typename Args>
  absl::Status Run(absl::Status (Backend::*op)(const Workspace&, const Args&), const Workspace& ws,
                   const Args& args) {
    if (fail_op >= 0 && fail_op-- == 0) return absl::InternalError("op failed on demand");
    if (hold_op >= 0 && hold_op-- == 0) {
      holding = true;
      while (holding) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ++ops;
    if (ws.unordered) ++unordered_ops;
    if (log_ != nullptr) log_->Op(ws, args);
    return (inner_.get()->*op)(ws, args);
  }
#define LAMINA_FORWARD_OP(Op)                                               \
  absl::Status Do##Op(const Workspace& ws, const Op##Args& args) override { \
    return Run(&Backend::Op, ws, args);                                     \
  }
  LAMINA_FORWARD_OP(Linear)
  LAMINA_FORWARD_OP(LinearInputGrad)
  LAMINA_FORWARD_OP(LinearWeightGrad)
  LAMINA_FORWARD_OP(Gelu)
  LAMINA_FORWARD_OP(GeluBackward)
  LAMINA_FORWARD_OP(LayerNorm)
  LAMINA_FORWARD_OP(LayerNormBackward)
  LAMINA_FORWARD_OP(DropoutAddNorm)
  LAMINA_FORWARD_OP(DropoutAddNormBackward)
  LAMINA_FORWARD_OP(Attention)
  LAMINA_FORWARD_OP(AttentionBackward)
  LAMINA_FORWARD_OP(Cast)
  LAMINA_FORWARD_OP(GradientStats)
  LAMINA_FORWARD_OP(AdamW)
  LAMINA_FORWARD_OP(Lamb)
#undef LAMINA_FORWARD_OP

  std::unique_ptr<Backend> inner_;
  Sizes op_sizes_;
  StepLog* log_ = nullptr;  // of the step that runs
  std::map<void*, size_t> sizes_;
};

}  // namespace lamina::testing
