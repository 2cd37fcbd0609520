// The one place where absl::Status becomes grpc::Status.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace lamina {

grpc::Status ToGrpc(const absl::Status& status);

}  // namespace lamina
