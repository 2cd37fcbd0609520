#include "server/metrics/step_log.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

static_assert(std::is_trivially_copyable_v<StepRecord>);
constexpr size_t kWords = (sizeof(StepRecord) + sizeof(uint64_t) - 1) / sizeof(uint64_t);

}  // namespace

const char* Name(StepDirection direction) {
  switch (direction) {
    case StepDirection::kForwardEval:
      return "forward_eval";
    case StepDirection::kForwardTraining:
      return "forward_training";
    case StepDirection::kBackward:
      return "backward";
    case StepDirection::kApply:
      return "apply";
  }
  return "";
}

std::string RequestIdOf(const StepRecord& step) {
  std::string id(step.request_id.data());
  if (step.request_item != 0) absl::StrAppend(&id, ".", step.request_item);
  return id;
}

// A sequence lock: odd while the slot is written, 2 * number once it holds that record. Each word
// is stored with release and loaded with acquire, so a reader that saw a word of a later record
// also sees that the lock has moved.
struct StepLog::Slot {
  std::atomic<uint64_t> lock{0};
  std::array<std::atomic<uint64_t>, kWords> words{};
};

struct StepLog::SecondSlot {
  std::atomic<int64_t> second{0};  // 0: nothing, or about to change
  std::array<std::array<std::atomic<double>, 4>, kStepDirections> sums{};
};

StepLog::StepLog(size_t capacity)
    : capacity_(std::max<size_t>(capacity, 1)),
      slots_(new Slot[capacity_]),
      seconds_(new SecondSlot[kSeconds]) {}

StepLog::~StepLog() = default;

void StepLog::Add(StepRecord& record) {
  std::lock_guard<std::mutex> lock(write_);
  record.number = last_.load(std::memory_order_relaxed) + 1;
  std::array<uint64_t, kWords> words{};
  std::memcpy(words.data(), &record, sizeof(record));
  Slot& slot = slots_[record.number % capacity_];
  slot.lock.store(2 * record.number - 1, std::memory_order_relaxed);
  for (size_t i = 0; i < kWords; ++i) slot.words[i].store(words[i], std::memory_order_release);
  slot.lock.store(2 * record.number, std::memory_order_release);
  last_.store(record.number, std::memory_order_release);

  const int64_t second = static_cast<int64_t>(std::floor(record.ended));
  SecondSlot& sum = seconds_[static_cast<size_t>(second % kSeconds)];
  if (sum.second.load(std::memory_order_relaxed) != second) {
    sum.second.store(0, std::memory_order_relaxed);
    for (auto& direction : sum.sums)
      for (auto& value : direction) value.store(0, std::memory_order_release);
    sum.second.store(second, std::memory_order_release);
  }
  auto& values = sum.sums[static_cast<size_t>(record.direction)];
  const double more[] = {1, record.samples, record.tokens, record.total};
  for (size_t i = 0; i < values.size(); ++i)
    values[i].store(values[i].load(std::memory_order_relaxed) + more[i], std::memory_order_release);
}

std::vector<StepRecord> StepLog::Last(size_t count) const {
  const uint64_t last = total();
  const uint64_t wanted = std::min<uint64_t>({count, capacity_, last});
  std::vector<StepRecord> records;
  records.reserve(wanted);
  for (uint64_t number = last - wanted + 1; number <= last; ++number) {
    const Slot& slot = slots_[number % capacity_];
    if (slot.lock.load(std::memory_order_acquire) != 2 * number) continue;  // a later one's by now
    std::array<uint64_t, kWords> words{};
    for (size_t i = 0; i < kWords; ++i) words[i] = slot.words[i].load(std::memory_order_acquire);
    if (slot.lock.load(std::memory_order_relaxed) != 2 * number) continue;
    std::memcpy(static_cast<void*>(&records.emplace_back()), words.data(), sizeof(StepRecord));
  }
  return records;
}

std::vector<StepSecond> StepLog::Seconds(int64_t now) const {
  std::vector<StepSecond> result;
  for (int64_t second = now - kSeconds + 1; second <= now; ++second) {
    if (second <= 0) continue;
    const SecondSlot& slot = seconds_[static_cast<size_t>(second % kSeconds)];
    if (slot.second.load(std::memory_order_acquire) != second) continue;
    StepSecond sum{.second = second};
    for (size_t d = 0; d < kStepDirections; ++d) {
      const auto& values = slot.sums[d];
      sum.sums[d] = {
          values[0].load(std::memory_order_acquire), values[1].load(std::memory_order_acquire),
          values[2].load(std::memory_order_acquire), values[3].load(std::memory_order_acquire)};
    }
    if (slot.second.load(std::memory_order_relaxed) != second) continue;
    result.push_back(sum);
  }
  return result;
}

}  // namespace lamina
