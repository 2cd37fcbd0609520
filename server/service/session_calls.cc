#include "server/service/session_calls.h"

#include <spdlog/spdlog.h>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

void Fill(const Region& region, v1::Region* out) {
  out->set_region_id(region.id());
  out->set_kind(v1::REGION_KIND_MEMFD);
  out->set_length_bytes(region.length());
  out->set_registered(region.registered());
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
  const double granted = absl::ToDoubleSeconds(opened->session->resume_grace());
  response->set_resume_grace_seconds(granted);
  spdlog::info("event=session_opened session={} client=\"{}\" resume_grace_seconds={}",
               opened->session->key(), absl::CEscape(opened->session->client_name()), granted);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::DeleteSessionRequest& request,
                     const CallControl& control, v1::DeleteSessionResponse*) {
  return state.sessions.Delete(request.session_id(), control.caller);
}

absl::Status RunCall(SharedState& state, const v1::CreateRegionRequest& request, const CallControl& control,
                     v1::CreateRegionResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  switch (request.kind()) {
    case v1::REGION_KIND_UNSPECIFIED:
    case v1::REGION_KIND_MEMFD:
      break;
    case v1::REGION_KIND_DEVICE:
      return absl::UnimplementedError(
          "kind: REGION_KIND_DEVICE is not offered by this version; use MEMFD");
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("kind: ", static_cast<int>(request.kind()), " must be REGION_KIND_MEMFD"));
  }
  auto region = (*session)->CreateRegion(request.size_bytes());
  if (!region.ok()) return region.status();
  Fill(**region, response->mutable_region());
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::ListRegionsRequest& request, const CallControl& control,
                     v1::ListRegionsResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  for (const auto& region : (*session)->ListRegions()) Fill(*region, response->add_regions());
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::ReleaseRegionRequest& request,
                     const CallControl& control, v1::ReleaseRegionResponse*) {
  auto session = state.sessions.Find(request.session_id(), control.caller);
  if (!session.ok()) return session.status();
  return (*session)->ReleaseRegion(request.region_id());
}

}  // namespace lamina
