// Small files that decide about access: read with care, and looked at again for changes.
#pragma once

#include <sys/stat.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace lamina {

// Whether a file's content is a secret.
enum class Secrecy : uint8_t { kPublic, kSecret };

// The whole file. FAILED_PRECONDITION, as "WHAT PATH: why": it is missing, unreadable, no file,
// larger than 1 MiB; or it is secret, and others than owner and group may read it or others than
// the owner may write it. Links are followed.
absl::StatusOr<std::string> ReadAccessFile(const std::string& what, const std::string& path,
                                           Secrecy secrecy);

// Notices that files changed, by what the file system says about them. A change counts once it has
// stood still from one look to the next: who replaces two files needs a moment between them.
// Threads: one at a time.
class FileWatch {
 public:
  // Takes the files as they are now for known. Empty paths are left out.
  explicit FileWatch(std::vector<std::string> paths);

  // True once for each change.
  bool Changed();

 private:
  struct Stamp {
    dev_t device = 0;
    ino_t inode = 0;
    off_t size = -1;  // -1: there is none
    timespec modified{};
    bool operator==(const Stamp& other) const;
  };
  std::vector<Stamp> Look() const;

  std::vector<std::string> paths_;
  std::vector<Stamp> known_, last_;
};

}  // namespace lamina
