// The dense parts of a step: linears side by side, and attention.
#pragma once

#include <math.h>

#include "formats.hpp"
#include "threads.hpp"
#include "workspace.hpp"

namespace countdown::VARIANT {

template <class W>
struct ProjectSpace {
    char *tokens;  // [parts, T, width], in the dtype that the format's products take
    int64_t width, token_bytes, bytes;

    ProjectSpace(const countdown_project_call &call, int parts) : width(ceil_to(call.d, PADDING)) {
        Workspace space(call.workspace);
        token_bytes = width * (takes_floats(call) ? int64_t(sizeof(float)) : int64_t(sizeof(W)));
        tokens = space.take<char>(parts * call.tokens * token_bytes);
        bytes = space.bytes();
    }

    static bool takes_floats(const countdown_project_call &call) {
        return FORMATS[call.format].operand == COUNTDOWN_FLOAT32;
    }
};

// Each part computes a range of the outputs of all linears, taken together, for every token. A token's outputs are the
// same whatever other tokens there are.
template <class W>
class Projection {
  public:
    Projection(const countdown_project_call &call, const ProjectSpace<W> &space, const Part &part)
        : call_(call), space_(space), part_(part), loops_(FORMATS[call.format].loops(call.tokens)),
          tokens_(space.tokens + part.index * call.tokens * space.token_bytes) {}

    void run(int) {
        for (int64_t t = 0; t < call_.tokens; ++t) copy(t, tokens_ + t * space_.token_bytes);
        int64_t total = 0;
        for (int64_t w = 0; w < call_.count; ++w) total += call_.rows[w];
        int64_t first = total * part_.index / part_.count, stop = total * (part_.index + 1) / part_.count;
        for (int64_t w = 0, before = 0; w < call_.count; before += call_.rows[w++])
            project(w, first > before ? first - before : 0, least(stop - before, call_.rows[w]), before);
    }

  private:
    const countdown_project_call &call_;
    const ProjectSpace<W> &space_;
    const Part &part_;
    const RowLoops loops_;
    char *const tokens_;

    void copy(int64_t t, char *to) const {
        const W *x = static_cast<const W *>(call_.x[t]);
        if (space_.takes_floats(call_))
            copy_token(x, call_.d, space_.width, reinterpret_cast<float *>(to));
        else
            copy_token(x, call_.d, space_.width, reinterpret_cast<Operand<W> *>(to));
    }

    // Rows from first to stop of linear w, whose outputs begin at a place.
    void project(int64_t w, int64_t first, int64_t stop, int64_t place) {
        const char *weight = static_cast<const char *>(call_.weights[w]);
        const W *bias = static_cast<const W *>(call_.biases[w]);
        int64_t stride = call_.strides[w];
        for (int64_t i = first; i < stop; i += Vec::width) {
            int64_t count = least(Vec::width, stop - i);
            float out[Vec::width * MOST_TOKENS] = {};
            loops_.products(weight + i * stride, stride, count, tokens_, space_.width, call_.d, out);
            for (int64_t t = 0; t < call_.tokens; ++t)
                write(static_cast<W *>(call_.y[t]) + place + i, out + t, bias ? bias + i : nullptr, count);
        }
    }

    // A token's outputs, of which the next one is T entries further.
    void write(W *y, const float *out, const W *bias, int64_t count) const {
        float own[Vec::width] = {};
        for (int64_t k = 0; k < count; ++k) own[k] = out[k * call_.tokens] + (bias ? widened(bias + k) : 0);
        store(y, load(own), count);
    }
};

// Attention: a part sees a range of the keys, for every query, and leaves what it finds. The queries are then shared
// out, and what the parts found about one is joined. The few vectors of a key are loaded once for all queries of its
// group, and their sums stay in registers over all keys, where these hold them.
struct Seen {
    float largest, total;  // of exp(score - largest)
};

template <class W>
struct AttendSpace {
    float *scores;       // [parts, MOST_TOKENS, range]
    int32_t *keys;       // [parts, range]: those that the mask lets through
    Operand<W> *queries; // [parts, MOST_TOKENS, width]
    Seen *seen;          // [parts, heads]
    float *sums;         // [parts, heads, width]
    int64_t range, width, bytes;  // both whole vectors

    AttendSpace(const countdown_attend_call &call, int parts)
        : range(ceil_to(call.length / parts + 1, 16)), width(ceil_to(call.size, PADDING)) {
        Workspace space(call.workspace);
        int64_t most = range * parts;
        scores = space.take<float>(most * MOST_TOKENS);
        keys = space.take<int32_t>(most);
        queries = space.take<Operand<W>>(parts * MOST_TOKENS * width);
        seen = space.take<Seen>(parts * call.heads);
        sums = space.take<float>(parts * call.heads * width);
        bytes = space.bytes();
    }
};

template <class W>
class Attention {
  public:
    Attention(const countdown_attend_call &call, const AttendSpace<W> &space, const Part &part)
        : call_(call), space_(space), part_(part), keys_(space.keys + part.index * space.range),
          scores_(space.scores + part.index * space.range * MOST_TOKENS),
          queries_(space.queries + part.index * MOST_TOKENS * space.width) {}

    void run(int phase) {
        if (phase)
            join_share();
        else
            see_keys();
    }

  private:
    const countdown_attend_call &call_;
    const AttendSpace<W> &space_;
    const Part &part_;
    int32_t *const keys_;
    float *const scores_;
    Operand<W> *const queries_;
    int64_t count_ = 0;

    void see_keys() {
        list_keys();
        int64_t each = call_.heads / call_.groups;
        for (int64_t group = 0; group < call_.groups; ++group)
            for (int64_t head = group * each; head < (group + 1) * each; head += MOST_TOKENS)
                with_count(least(MOST_TOKENS, (group + 1) * each - head),
                           [&](auto queries) { attend<int(queries)>(group, head); });
    }

    void join_share() {
        int64_t stop = call_.heads * (part_.index + 1) / part_.count;
        for (int64_t head = call_.heads * part_.index / part_.count; head < stop; ++head) join(head);
    }

    void list_keys() {
        int64_t stop = call_.length * (part_.index + 1) / part_.count;
        for (int64_t key = call_.length * part_.index / part_.count; key < stop; ++key)
            if (!call_.mask || call_.mask[key]) keys_[count_++] = int32_t(key);
    }

    // T queries from `head` on, of one group, over this part's keys.
    template <int T>
    void attend(int64_t group, int64_t head) {
        for (int t = 0; t < T; ++t)
            copy_token(static_cast<const W *>(call_.q) + (head + t) * call_.q_stride, call_.size, space_.width,
                       queries_ + t * space_.width);
        score<T>(static_cast<const W *>(call_.keys) + group * call_.keys_group_stride);
        for (int t = 0; t < T; ++t)
            space_.seen[part_.index * call_.heads + head + t] = weigh(scores_ + t * space_.range);
        float *sums = space_.sums + (part_.index * call_.heads + head) * space_.width;
        const W *values = static_cast<const W *>(call_.values) + group * call_.values_group_stride;
        int64_t c = 0;
        for (; c + 2 * Vec::width <= call_.size; c += 2 * Vec::width) sum_values<T, 2>(values, c, sums);
        for (; c < call_.size; c += Vec::width) sum_values<T, 1>(values, c, sums);
    }

    template <int T>
    void score(const W *keys) {
        using P = Product<W>;
        for (int64_t k = 0; k < count_; ++k) {
            const W *key = keys + keys_[k] * call_.keys_stride;
            Vec products[T];
            for (int t = 0; t < T; ++t) products[t] = splat(0);
            int64_t c = 0;
            for (; c + P::step <= call_.size; c += P::step)
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) products[t] = P::add(key + c, queries_ + t * space_.width + c, products[t]);
            if (c < call_.size)
                for (int t = 0; t < T; ++t)
                    products[t] = P::add(key + c, queries_ + t * space_.width + c, products[t], call_.size - c);
            for (int t = 0; t < T; ++t) scores_[t * space_.range + k] = sum(products[t]) * call_.scale;
        }
    }

    // Scores of a query become exp(score - largest). One that is NaN makes the total NaN.
    Seen weigh(float *scores) const {
        if (!count_) return {-INFINITY, 0};
        int64_t padded = ceil_to(count_, Vec::width);
        for (int64_t k = count_; k < padded; ++k) scores[k] = -INFINITY;
        float most[Vec::width];
        for (float &one : most) one = -INFINITY;
        for (int64_t k = 0; k < padded; k += Vec::width)
            for (int i = 0; i < Vec::width; ++i) most[i] = scores[k + i] > most[i] ? scores[k + i] : most[i];
        Seen seen = {-INFINITY, 0};
        for (float one : most) seen.largest = one > seen.largest ? one : seen.largest;
        if (seen.largest == -INFINITY && !any_nan(scores)) return seen;  // as if no key were seen
        Vec total = splat(0);
        for (int64_t k = 0; k < padded; k += Vec::width) {
            Vec weights = exponential(load(scores + k) - splat(seen.largest));
            store(scores + k, weights);
            total = total + weights;
        }
        seen.total = sum(total);
        return seen;
    }

    bool any_nan(const float *scores) const {
        for (int64_t k = 0; k < count_; ++k)
            if (scores[k] != scores[k]) return true;
        return false;
    }

    // N vectors of all queries' sums, from entry c on.
    template <int T, int N>
    void sum_values(const W *values, int64_t c, float *sums) const {
        Vec total[T][N];
        for (int t = 0; t < T; ++t)
            for (int n = 0; n < N; ++n) total[t][n] = splat(0);
        int64_t left = call_.size - c;
        for (int64_t k = 0; k < count_; ++k) {
            const W *value = values + keys_[k] * call_.values_stride + c;
            Vec some[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n)
                some[n] = N * Vec::width <= left ? load(value + n * Vec::width) : load(value, left);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n)
                    total[t][n] = fma(some[n], splat(scores_[t * space_.range + k]), total[t][n]);
        }
        for (int t = 0; t < T; ++t)
            for (int n = 0; n < N; ++n) store(sums + t * space_.width + c + n * Vec::width, total[t][n]);
    }

    void join(int64_t head) {
        const Seen *seen = space_.seen + head;
        const float *sums = space_.sums + head * space_.width;
        float largest = -INFINITY, total = 0;
        for (int part = 0; part < part_.count; ++part) {
            float some = seen[part * call_.heads].largest;
            if (!(some <= largest)) largest = some;
        }
        for (int part = 0; part < part_.count; ++part) total += share(seen, part, largest);
        W *y = static_cast<W *>(call_.y) + head * call_.size;
        for (int64_t c = 0; c < call_.size; c += Vec::width) {
            Vec value = splat(0);
            for (int part = 0; part < part_.count; ++part) {
                float weight = expf(seen[part * call_.heads].largest - largest);
                if (seen[part * call_.heads].total == 0) continue;
                value = fma(splat(weight), load(sums + part * call_.heads * space_.width + c), value);
            }
            store(y + c, value / splat(total), least(Vec::width, call_.size - c));
        }
    }

    // What a part's total is in terms of the largest score of all; it may have seen no key.
    float share(const Seen *seen, int part, float largest) const {
        const Seen &some = seen[part * call_.heads];
        return some.total == 0 ? 0 : some.total * expf(some.largest - largest);
    }
};

}  // namespace countdown::VARIANT
