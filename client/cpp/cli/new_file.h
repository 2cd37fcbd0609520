// A file that appears under its name complete or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lamina::cli {

// Written beside its place, synced and renamed by Commit; the destructor removes what was not
// committed. Errors are INTERNAL with the path and the system's reason.
class NewFile {
 public:
  static absl::StatusOr<NewFile> Create(const std::string& path);
  NewFile(NewFile&& other) noexcept;
  NewFile& operator=(NewFile&& other) noexcept;
  ~NewFile();

  const std::string& path() const { return path_; }
  absl::Status WriteAt(uint64_t offset, const void* data, size_t bytes);
  // Takes the name, also where another file has it.
  absl::Status Commit();

 private:
  NewFile() = default;
  absl::Status Failed(const char* what, int error) const;
  std::string path_, temporary_;  // temporary_ is empty once there is nothing to remove
  int fd_ = -1;
};

}  // namespace lamina::cli
