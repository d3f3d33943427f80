// What a linear adds for the input channels that a token drops: outer (inner (x of those)), of a low rank.
//
// While a part finds active channels in its range it adds the rows of the others, into sums of its own. In the last phase
// each part adds these up, in one order, and multiplies them with the rows of its outputs.
#pragma once

#include "terms.hpp"
#include "threads.hpp"

namespace countdown::VARIANT {

class LowRank {
  public:
    LowRank(const countdown_sum_call &call, const SumSpace &space, const Part &part)
        : call_(call), space_(space), part_(part), inner_(call.added.inner, COUNTDOWN_FLOAT32, call.tokens),
          outer_(call.added.outer, COUNTDOWN_FLOAT32, call.tokens), size_(call.tokens * space.rank_width),
          sums_(space.inner + part.index * size_), low_(space.low + part.index * size_) {}

    bool is_there() const { return call_.added.rank > 0 && !call_.selected; }

    void begin() const { memset(sums_, 0, size_t(size_) * sizeof(float)); }

    // Add the channels from `start` on that a token drops: x [count, T], and who needs each.
    void add(int64_t start, int64_t count, const float *x, const uint8_t *masks, int present) const {
        int32_t channels[CHUNK];
        int64_t dropped = 0;
        for (int64_t k = 0; k < count; ++k) {
            channels[dropped] = int32_t(k);
            dropped += (~masks[k] & present) != 0;
        }
        const int64_t step = inner_.loops.rows_at_once;
        for (int64_t at = 0; at < dropped; at += step) {
            int64_t some = least(step, dropped - at), next = least(step, dropped - at - some);
            float factors[BLOCK * MOST_TOKENS] = {};
            for (int64_t k = 0; k < some; ++k) read(channels[at + k], x, masks, present, factors + k * call_.tokens);
            Rows rows = rows_of(start, channels + at, some), later;
            if (next > 0) later = rows_of(start, channels + at + some, next);
            inner_.loops.add(rows, some, factors, call_.added.rank, sums_, space_.rank_width,
                             next > 0 ? &later : nullptr);
        }
    }

    // Add up what all parts have.
    void gather() const {
        for (int64_t c = 0; c < size_; c += Vec::width) {
            Vec total = splat(0);
            for (int part = 0; part < part_.count; ++part) total = total + load(space_.inner + part * size_ + c);
            store(low_ + c, total, Vec::width);
        }
    }

    // What is added to `count` outputs from `first` on, [count, T].
    void outputs(int64_t first, int64_t count, float *out) const {
        outer_.loops.products(outer_.data + first * outer_.stride, outer_.stride, count,
                              reinterpret_cast<const char *>(low_), space_.rank_width, call_.added.rank, out);
    }

  private:
    const countdown_sum_call &call_;
    const SumSpace &space_;
    const Part &part_;
    const Matrix inner_, outer_;
    const int64_t size_;
    float *const sums_, *const low_;

    void read(int64_t channel, const float *x, const uint8_t *masks, int present, float *factors) const {
        int dropped = ~masks[channel] & present;
        for (int64_t t = 0; t < call_.tokens; ++t)
            factors[t] = dropped >> t & 1 ? x[channel * call_.tokens + t] : 0;
    }

    Rows rows_of(int64_t start, const int32_t *channels, int64_t count) const {
        Rows some;
        for (int64_t k = 0; k < BLOCK; ++k)
            some.row[k] = inner_.data + (start + channels[least(k, count - 1)]) * inner_.stride;
        return some;
    }
};

}  // namespace countdown::VARIANT
