#define VARIANT avx2_kernels
#include "vec_avx2.hpp"
#include "kernels.hpp"

namespace countdown {

const Variant avx2 = avx2_kernels::variant_of("avx2", [] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
});

}  // namespace countdown
