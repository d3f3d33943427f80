// Teams from the OpenMP runtime that torch runs on: threads of our own would fight with its spinning ones for cores.
#include "threads.hpp"

#include <barrier>
#include <thread>
#include <vector>

#include "countdown.h"

namespace countdown {
namespace {

struct OpenMP {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
    void (*barrier)();
    int (*thread_num)();
    int (*num_threads)();
};

OpenMP openmp = {};

struct Job {
    void (*work)(const void *, const Team &);
    const void *data;
};

void join_openmp(void *argument) {
    const Job *job = static_cast<const Job *>(argument);
    job->work(job->data, Team{openmp.thread_num(), openmp.num_threads(), nullptr});
}

void run_own(int threads, const Job &job) {
    std::barrier<> barrier(threads);
    std::vector<std::thread> others;
    for (int index = 1; index < threads; ++index)
        others.emplace_back([&, index] { job.work(job.data, Team{index, threads, &barrier}); });
    job.work(job.data, Team{0, threads, &barrier});
    for (std::thread &other : others) other.join();
}

}  // namespace

void Team::barrier() const {
    if (size == 1) return;
    if (own_barrier)
        static_cast<std::barrier<> *>(own_barrier)->arrive_and_wait();
    else
        openmp.barrier();
}

void run_team(int threads, void (*work)(const void *, const Team &), const void *data) {
    Job job = {work, data};
    if (threads <= 1)
        work(data, Team{0, 1, nullptr});
    else if (openmp.parallel)
        openmp.parallel(join_openmp, &job, unsigned(threads), 0);
    else
        run_own(threads, job);
}

}  // namespace countdown

void countdown_use_openmp(void *parallel, void *barrier, void *thread_num, void *num_threads) {
    countdown::openmp = {
        reinterpret_cast<decltype(countdown::OpenMP::parallel)>(parallel),
        reinterpret_cast<decltype(countdown::OpenMP::barrier)>(barrier),
        reinterpret_cast<decltype(countdown::OpenMP::thread_num)>(thread_num),
        reinterpret_cast<decltype(countdown::OpenMP::num_threads)>(num_threads),
    };
}
