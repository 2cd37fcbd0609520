// Leases: what opens a session, what holds it, and each way in which it ends.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/strings/ascii.h"
#include "cli/conformance/broker_socket.h"
#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

// Longer leases are waited out with --slow alone.
constexpr double kShortLease = 5;
// What the daemon may take, in seconds, to see that a session has ended.
constexpr double kSlack = 5;

v1::CreateSessionRequest Open(const std::string& client_name) {
  v1::CreateSessionRequest request;
  request.set_client_name(client_name);
  return request;
}

v1::DeleteSessionRequest End(const std::string& session_id) {
  v1::DeleteSessionRequest request;
  request.set_session_id(session_id);
  return request;
}

v1::ListRegionsRequest Probe(const std::string& session_id) {
  v1::ListRegionsRequest request;
  request.set_session_id(session_id);
  return request;
}

// A KeepAlive stream.
class Keeper {
 public:
  explicit Keeper(Daemon& daemon, double timeout_seconds = 0) : daemon_(daemon) {
    if (timeout_seconds > 0) {
      context_.set_deadline(std::chrono::system_clock::now() +
                            Milliseconds(static_cast<int64_t>(timeout_seconds * 1000)));
    } else {
      daemon.Prepare(&context_);
    }
    stream_ = daemon.sessions().KeepAlive(&context_);
  }
  // Sends a message and waits for its answer; false: the stream has ended.
  bool Beat(const std::string& session_id) {
    v1::KeepAliveRequest request;
    request.set_session_id(session_id);
    return stream_->Write(request) && stream_->Read(&response);
  }
  void Bind(const std::string& session_id) {
    if (!Beat(session_id)) Fail("KeepAlive's first message is answered ", Describe(Finish()));
  }
  // Closes this side; how the stream ended.
  grpc::Status Close() {
    stream_->WritesDone();
    return Finish();
  }
  void Cancel() { context_.TryCancel(); }
  // Waits for the daemon to end it.
  grpc::Status Finish() {
    while (stream_->Read(&response)) {
    }
    const grpc::Status status = stream_->Finish();
    daemon_.Count(v1::SessionService::service_full_name(), "KeepAlive", status);
    return status;
  }
  v1::KeepAliveResponse response;

 private:
  Daemon& daemon_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::KeepAliveRequest, v1::KeepAliveResponse>> stream_;
};

// Holds within a while, for what the daemon does after it has answered, or when a lease has ended.
void Eventually(const char* what, double within_seconds, const std::function<bool()>& holds) {
  const auto give_up =
      std::chrono::steady_clock::now() + std::chrono::duration<double>(within_seconds);
  while (!holds()) {
    Require(std::chrono::steady_clock::now() < give_up, what, " after ", within_seconds, " s");
    std::this_thread::sleep_for(Milliseconds(20));
  }
}

// Calls of a session, often enough to hold it for as long as this lives.
class Held {
 public:
  Held(Daemon& daemon, const std::string& session_id)
      : caller_([this, &daemon, request = Probe(session_id)] {
          std::unique_lock<std::mutex> lock(mutex_);
          const std::chrono::duration<double> pause(daemon.session_info().lease_seconds() / 4);
          while (!over_.wait_for(lock, pause, [this] { return ended_; })) daemon.Finally(request);
        }) {}
  ~Held() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    over_.notify_all();
    caller_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable over_;
  bool ended_ = false;  // guarded by mutex_
  std::thread caller_;
};

// A session with all that it can have, and whether all is gone after `end`; another session and
// the stack are as they were. `within_seconds`: how long that may take after `end`.
void EndFreesAll(Daemon& daemon, const std::function<void(const std::string& session_id)>& end,
                 double within_seconds = kSlack) {
  Rig rig(daemon);
  const std::string context = rig.Context();
  v1::CreateRegionRequest region;
  region.set_session_id(rig.session.id());
  region.set_size_bytes(4096);
  const std::string region_id = daemon.Ok(region).region().region_id();
  OwnSession other(daemon);
  v1::ForwardRequest train = rig.Train();
  train.set_session_id(other.id());
  *train.mutable_mutation() = other.Next();
  const std::string others_context = daemon.Ok(train).context_id();
  other.Applied();
  Require(rig.stack.Describe().outstanding_contexts() == 2, "two contexts are not outstanding");
  const Held held(daemon, other.id());

  end(rig.session.id());

  // The context first: asking for the session would hold it.
  Eventually("the session's context is still outstanding", within_seconds,
             [&] { return rig.stack.Describe().outstanding_contexts() == 1; });
  Eventually("the session is still there", kSlack, [&] {
    return daemon.Call(Probe(rig.session.id())).status.error_code() == Code::NOT_FOUND;
  });
  daemon.Refuses(rig.Train(), Code::NOT_FOUND, {"session"});
  daemon.Refuses(rig.Evaluate(), Code::NOT_FOUND, {"session"});
  daemon.Refuses(rig.Backward(context), Code::NOT_FOUND, {"session"});
  daemon.Refuses(rig.Release(context), Code::NOT_FOUND, {"session"});
  daemon.Refuses(rig.Apply(), Code::NOT_FOUND, {"session"});
  daemon.Refuses(rig.Zero(), Code::NOT_FOUND, {"session"});
  daemon.Refuses(region, Code::NOT_FOUND, {"session"});
  daemon.Refuses(End(rig.session.id()), Code::NOT_FOUND, {"session"});
  if (daemon.no_regions().empty()) {
    const BrokerAnswer answer =
        AskBroker(daemon.session_info().broker_path(), rig.session.id(), region_id);
    Require(answer.code == Code::NOT_FOUND, "the broker still hands the session's region out");
  }
  v1::BackwardRequest theirs = rig.Backward(others_context);
  *theirs.mutable_mutation() = other.Next();
  daemon.Ok(theirs);
}

// A session that outlives a broken stream for this long.
std::string OpenWithGrace(Daemon& daemon, double seconds) {
  v1::CreateSessionRequest request = Open("lamina conformance");
  request.set_resume_grace_seconds(seconds);
  const auto answer = daemon.Ok(request);
  const double granted = answer.resume_grace_seconds();
  if (granted == 0) {
    daemon.Ok(End(answer.session_id()));
    Skip("this daemon grants no grace");
  }
  Require(granted > 0 && granted <= seconds, "a grace of ", granted, " s is granted, ", seconds,
          " were asked for");
  return answer.session_id();
}

void ResumesWithinTheGrace(Daemon& daemon) {
  const std::string id = OpenWithGrace(daemon, 30);
  v1::CreateRegionRequest region;
  region.set_session_id(id);
  region.set_size_bytes(1);
  daemon.Ok(region);
  const OwnStack stack(daemon, SmallConfig());
  v1::ZeroGradientsRequest zero;
  zero.set_stack(stack.name());
  zero.mutable_mutation()->set_session_id(id);
  zero.mutable_mutation()->set_sequence(1);
  const std::string first = [&] {
    Keeper keeper(daemon);
    keeper.Bind(id);
    const std::string answer = Bytes(daemon.Ok(zero));
    keeper.Cancel();
    keeper.Finish();
    return answer;
  }();
  Require(daemon.Ok(Probe(id)).regions_size() == 1, "the region is gone with the stream");
  Keeper keeper(daemon);
  keeper.Bind(id);
  Require(keeper.response.applied_sequence() == 1, "the new stream's applied_sequence is ",
          keeper.response.applied_sequence(), "; 1 was applied");
  Require(Bytes(daemon.Ok(zero)) == first, "a repeat after the break is answered with other bytes");
  Require(daemon.Ok(Probe(id)).regions_size() == 1, "the region is gone with the new stream");
  // A half-close ends the session, grace or not.
  keeper.Close();
  Eventually("the session is still there", kSlack,
             [&] { return daemon.Call(Probe(id)).status.error_code() == Code::NOT_FOUND; });
}

void TakesOver(Daemon& daemon) {
  const std::string id = OpenWithGrace(daemon, 30);
  Keeper first(daemon), second(daemon);
  first.Bind(id);
  second.Bind(id);
  Daemon::Refused("the stream that was taken over", first.Finish(), Code::ABORTED);
  second.Bind(id);
  daemon.Ok(End(id));
  Require(second.Finish().ok(), "the stream of a deleted session does not end with OK");
}

void EndsAfterTheGrace(Daemon& daemon) {
  constexpr double kGrace = 0.5;
  const std::string id = OpenWithGrace(daemon, kGrace);
  {
    Keeper keeper(daemon);
    keeper.Bind(id);
    keeper.Cancel();
    keeper.Finish();
  }
  // Calls do not prolong the grace.
  Eventually("the session is still there", kGrace + kSlack,
             [&] { return daemon.Call(Probe(id)).status.error_code() == Code::NOT_FOUND; });
  Keeper late(daemon);
  Require(!late.Beat(id), "a stream after the grace is answered");
  Daemon::Refused("a stream after the grace", late.Finish(), Code::NOT_FOUND, {"session"});
}

double SilentLease(Daemon& daemon) {
  const double lease = daemon.session_info().lease_seconds();
  if (lease > kShortLease && !daemon.options().slow)
    Skip("the lease is ", lease, " s: waiting for its end needs --slow");
  return lease;
}

void Sleep(double seconds) {
  std::this_thread::sleep_for(Milliseconds(static_cast<int64_t>(seconds * 1000)));
}

}  // namespace

Group SessionChecks() {
  return {
      "sessions",
      "Sessions and their leases",
      {
          {"sessions.create", "CreateSession gives a random 128-bit id, the lease and the caps",
           [](Daemon& daemon) {
             const auto a = daemon.Ok(Open("lamina conformance")), b = daemon.Ok(Open(""));
             daemon.Ok(End(a.session_id()));
             daemon.Ok(End(b.session_id()));
             Require(a.session_id().size() == 32 &&
                         std::all_of(a.session_id().begin(), a.session_id().end(),
                                     absl::ascii_isxdigit),
                     "session_id is not 32 hexadecimal digits");
             Require(a.session_id() != b.session_id(), "two sessions have the same id");
             Require(a.lease_seconds() > 0 && a.region_cap_bytes() > 0 && a.region_cap() > 0,
                     "lease_seconds or a cap is 0");
           }},
          {"sessions.create-name", "A client_name is at most 64 printable characters",
           [](Daemon& daemon) {
             Cases cases;
             for (const std::string& name : {std::string(65, 'a'), std::string("a\nb"),
                                             std::string("a\x7f"), std::string(1, '\0')}) {
               cases.Try(absl::StrCat("a name of ", name.size(), " bytes"), [&] {
                 daemon.Refuses(Open(name), Code::INVALID_ARGUMENT, {"client_name"});
               });
             }
             cases.Done();
             daemon.Ok(End(daemon.Ok(Open(std::string(64, 'a'))).session_id()));
           }},
          {"sessions.delete",
           "DeleteSession ends the session: its contexts and regions are gone, others' are not",
           [](Daemon& daemon) {
             EndFreesAll(daemon, [&](const std::string& id) { daemon.Ok(End(id)); });
           }},
          {"sessions.not-found", "Calls of a session that is not there are NOT_FOUND",
           [](Daemon& daemon) {
             for (const std::string& id : {std::string(), std::string(32, '0'), std::string("x")}) {
               daemon.Refuses(End(id), Code::NOT_FOUND, {"session"});
               daemon.Refuses(Probe(id), Code::NOT_FOUND, {"session"});
               Keeper keeper(daemon);
               Require(!keeper.Beat(id), "KeepAlive answers a session that is none");
               Daemon::Refused("KeepAlive", keeper.Finish(), Code::NOT_FOUND, {"session"});
             }
           }},
          {"sessions.keep-alive", "KeepAlive answers each message with the last applied sequence",
           [](Daemon& daemon) {
             Rig rig(daemon);
             Keeper keeper(daemon);
             for (uint64_t applied = 0; applied < 3; ++applied) {
               keeper.Bind(applied == 1 ? "" : rig.session.id());  // needed in the first alone
               Require(keeper.response.applied_sequence() == applied, "applied_sequence is ",
                       keeper.response.applied_sequence(), " after ", applied, " mutations");
               rig.Mutate(rig.Zero());
               daemon.Refuses(rig.Apply(-1), Code::INVALID_ARGUMENT);  // not applied
             }
             const grpc::Status end = keeper.Close();
             Require(end.ok(), "a stream that the client closes ends with ", Describe(end));
           }},
          {"sessions.keep-alive-second", "A second KeepAlive stream of a session is ALREADY_EXISTS",
           [](Daemon& daemon) {
             const OwnSession session(daemon);
             Keeper first(daemon), second(daemon);
             first.Bind(session.id());
             Require(!second.Beat(session.id()), "a second stream is answered");
             Daemon::Refused("the second stream", second.Finish(), Code::ALREADY_EXISTS);
             first.Bind(session.id());  // and the first goes on
             daemon.Ok(Probe(session.id()));
             first.Close();
           }},
          {"sessions.keep-alive-other",
           "A KeepAlive stream that names another session later is INVALID_ARGUMENT",
           [](Daemon& daemon) {
             const OwnSession session(daemon), other(daemon);
             Keeper keeper(daemon);
             keeper.Bind(session.id());
             Require(!keeper.Beat(other.id()), "another session's id is answered");
             Daemon::Refused("KeepAlive", keeper.Finish(), Code::INVALID_ARGUMENT, {"session_id"});
             daemon.Ok(Probe(other.id()));
           }},
          {"sessions.keep-alive-close",
           "Closing the KeepAlive stream ends the session, with all it has",
           [](Daemon& daemon) {
             EndFreesAll(daemon, [&](const std::string& id) {
               Keeper keeper(daemon);
               keeper.Bind(id);
               keeper.Close();
             });
           }},
          {"sessions.keep-alive-broken",
           "A KeepAlive stream that breaks ends the session, unless it asked for more",
           [](Daemon& daemon) {
             EndFreesAll(daemon, [&](const std::string& id) {
               Keeper keeper(daemon);
               keeper.Bind(id);
               keeper.Cancel();
               Daemon::Refused("a cancelled KeepAlive", keeper.Finish(), Code::CANCELLED);
             });
           }},
          {"sessions.keep-alive-deleted",
           "DeleteSession ends the session's KeepAlive stream with OK",
           [](Daemon& daemon) {
             const OwnSession session(daemon);
             Keeper keeper(daemon);
             keeper.Bind(session.id());
             daemon.Ok(End(session.id()));
             Require(keeper.Finish().ok(), "the stream does not end with OK");
           }},
          {"sessions.grace",
           "With a grace, a session outlives a stream that breaks and goes on under a new one",
           ResumesWithinTheGrace},
          {"sessions.grace-over",
           "When the grace is over the session ends, whatever calls it makes", EndsAfterTheGrace},
          {"sessions.grace-takeover",
           "With a grace, a new stream takes over from an open one, which ends with ABORTED",
           TakesOver},
          {"sessions.grace-range", "A grace below 0 or that is no number is INVALID_ARGUMENT",
           [](Daemon& daemon) {
             for (const double grace : {-1.0, std::nan("")}) {
               v1::CreateSessionRequest request = Open("lamina conformance");
               request.set_resume_grace_seconds(grace);
               daemon.Refuses(request, Code::INVALID_ARGUMENT, {"resume_grace_seconds"});
             }
           }},
          {"sessions.silence",
           "Without a KeepAlive stream, silence for lease_seconds ends the session",
           [](Daemon& daemon) {
             const double lease = SilentLease(daemon);
             const auto began = std::chrono::steady_clock::now();
             EndFreesAll(
                 daemon, [](const std::string&) {}, lease + kSlack);
             const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - began;
             Require(waited.count() >= lease, "the session ends after ", waited.count(),
                     " s of silence; the lease is ", lease, " s");
           }},
          {"sessions.calls-hold",
           "Without a KeepAlive stream, calls within lease_seconds hold the session",
           [](Daemon& daemon) {
             const double lease = SilentLease(daemon);
             const OwnSession session(daemon);
             for (int i = 0; i < 6; ++i) {
               Sleep(lease / 4);
               daemon.Ok(Probe(session.id()));
             }
           }},
          {"sessions.keep-alive-holds",
           "A KeepAlive stream's messages hold a session that makes no call",
           [](Daemon& daemon) {
             const double lease = SilentLease(daemon);
             const OwnSession session(daemon);
             Keeper keeper(daemon, 4 * lease + 10);
             for (int i = 0; i < 6; ++i) {
               keeper.Bind(session.id());
               Sleep(lease / 4);
             }
             daemon.Ok(Probe(session.id()));
             keeper.Close();
           }},
          {"sessions.keep-alive-silence",
           "A KeepAlive stream that falls silent for lease_seconds is DEADLINE_EXCEEDED and the "
           "session's end",
           [](Daemon& daemon) {
             const double lease = SilentLease(daemon);
             EndFreesAll(daemon, [&](const std::string& id) {
               Keeper keeper(daemon, lease + 10);
               keeper.Bind(id);
               const auto began = std::chrono::steady_clock::now();
               Daemon::Refused("a silent KeepAlive", keeper.Finish(), Code::DEADLINE_EXCEEDED,
                               {"lease"});
               const double waited =
                   std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
               Require(waited > 0.8 * lease, "the stream ends after ", waited, " s; the lease is ",
                       lease, " s");
             });
           }},
          {"sessions.keep-alive-nameless",
           "A KeepAlive stream that names no session for lease_seconds is DEADLINE_EXCEEDED",
           [](Daemon& daemon) {
             const double lease = SilentLease(daemon);
             Keeper keeper(daemon, lease + 10);
             Daemon::Refused("a KeepAlive without a message", keeper.Finish(),
                             Code::DEADLINE_EXCEEDED, {"lease"});
           }},
      }};
}

}  // namespace lamina::conformance
