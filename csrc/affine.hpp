// What an FFN adds to a sparse token for the neurons that it drops, predicted from the token: L (x / channels) + bias,
// L in 4 bits, the token in 8 as where copies decide.
#pragma once

#include "terms.hpp"
#include "threads.hpp"

namespace countdown::VARIANT {

class Affine {
  public:
    static constexpr int OUTPUTS = 2 * TILE;  // that are computed at once

    Affine(const countdown_sum_call &call, const SumSpace &space, const Part &part, const Terms &terms)
        : affine_(call.affine), call_(call), terms_(terms),
          sparse_(uint8_t(terms.seen.present & terms.seen.counted & ~terms.seen.whole)),
          memory_(space.own + part.index * space.own_bytes + space.predicted_at) {}

    bool is_there() const { return affine_.words > 0 && !call_.selected; }
    bool adds(int64_t t) const { return is_there() && (sparse_ >> t & 1); }

    // Each part quantises the tokens for itself.
    void begin() {
        const int64_t words = affine_.words, groups = affine_.groups, entries = ceil_to(8 * words, Vec::width);
        float *values = reinterpret_cast<float *>(memory_);
        char *memory = reinterpret_cast<char *>(values + entries);
        for (int64_t t = 0; t < call_.tokens; ++t, memory += Quantised::bytes(words, groups)) {
            if (!adds(t)) continue;
            terms_.copy(t, entries, values);
            for (int64_t c = 0; c < call_.d; ++c) values[c] /= affine_.channels[c];
            quantised_[t] = Quantised(memory, words);
            quantise(values, words, groups, quantised_[t]);
        }
    }

    // The outputs from OUTPUTS * block on, of each token that it adds to.
    void outputs(int64_t block, float (*out)[OUTPUTS]) const {
        const int64_t first = 2 * block, second = least(first + 1, (call_.outputs - 1) / TILE);
        const int64_t level = affine_.words * TILE * 4, scale = affine_.groups * TILE;
        const uint8_t *levels = affine_.matrix.levels;
        const Fp16 *scales = reinterpret_cast<const Fp16 *>(affine_.matrix.scales);
        const TwoTiles tiles = {{levels + first * level, levels + second * level},
                                {scales + first * scale, scales + second * scale}};
        const int64_t count = least(OUTPUTS, call_.outputs - OUTPUTS * block);
        for (int64_t t = 0; t < call_.tokens; ++t) {
            if (!adds(t)) continue;
            tile_products(tiles, affine_.words, affine_.groups, quantised_[t], reinterpret_cast<float(*)[TILE]>(out[t]));
            for (int64_t k = 0; k < count; ++k) out[t][k] += affine_.bias[OUTPUTS * block + k];
        }
    }

  private:
    const countdown_affine &affine_;
    const countdown_sum_call &call_;
    const Terms &terms_;
    const uint8_t sparse_;  // bit t: token t is
    char *const memory_;
    Quantised quantised_[MOST_TOKENS];
};

}  // namespace countdown::VARIANT
