// What callers may do: roles, and which of them each RPC asks for. This table is the whole policy.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace lamina {

// A set of roles, as bits.
using Roles = uint8_t;
inline constexpr Roles kNoRole = 0;
inline constexpr Roles kReadOnly = 1;  // information, plans, lists, health
inline constexpr Roles kOperator = 2;  // stacks, checkpoints, parameters
inline constexpr Roles kTrainer = 4;   // sessions, steps, and what steps need
inline constexpr Roles kAllRoles = kReadOnly | kOperator | kTrainer;

// What an RPC asks for.
struct Demand {
  bool open = false;         // of nobody anything: for probes
  Roles any_of = kAllRoles;  // one of these roles will do
};

// By an RPC's path, "/lamina.v1.LayerService/Forward". Nothing for one that the daemon does not
// have; GrpcServer starts only if each that it has is here.
std::optional<Demand> DemandOf(absl::string_view path);

// "operator,trainer", or "all", as the roles file has them; nothing where a word is no role.
std::optional<Roles> ParseRoles(absl::string_view text);
// "operator and trainer"; "none".
std::string Describe(Roles roles, absl::string_view joint);

}  // namespace lamina
