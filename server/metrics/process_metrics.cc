#include "server/metrics/process_metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace lamina {
namespace {

prometheus::Gauge* ProcessGauge(prometheus::Registry& registry, const char* name,
                                const char* help) {
  return &prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Unix time at which the system started, 0 if it does not say.
double BootTime() {
  std::ifstream file("/proc/stat");
  for (std::string line; std::getline(file, line);) {
    double seconds = 0;
    if (line.rfind("btime ", 0) == 0 && absl::SimpleAtod(line.substr(6), &seconds)) return seconds;
  }
  return 0;
}

// When this process started: the 22nd field of its stat, in ticks since the system did.
double StartTime() {
  const std::string stat = FirstLine("/proc/self/stat");
  const size_t name_end = stat.rfind(')');  // the name may hold blanks
  if (name_end == std::string::npos || name_end + 2 > stat.size()) return 0;
  const std::vector<absl::string_view> fields =
      absl::StrSplit(absl::string_view(stat).substr(name_end + 2), ' ');
  double ticks = 0;
  if (fields.size() < 20 || !absl::SimpleAtod(fields[19], &ticks)) return 0;
  return BootTime() + ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
}

}  // namespace

ProcessMetrics::ProcessMetrics(prometheus::Registry& registry) {
  start_time_ = ProcessGauge(registry, "process_start_time_seconds", "Unix time of the start.");
  start_time_->Set(StartTime());
  resident_ = ProcessGauge(registry, "process_resident_memory_bytes", "Resident memory.");
  open_fds_ = ProcessGauge(registry, "process_open_fds", "Open file descriptors.");
  max_fds_ = ProcessGauge(registry, "process_max_fds", "Most file descriptors that may be open.");
  cpu_seconds_ = &prometheus::BuildCounter()
                      .Name("process_cpu_seconds_total")
                      .Help("User and system time of the CPU.")
                      .Register(registry)
                      .Add({});
}

void ProcessMetrics::Read() {
  // Total, resident, ... in pages.
  const std::vector<std::string> pages = absl::StrSplit(FirstLine("/proc/self/statm"), ' ');
  double resident = 0;
  if (pages.size() > 1 && absl::SimpleAtod(pages[1], &resident))
    resident_->Set(resident * static_cast<double>(sysconf(_SC_PAGESIZE)));
  if (DIR* const folder = opendir("/proc/self/fd")) {
    int found = 0;
    while (readdir(folder) != nullptr) ++found;
    closedir(folder);
    open_fds_->Set(found - 3);  // ".", "..", and the folder itself
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) max_fds_->Set(static_cast<double>(limit.rlim_cur));
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
    };
    const double more = seconds(usage.ru_utime) + seconds(usage.ru_stime) - cpu_seconds_->Value();
    if (more > 0) cpu_seconds_->Increment(more);
  }
}

}  // namespace lamina
