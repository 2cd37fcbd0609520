// The daemon's log: a line an event on standard error, as key=value pairs or as JSON.
#pragma once

#include <string>

namespace lamina {

// `level`: "trace" ... "off". `format`: "text" or "json". A JSON line has "time", "level", the
// line's own text as "message", and each of its key=value pairs as a field (whole numbers as
// numbers).
void SetUpLog(const std::string& level, const std::string& format);

}  // namespace lamina
