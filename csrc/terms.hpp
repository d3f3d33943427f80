// The terms of a sum as one part of the work sees them: the tokens, and what they make of rows of the weights.
#pragma once

#include "formats.hpp"
#include "proxy.hpp"
#include "workspace.hpp"

namespace countdown::VARIANT {

// Neurons that are decided on together: what comes between one chunk and the next lets streams of weights run dry.
constexpr int64_t CHUNK = 256;

// Bit t of each: every neuron is active for token t; some may be; it is counted.
struct Tokens {
    uint8_t whole = 0, present = 0, counted = 0;
};

struct Found {
    int64_t neurons, active;  // neurons that some token needs, and pairs of a counted token and a neuron it needs
    int64_t left;             // such pairs after a second look, of the part's share of all
    Tokens tokens;            // as the part has read them
    char padding[37];         // a line of its own for each part
};

// The dtype in which tokens are multiplied: that of x where products with both matrices take it, else float32, as of a
// linear, whose one matrix is multiplied with floats.
static int64_t operand_of(const countdown_sum_call &call) {
    bool taken = FORMATS[call.gate.format].operand == call.dtype && FORMATS[call.up.format].operand == call.dtype;
    return taken ? call.dtype : int64_t(COUNTDOWN_FLOAT32);
}

struct SumSpace {
    // By place in a part's list, which starts where the part's range does.
    int32_t *neurons;
    uint8_t *masks;  // bit t: token t needs it
    float *values;   // [T] of a place: what is known of the coefficient
    Found *found;
    float *sums;     // [parts, T, width]
    float *inner;    // [parts, T, rank_width]: of dropped input channels, in as many entries as the low rank has
    float *low;      // [parts, T, rank_width]: the same of all parts, added by each for itself
    int64_t width, tokens_width, rank_width;
    int64_t entries;  // of a token, as floats, that copies are multiplied with
    char *own;        // of each part: tokens, one of them as floats, and its quantised ones; those of the prediction
    int64_t tokens_bytes, predicted_at, own_bytes, bytes;

    SumSpace(const countdown_sum_call &call, int parts) {
        Workspace space(call.workspace);
        const countdown_decision &decision = call.decision;
        entries = ceil_to(8 * decision.words, Vec::width);
        width = ceil_to(call.outputs, 16);
        tokens_width = ceil_to(call.d, PADDING);
        neurons = space.take<int32_t>(call.h);
        masks = space.take<uint8_t>(call.h);
        values = space.take<float>(call.h * call.tokens);
        found = space.take<Found>(parts);
        sums = space.take<float>(parts * call.tokens * width);
        rank_width = ceil_to(call.added.rank, PADDING);
        inner = space.take<float>(parts * call.tokens * rank_width);
        low = space.take<float>(parts * call.tokens * rank_width);
        tokens_bytes = ceil_to(call.tokens * tokens_width * (operand_of(call) == COUNTDOWN_FLOAT32 ? 4 : 2), 64);
        own_bytes = tokens_bytes + entries * 4 + call.tokens * Quantised::bytes(decision.words, decision.groups);
        predicted_at = own_bytes = ceil_to(own_bytes, 64);  // no line is of two parts
        const countdown_affine &affine = call.affine;
        own_bytes += 4 * ceil_to(8 * affine.words, Vec::width);
        own_bytes = ceil_to(own_bytes + call.tokens * Quantised::bytes(affine.words, affine.groups), 64);
        own = space.take<char>(parts * own_bytes);
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

// A matrix with a row a neuron.
struct Matrix {
    const char *data;
    int64_t stride;
    Array bias;
    RowLoops loops;

    Matrix(const countdown_weight &weight, int64_t operand, int64_t tokens)
        : data(static_cast<const char *>(weight.data)), stride(weight.stride), bias{weight.bias, weight.bias_dtype},
          loops(FORMATS[weight.format].loops_with(operand, tokens)) {}

    // Of a block; beyond its neurons, the last one's again.
    Rows rows(const Block &block) const {
        Rows some;
        for (int64_t k = 0; k < BLOCK; ++k) some.row[k] = data + block.neurons[least(k, block.count - 1)] * stride;
        return some;
    }
};

class Terms {
  public:
    const countdown_sum_call &call;
    const Matrix gate, up, down;
    Tokens seen;

    // The tokens that part `index` reads, or has read in a phase before.
    enum Reading { READ, WAS_READ };

    Terms(const countdown_sum_call &call, const SumSpace &space, int index, Reading reading)
        : call(call), gate(call.gate, operand_of(call), call.tokens), up(call.up, operand_of(call), call.tokens),
          down(call.down, operand_of(call), call.tokens), space_(space), tokens_(space.own + index * space.own_bytes) {
        if (reading == WAS_READ) {
            seen = space.found[index].tokens;
            return;
        }
        for (int64_t t = 0; t < call.tokens; ++t) see(t, read_token(t));
        if (call.decision.words) quantise_tokens();
        space.found[index].tokens = seen;
    }

    // What whole vectors of [count, T] hold.
    void clear(float *values, int64_t count) const {
        memset(values, 0, size_t(ceil_to(count * call.tokens, Vec::width)) * sizeof(float));
    }

    // Rows of W x + b from `start` on for all tokens, [count, T].
    void project(const Matrix &matrix, int64_t start, int64_t count, float *out) const {
        const char *row = matrix.data + start * matrix.stride;
        matrix.loops.products(row, matrix.stride, count, tokens_, space_.tokens_width, call.d, out);
        if (!matrix.bias.data) return;
        for (int64_t k = 0; k < count; ++k) add_bias(matrix, start + k, out + k * call.tokens);
    }

    // The same of a block's neurons, while the rows that come `next` are fetched.
    void project(const Matrix &matrix, const Block &block, float *out, const Rows &next) const {
        matrix.loops.products(matrix.rows(block), block.count, tokens_, space_.tokens_width, call.d, out, next);
        if (!matrix.bias.data) return;
        for (int64_t k = 0; k < block.count; ++k) add_bias(matrix, block.neurons[k], out + k * call.tokens);
    }

    // What the copies take W_gate x + b_gate and W_up x + b_up for, [count, T] each.
    void project_copies(int64_t start, int64_t count, float *g, float *u) const {
        for (int64_t k = 0; k < count; k += TILE)
            for (int64_t t = 0; t < call.tokens; ++t) {
                float tile[2][TILE];
                tile_products(tile_from(start + k), call.decision.words, call.decision.groups, quantised_[t], tile);
                for (int64_t j = 0; j < TILE && k + j < count; ++j) {
                    g[(k + j) * call.tokens + t] = tile[0][j];
                    u[(k + j) * call.tokens + t] = tile[1][j];
                }
            }
        for (int64_t k = 0; k < count; ++k) {
            add_bias(gate, start + k, g + k * call.tokens);
            add_bias(up, start + k, u + k * call.tokens);
        }
    }

    // Entries of the tokens themselves, which are floats where there is no gate, [count, T].
    void read_inputs(int64_t start, int64_t count, float *values) const {
        const float *tokens = reinterpret_cast<const float *>(tokens_) + start;
        if (call.tokens == 1) return void(memcpy(values, tokens, size_t(count) * sizeof(float)));
        for (int64_t k = 0; k < count; ++k)
            for (int64_t t = 0; t < call.tokens; ++t)
                values[k * call.tokens + t] = tokens[t * space_.tokens_width + k];
    }

    // [count, T], as the dense FFN rounds what it projects, so that active sets are those of the reference.
    void round(float *values, int64_t count) const {
        as_type(call.dtype, [&](auto like) {
            for (int64_t k = 0; k < count * call.tokens; k += Vec::width)
                store(values + k, rounded(load(values + k), like));
        });
    }

    void activate(float *values, int64_t count) const {
        for (int64_t k = 0; k < count * call.tokens; k += Vec::width)
            store(values + k, activated(load(values + k), call.activation));
    }

    void multiply(float *values, const float *others, int64_t count) const {
        for (int64_t k = 0; k < count * call.tokens; ++k) values[k] *= others[k];
    }

    // Copy a token and zeros up to `width`; return whether all of it is finite.
    template <class To>
    bool copy(int64_t t, int64_t width, To *to) const {
        return as_type(call.dtype, [&](auto like) {
            return copy_token(static_cast<const decltype(like) *>(call.x[t]), call.d, width, to);
        });
    }

  private:
    const SumSpace &space_;
    char *const tokens_;
    Quantised quantised_[MOST_TOKENS];

    // In the dtype in which it is multiplied.
    bool read_token(int64_t t) const {
        int64_t width = space_.tokens_width;
        if (operand_of(call) == COUNTDOWN_BFLOAT16) return copy(t, width, reinterpret_cast<Bf16 *>(tokens_) + t * width);
        return copy(t, width, reinterpret_cast<float *>(tokens_) + t * width);
    }

    void see(int64_t t, bool finite) {
        int phase = call.decision.phases ? call.decision.phases[t] : int(COUNTDOWN_GENERATED);
        seen.whole |= uint8_t((!finite || phase == COUNTDOWN_PROMPT) << t);
        seen.present |= uint8_t((phase != COUNTDOWN_PADDING) << t);
        seen.counted |= uint8_t((phase == COUNTDOWN_GENERATED) << t);
    }

    void quantise_tokens() {
        int64_t words = call.decision.words, groups = call.decision.groups;
        float *values = reinterpret_cast<float *>(tokens_ + space_.tokens_bytes);
        char *memory = reinterpret_cast<char *>(values + space_.entries);
        for (int64_t t = 0; t < call.tokens; ++t, memory += Quantised::bytes(words, groups)) {
            copy(t, space_.entries, values);
            quantised_[t] = Quantised(memory, words);
            quantise(values, words, groups, quantised_[t]);
        }
    }

    void add_bias(const Matrix &matrix, int64_t neuron, float *out) const {
        if (!matrix.bias.data) return;
        for (int64_t t = 0; t < call.tokens; ++t) out[t] += matrix.bias.at(neuron);
    }

    TwoTiles tile_from(int64_t neuron) const {
        const countdown_decision &by = call.decision;
        int64_t level = neuron * by.words * 4, scale = neuron * by.groups;
        return {{by.gate.levels + level, by.up.levels + level},
                {reinterpret_cast<const Fp16 *>(by.gate.scales) + scale,
                 reinterpret_cast<const Fp16 *>(by.up.scales) + scale}};
    }
};

}  // namespace countdown::VARIANT
