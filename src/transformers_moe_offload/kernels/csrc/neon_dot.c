/* The kernels for NEON with the dot product instructions of ARMv8.2 (FEAT_DotProd). */
#include "lowbit.h"

#if defined(HAS_NEON_DOT)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod") /* as arm_neon.h has it for these instructions */
#endif

#include "neon.h"

ALWAYS_INLINE dots added_dots(dots total, byte_vec codes, const int8_t *x, const int nbits)
{
    (void)nbits;
    return vdotq_s32(total, codes, vld1q_s8(x));
}

ALWAYS_INLINE int32x4_t ints_of(dots total, const int nbits)
{
    (void)nbits;
    return total;
}

#include "exact.h"
#include "plain.h"
#include "rounded.h"
#include "stream.h"
#include "gate.h"
#include "norm.h"
#include "attend.h"

const struct kernels neon_dot_kernels = {"neon_dot", exact_tiles, rounded_tiles, plain_tiles, round_rows,
    values_to_floats, activate, weigh, norm, floats_to_values, softmax, sigmoid, attend, read_memory,
    NULL, NULL, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
