#include "loss_scale.h"

#include <algorithm>

namespace lamina {

void StartLossScale(const StackConfig& config, StackCounters& counters) {
  counters.loss_scale = config.dynamic_loss_scale ? config.initial_loss_scale : 1.0;
  counters.clean_steps = 0;
  counters.overflows_tolerated = config.loss_scale_hysteresis;
}

void AdjustLossScale(const StackConfig& config, bool overflow, StackCounters& counters) {
  if (overflow) {
    counters.clean_steps = 0;
    if (counters.overflows_tolerated > 1) {
      --counters.overflows_tolerated;
    } else {
      counters.loss_scale =
          std::max(counters.loss_scale * config.loss_scale_backoff_factor, config.min_loss_scale);
    }
    return;
  }
  if (++counters.clean_steps < config.loss_scale_growth_interval) return;
  counters.clean_steps = 0;
  counters.overflows_tolerated = config.loss_scale_hysteresis;
  counters.loss_scale =
      std::min(counters.loss_scale * config.loss_scale_growth_factor, StackConfig::kMaxLossScale);
}

}  // namespace lamina
