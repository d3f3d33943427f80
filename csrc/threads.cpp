#include "threads.hpp"

#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

#include "countdown.h"

namespace countdown {
namespace {

// ---- OpenMP

struct OpenMP {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
    void (*barrier)();
    int (*thread_num)();
    int (*num_threads)();
};

OpenMP openmp = {};

// Inside another parallel region the team is smaller than asked for: its members do several parts.
void join_openmp(void *argument) {
    const Phases &phases = *static_cast<const Phases *>(argument);
    for (int phase = 0; phase < phases.count; ++phase) {
        if (phase) openmp.barrier();
        for (int index = openmp.thread_num(); index < phases.parts; index += openmp.num_threads())
            phases.run(phase, index);
    }
}

void run_alone(const Phases &phases) {
    for (int phase = 0; phase < phases.count; ++phase)
        for (int index = 0; index < phases.parts; ++index) phases.run(phase, index);
}

// ---- waiting

using Clock = std::chrono::steady_clock;

// Longer than what lies between two phases where all cores are free; little to waste where they are not.
constexpr auto MOMENT = std::chrono::microseconds(100);
// Where a worker that has lost its core was waited for, the caller goes on alone for so many times as long, and for twice
// as long as the last time where that was of no use: then little of its time is spent waiting.
constexpr int REST = 4;
constexpr auto LONGEST_REST = std::chrono::seconds(3);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Return whether it came true within a moment.
template <class Ready>
bool soon(Ready ready) {
    auto turns = [&] {
        for (int k = 0; k < 64; ++k) {
            if (ready()) return true;
            pause();
        }
        return false;
    };
    if (turns()) return true;  // as mostly: without asking for the time, which takes longer
    Clock::time_point end = Clock::now() + MOMENT;
    while (!turns())
        if (Clock::now() >= end) return false;
    return true;
}

}  // namespace

void add_to(int64_t *count, int64_t more) { std::atomic_ref(*count).fetch_add(more, std::memory_order_relaxed); }

// ---- threads of our own

class Pool {
  public:
    void run(const Phases &phases) {
        if (Clock::now() < rested_) return run_alone(phases);
        grow(phases.parts - 1);
        phases_ = &phases;
        for (int phase = 0; phase < phases.count; ++phase) run(phase);
    }

  private:
    const Phases *phases_ = nullptr;
    int workers_ = 0;
    Clock::time_point rested_{};
    Clock::duration rest_{};
    // Of a phase: its parts that are not done; which one it is, in this pool's life, and the next part that nobody has
    // begun. A phase's number in the ticket keeps whoever looked at an earlier one from taking a part of this one.
    alignas(64) std::atomic<int32_t> left_{0};
    alignas(64) std::atomic<uint64_t> ticket_{0};
    std::atomic<uint32_t> started_{0};  // phases
    int phase_ = 0;

    void grow(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error &) {
            // The caller does what they would have done.
        }
    }

    void run(int phase) {
        uint32_t number = started_.load(std::memory_order_relaxed) + 1;
        phase_ = phase;
        left_.store(phases_->parts, std::memory_order_relaxed);
        // The first part is the caller's.
        ticket_.store(uint64_t(number) << 32 | uint64_t(phases_->parts) << 16 | 1, std::memory_order_release);
        started_.store(number, std::memory_order_release);
        started_.notify_all();
        Clock::time_point start = Clock::now();
        finish(0);
        work();
        Clock::time_point done = Clock::now();
        if (soon([&] { return left_.load(std::memory_order_acquire) == 0; })) return;
        for (int32_t left; (left = left_.load(std::memory_order_acquire));) left_.wait(left, std::memory_order_acquire);
        // If it took longer than the work itself, whoever began the rest has lost its core.
        Clock::time_point stop = Clock::now();
        if (stop - done > done - start) rest(stop - done);
    }

    void rest(Clock::duration waited) {
        Clock::time_point now = Clock::now();
        Clock::duration least = REST * waited;
        rest_ = now - rested_ < rest_ && 2 * rest_ > least ? 2 * rest_ : least;
        if (rest_ > LONGEST_REST) rest_ = LONGEST_REST;
        rested_ = now + rest_;
    }

    [[noreturn]] void serve() {
        for (uint32_t seen = 0;;) {
            if (!soon([&] { return started_.load(std::memory_order_acquire) != seen; }))
                started_.wait(seen, std::memory_order_acquire);
            seen = started_.load(std::memory_order_acquire);
            work();
        }
    }

    // Do parts until all are begun.
    void work() {
        for (int index; (index = begin()) >= 0;) finish(index);
    }

    void finish(int index) {
        phases_->run(phase_, index);
        if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
    }

    // Return a part that nobody had begun, -1 where there is none. Until it is done nothing of its phase changes.
    int begin() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while ((ticket & 0xffff) < (ticket >> 16 & 0xffff))
            if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire))
                return int(ticket & 0xffff);
        return -1;
    }
};

namespace {

// Never destroyed: workers wait in pools until the process ends.
struct Idle {
    std::mutex mutex;
    std::vector<Pool *> pools;

    Idle() {
#ifndef _WIN32
        // A child process has none of the workers.
        pthread_atfork([] { idle().mutex.lock(); }, [] { idle().mutex.unlock(); },
                       [] { idle().pools.clear(); idle().mutex.unlock(); });
#endif
    }

    static Idle &idle() {
        static Idle *one = new Idle;
        return *one;
    }
};

}  // namespace

Crew::Crew() : pool_(nullptr) {
    Idle &idle = Idle::idle();
    std::lock_guard<std::mutex> lock(idle.mutex);
    if (!idle.pools.empty()) {
        pool_ = idle.pools.back();
        idle.pools.pop_back();
    } else {
        pool_ = new Pool;
    }
}

Crew::~Crew() {
    Idle &idle = Idle::idle();
    std::lock_guard<std::mutex> lock(idle.mutex);
    idle.pools.push_back(pool_);
}

void Crew::run(const Phases &phases) {
    if (phases.parts == 1)
        run_alone(phases);
    else
        pool_->run(phases);
}

void run_on_openmp(const Phases &phases) {
    if (phases.parts == 1)
        run_alone(phases);
    else if (openmp.parallel)
        openmp.parallel(join_openmp, const_cast<Phases *>(&phases), unsigned(phases.parts), 0);
    else
        Crew().run(phases);
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
