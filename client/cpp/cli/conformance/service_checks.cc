// What the daemon says of itself: GetServerInfo, the health service, reflection.
#include <google/protobuf/descriptor.pb.h>
#include <grpcpp/generic/generic_stub.h>

#include <algorithm>
#include <set>

#include "cli/conformance/checks.h"
#include "cli/conformance/daemon.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"

namespace lamina::conformance {
namespace {

namespace health = grpc::health::v1;
namespace reflection = grpc::reflection::v1alpha;

const google::protobuf::ServiceDescriptor* const* Services() {
  static const google::protobuf::ServiceDescriptor* const kServices[] = {
      v1::ForwardRequest::descriptor()->file()->service(0),
      v1::GetServerInfoRequest::descriptor()->file()->service(0),
      v1::CreateSessionRequest::descriptor()->file()->service(0), nullptr};
  return kServices;
}

grpc::Status CheckHealth(Daemon& daemon, const std::string& service,
                         health::HealthCheckResponse* response) {
  grpc::ClientContext context;
  daemon.Prepare(&context);
  health::HealthCheckRequest request;
  request.set_service(service);
  const grpc::Status status =
      health::Health::NewStub(daemon.channel())->Check(&context, request, response);
  daemon.Count(health::Health::service_full_name(), "Check", status);
  return status;
}

// What a Watch says at once; cancels it then and gives how it ended.
std::pair<health::HealthCheckResponse, grpc::Status> WatchHealth(Daemon& daemon,
                                                                 const std::string& service) {
  grpc::ClientContext context;
  daemon.Prepare(&context);
  health::HealthCheckRequest request;
  request.set_service(service);
  const auto stub = health::Health::NewStub(daemon.channel());
  const auto stream = stub->Watch(&context, request);
  health::HealthCheckResponse first, more;
  const bool answered = stream->Read(&first);
  context.TryCancel();
  while (stream->Read(&more)) {
  }
  const grpc::Status status = stream->Finish();
  daemon.Count(health::Health::service_full_name(), "Watch", status);
  Require(answered, "Watch of '", service, "' ends without a status: ", Describe(status));
  return {first, status};
}

reflection::ServerReflectionResponse Reflect(Daemon& daemon,
                                             const reflection::ServerReflectionRequest& request) {
  grpc::ClientContext context;
  daemon.Prepare(&context);
  const auto stub = reflection::ServerReflection::NewStub(daemon.channel());
  const auto stream = stub->ServerReflectionInfo(&context);
  reflection::ServerReflectionResponse response;
  const bool answered = stream->Write(request) && stream->Read(&response);
  stream->WritesDone();
  const grpc::Status status = stream->Finish();
  daemon.Count(reflection::ServerReflection::service_full_name(), "ServerReflectionInfo", status);
  Require(answered && status.ok(), "reflection answers ", Describe(status));
  return response;
}

// "Forward(stream lamina.v1.X) returns (lamina.v1.Y)" of each method.
std::set<std::string> Signatures(const google::protobuf::ServiceDescriptorProto& service) {
  std::set<std::string> signatures;
  for (const auto& method : service.method()) {
    signatures.insert(absl::StrCat(
        method.name(), "(", method.client_streaming() ? "stream " : "", method.input_type(),
        ") returns (", method.server_streaming() ? "stream " : "", method.output_type(), ")"));
  }
  return signatures;
}

void DescribesItsServices(Daemon& daemon) {
  Cases cases;
  for (const auto* service = Services(); *service != nullptr; ++service) {
    const std::string name = (*service)->full_name();
    cases.Try(name, [&] {
      reflection::ServerReflectionRequest request;
      request.set_file_containing_symbol(name);
      const auto response = Reflect(daemon, request);
      Require(response.has_file_descriptor_response(), "reflection does not know it");
      google::protobuf::ServiceDescriptorProto known, told;
      (*service)->CopyTo(&known);
      for (const std::string& bytes : response.file_descriptor_response().file_descriptor_proto()) {
        google::protobuf::FileDescriptorProto file;
        Require(file.ParseFromString(bytes), "reflection gives a file that can't be parsed");
        for (const auto& candidate : file.service()) {
          if (file.package() + "." + candidate.name() == name) told = candidate;
        }
      }
      const std::set<std::string> offered = Signatures(told);
      for (const std::string& signature : Signatures(known)) {
        Require(offered.count(signature) == 1, "it has no ", signature);
      }
    });
  }
  cases.Done();
}

void AnswersNoUnknownMethod(Daemon& daemon) {
  Cases cases;
  for (const auto* service = Services(); *service != nullptr; ++service) {
    const std::string method = absl::StrCat("/", (*service)->full_name(), "/NoSuchCall");
    cases.Try(method, [&] {
      grpc::ClientContext context;
      daemon.Prepare(&context);
      grpc::CompletionQueue queue;
      grpc::TemplatedGenericStub<v1::ListStacksRequest, v1::ListStacksResponse> stub(
          daemon.channel());
      v1::ListStacksResponse response;
      grpc::Status status;
      const auto call = stub.PrepareUnaryCall(&context, method, v1::ListStacksRequest(), &queue);
      call->StartCall();
      call->Finish(&response, &status, nullptr);
      void* tag = nullptr;
      bool ok = false;
      queue.Next(&tag, &ok);
      queue.Shutdown();
      Daemon::Refused(method, status, Code::UNIMPLEMENTED);
    });
  }
  cases.Done();
}

}  // namespace

Group ServiceChecks() {
  return {
      "service",
      "What the daemon says of itself",
      {
          {"service.info", "GetServerInfo names the version, the backend, the device and the caps",
           [](Daemon& daemon) {
             const auto info = daemon.Ok(v1::GetServerInfoRequest());
             Require(!info.version().empty(), "version is empty");
             Require(info.backend() == "cpu" || info.backend() == "cuda", "backend is '",
                     info.backend(), "'; it must be cpu or cuda");
             Require(!info.device_name().empty(), "device_name is empty");
             Require(info.device_uuid().empty() == (info.backend() == "cpu"), "device_uuid is '",
                     info.device_uuid(), "' on ", info.backend());
             Require(info.device_free_bytes() <= info.device_total_bytes(), "device_free_bytes ",
                     info.device_free_bytes(), " are more than the device's ",
                     info.device_total_bytes());
             Require(info.inline_cap_bytes() > 0 && info.replay_window() > 0,
                     "inline_cap_bytes or replay_window is 0");
             const auto& transports = info.transports();
             Require(std::find(transports.begin(), transports.end(), v1::TRANSPORT_INLINE) !=
                         transports.end(),
                     "transports do not include INLINE");
           }},
          {"service.health-check", "Health/Check answers SERVING for the daemon and each service",
           [](Daemon& daemon) {
             Cases cases;
             for (const auto* service = Services();; ++service) {
               const std::string name = *service == nullptr ? "" : (*service)->full_name();
               cases.Try(absl::StrCat("'", name, "'"), [&] {
                 health::HealthCheckResponse response;
                 const grpc::Status status = CheckHealth(daemon, name, &response);
                 Require(status.ok(), "Check answers ", Describe(status));
                 Require(response.status() == health::HealthCheckResponse::SERVING, "Check says ",
                         health::HealthCheckResponse::ServingStatus_Name(response.status()));
               });
               if (*service == nullptr) break;
             }
             cases.Done();
           }},
          {"service.health-check-unknown",
           "Health/Check of a service that is not there is NOT_FOUND",
           [](Daemon& daemon) {
             health::HealthCheckResponse response;
             Daemon::Refused("Check", CheckHealth(daemon, "no.such.Service", &response),
                             Code::NOT_FOUND);
           }},
          {"service.health-watch",
           "Health/Watch says SERVING at once and stays open until it is cancelled",
           [](Daemon& daemon) {
             const auto [first, end] = WatchHealth(daemon, "lamina.v1.LayerService");
             Require(first.status() == health::HealthCheckResponse::SERVING, "Watch says ",
                     health::HealthCheckResponse::ServingStatus_Name(first.status()));
             Daemon::Refused("a cancelled Watch", end, Code::CANCELLED);
           }},
          {"service.health-watch-unknown",
           "Health/Watch of a service that is not there says SERVICE_UNKNOWN",
           [](Daemon& daemon) {
             const auto [first, end] = WatchHealth(daemon, "no.such.Service");
             Require(first.status() == health::HealthCheckResponse::SERVICE_UNKNOWN, "Watch says ",
                     health::HealthCheckResponse::ServingStatus_Name(first.status()));
           }},
          {"service.reflection-lists", "Reflection lists the three services and the health service",
           [](Daemon& daemon) {
             reflection::ServerReflectionRequest request;
             request.set_list_services("*");
             std::set<std::string> names;
             const auto response = Reflect(daemon, request);
             for (const auto& service : response.list_services_response().service())
               names.insert(service.name());
             for (const auto* service = Services(); *service != nullptr; ++service)
               Require(names.count((*service)->full_name()) == 1, "it does not list ",
                       (*service)->full_name());
             Require(names.count(health::Health::service_full_name()) == 1, "it does not list ",
                     health::Health::service_full_name());
           }},
          {"service.reflection-describes",
           "Reflection gives each service's file, with every method of this program's contract",
           DescribesItsServices},
          {"service.unknown-method", "A method that a service does not have is UNIMPLEMENTED",
           AnswersNoUnknownMethod},
      }};
}

}  // namespace lamina::conformance
