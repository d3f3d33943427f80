// The dense parts of one token's step: linears side by side, and attention.
#pragma once

#include <math.h>

#include "countdown.h"
#include "threads.hpp"
#include "workspace.hpp"

namespace countdown {
namespace VARIANT {

template <class W>
struct ProjectSpace {
    Operand<W> *tokens;  // [threads, width]
    int64_t width, bytes;

    ProjectSpace(const countdown_project_call &call, int threads) : width(ceil_to(call.d, PADDING)) {
        Workspace space(call.workspace);
        tokens = space.take<Operand<W>>(threads * width);
        bytes = space.bytes();
    }
};

// Each thread computes a range of the outputs of all linears, taken together.
template <class W>
class Projection {
  public:
    Projection(const countdown_project_call &call, const ProjectSpace<W> &space, const Team &team)
        : call_(call), space_(space), team_(team), loops_(1), token_(space.tokens + team.index * space.width) {}

    void run() {
        copy_token(static_cast<const W *>(call_.x), call_.d, space_.width, token_);
        int64_t total = 0;
        for (int64_t w = 0; w < call_.count; ++w) total += call_.rows[w];
        int64_t first = total * team_.index / team_.size, stop = total * (team_.index + 1) / team_.size;
        for (int64_t w = 0, before = 0; w < call_.count; before += call_.rows[w++])
            project(w, first > before ? first - before : 0, least(stop - before, call_.rows[w]),
                    static_cast<W *>(call_.y) + before);
    }

  private:
    const countdown_project_call &call_;
    const ProjectSpace<W> &space_;
    const Team &team_;
    const RowLoops<W> loops_;
    Operand<W> *const token_;

    // Rows from first to stop of linear w.
    void project(int64_t w, int64_t first, int64_t stop, W *y) {
        const W *weight = static_cast<const W *>(call_.weights[w]), *bias = static_cast<const W *>(call_.biases[w]);
        for (int64_t i = first; i < stop; i += Vec::width) {
            int64_t count = least(Vec::width, stop - i);
            float out[Vec::width] = {};
            for (int64_t k = 0; k < count; ++k) {
                loops_.products(weight + (i + k) * call_.strides[w], token_, space_.width, call_.d, out + k);
                if (bias) out[k] += widened(bias + i + k);
            }
            store(y + i, load(out), count);
        }
    }
};

// Attention: a thread sees a range of the keys, for every query, and leaves what it finds. The queries are then shared
// out, and what the threads found about one is joined.
struct Seen {
    float largest, total;  // of exp(score - largest)
};

template <class W>
struct AttendSpace {
    float *scores;       // [threads, range, MOST_TOKENS]
    int32_t *keys;       // [threads, range]: those that the mask lets through
    Operand<W> *queries; // [threads, MOST_TOKENS, width]
    Seen *seen;          // [threads, heads]
    float *sums;         // [threads, heads, width]
    int64_t range, width, bytes;

    AttendSpace(const countdown_attend_call &call, int threads)
        : range(call.length / threads + 1), width(ceil_to(call.size, PADDING)) {
        Workspace space(call.workspace);
        scores = space.take<float>(threads * range * MOST_TOKENS);
        keys = space.take<int32_t>(threads * range);
        queries = space.take<Operand<W>>(threads * MOST_TOKENS * width);
        seen = space.take<Seen>(threads * call.heads);
        sums = space.take<float>(threads * call.heads * width);
        bytes = space.bytes();
    }
};

template <class W>
class Attention {
  public:
    Attention(const countdown_attend_call &call, const AttendSpace<W> &space, const Team &team)
        : call_(call), space_(space), team_(team), keys_(space.keys + team.index * space.range),
          scores_(space.scores + team.index * space.range * MOST_TOKENS),
          queries_(space.queries + team.index * MOST_TOKENS * space.width) {}

    void run() {
        list_keys();
        int64_t each = call_.heads / call_.groups;
        for (int64_t group = 0; group < call_.groups; ++group)
            for (int64_t head = group * each; head < (group + 1) * each; head += MOST_TOKENS)
                attend(group, head, least(MOST_TOKENS, (group + 1) * each - head));
        team_.barrier();
        int64_t stop = call_.heads * (team_.index + 1) / team_.size;
        for (int64_t head = call_.heads * team_.index / team_.size; head < stop; ++head) join(head);
    }

  private:
    const countdown_attend_call &call_;
    const AttendSpace<W> &space_;
    const Team &team_;
    int32_t *const keys_;
    float *const scores_;
    Operand<W> *const queries_;
    int64_t count_ = 0;

    void list_keys() {
        int64_t stop = call_.length * (team_.index + 1) / team_.size;
        for (int64_t key = call_.length * team_.index / team_.size; key < stop; ++key)
            if (!call_.mask || call_.mask[key]) keys_[count_++] = int32_t(key);
    }

    // The queries from `head` on, of one group, over this thread's keys.
    void attend(int64_t group, int64_t head, int64_t queries) {
        for (int64_t q = 0; q < queries; ++q)
            copy_token(static_cast<const W *>(call_.q) + (head + q) * call_.q_stride, call_.size, space_.width,
                       queries_ + q * space_.width);
        float *sums = space_.sums + (team_.index * call_.heads + head) * space_.width;
        memset(sums, 0, size_t(queries * space_.width) * sizeof(float));
        const RowLoops<W> loops(queries);
        const W *keys = static_cast<const W *>(call_.keys) + group * call_.keys_group_stride;
        const W *values = static_cast<const W *>(call_.values) + group * call_.values_group_stride;
        for (int64_t at = 0; at < count_; at += loops.rows_at_once) {
            int64_t count = least(loops.rows_at_once, count_ - at);
            loops.products(rows(keys, call_.keys_stride, at, count), count, queries_, space_.width, call_.size,
                           scores_ + at * queries);
        }
        weigh(head, queries);
        for (int64_t at = 0; at < count_; at += loops.rows_at_once) {
            int64_t count = least(loops.rows_at_once, count_ - at);
            loops.add(rows(values, call_.values_stride, at, count), count, scores_ + at * queries, call_.size, sums,
                      space_.width);
        }
    }

    Rows<W> rows(const W *matrix, int64_t stride, int64_t at, int64_t count) const {
        Rows<W> some;
        for (int64_t k = 0; k < count; ++k) some.row[k] = matrix + keys_[at + k] * stride;
        return some;
    }

    // Scores become exp(score - largest) of their query.
    void weigh(int64_t head, int64_t queries) {
        for (int64_t q = 0; q < queries; ++q) {
            Seen seen = {-INFINITY, 0};
            for (int64_t k = q; k < count_ * queries; k += queries) {
                scores_[k] *= call_.scale;
                if (!(scores_[k] <= seen.largest)) seen.largest = scores_[k];  // also NaN
            }
            space_.seen[team_.index * call_.heads + head + q] = seen;
        }
        Seen *seen = space_.seen + team_.index * call_.heads + head;
        for (int64_t k = 0; k < count_; ++k)
            for (int64_t q = 0; q < queries; ++q) scores_[k * queries + q] -= seen[q].largest;
        int64_t entries = count_ * queries, whole = entries / Vec::width * Vec::width;
        for (int64_t k = 0; k < whole; k += Vec::width) store(scores_ + k, exponential(load(scores_ + k)));
        if (whole < entries)
            store(scores_ + whole, exponential(load(scores_ + whole, entries - whole)), entries - whole);
        for (int64_t k = 0; k < count_; ++k)
            for (int64_t q = 0; q < queries; ++q) seen[q].total += scores_[k * queries + q];
    }

    void join(int64_t head) {
        const Seen *seen = space_.seen + head;
        const float *sums = space_.sums + head * space_.width;
        float largest = -INFINITY, total = 0;
        for (int member = 0; member < team_.size; ++member) {
            float some = seen[member * call_.heads].largest;
            if (!(some <= largest)) largest = some;
        }
        for (int member = 0; member < team_.size; ++member) total += share(seen, member, largest);
        W *y = static_cast<W *>(call_.y) + head * call_.size;
        for (int64_t c = 0; c < call_.size; c += Vec::width) {
            Vec value = splat(0);
            for (int member = 0; member < team_.size; ++member) {
                float weight = expf(seen[member * call_.heads].largest - largest);
                if (seen[member * call_.heads].total == 0) continue;
                value = fma(splat(weight), load(sums + member * call_.heads * space_.width + c), value);
            }
            store(y + c, value / splat(total), least(Vec::width, call_.size - c));
        }
    }

    // What a thread's total is in terms of the largest score of all; it may have seen no key.
    float share(const Seen *seen, int member, float largest) const {
        const Seen &some = seen[member * call_.heads];
        return some.total == 0 ? 0 : some.total * expf(some.largest - largest);
    }
};

}  // namespace VARIANT
}  // namespace countdown
