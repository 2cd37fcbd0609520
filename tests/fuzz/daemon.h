// The daemon's rooms in this process, without its sockets: what the targets hand requests to.
//
// One engine on the CPU backend lives as long as the process; sessions, regions and contexts live
// for one input. Three small stacks are always there: "s" (fp32, Pre-LN, dropout), "h" (bf16,
// Post-LN, dynamic loss scale, activation checkpointing) and "e" (fp16, causal, no training), each
// of B 2, S 4, H 8, A 2, I 16, L 2, and a checkpoint of each. What an input made of them is undone,
// but for weights, which live on for some inputs.
// The device has little memory, so that a plan above it is refused as on a full one.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"
#include "grpcpp/grpcpp.h"
#include "server/engine/engine.h"
#include "server/metrics/metrics.h"
#include "server/service/layer_service.h"
#include "server/service/session_service.h"
#include "server/service/shared_state.h"
#include "server/service/workers.h"
#include "server/session/session_manager.h"
#include "tests/fuzz/calls.pb.h"
#include "tests/transformer/counting_backend.h"

namespace lamina::fuzz {

class Daemon {
 public:
  // This process's; made at the first call. It is never destroyed.
  static Daemon& Get();

  // Ends an input's life: all its sessions are deleted. Then nothing of them may be left, and the
  // engine must be well: else Broken.
  void End();

  // Replaces the ids "live" and "other" in all fields for ids: the latest session, region or
  // context and the one before it. Makes the session, a region of 64 KiB or a context of "s" where
  // there is none yet.
  void Bind(google::protobuf::Message* message);

  // Runs a bound request in its handler: any request of an RPC, or a fuzz.ExecuteStream. Broken
  // where a handler answers INTERNAL or UNKNOWN, throws, or tells a capability.
  absl::Status Call(const google::protobuf::Message& request);
  // Opens a KeepAlive stream through gRPC and sends these.
  void KeepAlive(const KeepAliveStream& stream);

  SessionManager& sessions() { return *sessions_; }
  // Calls, and calls within a stream, that were answered with OK so far.
  int64_t answered_ok() const { return answered_ok_; }
  const std::string& checkpoints() const { return checkpoints_; }
  // The latest session and its latest region; made where there is none.
  std::string SessionId();
  std::string RegionId();

 private:
  struct Client {
    std::string id;
    std::vector<std::string> regions, contexts;
  };
  using Handler = std::function<absl::Status(const google::protobuf::Message&)>;

  Daemon();
  void CreateStack(const std::string& name);
  void AddHandlers();
  template <typename Request, typename Response>
  void Add();
  void Serve();  // starts the server, where none runs
  // The other way round; returns when no stream is left.
  void StopServing();
  absl::Status Execute(const ExecuteStream& stream);
  // What later requests can name, and what is to be undone.
  void Note(const google::protobuf::Message& request, const google::protobuf::Message& response);
  void NoteContext(const v1::ForwardRequest& request, const v1::ForwardResponse& response);
  void Check(const absl::Status& status);
  std::string Bound(const std::string& field, const std::string& value);
  void RestoreStacks();
  void SetFreeBytes();

  std::string checkpoints_;
  MetricSet metrics_;
  testing::CountingBackend* backend_ = nullptr;
  std::unique_ptr<Engine> engine_;
  MutationLogs mutations_;
  std::unique_ptr<SessionManager> sessions_;
  Gate gate_;
  std::unique_ptr<Access> access_;
  std::unique_ptr<SharedState> state_;
  std::map<const google::protobuf::Descriptor*, Handler> handlers_;
  // For streams, which are handled by gRPC's callbacks.
  Workers workers_;
  std::unique_ptr<LayerServiceImpl> layer_;
  std::unique_ptr<SessionServiceImpl> session_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::LayerService::Stub> layer_stub_;
  std::unique_ptr<v1::SessionService::Stub> session_stub_;
  int64_t answered_ok_ = 0;
  int64_t inputs_ = 0;
  // --- of one input ---
  std::vector<Client> clients_;
  std::set<std::string> changed_;  // stacks
  std::set<std::string> saved_;    // paths of checkpoints
  bool contexts_made_ = false;
};

}  // namespace lamina::fuzz
