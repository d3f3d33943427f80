// What a variant offers: the same functions, compiled for one set of instructions.
#pragma once

#include "countdown.h"
#include "threads.hpp"

namespace countdown {

struct Variant {
    const char *name;
    bool (*runs_here)();
    int64_t (*ffn_workspace)(const countdown_ffn_call &, int threads);
    int64_t (*project_workspace)(const countdown_project_call &, int threads);
    int64_t (*attend_workspace)(const countdown_attend_call &, int threads);
    void (*ffn)(const countdown_ffn_call &, int threads);
    void (*project)(const countdown_project_call &, int threads);
    void (*attend)(const countdown_attend_call &, int threads);
    void (*small)(const countdown_small_call &);
};

extern const Variant portable, avx2, avx512, avx512_bf16;

}  // namespace countdown
