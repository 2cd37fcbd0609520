#include "cli/conformance/daemon.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <random>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "cli/conformance/broker_socket.h"

namespace lamina::conformance {
namespace {

std::string RandomPrefix() {
  std::random_device entropy;
  return absl::StrCat("conformance-", absl::Hex(entropy(), absl::kZeroPad8), "-");
}

}  // namespace

std::string CodeName(Code code) {
  return absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
}

std::string Describe(const grpc::Status& status) {
  return status.ok() ? "OK"
                     : absl::StrCat(CodeName(status.error_code()), ": ", status.error_message());
}

Daemon::Daemon(DaemonOptions options) : options_(std::move(options)), prefix_(RandomPrefix()) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  channel_ = options_.open ? options_.open(arguments)
                           : grpc::CreateCustomChannel(
                                 options_.target, grpc::InsecureChannelCredentials(), arguments);
  config_ = v1::ConfigService::NewStub(channel_);
  layers_ = v1::LayerService::NewStub(channel_);
  sessions_ = v1::SessionService::NewStub(channel_);
}

grpc::Status Daemon::Connect() {
  auto info = Call(v1::GetServerInfoRequest());
  if (!info.status.ok()) return info.status;
  info_ = std::move(info.response);
  auto opened = Call(v1::CreateSessionRequest());
  if (!opened.status.ok()) return opened.status;
  session_info_ = opened.response;
  v1::CreateRegionRequest wanted;
  wanted.set_session_id(session_info_.session_id());
  wanted.set_size_bytes(1);
  bool offered = false;
  for (const int transport : info_.transports()) offered |= transport == v1::TRANSPORT_MEMFD;
  if (!offered) {
    no_regions_ = "the daemon offers no regions: it has no broker socket";
  } else if (!absl::StartsWith(options_.target, "unix:")) {
    // Perhaps another host, where the broker's path names nothing or another daemon's socket.
    const auto made = Call(wanted);
    const BrokerAnswer answer = AskBroker(session_info_.broker_path(), session_info_.session_id(),
                                          made.response.region().region_id());
    if (answer.code != Code::OK) {
      no_regions_ = absl::StrCat("the broker socket ", session_info_.broker_path(),
                                 " is not to be reached from here");
    }
  }
  v1::DeleteSessionRequest end;
  end.set_session_id(session_info_.session_id());
  return Call(end).status;
}

void Daemon::NeedCheckpoints() const {
  if (!info_.checkpoints_enabled()) Skip("the daemon has no checkpoint folder");
}

void Daemon::Refused(absl::string_view call, const grpc::Status& status, Code code,
                     std::initializer_list<absl::string_view> words) {
  Require(status.error_code() == code, call, " answers ", Describe(status), "; it must be ",
          CodeName(code));
  for (const absl::string_view word : words) {
    Require(absl::StrContains(status.error_message(), word), call, " answers ", Describe(status),
            "; the message must name '", word, "'");
  }
}

void Daemon::Prepare(grpc::ClientContext* context) const {
  if (options_.timeout_seconds > 0) {
    context->set_deadline(std::chrono::system_clock::now() +
                          Milliseconds(static_cast<int64_t>(options_.timeout_seconds * 1000)));
  }
}

void Daemon::Count(absl::string_view service, absl::string_view method,
                   const grpc::Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counts_[absl::StrCat(service, ".", method)][CodeName(status.error_code())];
  for (const std::string& secret : secrets_) {
    Require(!absl::StrContains(status.error_message(), secret), method,
            "'s error message has the id of a session or region in it: ", Describe(status));
  }
}

void Daemon::Remember(const std::string& secret) {
  if (secret.empty()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  secrets_.push_back(secret);
}

std::map<std::string, std::map<std::string, int64_t>> Daemon::Counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

std::string Daemon::NewName() {
  std::lock_guard<std::mutex> lock(mutex_);
  return absl::StrCat(prefix_, ++names_);
}

void Daemon::CleanUp() {
  const auto listed = Call(v1::ListStacksRequest());
  for (const v1::Stack& stack : listed.response.stacks()) {
    if (!absl::StartsWith(stack.name(), prefix_)) continue;
    v1::DeleteStackRequest request;
    request.set_name(stack.name());
    Call(request);
  }
}

}  // namespace lamina::conformance
