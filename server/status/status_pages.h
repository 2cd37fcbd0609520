// The pages of the metrics port for people and probes:
//   /statusz        one self-contained HTML page that updates itself; /statusz?format=json and
//                   /statusz.json: the report behind it
//   /healthz        200 while the daemon need not be restarted; 503 once its device failed. Asks no
//                   step and waits for none
//   /readyz         200 while it takes calls; 503, with the reason, while it starts, drains or has
//                   failed
//   /configz        the settings that it runs with, as JSON
#pragma once

#include <map>
#include <string>

#include "server/metrics/exposer.h"
#include "server/status/status_report.h"

namespace lamina {

// `config_json`: what /configz shows. `sources` outlives the pages.
std::map<std::string, HttpPage> StatusPages(const StatusSources& sources, std::string config_json);

// `json` as it may stand inside a <script> element: nothing in it can end that.
std::string EmbeddedJson(std::string json);

extern const char kStatuszHtml[];  // with @@NONCE@@ and @@DATA@@ to be filled in

}  // namespace lamina
