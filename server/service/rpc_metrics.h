// The one interceptor: counts every RPC as gRPC dashboards expect it.
#pragma once

#include <grpcpp/support/server_interceptor.h>

#include "server/metrics/metrics.h"

namespace lamina {

class RpcMetricsFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit RpcMetricsFactory(MetricSet& metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override;

 private:
  MetricSet& metrics_;
};

}  // namespace lamina
