/* Products of many rows in bfloat16, for AVX-512 with instructions for pairs of them: codes are bfloat16 exactly. Those
 * instructions take numbers below the smallest normal one, 1e-38, for zeros. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "avx512.h"
#include "many.h"

/* Of each lane's four codes, the first two or the last two. */
ALWAYS_INLINE __m512bh bfloats(ints codes, const int last)
{
    ints byte = _mm512_set1_epi32(0xff);
    ints first = _mm512_and_si512(last ? _mm512_srli_epi32(codes, 16) : codes, byte);
    ints second = _mm512_and_si512(_mm512_srli_epi32(codes, last ? 24 : 8), byte);
    /* A float of such a number ends in sixteen zeros. */
    ints low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(first)), 16);
    return (__m512bh)_mm512_or_si512(low, _mm512_castps_si512(_mm512_cvtepi32_ps(second)));
}

ALWAYS_INLINE void add_products(const struct product *p, const ints *codes, int64_t column, __m512 scale, __m512 *sums,
                                const int vectors)
{
    __m512bh pairs[16];
#pragma GCC unroll 8
    for (int q = 0; q < vectors; q++) {
        pairs[2 * q] = bfloats(codes[q], 0);
        pairs[2 * q + 1] = bfloats(codes[q], 1);
    }
    for (int64_t t = 0; t < p->inputs; t++) {
        const uint16_t *row = p->bfloats.rows + t * p->matrix->cols + column;
        __m512 totals[CHAINS];
#pragma GCC unroll 4
        for (int i = 0; i < CHAINS; i++)
            totals[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int q = 0; q < 2 * vectors; q++) {
            int32_t both;
            memcpy(&both, row + 2 * q, sizeof both);
            totals[q % CHAINS] = _mm512_dpbf16_ps(totals[q % CHAINS], pairs[q], (__m512bh)_mm512_set1_epi32(both));
        }
        __m512 total = totals[0];
#pragma GCC unroll 4
        for (int i = 1; i < CHAINS; i++)
            total = _mm512_add_ps(total, totals[i]);
        sums[t] = _mm512_fmadd_ps(total, scale, sums[t]);
    }
}

static void add_bfloats(const struct product *p, const ints *codes, int64_t column, int64_t count, int64_t group,
                        int is_end, __m512 scale, __m512 zero, __m512 *sums)
{
    if (count == 16)
        add_products(p, codes, column, scale, sums, 4);
    else
        for (int64_t k = 0; k < count; k += 32)
            add_products(p, codes + k / 4, column + k, scale, sums, 8);
    if (!is_end)
        return;
    __m512 shift = _mm512_mul_ps(scale, zero);
    for (int64_t t = 0; t < p->inputs; t++)
        sums[t] = _mm512_fnmadd_ps(shift, _mm512_set1_ps(p->bfloats.sum[t * p->bfloats.groups + group]), sums[t]);
}

void many_bfloats(const struct product *p, int64_t first_tile, int64_t last_tile)
{
    multiply_blocks(p, first_tile, last_tile, add_bfloats);
}

/* The sums of some groups of bfloat16. */
void sum_bfloats(const uint16_t *values, int64_t count, int group_size, float *out)
{
    __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t g = 0; g < count; g++, values += group_size) {
        __m512 total = _mm512_setzero_ps();
        for (int k = 0; k < group_size; k += 32) {
            __mmask32 wanted = group_size - k < 32 ? 0xffff : 0xffffffff;
            total = _mm512_dpbf16_ps(total, (__m512bh)_mm512_maskz_loadu_epi16(wanted, values + k), ones);
        }
        out[g] = _mm512_reduce_add_ps(total);
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
