#include "cli/read_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lamina::cli {

absl::StatusOr<std::string> ReadFile(const std::string& path, uint64_t most) {
  const auto failed = [&path] {
    return absl::InvalidArgumentError(absl::StrCat("'", path, "': ", std::strerror(errno)));
  };
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  if (file == nullptr) return failed();
  std::string content;
  std::string chunk(size_t{1} << 16, '\0');
  size_t got = 0;
  while ((got = std::fread(chunk.data(), 1, chunk.size(), file.get())) > 0) {
    content.append(chunk, 0, got);
    if (content.size() > most) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", path, "': has more than ", most, " bytes"));
    }
  }
  if (std::ferror(file.get()) != 0) return failed();
  return content;
}

}  // namespace lamina::cli
