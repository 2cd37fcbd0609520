// Steps captured into CUDA graphs. The first run of a key launches its kernels one by one, so that
// everything that is set up once (products' plans, lazily loaded kernels) is there; the second one
// is captured; later ones are replayed.
//
// Where one key after another is new, as with packed batches, which bring other numbers of tokens
// each time, a step is captured as it comes, in pieces of some parts: each piece's graph takes the
// place of the one that the same piece of the last such step had, whose launch is there already, so
// that kernels follow each other as closely as in a step that comes back. While one piece runs the
// next is captured.
//
// Where CUDA refuses to capture, instantiate, change or launch, the step runs as it would without
// graphs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <type_traits>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "lamina/kernels/backend.h"

namespace lamina::cuda {

// Keeps the keys and kinds last used, up to kMaxKeys of either, and graphs of some of them, up to
// kGraphBytes of device memory together (kernel_limits.h). A graph makes room for another one only
// after kIdleRuns runs of other steps: a capture costs as much as several steps' launches, and
// where more steps take turns than fit it would never pay, so then some of them stay without a
// graph.
class GraphCache final : public StepCache {
 public:
  static constexpr size_t kMaxKeys = 64;
  static constexpr int64_t kIdleRuns = 256;
  // A kind that has had more new keys than this runs them in pieces. A key of such a kind may well
  // be there a second time by chance: it is captured only when it has been there so often.
  static constexpr int64_t kFewKeys = 2;
  static constexpr int64_t kRunsAmongMany = 4;
  // A piece has so many parts at least, and a step so many pieces at most. Pieces take up to half
  // of kGraphBytes.
  static constexpr int64_t kPieceParts = 2;
  static constexpr int64_t kMostPieces = 16;
  static constexpr size_t kPieceVariants = 3;

  // Steps are enqueued on `stream` of device `ordinal`, which outlives the cache.
  GraphCache(int ordinal, cudaStream_t stream) : ordinal_(ordinal), stream_(stream) {}
  ~GraphCache() override { Forget(); }

  absl::Status Run(const Key& kind, const Key& key, int64_t parts,
                   absl::FunctionRef<absl::Status(int64_t)> part) override;
  void Forget() override;

 private:
  using Part = absl::FunctionRef<absl::Status(int64_t)>;
  struct Range {
    int64_t begin, end;  // of parts
  };
  struct Destroy {
    void operator()(cudaGraph_t graph) const { static_cast<void>(cudaGraphDestroy(graph)); }
    // One that still runs is freed when it is done.
    void operator()(cudaGraphExec_t exec) const { static_cast<void>(cudaGraphExecDestroy(exec)); }
  };
  template <typename Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

  struct Graph {
    Owned<cudaGraphExec_t> exec;  // null: not captured, or not yet
    size_t bytes = 0;             // that it is counted as; 0: it was never captured
  };
  struct Entry {
    Key key;
    Graph graph;
    int64_t runs = 0;
    int64_t last_run = 0;  // runs_ then
    bool refused = false;  // not to be tried again
  };
  // A change of a graph leaves its kernels the cluster dimensions that they had, and says nothing
  // of it: so there is a graph for each list of them, as products with other algorithms have
  // others.
  using Clusters = std::vector<uint64_t>;
  struct Variant {
    Clusters clusters;
    Graph graph;
  };
  using Piece = std::list<Variant>;  // the last used one first
  struct Kind {
    Key key;
    std::vector<Piece> pieces;
    int64_t keys = 0;               // that were new
    int64_t changed = 0, made = 0;  // graphs
    int64_t last_run = 0;
    bool refused = false;
  };

  Kind& KindOf(const Key& key);
  // Launches what `entry` has, or captures it first. Whether it did.
  bool Replay(Entry& entry, int64_t parts, Part part);
  absl::Status RunInPieces(Kind& kind, int64_t parts, Part part);
  // Whether it enqueued the parts.
  bool RunPiece(Kind& kind, Piece& piece, Range range, Part part);

  static absl::Status RunPlainly(Range range, Part part);
  // Null where something was refused.
  Owned<cudaGraph_t> Capture(Range range, Part part);
  // Sets graph.bytes. False: the graph can't be asked for its nodes.
  static bool CountBytes(Graph& graph, cudaGraph_t captured);
  // Makes graph.exec one of `captured`. False: there is no room, or it was refused.
  bool Instantiate(Graph& graph, cudaGraph_t captured, bool& refused);
  // Drops those of the piece's variants that were not used last, until `bytes` more may be taken.
  bool MakeRoomInPiece(Piece& piece, size_t bytes);
  // The nodes' cluster dimensions. False: the graph can't be asked for them.
  static bool ClustersOf(cudaGraph_t captured, Clusters& clusters);
  void Drop(Graph& graph);
  void Drop(Kind& kind);
  // Drops idle graphs, and says whether so many more bytes may be taken now.
  bool MakeRoom(size_t bytes);

  const int ordinal_;
  const cudaStream_t stream_;
  std::list<Entry> entries_;  // the last used one first
  std::list<Kind> kinds_;     // likewise
  size_t bytes_ = 0;          // of all graphs
  int64_t runs_ = 0;
};

}  // namespace lamina::cuda
