// All checks, a file a group.
#pragma once

#include <vector>

#include "cli/conformance/harness.h"

namespace lamina::conformance {

Group ServiceChecks();      // service_checks.cc: what the daemon says of itself
Group StackChecks();        // stack_checks.cc: ConfigService's stacks and plans
Group ParameterChecks();    // parameter_checks.cc: ConfigService's parameters and gradients
Group CheckpointChecks();   // checkpoint_checks.cc
Group StepChecks();         // step_checks.cc: LayerService's calls one by one
Group HandleChecks();       // handle_checks.cc: regions, slices, the broker
Group ExactlyOnceChecks();  // exactly_once_checks.cc: sequences
Group SessionChecks();      // session_checks.cc: leases
Group ExecuteChecks();      // execute_checks.cc: the stream of calls
Group NumericsChecks();     // numerics_checks.cc: gradients, dropout, packing, training

std::vector<Group> AllChecks();

}  // namespace lamina::conformance
