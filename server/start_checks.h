// What can be known to go wrong before anything listens or a device is touched.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace lamina {

// Writes a file into the folder, as a checkpoint or a profile would, and removes it.
// FAILED_PRECONDITION, as "WHAT: why": the folder is missing, is none, can't be written, or its
// disk is full.
absl::Status CheckFolder(const std::string& what, const std::string& folder);

// Whether all these can be listened on: "unix:PATH" and "HOST:PORT". TCP ports are bound and given
// back; somebody may still take one before the daemon does, which then fails as any bind.
// UNAVAILABLE: one is in use or not this machine's, or two are the same. INVALID_ARGUMENT: a
// socket's path.
absl::Status CheckAddresses(const std::vector<std::string>& addresses);

}  // namespace lamina
