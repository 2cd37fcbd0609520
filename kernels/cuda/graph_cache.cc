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
    entries_.push_front(Entry{.key = key, .last_run = ++runs_});
    if (entries_.size() > kMaxKeys) DropOldest();
    return status;
  }
  entries_.splice(entries_.begin(), entries_, found);
  Entry& entry = *found;
  entry.last_run = ++runs_;
  if (cudaSetDevice(ordinal_) != cudaSuccess) return work();  // which says so
  if (!entry.graph && !entry.refused) Capture(entry, work);
  if (!entry.graph) return work();
  if (cudaGraphLaunch(entry.graph.get(), stream_) == cudaSuccess) return absl::OkStatus();
  // Nothing of it was enqueued. A device that failed refuses the kernels too.
  static_cast<void>(cudaGetLastError());
  entry.graph.reset();
  bytes_ -= entry.bytes;
  entry.refused = true;
  return work();
}

void GraphCache::Capture(Entry& entry, absl::FunctionRef<absl::Status()> work) {
  if (!MakeRoom(entry.bytes)) return;
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
  if (cudaGraphGetNodes(graph.get(), nullptr, &nodes) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return;
  }
  entry.bytes = nodes * kGraphNodeBytes;
  if (entry.bytes > kGraphBytes) return;
  if (!MakeRoom(entry.bytes)) {
    entry.refused = false;  // there may be room another time
    return;
  }

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
  entry.refused = false;
  bytes_ += entry.bytes;
}

bool GraphCache::MakeRoom(size_t bytes) {
  while (bytes_ + bytes > kGraphBytes && runs_ - entries_.back().last_run > kIdleRuns) DropOldest();
  return bytes_ + bytes <= kGraphBytes;
}

void GraphCache::DropOldest() {
  if (entries_.back().graph) bytes_ -= entries_.back().bytes;
  entries_.pop_back();
}

void GraphCache::Forget() {
  if (cudaSetDevice(ordinal_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  entries_.clear();
  bytes_ = 0;
}

}  // namespace lamina::cuda
