// Small operations on tensors of any strides: what is left of a step beside the weights.
#pragma once

#include <math.h>

#include "countdown.h"

namespace countdown::VARIANT {

// Floats of a row that are worked on at once, and a vector more.
constexpr int64_t PIECE = 1024;
constexpr int64_t BUFFER = PIECE + 16;

// Entries of one of a tensor's rows.
struct Entries {
    char *data;
    int64_t dtype, stride;

    Entries(const countdown_tensor &tensor, int64_t offset)
        : data(static_cast<char *>(tensor.data) + offset * size(tensor.dtype)), dtype(tensor.dtype),
          stride(tensor.strides[3]) {}

    static int64_t size(int64_t dtype) { return dtype == COUNTDOWN_FLOAT32 ? 4 : 2; }

    void read(int64_t start, int64_t count, float *to) const {
        as_type(dtype, [&](auto like) {
            const auto *from = reinterpret_cast<const decltype(like) *>(data) + start * stride;
            if (stride == 1) {
                int64_t k = 0;
                for (; k + Vec::width <= count; k += Vec::width) store(to + k, load(from + k));
                if (k < count) store(to + k, load(from + k, count - k));
            } else if (stride == 0) {
                Vec same = splat(widened(from));
                for (int64_t k = 0; k < count; k += Vec::width) store(to + k, same);
            } else {
                for (int64_t k = 0; k < count; ++k) to[k] = widened(from + k * stride);
            }
        });
    }

    void write(int64_t start, int64_t count, const float *from) const {
        as_type(dtype, [&](auto value) {
            auto *to = reinterpret_cast<decltype(value) *>(data) + start * stride;
            if (stride == 1) {
                for (int64_t k = 0; k < count; k += Vec::width)
                    store(to + k, load(from + k), least(Vec::width, count - k));
            } else {
                for (int64_t k = 0; k < count; ++k) {
                    narrow(from[k], &value);
                    memcpy(to + k * stride, &value, sizeof value);
                }
            }
        });
    }
};

static Vec small_result(const countdown_small_call &call, Vec a, Vec b) {
    switch (call.operation) {
        case COUNTDOWN_ADD: return a + b;
        case COUNTDOWN_MULTIPLY: return a * b;
        case COUNTDOWN_NEGATE: return splat(0) - a;
        case COUNTDOWN_SQUARE: return a * a;
        case COUNTDOWN_ACTIVATE: return activated(a, call.activation);
        default: return a;
    }
}

static void small_row(const countdown_small_call &call, const Entries &to, const Entries &a, const Entries &b) {
    float first[BUFFER], second[BUFFER];
    for (int64_t start = 0; start < call.sizes[3]; start += PIECE) {
        int64_t count = least(PIECE, call.sizes[3] - start);
        a.read(start, count, first);
        if (call.second.data) b.read(start, count, second);
        for (int64_t k = 0; k < count; k += Vec::width) {
            Vec other = call.second.data ? load(second + k) : splat(float(call.value));
            store(first + k, small_result(call, load(first + k), other));
        }
        if (call.operation == COUNTDOWN_INVERSE_ROOT)
            for (int64_t k = 0; k < count; ++k) first[k] = 1 / sqrtf(first[k]);
        to.write(start, count, first);
    }
}

// NaN if either is.
static float larger(float a, float b) { return a != a || a >= b ? a : b; }

static void small_mean(const countdown_small_call &call, const Entries &to, const Entries &a) {
    float some[BUFFER];
    Vec total = splat(0);
    for (int64_t start = 0; start < call.sizes[3]; start += PIECE) {
        int64_t count = least(PIECE, call.sizes[3] - start);
        a.read(start, count, some);
        for (int64_t k = count; k < ceil_to(count, Vec::width); ++k) some[k] = 0;
        for (int64_t k = 0; k < count; k += Vec::width) total = total + load(some + k);
    }
    some[0] = sum(total) / float(call.sizes[3]);  // in a buffer: a vector is read
    to.write(0, 1, some);
}

static void small_largest(const Entries &to, const Entries &a, int64_t size) {
    float some[BUFFER], largest = -INFINITY;
    for (int64_t start = 0; start < size; start += PIECE) {
        int64_t count = least(PIECE, size - start);
        a.read(start, count, some);
        float most[Vec::width];
        for (float &one : most) one = -INFINITY;
        for (int64_t k = count; k < ceil_to(count, Vec::width); ++k) some[k] = -INFINITY;
        for (int64_t k = 0; k < count; k += Vec::width)
            for (int i = 0; i < Vec::width; ++i) most[i] = larger(most[i], some[k + i]);
        for (float one : most) largest = larger(largest, one);
    }
    some[0] = largest;
    to.write(0, 1, some);
}

// Integers are few: positions and counts. They are added.
static void integer_row(const countdown_small_call &call, int64_t to, int64_t a, int64_t b) {
    int64_t *result = static_cast<int64_t *>(call.result.data) + to;
    const int64_t *first = static_cast<const int64_t *>(call.first.data) + a;
    const int64_t *second = call.second.data ? static_cast<const int64_t *>(call.second.data) + b : nullptr;
    for (int64_t k = 0; k < call.sizes[3]; ++k) {
        int64_t other = second ? second[k * call.second.strides[3]] : int64_t(call.value);
        result[k * call.result.strides[3]] = first[k * call.first.strides[3]] + other;
    }
}

static void run_small(const countdown_small_call &call) {
    int64_t moved = 0;
    if (call.at) {
        if (*call.at < 0 || *call.at >= call.at_limit) return;
        moved = *call.at * call.at_stride;
    }
    for (int64_t i = 0; i < call.sizes[0]; ++i)
        for (int64_t j = 0; j < call.sizes[1]; ++j)
            for (int64_t k = 0; k < call.sizes[2]; ++k) {
                auto offset = [&](const countdown_tensor &of) {
                    return i * of.strides[0] + j * of.strides[1] + k * of.strides[2];
                };
                int64_t to = offset(call.result) + moved, a = offset(call.first), b = offset(call.second);
                if (call.result.dtype == COUNTDOWN_INT64)
                    integer_row(call, to, a, b);
                else if (call.operation == COUNTDOWN_MEAN)
                    small_mean(call, Entries(call.result, to), Entries(call.first, a));
                else if (call.operation == COUNTDOWN_LARGEST)
                    small_largest(Entries(call.result, to), Entries(call.first, a), call.sizes[3]);
                else
                    small_row(call, Entries(call.result, to), Entries(call.first, a), Entries(call.second, b));
            }
}

}  // namespace countdown::VARIANT
