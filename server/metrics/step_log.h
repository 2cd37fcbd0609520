// The last steps that were done, one by one, and what was done in each of the last seconds: what
// the status page draws and --profile writes.
//
// Writers take turns (steps do anyway); readers copy what is there without holding a writer up.
// Threads: all methods from any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace lamina {

enum class StepDirection : uint8_t { kForwardEval, kForwardTraining, kBackward, kApply };
inline constexpr size_t kStepDirections = 4;
const char* Name(StepDirection direction);  // "forward_eval", ...

// One step. Its phases lie one after another before `ended`, but that the host's own work may lie
// between the queue and the input.
struct StepRecord {
  uint64_t number = 0;                                   // counts the daemon's steps, from 1
  double ended = 0;                                      // Unix time, seconds
  double queue = 0, input = 0, compute = 0, output = 0;  // seconds
  double total = 0;                                      // seconds, from admission to result
  double samples = 0, tokens = 0, padding_tokens = 0, flops = 0;  // padding is part of tokens
  uint64_t session = 0;                                           // its key; 0: none
  uint64_t request_item = 0;  // the message's id in an Execute stream; 0: a call of its own
  StepDirection direction = StepDirection::kForwardEval;
  // Cut to what fits; with a zero behind.
  std::array<char, 65> stack{};
  std::array<char, 65> request_id{};
  std::array<char, 33> trace_id{};  // 32 hexadecimal digits, or empty
};

// Its request's id, with the message's behind a dot where it came on an Execute stream; may be
// empty.
std::string RequestIdOf(const StepRecord& step);

// Copies text into one of the arrays above.
template <size_t n>
void SetText(std::array<char, n>& to, absl::string_view text) {
  const size_t length = text.size() < n ? text.size() : n - 1;
  for (size_t i = 0; i < length; ++i) to[i] = text[i];
  to[length] = '\0';
}

// What ended within one second, by direction.
struct StepSecond {
  struct Sum {
    double steps = 0, samples = 0, tokens = 0, seconds = 0;  // seconds: of `total`
  };
  int64_t second = 0;  // Unix time
  std::array<Sum, kStepDirections> sums{};
};

class StepLog {
 public:
  static constexpr int64_t kSeconds = 300;  // that are remembered

  // Remembers `capacity` >= 1 steps.
  explicit StepLog(size_t capacity);
  ~StepLog();

  // Sets the record's number.
  void Add(StepRecord& record);

  size_t capacity() const { return capacity_; }
  uint64_t total() const { return last_.load(std::memory_order_acquire); }  // steps so far
  // The last `count` at most, oldest first. Steps that end meanwhile may push out the oldest.
  std::vector<StepRecord> Last(size_t count) const;
  // Those of the last kSeconds before `now` (Unix time) in which something ended, oldest first. The
  // second that runs is among them, as far as it has come.
  std::vector<StepSecond> Seconds(int64_t now) const;

 private:
  struct Slot;
  struct SecondSlot;

  const size_t capacity_;
  const std::unique_ptr<Slot[]> slots_;
  const std::unique_ptr<SecondSlot[]> seconds_;
  std::mutex write_;               // held by the one who adds
  std::atomic<uint64_t> last_{0};  // the last record's number
};

}  // namespace lamina
