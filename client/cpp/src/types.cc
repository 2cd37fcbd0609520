#include "lamina/client/types.h"

#include <array>
#include <utility>

namespace lamina::client {
namespace {

constexpr std::array<std::pair<const char*, DType>, 7> kDTypeNames = {{
    {"fp32", DType::kFloat32},
    {"bf16", DType::kBFloat16},
    {"fp16", DType::kFloat16},
    {"int32", DType::kInt32},
    {"float32", DType::kFloat32},
    {"bfloat16", DType::kBFloat16},
    {"float16", DType::kFloat16},
}};

}  // namespace

const char* Name(DType dtype) {
  for (const auto& [name, value] : kDTypeNames) {
    if (value == dtype) return name;
  }
  return "unknown";
}

size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

std::optional<DType> ParseDType(std::string_view name) {
  for (const auto& [known, value] : kDTypeNames) {
    if (name == known) return value;
  }
  return std::nullopt;
}

const char* Name(Transport transport) {
  switch (transport) {
    case Transport::kNone:
      return "none";
    case Transport::kInline:
      return "inline";
    case Transport::kMemfd:
      return "memfd";
    case Transport::kDevice:
      return "device";
    case Transport::kPosix:
      return "posix";
  }
  return "unknown";
}

const char* Name(Gelu gelu) { return gelu == Gelu::kTanh ? "tanh" : "erf"; }

std::optional<Gelu> ParseGelu(std::string_view name) {
  if (name == "erf") return Gelu::kErf;
  if (name == "tanh") return Gelu::kTanh;
  return std::nullopt;
}

const char* Name(AttentionPath path) {
  switch (path) {
    case AttentionPath::kNone:
      return "none";
    case AttentionPath::kFused:
      return "fused";
    case AttentionPath::kPlain:
      return "plain";
  }
  return "unknown";
}

const char* Name(OptimizerKind kind) { return kind == OptimizerKind::kLamb ? "lamb" : "adamw"; }

std::optional<OptimizerKind> ParseOptimizer(std::string_view name) {
  if (name == "adamw") return OptimizerKind::kAdamW;
  if (name == "lamb") return OptimizerKind::kLamb;
  return std::nullopt;
}

std::string ToString(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

const char* Name(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::kWeights:
      return "weights";
    case MemoryKind::kMasterWeights:
      return "master_weights";
    case MemoryKind::kGradients:
      return "gradients";
    case MemoryKind::kOptimizer:
      return "optimizer";
    case MemoryKind::kActivations:
      return "activations";
    case MemoryKind::kWorkspace:
      return "workspace";
    case MemoryKind::kStaging:
      return "staging";
    case MemoryKind::kGraphs:
      return "graphs";
    case MemoryKind::kUnknown:
      break;
  }
  return "unknown";
}

uint64_t MemoryPlan::Bytes(MemoryKind kind) const {
  uint64_t sum = 0;
  for (const MemoryPlanEntry& entry : entries) {
    if (entry.kind == kind) sum += entry.bytes;
  }
  return sum;
}

const char* Name(Health health) {
  switch (health) {
    case Health::kServing:
      return "SERVING";
    case Health::kNotServing:
      return "NOT_SERVING";
    case Health::kServiceUnknown:
      return "SERVICE_UNKNOWN";
    case Health::kUnknown:
      break;
  }
  return "UNKNOWN";
}

}  // namespace lamina::client
