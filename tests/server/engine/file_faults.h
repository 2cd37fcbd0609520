// File operations that fail, or end the process, on demand. The linker sends this binary's calls of
// pwrite, fsync, rename and fallocate through file_faults.cc.
#pragma once

namespace lamina::testing {

enum class FileOp { kPwrite, kFsync, kRename, kFallocate };

// While it lives, the `nth` call from now on (0: the next) of `op` fails with `error`; later ones
// work. One at a time, from one thread.
class FileFault {
 public:
  FileFault(FileOp op, int error, int nth = 0);
  ~FileFault();
  FileFault(const FileFault&) = delete;
  FileFault& operator=(const FileFault&) = delete;
  bool hit() const;
};

// The next rename ends the process with this exit code, as a kill at that moment would.
void ExitAtRename(int code);

}  // namespace lamina::testing
