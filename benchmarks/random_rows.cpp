// Read rows of an array, in order, all or a random share of them, and print the GB/s of the rows that were read.
//
// By a plain loop that does nothing but add: what the processor makes of it unaided.
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

constexpr size_t SIZE = size_t(1) << 30;
constexpr int REPEATS = 7, LANES = 32;

// The sum of the listed rows of `width` floats, and how it adds: lane by lane, as the compiler makes vectors of.
static float sum(const float *array, size_t width, const int *rows, size_t count) {
    float lanes[LANES] = {};
    for (size_t k = 0; k < count; ++k) {
        const float *row = array + rows[k] * width;
        for (size_t c = 0; c < width; c += LANES)
            for (int i = 0; i < LANES; ++i) lanes[i] += row[c + i];
    }
    float total = 0;
    for (float lane : lanes) total += lane;
    return total;
}

// Arguments: bytes of a row (a multiple of 128), share of the rows, threads.
int main(int, char **arguments) {
    const size_t bytes = atoi(arguments[1]), width = bytes / sizeof(float);
    const double share = atof(arguments[2]);
    const int threads = atoi(arguments[3]);
    std::vector<float> array(SIZE / sizeof(float), 1.0f);
    std::mt19937 random(0);
    std::uniform_real_distribution<double> uniform(0, 1);
    std::vector<int> rows;
    for (size_t i = 0; i < SIZE / bytes; ++i)
        if (uniform(random) < share) rows.push_back(int(i));
    std::vector<double> speeds;
    volatile float total = 0;
    for (int repeat = 0; repeat < REPEATS; ++repeat) {
        auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
        {
            size_t first = rows.size() * omp_get_thread_num() / threads;
            size_t stop = rows.size() * (omp_get_thread_num() + 1) / threads;
            float part = sum(array.data(), width, rows.data() + first, stop - first);
#pragma omp critical
            total = total + part;
        }
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        speeds.push_back(double(rows.size()) * double(bytes) / seconds / 1e9);
    }
    std::sort(speeds.begin(), speeds.end());
    printf("%.2f\n", speeds[REPEATS / 2]);
}
