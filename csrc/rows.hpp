// The two loops that read weights: products of rows and tokens, and sums of rows.
//
// A matrix that is read from end to end is read one row at a time, which the processor's prefetchers follow. Rows of
// active neurons lie anywhere: there, several are read side by side, while the ones that come after are fetched, line by
// line. Into the second cache, not the first: more lines can be on their way to it than to the first.
#pragma once

#include "types.hpp"

namespace countdown::VARIANT {

constexpr int MOST_TOKENS = COUNTDOWN_MOST_TOKENS;
// Rows that are read side by side, as many as there are registers for their sums.
constexpr int BLOCK = Vec::width < 16 ? 4 : 8;
// Tokens are copied with zeros up to a multiple of this many entries, so that they are loaded whole.
constexpr int64_t PADDING = 64;

template <class W>
using Operand = typename Product<W>::Operand;

template <int N>
struct Count {
    constexpr operator int() const { return N; }
};

// f of a Count that is known when it compiles, of 1 to MOST_TOKENS.
template <class F>
static auto with_count(int64_t count, F f) {
    switch (count) {
        case 1: return f(Count<1>{});
        case 2: return f(Count<2>{});
        case 3: return f(Count<3>{});
        case 4: return f(Count<4>{});
        case 5: return f(Count<5>{});
        case 6: return f(Count<6>{});
        case 7: return f(Count<7>{});
        default: return f(Count<8>{});
    }
}

// Copy x [d] and zeros up to `width`, a multiple of Vec::width; return whether all of x is finite.
template <class W, class To>
static bool copy_token(const W *x, int64_t d, int64_t width, To *to) {
    Vec zeros = splat(0);
    for (int64_t c = 0; c < width; c += Vec::width) {
        Vec some = c + Vec::width <= d ? load(x + c) : c < d ? load(x + c, d - c) : splat(0);
        store(to + c, some, Vec::width);
        zeros = fma(some, splat(0), zeros);  // NaN from an entry that is not finite
    }
    return sum(zeros) == 0;
}

// Where rows begin, of any format.
struct Rows {
    const void *row[BLOCK] = {};

    // Entry c of row k.
    template <class W>
    const W *at(int64_t k, int64_t c) const {
        return static_cast<const W *>(row[k]) + c;
    }
};

constexpr int64_t page = 4096, line = 64;

// Start reading a line into the second cache. An address that nothing lies at does no harm.
static inline void prefetch(const void *address) {
#ifdef __GNUC__
    __builtin_prefetch(address, 0, 2);
    asm volatile("");  // GCC takes a function that only prefetches for one without effect, and drops calls of it
#else
    (void)address;
#endif
}

// Start reading what lies `c` to `c + count` entries into each of R rows, by the line.
template <class W, int R>
static inline void prefetch(const Rows &rows, int64_t c, int count) {
    constexpr int entries = int(line / sizeof(W));
#pragma GCC unroll 8
    for (int k = 0; k < R; ++k)
        for (int at = 0; at < count; at += entries)
            if (count >= entries || c % entries == 0) prefetch(rows.at<W>(k, c + at));
}

// out[k] = sum(totals[k]) for N vectors.
template <int N>
static inline void sum_each(const Vec *totals, float *out) {
    int k = 0;
    for (; k + 8 <= N; k += 8) sum_eight(totals + k, out + k);
    for (; k < N; ++k) out[k] = sum(totals[k]);
}

// totals[k * T + t]: vectors that add up to Σ_c rows[k][c] x[t][c], of R rows and T tokens, while R rows `ahead` are
// fetched, if AHEAD. A row's total with a token is the same for any R and T.
template <class W, int R, int T, bool AHEAD>
static inline void totals_of(const Rows &rows, const Operand<W> *x, int64_t x_stride, int64_t d, Vec *totals,
                             const Rows *ahead) {
    using P = Product<W>;
    constexpr int step = P::step;
    Vec even[R][T], odd[R][T];
    for (int k = 0; k < R; ++k)
        for (int t = 0; t < T; ++t) even[k][t] = odd[k][t] = splat(0);
    int64_t c = 0;
    for (; c + 2 * step <= d; c += 2 * step) {
        if (AHEAD) prefetch<W, R>(*ahead, c, 2 * step);
#pragma GCC unroll 8
        for (int k = 0; k < R; ++k) {
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                even[k][t] = P::add(rows.at<W>(k, c), x + t * x_stride + c, even[k][t]);
                odd[k][t] = P::add(rows.at<W>(k, c + step), x + t * x_stride + c + step, odd[k][t]);
            }
        }
    }
    for (int k = 0; k < R; ++k) {
        for (int t = 0; t < T; ++t) {
            int64_t rest = c;
            const Operand<W> *token = x + t * x_stride;
            if (rest + step <= d) {
                even[k][t] = P::add(rows.at<W>(k, rest), token + rest, even[k][t]);
                rest += step;
            }
            if (rest < d) odd[k][t] = P::add(rows.at<W>(k, rest), token + rest, odd[k][t], d - rest);
            totals[k * T + t] = even[k][t] + odd[k][t];
        }
    }
}

// out[k * T + t] = Σ_c rows[k][c] x[t][c] for R rows side by side and T tokens.
template <class W, int R, int T, bool AHEAD>
static void products_of(const Rows &rows, const void *x, int64_t x_stride, int64_t d, float *out, const Rows *ahead) {
    Vec totals[R * T];
    totals_of<W, R, T, AHEAD>(rows, static_cast<const Operand<W> *>(x), x_stride, d, totals, ahead);
    sum_each<R * T>(totals, out);
}

// The same for R rows, P at a time: registers hold no more sums than that.
template <class W, int R, int P, int T>
static void products_in_blocks(const Rows &rows, const void *x, int64_t x_stride, int64_t d, float *out,
                               const Rows *ahead) {
    for (int k = 0; k < R; k += P) {
        Rows some, later;
        for (int i = 0; i < P; ++i) some.row[i] = rows.row[k + i], later.row[i] = ahead->row[k + i];
        products_of<W, P, T, true>(some, x, x_stride, d, out + k * T, &later);
    }
}

// The same for N rows one after the other, `stride` bytes apart, while what lies a page further on is fetched.
template <class W, int N, int T>
static void products_in_turn(const char *row, int64_t stride, const void *x, int64_t x_stride, int64_t d, float *out) {
    Vec totals[N * T];
    for (int k = 0; k < N; ++k, row += stride) {
        Rows later = {{row + page}};
        totals_of<W, 1, T, true>({{row}}, static_cast<const Operand<W> *>(x), x_stride, d, totals + k * T, &later);
    }
    sum_each<N * T>(totals, out);
}

// sums[t][c] += Σ_k factors[k * T + t] rows[k][c] for R rows and T tokens, while R rows `ahead` are fetched, if AHEAD.
template <class W, int R, int T, bool AHEAD>
static void add_rows(const Rows &rows, const float *factors, int64_t d, float *sums, int64_t sums_stride,
                     const Rows *ahead) {
    // Two vectors at a time: of weights in 16 bits they are a line, which is then read once.
    constexpr int both = 2 * Vec::width;
    int64_t c = 0;
    for (; c + both <= d; c += both) {
        if (AHEAD) prefetch<W, R>(*ahead, c, both);
        Vec w[R][2];
#pragma GCC unroll 8
        for (int k = 0; k < R; ++k) {
            w[k][0] = load(rows.at<W>(k, c));
            w[k][1] = load(rows.at<W>(k, c + Vec::width));
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            float *to = sums + t * sums_stride + c;
            Vec total[2] = {load(to), load(to + Vec::width)};
#pragma GCC unroll 8
            for (int k = 0; k < R; ++k) {
                Vec factor = splat(factors[k * T + t]);
                total[0] = fma(factor, w[k][0], total[0]);
                total[1] = fma(factor, w[k][1], total[1]);
            }
            store(to, total[0]);
            store(to + Vec::width, total[1]);
        }
    }
    for (; c + Vec::width <= d; c += Vec::width)
        for (int t = 0; t < T; ++t) {
            float *to = sums + t * sums_stride + c;
            Vec total = load(to);
            for (int k = 0; k < R; ++k) total = fma(splat(factors[k * T + t]), load(rows.at<W>(k, c)), total);
            store(to, total);
        }
    if (c == d) return;
    for (int t = 0; t < T; ++t) {
        float *to = sums + t * sums_stride + c;
        Vec total = load(to);
        for (int k = 0; k < R; ++k) total = fma(splat(factors[k * T + t]), load(rows.at<W>(k, c), d - c), total);
        store(to, total);
    }
}

// The loops of a format for so many tokens, and up to rows_at_once rows. What is behind the pointers knows the format,
// and the dtype of the tokens that it multiplies.
struct RowLoops {
    int64_t tokens, rows_at_once, rows_in_turn;  // in turn: as many as are summed together
    void (*in_turn)(const char *row, int64_t stride, const void *x, int64_t x_stride, int64_t d, float *out);
    void (*one_in_turn)(const char *row, int64_t stride, const void *x, int64_t x_stride, int64_t d, float *out);
    void (*row_products)(const Rows &, const void *x, int64_t x_stride, int64_t d, float *out, const Rows *ahead);
    void (*block_products)(const Rows &, const void *x, int64_t x_stride, int64_t d, float *out, const Rows *ahead);
    void (*row_add)(const Rows &, const float *factors, int64_t d, float *sums, int64_t stride, const Rows *ahead);
    // Without rows ahead, and with.
    void (*block_add[2])(const Rows &, const float *factors, int64_t d, float *sums, int64_t stride, const Rows *ahead);

    // Of rows that follow one another, `stride` bytes apart.
    void products(const char *row, int64_t stride, int64_t count, const void *x, int64_t x_stride, int64_t d,
                  float *out) const {
        for (; count >= rows_in_turn; count -= rows_in_turn, row += rows_in_turn * stride, out += rows_in_turn * tokens)
            in_turn(row, stride, x, x_stride, d, out);
        for (; count; --count, row += stride, out += tokens) one_in_turn(row, stride, x, x_stride, d, out);
    }

    // `ahead`: rows_at_once rows to fetch meanwhile.
    void products(const Rows &rows, int64_t count, const void *x, int64_t x_stride, int64_t d, float *out,
                  const Rows &ahead) const {
        if (count == rows_at_once) return block_products(rows, x, x_stride, d, out, &ahead);
        for (int64_t k = 0; k < count; ++k) row_products({{rows.row[k]}}, x, x_stride, d, out + k * tokens, nullptr);
    }

    // `ahead` may be nullptr.
    void add(const Rows &rows, int64_t count, const float *factors, int64_t d, float *sums, int64_t sums_stride,
             const Rows *ahead) const {
        if (count == rows_at_once) return block_add[ahead != nullptr](rows, factors, d, sums, sums_stride, ahead);
        for (int64_t k = 0; k < count; ++k)
            row_add({{rows.row[k]}}, factors + k * tokens, d, sums, sums_stride, nullptr);
    }
};

// The loops above for T tokens of plain entries: products of P rows at a time, sums of BLOCK, which are read and written
// once for all of them.
template <class W, int P, int T>
static RowLoops loops_for() {
    constexpr int R = BLOCK;
    return {.tokens = T,
            .rows_at_once = R,
            .rows_in_turn = 8 / T,
            .in_turn = products_in_turn<W, 8 / T, T>,
            .one_in_turn = products_in_turn<W, 1, T>,
            .row_products = products_of<W, 1, T, false>,
            .block_products = products_in_blocks<W, R, P, T>,
            .row_add = add_rows<W, 1, T, false>,
            .block_add = {add_rows<W, R, T, false>, add_rows<W, R, T, true>}};
}

template <class W>
static RowLoops plain_loops(int64_t tokens) {
    return with_count(tokens, [](auto count) {
        constexpr int T = count;
        return loops_for<W, T == 1 ? BLOCK : T <= 4 ? 2 : 1, T>();
    });
}

}  // namespace countdown::VARIANT
