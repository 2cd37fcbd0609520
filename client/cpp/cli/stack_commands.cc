// Commands about stacks and their parameters.
#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/describe.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

int PrintStack(const GlobalOptions& options, const absl::StatusOr<client::StackInfo>& info) {
  if (!info.ok()) return Fail(options, info.status());
  if (options.json) {
    PrintJson(ToJson(*info));
  } else {
    PrintText(StackText(*info));
  }
  return kOk;
}

}  // namespace

int CreateStack(const GlobalOptions& options, const std::string& name,
                const client::StackConfig& config) {
  return WithClient(options, [&](const client::Client& daemon) {
    return PrintStack(options, daemon.CreateStack(name, config));
  });
}

int ShowStack(const GlobalOptions& options, const std::string& name) {
  return WithClient(options, [&](const client::Client& daemon) {
    return PrintStack(options, daemon.GetStack(name));
  });
}

int UpdateStack(const GlobalOptions& options, const std::string& name,
                const client::StackUpdate& update) {
  return WithClient(options, [&](const client::Client& daemon) {
    return PrintStack(options, daemon.UpdateStack(name, update));
  });
}

int ListStacks(const GlobalOptions& options) {
  return WithClient(options, [&](const client::Client& daemon) {
    const absl::StatusOr<std::vector<client::StackInfo>> stacks = daemon.ListStacks();
    if (!stacks.ok()) return Fail(options, stacks.status());
    if (options.json) {
      nlohmann::json json = {{"stacks", nlohmann::json::array()}};
      for (const client::StackInfo& info : *stacks) json["stacks"].push_back(ToJson(info));
      PrintJson(json);
      return static_cast<int>(kOk);
    }
    if (stacks->empty()) {
      PrintText("no stacks; make one with: lamina stack create NAME --config FILE");
      return static_cast<int>(kOk);
    }
    Table table({"NAME", "L", "H", "A", "I", "DTYPE", "B", "S", "TRAINING", "PARAMETERS", "MEMORY",
                 "STEPS", "CONTEXTS"});
    for (const client::StackInfo& info : *stacks) {
      const client::StackConfig& config = info.config;
      table.Add({info.name, std::to_string(config.num_hidden_layers),
                 std::to_string(config.hidden_size), std::to_string(config.heads),
                 std::to_string(config.intermediate_size), client::Name(config.dtype),
                 std::to_string(config.batch_size), std::to_string(config.max_seq_length),
                 config.training ? "on" : "off", HumanCount(info.parameter_count),
                 HumanBytes(info.plan.total_bytes), HumanCount(info.step),
                 std::to_string(info.outstanding_contexts)});
    }
    PrintText(table.Text());
    return static_cast<int>(kOk);
  });
}

int DeleteStack(const GlobalOptions& options, const std::string& name) {
  return WithClient(options, [&](const client::Client& daemon) {
    if (absl::Status status = daemon.DeleteStack(name); !status.ok()) return Fail(options, status);
    if (options.json) {
      PrintJson(nlohmann::json{{"deleted", name}});
    } else {
      PrintText(absl::StrCat("deleted '", name, "'"));
    }
    return static_cast<int>(kOk);
  });
}

int ListParameters(const GlobalOptions& options, const std::string& stack) {
  return WithClient(options, [&](const client::Client& daemon) {
    const absl::StatusOr<client::StackInfo> info = daemon.GetStack(stack);
    if (!info.ok()) return Fail(options, info.status());
    if (options.json) {
      nlohmann::json json = {{"stack", stack},
                             {"parameter_count", info->parameter_count},
                             {"parameters", nlohmann::json::array()}};
      for (const client::ParameterInfo& parameter : info->parameters) {
        json["parameters"].push_back({{"name", parameter.name}, {"shape", parameter.shape}});
      }
      PrintJson(json);
      return static_cast<int>(kOk);
    }
    Table table({"NAME", "SHAPE", "VALUES"});
    for (const client::ParameterInfo& parameter : info->parameters) {
      int64_t values = 1;
      for (const int64_t extent : parameter.shape) values *= extent;
      table.Add({parameter.name, client::ToString(parameter.shape), HumanCount(values)});
    }
    table.Add({"total", "", HumanCount(info->parameter_count)});
    PrintText(table.Text());
    return static_cast<int>(kOk);
  });
}

}  // namespace lamina::cli
