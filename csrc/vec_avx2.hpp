// Vectors of 8 floats for AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "types.hpp"

namespace countdown::VARIANT {

struct Vec {
    static constexpr int width = 8;
    __m256 v;
};

// All bits set in the first n of eight lanes.
static inline __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline Vec splat(float value) { return {_mm256_set1_ps(value)}; }

static inline Vec widen(__m128i bits, Bf16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
static inline Vec widen(__m128i bits, Fp16) { return {_mm256_cvtph_ps(bits)}; }

static inline Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
template <class W>
static inline Vec load(const W *p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)), W{});
}
// The first n, 0 < n < width, and zeros.
static inline Vec load(const float *p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
template <class W>
static inline Vec load(const W *p, int64_t n) {
    W some[Vec::width] = {};
    memcpy(some, p, size_t(n) * sizeof(W));
    return load(some);
}

static inline __m128i narrowed(Vec a, Bf16) {
    __m256i bits = _mm256_castps_si256(a.v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
static inline __m128i narrowed(Vec a, Fp16) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

static inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a.v); }
// The first n, 0 < n <= width.
static inline void store(float *p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.v); }
template <class W>
static inline void store(W *p, Vec a, int64_t n) {
    __m128i some = narrowed(a, W{});
    memcpy(p, &some, size_t(n) * sizeof(W));
}

// As if stored in W and loaded again.
static inline Vec rounded(Vec a, float) { return a; }
template <class W>
static inline Vec rounded(Vec a, W like) {
    return widen(narrowed(a, like), like);
}

static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// b where it is NaN.
static inline Vec at_least(float a, Vec b) { return {_mm256_max_ps(_mm256_set1_ps(a), b.v)}; }
static inline Vec at_most(float a, Vec b) { return {_mm256_min_ps(_mm256_set1_ps(a), b.v)}; }
static inline Vec nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n of whole n from -126 to 127.
static inline Vec power_of_2(Vec n) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
static inline float sum(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// out[k] = sum(a[k]): the same additions, those of eight vectors side by side.
static inline void sum_eight(const Vec *a, float *out) {
    __m256 two[4], four[2];
    for (int k = 0; k < 4; ++k)  // vectors k and 4 + k
        two[k] = _mm256_add_ps(_mm256_permute2f128_ps(a[k].v, a[4 + k].v, 0x20),
                               _mm256_permute2f128_ps(a[k].v, a[4 + k].v, 0x31));
    for (int k = 0; k < 2; ++k)
        four[k] = _mm256_add_ps(_mm256_shuffle_ps(two[2 * k], two[2 * k + 1], 0x44),
                                _mm256_shuffle_ps(two[2 * k], two[2 * k + 1], 0xee));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_shuffle_ps(four[0], four[1], 0x88),
                                        _mm256_shuffle_ps(four[0], four[1], 0xdd)));
}

// The 64 entries of a group in 4 bits, less their scale; see int4.hpp.
static inline void unpack_levels(const char *words, Vec *out) {
    for (int half = 0; half < 2; ++half) {
        __m256i some = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(words + 16 * half)));
        for (int k = 0; k < 4; ++k, some = _mm256_srli_epi32(some, 4)) {
            __m256i level = _mm256_and_si256(some, _mm256_set1_epi32(15));
            out[2 * k + half] = {_mm256_sub_ps(_mm256_cvtepi32_ps(level), _mm256_set1_ps(7.5f))};
        }
    }
}

// One step of a product of weights and a token, whose dtype in memory is Operand.
template <class W>
struct Product {
    using Operand = float;
    static constexpr int step = Vec::width;
    static inline Vec add(const W *w, const float *x, Vec acc) { return fma(load(w), load(x), acc); }
    static inline Vec add(const W *w, const float *x, Vec acc, int64_t n) { return fma(load(w, n), load(x), acc); }
};

// Products of words of eight 4-bit levels with eight entries of a token, summed word by word: a lane a neuron.
class WordSums {
  public:
    // levels: a word of each neuron; low and high: the token's entries that its half bytes are multiplied with.
    inline void add(const uint8_t *levels, int32_t low, int32_t high) {
        __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(levels)), nibble = _mm256_set1_epi8(15);
        __m256i first = _mm256_and_si256(both, nibble), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        // Four products of at most 15 * 127 fit 16 bits.
        __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_set1_epi32(low)),
                                         _mm256_maddubs_epi16(second, _mm256_set1_epi32(high)));
        sums_ = _mm256_add_epi32(sums_, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    inline Vec total() const { return {_mm256_cvtepi32_ps(sums_)}; }

  private:
    __m256i sums_ = _mm256_setzero_si256();
};

}  // namespace countdown::VARIANT
