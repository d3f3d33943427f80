// What a variant offers: the same functions, compiled for one set of instructions.
#pragma once

#include "countdown.h"
#include "threads.hpp"

namespace countdown {

struct Variant {
    const char *name;
    bool (*runs_here)();
    // Of a call of this kind.
    int64_t (*workspace)(int64_t kind, const void *call, int parts);
    // Phases of a call, and one part of one of them.
    int (*phases)(int64_t kind, const void *call);
    void (*run)(int64_t kind, const void *call, int phase, const Part &part);
};

extern const Variant portable, avx2, avx512, avx512_bf16;

}  // namespace countdown
