// Plans that are computed in this process, by the code that the daemon allocates with: no daemon
// and no device is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "lamina/client/types.h"
#include "nlohmann/json_fwd.hpp"

namespace lamina::cli {

// The layers of a model that people know by name, as a config's fields. INVALID_ARGUMENT lists the
// names.
absl::StatusOr<nlohmann::json> ModelFields(const std::string& name);
std::string ModelNames();  // "bert-base, bert-large, ..."

// What the config would allocate. `device`: "cuda", which is a Hopper card, or "cpu", which is this
// machine with a thread a core. INVALID_ARGUMENT as the daemon's.
absl::StatusOr<client::MemoryPlan> PlanOffline(const client::StackConfig& config,
                                               const std::string& device);

// Micro-batches that need the same memory flags: lamina/transformer/plan.h.
struct Capacity {
  int64_t seq = 0;
  int64_t batch_from = 0, batch_to = 0;
  std::vector<std::string> flags;
  uint64_t bytes = 0;  // of the plan at batch_to
};
// By sequence length, then batch. The config's batch_size, max_seq_length, max_contexts and memory
// flags do not count. INVALID_ARGUMENT as PlanOffline.
absl::StatusOr<std::vector<Capacity>> CapacityOffline(const client::StackConfig& config,
                                                      const std::string& device, uint64_t memory,
                                                      const std::vector<int64_t>& seqs);
// The largest micro-batch that a stack takes at all: where memory is not what ends the rows.
int64_t LargestBatch();

}  // namespace lamina::cli
