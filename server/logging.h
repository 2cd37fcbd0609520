// The daemon's log: a line an event on standard error, as key=value pairs or as JSON.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace lamina {

// `level`: "trace" ... "off". `format`: "text" or "json". A JSON line has "time", "level", the
// line's own text as "message", and each of its key=value pairs as a field (whole numbers as
// numbers).
void SetUpLog(const std::string& level, const std::string& format);

// `text` as a pair's value: in double quotes, with what would end it or the line escaped as in C.
std::string Quoted(absl::string_view text);

}  // namespace lamina
