// A stack's config on the command line: --config FILE, and a flag a field that overrides it.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "lamina/client/types.h"
#include "nlohmann/json_fwd.hpp"

namespace CLI {
class App;
}

namespace lamina::cli {

class ConfigFlags {
 public:
  ConfigFlags();
  ~ConfigFlags();
  // Adds the options to a command; this must outlive its parsing.
  void AddTo(CLI::App* command);
  // What was given. INVALID_ARGUMENT: the file, or nothing was given at all.
  absl::StatusOr<client::StackConfig> Resolve() const;
  // The same over fields that are known already, and then nothing need be given.
  absl::StatusOr<client::StackConfig> ResolveOver(nlohmann::json fields) const;

 private:
  struct Given;
  std::unique_ptr<Given> given_;
};

}  // namespace lamina::cli
