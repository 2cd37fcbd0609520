#include "server/service/grpc_log.h"

#include <grpc/support/log.h>
#include <spdlog/spdlog.h>

#include <string>

#include "absl/strings/string_view.h"
#include "server/logging.h"

namespace lamina {

void TakeGrpcLog() {
  gpr_set_log_function([](gpr_log_func_args* line) {
    const auto level = line->severity == GPR_LOG_SEVERITY_ERROR  ? spdlog::level::warn
                       : line->severity == GPR_LOG_SEVERITY_INFO ? spdlog::level::info
                                                                 : spdlog::level::debug;
    const absl::string_view path = line->file;
    const std::string file(path.substr(path.rfind('/') + 1));
    spdlog::log(level, "event=grpc where={}:{} message={}", file, line->line,
                Quoted(line->message));
  });
}

}  // namespace lamina
