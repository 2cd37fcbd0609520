#include "graph_cache.h"

#include <algorithm>

#include "kernel_limits.h"

namespace lamina::cuda {

absl::Status GraphCache::Run(const Key& key, absl::FunctionRef<absl::Status()> work) {
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.key == key; });
  if (found == entries_.end()) {
    absl::Status status = work();
    if (!status.ok()) return status;
    entries_.push_front(Entry{.key = key});
    if (entries_.size() > kMaxGraphKeys) DropOldest();
    return status;
  }
  entries_.splice(entries_.begin(), entries_, found);
  Entry& entry = *found;
  if (cudaSetDevice(ordinal_) != cudaSuccess) return work();  // which says so
  if (!entry.graph && !entry.refused) Capture(entry, work);
  if (!entry.graph) return work();
  if (cudaGraphLaunch(entry.graph.get(), stream_) == cudaSuccess) return absl::OkStatus();
  // Nothing of it was enqueued. A device that failed refuses the kernels too.
  static_cast<void>(cudaGetLastError());
  entry.graph.reset();
  bytes_ -= entry.bytes;
  entry.bytes = 0;
  entry.refused = true;
  return work();
}

void GraphCache::Capture(Entry& entry, absl::FunctionRef<absl::Status()> work) {
  entry.refused = true;  // unless all goes well
  // Other threads may allocate meanwhile; this one may not.
  if (cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return;
  }
  const absl::Status captured = work();
  cudaGraph_t raw = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_, &raw);  // ends it, failed or not
  const Owned<cudaGraph_t> graph(raw);
  if (ended != cudaSuccess) static_cast<void>(cudaGetLastError());
  if (!captured.ok() || ended != cudaSuccess || !graph) return;

  size_t nodes = 0;
  if (cudaGraphGetNodes(graph.get(), nullptr, &nodes) != cudaSuccess) return;
  const size_t bytes = nodes * kGraphNodeBytes;
  if (bytes > kGraphBytes) return;
  while (bytes_ + bytes > kGraphBytes) DropOldest();  // this entry, the first, has none yet

  cudaGraphExec_t exec = nullptr;
  cudaError_t error = cudaGraphInstantiate(&exec, graph.get(), 0);
  entry.graph.reset(exec);
  // So that the memory that a launch needs is asked for here.
  if (error == cudaSuccess) error = cudaGraphUpload(exec, stream_);
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    entry.graph.reset();
    return;
  }
  entry.bytes = bytes;
  entry.refused = false;
  bytes_ += bytes;
}

void GraphCache::DropOldest() {
  bytes_ -= entries_.back().bytes;
  entries_.pop_back();
}

void GraphCache::Forget() {
  if (cudaSetDevice(ordinal_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  entries_.clear();
  bytes_ = 0;
}

}  // namespace lamina::cuda
