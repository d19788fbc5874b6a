/* One tile of a matrix: which rows it has, their scales and zeros, and where their third bits lie.
 *
 * Included once by each instruction set, after `halves_to_floats(halves, count, out)` and
 * `bytes_to_floats(bytes, count, range, out)`, whose floats are a minimum plus as many steps; `range` has both, as halves.
 */

#include <stddef.h>

#include "half.h"
#include "lowbit.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Most groups of a row that are looked at at once. */
#define MOST_GROUPS 64

struct tile {
    const uint8_t *bytes[TILE_ROWS]; /* rows of bytes, of their first column */
    int64_t row[TILE_ROWS];          /* of the matrix; N or more where there is none */
    const float *scale[TILE_ROWS], *zero[TILE_ROWS]; /* of some groups of each row */
    float scales[TILE_ROWS * MOST_GROUPS], zeros[TILE_ROWS * MOST_GROUPS];
};

/* A row of bytes that does not exist looks like the last one, and its rows of the matrix do not exist. */
static void find_rows(const struct matrix *m, int64_t number, struct tile *tile)
{
    int64_t total = byte_rows(m), in_tile = tile_byte_rows(m), in_a_byte = 8 / plane_nbits(m->nbits);
    for (int64_t b = 0; b < in_tile; b++) {
        int64_t byte_row = number * in_tile + b;
        tile->bytes[b] = m->codes + (byte_row < total ? byte_row : total - 1) * m->cols;
        for (int64_t i = 0; i < in_a_byte; i++)
            tile->row[b * in_a_byte + i] = byte_row < total ? byte_row + i * total : m->rows;
    }
}

ALWAYS_INLINE void meta_to_floats(const struct matrix *m, const void *stored, const uint16_t *range, int64_t start,
                                  int64_t count, float *out)
{
    if (m->meta_nbits == 16) {
        halves_to_floats((const uint16_t *)stored + start, count, out);
        return;
    }
    const uint8_t *values = (const uint8_t *)stored + start;
    for (int64_t done = 0; done < count;) {
        int64_t block = (start + done) / META_BLOCK, stop = (block + 1) * META_BLOCK - start;
        stop = stop < count ? stop : count;
        bytes_to_floats(values + done, stop - done, range + 2 * block, out + done);
        done = stop;
    }
}

/* Those of the tiles after the next one are fetched, into the L1: there are too few in a tile for a processor to see by
 * itself where they are read on, and each line of them was waited for. In 4 bits a step of many experts took 4 % less time. */
#define META_AHEAD 256

ALWAYS_INLINE void fetch_meta(const struct matrix *m, const void *stored, int64_t start, int64_t count)
{
    const char *first = (const char *)stored + start * m->meta_nbits / 8 + META_AHEAD;
    for (int64_t nbytes = count * m->meta_nbits / 8; nbytes > 0; nbytes -= 64, first += 64)
        __builtin_prefetch(first, 0, 3);
}

/* Scales and zeros of the groups from `group` on. A row that does not exist gets zeros, and so weights of zero. Those of
 * rows that follow each other, if they are read to the end, lie together and are read together. */
static void read_meta(const struct matrix *m, int64_t group, int64_t count, struct tile *tile)
{
    static const float nothing[MOST_GROUPS] = {0};
    int64_t groups = m->cols / m->group_size, in_a_byte = 8 / plane_nbits(m->nbits), run = TILE_ROWS / in_a_byte;
    for (int64_t i = 0; i < in_a_byte; i++) {
        int64_t exist = 0, at_once = count == groups ? run : 1;
        while (exist < run && tile->row[exist * in_a_byte + i] < m->rows)
            exist++;
        for (int64_t b = 0; b < run; b++) {
            int64_t place = (i * run + b) * count, row = b * in_a_byte + i;
            tile->scale[row] = b < exist ? tile->scales + place : nothing;
            tile->zero[row] = b < exist ? tile->zeros + place : nothing;
            if (b < exist && b % at_once == 0) {
                int64_t start = tile->row[row] * groups + group, all = at_once == 1 ? count : exist * count;
                fetch_meta(m, m->scale, start, all);
                fetch_meta(m, m->zero, start, all);
                meta_to_floats(m, m->scale, m->scale_range, start, all, tile->scales + place);
                meta_to_floats(m, m->zero, m->zero_range, start, all, tile->zeros + place);
            }
        }
    }
}

/* Of 3-bit codes: the bytes their third bit is in, and its place in them. Rows that do not exist look like row 0. */
static const uint8_t *third_bits(const struct matrix *m, int64_t row, int *place)
{
    int64_t total = ceil_div(m->rows, 8);
    row = row < m->rows ? row : 0;
    *place = (int)(7 - row / total);
    return m->high + row % total * m->cols;
}

/* Tiles follow each other in memory: while one is multiplied, the same place of the next is fetched, into the L2, because
 * a tile and the next do not fit into an L1. Read from memory by two cores, matrices of bfloat16 gave 26 to 28 GB/s;
 * fetched 1 KiB ahead in each row, into the L1, 16 to 21 (an EPYC with AVX-512). */
ALWAYS_INLINE void fetch_ahead(const uint8_t *bytes, int64_t tile_bytes)
{
    __builtin_prefetch(bytes + tile_bytes, 0, 2);
}

static void put(const struct product *p, int64_t input, int64_t row, float value)
{
    int64_t place = input * p->matrix->rows + row;
    value += p->bias ? p->bias[row] : 0.0f;
    if (p->out_type == FLOAT32)
        ((float *)p->out)[place] = value;
    else
        ((uint16_t *)p->out)[place] = p->out_type == BFLOAT16 ? bfloat_of_float(value) : half_of_float(value);
}

static inline void values_to_floats(const void *values, enum float_type type, int64_t count, float *out)
{
    const uint16_t *bits = (const uint16_t *)values;
    if (type == FLOAT16)
        halves_to_floats(bits, count, out);
    else
        for (int64_t k = 0; k < count; k++)
            out[k] = float_of_bfloat(bits[k]);
}

static void floats_to_values(const float *values, enum float_type type, int64_t count, void *out)
{
    uint16_t *bits = (uint16_t *)out;
    if (type == FLOAT32)
        memcpy(out, values, (size_t)count * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t k = 0; k < count; k++)
            bits[k] = bfloat_of_float(values[k]);
    else
        for (int64_t k = 0; k < count; k++)
            bits[k] = half_of_float(values[k]);
}
