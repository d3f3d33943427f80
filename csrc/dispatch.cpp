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

// The next steps that one team can run: those of as many threads, and those of one thread, which its first member runs.
struct Stretch {
    const countdown_step *steps;
    int64_t count = 0, threads = 1;

    Stretch(const countdown_step *steps, int64_t most) : steps(steps) {
        for (; count < most && fits(steps[count].threads); ++count)
            threads = steps[count].threads > threads ? steps[count].threads : threads;
    }

    bool fits(int64_t wanted) const { return wanted == 1 || threads == 1 || wanted == threads; }

    bool is_alone(int64_t k) const { return steps[k].threads == 1; }

    void run(const Team &member) const {
        const Team alone = {0, 1, nullptr};
        for (int64_t k = 0; k < count; ++k) {
            if (!is_alone(k))
                taken()->run(steps[k].kind, steps[k].call, member);
            else if (member.index == 0)
                taken()->run(steps[k].kind, steps[k].call, alone);
            // What a step leaves is there for all members of the next.
            if (k + 1 < count && !(is_alone(k) && is_alone(k + 1))) member.barrier();
        }
    }
};

}  // namespace
}  // namespace countdown

using countdown::taken;

int64_t countdown_abi(void) { return COUNTDOWN_ABI; }

int64_t countdown_workspace(const countdown_step *step) {
    return taken()->workspace(step->kind, step->call, int(step->threads));
}

void countdown_run(const countdown_step *steps, int64_t count) {
    while (count) {
        countdown::Stretch stretch(steps, count);
        countdown::run_team(
            int(stretch.threads),
            [](const void *data, const countdown::Team &member) {
                static_cast<const countdown::Stretch *>(data)->run(member);
            },
            &stretch);
        steps += stretch.count;
        count -= stretch.count;
    }
}

const char *countdown_variant(int place) {
    const countdown::Variant *variant = countdown::find(place);
    return variant ? variant->name : nullptr;
}

void countdown_take_variant(int place) { taken() = countdown::find(place); }
