// Times ops on the device, and what the device can do at most.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "device.h"
#include "lamina/kernels/backend.h"
#include "layer_ops.h"
#include "power.h"

namespace lamina::bench {

struct Timing {
  double median_us = 0, min_us = 0, max_us = 0;  // a call, over the repetitions
  size_t moved_bytes = 0;                        // by a call
};

// An op called again and again, without a pause, for so long that a card at its power limit has
// brought its clock down to what the op allows. Of calls between two changes of the driver's energy
// counter.
struct Sustained {
  double us = 0, millijoules = 0;  // a call
  double watts = 0, megahertz = 0;
};

class OpTimer {
 public:
  OpTimer(Device& device, int repetitions);

  // Calls follow one another on the device, each on operands that are not in its cache.
  Timing Time(const OpCase& op, const Workspace& workspace);
  // For about so many seconds, of which the first third only heats.
  Sustained Sustain(const OpCase& op, const Workspace& workspace, const PowerMeter& meter,
                    double seconds);

 private:
  struct Calls {
    std::vector<Operands> operands;
    std::vector<OpCall> calls;
  };
  // With as many sets of operands as push one another out of any cache.
  Calls Prepare(const OpCase& op);
  // Seconds a call of `count`.
  double Run(const std::vector<OpCall>& calls, const Workspace& workspace, int64_t count);

  Device& device_;
  int repetitions_;
  Tensors head_start_;
  TensorView from_, to_;
  size_t next_ = 0;
};

// Workspace that is enough for any op at these dims, and for what a layer's ops leave to
// FinishSums.
class Scratch {
 public:
  Scratch(Device& device, const LayerDims& dims);
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const Workspace& workspace() const { return workspace_; }

 private:
  Tensors tensors_;
  PendingSums pending_;
  Workspace workspace_;
};

// What this device did in this run: a large product's FLOP/s, a copy's bytes a second, read and
// written.
struct Ceilings {
  double flops = 0, bytes = 0;
  // The same two for long, where a meter was given.
  struct Energy {
    Sustained product, copy;
    double flop_picojoules, byte_picojoules;
  };
  std::optional<Energy> energy;

  // The least time in which an op can be done.
  double FloorUs(double op_flops, double op_bytes) const;
};

// `meter`: may be null; else both are also called for about `seconds`.
Ceilings MeasureCeilings(Device& device, OpTimer& timer, DType dtype,
                         const PowerMeter* meter = nullptr, double seconds = 0);

}  // namespace lamina::bench
