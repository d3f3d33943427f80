// Tokens in 8 bits and their products with rows of 4-bit levels; the packing is that of countdown.ops.proxy.
//
// A word of 4 bytes holds eight neighbouring levels, 0 to 15: the first four in its low half bytes, the others in its
// high ones. For the word, Σ (level - 7.5) x is Σ (level - 8) x + Σ x / 2; a group of words shares one scale.
#pragma once

#include <math.h>

#include "types.hpp"

namespace countdown {
namespace VARIANT {

// A token in 255 even steps between ± its largest entry, padded with zeros to whole vectors.
struct Quantised {
    int8_t *low, *high;  // [4 * words]: entries 0 to 3 of each eight, and 4 to 7
    int32_t *starts;     // [words]: -8 Σ of the entries of a word
    float *halves;       // [groups]: Σ / 2 of the entries of a group
    float step;

    static int64_t padded(int64_t count) { return ceil_to(count, 16); }
    static int64_t bytes(int64_t words, int64_t groups) { return padded(words) * 12 + padded(groups) * 4; }

    Quantised() = default;
    Quantised(char *memory, int64_t words) {
        low = reinterpret_cast<int8_t *>(memory);
        high = low + 4 * padded(words);
        starts = reinterpret_cast<int32_t *>(high + 4 * padded(words));
        halves = reinterpret_cast<float *>(starts + padded(words));
    }
};

// A group is 2^shift words.
static inline int shift_of(int64_t words, int64_t groups) {
    int shift = 0;
    while (groups << shift < words) ++shift;
    return shift;
}

// x: [8 * padded words], zeros from d on. An entry that is not finite leaves nothing sensible: the caller sees to that.
static void quantise(const float *x, int64_t words, int64_t groups, Quantised &to) {
    float largest = 0;
    int64_t padded = Quantised::padded(words);
    for (int64_t c = 0; c < 8 * padded; ++c) largest = fabsf(x[c]) > largest ? fabsf(x[c]) : largest;
    float per_step = largest > 0 ? 127 / largest : 0;
    if (!(per_step <= 3e38f)) per_step = 3e38f;  // of entries so small that the quotient is infinite
    to.step = largest / 127;
    int shift = shift_of(words, groups);
    memset(to.halves, 0, size_t(Quantised::padded(groups)) * sizeof(float));
    for (int64_t w = 0; w < padded; ++w) {
        int8_t entries[8];
        int total = 0;
        for (int j = 0; j < 8; ++j) {
            float steps = rintf(x[8 * w + j] * per_step);
            entries[j] = int8_t(fabsf(steps) < 128 ? steps : 0);
            total += entries[j];
        }
        memcpy(to.low + 4 * w, entries, 4);
        memcpy(to.high + 4 * w, entries + 4, 4);
        to.starts[w] = -8 * total;
        if (w < words) to.halves[w >> shift] += 0.5f * float(total);
    }
}

// Rows of 4-bit levels of one matrix.
struct ProxyRows {
    const uint8_t *levels;
    const Fp16 *scales;
    int64_t words, groups;
    int shift;

    ProxyRows(const uint8_t *levels, const uint16_t *scales, int64_t words, int64_t groups)
        : levels(levels), scales(reinterpret_cast<const Fp16 *>(scales)), words(words), groups(groups),
          shift(shift_of(words, groups)) {}

    // Row i times the token, in the token's steps.
    float product(int64_t i, const Quantised &x) const {
        switch (shift) {
            case 0: return product<0>(i, x);
            case 1: return product<1>(i, x);
            case 2: return product<2>(i, x);
            default: return product<3>(i, x);
        }
    }

  private:
    // A vector of scales at a time, and all words of their groups.
    template <int SHIFT>
    float product(int64_t i, const Quantised &x) const {
        const uint8_t *row = levels + i * words * 4;
        const Fp16 *scale = scales + i * groups;
        Vec total = splat(0);
        int64_t group = 0;
        for (; group + Vec::width <= groups; group += Vec::width) {
            Vec some = load(scale + group);
            total = fma(some, load(x.halves + group), total);
#pragma GCC unroll 8
            for (int at = 0; at < Vec::width << SHIFT; at += Vec::width) {
                int64_t w = (group << SHIFT) + at;
                total = fma(products(row + 4 * w, x.low + 4 * w, x.high + 4 * w, x.starts + w),
                            spread<SHIFT>(some, at), total);
            }
        }
        if (group == groups) return sum(total);
        Vec some = load(scale + group, groups - group);
        total = fma(some, load(x.halves + group), total);
        for (int64_t first = group << SHIFT, w = first; w < words; w += Vec::width) {
            Vec part = w + Vec::width <= words
                           ? products(row + 4 * w, x.low + 4 * w, x.high + 4 * w, x.starts + w)
                           : products(row + 4 * w, x.low + 4 * w, x.high + 4 * w, x.starts + w, words - w);
            total = fma(part, spread<SHIFT>(some, int(w - first)), total);
        }
        return sum(total);
    }
};

}  // namespace VARIANT
}  // namespace countdown
