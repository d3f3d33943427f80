// Vectors of 8 floats in plain C++: loops of fixed length, for compilers to vectorise as the architecture allows.
#pragma once

#include <math.h>

#include "types.hpp"

namespace countdown::VARIANT {

struct Vec {
    static constexpr int width = 8;
    float v[width];
};

#define EACH for (int i = 0; i < Vec::width; ++i)

static inline Vec splat(float value) {
    Vec a;
    EACH a.v[i] = value;
    return a;
}

// Loads and stores go through copies, as pointers may be misaligned.
template <class W>
static inline Vec load(const W *p) {
    W some[Vec::width];
    memcpy(some, p, sizeof some);
    Vec a;
    EACH a.v[i] = countdown::widen(some[i]);
    return a;
}
// The first n, 0 < n < width, and zeros.
template <class W>
static inline Vec load(const W *p, int64_t n) {
    W some[Vec::width] = {};
    memcpy(some, p, n * sizeof(W));
    return load(some);
}
// The first n, 0 < n <= width.
template <class W>
static inline void store(W *p, Vec a, int64_t n) {
    W some[Vec::width];
    EACH narrow(a.v[i], some + i);
    memcpy(p, some, n * sizeof(W));
}
static inline void store(float *p, Vec a) { memcpy(p, a.v, sizeof a.v); }

// As if stored in W and loaded again.
template <class W>
static inline Vec rounded(Vec a, W like) {
    EACH {
        narrow(a.v[i], &like);
        a.v[i] = countdown::widen(like);
    }
    return a;
}

static inline Vec operator+(Vec a, Vec b) {
    EACH a.v[i] += b.v[i];
    return a;
}
static inline Vec operator-(Vec a, Vec b) {
    EACH a.v[i] -= b.v[i];
    return a;
}
static inline Vec operator*(Vec a, Vec b) {
    EACH a.v[i] *= b.v[i];
    return a;
}
static inline Vec operator/(Vec a, Vec b) {
    EACH a.v[i] /= b.v[i];
    return a;
}
static inline Vec fma(Vec a, Vec b, Vec c) {
    EACH c.v[i] += a.v[i] * b.v[i];
    return c;
}
// b where it is NaN.
static inline Vec at_least(float a, Vec b) {
    EACH b.v[i] = a > b.v[i] ? a : b.v[i];
    return b;
}
static inline Vec at_most(float a, Vec b) {
    EACH b.v[i] = a < b.v[i] ? a : b.v[i];
    return b;
}
static inline Vec nearest(Vec a) {
    EACH a.v[i] = rintf(a.v[i]);
    return a;
}
// 2^n of whole n from -126 to 127.
static inline Vec power_of_2(Vec n) {
    EACH n.v[i] = as_float(n.v[i] == n.v[i] ? uint32_t(int32_t(n.v[i]) + 127) << 23 : 0);
    return n;
}
static inline float sum(Vec a) {
    float total = 0;
    EACH total += a.v[i];
    return total;
}
static inline void sum_eight(const Vec *a, float *out) {
    for (int k = 0; k < 8; ++k) out[k] = sum(a[k]);
}

// The 64 entries of a group in 4 bits, less their scale; see int4.hpp.
static inline void unpack_levels(const char *words, Vec *out) {
    uint16_t some[16];
    memcpy(some, words, sizeof some);
    for (int k = 0; k < 4; ++k)
        for (int half = 0; half < 2; ++half)
            EACH out[2 * k + half].v[i] = float(some[Vec::width * half + i] >> 4 * k & 15) - 7.5f;
}

// One step of a product of weights and a token, whose dtype in memory is Operand.
template <class W>
struct Product {
    using Operand = float;
    static constexpr int step = Vec::width;
    static inline Vec add(const W *w, const float *x, Vec acc) { return fma(load(w), load(x), acc); }
    static inline Vec add(const W *w, const float *x, Vec acc, int64_t n) { return fma(load(w, n), load(x), acc); }
};

// Products of words of eight 4-bit levels with eight entries of a token, summed word by word: a lane a neuron.
class WordSums {
  public:
    // levels: a word of each neuron; low and high: the token's entries that its half bytes are multiplied with.
    inline void add(const uint8_t *levels, int32_t low, int32_t high) {
        int8_t x[4], z[4];
        memcpy(x, &low, 4);
        memcpy(z, &high, 4);
        // By pairs of bytes, the first the lower, whose four products fit 16 bits: compilers make vectors of that.
        constexpr int count = 2 * Vec::width;
        uint16_t pairs[count];
        memcpy(pairs, levels, sizeof pairs);
        int16_t factors[4][count], products[count];
        for (int k = 0; k < count; ++k) {
            factors[0][k] = x[k % 2 * 2];
            factors[1][k] = z[k % 2 * 2];
            factors[2][k] = x[k % 2 * 2 + 1];
            factors[3][k] = z[k % 2 * 2 + 1];
        }
        for (int k = 0; k < count; ++k)
            products[k] = int16_t((pairs[k] & 15) * factors[0][k] + (pairs[k] >> 4 & 15) * factors[1][k] +
                                  (pairs[k] >> 8 & 15) * factors[2][k] + (pairs[k] >> 12) * factors[3][k]);
        EACH sums_[i] += products[2 * i] + products[2 * i + 1];
    }
    inline Vec total() const {
        Vec a;
        EACH a.v[i] = float(sums_[i]);
        return a;
    }

  private:
    int32_t sums_[Vec::width] = {};
};

#undef EACH

}  // namespace countdown::VARIANT
