#include "server/session/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

absl::Status SystemError(const char* what) {
  const int error = errno;
  const std::string message = absl::StrCat(what, ": ", std::strerror(error));
  if (error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOSPC) {
    return absl::ResourceExhaustedError(message);
  }
  return absl::InternalError(message);
}

// What the kernel could still give, in bytes, about; without that file, no limit.
size_t AvailableMemory() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  size_t kibibytes = 0;
  while (file >> name >> kibibytes) {
    if (name == "MemAvailable:") return kibibytes * 1024;
    std::getline(file, unit);
  }
  return std::numeric_limits<size_t>::max();
}

// What has been charged to both ledgers; uncharged with its end.
class Charge {
 public:
  // Counted as a region.
  Charge(Ledgers ledgers, size_t bytes) : ledgers_(std::move(ledgers)), bytes_(bytes) {
    ++ledgers_.total->count;
  }
  Charge(Charge&& other) noexcept
      : ledgers_(std::exchange(other.ledgers_, {})), bytes_(other.bytes_) {}
  Charge& operator=(Charge&&) = delete;
  ~Charge() {
    if (ledgers_.total == nullptr) return;
    ledgers_.session->Uncharge(bytes_);
    ledgers_.total->Uncharge(bytes_);
    --ledgers_.total->count;
  }

 private:
  Ledgers ledgers_;
  size_t bytes_;
};

class MemfdRegion final : public Region {
 public:
  MemfdRegion(std::string id, size_t length, Charge charge,
              std::shared_ptr<const SessionHooks> hooks)
      : charge_(std::move(charge)), id_(std::move(id)), length_(length), hooks_(std::move(hooks)) {}

  ~MemfdRegion() override {
    if (registered_ && hooks_->unregister_host) hooks_->unregister_host(data_);
    if (data_ != MAP_FAILED) munmap(data_, length_);
    if (descriptor_ >= 0) close(descriptor_);
  }

  absl::Status Open() {
    descriptor_ = memfd_create("lamina-region", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (descriptor_ < 0) return SystemError("memfd_create");
    if (ftruncate(descriptor_, static_cast<off_t>(length_)) != 0) return SystemError("ftruncate");
    // Without this, running out of memory would show as a SIGBUS inside a kernel.
    if (fallocate(descriptor_, 0, 0, static_cast<off_t>(length_)) != 0) {
      return SystemError("reserving the region's pages");
    }
    if (fcntl(descriptor_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
      return SystemError("sealing the region");
    }
    data_ = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
    if (data_ == MAP_FAILED) return SystemError("mmap");
    if (hooks_->register_host) {
      if (absl::Status status = hooks_->register_host(data_, length_); !status.ok()) return status;
      registered_ = true;
    }
    return absl::OkStatus();
  }

  RegionKind kind() const override { return RegionKind::kMemfd; }
  void* data() const override { return data_; }
  size_t length() const override { return length_; }
  int descriptor() const override { return descriptor_; }
  const std::string& handle() const override { return handle_; }
  bool registered() const override { return registered_; }
  const std::string& id() const override { return id_; }

 private:
  const Charge charge_;  // goes last
  const std::string id_;
  const size_t length_;
  const std::string handle_;
  const std::shared_ptr<const SessionHooks> hooks_;
  int descriptor_ = -1;
  void* data_ = MAP_FAILED;
  bool registered_ = false;
};

class DeviceRegion final : public Region {
 public:
  DeviceRegion(std::string id, RegionKind kind, size_t length, Charge charge,
               std::unique_ptr<DeviceMemory> memory)
      : charge_(std::move(charge)),
        id_(std::move(id)),
        kind_(kind),
        length_(length),
        memory_(std::move(memory)) {}

  RegionKind kind() const override { return kind_; }
  void* data() const override { return memory_->data(); }
  size_t length() const override { return length_; }
  int descriptor() const override { return memory_->descriptor(); }
  const std::string& handle() const override { return memory_->handle(); }
  bool registered() const override { return true; }
  const std::string& id() const override { return id_; }

 private:
  const Charge charge_;  // goes last
  const std::string id_;
  const RegionKind kind_;
  const size_t length_;
  const std::unique_ptr<DeviceMemory> memory_;
};

}  // namespace

bool Ledger::Charge(size_t bytes) {
  size_t now = bytes_.load(std::memory_order_relaxed);
  do {
    if (bytes > cap_ || now > cap_ - bytes) return false;
  } while (!bytes_.compare_exchange_weak(now, now + bytes, std::memory_order_relaxed));
  return true;
}

void Ledger::Uncharge(size_t bytes) { bytes_.fetch_sub(bytes, std::memory_order_relaxed); }

namespace {

// RESOURCE_EXHAUSTED with the numbers.
absl::StatusOr<Charge> ChargeBoth(Ledgers ledgers, size_t length, const char* regions) {
  if (!ledgers.session->Charge(length)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("size_bytes: the region takes ", length, " bytes; the session's ", regions,
                     " have ", ledgers.session->bytes(), " of at most ", ledgers.session->cap()));
  }
  if (!ledgers.total->Charge(length)) {
    ledgers.session->Uncharge(length);
    return absl::ResourceExhaustedError(
        absl::StrCat("size_bytes: the region takes ", length, " bytes; all sessions' ", regions,
                     " have ", ledgers.total->bytes(), " of at most ", ledgers.total->cap()));
  }
  return Charge(std::move(ledgers), length);
}

size_t Rounded(size_t bytes, size_t page) { return (bytes + page - 1) / page * page; }

absl::StatusOr<std::shared_ptr<Region>> MakeDeviceRegion(std::string id, size_t bytes,
                                                         RegionKind kind, Ledgers ledgers,
                                                         const SessionHooks& hooks) {
  if (!hooks.make_device_memory) {
    return absl::UnimplementedError("kind: this daemon offers no regions in device memory");
  }
  const size_t length = Rounded(bytes, kDevicePage);
  auto charge = ChargeBoth(std::move(ledgers), length, "device regions");
  if (!charge.ok()) return charge.status();
  auto memory = hooks.make_device_memory(length, kind);
  if (!memory.ok()) {
    return absl::Status(memory.status().code(),
                        absl::StrCat("size_bytes: ", length,
                                     " bytes of device memory: ", memory.status().message()));
  }
  return std::make_shared<DeviceRegion>(std::move(id), kind, length, *std::move(charge),
                                        *std::move(memory));
}

}  // namespace

absl::StatusOr<std::shared_ptr<Region>> MakeRegion(std::string id, size_t bytes, RegionKind kind,
                                                   Ledgers ledgers,
                                                   std::shared_ptr<const SessionHooks> hooks) {
  if (kind != RegionKind::kMemfd) {
    return MakeDeviceRegion(std::move(id), bytes, kind, std::move(ledgers), *hooks);
  }
  const size_t length = Rounded(bytes, static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  auto charge = ChargeBoth(std::move(ledgers), length, "regions");
  if (!charge.ok()) return charge.status();
  // Pages are reserved below; past what there is, the kernel would kill processes for them.
  if (const size_t available = AvailableMemory(); length > available) {
    return absl::ResourceExhaustedError(absl::StrCat("size_bytes: the region takes ", length,
                                                     " bytes; the machine has ", available,
                                                     " available"));
  }
  // From here on the region's destructor undoes what was done.
  auto region =
      std::make_shared<MemfdRegion>(std::move(id), length, *std::move(charge), std::move(hooks));
  if (absl::Status status = region->Open(); !status.ok()) return status;
  return region;
}

}  // namespace lamina
