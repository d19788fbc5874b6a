/* Attention of one token's heads to some tokens of its text.
 *
 * Included once by each instruction set, after plain.h and gate.h. Sums are in float32, and their order depends on the
 * number of tokens alone.
 */

ALWAYS_INLINE vec at_lanes(const char *row, int64_t lane, const enum float_type type)
{
    return load_values(row + lane * (type == FLOAT32 ? 4 : 2), type);
}

/* scores: how much each head attends to each token, not yet exponentials. */
ALWAYS_INLINE void score_keys(const struct span *s, float (*scores)[MOST_TOKENS_AT_ONCE], const int heads,
                              const enum float_type type)
{
    const int size = type == FLOAT32 ? 4 : 2;
    int64_t dim = s->head_dim, whole = dim / LANES * LANES;
    for (int64_t j = 0; j < s->count; j++) {
        const char *key = s->keys + j * s->key_step;
        vec sums[HEADS_AT_ONCE];
        memset(sums, 0, sizeof sums);
        for (int64_t k = 0; k < whole; k += LANES) {
            vec some = at_lanes(key, k, type);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++)
                sums[h] = fused(some, load(s->queries + h * dim + k), sums[h]);
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            float total = sum(sums[h]);
            for (int64_t k = whole; k < dim; k++)
                total += value_at(key + k * size, type) * s->queries[h * dim + k];
            scores[h][j] = total * s->scaling;
        }
    }
}

/* Write the sums of the values, each times the head's weight for its token. */
ALWAYS_INLINE void add_values(const struct span *s, float (*weights)[MOST_TOKENS_AT_ONCE], const int heads,
                              const enum float_type type)
{
    const int size = type == FLOAT32 ? 4 : 2;
    int64_t dim = s->head_dim, whole = dim / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        vec sums[HEADS_AT_ONCE];
        memset(sums, 0, sizeof sums);
        for (int64_t j = 0; j < s->count; j++) {
            vec some = at_lanes(s->values + j * s->value_step, k, type);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++)
                sums[h] = fused(some, all_of(weights[h][j]), sums[h]);
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++)
            store(s->sums + h * s->sums_step + k, sums[h]);
    }
    for (int64_t k = whole; k < dim; k++)
        for (int h = 0; h < heads; h++) {
            float total = 0;
            for (int64_t j = 0; j < s->count; j++)
                total += value_at(s->values + j * s->value_step + k * size, type) * weights[h][j];
            s->sums[h * s->sums_step + k] = total;
        }
}

ALWAYS_INLINE void attend_heads(const struct span *s, const int heads, const enum float_type type)
{
    float scores[HEADS_AT_ONCE][MOST_TOKENS_AT_ONCE];
    score_keys(s, scores, heads, type);
    for (int h = 0; h < heads; h++) {
        float most = -INFINITY, total = 0;
        for (int64_t j = 0; j < s->count; j++)
            most = scores[h][j] > most ? scores[h][j] : most;
        for (int64_t j = s->count; j % LANES; j++)
            scores[h][j] = most;
        for (int64_t j = 0; j < s->count; j += LANES)
            store(scores[h] + j, exponential(load(scores[h] + j) - all_of(most)));
        for (int64_t j = 0; j < s->count; j++)
            total += scores[h][j];
        s->most[h * s->most_step] = most;
        s->total[h * s->most_step] = total;
    }
    add_values(s, scores, heads, type);
}

ALWAYS_INLINE void attend_of(const struct span *s, const enum float_type type)
{
    switch (s->heads) {
    case 1: attend_heads(s, 1, type); break;
    case 2: attend_heads(s, 2, type); break;
    case 3: attend_heads(s, 3, type); break;
    default: attend_heads(s, HEADS_AT_ONCE, type);
    }
}

static void attend(const struct span *s)
{
    switch (s->type) {
    case FLOAT32: attend_of(s, FLOAT32); break;
    case BFLOAT16: attend_of(s, BFLOAT16); break;
    default: attend_of(s, FLOAT16);
    }
}
