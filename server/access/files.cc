#include "server/access/files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace lamina {
namespace {

constexpr size_t kLargest = size_t{1} << 20;

}  // namespace

absl::StatusOr<std::string> ReadAccessFile(const std::string& what, const std::string& path,
                                           Secrecy secrecy) {
  const auto fail = [&](const std::string& why) {
    return absl::FailedPreconditionError(absl::StrCat(what, " ", path, ": ", why));
  };
  // Not to be held up by a pipe.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return fail(std::strerror(errno));
  const absl::Cleanup closing = [fd] { close(fd); };
  struct stat found {};
  if (fstat(fd, &found) != 0) return fail(std::strerror(errno));
  if (!S_ISREG(found.st_mode)) return fail("is not a regular file");
  if (secrecy == Secrecy::kSecret) {
    const auto mode = static_cast<unsigned>(found.st_mode & 0777);
    if ((mode & 0027) != 0) {
      return fail(absl::StrFormat(
          "is a secret, and its mode %04o lets others read it or change it; chmod it to 0600, or "
          "to 0640 for a group",
          mode));
    }
    if (found.st_uid != 0 && found.st_uid != geteuid()) {
      return fail(absl::StrCat("belongs to UID ", found.st_uid, "; it must be root's or UID ",
                               geteuid(), "'s, who runs the daemon"));
    }
  }
  std::string content;
  char part[4096];
  for (;;) {
    const ssize_t got = read(fd, part, sizeof(part));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail(std::strerror(errno));
    if (got == 0) break;
    content.append(part, static_cast<size_t>(got));
    if (content.size() > kLargest) return fail(absl::StrCat("is larger than ", kLargest, " bytes"));
  }
  return content;
}

bool FileWatch::Stamp::operator==(const Stamp& other) const {
  return device == other.device && inode == other.inode && size == other.size &&
         modified.tv_sec == other.modified.tv_sec && modified.tv_nsec == other.modified.tv_nsec;
}

FileWatch::FileWatch(std::vector<std::string> paths) {
  for (std::string& path : paths) {
    if (!path.empty()) paths_.push_back(std::move(path));
  }
  known_ = last_ = Look();
}

std::vector<FileWatch::Stamp> FileWatch::Look() const {
  std::vector<Stamp> stamps;
  for (const std::string& path : paths_) {
    struct stat found {};
    Stamp stamp;
    if (stat(path.c_str(), &found) == 0) {
      stamp = {.device = found.st_dev,
               .inode = found.st_ino,
               .size = found.st_size,
               .modified = found.st_mtim};
    }
    stamps.push_back(stamp);
  }
  return stamps;
}

bool FileWatch::Changed() {
  std::vector<Stamp> now = Look();
  const bool stands_still = now == last_;
  last_ = std::move(now);
  if (!stands_still || last_ == known_) return false;
  known_ = last_;
  return true;
}

}  // namespace lamina
