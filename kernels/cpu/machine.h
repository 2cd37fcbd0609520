// What the operating system says of this machine and of this process's share of it.
#pragma once

#include <cstddef>
#include <string>

namespace lamina::cpu {

// Cores that the process may use: those of its affinity mask, or its control group's CPU quota
// rounded up, or OMP_NUM_THREADS, where those are less. At least 1.
int AvailableCores();

// The processor's own name ("model name" in /proc/cpuinfo); "unknown" where there is none.
std::string ProcessorName();

// Bytes of memory: the machine's, or the control group's limit where that is less.
size_t TotalMemory();

// Bytes that can be had now without swapping: the kernel's estimate (MemAvailable), or what is left
// below the control group's limit where that is less; page cache that can be dropped counts as
// left.
size_t AvailableMemory();

}  // namespace lamina::cpu
