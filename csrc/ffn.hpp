// The sparse FFN: find the active neurons, then read their rows only.
//
// Each thread finds the active ones among a range of its own and lists them in order. The lists taken together are then
// shared out evenly, and each thread adds its share into sums of its own, which all threads add in one order at the
// end. So the same number of threads gives the same bits.
#pragma once

#include "countdown.h"
#include "threads.hpp"
#include "workspace.hpp"

namespace countdown {
namespace VARIANT {

struct Found {
    int64_t neurons, active;  // neurons that some token needs, and pairs of a token and a neuron it needs
    char padding[48];         // a line of its own for each thread
};

template <class W>
struct FFNSpace {
    // By place in a thread's list, which starts where the thread's range does.
    int32_t *neurons;
    uint8_t *masks;  // bit t: token t needs it
    float *values;   // [T] of a place: what is known of the coefficient
    Found *found;
    float *sums;     // [threads, T, width]
    int64_t width, tokens_width;
    int64_t entries;  // of a token, as floats
    char *own;       // of each thread: tokens, one of them as floats, and its quantised ones
    int64_t own_bytes, bytes;

    FFNSpace(const countdown_ffn_call &call, int threads) {
        Workspace space(call.workspace);
        entries = call.decider == COUNTDOWN_BY_PROXY ? ceil_to(8 * call.words, Vec::width) : 0;
        width = ceil_to(call.d, 16);
        tokens_width = ceil_to(call.d, PADDING);
        neurons = space.take<int32_t>(call.h);
        masks = space.take<uint8_t>(call.h);
        values = space.take<float>(call.h * call.tokens);
        found = space.take<Found>(threads);
        sums = space.take<float>(threads * call.tokens * width);
        own_bytes = ceil_to(call.tokens * tokens_width * int64_t(sizeof(Operand<W>)), 64) + entries * 4 +
                    call.tokens * Quantised::bytes(call.words, call.groups);
        own_bytes = ceil_to(own_bytes, 64);  // no line is of two threads
        own = space.take<char>(threads * own_bytes);
        bytes = space.bytes();
    }
};

// Neurons of a list that follow one another.
struct Block {
    int64_t count;
    const int32_t *neurons;
    const uint8_t *masks;
    const float *values;  // [count, T]
};

template <class W>
struct Matrix {
    const W *weight;
    int64_t stride;
    const W *bias;

    Matrix(const void *weight, int64_t stride, const void *bias)
        : weight(static_cast<const W *>(weight)), stride(stride), bias(static_cast<const W *>(bias)) {}

    // Of a block; beyond its neurons, the last one's again.
    Rows<W> rows(const Block &block) const {
        Rows<W> some;
        for (int64_t k = 0; k < BLOCK; ++k) some.row[k] = weight + block.neurons[least(k, block.count - 1)] * stride;
        return some;
    }
};

template <class W>
class FFN {
  public:
    FFN(const countdown_ffn_call &call, const FFNSpace<W> &space, const Team &team)
        : call_(call), space_(space), team_(team), loops_(call.tokens),
          gate_(call.gate, call.gate_stride, call.gate_bias), up_(call.up, call.up_stride, call.up_bias),
          down_(call.down, call.down_stride, nullptr),
          tokens_(reinterpret_cast<Operand<W> *>(space.own + team.index * space.own_bytes)),
          sums_(space.sums + team.index * call.tokens * space.width) {}

    void run() {
        read_tokens();
        find();
        if (call_.selected) return;
        memset(sums_, 0, size_t(call_.tokens * space_.width) * sizeof(float));
        team_.barrier();
        if (team_.index == 0) count();
        sum_active();
        team_.barrier();
        reduce();
    }

  private:
    // Neurons that are decided on together: what comes between one chunk and the next lets streams of weights run dry.
    static constexpr int64_t CHUNK = 256;

    const countdown_ffn_call &call_;
    const FFNSpace<W> &space_;
    const Team &team_;
    const RowLoops<W> loops_;
    const Matrix<W> gate_, up_, down_;
    Operand<W> *const tokens_;
    float *const sums_;
    uint8_t dense_ = 0;  // bit t: token t is not finite, and needs every neuron
    Quantised quantised_[MOST_TOKENS];

    int64_t first_of(int64_t member, int64_t total) const { return total * member / team_.size; }
    // The first neuron that a member decides on: of a tile.
    int64_t first_decided(int64_t member) const {
        return least(TILE * first_of(member, ceil_to(call_.h, TILE) / TILE), call_.h);
    }

    // ---- tokens

    void read_tokens() {
        for (int64_t t = 0; t < call_.tokens; ++t) {
            const W *x = static_cast<const W *>(call_.x) + t * call_.d;
            if (!copy_token(x, call_.d, space_.tokens_width, tokens_ + t * space_.tokens_width))
                dense_ |= uint8_t(1 << t);
        }
        if (call_.decider == COUNTDOWN_BY_PROXY) quantise_tokens();
    }

    void quantise_tokens() {
        char *memory = reinterpret_cast<char *>(tokens_) +
                       ceil_to(call_.tokens * space_.tokens_width * int64_t(sizeof(Operand<W>)), 64);
        float *values = reinterpret_cast<float *>(memory);
        memory += space_.entries * 4;
        for (int64_t t = 0; t < call_.tokens; ++t, memory += Quantised::bytes(call_.words, call_.groups)) {
            copy_token(static_cast<const W *>(call_.x) + t * call_.d, call_.d, space_.entries, values);
            quantised_[t] = Quantised(memory, call_.words);
            quantise(values, call_.words, call_.groups, quantised_[t]);
        }
    }

    // ---- active sets

    void find() {
        int64_t first = first_decided(team_.index), stop = first_decided(team_.index + 1), place = first;
        int64_t active = 0;
        for (int64_t start = first; start < stop; start += CHUNK) {
            int64_t count = least(CHUNK, stop - start);
            uint8_t masks[CHUNK] = {};
            float values[CHUNK * MOST_TOKENS];
            clear(values, count);
            decide(start, count, values, masks);
            if (call_.selected)
                write_selected(start, count, masks);
            else
                place = list(start, count, values, masks, place, &active);
        }
        space_.found[team_.index].neurons = place - first;
        space_.found[team_.index].active = active;
    }

    // What whole vectors of [count, T] hold.
    void clear(float *values, int64_t count) const {
        memset(values, 0, size_t(ceil_to(count * call_.tokens, Vec::width)) * sizeof(float));
    }

    void decide(int64_t start, int64_t count, float *values, uint8_t *masks) {
        if (call_.decider == COUNTDOWN_GIVEN) return read_given(start, count, masks);
        indicators(start, count, values);
        const float *thresholds = call_.thresholds + start;
        // NaN is active.
        if (call_.tokens == 1) {
            for (int64_t k = 0; k < count; ++k) masks[k] = uint8_t(dense_ | !(fabsf(values[k]) <= thresholds[k]));
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
            int mask = dense_;
            for (int64_t t = 0; t < call_.tokens; ++t)
                mask |= !(fabsf(values[k * call_.tokens + t]) <= thresholds[k]) << t;
            masks[k] = uint8_t(mask);
        }
    }

    void read_given(int64_t start, int64_t count, uint8_t *masks) {
        for (int64_t t = 0; t < call_.tokens; ++t) {
            const uint8_t *given = call_.given + t * call_.h + start;
            for (int64_t k = 0; k < count; ++k) masks[k] |= uint8_t(given[k] << t);
        }
    }

    void write_selected(int64_t start, int64_t count, const uint8_t *masks) {
        for (int64_t t = 0; t < call_.tokens; ++t)
            for (int64_t k = 0; k < count; ++k) call_.selected[t * call_.h + start + k] = masks[k] >> t & 1;
    }

    int64_t list(int64_t start, int64_t count, const float *values, const uint8_t *masks, int64_t place,
                 int64_t *active) {
        if (call_.tokens == 1) return list_one(start, count, values, masks, place, active);
        for (int64_t k = 0; k < count; ++k) {
            if (!masks[k]) continue;
            space_.neurons[place] = int32_t(start + k);
            space_.masks[place] = masks[k];
            memcpy(space_.values + place * call_.tokens, values + k * call_.tokens, size_t(call_.tokens) * sizeof(float));
            for (int mask = masks[k]; mask; mask &= mask - 1) ++*active;
            ++place;
        }
        return place;
    }

    // Without branches, which would be taken at random: what is not kept is overwritten.
    int64_t list_one(int64_t start, int64_t count, const float *values, const uint8_t *masks, int64_t place,
                     int64_t *active) {
        int64_t before = place;
        for (int64_t k = 0; k < count; ++k) {
            space_.neurons[place] = int32_t(start + k);
            space_.masks[place] = masks[k];
            space_.values[place] = values[k];
            place += masks[k];
        }
        *active += place - before;
        return place;
    }

    // What is compared with thresholds, [count, T]; except of a proxy, it is part of the coefficient too.
    void indicators(int64_t start, int64_t count, float *values) {
        int64_t entries = count * call_.tokens;
        float others[CHUNK * MOST_TOKENS];
        clear(others, count);
        switch (call_.decider) {
            case COUNTDOWN_BY_UP:
                project_range(up_, start, count, values);
                return round(values, entries);
            case COUNTDOWN_BY_GATE: return activated_gate(start, count, values);
            case COUNTDOWN_BY_COEFFICIENT:
                activated_gate(start, count, values);
                project_range(up_, start, count, others);
                round(others, entries);
                break;
            default:
                proxy_range(start, count, values, others);
                activate(values, entries);
        }
        for (int64_t k = 0; k < entries; ++k) values[k] *= others[k];
    }

    void activated_gate(int64_t start, int64_t count, float *values) {
        project_range(gate_, start, count, values);
        round(values, count * call_.tokens);
        activate(values, count * call_.tokens);
        round(values, count * call_.tokens);
    }

    // Rows of W x + b for all tokens, [count, T].
    void project_range(const Matrix<W> &matrix, int64_t start, int64_t count, float *out) {
        const W *row = matrix.weight + start * matrix.stride;
        loops_.products(row, matrix.stride, count, tokens_, space_.tokens_width, call_.d, out);
        for (int64_t k = 0; k < count; ++k) add_bias(matrix, start + k, out + k * call_.tokens);
    }

    void add_bias(const Matrix<W> &matrix, int64_t neuron, float *out) const {
        if (!matrix.bias) return;
        for (int64_t t = 0; t < call_.tokens; ++t) out[t] += widened(matrix.bias + neuron);
    }

    ProxyTile tile_from(int64_t neuron) const {
        int64_t level = neuron * call_.words * 4, scale = neuron * call_.groups;
        return {{call_.gate_levels + level, call_.up_levels + level},
                {reinterpret_cast<const Fp16 *>(call_.gate_scales) + scale,
                 reinterpret_cast<const Fp16 *>(call_.up_scales) + scale}};
    }

    // Rows of what the proxy takes W_gate x + b_gate and W_up x + b_up for, for all tokens, [count, T] each.
    void proxy_range(int64_t start, int64_t count, float *gate, float *up) {
        for (int64_t k = 0; k < count; k += TILE)
            for (int64_t t = 0; t < call_.tokens; ++t) {
                float tile[2][TILE];
                tile_products(tile_from(start + k), call_.words, call_.groups, quantised_[t], tile[0], tile[1]);
                for (int64_t j = 0; j < TILE && k + j < count; ++j) {
                    gate[(k + j) * call_.tokens + t] = tile[0][j];
                    up[(k + j) * call_.tokens + t] = tile[1][j];
                }
            }
        for (int64_t k = 0; k < count; ++k) {
            add_bias(gate_, start + k, gate + k * call_.tokens);
            add_bias(up_, start + k, up + k * call_.tokens);
        }
    }

    // As the dense FFN rounds what it projects, so that active sets are those of the reference.
    static void round(float *values, int64_t count) {
        for (int64_t k = 0; k < count; k += Vec::width) store(values + k, rounded(load(values + k), W{}));
    }

    void activate(float *values, int64_t count) const {
        for (int64_t k = 0; k < count; k += Vec::width)
            store(values + k, activated(load(values + k), call_.activation));
    }

    // ---- sums over the active neurons

    void count() {
        int64_t active = 0;
        for (int member = 0; member < team_.size; ++member) active += space_.found[member].active;
        if (!call_.counters) return;
        call_.counters[0] += call_.tokens;
        call_.counters[1] += active;
    }

    // This thread's share of the neurons of all lists, taken together.
    void sum_active() {
        int64_t total = 0, before = 0;
        for (int member = 0; member < team_.size; ++member) total += space_.found[member].neurons;
        int64_t first = first_of(team_.index, total), stop = first_of(team_.index + 1, total);
        for (int member = 0; member < team_.size; before += space_.found[member++].neurons) {
            int64_t from = first > before ? first - before : 0;
            sum_list(first_decided(member), from, least(stop - before, space_.found[member].neurons));
        }
    }

    // Neurons from `from` to `stop` of the list that starts at a place.
    void sum_list(int64_t place, int64_t from, int64_t stop) {
        for (int64_t at = from; at < stop; at += loops_.rows_at_once)
            add(block_of(place + at, stop - at), block_of(place + at + loops_.rows_at_once, stop - at - loops_.rows_at_once));
    }

    Block block_of(int64_t place, int64_t left) const {
        return {least(loops_.rows_at_once, left), space_.neurons + place, space_.masks + place,
                space_.values + place * call_.tokens};
    }

    void add(const Block &block, const Block &next) {
        float factors[BLOCK * MOST_TOKENS] = {};
        Rows<W> down = down_.rows(block), later;
        coefficients(block, down, factors);
        if (call_.tokens > 1) leave_others_out(block, factors);
        if (next.count > 0) later = first_read().rows(next);
        loops_.add(down, block.count, factors, call_.d, sums_, space_.width, next.count > 0 ? &later : nullptr);
    }

    // A neuron of a block is needed by some token, not by all.
    void leave_others_out(const Block &block, float *factors) const {
        for (int64_t k = 0; k < block.count; ++k)
            for (int64_t t = 0; t < call_.tokens; ++t)
                if (!(block.masks[k] >> t & 1)) factors[k * call_.tokens + t] = 0;
    }

    // The matrix of which a block's rows are read first.
    const Matrix<W> &first_read() const {
        if (call_.decider == COUNTDOWN_BY_COEFFICIENT) return down_;
        return call_.decider == COUNTDOWN_BY_GATE ? up_ : gate_;
    }

    // What the rows of W_down are multiplied with, which are prefetched meanwhile.
    void coefficients(const Block &block, const Rows<W> &down, float *factors) {
        int64_t entries = block.count * call_.tokens;
        float others[BLOCK * MOST_TOKENS] = {};
        switch (call_.decider) {
            case COUNTDOWN_BY_COEFFICIENT: memcpy(factors, block.values, size_t(entries) * sizeof(float)); return;
            case COUNTDOWN_BY_GATE: project(up_, block, factors, down); break;
            case COUNTDOWN_BY_UP:
                project(gate_, block, factors, down);
                activate(factors, entries);
                break;
            default:
                project(gate_, block, factors, up_.rows(block));
                activate(factors, entries);
                project(up_, block, others, down);
        }
        const float *factor = call_.decider == COUNTDOWN_BY_UP || call_.decider == COUNTDOWN_BY_GATE ? block.values : others;
        for (int64_t k = 0; k < entries; ++k) factors[k] *= factor[k];
    }

    // Rows of a block's neurons times all tokens, [count, T], while those that come `next` are fetched.
    void project(const Matrix<W> &matrix, const Block &block, float *out, const Rows<W> &next) {
        loops_.products(matrix.rows(block), block.count, tokens_, space_.tokens_width, call_.d, out, next);
        for (int64_t k = 0; k < block.count; ++k) add_bias(matrix, block.neurons[k], out + k * call_.tokens);
    }

    void reduce() {
        int64_t vectors = space_.width / Vec::width;
        int64_t first = first_of(team_.index, vectors) * Vec::width;
        int64_t stop = least(call_.d, first_of(team_.index + 1, vectors) * Vec::width);
        const W *bias = static_cast<const W *>(call_.down_bias);
        for (int64_t t = 0; t < call_.tokens; ++t) {
            W *y = static_cast<W *>(call_.y) + t * call_.d;
            for (int64_t c = first; c < stop; c += Vec::width) {
                int64_t count = least(Vec::width, stop - c);
                Vec total = splat(0);
                for (int member = 0; member < team_.size; ++member)
                    total = total + load(space_.sums + (member * call_.tokens + t) * space_.width + c);
                if (bias) total = total + (count == Vec::width ? load(bias + c) : load(bias + c, count));
                store(y + c, total, count);
            }
        }
    }
};

}  // namespace VARIANT
}  // namespace countdown
