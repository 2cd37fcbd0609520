#include "op_timer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <utility>

namespace lamina::bench {

OpTimer::OpTimer(Device& device, int repetitions)
    : device_(device), repetitions_(repetitions), head_start_(device) {
  if (!device.is_gpu()) return;
  constexpr int64_t kBytes = int64_t{1} << 30;  // about 0.7 ms
  for (TensorView* view : {&from_, &to_}) *view = head_start_.Zeros(DType::kU8, {kBytes});
}

OpTimer::Calls OpTimer::Prepare(const OpCase& op) {
  constexpr size_t kCold = size_t{128} << 20, kMostSets = 16;
  Calls prepared;
  auto& [operands, calls] = prepared;
  size_t wanted = 1;
  do {
    calls.push_back(op.make(operands.emplace_back(device_)));
    const size_t bytes = std::max<size_t>(operands.front().moved_bytes(), 1);
    wanted = bytes >= 4 * kCold ? 1 : std::min(1 + (kCold + bytes - 1) / bytes, kMostSets);
  } while (calls.size() < wanted);
  return prepared;
}

Timing OpTimer::Time(const OpCase& op, const Workspace& workspace) {
  const auto [operands, calls] = Prepare(op);
  const auto sets = static_cast<int64_t>(calls.size());
  for (int i = 0; i < 2; ++i) Run(calls, workspace, sets);
  const double estimate = Run(calls, workspace, sets);
  const double target = device_.is_gpu() ? 1e-3 : 5e-3;
  const int64_t count =
      std::clamp<int64_t>(std::llround(target / std::max(estimate, 1e-9)), 1, 100);
  std::vector<double> us;
  for (int i = 0; i < repetitions_; ++i) us.push_back(Run(calls, workspace, count) * 1e6);
  std::sort(us.begin(), us.end());
  const size_t middle = us.size() / 2;
  return {.median_us = us.size() % 2 == 1 ? us[middle] : (us[middle - 1] + us[middle]) / 2,
          .min_us = us.front(),
          .max_us = us.back(),
          .moved_bytes = operands.front().moved_bytes()};
}

Sustained OpTimer::Sustain(const OpCase& op, const Workspace& workspace, const PowerMeter& meter,
                           double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const auto [operands, calls] = Prepare(op);
  Backend& backend = device_.backend();
  // Beside which asking the driver, for milliseconds, leaves no gap.
  constexpr double kBatchSeconds = 10e-3;
  const auto batch = std::max<int64_t>(
      std::llround(kBatchSeconds / Run(calls, workspace, static_cast<int64_t>(calls.size()))), 1);
  // One batch runs while the next one is enqueued.
  int64_t enqueued = 0;
  const auto enqueue = [&] {
    for (int64_t i = 0; i < batch; ++i) Check(calls[next_++ % calls.size()](workspace));
    Check(backend.RecordMark(static_cast<int>(enqueued++ % 2)));
  };
  struct Moment {
    double joules, second;
    int64_t batches;
  };
  std::optional<Moment> first, last;
  double joules = 0.0, megahertz = 0.0;
  int64_t clocks = 0;
  const Clock::time_point start = Clock::now();
  enqueue();
  for (int64_t done = 0; since(start) < seconds; ++done) {
    enqueue();
    Check(backend.WaitMark(static_cast<int>(done % 2)));
    const Moment now{meter.Joules(), since(start), done + 1};
    const bool renewed = std::exchange(joules, now.joules) != now.joules;
    if (!renewed || now.second < seconds / 3) continue;
    (first ? last : first) = now;
    megahertz += meter.Megahertz();
    ++clocks;
  }
  Check(backend.Synchronize());
  if (!last) throw std::runtime_error("the driver's energy counter stands still: a longer time");
  const auto count = static_cast<double>((last->batches - first->batches) * batch);
  const double taken = last->second - first->second, drawn = last->joules - first->joules;
  return {.us = taken / count * 1e6,
          .millijoules = drawn / count * 1e3,
          .watts = drawn / taken,
          .megahertz = megahertz / static_cast<double>(clocks)};
}

double OpTimer::Run(const std::vector<OpCall>& calls, const Workspace& workspace, int64_t count) {
  Backend& backend = device_.backend();
  // While the device copies, the host enqueues: short kernels are not timed by what a launch takes
  // the host.
  if (from_) Check(backend.CopyWithin(to_.data, from_.data, from_.bytes()));
  Check(backend.RecordMark(0));
  for (int64_t i = 0; i < count; ++i) {
    Check(calls[next_ % calls.size()](workspace));
    ++next_;
  }
  Check(backend.RecordMark(1));
  Check(backend.Synchronize());
  return Value(backend.SecondsBetween(0, 1)) / static_cast<double>(count);
}

Scratch::Scratch(Device& device, const LayerDims& dims) : tensors_(device) {
  const size_t bytes = device.backend().WorkspaceBytes(dims);
  if (bytes > 0)
    workspace_ = {tensors_.Zeros(DType::kU8, {static_cast<int64_t>(bytes)}).data, bytes};
  const size_t pending = device.backend().PendingSumBytes(dims);
  if (pending == 0) return;
  pending_ = {tensors_.Zeros(DType::kU8, {static_cast<int64_t>(pending)}).data, pending};
  workspace_.pending = &pending_;
}

double Ceilings::FloorUs(double op_flops, double op_bytes) const {
  return std::max(op_flops / flops, op_bytes / bytes) * 1e6;
}

Ceilings MeasureCeilings(Device& device, OpTimer& timer, DType dtype, const PowerMeter* meter,
                         double seconds) {
  const int64_t size = device.is_gpu() ? 8192 : 512;
  const Scratch scratch(device, {.batch = 1,
                                 .seq = size,
                                 .hidden = size,
                                 .heads = size / 64,
                                 .intermediate = size,
                                 .dtype = dtype});
  const OpCase product = ProductCeiling(dtype, size);
  const OpCase copy = CopyCeiling(int64_t{1} << (device.is_gpu() ? 30 : 26));
  const Timing product_timing = timer.Time(product, scratch.workspace());
  const Timing copy_timing = timer.Time(copy, scratch.workspace());
  const auto copy_bytes = static_cast<double>(copy_timing.moved_bytes);
  Ceilings ceilings{.flops = product.flops / product_timing.median_us * 1e6,
                    .bytes = copy_bytes / copy_timing.median_us * 1e6};
  if (meter == nullptr) return ceilings;
  const Sustained p = timer.Sustain(product, scratch.workspace(), *meter, seconds);
  const Sustained c = timer.Sustain(copy, scratch.workspace(), *meter, seconds);
  ceilings.energy = {.product = p,
                     .copy = c,
                     .flop_picojoules = p.millijoules / product.flops * 1e9,
                     .byte_picojoules = c.millijoules / copy_bytes * 1e9};
  return ceilings;
}

}  // namespace lamina::bench
