#include "server/tcp_address.h"

#include <arpa/inet.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

bool IsBracketed(absl::string_view host) { return !host.empty() && host.front() == '['; }

// Letters, digits and these.
bool HasOnly(absl::string_view text, absl::string_view others) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [&](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains(others, c);
  });
}

}  // namespace

std::string TcpAddress::bare_host() const {
  return IsBracketed(host) ? host.substr(1, host.size() - 2) : host;
}

std::string TcpAddress::WithPort(int real_port) const { return absl::StrCat(host, ":", real_port); }

bool TcpAddress::IsLoopback() const {
  in_addr v4{};
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6{};
  if (IsBracketed(host) && inet_pton(AF_INET6, bare_host().c_str(), &v6) == 1) {
    return IN6_IS_ADDR_LOOPBACK(&v6) != 0;
  }
  return host == "localhost";
}

std::optional<TcpAddress> ParseTcpAddress(absl::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return std::nullopt;
  const absl::string_view host = text.substr(0, colon), port = text.substr(colon + 1);
  const bool bracketed = IsBracketed(host) && host.size() > 2 && host.back() == ']';
  // '%' stands before an IPv6 address's zone.
  if (bracketed ? !HasOnly(host.substr(1, host.size() - 2), ":.%-_") : !HasOnly(host, ".-_")) {
    return std::nullopt;
  }
  uint32_t number = 0;
  if (port.size() > 5 || !std::all_of(port.begin(), port.end(), absl::ascii_isdigit) ||
      !absl::SimpleAtoi(port, &number) || number > 65535) {
    return std::nullopt;
  }
  return TcpAddress{.host = std::string(host), .port = static_cast<uint16_t>(number)};
}

}  // namespace lamina
