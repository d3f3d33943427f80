// Tokens in 8 bits and their products with rows of 4-bit levels; the packing is that of countdown.ops.proxy.
//
// A word of 4 bytes holds eight neighbouring levels, 0 to 15: the first four in its low half bytes, the others in its
// high ones. For the word, Σ (level - 7.5) x is Σ (level - 8) x + Σ x / 2; a group of words shares one scale.
#pragma once

#include <math.h>

#include "rows.hpp"

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

// The 4-bit rows of a neuron, of gate and of up.
struct ProxyRows {
    const uint8_t *levels[2];
    const Fp16 *scales[2];

    ProxyRows after(int64_t words, int64_t groups) const {
        return {{levels[0] + 4 * words, levels[1] + 4 * words}, {scales[0] + groups, scales[1] + groups}};
    }
};

// Rows of less than this are fetched ahead: short ones end before the processor's prefetchers follow them.
constexpr int64_t short_row = 1024;

// Start reading what lies a page behind these levels, and as many rows behind these scales.
static inline void prefetch_later(const ProxyRows &rows, int64_t words, int64_t scales_of_a_page) {
    if (4 * words >= short_row) return;
    for (int k = 0; k < 2; ++k) {
        for (int64_t at = 0; at < 4 * words; at += line) prefetch(rows.levels[k] + page + at);
        prefetch(rows.scales[k] + scales_of_a_page);
    }
}

// totals[k]: a vector that adds up to row k times the token, in the token's steps: a vector of scales at a time, and all
// words of their groups. The two rows share what is loaded of the token, and neither sum waits for the other.
template <int SHIFT>
static inline void proxy_totals(const ProxyRows &rows, int64_t words, int64_t groups, const Quantised &x, Vec *totals) {
    Vec total[2] = {splat(0), splat(0)};
    for (int64_t group = 0; group < groups; group += Vec::width) {
        Vec some[2], halves = load(x.halves + group);
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            const Fp16 *scales = rows.scales[k] + group;
            some[k] = group + Vec::width <= groups ? load(scales) : load(scales, groups - group);
            total[k] = fma(some[k], halves, total[k]);
        }
        int64_t first = group << SHIFT;
        for (int at = 0; at < Vec::width << SHIFT; at += Vec::width) {
            int64_t w = first + at, left = words - w;
            if (left <= 0) break;
            const int8_t *low = x.low + 4 * w, *high = x.high + 4 * w;
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const uint8_t *levels = rows.levels[k] + 4 * w;
                Vec part = left < Vec::width ? products(levels, low, high, x.starts + w, left)
                                             : products(levels, low, high, x.starts + w);
                total[k] = fma(part, spread<SHIFT>(some[k], at), total[k]);
            }
        }
    }
    totals[0] = total[0];
    totals[1] = total[1];
}

// What the rows of `count` neurons from the first on are times the token, gate[k * stride] and up[k * stride].
template <int SHIFT>
static void proxy_products(ProxyRows rows, int64_t count, int64_t words, int64_t groups, const Quantised &x,
                           float *gate, float *up, int64_t stride) {
    int64_t scales_of_a_page = page / (4 * words) * groups;
    for (int64_t k = 0; k < count; k += 4) {
        Vec totals[8];
        float sums[8];
        for (int j = 0; j < 4; ++j) {
            if (k + j >= count) {
                totals[2 * j] = totals[2 * j + 1] = splat(0);
                continue;
            }
            prefetch_later(rows, words, scales_of_a_page);
            proxy_totals<SHIFT>(rows, words, groups, x, totals + 2 * j);
            rows = rows.after(words, groups);
        }
        sum_eight(totals, sums);
        for (int64_t j = 0; j < 4 && k + j < count; ++j) {
            gate[(k + j) * stride] = sums[2 * j] * x.step;
            up[(k + j) * stride] = sums[2 * j + 1] * x.step;
        }
    }
}

static void proxy_products(const ProxyRows &rows, int64_t count, int64_t words, int64_t groups, const Quantised &x,
                           float *gate, float *up, int64_t stride) {
    switch (shift_of(words, groups)) {
        case 0: return proxy_products<0>(rows, count, words, groups, x, gate, up, stride);
        case 1: return proxy_products<1>(rows, count, words, groups, x, gate, up, stride);
        case 2: return proxy_products<2>(rows, count, words, groups, x, gate, up, stride);
        default: return proxy_products<3>(rows, count, words, groups, x, gate, up, stride);
    }
}

}  // namespace VARIANT
}  // namespace countdown
