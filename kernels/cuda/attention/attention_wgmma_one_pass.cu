// Purpose: the backward of attention with wgmma in one pass, for more than 128 tokens and head dims
// up to 64; attention_wgmma.cuh.
//
// A block has 128 keys of a head: two warpgroups compute the gradients of their scores, and dK and
// dV, a third one dQ, and the fourth finds out what part comes next, copies what the others read
// and draws the dropout's bits. All blocks of a head run at once, on different multiprocessors, and
// go over the head's tiles of queries in turn, each from its own tile on. dQ of a tile is summed up
// in device memory, by one block after the other: the tile's own block writes its part there, the
// others add theirs in a fixed order, and the last one has the sum. Until a tile is back with a
// block before the tile's own it has been with all others, so that they hardly wait for each other.
#include <algorithm>

#include "attention/attention_wgmma.cuh"
#include "attention/attention_wgmma_ring.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kDim = 64;
constexpr int kGroups = 2;  // that compute scores
constexpr int kComputing = kGroups * kWarpgroup;
constexpr int kThreads = kComputing + 2 * kWarpgroup;
constexpr int kKeys = kGroups * kTile;  // of a block
static_assert(kKeys == kPassKeys, "what the sums are counted by");
constexpr int kComputeRegisters = 192, kQueryGradRegisters = 88, kCopyRegisters = 40;
static_assert(2 * kComputeRegisters + kQueryGradRegisters + kCopyRegisters == 512);
constexpr int kSlots = 4;

// A block's keys of a head, and how the head's blocks share its tiles of queries.
struct Part {
  Head h;
  uint32_t mark;    // of the head, in turns: lower 8 bits are 0
  int block;        // of the head's
  int members;      // how many blocks there are; 0: there is no such part
  int tiles;        // of all of the head's queries
  int log_own;      // a block's own are 2^log_own neighbouring ones, kPassSlots at most
  int begin;        // where the block begins
  int first_block;  // of the grid
  int side;         // which half of the sums' slots the head has

  __device__ __forceinline__ void Share(bool causal) {
    log_own = causal || members < tiles ? 1 : 0;
    if (!causal && 2 * members < tiles) log_own = 2;
    begin = block << log_own;
    if (!causal && begin >= tiles) begin -= tiles;
  }
  // Which of the grid's blocks for the head, counted from the first one, has its keys `of`. A
  // causal head's first keys have the most queries: every other time they come last.
  __device__ __forceinline__ int Place(bool causal, int of) const {
    return causal && side != 0 ? members - 1 - of : of;
  }
  // A causal block leaves out the tiles that see none of its keys.
  __device__ __forceinline__ int Steps(bool causal) const {
    return causal ? max(tiles - begin, 0) : tiles;
  }
  __device__ __forceinline__ int Tile(int step) const {
    const int tile = begin + step;
    return tile < tiles ? tile : tile - tiles;
  }
  // The block whose own a tile is.
  __device__ __forceinline__ int Owner(int tile) const { return tile >> log_own; }
};

// A block's parts: heads in their order, as many at a time as the grid has blocks for. So all
// blocks of a head have it at the same time, after what they had before. In shared memory: it is
// one warp's, which has more to keep in registers from one part to the next.
struct PartsInTurn {
  int batch, head;   // the next one
  int place, round;  // of the grid's blocks
  int known;         // the first of the following sequences
  Sequence sequences[32];

  __device__ __forceinline__ void Start() {
    batch = head = place = round = 0;
    known = -32;
  }
  // For all lanes of the warp together; the first one sets `part`.
  __device__ __forceinline__ void Next(const AttentionParams& p, Part& part) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const int grid = static_cast<int>(gridDim.x);
    const int heads = static_cast<int>(p.heads);
    const int batches = static_cast<int>(p.batch);
    int next_batch = batch, next_head = head, next_place = place, next_round = round;
    bool found = false;
    while (next_batch < batches && !found) {
      if (next_batch >= known + 32) {
        __syncwarp();
        sequences[lane] = SequenceOf(p, min(next_batch + lane, batches - 1));
        if (lane == 0) known = next_batch;
        __syncwarp();
      }
      const Sequence& sequence = sequences[next_batch - known];
      const int tiles = (sequence.length + kTile - 1) / kTile;
      const int keys = p.causal ? sequence.length : sequence.keys;
      int members = max(1, (keys + kKeys - 1) / kKeys);
      // No block has more tiles than there are slots for.
      if (!p.causal) members = max(members, (tiles + kPassSlots - 1) / kPassSlots);
      const int fit = min(Quotient(grid - next_place, members), heads - next_head);
      if (fit == 0) {
        next_place = 0;
        ++next_round;
        continue;
      }
      const int64_t this_batch = next_batch;
      const int at = static_cast<int>(blockIdx.x) - next_place;
      const int first_head = next_head;
      const int first_block = next_place;
      next_place += fit * members;
      next_head += fit;
      if (next_head == heads) {
        next_head = 0;
        ++next_batch;
      }
      found = at >= 0 && at < fit * members;
      if (!found || lane != 0) continue;
      const int nth = Quotient(at, members);
      part.members = members;
      part.tiles = tiles;
      part.first_block = first_block + nth * members;
      part.side = next_round & 1;
      part.block = part.Place(p.causal, at - nth * members);
      part.Share(p.causal);
      const int64_t index = this_batch * heads + first_head + nth;
      part.mark = static_cast<uint32_t>(index) << 8;
      part.h = HeadAt<kKeys, BlockRows::kKeys>(p, sequence, index, this_batch, first_head + nth,
                                               part.block);
    }
    __syncwarp();
    if (lane == 0) {
      batch = next_batch;
      head = next_head;
      place = next_place;
      round = next_round;
      if (!found) part.members = 0;
    }
  }

 private:
  // a / b, of numbers up to a thousand: half of one is more than is lost. A division of integers
  // takes ten times as long.
  static __device__ __forceinline__ int Quotient(int a, int b) {
    return static_cast<int>(__fdividef(static_cast<float>(a) + 0.5f, static_cast<float>(b)));
  }
};

template <typename T>
struct PassShared {
  struct Keys {
    SwizzledTile<T> k[kGroups], v[kGroups];
  };
  Keys keys[2];
  Part parts[2];  // that the keys are of
  PartsInTurn parts_in_turn;
  struct Slot {
    SwizzledTile<T> q, dout;
  };
  Slot slots[kSlots];
  SwizzledTile<T> ds[2][kGroups];  // rows are keys
  SoftmaxRow softmax[kSlots][kTile];
  float shift[kSlots][kTile];
  float delta[kSlots][kTile];
  uint32_t kept[kSlots][2 * kGroups][kTile];  // [word of the block's keys][query]
  // Of a part and of the next one in turn, so that there is one barrier a part.
  WarpSums sums[2][2][kComputing / 32];  // of dk and dv
  WarpSums query_sums[2][kWarpgroup / 32];
  uint64_t full[kSlots], empty[kSlots];
  uint64_t keys_full[2], keys_empty[2];
  uint64_t ds_full[2], ds_empty[2];

  __device__ __forceinline__ void Start() {
    parts_in_turn.Start();
    for (int i = 0; i < kSlots; ++i) {
      StartBarrier(&full[i], 2 * kWarpgroup);
      StartBarrier(&empty[i], kComputing / 32);
    }
    for (int i = 0; i < 2; ++i) {
      StartBarrier(&keys_full[i], kWarpgroup + 1);
      StartBarrier(&keys_empty[i], (kComputing + kWarpgroup) / 32);
      StartBarrier(&ds_full[i], kComputing / 32);
      StartBarrier(&ds_empty[i], kWarpgroup / 32);
    }
  }
};

// --- the warpgroup that copies and draws ---

template <typename T, bool kDropout>
__device__ __forceinline__ void CopyTiles(const AttentionParams& p, PassShared<T>& shared) {
  const int64_t stride = 3 * p.width;
  const TileCopies<kDim> copies(static_cast<int>(p.head_dim));
  const int tid = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int row = tid % kTile;
  const int word = tid / kTile;
  RngState rng{};
  if (kDropout) rng = UniformState(p.dropout.rng);
  RingPlace<kSlots> place;
  RingPlace<2> keys_place;
  while (true) {
    WaitForPhase(&shared.keys_empty[keys_place.slot], keys_place.parity ^ 1);
    if (tid < 32) shared.parts_in_turn.Next(p, shared.parts[keys_place.slot]);
    if (tid == 0) Arrive(&shared.keys_full[keys_place.slot]);
    WarpgroupBarrier();
    const Part& part = shared.parts[keys_place.slot];
    const int steps = part.members > 0 ? part.Steps(p.causal) : 0;
    if (steps == 0) {
      Arrive(&shared.keys_full[keys_place.slot]);
      keys_place.Advance();
      if (part.members == 0) break;
      continue;
    }
    const Head& h = part.h;
    const T* qkv = static_cast<const T*>(p.qkv) + h.token * stride + h.column;
    const T* dout = static_cast<const T*>(p.dout) + h.token * p.width + h.column;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int first = h.first + i * kTile;
      const T* keys = qkv + p.width + min(first, h.length - 1) * stride;
      auto& to = shared.keys[keys_place.slot];
      copies.template Start<TileOrder::kPlain>(reinterpret_cast<HeadTile<T, kDim>&>(to.k[i]), keys,
                                               stride, h.keys - first);
      copies.template Start<TileOrder::kPlain>(reinterpret_cast<HeadTile<T, kDim>&>(to.v[i]),
                                               keys + p.width, stride, h.keys - first);
    }
    ArriveAfterCopies(&shared.keys_full[keys_place.slot]);
    keys_place.Advance();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int query0 = part.Tile(step) * kTile;
      const int rows = h.length - query0;
      SoftmaxRow softmax{INFINITY, 0.0f};
      float delta = 0.0f;
      if (tid < min(rows, kTile)) {
        softmax = p.softmax[h.row + query0 + tid];
        delta = p.delta[h.row + query0 + tid];
      }
      WaitForPhase(&shared.empty[place.slot], place.parity ^ 1);
      auto& slot = shared.slots[place.slot];
      copies.template Start<TileOrder::kPlain>(reinterpret_cast<HeadTile<T, kDim>&>(slot.q),
                                               qkv + query0 * stride, stride, rows);
      copies.template Start<TileOrder::kPlain>(reinterpret_cast<HeadTile<T, kDim>&>(slot.dout),
                                               dout + query0 * p.width, p.width, rows);
      ArriveAfterCopies(&shared.full[place.slot]);
      if (tid < kTile) {
        shared.softmax[place.slot][tid] = softmax;
        shared.shift[place.slot][tid] = ShiftOf(softmax);
        shared.delta[place.slot][tid] = delta;
      }
      if constexpr (kDropout) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          const auto call = static_cast<uint32_t>(4 * (h.first / kTile + i) + 2 * word);
          const int64_t softmax_row = h.row + query0 + row;
          shared.kept[place.slot][2 * i + word][row] =
              DrawCall(p.dropout, rng, softmax_row, call) |
              static_cast<uint32_t>(DrawCall(p.dropout, rng, softmax_row, call + 1)) << 16;
        }
      }
      // Each thread for itself: see ArriveByWarp.
      Arrive(&shared.full[place.slot]);
      place.Advance();
    }
  }
}

// --- those that compute with scores ---

// A barrier beside those of the warpgroups.
__device__ __forceinline__ void ComputersBarrier() {
  asm volatile("bar.sync 5, %0;" ::"n"(kComputing) : "memory");
}

template <typename T, bool kDropout>
__device__ __forceinline__ void ComputeKeyGrads(const AttentionParams& p, PassShared<T>& shared) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int group = __shfl_sync(0xFFFFFFFFu, tid / kWarpgroup, 0);
  const int warp = __shfl_sync(0xFFFFFFFFu, tid / 32, 0);
  const int warp_row = warp % 4 * 16;  // within the group's tile
  const int blocks = static_cast<int>((p.seq + kKeys - 1) / kKeys);
  RingPlace<kSlots> place;
  RingPlace<2> keys_place, ds_place;
  const auto wait_full = [&] {
    WaitForPhase(&shared.full[place.slot], place.parity);
    ShareWithEngines();
  };
  // To the warpgroup that computes dQ.
  const auto pass_ds = [&](const uint32_t(&ds)[4][4]) {
    WaitForPhase(&shared.ds_empty[ds_place.slot], ds_place.parity ^ 1);
#pragma unroll
    for (int k = 0; k < 4; ++k) StoreFragment(shared.ds[ds_place.slot][group], warp_row, k, ds[k]);
    ShareWithEngines();
    ArriveByWarp(&shared.ds_full[ds_place.slot]);
    ds_place.Advance();
  };
  int side = 0;  // of the sums
  while (true) {
    WaitForPhase(&shared.keys_full[keys_place.slot], keys_place.parity);
    const Part& part = shared.parts[keys_place.slot];
    if (Uniform(part.members) == 0) break;
    const Head& h = part.h;
    const int key0 = h.first + group * kTile;
    const KeyTile keys(p, h, key0, warp_row);
    const uint64_t k_tile = DescribeTile(&shared.keys[keys_place.slot].k[group]);
    const uint64_t v_tile = DescribeTile(&shared.keys[keys_place.slot].v[group]);
    float dk[8][4] = {};
    float dv[8][4] = {};
    const int steps = Uniform(part.Steps(p.causal));
    // A warpgroup whose keys are cut off, or not seen by the first queries.
    const int skipped = Uniform(key0 < h.keys ? min(p.causal ? group : 0, steps) : steps);
#pragma unroll 1
    for (int step = 0; step < skipped; ++step) {
      wait_full();
      ArriveByWarp(&shared.empty[place.slot]);
      place.Advance();
      const uint32_t none[4][4] = {};
      pass_ds(none);
    }
    float s[8][4], dp[8][4];
    const auto begin = [&] {
      wait_full();
      BeginProducts();
      MultiplyRowsOfTiles<T>(s, k_tile, DescribeTile(&shared.slots[place.slot].q));
      CommitProducts();
      MultiplyRowsOfTiles<T>(dp, v_tile, DescribeTile(&shared.slots[place.slot].dout));
      CommitProducts();
    };
    const auto compute = [&](int step, auto last) {
      const QueryTile queries{shared.softmax[place.slot], shared.shift[place.slot],
                              shared.delta[place.slot],
                              shared.kept[place.slot][2 * group + KeptWord(warp)]};
      uint32_t probs[4][4], ds[4][4];
      keys.Probabilities<T, kDropout>(s, probs, p, queries, part.Tile(step) * kTile);
      WaitForProducts<0>();
      PinProduct(dp);
      keys.ScoreGrads<T, kDropout>(s, dp, ds, p, queries);
      pass_ds(ds);
      BeginProducts();
      MultiplyTile<T>(dv, probs, DescribeTile(&shared.slots[place.slot].dout));
      MultiplyTile<T>(dk, ds, DescribeTile(&shared.slots[place.slot].q));
      CommitProducts();
      const int now = place.slot;
      place.Advance();
      if constexpr (!last) {
        begin();
        WaitForProducts<1>();
        PinProduct(s);
      } else {
        WaitForProducts<0>();
      }
      PinProduct(dv);
      PinProduct(dk);
      ArriveByWarp(&shared.empty[now]);
    };
    if (skipped < steps) {
      begin();
      WaitForProducts<1>();
      PinProduct(s);
#pragma unroll 1
      for (int step = skipped; step < steps - 1; ++step) compute(step, std::false_type{});
      compute(steps - 1, std::true_type{});
    }

    T* dst = static_cast<T*>(p.dqkv) + h.token * stride + h.column;
    int row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = keys.Row(half) < h.length ? keys.Row(half) : -1;
    }
    StoreHeadRows(dst + p.width, stride, row, head_dim, dk, p.scale, p.scale);
    StoreHeadRows(dst + 2 * p.width, stride, row, head_dim, dv, p.dropout.scale, p.dropout.scale);
    const auto sums_of = [&](int block) {
      return p.sums + (3 * (h.batch * blocks + block) + 1) * p.width + h.column;
    };
    if (p.sums != nullptr) {
      auto& sums = shared.sums[side];
      sums[0][warp].pairs[lane] = ColumnSums(dk);
      sums[1][warp].pairs[lane] = ColumnSums(dv);
      ComputersBarrier();
      const int which = tid / kDim;
      const int column = tid % kDim;
      if (which < 2 && column < head_dim) {
        sums_of(part.block)[which * p.width + column] = AddWarpSums(
            sums[which], kComputing / 32, which == 0 ? p.scale : p.dropout.scale, column);
      }
    }
    // Keys that no block has, as they are cut off.
#pragma unroll 1
    for (int block = part.block + part.members; block < blocks; block += part.members) {
      const int chunk = tid % 8;
      for (int i = tid / 8; i < kKeys; i += kComputing / 8) {
        if (block * kKeys + i >= h.length || chunk * 8 >= head_dim) continue;
        T* to = dst + (block * kKeys + i) * stride + chunk * 8;
        *reinterpret_cast<uint4*>(to + p.width) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(to + 2 * p.width) = make_uint4(0, 0, 0, 0);
      }
      if (p.sums != nullptr && tid < head_dim) {
        sums_of(block)[tid] = sums_of(block)[p.width + tid] = 0.0f;
      }
    }
    ArriveByWarp(&shared.keys_empty[keys_place.slot]);
    keys_place.Advance();
    side ^= 1;
  }
}

// --- the one that computes dQ ---

__device__ __forceinline__ uint32_t LoadAcquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t LoadRelaxed(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void StoreRelaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
// Acquires what loads before have seen, releases what stores behind tell of.
__device__ __forceinline__ void FenceAll() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// *to += v
__device__ __forceinline__ void AddFour(float* to, const float (&v)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]),
               "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

// Of what other blocks have written.
__device__ __forceinline__ void LoadFour(float (&v)[4], const float* from) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(from)
               : "memory");
}

// What a turn says where its slot is free; else it is a head's mark and how many have added.
constexpr uint32_t kFree = 0xFF;

// A block's turn at a tile of queries.
struct Turn {
  int tile;
  int turn, all;  // of so many
  int slot;

  __device__ __forceinline__ Turn(const Part& part, bool causal, int step) : tile(part.Tile(step)) {
    const int owner = part.Owner(tile);
    all = causal ? owner + 1 : part.members;
    turn = owner - part.block + (owner < part.block ? part.members : 0);
    slot = ((part.first_block + part.Place(causal, owner)) * 2 + part.side) * kPassSlots + tile -
           (owner << part.log_own);
  }
  // What the flag says when it has come.
  __device__ __forceinline__ bool Has(const Part& part, uint32_t value) const {
    return turn == 0 ? (value & 0xFFu) == kFree
                     : value == (part.mark | static_cast<uint32_t>(turn));
  }
  // What it is to say when it is over.
  __device__ __forceinline__ uint32_t Over(const Part& part) const {
    return part.mark | (turn < all - 1 ? static_cast<uint32_t>(turn + 1) : kFree);
  }
};

template <typename T>
__device__ __forceinline__ void ComputeQueryGrads(const AttentionParams& p, PassShared<T>& shared) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int tid = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = tid & 31;
  const int warp = __shfl_sync(0xFFFFFFFFu, tid / 32, 0);
  const int blocks = static_cast<int>((p.seq + kKeys - 1) / kKeys);
  RingPlace<2> keys_place, ds_place;
  int side = 0;  // of the sums
  while (true) {
    WaitForPhase(&shared.keys_full[keys_place.slot], keys_place.parity);
    const Part& part = shared.parts[keys_place.slot];
    if (Uniform(part.members) == 0) break;
    const Head& h = part.h;
    const int steps = Uniform(part.Steps(p.causal));
    float2 sums = make_float2(0.0f, 0.0f);
    if (steps > 0) {
      ShareWithEngines();
      Turn next(part, p.causal, 0);
      // In lane 0. What this warp's last turn was at, until the next one in it is told: while it
      // waits for the scores' gradients, or for their products.
      uint32_t* over = nullptr;
      uint32_t over_value = 0;
      bool ready = false;  // whether the turn that comes next is there already
      const auto hand_over = [&](const uint32_t* next_turns, const Turn& next_turn) {
        // Acquired by the same fence.
        const uint32_t seen = next_turns != nullptr ? LoadRelaxed(next_turns) : 0;
        FenceAll();
        StoreRelaxed(over, over_value);
        over = nullptr;
        ready = next_turns != nullptr && next_turn.Has(part, seen);
      };
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const Turn now = next;
        next = Turn(part, p.causal, min(step + 1, steps - 1));
        const int tile = now.tile;
        // Warps hand over their own rows.
        uint32_t* turns = p.turns + now.slot * 4 + warp;
        float* sum = p.query_sums + int64_t{now.slot} * (kTile * kDim) + tid * 4;
        if (lane == 0 && over != nullptr &&
            !HasPhaseEnded(&shared.ds_full[ds_place.slot], ds_place.parity)) {
          hand_over(now.all > 1 ? turns : nullptr, now);
        }
        __syncwarp();
        WaitForPhase(&shared.ds_full[ds_place.slot], ds_place.parity);
        const uint64_t ds = DescribeTile(&shared.ds[ds_place.slot][0]);
        const uint64_t k = DescribeTile(&shared.keys[keys_place.slot].k[0]);
        constexpr uint64_t kNext = kSwizzledBytes >> 4;
        float dq[8][4];
        BeginProducts();
        MultiplyTransposedTile<T, false>(dq, ds, k);
        MultiplyTransposedTile<T>(dq, ds + kNext, k + kNext);
        CommitProducts();
        if (lane == 0 && over != nullptr) hand_over(now.all > 1 ? turns : nullptr, now);
        __syncwarp();
        WaitForProducts<0>();
        PinProduct(dq);
        ArriveByWarp(&shared.ds_empty[ds_place.slot]);
        ds_place.Advance();
        if (now.all > 1) {
          if (lane == 0 && !ready) {
            while (!now.Has(part, LoadAcquire(turns))) {
            }
          }
          ready = false;
          __syncwarp();
          if (now.turn == 0) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              *reinterpret_cast<float4*>(sum + i * kWarpgroup * 4) =
                  make_float4(dq[i][0], dq[i][1], dq[i][2], dq[i][3]);
            }
          } else if (now.turn < now.all - 1) {
#pragma unroll
            for (int i = 0; i < 8; ++i) AddFour(sum + i * kWarpgroup * 4, dq[i]);
          } else {
#pragma unroll
            for (int fours = 0; fours < 8; fours += 4) {
              float others[4][4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                LoadFour(others[i], sum + (fours + i) * kWarpgroup * 4);
              }
#pragma unroll
              for (int i = 0; i < 16; ++i) dq[fours + i / 4][i % 4] += others[i / 4][i % 4];
            }
          }
          __syncwarp();
          over = turns;
          over_value = now.Over(part);
          if (now.turn < now.all - 1) continue;
        }
        int row[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          row[half] = tile * kTile + warp * 16 + lane / 4 + 8 * half;
          if (row[half] >= h.length) row[half] = -1;
        }
        if (p.sums != nullptr) {
          const float2 more = ColumnSums(dq);
          sums.x += more.x;
          sums.y += more.y;
        }
        StoreHeadRows(static_cast<T*>(p.dqkv) + h.token * stride + h.column, stride, row, head_dim,
                      dq, p.scale, p.scale);
      }
      if (lane == 0 && over != nullptr) hand_over(nullptr, next);
    }
    if (p.sums != nullptr) {
      const auto sums_of = [&](int block) {
        return p.sums + 3 * (h.batch * blocks + block) * p.width + h.column;
      };
      auto& query_sums = shared.query_sums[side];
      side ^= 1;
      query_sums[warp].pairs[lane] = sums;
      WarpgroupBarrier();
      if (tid < head_dim) {
        sums_of(part.block)[tid] = AddWarpSums(query_sums, kWarpgroup / 32, p.scale, tid);
        for (int block = part.block + part.members; block < blocks; block += part.members) {
          sums_of(block)[tid] = 0.0f;
        }
      }
    }
    ArriveByWarp(&shared.keys_empty[keys_place.slot]);
    keys_place.Advance();
  }
}

template <typename T, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) OnePassKernel(const AttentionParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<PassShared<T>*>(shared_bytes);
  if (threadIdx.x == 0) shared.Start();
  __syncthreads();
  if (threadIdx.x < kComputing) {
    TakeRegisters<kComputeRegisters>();
    ComputeKeyGrads<T, kDropout>(p, shared);
  } else if (threadIdx.x < kComputing + kWarpgroup) {
    GiveRegisters<kQueryGradRegisters>();
    ComputeQueryGrads<T>(p, shared);
  } else {
    GiveRegisters<kCopyRegisters>();
    CopyTiles<T, kDropout>(p, shared);
  }
}

template <typename T, bool kDropout>
cudaError_t Launch(const AttentionParams& p, cudaStream_t stream) {
  const auto kernel = OnePassKernel<T, kDropout>;
  constexpr size_t kShared = sizeof(PassShared<T>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(kShared));
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(p.turns, 0xFF, PassTurnBytes(p.multiprocessors), stream);
  if (error != cudaSuccess) return error;
  const int64_t most = p.batch * p.heads * ((p.seq + kKeys - 1) / kKeys);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(most, p.multiprocessors)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  // Blocks wait for each other: all of them must run at once, whatever else the device does.
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t LaunchAttentionWgmmaOnePassBackward(const AttentionParams& p, cudaStream_t stream) {
  if (p.batch * p.heads > 0x7FFFFFFF) return cudaErrorInvalidValue;
  return DispatchHalf(p.dtype, p.dropout.rng != nullptr, [&](auto tag, auto dropout) {
    return Launch<typename decltype(tag)::type, dropout.value>(p, stream);
  });
}

}  // namespace lamina::cuda
