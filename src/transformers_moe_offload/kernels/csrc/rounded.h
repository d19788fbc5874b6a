/* Products with input rounded to int8, each group of it with a scale of its own: faster for few rows, and lossy.
 *
 * Included once by each instruction set, after tile.h, exact.h's vectors and:
 *   BYTES, byte_vec           codes in a vector, 4 * LANES
 *   load_bytes(p), field(bytes, shift, nbits), with_third_bits(codes, high, place)
 *   to_float(ints), multiplied, negative
 *   what dots.h needs; or CODE_OFFSET(nbits), what `field` subtracts from codes, and what dots_of_groups.h needs
 *   load_first(p, count)      as `load`, with zeros from `count` on, which are not looked at
 *   ROUNDS_GROUPS             defined if it has a `round_group` of its own, to the same bits
 */

#ifndef ROUNDS_GROUPS
static void round_group(const float *x, int group_size, int8_t *codes, float *scale, float *sum_of_codes)
{
    float largest[16] = {0}, broken[16] = {0}, most = 0, any_broken = 0;
    for (int k = 0; k < group_size; k += 16) {
        for (int i = 0; i < 16; i++) {
            float size = x[k + i] < 0 ? -x[k + i] : x[k + i];
            largest[i] = size > largest[i] ? size : largest[i];
            broken[i] += x[k + i] - x[k + i]; /* not a number where x is infinite or none */
        }
    }
    for (int i = 0; i < 16; i++) {
        most = largest[i] > most ? largest[i] : most;
        any_broken += broken[i];
    }
    if (any_broken != 0 || most < 0x1p-110f) { /* so small that 127 / most would be infinite */
        memset(codes, 0, (size_t)group_size);
        *scale = *sum_of_codes = any_broken;
        return;
    }
    float inverse = 127 / most;
    int32_t total = 0;
    for (int k = 0; k < group_size; k++) {
        /* The lowest bits of 1.5 * 2^23 + v are v, rounded to the nearest integer. */
        int32_t code = (int32_t)(bits_of_float(x[k] * inverse + 0x1.8p23f) - 0x4b400000u);
        codes[k] = (int8_t)code;
        total += code;
    }
    *scale = most / 127;
    *sum_of_codes = *scale * (float)total;
}
#endif

static void round_rows(const struct product *p, const float *rows)
{
    const struct rounded_rows *r = &p->rounded;
    int64_t cols = p->matrix->cols, group_size = p->matrix->group_size, groups = cols / group_size;
    for (int64_t t = 0; t < p->inputs; t++) {
        int8_t *codes = r->codes + t * r->cols;
        float *scale = r->scale + t * r->groups, *sum = r->sum + t * r->groups;
        for (int64_t g = 0; g < groups; g++)
            round_group(rows + t * cols + g * group_size, (int)group_size, codes + g * group_size, scale + g, sum + g);
        memset(codes + cols, 0, (size_t)(r->cols - cols));
        memset(scale + groups, 0, (size_t)(r->groups - groups) * sizeof(float));
        memset(sum + groups, 0, (size_t)(r->groups - groups) * sizeof(float));
    }
}

/* Where the bytes of a tile's columns are; those of third bits by the row of the tile they belong to. */
struct bytes {
    const uint8_t *low[TILE_ROWS], *high[TILE_ROWS];
    int place[TILE_ROWS];
};

static void find_bytes(const struct matrix *m, const struct tile *tile, int64_t column, struct bytes *bytes)
{
    for (int i = 0; i < TILE_ROWS; i++) {
        bytes->low[i] = i < tile_byte_rows(m) ? tile->bytes[i] + column : NULL;
        if (m->nbits == 3)
            bytes->high[i] = third_bits(m, tile->row[i], &bytes->place[i]) + column;
    }
}

/* Copies of the last columns, too few for a vector, with zeros after them. */
static void copy_tail(const struct matrix *m, const struct bytes *bytes, int64_t start, int64_t length,
                      uint8_t copies[2 * TILE_ROWS][BYTES], struct bytes *tail)
{
    *tail = *bytes;
    memset(copies, 0, 2 * TILE_ROWS * BYTES);
    for (int i = 0; i < TILE_ROWS; i++) {
        if (i < tile_byte_rows(m))
            tail->low[i] = memcpy(copies[i], bytes->low[i] + start, (size_t)length);
        if (m->nbits == 3)
            tail->high[i] = memcpy(copies[TILE_ROWS + i], bytes->high[i] + start, (size_t)length);
    }
}

/* `multiply_bytes` adds the products of a tile and one input to `sums` (TILE_ROWS). `scales` are both scales, multiplied. */
#if defined(CODE_OFFSET)
#include "dots_of_groups.h"
#else
#include "dots.h"
#endif

ALWAYS_INLINE void multiply_rounded(const struct tile *tile, const struct product *p, int64_t column, int64_t length,
                                    vec *sums, const int nbits, const int group_size)
{
    const struct matrix *m = p->matrix;
    const struct rounded_rows *r = &p->rounded;
    int64_t group = column / group_size, count = length / group_size, whole = length / BYTES * BYTES;
    int64_t tile_bytes = tile_byte_rows(m) * m->cols;
    float scales[TILE_ROWS][MOST_GROUPS + LANES];
    uint8_t copies[2 * TILE_ROWS][BYTES];
    struct bytes bytes, tail;
    find_bytes(m, tile, column, &bytes);
    if (whole < length)
        copy_tail(m, &bytes, whole, length - whole, copies, &tail);
    for (int64_t t = 0; t < p->inputs; t++, sums += TILE_ROWS) {
        const float *scale = r->scale + t * r->groups + group, *sum_of_codes = r->sum + t * r->groups + group;
        const int8_t *x = r->codes + t * r->cols + column;
        for (int i = 0; i < TILE_ROWS; i++) {
            vec sum = sums[i];
            for (int64_t g = 0; g < count; g += LANES) {
                int64_t left = count - g;
                vec of_row = load_first(tile->scale[i] + g, left), zero = load_first(tile->zero[i] + g, left);
#if defined(CODE_OFFSET)
                zero -= CODE_OFFSET(nbits);
#endif
                store(scales[i] + g, multiplied(of_row, load(scale + g)));
                sum = fused(multiplied(of_row, zero), negative(load(sum_of_codes + g)), sum);
            }
            sums[i] = sum;
        }
        multiply_bytes(&bytes, x, scales, 0, whole, tile_bytes, sums, nbits, group_size);
        if (whole < length)
            multiply_bytes(&tail, x + whole, scales, whole / group_size, BYTES, 0, sums, nbits, group_size);
    }
}

ALWAYS_INLINE void multiply_rounded_bits(const struct tile *tile, const struct product *p, int64_t column,
                                         int64_t length, vec *sums, const int nbits)
{
    switch (p->matrix->group_size) {
    case 16: multiply_rounded(tile, p, column, length, sums, nbits, 16); break;
    case 32: multiply_rounded(tile, p, column, length, sums, nbits, 32); break;
    case 64: multiply_rounded(tile, p, column, length, sums, nbits, 64); break;
    default: multiply_rounded(tile, p, column, length, sums, nbits, 128);
    }
}

static void rounded_tiles(const struct product *p, int64_t first_tile, int64_t last_tile)
{
    const struct matrix *m = p->matrix;
    vec sums[MOST_INPUTS * TILE_ROWS];
    struct tile tile;
    int64_t at_once = MOST_GROUPS * m->group_size;
    for (int64_t number = first_tile; number < last_tile; number++) {
        find_rows(m, number, &tile);
        memset(sums, 0, (size_t)p->inputs * TILE_ROWS * sizeof(vec));
        for (int64_t column = 0; column < m->cols; column += at_once) {
            int64_t length = m->cols - column < at_once ? m->cols - column : at_once;
            read_meta(m, column / m->group_size, length / m->group_size, &tile);
            switch (m->nbits) {
            case 8: multiply_rounded_bits(&tile, p, column, length, sums, 8); break;
            case 4: multiply_rounded_bits(&tile, p, column, length, sums, 4); break;
            case 3: multiply_rounded_bits(&tile, p, column, length, sums, 3); break;
            case 2: multiply_rounded_bits(&tile, p, column, length, sums, 2); break;
            default: multiply_rounded_bits(&tile, p, column, length, sums, 1);
            }
        }
        write_tile(p, &tile, sums);
    }
}
