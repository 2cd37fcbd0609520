// Exactly once: the sequence of one session's mutations and the answers to the last of them.
//
//   auto ticket = log.Begin(sequence, digest, control);   // may wait for the one before
//   if (!ticket.ok()) return ticket.status();
//   if (ticket->replay) return *ticket->replay;           // ran before: the same answer
//   ... run ...
//   ok ? log.Commit(sequence, answer) : log.Abort(sequence);
//
// Sequence n + 1 that arrives while n runs waits for it (and n + 2 while n + 1 waits, and so on); a
// repeat of n that arrives while n runs waits too and gets n's answer, or, with another body,
// ALREADY_EXISTS once n is committed. An aborted sequence was not used up.
//
// A mutation of which the rest is the device's to do is left (Leave) between Begin and its Commit
// or Abort: n + 1 may then begin. It is applied, for whoever asks, once it is committed, and not
// before all that came before it are. Where the device fails, each of those left is aborted.
//
// Threads: all methods from any thread.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/engine/engine.h"

namespace lamina {

// SHA-256 of the request's body.
using BodyDigest = std::array<uint8_t, 32>;
BodyDigest DigestOf(const std::string& bytes);

class MutationLog {
 public:
  // Answers kept: as many as a pipeline has under way, but of those longer than kShortAnswer, which
  // may be as long as the inline cap, the last kLongWindow alone.
  static constexpr int kReplayWindow = 64;
  static constexpr int kLongWindow = 16;
  static constexpr size_t kShortAnswer = 1024;  // bytes

  struct Ticket {
    std::shared_ptr<const std::string>
        replay;  // the serialized answer of the first run; null: run it now
  };

  // INVALID_ARGUMENT: sequence 0. ALREADY_EXISTS: used with another body, or used and its answer no
  // longer kept. FAILED_PRECONDITION: beyond the next one (says which is next). DEADLINE_EXCEEDED
  // or CANCELLED while waiting. NotNow: `control` has the device's turn, and the sequence is not
  // the next one yet.
  absl::StatusOr<Ticket> Begin(uint64_t sequence, const BodyDigest& digest,
                               const CallControl& control);
  // What is left of the running one happens by itself, in the order in which they are left.
  void Leave(uint64_t sequence);
  void Commit(uint64_t sequence, std::string answer);
  void Abort(uint64_t sequence);

  uint64_t applied() const;  // the last committed sequence

 private:
  struct Entry {
    uint64_t sequence;
    BodyDigest digest;
    std::shared_ptr<const std::string> answer;  // null: it was long, and is no longer kept
  };
  // Of those that have begun and are neither committed nor aborted.
  struct Begun {
    uint64_t sequence;
    BodyDigest digest;
    std::shared_ptr<const std::string> answer;  // null: not there yet
  };
  // Begin after `sequence` was entered into waiting_. `lock` holds mutex_.
  absl::StatusOr<Ticket> Wait(std::unique_lock<std::mutex>& lock, uint64_t sequence,
                              const BodyDigest& digest, const CallControl& control);
  // Whether each sequence between the last committed one and this one runs or waits. Needs mutex_.
  bool AllBeforeUnderWay(uint64_t sequence) const;
  // Whether it is the one that may begin now. Needs mutex_.
  bool MayBegin(uint64_t sequence) const;
  std::deque<Begun>::iterator FindBegun(uint64_t sequence);  // needs mutex_
  // Into answers_. Needs mutex_.
  void Keep(Begun applied);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t applied_ = 0;             // guarded by mutex_
  std::deque<Begun> begun_;          // guarded by mutex_: ascending
  bool running_ = false;             // guarded by mutex_: the last of begun_ was not left
  std::multiset<uint64_t> waiting_;  // guarded by mutex_: sequences inside Begin
  std::deque<Entry> answers_;        // guarded by mutex_: at most kReplayWindow, ascending
};

}  // namespace lamina
