// Purpose: gelu_product.cuh, by a product of its own whose epilogue is the elementwise pass.
//
// A block is three warpgroups, one block a multiprocessor, and goes over many 128 x 128 tiles of
// the result. One warpgroup only starts copies into a ring of stages, 64 deep along k each. The
// other two take tiles in turn: while one multiplies, the other is in its epilogue, so that GELU,
// as long as half of the products, costs nothing of its own. The elements that an epilogue reads
// and writes go through a buffer in shared memory and the copy engine: that takes whole lines, and
// leaves the epilogue without branches or addresses, in one piece that the compiler can interleave;
// one warp a scheduler hides no latency by itself. Blocks of a cluster do neighbouring tiles
// together: an operand's tile that two of them need is fetched by halves, each for both. That keeps
// the traffic from the L2 cache within its rate; clusters of 2 x 2 halve it once more, but leave
// 12 of 132 multiprocessors out.
//
// The order of every sum is fixed by the shape alone.
#include <cudaTypedefs.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "column_sum.cuh"
#include "common/cluster.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/gelu_math.cuh"
#include "common/mbarrier.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"
#include "gelu_product.cuh"
#include "kernel_limits.h"

namespace lamina::cuda {
namespace {

constexpr int kTile = kGeluProductRows;  // rows and columns of a tile
constexpr int kDepth = 64;               // of a stage along k: 128 bytes
constexpr int kStages = 5;
constexpr int kRowBlocks = 1;  // of a cluster: along rows, and along columns
constexpr int kColBlocks = 2;
constexpr int kCluster = kRowBlocks * kColBlocks;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kTileBytes = kTile * kDepth * 2;  // of an operand
// Blocks with the same rows share the left operand's tile, each fetching a part for all; blocks
// with the same columns the right one's.
constexpr int kLeftPart = kTile / kColBlocks;
constexpr int kRightPart = kTile / kRowBlocks;
constexpr int kStageBytes = 2 * kTileBytes;
// Arrivals that free a stage: each warp of a consumer, in each block that a copy of it goes to.
constexpr int kReaders = (kRowBlocks + kColBlocks - 1) * kWarpgroup / 32;
// Of 65536: 128 * 40 + 256 * 232.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

// Half of a tile of the result, 64 columns, as the copy engine and Swizzled have it.
constexpr int kBoxBytes = kTile * 128;
constexpr int kBoxes = kTile / 64;

struct Shared {
  unsigned char stages[kStages][kStageBytes];  // the left operand's tile, then the right one's
  unsigned char boxes[kConsumers][kBoxes][kBoxBytes];  // each consumer's elements
  float4 sums[kConsumers][2][32];                      // of columns, by warps
  uint16_t bias[kConsumers][kTile];
  uint64_t full[kStages], empty[kStages];
  uint64_t turn[kConsumers];  // of each consumer: the other one has waited for its tile's stages
  uint64_t boxes_full[kConsumers];
};
constexpr size_t kSharedBytes = sizeof(Shared);

// What an epilogue makes of a product. Between forward and backward GELU's derivative is kept, or
// what GELU saw.
enum class Task {
  kGelu,     // pre, if it is kept, and y = gelu(pre)
  kSlope,    // slope = gelu'(pre), and y
  kBySlope,  // dx = product * slope
  kByPre,    // dx = product * gelu'(pre), and y again
};
constexpr bool IsBackward(Task task) { return task == Task::kBySlope || task == Task::kByPre; }

struct Problem {
  const void* bias;  // forward: act [n]
  bool keep_pre;     // kGelu
  float* partials;   // backward: fp32 [row tiles, n]; null: none
  int m, n, k;
  int row_squares, squares;  // a cluster's at once: along rows, and all
};

// Of a product's operands, and of what an epilogue reads or writes, act [m, n] each.
struct Maps {
  CUtensorMap left, right;
  CUtensorMap kept;   // slope or pre: forward writes it, backward reads it
  CUtensorMap out;    // y or dx
  CUtensorMap again;  // kByPre: y; its tiles may be kept's
};

// Where a warpgroup is in the ring.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance(int stages) {
    stage += stages;
    while (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

// A block's place in its cluster.
struct Place {
  int row, col;
  __device__ explicit Place(int rank) : row(rank % kRowBlocks), col(rank / kRowBlocks) {}
};

// The first row and column of this block's tile in a square of the result.
struct Corner {
  int m, n;
  __device__ Corner(const Problem& p, int square, Place place)
      : m((square % p.row_squares * kRowBlocks + place.row) * kTile),
        n((square / p.row_squares * kColBlocks + place.col) * kTile) {}
};

// The right operand's rows go along n, or with kTransposed along k.
template <bool kTransposed>
__device__ __forceinline__ void Produce(const Maps& maps, const Problem& p, Shared& shared,
                                        int first, int step) {
  const Place place(static_cast<int>(ClusterRank()));
  uint16_t same_rows = 0, same_cols = 0;
  for (int rank = 0; rank < kCluster; ++rank) {
    if (Place(rank).row == place.row) same_rows |= static_cast<uint16_t>(1 << rank);
    if (Place(rank).col == place.col) same_cols |= static_cast<uint16_t>(1 << rank);
  }
  Ring ring;
  for (int square = first; square < p.squares; square += step) {
    const Corner corner(p, square, place);
    const int m = corner.m + place.col * kLeftPart;
    const int n = corner.n + place.row * kRightPart;
    for (int k = 0; k < p.k; k += kDepth) {
      uint64_t* full = &shared.full[ring.stage];
      WaitForPhase(&shared.empty[ring.stage], ring.parity ^ 1);
      ArriveAndExpect(full, kStageBytes);
      unsigned char* stage = shared.stages[ring.stage];
      StartBox(&maps.left, k, m, stage + place.col * kLeftPart * 128, full, same_rows);
      stage += kTileBytes;
      if constexpr (!kTransposed) {
        StartBox(&maps.right, k, n, stage + place.row * kRightPart * 128, full, same_cols);
      } else if constexpr (kRowBlocks == 2) {
        StartBox(&maps.right, n, k, stage + place.row * kSwizzledBytes, full, same_cols);
      } else {
        StartBox(&maps.right, n, k, stage, full, same_cols);
        StartBox(&maps.right, n + 64, k, stage + kSwizzledBytes, full, same_cols);
      }
      ring.Advance(1);
    }
  }
}

// Tells every block whose copies went into the stage that this warp has read it.
__device__ __forceinline__ void Release(Shared& shared, int stage, Place place) {
  const Place other(static_cast<int>(threadIdx.x) & 31);
  if (other.col < kColBlocks && (other.row == place.row || other.col == place.col)) {
    ArriveAt(&shared.empty[stage], threadIdx.x & 31u);
  }
}

// acc[half] = 64 rows of the tile: rows [64 half, + 64). Calls all_there() when the tile's last
// stage is.
template <typename T, bool kTransposed, typename AllThere>
__device__ __forceinline__ void Multiply(const Problem& p, Shared& shared, Ring& ring,
                                         float (&acc)[2][16][4], const AllThere& all_there) {
  const Place place(static_cast<int>(ClusterRank()));
  int previous = -1;
  for (int k0 = 0; k0 < p.k; k0 += kDepth) {
    WaitForPhase(&shared.full[ring.stage], ring.parity);
    const unsigned char* left = shared.stages[ring.stage];
    const unsigned char* right = left + kTileBytes;
    BeginProducts();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const uint64_t b = kTransposed ? DescribeTile(right, kSwizzledBytes) + k * kStepAlongColumn
                                     : DescribeTile(right) + k * kStepAlongRow;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint64_t a = DescribeTile(left + half * kSwizzledBytes) + k * kStepAlongRow;
        ProductStep<T, kTransposed>(acc[half], a, b, k0 > 0 || k > 0);
      }
      if (k == 0) {
        // With these under way the stage before need not be kept any longer.
        CommitProducts();
        WaitForProducts<1>();
        if (previous >= 0) Release(shared, previous, place);
      }
    }
    CommitProducts();
    previous = ring.stage;
    ring.Advance(1);
  }
  all_there();
  WaitForProducts<0>();
  PinProduct(acc[0]);
  PinProduct(acc[1]);
  Release(shared, previous, place);
}

// A consumer's buffer, as a thread sees it: the words that belong to its fragments, two elements of
// a row each.
class Buffer {
 public:
  __device__ explicit Buffer(unsigned char (&boxes)[kBoxes][kBoxBytes]) : boxes_(boxes) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
      offset_[chunk] = Swizzled(row, chunk) + (thread & 3) * 4;
    }
  }
  // Of a box's column tile `tile`, in row 64 half + 8 e of the thread's.
  __device__ __forceinline__ uint32_t& Word(int box, int tile, int half, int e) const {
    return *reinterpret_cast<uint32_t*>(boxes_[box] + offset_[tile] + (half * 64 + e * 8) * 128);
  }
  // Hands all threads' words of a box to the copy engine.
  __device__ __forceinline__ void Store(int box, const CUtensorMap* map, int col, int row) const {
    ShareWithEngines();
    WarpgroupBarrier();
    if (threadIdx.x % kWarpgroup != 0) return;
    StoreBox(map, col, row, boxes_[box]);
    CommitBoxes();
  }
  // Until the words of all but the last kPending boxes may be written again.
  template <int kPending>
  __device__ __forceinline__ void Reuse() const {
    if (threadIdx.x % kWarpgroup == 0) WaitForBoxesRead<kPending>();
    WarpgroupBarrier();
  }

 private:
  unsigned char (&boxes_)[kBoxes][kBoxBytes];
  int offset_[8];
};

// A consumer's words of half of a tile, [column tile][half][e] as Buffer::Word has them.
using Words = uint32_t[8][2][2];

// What a consumer does with a tile's product: Begin before it, to have what is read on its way, and
// Finish after it, which may overwrite it.
template <typename T, Task kTask, bool kTanh, bool kBackward = IsBackward(kTask)>
class Epilogue;

// y = gelu(product + bias)
template <typename T, Task kTask, bool kTanh>
class Epilogue<T, kTask, kTanh, false> {
 public:
  __device__ __forceinline__ Epilogue(const Problem& p, const Maps& maps, Shared& shared, int group)
      : p_(p), maps_(maps), bias_(shared.bias[group]), buffer_(shared.boxes[group]) {}

  __device__ __forceinline__ void Begin(Corner corner) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    bias_[thread] = static_cast<const uint16_t*>(p_.bias)[min(corner.n + thread, p_.n - 1)];
  }

  __device__ __forceinline__ void Finish(Corner corner, const float (&acc)[2][16][4]) {
    // Half of the columns after the other: box 0 has what is kept, box 1 what GELU gives.
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int col = corner.n + side * 64;
      Words words;
      buffer_.template Reuse<1>();  // box 0; and a barrier for the bias
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
        const float2 b = UnpackPair<T>(*reinterpret_cast<const uint32_t*>(
            bias_ + side * 64 + tile * 8 + (threadIdx.x & 3) * 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto& d = acc[half][side * 8 + tile];
          words[tile][half][0] = PackPair<T>(d[0] + b.x, d[1] + b.y);
          words[tile][half][1] = PackPair<T>(d[2] + b.x, d[3] + b.y);
        }
      }
      const bool keep = kTask == Task::kSlope || p_.keep_pre;
      if constexpr (kTask == Task::kSlope) {
        Words slopes;
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t& word = words[tile][i / 2][i % 2];
            const float2 v = UnpackPair<T>(word);
            const GeluPoint low = GeluAt<Fast, kTanh>(v.x), high = GeluAt<Fast, kTanh>(v.y);
            slopes[tile][i / 2][i % 2] = PackPair<T>(low.slope, high.slope);
            word = PackPair<T>(low.value, high.value);
          }
        }
        Write(0, slopes);
        buffer_.Store(0, &maps_.kept, col, corner.m);
      } else {
        if (keep) {
          Write(0, words);
          buffer_.Store(0, &maps_.kept, col, corner.m);
        }
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t& word = words[tile][i / 2][i % 2];
            const float2 v = UnpackPair<T>(word);
            word = PackPair<T>(Gelu<Fast, kTanh>(v.x), Gelu<Fast, kTanh>(v.y));
          }
        }
      }
      if (keep) {
        buffer_.template Reuse<1>();
      } else {
        buffer_.template Reuse<0>();
      }
      Write(1, words);
      buffer_.Store(1, &maps_.out, col, corner.m);
    }
  }

 private:
  __device__ __forceinline__ void Write(int box, const Words& words) const {
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) buffer_.Word(box, tile, i / 2, i % 2) = words[tile][i / 2][i % 2];
    }
  }

  const Problem& p_;
  const Maps& maps_;
  uint16_t (&bias_)[kTile];
  const Buffer buffer_;
};

// dx = product * slope, and its column sums
template <typename T, Task kTask, bool kTanh>
class Epilogue<T, kTask, kTanh, true> {
 public:
  __device__ __forceinline__ Epilogue(const Problem& p, const Maps& maps, Shared& shared, int group)
      : p_(p),
        maps_(maps),
        boxes_(shared.boxes[group]),
        full_(&shared.boxes_full[group]),
        sums_(shared.sums[group]),
        buffer_(shared.boxes[group]) {}

  __device__ __forceinline__ void Begin(Corner corner) {
    if (threadIdx.x % kWarpgroup != 0) return;
    WaitForBoxesRead<0>();
    ArriveAndExpect(full_, kBoxes * kBoxBytes);
    for (int box = 0; box < kBoxes; ++box) {
      StartBox(&maps_.kept, corner.n + box * 64, corner.m, boxes_[box], full_);
    }
  }

  __device__ __forceinline__ void Finish(Corner corner, float (&acc)[2][16][4]) {
    WaitForPhase(full_, parity_);
    parity_ ^= 1;
    float sums[32] = {};  // columns 8 j + 2 t + e of the tile: sums[2 j + e]
    // A box's words give way to its share of dx. kByPre has y to write too: that takes their place
    // first, dx the product's in the registers, and the box when y has left it.
    constexpr bool kByPre = kTask == Task::kByPre;
    const CUtensorMap* map = kByPre ? &maps_.again : &maps_.out;
    // Some tiles at a time: the compiler can't know that another's words are not these.
    constexpr int kTiles = 4;
#pragma unroll
    for (int first = 0; first < 16; first += kTiles) {
      uint32_t words[kTiles][2][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          words[tile][i / 2][i % 2] = buffer_.Word(first / 8, first % 8 + tile, i / 2, i % 2);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t& word = words[tile][i / 2][i % 2];
          float& low = acc[i / 2][first + tile][i % 2 * 2];
          float& high = acc[i / 2][first + tile][i % 2 * 2 + 1];
          uint32_t slopes = word;
          if constexpr (kByPre) {
            const float2 v = UnpackPair<T>(word);
            const GeluPoint a = GeluAt<Fast, kTanh>(v.x), b = GeluAt<Fast, kTanh>(v.y);
            slopes = PackPair<T>(a.slope, b.slope);  // as kSlope would have kept them
            word = PackPair<T>(a.value, b.value);
          }
          const float2 slope = UnpackPair<T>(slopes);
          low *= slope.x;
          high *= slope.y;
          sums[(first + tile) * 2] += low;
          sums[(first + tile) * 2 + 1] += high;
          if constexpr (!kByPre) word = PackPair<T>(low, high);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          buffer_.Word(first / 8, first % 8 + tile, i / 2, i % 2) = words[tile][i / 2][i % 2];
      }
      if ((first + kTiles) % 8 == 0) {
        buffer_.Store(first / 8, map, corner.n + first / 8 * 64, corner.m);
      }
    }
    if constexpr (kByPre) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        buffer_.template Reuse<1>();  // all but the other box's last store
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* dx = &acc[i / 2][box * 8 + tile][i % 2 * 2];
            buffer_.Word(box, tile, i / 2, i % 2) = PackPair<T>(dx[0], dx[1]);
          }
        }
        buffer_.Store(box, &maps_.out, corner.n + box * 64, corner.m);
      }
    }
    if (p_.partials != nullptr) Sum(corner, sums);
  }

 private:
  // A tile's row of partial sums. Outside of the matrix all terms are 0.
  __device__ __forceinline__ void Sum(Corner corner, const float (&sums)[32]) {
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    // The lane's four are of columns 16 g + 2 t, + 1, + 8, + 9.
    float four[4];
    SumOverRows(sums, four);
    // Warps 2 and 3 give theirs to 0 and 1, and 1 its own to 0.
    const auto give = [&](int slot) {
      sums_[slot][lane] = make_float4(four[0], four[1], four[2], four[3]);
    };
    const auto take = [&](int slot) {
      const float4 theirs = sums_[slot][lane];
      four[0] += theirs.x;
      four[1] += theirs.y;
      four[2] += theirs.z;
      four[3] += theirs.w;
    };
    if (warp >= 2) give(warp - 2);
    WarpgroupBarrier();
    if (warp < 2) take(warp);
    if (warp == 1) give(1);
    WarpgroupBarrier();
    if (warp > 0) return;
    take(1);
    float* row = p_.partials + int64_t{corner.m / kTile} * p_.n;
    const int col = corner.n + lane / 4 * 16 + lane % 4 * 2;
    if (corner.m >= p_.m) return;
    if (col < p_.n) *reinterpret_cast<float2*>(row + col) = make_float2(four[0], four[1]);
    if (col + 8 < p_.n) *reinterpret_cast<float2*>(row + col + 8) = make_float2(four[2], four[3]);
  }

  const Problem& p_;
  const Maps& maps_;
  unsigned char (&boxes_)[kBoxes][kBoxBytes];
  uint64_t* const full_;
  float4 (&sums_)[2][32];
  const Buffer buffer_;
  uint32_t parity_ = 0;
};

template <typename T, Task kTask, bool kTanh>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    GeluProductKernel(const __grid_constant__ Maps maps, const Problem p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      StartBarrier(&shared.full[i], 1);
      StartBarrier(&shared.empty[i], kReaders);
    }
    for (int i = 0; i < kConsumers; ++i) {
      StartBarrier(&shared.turn[i], kWarpgroup / 32);
      StartBarrier(&shared.boxes_full[i], 1);
    }
    PublishBarriers();
    PrefetchTensorMap(&maps.left);
    PrefetchTensorMap(&maps.right);
    PrefetchTensorMap(&maps.kept);
    PrefetchTensorMap(&maps.out);
  }
  ClusterSync();
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int step = static_cast<int>(gridDim.x) / kCluster;
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == kConsumers) {
    GiveRegisters<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      Produce<IsBackward(kTask)>(maps, p, shared, first, step);
    }
    __syncwarp();
  } else {
    TakeRegisters<kConsumerRegisters>();
    const Place place(static_cast<int>(ClusterRank()));
    const int stages = (p.k + kDepth - 1) / kDepth;  // of a tile
    Epilogue<T, kTask, kTanh> epilogue(p, maps, shared, group);
    Ring ring;
    ring.Advance(group * stages);
    // A consumer may not look at the ring before its turn: a stage's barrier tells its last phase
    // from the one before, but not from earlier ones. The first turn is consumer 0's.
    uint32_t turn = group == 0 ? 1 : 0;
    for (int square = first + group * step; square < p.squares; square += kConsumers * step) {
      const Corner corner(p, square, place);
      epilogue.Begin(corner);
      WaitForPhase(&shared.turn[group], turn);
      turn ^= 1;
      float acc[2][16][4];
      Multiply<T, IsBackward(kTask)>(p, shared, ring, acc, [&] {
        if (threadIdx.x % 32 == 0) Arrive(&shared.turn[kConsumers - 1 - group]);
      });
      ring.Advance((kConsumers - 1) * stages);
      epilogue.Finish(corner, acc);
    }
    if (threadIdx.x % kWarpgroup == 0) WaitForBoxes();
  }
  // A block's shared memory must stay until the others' copies and arrivals are in.
  ClusterSync();
}

// --- host ---

PFN_cuTensorMapEncodeTiled_v12000 TensorMapEncoder() {
  // Asked for once; the answer is the same for whoever asks first.
  static std::atomic<PFN_cuTensorMapEncodeTiled_v12000> encoder{nullptr};
  PFN_cuTensorMapEncodeTiled_v12000 f = encoder.load(std::memory_order_relaxed);
  if (f != nullptr) return f;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                       &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    return nullptr;
  }
  f = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  encoder.store(f, std::memory_order_relaxed);
  return f;
}

// Boxes of 64 columns (128 bytes) and `box_rows` rows of a [rows, cols] matrix.
cudaError_t MakeTensorMap(CUtensorMap* map, const void* data, DType dtype, int64_t rows,
                          int64_t cols, uint32_t box_rows) {
  const auto encode = TensorMapEncoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t box[2] = {kDepth, box_rows};
  const cuuint32_t one[2] = {1, 1};
  const CUresult result = encode(
      map,
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), size, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Clusters that run at once, which may leave some multiprocessors out. Asked for once: it takes
// longer than a launch. On another device of the kind it may be off by a few, which costs a little
// time there.
template <typename Kernel>
cudaError_t Clusters(Kernel kernel, std::atomic<int>& known, int* clusters) {
  *clusters = known.load(std::memory_order_relaxed);
  if (*clusters > 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  if (const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
      error != cudaSuccess) {
    return error;
  }
  if (*clusters < 1) return cudaErrorInvalidConfiguration;
  known.store(*clusters, std::memory_order_relaxed);
  return cudaSuccess;
}

template <typename T, Task kTask, bool kTanh>
cudaError_t Launch(const Maps& maps, Problem problem, cudaStream_t stream) {
  const auto kernel = GeluProductKernel<T, kTask, kTanh>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(kSharedBytes));
  if (error != cudaSuccess) return error;
  static std::atomic<int> known_clusters{0};
  int clusters = 0;
  error = Clusters(kernel, known_clusters, &clusters);
  if (error != cudaSuccess) return error;
  const auto squares = [](int size, int side) { return (size + side - 1) / side; };
  problem.row_squares = squares(problem.m, kRowBlocks * kTile);
  problem.squares = problem.row_squares * squares(problem.n, kColBlocks * kTile);
  const int used = std::min(clusters, problem.squares);
  kernel<<<static_cast<unsigned>(used * kCluster), kThreads, kSharedBytes, stream>>>(maps, problem);
  return cudaGetLastError();
}

template <Task kTask>
cudaError_t Launch(DType dtype, bool tanh, const Maps& maps, const Problem& problem,
                   cudaStream_t stream) {
  // GELU's form is in the slopes.
  const bool choose = kTask != Task::kBySlope && tanh;
  return DispatchHalf(dtype, choose, [&](auto tag, auto choice) {
    constexpr bool kTanh = kTask != Task::kBySlope && choice.value;
    return Launch<typename decltype(tag)::type, kTask, kTanh>(maps, problem, stream);
  });
}

constexpr int64_t kDeepestForward = 1280;
constexpr int64_t kDeepestBackward = 2304;

bool Fits(DType dtype, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return (dtype == DType::kBF16 || dtype == DType::kF16) && m > 0 && n > 0 && k > 0 && m < kMost &&
         n < kMost && k < kMost && n % 8 == 0 && k % 8 == 0;
}

}  // namespace

bool UseGeluProduct(const GeluProductParams& p) {
  return p.k <= kDeepestForward && Fits(p.dtype, p.m, p.n, p.k) && p.bias != nullptr &&
         Aligned16(p.x, p.w, p.bias, p.pre, p.slope, p.y);
}

bool UseGeluProduct(const GeluProductBackwardParams& p) {
  return p.k <= kDeepestBackward && Fits(p.dtype, p.m, p.n, p.k) &&
         Aligned16(p.dy, p.w, p.slope, p.pre, p.y_again, p.dx);
}

cudaError_t LaunchGeluProduct(const GeluProductParams& p, cudaStream_t stream) {
  Maps maps;
  cudaError_t error = MakeTensorMap(&maps.left, p.x, p.dtype, p.m, p.k, kLeftPart);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.right, p.w, p.dtype, p.n, p.k, kRightPart);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.out, p.y, p.dtype, p.m, p.n, kTile);
  maps.kept = maps.again = maps.out;
  const void* kept = p.slope != nullptr ? p.slope : p.pre;
  if (error == cudaSuccess && kept != nullptr) {
    error = MakeTensorMap(&maps.kept, kept, p.dtype, p.m, p.n, kTile);
  }
  if (error != cudaSuccess) return error;
  Problem problem{};
  problem.bias = p.bias;
  problem.keep_pre = p.pre != nullptr;
  problem.m = static_cast<int>(p.m);
  problem.n = static_cast<int>(p.n);
  problem.k = static_cast<int>(p.k);
  return p.slope != nullptr ? Launch<Task::kSlope>(p.dtype, p.tanh, maps, problem, stream)
                            : Launch<Task::kGelu>(p.dtype, p.tanh, maps, problem, stream);
}

cudaError_t LaunchGeluProductBackward(const GeluProductBackwardParams& p, cudaStream_t stream) {
  const bool by_slope = p.slope != nullptr;
  const void* kept = by_slope ? p.slope : p.pre;
  const void* again = by_slope ? p.dx : p.y_again;
  Maps maps;
  cudaError_t error = MakeTensorMap(&maps.left, p.dy, p.dtype, p.m, p.k, kLeftPart);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.right, p.w, p.dtype, p.k, p.n, kDepth);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.kept, kept, p.dtype, p.m, p.n, kTile);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.out, p.dx, p.dtype, p.m, p.n, kTile);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.again, again, p.dtype, p.m, p.n, kTile);
  if (error != cudaSuccess) return error;
  Problem problem{};
  problem.partials = p.dbias != nullptr ? p.workspace : nullptr;
  problem.m = static_cast<int>(p.m);
  problem.n = static_cast<int>(p.n);
  problem.k = static_cast<int>(p.k);
  error = by_slope ? Launch<Task::kBySlope>(p.dtype, p.tanh, maps, problem, stream)
                   : Launch<Task::kByPre>(p.dtype, p.tanh, maps, problem, stream);
  if (error != cudaSuccess || p.dbias == nullptr) return error;
  FinishColumnSumArgs finish;
  finish.partials = p.workspace;
  finish.slices = (p.m + kTile - 1) / kTile;
  finish.cols = p.n;
  finish.dst[0] = p.dbias;
  return LaunchFinishColumnSum(finish, stream);
}

}  // namespace lamina::cuda
