// cuBLASLt, loaded when the backend is made rather than with the program.
//
// Loaded with the program its thread-local storage, 92 KiB, would be a part of every thread's
// stack, and libraries that make threads with small stacks could make none. So the functions that
// product.cc calls are defined here under cublasLt.h's names, and pass the calls on. A program with
// this backend also starts where there is no cuBLAS, and serves the CPU.
#pragma once

#include "absl/status/status.h"

namespace lamina::cuda {

// To be called before anything of cublasLt.h; the first call decides. Looks where the loader looks
// (LD_LIBRARY_PATH, ld.so.conf), then in the toolkit that this was built with.
// FAILED_PRECONDITION: the library, or a function of it, is not there. Threads: any.
absl::Status LoadCublasLt();

}  // namespace lamina::cuda
