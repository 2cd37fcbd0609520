// Activation contexts by session and id.
//
// An id is the decimal form of a counter over all sessions; a context is found under its own
// session alone. When a stack goes, what its contexts leave behind is remembered, so that a late
// Backward hears why.
//
// Threads: the device thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/transformer/stack.h"
#include "server/engine/engine.h"

namespace lamina {

// How much a call worked on, as metrics count it.
struct CallSize {
  int64_t sequences = 0;  // B, or n of a packed batch
  int64_t tokens = 0;     // B * S, or T of a packed batch
  int64_t padding = 0;    // those of them that lengths or a mask hide
  double sum_of_squared_lengths = 0;
};

class ContextTable {
 public:
  struct Record {
    std::string stack;
    std::unique_ptr<Context> context;  // null: its stack was deleted
    CallSize size;                     // of its Forward
  };

  // Takes the context over; `stack` is the name that calls must give with the id.
  std::string Add(SessionKey session, const std::string& stack, std::unique_ptr<Context> context,
                  const CallSize& size);

  // The context, which is there; it stays the table's until Erase. NOT_FOUND: not this session's,
  // spent or released. FAILED_PRECONDITION: its stack was deleted; or `id` is empty, or names
  // nothing that ever was and this session ran no training Forward. INVALID_ARGUMENT: another
  // stack's.
  absl::StatusOr<const Record*> Find(SessionKey session, const std::string& stack,
                                     const std::string& id) const;
  // `id` has been found.
  void Erase(SessionKey session, const std::string& id);

  // Frees the contexts of a stack that is about to go.
  void StackDeleted(const std::string& stack);
  // Frees a session's contexts and takes none of it from now on.
  void SessionEnded(SessionKey session);
  bool ended(SessionKey session) const;

  int64_t live() const { return live_; }
  int64_t live(const std::string& stack) const;
  // What a session's contexts take; of all that have any, or had.
  ContextUse use(SessionKey session) const;
  const std::map<SessionKey, ContextUse>& uses() const { return uses_; }

 private:
  // Of uses_.
  void Gone(SessionKey session, const Context& context);

  // What is remembered at most of one session's deleted contexts. A client that asks for something
  // older hears NOT_FOUND; no call is in flight for that long.
  static constexpr size_t kDeletedKept = 1024;

  std::map<SessionKey, std::map<uint64_t, Record>> sessions_;
  std::map<std::string, int64_t> live_of_stack_;
  std::map<SessionKey, ContextUse> uses_;
  // The ended sessions, as ranges of keys: the first to the last. Keys are given out in order, so
  // there is at most one range more than sessions that live, however many have ended.
  std::map<SessionKey, SessionKey> ended_;
  uint64_t last_id_ = 0;
  int64_t live_ = 0;
};

}  // namespace lamina
