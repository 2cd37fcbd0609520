// The memory plan: what a stack allocates, to the byte, before anything is allocated. The same code
// lays out the arena, so the two cannot differ. The device's driver allocates kGraphs by itself, as
// steps come back, up to what the plan says.
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
  kGraphs = 7,       // captured steps at most; zero on devices that capture none
};
inline constexpr int kMemoryKinds = 8;
const char* Name(MemoryKind kind);  // "weights", "master_weights", ...

struct PlanEntry {
  MemoryKind kind;
  std::string name;  // what it is: "weights", "layer.qkv", "workspace.ops", ...
  // All instances together, alignment padding included. 0 for "layer.attn_dropout": attention keeps
  // neither its probabilities nor what dropout leaves of them, with attn_dropout_checkpoint or
  // without.
  size_t bytes = 0;
  int64_t instances = 1;  // e.g. L layers x max_contexts
};

struct MemoryPlan {
  std::vector<PlanEntry> entries;
  size_t context_bytes = 0;  // one context of all layers that any call, packed or not, fits into
  size_t Bytes(MemoryKind kind) const;
  size_t Total() const;
};

// Bytes of a context of `layers` layers for a call of these dims (config.Dims): what a training
// Forward takes from the context arena. Grows with each dimension.
size_t ContextBytes(const StackConfig& config, const OpSizes& sizes, int64_t layers,
                    const LayerDims& dims);

// `config` is resolved. INVALID_ARGUMENT where a size overflows 63 bits.
absl::StatusOr<MemoryPlan> PlanStack(const StackConfig& config, const OpSizes& sizes);

// How large a micro-batch fits, and what it takes: the table of DeepSpeed's tutorial, computed.
struct CapacityRow {
  int64_t seq = 0;
  int64_t batch_from = 0, batch_to = 0;  // micro-batches that need exactly these flags
  std::vector<std::string> flags;        // by the config's names; empty: none is needed
  size_t bytes = 0;                      // the plan's total at batch_to
};
// Rows by seq, then ascending batch. Flags come in the order of what they cost in time: each row
// adds the cheapest set that fits. `config`'s own batch_size, max_seq_length and memory flags are
// ignored; one context. A seq at which not even batch 1 fits has no row. INVALID_ARGUMENT as
// Resolve.
absl::StatusOr<std::vector<CapacityRow>> PlanCapacity(const StackConfig& config,
                                                      const OpSizes& sizes, size_t memory_bytes,
                                                      const std::vector<int64_t>& seqs);

}  // namespace lamina
