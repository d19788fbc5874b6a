/* The library's entry: chooses kernels by what the processor can do, and shares the tiles out among threads. */

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "lowbit.h"

#define ABI 1 /* as in native.py; one more whenever a function's arguments change */

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT int moe_abi(void) { return ABI; }

/* An OpenMP runtime's GOMP_parallel(work, data, num_threads, flags), or NULL: torch's own, so that its threads, which
 * are awake between torch's operations, do this work too instead of spinning beside ours. */
typedef void parallel_function(void (*)(void *), void *, unsigned, unsigned);
static parallel_function *parallel;

EXPORT void moe_set_parallel(parallel_function *function) { parallel = function; }

static const struct kernels *chosen;

static const struct kernels *supported(const char *name)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni");
    const struct kernels *all[] = {
        avx512 ? &avx512_kernels : NULL,
        avx2 ? &avx2_kernels : NULL,
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
    const struct product *product;
    void (*kernel)(const struct product *, int64_t, int64_t);
    int64_t tiles, at_once;
    atomic_llong next;
};

static void take_tiles(void *data)
{
    struct shared *s = data;
    for (;;) {
        int64_t first = atomic_fetch_add(&s->next, s->at_once), last = first + s->at_once;
        if (first >= s->tiles)
            return;
        s->kernel(s->product, first, last < s->tiles ? last : s->tiles);
    }
}

static void run(const struct product *p, void (*kernel)(const struct product *, int64_t, int64_t), int threads)
{
    int64_t tiles = ceil_div(byte_rows(p->matrix), tile_byte_rows(p->matrix));
    if (threads <= 1 || !parallel || tiles == 1) {
        kernel(p, 0, tiles);
        return;
    }
    struct shared shared = {.product = p, .kernel = kernel, .tiles = tiles, .at_once = ceil_div(tiles, 8 * threads)};
    atomic_init(&shared.next, 0);
    parallel(take_tiles, &shared, (unsigned)threads, 0);
}

/* Bytes of float32 input that one pass over a matrix may use: half of the L2 of the Xeon this was measured on. */
#define INPUT_BYTES (1 << 20)

/* Rows of input that go over the matrix at once. More share the work of decoding it, but must stay in the L2. */
static int64_t inputs_at_once(int64_t cols)
{
    int64_t fit = INPUT_BYTES / (4 * cols);
    return fit > MOST_INPUTS ? MOST_INPUTS : fit < 15 ? 15 : fit / 3 * 3;
}

static int64_t padded(int64_t count, int64_t to) { return ceil_div(count, to) * to; }

/* Products of rows (T, K) and a matrix: out (T, N). Both are of `type`. `rounded`: with the rows rounded to int8.
 * Returns 0, or 1 if there is no memory. */
EXPORT int moe_linear(int64_t matrix_rows, int64_t cols, int nbits, int group_size, int meta_nbits, const void *codes,
                      const void *high, const void *scale, const void *zero, const void *scale_range,
                      const void *zero_range, int64_t inputs, const void *rows, void *out, int type, int rounded,
                      int threads)
{
    if (!inputs)
        return 0;
    const struct matrix matrix = {matrix_rows, cols,  nbits, group_size,  meta_nbits, codes,
                                  high,        scale, zero,  scale_range, zero_range};
    int64_t most = inputs < inputs_at_once(cols) ? inputs : inputs_at_once(cols);
    size_t size = type == FLOAT32 ? 4 : 2;
    struct product p = {.matrix = &matrix, .out_type = type};
    p.rounded.cols = padded(cols, 64);
    p.rounded.groups = padded(cols / group_size, 16) + 64; /* `read_meta` pads what is looked at, too */
    float *floats = type == FLOAT32 ? NULL : malloc((size_t)(most * cols) * sizeof(float));
    char *of_rounded = rounded ? malloc((size_t)most * (size_t)(p.rounded.cols + 8 * p.rounded.groups)) : NULL;
    int failed = (type != FLOAT32 && !floats) || (rounded && !of_rounded);
    if (rounded && !failed) {
        p.rounded.scale = (float *)of_rounded;
        p.rounded.sum = p.rounded.scale + most * p.rounded.groups;
        p.rounded.codes = (int8_t *)(p.rounded.sum + most * p.rounded.groups);
    }
    for (int64_t t = 0; t < inputs && !failed; t += most) {
        const char *some = (const char *)rows + (size_t)(t * cols) * size;
        p.inputs = inputs - t < most ? inputs - t : most;
        p.out = (char *)out + (size_t)(t * matrix_rows) * size;
        p.rows = type == FLOAT32 ? (const float *)some : floats;
        if (type != FLOAT32)
            chosen->to_float(some, type, p.inputs * cols, floats);
        if (rounded)
            chosen->round(&p, p.rows);
        run(&p, rounded ? chosen->rounded : chosen->exact, threads);
    }
    free(floats);
    free(of_rounded);
    return failed;
}
