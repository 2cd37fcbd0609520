// The one place where a call is let in or denied. gRPC asks it before it reads a call's message or
// looks for a handler: the credentials of every listener carry it, also those without encryption.
//
// Threads: all methods from any thread.
#pragma once

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/server_interceptor.h>
#include <sys/types.h>

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "server/access/access.h"
#include "server/access/tls_files.h"
#include "server/metrics/metrics.h"

namespace lamina {

class Admission {
 public:
  Admission(const Access& access, MetricSet& metrics);
  ~Admission();
  Admission(const Admission&) = delete;
  Admission& operator=(const Admission&) = delete;

  // Credentials of a listener: without encryption, or with TLS. This and `files` outlive the
  // server.
  std::shared_ptr<grpc::ServerCredentials> Plain();
  std::shared_ptr<grpc::ServerCredentials> Tls(const TlsFiles& files);
  // Of connections over a Unix socket whose other end is this user's.
  std::shared_ptr<grpc::ServerCredentials> Local(uid_t uid);

  // Ends the streams whose callers may no longer have them: for when access has changed.
  void LookAgain();

  // What knows of open streams; goes into the server.
  std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> StreamWatch();

 private:
  friend class OpenStream;
  struct Listener;
  struct Stream;

  std::shared_ptr<grpc::ServerCredentials> With(grpc_server_credentials* credentials, int64_t uid);
  static void Process(void* listener, grpc_auth_context* connection, const grpc_metadata* metadata,
                      size_t count, grpc_process_auth_metadata_done_cb done, void* user_data);

  const Access& access_;
  MetricSet& metrics_;
  std::mutex mutex_;
  std::list<Stream> streams_;                   // guarded by mutex_
  std::vector<std::shared_ptr<void>> sources_;  // of certificates, which gRPC's credentials ask
};

// Who makes the call, as Caller::identity; empty also for one whose token has gone since.
std::string CallerOf(const Access& access, grpc::ServerContextBase* context);

// INTERNAL: a method of one of these services has no entry in the roles' table.
absl::Status CheckThatAllHaveRoles(const std::vector<std::string>& services);

}  // namespace lamina
