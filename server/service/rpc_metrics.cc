#include "server/service/rpc_metrics.h"

#include <spdlog/spdlog.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "server/access/roles.h"
#include "server/service/request_tag.h"

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
  RpcMetrics(RpcMethodMetrics& method, const char* path)
      : method_(method), path_(path), began_(std::chrono::steady_clock::now()) {
    method_.Started();
  }

  ~RpcMetrics() override {
    OrderedByGrpc();
    // A call that never got to send a status was cancelled by its client.
    method_.Handled(code_, Seconds());
    OrderedByGrpc();
  }

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      ReadTag(*methods->GetRecvInitialMetadata());
      OrderedByGrpc();
    }
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      const grpc::Status status = methods->GetSendStatus();
      code_ = static_cast<int>(status.error_code());
      if (!status.ok()) {
        methods->GetSendTrailingMetadata()->emplace(kRequestIdKey, request_id_);
        LogFailure(path_, static_cast<absl::StatusCode>(code_), status.error_message(), Control());
      } else if (spdlog::should_log(spdlog::level::debug)) {
        spdlog::debug("event=rpc_done method={} seconds={:.6f}{}", path_, Seconds(),
                      TagFields(Control()));
      }
      OrderedByGrpc();
    }
    methods->Proceed();
  }

 private:
  // Sees to it that the metadata have a request id that is fit to be one: handlers find it there.
  void ReadTag(std::multimap<grpc::string_ref, grpc::string_ref>& metadata) {
    const auto [first, last] = metadata.equal_range(kRequestIdKey);
    for (auto it = first; it != last; ++it)
      if (request_id_.empty() &&
          IsRequestId(absl::string_view(it->second.data(), it->second.size())))
        request_id_.assign(it->second.data(), it->second.size());
    metadata.erase(first, last);
    if (request_id_.empty()) request_id_ = NewRequestId();
    metadata.emplace(kRequestIdKey, request_id_);
    const auto parent = metadata.find(kTraceparentKey);
    if (parent == metadata.end()) return;
    const TraceContext trace =
        ParseTraceparent(absl::string_view(parent->second.data(), parent->second.size()));
    trace_id_ = std::string(trace.trace_id);
    span_id_ = std::string(trace.span_id);
  }

  CallControl Control() const {
    CallControl control;
    control.request_id = request_id_;
    control.trace_id = trace_id_;
    control.span_id = span_id_;
    return control;
  }

  double Seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
  }

  RpcMethodMetrics& method_;
  const char* const path_;  // gRPC's, which lives as long as the server
  std::string request_id_, trace_id_, span_id_;
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
  auto* const interceptor =
      new RpcMetrics(metrics_.Rpc(service, method, TypeName(info->type())), info->method());
  OrderedByGrpc();  // another thread may destroy it
  return interceptor;
}

}  // namespace lamina
