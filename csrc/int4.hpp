// Rows of weights in 4 bits, as countdown.weights.int4 says: levels of all groups of 64 entries, then their scales.
//
// A group is 16 words of 16 bits; entry 16 k + j is the k-th half byte of word j, so that one shift gives a vector of
// entries that follow one another. It stands for (level - 7.5) times the group's scale.
#pragma once

#include "rows.hpp"

namespace countdown::VARIANT {

constexpr int64_t INT4_GROUP = 64, INT4_LEVELS = INT4_GROUP / 2;
// Groups whose scales are widened together.
constexpr int64_t INT4_SLAB = 16;
// Vectors of a group.
constexpr int INT4_VECTORS = INT4_GROUP / Vec::width;

// The scales of R rows from group `first` on, of `count` groups.
template <int R>
static inline void widen_scales(const Rows &rows, int64_t groups, int64_t first, int64_t count,
                                float (*scales)[INT4_SLAB]) {
    for (int k = 0; k < R; ++k) {
        const Fp16 *from = reinterpret_cast<const Fp16 *>(rows.at<char>(k, groups * INT4_LEVELS)) + first;
        for (int64_t c = 0; c < count; c += Vec::width) {
            Vec some = c + Vec::width <= count ? load(from + c) : load(from + c, count - c);
            store(scales[k] + c, some);
        }
    }
}

// Start reading R rows `ahead` from a group on; at the first group their scales, too.
template <int R>
static inline void prefetch_group(const Rows &ahead, int64_t groups, int64_t group) {
    constexpr int64_t each = line / INT4_LEVELS;
    for (int k = 0; k < R; ++k) {
        if (group == 0)
            for (int64_t at = 0; at < 2 * groups; at += line) prefetch(ahead.at<char>(k, groups * INT4_LEVELS + at));
        if (group % each == 0) prefetch(ahead.at<char>(k, group * INT4_LEVELS));
    }
}

// totals[k * T + t]: vectors that add up to Σ_c rows[k][c] x[t][c], of R rows and T tokens; see `totals_of`.
template <int R, int T, bool AHEAD>
static inline void int4_totals(const Rows &rows, const float *x, int64_t x_stride, int64_t d, Vec *totals,
                               const Rows *ahead) {
    const int64_t groups = d / INT4_GROUP;
    for (int k = 0; k < R * T; ++k) totals[k] = splat(0);
    for (int64_t first = 0; first < groups; first += INT4_SLAB) {
        float scales[R][INT4_SLAB];
        const int64_t count = least(INT4_SLAB, groups - first);
        widen_scales<R>(rows, groups, first, count, scales);
        for (int64_t g = 0; g < count; ++g) {
            if (AHEAD) prefetch_group<R>(*ahead, groups, first + g);
            const float *token = x + (first + g) * INT4_GROUP;
#pragma GCC unroll 8
            for (int k = 0; k < R; ++k) {
                Vec w[INT4_VECTORS];
                unpack_levels(rows.at<char>(k, (first + g) * INT4_LEVELS), w);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    Vec of_group = w[0] * load(token + t * x_stride);
#pragma GCC unroll 8
                    for (int v = 1; v < INT4_VECTORS; ++v)
                        of_group = fma(w[v], load(token + t * x_stride + v * Vec::width), of_group);
                    totals[k * T + t] = fma(of_group, splat(scales[k][g]), totals[k * T + t]);
                }
            }
        }
    }
}

template <int R, int T, bool AHEAD>
static void int4_products(const Rows &rows, const void *x, int64_t x_stride, int64_t d, float *out, const Rows *ahead) {
    Vec totals[R * T];
    int4_totals<R, T, AHEAD>(rows, static_cast<const float *>(x), x_stride, d, totals, ahead);
    sum_each<R * T>(totals, out);
}

// P rows at a time.
template <int R, int P, int T>
static void int4_in_blocks(const Rows &rows, const void *x, int64_t x_stride, int64_t d, float *out,
                           const Rows *ahead) {
    for (int k = 0; k < R; k += P) {
        Rows some, later;
        for (int i = 0; i < P; ++i) some.row[i] = rows.row[k + i], later.row[i] = ahead->row[k + i];
        int4_products<P, T, true>(some, x, x_stride, d, out + k * T, &later);
    }
}

// N rows that follow one another, P side by side, while what lies a page further on is fetched.
template <int N, int P, int T>
static void int4_in_turn(const char *row, int64_t stride, const void *x, int64_t x_stride, int64_t d, float *out) {
    Vec totals[N * T];
    for (int k = 0; k < N; k += P) {
        Rows some, later;
        for (int i = 0; i < P; ++i, row += stride) some.row[i] = row, later.row[i] = row + page;
        int4_totals<P, T, true>(some, static_cast<const float *>(x), x_stride, d, totals + k * T, &later);
    }
    sum_each<N * T>(totals, out);
}

// sums[t][c] += Σ_k factors[k * T + t] rows[k][c] of R rows, for N tokens from t on; see `add_rows`.
template <int R, int T, int N>
static inline void int4_add_group(const Rows &rows, const float (*scales)[INT4_SLAB], int64_t group, int64_t place,
                                  const float *factors, int t, float *sums, int64_t sums_stride) {
    Vec total[N][INT4_VECTORS];
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < INT4_VECTORS; ++v)
            total[n][v] = load(sums + (t + n) * sums_stride + group * INT4_GROUP + v * Vec::width);
#pragma GCC unroll 8
    for (int k = 0; k < R; ++k) {
        Vec w[INT4_VECTORS];
        unpack_levels(rows.at<char>(k, group * INT4_LEVELS), w);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            Vec factor = splat(factors[k * T + t + n] * scales[k][place]);
#pragma GCC unroll 8
            for (int v = 0; v < INT4_VECTORS; ++v) total[n][v] = fma(factor, w[v], total[n][v]);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < INT4_VECTORS; ++v)
            store(sums + (t + n) * sums_stride + group * INT4_GROUP + v * Vec::width, total[n][v]);
}

template <int R, int T, bool AHEAD>
static void int4_add(const Rows &rows, const float *factors, int64_t d, float *sums, int64_t sums_stride,
                     const Rows *ahead) {
    // Tokens that are summed side by side, as many as there are registers for.
    constexpr int most = Vec::width < 16 ? 1 : 4;
    const int64_t groups = d / INT4_GROUP;
    for (int64_t first = 0; first < groups; first += INT4_SLAB) {
        float scales[R][INT4_SLAB];
        const int64_t count = least(INT4_SLAB, groups - first);
        widen_scales<R>(rows, groups, first, count, scales);
        for (int64_t g = 0; g < count; ++g) {
            if (AHEAD) prefetch_group<R>(*ahead, groups, first + g);
            int t = 0;
            for (; t + most <= T; t += most)
                int4_add_group<R, T, most>(rows, scales, first + g, g, factors, t, sums, sums_stride);
            for (; t < T; ++t) int4_add_group<R, T, 1>(rows, scales, first + g, g, factors, t, sums, sums_stride);
        }
    }
}

static RowLoops int4_loops(int64_t tokens) {
    return with_count(tokens, [](auto count) {
        constexpr int T = count, R = BLOCK, P = T == 1 ? 4 : T <= 4 ? 2 : 1, N = 8 / T;
        return RowLoops{.tokens = T,
                        .rows_at_once = R,
                        .rows_in_turn = N,
                        .in_turn = int4_in_turn<N, N < P ? N : P, T>,
                        .one_in_turn = int4_in_turn<1, 1, T>,
                        .row_products = int4_products<1, T, false>,
                        .block_products = int4_in_blocks<R, P, T>,
                        .row_add = int4_add<1, T, false>,
                        .block_add = {int4_add<R, T, false>, int4_add<R, T, true>}};
    });
}

}  // namespace countdown::VARIANT
