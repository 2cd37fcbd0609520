#include "server/access/roles.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace lamina {
namespace {

constexpr Roles kSomeRole = kAllRoles;
constexpr Roles kWorker = kOperator | kTrainer;

struct Entry {
  absl::string_view path;
  Demand demand;
};

constexpr Demand Open() { return {.open = true, .any_of = kSomeRole}; }
constexpr Demand Needs(Roles any_of) { return {.open = false, .any_of = any_of}; }

constexpr Entry kTable[] = {
    // Without it a probe would need a secret. It says whether the daemon serves, and no more.
    {"/grpc.health.v1.Health/Check", Open()},
    {"/grpc.health.v1.Health/Watch", Needs(kSomeRole)},
    {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Needs(kSomeRole)},
    // Shows the addresses of all who are connected.
    {"/grpc.channelz.v1.Channelz/GetTopChannels", Needs(kOperator)},
    {"/grpc.channelz.v1.Channelz/GetServers", Needs(kOperator)},
    {"/grpc.channelz.v1.Channelz/GetServer", Needs(kOperator)},
    {"/grpc.channelz.v1.Channelz/GetServerSockets", Needs(kOperator)},
    {"/grpc.channelz.v1.Channelz/GetChannel", Needs(kOperator)},
    {"/grpc.channelz.v1.Channelz/GetSubchannel", Needs(kOperator)},
    {"/grpc.channelz.v1.Channelz/GetSocket", Needs(kOperator)},

    {"/lamina.v1.ConfigService/GetServerInfo", Needs(kSomeRole)},
    {"/lamina.v1.ConfigService/GetStack", Needs(kSomeRole)},
    {"/lamina.v1.ConfigService/ListStacks", Needs(kSomeRole)},
    {"/lamina.v1.ConfigService/PlanMemory", Needs(kSomeRole)},
    {"/lamina.v1.ConfigService/CreateStack", Needs(kOperator)},
    {"/lamina.v1.ConfigService/UpdateStack", Needs(kOperator)},
    {"/lamina.v1.ConfigService/DeleteStack", Needs(kOperator)},
    {"/lamina.v1.ConfigService/SaveCheckpoint", Needs(kOperator)},
    {"/lamina.v1.ConfigService/LoadCheckpoint", Needs(kOperator)},
    {"/lamina.v1.ConfigService/SetParameters", Needs(kOperator)},
    // Weights are what a run is worth: not for those who only look on.
    {"/lamina.v1.ConfigService/GetParameters", Needs(kWorker)},
    {"/lamina.v1.ConfigService/StreamParameters", Needs(kWorker)},
    {"/lamina.v1.ConfigService/GetGradients", Needs(kWorker)},

    // An operator's SetParameters is a mutation, which needs a session and may use regions.
    {"/lamina.v1.SessionService/CreateSession", Needs(kWorker)},
    {"/lamina.v1.SessionService/KeepAlive", Needs(kWorker)},
    {"/lamina.v1.SessionService/DeleteSession", Needs(kWorker)},
    {"/lamina.v1.SessionService/CreateRegion", Needs(kWorker)},
    {"/lamina.v1.SessionService/ListRegions", Needs(kWorker)},
    {"/lamina.v1.SessionService/ReleaseRegion", Needs(kWorker)},

    {"/lamina.v1.LayerService/Forward", Needs(kTrainer)},
    {"/lamina.v1.LayerService/Backward", Needs(kTrainer)},
    {"/lamina.v1.LayerService/ApplyGradients", Needs(kTrainer)},
    {"/lamina.v1.LayerService/ZeroGradients", Needs(kTrainer)},
    {"/lamina.v1.LayerService/ReleaseContext", Needs(kTrainer)},
    {"/lamina.v1.LayerService/Execute", Needs(kTrainer)},
};

constexpr std::array<std::pair<absl::string_view, Roles>, 4> kNames = {
    {{"read-only", kReadOnly}, {"operator", kOperator}, {"trainer", kTrainer}, {"all", kAllRoles}}};

}  // namespace

std::optional<Demand> DemandOf(absl::string_view path) {
  static const auto* const table = [] {
    auto* map = new absl::flat_hash_map<absl::string_view, Demand>();
    for (const Entry& entry : kTable) map->emplace(entry.path, entry.demand);
    return map;
  }();
  const auto found = table->find(path);
  if (found == table->end()) return std::nullopt;
  return found->second;
}

std::optional<Roles> ParseRoles(absl::string_view text) {
  Roles roles = kNoRole;
  for (const absl::string_view word : absl::StrSplit(text, ',')) {
    const auto* const found = std::find_if(kNames.begin(), kNames.end(),
                                           [&](const auto& name) { return name.first == word; });
    if (found == kNames.end()) return std::nullopt;
    roles |= found->second;
  }
  return roles;
}

std::string Describe(Roles roles, absl::string_view joint) {
  std::vector<absl::string_view> words;
  for (const auto& [name, role] : kNames) {
    if (role != kAllRoles && (roles & role) != 0) words.push_back(name);
  }
  return words.empty() ? "none" : absl::StrJoin(words, joint);
}

}  // namespace lamina
