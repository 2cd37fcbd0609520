// What Session, Stack, Context and region tensors share: the lease, the sequence, the regions.
// Internal.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "lamina/client/session.h"
#include "src/connection.h"
#include "src/keeper.h"

namespace lamina::client::internal {

// Threads: all methods from any thread.
class SessionCore : public std::enable_shared_from_this<SessionCore> {
 public:
  static absl::StatusOr<std::shared_ptr<SessionCore>> Open(std::shared_ptr<Connection> connection,
                                                           SessionOptions options);
  ~SessionCore();  // Close

  absl::Status Close();
  absl::Status status() const;

  Connection& connection() const { return *connection_; }
  const std::string& id() const { return id_; }
  const SessionOptions& options() const { return options_; }
  std::chrono::duration<double> lease() const { return lease_; }
  std::chrono::duration<double> resume_grace() const { return resume_grace_; }

  struct MadeRegion {
    Tensor bytes;
    size_t length = 0;
    bool registered = false;
  };
  absl::StatusOr<MadeRegion> CreateRegion(size_t bytes);
  absl::StatusOr<Tensor> NewTensor(DType dtype, Shape shape);
  Transport transport() const;
  std::string transport_reason() const;
  // Gives it back to the daemon; nothing to do when the session is over. Errors are ignored: the
  // session's end frees it too.
  void ReleaseRegion(const std::string& region_id);

  // Frees a context that gets no Backward; OK where the session is over, or it had been heard of.
  absl::Status ReleaseContext(const std::string& stack, const std::string& context_id);

  // Calls `once` until it is no longer UNAVAILABLE, the session is over, or the retry budget is
  // spent. While the session's connection is being mended it waits for that, and does not count
  // what failed because of it.
  template <class Once>
  absl::Status Repeat(const Once& once) const {
    const Clock::time_point began = Clock::now();
    const std::chrono::duration<double> grace = resume_grace_;
    Milliseconds pause(20);
    for (;;) {
      const uint64_t breaks = Breaks();
      absl::Status status = once();
      if (status.code() != absl::StatusCode::kUnavailable || options_.retry_budget.count() == 0) {
        return status;
      }
      Settle();
      if (!this->status().ok()) return status;
      connection_->PauseBeforeRepeat(pause);  // within which the keeper hears of a break too
      Settle();
      const bool mended = Breaks() != breaks;
      const auto spent = Clock::now() - began;
      if (spent >= options_.retry_budget && !(mended && spent < grace)) return status;
      pause = mended ? Milliseconds(20) : std::min(pause * 2, Milliseconds(500));
    }
  }

  // A call that changes nothing, repeated while the daemon is unavailable.
  template <class Stub, class Request, class Response>
  absl::Status Read(Stub& stub, Method<Stub, Request, Response> method, const Request& request,
                    Response* response) {
    if (absl::Status over = status(); !over.ok()) return over;
    return Explain(Repeat([&] { return connection_->Call(stub, method, request, response); }));
  }

  // The same for a call that is not unary; `once` starts over each time.
  template <class Once>
  absl::Status ReadStream(const Once& once) {
    if (absl::Status over = status(); !over.ok()) return over;
    return Explain(Repeat([&] { return once(*connection_); }));
  }

  // A mutation: the session's next one, run once and only once however often it is sent.
  //
  // A call whose answer is lost (its deadline passed, the connection broke for longer than the
  // budget) leaves open whether it ran. Its sequence is then used for the next mutation: the same
  // body again gets the first run's answer; for another body the daemon says ALREADY_EXISTS if the
  // lost one ran, and then the next sequence is right.
  template <class Stub, class Request, class Response>
  absl::Status Mutate(Stub& stub, Method<Stub, Request, Response> method, Request* request,
                      Response* response) {
    if (absl::Status over = status(); !over.ok()) return over;
    WaitForTurn();
    const absl::Status done = MutateInTurn(stub, method, request, response);
    PassTurn();
    return done;
  }

  // Waits until no other mutates and takes the turn, for mutations that go out without waiting for
  // each other's answers. Settles which of those whose answers were lost have run; the next
  // sequence. An error: that could not be settled, and there is no turn.
  absl::StatusOr<uint64_t> TakeTurn();
  // Gives the turn back, from any thread. `next`: after the last mutation that was answered to have
  // run. `lost`: those sent after it that got no answer; `forwards`: which of them were Forwards,
  // whose contexts, if they have run, are released.
  void EndTurn(uint64_t next, size_t lost = 0,
               std::vector<lamina::v1::ForwardRequest> forwards = {});

 private:
  // Needs the turn.
  template <class Stub, class Request, class Response>
  absl::Status MutateInTurn(Stub& stub, Method<Stub, Request, Response> method, Request* request,
                            Response* response) {
    for (;;) {
      request->mutable_mutation()->set_session_id(id_);
      request->mutable_mutation()->set_sequence(next_sequence_);
      const absl::Status status =
          Repeat([&] { return connection_->Call(stub, method, *request, response); });
      if (status.ok()) {
        ++next_sequence_;
        lost_ = 0;
        return status;
      }
      if (lost_ > 0 && status.code() == absl::StatusCode::kAlreadyExists) {
        ++next_sequence_;
        --lost_;
        continue;
      }
      if (MayHaveRun(status.code())) lost_ = std::max<size_t>(lost_, 1);
      return Explain(status);
    }
  }

  void WaitForTurn();
  void PassTurn();
  // Finds out which of the mutations whose answers were lost have run. Needs the turn.
  absl::Status FindNextSequence();

  SessionCore(std::shared_ptr<Connection> connection, SessionOptions options);
  static bool MayHaveRun(absl::StatusCode code);
  // Adds why the session is over, where it is.
  absl::Status Explain(absl::Status status) const;
  absl::StatusOr<MadeRegion> TryRegion(size_t bytes, bool* broker_failed);
  absl::StatusOr<lamina::v1::Region> MakeRegion(size_t bytes);
  // Gives up regions that were made but whose ids were lost on their way here. Needs
  // making_mutex_.
  absl::Status ReleaseUnheardOf();
  std::shared_ptr<Keeper> keeper() const;  // null: none
  uint64_t Breaks() const;
  void Settle() const;

  const std::shared_ptr<Connection> connection_;
  const SessionOptions options_;
  std::string id_;           // set by Open
  std::string broker_path_;  // set by Open
  std::chrono::duration<double> lease_{0};
  std::chrono::duration<double> resume_grace_{0};
  std::shared_ptr<Keeper> keeper_;  // set by Open, reset by Close; guarded by mutex_

  mutable std::mutex mutex_;
  bool closed_ = false;            // guarded by mutex_
  bool inline_only_ = false;       // guarded by mutex_
  std::string inline_reason_;      // guarded by mutex_
  std::set<std::string> regions_;  // ours, by id; guarded by mutex_
  std::mutex making_mutex_;        // before mutex_: regions are made one after another

  std::mutex turn_mutex_;
  std::condition_variable turn_passed_;
  bool turn_taken_ = false;     // guarded by turn_mutex_
  uint64_t next_sequence_ = 1;  // whoever's turn it is, as the next
  size_t lost_ = 0;             // mutations from that one on that may have run
};

}  // namespace lamina::client::internal
