#include "server/service/session_calls.h"

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "server/logging.h"

namespace lamina {
namespace {

static_assert(static_cast<int>(RegionKind::kMemfd) == v1::REGION_KIND_MEMFD &&
              static_cast<int>(RegionKind::kDevice) == v1::REGION_KIND_DEVICE &&
              static_cast<int>(RegionKind::kDeviceIpc) == v1::REGION_KIND_DEVICE_IPC);

void Fill(const SharedState& state, const Region& region, v1::Region* out) {
  out->set_region_id(region.id());
  out->set_kind(static_cast<v1::RegionKind>(region.kind()));
  out->set_length_bytes(region.length());
  out->set_registered(region.registered());
  if (region.kind() != RegionKind::kMemfd) {
    out->set_device_uuid(state.engine.device().uuid);
    out->set_base_offset_bytes(0);  // memory that is shared is shared with nothing else
  }
}

// The kind that is asked for. INVALID_ARGUMENT, UNIMPLEMENTED.
absl::StatusOr<RegionKind> KindOf(const SharedState& state, v1::RegionKind kind) {
  switch (kind) {
    case v1::REGION_KIND_UNSPECIFIED:
    case v1::REGION_KIND_MEMFD:
      return RegionKind::kMemfd;
    case v1::REGION_KIND_DEVICE:
    case v1::REGION_KIND_DEVICE_IPC:
      if (state.engine.device().host_memory) {
        return absl::UnimplementedError(
            absl::StrCat("kind: ", v1::RegionKind_Name(kind), ": this daemon runs on the ",
                         state.engine.device().kind,
                         " and has no memory but the host's; use REGION_KIND_MEMFD"));
      }
      if (!state.sessions.offers_device_regions()) {
        return absl::UnimplementedError(
            absl::StrCat("kind: ", v1::RegionKind_Name(kind),
                         ": this daemon's cap on device regions is 0 (--device-region-cap-bytes, "
                         "--total-device-region-cap-bytes); use REGION_KIND_MEMFD"));
      }
      return static_cast<RegionKind>(kind);
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "kind: ", static_cast<int>(kind), " must be REGION_KIND_MEMFD, _DEVICE or _DEVICE_IPC"));
  }
}

}  // namespace

absl::Status RunCall(SharedState& state, const v1::CreateSessionRequest& request,
                     const CallControl& control, v1::CreateSessionResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  const double grace = request.resume_grace_seconds();
  if (!(grace >= 0)) {  // nor a number that is none
    return absl::InvalidArgumentError(
        absl::StrCat("resume_grace_seconds: ", grace, " must be at least 0"));
  }
  auto opened = state.sessions.Open(request.client_name(), absl::Seconds(grace), control.caller);
  if (!opened.ok()) return opened.status();
  const SessionOptions& options = state.sessions.options();
  response->set_session_id(opened->id);
  response->set_lease_seconds(absl::ToDoubleSeconds(options.lease));
  response->set_broker_path(state.broker_path);
  response->set_region_cap_bytes(options.region_cap_bytes);
  response->set_region_cap(options.region_cap);
  if (state.sessions.offers_device_regions()) {
    response->set_device_region_cap_bytes(options.device_region_cap_bytes);
  }
  const double granted = absl::ToDoubleSeconds(opened->session->resume_grace());
  response->set_resume_grace_seconds(granted);
  spdlog::info("event=session_opened session={} client={} resume_grace_seconds={}",
               opened->session->key(), Quoted(opened->session->client_name()), granted);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::DeleteSessionRequest& request,
                     const CallControl& control, v1::DeleteSessionResponse*) {
  return state.sessions.Delete(request.session_id(), control.caller);
}

absl::Status RunCall(SharedState& state, const v1::CreateRegionRequest& request,
                     const CallControl& control, v1::CreateRegionResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  const auto kind = KindOf(state, request.kind());
  if (!kind.ok()) return kind.status();
  auto region = (*session)->CreateRegion(request.size_bytes(), *kind);
  if (!region.ok()) return region.status();
  Fill(state, **region, response->mutable_region());
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::ListRegionsRequest& request,
                     const CallControl& control, v1::ListRegionsResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  for (const auto& region : (*session)->ListRegions()) {
    Fill(state, *region, response->add_regions());
  }
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::ReleaseRegionRequest& request,
                     const CallControl& control, v1::ReleaseRegionResponse*) {
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  return (*session)->ReleaseRegion(request.region_id());
}

}  // namespace lamina
