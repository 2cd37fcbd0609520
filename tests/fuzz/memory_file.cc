#include "tests/fuzz/memory_file.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "tests/fuzz/target.h"

namespace lamina::fuzz {

MemoryFile::MemoryFile(absl::string_view bytes, mode_t mode)
    : descriptor_(memfd_create("input", MFD_CLOEXEC)) {
  if (write(descriptor_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()) ||
      fchmod(descriptor_, mode) != 0)
    Broken("the rig can write a file");
}

MemoryFile::~MemoryFile() { close(descriptor_); }

std::string MemoryFile::path() const { return absl::StrCat("/proc/self/fd/", descriptor_); }

}  // namespace lamina::fuzz
