#include "file_faults.h"

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace lamina::testing {
namespace {

std::atomic<bool> armed{false};
std::atomic<bool> was_hit{false};
std::atomic<int> countdown{0};
std::atomic<int> exit_code{-1};
FileOp fault_op = FileOp::kPwrite;  // changes only while not armed
int fault_error = 0;

// Whether this call is the one that fails; errno is set then.
bool Fails(FileOp op) {
  if (!armed.load(std::memory_order_acquire) || op != fault_op || countdown.fetch_sub(1) != 0)
    return false;
  was_hit = true;
  errno = fault_error;
  return true;
}

}  // namespace

FileFault::FileFault(FileOp op, int error, int nth) {
  fault_op = op;
  fault_error = error;
  countdown = nth;
  was_hit = false;
  armed.store(true, std::memory_order_release);
}
FileFault::~FileFault() { armed = false; }
bool FileFault::hit() const { return was_hit; }

void ExitAtRename(int code) { exit_code = code; }

}  // namespace lamina::testing

using lamina::testing::FileOp;

extern "C" {

ssize_t __real_pwrite(int fd, const void* data, size_t bytes, off_t offset);
int __real_fsync(int fd);
int __real_rename(const char* from, const char* to);
int __real_fallocate(int fd, int mode, off_t offset, off_t bytes);

ssize_t __wrap_pwrite(int fd, const void* data, size_t bytes, off_t offset);
int __wrap_fsync(int fd);
int __wrap_rename(const char* from, const char* to);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t bytes);

ssize_t __wrap_pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  return lamina::testing::Fails(FileOp::kPwrite) ? -1 : __real_pwrite(fd, data, bytes, offset);
}
int __wrap_fsync(int fd) { return lamina::testing::Fails(FileOp::kFsync) ? -1 : __real_fsync(fd); }
int __wrap_rename(const char* from, const char* to) {
  if (lamina::testing::exit_code >= 0) _exit(lamina::testing::exit_code);
  return lamina::testing::Fails(FileOp::kRename) ? -1 : __real_rename(from, to);
}
int __wrap_fallocate(int fd, int mode, off_t offset, off_t bytes) {
  return lamina::testing::Fails(FileOp::kFallocate) ? -1
                                                    : __real_fallocate(fd, mode, offset, bytes);
}

}  // extern "C"
