// The activations of gated FFNs, on vectors of floats. NaN stays NaN.
#pragma once

#include <math.h>

#include "countdown.h"

namespace countdown::VARIANT {

// Within 2 units in the last place; inputs are limited to where the result is a normal number.
static inline Vec exponential(Vec x) {
    x = at_most(88.0f, at_least(-87.0f, x));
    Vec n = nearest(x * splat(1.44269504f));
    Vec r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                  5.0000001201e-1f};
    for (float coefficient : coefficients) p = fma(p, r, splat(coefficient));
    p = fma(p * r, r, r + splat(1));
    return p * power_of_2(n);
}

static inline Vec times_sigmoid(Vec x, Vec z) { return x / (splat(1) + exponential(splat(0) - z)); }

static inline Vec silu(Vec x) { return times_sigmoid(x, x); }

// (1 + tanh z) / 2 is the sigmoid of 2z.
static inline Vec gelu_tanh(Vec x) {
    return times_sigmoid(x, splat(1.5957691216057308f) * fma(splat(0.044715f) * x, x * x, x));
}

static inline Vec gelu(Vec x) {
    float values[Vec::width];
    store(values, x);
    for (float &value : values) value = 0.5f * value * (1 + erff(value * 0.70710678f));
    return load(values);
}

static inline Vec relu(Vec x) { return at_least(0, x); }

static inline Vec activated(Vec x, int64_t activation) {
    switch (activation) {
        case COUNTDOWN_SILU: return silu(x);
        case COUNTDOWN_GELU_TANH: return gelu_tanh(x);
        case COUNTDOWN_GELU: return gelu(x);
        default: return relu(x);
    }
}

}  // namespace countdown::VARIANT
