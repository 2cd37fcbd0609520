#include "layer_ops.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace lamina::bench {
namespace {

constexpr DType kF32 = DType::kF32;

double ProductFlops(int64_t m, int64_t n, int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

// Makes the cases of one shape; the letters are backend.h's. Each case keeps a copy of it.
class Cases {
 public:
  Cases(const LayerDims& dims, float dropout, int64_t layers, const Workspace& workspace,
        std::vector<OpCase>* cases)
      : dims_(dims), dropout_(dropout), layers_(layers), workspace_(workspace), cases_(cases) {}

  void AddAll() {
    const struct {
      const char* name;
      int64_t n, k;
    } products[] = {{"qkv", 3 * h_, h_}, {"out", h_, h_}, {"fc1", i_, h_}, {"fc2", h_, i_}};
    for (const auto& p : products) Linear(p.name, p.n, p.k);
    for (const auto& p : products) LinearInputGrad(p.name, p.n, p.k);
    for (const auto& p : products) LinearWeightGrad(p.name, p.n, p.k);
    Gelu();
    GeluBackward();
    LayerNorm();
    LayerNormBackward();
    DropoutAddNorm();
    DropoutAddNormBackward();
    for (const bool causal : {false, true}) {
      if (dropout_ > 0) Attention(dropout_, causal);
      Attention(0.0f, causal);
    }
    Parameters();
  }

 private:
  struct Calls {
    int pre_norm = 0, post_norm = 0;
  };
  OpCase& Add(std::string name, Calls calls, std::function<OpCall(Operands&)> make) {
    cases_->push_back({.name = std::move(name),
                       .calls_pre_norm = calls.pre_norm,
                       .calls_post_norm = calls.post_norm,
                       .make = std::move(make)});
    return cases_->back();
  }

  // Lets a case's arguments be written as the layer writes them.
  template <typename Args>
  static OpCall Call(Operands& o, absl::Status (Backend::*op)(const Workspace&, const Args&),
                     const Args& args) {
    return
        [&backend = o.backend(), op, args](const Workspace& ws) { return (backend.*op)(ws, args); };
  }

  lamina::Dropout DropoutOf(Operands& o, float ratio) const {
    if (ratio == 0.0f) return {};
    return {ratio, o.tensors().Copy<RngState>({{.seed = 1, .counter = 0}}), 0};
  }

  void Linear(const std::string& part, int64_t n, int64_t k) {
    // fc1 has its bias and GELU in the product, and keeps what GELU saw; qkv has its bias; the
    // others' biases are DropoutAddNorm's.
    const bool gelu = part == "fc1", bias = gelu || part == "qkv";
    Add(absl::StrCat("Linear ", part,
                     gelu   ? ", bias, GELU, pre"
                     : bias ? ", bias"
                            : ""),
        {1, 1},
        [=, *this](Operands& o) {
          return Call(o, &Backend::Linear,
                      {.x = o.Read(act_, {t_, k}),
                       .w = o.Read(act_, {n, k}),
                       .bias = bias ? o.Read(act_, {n}) : TensorView{},
                       .y = o.Write(act_, {t_, n}),
                       .apply_gelu = gelu,
                       .pre = gelu ? o.Write(act_, {t_, n}) : TensorView{}});
        })
        .flops = ProductFlops(t_, n, k);
  }

  void LinearInputGrad(const std::string& part, int64_t n, int64_t k) {
    // fc2's goes on through GELU, and sums fc1's bias gradient. Post-LN's branches end in qkv's and
    // fc1's, which add to the gradient that came by the residual.
    const bool gelu = part == "fc2", branch = part == "qkv" || part == "fc1";
    AddLinearInputGrad(part, n, k, gelu, false, branch ? Calls{.pre_norm = 1} : Calls{1, 1});
    if (branch) AddLinearInputGrad(part, n, k, false, true, {.post_norm = 1});
  }

  void AddLinearInputGrad(const std::string& part, int64_t n, int64_t k, bool gelu, bool accumulate,
                          Calls calls) {
    OpCase& c =
        Add(absl::StrCat("LinearInputGrad ", part, gelu ? ", GELU, dbias" : "",
                         accumulate ? ", onto dx" : ""),
            calls, [=, *this](Operands& o) {
              return Call(o, &Backend::LinearInputGrad,
                          {.dy = o.Read(act_, {t_, n}),
                           .w = o.Read(act_, {n, k}),
                           .dx = accumulate ? o.Update(act_, {t_, k}) : o.Write(act_, {t_, k}),
                           .accumulate = accumulate,
                           .apply_gelu = gelu,
                           .pre = gelu ? o.Read(act_, {t_, k}) : TensorView{},
                           .dbias = gelu ? o.Update(kF32, {k}) : TensorView{}});
            });
    c.flops = ProductFlops(t_, n, k);
    c.sums_tokens = gelu;
  }

  void LinearWeightGrad(const std::string& part, int64_t n, int64_t k) {
    OpCase& c = Add(absl::StrCat("LinearWeightGrad ", part), {1, 1}, [=, *this](Operands& o) {
      return Call(
          o, &Backend::LinearWeightGrad,
          {.dy = o.Read(act_, {t_, n}), .x = o.Read(act_, {t_, k}), .dw = o.Update(kF32, {n, k})});
    });
    c.flops = ProductFlops(t_, n, k);
    c.sums_tokens = true;
  }

  void Gelu() {
    // Only with gelu_checkpoint, to compute again what was not kept.
    Add("Gelu", {}, [*this](Operands& o) {
      return Call(o, &Backend::Gelu, {.x = o.Read(act_, {t_, i_}), .y = o.Write(act_, {t_, i_})});
    });
  }

  void GeluBackward() {
    // What LinearInputGrad's GELU is where a backend has no such product.
    Add("GeluBackward, in place, dbias", {}, [*this](Operands& o) {
      const TensorView dy = o.Update(act_, {t_, i_});
      return Call(o, &Backend::GeluBackward,
                  {.x = o.Read(act_, {t_, i_}), .dy = dy, .dx = dy, .dbias = o.Update(kF32, {i_})});
    }).sums_tokens = true;
  }

  void LayerNorm() {
    // The first layer's of a call. Further up the sum below has it.
    Add("LayerNorm", {}, [*this](Operands& o) {
      return Call(o, &Backend::LayerNorm,
                  {.x = o.Read(act_, {t_, h_}),
                   .gamma = o.Read(act_, {h_}),
                   .beta = o.Read(act_, {h_}),
                   .y = o.Write(act_, {t_, h_}),
                   .mean = o.Write(kF32, {t_}),
                   .rstd = o.Write(kF32, {t_})});
    });
  }

  // The first layer's of a call too. The layer has the norm's output again, over dy; without
  // normalize_invertible.
  void LayerNormBackward() {
    for (const bool again : {true, false})
      Add(absl::StrCat("LayerNormBackward, residual", again ? ", y again" : ""), {},
          [=, *this](Operands& o) {
            const TensorView dy = again ? o.Update(act_, {t_, h_}) : o.Read(act_, {t_, h_});
            return Call(o, &Backend::LayerNormBackward,
                        {.dy = dy,
                         .x = o.Read(act_, {t_, h_}),
                         .beta = again ? o.Read(act_, {h_}) : TensorView{},
                         .y_again = again ? dy : TensorView{},
                         .gamma = o.Read(act_, {h_}),
                         .mean = o.Read(kF32, {t_}),
                         .rstd = o.Read(kF32, {t_}),
                         .residual_grad = o.Read(act_, {t_, h_}),
                         .dx = o.Write(act_, {t_, h_}),
                         .dgamma = o.Update(kF32, {h_}),
                         .dbeta = o.Update(kF32, {h_})});
          })
          .sums_tokens = true;
  }

  void DropoutAddNorm() {
    // Pre-LN: attention's sum with its norm, and the layer's with the norm above.
    Add("DropoutAddNorm, norm, in place", {.pre_norm = 2, .post_norm = 2}, [*this](Operands& o) {
      const TensorView x = o.Update(act_, {t_, h_});
      return Call(o, &Backend::DropoutAddNorm,
                  {.x = x,
                   .bias = o.Read(act_, {h_}),
                   .residual = o.Read(act_, {t_, h_}),
                   .dropout = DropoutOf(o, dropout_),
                   .sum = x,
                   .gamma = o.Read(act_, {h_}),
                   .beta = o.Read(act_, {h_}),
                   .y = o.Write(act_, {t_, h_}),
                   .mean = o.Write(kF32, {t_}),
                   .rstd = o.Write(kF32, {t_})});
    });
    // Pre-LN's last layer.
    Add("DropoutAddNorm, no norm, in place", {}, [*this](Operands& o) {
      const TensorView x = o.Update(act_, {t_, h_});
      return Call(o, &Backend::DropoutAddNorm,
                  {.x = x,
                   .bias = o.Read(act_, {h_}),
                   .residual = o.Read(act_, {t_, h_}),
                   .dropout = DropoutOf(o, dropout_),
                   .sum = x});
    });
  }

  void DropoutAddNormBackward() {
    // Pre-LN: attention's sum is also the feed-forward branch's residual, so it has a gradient
    // beside the norm's; and so is the sum of the layer below attention's.
    for (const bool pre_norm : {true, false})
      for (const bool again : {true, false})
        Add(absl::StrCat("DropoutAddNormBackward, norm", pre_norm ? ", dsum" : "",
                         again ? ", y again" : ""),
            !again     ? Calls{}
            : pre_norm ? Calls{.pre_norm = 2}
                       : Calls{.post_norm = 2},
            [=, *this](Operands& o) {
              const TensorView dy = again ? o.Update(act_, {t_, h_}) : o.Read(act_, {t_, h_});
              return Call(o, &Backend::DropoutAddNormBackward,
                          {.dy = dy,
                           .dsum = pre_norm ? o.Read(act_, {t_, h_}) : TensorView{},
                           .sum = o.Read(act_, {t_, h_}),
                           .beta = again ? o.Read(act_, {h_}) : TensorView{},
                           .y_again = again ? dy : TensorView{},
                           .gamma = o.Read(act_, {h_}),
                           .mean = o.Read(kF32, {t_}),
                           .rstd = o.Read(kF32, {t_}),
                           .dropout = DropoutOf(o, dropout_),
                           .dresidual = o.Write(act_, {t_, h_}),
                           .dx = o.Write(act_, {t_, h_}),
                           .dbias = o.Update(kF32, {h_}),
                           .dgamma = o.Update(kF32, {h_}),
                           .dbeta = o.Update(kF32, {h_})});
            })
            .sums_tokens = true;
    // Pre-LN's last layer.
    Add("DropoutAddNormBackward, no norm", {}, [*this](Operands& o) {
      return Call(o, &Backend::DropoutAddNormBackward,
                  {.dsum = o.Read(act_, {t_, h_}),
                   .dropout = DropoutOf(o, dropout_),
                   .dx = o.Write(act_, {t_, h_}),
                   .dbias = o.Update(kF32, {h_})});
    }).sums_tokens = true;
  }

  void Attention(float ratio, bool causal) {
    const std::string suffix = absl::StrCat(causal ? ", causal" : "", ratio > 0 ? ", dropout" : "");
    // A layer calls it as the stack's settings say: with its dropout, not causal.
    const Calls calls = causal || ratio != dropout_ ? Calls{} : Calls{1, 1};
    // Two products forward; five backward, which computes the probabilities again.
    const double product = ProductFlops(t_, dims_.seq, h_) * (causal ? 0.5 : 1.0);
    Add("Attention" + suffix, calls, [=, *this](Operands& o) {
      return Call(o, &Backend::Attention, AttentionArgsOf(o, ratio, causal));
    }).flops = 2 * product;
    OpCase& backward =
        Add("AttentionBackward" + suffix + ", dbias", calls, [=, *this](Operands& o) {
          const AttentionArgs forward = AttentionArgsOf(o, ratio, causal);
          Check(o.backend().Attention(workspace_, forward));  // fills out and saved
          return Call(o, &Backend::AttentionBackward,
                      {.dims = dims_,
                       .qkv = forward.qkv,
                       .causal = causal,
                       .scale = forward.scale,
                       .dropout = forward.dropout,
                       .out = forward.out,
                       .saved = forward.saved,
                       .dout = o.Read(act_, {t_, h_}),
                       .dqkv = o.Write(act_, {t_, 3 * h_}),
                       .dbias = o.Update(kF32, {3 * h_})});
        });
    backward.flops = 5 * product;
    backward.sums_tokens = true;
  }

  // Backward reads what Forward reads and writes, so the bytes that are counted are the same.
  AttentionArgs AttentionArgsOf(Operands& o, float ratio, bool causal) const {
    const auto saved = static_cast<int64_t>(o.backend().AttentionSavedBytes(dims_));
    return {.dims = dims_,
            .qkv = o.Read(act_, {t_, 3 * h_}),
            .causal = causal,
            .scale = 1.0f / std::sqrt(static_cast<float>(dims_.head_dim())),
            .dropout = DropoutOf(o, ratio),
            .out = o.Write(act_, {t_, h_}),
            .saved = o.Write(DType::kU8, {saved})};
  }

  // What goes over all parameters of a stack at once.
  void Parameters() {
    const std::vector<LambSegment> segments = Segments();
    const int64_t n = segments.back().end;
    const bool separate = act_ != kF32;
    Add("Cast, fp32 to act, all parameters", {}, [=, *this](Operands& o) {
      return Call(o, &Backend::Cast, {.src = o.Read(kF32, {n}), .dst = o.Write(act_, {n})});
    });
    Add("GradientStats, all parameters", {}, [=](Operands& o) {
      auto* control = o.tensors().Copy<OptimizerControl>({OptimizerControl{}});
      return Call(o, &Backend::GradientStats,
                  {.grad = o.Read(kF32, {n}), .max_norm = 1.0f, .control = control});
    });
    Add("AdamW, all parameters", {}, [=, *this](Operands& o) {
      return Call(o, &Backend::AdamW,
                  {.master = o.Update(kF32, {n}),
                   .weights = separate ? o.Write(act_, {n}) : TensorView{},
                   .grad = o.Read(kF32, {n}),
                   .m = o.Update(kF32, {n}),
                   .v = o.UpdateZeros(kF32, {n}),  // squares: noise would be negative
                   .lr = 1e-4f,
                   .weight_decay = 0.01f,
                   .control = o.tensors().Copy<OptimizerControl>({{.grad_scale = 1.0f}})});
    });
    Add("Lamb, all parameters", {}, [=, *this](Operands& o) {
      return Call(o, &Backend::Lamb,
                  {.master = o.Update(kF32, {n}),
                   .weights = separate ? o.Write(act_, {n}) : TensorView{},
                   .grad = o.Read(kF32, {n}),
                   .m = o.Update(kF32, {n}),
                   .v = o.UpdateZeros(kF32, {n}),
                   .segments = o.tensors().Copy(segments),
                   .segment_count = static_cast<int64_t>(segments.size()),
                   .lr = 1e-4f,
                   .weight_decay = 0.01f,
                   .control = o.tensors().Copy<OptimizerControl>({{.grad_scale = 1.0f}})});
    });
  }

  // A stack's parameters in its order: all matrices, then all vectors, each at a multiple of 128.
  std::vector<LambSegment> Segments() const {
    std::vector<LambSegment> segments;
    int64_t end = 0;
    const auto place = [&](int64_t elements, int32_t matrix) {
      segments.push_back({end, end + elements, matrix, matrix});
      end = (end + elements + 127) / 128 * 128;
    };
    for (int64_t l = 0; l < layers_; ++l)
      for (const int64_t elements : {3 * h_ * h_, h_ * h_, i_ * h_, h_ * i_}) place(elements, 1);
    for (int64_t l = 0; l < layers_; ++l)
      for (const int64_t elements : {3 * h_, h_, h_, h_, i_, h_, h_, h_}) place(elements, 0);
    return segments;
  }

  LayerDims dims_;
  float dropout_;
  int64_t layers_;
  Workspace workspace_;
  DType act_ = dims_.dtype;
  int64_t t_ = dims_.tokens(), h_ = dims_.hidden, i_ = dims_.intermediate;
  std::vector<OpCase>* cases_;
};

}  // namespace

TensorView Operands::Moved(DType dtype, const Shape& shape, size_t times) {
  const TensorView view =
      IsFloat(dtype) ? tensors_.Noise(dtype, shape) : tensors_.Zeros(dtype, shape);
  moved_bytes_ += times * view.bytes();
  return view;
}

TensorView Operands::UpdateZeros(DType dtype, const Shape& shape) {
  const TensorView view = tensors_.Zeros(dtype, shape);
  moved_bytes_ += 2 * view.bytes();
  return view;
}

std::vector<OpCase> LayerOps(const LayerDims& dims, float dropout, int64_t layers,
                             const Workspace& workspace) {
  std::vector<OpCase> cases;
  Cases(dims, dropout, layers, workspace, &cases).AddAll();
  return cases;
}

OpCase ProductCeiling(DType dtype, int64_t size) {
  return {
      .name = "product ceiling", .flops = ProductFlops(size, size, size), .make = [=](Operands& o) {
        return OpCall([&backend = o.backend(),
                       args = LinearArgs{.x = o.Read(dtype, {size, size}),
                                         .w = o.Read(dtype, {size, size}),
                                         .y = o.Write(dtype, {size, size})}](const Workspace& ws) {
          return backend.Linear(ws, args);
        });
      }};
}

OpCase CopyCeiling(int64_t bytes) {
  return {.name = "copy ceiling", .make = [=](Operands& o) {
            const TensorView from = o.Read(kF32, {bytes / 4}), to = o.Write(kF32, {bytes / 4});
            return OpCall([&backend = o.backend(), from, to](const Workspace&) {
              return backend.CopyWithin(to.data, from.data, from.bytes());
            });
          }};
}

}  // namespace lamina::bench
