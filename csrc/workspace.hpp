// Memory that the caller lends for a call, cut into aligned arrays.
#pragma once

#include "types.hpp"

namespace countdown::VARIANT {

class Workspace {
  public:
    // Without memory, only counts what would be taken.
    explicit Workspace(void *memory) : base_((uintptr_t(memory) + LINE - 1) / LINE * LINE) {}

    template <class T>
    T *take(int64_t count) {
        uintptr_t at = base_ + uintptr_t(used_);
        used_ += ceil_to(count * int64_t(sizeof(T)), LINE);
        return reinterpret_cast<T *>(at);
    }

    int64_t bytes() const { return used_ + LINE; }

  private:
    static constexpr int64_t LINE = 64;
    uintptr_t base_;
    int64_t used_ = 0;
};

}  // namespace countdown::VARIANT
