// What is fuzzed: each target hands one input to a part of Lamina that takes bytes from outside.
//
// The same entry is called by libFuzzer (fuzz_main.cc, `scripts/fuzz`) and by the tests, which
// replay the corpus. An input that breaks a promise aborts the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"

namespace lamina::fuzz {

struct Target {
  std::string name;   // "forward"
  std::string about;  // for people, one line
  // Inputs are this message in protobuf's text format; null: plain bytes.
  const google::protobuf::Message* form = nullptr;
  // Takes any input; one that is no input of this target is passed over. One at a time.
  std::function<void(absl::string_view input)> run;
};

// One for each RPC, then the rest. They share one daemon in this process, which is made by the
// first target that needs it.
const std::vector<Target>& Targets();

// By room, in the order of Targets.
std::vector<Target> MessageTargets();  // message_targets.cc: every RPC, and sequences of them
std::vector<Target> BrokerTargets();   // broker_target.cc
std::vector<Target> FileTargets();     // file_targets.cc
std::vector<Target> AccessTargets();   // access_targets.cc: the files that decide about access

// Says which promise was broken, and aborts.
[[noreturn]] void Broken(absl::string_view promise);

}  // namespace lamina::fuzz
