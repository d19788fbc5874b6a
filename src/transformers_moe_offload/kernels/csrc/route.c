/* A router: the scores of all experts for a few tokens, and the experts that each token takes. */

#include <stdlib.h>

#include "work.h"

/* The largest of values (count), as many as there are `choices`, in descending order; of equal ones the first. */
static void choose(const float *values, int64_t count, int64_t choices, int64_t *index)
{
    for (int64_t c = 0; c < choices; c++) {
        int64_t best = -1;
        for (int64_t k = 0; k < count; k++) {
            int is_taken = 0;
            if (best >= 0 && !(values[k] > values[best]))
                continue;
            for (int64_t i = 0; i < c; i++)
                is_taken |= index[i] == k;
            if (!is_taken)
                best = k;
        }
        index[c] = best;
    }
}

static void score(int is_sigmoid, float *values, int64_t count)
{
    if (is_sigmoid)
        chosen->sigmoid(values, count);
    else
        chosen->softmax(values, count);
}

/* As `choose`, with residents raised by a bonus after the `protect` best; what is chosen is in descending order of the
 * values themselves. */
static void choose_near(const float *values, int64_t count, int64_t choices, const uint8_t *resident, float bonus,
                        int64_t protect, int64_t *index)
{
    choose(values, count, protect, index);
    for (int64_t c = protect; c < choices; c++) {
        int64_t best = -1;
        float raised = 0;
        for (int64_t k = 0; k < count; k++) {
            float value = values[k] + bonus * (float)resident[k];
            int is_taken = 0;
            if (best >= 0 && !(value > raised))
                continue;
            for (int64_t i = 0; i < c; i++)
                is_taken |= index[i] == k;
            if (!is_taken) {
                best = k;
                raised = value;
            }
        }
        index[c] = best;
    }
    for (int64_t c = 1; c < choices; c++) {
        int64_t moved = index[c], place = c;
        for (; place > 0 && values[index[place - 1]] < values[moved]; place--)
            index[place] = index[place - 1];
        index[place] = moved;
    }
}

/* Count the tokens of affinities (T, E) and their ranges: sums (2). */
static void count_ranges(const float *affinities, int64_t tokens, int64_t experts, double *sums)
{
    double total = 0;
    for (int64_t t = 0; t < tokens; t++) {
        const float *of_token = affinities + t * experts;
        float least = of_token[0], most = of_token[0];
        for (int64_t k = 1; k < experts; k++) {
            least = of_token[k] < least ? of_token[k] : least;
            most = of_token[k] > most ? of_token[k] : most;
        }
        total += most - least;
    }
    sums[0] += total;
    sums[1] += (double)tokens;
}

/* x (T, H) of a type and weight (E, H) of the same -> logits (T, E) of it, scores (T, K) of their type, index (T, K).
 * Logits become scores as kernels/few_rows.py says. With sums (2), not NULL, the affinities of all tokens are counted in
 * them, and where there is resident (E), experts with a 1 are preferred as in routing/strategies/cache_aware.py.
 * Returns 0, or 1 if there is no memory. */
EXPORT int moe_route(const void *weight, const void *x, int type, int64_t tokens, int64_t hidden, int64_t experts,
                     int64_t choices, int is_sigmoid, int is_late, int normalises, char *logits, char *scores,
                     int scores_type, int64_t *index, const uint8_t *resident, double strength, int64_t protect,
                     double *sums, int threads)
{
    int64_t size = bytes_of((enum float_type)type), scores_size = bytes_of((enum float_type)scores_type);
    float *values = malloc((size_t)(experts + choices + (sums ? tokens * experts : 0)) * sizeof *values);
    float *taken = values + experts, *affinities = taken + choices;
    if (!values || moe_dense(weight, NULL, type, experts, hidden, x, type, tokens, logits, threads)) {
        free(values);
        return 1;
    }
    for (int64_t t = 0; t < tokens && sums; t++) {
        to_floats(logits + t * experts * size, (enum float_type)type, experts, affinities + t * experts);
        score(is_sigmoid && !is_late, affinities + t * experts, experts);
    }
    if (sums)
        count_ranges(affinities, tokens, experts, sums);
    for (int64_t t = 0; t < tokens; t++) {
        int64_t *of_token = index + t * choices;
        float total = 0;
        to_floats(logits + t * experts * size, (enum float_type)type, experts, values);
        if (!is_late)
            score(is_sigmoid, values, experts);
        if (sums && resident)
            choose_near(affinities + t * experts, experts, choices, resident, (float)(strength * sums[0] / sums[1]),
                        protect, of_token);
        else
            choose(values, experts, choices, of_token);
        for (int64_t c = 0; c < choices; c++)
            taken[c] = values[of_token[c]];
        if (is_late)
            score(is_sigmoid, taken, choices);
        for (int64_t c = 0; c < choices; c++)
            total += taken[c];
        for (int64_t c = 0; c < choices && normalises; c++)
            taken[c] /= total;
        chosen->from_float(taken, (enum float_type)scores_type, choices, scores + t * choices * scores_size);
    }
    free(values);
    return 0;
}
