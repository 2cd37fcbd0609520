// What the ops of the CPU backend share: its threads, its kernels, its products, and the rules by
// which work and scratch are shared out.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "lamina/kernels/backend.h"
#include "products.h"
#include "simd/kernels.h"

namespace lamina::cpu {

struct Context {
  int threads;
  const KernelSet& kernels;
  Products& products;
};

// Runs body(thread, begin, end) on contiguous ranges that cover [0, n), on at most `threads`
// threads, each with `grain` items at least. The ranges are fixed by n and the thread count. With
// one thread no other is started.
template <typename Body>
void ParallelRanges(int threads, int64_t n, int64_t grain, const Body& body) {
  const int useful = static_cast<int>(
      std::min<int64_t>(threads, std::max<int64_t>(1, n / std::max<int64_t>(grain, 1))));
  if (useful <= 1) {
    body(0, int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(useful)
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = n * thread / team, end = n * (thread + 1) / team;
    if (begin < end) body(static_cast<int>(thread), begin, end);
  }
}

// For items of unequal cost: threads take them in turn, a few at a time. `worker(thread)` makes
// what a thread calls with each of its items. Which thread takes an item differs from run to run,
// so what is computed for it must not depend on that.
template <typename MakeWorker>
void ParallelItems(int threads, int64_t n, const MakeWorker& worker) {
  const int useful = static_cast<int>(std::min<int64_t>(threads, n));
  if (useful <= 1) {
    auto work = worker(0);
    for (int64_t item = 0; item < n; ++item) work(item);
    return;
  }
  const int64_t taken = std::max<int64_t>(1, n / (32 * int64_t{useful}));
#pragma omp parallel num_threads(useful)
  {
    auto work = worker(omp_get_thread_num());
#pragma omp for schedule(dynamic, taken)
    for (int64_t item = 0; item < n; ++item) work(item);
  }
}

// Rows of `width` elements that are worth a thread's start.
constexpr int64_t RowGrain(int64_t width) { return std::max<int64_t>(1, 16384 / width); }

// Column sums over rows are taken chunk by chunk, and the chunks' sums are added in a fixed tree:
// the bits depend on the number of rows alone, never on the threads.
struct RowChunks {
  explicit RowChunks(int64_t all) : rows(all), size(std::max<int64_t>(16, (all + 63) / 64)) {}
  static constexpr int64_t kMost = 64;
  // No fewer than any count of `most` rows or less gives.
  static constexpr int64_t Bound(int64_t most) { return std::min(kMost, (most + 15) / 16); }

  int64_t count() const { return (rows + size - 1) / size; }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * size); }

  int64_t rows;
  int64_t size;
};

// out [n] += the sum of `count` partial sums, each `stride` floats after the last. Overwrites them.
inline void AddPartials(const KernelSet& kernels, float* partials, int64_t count, int64_t stride,
                        int64_t n, float* out) {
  for (int64_t step = 1; step < count; step *= 2)
    for (int64_t i = 0; i + step < count; i += 2 * step)
      kernels.add(partials + (i + step) * stride, partials + i * stride, n);
  kernels.add(partials, out, n);
}

inline absl::Status NeedWorkspace(const char* op, const Workspace& ws, size_t bytes) {
  if (ws.bytes >= bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": workspace has ", ws.bytes, " bytes; it must have ", bytes, " at least"));
}

inline float* Floats(const Workspace& ws, int64_t offset = 0) {
  return static_cast<float*>(ws.data) + offset;
}

inline DropoutKey KeyOf(const Dropout& dropout) {
  DropoutKey key;
  if (dropout.ratio <= 0.0f) return key;
  key.on = true;
  key.rng = *dropout.rng;
  key.stream = dropout.stream;
  key.threshold = KeepThreshold(dropout.ratio);
  key.scale = KeepScale(key.threshold);
  return key;
}

}  // namespace lamina::cpu
