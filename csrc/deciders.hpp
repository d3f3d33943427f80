// What decides which neurons are active: a struct each, and a row of DECIDERS.
#pragma once

#include "terms.hpp"

namespace countdown::VARIANT {

struct Decider {
    // What is compared with the thresholds of the neurons from `start` on, [count, T].
    void (*score)(const Terms &terms, int64_t start, int64_t count, float *values);
    // What a block's rows of W_down, which are fetched meanwhile, are multiplied with, [count, T]; its `values` are
    // what `score` left of them.
    void (*coefficients)(const Terms &terms, const Block &block, const Rows &down, float *factors);
    const Matrix Terms::*first_read;  // of whose rows `coefficients` reads a block first
    // Coefficients of a block as the dense FFN rounds their factors, [count, T], while the rows of `first_read` that come
    // `next` are fetched; for a second look.
    void (*look_again)(const Terms &terms, const Block &block, const Rows &next, float *out);
};

struct ByUp {
    static void score(const Terms &terms, int64_t start, int64_t count, float *values) {
        terms.project(terms.up, start, count, values);
        terms.round(values, count);
    }

    static void coefficients(const Terms &terms, const Block &block, const Rows &down, float *factors) {
        terms.project(terms.gate, block, factors, down);
        terms.activate(factors, block.count);
        terms.multiply(factors, block.values, block.count);
    }

    static void look_again(const Terms &terms, const Block &block, const Rows &next, float *out) {
        terms.project(terms.gate, block, out, next);
        terms.round(out, block.count);
        terms.activate(out, block.count);
        terms.round(out, block.count);
        terms.multiply(out, block.values, block.count);
    }
};

struct ByGate {
    static void score(const Terms &terms, int64_t start, int64_t count, float *values) {
        terms.project(terms.gate, start, count, values);
        terms.round(values, count);
        terms.activate(values, count);
        terms.round(values, count);
    }

    static void coefficients(const Terms &terms, const Block &block, const Rows &down, float *factors) {
        terms.project(terms.up, block, factors, down);
        terms.multiply(factors, block.values, block.count);
    }

    static void look_again(const Terms &terms, const Block &block, const Rows &next, float *out) {
        terms.project(terms.up, block, out, next);
        terms.round(out, block.count);
        terms.multiply(out, block.values, block.count);
    }
};

struct ByCoefficient {
    static void score(const Terms &terms, int64_t start, int64_t count, float *values) {
        float others[CHUNK * MOST_TOKENS];
        terms.clear(others, count);
        ByGate::score(terms, start, count, values);
        ByUp::score(terms, start, count, others);
        terms.multiply(values, others, count);
    }

    static void coefficients(const Terms &terms, const Block &block, const Rows &, float *factors) {
        memcpy(factors, block.values, size_t(block.count * terms.call.tokens) * sizeof(float));
    }
};

// An input channel's coefficient is the input.
struct ByInput : ByCoefficient {
    static void score(const Terms &terms, int64_t start, int64_t count, float *values) {
        terms.read_inputs(start, count, values);
    }
};

// Of a neuron that others found active nothing is known.
struct Unknown {
    static void coefficients(const Terms &terms, const Block &block, const Rows &down, float *factors) {
        float others[BLOCK * MOST_TOKENS] = {};
        terms.project(terms.gate, block, factors, terms.up.rows(block));
        terms.activate(factors, block.count);
        terms.project(terms.up, block, others, down);
        terms.multiply(factors, others, block.count);
    }
};

struct ByCopy : Unknown {
    static void score(const Terms &terms, int64_t start, int64_t count, float *values) {
        float others[CHUNK * MOST_TOKENS];
        terms.clear(others, count);
        terms.project_copies(start, count, values, others);
        terms.activate(values, count);
        terms.multiply(values, others, count);
    }
};

// In the order of countdown_decider. What is given is not compared.
static constexpr Decider DECIDERS[] = {
    {ByUp::score, ByUp::coefficients, &Terms::gate, ByUp::look_again},
    {ByGate::score, ByGate::coefficients, &Terms::up, ByGate::look_again},
    {ByCoefficient::score, ByCoefficient::coefficients, &Terms::down, nullptr},
    {ByCopy::score, ByCopy::coefficients, &Terms::gate, nullptr},
    {ByInput::score, ByInput::coefficients, &Terms::down, nullptr},
    {nullptr, Unknown::coefficients, &Terms::gate, nullptr},
};

}  // namespace countdown::VARIANT
