// A sum over active terms: find the active neurons, then read their rows only.
//
// Each thread finds the active ones among a range of its own and lists them in order. The lists taken together are then
// shared out evenly, and each thread adds its share into sums of its own, which all threads add in one order at the
// end. So the same number of threads gives the same bits.
#pragma once

#include "deciders.hpp"
#include "threads.hpp"

namespace countdown::VARIANT {

class Sum {
  public:
    Sum(const countdown_sum_call &call, const SumSpace &space, const Team &team)
        : call_(call), space_(space), team_(team), terms_(call, space, team.index),
          decider_(DECIDERS[call.decision.by]), rows_at_once_(terms_.down.loops.rows_at_once),
          sums_(space.sums + team.index * call.tokens * space.width) {}

    void run() {
        find();
        if (call_.selected) return;
        memset(sums_, 0, size_t(call_.tokens * space_.width) * sizeof(float));
        team_.barrier();
        if (team_.index == 0 && call_.counters) count();
        sum_active();
        team_.barrier();
        reduce();
    }

  private:
    const countdown_sum_call &call_;
    const SumSpace &space_;
    const Team &team_;
    const Terms terms_;
    const Decider &decider_;
    const int64_t rows_at_once_;
    float *const sums_;

    int64_t first_of(int64_t member, int64_t total) const { return total * member / team_.size; }
    // The first neuron that a member decides on: of a tile.
    int64_t first_decided(int64_t member) const {
        return least(TILE * first_of(member, ceil_to(call_.h, TILE) / TILE), call_.h);
    }

    // ---- active sets

    void find() {
        int64_t first = first_decided(team_.index), stop = first_decided(team_.index + 1), place = first;
        int64_t active = 0;
        for (int64_t start = first; start < stop; start += CHUNK) {
            int64_t count = least(CHUNK, stop - start);
            uint8_t masks[CHUNK] = {};
            float values[CHUNK * MOST_TOKENS];
            terms_.clear(values, count);
            decide(start, count, values, masks);
            if (call_.selected)
                write_selected(start, count, masks);
            else
                place = list(start, count, values, masks, place, &active);
        }
        space_.found[team_.index].neurons = place - first;
        space_.found[team_.index].active = active;
    }

    void decide(int64_t start, int64_t count, float *values, uint8_t *masks) const {
        if (call_.decision.active) return read_given(start, count, masks);
        decider_.score(terms_, start, count, values);
        const float *thresholds = call_.decision.per_term + start;
        const int whole = terms_.whole, present = terms_.present;
        // NaN is active.
        if (call_.tokens == 1) {
            for (int64_t k = 0; k < count; ++k)
                masks[k] = uint8_t((whole | !(fabsf(values[k]) <= thresholds[k])) & present);
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
            int mask = whole;
            for (int64_t t = 0; t < call_.tokens; ++t)
                mask |= !(fabsf(values[k * call_.tokens + t]) <= thresholds[k]) << t;
            masks[k] = uint8_t(mask & present);
        }
    }

    void read_given(int64_t start, int64_t count, uint8_t *masks) const {
        for (int64_t t = 0; t < call_.tokens; ++t) {
            const uint8_t *given = call_.decision.active + t * call_.h + start;
            for (int64_t k = 0; k < count; ++k) masks[k] |= uint8_t(given[k] << t);
        }
    }

    void write_selected(int64_t start, int64_t count, const uint8_t *masks) const {
        for (int64_t t = 0; t < call_.tokens; ++t)
            for (int64_t k = 0; k < count; ++k) call_.selected[t * call_.h + start + k] = masks[k] >> t & 1;
    }

    int64_t list(int64_t start, int64_t count, const float *values, const uint8_t *masks, int64_t place,
                 int64_t *active) const {
        if (call_.tokens == 1) return list_one(start, count, values, masks, place, active);
        for (int64_t k = 0; k < count; ++k) {
            if (!masks[k]) continue;
            space_.neurons[place] = int32_t(start + k);
            space_.masks[place] = masks[k];
            memcpy(space_.values + place * call_.tokens, values + k * call_.tokens, size_t(call_.tokens) * sizeof(float));
            *active += bits(masks[k] & terms_.counted);
            ++place;
        }
        return place;
    }

    // Without branches, which would be taken at random: what is not kept is overwritten.
    int64_t list_one(int64_t start, int64_t count, const float *values, const uint8_t *masks, int64_t place,
                     int64_t *active) const {
        int64_t before = place;
        for (int64_t k = 0; k < count; ++k) {
            space_.neurons[place] = int32_t(start + k);
            space_.masks[place] = masks[k];
            space_.values[place] = values[k];
            place += masks[k];
        }
        *active += terms_.counted ? place - before : 0;
        return place;
    }

    static int64_t bits(int mask) {
        int64_t count = 0;
        for (; mask; mask &= mask - 1) ++count;
        return count;
    }

    // ---- sums over the active neurons

    void count() const {
        int64_t active = 0;
        for (int member = 0; member < team_.size; ++member) active += space_.found[member].active;
        // Other threads of the program may run the same module.
        __atomic_fetch_add(&call_.counters[0], bits(terms_.counted), __ATOMIC_RELAXED);
        __atomic_fetch_add(&call_.counters[1], active, __ATOMIC_RELAXED);
    }

    // This thread's share of the neurons of all lists, taken together.
    void sum_active() const {
        int64_t total = 0, before = 0;
        for (int member = 0; member < team_.size; ++member) total += space_.found[member].neurons;
        int64_t first = first_of(team_.index, total), stop = first_of(team_.index + 1, total);
        for (int member = 0; member < team_.size; before += space_.found[member++].neurons) {
            int64_t from = first > before ? first - before : 0;
            sum_list(first_decided(member), from, least(stop - before, space_.found[member].neurons));
        }
    }

    // Neurons from `from` to `stop` of the list that starts at a place.
    void sum_list(int64_t place, int64_t from, int64_t stop) const {
        for (int64_t at = from; at < stop; at += rows_at_once_)
            add(block_of(place + at, stop - at), block_of(place + at + rows_at_once_, stop - at - rows_at_once_));
    }

    Block block_of(int64_t place, int64_t left) const {
        return {least(rows_at_once_, left), space_.neurons + place, space_.masks + place,
                space_.values + place * call_.tokens};
    }

    void add(const Block &block, const Block &next) const {
        float factors[BLOCK * MOST_TOKENS] = {};
        Rows down = terms_.down.rows(block), later;
        decider_.coefficients(terms_, block, down, factors);
        if (call_.tokens > 1) leave_others_out(block, factors);
        if (next.count > 0) later = (terms_.*decider_.first_read).rows(next);
        terms_.down.loops.add(down, block.count, factors, call_.outputs, sums_, space_.width,
                              next.count > 0 ? &later : nullptr);
    }

    // A neuron of a block is needed by some token, not by all.
    void leave_others_out(const Block &block, float *factors) const {
        for (int64_t k = 0; k < block.count; ++k)
            for (int64_t t = 0; t < call_.tokens; ++t)
                if (!(block.masks[k] >> t & 1)) factors[k * call_.tokens + t] = 0;
    }

    void reduce() const {
        int64_t vectors = space_.width / Vec::width;
        int64_t first = first_of(team_.index, vectors) * Vec::width;
        int64_t stop = least(call_.outputs, first_of(team_.index + 1, vectors) * Vec::width);
        for (int64_t t = 0; t < call_.tokens; ++t)
            for (int64_t c = first; c < stop; c += Vec::width) {
                int64_t count = least(Vec::width, stop - c);
                Vec total = total_of(t, c);
                if (terms_.down.bias.data) total = total + terms_.down.bias.vector(c, count);
                as_type(call_.dtype, [&](auto like) {
                    store(static_cast<decltype(like) *>(call_.y) + t * call_.outputs + c, total, count);
                });
            }
    }

    Vec total_of(int64_t t, int64_t c) const {
        Vec total = splat(0);
        for (int member = 0; member < team_.size; ++member)
            total = total + load(space_.sums + (member * call_.tokens + t) * space_.width + c);
        return total;
    }
};

}  // namespace countdown::VARIANT
