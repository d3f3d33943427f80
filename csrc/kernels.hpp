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

template <template <class> class Part, template <class> class Space, class Call>
struct Kernel {
    static int64_t workspace(const void *given, int threads) {
        const Call &call = *static_cast<const Call *>(given);
        switch (call.dtype) {
            case COUNTDOWN_FLOAT32: return Space<float>(call, threads).bytes;
            case COUNTDOWN_BFLOAT16: return Space<Bf16>(call, threads).bytes;
            default: return Space<Fp16>(call, threads).bytes;
        }
    }

    static void run(const void *given, const Team &member) {
        const Call &call = *static_cast<const Call *>(given);
        switch (call.dtype) {
            case COUNTDOWN_FLOAT32: return run_as<float>(call, member);
            case COUNTDOWN_BFLOAT16: return run_as<Bf16>(call, member);
            default: return run_as<Fp16>(call, member);
        }
    }

  private:
    template <class W>
    static void run_as(const Call &call, const Team &member) {
        Space<W> space(call, member.size);
        Part<W>(call, space, member).run();
    }
};

using FFNKernel = Kernel<FFN, FFNSpace, countdown_ffn_call>;
using ProjectKernel = Kernel<Projection, ProjectSpace, countdown_project_call>;
using AttendKernel = Kernel<Attention, AttendSpace, countdown_attend_call>;

static int64_t workspace_of(int64_t kind, const void *call, int threads) {
    switch (kind) {
        case COUNTDOWN_FFN: return FFNKernel::workspace(call, threads);
        case COUNTDOWN_PROJECT: return ProjectKernel::workspace(call, threads);
        case COUNTDOWN_ATTEND: return AttendKernel::workspace(call, threads);
        default: return 0;
    }
}

static void run_part(int64_t kind, const void *call, const Team &member) {
    switch (kind) {
        case COUNTDOWN_FFN: return FFNKernel::run(call, member);
        case COUNTDOWN_PROJECT: return ProjectKernel::run(call, member);
        case COUNTDOWN_ATTEND: return AttendKernel::run(call, member);
        default: return run_small(*static_cast<const countdown_small_call *>(call));
    }
}

static constexpr Variant variant_of(const char *name, bool (*runs_here)()) {
    return {name, runs_here, workspace_of, run_part};
}

}  // namespace VARIANT
}  // namespace countdown
