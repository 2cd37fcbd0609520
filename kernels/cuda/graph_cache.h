// Steps captured into CUDA graphs. The first run of a key launches its kernels one by one, so that
// everything that is set up once (products' plans, lazily loaded kernels) is there; the second one
// is captured; later ones are replayed. Where CUDA refuses to capture, instantiate or launch, the
// step runs as it would without graphs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <type_traits>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "lamina/kernels/backend.h"

namespace lamina::cuda {

// Keeps the keys last used, up to kMaxKeys of them, and graphs of some of them, up to kGraphBytes
// of device memory together (kernel_limits.h). A graph makes room for another one only after
// kIdleRuns runs of other steps: a capture costs as much as several steps' launches, and where more
// steps take turns than fit it would never pay, so then some of them stay without a graph.
class GraphCache final : public StepCache {
 public:
  static constexpr size_t kMaxKeys = 64;
  static constexpr int64_t kIdleRuns = 256;

  // Steps are enqueued on `stream` of device `ordinal`, which outlives the cache.
  GraphCache(int ordinal, cudaStream_t stream) : ordinal_(ordinal), stream_(stream) {}
  ~GraphCache() override { Forget(); }

  absl::Status Run(const Key& key, absl::FunctionRef<absl::Status()> work) override;
  void Forget() override;

 private:
  struct Destroy {
    void operator()(cudaGraph_t graph) const { static_cast<void>(cudaGraphDestroy(graph)); }
    // One that still runs is freed when it is done.
    void operator()(cudaGraphExec_t exec) const { static_cast<void>(cudaGraphExecDestroy(exec)); }
  };
  template <typename Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

  struct Entry {
    Key key;
    Owned<cudaGraphExec_t> graph;  // null: not captured, or not yet
    size_t bytes = 0;              // that its graph is counted as; 0: it was never captured
    int64_t last_run = 0;          // runs_ then
    bool refused = false;          // not to be tried again
  };

  // Sets entry.graph, or not. `entry` is the first.
  void Capture(Entry& entry, absl::FunctionRef<absl::Status()> work);
  // Drops idle graphs, and says whether so many more bytes may be taken now.
  bool MakeRoom(size_t bytes);
  void DropOldest();

  const int ordinal_;
  const cudaStream_t stream_;
  std::list<Entry> entries_;  // the last used one first
  size_t bytes_ = 0;          // of all graphs
  int64_t runs_ = 0;
};

}  // namespace lamina::cuda
