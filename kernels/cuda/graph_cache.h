// Steps captured into CUDA graphs. The first run of a key launches its kernels one by one, so that
// everything that is set up once (products' plans, lazily loaded kernels) is there; the second one
// is captured; later ones are replayed. Where CUDA refuses to capture, instantiate or launch, the
// step runs as it would without graphs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <list>
#include <memory>
#include <type_traits>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "lamina/kernels/backend.h"

namespace lamina::cuda {

// The keys last used, up to kMaxGraphKeys of them, and graphs of some of them, up to kGraphBytes of
// device memory together (kernel_limits.h). Steps that take turns with more than fit are launched
// one by one or captured now and then: always right, only slower.
class GraphCache final : public StepCache {
 public:
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
    size_t bytes = 0;              // of the graph, as they are counted
    bool refused = false;          // not to be tried again
  };

  void Capture(Entry& entry, absl::FunctionRef<absl::Status()> work);
  void DropOldest();

  const int ordinal_;
  const cudaStream_t stream_;
  std::list<Entry> entries_;  // the last used one first
  size_t bytes_ = 0;          // of all graphs
};

}  // namespace lamina::cuda
