// The kernels of one variant. Included by each variant's file, after it has defined VARIANT, its name, and Vec.
#pragma once

#include "activations.hpp"
#include "rows.hpp"
// These build on the ones above.
#include "proxy.hpp"
#include "dense.hpp"
#include "ffn.hpp"
#include "small.hpp"
#include "variant.hpp"

namespace countdown {
namespace VARIANT {

// Run Part(call, space, member).run() on a team.
template <class Part, class Call, class Space>
static void run_parts(const Call &call, const Space &space, int threads) {
    struct Job {
        const Call &call;
        const Space &space;
    };
    Job job = {call, space};
    run_team(
        threads,
        [](const void *data, const Team &team) {
            const Job &given = *static_cast<const Job *>(data);
            Part(given.call, given.space, team).run();
        },
        &job);
}

template <class W>
struct Kernels {
    static int64_t workspace(const countdown_ffn_call &call, int threads) { return FFNSpace<W>(call, threads).bytes; }
    static int64_t workspace(const countdown_project_call &call, int threads) {
        return ProjectSpace<W>(call, threads).bytes;
    }
    static int64_t workspace(const countdown_attend_call &call, int threads) {
        return AttendSpace<W>(call, threads).bytes;
    }
    static void run(const countdown_ffn_call &call, int threads) {
        run_parts<FFN<W>>(call, FFNSpace<W>(call, threads), threads);
    }
    static void run(const countdown_project_call &call, int threads) {
        run_parts<Projection<W>>(call, ProjectSpace<W>(call, threads), threads);
    }
    static void run(const countdown_attend_call &call, int threads) {
        run_parts<Attention<W>>(call, AttendSpace<W>(call, threads), threads);
    }
};

template <class Call>
static int64_t workspace(const Call &call, int threads) {
    switch (call.dtype) {
        case COUNTDOWN_FLOAT32: return Kernels<float>::workspace(call, threads);
        case COUNTDOWN_BFLOAT16: return Kernels<Bf16>::workspace(call, threads);
        default: return Kernels<Fp16>::workspace(call, threads);
    }
}

template <class Call>
static void run(const Call &call, int threads) {
    switch (call.dtype) {
        case COUNTDOWN_FLOAT32: return Kernels<float>::run(call, threads);
        case COUNTDOWN_BFLOAT16: return Kernels<Bf16>::run(call, threads);
        default: return Kernels<Fp16>::run(call, threads);
    }
}

static constexpr Variant variant_of(const char *name, bool (*runs_here)()) {
    return {name, runs_here, workspace, workspace, workspace, run, run, run, run_small};
}

}  // namespace VARIANT
}  // namespace countdown
