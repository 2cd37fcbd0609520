// The memory plan: what a stack allocates, to the byte, before anything is allocated. The same code
// lays out the arena, so the two cannot differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/config.h"

namespace lamina {

enum class MemoryKind : uint8_t {
  kWeights = 0,
  kMasterWeights = 1,  // fp32 copies; none where dtype is fp32, the weights are the master then
  kGradients = 2,
  kOptimizer = 3,
  kActivations = 4,  // max_contexts full-size contexts
  kWorkspace = 5,    // gradients in flight, op scratch
  kStaging = 6,      // device copies of a call's tensors; zero where kernels read host memory
};
inline constexpr int kMemoryKinds = 7;
const char* Name(MemoryKind kind);  // "weights", "master_weights", ...

struct PlanEntry {
  MemoryKind kind;
  std::string name;       // what it is: "attn_qkvw", "layer.qkv", "workspace.ops", ...
  size_t bytes = 0;       // all instances together, alignment padding included
  int64_t instances = 1;  // e.g. L layers x max_contexts
};

struct MemoryPlan {
  std::vector<PlanEntry> entries;
  size_t context_bytes = 0;  // one full-size context of all layers
  size_t Bytes(MemoryKind kind) const;
  size_t Total() const;
};

// Bytes of a context for layers [begin, end) at (batch, seq): what a training Forward takes from
// the context arena.
size_t ContextBytes(const StackConfig& config, const Backend& backend, int64_t layers,
                    int64_t batch, int64_t seq);

// `config` is resolved. INVALID_ARGUMENT where a size overflows 63 bits.
absl::StatusOr<MemoryPlan> PlanStack(const StackConfig& config, const Backend& backend);

}  // namespace lamina
