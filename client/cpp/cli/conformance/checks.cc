#include "cli/conformance/checks.h"

namespace lamina::conformance {

std::vector<Group> AllChecks() {
  return {ServiceChecks(), StackChecks(),   ParameterChecks(),   CheckpointChecks(),
          StepChecks(),    HandleChecks(),  ExactlyOnceChecks(), SessionChecks(),
          ExecuteChecks(), NumericsChecks()};
}

}  // namespace lamina::conformance
