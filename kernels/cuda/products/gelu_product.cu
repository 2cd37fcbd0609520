// Purpose: gelu_product.cuh, by a product of its own whose epilogue is the elementwise pass.
//
// A block is three warpgroups, one block a multiprocessor, and goes over many 128 x 256 tiles of
// the result. Two warpgroups multiply, 64 rows of a tile each: so wide, because a product's
// operands come out of shared memory, whose bandwidth narrower tiles exceed. When a tile is done
// they only hand it over, through shared memory, and go on with the next one; GELU is that of
// three warps of the third warpgroup, which have the time of a tile for it. (A fourth warpgroup
// would leave each thread 128 registers, as many as the accumulators of 64 x 256 alone.) The last
// warp only starts copies into a ring of stages.
//
// Forward GELU's input is handed over, rounded as it is kept. Backward the slopes are in the same
// place before the product is: brought by the copy engine, or computed from what it brought. The
// multiplying warpgroups leave the product times the slope there, and the finishing warps take
// that to memory and add up its columns: the bias's gradient is the sum of dx as it is rounded, as
// the weight's is.
//
// Blocks of a cluster do neighbouring tiles together: an operand's tile that both need is fetched
// by halves, each for both. That keeps the traffic from the L2 cache within its rate. And all
// blocks together work on a part of the result that is about as high as wide, whose operands stay
// in that cache beside what is written; whole columns' would not.
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
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"
#include "kernel_limits.h"
#include "products/gelu_product.cuh"

namespace lamina::cuda {
namespace {

// What is made of a product. Between forward and backward GELU's derivative is kept, or what GELU
// saw.
enum class Task {
  kGelu,     // pre, if it is kept, and y = gelu(pre)
  kSlope,    // slope = gelu'(pre), and y
  kBySlope,  // dx = product * slope
  kByPre,    // dx = product * gelu'(pre), and y again
};
constexpr bool IsBackward(Task task) { return task == Task::kBySlope || task == Task::kByPre; }

constexpr int kRows = kGeluProductRows;  // of a tile
constexpr int kCols = 256;
constexpr int kGroupRows = 8;  // squares of neighbouring rows that are done together
constexpr int kRowBlocks = 2;  // of a cluster: along rows, and along columns
constexpr int kColBlocks = 1;
constexpr int kCluster = kRowBlocks * kColBlocks;
// The roles of warps: the first two warpgroups multiply, then there are finishers and the producer.
constexpr int kMultipliers = 2;
constexpr int kWarps = kWarpgroup / 32;  // of a warpgroup
constexpr int kFinishers = kWarps - 1;
constexpr int kThreads = 3 * kWarpgroup;
// Blocks with the same rows share the left operand's tile, each fetching a part for all; blocks
// with the same columns the right one's.
constexpr int kLeftPart = kRows / kColBlocks;
constexpr int kRightPart = kCols / kRowBlocks;
// Arrivals that free a stage: each multiplying warp of each block that a copy of it goes to.
constexpr int kReaders = (kRowBlocks + kColBlocks - 1) * kMultipliers * kWarps;

// How deep a stage of the ring is along k. Deep ones take less energy, 2.5 % of a forward's and 3
// of a backward's that computes slopes, and a card at its power limit gives that back as time. By
// slopes that are there it takes none less, and at large n more time, as so few hide less.
constexpr int DepthOf(Task task) { return task == Task::kBySlope ? 32 : 64; }

template <Task kTask>
struct Stages {
  static constexpr int kDepth = DepthOf(kTask);
  static constexpr int kCount = 192 / kDepth;
  static constexpr int kRowBytes = kDepth * 2;       // of an operand whose rows go along k
  static constexpr int kColumnBytes = kDepth * 128;  // of 64 columns of one whose columns do
  static constexpr int kLeftBytes = kRows * kDepth * 2;
  static constexpr int kRightBytes = kCols * kDepth * 2;
  static constexpr int kBytes = kLeftBytes + kRightBytes;

  // An operand's tile whose rows go along k.
  static __device__ __forceinline__ uint64_t Describe(const unsigned char* rows) {
    return kDepth == 64 ? DescribeTile(rows) : DescribeNarrowTile(rows);
  }
};

// As Swizzled and the copy engine have the result: a multiplier's half of a tile is four boxes of
// 64 columns, side by side. A warp takes 16 rows of a box at once where there is much to compute.
constexpr int kHalfRows = kRows / kMultipliers;
constexpr int kBoxes = kCols / 64;
constexpr int kBoxBytes = kHalfRows * 128;
constexpr int kPartRows = 16;
constexpr int kPartBytes = kPartRows * 128;
constexpr int kPartsOfBox = kHalfRows / kPartRows;
constexpr int kParts = kBoxes * kPartsOfBox;  // of a half
using Half = unsigned char[kBoxes][kBoxBytes];

template <Task kTask>
struct Shared {
  static constexpr int kStages = Stages<kTask>::kCount;
  // The left operand's tile, then the right one's.
  unsigned char stages[kStages][Stages<kTask>::kBytes];
  Half halves[kMultipliers];             // of the tile, on their way in or out
  float2 bias[kMultipliers][kCols / 2];  // forward, each multiplier's own
  uint64_t full[kStages], empty[kStages];
  uint64_t loaded[kMultipliers];  // backward: the copy engine has brought what a half needs
  uint64_t ready[kMultipliers];   // a half may be written, and backward has the slopes
  uint64_t given[kMultipliers];   // and is written
};
static_assert(sizeof(Shared<Task::kSlope>) <= 227 * 1024 &&
              sizeof(Shared<Task::kBySlope>) <= 227 * 1024);

struct Problem {
  const void* bias;  // forward: act [n]
  void* kept;        // forward: slope or pre, act [m, n]; null: neither
  void* out;         // y or dx, act [m, n]
  void* again;       // kByPre: y, act [m, n]
  float* partials;   // backward: fp32 [row tiles, n]; null: none
  int m, n, k;
  int row_squares, squares;       // a cluster's at once: along rows, and all
  int group_rows, group_squares;  // of a group: squares along rows, and all
};

// Of what the copy engine brings: a product's operands, and backward slope or pre.
struct Maps {
  CUtensorMap left, right, kept;
};

// Where a warpgroup is in the ring.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// A block's place in its cluster.
struct Place {
  int row, col;
  __device__ explicit Place(int rank) : row(rank % kRowBlocks), col(rank / kRowBlocks) {}
};

// The first row and column of this block's tile in a square of the result. Squares are numbered by
// groups of rows, down the columns of a group: those that are worked on at once then lie in a
// block that is about as high as wide, and their operands stay in the L2 cache.
struct Corner {
  int m, n;
  __device__ Corner(const Problem& p, int square, Place place) {
    const int group = square / p.group_squares;
    const int in_group = square - group * p.group_squares;
    const int rows = min(p.group_rows, p.row_squares - group * p.group_rows);
    const int col = in_group / rows;
    m = ((group * p.group_rows + in_group - col * rows) * kRowBlocks + place.row) * kRows;
    n = (col * kColBlocks + place.col) * kCols;
  }
};

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % 32; }

// --- the producer ---

// The right operand's rows go along n, or backward along k.
template <Task kTask>
__device__ __forceinline__ void Produce(const Maps& maps, const Problem& p, Shared<kTask>& shared,
                                        int first, int step) {
  using Stage = Stages<kTask>;
  const Place place(static_cast<int>(ClusterRank()));
  uint16_t same_rows = 0, same_cols = 0;
  for (int rank = 0; rank < kCluster; ++rank) {
    if (Place(rank).row == place.row) same_rows |= static_cast<uint16_t>(1 << rank);
    if (Place(rank).col == place.col) same_cols |= static_cast<uint16_t>(1 << rank);
  }
  Ring<Stage::kCount> ring;
  for (int square = first; square < p.squares; square += step) {
    const Corner corner(p, square, place);
    const int m = corner.m + place.col * kLeftPart;
    const int n = corner.n + place.row * kRightPart;
    for (int k = 0; k < p.k; k += Stage::kDepth) {
      uint64_t* full = &shared.full[ring.stage];
      WaitForPhase(&shared.empty[ring.stage], ring.parity ^ 1);
      ArriveAndExpect(full, Stage::kBytes);
      unsigned char* left = shared.stages[ring.stage];
      StartBox(&maps.left, k, m, left + place.col * kLeftPart * Stage::kRowBytes, full, same_rows);
      unsigned char* right = left + Stage::kLeftBytes + place.row * kRightPart * Stage::kRowBytes;
      if constexpr (IsBackward(kTask)) {
#pragma unroll
        for (int col = 0; col < kRightPart; col += 64) {
          StartBox(&maps.right, n + col, k, right + col / 64 * Stage::kColumnBytes, full,
                   same_cols);
        }
      } else {
        StartBox(&maps.right, k, n, right, full, same_cols);
      }
      ring.Advance();
    }
  }
}

// --- the multipliers ---

// Tells every block whose copies went into the stage that this warp has read it.
template <Task kTask>
__device__ __forceinline__ void Release(Shared<kTask>& shared, int stage, Place place) {
  const Place other(static_cast<int>(threadIdx.x) & 31);
  if (other.col < kColBlocks && (other.row == place.row || other.col == place.col)) {
    ArriveAt(&shared.empty[stage], threadIdx.x & 31u);
  }
}

// A fragment of the result: rows [16 w, 16 w + 16) of warp w, columns 8 j and on in acc[j].
using Fragment = float[kBoxes * 8][4];

// acc = this multiplier's rows of the tile. Calls meanwhile() when the last products are under way.
template <typename T, Task kTask, typename Meanwhile>
__device__ __forceinline__ void Multiply(const Problem& p, Shared<kTask>& shared,
                                         Ring<Stages<kTask>::kCount>& ring, int half, Fragment& acc,
                                         const Meanwhile& meanwhile) {
  using Stage = Stages<kTask>;
  constexpr bool kTransposed = IsBackward(kTask);
  const Place place(static_cast<int>(ClusterRank()));
  int previous = -1;
  for (int k0 = 0; k0 < p.k; k0 += Stage::kDepth) {
    WaitForPhase(&shared.full[ring.stage], ring.parity);
    const unsigned char* left = shared.stages[ring.stage];
    const unsigned char* right = left + Stage::kLeftBytes;
    const uint64_t a = Stage::Describe(left + half * kHalfRows * Stage::kRowBytes);
    const uint64_t b =
        kTransposed ? DescribeTile(right, Stage::kColumnBytes) : Stage::Describe(right);
    BeginProducts();
#pragma unroll
    for (int k = 0; k < Stage::kDepth / 16; ++k) {
      ProductStep<T, kTransposed>(acc, a + k * kStepAlongRow,
                                  b + k * (kTransposed ? kStepAlongColumn : kStepAlongRow),
                                  k0 > 0 || k > 0);
      if (k == 0) {
        // With these under way the stage before need not be kept any longer.
        CommitProducts();
        WaitForProducts<1>();
        if (previous >= 0) Release(shared, previous, place);
      }
    }
    CommitProducts();
    previous = ring.stage;
    ring.Advance();
  }
  meanwhile();
  WaitForProducts<0>();
  PinProduct(acc);
  Release(shared, previous, place);
}

// Four 8x8 matrices to shared memory, as LoadMatrices reads them.
__device__ __forceinline__ void StoreMatrices(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(SharedAddress(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// A half's words as a multiplier's fragments have them, two column tiles at a time: its lane's part
// of the addresses.
class Words {
 public:
  __device__ explicit Words(Half& half) : half_(half) {
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      offset_[pair] = Swizzled(warp * 16 + lane % 16, 2 * pair + lane / 16);
    }
  }
  // Of acc[2 pair] and acc[2 pair + 1].
  __device__ __forceinline__ unsigned char* At(int pair) const {
    return half_[pair / 4] + offset_[pair % 4];
  }

 private:
  Half& half_;
  int offset_[4];
};

// What GELU sees: product + bias, rounded.
template <typename T>
__device__ __forceinline__ void GiveSums(const Fragment& acc, const float2* bias,
                                         const Words& words) {
  const int t = static_cast<int>(threadIdx.x) & 3;
#pragma unroll
  for (int pair = 0; pair < kBoxes * 4; ++pair) {
    uint32_t r[4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float2 b = bias[(2 * pair + side) * 4 + t];
      const auto& c = acc[2 * pair + side];
      r[2 * side] = PackPair<T>(c[0] + b.x, c[1] + b.y);
      r[2 * side + 1] = PackPair<T>(c[2] + b.x, c[3] + b.y);
    }
    StoreMatrices(words.At(pair), r);
  }
}

// The product times the slopes that are there.
template <typename T>
__device__ __forceinline__ void GiveTimesSlopes(const Fragment& acc, const Words& words) {
#pragma unroll
  for (int first = 0; first < kBoxes * 4; first += 4) {
    uint32_t r[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) LoadMatrices(r[i], words.At(first + i));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const auto& c = acc[2 * (first + i) + e / 2];
        const float2 slope = UnpackPair<T>(r[i][e]);
        r[i][e] = PackPair<T>(c[e % 2 * 2] * slope.x, c[e % 2 * 2 + 1] * slope.y);
      }
      StoreMatrices(words.At(first + i), r[i]);
    }
  }
}

// --- GELU, by a warp ---

// A lane's words of a part here: eight columns of four rows.
class Part {
 public:
  static constexpr int kWords = kPartBytes / 128;
  __device__ __forceinline__ void Load(const unsigned char* part) {
    const unsigned char* at = part + Offset();
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const auto v = *reinterpret_cast<const uint4*>(i % 2 ? Other(at) + i * 512 : at + i * 512);
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  }
  __device__ __forceinline__ void Store(unsigned char* part) const {
    unsigned char* at = part + Offset();
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      *reinterpret_cast<uint4*>(i % 2 ? Other(at) + i * 512 : at + i * 512) =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  }

  uint32_t words[kWords];

 private:
  // Of chunk lane % 8 in row lane / 8; four rows further it is exchanged with another one.
  static __device__ __forceinline__ int Offset() { return Swizzled(Lane() / 8, Lane() % 8); }
  template <typename Byte>
  static __device__ __forceinline__ Byte* Other(Byte* at) {
    return at + Swizzled(Lane() / 8 + 4, Lane() % 8) - Swizzled(Lane() / 8, Lane() % 8) - 512;
  }
};

// Where part `part` of a half is, there and in the result.
struct PartPlace {
  unsigned char* at;
  int row, col;
  __device__ PartPlace(Half& half, int half_row, int half_col, int part)
      : at(half[part / kPartsOfBox] + part % kPartsOfBox * kPartBytes),
        row(half_row + part % kPartsOfBox * kPartRows),
        col(half_col + part / kPartsOfBox * 64) {}
};

// y = gelu(y), slope = gelu'(y)
template <typename T, bool kTanh>
__device__ __forceinline__ void SplitPart(Part& y, Part& slope) {
#pragma unroll
  for (int i = 0; i < Part::kWords; ++i) {
    const float2 v = UnpackPair<T>(y.words[i]);
    const GeluPoint low = GeluAt<Fast, kTanh>(v.x), high = GeluAt<Fast, kTanh>(v.y);
    y.words[i] = PackPair<T>(low.value, high.value);
    slope.words[i] = PackPair<T>(low.slope, high.slope);
  }
}

// To memory: whole lines of 128 bytes.
__device__ __forceinline__ void StorePart(void* dst, const Problem& p, const PartPlace& place,
                                          const Part& part) {
  const int row = place.row + Lane() / 8, col = place.col + Lane() % 8 * 8;
  auto* at = static_cast<uint16_t*>(dst) + int64_t{row} * p.n + col;
  if (col >= p.n) return;
#pragma unroll
  for (int i = 0; i < Part::kWords / 4; ++i) {
    if (row + 4 * i < p.m) {
      *reinterpret_cast<uint4*>(at + int64_t{4} * i * p.n) = make_uint4(
          part.words[4 * i], part.words[4 * i + 1], part.words[4 * i + 2], part.words[4 * i + 3]);
    }
  }
}

// From pre in a part to y, and to slope or pre if it is kept, in memory.
template <typename T, Task kTask, bool kTanh>
__device__ __forceinline__ void FinishPart(const Problem& p, const PartPlace& place) {
  Part y;
  y.Load(place.at);
  if constexpr (kTask == Task::kSlope) {
    Part slope;
    SplitPart<T, kTanh>(y, slope);
    StorePart(p.kept, p, place, slope);
  } else {
    const Part pre = y;
#pragma unroll
    for (uint32_t& word : y.words) {
      const float2 v = UnpackPair<T>(word);
      word = PackPair<T>(Gelu<Fast, kTanh>(v.x), Gelu<Fast, kTanh>(v.y));
    }
    if (p.kept != nullptr) StorePart(p.kept, p, place, pre);
  }
  StorePart(p.out, p, place, y);
}

// --- the finishers ---

// Forward. The last tile is the multipliers' own.
template <typename T, Task kTask, bool kTanh>
__device__ __forceinline__ void FinishForward(const Problem& p, Shared<kTask>& shared, Place place,
                                              int first, int step, int finisher) {
  uint32_t parity = 0;
  for (int square = first; square + step < p.squares; square += step) {
    const Corner corner(p, square, place);
#pragma unroll 1
    for (int half = 0; half < kMultipliers; ++half) {
      WaitForPhase(&shared.given[half], parity);
#pragma unroll 1
      for (int part = finisher; part < kParts; part += kFinishers) {
        FinishPart<T, kTask, kTanh>(
            p, PartPlace(shared.halves[half], corner.m + half * kHalfRows, corner.n, part));
      }
      Arrive(&shared.ready[half]);
    }
    parity ^= 1;
  }
}

// Starts to fetch the slopes of a box, or what they are computed from.
template <Task kTask>
__device__ __forceinline__ void Fetch(const Maps& maps, Shared<kTask>& shared, Corner corner,
                                      int half, int box) {
  uint64_t* loaded = &shared.loaded[half];
  ArriveAndExpect(loaded, kBoxBytes);
  StartBox(&maps.kept, corner.n + box * 64, corner.m + half * kHalfRows, shared.halves[half][box],
           loaded);
}

// Brings a part of dx to memory, and adds its rows to the sums of the lane's columns.
template <typename T>
__device__ __forceinline__ void FinishPart(const Problem& p, const PartPlace& place,
                                           float (&sums)[8]) {
  Part dx;
  dx.Load(place.at);
  StorePart(p.out, p, place, dx);
#pragma unroll
  for (int i = 0; i < Part::kWords; ++i) {
    const float2 v = UnpackPair<T>(dx.words[i]);
    sums[i % 4 * 2] += v.x;
    sums[i % 4 * 2 + 1] += v.y;
  }
}

// A box's column sums, of which each lane has those of eight columns' fourth rows.
__device__ __forceinline__ void FinishSums(const Problem& p, Corner corner, int box,
                                           const float (&sums)[8]) {
  float half[4], two[2];
  ShareSums<16>(sums, half);
  ShareSums<8>(half, two);
  const int lane = Lane();
  const int col = corner.n + box * 64 + lane % 8 * 8 + lane / 16 * 4 + lane / 8 % 2 * 2;
  // Outside of the matrix all terms are 0.
  if (corner.m >= p.m || col >= p.n) return;
  *reinterpret_cast<float2*>(p.partials + int64_t{corner.m / kRows} * p.n + col) =
      make_float2(two[0], two[1]);
}

// Whose it is to compute a part's slopes. The first finisher has two boxes of dx to bring to
// memory, the others one: it computes 4 parts, they 6, as a part of dx takes a third of a part of
// slopes.
constexpr int SlopesFinisher(int part) {
  static_assert(kFinishers == 3 && kBoxes == 4);
  const int in_four = part % 4;
  return in_four < kFinishers ? in_four : 1 + part / 4 % 2;
}

// Backward: makes slopes and y from pre unless the slopes are kept, brings dx and its column sums
// to memory, and fetches what the next tile needs. A finisher's boxes of dx are its own.
template <typename T, Task kTask, bool kTanh>
__device__ __forceinline__ void FinishBackward(const Problem& p, const Maps& maps,
                                               Shared<kTask>& shared, Place place, int first,
                                               int step, int finisher) {
  if (Lane() == 0) {
    for (int half = 0; half < kMultipliers; ++half) {
      for (int box = finisher; box < kBoxes; box += kFinishers) {
        Fetch(maps, shared, Corner(p, first, place), half, box);
      }
    }
  }
  uint32_t parity = 0;
  for (int square = first; square < p.squares; square += step) {
    const Corner corner(p, square, place);
    if constexpr (kTask == Task::kByPre) {
#pragma unroll 1
      for (int half = 0; half < kMultipliers; ++half) {
        WaitForPhase(&shared.loaded[half], parity);
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
          if (SlopesFinisher(part) != finisher) continue;
          const PartPlace from(shared.halves[half], corner.m + half * kHalfRows, corner.n, part);
          Part y, slope;
          y.Load(from.at);
          SplitPart<T, kTanh>(y, slope);
          slope.Store(from.at);
          StorePart(p.again, p, from, y);
        }
        Arrive(&shared.ready[half]);
      }
    }
    constexpr int kOwn = (kBoxes + kFinishers - 1) / kFinishers;  // boxes of a half, at most
    float sums[kOwn][8] = {};
#pragma unroll 1
    for (int half = 0; half < kMultipliers; ++half) {
      WaitForPhase(&shared.given[half], parity);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int box = finisher + i * kFinishers;
        if (box >= kBoxes) break;
#pragma unroll 1
        for (int part = box * kPartsOfBox; part < (box + 1) * kPartsOfBox; ++part) {
          FinishPart<T>(p,
                        PartPlace(shared.halves[half], corner.m + half * kHalfRows, corner.n, part),
                        sums[i]);
        }
        __syncwarp();
        if (Lane() == 0 && square + step < p.squares) {
          Fetch(maps, shared, Corner(p, square + step, place), half, box);
        }
      }
    }
    if (p.partials != nullptr) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int box = finisher + i * kFinishers;
        if (box < kBoxes) FinishSums(p, corner, box, sums[i]);
      }
    }
    parity ^= 1;
  }
}

template <typename T, Task kTask, bool kTanh>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    GeluProductKernel(const __grid_constant__ Maps maps, const Problem p) {
  constexpr bool kBackward = IsBackward(kTask);
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kTask>*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages<kTask>::kCount; ++i) {
      StartBarrier(&shared.full[i], 1);
      StartBarrier(&shared.empty[i], kReaders);
    }
    for (int i = 0; i < kMultipliers; ++i) {
      StartBarrier(&shared.loaded[i], kBoxes);
      // Each thread for itself: see ArriveByWarp.
      StartBarrier(&shared.ready[i], kFinishers * 32);
      StartBarrier(&shared.given[i], kWarpgroup);
    }
    PublishBarriers();
    PrefetchTensorMap(&maps.left);
    PrefetchTensorMap(&maps.right);
    if (kBackward) PrefetchTensorMap(&maps.kept);
  }
  ClusterSync();
  const Place place(static_cast<int>(ClusterRank()));
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int step = static_cast<int>(gridDim.x) / kCluster;
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  constexpr int kFirstFinisher = kMultipliers * kWarps;
  if (warp == kFirstFinisher + kFinishers) {
    if (Lane() == 0) Produce(maps, p, shared, first, step);
    __syncwarp();
  } else if (warp >= kFirstFinisher) {
    if constexpr (kBackward) {
      FinishBackward<T, kTask, kTanh>(p, maps, shared, place, first, step, warp - kFirstFinisher);
    } else {
      FinishForward<T, kTask, kTanh>(p, shared, place, first, step, warp - kFirstFinisher);
    }
  } else {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    Half& half = shared.halves[group];
    const Words words(half);
    // Forward a half may be written at first without waiting.
    uint64_t* ready = kTask == Task::kBySlope ? &shared.loaded[group] : &shared.ready[group];
    uint32_t parity = kBackward ? 0 : 1;
    Ring<Stages<kTask>::kCount> ring;
    for (int square = first; square < p.squares; square += step) {
      const Corner corner(p, square, place);
      Fragment acc;
      if constexpr (kBackward) {
        Multiply<T>(p, shared, ring, group, acc, [&] { WaitForPhase(ready, parity); });
        GiveTimesSlopes<T>(acc, words);
      } else {
        const int col = corner.n + thread * 2;
        const uint32_t pair =
            col < p.n
                ? *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.bias) + col)
                : 0;
        Multiply<T>(p, shared, ring, group, acc, [&] {
          // Then the bias of the tile before has been read by all, too.
          WaitForPhase(ready, parity);
          shared.bias[group][thread] = UnpackPair<T>(pair);
          WarpgroupBarrier();
        });
        GiveSums<T>(acc, shared.bias[group], words);
      }
      parity ^= 1;
      if (kBackward) ShareWithEngines();  // which bring the next slopes to the same place
      if (kBackward || square + step < p.squares) Arrive(&shared.given[group]);
    }
    if constexpr (!kBackward) {
      // With no product left to do meanwhile the multipliers finish the last tile themselves, which
      // the finishers would take three times as long for.
      WarpgroupBarrier();
      const Corner corner(p, first + (p.squares - 1 - first) / step * step, place);
#pragma unroll 1
      for (int part = warp % kWarps; part < kParts; part += kWarps) {
        FinishPart<T, kTask, kTanh>(p,
                                    PartPlace(half, corner.m + group * kHalfRows, corner.n, part));
      }
    }
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

// Boxes of `box_cols` columns, 32 or 64, and `box_rows` rows of a [rows, cols] matrix.
cudaError_t MakeTensorMap(CUtensorMap* map, const void* data, DType dtype, int64_t rows,
                          int64_t cols, uint32_t box_rows, uint32_t box_cols = 64) {
  const auto encode = TensorMapEncoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t box[2] = {box_cols, box_rows};
  const cuuint32_t one[2] = {1, 1};
  const CUresult result = encode(
      map,
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), size, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Clusters that run at once, which may leave some multiprocessors out. Asked for once: it takes
// longer than a launch. On another device of the kind it may be off by a few, which costs a little
// time there.
template <typename Kernel>
cudaError_t Clusters(Kernel kernel, size_t shared, std::atomic<int>& known, int* clusters) {
  *clusters = known.load(std::memory_order_relaxed);
  if (*clusters > 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
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
  constexpr size_t kShared = sizeof(Shared<kTask>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(kShared));
  if (error != cudaSuccess) return error;
  static std::atomic<int> known_clusters{0};
  int clusters = 0;
  error = Clusters(kernel, kShared, known_clusters, &clusters);
  if (error != cudaSuccess) return error;
  const auto squares = [](int size, int side) { return (size + side - 1) / side; };
  problem.row_squares = squares(problem.m, kRowBlocks * kRows);
  problem.squares = problem.row_squares * squares(problem.n, kColBlocks * kCols);
  problem.group_rows = std::min(problem.row_squares, kGroupRows);
  problem.group_squares = problem.group_rows * squares(problem.n, kColBlocks * kCols);
  const int used = std::min(clusters, problem.squares);
  kernel<<<static_cast<unsigned>(used * kCluster), kThreads, kShared, stream>>>(maps, problem);
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

constexpr int64_t kDeepest = 2304;

bool Fits(DType dtype, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return (dtype == DType::kBF16 || dtype == DType::kF16) && m > 0 && n > 0 && k > 0 && m < kMost &&
         n < kMost && k < kMost && n % 8 == 0 && k % 8 == 0;
}

}  // namespace

bool UseGeluProduct(const GeluProductParams& p) {
  return p.k <= kDeepest && Fits(p.dtype, p.m, p.n, p.k) && p.bias != nullptr &&
         Aligned16(p.x, p.w, p.bias, p.pre, p.slope, p.y);
}

bool UseGeluProduct(const GeluProductBackwardParams& p) {
  return p.k <= kDeepest && Fits(p.dtype, p.m, p.n, p.k) &&
         Aligned16(p.dy, p.w, p.slope, p.pre, p.y_again, p.dx);
}

cudaError_t LaunchGeluProduct(const GeluProductParams& p, cudaStream_t stream) {
  Maps maps{};
  const Task task = p.slope != nullptr ? Task::kSlope : Task::kGelu;
  const auto depth = static_cast<uint32_t>(DepthOf(task));
  cudaError_t error = MakeTensorMap(&maps.left, p.x, p.dtype, p.m, p.k, kLeftPart, depth);
  if (error == cudaSuccess) {
    error = MakeTensorMap(&maps.right, p.w, p.dtype, p.n, p.k, kRightPart, depth);
  }
  if (error != cudaSuccess) return error;
  Problem problem{};
  problem.bias = p.bias;
  problem.kept = p.slope != nullptr ? p.slope : p.pre;
  problem.out = p.y;
  problem.m = static_cast<int>(p.m);
  problem.n = static_cast<int>(p.n);
  problem.k = static_cast<int>(p.k);
  return task == Task::kSlope ? Launch<Task::kSlope>(p.dtype, p.tanh, maps, problem, stream)
                              : Launch<Task::kGelu>(p.dtype, p.tanh, maps, problem, stream);
}

cudaError_t LaunchGeluProductBackward(const GeluProductBackwardParams& p, cudaStream_t stream) {
  const bool by_slope = p.slope != nullptr;
  const void* kept = by_slope ? p.slope : p.pre;
  const auto depth = static_cast<uint32_t>(DepthOf(by_slope ? Task::kBySlope : Task::kByPre));
  Maps maps;
  cudaError_t error = MakeTensorMap(&maps.left, p.dy, p.dtype, p.m, p.k, kLeftPart, depth);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.right, p.w, p.dtype, p.k, p.n, depth);
  if (error == cudaSuccess) error = MakeTensorMap(&maps.kept, kept, p.dtype, p.m, p.n, kHalfRows);
  if (error != cudaSuccess) return error;
  Problem problem{};
  problem.out = p.dx;
  problem.again = p.y_again;
  problem.partials = p.dbias != nullptr ? p.sums : nullptr;
  problem.m = static_cast<int>(p.m);
  problem.n = static_cast<int>(p.n);
  problem.k = static_cast<int>(p.k);
  error = by_slope ? Launch<Task::kBySlope>(p.dtype, p.tanh, maps, problem, stream)
                   : Launch<Task::kByPre>(p.dtype, p.tanh, maps, problem, stream);
  if (error != cudaSuccess || p.dbias == nullptr || p.leave_sums) return error;
  return LaunchFinishColumnSum({p.sums, GeluProductSlices(p.m), p.n, {p.dbias}}, stream);
}

}  // namespace lamina::cuda
