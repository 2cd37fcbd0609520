#include "src/session_core.h"

#include <utility>

#include "src/broker.h"
#include "src/storage.h"

namespace lamina::client::internal {
namespace {

// A dying session must not hold its owner up for long: the lease ends it anyway.
constexpr std::chrono::seconds kFarewell{2};
// What a session over TCP asks for: the network may break its connection. A Unix socket breaks with
// its process alone, whose memory should be free at once.
constexpr std::chrono::seconds kResumeGrace{10};

class MappedRegion : public Storage {
 public:
  MappedRegion(Mapping mapping, std::string region_id, std::shared_ptr<SessionCore> session)
      : Storage(mapping.data(), mapping.length(), std::move(region_id), session.get()),
        mapping_(std::move(mapping)),
        session_(session) {}
  ~MappedRegion() override {
    if (std::shared_ptr<SessionCore> session = session_.lock()) session->ReleaseRegion(region_id());
  }

 private:
  Mapping mapping_;
  std::weak_ptr<SessionCore> session_;
};

}  // namespace

SessionCore::SessionCore(std::shared_ptr<Connection> connection, SessionOptions options)
    : connection_(std::move(connection)), options_(std::move(options)) {
  if (options_.transport == TransportPolicy::kInline) {
    inline_only_ = true;
    inline_reason_ = "the session was opened so";
  }
}

SessionCore::~SessionCore() { Close().IgnoreError(); }

absl::StatusOr<std::shared_ptr<SessionCore>> SessionCore::Open(
    std::shared_ptr<Connection> connection, SessionOptions options) {
  std::shared_ptr<SessionCore> core(new SessionCore(std::move(connection), std::move(options)));
  pb::CreateSessionRequest request;
  request.set_client_name(core->options_.client_name);
  if (core->options_.keep_alive) {
    const std::chrono::milliseconds usual =
        core->connection_->on_this_host() ? std::chrono::seconds(0) : kResumeGrace;
    request.set_resume_grace_seconds(
        std::chrono::duration<double>(core->options_.resume_grace.value_or(usual)).count());
  }
  pb::CreateSessionResponse response;
  // One whose answer was lost has no keeper and ends with its lease.
  absl::Status status = core->connection_->Call(core->connection_->sessions(),
                                                &pb::SessionService::Stub::CreateSession, request,
                                                &response, core->options_.retry_budget);
  if (!status.ok()) {
    core->closed_ = true;  // there is nothing to end
    return status;
  }
  core->id_ = response.session_id();
  core->lease_ = std::chrono::duration<double>(response.lease_seconds());
  core->resume_grace_ = std::chrono::duration<double>(response.resume_grace_seconds());
  core->broker_path_ =
      core->options_.broker_path.empty() ? response.broker_path() : core->options_.broker_path;
  if (core->options_.keep_alive) {
    absl::StatusOr<std::shared_ptr<Keeper>> keeper =
        Keeper::Start({.connection = core->connection_,
                       .session_id = core->id_,
                       .lease = core->lease_,
                       .grace = core->resume_grace_,
                       .start_timeout = core->connection_->call_timeout()});
    if (!keeper.ok()) return keeper.status();
    core->keeper_ = *std::move(keeper);
  }
  return core;
}

absl::Status SessionCore::Close() {
  std::shared_ptr<Keeper> keeper;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(closed_, true)) return absl::OkStatus();
    keeper = std::move(keeper_);
  }
  if (keeper != nullptr && !keeper->status().ok()) return absl::OkStatus();  // it is over already
  pb::DeleteSessionRequest request;
  request.set_session_id(id_);
  const auto deadline = std::chrono::system_clock::now() + kFarewell;
  const auto remove = [&](bool wait_for_connection) {
    pb::DeleteSessionResponse response;
    grpc::ClientContext context;
    context.set_deadline(deadline);
    context.set_wait_for_ready(wait_for_connection);
    return ToAbsl(connection_->sessions().DeleteSession(&context, request, &response),
                  connection_->target());
  };
  absl::Status status = remove(false);
  // Where the connection is broken and the session waits for another, so does this, for a moment.
  if (status.code() == absl::StatusCode::kUnavailable && resume_grace_.count() > 0) {
    status = remove(true);
  }
  if (keeper != nullptr) keeper->Stop();
  return status.code() == absl::StatusCode::kNotFound ? absl::OkStatus() : status;
}

absl::Status SessionCore::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return absl::FailedPreconditionError("the session is closed");
  if (keeper_ == nullptr) return absl::OkStatus();
  absl::Status kept = keeper_->status();
  if (kept.ok()) return kept;
  return absl::Status(kept.code(), absl::StrCat("the session's lease ended: ", kept.message()));
}

std::shared_ptr<Keeper> SessionCore::keeper() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return keeper_;
}

uint64_t SessionCore::Breaks() const {
  const std::shared_ptr<Keeper> keeping = keeper();
  return keeping == nullptr ? 0 : keeping->breaks();
}

void SessionCore::Settle() const {
  if (const std::shared_ptr<Keeper> keeping = keeper(); keeping != nullptr) keeping->Settle();
}

bool SessionCore::MayHaveRun(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kInternal:
      return true;
    default:
      return false;
  }
}

absl::Status SessionCore::Explain(absl::Status failed) const {
  if (failed.ok()) return failed;
  const absl::Status over = status();
  if (over.ok()) return failed;
  return absl::Status(failed.code(), absl::StrCat(failed.message(), " (", over.message(), ")"));
}

absl::StatusOr<SessionCore::MadeRegion> SessionCore::TryRegion(size_t bytes, bool* broker_failed) {
  *broker_failed = false;
  if (broker_path_.empty()) {
    *broker_failed = true;
    return absl::UnavailableError("the daemon has no broker socket");
  }
  if (absl::Status over = status(); !over.ok()) return over;
  absl::StatusOr<pb::Region> made = MakeRegion(bytes);
  if (!made.ok()) return Explain(made.status());
  const pb::Region& region = *made;
  BrokerRequest fetch{.path = broker_path_,
                      .session_id = id_,
                      .region_id = region.region_id(),
                      .length = region.length_bytes()};
  if (connection_->call_timeout().count() > 0) fetch.timeout = connection_->call_timeout();
  absl::StatusOr<Mapping> mapping = MapRegion(fetch);
  if (!mapping.ok()) {
    *broker_failed = true;
    ReleaseRegion(region.region_id());
    return mapping.status();
  }
  auto storage =
      std::make_shared<MappedRegion>(*std::move(mapping), region.region_id(), shared_from_this());
  // Pages are a multiple of four bytes, so the whole region can be seen as words.
  absl::StatusOr<Tensor> words =
      Storage::View(storage, DType::kInt32, {static_cast<int64_t>(region.length_bytes() / 4)}, 0);
  if (!words.ok()) return words.status();
  return MadeRegion{.bytes = *std::move(words),
                    .length = region.length_bytes(),
                    .registered = region.registered()};
}

absl::StatusOr<pb::Region> SessionCore::MakeRegion(size_t bytes) {
  pb::CreateRegionRequest request;
  request.set_session_id(id_);
  request.set_kind(pb::REGION_KIND_MEMFD);
  request.set_size_bytes(bytes);
  pb::CreateRegionResponse response;
  bool repeated = false;
  std::lock_guard<std::mutex> making(making_mutex_);
  const absl::Status status = Repeat([&] {
    if (std::exchange(repeated, true)) {
      if (absl::Status released = ReleaseUnheardOf(); !released.ok()) return released;
    }
    return connection_->Call(connection_->sessions(), &pb::SessionService::Stub::CreateRegion,
                             request, &response);
  });
  if (!status.ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  regions_.insert(response.region().region_id());
  return response.region();
}

absl::Status SessionCore::ReleaseUnheardOf() {
  pb::ListRegionsRequest request;
  request.set_session_id(id_);
  pb::ListRegionsResponse listed;
  absl::Status status = connection_->Call(connection_->sessions(),
                                          &pb::SessionService::Stub::ListRegions, request, &listed);
  for (const pb::Region& region : listed.regions()) {
    if (!status.ok()) break;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (regions_.count(region.region_id()) > 0) continue;
    }
    pb::ReleaseRegionRequest release;
    release.set_session_id(id_);
    release.set_region_id(region.region_id());
    pb::ReleaseRegionResponse released;
    status = connection_->Call(connection_->sessions(), &pb::SessionService::Stub::ReleaseRegion,
                               release, &released);
    // One that another thread is giving up just now.
    if (status.code() == absl::StatusCode::kNotFound) status = absl::OkStatus();
  }
  return status;
}

absl::StatusOr<SessionCore::MadeRegion> SessionCore::CreateRegion(size_t bytes) {
  if (options_.transport == TransportPolicy::kInline) {
    return absl::FailedPreconditionError("the session was opened with TransportPolicy::kInline");
  }
  bool broker_failed = false;
  return TryRegion(bytes, &broker_failed);
}

absl::StatusOr<Tensor> SessionCore::NewTensor(DType dtype, Shape shape) {
  absl::StatusOr<size_t> bytes = BytesOf(dtype, shape);
  if (!bytes.ok()) return bytes.status();
  if (transport() == Transport::kInline) return Tensor::Allocate(dtype, std::move(shape));
  bool broker_failed = false;
  absl::StatusOr<MadeRegion> region = TryRegion(*bytes, &broker_failed);
  if (region.ok()) return region->bytes.View(dtype, std::move(shape), 0);
  if (!broker_failed || options_.transport == TransportPolicy::kRegions) return region.status();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    inline_only_ = true;
    inline_reason_ = std::string(region.status().message());
  }
  return Tensor::Allocate(dtype, std::move(shape));
}

Transport SessionCore::transport() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return inline_only_ ? Transport::kInline : Transport::kMemfd;
}

std::string SessionCore::transport_reason() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return inline_reason_;
}

void SessionCore::ReleaseRegion(const std::string& region_id) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    regions_.erase(region_id);
  }
  if (!status().ok()) return;
  pb::ReleaseRegionRequest request;
  request.set_session_id(id_);
  request.set_region_id(region_id);
  Repeat([&] {
    pb::ReleaseRegionResponse response;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kFarewell);
    return ToAbsl(connection_->sessions().ReleaseRegion(&context, request, &response),
                  connection_->target());
  }).IgnoreError();
}

absl::Status SessionCore::ReleaseContext(const std::string& stack, const std::string& context_id) {
  if (!status().ok()) return absl::OkStatus();
  pb::ReleaseContextRequest request;
  request.set_stack(stack);
  request.set_session_id(id_);
  request.set_context_id(context_id);
  int tries = 0;
  const absl::Status released = Repeat([&] {
    ++tries;
    pb::ReleaseContextResponse response;
    return connection_->Call(connection_->layers(), &pb::LayerService::Stub::ReleaseContext,
                             request, &response);
  });
  // An earlier try was heard, if its answer was not.
  if (tries > 1 && released.code() == absl::StatusCode::kNotFound) return absl::OkStatus();
  return released;
}

// --- the turn to mutate ---

void SessionCore::WaitForTurn() {
  std::unique_lock<std::mutex> lock(turn_mutex_);
  turn_passed_.wait(lock, [this] { return !turn_taken_; });
  turn_taken_ = true;
}

void SessionCore::PassTurn() {
  std::lock_guard<std::mutex> lock(turn_mutex_);
  turn_taken_ = false;
  turn_passed_.notify_one();
}

absl::StatusOr<uint64_t> SessionCore::TakeTurn() {
  if (absl::Status over = status(); !over.ok()) return over;
  WaitForTurn();
  if (absl::Status status = FindNextSequence(); !status.ok()) {
    PassTurn();
    return status;
  }
  return next_sequence_;
}

void SessionCore::EndTurn(uint64_t next, size_t lost,
                          std::vector<lamina::v1::ForwardRequest> forwards) {
  next_sequence_ = next;
  lost_ = lost;
  // What stays open is the next mutation's to find out.
  if (FindNextSequence().ok()) {
    for (const lamina::v1::ForwardRequest& forward : forwards) {
      if (forward.mutation().sequence() >= next_sequence_) break;
      // It has run: this is its answer once more, unless the daemon keeps that no longer.
      pb::ForwardResponse response;
      const absl::Status status = Repeat([&] {
        return connection_->Call(connection_->layers(), &pb::LayerService::Stub::Forward, forward,
                                 &response);
      });
      if (status.ok()) ReleaseContext(forward.stack(), response.context_id()).IgnoreError();
    }
  }
  PassTurn();
}

absl::Status SessionCore::FindNextSequence() {
  // A mutation that can't run, whatever the daemon has: it says whether its number was used, and
  // does not use it up.
  pb::ZeroGradientsRequest probe;
  probe.mutable_mutation()->set_session_id(id_);
  while (lost_ > 0) {
    probe.mutable_mutation()->set_sequence(next_sequence_);
    const absl::Status status = Repeat([&] {
      pb::ZeroGradientsResponse response;
      return connection_->Call(connection_->layers(), &pb::LayerService::Stub::ZeroGradients, probe,
                               &response);
    });
    if (MayHaveRun(status.code()) || !this->status().ok()) return Explain(status);
    if (status.code() != absl::StatusCode::kAlreadyExists) {
      lost_ = 0;
      break;
    }
    ++next_sequence_;
    --lost_;
  }
  return absl::OkStatus();
}

}  // namespace lamina::client::internal
