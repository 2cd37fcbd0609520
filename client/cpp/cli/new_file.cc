#include "cli/new_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lamina::cli {

absl::StatusOr<NewFile> NewFile::Create(const std::string& path) {
  NewFile file;
  file.path_ = path;
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  file.fd_ = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file.fd_ < 0) return file.Failed("writing", errno);
  file.temporary_ = temporary;
  return file;
}

NewFile::NewFile(NewFile&& other) noexcept { *this = std::move(other); }

NewFile& NewFile::operator=(NewFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(temporary_, other.temporary_);
  std::swap(fd_, other.fd_);
  return *this;
}

NewFile::~NewFile() {
  if (fd_ >= 0) close(fd_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

absl::Status NewFile::Failed(const char* what, int error) const {
  return absl::InternalError(absl::StrCat(what, " '", path_, "': ", std::strerror(error)));
}

absl::Status NewFile::WriteAt(uint64_t offset, const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = pwrite(fd_, from, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return Failed("writing", n == 0 ? ENOSPC : errno);
    from += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status NewFile::Commit() {
  if (fsync(fd_) != 0) return Failed("writing", errno);
  if (close(std::exchange(fd_, -1)) != 0) return Failed("writing", errno);
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) return Failed("renaming to", errno);
  temporary_.clear();
  // The name is durable once the folder is; a file system that cannot sync folders has done all it
  // can.
  const size_t slash = path_.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
  if (const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); fd >= 0) {
    fsync(fd);
    close(fd);
  }
  return absl::OkStatus();
}

}  // namespace lamina::cli
