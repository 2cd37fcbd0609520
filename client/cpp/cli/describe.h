// The library's values as JSON and as text.
#pragma once

#include <string>

#include "lamina/client.h"
#include "nlohmann/json_fwd.hpp"

namespace lamina::cli {

nlohmann::json ToJson(const client::MemoryPlan& plan);
nlohmann::json ToJson(const client::PlanResult& result);
nlohmann::json ToJson(const client::ServerInfo& info);
nlohmann::json ToJson(const client::StackInfo& info);
nlohmann::json ToJson(const client::StepTiming& timing);

// Two tables: bytes by kind, bytes by buffer.
std::string PlanText(const client::MemoryPlan& plan);
std::string StackText(const client::StackInfo& info);
std::string TimingText(const client::StepTiming& timing);

}  // namespace lamina::cli
