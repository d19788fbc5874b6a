/* The kernels for AVX-512: a table of the sixteen weights a code can stand for is one register. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include <immintrin.h>
#include <stdint.h>

static void halves_to_floats(const uint16_t *halves, int64_t count, float *out)
{
    for (int64_t k = 0; k < count; k += 16) {
        __mmask16 wanted = (__mmask16)(count - k < 16 ? (1u << (count - k)) - 1 : 0xffffu);
        __m256i some = _mm256_maskz_loadu_epi16(wanted, halves + k);
        _mm512_mask_storeu_ps(out + k, wanted, _mm512_cvtph_ps(some));
    }
}

static void bytes_to_floats(const uint8_t *bytes, int64_t count, const uint16_t *range, float *out)
{
    __m512 minimum = _mm512_set1_ps(_cvtsh_ss(range[0])), step = _mm512_set1_ps(_cvtsh_ss(range[1]));
    for (int64_t k = 0; k < count; k += 16) {
        __mmask16 wanted = (__mmask16)(count - k < 16 ? (1u << (count - k)) - 1 : 0xffffu);
        __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(wanted, bytes + k)));
        _mm512_mask_storeu_ps(out + k, wanted, _mm512_add_ps(minimum, _mm512_mul_ps(step, values)));
    }
}

#include "tile.h"

#define LANES 16
#define WIDE_ROWS 8
#define FUSED_INPUTS 2
typedef __m512 vec;
typedef __m512i ints;

ALWAYS_INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE vec load_first(const float *p, int64_t count)
{
    return _mm512_maskz_loadu_ps((__mmask16)(count < LANES ? (1u << count) - 1 : 0xffffu), p);
}
ALWAYS_INLINE void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
ALWAYS_INLINE vec load_bfloats(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
ALWAYS_INLINE vec load_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
ALWAYS_INLINE vec fused(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE float sum(vec v) { return _mm512_reduce_add_ps(v); }
ALWAYS_INLINE ints load_codes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
ALWAYS_INLINE ints shifted(ints v, int by) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(by)); }
ALWAYS_INLINE ints with_third(ints codes, ints high, int place)
{
    ints third = _mm512_rorv_epi32(high, _mm512_set1_epi32(place - 2));
    return _mm512_ternarylogic_epi32(codes, third, _mm512_set1_epi32(4), 0xd8); /* bit 2 of third, else of codes */
}

struct values {
    vec table, scale, zero;
};

ALWAYS_INLINE struct values values_of(float scale, float zero, const int nbits)
{
    struct values v = {.scale = _mm512_set1_ps(scale), .zero = _mm512_set1_ps(zero)};
    if (nbits <= 4) {
        vec codes = nbits == 4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
            : nbits == 3       ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7)
            : nbits == 2       ? _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3)
                               : _mm512_setr_ps(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1);
        v.table = _mm512_mul_ps(_mm512_sub_ps(codes, v.zero), v.scale);
    }
    return v;
}

ALWAYS_INLINE vec weights(ints codes, struct values v, const int nbits)
{
    if (nbits <= 4) /* looks at the lowest four bits of each lane */
        return _mm512_permutexvar_ps(codes, v.table);
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), v.zero), v.scale);
}

typedef ints byte_vec;

#include "exact.h"
#include "plain.h"

#define BYTES 64

ALWAYS_INLINE vec multiplied(vec a, vec b) { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE vec negative(vec v) { return _mm512_sub_ps(_mm512_setzero_ps(), v); }
ALWAYS_INLINE vec to_float(ints v) { return _mm512_cvtepi32_ps(v); }

ALWAYS_INLINE ints load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }

ALWAYS_INLINE ints field(ints bytes, int shift, const int nbits)
{
    if (nbits == 8)
        return bytes;
    return _mm512_and_si512(shift ? _mm512_srli_epi16(bytes, (unsigned)shift) : bytes,
                            _mm512_set1_epi8((char)((1 << nbits) - 1)));
}

ALWAYS_INLINE ints with_third_bits(ints codes, ints high, int place)
{
    __mmask64 third = _mm512_test_epi8_mask(high, _mm512_set1_epi8((char)(1 << place)));
    return _mm512_or_si512(codes, _mm512_maskz_set1_epi8(third, 4));
}

ALWAYS_INLINE ints dot(ints codes, const int8_t *x, const int nbits)
{
    (void)nbits;
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(x));
}

ALWAYS_INLINE vec spread(const float *p, const int group_size)
{
    if (group_size >= BYTES)
        return _mm512_set1_ps(*p);
    ints quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    ints halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_ps(group_size == 16 ? quarters : halves, load(p));
}

#include "rounded.h"
#include "stream.h"
#include "gate.h"
#include "norm.h"
#include "attend.h"

const struct kernels avx512_kernels = {"avx512", exact_tiles, rounded_tiles, plain_tiles, round_rows, values_to_floats,
    activate, weigh, norm, floats_to_values, softmax, sigmoid, attend, read_memory};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
