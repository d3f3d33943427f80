// Work in phases: a phase has parts, which any threads do in any order, all of them before the next phase starts.
#pragma once

#include <stdint.h>

namespace countdown {

// One of a phase's parts.
struct Part {
    int index, count;
};

// Phases that follow one another.
struct Phases {
    int count;
    // Parts of a phase; the same for all of them.
    int parts;
    void (*work)(const void *data, int phase, const Part &part);
    const void *data;

    void run(int phase, int index) const { work(data, phase, Part{index, parts}); }
};

// Add to a count that other threads of the program may add to. Compiled once, not for every instruction set.
void add_to(int64_t *count, int64_t more);

// On the threads of the OpenMP runtime that torch runs on, which threads of our own would fight for cores while they
// spin: for calls between operations of torch. On our own where there is none.
void run_on_openmp(const Phases &phases);

// Threads of our own, for calls between which nothing of torch computes. They wait a moment for the next phase and then
// sleep, and what they have not begun the caller does: a core that is not free delays it by one part at most.
class Crew {
  public:
    // One that nobody uses; as many calls at once, as many crews.
    Crew();
    ~Crew();
    Crew(const Crew &) = delete;
    Crew &operator=(const Crew &) = delete;

    void run(const Phases &phases);

  private:
    class Pool *pool_;
};

}  // namespace countdown
