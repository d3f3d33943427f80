// Read rows of an array, in order, all or a random share of them, and print the GB/s of the rows that were read, by two
// loops that do nothing but add: one that leaves it to the processor, row by row, and one that reads eight rows side by
// side and meanwhile fetches the next eight into the second cache.
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

constexpr size_t SIZE = size_t(1) << 30;
constexpr int REPEATS = 7, LANES = 32, SIDE_BY_SIDE = 8, LINE = 16;

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

static float sum_fetched(const float *array, size_t width, const int *rows, size_t count) {
    float lanes[SIDE_BY_SIDE][LINE] = {};
    for (size_t k = 0; k + SIDE_BY_SIDE <= count; k += SIDE_BY_SIDE) {
        const float *row[SIDE_BY_SIDE], *next[SIDE_BY_SIDE];
        for (int r = 0; r < SIDE_BY_SIDE; ++r) {
            row[r] = array + rows[k + r] * width;
            next[r] = array + rows[std::min(k + SIDE_BY_SIDE + r, count - 1)] * width;
        }
        for (size_t c = 0; c < width; c += LINE)
            for (int r = 0; r < SIDE_BY_SIDE; ++r) {
                __builtin_prefetch(next[r] + c, 0, 2);
                for (int i = 0; i < LINE; ++i) lanes[r][i] += row[r][c + i];
            }
    }
    float total = 0;
    for (auto &some : lanes)
        for (float lane : some) total += lane;
    return total;
}

// GB/s of reading the rows once.
static double speed(float (*sum)(const float *, size_t, const int *, size_t), const std::vector<float> &array,
                    size_t width, const std::vector<int> &rows, int threads) {
    static volatile float total = 0;
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
    return double(rows.size() * width * sizeof(float)) / seconds / 1e9;
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
    std::vector<double> plain, fetched;
    for (int repeat = 0; repeat < REPEATS; ++repeat) {
        plain.push_back(speed(sum, array, width, rows, threads));
        fetched.push_back(speed(sum_fetched, array, width, rows, threads));
    }
    std::sort(plain.begin(), plain.end());
    std::sort(fetched.begin(), fetched.end());
    printf("%.2f %.2f\n", plain[REPEATS / 2], fetched[REPEATS / 2]);
}
