/* The library's entry: chooses kernels by what the processor can do, and shares the tiles out among threads. */

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "work.h"

#define ABI 8 /* as in native.py; one more whenever a function's arguments change */

EXPORT int moe_abi(void) { return ABI; }

const struct kernels *chosen;

#if defined(HAS_NEON_DOT)
static int has_dot_product(void)
{
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__) || defined(__ARM_FEATURE_DOTPROD)
    return 1; /* every Mac with an ARM processor has it */
#else
    return 0;
#endif
}
#endif

static const struct kernels *supported(const char *name)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni");
    int bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const struct kernels *all[] = {
        bf16 ? &avx512_bf16_kernels : NULL,
        avx512 ? &avx512_kernels : NULL,
        avx2 ? &avx2_kernels : NULL,
        &portable_kernels,
    };
#elif defined(__aarch64__)
    const struct kernels *all[] = {
#if defined(HAS_NEON_DOT)
        has_dot_product() ? &neon_dot_kernels : NULL,
#endif
        &neon_kernels,
        &portable_kernels,
    };
#else
    const struct kernels *all[] = {&portable_kernels};
#endif
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i] && (!name || !strcmp(all[i]->name, name)))
            return all[i];
    return NULL;
}

/* Use the kernels of that name, or the best there are for NULL. Returns their name, or NULL if this processor cannot
 * run them, or there are none of that name. */
EXPORT const char *moe_choose(const char *name)
{
    const struct kernels *found = supported(name);
    if (found)
        chosen = found;
    return found ? found->name : NULL;
}

struct shared {
    const struct product *products;
    int64_t count, tiles, at_once;
    int rounded;
    atomic_llong next;
};

static void take_tiles(void *data)
{
    struct shared *s = data;
    for (;;) {
        int64_t first = atomic_fetch_add(&s->next, s->at_once), last = first + s->at_once;
        if (first >= s->tiles)
            return;
        multiply_tiles(s->products, s->count, s->rounded, first, last < s->tiles ? last : s->tiles);
    }
}

void multiply_all(const struct product *products, int64_t count, int rounded, int threads)
{
    struct shared shared = {.products = products, .count = count, .rounded = rounded};
    for (int64_t i = 0; i < count; i++)
        shared.tiles += tiles_of(&products[i]);
    shared.at_once = threads > 1 ? ceil_div(shared.tiles, 8 * threads) : shared.tiles;
    atomic_init(&shared.next, 0);
    on_threads(shared.tiles == 1 ? 1 : threads, take_tiles, &shared);
}

/* Bytes of float32 input that one pass over a matrix may use: half of the L2 of the cores we know. */
#define INPUT_BYTES (1 << 20)


/* Rows of input, the matrix that multiplies them, and where the products go. */
struct call {
    struct matrix matrix;
    const float *bias; /* NULL where there is none */
    int64_t inputs;
    const char *rows;
    char *out;
};

/* How all calls are done. */
struct manner {
    enum float_type type; /* of rows and products */
    int rounded, threads;
};

static int has_many(const struct call *c) { return c->matrix.nbits != PLAIN && c->inputs > FEW_INPUTS; }

/* Whether a call's rows are multiplied in bfloat16. */
static int in_bfloats(const struct call *c, const struct manner *how)
{
    return has_many(c) && how->type == BFLOAT16 && !how->rounded && chosen->many_bfloats;
}

/* Rows of input that go over the matrix at once. More share the work of decoding it, but must stay in the L2. */
static int64_t inputs_at_once(const struct call *c, const struct manner *how)
{
    if (has_many(c) && (how->rounded ? chosen->many_rounded != NULL : in_bfloats(c, how)))
        return MOST_OF_MANY;
    int64_t fit = INPUT_BYTES / (4 * c->matrix.cols);
    return fit > MOST_INPUTS ? MOST_INPUTS : fit < 15 ? 15 : fit / 3 * 3;
}

/* Bytes for a call's rows as the kernels take them. */
static size_t prepared_bytes(const struct call *c, const struct manner *how)
{
    if (in_bfloats(c, how))
        return (size_t)padded(c->inputs * (c->matrix.cols / c->matrix.group_size) * 4, 64);
    int64_t floats = how->type == FLOAT32 ? 0 : 4 * c->matrix.cols;
    if (how->rounded)
        return (size_t)padded(c->inputs * rounded_bytes(&c->matrix) + floats, 64);
    return (size_t)padded(c->inputs * floats, 64);
}

/* Round rows of a type; those that are no floats by way of `one_row`. */
static void round_all(const struct product *p, const char *rows, enum float_type type, float *one_row)
{
    if (type == FLOAT32) {
        chosen->round(p, (const float *)rows);
        return;
    }
    struct product one = *p;
    one.inputs = 1;
    for (int64_t t = 0; t < p->inputs; t++, rows += p->matrix->cols * bytes_of(type)) {
        chosen->to_float(rows, type, p->matrix->cols, one_row);
        chosen->round(&one, one_row);
        one.rounded.codes += one.rounded.cols;
        one.rounded.scale += one.rounded.groups;
        one.rounded.sum += one.rounded.groups;
    }
}

static void prepare(const struct call *c, const struct manner *how, char *memory, struct product *p)
{
    *p = (struct product){.matrix = &c->matrix, .inputs = c->inputs, .out = c->out, .out_type = how->type,
                          .bias = c->bias};
    if (in_bfloats(c, how)) {
        int64_t groups = c->matrix.cols / c->matrix.group_size;
        p->bfloats = (struct bfloat_rows){(const uint16_t *)c->rows, groups, (float *)memory};
        chosen->sum_bfloats(p->bfloats.rows, c->inputs * groups, c->matrix.group_size, p->bfloats.sum);
        return;
    }
    if (how->rounded) {
        p->rounded = rounded_in(memory, &c->matrix, c->inputs);
        round_all(p, c->rows, how->type, (float *)(memory + c->inputs * rounded_bytes(&c->matrix)));
    } else if (how->type != FLOAT32) {
        chosen->to_float(c->rows, how->type, c->inputs * c->matrix.cols, (float *)memory);
        p->rows = (const float *)memory;
    } else {
        p->rows = (const float *)c->rows;
    }
}

/* Do calls whose rows go over their matrices at once. Returns 0, or 1 if there is no memory. */
static int multiply(const struct call *calls, int64_t count, const struct manner *how)
{
    size_t own = (size_t)padded(count * (int64_t)sizeof(struct product), 64), size = own;
    for (int64_t i = 0; i < count; i++)
        size += prepared_bytes(&calls[i], how);
    char *memory = malloc(size ? size : 1), *next = memory + own;
    if (!memory)
        return 1;
    struct product *products = (struct product *)memory;
    for (int64_t i = 0; i < count; i++) {
        prepare(&calls[i], how, next, &products[i]);
        next += prepared_bytes(&calls[i], how);
    }
    multiply_all(products, count, how->rounded, how->threads);
    free(memory);
    return 0;
}

/* Do a call with any number of rows. */
static int multiply_long(struct call c, const struct manner *how)
{
    int64_t inputs = c.inputs, size = bytes_of(how->type);
    int64_t most = ceil_div(inputs, ceil_div(inputs, inputs_at_once(&c, how))); /* so that parts are equal */
    for (; inputs > 0; inputs -= most) {
        c.inputs = inputs < most ? inputs : most;
        if (multiply(&c, 1, how))
            return 1;
        c.rows += most * c.matrix.cols * size;
        c.out += most * c.matrix.rows * size;
    }
    return 0;
}

#define NUMBERS 14 /* that describe a call, as cpu.py lists them */

static struct call call_of(const int64_t *n)
{
    char *at[NUMBERS]; /* those that are addresses; 0 is NULL */
    for (int i = 0; i < NUMBERS; i++)
        at[i] = (char *)(intptr_t)n[i];
    return (struct call){
        .matrix = {.rows = n[0], .cols = n[1], .nbits = (int)n[2], .group_size = (int)n[3], .meta_nbits = (int)n[4],
                   .type = BFLOAT16, .codes = (uint8_t *)at[5], .high = (uint8_t *)at[6], .scale = at[7], .zero = at[8],
                   .scale_range = (uint16_t *)at[9], .zero_range = (uint16_t *)at[10]},
        .inputs = n[11],
        .rows = at[12],
        .out = at[13],
    };
}

/* Products of rows (T, K) and a matrix, out (T, N), for each of several calls, which share the threads. All rows and
 * products are of `type`. `rounded`: with the rows rounded to int8. Returns 0, or 1 if there is no memory. */
EXPORT int moe_linear(int64_t count, const int64_t *numbers, int type, int rounded, int threads)
{
    const struct manner how = {(enum float_type)type, rounded, threads};
    struct call *calls = malloc((size_t)(count ? count : 1) * sizeof *calls);
    int64_t together = 0;
    int failed = !calls;
    for (int64_t i = 0; i < count && !failed; i++) {
        struct call c = call_of(numbers + i * NUMBERS);
        if (!c.matrix.cols) /* sums of no products */
            memset(c.out, 0, (size_t)(c.inputs * c.matrix.rows * bytes_of((enum float_type)type)));
        else if (c.inputs > inputs_at_once(&c, &how))
            failed = multiply_long(c, &how);
        else if (c.inputs)
            calls[together++] = c;
    }
    failed = failed || multiply(calls, together, &how);
    free(calls);
    return failed;
}

/* Products of a few rows x (T, K) of a type and a matrix of floats (N, K), plus a bias (N) of the matrix's type, or NULL,
 * out (T, N) of the same type as the rows. Returns 0, or 1 if there is no memory. */
EXPORT int moe_dense(const void *weight, const void *bias, int weight_type, int64_t rows, int64_t cols, const void *x,
                     int type, int64_t inputs, void *out, int threads)
{
    float *floats = bias ? malloc((size_t)(rows ? rows : 1) * sizeof *floats) : NULL;
    if (bias && !floats)
        return 1;
    if (bias)
        to_floats(bias, (enum float_type)weight_type, rows, floats);
    struct call c = {.matrix = {.rows = rows, .cols = cols, .nbits = PLAIN, .group_size = (int)cols,
                                .type = (enum float_type)weight_type, .codes = weight},
                     .bias = floats, .inputs = inputs, .rows = x, .out = out};
    int64_t nbytes = rows * cols * bytes_of((enum float_type)weight_type);
    const struct manner how = {(enum float_type)type, 0, threads_for(nbytes, threads)};
    int failed = multiply_long(c, &how);
    free(floats);
    return failed;
}

/* Normalise rows x (T, K) of a type -> out (T, K); weight (K) of its own type, or NULL. Returns 0, or 1 if there is no
 * memory. */
EXPORT int moe_norm(const char *x, int type, int64_t rows, int64_t cols, const void *weight, int weight_type,
                    double epsilon, double shift, int rounds, char *out)
{
    const struct norm how = {epsilon, shift, rounds};
    float *memory = malloc((size_t)(cols ? 3 * cols : 1) * sizeof *memory);
    if (!memory)
        return 1;
    if (weight)
        to_floats(weight, (enum float_type)weight_type, cols, memory);
    for (int64_t t = 0, size = bytes_of((enum float_type)type); t < rows; t++) {
        to_floats(x + t * cols * size, (enum float_type)type, cols, memory + cols);
        chosen->norm(memory + cols, weight ? memory : NULL, cols, &how, (enum float_type)type, memory + 2 * cols);
        chosen->from_float(memory + 2 * cols, (enum float_type)type, cols, out + t * cols * size);
    }
    free(memory);
    return 0;
}

/* Bytes that a thread takes at once, to read them: 128 KiB in each of the rows side by side, or more. */
#define READ_AT_ONCE (1 << 20)

struct reading {
    const char *memory;
    int64_t nbytes;
    int streams;
    atomic_llong next;
    atomic_ullong seen;
};

static void read_parts(void *data)
{
    struct reading *r = data;
    uint64_t seen = 0;
    for (;;) {
        int64_t first = atomic_fetch_add(&r->next, READ_AT_ONCE), left = r->nbytes - first;
        if (left <= 0)
            break;
        seen ^= chosen->read_memory(r->memory + first, left < READ_AT_ONCE ? left : READ_AT_ONCE, r->streams);
    }
    atomic_fetch_xor(&r->seen, seen);
}

/* Read memory, as 1, 2, 4 or 8 `streams` side by side, and do nothing with it. Returns its words combined by xor, for a
 * compiler would leave out what has no result. */
EXPORT uint64_t moe_read(const void *memory, int64_t nbytes, int streams, int threads)
{
    struct reading reading = {.memory = memory, .nbytes = nbytes, .streams = streams};
    atomic_init(&reading.next, 0);
    atomic_init(&reading.seen, 0);
    on_threads(threads, read_parts, &reading);
    return atomic_load(&reading.seen);
}
