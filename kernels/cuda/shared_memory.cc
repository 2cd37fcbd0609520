#include "shared_memory.h"

#include <unistd.h>

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lamina::cuda {
namespace {

// The driver's functions by the version of their signatures that <cuda.h> declares.
struct Driver {
  decltype(&cuDeviceGetAttribute) device_get_attribute = nullptr;
  decltype(&cuGetErrorName) get_error_name = nullptr;
  decltype(&cuMemAddressFree) mem_address_free = nullptr;
  decltype(&cuMemAddressReserve) mem_address_reserve = nullptr;
  decltype(&cuMemCreate) mem_create = nullptr;
  decltype(&cuMemExportToShareableHandle) mem_export = nullptr;
  decltype(&cuMemGetAddressRange) mem_get_address_range = nullptr;
  decltype(&cuMemGetAllocationGranularity) mem_get_granularity = nullptr;
  decltype(&cuMemMap) mem_map = nullptr;
  decltype(&cuMemRelease) mem_release = nullptr;
  decltype(&cuMemSetAccess) mem_set_access = nullptr;
  decltype(&cuMemUnmap) mem_unmap = nullptr;
  decltype(&cuStreamWriteValue64) stream_write_value = nullptr;
};

template <typename Function>
absl::Status Find(const char* name, Function& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    static_cast<void>(cudaGetLastError());
    return absl::UnimplementedError(absl::StrCat("cuda: the driver has no ", name));
  }
  function = reinterpret_cast<Function>(found);
  return absl::OkStatus();
}

absl::StatusOr<Driver> FindAll() {
  Driver driver;
  absl::Status status;
  const auto find = [&](const char* name, auto& function) {
    if (status.ok()) status = Find(name, function);
  };
  find("cuDeviceGetAttribute", driver.device_get_attribute);
  find("cuGetErrorName", driver.get_error_name);
  find("cuMemAddressFree", driver.mem_address_free);
  find("cuMemAddressReserve", driver.mem_address_reserve);
  find("cuMemCreate", driver.mem_create);
  find("cuMemExportToShareableHandle", driver.mem_export);
  find("cuMemGetAddressRange", driver.mem_get_address_range);
  find("cuMemGetAllocationGranularity", driver.mem_get_granularity);
  find("cuMemMap", driver.mem_map);
  find("cuMemRelease", driver.mem_release);
  find("cuMemSetAccess", driver.mem_set_access);
  find("cuMemUnmap", driver.mem_unmap);
  find("cuStreamWriteValue64", driver.stream_write_value);
  if (!status.ok()) return status;
  return driver;
}

// Once a process; after the device was made current.
const absl::StatusOr<Driver>& TheDriver() {
  static const absl::StatusOr<Driver> driver = FindAll();
  return driver;
}

absl::Status NoRoom(int ordinal, size_t bytes) {
  size_t free_bytes = 0, total_bytes = 0;
  static_cast<void>(cudaMemGetInfo(&free_bytes, &total_bytes));
  return absl::ResourceExhaustedError(absl::StrCat("cuda:", ordinal, ": ", bytes,
                                                   " bytes asked for, ", free_bytes, " of ",
                                                   total_bytes, " are free"));
}

absl::Status RuntimeError(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cuda: ", what, ": ", cudaGetErrorName(error)));
}

absl::Status DriverError(const Driver& driver, CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  const char* name = nullptr;
  static_cast<void>(driver.get_error_name(result, &name));
  return absl::InternalError(absl::StrCat("cuda: ", what, ": ", name == nullptr ? "?" : name));
}

// What was there before is nobody else's business.
absl::Status SetToZero(void* data, size_t bytes) {
  cudaStream_t stream = nullptr;  // of its own: it is not to wait for the backend's
  absl::Status status =
      RuntimeError(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  if (!status.ok()) return status;
  status = RuntimeError(cudaMemsetAsync(data, 0, bytes, stream), "set to zero");
  if (status.ok()) status = RuntimeError(cudaStreamSynchronize(stream), "set to zero");
  static_cast<void>(cudaStreamDestroy(stream));
  return status;
}

class MappedMemory final : public SharedMemory {
 public:
  MappedMemory(const Driver& driver, int ordinal, size_t bytes)
      : driver_(driver), ordinal_(ordinal), bytes_(bytes) {}

  // What can't be undone is the driver's to clean up at the process's end.
  ~MappedMemory() override {
    static_cast<void>(cudaSetDevice(ordinal_));
    if (mapped_) static_cast<void>(driver_.mem_unmap(address_, bytes_));
    if (address_ != 0) static_cast<void>(driver_.mem_address_free(address_, bytes_));
    if (created_) static_cast<void>(driver_.mem_release(allocation_));
    if (descriptor_ >= 0) close(descriptor_);
  }

  absl::Status Open() {
    int supported = 0;
    CUresult result = driver_.device_get_attribute(
        &supported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, ordinal_);
    if (result != CUDA_SUCCESS || supported == 0) {
      return absl::UnimplementedError("cuda: this device exports no memory by descriptors");
    }
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = ordinal_;
    size_t granularity = 0;
    result = driver_.mem_get_granularity(&granularity, &properties,
                                         CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    if (absl::Status status = DriverError(driver_, result, "granularity"); !status.ok()) {
      return status;
    }
    if (granularity == 0 || kSharingUnit % granularity != 0) {
      return absl::UnimplementedError(
          absl::StrCat("cuda: this device's memory comes in pages of ", granularity, " bytes"));
    }
    result = driver_.mem_create(&allocation_, bytes_, &properties, 0);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) return NoRoom(ordinal_, bytes_);
    if (absl::Status status = DriverError(driver_, result, "cuMemCreate"); !status.ok()) {
      return status;
    }
    created_ = true;
    result = driver_.mem_address_reserve(&address_, bytes_, kSharingUnit, 0, 0);
    if (absl::Status status = DriverError(driver_, result, "cuMemAddressReserve"); !status.ok()) {
      return status;
    }
    result = driver_.mem_map(address_, bytes_, 0, allocation_, 0);
    if (absl::Status status = DriverError(driver_, result, "cuMemMap"); !status.ok()) return status;
    mapped_ = true;
    CUmemAccessDesc access{};
    access.location = properties.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    result = driver_.mem_set_access(address_, bytes_, &access, 1);
    if (absl::Status status = DriverError(driver_, result, "cuMemSetAccess"); !status.ok()) {
      return status;
    }
    result =
        driver_.mem_export(&descriptor_, allocation_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (absl::Status status = DriverError(driver_, result, "cuMemExportToShareableHandle");
        !status.ok()) {
      descriptor_ = -1;
      return status;
    }
    return SetToZero(data(), bytes_);
  }

  void* data() const override { return reinterpret_cast<void*>(address_); }
  size_t bytes() const override { return bytes_; }
  int descriptor() const override { return descriptor_; }
  const std::string& handle() const override { return handle_; }

 private:
  const Driver& driver_;
  const int ordinal_;
  const size_t bytes_;
  const std::string handle_;
  CUmemGenericAllocationHandle allocation_ = 0;
  CUdeviceptr address_ = 0;
  int descriptor_ = -1;
  bool created_ = false, mapped_ = false;
};

class IpcMemory final : public SharedMemory {
 public:
  IpcMemory(const Driver& driver, int ordinal, size_t bytes)
      : driver_(driver), ordinal_(ordinal), bytes_(bytes) {}

  ~IpcMemory() override {
    static_cast<void>(cudaSetDevice(ordinal_));
    if (data_ != nullptr && cudaFree(data_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }

  absl::Status Open() {
    const cudaError_t error = cudaMalloc(&data_, bytes_);
    if (error == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());
      return NoRoom(ordinal_, bytes_);
    }
    if (absl::Status status = RuntimeError(error, "cudaMalloc"); !status.ok()) return status;
    // Who opens the handle maps whole pages: nothing else may lie in them.
    CUdeviceptr base = 0;
    size_t size = 0;
    const auto address = reinterpret_cast<CUdeviceptr>(data_);
    const CUresult result = driver_.mem_get_address_range(&base, &size, address);
    if (absl::Status status = DriverError(driver_, result, "address range"); !status.ok()) {
      return status;
    }
    if (base != address || size != bytes_ || address % kSharingUnit != 0) {
      return absl::UnimplementedError(
          "cuda: this driver gives plain allocations no pages of their "
          "own, so they are not shared");
    }
    cudaIpcMemHandle_t handle{};
    const cudaError_t got = cudaIpcGetMemHandle(&handle, data_);
    if (got == cudaErrorNotSupported) {
      static_cast<void>(cudaGetLastError());
      return absl::UnimplementedError("cuda: this device has no IPC handles");
    }
    if (absl::Status status = RuntimeError(got, "cudaIpcGetMemHandle"); !status.ok()) return status;
    handle_.assign(handle.reserved, sizeof(handle.reserved));
    return SetToZero(data_, bytes_);
  }

  void* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }
  int descriptor() const override { return -1; }
  const std::string& handle() const override { return handle_; }

 private:
  const Driver& driver_;
  const int ordinal_;
  const size_t bytes_;
  void* data_ = nullptr;
  std::string handle_;
};

template <typename Memory>
absl::StatusOr<std::unique_ptr<SharedMemory>> Opened(const Driver& driver, int ordinal,
                                                     size_t bytes) {
  auto memory = std::make_unique<Memory>(driver, ordinal, bytes);
  if (absl::Status status = memory->Open(); !status.ok()) return status;
  return memory;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SharedMemory>> AllocateShared(int ordinal, size_t bytes,
                                                             SharingKind kind) {
  if (bytes == 0) return absl::InvalidArgumentError("AllocateShared: 0 bytes");
  if (absl::Status status = RuntimeError(cudaSetDevice(ordinal), "cudaSetDevice"); !status.ok()) {
    return status;
  }
  const absl::StatusOr<Driver>& driver = TheDriver();
  if (!driver.ok()) return driver.status();
  const size_t whole = (bytes + kSharingUnit - 1) / kSharingUnit * kSharingUnit;
  return kind == SharingKind::kDescriptor ? Opened<MappedMemory>(*driver, ordinal, whole)
                                          : Opened<IpcMemory>(*driver, ordinal, whole);
}

absl::Status WriteValue(cudaStream_t stream, uint64_t* at, uint64_t value) {
  const absl::StatusOr<Driver>& driver = TheDriver();
  if (!driver.ok()) return driver.status();
  void* address = nullptr;
  if (absl::Status status =
          RuntimeError(cudaHostGetDevicePointer(&address, at, 0), "cudaHostGetDevicePointer");
      !status.ok()) {
    static_cast<void>(cudaGetLastError());
    return status;
  }
  const CUresult result = driver->stream_write_value(stream, reinterpret_cast<CUdeviceptr>(address),
                                                     value, CU_STREAM_WRITE_VALUE_DEFAULT);
  if (result == CUDA_ERROR_NOT_SUPPORTED) {
    return absl::UnimplementedError("cuda: this device's streams write no values");
  }
  return DriverError(*driver, result, "cuStreamWriteValue64");
}

}  // namespace lamina::cuda
