// The dtypes of entries, and conversions in plain C++ for any architecture.
//
// Everything here is `static`: each variant is compiled with instructions of its own, and a function that two of them
// shared would be linked once, perhaps with instructions that this CPU lacks. For the same reason no kernel calls
// templates of the standard library.
#pragma once

#include <string.h>

#include "countdown.h"

namespace countdown {

struct Bf16 {
    uint16_t bits;
};

struct Fp16 {
    uint16_t bits;
};

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float widen(float value) { return value; }

static inline float widen(Bf16 value) { return as_float(uint32_t(value.bits) << 16); }

static inline float widen(Fp16 value) {
    uint32_t magnitude = value.bits & 0x7fffu;
    // The exponent moves by 127 - 15; a multiplication does that for subnormal numbers too.
    float scaled = as_float(magnitude << 13) * 0x1p112f;
    uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0;
    return as_float(as_bits(scaled) | special | uint32_t(value.bits & 0x8000u) << 16);
}

// Of a pointer that may be misaligned.
template <class W>
static inline float widened(const W *p) {
    W value;
    memcpy(&value, p, sizeof value);
    return widen(value);
}

static inline void narrow(float value, float *to) { *to = value; }

// To nearest, halves to even.
static inline void narrow(float value, Bf16 *to) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    to->bits = uint16_t(value != value ? 0x7fc0u : rounded);
}

static inline void narrow(float value, Fp16 *to) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
    uint32_t result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // from 65520 on
        result = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 lets the unit rounding of floats do it
        result = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    }
    to->bits = uint16_t(result | (bits >> 16 & 0x8000u));
}

// f of a value of the type that a dtype names.
template <class F>
static inline auto as_type(int64_t dtype, F f) {
    switch (dtype) {
        case COUNTDOWN_FLOAT32: return f(float{});
        case COUNTDOWN_BFLOAT16: return f(Bf16{});
        default: return f(Fp16{});
    }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t ceil_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace countdown
