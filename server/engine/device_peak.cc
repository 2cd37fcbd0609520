#include "server/engine/device_peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/strings/match.h"

namespace lamina {
namespace {

// NVIDIA's data sheets, dense, TFLOP/s. The first entry whose words are all in the name counts.
struct Card {
  const char* words[2];
  double half, fp32;  // bf16 and fp16 alike
};
constexpr Card kCards[] = {
    {{"H100", "PCIe"}, 756, 51.2}, {{"H100", "NVL"}, 835.5, 60},
    {{"H100", ""}, 989.4, 66.9},  // SXM5: "NVIDIA H100 80GB HBM3"
    {{"H800", "PCIe"}, 756, 51.2}, {{"H800", ""}, 989.4, 66.9},
    {{"H200", "NVL"}, 835.5, 60},  {{"GH200", ""}, 989.4, 66.9},
    {{"H200", ""}, 989.4, 66.9},   {{"H20", ""}, 148, 44},
};

// Large enough that cores and caches are at their best, small enough to be over soon.
struct Product {
  int64_t tokens, inputs, outputs;
};
constexpr Product kOnCores{.tokens = 256, .inputs = 1024, .outputs = 1024};
constexpr Product kOnCard{.tokens = 8192, .inputs = 4096, .outputs = 4096};
constexpr int kRuns = 5;
constexpr std::chrono::milliseconds kEnough{10};  // then no further run is begun

// Device memory for the measurement.
class Scratch {
 public:
  Scratch(Backend& backend, size_t bytes) : backend_(backend) {
    const auto allocated = backend_.Allocate(bytes);
    if (allocated.ok()) data_ = *allocated;
  }
  ~Scratch() {
    if (data_ != nullptr) backend_.Free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  Backend& backend_;
  void* data_ = nullptr;
};

// Numbers in [1, 2) whose bits differ: with zeros a card draws less power than it does in earnest
// and keeps a higher clock.
bool Fill(Backend& backend, void* data, size_t bytes, DType dtype) {
  std::vector<uint16_t> words(std::min<size_t>(bytes, size_t{1} << 20) / sizeof(uint16_t));
  uint32_t random = 1;
  for (size_t i = 0; i < words.size(); ++i) {
    random = random * 1664525 + 1013904223;
    const uint16_t bits = static_cast<uint16_t>(random >> 16);
    if (dtype == DType::kF16) {
      words[i] = static_cast<uint16_t>(0x3C00 | (bits & 0x03FF));
    } else if (dtype == DType::kBF16 || i % 2 == 1) {  // of fp32 the upper half
      words[i] = static_cast<uint16_t>(0x3F80 | (bits & 0x007F));
    } else {
      words[i] = bits;
    }
  }
  const size_t chunk = words.size() * sizeof(uint16_t);
  for (size_t at = 0; at < bytes; at += chunk)
    if (!backend.CopyIn(static_cast<char*>(data) + at, words.data(), std::min(chunk, bytes - at))
             .ok())
      return false;
  return backend.Synchronize().ok();
}

}  // namespace

ComputeType ComputeTypeOf(DType dtype) {
  if (dtype == DType::kBF16) return ComputeType::kBF16;
  return dtype == DType::kF16 ? ComputeType::kF16 : ComputeType::kF32;
}

double KnownPeakFlops(absl::string_view device_name, DType dtype) {
  for (const Card& card : kCards)
    if (absl::StrContains(device_name, card.words[0]) &&
        absl::StrContains(device_name, card.words[1]))
      return 1e12 * (dtype == DType::kF32 ? card.fp32 : card.half);
  return 0;
}

double MeasurePeakFlops(Backend& backend, DType dtype) {
  const Product p = backend.info().host_memory ? kOnCores : kOnCard;
  const size_t element = SizeOf(dtype);
  const size_t x_bytes = static_cast<size_t>(p.tokens * p.inputs) * element;
  const size_t w_bytes = static_cast<size_t>(p.outputs * p.inputs) * element;
  const size_t y_bytes = static_cast<size_t>(p.tokens * p.outputs) * element;
  const LayerDims dims{.batch = 1,
                       .seq = p.tokens,
                       .hidden = p.inputs,
                       .heads = p.inputs / 64,
                       .intermediate = p.outputs,
                       .dtype = dtype};
  const size_t workspace_bytes = backend.sizes().WorkspaceBytes(dims);
  const auto free_bytes = backend.FreeBytes();
  if (!free_bytes.ok() || *free_bytes / 2 < x_bytes + w_bytes + y_bytes + workspace_bytes) return 0;
  const Scratch x(backend, x_bytes), w(backend, w_bytes), y(backend, y_bytes),
      workspace(backend, workspace_bytes);
  if (x.data() == nullptr || w.data() == nullptr || y.data() == nullptr ||
      (workspace_bytes > 0 && workspace.data() == nullptr))
    return 0;
  if (!Fill(backend, x.data(), x_bytes, dtype) || !Fill(backend, w.data(), w_bytes, dtype))
    return 0;
  const Workspace ws{.data = workspace.data(), .bytes = workspace_bytes};
  const LinearArgs args{.x = TensorView{x.data(), dtype, Shape{p.tokens, p.inputs}},
                        .w = TensorView{w.data(), dtype, Shape{p.outputs, p.inputs}},
                        .y = TensorView{y.data(), dtype, Shape{p.tokens, p.outputs}}};
  using Clock = std::chrono::steady_clock;
  const double flops = 2.0 * static_cast<double>(p.tokens * p.inputs * p.outputs);
  double best = 0;
  const Clock::time_point first = Clock::now();
  for (int run = 0; run < kRuns && (run < 2 || Clock::now() - first < kEnough); ++run) {
    const Clock::time_point begin = Clock::now();
    if (!backend.Linear(ws, args).ok() || !backend.Synchronize().ok()) return 0;
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    if (seconds > 0) best = std::max(best, flops / seconds);
  }
  return best;
}

}  // namespace lamina
