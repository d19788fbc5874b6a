/* Attention of a decode step: the newest token of each of a few texts attends to all tokens of its text.
 *
 * Two calls, between which the caller puts keys and values where it keeps them: `moe_project` computes queries, keys and
 * values of the newest token, `moe_attend` what the layer's output is.
 *
 * Letters: B texts, H hidden, N heads of queries, M of keys and values, D columns of a head, S tokens of a text, R of a
 * head's columns that are rotated.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "work.h"

/* A linear layer; kernels/attention.py has the same structures. */
struct linear {
    struct shape shape;
    struct arrays arrays;
};

/* The norm of a row of heads (cols = D) or of all of them; of no columns where there is none. */
struct norm_of_heads {
    const void *weight;
    int64_t type, cols, rounds;
    double epsilon, shift;
};

enum { QUERIES, KEYS, VALUES, OUTPUT };

struct attention {
    int64_t head_dim, rounded;
    double scaling;
    struct linear linears[4];
    struct norm_of_heads norms[2]; /* of queries and keys */
};

/* The next bytes of some memory. */
static void *cut(char **next, int64_t nbytes)
{
    char *found = *next;
    *next += padded(nbytes, 64);
    return found;
}

/* Bytes that a linear layer needs for its bias, and for rounded rows. */
static int64_t bytes_beside(const struct linear *l, const struct matrix *m, int rounded, int64_t texts)
{
    int64_t bias = l->shape.bias_type < 0 ? 0 : padded(4 * m->rows, 64);
    return bias + (rounded && m->nbits != PLAIN ? padded(texts * rounded_bytes(m), 64) : 0);
}

/* The product of rows (B, K) with a linear layer. */
static struct product product_of(const struct linear *l, const struct matrix *m, int rounded, const float *rows,
                                 int64_t texts, void *out, enum float_type type, char **memory)
{
    struct product p = {.matrix = m, .inputs = texts, .rows = rows, .out = out, .out_type = type};
    if (l->shape.bias_type >= 0) {
        float *bias = cut(memory, 4 * m->rows);
        to_floats(l->arrays.bias, (enum float_type)l->shape.bias_type, m->rows, bias);
        p.bias = bias;
    }
    if (rounded && m->nbits != PLAIN) {
        p.rounded = rounded_in(cut(memory, texts * rounded_bytes(m)), m, texts);
        chosen->round(&p, rows);
    }
    return p;
}

static int64_t matrix_bytes(const struct matrix *m)
{
    int64_t nbits = m->nbits == PLAIN && m->type == FLOAT32 ? 32 : m->nbits;
    return m->rows * m->cols * nbits / 8;
}

/* Turn each head's pairs of columns i and i + R / 2, of a row of heads. */
static void rotate(float *row, int64_t heads, int64_t head_dim, int64_t rotary_dim, const float *cos, const float *sin)
{
    int64_t half = rotary_dim / 2;
    for (int64_t h = 0; h < heads; h++, row += head_dim)
        for (int64_t i = 0; i < half; i++) {
            float first = row[i], second = row[i + half];
            row[i] = first * cos[i] - second * sin[i];
            row[i + half] = second * cos[i + half] + first * sin[i + half];
        }
}

/* Normalise and rotate a row of heads (cols), in its place. `floats` has room for it twice and for the norm's weight. */
static void finish_row(const struct attention *a, const struct norm_of_heads *n, char *row, enum float_type type,
                       int64_t cols, const float *cos, const float *sin, int64_t rotary_dim, float *floats)
{
    to_floats(row, type, cols, floats);
    if (n->cols) {
        const struct norm how = {n->epsilon, n->shift, (int)n->rounds};
        float *normed = floats + cols, *weight = normed + cols;
        if (n->weight)
            to_floats(n->weight, (enum float_type)n->type, n->cols, weight);
        for (int64_t k = 0; k < cols; k += n->cols)
            chosen->norm(floats + k, n->weight ? weight : NULL, n->cols, &how, type, normed + k);
        chosen->from_float(normed, type, cols, row);
        to_floats(row, type, cols, floats);
    }
    rotate(floats, cols / a->head_dim, a->head_dim, rotary_dim, cos, sin);
    chosen->from_float(floats, type, cols, row);
}

/* hidden (B, H) of a type, cos and sin (`turns`, R) of another, for each text or for all -> queries (B, N, D), keys
 * (B, M, D) and values (B, M, D) of the first. Returns 0, or 1 if there is no memory. */
EXPORT int moe_project(const struct attention *a, const char *hidden, int type, int64_t texts, const char *cos,
                       const char *sin, int rotary_type, int64_t turns, int64_t rotary_dim, char *queries, char *keys,
                       char *values, int threads)
{
    const enum float_type of_rows = (enum float_type)type, of_rotary = (enum float_type)rotary_type;
    const int rounded = (int)a->rounded;
    char *outs[3] = {queries, keys, values};
    struct matrix matrices[3];
    struct product products[3];
    int64_t cols = a->linears[QUERIES].shape.cols, wide = 0, nbytes = 0, size = padded(4 * texts * cols, 64);
    for (int i = 0; i < 3; i++) {
        matrices[i] = matrix_of(&a->linears[i].shape, &a->linears[i].arrays);
        wide = matrices[i].rows > wide ? matrices[i].rows : wide;
        nbytes += matrix_bytes(&matrices[i]);
        size += bytes_beside(&a->linears[i], &matrices[i], rounded, texts);
    }
    char *memory = malloc((size_t)(size + 4 * (3 * wide + 2 * rotary_dim) + 64)), *next = memory;
    if (!memory)
        return 1;
    float *rows = cut(&next, 4 * texts * cols);
    to_floats(hidden, of_rows, texts * cols, rows);
    for (int i = 0; i < 3; i++)
        products[i] = product_of(&a->linears[i], &matrices[i], rounded, rows, texts, outs[i], of_rows, &next);
    multiply_all(products, 3, rounded, threads_for(nbytes, threads));
    float *turn = (float *)next, *floats = turn + 2 * rotary_dim;
    for (int64_t b = 0; b < texts; b++) {
        int64_t skipped = (turns > 1 ? b : 0) * rotary_dim * bytes_of(of_rotary);
        if (rotary_dim) {
            to_floats(cos + skipped, of_rotary, rotary_dim, turn);
            to_floats(sin + skipped, of_rotary, rotary_dim, turn + rotary_dim);
        }
        for (int i = QUERIES; i <= KEYS; i++)
            if (a->norms[i].cols || rotary_dim)
                finish_row(a, &a->norms[i], outs[i] + b * matrices[i].rows * bytes_of(of_rows), of_rows,
                           matrices[i].rows, turn, turn + rotary_dim, rotary_dim, floats);
    }
    free(memory);
    return 0;
}

/* Where keys or values lie: their first byte, and the bytes between texts, heads and tokens. */
struct kept {
    const char *at;
    int64_t text, head, token;
};

struct attending {
    const struct attention *a;
    enum float_type type;
    int64_t texts, heads, kv_heads, tokens; /* B, N, M, S */
    int64_t spans, blocks;                  /* of a text; of the heads that share keys */
    struct kept keys, values;
    const float *queries; /* (B, N, D) */
    float *most, *total;  /* (B, N, spans) */
    float *sums;          /* (B, N, spans, D) */
    atomic_llong next;
};

static void attend_some(void *data)
{
    struct attending *t = data;
    int64_t dim = t->a->head_dim, sharing = t->heads / t->kv_heads;
    int64_t pieces = t->texts * t->kv_heads * t->spans * t->blocks;
    for (int64_t piece; (piece = atomic_fetch_add(&t->next, 1)) < pieces;) {
        int64_t block = piece % t->blocks, span = piece / t->blocks % t->spans;
        int64_t kv_head = piece / t->blocks / t->spans % t->kv_heads, text = piece / t->blocks / t->spans / t->kv_heads;
        int64_t left = sharing - block * HEADS_AT_ONCE, first = span * MOST_TOKENS_AT_ONCE, behind = t->tokens - first;
        int64_t head = text * t->heads + kv_head * sharing + block * HEADS_AT_ONCE; /* of (B, N) */
        const struct kept *k = &t->keys, *v = &t->values;
        const struct span s = {
            .type = t->type, .head_dim = dim, .scaling = (float)t->a->scaling,
            .heads = left < HEADS_AT_ONCE ? left : HEADS_AT_ONCE,
            .count = behind < MOST_TOKENS_AT_ONCE ? behind : MOST_TOKENS_AT_ONCE,
            .keys = k->at + text * k->text + kv_head * k->head + first * k->token, .key_step = k->token,
            .values = v->at + text * v->text + kv_head * v->head + first * v->token, .value_step = v->token,
            .queries = t->queries + head * dim,
            .most = t->most + head * t->spans + span, .total = t->total + head * t->spans + span,
            .most_step = t->spans,
            .sums = t->sums + (head * t->spans + span) * dim, .sums_step = t->spans * dim,
        };
        chosen->attend(&s);
    }
}

/* Of one head: the spans' sums, each with the weight that it has among them all -> out (D). */
static void join_spans(const struct attending *t, int64_t head, float *out)
{
    const float *most = t->most + head * t->spans, *total = t->total + head * t->spans;
    const float *sums = t->sums + head * t->spans * t->a->head_dim;
    float largest = most[0], all = 0;
    for (int64_t s = 1; s < t->spans; s++)
        largest = most[s] > largest ? most[s] : largest;
    memset(out, 0, (size_t)t->a->head_dim * sizeof *out);
    for (int64_t s = 0; s < t->spans; s++, sums += t->a->head_dim) {
        float weight = expf(most[s] - largest);
        all += weight * total[s];
        for (int64_t k = 0; k < t->a->head_dim; k++)
            out[k] += weight * sums[k];
    }
    for (int64_t k = 0; k < t->a->head_dim; k++)
        out[k] /= all;
}

static struct kept kept_at(const char *at, const int64_t *steps, enum float_type type)
{
    return (struct kept){at, steps[0] * bytes_of(type), steps[1] * bytes_of(type), steps[2] * bytes_of(type)};
}

/* queries (B, N, D), keys (B, M, S, D) and values (B, M, S, D) of a type, whose columns are contiguous -> out (B, H).
 * `steps`: the numbers between texts, heads and tokens of keys, and those of values. Returns 0, or 1 if there is no
 * memory. */
EXPORT int moe_attend(const struct attention *a, const char *queries, int type, int64_t texts, const char *keys,
                      const char *values, const int64_t *steps, int64_t tokens, char *out, int threads)
{
    const struct linear *output = &a->linears[OUTPUT];
    const enum float_type of_rows = (enum float_type)type;
    const int rounded = (int)a->rounded;
    struct matrix matrix = matrix_of(&output->shape, &output->arrays);
    struct attending t = {
        .a = a, .type = of_rows, .texts = texts, .heads = matrix.cols / a->head_dim, .tokens = tokens,
        .kv_heads = a->linears[KEYS].shape.rows / a->head_dim, .spans = ceil_div(tokens, MOST_TOKENS_AT_ONCE),
        .keys = kept_at(keys, steps, of_rows), .values = kept_at(values, steps + 3, of_rows),
    };
    int64_t all_heads = texts * t.heads, width = texts * matrix.cols;
    int64_t of_spans = padded(4 * all_heads * t.spans, 64), of_sums = padded(4 * width * t.spans, 64);
    t.blocks = ceil_div(t.heads / t.kv_heads, HEADS_AT_ONCE);
    char *memory = malloc((size_t)(2 * padded(4 * width, 64) + 2 * of_spans + of_sums +
                                   bytes_beside(output, &matrix, rounded, texts))), *next = memory;
    if (!memory)
        return 1;
    float *floats = cut(&next, 4 * width);
    void *values_of_type = cut(&next, 4 * width);
    t.queries = floats;
    t.most = cut(&next, of_spans);
    t.total = cut(&next, of_spans);
    t.sums = cut(&next, of_sums);
    atomic_init(&t.next, 0);
    to_floats(queries, of_rows, width, floats);
    int wanted = threads_for(2 * tokens * texts * t.kv_heads * a->head_dim * bytes_of(of_rows), threads);
    on_threads(wanted, attend_some, &t);
    for (int64_t h = 0; h < all_heads; h++)
        join_spans(&t, h, floats + h * a->head_dim);
    chosen->from_float(floats, of_rows, width, values_of_type);
    to_floats(values_of_type, of_rows, width, floats);
    const struct product p = product_of(output, &matrix, rounded, floats, texts, out, of_rows, &next);
    multiply_all(&p, 1, rounded, threads_for(matrix_bytes(&matrix), threads));
    free(memory);
    return 0;
}
