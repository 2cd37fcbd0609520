#include "src/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <grpcpp/support/client_interceptor.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace lamina::client {
namespace internal {
namespace {

// How often gRPC looks whether certificates have changed; new connections use the new ones.
constexpr unsigned kLookEverySeconds = 30;

absl::StatusOr<std::string> ReadFile(const char* what, const std::string& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  if (!file || content.str().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, " ", path, ": ", errno != 0 ? std::strerror(errno) : "can't be read, or is empty"));
  }
  return content.str();
}

absl::StatusOr<std::string> ReadToken(const std::string& path) {
  absl::StatusOr<std::string> content = ReadFile("token_file", path);
  if (!content.ok()) return content.status();
  std::string token(absl::StripAsciiWhitespace(*content));
  if (token.empty() || token.find_first_of(" \t\r\n") != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_file ", path, ": must hold one token and nothing else"));
  }
  return token;
}

// The token that calls carry; where it comes from a file, as that is now.
class Token {
 public:
  Token(std::string token, std::string path) : path_(std::move(path)), token_(std::move(token)) {
    if (!path_.empty()) Look();
  }

  std::string Header() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!path_.empty() && Look()) {
      // A file that is being written counts when it is whole.
      if (absl::StatusOr<std::string> token = ReadToken(path_); token.ok()) {
        token_ = *std::move(token);
      }
    }
    return absl::StrCat("Bearer ", token_);
  }

 private:
  // Whether the file is another than at the last look.
  bool Look() {
    struct stat now {};
    if (stat(path_.c_str(), &now) != 0) return false;
    const bool same = now.st_ino == seen_.st_ino && now.st_size == seen_.st_size &&
                      now.st_mtim.tv_sec == seen_.st_mtim.tv_sec &&
                      now.st_mtim.tv_nsec == seen_.st_mtim.tv_nsec;
    seen_ = now;
    return !same;
  }

  const std::string path_;  // empty: the token does not change
  std::mutex mutex_;
  std::string token_;    // guarded by mutex_
  struct stat seen_ {};  // guarded by mutex_
};

// Adds the token to every call of a channel, also without encryption, where gRPC's call credentials
// refuse to.
class TokenInterceptor final : public grpc::experimental::Interceptor {
 public:
  explicit TokenInterceptor(Token& token) : token_(token) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", token_.Header());
    }
    methods->Proceed();
  }

 private:
  Token& token_;
};

class TokenFactory final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  TokenFactory(std::string token, std::string path) : token_(std::move(token), std::move(path)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo*) override {
    return new TokenInterceptor(token_);
  }

 private:
  Token token_;
};

bool WantsTls(const Security& security) {
  return security.tls || !security.ca_file.empty() || !security.certificate_file.empty() ||
         !security.key_file.empty() || !security.server_name.empty();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> TlsCredentials(const Security& security) {
  if (security.certificate_file.empty() != security.key_file.empty()) {
    return absl::InvalidArgumentError("certificate_file and key_file go together");
  }
  // gRPC itself would only say at the first call that something is wrong.
  const std::pair<const char*, const std::string*> files[] = {
      {"ca_file", &security.ca_file},
      {"certificate_file", &security.certificate_file},
      {"key_file", &security.key_file}};
  for (const auto& [what, path] : files) {
    if (path->empty()) continue;
    absl::StatusOr<std::string> content = ReadFile(what, *path);
    if (!content.ok()) return content.status();
    if (!absl::StrContains(*content, "-----BEGIN ")) {
      return absl::InvalidArgumentError(absl::StrCat(what, " ", *path, ": is not PEM"));
    }
  }
  namespace tls = grpc::experimental;
  tls::TlsChannelCredentialsOptions options;
  if (!security.certificate_file.empty() && !security.ca_file.empty()) {
    options.set_certificate_provider(std::make_shared<tls::FileWatcherCertificateProvider>(
        security.key_file, security.certificate_file, security.ca_file, kLookEverySeconds));
  } else if (!security.certificate_file.empty()) {
    options.set_certificate_provider(std::make_shared<tls::FileWatcherCertificateProvider>(
        security.key_file, security.certificate_file, kLookEverySeconds));
  } else if (!security.ca_file.empty()) {
    options.set_certificate_provider(
        std::make_shared<tls::FileWatcherCertificateProvider>(security.ca_file, kLookEverySeconds));
  }
  if (!security.ca_file.empty()) options.watch_root_certs();
  if (!security.certificate_file.empty()) options.watch_identity_key_cert_pairs();
  return tls::TlsCredentials(options);
}

}  // namespace

bool IsOnThisHost(const std::string& target) {
  return absl::StartsWith(target, "unix:") || absl::StartsWith(target, "unix-abstract:");
}

bool IsLoopback(const std::string& host) {
  return host == "localhost" || host == "::1" || host == "[::1]" ||
         (absl::StartsWith(host, "127.") &&
          host.find_first_not_of("0123456789.") == std::string::npos);
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const std::string& target,
                                                           const Security& security,
                                                           grpc::ChannelArguments arguments) {
  // A Unix socket's daemon knows its callers by their users.
  if (IsOnThisHost(target)) {
    return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
  }
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  if (security.insecure || !WantsTls(security)) {
    credentials = grpc::InsecureChannelCredentials();
  } else {
    absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> made = TlsCredentials(security);
    if (!made.ok()) return made.status();
    credentials = *std::move(made);
    if (!security.server_name.empty()) {
      arguments.SetSslTargetNameOverride(security.server_name);
    }
  }
  if (security.token.empty() && security.token_file.empty()) {
    return grpc::CreateCustomChannel(target, credentials, arguments);
  }
  std::string token = security.token;
  if (token.empty()) {
    absl::StatusOr<std::string> read = ReadToken(security.token_file);
    if (!read.ok()) return read.status();
    token = *std::move(read);
  }
  if (!security.insecure && !WantsTls(security) &&
      !IsLoopback(target.substr(0, target.rfind(':')))) {
    return absl::InvalidArgumentError(
        absl::StrCat("the token would cross the network to ", target,
                     " unencrypted: use TLS (ca_file), or insecure if that is meant"));
  }
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> factories;
  factories.push_back(std::make_unique<TokenFactory>(
      std::move(token), security.token.empty() ? security.token_file : ""));
  return grpc::experimental::CreateCustomChannelWithInterceptors(target, credentials, arguments,
                                                                 std::move(factories));
}

}  // namespace internal

Security Security::FromEnvironment() {
  const auto value = [](const char* name) -> std::string {
    const char* found = std::getenv(name);
    return found == nullptr ? "" : found;
  };
  Security security;
  const std::string tls = value("LAMINA_TLS");
  security.tls = !tls.empty() && tls != "0";
  security.ca_file = value("LAMINA_TLS_CA");
  security.certificate_file = value("LAMINA_CLIENT_CERT");
  security.key_file = value("LAMINA_CLIENT_KEY");
  security.server_name = value("LAMINA_TLS_SERVER_NAME");
  security.token_file = value("LAMINA_TOKEN_FILE");
  return security;
}

}  // namespace lamina::client
