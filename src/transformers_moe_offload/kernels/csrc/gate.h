/* What an expert computes between its two products, and the sum of the experts that a token chose.
 *
 * Included once by each instruction set, after tile.h, LANES and the vectors. Each value is computed on its own, so
 * results do not depend on how values are shared out among threads.
 */

#include <math.h>

typedef int32_t whole_numbers __attribute__((vector_size(4 * LANES)));

#if !defined(all_of) /* as an instruction of its own */
ALWAYS_INLINE vec all_of(float value)
{
    float values[LANES];
    for (int i = 0; i < LANES; i++)
        values[i] = value;
    return load(values);
}
#endif

/* `a` where the mask's bits are set, else `b`. */
ALWAYS_INLINE vec either(whole_numbers mask, vec a, vec b)
{
    return (vec)(((whole_numbers)a & mask) | ((whole_numbers)b & ~mask));
}

/* A value that is no number stays one. */
ALWAYS_INLINE vec at_most(vec v, vec limit) { return either(v > limit, limit, v); }
ALWAYS_INLINE vec at_least(vec v, vec limit) { return either(v < limit, limit, v); }

/* e^x to within two units in the last place, of x within -87 and 88: 2^n e^r with r = x - n log 2, and the polynomial
 * of Cephes' expf. */
ALWAYS_INLINE vec exponential(vec x)
{
    const vec magic = all_of(0x1.8p23f); /* a float this large has no fraction, so adding it rounds */
    x = at_least(at_most(x, all_of(88.0f)), all_of(-87.0f));
    vec shifted_up = fused(x, all_of(1.44269504f), magic), n = shifted_up - magic;
    vec r = fused(n, all_of(2.12194440e-4f), fused(n, all_of(-0.693359375f), x));
    vec p = all_of(1.9875691500e-4f);
    p = fused(p, r, all_of(1.3981999507e-3f));
    p = fused(p, r, all_of(8.3334519073e-3f));
    p = fused(p, r, all_of(4.1665795894e-2f));
    p = fused(p, r, all_of(1.6666665459e-1f));
    p = fused(p, r, all_of(5.0000001201e-1f));
    p = fused(p, r * r, r + all_of(1.0f));
    whole_numbers power = ((whole_numbers)shifted_up - (whole_numbers)magic + 127) << 23;
    return p * (vec)power;
}

/* x times a sigmoid of `inner`. */
ALWAYS_INLINE vec gated(vec x, vec inner) { return x / (all_of(1.0f) + exponential(all_of(0.0f) - inner)); }

ALWAYS_INLINE vec function_of(const struct activation *a, vec x)
{
    switch (a->function) {
    case 0: return gated(x, x * all_of((float)a->slope));
    case 1: {
        float values[LANES];
        store(values, x);
        for (int i = 0; i < LANES; i++)
            values[i] = 0.5f * values[i] * (1.0f + erff(values[i] * 0.70710678f));
        return load(values);
    }
    case 2: /* 1 + tanh(u) = 2 sigmoid(2 u) */
        return gated(x, all_of(1.59576912f) * fused(x * x * x, all_of(0.044715f), x));
    case 3: return at_least(x, all_of(0.0f));
    default: {
        vec positive = at_least(x, all_of(0.0f));
        return positive * positive;
    }
    }
}

ALWAYS_INLINE vec activated(const struct activation *a, vec gate, vec up)
{
    if (!a->has_gate)
        return function_of(a, gate);
    if (a->has_limit) {
        vec limit = all_of((float)a->limit);
        gate = at_most(gate, limit);
        up = at_least(at_most(up, limit), all_of(0.0f) - limit);
    }
    return function_of(a, gate) * (up + all_of((float)a->shift));
}

/* gates (count), and ups if there are gates, each `step` values after the one before -> out (count). */
static void activate(const struct activation *a, const float *gates, const float *ups, int64_t step, int64_t count,
                     float *out)
{
    for (int64_t k = 0; k < count; k += LANES) {
        float some_gates[LANES] = {0}, some_ups[LANES] = {0};
        int64_t lanes = count - k < LANES ? count - k : LANES;
        if (lanes == LANES && step == 1) {
            store(out + k, activated(a, load(gates + k), a->has_gate ? load(ups + k) : all_of(0.0f)));
            continue;
        }
        for (int64_t i = 0; i < lanes; i++) {
            some_gates[i] = gates[(k + i) * step];
            some_ups[i] = a->has_gate ? ups[(k + i) * step] : 0;
        }
        store(some_gates, activated(a, load(some_gates), load(some_ups)));
        memcpy(out + k, some_gates, (size_t)lanes * sizeof(float));
    }
}

/* values (count) -> their softmax, in their place. */
static void softmax(float *values, int64_t count)
{
    float most = values[0], total = 0;
    for (int64_t k = 1; k < count; k++)
        most = values[k] > most ? values[k] : most;
    for (int64_t k = 0; k < count; k += LANES) {
        float some[LANES] = {0};
        size_t bytes = (size_t)(count - k < LANES ? count - k : LANES) * sizeof(float);
        memcpy(some, values + k, bytes);
        store(some, exponential(load(some) - all_of(most)));
        memcpy(values + k, some, bytes);
    }
    for (int64_t k = 0; k < count; k++)
        total += values[k];
    for (int64_t k = 0; k < count; k++)
        values[k] /= total;
}

/* values (count) -> their sigmoids, in their place. */
static void sigmoid(float *values, int64_t count)
{
    for (int64_t k = 0; k < count; k++)
        values[k] = 1.0f / (1.0f + expf(-values[k]));
}

/* Add up `count` rows, each times its weight, in their order: their columns from `first` up to `last`, WEIGHED_AT_ONCE at
 * most, as values of a type. */
static void weigh(const float *const *rows, const float *weights, int64_t count, int64_t first, int64_t last, void *out,
                  enum float_type type)
{
    float sums[WEIGHED_AT_ONCE];
    int64_t cols = last - first;
    memset(sums, 0, sizeof sums);
    for (int64_t c = 0; c < count; c++) {
        const float *row = rows[c] + first;
        float weight = weights[c];
        for (int64_t k = 0; k < cols; k++)
            sums[k] += weight * row[k];
    }
    floats_to_values(sums, type, cols, (char *)out + first * (type == FLOAT32 ? 4 : 2));
}
