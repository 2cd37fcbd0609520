// What a device can do at most: by its maker's word, or measured.
#pragma once

#include "absl/strings/string_view.h"
#include "lamina/kernels/backend.h"
#include "server/metrics/metrics.h"

namespace lamina {

// `dtype` is one that a stack computes in.
ComputeType ComputeTypeOf(DType dtype);

// FLOP/s of dense products of this dtype that accumulate in fp32 (fp32: without TF32), as the data
// sheet of the card of this name says, at its boost clock; 0: the name is not known.
double KnownPeakFlops(absl::string_view device_name, DType dtype);

// FLOP/s of a large product on this device, the best of a few; 0 where it can't be run (there is
// no memory for it). Gives back what it allocates. In the device's turn.
double MeasurePeakFlops(Backend& backend, DType dtype);

}  // namespace lamina
