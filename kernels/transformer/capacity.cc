// PlanCapacity: which memory flags each micro-batch needs.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "lamina/transformer/plan.h"
#include "status_macros.h"

namespace lamina {
namespace {

struct Flag {
  const char* name;
  bool StackConfig::*member;
};
constexpr Flag kFlags[] = {
    {"gelu_checkpoint", &StackConfig::gelu_checkpoint},
    {"normalize_invertible", &StackConfig::normalize_invertible},
    {"activation_checkpointing", &StackConfig::activation_checkpointing},
};
constexpr unsigned kGelu = 1, kNorms = 2, kLayers = 4;  // bits, as kFlags is ordered

// By what they cost. gelu_checkpoint makes GELU's output once more a layer, with the same bits;
// normalize_invertible costs digits and may refuse a Forward. activation_checkpointing runs every
// layer's Forward twice; the others then shrink the one set that it recomputes into, but for
// normalize_invertible with Pre-LN. attn_dropout_checkpoint is not among them: it has nothing to
// drop.
constexpr unsigned kFlagSets[] = {
    0,       kGelu,           kNorms,           kGelu | kNorms,
    kLayers, kLayers | kGelu, kLayers | kNorms, kLayers | kGelu | kNorms};

}  // namespace

absl::StatusOr<std::vector<CapacityRow>> PlanCapacity(const StackConfig& config,
                                                      const OpSizes& sizes, size_t memory_bytes,
                                                      const std::vector<int64_t>& seqs) {
  std::vector<int64_t> ascending = seqs;
  std::sort(ascending.begin(), ascending.end());
  ascending.erase(std::unique(ascending.begin(), ascending.end()), ascending.end());

  std::vector<CapacityRow> rows;
  for (const int64_t seq : ascending) {
    StackConfig wanted = config;
    wanted.batch_size = 1;
    wanted.max_seq_length = seq;
    wanted.max_contexts = 1;
    wanted.attn_dropout_checkpoint = false;
    LAMINA_ASSIGN_OR_RETURN(wanted, Resolve(wanted, std::max(0, config.local_rank)));
    // The plan's bytes; SIZE_MAX where they overflow.
    const auto bytes_at = [&](int64_t batch) {
      wanted.batch_size = batch;
      const absl::StatusOr<MemoryPlan> plan = PlanStack(wanted, sizes);
      return plan.ok() ? plan->Total() : std::numeric_limits<size_t>::max();
    };
    int64_t covered = 0;  // batches up to here have their rows
    for (const unsigned set : kFlagSets) {
      CapacityRow row{.seq = seq, .batch_from = covered + 1};
      for (size_t i = 0; i < std::size(kFlags); ++i) {
        wanted.*kFlags[i].member = (set >> i & 1u) != 0;
        if (wanted.*kFlags[i].member) row.flags.emplace_back(kFlags[i].name);
      }
      // Bytes grow with the batch: the last one that fits lies in [fits, fails).
      int64_t fits = covered, fails = StackConfig::kMaxBatchSize + 1;
      while (fails - fits > 1) {
        const int64_t middle = fits + (fails - fits) / 2;
        (bytes_at(middle) <= memory_bytes ? fits : fails) = middle;
      }
      if (fits == covered) continue;
      row.batch_to = fits;
      row.bytes = bytes_at(fits);
      covered = fits;
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

}  // namespace lamina
