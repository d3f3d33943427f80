// Picks a variant for this CPU, and runs steps with it.
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

Phases phases_of(const countdown_step &step) {
    auto work = [](const void *given, int phase, const Part &part) {
        const countdown_step &step = *static_cast<const countdown_step *>(given);
        taken()->run(step.kind, step.call, phase, part);
    };
    return {taken()->phases(step.kind, step.call), int(step.parts), work, &step};
}

}  // namespace
}  // namespace countdown

using countdown::taken;

int64_t countdown_abi(void) { return COUNTDOWN_ABI; }

int64_t countdown_workspace(const countdown_step *step) {
    return taken()->workspace(step->kind, step->call, int(step->parts));
}

void countdown_run(const countdown_step *steps, int64_t count) {
    for (const countdown_step *step = steps; step < steps + count; ++step)
        countdown::run_on_openmp(countdown::phases_of(*step));
}

void countdown_run_apart(const countdown_step *steps, int64_t count) {
    countdown::Crew crew;
    for (const countdown_step *step = steps; step < steps + count; ++step) crew.run(countdown::phases_of(*step));
}

const char *countdown_variant(int place) {
    const countdown::Variant *variant = countdown::find(place);
    return variant ? variant->name : nullptr;
}

void countdown_take_variant(int place) { taken() = countdown::find(place); }
