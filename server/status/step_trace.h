// The last steps as a trace in Chrome's JSON form, which Perfetto (ui.perfetto.dev) and
// chrome://tracing open.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/metrics/step_log.h"

namespace lamina {

// A row "device" with a slice a step and its input, compute and output below; a row "queue" with
// each call's wait, where waits may overlap. A slice's arguments say stack, session, samples,
// tokens, FLOP/s, request and trace. Times are microseconds since the first event; `otherData` has
// that one's Unix time. `steps` in the order of their numbers.
std::string StepTrace(const std::vector<StepRecord>& steps, const std::string& title);

// The folder where WriteStepTrace will put files.
std::string FolderOfProfile(const std::string& path);

// Writes that of all steps that `log` remembers: to the file `path`, or, where that is a folder, to
// laminad-PID-STEP.json in it, STEP being the last one's number. A file of that name is replaced at
// once or not at all. Answers with the file's path; UNAVAILABLE: it can't be written.
absl::StatusOr<std::string> WriteStepTrace(const StepLog& log, const std::string& path,
                                           const std::string& title);

}  // namespace lamina
