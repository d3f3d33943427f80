// The kernels of one variant. Included by each variant's file, after it has defined VARIANT, its name, and Vec.
#pragma once

#include "activations.hpp"
#include "rows.hpp"
// These build on the ones above.
#include "sum.hpp"
#include "dense.hpp"
#include "small.hpp"
#include "variant.hpp"

namespace countdown::VARIANT {

// A kernel for one dtype of all that it reads and writes.
template <template <class> class Part, template <class> class Space, class Call>
struct DenseKernel {
    static int64_t workspace(const void *given, int threads) {
        const Call &call = *static_cast<const Call *>(given);
        return as_type(call.dtype, [&](auto like) { return Space<decltype(like)>(call, threads).bytes; });
    }

    static void run(const void *given, const Team &member) {
        const Call &call = *static_cast<const Call *>(given);
        as_type(call.dtype, [&](auto like) {
            Space<decltype(like)> space(call, member.size);
            Part<decltype(like)>(call, space, member).run();
        });
    }
};

using ProjectKernel = DenseKernel<Projection, ProjectSpace, countdown_project_call>;
using AttendKernel = DenseKernel<Attention, AttendSpace, countdown_attend_call>;

static void run_sum(const countdown_sum_call &call, const Team &member) {
    SumSpace space(call, member.size);
    Sum(call, space, member).run();
}

static int64_t workspace_of(int64_t kind, const void *call, int threads) {
    switch (kind) {
        case COUNTDOWN_SUM: return SumSpace(*static_cast<const countdown_sum_call *>(call), threads).bytes;
        case COUNTDOWN_PROJECT: return ProjectKernel::workspace(call, threads);
        case COUNTDOWN_ATTEND: return AttendKernel::workspace(call, threads);
        default: return 0;
    }
}

static void run_part(int64_t kind, const void *call, const Team &member) {
    switch (kind) {
        case COUNTDOWN_SUM: return run_sum(*static_cast<const countdown_sum_call *>(call), member);
        case COUNTDOWN_PROJECT: return ProjectKernel::run(call, member);
        case COUNTDOWN_ATTEND: return AttendKernel::run(call, member);
        default: return run_small(*static_cast<const countdown_small_call *>(call));
    }
}

static constexpr Variant variant_of(const char *name, bool (*runs_here)()) {
    return {name, runs_here, workspace_of, run_part};
}

}  // namespace countdown::VARIANT
