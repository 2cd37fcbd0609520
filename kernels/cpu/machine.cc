#include "machine.h"

#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace lamina::cpu {
namespace {

constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();

// The value after `key` in a file of "key value" lines, e.g. /proc/meminfo.
std::optional<size_t> ValueOf(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string name;
    size_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

// A file that holds one number; "max" and the like are no number.
std::optional<size_t> NumberIn(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

// This process's control group of one controller ("" for the unified hierarchy), and all its
// ancestors: each of them may set a limit. Inside a container the path may lie outside what is
// mounted; the mount's root is then the group.
std::vector<std::string> ControlGroups(const std::string& controller) {
  const std::string root = controller.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controller;
  std::vector<std::string> groups{root};
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {  // id:controllers:path
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string names = absl::StrCat(",", line.substr(first + 1, second - first - 1), ",");
    const bool ours = controller.empty()
                          ? names == ",,"
                          : names.find(absl::StrCat(",", controller, ",")) != std::string::npos;
    if (!ours) continue;
    std::string path = line.substr(second + 1);
    while (path.size() > 1) {
      groups.push_back(root + path);
      path.resize(path.rfind('/'));
    }
  }
  return groups;
}

struct GroupMemory {
  size_t limit = kNoLimit;
  size_t left = kNoLimit;
};

// `limit`, `used`: file names; `cache`: memory.stat's word for page cache that can be dropped.
void Tighten(GroupMemory& memory, const std::string& group, const char* limit_file,
             const char* used_file, const char* cache) {
  const auto limit = NumberIn(group + "/" + limit_file);
  if (!limit) return;
  memory.limit = std::min(memory.limit, *limit);
  const size_t used = NumberIn(group + "/" + used_file).value_or(0);
  const size_t droppable = ValueOf(group + "/memory.stat", cache).value_or(0);
  const size_t held = used - std::min(used, droppable);
  memory.left = std::min(memory.left, *limit - std::min(*limit, held));
}

GroupMemory MemoryOfControlGroup() {
  GroupMemory memory;
  for (const std::string& group : ControlGroups(""))
    Tighten(memory, group, "memory.max", "memory.current", "inactive_file");
  for (const std::string& group : ControlGroups("memory"))
    Tighten(memory, group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file");
  return memory;
}

// Cores' worth of CPU time that the control group grants; no value without a quota.
std::optional<int> CoresByQuota() {
  double least = std::numeric_limits<double>::infinity();
  for (const std::string& group : ControlGroups("")) {
    std::ifstream file(group + "/cpu.max");
    double quota = 0, period = 0;
    if (file >> quota >> period && quota > 0 && period > 0) least = std::min(least, quota / period);
  }
  for (const std::string& group : ControlGroups("cpu")) {
    const auto quota = NumberIn(group + "/cpu.cfs_quota_us");
    const auto period = NumberIn(group + "/cpu.cfs_period_us");
    // No quota reads as -1, which as a size is past anything.
    if (quota && period && *period > 0 && *quota < (size_t{1} << 40))
      least = std::min(least, static_cast<double>(*quota) / static_cast<double>(*period));
  }
  if (least > 1e6) return std::nullopt;
  const int whole = static_cast<int>(least);
  return std::max(1, whole + (least > whole ? 1 : 0));
}

int CoresByAffinity() {
  // The set must be as wide as the kernel's, which may be wider than cpu_set_t.
  for (int cpus = CPU_SETSIZE; cpus <= (1 << 20); cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const int error = sched_getaffinity(0, bytes, set) == 0 ? 0 : errno;
    const int count = error == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (error == 0) return std::max(1, count);
    if (error != EINVAL) break;
  }
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

}  // namespace

int AvailableCores() {
  const int cores = CoresByAffinity();
  return std::min({cores, CoresByQuota().value_or(cores), omp_get_max_threads()});
}

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

size_t TotalMemory() {
  const size_t pages = static_cast<size_t>(sysconf(_SC_PHYS_PAGES));
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::min(pages * page, MemoryOfControlGroup().limit);
}

size_t AvailableMemory() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto kilobytes = ValueOf("/proc/meminfo", "MemAvailable:");
  const size_t machine =
      kilobytes ? *kilobytes * 1024 : static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES)) * page;
  return std::min(machine, MemoryOfControlGroup().left);
}

}  // namespace lamina::cpu
