#include "server/engine/mutation_log.h"

#include <openssl/evp.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace lamina {
namespace {

// How often a waiting call looks whether its client has gone: nothing notifies the log of that.
constexpr absl::Duration kCancelPoll = absl::Milliseconds(20);

}  // namespace

BodyDigest DigestOf(const std::string& bytes) {
  BodyDigest digest{};
  unsigned int length = 0;
  // Fails only where the library itself has no SHA-256; equal digests for all bodies would then
  // turn every conflict into a replay, so that must not pass.
  if (EVP_Digest(bytes.data(), bytes.size(), digest.data(), &length, EVP_sha256(), nullptr) != 1 ||
      length != digest.size())
    std::terminate();
  return digest;
}

bool MutationLog::AllBeforeUnderWay(uint64_t sequence) const {
  const auto has_begun = [this](uint64_t s) {
    return std::any_of(begun_.begin(), begun_.end(),
                       [s](const Begun& begun) { return begun.sequence == s; });
  };
  for (uint64_t s = applied_ + 1; s < sequence; ++s)
    if (waiting_.count(s) == 0 && !has_begun(s)) return false;
  return true;
}

bool MutationLog::MayBegin(uint64_t sequence) const {
  if (begun_.empty()) return sequence == applied_ + 1;
  // After one that was aborted, those behind it go first.
  return !running_ && begun_.front().sequence == applied_ + 1 &&
         sequence == begun_.back().sequence + 1;
}

std::deque<MutationLog::Begun>::iterator MutationLog::FindBegun(uint64_t sequence) {
  return std::find_if(begun_.begin(), begun_.end(),
                      [sequence](const Begun& begun) { return begun.sequence == sequence; });
}

absl::StatusOr<MutationLog::Ticket> MutationLog::Begin(uint64_t sequence, const BodyDigest& digest,
                                                       const CallControl& control) {
  if (sequence == 0)
    return absl::InvalidArgumentError(
        "mutation.sequence: is 0; a session's first mutation has sequence 1");
  std::unique_lock<std::mutex> lock(mutex_);
  // Who may not wait leaves no trace here: those behind it must not see it come and go.
  if (control.has_turn && sequence > applied_ && !MayBegin(sequence)) return NotNow();
  waiting_.insert(sequence);
  const absl::StatusOr<Ticket> ticket = Wait(lock, sequence, digest, control);
  waiting_.erase(waiting_.find(sequence));
  // Who waits behind this one must look again: it runs now, or it left a gap.
  changed_.notify_all();
  return ticket;
}

absl::StatusOr<MutationLog::Ticket> MutationLog::Wait(std::unique_lock<std::mutex>& lock,
                                                      uint64_t sequence, const BodyDigest& digest,
                                                      const CallControl& control) {
  for (;;) {
    if (sequence <= applied_) {
      const auto entry = std::find_if(answers_.begin(), answers_.end(), [sequence](const Entry& e) {
        return e.sequence == sequence;
      });
      if (entry != answers_.end() && entry->digest != digest)
        return absl::AlreadyExistsError(absl::StrCat("mutation.sequence: ", sequence,
                                                     " was used with another body; the next is ",
                                                     applied_ + 1));
      if (entry == answers_.end() || entry->answer == nullptr)
        return absl::AlreadyExistsError(absl::StrCat(
            "mutation.sequence: ", sequence,
            " was used, and its answer is no longer kept; the next is ", applied_ + 1));
      return Ticket{.replay = entry->answer};
    }
    if (MayBegin(sequence)) {
      begun_.push_back({.sequence = sequence, .digest = digest, .answer = nullptr});
      running_ = true;
      return Ticket{};
    }
    if (!AllBeforeUnderWay(sequence))
      return absl::FailedPreconditionError(absl::StrCat(
          "mutation.sequence: ", sequence, " leaves a gap; the next is ", applied_ + 1));

    const absl::Time now = absl::Now();
    if (now >= control.deadline)
      return absl::DeadlineExceededError(absl::StrCat(
          "mutation.sequence: the deadline passed while ", sequence, " waited for ", applied_ + 1));
    if (control.cancelled && control.cancelled())
      return absl::CancelledError(absl::StrCat("mutation.sequence: cancelled while ", sequence,
                                               " waited for ", applied_ + 1));
    absl::Time until = control.deadline;
    if (control.cancelled) until = std::min(until, now + kCancelPoll);
    if (until == absl::InfiniteFuture())
      changed_.wait(lock);
    else
      changed_.wait_until(lock, absl::ToChronoTime(until));
  }
}

void MutationLog::Leave(uint64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!running_ || begun_.back().sequence != sequence) return;
  running_ = false;
  changed_.notify_all();
}

void MutationLog::Commit(uint64_t sequence, std::string answer) {
  auto kept = std::make_shared<const std::string>(std::move(answer));
  std::lock_guard<std::mutex> lock(mutex_);
  const auto committed = FindBegun(sequence);
  if (committed == begun_.end() || committed->answer != nullptr) return;
  if (sequence == begun_.back().sequence) running_ = false;
  // Behind one that was aborted it is not applied, whatever its own end was.
  const auto gapless = begun_.front().sequence == applied_ + 1 &&
                       sequence - begun_.front().sequence ==
                           static_cast<uint64_t>(std::distance(begun_.begin(), committed));
  if (!gapless) {
    begun_.erase(committed);
    changed_.notify_all();
    return;
  }
  committed->answer = std::move(kept);
  // Two streams of the session may bring the news of what they left in either order.
  while (!begun_.empty() && begun_.front().sequence == applied_ + 1 &&
         begun_.front().answer != nullptr) {
    Keep(std::move(begun_.front()));
    begun_.pop_front();
  }
  changed_.notify_all();
}

void MutationLog::Keep(Begun applied) {
  applied_ = applied.sequence;
  answers_.push_back({applied.sequence, applied.digest, std::move(applied.answer)});
  if (answers_.size() > kReplayWindow) answers_.pop_front();
  if (answers_.size() > kLongWindow) {
    Entry& passed = answers_[answers_.size() - 1 - kLongWindow];
    if (passed.answer != nullptr && passed.answer->size() > kShortAnswer) passed.answer = nullptr;
  }
}

void MutationLog::Abort(uint64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto aborted = FindBegun(sequence);
  if (aborted == begun_.end() || aborted->answer != nullptr) return;
  if (sequence == begun_.back().sequence) running_ = false;
  // What came after it is not applied without it.
  auto behind = begun_.erase(aborted);
  while (behind != begun_.end() && behind->answer != nullptr) behind = begun_.erase(behind);
  changed_.notify_all();
}

uint64_t MutationLog::applied() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return applied_;
}

}  // namespace lamina
