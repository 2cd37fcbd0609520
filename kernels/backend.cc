// The op set's checks, which every backend may rely on, and the choice of the backend.
#include "lamina/kernels/backend.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "cpu/cpu_backend.h"
#include "cuda/cuda_backend.h"

namespace lamina {
namespace {

// One letter of a shape. The first tensor that names it sets it; the others must agree.
struct Extent {
  const char* letter;
  int64_t value = 0;  // 0: not set yet
};

// Collects what is wrong with one call's arguments; the first fault is kept. It allocates nothing
// while nothing is wrong: these checks run before every kernel of a step.
class ArgsCheck {
 public:
  ArgsCheck(const char* op, const Workspace& ws) : op_(op) {
    if (ws.data == nullptr && ws.bytes > 0)
      Fail("workspace has ", ws.bytes, " bytes and no data; it must have both or neither");
    if (reinterpret_cast<uintptr_t>(ws.data) % 256 != 0)
      Fail("workspace is not aligned to 256 bytes");
    if (ws.data != nullptr) Remember("workspace", ws.data, ws.bytes, /*written=*/true);
  }

  // A tensor that the op reads, of the stack's dtype. The first one of a call sets the dtype.
  void Act(const char* name, const TensorView& t, std::initializer_list<Extent*> shape) {
    CheckAct(name, t, shape, /*written=*/false);
  }
  void F32(const char* name, const TensorView& t, std::initializer_list<Extent*> shape) {
    CheckTensor(name, t, DType::kF32, "", shape, /*written=*/false);
  }
  void I32(const char* name, const TensorView& t, std::initializer_list<Extent*> shape) {
    CheckTensor(name, t, DType::kI32, "", shape, /*written=*/false);
  }
  // The same for a tensor that the op writes.
  void ActOut(const char* name, const TensorView& t, std::initializer_list<Extent*> shape) {
    CheckAct(name, t, shape, /*written=*/true);
  }
  void F32Out(const char* name, const TensorView& t, std::initializer_list<Extent*> shape) {
    CheckTensor(name, t, DType::kF32, "", shape, /*written=*/true);
  }

  // Any float dtype and any shape with elements in it.
  void AnyFloat(const char* name, const TensorView& t, bool written) {
    if (!Present(name, t)) return;
    if (!IsFloat(t.dtype))
      return Fail(name, " is ", Name(t.dtype), "; it must be fp32, bf16 or fp16");
    for (int i = 0; i < t.shape.rank(); ++i)
      if (t.shape[i] < 1)
        return Fail(name, " has shape ", t.shape.ToString(), "; every extent must be at least 1");
    Place(name, t, written);
  }

  // What Attention keeps for its Backward.
  void Saved(const TensorView& t, size_t needed, bool written) {
    if (t.dtype != DType::kU8) return Fail("saved is ", Name(t.dtype), "; it must be uint8");
    if (t.shape.rank() != 1 || t.shape[0] < 0 || t.bytes() < needed)
      return Fail("saved has shape ", t.shape.ToString(), "; it must be uint8 [", needed,
                  "] (AttentionSavedBytes) or longer");
    Place("saved", t, written);
  }

  // A tensor that has no meaning in this call.
  void Absent(const char* name, const TensorView& t, const char* because) {
    if (t) Fail(name, " is present; it must be absent ", because);
  }
  void BothOrNeither(const char* a, const TensorView& at, const char* b, const TensorView& bt) {
    if (static_cast<bool>(at) != static_cast<bool>(bt))
      Fail(at ? b : a, " is absent and ", at ? a : b,
           " is present; both must be present, or neither");
  }

  // `out` may be the very same tensor as `in`; any other overlap with an output is refused. Of an
  // op at most two pairs.
  void MayBe(const TensorView& out, const TensorView& in) {
    if (out.data == in.data) same_[same_count_++] = in.data;
  }

  void Real(const char* name, double value, bool allowed, const char* range) {
    if (!allowed) Fail(name, " is ", value, "; it must be ", range);
  }
  void NonNegative(const char* name, float value) {
    Real(name, value, std::isfinite(value) && value >= 0.0f, "finite and at least 0");
  }
  void Positive(const char* name, float value) {
    Real(name, value, std::isfinite(value) && value > 0.0f, "finite and above 0");
  }

  void DropoutIs(const Dropout& dropout) {
    // Written so that NaN is refused too.
    if (!(dropout.ratio >= 0.0f && dropout.ratio < 1.0f))
      return Fail("dropout.ratio is ", dropout.ratio, "; it must be in [0, 1)");
    if (dropout.ratio > 0.0f) Struct("dropout.rng", dropout.rng, alignof(RngState));
  }
  void GeluIs(GeluKind kind) {
    if (kind != GeluKind::kErf && kind != GeluKind::kTanh)
      Fail("gelu is ", static_cast<int>(kind), "; it must be 1 (erf) or 2 (tanh)");
  }
  void DimsAre(const LayerDims& dims) {
    for (const auto& [name, value] :
         {std::pair("dims.batch", dims.batch), std::pair("dims.seq", dims.seq),
          std::pair("dims.hidden", dims.hidden), std::pair("dims.heads", dims.heads)})
      if (value < 1) return Fail(name, " is ", value, "; it must be at least 1");
    const int64_t most = dims.batch * dims.seq;
    if (dims.packed_tokens != 0 && (dims.packed_tokens < dims.batch || dims.packed_tokens > most))
      return Fail("dims.packed_tokens is ", dims.packed_tokens, "; it must be in [", dims.batch,
                  ", ", most, "], dims.batch sequences of 1 to dims.seq tokens, or 0: not packed");
    if (dims.hidden % dims.heads != 0)
      return Fail("dims.hidden is ", dims.hidden, "; it must be a multiple of dims.heads, ",
                  dims.heads);
    if (!IsFloat(dims.dtype))
      return Fail("dims.dtype is ", Name(dims.dtype), "; it must be fp32, bf16 or fp16");
    act_ = dims.dtype;
    act_source_ = "dims.dtype";
  }
  void Struct(const char* name, const void* pointer, size_t alignment) {
    if (pointer == nullptr) return Fail(name, " is null; it must point into the backend's memory");
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
      Fail(name, " is not aligned to ", alignment, " bytes");
  }
  template <typename... Parts>
  void Fail(const Parts&... parts) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(op_, ": ", parts...));
  }

  bool ok() const { return status_.ok(); }

  // To be called last: looks for outputs that overlap other tensors.
  absl::Status Done() {
    for (size_t i = 0; i < placed_count_ && status_.ok(); ++i)
      for (size_t j = i + 1; j < placed_count_ && status_.ok(); ++j) {
        const Placed& a = placed_[i];
        const Placed& b = placed_[j];
        if (!a.written && !b.written) continue;
        const std::less<> before;  // defined for pointers into different objects
        if (!before(a.begin, b.end) || !before(b.begin, a.end)) continue;
        const bool same = a.begin == b.begin && a.end == b.end && a.written != b.written;
        if (same && std::count(same_.begin(), same_.begin() + same_count_, a.begin) > 0) continue;
        // Named in the order in which the Args struct has them.
        Fail(b.written ? b.name : a.name, " overlaps ", b.written ? a.name : b.name,
             "; outputs must not overlap other tensors",
             same ? "" : ", not even in part where one tensor may serve as both");
      }
    return std::move(status_);
  }

 private:
  struct Placed {
    const char* name;
    const char* begin;
    const char* end;
    bool written;
  };

  bool Present(const char* name, const TensorView& t) {
    if (!t) Fail(name, " is absent; it is required here");
    return static_cast<bool>(t);
  }

  void CheckAct(const char* name, const TensorView& t, std::initializer_list<Extent*> shape,
                bool written) {
    if (act_source_ == nullptr) {
      if (!Present(name, t)) return;
      if (!IsFloat(t.dtype))
        return Fail(name, " is ", Name(t.dtype), "; it must be fp32, bf16 or fp16");
      act_ = t.dtype;
      act_source_ = name;
    }
    CheckTensor(name, t, act_, act_source_, shape, written);
  }

  void CheckTensor(const char* name, const TensorView& t, DType dtype, const char* like,
                   std::initializer_list<Extent*> shape, bool written) {
    if (!Present(name, t)) return;
    if (t.dtype != dtype)
      return Fail(name, " is ", Name(t.dtype), "; it must be ", Name(dtype),
                  *like != '\0' ? " like " : "", like);
    bool fits = t.shape.rank() == static_cast<int>(shape.size());
    int i = 0;
    if (fits)
      for (Extent* extent : shape) {
        const int64_t value = t.shape[i++];
        if (value < 1 || (extent->value != 0 && extent->value != value)) fits = false;
      }
    if (!fits) return FailShape(name, t, shape);
    i = 0;
    for (Extent* extent : shape) extent->value = t.shape[i++];
    Place(name, t, written);
  }

  // "Linear: w has shape [7, 5]; it must be [N, K] with K = 8 and every extent at least 1"
  void FailShape(const char* name, const TensorView& t, std::initializer_list<Extent*> shape) {
    std::string letters, values;
    for (const Extent* extent : shape) {
      absl::StrAppend(&letters, letters.empty() ? "" : ", ", extent->letter);
      if (extent->value != 0)
        absl::StrAppend(&values, values.empty() ? "" : ", ", extent->letter, " = ", extent->value);
    }
    Fail(name, " has shape ", t.shape.ToString(), "; it must be [", letters, "] with ", values,
         values.empty() ? "" : " and ", "every extent at least 1");
  }

  void Place(const char* name, const TensorView& t, bool written) {
    if (reinterpret_cast<uintptr_t>(t.data) % SizeOf(t.dtype) != 0)
      Fail(name, " is not aligned to its element size, ", SizeOf(t.dtype), " bytes");
    Remember(name, t.data, t.bytes(), written);
  }

  void Remember(const char* name, const void* data, size_t bytes, bool written) {
    const char* begin = static_cast<const char*>(data);
    if (placed_count_ < placed_.size())
      placed_[placed_count_++] = Placed{name, begin, begin + bytes, written};
  }

  const char* op_;
  absl::Status status_;
  DType act_ = DType::kF32;
  const char* act_source_ = nullptr;  // which tensor set act_
  std::array<Placed, 16> placed_;     // the widest op has 13 tensors and the workspace
  size_t placed_count_ = 0;
  std::array<const void*, 2> same_{};  // tensors that are an output and an input, by MayBe
  size_t same_count_ = 0;
};

// Attention's and its Backward's common part.
template <typename Args>
void CheckAttention(ArgsCheck& check, const Args& args, Extent& tokens, Extent& hidden) {
  check.DimsAre(args.dims);
  if (!check.ok()) return;
  tokens.value = args.dims.tokens();
  hidden.value = args.dims.hidden;
  Extent wide{"3H", 3 * args.dims.hidden}, batch{"B", args.dims.batch}, seq{"S", args.dims.seq};
  check.Act("qkv", args.qkv, {&tokens, &wide});
  if (args.dims.packed_tokens > 0) {
    check.Absent("mask", args.mask, "where dims.packed_tokens is not 0");
    check.Absent("lengths", args.lengths, "where dims.packed_tokens is not 0");
    Extent ends{"B+1", args.dims.batch + 1};
    check.I32("cu_seqlens", args.cu_seqlens, {&ends});
  } else {
    if (args.mask && args.lengths)
      check.Fail("mask and lengths are both present; at most one of them may be");
    if (args.mask) check.F32("mask", args.mask, {&batch, &seq});
    if (args.lengths) check.I32("lengths", args.lengths, {&batch});
    check.Absent("cu_seqlens", args.cu_seqlens, "where dims.packed_tokens is 0");
  }
  check.Real("scale", args.scale, std::isfinite(args.scale), "finite");
  check.DropoutIs(args.dropout);
}

// What a norm's gradient reads: of the normalised values one of their two sources.
struct NormInputs {
  const char* x_name;
  const char* with_x;
  const char* with_x_alone;
  const char* without_x;
  const TensorView &x, &y, &beta, &y_again, &gamma, &mean, &rstd;
};

void CheckNormInputs(ArgsCheck& check, const NormInputs& norm, Extent& tokens, Extent& hidden) {
  if (norm.x) {
    check.Act(norm.x_name, norm.x, {&tokens, &hidden});
    check.Absent("y", norm.y, norm.with_x);
    if (norm.y_again) {
      check.Act("beta", norm.beta, {&hidden});
    } else {
      check.Absent("beta", norm.beta, norm.with_x_alone);
    }
  } else if (!norm.y && !norm.beta) {
    check.Fail(norm.x_name, " is absent, and so are y and beta; ", norm.x_name,
               " is required, or y and beta in its place");
  } else {
    check.Act("y", norm.y, {&tokens, &hidden});
    check.Act("beta", norm.beta, {&hidden});
    check.Absent("y_again", norm.y_again, norm.without_x);
    check.Absent("mean", norm.mean, norm.without_x);
  }
  check.Act("gamma", norm.gamma, {&hidden});
  if (norm.x) check.F32("mean", norm.mean, {&tokens});
  check.F32("rstd", norm.rstd, {&tokens});
}

// Of GELU's gradient one of its two sources: the slopes; or what GELU saw, `pre_name`, and then its
// output is made again.
struct GeluInputs {
  const char *pre_name, *without_pre;
  const TensorView &slope, &pre, &y_again;
};

void CheckGeluInputs(ArgsCheck& check, const GeluInputs& gelu, Extent& rows, Extent& cols) {
  if (gelu.slope) {
    check.Act("slope", gelu.slope, {&rows, &cols});
    check.Absent(gelu.pre_name, gelu.pre, "where slope is present");
    check.Absent("y_again", gelu.y_again, gelu.without_pre);
  } else if (!gelu.pre) {
    check.Fail("slope is absent, and so is ", gelu.pre_name, "; one of them is required here");
  } else {
    check.Act(gelu.pre_name, gelu.pre, {&rows, &cols});
    check.ActOut("y_again", gelu.y_again, {&rows, &cols});
    check.MayBe(gelu.y_again, gelu.pre);
  }
}

// What an Adam-like step's scalars must be.
template <typename Args>
void CheckAdamSettings(ArgsCheck& check, const Args& args) {
  check.NonNegative("lr", args.lr);
  check.Real("beta1", args.beta1, args.beta1 >= 0.0f && args.beta1 < 1.0f, "in [0, 1)");
  check.Real("beta2", args.beta2, args.beta2 >= 0.0f && args.beta2 < 1.0f, "in [0, 1)");
  check.NonNegative("eps", args.eps);
  check.NonNegative("weight_decay", args.weight_decay);
  check.Real("correction1", args.correction1, args.correction1 > 0.0f && args.correction1 <= 1.0f,
             "in (0, 1]");
  check.Real("correction2", args.correction2, args.correction2 > 0.0f && args.correction2 <= 1.0f,
             "in (0, 1]");
  check.Struct("control", args.control, alignof(OptimizerControl));
}
// And its tensors, which all are [n].
template <typename Args>
void CheckAdamTensors(ArgsCheck& check, const Args& args, Extent& n) {
  check.F32Out("master", args.master, {&n});
  if (args.weights) check.ActOut("weights", args.weights, {&n});
  check.F32("grad", args.grad, {&n});
  check.F32Out("m", args.m, {&n});
  check.F32Out("v", args.v, {&n});
}

}  // namespace

absl::StatusOr<std::unique_ptr<SharedMemory>> Backend::AllocateShared(size_t /*bytes*/,
                                                                      SharingKind /*kind*/) {
  return absl::UnimplementedError(
      absl::StrCat(info_.kind, ": has no device memory that another process could map"));
}

absl::Status StepCache::Run(const Key& /*kind*/, const Key& /*key*/, int64_t parts,
                            absl::FunctionRef<absl::Status(int64_t)> part) {
  for (int64_t i = 0; i < parts; ++i) {
    if (absl::Status status = part(i); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Backend::Signal(uint64_t* at, uint64_t value) {
  // Ops of a backend that keeps this have run when they return.
  std::atomic_ref<uint64_t>(*at).store(value, std::memory_order_release);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Backend>> Backend::Create(const std::string& device, int threads) {
  if (threads < 0)
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", threads, "; it must be at least 0 (0: one a core)"));
  if (device == "cpu") return CreateCpuBackend(threads);
  absl::string_view rest = device;
  if (absl::ConsumePrefix(&rest, "cuda")) {
    if (rest.empty()) return CreateCudaBackend(0);
    int ordinal = 0;
    const bool number = absl::ConsumePrefix(&rest, ":") && !rest.empty() &&
                        rest.find_first_not_of("0123456789") == absl::string_view::npos &&
                        absl::SimpleAtoi(rest, &ordinal);
    if (number) return CreateCudaBackend(ordinal);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("device is \"", device,
                   "\"; it must be \"cpu\", \"cuda\" or \"cuda:N\" with N the device's ordinal"));
}

absl::Status Backend::Linear(const Workspace& ws, const LinearArgs& args) {
  ArgsCheck check("Linear", ws);
  Extent t{"T"}, k{"K"}, n{"N"};
  check.Act("x", args.x, {&t, &k});
  check.Act("w", args.w, {&n, &k});
  if (args.bias) check.Act("bias", args.bias, {&n});
  check.ActOut("y", args.y, {&t, &n});
  if (args.apply_gelu) {
    check.GeluIs(args.gelu);
    if (args.slope) check.ActOut("slope", args.slope, {&t, &n});
    if (args.slope) check.Absent("pre", args.pre, "where slope is present");
    if (args.pre) check.ActOut("pre", args.pre, {&t, &n});
  } else {
    check.Absent("slope", args.slope, "without apply_gelu");
    check.Absent("pre", args.pre, "without apply_gelu");
  }
  const absl::Status status = check.Done();
  return status.ok() ? DoLinear(ws, args) : status;
}

absl::Status Backend::LinearInputGrad(const Workspace& ws, const LinearInputGradArgs& args) {
  ArgsCheck check("LinearInputGrad", ws);
  Extent t{"T"}, k{"K"}, n{"N"};
  check.Act("dy", args.dy, {&t, &n});
  check.Act("w", args.w, {&n, &k});
  check.ActOut("dx", args.dx, {&t, &k});
  if (args.apply_gelu) {
    check.GeluIs(args.gelu);
    if (args.accumulate) check.Fail("accumulate is set; it must not be with apply_gelu");
    CheckGeluInputs(check,
                    {.pre_name = "pre",
                     .without_pre = "where pre is absent",
                     .slope = args.slope,
                     .pre = args.pre,
                     .y_again = args.y_again},
                    t, k);
    if (args.dbias) check.F32Out("dbias", args.dbias, {&k});
  } else {
    check.Absent("slope", args.slope, "without apply_gelu");
    check.Absent("pre", args.pre, "without apply_gelu");
    check.Absent("y_again", args.y_again, "without apply_gelu");
    check.Absent("dbias", args.dbias, "without apply_gelu");
  }
  const absl::Status status = check.Done();
  return status.ok() ? DoLinearInputGrad(ws, args) : status;
}

absl::Status Backend::LinearWeightGrad(const Workspace& ws, const LinearWeightGradArgs& args) {
  ArgsCheck check("LinearWeightGrad", ws);
  Extent t{"T"}, k{"K"}, n{"N"};
  check.Act("dy", args.dy, {&t, &n});
  check.Act("x", args.x, {&t, &k});
  check.F32Out("dw", args.dw, {&n, &k});
  const absl::Status status = check.Done();
  return status.ok() ? DoLinearWeightGrad(ws, args) : status;
}

absl::Status Backend::Gelu(const Workspace& ws, const GeluArgs& args) {
  ArgsCheck check("Gelu", ws);
  Extent t{"T"}, i{"I"};
  check.Act("x", args.x, {&t, &i});
  check.ActOut("y", args.y, {&t, &i});
  check.MayBe(args.y, args.x);
  if (args.slope) check.ActOut("slope", args.slope, {&t, &i});
  check.MayBe(args.slope, args.x);
  check.GeluIs(args.gelu);
  const absl::Status status = check.Done();
  return status.ok() ? DoGelu(ws, args) : status;
}

absl::Status Backend::GeluBackward(const Workspace& ws, const GeluBackwardArgs& args) {
  ArgsCheck check("GeluBackward", ws);
  Extent t{"T"}, i{"I"};
  CheckGeluInputs(check,
                  {.pre_name = "x",
                   .without_pre = "where x is absent",
                   .slope = args.slope,
                   .pre = args.x,
                   .y_again = args.y_again},
                  t, i);
  check.Act("dy", args.dy, {&t, &i});
  check.ActOut("dx", args.dx, {&t, &i});
  check.MayBe(args.dx, args.dy);
  if (args.dbias) check.F32Out("dbias", args.dbias, {&i});
  check.GeluIs(args.gelu);
  const absl::Status status = check.Done();
  return status.ok() ? DoGeluBackward(ws, args) : status;
}

absl::Status Backend::LayerNorm(const Workspace& ws, const LayerNormArgs& args) {
  ArgsCheck check("LayerNorm", ws);
  Extent t{"T"}, h{"H"};
  check.Act("x", args.x, {&t, &h});
  check.Act("gamma", args.gamma, {&h});
  check.Act("beta", args.beta, {&h});
  check.NonNegative("eps", args.eps);
  check.ActOut("y", args.y, {&t, &h});
  check.BothOrNeither("mean", args.mean, "rstd", args.rstd);
  if (args.mean) check.F32Out("mean", args.mean, {&t});
  if (args.rstd) check.F32Out("rstd", args.rstd, {&t});
  const absl::Status status = check.Done();
  return status.ok() ? DoLayerNorm(ws, args) : status;
}

absl::Status Backend::LayerNormBackward(const Workspace& ws, const LayerNormBackwardArgs& args) {
  ArgsCheck check("LayerNormBackward", ws);
  Extent t{"T"}, h{"H"};
  check.Act("dy", args.dy, {&t, &h});
  CheckNormInputs(check,
                  {.x_name = "x",
                   .with_x = "where x is present",
                   .with_x_alone = "where x is present and y_again is not",
                   .without_x = "where x is absent",
                   .x = args.x,
                   .y = args.y,
                   .beta = args.beta,
                   .y_again = args.y_again,
                   .gamma = args.gamma,
                   .mean = args.mean,
                   .rstd = args.rstd},
                  t, h);
  if (args.y_again) check.ActOut("y_again", args.y_again, {&t, &h});
  check.MayBe(args.y_again, args.dy);
  if (args.residual_grad) check.Act("residual_grad", args.residual_grad, {&t, &h});
  check.ActOut("dx", args.dx, {&t, &h});
  check.MayBe(args.dx, args.residual_grad);
  check.F32Out("dgamma", args.dgamma, {&h});
  check.F32Out("dbeta", args.dbeta, {&h});
  const absl::Status status = check.Done();
  return status.ok() ? DoLayerNormBackward(ws, args) : status;
}

absl::Status Backend::DropoutAddNorm(const Workspace& ws, const DropoutAddNormArgs& args) {
  ArgsCheck check("DropoutAddNorm", ws);
  Extent t{"T"}, h{"H"};
  check.Act("x", args.x, {&t, &h});
  check.Act("bias", args.bias, {&h});
  check.Act("residual", args.residual, {&t, &h});
  check.DropoutIs(args.dropout);
  if (args.sum) check.ActOut("sum", args.sum, {&t, &h});
  check.MayBe(args.sum, args.x);
  if (args.gamma) {
    check.Act("gamma", args.gamma, {&h});
    check.Act("beta", args.beta, {&h});
    check.NonNegative("eps", args.eps);
    check.ActOut("y", args.y, {&t, &h});
    check.BothOrNeither("mean", args.mean, "rstd", args.rstd);
    if (args.mean) check.F32Out("mean", args.mean, {&t});
    if (args.rstd) check.F32Out("rstd", args.rstd, {&t});
  } else {
    if (!args.sum) check.Fail("sum is absent; it is required without gamma");
    check.Absent("beta", args.beta, "without gamma");
    check.Absent("y", args.y, "without gamma");
    check.Absent("mean", args.mean, "without gamma");
    check.Absent("rstd", args.rstd, "without gamma");
  }
  const absl::Status status = check.Done();
  return status.ok() ? DoDropoutAddNorm(ws, args) : status;
}

absl::Status Backend::DropoutAddNormBackward(const Workspace& ws,
                                             const DropoutAddNormBackwardArgs& args) {
  ArgsCheck check("DropoutAddNormBackward", ws);
  Extent t{"T"}, h{"H"};
  if (!args.dy && !args.dsum)
    check.Fail("dy and dsum are both absent; one of them is required at least");
  if (args.dy) check.Act("dy", args.dy, {&t, &h});
  if (args.dsum) check.Act("dsum", args.dsum, {&t, &h});
  if (args.dy) {
    CheckNormInputs(check,
                    {.x_name = "sum",
                     .with_x = "where sum is present",
                     .with_x_alone = "where sum is present and y_again is not",
                     .without_x = "where sum is absent",
                     .x = args.sum,
                     .y = args.y,
                     .beta = args.beta,
                     .y_again = args.y_again,
                     .gamma = args.gamma,
                     .mean = args.mean,
                     .rstd = args.rstd},
                    t, h);
  } else {
    check.Absent("sum", args.sum, "without dy");
    check.Absent("y", args.y, "without dy");
    check.Absent("beta", args.beta, "without dy");
    check.Absent("y_again", args.y_again, "without dy");
    check.Absent("gamma", args.gamma, "without dy");
    check.Absent("mean", args.mean, "without dy");
    check.Absent("rstd", args.rstd, "without dy");
  }
  if (args.y_again) check.ActOut("y_again", args.y_again, {&t, &h});
  check.MayBe(args.y_again, args.dy);
  check.DropoutIs(args.dropout);
  if (args.dresidual) check.ActOut("dresidual", args.dresidual, {&t, &h});
  check.MayBe(args.dresidual, args.dsum);
  check.ActOut("dx", args.dx, {&t, &h});
  check.F32Out("dbias", args.dbias, {&h});
  if (args.dy) {
    check.F32Out("dgamma", args.dgamma, {&h});
    check.F32Out("dbeta", args.dbeta, {&h});
  } else {
    check.Absent("dgamma", args.dgamma, "without dy");
    check.Absent("dbeta", args.dbeta, "without dy");
  }
  const absl::Status status = check.Done();
  return status.ok() ? DoDropoutAddNormBackward(ws, args) : status;
}

absl::Status Backend::Attention(const Workspace& ws, const AttentionArgs& args) {
  ArgsCheck check("Attention", ws);
  Extent t{"T"}, h{"H"};
  CheckAttention(check, args, t, h);
  if (check.ok()) {
    check.ActOut("out", args.out, {&t, &h});
    if (args.saved) check.Saved(args.saved, AttentionSavedBytes(args.dims), /*written=*/true);
  }
  const absl::Status status = check.Done();
  return status.ok() ? DoAttention(ws, args) : status;
}

absl::Status Backend::AttentionBackward(const Workspace& ws, const AttentionBackwardArgs& args) {
  ArgsCheck check("AttentionBackward", ws);
  Extent t{"T"}, h{"H"};
  CheckAttention(check, args, t, h);
  if (check.ok()) {
    Extent wide{"3H", 3 * h.value};
    check.Act("out", args.out, {&t, &h});
    const size_t needed = AttentionSavedBytes(args.dims);
    if (args.saved)
      check.Saved(args.saved, needed, /*written=*/false);
    else if (needed > 0)
      check.Fail("saved is absent; it must be uint8 [", needed, "], as Attention left it");
    check.Act("dout", args.dout, {&t, &h});
    check.ActOut("dqkv", args.dqkv, {&t, &wide});
    if (args.dbias) check.F32Out("dbias", args.dbias, {&wide});
  }
  const absl::Status status = check.Done();
  return status.ok() ? DoAttentionBackward(ws, args) : status;
}

absl::Status Backend::Cast(const Workspace& ws, const CastArgs& args) {
  ArgsCheck check("Cast", ws);
  check.AnyFloat("src", args.src, /*written=*/false);
  check.AnyFloat("dst", args.dst, /*written=*/true);
  if (args.src.elements() != args.dst.elements())
    check.Fail("dst has shape ", args.dst.shape.ToString(), ", ", args.dst.elements(),
               " elements; it must have as many as src, ", args.src.elements());
  const absl::Status status = check.Done();
  return status.ok() ? DoCast(ws, args) : status;
}

absl::Status Backend::GradientStats(const Workspace& ws, const GradientStatsArgs& args) {
  ArgsCheck check("GradientStats", ws);
  Extent n{"n"};
  check.F32("grad", args.grad, {&n});
  check.Positive("loss_scale", args.loss_scale);
  check.NonNegative("max_norm", args.max_norm);
  check.Struct("control", args.control, alignof(OptimizerControl));
  const absl::Status status = check.Done();
  return status.ok() ? DoGradientStats(ws, args) : status;
}

absl::Status Backend::AdamW(const Workspace& ws, const AdamWArgs& args) {
  ArgsCheck check("AdamW", ws);
  Extent n{"n"};
  CheckAdamTensors(check, args, n);
  CheckAdamSettings(check, args);
  const absl::Status status = check.Done();
  return status.ok() ? DoAdamW(ws, args) : status;
}

absl::Status Backend::Lamb(const Workspace& ws, const LambArgs& args) {
  ArgsCheck check("Lamb", ws);
  Extent n{"n"};
  CheckAdamTensors(check, args, n);
  if (args.segment_count < 1)
    check.Fail("segment_count is ", args.segment_count, "; it must be at least 1");
  check.Struct("segments", args.segments, alignof(LambSegment));
  CheckAdamSettings(check, args);
  check.NonNegative("min_ratio", args.min_ratio);
  check.NonNegative("max_ratio", args.max_ratio);
  check.Real("max_ratio", args.max_ratio,
             args.max_ratio == 0.0f || args.max_ratio >= args.min_ratio,
             "at least min_ratio, or 0: no clamp above");
  const absl::Status status = check.Done();
  return status.ok() ? DoLamb(ws, args) : status;
}

}  // namespace lamina
