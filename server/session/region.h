// A region's memory: a sealed memfd, or device memory; mapped here and charged to ledgers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/session/session_manager.h"

namespace lamina {

// What is charged: of one session, or of all together. Threads: any.
class Ledger {
 public:
  explicit Ledger(size_t cap) : cap_(cap) {}
  // False, and nothing charged, where the cap would be passed.
  bool Charge(size_t bytes);
  void Uncharge(size_t bytes);
  size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
  size_t cap() const { return cap_; }
  std::atomic<int64_t> count{0};  // regions that exist

 private:
  const size_t cap_;
  std::atomic<size_t> bytes_{0};
};

// The two ledgers that a region is charged to.
struct Ledgers {
  std::shared_ptr<Ledger> session, total;
};

// `id` is the new region's; `bytes` >= 1 is rounded up to whole pages. RESOURCE_EXHAUSTED with the
// numbers where a ledger's cap, the descriptors or the free memory do not allow it. The pages are
// reserved at once: a later touch of them can't fail. The hooks' functions run here and in the
// region's destructor. `ledgers` are those of the kind's memory.
absl::StatusOr<std::shared_ptr<Region>> MakeRegion(std::string id, size_t bytes, RegionKind kind,
                                                   Ledgers ledgers,
                                                   std::shared_ptr<const SessionHooks> hooks);

}  // namespace lamina
