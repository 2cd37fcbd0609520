// The op set: everything that a transformer layer needs of a device, at the granularity at which
// fused kernels exist. The layer is written once over this class; `cpu` and `cuda` implement it.
//
// Letters: B batch, S sequence, T = B*S tokens, H hidden, A heads, D = H/A head dim, I
// intermediate, K and N a product's reduction and output widths. "act" is the stack's dtype (fp32,
// bf16, fp16); every product, reduction, softmax and normalisation accumulates in fp32 whatever act
// is. All tensors are dense, row-major, and live in this backend's memory (on the CPU: any host
// memory).
//
// Conventions. Each public method checks presence, shapes and dtypes and returns INVALID_ARGUMENT
// naming the tensor; then it calls the private virtual of the same name with `Do` before it, which
// may rely on the check. Ops are enqueued in order on the backend's one stream and may return
// before they have run; Synchronize() waits. A device failure surfaces at a later call as INTERNAL
// and is sticky. Inputs may not alias outputs except where an Args comment says so. Gradients of
// parameters are fp32 and are added to what is there. Every result is a function of the inputs
// alone: the same call on the same device gives the same bits (deterministic reductions), unless
// Workspace::unordered allows otherwise.
//
// Threads: one thread at a time may call ops (the engine's device thread). Memory methods may be
// called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/dtype.h"
#include "lamina/kernels/pending_sums.h"
#include "lamina/kernels/philox.h"
#include "lamina/kernels/tensor.h"

namespace lamina {

enum class GeluKind : uint8_t {
  kErf = 1,   // x * Phi(x), Phi the normal distribution function: BERT's
  kTanh = 2,  // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): DeepSpeed's
};

struct DeviceInfo {
  std::string kind;  // "cpu" or "cuda"
  std::string name;  // the processor's or the card's own name
  std::string uuid;  // "GPU-..." as the driver prints it; empty on the CPU
  int ordinal = 0;
  size_t total_bytes = 0;
  int threads = 0;           // worker threads (CPU), multiprocessors (CUDA)
  bool host_memory = false;  // kernels read and write host memory directly: no staging is needed
};

// Scratch that an op may overwrite; WorkspaceBytes says how much is enough. Aligned to 256 bytes.
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
  // Sums over tokens may be added in any order (DeepSpeed's stochastic_mode): parameter gradients
  // may then differ in their last bits from run to run. A backend that gains nothing ignores it:
  // the CPU's does, whose ordered sums are the fastest.
  bool unordered = false;
  // Ops that sum over tokens may leave their last additions to FinishSums, which makes them for all
  // of them at once: dbias, dgamma and dbeta are theirs only then. The bits are the same. Null, or
  // without room for them: every op finishes its own.
  PendingSums* pending = nullptr;
};

// The dimensions that decide workspace and saved bytes.
//
// A packed batch has no padding: its sequences lie one after the other, and T is the sum of their
// lengths. packed_tokens is then T, `batch` the number of sequences, `seq` the longest one's
// length.
struct LayerDims {
  int64_t batch = 0, seq = 0, hidden = 0, heads = 0, intermediate = 0;
  DType dtype = DType::kF32;
  int64_t packed_tokens = 0;  // 0: not packed
  int64_t tokens() const { return packed_tokens > 0 ? packed_tokens : batch * seq; }
  int64_t head_dim() const { return hidden / heads; }
};

// One dropout of one training step. ratio 0 means none, and then `rng` may be null.
struct Dropout {
  float ratio = 0.0f;             // p in [0, 1)
  const RngState* rng = nullptr;  // in the backend's memory; read when the kernel runs
  uint32_t stream = 0;            // DropoutStream(layer, site)
};

// y = x w^T + bias, or gelu of that.
struct LinearArgs {
  TensorView x;     // act [T, K]
  TensorView w;     // act [N, K]
  TensorView bias;  // act [N]; absent: none
  TensorView y;     // act [T, N]
  bool apply_gelu = false;
  GeluKind gelu = GeluKind::kErf;
  // What Backward needs of the pre-activation x w^T + bias: one of the two, only with apply_gelu;
  // neither in evaluation. With either, y is gelu of the pre-activation as act has it.
  TensorView slope;  // act [T, N]: receives gelu' of the pre-activation as act has it
  TensorView pre;    // act [T, N]: receives it itself, of which y can be made again
};

// dx = dy w, or with accumulate dx + dy w, whose product may be rounded to act by itself;  with
// apply_gelu dx = (dy w) * slope, and dbias += column sums of dx: the gradients of the
// pre-activation and of its bias.
//
// With pre in the place of slope: slope is gelu'(pre), rounded to act, so that dx has the same
// bits; and y_again is gelu(pre), with the bits of Linear's y.
struct LinearInputGradArgs {
  TensorView dy;            // act [T, N]
  TensorView w;             // act [N, K]
  TensorView dx;            // act [T, K], overwritten, or with accumulate added to
  bool accumulate = false;  // not with apply_gelu
  bool apply_gelu = false;
  GeluKind gelu = GeluKind::kErf;
  TensorView slope;    // act [T, K], with apply_gelu alone: Linear's; absent: pre is there instead
  TensorView pre;      // act [T, K], with apply_gelu alone: Linear's
  TensorView y_again;  // act [T, K], present exactly where pre is. May be pre
  TensorView dbias;    // fp32 [K], only with apply_gelu, accumulated; absent: none
};

// dw += dy^T x. The biases' gradients are added to by the ops that make dy.
struct LinearWeightGradArgs {
  TensorView dy;  // act [T, N]
  TensorView x;   // act [T, K]
  TensorView dw;  // fp32 [N, K], accumulated
};

// y = gelu(x), slope = gelu'(x): what Linear's apply_gelu is where a backend has no such product.
struct GeluArgs {
  TensorView x;      // act [T, I]
  TensorView y;      // act [T, I]; may be x
  TensorView slope;  // act [T, I]; may be x where y is not; absent: not wanted
  GeluKind gelu = GeluKind::kErf;
};

// dx = dy * slope;  dbias += column sums of dx: LinearInputGrad's, likewise. With x, the
// pre-activation, in the place of slope: slope is gelu'(x), rounded to act, and y_again is gelu(x).
struct GeluBackwardArgs {
  TensorView slope;    // act [T, I]: Gelu's; absent: x is there instead
  TensorView x;        // act [T, I]
  TensorView y_again;  // act [T, I], present exactly where x is. May be x
  TensorView dy;       // act [T, I]
  TensorView dx;       // act [T, I], overwritten; may be dy
  TensorView dbias;    // fp32 [I], accumulated; absent: none
  GeluKind gelu = GeluKind::kErf;
};

// y = (x - mean) * rstd * gamma + beta over the last dimension, rstd = 1/sqrt(var + eps), biased
// var.
struct LayerNormArgs {
  TensorView x;      // act [T, H]
  TensorView gamma;  // act [H]
  TensorView beta;   // act [H]
  float eps = 1e-12f;
  TensorView y;     // act [T, H]
  TensorView mean;  // fp32 [T]; absent in evaluation
  TensorView rstd;  // fp32 [T]; absent in evaluation
};

// dx = d(LayerNorm)/dx . dy + residual_grad;  dgamma, dbeta accumulated.
//
// Of the normalised values (x - mean) * rstd there are two sources: x, mean and rstd; or, where x
// is absent (normalize_invertible), the norm's output as (y - beta) / gamma, with rstd alone. The
// caller has seen to it that no |gamma| is too small for that.
//
// From x the norm's output can be had again in the same pass, so that nobody needs to keep it: with
// the forward's mean, rstd, gamma and beta, y_again has its y's bits.
struct LayerNormBackwardArgs {
  TensorView dy;             // act [T, H]
  TensorView x;              // act [T, H]: the norm's input; absent: y and beta are there instead
  TensorView y;              // act [T, H]: the norm's output; only without x
  TensorView beta;           // act [H]; only without x or with y_again
  TensorView y_again;        // act [T, H]; only with x. May be dy. Absent: not wanted
  TensorView gamma;          // act [H]
  TensorView mean;           // fp32 [T]; only with x
  TensorView rstd;           // fp32 [T]
  TensorView residual_grad;  // act [T, H]; absent: zero. May be dx
  TensorView dx;             // act [T, H], overwritten
  TensorView dgamma;         // fp32 [H], accumulated
  TensorView dbeta;          // fp32 [H], accumulated
};

// sum = residual + dropout(x + bias); and, where gamma is present, y = LayerNorm(sum) in the same
// pass, of the sum as act has it, whether it is stored or not: LayerNorm of a stored sum has y's
// bits. The mask is over [T, H].
struct DropoutAddNormArgs {
  TensorView x;         // act [T, H]: an output product without its bias
  TensorView bias;      // act [H]
  TensorView residual;  // act [T, H]
  Dropout dropout;
  TensorView sum;  // act [T, H]; absent only where gamma is present (Post-LN evaluation). May be x
  TensorView gamma;  // act [H]; absent: no norm
  TensorView beta;   // act [H]
  float eps = 1e-12f;
  TensorView y;     // act [T, H]; present exactly when gamma is
  TensorView mean;  // fp32 [T]; absent in evaluation
  TensorView rstd;  // fp32 [T]; absent in evaluation
};

// With ds = d(LayerNorm)/d(sum) . dy + dsum:
//   dresidual = ds;  dx = mask * scale * ds;  dbias += column sums of dx;  dgamma, dbeta
//   accumulated.
// Where dresidual is wanted, dx and dbias are of ds as act has it: the same op of dresidual alone,
// as dsum, has their bits.
struct DropoutAddNormBackwardArgs {
  TensorView dy;  // act [T, H]: gradient of the norm's output; absent where Forward had no norm
  TensorView
      dsum;  // act [T, H]: gradient of sum by its other uses; absent: zero. One of the two at least
  TensorView sum;      // act [T, H]: only with dy; absent: y and beta are there instead, as in
                       // LayerNormBackwardArgs
  TensorView y;        // act [T, H]: the norm's output; only with dy and without sum
  TensorView beta;     // act [H]: only with dy, and without sum or with y_again
  TensorView y_again;  // act [T, H]; only with dy and sum, as in LayerNormBackwardArgs. May be dy
  TensorView gamma;    // act [H]: only with dy
  TensorView mean;     // fp32 [T]: only with dy and sum
  TensorView rstd;     // fp32 [T]: only with dy
  Dropout dropout;
  TensorView dresidual;  // act [T, H]; may be dsum. Absent: not wanted (it equals dsum without dy)
  TensorView dx;         // act [T, H]
  TensorView dbias;      // fp32 [H], accumulated
  TensorView dgamma;     // fp32 [H], accumulated: only with dy
  TensorView dbeta;      // fp32 [H], accumulated: only with dy
};

// out = dropout(softmax(q k^T * scale + mask)) v, head by head. A query whose keys are all masked
// out (-inf) gives zeros, and passes no gradient.
//
// Packed batches: sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1]), and attends to itself
// alone. Its masks' rows are cu_seqlens[b] * A + a * length + s, which for equal lengths is what it
// is without packing; so is the order of what is saved.
struct AttentionArgs {
  LayerDims dims;
  TensorView qkv;   // act [T, 3H]: q in columns [0, H), k in [H, 2H), v in [2H, 3H); head a at a*D
  TensorView mask;  // fp32 [B, S], added to the scores of each key; absent: none
  TensorView lengths;     // int32 [B], 1..S: keys at and after lengths[b] are masked out; absent:
                          // none. Not both. Rows of padded queries are computed like any other
  TensorView cu_seqlens;  // int32 [B + 1]: 0 first, T last, each step in [1, dims.seq] (the caller
                          // has checked). Present exactly where the batch is packed, and then
                          // neither mask nor lengths is
  bool causal = false;    // query s sees keys 0..s of its sequence alone
  float scale = 1.0f;     // 1/sqrt(D)
  Dropout dropout;        // mask over [B*A*S, S], or [A*T, S] where packed
  TensorView out;         // act [T, H]
  TensorView saved;  // uint8 [AttentionSavedBytes], aligned to 16: what Backward needs; absent in
                     // evaluation
};

// dbias += column sums of dqkv
struct AttentionBackwardArgs {
  LayerDims dims;
  TensorView qkv, mask, lengths, cu_seqlens;  // as in Forward
  bool causal = false;
  float scale = 1.0f;
  Dropout dropout;
  TensorView out;    // act [T, H]: Forward's output
  TensorView saved;  // uint8: Forward's
  TensorView dout;   // act [T, H]
  TensorView dqkv;   // act [T, 3H], overwritten
  TensorView dbias;  // fp32 [3H], accumulated; absent: none
};

struct CastArgs {
  TensorView src;  // act or fp32 [n], any shape
  TensorView dst;  // act or fp32, as many elements; rounds to nearest even
};

// What GradientStats leaves in the backend's memory for AdamW to read, without a synchronisation.
struct OptimizerControl {
  float grad_scale;  // what each gradient is multiplied by: clip / loss_scale
  float grad_norm;   // L2 norm of grad / loss_scale, before clipping; not finite if any gradient is
                     // not
  int32_t skip;      // 1 where a gradient was not finite: AdamW then changes nothing
  int32_t reserved;
};

struct GradientStatsArgs {
  TensorView grad;                      // fp32 [n]
  float loss_scale = 1.0f;              // > 0
  float max_norm = 0.0f;                // clip to this L2 norm; 0: no clipping
  OptimizerControl* control = nullptr;  // in the backend's memory
};

// AdamW with decoupled decay (Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
// 2019):
//   g = grad * grad_scale;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//   w = w - lr * (weight_decay * w + (m / correction1) / (sqrt(v / correction2) + eps))
struct AdamWArgs {
  TensorView master;  // fp32 [n]
  TensorView
      weights;  // act [n], written from master; absent where act is fp32 (master is the weights)
  TensorView grad;  // fp32 [n]
  TensorView m, v;  // fp32 [n]
  float lr = 0, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0;
  float correction1 = 1, correction2 = 1;     // 1 - beta^t
  const OptimizerControl* control = nullptr;  // in the backend's memory
};

// A parameter tensor in the flat buffers of a LAMB step.
struct LambSegment {
  int64_t begin = 0, end = 0;  // elements
  int32_t decay = 1;           // 0: no weight decay
  int32_t adapt = 1;           // 0: no trust ratio, as for biases and norms
};

// LAMB (You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
// 2020, Algorithm 2), for each segment:
//   g = grad * grad_scale;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//   u = (m / correction1) / (sqrt(v / correction2) + eps) + weight_decay * w
//   w = w - lr * ratio * u,  ratio = ||w|| / ||u||, clamped; 1, whatever the clamps, where either
//   norm is 0 or adapt is 0
// Elements outside every segment stay as they are.
struct LambArgs {
  TensorView master;                      // fp32 [n]
  TensorView weights;                     // act [n], written from master; absent where act is fp32
  TensorView grad;                        // fp32 [n]
  TensorView m, v;                        // fp32 [n]
  const LambSegment* segments = nullptr;  // in the backend's memory, ascending, not overlapping
  int64_t segment_count = 0;
  float lr = 0, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-6f, weight_decay = 0;
  float correction1 = 1, correction2 = 1;     // 1 - beta^t
  float min_ratio = 0, max_ratio = 0;         // clamp the ratio to these; max 0: no clamp above
  const OptimizerControl* control = nullptr;  // in the backend's memory
};

// What the plan must know of a backend: pure functions, there on machines without the device.
class OpSizes {
 public:
  // "cpu", or "cuda": a Hopper card of 132 multiprocessors. INVALID_ARGUMENT for anything else.
  // `threads`: CPU worker threads, 0 for one a core (OMP_NUM_THREADS at most).
  static absl::StatusOr<std::unique_ptr<const OpSizes>> Of(const std::string& kind,
                                                           int threads = 0);
  virtual ~OpSizes() = default;

  // What Attention saves for its Backward.
  virtual size_t AttentionSavedBytes(const LayerDims& dims) const = 0;
  // Enough for any op at these dims, for GradientStats and Lamb of any length too.
  virtual size_t WorkspaceBytes(const LayerDims& dims) const = 0;
  // Enough for what the ops of one layer's backward leave to FinishSums. 0: they leave nothing.
  virtual size_t PendingSumBytes(const LayerDims& /*dims*/) const { return 0; }
  // Kernels read and write host memory directly: no staging is needed.
  virtual bool host_memory() const = 0;
  // Whether Attention at these dims has its fused kernel, or the plain one that every shape has.
  virtual bool FusedAttention(const LayerDims& dims) const = 0;
  // Device memory that a StepCache may take, beside what Allocate gives. 0: its steps take none.
  virtual size_t StepCacheBytes() const = 0;
};

// For steps that come back with the same launches: a device that can keep a step's launches does so
// when it meets its key again, and replays them from then on. Of steps that are alike but for sizes
// and addresses it can keep launches too, and change what differs. The results have the same bits
// in any case. This class keeps nothing and runs every step.
//
// Made by Backend::MakeStepCache, owned by whoever owns the memory that its steps use, and gone
// before the backend. Threads: as ops.
class StepCache {
 public:
  // All that decides which ops a step enqueues and with which arguments, addresses included.
  using Key = std::vector<uint64_t>;

  virtual ~StepCache() = default;
  // Enqueues what part(0) to part(parts - 1) enqueue, in this order, or what they did when they
  // last ran with this key. A part may thus run once, twice or not at all: it calls ops, CopyWithin
  // and SetZero and changes nothing else, nor does it need an earlier part to have run. What
  // differs from one such step to the next must be read from the backend's memory. Steps of one
  // `kind` enqueue much the same ops, part by part, with other arguments. The status is that of
  // parts that ran plainly: where a device can't keep a step, that is no error.
  virtual absl::Status Run(const Key& kind, const Key& key, int64_t parts,
                           absl::FunctionRef<absl::Status(int64_t)> part);
  // The same keys will mean other launches from now on, or other contents of the addresses in them.
  virtual void Forget() {}
};

// How another process comes to memory of the device.
enum class SharingKind : uint8_t {
  kDescriptor = 1,  // a POSIX file descriptor, which it imports and maps (CUDA's virtual memory)
  kIpcHandle = 2,   // bytes that it opens (CUDA IPC), where it can't map
};

// Device memory that another process may map, all zeros at first; freed by the destructor, once
// nothing that was enqueued uses it. What the other one still maps by descriptor stays its own.
// Threads: any.
class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
  virtual void* data() const = 0;  // here; aligned to kSharingUnit
  virtual size_t bytes() const = 0;
  virtual int descriptor() const = 0;             // kDescriptor: owned by this; else -1
  virtual const std::string& handle() const = 0;  // kIpcHandle: 64 bytes; else empty
};
// Shared memory comes in multiples of it: a smaller part of a page could not be kept apart from
// what else lies there.
inline constexpr size_t kSharingUnit = size_t{2} << 20;

class Backend {
 public:
  // `device` is "cpu" or "cuda:N". UNIMPLEMENTED for cuda in a build without it; NOT_FOUND where
  // there is no such device. `threads`: CPU worker threads, 0 for one a core (OMP_NUM_THREADS at
  // most).
  static absl::StatusOr<std::unique_ptr<Backend>> Create(const std::string& device,
                                                         int threads = 0);

  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  const DeviceInfo& info() const { return info_; }

  // --- memory ---
  // Bytes of device memory, 256-byte aligned, contents undefined. RESOURCE_EXHAUSTED with the
  // numbers.
  virtual absl::StatusOr<void*> Allocate(size_t bytes) = 0;
  virtual void Free(void* data) = 0;
  // What Allocate can still give, in a few large blocks.
  virtual absl::StatusOr<size_t> FreeBytes() const = 0;
  // Host memory that a copy can move by one DMA (pinned); a no-op on the CPU. Once per mapping.
  virtual absl::Status RegisterHost(void* data, size_t bytes) = 0;
  virtual void UnregisterHost(void* data) = 0;
  // `bytes`, > 0, is rounded up to whole kSharingUnits. RESOURCE_EXHAUSTED with the numbers;
  // UNIMPLEMENTED where there is no memory but the host's, or the driver can't share in this way.
  virtual absl::StatusOr<std::unique_ptr<SharedMemory>> AllocateShared(size_t bytes,
                                                                       SharingKind kind);

  // --- copies, in stream order. Host memory that was not given to RegisterHost may be changed once
  // CopyIn has returned; what was, and what CopyOut fills, is the device's until Synchronize ---
  virtual absl::Status CopyIn(void* device_dst, const void* host_src, size_t bytes) = 0;
  virtual absl::Status CopyOut(void* host_dst, const void* device_src, size_t bytes) = 0;
  virtual absl::Status CopyWithin(void* device_dst, const void* device_src, size_t bytes) = 0;
  virtual absl::Status SetZero(void* data, size_t bytes) = 0;
  // Waits for all of it, and for CopyInAhead and CopyOutBehind.
  virtual absl::Status Synchronize() = 0;

  // --- a copy ahead of its turn, beside what runs: for the input of a step that is to come ---
  // Begins to fill `ahead`, a buffer of the device's for nothing else, without waiting for what was
  // enqueued before, but for the last TakeAhead. host_src stays as it is until Synchronize, or
  // until `mark` has passed, which remembers the copy's end.
  virtual absl::Status CopyInAhead(void* ahead, const void* host_src, size_t bytes, int mark) {
    const absl::Status status = CopyIn(ahead, host_src, bytes);
    return status.ok() ? RecordMark(mark) : status;
  }
  // In stream order: copies what the last CopyInAhead brought from `ahead` to where it is needed.
  virtual absl::Status TakeAhead(void* device_dst, const void* ahead, size_t bytes) {
    return CopyWithin(device_dst, ahead, bytes);
  }

  // --- a copy out behind its step, beside what runs next ---
  // In stream order: copies a result to `behind`, a buffer of the device's for nothing else, and
  // begins to copy it from there to host_dst, for which nothing that is enqueued afterwards waits
  // but another CopyOutBehind, and what comes after JoinBehind. host_dst is the device's until
  // Synchronize, or until `mark` has passed, which remembers the copy's end.
  virtual absl::Status CopyOutBehind(void* host_dst, void* /*behind*/, const void* device_src,
                                     size_t bytes, int mark) {
    const absl::Status status = CopyOut(host_dst, device_src, bytes);
    return status.ok() ? RecordMark(mark) : status;
  }
  // What is enqueued from now on comes after every CopyOutBehind so far.
  virtual absl::Status JoinBehind() { return absl::OkStatus(); }

  // Stores `value` in `at`, host memory that was given to RegisterHost and is aligned to 8, once
  // everything enqueued before is done: who reads it there, on any processor or device, sees all of
  // that. Nobody else may write there meanwhile.
  virtual absl::Status Signal(uint64_t* at, uint64_t value);

  // --- time, in stream order: what lets a step be split into input, compute and output without a
  // wait --- Remembers the moment at which everything enqueued so far is done. `mark` is in [0,
  // kMarks).
  static constexpr int kMarks = 15;
  virtual absl::Status RecordMark(int mark) = 0;
  // Seconds from one recorded mark to another; both must have passed (call Synchronize first).
  virtual absl::StatusOr<double> SecondsBetween(int begin, int end) = 0;
  // Waits until a recorded mark has passed, and not for what was enqueued behind it; or tells
  // whether it has. These two and SecondsBetween from any thread, while nobody records these marks.
  virtual absl::Status WaitMark(int /*mark*/) { return absl::OkStatus(); }
  virtual absl::StatusOr<bool> MarkPassed(int /*mark*/) { return true; }

  // --- for a profiler that looks on (NVTX on CUDA): what the calling thread does until EndRange;
  // ranges nest. `name` lives for ever; `index` is a layer's, or -1. A few nanoseconds where none
  // does, nothing where none can ---
  virtual void BeginRange(const char* /*name*/, int64_t /*index*/) {}
  virtual void EndRange() {}

  // --- sizes; the plan adds them up. Equal to OpSizes::Of this device's kind and threads ---
  virtual const OpSizes& sizes() const = 0;
  size_t AttentionSavedBytes(const LayerDims& dims) const {
    return sizes().AttentionSavedBytes(dims);
  }
  size_t WorkspaceBytes(const LayerDims& dims) const { return sizes().WorkspaceBytes(dims); }
  size_t PendingSumBytes(const LayerDims& dims) const { return sizes().PendingSumBytes(dims); }

  // --- steps ---
  virtual std::unique_ptr<StepCache> MakeStepCache() { return std::make_unique<StepCache>(); }

  // --- ops ---
  absl::Status Linear(const Workspace& ws, const LinearArgs& args);
  absl::Status LinearInputGrad(const Workspace& ws, const LinearInputGradArgs& args);
  absl::Status LinearWeightGrad(const Workspace& ws, const LinearWeightGradArgs& args);
  absl::Status Gelu(const Workspace& ws, const GeluArgs& args);
  absl::Status GeluBackward(const Workspace& ws, const GeluBackwardArgs& args);
  absl::Status LayerNorm(const Workspace& ws, const LayerNormArgs& args);
  absl::Status LayerNormBackward(const Workspace& ws, const LayerNormBackwardArgs& args);
  absl::Status DropoutAddNorm(const Workspace& ws, const DropoutAddNormArgs& args);
  absl::Status DropoutAddNormBackward(const Workspace& ws, const DropoutAddNormBackwardArgs& args);
  absl::Status Attention(const Workspace& ws, const AttentionArgs& args);
  absl::Status AttentionBackward(const Workspace& ws, const AttentionBackwardArgs& args);
  absl::Status Cast(const Workspace& ws, const CastArgs& args);
  absl::Status GradientStats(const Workspace& ws, const GradientStatsArgs& args);
  absl::Status AdamW(const Workspace& ws, const AdamWArgs& args);
  absl::Status Lamb(const Workspace& ws, const LambArgs& args);
  // Finishes the sums that ops have left in `pending`, in stream order, and clears it.
  virtual absl::Status FinishSums(PendingSums& pending) {
    pending.Clear();
    return absl::OkStatus();
  }

 protected:
  Backend() = default;
  DeviceInfo info_;

 private:
  virtual absl::Status DoLinear(const Workspace& ws, const LinearArgs& args) = 0;
  virtual absl::Status DoLinearInputGrad(const Workspace& ws, const LinearInputGradArgs& args) = 0;
  virtual absl::Status DoLinearWeightGrad(const Workspace& ws,
                                          const LinearWeightGradArgs& args) = 0;
  virtual absl::Status DoGelu(const Workspace& ws, const GeluArgs& args) = 0;
  virtual absl::Status DoGeluBackward(const Workspace& ws, const GeluBackwardArgs& args) = 0;
  virtual absl::Status DoLayerNorm(const Workspace& ws, const LayerNormArgs& args) = 0;
  virtual absl::Status DoLayerNormBackward(const Workspace& ws,
                                           const LayerNormBackwardArgs& args) = 0;
  virtual absl::Status DoDropoutAddNorm(const Workspace& ws, const DropoutAddNormArgs& args) = 0;
  virtual absl::Status DoDropoutAddNormBackward(const Workspace& ws,
                                                const DropoutAddNormBackwardArgs& args) = 0;
  virtual absl::Status DoAttention(const Workspace& ws, const AttentionArgs& args) = 0;
  virtual absl::Status DoAttentionBackward(const Workspace& ws,
                                           const AttentionBackwardArgs& args) = 0;
  virtual absl::Status DoCast(const Workspace& ws, const CastArgs& args) = 0;
  virtual absl::Status DoGradientStats(const Workspace& ws, const GradientStatsArgs& args) = 0;
  virtual absl::Status DoAdamW(const Workspace& ws, const AdamWArgs& args) = 0;
  virtual absl::Status DoLamb(const Workspace& ws, const LambArgs& args) = 0;
};

// A range of the profiler's, as long as this lives.
class ProfilerRange {
 public:
  ProfilerRange(Backend& backend, const char* name, int64_t index = -1) : backend_(backend) {
    backend_.BeginRange(name, index);
  }
  ~ProfilerRange() { backend_.EndRange(); }
  ProfilerRange(const ProfilerRange&) = delete;
  ProfilerRange& operator=(const ProfilerRange&) = delete;
  // Ends it and begins the next one.
  void Next(const char* name) {
    backend_.EndRange();
    backend_.BeginRange(name, -1);
  }

 private:
  Backend& backend_;
};

}  // namespace lamina
