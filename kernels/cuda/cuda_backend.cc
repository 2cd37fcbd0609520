#include "cuda_backend.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/attention.cuh"
#include "column_sum.cuh"
#include "cuda_sizes.h"
#include "elementwise/cast.cuh"
#include "elementwise/gelu.cuh"
#include "graph_cache.h"
#include "kernel_limits.h"
#include "norms/row_norm.cuh"
#include "nvtx.h"
#include "optimizer/lamb.cuh"
#include "optimizer/optimizer.cuh"
#include "products/gelu_product.cuh"
#include "products/product.h"
#include "shared_memory.h"

namespace lamina {
namespace {

using cuda::AttentionParams;
using cuda::DropoutParams;
using cuda::ProductArgs;
using cuda::ProductKind;
using cuda::RowNormBackwardParams;
using cuda::RowNormParams;
using cuda::SoftmaxRow;

static_assert(sizeof(cuda::Control) == sizeof(OptimizerControl) &&
                  offsetof(cuda::Control, grad_scale) == offsetof(OptimizerControl, grad_scale) &&
                  offsetof(cuda::Control, grad_norm) == offsetof(OptimizerControl, grad_norm) &&
                  offsetof(cuda::Control, skip) == offsetof(OptimizerControl, skip),
              "the kernels' view of OptimizerControl");
static_assert(sizeof(cuda::LambRange) == sizeof(LambSegment) &&
                  offsetof(cuda::LambRange, begin) == offsetof(LambSegment, begin) &&
                  offsetof(cuda::LambRange, end) == offsetof(LambSegment, end) &&
                  offsetof(cuda::LambRange, decay) == offsetof(LambSegment, decay) &&
                  offsetof(cuda::LambRange, adapt) == offsetof(LambSegment, adapt),
              "the kernels' view of LambSegment");

// Of what the driver calls free, this much may be out of Allocate's reach: a block takes whole
// pages of 2 MiB, and the rest of a page that something small lies in counts as free. A stack has
// fewer than ten blocks.
constexpr size_t kUnreachableBytes = size_t{32} << 20;

absl::Status CudaError(cudaError_t error, const char* what) {
  return absl::InternalError(
      absl::StrCat("cuda: ", what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
}

absl::Status Check(cudaError_t error, const char* what) {
  return error == cudaSuccess ? absl::OkStatus() : CudaError(error, what);
}

absl::Status CheckMark(int mark) {
  if (mark >= 0 && mark < Backend::kMarks) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("mark ", mark, " is not in [0, ", Backend::kMarks, ")"));
}

absl::Status NeedWorkspace(const Workspace& ws, size_t bytes, const char* op) {
  if (ws.bytes >= bytes && (ws.data != nullptr || bytes == 0)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": workspace has ", ws.bytes, " bytes, at least ", bytes, " are needed"));
}

// "GPU-01234567-89ab-cdef-0123-456789abcdef", as the driver prints it.
std::string UuidString(const cudaUUID_t& uuid) {
  std::string s = "GPU";
  for (int i = 0; i < 16; ++i) {
    if (i == 0 || i == 4 || i == 6 || i == 8 || i == 10) s += '-';
    absl::StrAppend(&s, absl::Hex(static_cast<uint32_t>(static_cast<unsigned char>(uuid.bytes[i])),
                                  absl::kZeroPad2));
  }
  return s;
}

DropoutParams DropoutOf(const Dropout& dropout) {
  DropoutParams p;
  if (dropout.ratio <= 0.0f) return p;
  p.rng = dropout.rng;
  p.stream = dropout.stream;
  p.threshold = KeepThreshold(dropout.ratio);
  p.scale = KeepScale(p.threshold);
  return p;
}

// The two dimensions of a matrix: all but the last one together, and the last one.
int64_t ColsOf(const TensorView& t) { return t.shape[t.shape.rank() - 1]; }
int64_t RowsOf(const TensorView& t) { return t.elements() / ColsOf(t); }

class CudaBackend final : public Backend {
 public:
  // Made in the order of the members; a failure leaves an object that can be destroyed.
  static absl::StatusOr<std::unique_ptr<Backend>> Create(DeviceInfo info);

  ~CudaBackend() override {
    // Nothing can be reported from here; a failed device fails the first call of whoever is next.
    static_cast<void>(cudaSetDevice(info_.ordinal));
    if (stream_ != nullptr) static_cast<void>(cudaStreamSynchronize(stream_));
    if (ahead_stream_ != nullptr) static_cast<void>(cudaStreamSynchronize(ahead_stream_));
    if (behind_stream_ != nullptr) static_cast<void>(cudaStreamSynchronize(behind_stream_));
    products_.reset();
    for (cudaEvent_t event : {ahead_there_, ahead_taken_, behind_there_, behind_taken_}) {
      if (event != nullptr) static_cast<void>(cudaEventDestroy(event));
    }
    for (cudaEvent_t event : marks_) {
      if (event != nullptr) static_cast<void>(cudaEventDestroy(event));
    }
    for (cudaStream_t stream : {stream_, ahead_stream_, behind_stream_}) {
      if (stream != nullptr) static_cast<void>(cudaStreamDestroy(stream));
    }
  }

  absl::StatusOr<void*> Allocate(size_t bytes) override;
  void Free(void* data) override;
  absl::StatusOr<size_t> FreeBytes() const override;
  absl::Status RegisterHost(void* data, size_t bytes) override;
  void UnregisterHost(void* data) override;
  absl::StatusOr<std::unique_ptr<SharedMemory>> AllocateShared(size_t bytes,
                                                               SharingKind kind) override {
    return cuda::AllocateShared(info_.ordinal, bytes, kind);
  }

  absl::Status CopyIn(void* device_dst, const void* host_src, size_t bytes) override {
    return Copy(device_dst, host_src, bytes, cudaMemcpyHostToDevice, "copy to the device");
  }
  absl::Status CopyOut(void* host_dst, const void* device_src, size_t bytes) override {
    return Copy(host_dst, device_src, bytes, cudaMemcpyDeviceToHost, "copy from the device");
  }
  absl::Status CopyWithin(void* device_dst, const void* device_src, size_t bytes) override {
    return Copy(device_dst, device_src, bytes, cudaMemcpyDeviceToDevice, "copy on the device");
  }
  absl::Status SetZero(void* data, size_t bytes) override;
  absl::Status Synchronize() override;
  absl::Status CopyInAhead(void* ahead, const void* host_src, size_t bytes, int mark) override;
  absl::Status TakeAhead(void* device_dst, const void* ahead, size_t bytes) override;
  absl::Status CopyOutBehind(void* host_dst, void* behind, const void* device_src, size_t bytes,
                             int mark) override;
  absl::Status JoinBehind() override;
  absl::Status Signal(uint64_t* at, uint64_t value) override;
  absl::Status RecordMark(int mark) override;
  absl::StatusOr<double> SecondsBetween(int begin, int end) override;
  absl::Status WaitMark(int mark) override;
  absl::StatusOr<bool> MarkPassed(int mark) override;

  void BeginRange(const char* name, int64_t index) override { cuda::BeginNvtxRange(name, index); }
  void EndRange() override { cuda::EndNvtxRange(); }

  const OpSizes& sizes() const override { return *sizes_; }

  absl::Status FinishSums(PendingSums& pending) override;

  std::unique_ptr<StepCache> MakeStepCache() override {
    return std::make_unique<cuda::GraphCache>(info_.ordinal, stream_);
  }

 private:
  explicit CudaBackend(DeviceInfo info) : sizes_(CudaOpSizes(info.threads)) {
    info_ = std::move(info);
  }

  absl::Status DoLinear(const Workspace& ws, const LinearArgs& args) override;
  absl::Status DoLinearInputGrad(const Workspace& ws, const LinearInputGradArgs& args) override;
  absl::Status DoLinearWeightGrad(const Workspace& ws, const LinearWeightGradArgs& args) override;
  absl::Status DoGelu(const Workspace& ws, const GeluArgs& args) override;
  absl::Status DoGeluBackward(const Workspace& ws, const GeluBackwardArgs& args) override;
  absl::Status DoLayerNorm(const Workspace& ws, const LayerNormArgs& args) override;
  absl::Status DoLayerNormBackward(const Workspace& ws, const LayerNormBackwardArgs& args) override;
  absl::Status DoDropoutAddNorm(const Workspace& ws, const DropoutAddNormArgs& args) override;
  absl::Status DoDropoutAddNormBackward(const Workspace& ws,
                                        const DropoutAddNormBackwardArgs& args) override;
  absl::Status DoAttention(const Workspace& ws, const AttentionArgs& args) override;
  absl::Status DoAttentionBackward(const Workspace& ws, const AttentionBackwardArgs& args) override;
  absl::Status DoCast(const Workspace& ws, const CastArgs& args) override;
  absl::Status DoGradientStats(const Workspace& ws, const GradientStatsArgs& args) override;
  absl::Status DoAdamW(const Workspace& ws, const AdamWArgs& args) override;
  absl::Status DoLamb(const Workspace& ws, const LambArgs& args) override;

  // The current device is a thread's own: set it in every call, whichever thread makes it.
  absl::Status UseDevice() const { return Check(cudaSetDevice(info_.ordinal), "cudaSetDevice"); }
  absl::Status Copy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind,
                    const char* what);
  absl::Status RunRowNorm(RowNormParams params, const char* op);
  absl::Status RunRowNormBackward(RowNormBackwardParams params, const Workspace& ws,
                                  const char* op);

  const std::unique_ptr<const OpSizes> sizes_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t ahead_stream_ = nullptr;   // of CopyInAhead
  cudaEvent_t ahead_there_ = nullptr;     // on it: the last one's end
  cudaEvent_t ahead_taken_ = nullptr;     // on stream_: the last TakeAhead's
  bool ahead_begun_ = false;              // since the last Synchronize
  cudaStream_t behind_stream_ = nullptr;  // of CopyOutBehind
  cudaEvent_t behind_there_ = nullptr;    // on stream_: the last one's result is in its buffer
  cudaEvent_t behind_taken_ = nullptr;    // on behind_stream_: and is copied
  bool behind_begun_ = false;             // since the last Synchronize
  std::array<cudaEvent_t, kMarks> marks_{};
  std::array<bool, kMarks> recorded_{};
  std::unique_ptr<cuda::Products> products_;
};

absl::StatusOr<std::unique_ptr<Backend>> CudaBackend::Create(DeviceInfo info) {
  std::unique_ptr<CudaBackend> backend(new CudaBackend(std::move(info)));
  absl::Status status =
      Check(cudaStreamCreateWithFlags(&backend->stream_, cudaStreamNonBlocking), "stream");
  for (cudaStream_t* stream : {&backend->ahead_stream_, &backend->behind_stream_}) {
    if (status.ok()) {
      status = Check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "stream");
    }
  }
  for (cudaEvent_t& event : backend->marks_) {
    if (status.ok()) status = Check(cudaEventCreate(&event), "event");
  }
  for (cudaEvent_t* event : {&backend->ahead_there_, &backend->ahead_taken_,
                             &backend->behind_there_, &backend->behind_taken_}) {
    if (status.ok()) {
      status = Check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "event");
    }
  }
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<cuda::Products>> products = cuda::Products::Create();
  if (!products.ok()) return products.status();
  backend->products_ = *std::move(products);
  return backend;
}

// --- memory ---

absl::StatusOr<void*> CudaBackend::Allocate(size_t bytes) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  void* data = nullptr;
  // cudaMalloc aligns to 256 bytes. It gives null for no bytes, which would read as an absent
  // tensor.
  const cudaError_t error = cudaMalloc(&data, std::max(bytes, size_t{1}));
  if (error == cudaSuccess) return data;
  if (error != cudaErrorMemoryAllocation) return CudaError(error, "cudaMalloc");
  static_cast<void>(cudaGetLastError());  // not sticky: the device works on
  size_t free_bytes = 0, total_bytes = 0;
  static_cast<void>(cudaMemGetInfo(&free_bytes, &total_bytes));
  return absl::ResourceExhaustedError(absl::StrCat("cuda:", info_.ordinal, ": ", bytes,
                                                   " bytes asked for, ", free_bytes, " of ",
                                                   total_bytes, " are free"));
}

void CudaBackend::Free(void* data) {
  if (data == nullptr || !UseDevice().ok()) return;
  static_cast<void>(cudaFree(data));
}

absl::StatusOr<size_t> CudaBackend::FreeBytes() const {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  size_t free_bytes = 0, total_bytes = 0;
  if (absl::Status status = Check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
      !status.ok()) {
    return status;
  }
  return free_bytes - std::min(free_bytes, kUnreachableBytes);
}

absl::Status CudaBackend::RegisterHost(void* data, size_t bytes) {
  if (data == nullptr || bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat("RegisterHost: no memory, ", bytes, " bytes"));
  }
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  const cudaError_t error =
      cudaHostRegister(data, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (error == cudaSuccess) return absl::OkStatus();
  static_cast<void>(cudaGetLastError());
  if (error == cudaErrorHostMemoryAlreadyRegistered) {
    return absl::AlreadyExistsError("RegisterHost: this memory is registered already");
  }
  if (error == cudaErrorMemoryAllocation) {
    return absl::ResourceExhaustedError(
        absl::StrCat("RegisterHost: ", bytes, " bytes can't be pinned"));
  }
  return CudaError(error, "cudaHostRegister");
}

void CudaBackend::UnregisterHost(void* data) {
  if (data == nullptr || !UseDevice().ok()) return;
  if (cudaHostUnregister(data) != cudaSuccess) static_cast<void>(cudaGetLastError());
}

absl::Status CudaBackend::Copy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind,
                               const char* what) {
  if (bytes == 0) return absl::OkStatus();
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  return Check(cudaMemcpyAsync(dst, src, bytes, kind, stream_), what);
}

absl::Status CudaBackend::SetZero(void* data, size_t bytes) {
  if (bytes == 0) return absl::OkStatus();
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  return Check(cudaMemsetAsync(data, 0, bytes, stream_), "set to zero");
}

absl::Status CudaBackend::Synchronize() {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  absl::Status status = Check(cudaStreamSynchronize(stream_), "synchronize");
  if (std::exchange(ahead_begun_, false)) {
    status.Update(Check(cudaStreamSynchronize(ahead_stream_), "synchronize"));
  }
  if (std::exchange(behind_begun_, false)) {
    status.Update(Check(cudaStreamSynchronize(behind_stream_), "synchronize"));
  }
  return status;
}

absl::Status CudaBackend::CopyInAhead(void* ahead, const void* host_src, size_t bytes, int mark) {
  if (absl::Status status = CheckMark(mark); !status.ok()) return status;
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  ahead_begun_ = true;
  // One that was never recorded is waited for by nobody.
  absl::Status status =
      Check(cudaStreamWaitEvent(ahead_stream_, ahead_taken_, 0), "copy ahead: wait");
  if (status.ok() && bytes > 0) {
    status = Check(cudaMemcpyAsync(ahead, host_src, bytes, cudaMemcpyHostToDevice, ahead_stream_),
                   "copy ahead");
  }
  for (cudaEvent_t event : {ahead_there_, marks_[static_cast<size_t>(mark)]}) {
    if (status.ok()) status = Check(cudaEventRecord(event, ahead_stream_), "copy ahead: event");
  }
  if (status.ok()) recorded_[static_cast<size_t>(mark)] = true;
  return status;
}

absl::Status CudaBackend::TakeAhead(void* device_dst, const void* ahead, size_t bytes) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  absl::Status status = Check(cudaStreamWaitEvent(stream_, ahead_there_, 0), "take ahead: wait");
  if (status.ok()) status = CopyWithin(device_dst, ahead, bytes);
  if (!status.ok()) return status;
  return Check(cudaEventRecord(ahead_taken_, stream_), "take ahead: event");
}

absl::Status CudaBackend::CopyOutBehind(void* host_dst, void* behind, const void* device_src,
                                        size_t bytes, int mark) {
  if (absl::Status status = CheckMark(mark); !status.ok()) return status;
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  behind_begun_ = true;
  absl::Status status = Check(cudaStreamWaitEvent(stream_, behind_taken_, 0), "copy behind: wait");
  if (status.ok()) status = CopyWithin(behind, device_src, bytes);
  if (status.ok()) status = Check(cudaEventRecord(behind_there_, stream_), "copy behind: event");
  if (status.ok()) {
    status = Check(cudaStreamWaitEvent(behind_stream_, behind_there_, 0), "copy behind: wait");
  }
  if (status.ok() && bytes > 0) {
    status = Check(cudaMemcpyAsync(host_dst, behind, bytes, cudaMemcpyDeviceToHost, behind_stream_),
                   "copy behind");
  }
  for (cudaEvent_t event : {behind_taken_, marks_[static_cast<size_t>(mark)]}) {
    if (status.ok()) status = Check(cudaEventRecord(event, behind_stream_), "copy behind: event");
  }
  if (status.ok()) recorded_[static_cast<size_t>(mark)] = true;
  return status;
}

absl::Status CudaBackend::JoinBehind() {
  if (!behind_begun_) return absl::OkStatus();
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  return Check(cudaStreamWaitEvent(stream_, behind_taken_, 0), "join the copies behind");
}

absl::Status CudaBackend::Signal(uint64_t* at, uint64_t value) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  const absl::Status written = cuda::WriteValue(stream_, at, value);
  if (!absl::IsUnimplemented(written)) return written;
  // Later than it could be, but never too early.
  if (absl::Status status = Synchronize(); !status.ok()) return status;
  return Backend::Signal(at, value);
}

// --- time ---

absl::Status CudaBackend::RecordMark(int mark) {
  if (absl::Status status = CheckMark(mark); !status.ok()) return status;
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  const auto index = static_cast<size_t>(mark);
  absl::Status status = Check(cudaEventRecord(marks_[index], stream_), "record a mark");
  if (status.ok()) recorded_[index] = true;
  return status;
}

absl::Status CudaBackend::WaitMark(int mark) {
  if (absl::Status status = CheckMark(mark); !status.ok()) return status;
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  return Check(cudaEventSynchronize(marks_[static_cast<size_t>(mark)]), "wait for a mark");
}

absl::StatusOr<bool> CudaBackend::MarkPassed(int mark) {
  if (absl::Status status = CheckMark(mark); !status.ok()) return status;
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  const cudaError_t error = cudaEventQuery(marks_[static_cast<size_t>(mark)]);
  if (error == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  if (error != cudaSuccess) return CudaError(error, "look at a mark");
  return true;
}

absl::StatusOr<double> CudaBackend::SecondsBetween(int begin, int end) {
  for (int mark : {begin, end}) {
    if (absl::Status status = CheckMark(mark); !status.ok()) return status;
    if (!recorded_[static_cast<size_t>(mark)]) {
      return absl::FailedPreconditionError(absl::StrCat("mark ", mark, " was never recorded"));
    }
  }
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  float milliseconds = 0.0f;
  const cudaError_t error = cudaEventElapsedTime(&milliseconds, marks_[static_cast<size_t>(begin)],
                                                 marks_[static_cast<size_t>(end)]);
  if (error == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return absl::FailedPreconditionError(
        absl::StrCat("marks ", begin, " and ", end, " have not both passed; synchronize first"));
  }
  if (error != cudaSuccess) return CudaError(error, "time between marks");
  return static_cast<double>(milliseconds) * 1e-3;
}

// --- products ---

absl::Status CudaBackend::DoLinear(const Workspace& ws, const LinearArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  if (args.apply_gelu) {
    cuda::GeluProductParams p;
    p.x = args.x.data;
    p.w = args.w.data;
    p.bias = args.bias.data;
    p.pre = args.pre.data;
    p.slope = args.slope.data;
    p.y = args.y.data;
    p.m = RowsOf(args.x);
    p.n = args.w.shape[0];
    p.k = ColsOf(args.x);
    p.tanh = args.gelu == GeluKind::kTanh;
    p.dtype = args.x.dtype;
    if (cuda::UseGeluProduct(p)) {
      return Check(cuda::LaunchGeluProduct(p, stream_), "Linear with gelu");
    }
  }
  const TensorView& kept = args.pre ? args.pre : args.slope;
  const TensorView& product = kept ? kept : args.y;
  absl::Status status = products_->Run(ProductArgs{.kind = ProductKind::kForward,
                                                   .m = RowsOf(args.x),
                                                   .n = args.w.shape[0],
                                                   .k = ColsOf(args.x),
                                                   .dtype = args.x.dtype,
                                                   .a = args.x.data,
                                                   .b = args.w.data,
                                                   .bias = args.bias.data,
                                                   .d = product.data,
                                                   .workspace = ws},
                                       stream_);
  if (!status.ok() || !args.apply_gelu) return status;
  cuda::GeluParams gelu;
  gelu.x = product.data;
  gelu.y = args.y.data;
  gelu.slope = args.slope.data;
  gelu.elements = args.y.elements();
  gelu.tanh = args.gelu == GeluKind::kTanh;
  gelu.dtype = args.y.dtype;
  return Check(cuda::LaunchGelu(gelu, stream_), "Linear: gelu");
}

// Where an op's partial sums [slices, cols] of dst stay for FinishSums; null: it finishes them.
float* LeaveSums(const Workspace& ws, float* dst, int64_t slices, int64_t cols) {
  if (ws.pending == nullptr || dst == nullptr || slices == 0) return nullptr;
  return ws.pending->Leave(&dst, 1, slices, cols);
}

absl::Status CudaBackend::DoLinearInputGrad(const Workspace& ws, const LinearInputGradArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  if (args.apply_gelu) {
    cuda::GeluProductBackwardParams p;
    p.dy = args.dy.data;
    p.w = args.w.data;
    p.slope = args.slope.data;
    p.pre = args.pre.data;
    p.y_again = args.y_again.data;
    p.dx = args.dx.data;
    p.dbias = args.dbias.as<float>();
    p.m = RowsOf(args.dy);
    p.n = ColsOf(args.w);
    p.k = ColsOf(args.dy);
    p.tanh = args.gelu == GeluKind::kTanh;
    p.dtype = args.dy.dtype;
    if (cuda::UseGeluProduct(p)) {
      const size_t needed = args.dbias ? cuda::GeluProductWorkspaceBytes(p.m, p.n) : 0;
      absl::Status status = NeedWorkspace(ws, needed, "LinearInputGrad");
      if (!status.ok()) return status;
      p.sums = LeaveSums(ws, p.dbias, cuda::GeluProductSlices(p.m), p.n);
      p.leave_sums = p.sums != nullptr;
      if (!p.leave_sums) p.sums = static_cast<float*>(ws.data);
      return Check(cuda::LaunchGeluProductBackward(p, stream_), "LinearInputGrad with gelu");
    }
  }
  absl::Status status = products_->Run(ProductArgs{.kind = ProductKind::kInputGrad,
                                                   .m = RowsOf(args.dy),
                                                   .n = ColsOf(args.w),
                                                   .k = ColsOf(args.dy),
                                                   .dtype = args.dy.dtype,
                                                   .a = args.dy.data,
                                                   .b = args.w.data,
                                                   .d = args.dx.data,
                                                   .accumulate = args.accumulate,
                                                   .workspace = ws},
                                       stream_);
  if (!status.ok() || !args.apply_gelu) return status;
  return DoGeluBackward(ws, {.slope = args.slope,
                             .x = args.pre,
                             .y_again = args.y_again,
                             .dy = args.dx,
                             .dx = args.dx,
                             .dbias = args.dbias,
                             .gelu = args.gelu});
}

absl::Status CudaBackend::DoLinearWeightGrad(const Workspace& ws,
                                             const LinearWeightGradArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  return products_->Run(ProductArgs{.kind = ProductKind::kWeightGrad,
                                    .m = ColsOf(args.dy),
                                    .n = ColsOf(args.x),
                                    .k = RowsOf(args.dy),
                                    .dtype = args.dy.dtype,
                                    .a = args.dy.data,
                                    .b = args.x.data,
                                    .d = args.dw.data,
                                    .workspace = ws},
                        stream_);
}

// --- gelu ---

absl::Status CudaBackend::DoGelu(const Workspace& /*ws*/, const GeluArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  cuda::GeluParams p;
  p.x = args.x.data;
  p.y = args.y.data;
  p.slope = args.slope.data;
  p.elements = args.x.elements();
  p.tanh = args.gelu == GeluKind::kTanh;
  p.dtype = args.x.dtype;
  return Check(cuda::LaunchGelu(p, stream_), "Gelu");
}

absl::Status CudaBackend::DoGeluBackward(const Workspace& ws, const GeluBackwardArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  const int64_t cols = ColsOf(args.dy);
  if (args.dbias) {
    absl::Status status =
        NeedWorkspace(ws, static_cast<size_t>(cols) * sizeof(float), "GeluBackward");
    if (!status.ok()) return status;
  }
  cuda::GeluBackwardParams p;
  p.slope = args.slope.data;
  p.x = args.x.data;
  p.y_again = args.y_again.data;
  p.dy = args.dy.data;
  p.dx = args.dx.data;
  p.dbias = args.dbias.as<float>();
  p.rows = RowsOf(args.dy);
  p.cols = cols;
  p.tanh = args.gelu == GeluKind::kTanh;
  p.dtype = args.dy.dtype;
  p.workspace = ws.data;
  p.workspace_bytes = ws.bytes;
  p.unordered = ws.unordered;
  p.multiprocessors = info_.threads;
  return Check(cuda::LaunchGeluBackward(p, stream_), "GeluBackward");
}

// --- norms ---

absl::Status CudaBackend::RunRowNorm(RowNormParams params, const char* op) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  if (params.cols > cuda::MaxRowNormCols()) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": hidden ", params.cols,
                                                   " is above this backend's limit of ",
                                                   cuda::MaxRowNormCols()));
  }
  params.multiprocessors = info_.threads;
  return Check(cuda::LaunchRowNorm(params, stream_), op);
}

absl::Status CudaBackend::RunRowNormBackward(RowNormBackwardParams params, const Workspace& ws,
                                             const char* op) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  absl::Status status = NeedWorkspace(ws, 3 * static_cast<size_t>(params.cols) * sizeof(float), op);
  if (!status.ok()) return status;
  params.workspace = ws.data;
  params.workspace_bytes = ws.bytes;
  params.pending = ws.pending;
  params.multiprocessors = info_.threads;
  return Check(cuda::LaunchRowNormBackward(params, stream_), op);
}

// What LayerNorm and DropoutAddNorm call the same, as do their backwards.
template <typename Args>
RowNormParams NormParams(const Args& args) {
  RowNormParams p;
  p.x = args.x.data;
  p.gamma = args.gamma.data;
  p.beta = args.beta.data;
  p.eps = args.eps;
  p.y = args.y.data;
  p.mean = args.mean.template as<float>();
  p.rstd = args.rstd.template as<float>();
  p.rows = RowsOf(args.x);
  p.cols = ColsOf(args.x);
  p.dtype = args.x.dtype;
  return p;
}

template <typename Args>
RowNormBackwardParams NormBackwardParams(const Args& args) {
  RowNormBackwardParams p;
  p.dy = args.dy.data;
  p.y = args.y.data;
  p.beta = args.beta.data;
  p.y_again = args.y_again.data;
  p.gamma = args.gamma.data;
  p.mean = args.mean.template as<float>();
  p.rstd = args.rstd.template as<float>();
  p.dgamma = args.dgamma.template as<float>();
  p.dbeta = args.dbeta.template as<float>();
  p.rows = RowsOf(args.dx);
  p.cols = ColsOf(args.dx);
  p.dtype = args.dx.dtype;
  return p;
}

absl::Status CudaBackend::DoLayerNorm(const Workspace& /*ws*/, const LayerNormArgs& args) {
  return RunRowNorm(NormParams(args), "LayerNorm");
}

absl::Status CudaBackend::DoLayerNormBackward(const Workspace& ws,
                                              const LayerNormBackwardArgs& args) {
  RowNormBackwardParams p = NormBackwardParams(args);
  p.dsum = args.residual_grad.data;
  p.sum = args.x.data;
  p.dsum_out = args.dx.data;
  return RunRowNormBackward(p, ws, "LayerNormBackward");
}

absl::Status CudaBackend::DoDropoutAddNorm(const Workspace& /*ws*/,
                                           const DropoutAddNormArgs& args) {
  RowNormParams p = NormParams(args);
  p.bias = args.bias.data;
  p.residual = args.residual.data;
  p.dropout = DropoutOf(args.dropout);
  p.sum = args.sum.data;
  return RunRowNorm(p, "DropoutAddNorm");
}

absl::Status CudaBackend::DoDropoutAddNormBackward(const Workspace& ws,
                                                   const DropoutAddNormBackwardArgs& args) {
  RowNormBackwardParams p = NormBackwardParams(args);
  p.dsum = args.dsum.data;
  p.sum = args.sum.data;
  p.dropout = DropoutOf(args.dropout);
  p.dsum_out = args.dresidual.data;
  p.dx = args.dx.data;
  p.dbias = args.dbias.as<float>();
  return RunRowNormBackward(p, ws, "DropoutAddNormBackward");
}

absl::Status CudaBackend::FinishSums(PendingSums& pending) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  const cudaError_t error = cuda::LaunchFinishColumnSums(pending, stream_);
  pending.Clear();
  return Check(error, "FinishSums");
}

// --- attention ---

// `saved` is bytes to everybody else.
absl::Status CheckSaved(const TensorView& saved, const char* op) {
  if (reinterpret_cast<uintptr_t>(saved.data) % alignof(SoftmaxRow) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": saved is not aligned to ", alignof(SoftmaxRow), " bytes"));
}

// Of words that warps write side by side: a line.
constexpr size_t kWordAlignment = 128;

// What AttentionArgs and AttentionBackwardArgs have in common.
template <typename Args>
AttentionParams AttentionParamsOf(const Args& args) {
  AttentionParams p;
  p.qkv = args.qkv.data;
  p.mask = args.mask.template as<const float>();
  p.lengths = args.lengths.template as<const int32_t>();
  p.cu_seqlens = args.cu_seqlens.template as<const int32_t>();
  p.causal = args.causal;
  p.scale = args.scale;
  p.dropout = DropoutOf(args.dropout);
  p.out = args.out.data;
  p.softmax = args.saved.template as<SoftmaxRow>();
  p.tokens = args.dims.tokens();
  p.batch = args.dims.batch;
  p.seq = args.dims.seq;
  p.heads = args.dims.heads;
  p.head_dim = args.dims.head_dim();
  p.width = args.dims.hidden;
  p.dtype = args.qkv.dtype;
  return p;
}

absl::Status CudaBackend::DoAttention(const Workspace& /*ws*/, const AttentionArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  if (absl::Status status = CheckSaved(args.saved, "Attention"); !status.ok()) return status;
  AttentionParams p = AttentionParamsOf(args);
  p.multiprocessors = info_.threads;
  return Check(cuda::LaunchAttention(p, stream_), "Attention");
}

absl::Status CudaBackend::DoAttentionBackward(const Workspace& ws,
                                              const AttentionBackwardArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  if (absl::Status status = CheckSaved(args.saved, "AttentionBackward"); !status.ok()) {
    return status;
  }
  AttentionParams p = AttentionParamsOf(args);
  p.multiprocessors = info_.threads;
  p.dout = args.dout.data;
  p.dqkv = args.dqkv.data;
  p.dbias = args.dbias.as<float>();
  const int64_t rows = p.tokens * p.heads;
  const int64_t cols = 3 * p.width;
  const bool one_pass = cuda::TakesOnePassBackward(p.dtype, p.seq, p.head_dim, info_.threads,
                                                   p.causal, p.dropout.rng != nullptr);
  const size_t delta_bytes = static_cast<size_t>(rows) * sizeof(float);
  if (args.dbias && cuda::BackwardSums(p)) {
    p.sum_slices = cuda::BiasSlices(p.tokens, p.batch, p.seq,
                                    one_pass ? cuda::kPassKeys : cuda::WgmmaBlockRows(p.head_dim));
  }
  const size_t sums_bytes = cuda::BiasSliceBytes(p.sum_slices, p.width);
  const size_t column_bytes = args.dbias ? static_cast<size_t>(cols) * sizeof(float) : 0;
  // With what is left; where that is less than the plan has, with fewer heads at a time.
  const size_t before =
      (delta_bytes + sums_bytes + kWordAlignment - 1) / kWordAlignment * kWordAlignment;
  const size_t turn_bytes = cuda::PassTurnBytes(info_.threads);
  const size_t own_bytes =
      one_pass ? before + turn_bytes + cuda::PassSumBytes(info_.threads) : delta_bytes + sums_bytes;
  absl::Status status = NeedWorkspace(ws, std::max(own_bytes, column_bytes), "AttentionBackward");
  if (!status.ok()) return status;
  p.delta = static_cast<float*>(ws.data);
  p.sums = LeaveSums(ws, p.dbias, p.sum_slices, cols);
  p.leave_sums = p.sums != nullptr;
  if (sums_bytes > 0 && !p.leave_sums) p.sums = p.delta + rows;
  const size_t kept_bytes =
      one_pass || args.dims.packed_tokens > 0 ? 0 : cuda::KeptBitsBytes(p.seq, p.batch * p.heads);
  if (p.dropout.rng != nullptr && kept_bytes > 0 && ws.bytes > before) {
    p.kept_bytes = std::min(kept_bytes, ws.bytes - before);
    if (p.kept_bytes >= cuda::KeptBitsBytes(p.seq))
      p.kept = reinterpret_cast<uint32_t*>(static_cast<char*>(ws.data) + before);
  }
  if (one_pass) {
    p.turns = reinterpret_cast<uint32_t*>(static_cast<char*>(ws.data) + before);
    p.query_sums = reinterpret_cast<float*>(static_cast<char*>(ws.data) + before + turn_bytes);
  }
  status = Check(cuda::LaunchAttentionBackward(p, stream_), "AttentionBackward");
  if (!status.ok() || !args.dbias || p.sums != nullptr) return status;
  cuda::ColumnSumArgs sums;
  sums.x = args.dqkv.data;
  sums.dst = p.dbias;
  sums.rows = p.tokens;
  sums.cols = cols;
  sums.dtype = p.dtype;
  sums.workspace = ws.data;
  sums.workspace_bytes = ws.bytes;
  sums.unordered = ws.unordered;
  sums.multiprocessors = info_.threads;
  return Check(cuda::LaunchColumnSum(sums, stream_), "AttentionBackward: dbias");
}

// --- casts and the optimizer ---

absl::Status CudaBackend::DoCast(const Workspace& /*ws*/, const CastArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  cuda::CastParams p;
  p.src = args.src.data;
  p.dst = args.dst.data;
  p.src_dtype = args.src.dtype;
  p.dst_dtype = args.dst.dtype;
  p.elements = args.src.elements();
  return Check(cuda::LaunchCast(p, stream_), "Cast");
}

absl::Status CudaBackend::DoGradientStats(const Workspace& ws, const GradientStatsArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  absl::Status status = NeedWorkspace(ws, cuda::kGradientStatsWorkspaceBytes, "GradientStats");
  if (!status.ok()) return status;
  cuda::GradientStatsParams p;
  p.grad = args.grad.as<const float>();
  p.elements = args.grad.elements();
  p.loss_scale = args.loss_scale;
  p.max_norm = args.max_norm;
  p.control = reinterpret_cast<cuda::Control*>(args.control);
  p.workspace = ws.data;
  return Check(cuda::LaunchGradientStats(p, stream_), "GradientStats");
}

absl::Status CudaBackend::DoAdamW(const Workspace& /*ws*/, const AdamWArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  cuda::AdamWParams p;
  p.master = args.master.as<float>();
  p.weights = args.weights.data;
  p.grad = args.grad.as<const float>();
  p.m = args.m.as<float>();
  p.v = args.v.as<float>();
  p.elements = args.master.elements();
  p.lr = args.lr;
  p.beta1 = args.beta1;
  p.beta2 = args.beta2;
  p.eps = args.eps;
  p.weight_decay = args.weight_decay;
  p.correction1 = args.correction1;
  p.correction2 = args.correction2;
  p.control = reinterpret_cast<const cuda::Control*>(args.control);
  p.dtype = args.weights.dtype;
  return Check(cuda::LaunchAdamW(p, stream_), "AdamW");
}

absl::Status CudaBackend::DoLamb(const Workspace& ws, const LambArgs& args) {
  if (absl::Status status = UseDevice(); !status.ok()) return status;
  const int64_t elements = args.master.elements();
  absl::Status status =
      NeedWorkspace(ws, cuda::LambWorkspaceBytes(elements, args.segment_count), "Lamb");
  if (!status.ok()) return status;
  cuda::LambParams p;
  p.master = args.master.as<float>();
  p.weights = args.weights.data;
  p.grad = args.grad.as<const float>();
  p.m = args.m.as<float>();
  p.v = args.v.as<float>();
  p.elements = elements;
  p.segments = reinterpret_cast<const cuda::LambRange*>(args.segments);
  p.segment_count = args.segment_count;
  p.lr = args.lr;
  p.beta1 = args.beta1;
  p.beta2 = args.beta2;
  p.eps = args.eps;
  p.weight_decay = args.weight_decay;
  p.correction1 = args.correction1;
  p.correction2 = args.correction2;
  p.min_ratio = args.min_ratio;
  p.max_ratio = args.max_ratio;
  p.control = reinterpret_cast<const cuda::Control*>(args.control);
  p.dtype = args.weights.dtype;
  p.workspace = ws.data;
  return Check(cuda::LaunchLamb(p, stream_), "Lamb");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(int ordinal) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return absl::NotFoundError(
        absl::StrCat("cuda:", ordinal, ": no usable CUDA device: ", cudaGetErrorString(error)));
  }
  if (ordinal < 0 || ordinal >= count) {
    return absl::NotFoundError(
        absl::StrCat("cuda:", ordinal, ": there are ", count, " CUDA devices, numbered from 0"));
  }
  if (absl::Status status = Check(cudaSetDevice(ordinal), "cudaSetDevice"); !status.ok()) {
    return status;
  }
  cudaDeviceProp properties{};
  if (absl::Status status =
          Check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
      !status.ok()) {
    return status;
  }
  if (properties.major != 9 || properties.minor != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("cuda:", ordinal, ": ", properties.name, " has compute capability ",
                     properties.major, ".", properties.minor, "; this build's kernels need 9.0"));
  }
  DeviceInfo info;
  info.kind = "cuda";
  info.name = properties.name;
  info.uuid = UuidString(properties.uuid);
  info.ordinal = ordinal;
  info.total_bytes = properties.totalGlobalMem;
  info.threads = properties.multiProcessorCount;
  info.host_memory = false;
  return CudaBackend::Create(std::move(info));
}

}  // namespace lamina
