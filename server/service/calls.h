// What calls do around their own work: whose session it is, running a mutation once, what the
// device does after it, memory that runs out.
#pragma once

#include <memory>
#include <new>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "lamina/v1/tensor.pb.h"
#include "server/service/conversions.h"
#include "server/service/shared_state.h"

namespace lamina {

// What `run` (absl::Status()) says, also where host memory runs out in it.
template <typename Run>
absl::Status Guarded(Run run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("the daemon ran out of host memory during the call");
  }
}

// The body as one string, the same for the same message.
template <typename Message>
std::string Canonical(const Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    message.SerializePartialToCodedStream(&coded);
  }
  return bytes;
}

// The mutation's session, or what is wrong with the mutation.
inline absl::StatusOr<std::shared_ptr<Session>> MutatingSession(SharedState& state,
                                                                bool has_mutation,
                                                                const v1::Mutation& mutation,
                                                                const CallControl& control) {
  if (!has_mutation) {
    return absl::InvalidArgumentError("mutation: is needed; this call changes something");
  }
  if (mutation.sequence() == 0) {
    return absl::InvalidArgumentError("mutation.sequence: 0 must be at least 1");
  }
  return state.sessions.Find(mutation.session_id(), control.caller);
}

// A mutation's sequence while its call runs. Whatever comes: one that stays in flight would block
// the session for good, so it is aborted unless it was committed or left.
class OpenSequence {
 public:
  // log null: the call is no mutation, and nothing happens.
  OpenSequence(std::shared_ptr<MutationLog> log, uint64_t sequence)
      : log_(std::move(log)), sequence_(sequence) {}
  OpenSequence(const OpenSequence&) = delete;
  OpenSequence& operator=(const OpenSequence&) = delete;
  ~OpenSequence() {
    if (log_ != nullptr) log_->Abort(sequence_);
  }
  template <typename Response>
  void Commit(const Response& response) {
    if (log_ != nullptr) log_->Commit(sequence_, response.SerializeAsString());
    log_ = nullptr;
  }
  // To whoever ends what the call has left.
  void Leave(Left& left) {
    left.log = log_;
    left.sequence = sequence_;
    log_->Leave(sequence_);
    log_ = nullptr;
  }

 private:
  std::shared_ptr<MutationLog> log_;
  const uint64_t sequence_;
};

// Runs `run` (absl::Status()) once for the request's (session, sequence), or answers as the first
// run did. `run` fills `response`. Where it leaves work to the device (CallControl::left), the
// sequence's place in the log is EndLeft's to settle.
template <typename Request, typename Response, typename Run>
absl::Status RunOnce(SharedState& state, const Session& session, const Request& request,
                     const CallControl& control, Response* response, Run run) {
  const std::shared_ptr<MutationLog> log = state.mutations.For(session.key());
  const uint64_t sequence = request.mutation().sequence();
  // The message's name is part of the body: two methods' requests may have the same bytes.
  auto ticket = log->Begin(
      sequence,
      DigestOf(absl::StrCat(Request::descriptor()->full_name(), "\n", Canonical(request))),
      control);
  if (!ticket.ok()) return ticket.status();
  if (ticket->replay != nullptr) {
    if (!response->ParseFromString(*ticket->replay)) {
      return absl::InternalError("a kept answer can't be read");
    }
    return absl::OkStatus();
  }
  OpenSequence open(log, sequence);
  const absl::Status status = run();
  if (!status.ok()) return status;
  if (control.left != nullptr && control.left->step != nullptr) {
    open.Leave(*control.left);
  } else {
    open.Commit(*response);
  }
  return status;
}

// Waits for what a call has left, and completes `response`, with which it has succeeded so far.
// INTERNAL: the device failed, and the call's mutation is not applied.
template <typename Response>
absl::Status EndLeft(const Left& left, Response* response) {
  OpenSequence open(left.log, left.sequence);
  const auto times = left.step->Wait();
  if (!times.ok()) return times.status();
  *response->mutable_timing() = ToProto(*times);
  open.Commit(*response);
  return absl::OkStatus();
}

}  // namespace lamina
