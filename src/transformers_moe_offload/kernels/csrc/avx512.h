/* What both files of kernels for AVX-512 need: how halves, scales and codes are read. */
#ifndef AVX512_H
#define AVX512_H

#include <immintrin.h>
#include <math.h>
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

typedef __m512i ints;

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

#endif
