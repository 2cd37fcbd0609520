// Backend::Create, memory, copies and marks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "op_rig.h"

namespace lamina::testing {
namespace {

using ::testing::HasSubstr;

TEST(BackendCreate, RefusesUnknownDevices) {
  for (const char* device : {"", "gpu", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda:1x",
                             "cuda0", "cuda:99999999999", " cpu"}) {
    const auto backend = Backend::Create(device);
    ASSERT_FALSE(backend.ok()) << device;
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument) << device;
    EXPECT_THAT(std::string(backend.status().message()), HasSubstr("\"cuda:N\"")) << device;
  }
}

TEST(BackendCreate, RefusesNegativeThreads) {
  const auto backend = Backend::Create("cpu", -1);
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(backend.status().message()), HasSubstr("-1"));
}

TEST(BackendCreate, CudaIsThereOrSaysWhyNot) {
  const auto backend = Backend::Create("cuda:4095");
  ASSERT_FALSE(backend.ok());
  EXPECT_TRUE(backend.status().code() == absl::StatusCode::kNotFound ||
              backend.status().code() == absl::StatusCode::kUnimplemented)
      << backend.status();
}

// The plan's numbers, on any machine.
TEST(OpSizes, OfTheCpuAreItsBackends) {
  for (const int threads : {0, 1, 3}) {
    const auto sizes = OpSizes::Of("cpu", threads);
    const auto backend = Backend::Create("cpu", threads);
    ASSERT_TRUE(sizes.ok()) << sizes.status();
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_TRUE((*sizes)->host_memory());
    for (const LayerShape& s : kOpShapes)
      for (const DType act : kActs) {
        LayerDims dims = s.Dims(act);
        for (const int64_t packed : {int64_t{0}, s.batch + s.seq - 1}) {
          dims.packed_tokens = packed;
          EXPECT_EQ((*sizes)->WorkspaceBytes(dims), (*backend)->WorkspaceBytes(dims)) << s.Name();
          EXPECT_EQ((*sizes)->PendingSumBytes(dims), (*backend)->PendingSumBytes(dims)) << s.Name();
          EXPECT_EQ((*sizes)->AttentionSavedBytes(dims), (*backend)->AttentionSavedBytes(dims))
              << s.Name();
          EXPECT_TRUE((*sizes)->FusedAttention(dims)) << s.Name();
        }
      }
  }
}

TEST(OpSizes, OfCudaNeedNoDevice) {
  const auto sizes = OpSizes::Of("cuda");
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  EXPECT_FALSE((*sizes)->host_memory());
  EXPECT_GT((*sizes)->WorkspaceBytes(kBertLargeShapes[0].Dims(DType::kBF16)), 0u);
}

TEST(OpSizes, RefusesOtherKinds) {
  for (const char* kind : {"", "gpu", "cuda:0", "CPU"}) {
    const auto sizes = OpSizes::Of(kind);
    ASSERT_FALSE(sizes.ok()) << kind;
    EXPECT_EQ(sizes.status().code(), absl::StatusCode::kInvalidArgument) << kind;
    EXPECT_THAT(std::string(sizes.status().message()), HasSubstr("\"cpu\" or \"cuda\"")) << kind;
  }
  const auto sizes = OpSizes::Of("cpu", -1);
  ASSERT_FALSE(sizes.ok());
  EXPECT_EQ(sizes.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(sizes.status().message()), HasSubstr("-1"));
}

TEST(PendingSumsTest, TakesWhatHasRoom) {
  alignas(256) char memory[1024];
  float a = 0, b = 0, c = 0;
  PendingSums pending(memory, sizeof(memory));
  float* const two[] = {&a, nullptr, &b};
  float* const parts = pending.Leave(two, 3, 2, 5);
  EXPECT_EQ(static_cast<void*>(parts), memory);
  ASSERT_EQ(pending.count(), 2);
  EXPECT_EQ(pending[0].dst, &a);
  EXPECT_EQ(pending[1].dst, &b);
  EXPECT_EQ(pending[1].partials, parts + 2 * 2 * 5);
  EXPECT_EQ(pending[1].slices, 2);
  EXPECT_EQ(pending[1].cols, 5);

  // One that is in the list already; one that does not fit; and what fits still, to the byte.
  float* const again[] = {&c, &b};
  EXPECT_EQ(pending.Leave(again, 2, 1, 1), nullptr);
  float* const other[] = {&c};
  EXPECT_EQ(pending.Leave(other, 1, 1, 193), nullptr);
  EXPECT_EQ(pending.count(), 2);
  EXPECT_EQ(static_cast<void*>(pending.Leave(other, 1, 1, 192)), memory + 256);
  EXPECT_EQ(pending.count(), 3);
  pending.Clear();
  EXPECT_EQ(pending.count(), 0);
  EXPECT_EQ(static_cast<void*>(pending.Leave(other, 1, 4, 64)), memory);
}

TEST(PendingSumsTest, HasAnEndAndMayHaveNoRoom) {
  alignas(256) char memory[256 * (PendingSums::kMostVectors + 1)];
  float sums[PendingSums::kMostVectors + 1];
  PendingSums pending(memory, sizeof(memory)), none;
  for (int i = 0; i <= PendingSums::kMostVectors; ++i) {
    float* const dst[] = {&sums[i]};
    EXPECT_EQ(pending.Leave(dst, 1, 1, 1) != nullptr, i < PendingSums::kMostVectors) << i;
    EXPECT_EQ(none.Leave(dst, 1, 1, 1), nullptr);
  }
}

class DeviceTest : public ::testing::TestWithParam<const char*> {
 public:
  static std::string ParamName(const ::testing::TestParamInfo<const char*>& info) {
    return std::string(info.param).substr(0, 4) == "cuda" ? "cuda" : "cpu";
  }

 protected:
  void SetUp() override {
    std::string reason;
    backend_ = OpenDevice(GetParam(), &reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
  }
  void* Allocate(size_t bytes) {
    absl::StatusOr<void*> memory = backend_->Allocate(bytes);
    if (!memory.ok()) throw std::runtime_error(memory.status().ToString());
    return *memory;
  }
  Backend* backend_ = nullptr;
};

TEST_P(DeviceTest, Info) {
  const DeviceInfo& info = backend_->info();
  EXPECT_EQ(info.kind, std::string(GetParam()).substr(0, info.kind.size()));
  EXPECT_FALSE(info.name.empty());
  EXPECT_GT(info.threads, 0);
  EXPECT_GT(info.total_bytes, 0u);
  EXPECT_EQ(info.host_memory, info.kind == "cpu");
  EXPECT_EQ(info.uuid.empty(), info.kind == "cpu");
  const absl::StatusOr<size_t> free_bytes = backend_->FreeBytes();
  ASSERT_TRUE(free_bytes.ok()) << free_bytes.status();
  EXPECT_GT(*free_bytes, 0u);
  EXPECT_LE(*free_bytes, info.total_bytes);
}

TEST_P(DeviceTest, AllocationsAreAlignedAndApart) {
  std::vector<char*> blocks;
  for (const size_t bytes : {1, 255, 256, 257, 100000})
    blocks.push_back(static_cast<char*>(Allocate(bytes)));
  for (char* block : blocks) EXPECT_EQ(reinterpret_cast<uintptr_t>(block) % 256, 0u);
  for (char* block : blocks) backend_->Free(block);
  backend_->Free(nullptr);
}

TEST_P(DeviceTest, AllocateRefusesWhatCannotBe) {
  const auto memory = backend_->Allocate(size_t{1} << 60);
  ASSERT_FALSE(memory.ok());
  EXPECT_EQ(memory.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(memory.status().message()), HasSubstr("1152921504606846976"));
  // And the device works on.
  void* small = Allocate(16);
  EXPECT_TRUE(backend_->SetZero(small, 16).ok());
  EXPECT_TRUE(backend_->Synchronize().ok());
  backend_->Free(small);
}

TEST_P(DeviceTest, CopiesMoveBytesInOrder) {
  std::vector<uint8_t> bytes(100001);
  std::iota(bytes.begin(), bytes.end(), uint8_t{3});
  std::vector<uint8_t> back(bytes.size(), 0);
  char* a = static_cast<char*>(Allocate(bytes.size()));
  char* b = static_cast<char*>(Allocate(bytes.size()));
  ASSERT_TRUE(backend_->CopyIn(a, bytes.data(), bytes.size()).ok());
  ASSERT_TRUE(backend_->CopyWithin(b, a, bytes.size()).ok());
  ASSERT_TRUE(backend_->SetZero(b + 7, 1000).ok());
  ASSERT_TRUE(backend_->CopyOut(back.data(), b, bytes.size()).ok());
  ASSERT_TRUE(backend_->Synchronize().ok());
  for (size_t i = 7; i < 1007; ++i) bytes[i] = 0;
  EXPECT_TRUE(back == bytes);
  // No bytes are no error.
  EXPECT_TRUE(backend_->CopyIn(a, bytes.data(), 0).ok());
  EXPECT_TRUE(backend_->CopyOut(back.data(), a, 0).ok());
  EXPECT_TRUE(backend_->SetZero(a, 0).ok());
  EXPECT_TRUE(backend_->Synchronize().ok());
  backend_->Free(a);
  backend_->Free(b);
}

TEST_P(DeviceTest, RegisteredHostMemoryIsCopied) {
  constexpr size_t kBytes = 1 << 20;
  void* host = std::aligned_alloc(4096, kBytes);
  ASSERT_NE(host, nullptr);
  ASSERT_TRUE(backend_->RegisterHost(host, kBytes).ok());
  auto* values = static_cast<uint8_t*>(host);
  for (size_t i = 0; i < kBytes; ++i) values[i] = static_cast<uint8_t>(i * 7);
  void* device = Allocate(kBytes);
  ASSERT_TRUE(backend_->CopyIn(device, host, kBytes).ok());
  ASSERT_TRUE(backend_->Synchronize().ok());
  for (size_t i = 0; i < kBytes; ++i) values[i] = 0;
  ASSERT_TRUE(backend_->CopyOut(host, device, kBytes).ok());
  ASSERT_TRUE(backend_->Synchronize().ok());
  size_t wrong = 0;
  for (size_t i = 0; i < kBytes; ++i) wrong += values[i] != static_cast<uint8_t>(i * 7) ? 1 : 0;
  EXPECT_EQ(wrong, 0u);
  backend_->UnregisterHost(host);
  backend_->Free(device);
  std::free(host);
}

TEST_P(DeviceTest, SharedMemoryIsZeroedMemoryOfTheDevice) {
  for (const SharingKind kind : {SharingKind::kDescriptor, SharingKind::kIpcHandle}) {
    const size_t before = backend_->FreeBytes().value();
    auto shared = backend_->AllocateShared(kSharingUnit + 1, kind);
    if (backend_->info().host_memory) {
      EXPECT_EQ(shared.status().code(), absl::StatusCode::kUnimplemented);
      EXPECT_THAT(std::string(shared.status().message()), HasSubstr("cpu"));
      continue;
    }
    ASSERT_TRUE(shared.ok()) << shared.status();
    EXPECT_EQ((*shared)->bytes(), 2 * kSharingUnit);
    EXPECT_EQ(reinterpret_cast<uintptr_t>((*shared)->data()) % kSharingUnit, 0u);
    EXPECT_EQ((*shared)->descriptor() >= 0, kind == SharingKind::kDescriptor);
    EXPECT_EQ((*shared)->handle().size(), kind == SharingKind::kIpcHandle ? 64u : 0u);
    std::vector<uint8_t> values(2 * kSharingUnit, 1);
    ASSERT_TRUE(backend_->CopyOut(values.data(), (*shared)->data(), values.size()).ok());
    ASSERT_TRUE(backend_->Synchronize().ok());
    EXPECT_EQ(std::count(values.begin(), values.end(), 0), static_cast<int64_t>(values.size()));
    // Ops and copies take it like any other memory of the device.
    std::iota(values.begin(), values.end(), 0);
    void* other = Allocate(values.size());
    ASSERT_TRUE(backend_->CopyIn((*shared)->data(), values.data(), values.size()).ok());
    ASSERT_TRUE(backend_->CopyWithin(other, (*shared)->data(), values.size()).ok());
    std::vector<uint8_t> back(values.size());
    ASSERT_TRUE(backend_->CopyOut(back.data(), other, back.size()).ok());
    ASSERT_TRUE(backend_->Synchronize().ok());
    EXPECT_EQ(back, values);
    backend_->Free(other);
    shared->reset();
    EXPECT_GE(backend_->FreeBytes().value() + kSharingUnit, before);
    EXPECT_EQ(backend_->AllocateShared(size_t{1} << 46, kind).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
}

TEST_P(DeviceTest, ASignalComesAfterWhatWentBeforeIt) {
  constexpr size_t kBytes = size_t{64} << 20;
  auto* host = static_cast<uint8_t*>(std::aligned_alloc(4096, kBytes + 4096));
  ASSERT_NE(host, nullptr);
  ASSERT_TRUE(backend_->RegisterHost(host, kBytes + 4096).ok());
  auto* number = reinterpret_cast<uint64_t*>(host + kBytes) + 3;  // anywhere in what is registered
  void* device = Allocate(kBytes);
  *number = 0;
  for (uint64_t value = 1; value <= 3; ++value) {
    host[0] = host[kBytes - 1] = 1;
    ASSERT_TRUE(backend_->SetZero(device, kBytes).ok());
    ASSERT_TRUE(backend_->CopyOut(host, device, kBytes).ok());
    ASSERT_TRUE(backend_->Signal(number, value).ok());
    // Looked at without a synchronisation: that is what it is for.
    while (std::atomic_ref<uint64_t>(*number).load(std::memory_order_acquire) < value) {
    }
    EXPECT_EQ(host[0], 0);
    EXPECT_EQ(host[kBytes - 1], 0);
  }
  ASSERT_TRUE(backend_->Synchronize().ok());
  EXPECT_EQ(*number, 3u);
  backend_->UnregisterHost(host);
  backend_->Free(device);
  std::free(host);
}

// What the daemon lets run beside a step: the next one's input, and the last one's result.
TEST_P(DeviceTest, CopiesBesideTheStreamKeepTheirOrder) {
  constexpr size_t kBytes = size_t{8} << 20;
  auto* host = static_cast<uint8_t*>(std::aligned_alloc(4096, 3 * kBytes));
  ASSERT_NE(host, nullptr);
  ASSERT_TRUE(backend_->RegisterHost(host, 3 * kBytes).ok());
  uint8_t *const in = host, *const out = host + kBytes, *const last = host + 2 * kBytes;
  void *const ahead = Allocate(kBytes), *const input = Allocate(kBytes),
              *const behind = Allocate(kBytes);
  const auto all_are = [](const uint8_t* bytes, uint8_t value) {
    return std::all_of(bytes, bytes + kBytes, [value](uint8_t b) { return b == value; });
  };
  for (int round = 1; round <= 3; ++round) {
    std::fill(in, in + kBytes, static_cast<uint8_t>(round));
    std::fill(out, out + 2 * kBytes, uint8_t{0});
    ASSERT_TRUE(backend_->CopyInAhead(ahead, in, kBytes, 0).ok());
    ASSERT_TRUE(backend_->TakeAhead(input, ahead, kBytes).ok());
    // The input's memory is free again, and taken for something else.
    ASSERT_TRUE(backend_->WaitMark(0).ok());
    std::fill(in, in + kBytes, uint8_t{99});
    ASSERT_TRUE(backend_->CopyOutBehind(out, behind, input, kBytes, 1).ok());
    // Nothing waits for that: what it comes from may be written at once.
    ASSERT_TRUE(backend_->SetZero(input, kBytes).ok());
    // But for who reads what it writes, or writes there, and says so.
    ASSERT_TRUE(backend_->JoinBehind().ok());
    ASSERT_TRUE(backend_->CopyIn(input, out, kBytes).ok());
    ASSERT_TRUE(backend_->CopyOutBehind(last, behind, input, kBytes, 2).ok());
    ASSERT_TRUE(backend_->WaitMark(2).ok());
    EXPECT_TRUE(all_are(out, static_cast<uint8_t>(round))) << "the first came before the second";
    EXPECT_TRUE(all_are(last, static_cast<uint8_t>(round)));
    for (const int mark : {0, 1, 2}) {
      const auto passed = backend_->MarkPassed(mark);
      ASSERT_TRUE(passed.ok()) << passed.status();
      EXPECT_TRUE(*passed) << mark;
    }
    // Synchronize waits for them too.
    ASSERT_TRUE(backend_->SetZero(input, kBytes).ok());
    ASSERT_TRUE(backend_->CopyOutBehind(last, behind, input, kBytes, 2).ok());
    ASSERT_TRUE(backend_->Synchronize().ok());
    EXPECT_TRUE(all_are(last, 0));
  }
  backend_->UnregisterHost(host);
  for (void* memory : {ahead, input, behind}) backend_->Free(memory);
  std::free(host);
}

TEST_P(DeviceTest, MarksTellTime) {
  // Work between the marks that no device does in no time.
  constexpr size_t kBytes = size_t{32} << 20;
  void* a = Allocate(kBytes);
  void* b = Allocate(kBytes);
  ASSERT_TRUE(backend_->RecordMark(0).ok());
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(backend_->SetZero(a, kBytes).ok());
  ASSERT_TRUE(backend_->RecordMark(1).ok());
  ASSERT_TRUE(backend_->CopyWithin(b, a, kBytes).ok());
  ASSERT_TRUE(backend_->RecordMark(Backend::kMarks - 1).ok());
  ASSERT_TRUE(backend_->Synchronize().ok());
  const auto zeroing = backend_->SecondsBetween(0, 1);
  const auto both = backend_->SecondsBetween(0, Backend::kMarks - 1);
  ASSERT_TRUE(zeroing.ok()) << zeroing.status();
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_GT(*zeroing, 0.0);
  EXPECT_GT(*both, *zeroing);
  EXPECT_LT(*both, 60.0);
  backend_->Free(a);
  backend_->Free(b);
}

TEST_P(DeviceTest, MarksAreChecked) {
  ASSERT_TRUE(backend_->RecordMark(0).ok());
  for (const int mark : {-1, Backend::kMarks}) {
    EXPECT_EQ(backend_->RecordMark(mark).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(backend_->SecondsBetween(0, mark).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

// The plan adds these up before anything is allocated.
TEST_P(DeviceTest, SizesArePureFunctions) {
  for (const LayerShape& s : kOpShapes)
    for (const DType act : kActs) {
      const LayerDims dims = s.Dims(act);
      EXPECT_EQ(backend_->WorkspaceBytes(dims), backend_->WorkspaceBytes(dims));
      EXPECT_EQ(backend_->AttentionSavedBytes(dims), backend_->AttentionSavedBytes(dims));
      // A smaller batch fits in what a larger one was given.
      LayerShape larger = s;
      larger.batch += 1;
      EXPECT_LE(backend_->WorkspaceBytes(dims), backend_->WorkspaceBytes(larger.Dims(act)))
          << s.Name();
      EXPECT_LE(backend_->AttentionSavedBytes(dims),
                backend_->AttentionSavedBytes(larger.Dims(act)))
          << s.Name();
      larger = s;
      larger.seq += 1;
      EXPECT_LE(backend_->WorkspaceBytes(dims), backend_->WorkspaceBytes(larger.Dims(act)))
          << s.Name();
    }
}

// No matrix [S, S] in what is saved nor in the workspace: twice the sequence needs twice as much at
// most, but for rounding.
TEST_P(DeviceTest, SizesGrowLinearlyWithTheSequence) {
  for (const int64_t head_dim : {int64_t{5}, int64_t{64}, int64_t{128}})
    for (const DType act : kActs)
      for (int64_t seq = 512; seq < 8192; seq *= 2) {
        const LayerShape one{1, seq, 2 * head_dim, 2, 8}, two{1, 2 * seq, 2 * head_dim, 2, 8};
        EXPECT_LE(backend_->WorkspaceBytes(two.Dims(act)),
                  2 * backend_->WorkspaceBytes(one.Dims(act)) + 4096)
            << one.Name();
        EXPECT_LE(backend_->AttentionSavedBytes(two.Dims(act)),
                  2 * backend_->AttentionSavedBytes(one.Dims(act)) + 4096)
            << one.Name();
      }
}

// A packed batch needs what its tokens need: no more than the batch that it would be with padding.
TEST_P(DeviceTest, SizesOfPackedBatches) {
  for (const LayerShape& s : kOpShapes)
    for (const DType act : kActs) {
      LayerDims packed = s.Dims(act);
      packed.packed_tokens = packed.tokens();
      EXPECT_EQ(backend_->AttentionSavedBytes(packed), backend_->AttentionSavedBytes(s.Dims(act)))
          << s.Name();
      EXPECT_EQ(backend_->WorkspaceBytes(packed), backend_->WorkspaceBytes(s.Dims(act)))
          << s.Name();
      packed.packed_tokens = s.batch + s.seq - 1;  // all but one sequence are single tokens
      EXPECT_LE(backend_->AttentionSavedBytes(packed), backend_->AttentionSavedBytes(s.Dims(act)))
          << s.Name();
      EXPECT_LE(backend_->WorkspaceBytes(packed), backend_->WorkspaceBytes(s.Dims(act)))
          << s.Name();
    }
}

INSTANTIATE_TEST_SUITE_P(cpu, DeviceTest, ::testing::Values("cpu"), DeviceTest::ParamName);
INSTANTIATE_TEST_SUITE_P(cuda, DeviceTest, ::testing::Values("cuda:0"), DeviceTest::ParamName);

}  // namespace
}  // namespace lamina::testing
