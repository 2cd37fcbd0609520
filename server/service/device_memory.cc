#include "server/service/device_memory.h"

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

static_assert(kDevicePage == kSharingUnit, "what a region's length is rounded up to");

class EngineMemory final : public DeviceMemory {
 public:
  explicit EngineMemory(std::unique_ptr<SharedMemory> memory) : memory_(std::move(memory)) {}
  void* data() const override { return memory_->data(); }
  int descriptor() const override { return memory_->descriptor(); }
  const std::string& handle() const override { return memory_->handle(); }

 private:
  const std::unique_ptr<SharedMemory> memory_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceMemory>> MakeDeviceMemory(Engine& engine, size_t bytes,
                                                               RegionKind kind) {
  auto memory = engine.AllocateShared(
      bytes, kind == RegionKind::kDeviceIpc ? SharingKind::kIpcHandle : SharingKind::kDescriptor);
  if (!memory.ok()) return memory.status();
  if ((*memory)->bytes() != bytes) {
    return absl::InternalError(absl::StrCat(bytes, " bytes were asked for and ", (*memory)->bytes(),
                                            " came: a region is charged for what it takes"));
  }
  return std::make_unique<EngineMemory>(*std::move(memory));
}

}  // namespace lamina
