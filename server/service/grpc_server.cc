#include "server/service/grpc_server.h"

#include <grpcpp/ext/channelz_service_plugin.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "grpc/health/v1/health.pb.h"
#include "server/service/admission.h"
#include "server/service/config_service.h"
#include "server/service/layer_service.h"
#include "server/service/rpc_metrics.h"
#include "server/service/session_service.h"
#include "server/service/unix_listener.h"
#include "server/service/workers.h"
#include "server/tcp_address.h"

namespace lamina {
namespace {

constexpr const char* kServices[] = {"lamina.v1.LayerService", "lamina.v1.ConfigService",
                                     "lamina.v1.SessionService"};

class GrpcServerImpl final : public GrpcServer {
 public:
  explicit GrpcServerImpl(SharedState& state)
      : admission_(state.access, state.metrics),
        layer_(state, workers_),
        config_(state, workers_),
        session_(state, workers_) {}
  ~GrpcServerImpl() override {
    if (server_ != nullptr) Shutdown(absl::Now());
  }

  absl::Status Listen(const GrpcServerOptions& options, SharedState& state) {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    if (options.channelz) grpc::channelz::experimental::InitChannelzService();
    std::vector<std::string> services(std::begin(kServices), std::end(kServices));
    services.insert(services.end(),
                    {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"});
    if (options.channelz) services.emplace_back("grpc.channelz.v1.Channelz");
    // Names the file, so that its description is linked in and reflection finds it.
    grpc::health::v1::HealthCheckRequest::descriptor();
    if (absl::Status status = CheckThatAllHaveRoles(services); !status.ok()) return status;

    grpc::ServerBuilder builder;
    std::vector<int> ports(options.listen.size(), 0);
    for (size_t i = 0; i < options.listen.size(); ++i) {
      const std::string& address = options.listen[i];
      absl::string_view path = address;
      if (absl::ConsumePrefix(&path, "unix:")) {
        auto listener =
            UnixListener::Bind(std::string(path), options.allowed_uids, admission_, builder);
        if (!listener.ok()) return listener.status();
        unix_listeners_.push_back(*std::move(listener));
        ports[i] = 1;
        continue;
      }
      builder.AddListeningPort(
          address, options.tls == nullptr ? admission_.Plain() : admission_.Tls(*options.tls),
          &ports[i]);
    }
    // Tensors up to the inline cap, and what is around them.
    const int largest =
        static_cast<int>(state.engine.options().inline_cap_bytes + (size_t{1} << 20));
    builder.SetMaxReceiveMessageSize(largest);
    builder.SetMaxSendMessageSize(-1);
    // Who connects has so long to get through TLS: nobody holds descriptors by silence.
    builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 20000);
    // Two servers must not share a port silently.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>>
        interceptors;
    interceptors.push_back(std::make_unique<RpcMetricsFactory>(state.metrics));
    interceptors.push_back(admission_.StreamWatch());
    builder.experimental().SetInterceptorCreators(std::move(interceptors));
    builder.RegisterService(&layer_);
    builder.RegisterService(&config_);
    builder.RegisterService(&session_);
    OrderedByGrpc();
    server_ = builder.BuildAndStart();
    for (size_t i = 0; i < options.listen.size(); ++i) {
      if (server_ == nullptr || ports[i] == 0) {
        return absl::UnavailableError(
            absl::StrCat("can't listen on ", options.listen[i], ": in use, or not this machine's"));
      }
      std::string address = options.listen[i];
      if (!absl::StartsWith(address, "unix:")) {
        // What is bound has a port.
        address = ParseTcpAddress(address)->WithPort(ports[i]);
      }
      addresses_.push_back(std::move(address));
    }
    SetServing(false);
    for (const auto& listener : unix_listeners_) listener->Start();
    return absl::OkStatus();
  }

  const std::vector<std::string>& addresses() const override { return addresses_; }

  void SetServing(bool serving) override {
    grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
    health->SetServingStatus(serving);  // all, and the empty name
    for (const char* service : kServices) health->SetServingStatus(service, serving);
  }

  void LookAgain() override { admission_.LookAgain(); }

  void Shutdown(absl::Time deadline) override {
    unix_listeners_.clear();
    server_->Shutdown(absl::ToChronoTime(deadline));
    server_->Wait();
    server_.reset();
    OrderedByGrpc();
  }

 private:
  Admission admission_;  // gRPC asks it as long as there is a server
  Workers workers_;      // before the services, which give it their calls
  LayerServiceImpl layer_;
  ConfigServiceImpl config_;
  SessionServiceImpl session_;
  std::vector<std::unique_ptr<UnixListener>> unix_listeners_;
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> addresses_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(const GrpcServerOptions& options,
                                                              SharedState& state) {
  auto server = std::make_unique<GrpcServerImpl>(state);
  if (absl::Status status = server->Listen(options, state); !status.ok()) return status;
  return server;
}

}  // namespace lamina
