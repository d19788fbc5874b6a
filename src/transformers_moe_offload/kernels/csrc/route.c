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

/* x (T, H) of a type and weight (E, H) of the same -> logits (T, E) of it, scores (T, K) of their type, index (T, K).
 * Logits become scores as kernels/few_rows.py says. Returns 0, or 1 if there is no memory. */
EXPORT int moe_route(const void *weight, const void *x, int type, int64_t tokens, int64_t hidden, int64_t experts,
                     int64_t choices, int is_sigmoid, int is_late, int normalises, char *logits, char *scores,
                     int scores_type, int64_t *index, int threads)
{
    int64_t size = type == FLOAT32 ? 4 : 2, scores_size = scores_type == FLOAT32 ? 4 : 2;
    float *values = malloc((size_t)(experts + choices) * sizeof *values), *taken = values + experts;
    if (!values || moe_dense(weight, NULL, type, experts, hidden, x, type, tokens, logits, threads)) {
        free(values);
        return 1;
    }
    for (int64_t t = 0; t < tokens; t++) {
        int64_t *of_token = index + t * choices;
        float total = 0;
        to_floats(logits + t * experts * size, (enum float_type)type, experts, values);
        if (!is_late)
            score(is_sigmoid, values, experts);
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
