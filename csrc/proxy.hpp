// Tokens in 8 bits and their products with rows of 4-bit levels; the packing is that of countdown.ops.proxy.
//
// A word of 4 bytes holds eight neighbouring levels, 0 to 15: the first four in its low half bytes, the others in its
// high ones. For the word, Σ (level - 7.5) x is Σ level x - 7.5 Σ x; a group of words shares one scale.
#pragma once

#include <math.h>

#include "types.hpp"

namespace countdown {
namespace VARIANT {

// A token in 255 even steps between ± its largest entry. Entries are padded with zeros to whole vectors of words.
struct Quantised {
    int8_t *low, *high;  // [4 * words]: entries 0 to 3 of each eight, and 4 to 7
    float *offsets;      // [words]: 7.5 Σ of the entries of a word
    float step;

    static int64_t padded(int64_t words) { return ceil_to(words, 16); }
    static int64_t bytes(int64_t words) { return padded(words) * 12; }

    Quantised() = default;
    Quantised(char *memory, int64_t words) {
        low = reinterpret_cast<int8_t *>(memory);
        high = low + 4 * padded(words);
        offsets = reinterpret_cast<float *>(high + 4 * padded(words));
    }
};

// x: [8 * padded words], zeros from d on. An entry that is not finite leaves nothing sensible: the caller sees to that.
static void quantise(const float *x, int64_t words, Quantised &to) {
    float largest = 0;
    int64_t padded = Quantised::padded(words);
    for (int64_t c = 0; c < 8 * padded; ++c) largest = fabsf(x[c]) > largest ? fabsf(x[c]) : largest;
    float per_step = largest > 0 ? 127 / largest : 0;
    if (!(per_step <= 3e38f)) per_step = 3e38f;  // of entries so small that the quotient is infinite
    to.step = largest / 127;
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
        to.offsets[w] = 7.5f * float(total);
    }
}

// Rows of 4-bit levels of one matrix.
struct ProxyRows {
    const uint8_t *levels;
    const Fp16 *scales;
    int64_t words, groups;
    int shift;  // a group is 2^shift words

    ProxyRows(const uint8_t *levels, const uint16_t *scales, int64_t words, int64_t groups)
        : levels(levels), scales(reinterpret_cast<const Fp16 *>(scales)), words(words), groups(groups), shift(0) {
        while (groups << shift < words) ++shift;
    }

    // Row i times the token, in the token's steps.
    float product(int64_t i, const Quantised &x) const {
        const uint8_t *row = levels + i * words * 4;
        const Fp16 *scale = scales + i * groups;
        Vec total = splat(0);
        int64_t w = 0;
        for (; w + Vec::width <= words; w += Vec::width)
            total = fma(products(row + 4 * w, x.low + 4 * w, x.high + 4 * w) - load(x.offsets + w),
                        load_scales(scale + (w >> shift), shift, Vec::width), total);
        if (w < words)
            total = fma(products(row + 4 * w, x.low + 4 * w, x.high + 4 * w, words - w) - load(x.offsets + w),
                        load_scales(scale + (w >> shift), shift, words - w), total);
        return sum(total);
    }
};

}  // namespace VARIANT
}  // namespace countdown
