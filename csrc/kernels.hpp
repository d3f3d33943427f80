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
template <template <class> class Work, template <class> class Space, class Call>
struct DenseKernel {
    static int64_t workspace(const void *given, int parts) {
        const Call &call = *static_cast<const Call *>(given);
        return as_type(call.dtype, [&](auto like) { return Space<decltype(like)>(call, parts).bytes; });
    }

    static void run(const void *given, int phase, const Part &part) {
        const Call &call = *static_cast<const Call *>(given);
        as_type(call.dtype, [&](auto like) {
            Space<decltype(like)> space(call, part.count);
            Work<decltype(like)>(call, space, part).run(phase);
        });
    }
};

using ProjectKernel = DenseKernel<Projection, ProjectSpace, countdown_project_call>;
using AttendKernel = DenseKernel<Attention, AttendSpace, countdown_attend_call>;

static void run_sum(const countdown_sum_call &call, int phase, const Part &part) {
    SumSpace space(call, part.count);
    Sum(call, space, part, phase).run();
}

static int64_t workspace_of(int64_t kind, const void *call, int parts) {
    switch (kind) {
        case COUNTDOWN_SUM: return SumSpace(*static_cast<const countdown_sum_call *>(call), parts).bytes;
        case COUNTDOWN_PROJECT: return ProjectKernel::workspace(call, parts);
        case COUNTDOWN_ATTEND: return AttendKernel::workspace(call, parts);
        default: return 0;
    }
}

static int phases_of(int64_t kind, const void *call) {
    switch (kind) {
        case COUNTDOWN_SUM: return Sum::phases(*static_cast<const countdown_sum_call *>(call));
        case COUNTDOWN_ATTEND: return 2;
        default: return 1;
    }
}

static void run_part(int64_t kind, const void *call, int phase, const Part &part) {
    switch (kind) {
        case COUNTDOWN_SUM: return run_sum(*static_cast<const countdown_sum_call *>(call), phase, part);
        case COUNTDOWN_PROJECT: return ProjectKernel::run(call, phase, part);
        case COUNTDOWN_ATTEND: return AttendKernel::run(call, phase, part);
        default: return run_small(*static_cast<const countdown_small_call *>(call));
    }
}

static constexpr Variant variant_of(const char *name, bool (*runs_here)()) {
    return {name, runs_here, workspace_of, phases_of, run_part};
}

}  // namespace countdown::VARIANT
