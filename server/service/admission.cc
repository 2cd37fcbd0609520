#include "server/service/admission.h"

#include <google/protobuf/descriptor.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <spdlog/spdlog.h>

#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "server/logging.h"
#include "server/service/request_tag.h"
#include "server/service/rpc_metrics.h"

namespace lamina {
namespace {

constexpr const char* kUidProperty = "lamina_uid";
constexpr int64_t kNoUid = -1;

// gRPC's C++ interface gives a processor of calls to listeners with encryption alone, and changes
// certificates only by a watcher that puts up with broken ones; its C interface has neither limit.
// gRPC 1.51 asks credentials for this much.
class CoreCredentials final : public grpc::ServerCredentials {
 public:
  explicit CoreCredentials(grpc_server_credentials* credentials) : credentials_(credentials) {}
  ~CoreCredentials() override { grpc_server_credentials_release(credentials_); }
  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }
  grpc_server_credentials* const credentials_;
};

absl::string_view View(const grpc_slice& slice) {
  return {reinterpret_cast<const char*>(GRPC_SLICE_START_PTR(slice)), GRPC_SLICE_LENGTH(slice)};
}

// Properties of a connection are added by calls on it, which may run side by side, and gRPC has no
// lock for that.
std::mutex& PropertiesMutex() {
  static auto* const mutex = new std::mutex();
  return *mutex;
}

std::optional<uid_t> UidOf(const grpc_auth_context* connection) {
  std::lock_guard<std::mutex> lock(PropertiesMutex());
  grpc_auth_property_iterator it =
      grpc_auth_context_find_properties_by_name(connection, kUidProperty);
  const grpc_auth_property* const property = grpc_auth_property_iterator_next(&it);
  uint32_t uid = 0;
  if (property == nullptr || !absl::SimpleAtoi(property->value, &uid)) return std::nullopt;
  return uid;
}

// Says on the connection whose it is, for CallerOf.
void MarkUid(grpc_auth_context* connection, uid_t uid) {
  std::lock_guard<std::mutex> lock(PropertiesMutex());
  grpc_auth_property_iterator it =
      grpc_auth_context_find_properties_by_name(connection, kUidProperty);
  if (grpc_auth_property_iterator_next(&it) != nullptr) return;
  grpc_auth_context_add_cstring_property(connection, kUidProperty, std::to_string(uid).c_str());
}

// The names of the connection's client certificate, the first being whose sessions it has.
void AddNames(const grpc_auth_context* connection, Presented* presented) {
  constexpr std::pair<const char*, absl::string_view> kKinds[] = {
      {GRPC_PEER_URI_PROPERTY_NAME, "uri"},
      {GRPC_PEER_DNS_PROPERTY_NAME, "dns"},
      {GRPC_PEER_EMAIL_PROPERTY_NAME, "email"},
      {GRPC_X509_CN_PROPERTY_NAME, "cn"}};
  for (const auto& [property_name, kind] : kKinds) {
    grpc_auth_property_iterator it =
        grpc_auth_context_find_properties_by_name(connection, property_name);
    while (const grpc_auth_property* property = grpc_auth_property_iterator_next(&it)) {
      presented->names.emplace_back(kind,
                                    absl::string_view(property->value, property->value_length));
    }
  }
}

// A call's headers of that name. They live with the call.
std::vector<absl::string_view> AuthorizationOf(const grpc::ServerContextBase& context) {
  std::vector<absl::string_view> values;
  const auto [begin, end] = context.client_metadata().equal_range("authorization");
  for (auto it = begin; it != end; ++it) values.emplace_back(it->second.data(), it->second.size());
  return values;
}

// What a call shows of its caller: over a Unix socket the connection's user and nothing else.
Presented PresentedBy(const grpc_auth_context* connection,
                      std::vector<absl::string_view> authorization) {
  Presented presented;
  presented.uid = UidOf(connection);
  if (presented.uid) return presented;
  AddNames(connection, &presented);
  presented.authorization = std::move(authorization);
  return presented;
}

const char* TypeOf(const google::protobuf::MethodDescriptor& method) {
  if (method.client_streaming()) return method.server_streaming() ? "bidi_stream" : "client_stream";
  return method.server_streaming() ? "server_stream" : "unary";
}

// A denied call never meets the interceptor that counts calls.
void CountDenied(MetricSet& metrics, absl::string_view path, absl::StatusCode code) {
  if (!DemandOf(path)) return;  // only names that the daemon has become labels
  const std::string name = absl::StrReplaceAll(path.substr(1), {{"/", "."}});
  const auto* const method =
      google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(name);
  if (method == nullptr) return;
  RpcMethodMetrics& rpc =
      metrics.Rpc(method->service()->full_name(), method->name(), TypeOf(*method));
  rpc.Started();
  rpc.Handled(static_cast<int>(code), 0);
}

}  // namespace

// What Process knows besides the call; one for each credentials, which free it.
struct Admission::Listener {
  Admission& admission;
  int64_t uid;
};

struct Admission::Stream {
  grpc_call* call;
  std::string path;
  std::vector<std::string> authorization;
};

Admission::Admission(const Access& access, MetricSet& metrics)
    : access_(access), metrics_(metrics) {}
Admission::~Admission() = default;

void Admission::Process(void* listener, grpc_auth_context* connection,
                        const grpc_metadata* metadata, size_t count,
                        grpc_process_auth_metadata_done_cb done, void* user_data) {
  OrderedByGrpc();
  auto& [admission, uid] = *static_cast<Listener*>(listener);
  std::vector<absl::string_view> authorization;
  absl::string_view path;
  std::string request_id;
  for (size_t i = 0; i < count; ++i) {
    const absl::string_view key = View(metadata[i].key);
    if (key == ":path") path = View(metadata[i].value);
    if (key == kRequestIdKey) request_id = std::string(View(metadata[i].value));
    if (key == "authorization") authorization.push_back(View(metadata[i].value));
  }
  if (uid != kNoUid) MarkUid(connection, static_cast<uid_t>(uid));
  const absl::Status status =
      admission.access_.Admit(path, PresentedBy(connection, std::move(authorization)));
  if (status.ok()) {
    done(user_data, nullptr, 0, nullptr, 0, GRPC_STATUS_OK, nullptr);
    return;
  }
  CountDenied(admission.metrics_, path, status.code());
  // gRPC sends no metadata with this answer, so the request's id is among the words.
  if (!IsRequestId(request_id)) request_id = NewRequestId();
  CallControl control;
  control.request_id = request_id;
  LogFailure(DemandOf(path) ? path : "unknown", status.code(), status.message(), control);
  const std::string words = absl::StrCat(status.message(), " (request ", request_id, ")");
  // The codes have the same numbers. The words are copied.
  done(user_data, nullptr, 0, nullptr, 0, static_cast<grpc_status_code>(status.raw_code()),
       words.c_str());
}

std::shared_ptr<grpc::ServerCredentials> Admission::With(grpc_server_credentials* credentials,
                                                         int64_t uid) {
  grpc_server_credentials_set_auth_metadata_processor(
      credentials, {.process = Process,
                    .destroy = [](void* listener) { delete static_cast<Listener*>(listener); },
                    .state = new Listener{*this, uid}});
  return std::make_shared<CoreCredentials>(credentials);
}

std::shared_ptr<grpc::ServerCredentials> Admission::Plain() {
  return With(grpc_insecure_server_credentials_create(), kNoUid);
}

std::shared_ptr<grpc::ServerCredentials> Admission::Local(uid_t uid) {
  return With(grpc_insecure_server_credentials_create(), static_cast<int64_t>(uid));
}

std::shared_ptr<grpc::ServerCredentials> Admission::Tls(const TlsFiles& files) {
  // gRPC asks at each new connection, one at a time, whether there is something new.
  struct Source {
    const TlsFiles& files;
    uint64_t given = 0;
  };
  const auto fetch = [](void* source, grpc_ssl_server_certificate_config** config) {
    auto& [tls, given] = *static_cast<Source*>(source);
    const std::shared_ptr<const TlsMaterial> material = tls.material();
    if (material->version == given) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair{.private_key = material->key.c_str(),
                                          .cert_chain = material->certificate.c_str()};
    // gRPC insists on authorities for clients' certificates, also where it asks for none of those.
    const std::string& authorities =
        material->client_ca.empty() ? material->certificate : material->client_ca;
    *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
    given = material->version;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  };
  // Who has no certificate may still have a token, where there are any: Access decides.
  const auto request = files.options().client_ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                       : access_.takes_tokens()
                           ? GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_AND_VERIFY
                           : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  const auto source = std::make_shared<Source>(Source{files});  // one for each address
  sources_.push_back(source);
  return With(grpc_ssl_server_credentials_create_with_options(
                  grpc_ssl_server_credentials_create_options_using_config_fetcher(request, fetch,
                                                                                  source.get())),
              kNoUid);
}

// Lives as long as its call.
class OpenStream final : public grpc::experimental::Interceptor {
 public:
  OpenStream(Admission& admission, const grpc::experimental::ServerRpcInfo& info,
             grpc::ServerContextBase& context)
      : admission_(admission) {
    Admission::Stream stream{context.c_call(), info.method(), {}};
    grpc_call_ref(stream.call);
    for (const absl::string_view value : AuthorizationOf(context)) {
      stream.authorization.emplace_back(value);
    }
    std::lock_guard<std::mutex> lock(admission_.mutex_);
    entry_ = admission_.streams_.insert(admission_.streams_.end(), std::move(stream));
  }

  ~OpenStream() override {
    grpc_call* const call = entry_->call;
    {
      std::lock_guard<std::mutex> lock(admission_.mutex_);
      admission_.streams_.erase(entry_);
    }
    grpc_call_unref(call);
  }

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    methods->Proceed();
  }

 private:
  Admission& admission_;
  std::list<Admission::Stream>::iterator entry_;
};

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> Admission::StreamWatch() {
  class Factory final : public grpc::experimental::ServerInterceptorFactoryInterface {
   public:
    explicit Factory(Admission& admission) : admission_(admission) {}
    grpc::experimental::Interceptor* CreateServerInterceptor(
        grpc::experimental::ServerRpcInfo* info) override {
      using Type = grpc::experimental::ServerRpcInfo::Type;
      if (info->type() == Type::UNARY || info->server_context()->c_call() == nullptr) {
        return nullptr;
      }
      return new OpenStream(admission_, *info, *info->server_context());
    }

   private:
    Admission& admission_;
  };
  return std::make_unique<Factory>(*this);
}

void Admission::LookAgain() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Stream& stream : streams_) {
    grpc_auth_context* const connection = grpc_call_auth_context(stream.call);
    const absl::Status status = access_.Admit(
        stream.path,
        PresentedBy(connection, {stream.authorization.begin(), stream.authorization.end()}));
    grpc_auth_context_release(connection);
    if (status.ok()) continue;
    spdlog::info("event=stream_ended path={} reason={}", Quoted(stream.path),
                 Quoted(status.message()));
    grpc_call_cancel_with_status(stream.call, static_cast<grpc_status_code>(status.raw_code()),
                                 std::string(status.message()).c_str(), nullptr);
  }
}

std::string CallerOf(const Access& access, grpc::ServerContextBase* context) {
  grpc_auth_context* const connection = grpc_call_auth_context(context->c_call());
  const auto caller = access.Identify(PresentedBy(connection, AuthorizationOf(*context)));
  grpc_auth_context_release(connection);
  return caller.ok() ? caller->identity : "";
}

absl::Status CheckThatAllHaveRoles(const std::vector<std::string>& services) {
  for (const std::string& name : services) {
    const auto* const service =
        google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(name);
    if (service == nullptr) return absl::InternalError(absl::StrCat(name, " is not described"));
    for (int i = 0; i < service->method_count(); ++i) {
      const std::string path = absl::StrCat("/", name, "/", service->method(i)->name());
      if (!DemandOf(path)) {
        return absl::InternalError(absl::StrCat(path, " has no entry in the table of roles"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace lamina
