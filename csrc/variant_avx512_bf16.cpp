#define VARIANT avx512_bf16_kernels
#include "vec_avx512.hpp"
#include "kernels.hpp"

namespace countdown {

const Variant avx512_bf16 = avx512_bf16_kernels::variant_of("avx512_bf16", [] {
    return avx512.runs_here() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
});

}  // namespace countdown
