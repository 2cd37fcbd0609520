// The engine's device memory as the sessions' regions take it: neither room knows the other.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "server/engine/engine.h"
#include "server/session/session_manager.h"

namespace lamina {

// What SessionHooks::make_device_memory is to do. The memory must go before the engine.
absl::StatusOr<std::unique_ptr<DeviceMemory>> MakeDeviceMemory(Engine& engine, size_t bytes,
                                                               RegionKind kind);

}  // namespace lamina
