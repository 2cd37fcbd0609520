#include "server/service/rpc_metrics.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "server/access/roles.h"

namespace lamina {
namespace {

using grpc::experimental::InterceptionHookPoints;

std::atomic<uint32_t> order{0};

const char* TypeName(grpc::experimental::ServerRpcInfo::Type type) {
  using Type = grpc::experimental::ServerRpcInfo::Type;
  switch (type) {
    case Type::CLIENT_STREAMING:
      return "client_stream";
    case Type::SERVER_STREAMING:
      return "server_stream";
    case Type::BIDI_STREAMING:
      return "bidi_stream";
    default:
      return "unary";
  }
}

class RpcMetrics final : public grpc::experimental::Interceptor {
 public:
  explicit RpcMetrics(RpcMethodMetrics& method)
      : method_(method), began_(std::chrono::steady_clock::now()) {
    method_.Started();
  }

  ~RpcMetrics() override {
    OrderedByGrpc();
    // A call that never got to send a status was cancelled by its client.
    method_.Handled(
        code_, std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count());
    OrderedByGrpc();
  }

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      code_ = static_cast<int>(methods->GetSendStatus().error_code());
      OrderedByGrpc();
    }
    methods->Proceed();
  }

 private:
  RpcMethodMetrics& method_;
  const std::chrono::steady_clock::time_point began_;
  int code_ = static_cast<int>(grpc::StatusCode::CANCELLED);
};

}  // namespace

void OrderedByGrpc() { order.fetch_add(1, std::memory_order_acq_rel); }

grpc::experimental::Interceptor* RpcMetricsFactory::CreateServerInterceptor(
    grpc::experimental::ServerRpcInfo* info) {
  OrderedByGrpc();
  // "/lamina.v1.LayerService/Forward"
  std::string path = info->method();
  // Clients may call what they like: only names that there are become labels.
  if (!DemandOf(path)) path = "unknown/unknown";
  if (!path.empty() && path.front() == '/') path.erase(0, 1);
  const size_t slash = path.find('/');
  const std::string service = path.substr(0, slash);
  const std::string method = slash == std::string::npos ? "" : path.substr(slash + 1);
  auto* const interceptor = new RpcMetrics(metrics_.Rpc(service, method, TypeName(info->type())));
  OrderedByGrpc();  // another thread may destroy it
  return interceptor;
}

}  // namespace lamina
