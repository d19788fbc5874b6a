/* The solver of solver.py, one group after another while it lies in the first cache.
 *
 * Plain loops over LANES neighbouring weights, which compilers turn into vectors; compiled once for any processor and
 * once for AVX2. Sums are kept lane by lane and nothing is contracted to fused multiply-adds, so both give the same
 * bits. Compile without -ffast-math.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define INLINE static inline __attribute__((always_inline))

#define LANES 16
#define LARGEST_GROUP 128

/* As in solver.py. */
#define ITERATIONS 20
#define BETA 10.0f
#define LP_NORM 0.7f
#define SHRUNK_AWAY 0.17012543f /* BETA ** (-1 / (2 - LP_NORM)) */

/* The nearest whole number, ties to even, of a value below 2^22: adding this leaves no bits for a fraction. */
#define ROUNDER 12582912.0f

INLINE float at_most(float a, float b) { return a < b ? a : b; }
INLINE float at_least(float a, float b) { return a > b ? a : b; }

INLINE float code_of(float position, float max_code)
{
    return at_most(at_least(position, 0.0f), max_code) + ROUNDER - ROUNDER;
}

INLINE float sum_of(const float *lanes)
{
    float sums[LANES];
    memcpy(sums, lanes, sizeof sums);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++)
            sums[l] += sums[l + width];
    return sums[0];
}

INLINE float least_of(const float *lanes)
{
    float least = lanes[0];
    for (int l = 1; l < LANES; l++)
        least = at_most(lanes[l], least);
    return least;
}

INLINE float largest_of(const float *lanes)
{
    float largest = lanes[0];
    for (int l = 1; l < LANES; l++)
        largest = at_least(lanes[l], largest);
    return largest;
}

/* low and high of `size` weights; both are no numbers if a weight is not finite. */
INLINE void range_of(const float *weights, int size, float *low, float *high)
{
    float lows[LANES], highs[LANES], spoilt[LANES];
    for (int l = 0; l < LANES; l++) {
        lows[l] = highs[l] = weights[l];
        spoilt[l] = 0.0f;
    }
    for (int k = 0; k < size; k += LANES)
        for (int l = 0; l < LANES; l++) {
            float weight = weights[k + l];
            lows[l] = at_most(weight, lows[l]);
            highs[l] = at_least(weight, highs[l]);
            spoilt[l] += weight - weight; /* 0, or not a number */
        }
    float spoiler = sum_of(spoilt);
    *low = least_of(lows) + spoiler;
    *high = largest_of(highs) + spoiler;
}

/* x ** (LP_NORM - 1), x > 0 and normal, to about 2e-7: 2 ** ((LP_NORM - 1) * log2(x)). */
INLINE float shrinkage(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    float exponent = (float)((int32_t)(bits >> 23) - 127);
    bits = (bits & 0x7fffff) | 0x3f800000;
    float mantissa;
    memcpy(&mantissa, &bits, sizeof mantissa);
    float s = (mantissa - 1.41421356f) / (mantissa + 1.41421356f), s2 = s * s; /* log((1 + s) / (1 - s)) as a series */
    float log2_x = exponent + 0.5f + s * (2.88539008f + s2 * (0.961796694f + s2 * (0.577078016f + s2 * 0.412198583f)));
    float power = (LP_NORM - 1) * log2_x, whole = power + ROUNDER - ROUNDER, y = (power - whole) * 0.693147181f;
    float part = 1 + y * (1 + y * (0.5f + y * (0.166666667f + y * (0.0416666667f + y * (0.00833333333f + y * 0.00138888889f)))));
    uint32_t scale_bits = (uint32_t)((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &scale_bits, sizeof scale);
    return part * scale;
}

/* Sum of what the p-norm leaves of the residuals, in weights. */
INLINE float shrunk_sum(const float *scaled, int size, float scale, float zero, float max_code)
{
    float sums[LANES] = {0};
    for (int k = 0; k < size; k += LANES)
        for (int l = 0; l < LANES; l++) {
            float position = scaled[k + l] + zero;
            float residual = (scaled[k + l] - code_of(position, max_code) + zero) * scale, distance = fabsf(residual);
            float left = distance - shrinkage(distance + 1e-30f) * (1 / BETA);
            sums[l] += copysignf(at_least(left, 0.0f), residual);
        }
    return sum_of(sums);
}

INLINE float fitted_zero(const float *weights, int size, float scale, float zero, float max_code)
{
    float scaled[LARGEST_GROUP], sums[LANES] = {0}, low, high;
    scale = scale == 0 ? 1 : scale;
    for (int k = 0; k < size; k += LANES)
        for (int l = 0; l < LANES; l++) {
            scaled[k + l] = weights[k + l] / scale;
            sums[l] += scaled[k + l];
        }
    range_of(scaled, size, &low, &high);
    float mean = sum_of(sums) / (float)size;
    for (int i = 0; i < ITERATIONS; i++) {
        float codes[LANES] = {0};
        for (int k = 0; k < size; k += LANES)
            for (int l = 0; l < LANES; l++)
                codes[l] += code_of(scaled[k + l] + zero, max_code);
        float fitted = sum_of(codes) / (float)size - mean;
        float largest = at_least(0.5f, at_least(-(low + zero), high + zero - max_code));
        if (largest * scale > SHRUNK_AWAY)
            fitted += shrunk_sum(scaled, size, scale, zero, max_code) / (float)size / scale;
        if (fitted == zero)
            break;
        zero = fitted;
    }
    return zero;
}

INLINE void codes_of(const float *weights, int size, float scale, float zero, float max_code, uint8_t *codes)
{
    for (int k = 0; k < size; k++)
        codes[k] = scale == 0 ? 0 : (uint8_t)(int32_t)code_of(weights[k] / scale + zero, max_code);
}

/* The functions that are called, for one kind of processor. */
#define FOR_GROUPS(name, target)                                                                                       \
    target static void ranges_##name(const float *groups, int64_t count, int size, float *low, float *high)            \
    {                                                                                                                  \
        for (int64_t m = 0; m < count; m++)                                                                            \
            range_of(groups + m * size, size, low + m, high + m);                                                      \
    }                                                                                                                  \
    target static void fit_##name(const float *groups, int64_t count, int size, const float *scale, float *zero,       \
                                  float max_code)                                                                      \
    {                                                                                                                  \
        for (int64_t m = 0; m < count; m++)                                                                            \
            zero[m] = fitted_zero(groups + m * size, size, scale[m], zero[m], max_code);                               \
    }                                                                                                                  \
    target static void codes_##name(const float *groups, int64_t count, int size, const float *scale,                  \
                                    const float *zero, float max_code, uint8_t *codes)                                 \
    {                                                                                                                  \
        for (int64_t m = 0; m < count; m++)                                                                            \
            codes_of(groups + m * size, size, scale[m], zero[m], max_code, codes + m * size);                          \
    }

FOR_GROUPS(portable, )

#if defined(__x86_64__)
FOR_GROUPS(avx2, __attribute__((target("avx2"))))
#define CHOOSE(function) (__builtin_cpu_supports("avx2") ? function##_avx2 : function##_portable)
#else
#define CHOOSE(function) function##_portable
#endif

/* groups (count, size), size a multiple of LANES and at most LARGEST_GROUP; the rest (count). */
EXPORT void moe_hqq_ranges(const float *groups, int64_t count, int size, float *low, float *high)
{
    CHOOSE(ranges)(groups, count, size, low, high);
}

/* zero: the first guess when called, fitted afterwards. */
EXPORT void moe_hqq_fit_zeros(const float *groups, int64_t count, int size, const float *scale, float *zero, int max_code)
{
    CHOOSE(fit)(groups, count, size, scale, zero, (float)max_code);
}

/* codes (count, size). */
EXPORT void moe_hqq_nearest_codes(const float *groups, int64_t count, int size, const float *scale, const float *zero,
                                  int max_code, uint8_t *codes)
{
    CHOOSE(codes)(groups, count, size, scale, zero, (float)max_code, codes);
}
