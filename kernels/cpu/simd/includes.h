// Everything from outside that the vector kernels use, gathered so that it comes before a
// translation unit's instruction set is chosen. Few and free of templates: those would be
// instantiated after it, and the linker might keep that copy for everybody.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "half.h"
#include "lamina/kernels/philox.h"
#include "simd/kernels.h"
