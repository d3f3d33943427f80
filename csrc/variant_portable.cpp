#define VARIANT portable_kernels
#include "vec_portable.hpp"
#include "kernels.hpp"

namespace countdown {

const Variant portable = portable_kernels::variant_of("portable", [] { return true; });

}  // namespace countdown
