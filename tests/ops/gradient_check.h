// Central differences in fp64.
#pragma once

#include <functional>
#include <string>

#include "ref/ops.h"

namespace lamina::testing {

double Dot(const ref::Vec& a, const ref::Vec& b);

// Expects `gradient` to be the derivative of `loss` by each element of `input`, which `loss` reads.
void ExpectGradient(const std::string& name, const std::function<double()>& loss, ref::Vec& input,
                    const ref::Vec& gradient);

}  // namespace lamina::testing
