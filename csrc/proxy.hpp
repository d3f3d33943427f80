// Tokens in 8 bits and their products with rows of 4-bit levels; packing is that of countdown.ops.proxy, tiles
// are those of countdown.ops.proxy_tiles.
//
// A word of 4 bytes holds eight neighbouring levels, 0 to 15: the first four in its low half bytes, the others in its
// high ones. Words of 16 neurons stand side by side, so that a vector multiplies a word of each with the same eight
// entries of the token and nothing is added across its lanes. A group of words shares one scale; for a group,
// Σ (level - 7.5) x is Σ level x - 7.5 Σ x.
#pragma once

#include <math.h>

#include "rows.hpp"

namespace countdown::VARIANT {

constexpr int TILE = 16;

// A token in 255 even steps between ± its largest entry.
struct Quantised {
    int32_t *low, *high;  // [words]: entries 0 to 3 of each eight as bytes, and 4 to 7
    float *offsets;       // [groups]: -7.5 Σ of the entries of a group
    float step;

    static int64_t bytes(int64_t words, int64_t groups) { return words * 8 + groups * 4; }

    Quantised() = default;
    Quantised(char *memory, int64_t words) {
        low = reinterpret_cast<int32_t *>(memory);
        high = low + words;
        offsets = reinterpret_cast<float *>(high + words);
    }
};

// x: [8 * words], zeros from d on. An entry that is not finite leaves nothing sensible: the caller sees to that.
static void quantise(const float *x, int64_t words, int64_t groups, Quantised &to) {
    float largest = 0;
    for (int64_t c = 0; c < 8 * words; ++c) largest = fabsf(x[c]) > largest ? fabsf(x[c]) : largest;
    float per_step = largest > 0 ? 127 / largest : 0;
    if (!(per_step <= 3e38f)) per_step = 3e38f;  // of entries so small that the quotient is infinite
    to.step = largest / 127;
    int64_t w = 0;
    for (int64_t group = 0; group < groups; ++group) {
        int total = 0;
        for (int64_t stop = w + words / groups; w < stop; ++w) {
            int8_t entries[8];
            for (int j = 0; j < 8; ++j) {
                float steps = rintf(x[8 * w + j] * per_step);
                entries[j] = int8_t(fabsf(steps) < 128 ? steps : 0);
                total += entries[j];
            }
            memcpy(to.low + w, entries, 4);
            memcpy(to.high + w, entries + 4, 4);
        }
        to.offsets[group] = -7.5f * float(total);
    }
}

// The 4-bit rows of 16 neurons, of gate and of up; or of twice 16 outputs.
struct TwoTiles {
    const uint8_t *levels[2];  // [words, TILE] of 4 bytes
    const Fp16 *scales[2];     // [groups, TILE]
};

// How many bytes ahead of what is multiplied the levels are fetched.
constexpr int64_t levels_ahead = 1024;

// What the rows of two tiles are times the token. The two share what is loaded of it, and neither sum waits for the other.
static inline void tile_products(const TwoTiles &tile, int64_t words, int64_t groups, const Quantised &x,
                                 float (*out)[TILE]) {
    constexpr int parts = TILE / Vec::width;
    const int64_t size = words / groups;
    Vec total[2][parts];
    for (auto &some : total)
        for (Vec &part : some) part = splat(0);
    int64_t w = 0;
    for (int64_t group = 0; group < groups; ++group) {
        WordSums sums[2][parts];
        for (int64_t stop = w + size; w < stop; ++w) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const uint8_t *levels = tile.levels[k] + 4 * w * TILE;
                prefetch(levels + levels_ahead);
#pragma GCC unroll 2
                for (int p = 0; p < parts; ++p) sums[k][p].add(levels + 4 * p * Vec::width, x.low[w], x.high[w]);
            }
        }
        Vec offset = splat(x.offsets[group]);
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            const Fp16 *scales = tile.scales[k] + group * TILE;
#pragma GCC unroll 2
            for (int p = 0; p < parts; ++p)
                total[k][p] = fma(load(scales + p * Vec::width), sums[k][p].total() + offset, total[k][p]);
        }
    }
    for (int p = 0; p < parts; ++p) {
        store(out[0] + p * Vec::width, total[0][p] * splat(x.step));
        store(out[1] + p * Vec::width, total[1][p] * splat(x.step));
    }
}

}  // namespace countdown::VARIANT
