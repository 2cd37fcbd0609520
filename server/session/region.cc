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

class MemfdRegion final : public Region {
 public:
  MemfdRegion(std::string id, size_t length, std::shared_ptr<Ledger> session,
              std::shared_ptr<Ledger> total, std::shared_ptr<const SessionHooks> hooks)
      : id_(std::move(id)),
        length_(length),
        session_(std::move(session)),
        total_(std::move(total)),
        hooks_(std::move(hooks)) {
    ++total_->count;
  }

  ~MemfdRegion() override {
    if (registered_ && hooks_->unregister_host) hooks_->unregister_host(data_);
    if (data_ != MAP_FAILED) munmap(data_, length_);
    if (descriptor_ >= 0) close(descriptor_);
    session_->Uncharge(length_);
    total_->Uncharge(length_);
    --total_->count;
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

  void* data() const override { return data_; }
  size_t length() const override { return length_; }
  int descriptor() const override { return descriptor_; }
  bool registered() const override { return registered_; }
  const std::string& id() const override { return id_; }

 private:
  const std::string id_;
  const size_t length_;
  const std::shared_ptr<Ledger> session_, total_;
  const std::shared_ptr<const SessionHooks> hooks_;
  int descriptor_ = -1;
  void* data_ = MAP_FAILED;
  bool registered_ = false;
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

absl::StatusOr<std::shared_ptr<Region>> MakeRegion(std::string id, size_t bytes,
                                                   std::shared_ptr<Ledger> session,
                                                   std::shared_ptr<Ledger> total,
                                                   std::shared_ptr<const SessionHooks> hooks) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t length = (bytes + page - 1) / page * page;
  if (!session->Charge(length)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("size_bytes: the region takes ", length, " bytes; the session's regions have ",
                     session->bytes(), " of at most ", session->cap()));
  }
  if (!total->Charge(length)) {
    session->Uncharge(length);
    return absl::ResourceExhaustedError(absl::StrCat("size_bytes: the region takes ", length,
                                                     " bytes; all sessions' regions have ",
                                                     total->bytes(), " of at most ", total->cap()));
  }
  // Pages are reserved below; past what there is, the kernel would kill processes for them.
  if (const size_t available = AvailableMemory(); length > available) {
    session->Uncharge(length);
    total->Uncharge(length);
    return absl::ResourceExhaustedError(absl::StrCat("size_bytes: the region takes ", length,
                                                     " bytes; the machine has ", available,
                                                     " available"));
  }
  // From here on the region's destructor undoes what was done.
  auto region = std::make_shared<MemfdRegion>(std::move(id), length, std::move(session),
                                              std::move(total), std::move(hooks));
  if (absl::Status status = region->Open(); !status.ok()) return status;
  return region;
}

}  // namespace lamina
