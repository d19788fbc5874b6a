/* The kernels for AVX2 with FMA and F16C. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>
#include <stdint.h>

static void halves_to_floats(const uint16_t *halves, int64_t count, float *out)
{
    int64_t k = 0;
    for (; k + 8 <= count; k += 8)
        _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + k))));
    for (; k < count; k++)
        out[k] = _cvtsh_ss(halves[k]);
}

static void bytes_to_floats(const uint8_t *bytes, int64_t count, const uint16_t *range, float *out)
{
    float minimum = _cvtsh_ss(range[0]), step = _cvtsh_ss(range[1]);
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
        __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + k))));
        __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(step), values);
        _mm256_storeu_ps(out + k, _mm256_add_ps(_mm256_set1_ps(minimum), scaled));
    }
    for (; k < count; k++)
        out[k] = minimum + step * (float)bytes[k];
}

#include "tile.h"

#define LANES 8
#define WIDE_ROWS 4
#define FUSED_INPUTS 1
typedef __m256 vec;
typedef __m256i ints;

ALWAYS_INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
ALWAYS_INLINE vec load_first(const float *p, int64_t count)
{
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count < LANES ? (int)count : LANES), lanes));
}
ALWAYS_INLINE void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
ALWAYS_INLINE vec load_bfloats(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
ALWAYS_INLINE vec load_halves(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
ALWAYS_INLINE vec fused(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS_INLINE ints load_codes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
ALWAYS_INLINE ints shifted(ints v, int by) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(by)); }
ALWAYS_INLINE ints with_third(ints codes, ints high, int place)
{
    ints third = _mm256_slli_epi32(_mm256_srlv_epi32(high, _mm256_set1_epi32(place)), 2);
    return _mm256_or_si256(_mm256_and_si256(codes, _mm256_set1_epi32(3)), third);
}

ALWAYS_INLINE float sum(vec v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

struct values {
    vec table, scale, zero;
};

ALWAYS_INLINE struct values values_of(float scale, float zero, const int nbits)
{
    struct values v = {.scale = _mm256_set1_ps(scale), .zero = _mm256_set1_ps(zero)};
    if (nbits <= 3) {
        vec codes = nbits == 3 ? _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)
            : nbits == 2       ? _mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3)
                               : _mm256_setr_ps(0, 1, 0, 1, 0, 1, 0, 1);
        v.table = _mm256_mul_ps(_mm256_sub_ps(codes, v.zero), v.scale);
    }
    return v;
}

ALWAYS_INLINE vec weights(ints codes, struct values v, const int nbits)
{
    if (nbits <= 3) /* looks at the lowest three bits of each lane */
        return _mm256_permutevar8x32_ps(v.table, codes);
    if (nbits == 4)
        codes = _mm256_and_si256(codes, _mm256_set1_epi32(15));
    return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes), v.zero), v.scale);
}

typedef ints byte_vec;

#include "exact.h"
#include "plain.h"

#define BYTES 32

ALWAYS_INLINE vec multiplied(vec a, vec b) { return _mm256_mul_ps(a, b); }
ALWAYS_INLINE vec negative(vec v) { return _mm256_sub_ps(_mm256_setzero_ps(), v); }
ALWAYS_INLINE vec to_float(ints v) { return _mm256_cvtepi32_ps(v); }

ALWAYS_INLINE ints load_bytes(const uint8_t *p) { return _mm256_loadu_si256((const ints *)p); }

ALWAYS_INLINE ints field(ints bytes, int shift, const int nbits)
{
    if (nbits == 8)
        return bytes;
    return _mm256_and_si256(shift ? _mm256_srli_epi16(bytes, shift) : bytes,
                            _mm256_set1_epi8((char)((1 << nbits) - 1)));
}

ALWAYS_INLINE ints with_third_bits(ints codes, ints high, int place)
{
    ints wanted = _mm256_set1_epi8((char)(1 << place));
    ints third = _mm256_cmpeq_epi8(_mm256_and_si256(high, wanted), wanted);
    return _mm256_or_si256(codes, _mm256_and_si256(third, _mm256_set1_epi8(4)));
}

/* Pairs are added up in 16 bits: two products of a code below 16 and an int8 fit, of a code below 256 they do not. */
ALWAYS_INLINE ints dot_nibbles(ints codes, ints x)
{
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1));
}

ALWAYS_INLINE ints dot(ints codes, const int8_t *x, const int nbits)
{
    ints values = _mm256_loadu_si256((const ints *)x);
    if (nbits <= 4)
        return dot_nibbles(codes, values);
    ints high = dot_nibbles(field(codes, 4, 4), values);
    return _mm256_add_epi32(dot_nibbles(field(codes, 0, 4), values), _mm256_slli_epi32(high, 4));
}

ALWAYS_INLINE vec spread(const float *p, const int group_size)
{
    if (group_size >= BYTES)
        return _mm256_set1_ps(*p);
    return _mm256_permutevar8x32_ps(load(p), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}

#include "rounded.h"
#include "stream.h"
#include "gate.h"
#include "norm.h"
#include "attend.h"

const struct kernels avx2_kernels = {"avx2", exact_tiles, rounded_tiles, plain_tiles, round_rows, values_to_floats,
    activate, weigh, norm, floats_to_values, softmax, sigmoid, attend, read_memory,
    NULL, NULL, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
