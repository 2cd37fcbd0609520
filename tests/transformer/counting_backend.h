// A backend that hands everything to another one and keeps count: what is allocated, how many ops
// ran. It can fail on demand. A step whose key promises what another one enqueued, and which
// enqueues something else, fails with INTERNAL.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

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
  std::atomic<int64_t> host_copies{0};       // so far: CopyIn and CopyOut
  std::atomic<int64_t> ahead_copies{0};      // so far: CopyInAhead
  std::atomic<int64_t> ahead_taken{0};       // so far: TakeAhead
  std::atomic<int64_t> behind_copies{0};     // so far: CopyOutBehind
  std::atomic<int64_t> mark_waits{0};        // so far: WaitMark
  std::atomic<size_t> shared_bytes{0};       // of AllocateShared, not freed
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
  // What was enqueued is done at once, but a test may have it look as if the device was slow:
  std::atomic<int64_t> mark_us{0};      // each mark passes so long after the one before it
  std::atomic<bool> late_marks{false};  // none has passed yet; who waits for one does not wait long
  std::atomic<bool> hold_marks{false};  // none passes until a test makes this false
  std::atomic<bool> fail_marks{false};  // the device fails instead
  std::atomic<bool> fail_shared{false};  // AllocateShared
  std::atomic<int64_t> fail_op{-1};      // this op from now on fails; 0 is the next
  std::atomic<int64_t> hold_op{-1};      // this op from now on waits; 0 is the next
  std::atomic<bool> holding{false};      // it does, until a test makes this false
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
  // Of an ordinary memfd, which stands for what a driver would export; a handle is its descriptor's
  // number and nothing more.
  absl::StatusOr<std::unique_ptr<SharedMemory>> AllocateShared(size_t bytes,
                                                               SharingKind kind) override {
    if (info_.host_memory) return Backend::AllocateShared(bytes, kind);
    if (fail_shared) return absl::ResourceExhaustedError("sharing failed on demand");
    return std::make_unique<FakeShared>(*this, (bytes + kSharingUnit - 1) / kSharingUnit, kind);
  }
  absl::Status CopyIn(void* dst, const void* src, size_t bytes) override {
    ++host_copies;
    return inner_->CopyIn(dst, src, bytes);
  }
  absl::Status CopyOut(void* dst, const void* src, size_t bytes) override {
    ++host_copies;
    return inner_->CopyOut(dst, src, bytes);
  }
  absl::Status CopyWithin(void* dst, const void* src, size_t bytes) override {
    if (log_ != nullptr) log_->Copy(dst, src, bytes);
    return inner_->CopyWithin(dst, src, bytes);
  }
  absl::Status CopyInAhead(void* ahead, const void* src, size_t bytes, int mark) override {
    ++ahead_copies;
    Passes(mark);
    return inner_->CopyInAhead(ahead, src, bytes, mark);
  }
  absl::Status TakeAhead(void* dst, const void* ahead, size_t bytes) override {
    ++ahead_taken;
    return inner_->TakeAhead(dst, ahead, bytes);
  }
  // As late as a card may be with it.
  absl::Status CopyOutBehind(void* dst, void* behind, const void* src, size_t bytes,
                             int mark) override {
    ++behind_copies;
    absl::Status status = inner_->CopyWithin(behind, src, bytes);
    if (!status.ok()) return status;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      behind_.push_back({mark, dst, std::string(static_cast<const char*>(behind), bytes)});
    }
    return RecordMark(mark);
  }
  absl::Status JoinBehind() override {
    Arrive(-1);
    return absl::OkStatus();
  }
  absl::Status SetZero(void* data, size_t bytes) override { return inner_->SetZero(data, bytes); }
  absl::Status Synchronize() override {
    ++synchronizations;
    std::this_thread::sleep_until(Passes(-1));
    Arrive(-1);
    return inner_->Synchronize();
  }
  absl::Status RecordMark(int mark) override {
    Passes(mark);
    return inner_->RecordMark(mark);
  }
  absl::StatusOr<double> SecondsBetween(int begin, int end) override {
    return inner_->SecondsBetween(begin, end);
  }
  absl::Status WaitMark(int mark) override {
    ++mark_waits;
    while (hold_marks) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_until(passes_at(mark));
    if (fail_marks) return absl::InternalError("a mark failed on demand");
    Arrive(mark);
    return inner_->WaitMark(mark);
  }
  absl::StatusOr<bool> MarkPassed(int mark) override {
    if (late_marks || hold_marks || Clock::now() < passes_at(mark)) return false;
    Arrive(mark);
    return inner_->MarkPassed(mark);
  }
  absl::Status FinishSums(PendingSums& pending) override { return inner_->FinishSums(pending); }
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
    size_t PendingSumBytes(const LayerDims& dims) const override {
      return sizes.PendingSumBytes(dims);
    }
    bool host_memory() const override { return claimed_host_memory; }
    bool FusedAttention(const LayerDims& dims) const override { return sizes.FusedAttention(dims); }
    size_t StepCacheBytes() const override { return sizes.StepCacheBytes(); }
    const OpSizes& sizes;
    bool claimed_host_memory = false;
  };

  class FakeShared final : public SharedMemory {
   public:
    FakeShared(CountingBackend& backend, size_t units, SharingKind kind)
        : backend_(backend),
          bytes_(units * kSharingUnit),
          kind_(kind),
          descriptor_(memfd_create("lamina-fake-device", MFD_CLOEXEC)) {
      if (descriptor_ < 0 || ftruncate(descriptor_, static_cast<off_t>(bytes_)) != 0)
        throw std::bad_alloc();
      data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
      if (data_ == MAP_FAILED) throw std::bad_alloc();
      if (kind == SharingKind::kIpcHandle) {
        handle_ = std::to_string(descriptor_);
        handle_.resize(64);
      }
      backend_.shared_bytes += bytes_;
    }
    ~FakeShared() override {
      munmap(data_, bytes_);
      close(descriptor_);
      backend_.shared_bytes -= bytes_;
    }
    void* data() const override { return data_; }
    size_t bytes() const override { return bytes_; }
    int descriptor() const override { return kind_ == SharingKind::kIpcHandle ? -1 : descriptor_; }
    const std::string& handle() const override { return handle_; }

   private:
    CountingBackend& backend_;
    const size_t bytes_;
    const SharingKind kind_;
    const int descriptor_;
    void* data_ = nullptr;
    std::string handle_;
  };

  class CheckedSteps final : public StepCache {
   public:
    CheckedSteps(CountingBackend& backend, std::unique_ptr<StepCache> inner)
        : backend_(backend), inner_(std::move(inner)) {}
    absl::Status Run(const Key& kind, const Key& key, int64_t parts,
                     absl::FunctionRef<absl::Status(int64_t)> part) override {
      ++backend_.steps;
      const auto known = logs_.find(key);
      if (known != logs_.end()) ++backend_.repeated_steps;
      std::vector<StepLog> log(static_cast<size_t>(parts));
      absl::Status status = inner_->Run(kind, key, parts, [&](int64_t i) {
        StepLog& own = log[static_cast<size_t>(i)];
        own.Clear();
        backend_.log_ = &own;
        absl::Status result = part(i);
        backend_.log_ = nullptr;
        return result;
      });
      const bool replayed = std::all_of(log.begin(), log.end(),
                                        [](const StepLog& part_log) { return part_log.empty(); });
      if (!status.ok() || replayed) return status;
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
    std::map<Key, std::vector<StepLog>> logs_;
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

  using Clock = std::chrono::steady_clock;
  // When what is enqueued so far is done; as of now, of this mark.
  Clock::time_point Passes(int mark) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (mark < 0) return busy_until_;
    if (mark_us > 0)
      busy_until_ = std::max(busy_until_, Clock::now()) + std::chrono::microseconds(mark_us);
    if (mark < kMarks) passes_[static_cast<size_t>(mark)] = busy_until_;
    return busy_until_;
  }
  Clock::time_point passes_at(int mark) {
    std::lock_guard<std::mutex> lock(mutex_);
    return passes_.at(static_cast<size_t>(mark));
  }
  // Ends the copies behind, up to the last one of `mark` if that has one; -1: all.
  void Arrive(int mark) {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t count = mark < 0 ? behind_.size() : 0;
    for (size_t i = 0; i < behind_.size(); ++i)
      if (behind_[i].mark == mark) count = i + 1;
    for (size_t i = 0; i < count; ++i)
      std::memcpy(behind_[i].dst, behind_[i].bytes.data(), behind_[i].bytes.size());
    behind_.erase(behind_.begin(), behind_.begin() + static_cast<std::ptrdiff_t>(count));
  }
  struct Behind {
    int mark;
    void* dst;
    std::string bytes;
  };

  std::unique_ptr<Backend> inner_;
  std::mutex mutex_;
  std::vector<Behind> behind_;                      // guarded by mutex_: on their way
  Clock::time_point busy_until_;                    // guarded by mutex_
  std::array<Clock::time_point, kMarks> passes_{};  // guarded by mutex_
  Sizes op_sizes_;
  StepLog* log_ = nullptr;  // of the step that runs
  std::map<void*, size_t> sizes_;
};

}  // namespace lamina::testing
