/* Vectors of NEON, which every 64-bit ARM processor has: neon.c and neon_dot.c differ in products of bytes only.
 *
 * Whoever includes it adds `added_dots` and `ints_of`, and then the kernels themselves.
 */

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

static void halves_to_floats(const uint16_t *halves, int64_t count, float *out)
{
    int64_t k = 0;
    for (; k + 4 <= count; k += 4)
        vst1q_f32(out + k, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + k))));
    if (k < count) {
        uint16_t some[4] = {0};
        float floats[4];
        memcpy(some, halves + k, (size_t)(count - k) * sizeof *some);
        vst1q_f32(floats, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(some))));
        memcpy(out + k, floats, (size_t)(count - k) * sizeof *out);
    }
}

static void bytes_to_floats(const uint8_t *bytes, int64_t count, const uint16_t *range, float *out)
{
    float ends[2];
    halves_to_floats(range, 2, ends);
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
        uint16x8_t wide = vmovl_u8(vld1_u8(bytes + k));
        float32x4_t first = vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
        float32x4_t last = vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)));
        vst1q_f32(out + k, vaddq_f32(vdupq_n_f32(ends[0]), vmulq_n_f32(first, ends[1])));
        vst1q_f32(out + k + 4, vaddq_f32(vdupq_n_f32(ends[0]), vmulq_n_f32(last, ends[1])));
    }
    for (; k < count; k++)
        out[k] = ends[0] + ends[1] * (float)bytes[k];
}

#include "tile.h"

#define LANES 4
#define AT_ONCE 16
#define DECODED_ROWS 4
#define WIDE_ROWS 4
#define FUSED_INPUTS 1
typedef float32x4_t vec;
typedef uint8x16_t ints;

ALWAYS_INLINE vec load(const float *p) { return vld1q_f32(p); }
ALWAYS_INLINE vec load_first(const float *p, int64_t count)
{
    if (count >= LANES)
        return load(p);
    float some[LANES] = {0};
    for (int i = 0; i < count; i++)
        some[i] = p[i];
    return load(some);
}
ALWAYS_INLINE void store(float *p, vec v) { vst1q_f32(p, v); }
ALWAYS_INLINE vec load_bfloats(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
ALWAYS_INLINE vec load_halves(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
ALWAYS_INLINE void load_two(const char *p, const enum float_type type, vec *two)
{
    if (type == FLOAT32) {
        two[0] = vld1q_f32((const float *)(const void *)p);
        two[1] = vld1q_f32((const float *)(const void *)p + LANES);
        return;
    }
    uint16x8_t bits = vld1q_u16((const uint16_t *)(const void *)p);
    if (type == BFLOAT16) {
        two[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16));
        two[1] = vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16));
    } else {
        two[0] = vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u16(bits)));
        two[1] = vcvt_high_f32_f16(vreinterpretq_f16_u16(bits));
    }
}
ALWAYS_INLINE vec fused(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
ALWAYS_INLINE float sum(vec v) { return vaddvq_f32(v); }
#define all_of vdupq_n_f32

ALWAYS_INLINE ints load_codes(const uint8_t *p) { return vld1q_u8(p); }
ALWAYS_INLINE ints shifted(ints v, int by) { return vshlq_u8(v, vdupq_n_s8((int8_t)-by)); }
ALWAYS_INLINE ints low_bits(ints codes, const int nbits)
{
    return nbits == 8 ? codes : vandq_u8(codes, vdupq_n_u8((uint8_t)((1 << nbits) - 1)));
}
ALWAYS_INLINE ints with_third(ints codes, ints high, int place)
{
    return vbslq_u8(vdupq_n_u8(4), shifted(high, place - 2), codes);
}

struct values {
    vec scale, zero;
};

ALWAYS_INLINE struct values values_of(float scale, float zero)
{
    return (struct values){all_of(scale), all_of(zero)};
}

/* A place beyond the vector gives a byte of zero, so the four lanes are codes as they are. */
ALWAYS_INLINE vec weights(ints codes, const int part, struct values v)
{
    static const uint8_t places[4][16] = {
        {0, 99, 99, 99, 1, 99, 99, 99, 2, 99, 99, 99, 3, 99, 99, 99},
        {4, 99, 99, 99, 5, 99, 99, 99, 6, 99, 99, 99, 7, 99, 99, 99},
        {8, 99, 99, 99, 9, 99, 99, 99, 10, 99, 99, 99, 11, 99, 99, 99},
        {12, 99, 99, 99, 13, 99, 99, 99, 14, 99, 99, 99, 15, 99, 99, 99},
    };
    uint32x4_t wide = vreinterpretq_u32_u8(vqtbl1q_u8(codes, vld1q_u8(places[part])));
    return vmulq_f32(vsubq_f32(vcvtq_f32_u32(wide), v.zero), v.scale);
}

#define BYTES 16
#define CODE_OFFSET(nbits) ((nbits) == 8 ? 128.0f : 0.0f) /* so that codes are int8, as the input */
typedef int8x16_t byte_vec;
typedef int32x4_t dots;

ALWAYS_INLINE vec multiplied(vec a, vec b) { return vmulq_f32(a, b); }
ALWAYS_INLINE vec negative(vec v) { return vnegq_f32(v); }
ALWAYS_INLINE vec to_float(int32x4_t v) { return vcvtq_f32_s32(v); }
ALWAYS_INLINE byte_vec load_bytes(const uint8_t *p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
ALWAYS_INLINE byte_vec field(byte_vec bytes, const int shift, const int nbits)
{
    uint8x16_t codes = vreinterpretq_u8_s8(bytes);
    if (nbits == 8)
        return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
    codes = shifted(codes, shift);
    return vreinterpretq_s8_u8(shift + nbits == 8 ? codes : low_bits(codes, nbits));
}
ALWAYS_INLINE byte_vec with_third_bits(byte_vec codes, byte_vec high, int place)
{
    return vreinterpretq_s8_u8(with_third(vreinterpretq_u8_s8(codes), vreinterpretq_u8_s8(high), place));
}
ALWAYS_INLINE dots no_dots(void) { return vdupq_n_s32(0); }
