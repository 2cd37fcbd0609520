// The daemon's certificate, its key, and whom it trusts to sign clients' certificates: read,
// checked, and read again when the files change.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/access/files.h"

namespace lamina {

struct TlsOptions {
  std::string certificate;  // file: the daemon's, then those between it and the root; PEM
  std::string key;          // file: its private key; PEM, not encrypted
  std::string client_ca;    // file: who signs clients' certificates; PEM. Empty: none is asked for
};

// The files' content, which fits together.
struct TlsMaterial {
  std::string certificate, key, client_ca;
  uint64_t version = 0;  // grows with each change
  absl::Time expires;    // when the daemon's own certificate does
};

// Threads: material from any; Refresh from one at a time.
class TlsFiles {
 public:
  // FAILED_PRECONDITION, as "WHAT PATH: why": a file as ReadAccessFile; it holds no certificate or
  // key in PEM; the key is encrypted, or is not the certificate's; a certificate is over or is not
  // valid yet.
  static absl::StatusOr<std::unique_ptr<TlsFiles>> Open(const TlsOptions& options);

  std::shared_ptr<const TlsMaterial> material() const;
  const TlsOptions& options() const { return options_; }

  // Reads the files again where they changed; what is wrong then is logged, and the old content
  // stays. Also logs, once each, that the certificate in use is about to be over, and that it is.
  void Refresh();

 private:
  explicit TlsFiles(const TlsOptions& options);
  void Use(TlsMaterial material);
  void WarnOfExpiry();

  const TlsOptions options_;
  FileWatch watch_;
  absl::Time next_warning_ = absl::InfiniteFuture();  // Refresh's own
  mutable std::mutex mutex_;
  std::shared_ptr<const TlsMaterial> material_;  // guarded by mutex_
};

}  // namespace lamina
