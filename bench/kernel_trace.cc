// Records when each kernel, copy and fill of a process ran on the device, for bench/trace: a
// library that the driver loads into it, by CUDA_INJECTION64_PATH. A line each in the file that
// KERNEL_TRACE names: begin and end in ns, and its name.
#include <cupti.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace {

constexpr size_t kBufferBytes = 4 << 20;
constexpr size_t kBufferAlignment = 8;  // CUPTI's ACTIVITY_RECORD_ALIGNMENT

std::FILE* file = nullptr;
std::mutex file_mutex;

void Write(uint64_t begin, uint64_t end, const char* name) {
  std::fprintf(file, "%" PRIu64 " %" PRIu64 " %s\n", begin, end, name);
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(kBufferAlignment, kBufferBytes));
  *size = *buffer != nullptr ? kBufferBytes : 0;
  *most_records = 0;  // as many as fit
}

void CUPTIAPI TakeBuffer(CUcontext /*context*/, uint32_t /*stream*/, uint8_t* buffer,
                         size_t /*size*/, size_t valid) {
  {
    const std::lock_guard<std::mutex> lock(file_mutex);
    CUpti_Activity* record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
      if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
        const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
        Write(kernel->start, kernel->end, kernel->name);
      } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        const auto* fill = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
        Write(fill->start, fill->end, "[fill]");
      } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy5*>(record);
        Write(copy->start, copy->end, "[copy]");
      }
    }
  }
  std::free(buffer);
}

void Finish() {
  cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  std::fclose(file);
}

}  // namespace

// The driver calls this when it starts; 1: all is well.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  const char* path = std::getenv("KERNEL_TRACE");
  file = path != nullptr ? std::fopen(path, "w") : nullptr;
  if (file == nullptr) {
    std::fputs("kernel_trace: KERNEL_TRACE names no file that can be written\n", stderr);
    return 0;
  }
  CUptiResult result = cuptiActivityRegisterCallbacks(GiveBuffer, TakeBuffer);
  for (const CUpti_ActivityKind kind : {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                        CUPTI_ACTIVITY_KIND_MEMSET, CUPTI_ACTIVITY_KIND_MEMCPY}) {
    if (result == CUPTI_SUCCESS) result = cuptiActivityEnable(kind);
  }
  if (result != CUPTI_SUCCESS) {
    const char* why = nullptr;
    cuptiGetResultString(result, &why);
    std::fprintf(stderr, "kernel_trace: %s\n", why != nullptr ? why : "CUPTI failed");
    return 0;
  }
  std::atexit(Finish);
  return 1;
}
