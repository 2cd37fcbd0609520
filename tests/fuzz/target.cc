#include "tests/fuzz/target.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace lamina::fuzz {

const std::vector<Target>& Targets() {
  static const auto* const targets = [] {
    auto* all = new std::vector<Target>;
    for (std::vector<Target> some :
         {MessageTargets(), BrokerTargets(), FileTargets(), AccessTargets()})
      for (Target& target : some) all->push_back(std::move(target));
    return all;
  }();
  return *targets;
}

void Broken(absl::string_view promise) {
  std::fprintf(stderr, "broken promise: %.*s\n", static_cast<int>(promise.size()), promise.data());
  std::abort();
}

}  // namespace lamina::fuzz
