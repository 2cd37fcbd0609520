// What Session, Stack, Context and region tensors share: the lease, the sequence, the regions.
// Internal.
#pragma once

#include <memory>
#include <mutex>
#include <string>

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

  // A call that changes nothing, repeated while the daemon is unavailable.
  template <class Stub, class Request, class Response>
  absl::Status Read(Stub& stub, Method<Stub, Request, Response> method, const Request& request,
                    Response* response) {
    if (absl::Status over = status(); !over.ok()) return over;
    return Explain(connection_->Call(stub, method, request, response, options_.retry_budget));
  }

  // The same for a call that is not unary; `once` starts over each time.
  template <class Once>
  absl::Status ReadStream(const Once& once) {
    if (absl::Status over = status(); !over.ok()) return over;
    return Explain(Connection::Repeat(options_.retry_budget, [&] { return once(*connection_); }));
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
    std::lock_guard<std::mutex> lock(sequence_mutex_);
    for (;;) {
      request->mutable_mutation()->set_session_id(id_);
      request->mutable_mutation()->set_sequence(next_sequence_);
      const absl::Status status =
          connection_->Call(stub, method, *request, response, options_.retry_budget);
      if (status.ok()) {
        ++next_sequence_;
        answer_lost_ = false;
        return status;
      }
      if (answer_lost_ && status.code() == absl::StatusCode::kAlreadyExists) {
        ++next_sequence_;
        answer_lost_ = false;
        continue;
      }
      if (MayHaveRun(status.code())) answer_lost_ = true;
      return Explain(status);
    }
  }

 private:
  SessionCore(std::shared_ptr<Connection> connection, SessionOptions options);
  static bool MayHaveRun(absl::StatusCode code);
  // Adds why the session is over, where it is.
  absl::Status Explain(absl::Status status) const;
  absl::StatusOr<MadeRegion> TryRegion(size_t bytes, bool* broker_failed);

  const std::shared_ptr<Connection> connection_;
  const SessionOptions options_;
  std::string id_;           // set by Open
  std::string broker_path_;  // set by Open
  std::chrono::duration<double> lease_{0};
  std::unique_ptr<Keeper> keeper_;  // set by Open, reset by Close; guarded by mutex_

  mutable std::mutex mutex_;
  bool closed_ = false;        // guarded by mutex_
  bool inline_only_ = false;   // guarded by mutex_
  std::string inline_reason_;  // guarded by mutex_

  std::mutex sequence_mutex_;
  uint64_t next_sequence_ = 1;  // guarded by sequence_mutex_
  bool answer_lost_ = false;    // guarded by sequence_mutex_
};

}  // namespace lamina::client::internal
