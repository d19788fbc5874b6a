/* The kernels for NEON, which every 64-bit ARM processor has. */
#if defined(__aarch64__)

#include "neon.h"

/* Products are added up in 16 bits: for codes below 16 all of a group's fit, sixteen of at most 15 * 127 in each lane; of
 * other codes two do, of at most 128 * 127. */
ALWAYS_INLINE dots added_dots(dots total, byte_vec codes, const int8_t *x, const int nbits)
{
    int8x16_t values = vld1q_s8(x);
    if (nbits <= 4) {
        int16x8_t sums = vmlal_s8(vreinterpretq_s16_s32(total), vget_low_s8(codes), vget_low_s8(values));
        return vreinterpretq_s32_s16(vmlal_high_s8(sums, codes, values));
    }
    int16x8_t products = vmull_s8(vget_low_s8(codes), vget_low_s8(values));
    return vpadalq_s16(total, vmlal_high_s8(products, codes, values));
}

ALWAYS_INLINE int32x4_t ints_of(dots total, const int nbits)
{
    return nbits <= 4 ? vpaddlq_s16(vreinterpretq_s16_s32(total)) : total;
}

#include "exact.h"
#include "plain.h"
#include "rounded.h"
#include "stream.h"
#include "gate.h"
#include "norm.h"
#include "attend.h"

const struct kernels neon_kernels = {"neon", exact_tiles, rounded_tiles, plain_tiles, round_rows, values_to_floats,
    activate, weigh, norm, floats_to_values, softmax, sigmoid, attend, read_memory,
    NULL, NULL, NULL};

#endif
