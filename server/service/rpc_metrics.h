// The one interceptor: counts every RPC as gRPC dashboards expect it, gives it a request id where
// its client did not, puts that into errors and logs them. As the first and the last of
// ours that a call meets, it also says what gRPC orders where no sanitizer sees it.
#pragma once

#include <grpcpp/support/server_interceptor.h>

#include "server/metrics/metrics.h"

namespace lamina {

// What threads do before they call this comes before what threads do after they called it later. A
// call's beginning and end do so, and a server's owner before it listens and after it has shut
// down. gRPC orders all that; but it is not instrumented, and ThreadSanitizer would have to guess.
void OrderedByGrpc();

class RpcMetricsFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit RpcMetricsFactory(MetricSet& metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override;

 private:
  MetricSet& metrics_;
};

}  // namespace lamina
