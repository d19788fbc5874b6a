/* What product.c, layer.c and route.c share: the kernels that were chosen, threads, tiles, and room for rounded rows. */
#ifndef WORK_H
#define WORK_H

#include <string.h>

#include "lowbit.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Bytes of matrices for each additional thread, as in cpu.py. */
#define BYTES_PER_THREAD (1 << 18)

/* An OpenMP runtime's GOMP_parallel(work, data, num_threads, flags). */
typedef void parallel_function(void (*)(void *), void *, unsigned, unsigned);

/* Have so many threads, or as many of them as there are, each call `work(data)`, which shares it out; of threads.c. */
void on_threads(int threads, void (*work)(void *), void *data);

extern const struct kernels *chosen;

int moe_dense(const void *weight, const void *bias, int weight_type, int64_t rows, int64_t cols, const void *x, int type,
              int64_t inputs, void *out, int threads); /* of product.c */

/* The product of several matrices and their rows, by so many threads; of product.c. */
void multiply_all(const struct product *products, int64_t count, int rounded, int threads);

/* How a matrix is stored, and of which type the bias that goes with it is, -1 where there is none; the structures are also
 * in kernels/stored.py. */
struct shape {
    int64_t rows, cols, nbits, group_size, meta_nbits, type, bias_type;
};

/* Where a matrix lies. */
struct arrays {
    void *codes, *high, *scale, *zero, *scale_range, *zero_range, *bias;
};

static inline struct matrix matrix_of(const struct shape *s, const struct arrays *a)
{
    return (struct matrix){.rows = s->rows, .cols = s->cols, .nbits = (int)s->nbits, .group_size = (int)s->group_size,
                           .meta_nbits = (int)s->meta_nbits, .type = (enum float_type)s->type, .codes = a->codes,
                           .high = a->high, .scale = a->scale, .zero = a->zero, .scale_range = a->scale_range,
                           .zero_range = a->zero_range};
}

/* As many of the threads as reading these bytes of matrices is worth. */
static inline int threads_for(int64_t nbytes, int threads)
{
    int64_t most = 1 + nbytes / BYTES_PER_THREAD;
    return threads < most ? threads : (int)most;
}

static inline int64_t padded(int64_t count, int64_t to) { return ceil_div(count, to) * to; }

static inline int64_t tiles_of(const struct product *p)
{
    if (p->matrix->nbits == PLAIN)
        return ceil_div(p->matrix->rows, TILE_ROWS);
    return ceil_div(byte_rows(p->matrix), tile_byte_rows(p->matrix));
}

typedef void tiles_function(const struct product *, int64_t first_tile, int64_t last_tile);

static inline int has_many_kernel(const struct product *p, int rounded)
{
    return p->bfloats.rows || (rounded && p->inputs > FEW_INPUTS && chosen->many_rounded);
}

static inline tiles_function *kernel_for(const struct product *p, int rounded)
{
    if (p->matrix->nbits == PLAIN)
        return chosen->plain;
    if (p->bfloats.rows)
        return chosen->many_bfloats;
    if (!rounded)
        return chosen->exact;
    return has_many_kernel(p, rounded) ? chosen->many_rounded : chosen->rounded;
}

/* Some tiles of a product: by several calls of the kernel if it has more rows of input than one takes, as when tokens
 * choose an expert more than once. */
static inline void multiply_product(const struct product *p, int rounded, int64_t first, int64_t last)
{
    tiles_function *kernel = kernel_for(p, rounded);
    const struct matrix *m = p->matrix;
    int64_t most = m->nbits == PLAIN ? p->inputs : has_many_kernel(p, rounded) ? MOST_OF_MANY : MOST_INPUTS;
    struct product part = *p;
    for (int64_t left = p->inputs; left > 0; left -= most) {
        part.inputs = left < most ? left : most;
        kernel(&part, first, last);
        if (part.rows)
            part.rows += most * m->cols;
        if (part.bfloats.rows) {
            part.bfloats.rows += most * m->cols;
            part.bfloats.sum += most * part.bfloats.groups;
        }
        if (part.rounded.codes) {
            part.rounded.codes += most * part.rounded.cols;
            part.rounded.scale += most * part.rounded.groups;
            part.rounded.sum += most * part.rounded.groups;
        }
        part.out = (char *)part.out + most * m->rows * bytes_of(part.out_type);
    }
}

/* The tiles from `first` up to `last`, as if those of all products were one after another. `rounded`: packed matrices are
 * multiplied with rounded rows. */
static inline void multiply_tiles(const struct product *products, int64_t count, int rounded, int64_t first, int64_t last)
{
    for (int64_t i = 0; i < count && last > 0; i++) {
        const struct product *p = &products[i];
        int64_t tiles = tiles_of(p);
        if (first < tiles)
            multiply_product(p, rounded, first > 0 ? first : 0, last < tiles ? last : tiles);
        first -= tiles;
        last -= tiles;
    }
}

static inline void to_floats(const void *values, enum float_type type, int64_t count, float *out)
{
    if (type == FLOAT32)
        memcpy(out, values, (size_t)count * sizeof(float));
    else
        chosen->to_float(values, type, count, out);
}

static inline int64_t rounded_groups(const struct matrix *m) { return padded(m->cols / m->group_size, 16); }

/* Bytes for one rounded row. */
static inline int64_t rounded_bytes(const struct matrix *m) { return padded(m->cols, 64) + 8 * rounded_groups(m); }

/* Room for rounded rows, `rounded_bytes` each. */
static inline struct rounded_rows rounded_in(char *memory, const struct matrix *m, int64_t inputs)
{
    struct rounded_rows r = {.cols = padded(m->cols, 64), .groups = rounded_groups(m), .scale = (float *)memory};
    r.sum = r.scale + inputs * r.groups;
    r.codes = (int8_t *)(r.sum + inputs * r.groups);
    return r;
}

#endif
