/* The experts of one sparse layer in a decode step: the rows of few tokens go through the experts that they chose, and
 * those of a token are weighed and added up in the order of its choices, all by one call.
 *
 * A table says where each expert that is in memory lies. What is computed does not depend on it: a layer some of whose
 * experts are absent is computed by several calls, to the same bits.
 *
 * Letters: T tokens, K experts per token, P = T K pairs, E experts, H hidden, I intermediate; a group is an expert with
 * the pairs that want it, and has a row for each.
 */

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include "work.h"

/* kernels/layer.py has the same structures. */
struct expert {
    int64_t kind; /* 0 where it is absent, else 1 and more: how it is stored */
    double until; /* the time from which it must be looked for before it is used again */
    struct arrays first, second;
};

#define MOST_KINDS 2

struct layer {
    int64_t num_experts, rounded;
    struct activation activation;
    struct shape first[MOST_KINDS], second[MOST_KINDS];
    double sure_for; /* after a use, until an expert must be looked for again */
    struct expert *experts;
};

/* A call, at the beginning of a workspace; the arrays are behind it. */
struct step {
    int64_t tokens, choices, num_groups, num_rows;
    const char *hidden; /* (T, H) */
    char *out;          /* (T, H) */
    enum float_type type;
    int32_t *wanted;       /* the experts of all groups, by the last token that wants them */
    int32_t *group_of;     /* (E), -1 where no pair wants the expert */
    int32_t *expert_of;    /* the groups' experts, ascending */
    int32_t *first_row;    /* of each group, and the number of all rows */
    int32_t *row_of_pair;  /* (P), -1 where a pair is idle */
    int32_t *token_of_row; /* (P) */
    float *weights;        /* (P) */
    float *inputs;         /* (T, H) */
    float *rows;           /* (P, H), the tokens' rows by group */
    float *products;       /* (P, N), N = rows of the first matrix */
    float *activated;      /* (P, I) */
    float *outputs;        /* (P, H) */
    float *bias;           /* (groups, H) */
    char *rounded;         /* one row for each pair, of the larger of both matrices */
    int64_t rounded_bytes;
    struct matrix *matrices;   /* two of each group */
    struct product *both;    /* likewise */
};

static int64_t most_rounded_bytes(const struct layer *l)
{
    int64_t most = 0;
    for (int kind = 0; l->rounded && kind < MOST_KINDS; kind++)
        for (int which = 0; which < 2; which++) {
            const struct shape *s = which ? &l->second[kind] : &l->first[kind];
            if (!s->rows || s->nbits == PLAIN)
                continue;
            struct matrix m = matrix_of(s, &(struct arrays){0});
            int64_t bytes = padded(rounded_bytes(&m), 64);
            most = bytes > most ? bytes : most;
        }
    return most;
}

/* Give the step its arrays behind it; returns the bytes of all. With `memory` NULL it only counts them. */
static int64_t lay_out(const struct layer *l, struct step *s, char *memory)
{
    int64_t pairs = s->tokens * s->choices, groups = pairs < l->num_experts ? pairs : l->num_experts, used = 0;
    int64_t hidden = l->first[0].cols, inner = l->second[0].cols;
    s->rounded_bytes = most_rounded_bytes(l);
#define ROOM(field, bytes) \
    do { \
        used = padded(used, 64); \
        s->field = (void *)(memory ? memory + used : NULL); \
        used += (int64_t)(bytes); \
    } while (0)
    used = sizeof *s;
    ROOM(wanted, 4 * l->num_experts);
    ROOM(group_of, 4 * l->num_experts);
    ROOM(expert_of, 4 * groups);
    ROOM(first_row, 4 * (groups + 1));
    ROOM(row_of_pair, 4 * pairs);
    ROOM(token_of_row, 4 * pairs);
    ROOM(weights, 4 * pairs);
    ROOM(inputs, 4 * s->tokens * hidden);
    ROOM(rows, pairs > 1 ? 4 * pairs * hidden : 0);
    ROOM(products, 4 * pairs * l->first[0].rows);
    ROOM(activated, 4 * pairs * inner);
    ROOM(outputs, 4 * pairs * hidden);
    ROOM(bias, l->second[0].bias_type < 0 ? 0 : 4 * groups * hidden);
    ROOM(rounded, 2 * pairs * s->rounded_bytes);
    ROOM(matrices, 2 * groups * (int64_t)sizeof(struct matrix));
    ROOM(both, 2 * groups * (int64_t)sizeof(struct product));
#undef ROOM
    return padded(used, 64);
}

/* Bytes of a workspace for so many tokens and choices. */
EXPORT int64_t moe_layer_bytes(const struct layer *layer, int64_t tokens, int64_t choices)
{
    struct step step = {.tokens = tokens, .choices = choices};
    return lay_out(layer, &step, NULL);
}

/* Sort the pairs into groups: index (P), weights (P) as floats in the step. A pair is idle if its weight is zero or its
 * index is no expert's. */
static void group_pairs(const struct layer *l, struct step *s, const int64_t *index)
{
    int64_t pairs = s->tokens * s->choices, num = l->num_experts, last_token = s->tokens - 1;
    memset(s->group_of, 0, (size_t)num * sizeof *s->group_of);
    for (int64_t p = 0; p < pairs; p++)
        if (index[p] >= 0 && index[p] < num && s->weights[p] != 0)
            s->group_of[index[p]]++;
    s->num_groups = s->num_rows = 0;
    for (int64_t e = 0; e < num; e++) {
        int32_t count = s->group_of[e];
        s->group_of[e] = count ? (int32_t)s->num_groups : -1;
        if (count) {
            s->expert_of[s->num_groups] = (int32_t)e;
            s->first_row[s->num_groups++] = (int32_t)s->num_rows;
            s->num_rows += count;
        }
    }
    s->first_row[s->num_groups] = (int32_t)s->num_rows;
    for (int64_t p = 0; p < pairs; p++) {
        int is_idle = index[p] < 0 || index[p] >= num || s->weights[p] == 0;
        int32_t *next = is_idle ? NULL : &s->first_row[s->group_of[index[p]]];
        s->row_of_pair[p] = is_idle ? -1 : *next;
        if (!is_idle)
            s->token_of_row[(*next)++] = (int32_t)(p / s->choices);
    }
    for (int64_t g = s->num_groups; g > 0; g--) /* each now is where the next one begins */
        s->first_row[g] = s->first_row[g - 1];
    s->first_row[0] = 0;
    int64_t found = 0;
    for (int64_t token = 0; token <= last_token; token++)
        for (int64_t g = 0; g < s->num_groups; g++)
            if (s->token_of_row[s->first_row[g + 1] - 1] == token)
                s->wanted[found++] = s->expert_of[g];
}

static int64_t num_absent(const struct layer *l, const struct step *s, double now)
{
    int64_t absent = 0;
    for (int64_t g = 0; g < s->num_groups; g++) {
        struct expert *e = &l->experts[s->expert_of[g]];
        if (!e->kind || now >= e->until)
            absent++;
        else if (now + l->sure_for > e->until)
            e->until = now + l->sure_for;
    }
    return absent;
}

/* Work that threads share out among themselves, a few pieces at a time. */
struct stage {
    _Alignas(64) atomic_llong next;
    _Alignas(64) atomic_llong done;
    int64_t total, at_once;
};

enum { FIRST, ACTIVATION, ROUNDING, SECOND, SUM, NUM_STAGES };

struct job {
    const struct layer *layer;
    struct step *step;
    int64_t num; /* groups that are computed */
    const struct product *first, *second;
    int32_t *groups;
    int64_t chunk; /* columns that are activated at once */
    struct stage stages[NUM_STAGES];
};

/* The group, among those of the job, that has a row of them all. */
static int64_t group_with(const struct job *j, int64_t row, int64_t *within)
{
    for (int64_t i = 0;; i++) {
        if (row < j->first[i].inputs) {
            *within = row;
            return i;
        }
        row -= j->first[i].inputs;
    }
}

static void activate_some(const struct job *j, int64_t first, int64_t last)
{
    const struct layer *l = j->layer;
    const struct activation *a = &l->activation;
    int64_t inner = l->second[0].cols, wide = l->first[0].rows, chunks = ceil_div(inner, j->chunk);
    int64_t step = a->has_gate && a->is_interleaved ? 2 : 1, ups = step == 2 ? 1 : inner;
    for (int64_t item = first; item < last; item++) {
        int64_t within, i = group_with(j, item / chunks, &within), start = item % chunks * j->chunk;
        int64_t count = inner - start < j->chunk ? inner - start : j->chunk;
        const struct expert *e = &l->experts[j->step->expert_of[j->groups[i]]];
        float *products = (float *)j->first[i].out + within * wide;
        const struct shape *shape = &l->first[e->kind - 1];
        if (shape->bias_type >= 0) { /* then a chunk is a whole row */
            float *out = (float *)j->second[i].rows + within * inner;
            for (int64_t k = 0; k < wide; k += inner) { /* `out` holds the bias meanwhile */
                int64_t part = wide - k < inner ? wide - k : inner;
                to_floats((char *)e->first.bias + k * bytes_of((enum float_type)shape->bias_type),
                          (enum float_type)shape->bias_type, part, out);
                for (int64_t c = 0; c < part; c++)
                    products[k + c] += out[c];
            }
        }
        products += start * step;
        chosen->activate(a, products, products + ups, step, count, (float *)j->second[i].rows + within * inner + start);
    }
}

static void round_some(const struct job *j, int64_t first, int64_t last)
{
    for (int64_t i = first; i < last; i++)
        if (j->second[i].rounded.codes)
            chosen->round(&j->second[i], j->second[i].rows);
}

static void sum_some(const struct job *j, int64_t first, int64_t last)
{
    const struct layer *l = j->layer;
    const struct step *s = j->step;
    int64_t hidden = l->first[0].cols, chunks = ceil_div(hidden, WEIGHED_AT_ONCE), size = bytes_of(s->type);
    for (int64_t item = first; item < last; item++) {
        const float *rows[2 * MOST_CHOICES];
        float weights[2 * MOST_CHOICES];
        int64_t token = item / chunks, start = item % chunks * WEIGHED_AT_ONCE, count = 0;
        int64_t stop = start + WEIGHED_AT_ONCE < hidden ? start + WEIGHED_AT_ONCE : hidden;
        for (int64_t p = token * s->choices; p < (token + 1) * s->choices; p++) {
            int32_t row = s->row_of_pair[p];
            if (row < 0)
                continue;
            weights[count] = s->weights[p];
            rows[count++] = s->outputs + row * hidden;
            if (l->second[0].bias_type >= 0) {
                int64_t group = 0;
                while (s->first_row[group + 1] <= row)
                    group++;
                weights[count] = s->weights[p];
                rows[count++] = s->bias + group * hidden;
            }
        }
        chosen->weigh(rows, weights, count, start, stop, s->out + token * hidden * size, s->type);
    }
}

/* Spin for some 10 us, which is more than threads in step are apart, then let others run. */
#define SPINS 4000

static void wait_for(struct stage *stage)
{
    for (int spins = 0; atomic_load_explicit(&stage->done, memory_order_acquire) < stage->total; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
#if defined(__linux__)
        if (spins > SPINS)
            sched_yield();
#else
        (void)spins;
#endif
    }
}

static void do_stages(void *data)
{
    struct job *j = data;
    const int rounded = (int)j->layer->rounded;
    for (int number = 0; number < NUM_STAGES; number++) {
        struct stage *stage = &j->stages[number];
        for (;;) {
            int64_t first = atomic_fetch_add(&stage->next, stage->at_once), last = first + stage->at_once;
            if (first >= stage->total)
                break;
            last = last < stage->total ? last : stage->total;
            switch (number) {
            case FIRST: multiply_tiles(j->first, j->num, rounded, first, last); break;
            case ACTIVATION: activate_some(j, first, last); break;
            case ROUNDING: round_some(j, first, last); break;
            case SECOND: multiply_tiles(j->second, j->num, rounded, first, last); break;
            default: sum_some(j, first, last);
            }
            atomic_fetch_add_explicit(&stage->done, last - first, memory_order_release);
        }
        wait_for(stage);
    }
}

static void set_stage(struct stage *stage, int64_t total, int64_t at_once)
{
    atomic_init(&stage->next, 0);
    atomic_init(&stage->done, 0);
    stage->total = total;
    stage->at_once = at_once > 1 ? at_once : 1;
}

/* The rows of some groups, and with `sums` the result of the step, for which all groups must have been computed. */
static void compute(const struct layer *l, struct step *s, const int32_t *experts, int64_t num, int sums, int threads)
{
    struct job job = {.layer = l, .step = s, .num = num};
    int64_t hidden = l->first[0].cols, wide = l->first[0].rows, inner = l->second[0].cols;
    int64_t num_rows = 0, first_tiles = 0, second_tiles = 0, bytes = 0;
    int32_t groups[MOST_PAIRS];
    const struct rounded_rows *shared[MOST_KINDS] = {0};
    job.groups = groups;
    job.first = s->both;
    job.second = s->both + num;
    job.chunk = l->first[0].bias_type < 0 ? 1024 : inner;
    for (int64_t i = 0; i < num; i++) {
        int32_t group = experts ? s->group_of[experts[i]] : (int32_t)i;
        const struct expert *e = &l->experts[s->expert_of[group]];
        int64_t kind = e->kind - 1, row = s->first_row[group], inputs = s->first_row[group + 1] - row;
        struct matrix *matrices = s->matrices + 2 * i;
        struct product *first = s->both + i, *second = s->both + num + i;
        char *rounded = s->rounded + 2 * row * s->rounded_bytes;
        groups[i] = group;
        matrices[0] = matrix_of(&l->first[kind], &e->first);
        matrices[1] = matrix_of(&l->second[kind], &e->second);
        *first = (struct product){.matrix = matrices, .inputs = inputs, .rows = s->inputs,
                                  .out = s->products + row * wide, .out_type = FLOAT32};
        *second = (struct product){.matrix = matrices + 1, .inputs = inputs, .rows = s->activated + row * inner,
                                   .out = s->outputs + row * hidden, .out_type = FLOAT32};
        if (s->tokens > 1 || inputs > 1) { /* a token may choose an expert more than once */
            first->rows = s->rows + row * hidden;
            for (int64_t t = 0; t < inputs; t++)
                memcpy(s->rows + (row + t) * hidden, s->inputs + s->token_of_row[row + t] * hidden,
                       (size_t)hidden * sizeof(float));
        }
        if (l->rounded && matrices[0].nbits != PLAIN) {
            if (s->tokens == 1 && inputs == 1 && shared[kind]) {
                first->rounded = *shared[kind];
            } else {
                first->rounded = rounded_in(rounded, matrices, inputs);
                chosen->round(first, first->rows);
                shared[kind] = &first->rounded;
            }
        }
        if (l->rounded && matrices[1].nbits != PLAIN)
            second->rounded = rounded_in(rounded + inputs * s->rounded_bytes, matrices + 1, inputs);
        if (l->second[kind].bias_type >= 0)
            to_floats(e->second.bias, (enum float_type)l->second[kind].bias_type, hidden, s->bias + group * hidden);
        num_rows += inputs;
        first_tiles += tiles_of(first);
        second_tiles += tiles_of(second);
        bytes += (wide * hidden * l->first[kind].nbits + hidden * inner * l->second[kind].nbits) / 8;
    }
    threads = threads > 1 ? threads_for(bytes, threads) : 1;
    set_stage(&job.stages[FIRST], first_tiles, first_tiles / (32 * threads));
    set_stage(&job.stages[ACTIVATION], num_rows * ceil_div(inner, job.chunk), 1);
    set_stage(&job.stages[ROUNDING], l->rounded ? num : 0, 1);
    set_stage(&job.stages[SECOND], second_tiles, second_tiles / (32 * threads));
    set_stage(&job.stages[SUM], sums ? s->tokens * ceil_div(hidden, WEIGHED_AT_ONCE) : 0, 1);
    on_threads(threads, do_stages, &job);
}

static void begin(const struct layer *l, struct step *s, int64_t tokens, int64_t choices, const char *hidden, int type,
                  const int64_t *index, const void *weights, int weights_type, char *out)
{
    s->tokens = tokens;
    s->choices = choices;
    s->hidden = hidden;
    s->type = (enum float_type)type;
    s->out = out;
    lay_out(l, s, (char *)s);
    to_floats(weights, (enum float_type)weights_type, tokens * choices, s->weights);
    to_floats(hidden, s->type, tokens * l->first[0].cols, s->inputs);
    group_pairs(l, s, index);
}

/* One step: hidden (T, H) of `type`, index (T, K), weights (T, K) of `weights_type` -> out (T, H), in a workspace of
 * `moe_layer_bytes`. Returns how many experts are absent, or may be at the time `now`; nothing is computed unless it is
 * none. The step is in the workspace until the next one begins there. */
EXPORT int64_t moe_layer(const struct layer *layer, struct step *step, int64_t tokens, int64_t choices,
                         const char *hidden, int type, const int64_t *index, const void *weights, int weights_type,
                         char *out, double now, int threads)
{
    begin(layer, step, tokens, choices, hidden, type, index, weights, weights_type, out);
    int64_t absent = num_absent(layer, step, now);
    if (!absent)
        compute(layer, step, NULL, step->num_groups, 1, threads);
    return absent;
}

/* The same, but nothing is computed yet. */
EXPORT void moe_layer_begin(const struct layer *layer, struct step *step, int64_t tokens, int64_t choices,
                            const char *hidden, int type, const int64_t *index, const void *weights, int weights_type,
                            char *out)
{
    begin(layer, step, tokens, choices, hidden, type, index, weights, weights_type, out);
}

/* The experts that the step in a workspace wants, by the last token that wants them; returns their number. */
EXPORT int64_t moe_layer_wanted(const struct step *step, const int32_t **wanted)
{
    *wanted = step->wanted;
    return step->num_groups;
}

/* Compute some experts of a step, which are all in memory now. */
EXPORT void moe_layer_some(const struct layer *layer, struct step *step, const int32_t *experts, int64_t num,
                           int threads)
{
    compute(layer, step, experts, num, 0, threads);
}

/* Write the result of a step whose experts have all been computed. */
EXPORT void moe_layer_end(const struct layer *layer, struct step *step, int threads)
{
    compute(layer, step, NULL, 0, 1, threads);
}
