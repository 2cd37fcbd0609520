// A file in memory that holds an input, by a path: for readers that take paths.
#pragma once

#include <sys/types.h>

#include <string>

#include "absl/strings/string_view.h"

namespace lamina::fuzz {

class MemoryFile {
 public:
  explicit MemoryFile(absl::string_view bytes, mode_t mode = 0700);
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const;

 private:
  const int descriptor_;
};

}  // namespace lamina::fuzz
