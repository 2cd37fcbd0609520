#include "parameters.h"

#include <string>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace lamina {

const ParameterKind kParameterKinds[kParametersPerLayer] = {
    {"attn_qkvw", ParameterRole::kInnerMatrix, &LayerTensors::attn_qkvw},
    {"attn_qkvb", ParameterRole::kBias, &LayerTensors::attn_qkvb},
    {"attn_ow", ParameterRole::kOutputMatrix, &LayerTensors::attn_ow},
    {"attn_ob", ParameterRole::kBias, &LayerTensors::attn_ob},
    {"attn_nw", ParameterRole::kGamma, &LayerTensors::attn_nw},
    {"attn_nb", ParameterRole::kBias, &LayerTensors::attn_nb},
    {"inter_w", ParameterRole::kInnerMatrix, &LayerTensors::inter_w},
    {"inter_b", ParameterRole::kBias, &LayerTensors::inter_b},
    {"output_w", ParameterRole::kOutputMatrix, &LayerTensors::output_w},
    {"output_b", ParameterRole::kBias, &LayerTensors::output_b},
    {"norm_w", ParameterRole::kGamma, &LayerTensors::norm_w},
    {"norm_b", ParameterRole::kBias, &LayerTensors::norm_b},
};

namespace {

// The thirds of the fused Q, K, V parameters under their own names.
struct PartName {
  const char* name;
  int kind;   // index into kParameterKinds
  int third;  // 0 Q, 1 K, 2 V
};
constexpr PartName kPartNames[] = {
    {"attn_qw", 0, 0}, {"attn_kw", 0, 1}, {"attn_vw", 0, 2},
    {"attn_qb", 1, 0}, {"attn_kb", 1, 1}, {"attn_vb", 1, 2},
};

int64_t Align(int64_t elements) {
  constexpr int64_t a = ParameterLayout::kAlignElements;
  return (elements + a - 1) / a * a;
}

}  // namespace

ParameterLayout::ParameterLayout(const StackConfig& config)
    : hidden_(config.hidden_size),
      intermediate_(config.intermediate_size),
      layers_(config.num_hidden_layers) {
  for (int kind = 0; kind < kParametersPerLayer; ++kind) {
    int64_t& end = IsMatrix(kParameterKinds[kind].role) ? matrices_per_layer_ : vectors_per_layer_;
    offset_in_layer_[kind] = end;
    end += PaddedElements(kind);
  }
  decayed_elements_ = layers_ * matrices_per_layer_;
  elements_ = decayed_elements_ + layers_ * vectors_per_layer_;
  parameters_.reserve(static_cast<size_t>(layers_) * kParametersPerLayer);
  for (int64_t layer = 0; layer < layers_; ++layer)
    for (int kind = 0; kind < kParametersPerLayer; ++kind)
      parameters_.push_back(
          {absl::StrCat("layers.", layer, ".", kParameterKinds[kind].name), ShapeOf(kind)});
}

Shape ParameterLayout::ShapeOf(int kind) const {
  const auto member = kParameterKinds[kind].member;
  if (member == &LayerTensors::attn_qkvw) return {3 * hidden_, hidden_};
  if (member == &LayerTensors::attn_qkvb) return {3 * hidden_};
  if (member == &LayerTensors::attn_ow) return {hidden_, hidden_};
  if (member == &LayerTensors::inter_w) return {intermediate_, hidden_};
  if (member == &LayerTensors::inter_b) return {intermediate_};
  if (member == &LayerTensors::output_w) return {hidden_, intermediate_};
  return {hidden_};
}

int64_t ParameterLayout::PaddedElements(int kind) const { return Align(ShapeOf(kind).elements()); }

int64_t ParameterLayout::Offset(int64_t layer, int kind) const {
  const int64_t first = IsMatrix(kParameterKinds[kind].role)
                            ? layer * matrices_per_layer_
                            : decayed_elements_ + layer * vectors_per_layer_;
  return first + offset_in_layer_[kind];
}

absl::StatusOr<ParameterLayout::Slot> ParameterLayout::Find(const std::string& name) const {
  const std::vector<absl::string_view> parts = absl::StrSplit(name, absl::MaxSplits('.', 2));
  int64_t layer = -1;
  if (parts.size() == 3 && parts[0] == "layers" && absl::SimpleAtoi(parts[1], &layer) &&
      layer >= 0 && layer < layers_ && parts[1] == absl::StrCat(layer)) {
    for (int kind = 0; kind < kParametersPerLayer; ++kind)
      if (parts[2] == kParameterKinds[kind].name)
        return Slot{{name, ShapeOf(kind)}, Offset(layer, kind), layer};
    for (const PartName& part : kPartNames) {
      if (parts[2] != part.name) continue;
      const Shape fused = ShapeOf(part.kind);
      const Shape shape = fused.rank() == 2 ? Shape{hidden_, hidden_} : Shape{hidden_};
      return Slot{{name, shape}, Offset(layer, part.kind) + part.third * shape.elements(), layer};
    }
  }
  std::string known;
  for (const ParameterKind& kind : kParameterKinds) absl::StrAppend(&known, kind.name, ", ");
  return absl::NotFoundError(absl::StrCat("no parameter \"", name, "\": names are layers.<0 to ",
                                          layers_ - 1, ">.<one of ", known,
                                          "attn_qw, attn_kw, attn_vw, attn_qb, attn_kb, attn_vb>"));
}

LayerTensors ParameterLayout::LayerViews(int64_t layer, void* base, DType dtype) const {
  LayerTensors views;
  for (int kind = 0; kind < kParametersPerLayer; ++kind) {
    char* data =
        static_cast<char*>(base) + static_cast<size_t>(Offset(layer, kind)) * SizeOf(dtype);
    views.*kParameterKinds[kind].member = TensorView{data, dtype, ShapeOf(kind)};
  }
  return views;
}

}  // namespace lamina
