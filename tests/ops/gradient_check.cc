#include "gradient_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace lamina::testing {

double Dot(const ref::Vec& a, const ref::Vec& b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) sum += a[i] * b[i];
  return sum;
}

void ExpectGradient(const std::string& name, const std::function<double()>& loss, ref::Vec& input,
                    const ref::Vec& gradient) {
  ASSERT_EQ(input.size(), gradient.size()) << name;
  // The difference's own error is h^2/6 times the third derivative, plus roundoff * |loss| / h. At
  // h = 1e-5 that is about 1e-10 for losses and derivatives of order 1 to 10.
  constexpr double kStep = 1e-5, kTolerance = 2e-8;
  double scale = 1.0;
  for (double g : gradient) scale = std::max(scale, std::abs(g));
  for (size_t i = 0; i < input.size(); ++i) {
    const double kept = input[i];
    input[i] = kept + kStep;
    const double above = loss();
    input[i] = kept - kStep;
    const double below = loss();
    input[i] = kept;
    EXPECT_NEAR(gradient[i], (above - below) / (2 * kStep), kTolerance * scale)
        << name << "[" << i << "]";
  }
}

}  // namespace lamina::testing
