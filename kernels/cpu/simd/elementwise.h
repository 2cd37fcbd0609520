// Bias, GELU, casts, sums and the optimizer's update: loops over elements.
#pragma once

#include "simd/math.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

struct ErfGelu {
  static LAMINA_INLINE F Value(F x) { return GeluErf(x); }
  static LAMINA_INLINE GeluPoint Point(F x) { return GeluErfPoint(x); }
};
struct TanhGelu {
  static LAMINA_INLINE F Value(F x) { return GeluTanh(x); }
  static LAMINA_INLINE GeluPoint Point(F x) { return GeluTanhPoint(x); }
};
// Calls body with the functions of one form, so that the choice is made once.
template <typename Body>
LAMINA_INLINE void WithGelu(bool tanh, Body body) {
  if (tanh)
    body(TanhGelu{});
  else
    body(ErfGelu{});
}

template <typename In, typename E>
void BiasGelu(const BiasGeluRows& a, int64_t begin, int64_t end) {
  WithGelu(a.tanh, [&](auto gelu) {
    const E* bias = static_cast<const E*>(a.bias);
    for (int64_t r = begin; r < end; ++r) {
      const In* x = static_cast<const In*>(a.x) + r * a.n;
      E* pre = a.pre != nullptr ? static_cast<E*>(a.pre) + r * a.n : nullptr;
      E* slope = a.slope != nullptr ? static_cast<E*>(a.slope) + r * a.n : nullptr;
      E* y = static_cast<E*>(a.y) + r * a.n;
      Lanes(a.n, [&](int64_t j, auto part) {
        F v = Load(x + j, part);
        if (bias != nullptr) v += Load(bias + j, part);
        if (pre != nullptr) {
          Store(pre + j, v, part);
          v = Load(pre + j, part);  // as GeluBackward will see it: what it makes has the same bits
        }
        if (slope != nullptr) {
          Store(slope + j, v, part);
          const GeluPoint point = gelu.Point(Load(slope + j, part));  // of the same again
          Store(slope + j, point.slope, part);
          Store(y + j, point.value, part);
        } else {
          Store(y + j, a.gelu ? gelu.Value(v) : v, part);
        }
      });
    }
  });
}

template <typename E>
void GeluBackward(const GeluBackwardRows& a, int64_t begin, int64_t end) {
  if (a.column != nullptr)
    for (int64_t j = 0; j < a.n; ++j) a.column[j] = 0.0f;
  const auto rows = [&](auto slope_at) {
    for (int64_t r = begin; r < end; ++r) {
      const E* dy = static_cast<const E*>(a.dy) + r * a.n;
      E* dx = static_cast<E*>(a.dx) + r * a.n;
      Lanes(a.n, [&](int64_t j, auto part) {
        const F v = Load(dy + j, part) * slope_at(r * a.n + j, part);
        Store(dx + j, v, part);
        if (a.column != nullptr) Store(a.column + j, Load(a.column + j, part) + v, part);
      });
    }
  };
  if (a.slope != nullptr) {
    const E* slope = static_cast<const E*>(a.slope);
    return rows([&](int64_t i, auto part) { return Load(slope + i, part); });
  }
  WithGelu(a.tanh, [&](auto gelu) {
    const E* x = static_cast<const E*>(a.x);
    E* y = static_cast<E*>(a.y_again);
    rows([&](int64_t i, auto part) {
      const GeluPoint point = gelu.Point(Load(x + i, part));
      Store(y + i, point.slope, part);
      const F slope = Load(y + i, part);  // as BiasGelu would have kept it
      Store(y + i, point.value, part);
      return slope;
    });
  });
}

template <typename E>
void ColumnSum(const void* matrix, int64_t n, int64_t begin, int64_t end, float* out) {
  const E* x = static_cast<const E*>(matrix);
  constexpr int kStrip = 4;
  int64_t j = 0;
  for (; j + kStrip * kLanes <= n; j += kStrip * kLanes) {
    F sum[kStrip] = {};
    for (int64_t r = begin; r < end; ++r) {
      LAMINA_UNROLL
      for (int i = 0; i < kStrip; ++i) sum[i] += Load(x + r * n + j + i * kLanes);
    }
    LAMINA_UNROLL
    for (int i = 0; i < kStrip; ++i) Store(out + j + i * kLanes, sum[i]);
  }
  Lanes(n - j, [&](int64_t i, auto part) {
    F sum{};
    for (int64_t r = begin; r < end; ++r) sum += Load(x + r * n + j + i, part);
    Store(out + j + i, sum, part);
  });
}

template <typename E>
void ToF32(const void* src, float* dst, int64_t n) {
  const E* from = static_cast<const E*>(src);
  Lanes(n, [&](int64_t j, auto part) { Store(dst + j, Load(from + j, part), part); });
}
template <typename E>
void FromF32(const float* src, void* dst, int64_t n) {
  E* to = static_cast<E*>(dst);
  Lanes(n, [&](int64_t j, auto part) { Store(to + j, Load(src + j, part), part); });
}

inline void Add(const float* src, float* dst, int64_t n) {
  Lanes(n, [&](int64_t j, auto part) {
    Store(dst + j, Load(dst + j, part) + Load(src + j, part), part);
  });
}

// A sum of squares in double precision: squares of finite floats neither overflow nor vanish there,
// so the sum is finite exactly where every element is.
struct Squares {
  D sum[2] = {};

  LAMINA_INLINE void Add(F v) {
    float lane[kLanes];
    Store(lane, v);
    LAMINA_UNROLL
    for (int h = 0; h < 2; ++h) {
      HalfF half;
      __builtin_memcpy(&half, lane + h * kLanes / 2, sizeof(half));
      const D d = __builtin_convertvector(half, D);
      sum[h] += d * d;
    }
  }
  LAMINA_INLINE double Total() const {
    const D both = sum[0] + sum[1];
    double total = 0.0;
    for (int i = 0; i < kLanes / 2; ++i) total += both[i];
    return total;
  }
};

inline double SumSquares(const float* x, int64_t n) {
  Squares squares;
  Lanes(n, [&](int64_t j, auto part) { squares.Add(Load(x + j, part)); });
  return squares.Total();
}

template <typename E>
void AdamW(const AdamWElements& a, int64_t begin, int64_t end) {
  E* weights = static_cast<E*>(a.weights);
  Lanes(end - begin, [&](int64_t i, auto part) {
    const int64_t j = begin + i;
    const F g = Load(a.grad + j, part) * a.grad_scale;
    const F m = Load(a.m + j, part) * a.beta1 + g * (1.0f - a.beta1);
    const F v = Load(a.v + j, part) * a.beta2 + g * g * (1.0f - a.beta2);
    F w = Load(a.master + j, part);
    const F step = (m / a.correction1) / (Sqrt(v / a.correction2) + a.eps);
    w = w - a.lr * (a.weight_decay * w + step);
    Store(a.m + j, m, part);
    Store(a.v + j, v, part);
    Store(a.master + j, w, part);
    if (weights != nullptr) Store(weights + j, w, part);
  });
}

// LAMB's update before the trust ratio. Both passes compute it, with the same bits: it is not
// stored.
LAMINA_INLINE F LambUpdate(const LambElements& a, F m, F v, F w) {
  return (m / a.correction1) / (Sqrt(v / a.correction2) + a.eps) + a.weight_decay * w;
}

inline LambSquares LambMoments(const LambElements& a, int64_t begin, int64_t end) {
  Squares weight, update;
  Lanes(end - begin, [&](int64_t i, auto part) {
    const int64_t j = begin + i;
    const F g = Load(a.grad + j, part) * a.grad_scale;
    const F m = Load(a.m + j, part) * a.beta1 + g * (1.0f - a.beta1);
    const F v = Load(a.v + j, part) * a.beta2 + g * g * (1.0f - a.beta2);
    const F w = Load(a.master + j, part);
    Store(a.m + j, m, part);
    Store(a.v + j, v, part);
    weight.Add(w);
    update.Add(Keep(LambUpdate(a, m, v, w), 0.0f, part));  // beyond the part it may be 0/0
  });
  return LambSquares{weight.Total(), update.Total()};
}

template <typename E>
void LambStep(const LambElements& a, int64_t begin, int64_t end, float step) {
  E* weights = static_cast<E*>(a.weights);
  Lanes(end - begin, [&](int64_t i, auto part) {
    const int64_t j = begin + i;
    F w = Load(a.master + j, part);
    w = w - step * LambUpdate(a, Load(a.m + j, part), Load(a.v + j, part), w);
    Store(a.master + j, w, part);
    if (weights != nullptr) Store(weights + j, w, part);
  });
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
