#include "graph_cache.h"

#include <algorithm>
#include <utility>

#include "kernel_limits.h"

namespace lamina::cuda {
namespace {

// Whether a call succeeded; the error of one that did not is not left to the next one.
bool Succeeded(cudaError_t error) {
  if (error == cudaSuccess) return true;
  static_cast<void>(cudaGetLastError());
  return false;
}

}  // namespace

absl::Status GraphCache::Run(const Key& kind_key, const Key& key, int64_t parts, Part part) {
  const Range all{0, parts};
  ++runs_;
  if (cudaSetDevice(ordinal_) != cudaSuccess) return RunPlainly(all, part);  // which says so
  Kind& kind = KindOf(kind_key);
  kind.last_run = runs_;
  const auto known = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.key == key; });
  if (known == entries_.end()) {
    ++kind.keys;
  } else {
    entries_.splice(entries_.begin(), entries_, known);
    Entry& entry = *known;
    entry.last_run = runs_;
    const int64_t enough = kind.keys > kFewKeys ? kRunsAmongMany : 1;
    if (entry.runs++ >= enough && Replay(entry, parts, part)) return absl::OkStatus();
  }
  absl::Status status = kind.keys > kFewKeys && !kind.refused ? RunInPieces(kind, parts, part)
                                                              : RunPlainly(all, part);
  if (status.ok() && known == entries_.end()) {
    entries_.push_front(Entry{.key = key, .runs = 1, .last_run = runs_});
    if (entries_.size() > kMaxKeys) {
      Drop(entries_.back().graph);
      entries_.pop_back();
    }
  }
  return status;
}

GraphCache::Kind& GraphCache::KindOf(const Key& key) {
  const auto known =
      std::find_if(kinds_.begin(), kinds_.end(), [&](const Kind& kind) { return kind.key == key; });
  if (known != kinds_.end()) {
    kinds_.splice(kinds_.begin(), kinds_, known);
    return *known;
  }
  kinds_.push_front(Kind{.key = key});
  if (kinds_.size() > kMaxKeys) {
    Drop(kinds_.back());
    kinds_.pop_back();
  }
  return kinds_.front();
}

absl::Status GraphCache::RunPlainly(Range range, Part part) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (absl::Status status = part(i); !status.ok()) return status;
  }
  return absl::OkStatus();
}

bool GraphCache::Replay(Entry& entry, int64_t parts, Part part) {
  if (entry.refused) return false;
  Graph& graph = entry.graph;
  if (!graph.exec) {
    if (!MakeRoom(graph.bytes)) return false;
    const Owned<cudaGraph_t> captured = Capture({0, parts}, part);
    entry.refused = captured == nullptr;
    if (!captured || !Instantiate(graph, captured.get(), entry.refused)) return false;
  }
  if (Succeeded(cudaGraphLaunch(graph.exec.get(), stream_))) return true;
  // Nothing of it was enqueued. A device that failed refuses the kernels too.
  Drop(graph);
  entry.refused = true;
  return false;
}

absl::Status GraphCache::RunInPieces(Kind& kind, int64_t parts, Part part) {
  const int64_t size = std::max(kPieceParts, (parts + kMostPieces - 1) / kMostPieces);
  const int64_t pieces = (parts + size - 1) / size;
  kind.pieces.resize(std::max(kind.pieces.size(), static_cast<size_t>(pieces)));
  for (int64_t i = 0; i < pieces; ++i) {
    const Range range{i * size, std::min((i + 1) * size, parts)};
    Piece& piece = kind.pieces[static_cast<size_t>(i)];
    if (!kind.refused && RunPiece(kind, piece, range, part)) continue;
    if (absl::Status status = RunPlainly(range, part); !status.ok()) return status;
  }
  if (kind.refused) Drop(kind);
  return absl::OkStatus();
}

bool GraphCache::RunPiece(Kind& kind, Piece& piece, Range range, Part part) {
  kind.refused = true;  // unless all goes well
  const Owned<cudaGraph_t> captured = Capture(range, part);
  Clusters clusters;
  if (!captured || !ClustersOf(captured.get(), clusters)) return false;
  const auto known = std::find_if(piece.begin(), piece.end(), [&](const Variant& variant) {
    return variant.clusters == clusters;
  });
  if (known != piece.end()) {
    piece.splice(piece.begin(), piece, known);
    cudaGraphExecUpdateResultInfo result = {};
    Graph& graph = piece.front().graph;
    if (Succeeded(cudaGraphExecUpdate(graph.exec.get(), captured.get(), &result))) {
      ++kind.changed;
    } else {
      Drop(graph);  // it has other nodes
    }
  } else {
    if (piece.size() == kPieceVariants) {
      Drop(piece.back().graph);
      piece.pop_back();
    }
    piece.push_front(Variant{.clusters = std::move(clusters)});
  }
  Graph& graph = piece.front().graph;
  if (!graph.exec) {
    // To make a graph takes longer than to launch its kernels: a kind whose steps differ so much
    // goes without, and so does one for which there is no room.
    const auto most = static_cast<int64_t>(kind.pieces.size() * kPieceVariants);
    bool refused = false;
    if (++kind.made > kind.changed + most || !CountBytes(graph, captured.get()) ||
        !MakeRoomInPiece(piece, graph.bytes) || !Instantiate(graph, captured.get(), refused))
      return false;
  }
  if (!Succeeded(cudaGraphLaunch(graph.exec.get(), stream_))) return false;
  kind.refused = false;
  return true;
}

bool GraphCache::MakeRoomInPiece(Piece& piece, size_t bytes) {
  size_t all = 0;
  for (const Kind& kind : kinds_) {
    for (const Piece& other : kind.pieces) {
      for (const Variant& variant : other) all += variant.graph.exec ? variant.graph.bytes : 0;
    }
  }
  while (all + bytes > kGraphBytes / 2 && piece.size() > 1) {
    if (piece.back().graph.exec) all -= piece.back().graph.bytes;
    Drop(piece.back().graph);
    piece.pop_back();
  }
  return all + bytes <= kGraphBytes / 2;
}

bool GraphCache::ClustersOf(cudaGraph_t captured, Clusters& clusters) {
  size_t count = 0;
  if (!Succeeded(cudaGraphGetNodes(captured, nullptr, &count))) return false;
  std::vector<cudaGraphNode_t> nodes(count);
  if (!Succeeded(cudaGraphGetNodes(captured, nodes.data(), &count))) return false;
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    if (!Succeeded(cudaGraphNodeGetType(node, &type))) return false;
    if (type != cudaGraphNodeTypeKernel) continue;
    cudaLaunchAttributeValue value{};
    if (!Succeeded(
            cudaGraphKernelNodeGetAttribute(node, cudaLaunchAttributeClusterDimension, &value)))
      return false;
    clusters.push_back(uint64_t{value.clusterDim.x} << 32 | value.clusterDim.y << 16 |
                       value.clusterDim.z);
  }
  return true;
}

GraphCache::Owned<cudaGraph_t> GraphCache::Capture(Range range, Part part) {
  // Other threads may allocate meanwhile; this one may not.
  if (!Succeeded(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal))) return nullptr;
  const absl::Status captured = RunPlainly(range, part);
  cudaGraph_t raw = nullptr;
  const bool ended = Succeeded(cudaStreamEndCapture(stream_, &raw));  // ends it, failed or not
  Owned<cudaGraph_t> graph(raw);
  if (!captured.ok() || !ended) return nullptr;
  return graph;
}

bool GraphCache::CountBytes(Graph& graph, cudaGraph_t captured) {
  size_t nodes = 0;
  if (!Succeeded(cudaGraphGetNodes(captured, nullptr, &nodes))) return false;
  graph.bytes = kGraphFixedBytes + nodes * kGraphNodeBytes;
  return true;
}

bool GraphCache::Instantiate(Graph& graph, cudaGraph_t captured, bool& refused) {
  refused = !CountBytes(graph, captured) || graph.bytes > kGraphBytes;
  // Where there is no room there may be some another time.
  if (refused || !MakeRoom(graph.bytes)) return false;
  cudaGraphExec_t exec = nullptr;
  refused = !Succeeded(cudaGraphInstantiate(&exec, captured, 0));
  graph.exec.reset(exec);
  // So that the memory that a launch needs is asked for here.
  if (!refused) refused = !Succeeded(cudaGraphUpload(exec, stream_));
  if (refused) {
    graph.exec.reset();
    return false;
  }
  bytes_ += graph.bytes;
  return true;
}

void GraphCache::Drop(Graph& graph) {
  if (graph.exec) bytes_ -= graph.bytes;
  graph.exec.reset();
}

void GraphCache::Drop(Kind& kind) {
  for (Piece& piece : kind.pieces) {
    for (Variant& variant : piece) Drop(variant.graph);
    piece.clear();
  }
}

bool GraphCache::MakeRoom(size_t bytes) {
  const auto idle = [&](const auto& one) { return runs_ - one.last_run > kIdleRuns; };
  for (auto entry = entries_.rbegin();
       entry != entries_.rend() && bytes_ + bytes > kGraphBytes && idle(*entry); ++entry) {
    Drop(entry->graph);
  }
  for (auto kind = kinds_.rbegin();
       kind != kinds_.rend() && bytes_ + bytes > kGraphBytes && idle(*kind); ++kind) {
    Drop(*kind);
  }
  return bytes_ + bytes <= kGraphBytes;
}

void GraphCache::Forget() {
  static_cast<void>(Succeeded(cudaSetDevice(ordinal_)));
  entries_.clear();
  kinds_.clear();
  bytes_ = 0;
}

}  // namespace lamina::cuda
