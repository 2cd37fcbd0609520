#include "op_rig.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace lamina::testing {
namespace {

constexpr size_t kGuard = 256;  // keeps the alignment of what Allocate gives

void Check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.ToString());
}

template <typename T>
std::vector<uint8_t> BytesOf(const T* values, size_t count) {
  std::vector<uint8_t> bytes(count * sizeof(T));
  std::memcpy(bytes.data(), values, bytes.size());
  return bytes;
}

// Memory of the runs that are over, for the next ones: to get it anew takes longer than most of the
// ops that are tested here. By backend and size, a power of two.
class MemoryPool {
 public:
  static MemoryPool& Instance() {
    static auto* const kPool = new MemoryPool;  // lives as long as the devices
    return *kPool;
  }
  void* Take(Backend& backend, size_t bytes) {
    std::vector<void*>& blocks = blocks_[{&backend, std::bit_ceil(bytes)}];
    if (blocks.empty()) {
      absl::StatusOr<void*> memory = backend.Allocate(std::bit_ceil(bytes));
      Check(memory.status());
      return *memory;
    }
    void* const block = blocks.back();
    blocks.pop_back();
    return block;
  }
  void Give(Backend& backend, size_t bytes, void* block) {
    blocks_[{&backend, std::bit_ceil(bytes)}].push_back(block);
  }

 private:
  std::map<std::pair<Backend*, size_t>, std::vector<void*>> blocks_;
};

uint8_t GuardByte(size_t i) { return static_cast<uint8_t>(0xA5u ^ (i * 29u)); }

}  // namespace

Backend* OpenDevice(const std::string& device, std::string* reason) {
  struct Opened {
    std::unique_ptr<Backend> backend;
    std::string reason;
  };
  static auto* const kOpened = new std::map<std::string, Opened>;  // lives as long as the process
  auto found = kOpened->find(device);
  if (found == kOpened->end()) {
    Opened opened;
    absl::StatusOr<std::unique_ptr<Backend>> backend = Backend::Create(device);
    if (backend.ok()) {
      opened.backend = *std::move(backend);
    } else {
      opened.reason = absl::StrCat("no ", device, " here: ", backend.status().ToString());
      if (backend.status().code() != absl::StatusCode::kUnimplemented &&
          backend.status().code() != absl::StatusCode::kNotFound)
        throw std::runtime_error(opened.reason);
    }
    found = kOpened->emplace(device, std::move(opened)).first;
  }
  *reason = found->second.reason;
  return found->second.backend.get();
}

OpRun::OpRun(Backend& backend, int round, int64_t offset)
    : backend_(backend), round_(round), offset_(offset) {}

OpRun::~OpRun() {
  // Nothing may still be running on what others get; Finish has reported any failure.
  static_cast<void>(backend_.Synchronize());
  for (const Buffer& buffer : buffers_)
    MemoryPool::Instance().Give(backend_, buffer.begin + buffer.bytes + kGuard, buffer.memory);
}

OpRun::Buffer& OpRun::AddBuffer(const std::string& name, size_t begin, size_t bytes) {
  void* const memory = MemoryPool::Instance().Take(backend_, begin + bytes + kGuard);
  Buffer& buffer = buffers_.emplace_back();
  buffer.name = name;
  buffer.memory = static_cast<char*>(memory);
  buffer.begin = begin;
  buffer.bytes = bytes;
  if (reinterpret_cast<uintptr_t>(buffer.memory) % 256 != 0)
    throw std::runtime_error("Allocate gave memory that is not aligned to 256 bytes");
  return buffer;
}

void* OpRun::Place(const std::string& name, std::vector<uint8_t> contents, size_t element_size) {
  const size_t begin = kGuard + static_cast<size_t>(offset_) * element_size;
  Buffer& buffer = AddBuffer(name, begin, contents.size());
  const size_t end = begin + contents.size();
  buffer.before.resize(end + kGuard);
  for (size_t i = 0; i < begin; ++i) buffer.before[i] = GuardByte(i);
  std::memcpy(buffer.before.data() + begin, contents.data(), contents.size());
  for (size_t i = end; i < buffer.before.size(); ++i) buffer.before[i] = GuardByte(i);
  Check(backend_.CopyIn(buffer.memory, buffer.before.data(), buffer.before.size()));
  return buffer.memory + begin;
}

TensorView OpRun::In(DType dtype, const Shape& shape, const Vec& values) {
  if (static_cast<int64_t>(values.size()) != shape.elements())
    throw std::runtime_error("In: values do not fit " + shape.ToString());
  return TensorView{Place("", Encode(dtype, values), SizeOf(dtype)), dtype, shape};
}

TensorView OpRun::In(const std::vector<int32_t>& values) {
  return TensorView{Place("", BytesOf(values.data(), values.size()), sizeof(int32_t)), DType::kI32,
                    Shape{static_cast<int64_t>(values.size())}};
}

TensorView OpRun::Out(const char* name, DType dtype, const Shape& shape) {
  // Opaque bytes hold numbers: backend.h wants them aligned to 16.
  const size_t element_size = dtype == DType::kU8 ? 16 : SizeOf(dtype);
  // 0xFF everywhere is a NaN in every float type.
  return TensorView{
      Place(name, std::vector<uint8_t>(static_cast<size_t>(shape.elements()) * SizeOf(dtype), 0xFF),
            element_size),
      dtype, shape};
}

TensorView OpRun::InOut(const char* name, DType dtype, const Shape& shape, const Vec& before) {
  if (static_cast<int64_t>(before.size()) != shape.elements())
    throw std::runtime_error("InOut: values do not fit " + shape.ToString());
  return TensorView{Place(name, Encode(dtype, before), SizeOf(dtype)), dtype, shape};
}

const RngState* OpRun::Rng(const RngState& rng) {
  return static_cast<const RngState*>(Place("", BytesOf(&rng, 1), sizeof(rng)));
}

OptimizerControl* OpRun::ControlOut(const char* name) {
  return static_cast<OptimizerControl*>(
      Place(name, std::vector<uint8_t>(sizeof(OptimizerControl), 0xFF), alignof(OptimizerControl)));
}

const OptimizerControl* OpRun::ControlIn(const OptimizerControl& control) {
  return static_cast<const OptimizerControl*>(
      Place("", BytesOf(&control, 1), alignof(OptimizerControl)));
}

const LambSegment* OpRun::Segments(const std::vector<LambSegment>& segments) {
  return static_cast<const LambSegment*>(
      Place("", BytesOf(segments.data(), segments.size()), alignof(LambSegment)));
}

Workspace OpRun::WorkspaceFor(const LayerDims& dims) {
  const size_t bytes = backend_.WorkspaceBytes(dims);
  if (bytes == 0) return Workspace{.unordered = unordered_};
  return Workspace{Scratch(bytes), bytes, unordered_};
}

PendingSums OpRun::PendingFor(size_t bytes) {
  return bytes == 0 ? PendingSums() : PendingSums(Scratch(bytes), bytes);
}

char* OpRun::Scratch(size_t bytes) {
  Buffer& buffer = AddBuffer("", kGuard, bytes);
  buffer.before.resize(2 * kGuard);
  for (size_t i = 0; i < buffer.before.size(); ++i) buffer.before[i] = GuardByte(i);
  buffer.scratch = true;
  char* const data = buffer.memory + kGuard;
  Check(backend_.CopyIn(buffer.memory, buffer.before.data(), kGuard));
  Check(backend_.CopyIn(data + bytes, buffer.before.data() + kGuard, kGuard));
  // NaN in one round, in the other numbers that would show in any sum: about 1e8 in fp32. In
  // pieces: a workspace is up to a hundred times as large as the tensors.
  const std::vector<uint8_t> poison(std::min(bytes, size_t{1} << 20), round_ == 0 ? 0xFF : 0x4C);
  for (size_t at = 0; at < bytes; at += poison.size())
    Check(backend_.CopyIn(data + at, poison.data(), std::min(poison.size(), bytes - at)));
  Check(backend_.Synchronize());
  return data;
}

void OpRun::CheckGuards(const Buffer& workspace) {
  std::vector<uint8_t> after(2 * kGuard);
  Check(backend_.CopyOut(after.data(), workspace.memory, kGuard));
  Check(
      backend_.CopyOut(after.data() + kGuard, workspace.memory + kGuard + workspace.bytes, kGuard));
  Check(backend_.Synchronize());
  EXPECT_TRUE(after == workspace.before) << "a byte was written outside of the workspace";
}

std::map<std::string, std::vector<uint8_t>> OpRun::Finish() {
  std::map<std::string, std::vector<uint8_t>> results;
  for (const Buffer& buffer : buffers_) {
    if (buffer.scratch) {
      CheckGuards(buffer);
      continue;
    }
    std::vector<uint8_t> after(buffer.before.size());
    Check(backend_.CopyOut(after.data(), buffer.memory, after.size()));
    Check(backend_.Synchronize());
    const std::string what =
        buffer.name.empty() ? absl::StrCat("an input of ", buffer.bytes, " bytes") : buffer.name;
    const bool result = !buffer.name.empty();
    const size_t end = buffer.begin + buffer.bytes;
    const auto same = [&](size_t from, size_t to) {
      return std::memcmp(after.data() + from, buffer.before.data() + from, to - from) == 0;
    };
    const bool untouched =
        same(0, buffer.begin) && same(end, after.size()) && (result || same(buffer.begin, end));
    for (size_t i = 0; !untouched && i < after.size(); ++i) {
      const bool guard = i < buffer.begin || i >= end;
      if (after[i] == buffer.before[i] || (!guard && result)) continue;
      ADD_FAILURE() << (guard ? "a byte was written outside of " : "the op changed ") << what
                    << ", at byte "
                    << static_cast<ptrdiff_t>(i) - static_cast<ptrdiff_t>(buffer.begin);
      break;
    }
    if (result) {
      const auto begin = after.begin() + static_cast<ptrdiff_t>(buffer.begin);
      results[buffer.name].assign(begin, begin + static_cast<ptrdiff_t>(buffer.bytes));
    }
  }
  return results;
}

Results RunTwice(Backend& backend, const std::function<absl::Status(OpRun&)>& op, int64_t offset) {
  std::map<std::string, std::vector<uint8_t>> rounds[2];
  // Both live at once, so that the second lies elsewhere.
  OpRun first(backend, 0, offset), second(backend, 1, offset);
  for (int round = 0; round < 2; ++round) {
    OpRun& run = round == 0 ? first : second;
    Check(op(run));
    Check(backend.Synchronize());
    rounds[round] = run.Finish();
  }
  for (const auto& [name, bytes] : rounds[0])
    EXPECT_TRUE(bytes == rounds[1].at(name)) << name << " differs between two runs of one call";
  return Results(std::move(rounds[0]));
}

Results RunInAnyOrder(Backend& backend, const std::function<absl::Status(OpRun&)>& op,
                      int64_t offset) {
  OpRun run(backend, 0, offset);
  run.AllowAnyOrder();
  Check(op(run));
  Check(backend.Synchronize());
  return Results(run.Finish());
}

double Growth(int64_t n) { return 8.0 * std::sqrt(static_cast<double>(n)) * kF32Roundoff; }

double GeluDerivativeError(double x) {
  const double a = std::min(std::abs(x), 8.0);
  return 8 * kF32Roundoff * (1 + a * a * a);
}

Bounded ColumnSumsAddedTo(const Vec& before, DType dtype, const Vec& terms, const Vec& errors) {
  const size_t cols = before.size();
  const auto rows = static_cast<int64_t>(terms.size() / cols);
  Vec absolutes(cols, 0.0), squares(cols, 0.0), inexact(cols, 0.0);
  for (size_t e = 0; e < terms.size(); ++e) {
    squares[e % cols] += terms[e] * terms[e];
    absolutes[e % cols] += std::abs(terms[e]);
    inexact[e % cols] += errors[e];
  }
  Bounded sums{ref::ColumnSums(terms, rows, static_cast<int64_t>(cols)), Vec(cols)};
  for (size_t c = 0; c < cols; ++c) {
    sums.want[c] += before[c];
    sums.bound[c] = Growth(rows) * (absolutes[c] + std::abs(before[c])) + inexact[c] +
                    4 * UnitRoundoff(dtype) * std::sqrt(squares[c]) +
                    kF32Roundoff * std::abs(sums.want[c]);
  }
  return sums;
}

void ExpectWithin(const char* what, const Vec& got, const Vec& want, const Vec& bound) {
  ASSERT_EQ(got.size(), want.size()) << what;
  ASSERT_EQ(bound.size(), want.size()) << what;
  size_t bad = 0, worst = 0;
  double worst_ratio = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(std::isfinite(bound[i]) && bound[i] >= 0)
        << what << "[" << i << "]: the test's own bound is " << bound[i];
    const double error = std::abs(got[i] - want[i]);
    if (error <= bound[i]) continue;  // false for NaN
    ++bad;
    const double ratio = std::isnan(error) ? HUGE_VAL : error / bound[i];
    if (ratio > worst_ratio) {
      worst_ratio = ratio;
      worst = i;
    }
  }
  if (bad == 0) return;
  ADD_FAILURE() << what << ": " << bad << " of " << got.size() << " elements are off; worst at "
                << worst << ": " << got[worst] << ", exactly " << want[worst] << ", bound "
                << bound[worst] << " (error / bound " << worst_ratio << ")";
}

}  // namespace lamina::testing
