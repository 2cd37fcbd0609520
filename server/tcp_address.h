// A TCP address as flags have it: "HOST:PORT".
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace lamina {

struct TcpAddress {
  std::string host;   // as it was written: an IPv4 address, an IPv6 address in brackets, or a name
  uint16_t port = 0;  // 0: any free one

  // Without brackets, as getaddrinfo takes it.
  std::string bare_host() const;
  // HOST:PORT with the port that it came to be.
  std::string WithPort(int real_port) const;
  // Whether nobody but this host's users can reach it. Told by numbers, and by "localhost": not by
  // a name that begins like them.
  bool IsLoopback() const;
};

// Nothing where the text is no such address. A host has only characters that addresses and names
// have, so that it can be handed to what has a syntax of its own for lists of them; a port is
// decimal, 0 to 65535, in at most five digits.
std::optional<TcpAddress> ParseTcpAddress(absl::string_view text);

}  // namespace lamina
