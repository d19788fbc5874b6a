/* The kernels for AVX-512: a table of the sixteen weights a code can stand for is one register. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "avx512.h"

#define LANES 16
#define WIDE_ROWS 8
#define FUSED_INPUTS 2
typedef __m512 vec;

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

#define ROUNDS_GROUPS

static void round_group(const float *x, int group_size, int8_t *codes, float *scale, float *sum_of_codes)
{
    vec largest = _mm512_setzero_ps();
    __mmask16 broken = 0;
    for (int k = 0; k < group_size; k += LANES) {
        largest = _mm512_max_ps(largest, _mm512_abs_ps(load(x + k)));
        broken |= _mm512_fpclass_ps_mask(load(x + k), 0x99); /* infinite, or not a number */
    }
    float most = _mm512_reduce_max_ps(largest);
    if (broken || most < 0x1p-110f) { /* so small that 127 / most would be infinite */
        memset(codes, 0, (size_t)group_size);
        *scale = *sum_of_codes = broken ? NAN : 0;
        return;
    }
    vec inverse = _mm512_set1_ps(127 / most);
    ints total = _mm512_setzero_si512();
    for (int k = 0; k < group_size; k += LANES) {
        ints some = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + k), inverse));
        _mm_storeu_si128((__m128i *)(codes + k), _mm512_cvtepi32_epi8(some));
        total = _mm512_add_epi32(total, some);
    }
    *scale = most / 127;
    *sum_of_codes = *scale * (float)_mm512_reduce_add_epi32(total);
}

#include "rounded.h"
#include "many.h"

ALWAYS_INLINE void add_dots(const struct product *p, const ints *codes, int64_t column, int64_t group, int is_end,
                            vec scale, vec zero, vec *sums, const int vectors)
{
    const struct rounded_rows *r = &p->rounded;
    ints kept[16];
#pragma GCC unroll 16
    for (int q = 0; q < vectors; q++)
        kept[q] = codes[q];
    for (int64_t t = 0; t < p->inputs; t++) {
        const int8_t *row = r->codes + t * r->cols + column;
        ints totals[CHAINS];
#pragma GCC unroll 4
        for (int i = 0; i < CHAINS; i++)
            totals[i] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int q = 0; q < vectors; q++) {
            int32_t four;
            memcpy(&four, row + 4 * q, sizeof four);
            totals[q % CHAINS] = _mm512_dpbusd_epi32(totals[q % CHAINS], kept[q], _mm512_set1_epi32(four));
        }
        ints total = totals[0];
#pragma GCC unroll 4
        for (int i = 1; i < CHAINS; i++)
            total = _mm512_add_epi32(total, totals[i]);
        vec product = _mm512_mul_ps(to_float(total), _mm512_set1_ps(r->scale[t * r->groups + group]));
        if (is_end)
            product = _mm512_fnmadd_ps(zero, _mm512_set1_ps(r->sum[t * r->groups + group]), product);
        sums[t] = fused(product, scale, sums[t]);
    }
}

static void add_rounded(const struct product *p, const ints *codes, int64_t column, int64_t count, int64_t group,
                        int is_end, vec scale, vec zero, vec *sums)
{
    switch (count) {
    case 16: add_dots(p, codes, column, group, is_end, scale, zero, sums, 4); break;
    case 32: add_dots(p, codes, column, group, is_end, scale, zero, sums, 8); break;
    default: add_dots(p, codes, column, group, is_end, scale, zero, sums, 16);
    }
}

static void many_rounded(const struct product *p, int64_t first_tile, int64_t last_tile)
{
    multiply_blocks(p, first_tile, last_tile, add_rounded);
}

#include "stream.h"
#include "gate.h"
#include "norm.h"
#include "attend.h"

#define COMMON exact_tiles, rounded_tiles, plain_tiles, round_rows, values_to_floats, activate, weigh, norm, \
    floats_to_values, softmax, sigmoid, attend, read_memory, many_rounded

const struct kernels avx512_kernels = {"avx512", COMMON, NULL, NULL};
const struct kernels avx512_bf16_kernels = {"avx512_bf16", COMMON, many_bfloats, sum_bfloats};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
