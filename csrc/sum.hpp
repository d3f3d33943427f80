// A sum over active terms: find the active neurons, then read their rows only.
//
// Each part finds the active ones among a range of its own and lists them in order. The lists taken together are then
// shared out evenly, and each part adds its share into sums of its own, which are added in one order at the end. So the
// same number of parts gives the same bits, whichever threads do them.
#pragma once

#include "affine.hpp"
#include "deciders.hpp"
#include "low_rank.hpp"
#include "threads.hpp"

namespace countdown::VARIANT {

class Sum {
  public:
    enum { FIND, SUM, REDUCE, PHASES };

    Sum(const countdown_sum_call &call, const SumSpace &space, const Part &part, int phase)
        : call_(call), space_(space), part_(part), phase_(phase),
          terms_(call, space, part.index, phase == FIND ? Terms::READ : Terms::WAS_READ),
          decider_(DECIDERS[call.decision.by]),
          known_(DECIDERS[call.decision.second ? int64_t(COUNTDOWN_BY_COEFFICIENT) : call.decision.by]),
          rows_at_once_(terms_.down.loops.rows_at_once),
          low_rank_(call, space, part), affine_(call, space, part, terms_),
          sums_(space.sums + part.index * call.tokens * space.width) {}

    static int phases(const countdown_sum_call &call) { return call.selected ? 1 : PHASES; }

    void run() {
        switch (phase_) {
            case FIND: return find();
            case SUM: return sum_active();
            default: return reduce();
        }
    }

  private:
    const countdown_sum_call &call_;
    const SumSpace &space_;
    const Part &part_;
    const int phase_;
    const Terms terms_;
    const Decider &decider_;
    const Decider &known_;  // what is known of listed neurons when their rows of W_down are read
    const int64_t rows_at_once_;
    const LowRank low_rank_;
    Affine affine_;
    float *const sums_;

    int64_t first_of(int64_t part, int64_t total) const { return total * part / part_.count; }
    // The first neuron that a part decides on: of a tile.
    int64_t first_decided(int64_t part) const {
        return least(TILE * first_of(part, ceil_to(call_.h, TILE) / TILE), call_.h);
    }

    // ---- active sets

    void find() {
        int64_t first = first_decided(part_.index), stop = first_decided(part_.index + 1), place = first;
        int64_t active = 0;
        if (low_rank_.is_there()) low_rank_.begin();
        for (int64_t start = first; start < stop; start += CHUNK) {
            int64_t count = least(CHUNK, stop - start);
            uint8_t masks[CHUNK] = {};
            float values[CHUNK * MOST_TOKENS];
            terms_.clear(values, count);
            decide(start, count, values, masks);
            if (low_rank_.is_there()) low_rank_.add(start, count, values, masks, terms_.seen.present);
            if (call_.selected)
                write_selected(start, count, masks);
            else
                place = list(start, count, values, masks, place, &active);
        }
        space_.found[part_.index].neurons = place - first;
        space_.found[part_.index].active = active;
    }

    void decide(int64_t start, int64_t count, float *values, uint8_t *masks) const {
        if (decider_.score) decider_.score(terms_, start, count, values);
        if (call_.decision.active) return read_given(start, count, masks);
        const float *thresholds = call_.decision.per_term + start;
        const int whole = terms_.seen.whole, present = terms_.seen.present;
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
            *active += bits(masks[k] & terms_.seen.counted);
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
        *active += terms_.seen.counted ? place - before : 0;
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
        for (int part = 0; part < part_.count; ++part) active += space_.found[part].active;
        add_to(&call_.counters[0], bits(terms_.seen.counted));
        add_to(&call_.counters[1], active);
        if (call_.decision.looks == 2 && !call_.decision.second) add_to(&call_.counters[2], active);
    }

    void count_left() const {
        int64_t left = 0;
        for (int part = 0; part < part_.count; ++part) left += space_.found[part].left;
        add_to(&call_.counters[2], left);
    }

    // This part's share of the neurons of all lists, taken together.
    void sum_active() const {
        if (part_.index == 0 && call_.counters) count();
        space_.found[part_.index].left = 0;
        memset(sums_, 0, size_t(call_.tokens * space_.width) * sizeof(float));
        int64_t total = 0, before = 0;
        for (int part = 0; part < part_.count; ++part) total += space_.found[part].neurons;
        int64_t first = first_of(part_.index, total), stop = first_of(part_.index + 1, total);
        for (int part = 0; part < part_.count; before += space_.found[part++].neurons) {
            int64_t from = first > before ? first - before : 0;
            sum_list(first_decided(part), from, least(stop - before, space_.found[part].neurons));
        }
    }

    // Neurons from `from` to `stop` of the list that starts at a place.
    void sum_list(int64_t place, int64_t from, int64_t stop) const {
        if (call_.decision.second && stop > from) stop = from + look_again(place + from, stop - from);
        for (int64_t at = from; at < stop; at += rows_at_once_)
            add(block_of(place + at, stop - at), block_of(place + at + rows_at_once_, stop - at - rows_at_once_));
    }

    // Of `count` neurons from a place on, list anew those whose coefficients some token needs, with these; return how
    // many.
    int64_t look_again(int64_t place, int64_t count) const {
        int64_t kept = place;
        for (int64_t at = 0; at < count; at += rows_at_once_) {
            const Block block = block_of(place + at, count - at);
            const int64_t rest = count - at - rows_at_once_;
            const Block next = rest > 0 ? block_of(place + at + rows_at_once_, rest) : block;
            float coefficients[BLOCK * MOST_TOKENS] = {};
            decider_.look_again(terms_, block, (terms_.*decider_.first_read).rows(next), coefficients);
            for (int64_t k = 0; k < block.count; ++k) kept = keep(kept, block, k, coefficients + k * call_.tokens);
        }
        return kept - place;
    }

    // List a block's k-th neuron at a place if some token needs its coefficient; return where the next one goes.
    int64_t keep(int64_t place, const Block &block, int64_t k, const float *coefficients) const {
        const int32_t neuron = block.neurons[k];
        const float threshold = call_.decision.second[neuron];
        int mask = terms_.seen.whole;
        // NaN is active.
        for (int64_t t = 0; t < call_.tokens; ++t) mask |= !(fabsf(coefficients[t]) <= threshold) << t;
        mask &= block.masks[k];
        space_.neurons[place] = neuron;
        space_.masks[place] = uint8_t(mask);
        memcpy(space_.values + place * call_.tokens, coefficients, size_t(call_.tokens) * sizeof(float));
        space_.found[part_.index].left += bits(mask & terms_.seen.counted);
        return place + (mask != 0);
    }

    Block block_of(int64_t place, int64_t left) const {
        return {least(rows_at_once_, left), space_.neurons + place, space_.masks + place,
                space_.values + place * call_.tokens};
    }

    void add(const Block &block, const Block &next) const {
        float factors[BLOCK * MOST_TOKENS] = {};
        Rows down = terms_.down.rows(block), later;
        known_.coefficients(terms_, block, down, factors);
        if (call_.tokens > 1) leave_others_out(block, factors);
        if (next.count > 0) later = (terms_.*known_.first_read).rows(next);
        terms_.down.loops.add(down, block.count, factors, call_.outputs, sums_, space_.width,
                              next.count > 0 ? &later : nullptr);
    }

    // A neuron of a block is needed by some token, not by all.
    void leave_others_out(const Block &block, float *factors) const {
        for (int64_t k = 0; k < block.count; ++k)
            for (int64_t t = 0; t < call_.tokens; ++t)
                if (!(block.masks[k] >> t & 1)) factors[k * call_.tokens + t] = 0;
    }

    void reduce() {
        int64_t vectors = space_.width / Vec::width;
        int64_t first = first_of(part_.index, vectors) * Vec::width;
        int64_t stop = least(call_.outputs, first_of(part_.index + 1, vectors) * Vec::width);
        float added[Vec::width * MOST_TOKENS] = {};
        float predicted[MOST_TOKENS][Affine::OUTPUTS] = {};
        int64_t known = -1;
        if (part_.index == 0 && call_.counters && call_.decision.second) count_left();
        if (low_rank_.is_there()) low_rank_.gather();
        if (affine_.is_there()) affine_.begin();
        for (int64_t c = first; c < stop; c += Vec::width) {
            int64_t count = least(Vec::width, stop - c);
            if (low_rank_.is_there()) low_rank_.outputs(c, count, added);
            const int64_t block = c / Affine::OUTPUTS;
            if (affine_.is_there() && block != known) affine_.outputs(known = block, predicted);
            for (int64_t t = 0; t < call_.tokens; ++t)
                write(t, c, count, added + t, affine_.adds(t) ? predicted[t] + c % Affine::OUTPUTS : nullptr);
        }
    }

    // The outputs of a token from c on; what is added to the next one is T entries further.
    void write(int64_t t, int64_t c, int64_t count, const float *added, const float *predicted) const {
        Vec total = total_of(t, c);
        if (terms_.down.bias.data) total = total + terms_.down.bias.vector(c, count);
        if (low_rank_.is_there()) total = total + of_token(added);
        if (predicted) total = total + load(predicted);
        as_type(call_.dtype, [&](auto like) {
            store(static_cast<decltype(like) *>(call_.y[t]) + c, total, count);
        });
    }

    Vec of_token(const float *added) const {
        if (call_.tokens == 1) return load(added);
        float own[Vec::width];
        for (int64_t k = 0; k < Vec::width; ++k) own[k] = added[k * call_.tokens];
        return load(own);
    }

    Vec total_of(int64_t t, int64_t c) const {
        Vec total = splat(0);
        for (int part = 0; part < part_.count; ++part)
            total = total + load(space_.sums + (part * call_.tokens + t) * space_.width + c);
        return total;
    }
};

}  // namespace countdown::VARIANT
