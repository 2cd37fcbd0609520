// The daemon under test, over its generated stubs: nothing stands between a check and the wire.
//
// Every answer is counted by method and status code, and every error message is searched for the
// ids that this client was given: none may ever appear in one.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/channel_arguments.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "cli/conformance/harness.h"
#include "lamina/v1/config_service.grpc.pb.h"
#include "lamina/v1/layer_service.grpc.pb.h"
#include "lamina/v1/session_service.grpc.pb.h"

namespace lamina::conformance {

namespace v1 = lamina::v1;
using Milliseconds = std::chrono::milliseconds;
using Code = grpc::StatusCode;

std::string CodeName(Code code);                   // "NOT_FOUND"
std::string Describe(const grpc::Status& status);  // "NOT_FOUND: no such stack", or "OK"

template <class Stub, class Request, class Response>
using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Request&, Response*);

// Each request's method.
inline auto MethodOf(const v1::GetServerInfoRequest&) {
  return &v1::ConfigService::Stub::GetServerInfo;
}
inline auto MethodOf(const v1::CreateStackRequest&) {
  return &v1::ConfigService::Stub::CreateStack;
}
inline auto MethodOf(const v1::GetStackRequest&) { return &v1::ConfigService::Stub::GetStack; }
inline auto MethodOf(const v1::ListStacksRequest&) { return &v1::ConfigService::Stub::ListStacks; }
inline auto MethodOf(const v1::UpdateStackRequest&) {
  return &v1::ConfigService::Stub::UpdateStack;
}
inline auto MethodOf(const v1::DeleteStackRequest&) {
  return &v1::ConfigService::Stub::DeleteStack;
}
inline auto MethodOf(const v1::PlanMemoryRequest&) { return &v1::ConfigService::Stub::PlanMemory; }
inline auto MethodOf(const v1::GetParametersRequest&) {
  return &v1::ConfigService::Stub::GetParameters;
}
inline auto MethodOf(const v1::SetParametersRequest&) {
  return &v1::ConfigService::Stub::SetParameters;
}
inline auto MethodOf(const v1::GetGradientsRequest&) {
  return &v1::ConfigService::Stub::GetGradients;
}
inline auto MethodOf(const v1::SaveCheckpointRequest&) {
  return &v1::ConfigService::Stub::SaveCheckpoint;
}
inline auto MethodOf(const v1::LoadCheckpointRequest&) {
  return &v1::ConfigService::Stub::LoadCheckpoint;
}
inline auto MethodOf(const v1::ForwardRequest&) { return &v1::LayerService::Stub::Forward; }
inline auto MethodOf(const v1::BackwardRequest&) { return &v1::LayerService::Stub::Backward; }
inline auto MethodOf(const v1::ApplyGradientsRequest&) {
  return &v1::LayerService::Stub::ApplyGradients;
}
inline auto MethodOf(const v1::ZeroGradientsRequest&) {
  return &v1::LayerService::Stub::ZeroGradients;
}
inline auto MethodOf(const v1::ReleaseContextRequest&) {
  return &v1::LayerService::Stub::ReleaseContext;
}
inline auto MethodOf(const v1::CreateSessionRequest&) {
  return &v1::SessionService::Stub::CreateSession;
}
inline auto MethodOf(const v1::DeleteSessionRequest&) {
  return &v1::SessionService::Stub::DeleteSession;
}
inline auto MethodOf(const v1::CreateRegionRequest&) {
  return &v1::SessionService::Stub::CreateRegion;
}
inline auto MethodOf(const v1::ListRegionsRequest&) {
  return &v1::SessionService::Stub::ListRegions;
}
inline auto MethodOf(const v1::ReleaseRegionRequest&) {
  return &v1::SessionService::Stub::ReleaseRegion;
}

template <class Response>
struct Answer {
  grpc::Status status;
  Response response;
};

struct DaemonOptions {
  std::string target;           // as gRPC takes it
  double timeout_seconds = 60;  // of each call; 0: none
  // Makes the channel to it; empty: one without TLS or token.
  std::function<std::shared_ptr<grpc::Channel>(const grpc::ChannelArguments&)> open;
  bool slow = false;  // also checks that wait for a lease longer than some seconds
};

// Threads: calls from any thread.
class Daemon {
 public:
  // Does not connect yet.
  explicit Daemon(DaemonOptions options);

  // Learns what the daemon is and offers, with a session that is opened and deleted. What it
  // answers where that fails.
  grpc::Status Connect();
  const v1::GetServerInfoResponse& info() const { return info_; }
  const v1::CreateSessionResponse& session_info() const { return session_info_; }
  const DaemonOptions& options() const { return options_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  v1::LayerService::Stub& layers() { return *layers_; }
  v1::ConfigService::Stub& config() { return *config_; }
  v1::SessionService::Stub& sessions() { return *sessions_; }

  // Why this client can't map regions; empty: it can.
  const std::string& no_regions() const { return no_regions_; }
  // Skips the check where it can't.
  void NeedRegions() const {
    if (!no_regions_.empty()) Skip(no_regions_);
  }
  void NeedCheckpoints() const;

  // One call, whatever it answers.
  template <class Request>
  auto Call(const Request& request) {
    return Invoke(MethodOf(request), request);
  }
  // The answer of a call that must work.
  template <class Request>
  auto Ok(const Request& request) {
    auto answer = Call(request);
    Require(answer.status.ok(), MethodName<Request>(), " answers ", Describe(answer.status));
    return std::move(answer.response);
  }
  // A call that ends something, for destructors: its answer does not matter.
  template <class Request>
  void Finally(const Request& request) noexcept {
    try {
      Call(request);
    } catch (const Violation&) {
      // A message with an id in it: checks say so where they look at messages.
    }
  }
  // The call must answer this code, with all these words in its message.
  template <class Request>
  void Refuses(const Request& request, Code code,
               std::initializer_list<absl::string_view> words = {}) {
    Refused(MethodName<Request>(), Call(request).status, code, words);
  }
  // The same of an answer that is there already.
  static void Refused(absl::string_view call, const grpc::Status& status, Code code,
                      std::initializer_list<absl::string_view> words = {});

  // Sets the deadline of one call.
  void Prepare(grpc::ClientContext* context) const;
  // Counts an answer of a method and looks at its message.
  void Count(absl::string_view service, absl::string_view method, const grpc::Status& status);
  // An id that no message may have.
  void Remember(const std::string& secret);
  // How often each method ("lamina.v1.LayerService.Forward") answered each code.
  std::map<std::string, std::map<std::string, int64_t>> Counts() const;

  // A name for a stack that nobody else has.
  std::string NewName();
  // Deletes what has such a name and is still there.
  void CleanUp();

  // "Forward" of a ForwardRequest.
  template <class Request>
  static std::string MethodName() {
    const std::string& name = Request::descriptor()->name();
    return name.substr(0, name.size() - std::string("Request").size());
  }

 private:
  template <class Stub, class Request, class Response>
  Answer<Response> Invoke(Method<Stub, Request, Response> method, const Request& request) {
    grpc::ClientContext context;
    Prepare(&context);
    Answer<Response> answer;
    absl::string_view service;
    if constexpr (std::is_same_v<Stub, v1::LayerService::Stub>) {
      answer.status = (*layers_.*method)(&context, request, &answer.response);
      service = v1::LayerService::service_full_name();
    } else if constexpr (std::is_same_v<Stub, v1::ConfigService::Stub>) {
      answer.status = (*config_.*method)(&context, request, &answer.response);
      service = v1::ConfigService::service_full_name();
    } else {
      answer.status = (*sessions_.*method)(&context, request, &answer.response);
      service = v1::SessionService::service_full_name();
    }
    Learn(answer.response);
    Count(service, MethodName<Request>(), answer.status);
    return answer;
  }
  // Ids that an answer hands out.
  void Learn(const google::protobuf::Message&) {}
  void Learn(const v1::CreateSessionResponse& response) { Remember(response.session_id()); }
  void Learn(const v1::CreateRegionResponse& response) { Remember(response.region().region_id()); }

  const DaemonOptions options_;
  const std::string prefix_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::ConfigService::Stub> config_;
  std::unique_ptr<v1::LayerService::Stub> layers_;
  std::unique_ptr<v1::SessionService::Stub> sessions_;
  v1::GetServerInfoResponse info_;
  v1::CreateSessionResponse session_info_;
  std::string no_regions_;
  mutable std::mutex mutex_;
  int64_t names_ = 0;                                             // guarded by mutex_
  std::vector<std::string> secrets_;                              // guarded by mutex_
  std::map<std::string, std::map<std::string, int64_t>> counts_;  // guarded by mutex_
};

}  // namespace lamina::conformance
