// Weight formats, and the dtypes of what goes into a sum and comes out of it.
//
// A format is a row of FORMATS, which names the loops that multiply its rows with tokens and add them into sums. To the
// rest a row is an address: a format keeps the scales of a row within the row.
#pragma once

#include "int4.hpp"

namespace countdown::VARIANT {

static constexpr int64_t dtype_of(float) { return COUNTDOWN_FLOAT32; }
static constexpr int64_t dtype_of(Bf16) { return COUNTDOWN_BFLOAT16; }

struct Format {
    int64_t operand;                              // the dtype of tokens that its products take; floats they take too
    RowLoops (*loops)(int64_t tokens);            // for tokens of this dtype
    RowLoops (*loops_of_floats)(int64_t tokens);  // for tokens as floats

    RowLoops loops_with(int64_t dtype, int64_t tokens) const {
        return (dtype == operand ? loops : loops_of_floats)(tokens);
    }
};

template <class W, class Widened = W>
static constexpr Format plain() {
    return {dtype_of(Operand<W>{}), plain_loops<W>, plain_loops<Widened>};
}

// bf16 that is multiplied as floats, where instructions would round the token to bf16 as well.
struct WideBf16 : Bf16 {};

// In the order of countdown_format.
static constexpr Format FORMATS[] = {plain<float>(), plain<Bf16, WideBf16>(), plain<Fp16>(),
                                     {COUNTDOWN_FLOAT32, int4_loops, int4_loops}};

// Entries of a dtype that is known when it runs; there may be none.
struct Array {
    const void *data;
    int64_t dtype;

    float at(int64_t place) const {
        return as_type(dtype, [&](auto like) { return widened(static_cast<const decltype(like) *>(data) + place); });
    }

    // The first n entries of a vector from `place` on, 0 < n <= width.
    Vec vector(int64_t place, int64_t n) const {
        return as_type(dtype, [&](auto like) {
            const auto *from = static_cast<const decltype(like) *>(data) + place;
            return n == Vec::width ? load(from) : load(from, n);
        });
    }
};

}  // namespace countdown::VARIANT
