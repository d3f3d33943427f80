// Picks a variant for this CPU, and forwards the calls of the C interface to it.
#include "variant.hpp"

namespace countdown {
namespace {

// The best first.
const Variant *const ALL[] = {
#ifdef COUNTDOWN_X86
    &avx512_bf16,
    &avx512,
    &avx2,
#endif
    &portable,
};

const Variant *find(int place) {
    for (const Variant *variant : ALL)
        if (variant->runs_here() && place-- == 0) return variant;
    return nullptr;
}

const Variant *&taken() {
    static const Variant *variant = find(0);
    return variant;
}

}  // namespace
}  // namespace countdown

using countdown::taken;

int64_t countdown_abi(void) { return COUNTDOWN_ABI; }

int64_t countdown_ffn_workspace(const countdown_ffn_call *call, int threads) {
    return taken()->ffn_workspace(*call, threads);
}
int64_t countdown_project_workspace(const countdown_project_call *call, int threads) {
    return taken()->project_workspace(*call, threads);
}
int64_t countdown_attend_workspace(const countdown_attend_call *call, int threads) {
    return taken()->attend_workspace(*call, threads);
}

void countdown_ffn(const countdown_ffn_call *call, int threads) { taken()->ffn(*call, threads); }
void countdown_project(const countdown_project_call *call, int threads) { taken()->project(*call, threads); }
void countdown_attend(const countdown_attend_call *call, int threads) { taken()->attend(*call, threads); }

void countdown_small(const countdown_small_call *calls, int64_t count) {
    for (int64_t k = 0; k < count; ++k) taken()->small(calls[k]);
}

const char *countdown_variant(int place) {
    const countdown::Variant *variant = countdown::find(place);
    return variant ? variant->name : nullptr;
}

void countdown_take_variant(int place) { taken() = countdown::find(place); }
