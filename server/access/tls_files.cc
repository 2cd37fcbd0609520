#include "server/access/tls_files.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <spdlog/spdlog.h>

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/logging.h"

namespace lamina {
namespace {

constexpr const char* kCertificate = "--tls-cert";
constexpr const char* kKey = "--tls-key";
constexpr const char* kClientCa = "--tls-client-ca";
// Long enough to see to it, shorter than what is left when a renewal is usually made.
constexpr absl::Duration kWarnBefore = absl::Hours(48);

struct Free {
  void operator()(BIO* bio) const { BIO_free(bio); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
};
using CertificatePtr = std::unique_ptr<X509, Free>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Free>;

std::unique_ptr<BIO, Free> Over(const std::string& pem) {
  return std::unique_ptr<BIO, Free>(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

absl::Status Wrong(const char* what, const std::string& path, const std::string& why) {
  return absl::FailedPreconditionError(absl::StrCat(what, " ", path, ": ", why));
}

absl::Time TimeOf(const ASN1_TIME* time) {
  std::tm parts{};
  return ASN1_TIME_to_tm(time, &parts) == 1 ? absl::FromTM(parts, absl::UTCTimeZone())
                                            : absl::InfiniteFuture();
}

std::string Printed(absl::Time time) {
  return absl::FormatTime(absl::RFC3339_sec, time, absl::UTCTimeZone());
}

absl::StatusOr<std::vector<CertificatePtr>> Certificates(const char* what, const std::string& path,
                                                         const std::string& pem) {
  std::vector<CertificatePtr> certificates;
  const auto bio = Over(pem);
  ERR_clear_error();
  while (X509* const certificate = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    certificates.emplace_back(certificate);
  }
  // At the end there is no further beginning; all else is damage.
  const unsigned long error = ERR_peek_last_error();
  ERR_clear_error();
  if (certificates.empty()) return Wrong(what, path, "has no certificate in PEM form");
  if (ERR_GET_LIB(error) != ERR_LIB_PEM || ERR_GET_REASON(error) != PEM_R_NO_START_LINE) {
    return Wrong(what, path,
                 absl::StrCat("its certificate ", certificates.size() + 1, " is damaged"));
  }
  return certificates;
}

// Its own time; of a bundle of authorities, one that is over is no harm.
absl::Status CheckTime(const char* what, const std::string& path, const X509* certificate) {
  if (X509_cmp_current_time(X509_get0_notAfter(certificate)) < 0) {
    return Wrong(what, path,
                 absl::StrCat("the certificate expired at ",
                              Printed(TimeOf(X509_get0_notAfter(certificate)))));
  }
  if (X509_cmp_current_time(X509_get0_notBefore(certificate)) > 0) {
    return Wrong(what, path,
                 absl::StrCat("the certificate is not valid before ",
                              Printed(TimeOf(X509_get0_notBefore(certificate)))));
  }
  return absl::OkStatus();
}

// Says that there is no pass phrase, rather than ask for one on a terminal.
int NoPassPhrase(char*, int, int, void* asked) {
  *static_cast<bool*>(asked) = true;
  return -1;
}

absl::StatusOr<KeyPtr> Key(const std::string& path, const std::string& pem) {
  bool asked = false;
  KeyPtr key(PEM_read_bio_PrivateKey(Over(pem).get(), nullptr, NoPassPhrase, &asked));
  ERR_clear_error();
  if (asked) return Wrong(kKey, path, "is encrypted; the daemon has nobody to ask for the phrase");
  if (key == nullptr) return Wrong(kKey, path, "has no private key in PEM form");
  return key;
}

absl::StatusOr<TlsMaterial> Read(const TlsOptions& options) {
  TlsMaterial material;
  auto content = ReadAccessFile(kCertificate, options.certificate, Secrecy::kPublic);
  if (!content.ok()) return content.status();
  material.certificate = *std::move(content);
  const auto chain = Certificates(kCertificate, options.certificate, material.certificate);
  if (!chain.ok()) return chain.status();
  X509* const leaf = chain->front().get();
  if (absl::Status status = CheckTime(kCertificate, options.certificate, leaf); !status.ok()) {
    return status;
  }

  material.expires = TimeOf(X509_get0_notAfter(leaf));

  content = ReadAccessFile(kKey, options.key, Secrecy::kSecret);
  if (!content.ok()) return content.status();
  material.key = *std::move(content);
  const auto key = Key(options.key, material.key);
  if (!key.ok()) return key.status();
  const bool fits = X509_check_private_key(leaf, key->get()) == 1;
  ERR_clear_error();
  if (!fits) {
    return Wrong(kKey, options.key,
                 absl::StrCat("is not the key of the certificate in ", options.certificate));
  }

  if (!options.client_ca.empty()) {
    content = ReadAccessFile(kClientCa, options.client_ca, Secrecy::kPublic);
    if (!content.ok()) return content.status();
    material.client_ca = *std::move(content);
    const auto authorities = Certificates(kClientCa, options.client_ca, material.client_ca);
    if (!authorities.ok()) return authorities.status();
  }
  return material;
}

}  // namespace

TlsFiles::TlsFiles(const TlsOptions& options)
    : options_(options), watch_({options.certificate, options.key, options.client_ca}) {}

absl::StatusOr<std::unique_ptr<TlsFiles>> TlsFiles::Open(const TlsOptions& options) {
  std::unique_ptr<TlsFiles> files(new TlsFiles(options));
  auto material = Read(options);
  if (!material.ok()) return material.status();
  material->version = 1;
  files->Use(*std::move(material));
  return files;
}

std::shared_ptr<const TlsMaterial> TlsFiles::material() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return material_;
}

void TlsFiles::Use(TlsMaterial material) {
  spdlog::info("event=certificate_loaded file={} expires={}", Quoted(options_.certificate),
               Printed(material.expires));
  next_warning_ = material.expires - kWarnBefore;
  std::lock_guard<std::mutex> lock(mutex_);
  material_ = std::make_shared<const TlsMaterial>(std::move(material));
}

void TlsFiles::Refresh() {
  if (absl::Now() >= next_warning_) WarnOfExpiry();
  if (!watch_.Changed()) return;
  auto read = Read(options_);
  if (!read.ok()) {
    spdlog::error("event=certificate_kept reason={}", Quoted(read.status().message()));
    return;
  }
  read->version = material()->version + 1;
  Use(*std::move(read));
}

void TlsFiles::WarnOfExpiry() {
  const absl::Time expires = material()->expires;
  if (absl::Now() < expires) {
    spdlog::warn("event=certificate_expires_soon file={} expires={}", Quoted(options_.certificate),
                 Printed(expires));
    next_warning_ = expires;
  } else {
    spdlog::error("event=certificate_expired file={} expires={}", Quoted(options_.certificate),
                  Printed(expires));
    next_warning_ = absl::InfiniteFuture();
  }
}

}  // namespace lamina
