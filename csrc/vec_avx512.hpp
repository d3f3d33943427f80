// Vectors of 16 floats for AVX-512 F, BW, VL and DQ, with BF16 and VNNI where the variant is compiled for them.
#pragma once

#include <immintrin.h>

#include "types.hpp"

namespace countdown::VARIANT {

struct Vec {
    static constexpr int width = 16;
    __m512 v;
};

static inline __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }

static inline Vec splat(float value) { return {_mm512_set1_ps(value)}; }

static inline Vec widen(__m256i bits, Bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
static inline Vec widen(__m256i bits, Fp16) { return {_mm512_cvtph_ps(bits)}; }

static inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
template <class W>
static inline Vec load(const W *p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), W{});
}
// The first n, 0 < n < width, and zeros.
static inline Vec load(const float *p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
template <class W>
static inline Vec load(const W *p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), W{});
}

static inline __m256i narrowed(Vec a, Bf16) {
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i rounded = _mm512_srli_epi32(sum, 16);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
static inline __m256i narrowed(Vec a, Fp16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

// The first n, 0 < n <= width.
static inline void store(float *p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <class W>
static inline void store(W *p, Vec a, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrowed(a, W{}));
}
static inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }

// As if stored in W and loaded again.
static inline Vec rounded(Vec a, float) { return a; }
template <class W>
static inline Vec rounded(Vec a, W like) {
    return widen(narrowed(a, like), like);
}

static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where it is NaN.
static inline Vec at_least(float a, Vec b) { return {_mm512_max_ps(_mm512_set1_ps(a), b.v)}; }
static inline Vec at_most(float a, Vec b) { return {_mm512_min_ps(_mm512_set1_ps(a), b.v)}; }
static inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
// 2^n of whole n from -126 to 127.
static inline Vec power_of_2(Vec n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
static inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// Lanes of 128 bits of a and b: the even ones and the odd ones, added.
static inline __m512 halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
// out[k] = sum(a[k]): the same additions, those of eight vectors side by side.
static inline void sum_eight(const Vec *a, float *out) {
    __m512 four[2];
    for (int k = 0; k < 2; ++k) {
        __m512 two[2];
        for (int j = 0; j < 2; ++j) {
            __m512 first = a[4 * k + 2 * j].v, second = a[4 * k + 2 * j + 1].v;
            two[j] = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x44), _mm512_shuffle_f32x4(first, second, 0xee));
        }
        four[k] = halves(two[0], two[1]);
    }
    __m512 eight = _mm512_add_ps(_mm512_shuffle_ps(four[0], four[1], 0x44), _mm512_shuffle_ps(four[0], four[1], 0xee));
    eight = _mm512_add_ps(eight, _mm512_shuffle_ps(eight, eight, 0xb1));
    // Of lane i, entry 0 is vector i's sum and entry 2 that of vector 4 + i.
    __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, eight)));
}

// The 64 entries of a group in 4 bits, less their scale; see int4.hpp.
static inline void unpack_levels(const char *words, Vec *out) {
    const __m512 values = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -.5f, .5f, 1.5f, 2.5f, 3.5f,
                                         4.5f, 5.5f, 6.5f, 7.5f);
    const __m512i some = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(words)));
    out[0] = {_mm512_permutexvar_ps(some, values)};
    out[1] = {_mm512_permutexvar_ps(_mm512_srli_epi32(some, 4), values)};
    out[2] = {_mm512_permutexvar_ps(_mm512_srli_epi32(some, 8), values)};
    out[3] = {_mm512_permutexvar_ps(_mm512_srli_epi32(some, 12), values)};
}

// One step of a product of weights and a token, whose dtype in memory is Operand.
template <class W>
struct Product {
    using Operand = float;
    static constexpr int step = Vec::width;
    static inline Vec add(const W *w, const float *x, Vec acc) { return fma(load(w), load(x), acc); }
    static inline Vec add(const W *w, const float *x, Vec acc, int64_t n) { return fma(load(w, n), load(x), acc); }
};

#ifdef __AVX512BF16__
template <>
struct Product<Bf16> {
    using Operand = Bf16;
    static constexpr int step = 2 * Vec::width;
    static inline Vec add(const Bf16 *w, const Bf16 *x, Vec acc) { return of(_mm512_loadu_si512(w), x, acc); }
    static inline Vec add(const Bf16 *w, const Bf16 *x, Vec acc, int64_t n) {
        return of(_mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), w), x, acc);
    }

  private:
    static inline Vec of(__m512i w, const Bf16 *x, Vec acc) {
        return {_mm512_dpbf16_ps(acc.v, __m512bh(w), __m512bh(_mm512_loadu_si512(x)))};
    }
};
#endif

// Products of words of eight 4-bit levels with eight entries of a token, summed word by word: a lane a neuron.
class WordSums {
  public:
    // levels: a word of each neuron; low and high: the token's entries that its half bytes are multiplied with.
    inline void add(const uint8_t *levels, int32_t low, int32_t high) {
        __m512i both = _mm512_loadu_si512(levels), x = _mm512_set1_epi32(low), z = _mm512_set1_epi32(high);
#ifdef __AVX512VNNI__
        // High half bytes stay where they are: 16 times their sum, in a sum of its own.
        low_ = _mm512_dpbusd_epi32(low_, _mm512_and_si512(both, _mm512_set1_epi8(15)), x);
        high_ = _mm512_dpbusd_epi32(high_, _mm512_and_si512(both, _mm512_set1_epi8(char(0xf0))), z);
#else
        __m512i nibble = _mm512_set1_epi8(15);
        __m512i first = _mm512_and_si512(both, nibble), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        // Four products of at most 15 * 127 fit 16 bits.
        __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(first, x), _mm512_maddubs_epi16(second, z));
        low_ = _mm512_add_epi32(low_, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
    }
    inline Vec total() const { return {_mm512_cvtepi32_ps(_mm512_add_epi32(low_, _mm512_srai_epi32(high_, 4)))}; }

  private:
    __m512i low_ = _mm512_setzero_si512(), high_ = _mm512_setzero_si512();
};

}  // namespace countdown::VARIANT
