// A team of threads that run one function together.
#pragma once

namespace countdown {

struct Team {
    int index, size;
    void *own_barrier;  // of a team that is not OpenMP's

    // Wait for all members.
    void barrier() const;
};

// Run work(data, member) on up to so many threads, fewer inside another parallel region.
void run_team(int threads, void (*work)(const void *data, const Team &member), const void *data);

}  // namespace countdown
