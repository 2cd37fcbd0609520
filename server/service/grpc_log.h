// What gRPC itself has to say goes into the daemon's log, in its form.
#pragma once

namespace lamina {

// For the whole process, from now on; gRPC's errors become warnings: a client's failed handshake is
// one. GRPC_VERBOSITY says as usual what gRPC tells at all.
void TakeGrpcLog();

}  // namespace lamina
