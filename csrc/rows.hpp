// The two loops that read weights: products of rows and tokens, and sums of rows.
//
// A matrix that is read from end to end is read one row at a time, which the processor's prefetchers follow at the full
// bandwidth. Rows of active neurons lie anywhere: there, several are read side by side, for more to be under way, and
// the beginnings of the ones that come after are prefetched.
#pragma once

#include "types.hpp"

namespace countdown {
namespace VARIANT {

constexpr int MOST_TOKENS = 8;
constexpr int BLOCK = 4;
// Tokens are copied with zeros up to a multiple of this many entries, so that they are loaded whole.
constexpr int64_t PADDING = 64;

template <class W>
using Operand = typename Product<W>::Operand;

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

template <class W>
struct Rows {
    const W *row[BLOCK] = {};
};

// Start reading the first lines of rows, and of their later pages: from there the processor goes on by itself.
template <class W>
static inline void prefetch(const Rows<W> &rows, int64_t count, int64_t d) {
#ifdef __GNUC__
    constexpr int64_t page = 4096, line = 64;
    for (int64_t k = 0; k < count; ++k) {
        const char *row = reinterpret_cast<const char *>(rows.row[k]), *end = reinterpret_cast<const char *>(rows.row[k] + d);
        for (; row < end; row += page) {
            __builtin_prefetch(row);
            if (row + line < end) __builtin_prefetch(row + line);
        }
    }
#endif
}

// out[k * T + t] = Σ_c rows[k][c] x[t][c] for R rows and T tokens. A row's sum with a token is added in the same order
// for any R and T.
template <class W, int R, int T>
static void products_of(const Rows<W> &rows, const Operand<W> *x, int64_t x_stride, int64_t d, float *out) {
    using P = Product<W>;
    constexpr int step = P::step;
    Vec even[R][T], odd[R][T];
    for (int k = 0; k < R; ++k)
        for (int t = 0; t < T; ++t) even[k][t] = odd[k][t] = splat(0);
    int64_t c = 0;
    for (; c + 2 * step <= d; c += 2 * step) {
#pragma GCC unroll 8
        for (int k = 0; k < R; ++k) {
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                even[k][t] = P::add(rows.row[k] + c, x + t * x_stride + c, even[k][t]);
                odd[k][t] = P::add(rows.row[k] + c + step, x + t * x_stride + c + step, odd[k][t]);
            }
        }
    }
    for (int k = 0; k < R; ++k) {
        for (int t = 0; t < T; ++t) {
            int64_t rest = c;
            const Operand<W> *token = x + t * x_stride;
            if (rest + step <= d) {
                even[k][t] = P::add(rows.row[k] + rest, token + rest, even[k][t]);
                rest += step;
            }
            if (rest < d) odd[k][t] = P::add(rows.row[k] + rest, token + rest, odd[k][t], d - rest);
            out[k * T + t] = sum(even[k][t] + odd[k][t]);
        }
    }
}

// sums[t][c] += Σ_k factors[k * T + t] rows[k][c] for R rows and T tokens.
template <class W, int R, int T>
static void add_rows(const Rows<W> &rows, const float *factors, int64_t d, float *sums, int64_t sums_stride) {
    int64_t c = 0;
    for (; c + Vec::width <= d; c += Vec::width) {
        Vec w[R];
#pragma GCC unroll 8
        for (int k = 0; k < R; ++k) w[k] = load(rows.row[k] + c);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            float *to = sums + t * sums_stride + c;
            Vec total = load(to);
#pragma GCC unroll 8
            for (int k = 0; k < R; ++k) total = fma(splat(factors[k * T + t]), w[k], total);
            store(to, total);
        }
    }
    if (c == d) return;
    for (int t = 0; t < T; ++t) {
        float *to = sums + t * sums_stride + c;
        Vec total = load(to);
        for (int k = 0; k < R; ++k) total = fma(splat(factors[k * T + t]), load(rows.row[k] + c, d - c), total);
        store(to, total);
    }
}

// The same loops for so many tokens, and up to rows_at_once rows.
template <class W>
class RowLoops {
  public:
    int64_t rows_at_once;

    explicit RowLoops(int64_t tokens) : tokens_(tokens) {
        switch (tokens) {
            case 1: take<4, 1>(); break;
            case 2: take<2, 2>(); break;
            case 3: take<2, 3>(); break;
            case 4: take<2, 4>(); break;
            case 5: take<1, 5>(); break;
            case 6: take<1, 6>(); break;
            case 7: take<1, 7>(); break;
            default: take<1, 8>(); break;
        }
    }

    void products(const W *row, const Operand<W> *x, int64_t x_stride, int64_t d, float *out) const {
        row_products_(Rows<W>{{row}}, x, x_stride, d, out);
    }

    void products(const Rows<W> &rows, int64_t count, const Operand<W> *x, int64_t x_stride, int64_t d,
                  float *out) const {
        if (count == rows_at_once) return block_products_(rows, x, x_stride, d, out);
        for (int64_t k = 0; k < count; ++k) products(rows.row[k], x, x_stride, d, out + k * tokens_);
    }

    void add(const Rows<W> &rows, int64_t count, const float *factors, int64_t d, float *sums,
             int64_t sums_stride) const {
        if (count == rows_at_once) return block_add_(rows, factors, d, sums, sums_stride);
        for (int64_t k = 0; k < count; ++k)
            row_add_(Rows<W>{{rows.row[k]}}, factors + k * tokens_, d, sums, sums_stride);
    }

  private:
    using ProductsOf = void (*)(const Rows<W> &, const Operand<W> *, int64_t, int64_t, float *);
    using AddRows = void (*)(const Rows<W> &, const float *, int64_t, float *, int64_t);

    int64_t tokens_;
    ProductsOf block_products_, row_products_;
    AddRows block_add_, row_add_;

    template <int R, int T>
    void take() {
        rows_at_once = R;
        block_products_ = products_of<W, R, T>;
        row_products_ = products_of<W, 1, T>;
        block_add_ = add_rows<W, R, T>;
        row_add_ = add_rows<W, 1, T>;
    }
};

}  // namespace VARIANT
}  // namespace countdown
