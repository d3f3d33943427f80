#define VARIANT avx512_kernels
#include "vec_avx512.hpp"
#include "kernels.hpp"

namespace countdown {

const Variant avx512 = avx512_kernels::variant_of("avx512", [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
});

}  // namespace countdown
