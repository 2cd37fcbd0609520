// The op set's checks (kernels/backend.cc): each bad argument once. Device-free: a backend that
// only counts calls stands behind them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "lamina/kernels/backend.h"

namespace lamina {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

class AnySizes final : public OpSizes {
 public:
  size_t AttentionSavedBytes(const LayerDims& d) const override {
    return static_cast<size_t>(d.tokens() * d.heads) * 4;
  }
  size_t WorkspaceBytes(const LayerDims&) const override { return 0; }
  bool host_memory() const override { return true; }
  bool FusedAttention(const LayerDims&) const override { return true; }
  size_t StepCacheBytes() const override { return 0; }
};

class CountingBackend final : public Backend {
 public:
  int calls = 0;

  absl::StatusOr<void*> Allocate(size_t) override { return absl::UnimplementedError(""); }
  void Free(void*) override {}
  absl::StatusOr<size_t> FreeBytes() const override { return size_t{0}; }
  absl::Status RegisterHost(void*, size_t) override { return absl::OkStatus(); }
  void UnregisterHost(void*) override {}
  absl::Status CopyIn(void*, const void*, size_t) override { return absl::OkStatus(); }
  absl::Status CopyOut(void*, const void*, size_t) override { return absl::OkStatus(); }
  absl::Status CopyWithin(void*, const void*, size_t) override { return absl::OkStatus(); }
  absl::Status SetZero(void*, size_t) override { return absl::OkStatus(); }
  absl::Status Synchronize() override { return absl::OkStatus(); }
  absl::Status RecordMark(int) override { return absl::OkStatus(); }
  absl::StatusOr<double> SecondsBetween(int, int) override { return 0.0; }
  const OpSizes& sizes() const override { return sizes_; }

 private:
  absl::Status Count() {
    ++calls;
    return absl::OkStatus();
  }
  absl::Status DoLinear(const Workspace&, const LinearArgs&) override { return Count(); }
  absl::Status DoLinearInputGrad(const Workspace&, const LinearInputGradArgs&) override {
    return Count();
  }
  absl::Status DoLinearWeightGrad(const Workspace&, const LinearWeightGradArgs&) override {
    return Count();
  }
  absl::Status DoGelu(const Workspace&, const GeluArgs&) override { return Count(); }
  absl::Status DoGeluBackward(const Workspace&, const GeluBackwardArgs&) override {
    return Count();
  }
  absl::Status DoLayerNorm(const Workspace&, const LayerNormArgs&) override { return Count(); }
  absl::Status DoLayerNormBackward(const Workspace&, const LayerNormBackwardArgs&) override {
    return Count();
  }
  absl::Status DoDropoutAddNorm(const Workspace&, const DropoutAddNormArgs&) override {
    return Count();
  }
  absl::Status DoDropoutAddNormBackward(const Workspace&,
                                        const DropoutAddNormBackwardArgs&) override {
    return Count();
  }
  absl::Status DoAttention(const Workspace&, const AttentionArgs&) override { return Count(); }
  absl::Status DoAttentionBackward(const Workspace&, const AttentionBackwardArgs&) override {
    return Count();
  }
  absl::Status DoCast(const Workspace&, const CastArgs&) override { return Count(); }
  absl::Status DoGradientStats(const Workspace&, const GradientStatsArgs&) override {
    return Count();
  }
  absl::Status DoAdamW(const Workspace&, const AdamWArgs&) override { return Count(); }
  absl::Status DoLamb(const Workspace&, const LambArgs&) override { return Count(); }

  AnySizes sizes_;
};

// Addresses that nothing reads. Each tensor gets its own stretch.
class Addresses {
 public:
  TensorView Tensor(DType dtype, const Shape& shape) {
    next_ += 4096;
    return TensorView{reinterpret_cast<void*>(next_), dtype, shape};
  }
  TensorView BF16(const Shape& shape) { return Tensor(DType::kBF16, shape); }
  TensorView F32(const Shape& shape) { return Tensor(DType::kF32, shape); }
  template <typename T>
  T* Pointer() {
    next_ += 4096;
    return reinterpret_cast<T*>(next_);
  }

 private:
  uintptr_t next_ = uintptr_t{1} << 40;
};

TensorView Shifted(TensorView t, ptrdiff_t bytes) {
  t.data =
      reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t.data) + static_cast<uintptr_t>(bytes));
  return t;
}

// One way to spoil arguments that are fine, and a part of the refusal: the tensor or field first.
template <typename Args>
struct Bad {
  const char* message;
  std::function<void(Args&)> spoil;
};

// `good` must pass as it is, and each spoiled copy of it must be refused without a call of the
// virtual.
template <typename Args>
void ExpectRefusals(const char* op, absl::Status (Backend::*call)(const Workspace&, const Args&),
                    const Args& good, const std::vector<Bad<Args>>& all_bad) {
  CountingBackend backend;
  const absl::Status fine = (backend.*call)(Workspace{}, good);
  ASSERT_TRUE(fine.ok()) << fine;
  ASSERT_EQ(backend.calls, 1);
  for (const Bad<Args>& bad : all_bad) {
    Args args = good;
    bad.spoil(args);
    const absl::Status status = (backend.*call)(Workspace{}, args);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.message;
    EXPECT_THAT(std::string(status.message()),
                AllOf(StartsWith(std::string(op) + ": "), HasSubstr(bad.message)));
    EXPECT_EQ(backend.calls, 1) << bad.message;
  }
}

// Arguments that must pass.
template <typename Args>
void ExpectAccepted(absl::Status (Backend::*call)(const Workspace&, const Args&), const Args& good,
                    const std::vector<std::function<void(Args&)>>& changes) {
  CountingBackend backend;
  for (size_t i = 0; i < changes.size(); ++i) {
    Args args = good;
    changes[i](args);
    const absl::Status status = (backend.*call)(Workspace{}, args);
    EXPECT_TRUE(status.ok()) << "change " << i << ": " << status;
    EXPECT_EQ(backend.calls, static_cast<int>(i) + 1);
  }
}

TEST(Checks, Workspace) {
  Addresses at;
  CountingBackend backend;
  const GeluArgs args{.x = at.BF16({6, 8}), .y = at.BF16({6, 8})};
  const auto message = [&](const Workspace& ws) {
    return std::string(backend.Gelu(ws, args).message());
  };
  EXPECT_THAT(message({nullptr, 8}), HasSubstr("Gelu: workspace has 8 bytes and no data"));
  EXPECT_THAT(message({at.Pointer<char>() + 64, 8}), HasSubstr("aligned to 256 bytes"));
  EXPECT_THAT(message({args.y.data, 256}), HasSubstr("overlaps"));
  EXPECT_THAT(message({args.x.data, 256}), HasSubstr("overlaps"));
  EXPECT_EQ(backend.calls, 0);
  EXPECT_EQ(message({at.Pointer<char>(), 256}), "");
  EXPECT_EQ(backend.calls, 1);
}

TEST(Checks, Linear) {
  using A = LinearArgs;
  Addresses at;
  const A good{.x = at.BF16({6, 8}),
               .w = at.BF16({5, 8}),
               .bias = at.BF16({5}),
               .y = at.BF16({6, 5}),
               .apply_gelu = true,
               .gelu = GeluKind::kTanh,
               .pre = at.BF16({6, 5})};
  ExpectRefusals<A>(
      "Linear", &Backend::Linear, good,
      {
          {"x is absent", [](A& a) { a.x = {}; }},
          {"x is int32; it must be fp32, bf16 or fp16", [](A& a) { a.x.dtype = DType::kI32; }},
          {"x has shape [2, 3, 8]; it must be [T, K]",
           [](A& a) {
             a.x.shape = {2, 3, 8};
           }},
          {"x has shape [0, 8]; it must be [T, K] with every extent at least 1",
           [](A& a) {
             a.x.shape = {0, 8};
           }},
          {"x has shape [6, -8]",
           [](A& a) {
             a.x.shape = {6, -8};
           }},
          {"x is not aligned to its element size, 2 bytes", [](A& a) { a.x = Shifted(a.x, 1); }},
          {"w is absent", [](A& a) { a.w = {}; }},
          {"w is fp32; it must be bf16 like x", [](A& a) { a.w.dtype = DType::kF32; }},
          {"w has shape [8, 5]; it must be [N, K] with K = 8",
           [](A& a) {
             a.w.shape = {8, 5};
           }},
          {"bias has shape [8]; it must be [N] with N = 5", [](A& a) { a.bias.shape = {8}; }},
          {"bias is fp16", [](A& a) { a.bias.dtype = DType::kF16; }},
          {"y is absent", [](A& a) { a.y = {}; }},
          {"y has shape [5, 6]; it must be [T, N] with T = 6, N = 5",
           [](A& a) {
             a.y.shape = {5, 6};
           }},
          {"y is fp32", [](A& a) { a.y.dtype = DType::kF32; }},
          {"y overlaps x", [](A& a) { a.y.data = a.x.data; }},
          {"y overlaps w", [](A& a) { a.y = Shifted(a.y, a.w.as<char>() - a.y.as<char>() + 2); }},
          {"gelu is 7; it must be 1 (erf) or 2 (tanh)",
           [](A& a) { a.gelu = static_cast<GeluKind>(7); }},
          {"pre is present; it must be absent without apply_gelu",
           [](A& a) { a.apply_gelu = false; }},
          {"pre has shape [6, 8]",
           [](A& a) {
             a.pre.shape = {6, 8};
           }},
          {"pre overlaps y", [](A& a) { a.pre.data = a.y.data; }},
      });
  ExpectAccepted<A>(&Backend::Linear, good,
                    {[](A& a) { a.bias = {}; }, [](A& a) { a.pre = {}; },
                     [](A& a) {
                       a.pre = {};
                       a.apply_gelu = false;
                     }});
}

TEST(Checks, LinearInputGrad) {
  using A = LinearInputGradArgs;
  Addresses at;
  const A good{.dy = at.BF16({6, 5}),
               .w = at.BF16({5, 8}),
               .dx = at.BF16({6, 8}),
               .apply_gelu = true,
               .pre = at.BF16({6, 8}),
               .dbias = at.F32({8})};
  ExpectRefusals<A>(
      "LinearInputGrad", &Backend::LinearInputGrad, good,
      {
          {"dy is absent", [](A& a) { a.dy = {}; }},
          {"dy is uint8", [](A& a) { a.dy.dtype = DType::kU8; }},
          {"dy has shape [30]", [](A& a) { a.dy.shape = {30}; }},
          {"w is absent", [](A& a) { a.w = {}; }},
          {"w is fp16", [](A& a) { a.w.dtype = DType::kF16; }},
          {"w has shape [8, 5]; it must be [N, K] with N = 5",
           [](A& a) {
             a.w.shape = {8, 5};
           }},
          {"dx is absent", [](A& a) { a.dx = {}; }},
          {"dx is fp32", [](A& a) { a.dx.dtype = DType::kF32; }},
          {"dx has shape [6, 5]; it must be [T, K] with T = 6, K = 8",
           [](A& a) {
             a.dx.shape = {6, 5};
           }},
          {"dx overlaps dy", [](A& a) { a.dx.data = a.dy.data; }},
          {"dx overlaps w", [](A& a) { a.dx.data = a.w.data; }},
          {"gelu is 3", [](A& a) { a.gelu = static_cast<GeluKind>(3); }},
          {"accumulate is set; it must not be with apply_gelu", [](A& a) { a.accumulate = true; }},
          {"pre is absent", [](A& a) { a.pre = {}; }},
          {"pre is fp32; it must be bf16 like dy", [](A& a) { a.pre.dtype = DType::kF32; }},
          {"pre has shape [6, 5]; it must be [T, K] with T = 6, K = 8",
           [](A& a) {
             a.pre.shape = {6, 5};
           }},
          {"dx overlaps pre", [](A& a) { a.dx.data = a.pre.data; }},
          {"dbias is bf16", [](A& a) { a.dbias.dtype = DType::kBF16; }},
          {"dbias has shape [6]; it must be [K] with K = 8", [](A& a) { a.dbias.shape = {6}; }},
          {"dbias overlaps dx", [](A& a) { a.dbias.data = a.dx.data; }},
          {"pre is present; it must be absent without apply_gelu",
           [](A& a) { a.apply_gelu = false; }},
          {"dbias is present; it must be absent without apply_gelu",
           [](A& a) {
             a.apply_gelu = false;
             a.pre = {};
           }},
      });
  ExpectAccepted<A>(&Backend::LinearInputGrad, good,
                    {[](A& a) { a.dbias = {}; },
                     [](A& a) {
                       a.pre = {};
                       a.dbias = {};
                       a.apply_gelu = false;
                       a.accumulate = true;
                     }});
}

TEST(Checks, LinearWeightGrad) {
  using A = LinearWeightGradArgs;
  Addresses at;
  const A good{.dy = at.BF16({6, 5}), .x = at.BF16({6, 8}), .dw = at.F32({5, 8})};
  ExpectRefusals<A>(
      "LinearWeightGrad", &Backend::LinearWeightGrad, good,
      {
          {"dy is absent", [](A& a) { a.dy = {}; }},
          {"x is absent", [](A& a) { a.x = {}; }},
          {"x is fp32; it must be bf16 like dy", [](A& a) { a.x.dtype = DType::kF32; }},
          {"x has shape [5, 8]; it must be [T, K] with T = 6",
           [](A& a) {
             a.x.shape = {5, 8};
           }},
          {"dw is absent", [](A& a) { a.dw = {}; }},
          {"dw is bf16; it must be fp32", [](A& a) { a.dw.dtype = DType::kBF16; }},
          {"dw has shape [8, 5]; it must be [N, K] with N = 5, K = 8",
           [](A& a) {
             a.dw.shape = {8, 5};
           }},
          {"dw is not aligned to its element size, 4 bytes", [](A& a) { a.dw = Shifted(a.dw, 2); }},
          {"dw overlaps x", [](A& a) { a.dw.data = a.x.data; }},
      });
}

TEST(Checks, Gelu) {
  using A = GeluArgs;
  Addresses at;
  const A good{.x = at.BF16({6, 8}), .y = at.BF16({6, 8})};
  ExpectRefusals<A>("Gelu", &Backend::Gelu, good,
                    {
                        {"x is absent", [](A& a) { a.x = {}; }},
                        {"x is int32", [](A& a) { a.x.dtype = DType::kI32; }},
                        {"y is absent", [](A& a) { a.y = {}; }},
                        {"y is fp32", [](A& a) { a.y.dtype = DType::kF32; }},
                        {"y has shape [8, 6]",
                         [](A& a) {
                           a.y.shape = {8, 6};
                         }},
                        {"not even in part", [](A& a) { a.y = Shifted(a.x, 2); }},
                        {"gelu is 0", [](A& a) { a.gelu = static_cast<GeluKind>(0); }},
                    });
  ExpectAccepted<A>(&Backend::Gelu, good, {[](A& a) { a.y = a.x; }});
}

TEST(Checks, GeluBackward) {
  using A = GeluBackwardArgs;
  Addresses at;
  const A good{
      .x = at.BF16({6, 8}), .dy = at.BF16({6, 8}), .dx = at.BF16({6, 8}), .dbias = at.F32({8})};
  ExpectRefusals<A>("GeluBackward", &Backend::GeluBackward, good,
                    {
                        {"x is absent", [](A& a) { a.x = {}; }},
                        {"dy is absent", [](A& a) { a.dy = {}; }},
                        {"dy has shape [6, 7]; it must be [T, I] with T = 6, I = 8",
                         [](A& a) {
                           a.dy.shape = {6, 7};
                         }},
                        {"dx is absent", [](A& a) { a.dx = {}; }},
                        {"dx is fp16", [](A& a) { a.dx.dtype = DType::kF16; }},
                        {"dx overlaps x", [](A& a) { a.dx.data = a.x.data; }},
                        {"dx overlaps dy", [](A& a) { a.dx = Shifted(a.dy, -2); }},
                        {"dbias is bf16", [](A& a) { a.dbias.dtype = DType::kBF16; }},
                        {"dbias has shape [6]", [](A& a) { a.dbias.shape = {6}; }},
                        {"gelu is 3", [](A& a) { a.gelu = static_cast<GeluKind>(3); }},
                    });
  ExpectAccepted<A>(&Backend::GeluBackward, good,
                    {[](A& a) { a.dx = a.dy; }, [](A& a) { a.dbias = {}; }});
}

TEST(Checks, LayerNorm) {
  using A = LayerNormArgs;
  Addresses at;
  const A good{.x = at.BF16({6, 8}),
               .gamma = at.BF16({8}),
               .beta = at.BF16({8}),
               .y = at.BF16({6, 8}),
               .mean = at.F32({6}),
               .rstd = at.F32({6})};
  ExpectRefusals<A>(
      "LayerNorm", &Backend::LayerNorm, good,
      {
          {"x is absent", [](A& a) { a.x = {}; }},
          {"gamma is absent", [](A& a) { a.gamma = {}; }},
          {"gamma is fp32; it must be bf16 like x", [](A& a) { a.gamma.dtype = DType::kF32; }},
          {"gamma has shape [6]; it must be [H] with H = 8", [](A& a) { a.gamma.shape = {6}; }},
          {"beta is absent", [](A& a) { a.beta = {}; }},
          {"beta has shape [1, 8]",
           [](A& a) {
             a.beta.shape = {1, 8};
           }},
          {"eps is -1e-05; it must be finite and at least 0", [](A& a) { a.eps = -1e-5f; }},
          {"eps is nan", [](A& a) { a.eps = kNaN; }},
          {"eps is inf", [](A& a) { a.eps = kInf; }},
          {"y is absent", [](A& a) { a.y = {}; }},
          {"y overlaps x", [](A& a) { a.y = a.x; }},
          {"mean is absent and rstd is present", [](A& a) { a.mean = {}; }},
          {"rstd is absent and mean is present", [](A& a) { a.rstd = {}; }},
          {"mean is bf16; it must be fp32", [](A& a) { a.mean.dtype = DType::kBF16; }},
          {"mean has shape [8]; it must be [T] with T = 6", [](A& a) { a.mean.shape = {8}; }},
          {"rstd has shape [6, 1]",
           [](A& a) {
             a.rstd.shape = {6, 1};
           }},
      });
  ExpectAccepted<A>(&Backend::LayerNorm, good,
                    {[](A& a) { a.mean = a.rstd = {}; }, [](A& a) { a.eps = 0.0f; }});
}

TEST(Checks, LayerNormBackward) {
  using A = LayerNormBackwardArgs;
  Addresses at;
  const A good{.dy = at.BF16({6, 8}),
               .x = at.BF16({6, 8}),
               .gamma = at.BF16({8}),
               .mean = at.F32({6}),
               .rstd = at.F32({6}),
               .residual_grad = at.BF16({6, 8}),
               .dx = at.BF16({6, 8}),
               .dgamma = at.F32({8}),
               .dbeta = at.F32({8})};
  const TensorView y = at.BF16({6, 8}), beta = at.BF16({8});
  // The other source of the normalised values.
  const std::function<void(A&)> from_output = [=](A& a) {
    a.y = y;
    a.beta = beta;
    a.x = a.mean = {};
  };
  // Its output again.
  const TensorView y_again = at.BF16({6, 8});
  const std::function<void(A&)> again = [=](A& a) {
    a.beta = beta;
    a.y_again = y_again;
  };
  ExpectRefusals<A>(
      "LayerNormBackward", &Backend::LayerNormBackward, good,
      {
          {"dy is absent", [](A& a) { a.dy = {}; }},
          {"x is absent, and so are y and beta; x is required, or y and beta in its place",
           [](A& a) { a.x = {}; }},
          {"y is present; it must be absent where x is present", [=](A& a) { a.y = y; }},
          {"beta is present; it must be absent where x is present and y_again is not",
           [=](A& a) { a.beta = beta; }},
          {"beta is absent", [=](A& a) { a.y_again = y_again; }},
          {"beta has shape [6]",
           [=](A& a) {
             again(a);
             a.beta.shape = {6};
           }},
          {"y_again is fp32; it must be bf16 like dy",
           [=](A& a) {
             again(a);
             a.y_again.dtype = DType::kF32;
           }},
          {"y_again has shape [6, 7]; it must be [T, H] with T = 6, H = 8",
           [=](A& a) {
             again(a);
             a.y_again.shape = {6, 7};
           }},
          {"y_again overlaps dy",
           [=](A& a) {
             again(a);
             a.y_again = Shifted(a.dy, 16);
           }},
          {"y_again overlaps x",
           [=](A& a) {
             again(a);
             a.y_again = a.x;
           }},
          {"y_again overlaps residual_grad",
           [=](A& a) {
             again(a);
             a.y_again = a.residual_grad;
           }},
          {"dx overlaps y_again",
           [=](A& a) {
             again(a);
             a.dx = a.y_again;
           }},
          {"dx overlaps y_again",
           [=](A& a) {
             again(a);
             a.y_again = a.dx = a.dy;
           }},
          {"y_again is present; it must be absent where x is absent",
           [=](A& a) {
             from_output(a);
             a.y_again = y_again;
           }},
          {"y is absent",
           [=](A& a) {
             from_output(a);
             a.y = {};
           }},
          {"y is fp32; it must be bf16 like dy",
           [=](A& a) {
             from_output(a);
             a.y.dtype = DType::kF32;
           }},
          {"y has shape [6, 7]; it must be [T, H] with T = 6, H = 8",
           [=](A& a) {
             from_output(a);
             a.y.shape = {6, 7};
           }},
          {"beta is absent",
           [=](A& a) {
             from_output(a);
             a.beta = {};
           }},
          {"beta has shape [6]; it must be [H] with H = 8",
           [=](A& a) {
             from_output(a);
             a.beta.shape = {6};
           }},
          {"mean is present; it must be absent where x is absent",
           [=](A& a) {
             const TensorView kept = a.mean;
             from_output(a);
             a.mean = kept;
           }},
          {"rstd is absent",
           [=](A& a) {
             from_output(a);
             a.rstd = {};
           }},
          {"dx overlaps y",
           [=](A& a) {
             from_output(a);
             a.dx = a.y;
           }},
          {"x has shape [8, 6]",
           [](A& a) {
             a.x.shape = {8, 6};
           }},
          {"gamma is absent", [](A& a) { a.gamma = {}; }},
          {"mean is absent", [](A& a) { a.mean = {}; }},
          {"mean is fp16", [](A& a) { a.mean.dtype = DType::kF16; }},
          {"rstd is absent", [](A& a) { a.rstd = {}; }},
          {"rstd has shape [8]", [](A& a) { a.rstd.shape = {8}; }},
          {"residual_grad is fp32", [](A& a) { a.residual_grad.dtype = DType::kF32; }},
          {"residual_grad has shape [48]", [](A& a) { a.residual_grad.shape = {48}; }},
          {"dx is absent", [](A& a) { a.dx = {}; }},
          {"dx overlaps dy", [](A& a) { a.dx = a.dy; }},
          {"dx overlaps residual_grad", [](A& a) { a.dx = Shifted(a.residual_grad, 16); }},
          {"dgamma is absent", [](A& a) { a.dgamma = {}; }},
          {"dgamma is bf16", [](A& a) { a.dgamma.dtype = DType::kBF16; }},
          {"dbeta is absent", [](A& a) { a.dbeta = {}; }},
          {"dbeta has shape [6]", [](A& a) { a.dbeta.shape = {6}; }},
          {"dbeta overlaps dgamma", [](A& a) { a.dbeta = a.dgamma; }},
      });
  ExpectAccepted<A>(
      &Backend::LayerNormBackward, good,
      {[](A& a) { a.residual_grad = {}; }, [](A& a) { a.dx = a.residual_grad; }, from_output,
       [=](A& a) {
         from_output(a);
         a.dx = a.residual_grad;
       },
       again,
       [=](A& a) {
         again(a);
         a.y_again = a.dy;
         a.dx = a.residual_grad;
       }});
}

TEST(Checks, DropoutAddNorm) {
  using A = DropoutAddNormArgs;
  Addresses at;
  A good{.x = at.BF16({6, 8}), .bias = at.BF16({8}), .residual = at.BF16({6, 8})};
  good.dropout = {.ratio = 0.1f, .rng = at.Pointer<RngState>(), .stream = 1};
  good.sum = at.BF16({6, 8});
  good.gamma = at.BF16({8});
  good.beta = at.BF16({8});
  good.y = at.BF16({6, 8});
  good.mean = at.F32({6});
  good.rstd = at.F32({6});
  const std::function<void(A&)> no_norm = [](A& a) {
    a.gamma = a.beta = a.y = a.mean = a.rstd = {};
  };
  ExpectRefusals<A>(
      "DropoutAddNorm", &Backend::DropoutAddNorm, good,
      {
          {"x is absent", [](A& a) { a.x = {}; }},
          {"bias is absent", [](A& a) { a.bias = {}; }},
          {"bias has shape [6]", [](A& a) { a.bias.shape = {6}; }},
          {"residual is absent", [](A& a) { a.residual = {}; }},
          {"residual is fp32", [](A& a) { a.residual.dtype = DType::kF32; }},
          {"dropout.ratio is 1; it must be in [0, 1)", [](A& a) { a.dropout.ratio = 1.0f; }},
          {"dropout.ratio is -0.1", [](A& a) { a.dropout.ratio = -0.1f; }},
          {"dropout.ratio is nan", [](A& a) { a.dropout.ratio = kNaN; }},
          {"dropout.rng is null", [](A& a) { a.dropout.rng = nullptr; }},
          {"dropout.rng is not aligned",
           [](A& a) {
             a.dropout.rng =
                 reinterpret_cast<const RngState*>(reinterpret_cast<uintptr_t>(a.dropout.rng) + 4);
           }},
          {"sum has shape [6, 7]",
           [](A& a) {
             a.sum.shape = {6, 7};
           }},
          {"sum overlaps residual", [](A& a) { a.sum = a.residual; }},
          {"sum overlaps x", [](A& a) { a.sum = Shifted(a.x, 4); }},
          {"sum is absent; it is required without gamma",
           [&](A& a) {
             no_norm(a);
             a.sum = {};
           }},
          {"gamma is fp16", [](A& a) { a.gamma.dtype = DType::kF16; }},
          {"beta is absent", [](A& a) { a.beta = {}; }},
          {"eps is nan", [](A& a) { a.eps = kNaN; }},
          {"y is absent", [](A& a) { a.y = {}; }},
          {"y overlaps sum", [](A& a) { a.y = a.sum; }},
          {"mean is absent and rstd is present", [](A& a) { a.mean = {}; }},
          {"rstd has shape [8]", [](A& a) { a.rstd.shape = {8}; }},
          {"beta is present; it must be absent without gamma",
           [&](A& a) {
             const TensorView kept = a.beta;
             no_norm(a);
             a.beta = kept;
           }},
          {"y is present; it must be absent without gamma",
           [&](A& a) {
             const TensorView kept = a.y;
             no_norm(a);
             a.y = kept;
           }},
          {"mean is present; it must be absent without gamma",
           [&](A& a) {
             const TensorView kept = a.mean;
             no_norm(a);
             a.mean = kept;
           }},
          {"rstd is present; it must be absent without gamma",
           [&](A& a) {
             const TensorView kept = a.rstd;
             no_norm(a);
             a.rstd = kept;
           }},
      });
  ExpectAccepted<A>(&Backend::DropoutAddNorm, good,
                    {no_norm, [](A& a) { a.sum = {}; }, [](A& a) { a.sum = a.x; },
                     [](A& a) { a.mean = a.rstd = {}; }, [](A& a) { a.dropout = {}; }});
}

TEST(Checks, DropoutAddNormBackward) {
  using A = DropoutAddNormBackwardArgs;
  Addresses at;
  A good{.dy = at.BF16({6, 8}), .dsum = at.BF16({6, 8}), .sum = at.BF16({6, 8})};
  good.gamma = at.BF16({8});
  good.mean = at.F32({6});
  good.rstd = at.F32({6});
  good.dropout = {.ratio = 0.1f, .rng = at.Pointer<RngState>(), .stream = 1};
  good.dresidual = at.BF16({6, 8});
  good.dx = at.BF16({6, 8});
  good.dbias = at.F32({8});
  good.dgamma = at.F32({8});
  good.dbeta = at.F32({8});
  const std::function<void(A&)> no_norm = [](A& a) {
    a.dy = a.sum = a.y = a.beta = a.gamma = a.mean = a.rstd = a.dgamma = a.dbeta = {};
  };
  const TensorView y = at.BF16({6, 8}), beta = at.BF16({8});
  // The other source of the normalised values.
  const std::function<void(A&)> from_output = [=](A& a) {
    a.y = y;
    a.beta = beta;
    a.sum = a.mean = {};
  };
  // Its output again.
  const TensorView y_again = at.BF16({6, 8});
  const std::function<void(A&)> again = [=](A& a) {
    a.beta = beta;
    a.y_again = y_again;
  };
  // Without a norm, each of its tensors is one too many.
  const auto no_norm_but = [&](TensorView A::*member) {
    return [=](A& a) {
      const TensorView kept = a.*member;
      no_norm(a);
      a.*member = kept;
    };
  };
  ExpectRefusals<A>(
      "DropoutAddNormBackward", &Backend::DropoutAddNormBackward, good,
      {
          {"dy and dsum are both absent",
           [&](A& a) {
             no_norm(a);
             a.dsum = {};
           }},
          {"dy is int32", [](A& a) { a.dy.dtype = DType::kI32; }},
          {"dsum is fp32; it must be bf16 like dy", [](A& a) { a.dsum.dtype = DType::kF32; }},
          {"dsum has shape [6, 9]",
           [](A& a) {
             a.dsum.shape = {6, 9};
           }},
          {"sum is absent, and so are y and beta; sum is required, or y and beta in its place",
           [](A& a) { a.sum = {}; }},
          {"y is present; it must be absent where sum is present", [=](A& a) { a.y = y; }},
          {"beta is present; it must be absent where sum is present and y_again is not",
           [=](A& a) { a.beta = beta; }},
          {"beta is absent", [=](A& a) { a.y_again = y_again; }},
          {"y_again is fp16; it must be bf16 like dy",
           [=](A& a) {
             again(a);
             a.y_again.dtype = DType::kF16;
           }},
          {"y_again has shape [8, 6]",
           [=](A& a) {
             again(a);
             a.y_again.shape = {8, 6};
           }},
          {"y_again overlaps sum",
           [=](A& a) {
             again(a);
             a.y_again = a.sum;
           }},
          {"dx overlaps y_again",
           [=](A& a) {
             again(a);
             a.y_again = a.dx;
           }},
          {"y_again is present; it must be absent where sum is absent",
           [=](A& a) {
             from_output(a);
             a.y_again = y_again;
           }},
          {"y_again is present; it must be absent without dy",
           [=](A& a) {
             no_norm(a);
             a.y_again = y_again;
           }},
          {"y is absent",
           [=](A& a) {
             from_output(a);
             a.y = {};
           }},
          {"y is fp16; it must be bf16 like dy",
           [=](A& a) {
             from_output(a);
             a.y.dtype = DType::kF16;
           }},
          {"beta is absent",
           [=](A& a) {
             from_output(a);
             a.beta = {};
           }},
          {"mean is present; it must be absent where sum is absent",
           [=](A& a) {
             const TensorView kept = a.mean;
             from_output(a);
             a.mean = kept;
           }},
          {"dresidual overlaps y",
           [=](A& a) {
             from_output(a);
             a.dresidual = a.y;
           }},
          {"y is present; it must be absent without dy",
           [=](A& a) {
             no_norm(a);
             a.y = y;
           }},
          {"beta is present; it must be absent without dy",
           [=](A& a) {
             no_norm(a);
             a.beta = beta;
           }},
          {"gamma is absent", [](A& a) { a.gamma = {}; }},
          {"mean is absent", [](A& a) { a.mean = {}; }},
          {"rstd is absent", [](A& a) { a.rstd = {}; }},
          {"sum is present; it must be absent without dy", no_norm_but(&A::sum)},
          {"gamma is present; it must be absent without dy", no_norm_but(&A::gamma)},
          {"mean is present; it must be absent without dy", no_norm_but(&A::mean)},
          {"rstd is present; it must be absent without dy", no_norm_but(&A::rstd)},
          {"dgamma is present; it must be absent without dy", no_norm_but(&A::dgamma)},
          {"dbeta is present; it must be absent without dy", no_norm_but(&A::dbeta)},
          {"dropout.ratio is inf", [](A& a) { a.dropout.ratio = kInf; }},
          {"dropout.rng is null", [](A& a) { a.dropout.rng = nullptr; }},
          {"dresidual has shape [8, 6]",
           [](A& a) {
             a.dresidual.shape = {8, 6};
           }},
          {"dresidual overlaps sum", [](A& a) { a.dresidual = a.sum; }},
          {"dx is absent", [](A& a) { a.dx = {}; }},
          {"dx overlaps dresidual", [](A& a) { a.dx = a.dresidual; }},
          {"dx overlaps dsum", [](A& a) { a.dx = a.dsum; }},
          {"dbias is absent", [](A& a) { a.dbias = {}; }},
          {"dbias is bf16", [](A& a) { a.dbias.dtype = DType::kBF16; }},
          {"dgamma is absent", [](A& a) { a.dgamma = {}; }},
          {"dbeta is absent", [](A& a) { a.dbeta = {}; }},
          {"dbeta has shape [6]", [](A& a) { a.dbeta.shape = {6}; }},
      });
  ExpectAccepted<A>(&Backend::DropoutAddNormBackward, good,
                    {no_norm, [](A& a) { a.dsum = {}; }, [](A& a) { a.dresidual = {}; },
                     [](A& a) { a.dresidual = a.dsum; }, from_output,
                     [=](A& a) {
                       from_output(a);
                       a.dresidual = a.dsum;
                     },
                     again,
                     [=](A& a) {
                       again(a);
                       a.y_again = a.dy;
                       a.dresidual = a.dsum;
                     }});
}

LayerDims Dims() {
  return LayerDims{
      .batch = 2, .seq = 3, .hidden = 8, .heads = 2, .intermediate = 0, .dtype = DType::kBF16};
}

// What Attention and its Backward have in common.
template <typename A>
std::vector<Bad<A>> BadAttention(const TensorView& lengths, const TensorView& cu_seqlens) {
  // Two sequences of three tokens.
  const std::function<void(A&)> pack = [=](A& a) {
    a.dims.packed_tokens = 6;
    a.mask = {};
    a.cu_seqlens = cu_seqlens;
  };
  return {
      {"dims.packed_tokens is -1; it must be in [2, 6], dims.batch sequences of 1 to dims.seq "
       "tokens, or 0: not packed",
       [=](A& a) {
         pack(a);
         a.dims.packed_tokens = -1;
       }},
      {"dims.packed_tokens is 1",
       [=](A& a) {
         pack(a);
         a.dims.packed_tokens = 1;
       }},
      {"dims.packed_tokens is 7",
       [=](A& a) {
         pack(a);
         a.dims.packed_tokens = 7;
       }},
      {"qkv has shape [6, 24]; it must be [T, 3H] with T = 5, 3H = 24",
       [=](A& a) {
         pack(a);
         a.dims.packed_tokens = 5;
       }},
      {"mask is present; it must be absent where dims.packed_tokens is not 0",
       [=](A& a) {
         const TensorView kept = a.mask;
         pack(a);
         a.mask = kept;
       }},
      {"lengths is present; it must be absent where dims.packed_tokens is not 0",
       [=](A& a) {
         pack(a);
         a.lengths = lengths;
       }},
      {"cu_seqlens is absent",
       [=](A& a) {
         pack(a);
         a.cu_seqlens = {};
       }},
      {"cu_seqlens is fp32; it must be int32",
       [=](A& a) {
         pack(a);
         a.cu_seqlens.dtype = DType::kF32;
       }},
      {"cu_seqlens has shape [2]; it must be [B+1] with B+1 = 3",
       [=](A& a) {
         pack(a);
         a.cu_seqlens.shape = {2};
       }},
      {"cu_seqlens is not aligned",
       [=](A& a) {
         pack(a);
         a.cu_seqlens = Shifted(a.cu_seqlens, 2);
       }},
      {"cu_seqlens is present; it must be absent where dims.packed_tokens is 0",
       [=](A& a) { a.cu_seqlens = cu_seqlens; }},
      {"dims.batch is 0; it must be at least 1", [](A& a) { a.dims.batch = 0; }},
      {"dims.seq is -3", [](A& a) { a.dims.seq = -3; }},
      {"dims.hidden is 0", [](A& a) { a.dims.hidden = 0; }},
      {"dims.heads is 0", [](A& a) { a.dims.heads = 0; }},
      {"dims.hidden is 8; it must be a multiple of dims.heads, 3", [](A& a) { a.dims.heads = 3; }},
      {"dims.dtype is uint8", [](A& a) { a.dims.dtype = DType::kU8; }},
      {"qkv is absent", [](A& a) { a.qkv = {}; }},
      {"qkv is fp32; it must be bf16 like dims.dtype", [](A& a) { a.qkv.dtype = DType::kF32; }},
      {"qkv has shape [6, 8]; it must be [T, 3H] with T = 6, 3H = 24",
       [](A& a) {
         a.qkv.shape = {6, 8};
       }},
      {"mask is bf16; it must be fp32", [](A& a) { a.mask.dtype = DType::kBF16; }},
      {"mask has shape [3, 2]; it must be [B, S] with B = 2, S = 3",
       [](A& a) {
         a.mask.shape = {3, 2};
       }},
      {"mask and lengths are both present", [=](A& a) { a.lengths = lengths; }},
      {"lengths is fp32; it must be int32",
       [=](A& a) {
         a.mask = {};
         a.lengths = lengths;
         a.lengths.dtype = DType::kF32;
       }},
      {"lengths has shape [3]; it must be [B] with B = 2",
       [=](A& a) {
         a.mask = {};
         a.lengths = lengths;
         a.lengths.shape = {3};
       }},
      {"scale is nan; it must be finite", [](A& a) { a.scale = kNaN; }},
      {"dropout.ratio is 1.5", [](A& a) { a.dropout.ratio = 1.5f; }},
      {"dropout.rng is null", [](A& a) { a.dropout.rng = nullptr; }},
      {"out is absent", [](A& a) { a.out = {}; }},
      {"out has shape [6, 24]",
       [](A& a) {
         a.out.shape = {6, 24};
       }},
      {"saved is bf16; it must be uint8", [](A& a) { a.saved.dtype = DType::kBF16; }},
      {"saved has shape [47]; it must be uint8 [48]", [](A& a) { a.saved.shape = {47}; }},
      {"saved has shape [2, 24]",
       [](A& a) {
         a.saved.shape = {2, 24};
       }},
  };
}

TEST(Checks, Attention) {
  using A = AttentionArgs;
  Addresses at;
  const TensorView lengths = at.Tensor(DType::kI32, {2}), ends = at.Tensor(DType::kI32, {3});
  A good{.dims = Dims(), .qkv = at.BF16({6, 24}), .mask = at.F32({2, 3})};
  good.dropout = {.ratio = 0.1f, .rng = at.Pointer<RngState>(), .stream = 0};
  good.out = at.BF16({6, 8});
  good.saved = at.Tensor(DType::kU8, {48});
  std::vector<Bad<A>> bad = BadAttention<A>(lengths, ends);
  bad.push_back({"out overlaps qkv", [](A& a) { a.out.data = a.qkv.data; }});
  bad.push_back({"saved overlaps out", [](A& a) { a.saved.data = a.out.data; }});
  bad.push_back({"out overlaps mask", [](A& a) { a.out.data = a.mask.data; }});
  ExpectRefusals<A>("Attention", &Backend::Attention, good, bad);
  ExpectAccepted<A>(
      &Backend::Attention, good,
      {[](A& a) { a.mask = {}; }, [](A& a) { a.causal = true; },
       [=](A& a) {
         a.dims.packed_tokens = 5;
         a.qkv.shape = {5, 24};
         a.out.shape = {5, 8};
         a.saved.shape = {40};
         a.mask = {};
         a.cu_seqlens = ends;
       },
       [](A& a) { a.saved = {}; }, [](A& a) { a.saved.shape = {64}; }, [](A& a) { a.dropout = {}; },
       [=](A& a) {
         a.mask = {};
         a.lengths = lengths;
       }});
}

TEST(Checks, AttentionBackward) {
  using A = AttentionBackwardArgs;
  Addresses at;
  const TensorView lengths = at.Tensor(DType::kI32, {2}), ends = at.Tensor(DType::kI32, {3});
  A good{.dims = Dims(), .qkv = at.BF16({6, 24}), .mask = at.F32({2, 3})};
  good.dropout = {.ratio = 0.1f, .rng = at.Pointer<RngState>(), .stream = 0};
  good.out = at.BF16({6, 8});
  good.saved = at.Tensor(DType::kU8, {48});
  good.dout = at.BF16({6, 8});
  good.dqkv = at.BF16({6, 24});
  good.dbias = at.F32({24});
  std::vector<Bad<A>> bad = BadAttention<A>(lengths, ends);
  bad.push_back({"saved is absent; it must be uint8 [48]", [](A& a) { a.saved = {}; }});
  bad.push_back({"dout is absent", [](A& a) { a.dout = {}; }});
  bad.push_back({"dout has shape [8, 6]", [](A& a) { a.dout.shape = {8, 6}; }});
  bad.push_back({"dqkv is absent", [](A& a) { a.dqkv = {}; }});
  bad.push_back({"dqkv is fp16", [](A& a) { a.dqkv.dtype = DType::kF16; }});
  bad.push_back({"dqkv overlaps qkv", [](A& a) { a.dqkv = a.qkv; }});
  bad.push_back({"dqkv overlaps dout", [](A& a) { a.dqkv.data = a.dout.data; }});
  bad.push_back({"dbias is bf16; it must be fp32", [](A& a) { a.dbias.dtype = DType::kBF16; }});
  bad.push_back(
      {"dbias has shape [8]; it must be [3H] with 3H = 24", [](A& a) { a.dbias.shape = {8}; }});
  bad.push_back({"dbias overlaps dqkv", [](A& a) { a.dbias.data = a.dqkv.data; }});
  ExpectRefusals<A>("AttentionBackward", &Backend::AttentionBackward, good, bad);
  ExpectAccepted<A>(&Backend::AttentionBackward, good,
                    {[](A& a) { a.dbias = {}; },
                     [=](A& a) {
                       a.dims.packed_tokens = 5;
                       a.qkv.shape = a.dqkv.shape = {5, 24};
                       a.out.shape = a.dout.shape = {5, 8};
                       a.saved.shape = {40};
                       a.mask = {};
                       a.cu_seqlens = ends;
                       a.causal = true;
                     }});
}

TEST(Checks, Cast) {
  using A = CastArgs;
  Addresses at;
  const A good{.src = at.F32({6, 8}), .dst = at.BF16({48})};
  ExpectRefusals<A>(
      "Cast", &Backend::Cast, good,
      {
          {"src is absent", [](A& a) { a.src = {}; }},
          {"dst is absent", [](A& a) { a.dst = {}; }},
          {"src is int32; it must be fp32, bf16 or fp16", [](A& a) { a.src.dtype = DType::kI32; }},
          {"dst is uint8", [](A& a) { a.dst.dtype = DType::kU8; }},
          {"src has shape [0]", [](A& a) { a.src.shape = {0}; }},
          {"dst has shape [47], 47 elements; it must have as many as src, 48",
           [](A& a) { a.dst.shape = {47}; }},
          {"dst overlaps src", [](A& a) { a.dst.data = a.src.data; }},
          {"src is not aligned", [](A& a) { a.src = Shifted(a.src, 2); }},
      });
}

TEST(Checks, GradientStats) {
  using A = GradientStatsArgs;
  Addresses at;
  const A good{.grad = at.F32({48}), .control = at.Pointer<OptimizerControl>()};
  ExpectRefusals<A>(
      "GradientStats", &Backend::GradientStats, good,
      {
          {"grad is absent", [](A& a) { a.grad = {}; }},
          {"grad is bf16; it must be fp32", [](A& a) { a.grad.dtype = DType::kBF16; }},
          {"grad has shape [6, 8]; it must be [n]",
           [](A& a) {
             a.grad.shape = {6, 8};
           }},
          {"loss_scale is 0; it must be finite and above 0", [](A& a) { a.loss_scale = 0.0f; }},
          {"loss_scale is nan", [](A& a) { a.loss_scale = kNaN; }},
          {"loss_scale is inf", [](A& a) { a.loss_scale = kInf; }},
          {"max_norm is -1; it must be finite and at least 0", [](A& a) { a.max_norm = -1.0f; }},
          {"max_norm is nan", [](A& a) { a.max_norm = kNaN; }},
          {"control is null", [](A& a) { a.control = nullptr; }},
      });
}

// What AdamW and Lamb have in common.
template <typename A>
A GoodStep(Addresses& at) {
  A good;
  good.master = at.F32({48});
  good.weights = at.BF16({48});
  good.grad = at.F32({48});
  good.m = at.F32({48});
  good.v = at.F32({48});
  good.control = at.Pointer<OptimizerControl>();
  return good;
}
template <typename A>
std::vector<Bad<A>> BadStep() {
  return {
      {"master is absent", [](A& a) { a.master = {}; }},
      {"master is bf16; it must be fp32", [](A& a) { a.master.dtype = DType::kBF16; }},
      {"weights is int32", [](A& a) { a.weights.dtype = DType::kI32; }},
      {"weights has shape [47]; it must be [n] with n = 48", [](A& a) { a.weights.shape = {47}; }},
      {"weights overlaps master", [](A& a) { a.weights.data = a.master.data; }},
      {"grad is absent", [](A& a) { a.grad = {}; }},
      {"grad has shape [6, 8]",
       [](A& a) {
         a.grad.shape = {6, 8};
       }},
      {"m is absent", [](A& a) { a.m = {}; }},
      {"m overlaps grad", [](A& a) { a.m = a.grad; }},
      {"v is absent", [](A& a) { a.v = {}; }},
      {"v overlaps m", [](A& a) { a.v = a.m; }},
      {"lr is -0.1; it must be finite and at least 0", [](A& a) { a.lr = -0.1f; }},
      {"lr is nan", [](A& a) { a.lr = kNaN; }},
      {"beta1 is 1; it must be in [0, 1)", [](A& a) { a.beta1 = 1.0f; }},
      {"beta1 is nan", [](A& a) { a.beta1 = kNaN; }},
      {"beta2 is -0.5; it must be in [0, 1)", [](A& a) { a.beta2 = -0.5f; }},
      {"eps is inf", [](A& a) { a.eps = kInf; }},
      {"weight_decay is -1", [](A& a) { a.weight_decay = -1.0f; }},
      {"correction1 is 0; it must be in (0, 1]", [](A& a) { a.correction1 = 0.0f; }},
      {"correction2 is 2; it must be in (0, 1]", [](A& a) { a.correction2 = 2.0f; }},
      {"control is null", [](A& a) { a.control = nullptr; }},
  };
}

TEST(Checks, AdamW) {
  Addresses at;
  const auto good = GoodStep<AdamWArgs>(at);
  ExpectRefusals<AdamWArgs>("AdamW", &Backend::AdamW, good, BadStep<AdamWArgs>());
  ExpectAccepted<AdamWArgs>(&Backend::AdamW, good, {[](AdamWArgs& a) { a.weights = {}; }});
}

TEST(Checks, Lamb) {
  using A = LambArgs;
  Addresses at;
  A good = GoodStep<A>(at);
  good.segments = at.Pointer<LambSegment>();
  good.segment_count = 2;
  good.min_ratio = 0.5f;
  good.max_ratio = 10.0f;
  std::vector<Bad<A>> bad = BadStep<A>();
  bad.push_back({"segments is null", [](A& a) { a.segments = nullptr; }});
  bad.push_back({"segments is not aligned to 8 bytes", [](A& a) {
                   a.segments = reinterpret_cast<const LambSegment*>(
                       reinterpret_cast<uintptr_t>(a.segments) + 4);
                 }});
  bad.push_back({"segment_count is 0; it must be at least 1", [](A& a) { a.segment_count = 0; }});
  bad.push_back({"segment_count is -2", [](A& a) { a.segment_count = -2; }});
  bad.push_back(
      {"min_ratio is -1; it must be finite and at least 0", [](A& a) { a.min_ratio = -1.0f; }});
  bad.push_back({"min_ratio is nan", [](A& a) { a.min_ratio = kNaN; }});
  bad.push_back(
      {"max_ratio is inf; it must be finite and at least 0", [](A& a) { a.max_ratio = kInf; }});
  bad.push_back({"max_ratio is 0.25; it must be at least min_ratio, or 0: no clamp above",
                 [](A& a) { a.max_ratio = 0.25f; }});
  ExpectRefusals<A>("Lamb", &Backend::Lamb, good, bad);
  ExpectAccepted<A>(&Backend::Lamb, good,
                    {[](A& a) { a.weights = {}; }, [](A& a) { a.max_ratio = 0.0f; },
                     [](A& a) { a.min_ratio = 10.0f; }});
}

}  // namespace
}  // namespace lamina
