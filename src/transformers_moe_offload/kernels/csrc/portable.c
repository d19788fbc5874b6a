/* The kernels for any processor: vectors of four floats, which compilers have instructions for nearly everywhere. */

#include <stdint.h>

#include "half.h"

static void halves_to_floats(const uint16_t *halves, int64_t count, float *out)
{
    for (int64_t k = 0; k < count; k++)
        out[k] = float_of_half(halves[k]);
}

static void bytes_to_floats(const uint8_t *bytes, int64_t count, const uint16_t *range, float *out)
{
    float minimum = float_of_half(range[0]), step = float_of_half(range[1]);
    for (int64_t k = 0; k < count; k++)
        out[k] = minimum + step * (float)bytes[k];
}

#include "tile.h"

#define LANES 4
#define WIDE_ROWS 4
#define FUSED_INPUTS 1
typedef float vec __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));

ALWAYS_INLINE vec load(const float *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

ALWAYS_INLINE vec load_first(const float *p, int64_t count)
{
    vec v = {0};
    memcpy(&v, p, (size_t)(count < LANES ? count : LANES) * sizeof *p);
    return v;
}

ALWAYS_INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
ALWAYS_INLINE vec load_bfloats(const uint16_t *p)
{
    return (vec){float_of_bfloat(p[0]), float_of_bfloat(p[1]), float_of_bfloat(p[2]), float_of_bfloat(p[3])};
}
ALWAYS_INLINE vec load_halves(const uint16_t *p)
{
    return (vec){float_of_half(p[0]), float_of_half(p[1]), float_of_half(p[2]), float_of_half(p[3])};
}
ALWAYS_INLINE vec fused(vec a, vec b, vec c) { return a * b + c; }
ALWAYS_INLINE float sum(vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
ALWAYS_INLINE ints load_codes(const uint8_t *p) { return (ints){p[0], p[1], p[2], p[3]}; }
ALWAYS_INLINE ints shifted(ints v, int by) { return v >> by; }
ALWAYS_INLINE ints with_third(ints codes, ints high, int place) { return (codes & 3) | (high >> place & 1) << 2; }
ALWAYS_INLINE vec to_float(ints v) { return __builtin_convertvector(v, vec); }

struct values {
    float scale, zero;
};

ALWAYS_INLINE struct values values_of(float scale, float zero, const int nbits)
{
    (void)nbits;
    return (struct values){scale, zero};
}

ALWAYS_INLINE vec weights(ints codes, struct values v, const int nbits)
{
    return (to_float(codes & ((1 << nbits) - 1)) - v.zero) * v.scale;
}

#include "exact.h"
#include "plain.h"

#define BYTES 16

ALWAYS_INLINE vec multiplied(vec a, vec b) { return a * b; }
ALWAYS_INLINE vec negative(vec v) { return -v; }

typedef uint8_t byte_vec __attribute__((vector_size(16)));

ALWAYS_INLINE byte_vec load_bytes(const uint8_t *p)
{
    byte_vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

ALWAYS_INLINE byte_vec field(byte_vec bytes, int shift, const int nbits)
{
    return (bytes >> (uint8_t)shift) & (uint8_t)((1 << nbits) - 1);
}

ALWAYS_INLINE byte_vec with_third_bits(byte_vec codes, byte_vec high, int place)
{
    return codes | ((high >> (uint8_t)place) & 1) << 2;
}

ALWAYS_INLINE ints dot(byte_vec codes, const int8_t *x, const int nbits)
{
    (void)nbits;
    ints total = {0};
    for (int i = 0; i < BYTES; i++)
        total[i / 4] += (int32_t)codes[i] * x[i];
    return total;
}

ALWAYS_INLINE vec spread(const float *p, const int group_size)
{
    (void)group_size; /* no group is smaller than a vector */
    return (vec){p[0], p[0], p[0], p[0]};
}

#include "rounded.h"
#include "stream.h"
#include "gate.h"
#include "norm.h"
#include "attend.h"

const struct kernels portable_kernels = {"portable", exact_tiles, rounded_tiles, plain_tiles, round_rows,
    values_to_floats, activate, weigh, norm, floats_to_values, softmax, sigmoid, attend, read_memory,
    NULL, NULL, NULL};
