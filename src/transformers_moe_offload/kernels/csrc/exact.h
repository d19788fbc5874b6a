/* Products with float32 weights, `(code - zero) * scale` rounded as the torch reference rounds them.
 *
 * Included once by each instruction set, after tile.h and its vectors:
 *   LANES, vec, ints       floats, and codes, in a vector
 *   WIDE_ROWS              rows of a tile that are multiplied by three inputs at once without leaving the registers
 *   FUSED_INPUTS           1 or 2: as many are multiplied while a tile is decoded
 *   load, store, fused (a * b + c), sum
 *   what decode.h needs; or AT_ONCE, and what decode_wide.h needs
 *
 * A product is added up lane by lane in the order of the columns and by one thread, so that it depends neither on the
 * number of threads nor on the rows that are multiplied beside it.
 */

/* Columns that are decoded at a time: 8 rows of them in float32 are 16 KiB, which leaves most of an L1 to the input. */
#define CHUNK 512

/* `decode` decodes the columns of a tile from `column` on, at most MOST_GROUPS groups, whose scales and zeros have been
 * read. With inputs, at most FUSED_INPUTS, their products with the weights are added to `sums` (T, TILE_ROWS); with none,
 * the weights are written to `out` (TILE_ROWS, CHUNK). `third_in_one`: the rows of the matrix in a row of bytes also have
 * their third bits in one row of bytes, which is so if their number is a multiple of 8. */
#if defined(AT_ONCE)
#include "decode_wide.h"
#else
#include "decode.h"
#endif

ALWAYS_INLINE void decode_bits(const struct matrix *m, const struct tile *tile, int64_t column, int64_t length,
                               const float *inputs, vec *sums, float *out, const int num_inputs, const int nbits,
                               const int third_in_one)
{
    switch (m->group_size) {
    case 16: decode(m, tile, column, length, inputs, sums, out, num_inputs, nbits, third_in_one, 16); break;
    case 32: decode(m, tile, column, length, inputs, sums, out, num_inputs, nbits, third_in_one, 32); break;
    case 64: decode(m, tile, column, length, inputs, sums, out, num_inputs, nbits, third_in_one, 64); break;
    default: decode(m, tile, column, length, inputs, sums, out, num_inputs, nbits, third_in_one, 128);
    }
}

ALWAYS_INLINE void decode_any(const struct matrix *m, const struct tile *tile, int64_t column, int64_t length,
                              const float *inputs, vec *sums, float *out, const int num_inputs)
{
    switch (m->nbits) {
    case 8: decode_bits(m, tile, column, length, inputs, sums, out, num_inputs, 8, 0); break;
    case 4: decode_bits(m, tile, column, length, inputs, sums, out, num_inputs, 4, 0); break;
    case 3:
        if (m->rows % 8 == 0)
            decode_bits(m, tile, column, length, inputs, sums, out, num_inputs, 3, 1);
        else
            decode_bits(m, tile, column, length, inputs, sums, out, num_inputs, 3, 0);
        break;
    case 2: decode_bits(m, tile, column, length, inputs, sums, out, num_inputs, 2, 0); break;
    default: decode_bits(m, tile, column, length, inputs, sums, out, num_inputs, 1, 0);
    }
}

static void decode_tile(const struct matrix *m, const struct tile *tile, int64_t column, int64_t length, float *out)
{
    decode_any(m, tile, column, length, NULL, NULL, out, 0);
}

static void multiply_packed(const struct matrix *m, const struct tile *tile, int64_t column, int64_t length,
                            const float *inputs, int64_t num_inputs, vec *sums)
{
    if (num_inputs == 1)
        decode_any(m, tile, column, length, inputs, sums, NULL, 1);
    else
        decode_any(m, tile, column, length, inputs, sums, NULL, FUSED_INPUTS);
}

/* Add the products of some rows of a tile and some inputs to `sums` (T, TILE_ROWS). */
ALWAYS_INLINE void multiply(const float *tile, const float *inputs, int64_t cols, int64_t length, vec *sums,
                            const int rows, const int num_inputs)
{
    vec sum[8][3];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int t = 0; t < num_inputs; t++)
            sum[i][t] = sums[t * TILE_ROWS + i];
    for (int64_t k = 0; k < length; k += LANES) {
        vec x[3];
#pragma GCC unroll 3
        for (int t = 0; t < num_inputs; t++)
            x[t] = load(inputs + t * cols + k);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            vec w = load(tile + i * CHUNK + k);
#pragma GCC unroll 3
            for (int t = 0; t < num_inputs; t++)
                sum[i][t] = fused(w, x[t], sum[i][t]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int t = 0; t < num_inputs; t++)
            sums[t * TILE_ROWS + i] = sum[i][t];
}

static void multiply_tile(const float *tile, const struct product *p, int64_t column, int64_t length, vec *sums)
{
    int64_t cols = p->matrix->cols;
    for (int64_t t = 0; t < p->inputs;) {
        const float *inputs = p->rows + t * cols + column;
        int64_t left = p->inputs - t;
        vec *mine = sums + t * TILE_ROWS;
        if (left == 1) {
            multiply(tile, inputs, cols, length, mine, TILE_ROWS, 1);
        } else {
            for (int i = 0; i < TILE_ROWS; i += WIDE_ROWS) {
                if (left == 2)
                    multiply(tile + i * CHUNK, inputs, cols, length, mine + i, WIDE_ROWS, 2);
                else
                    multiply(tile + i * CHUNK, inputs, cols, length, mine + i, WIDE_ROWS, 3);
            }
        }
        t += left < 3 ? left : 3;
    }
}

/* Add up the lanes of the sums (T, TILE_ROWS). */
static void write_tile(const struct product *p, const struct tile *tile, const vec *sums)
{
    for (int64_t t = 0; t < p->inputs; t++)
        for (int i = 0; i < TILE_ROWS; i++)
            if (tile->row[i] < p->matrix->rows)
                put(p, t, tile->row[i], sum(sums[t * TILE_ROWS + i]));
}

static void exact_tiles(const struct product *p, int64_t first_tile, int64_t last_tile)
{
    const struct matrix *m = p->matrix;
    _Alignas(64) float weights_of_tile[TILE_ROWS * CHUNK];
    vec sums[MOST_INPUTS * TILE_ROWS];
    struct tile tile;
    int64_t at_once = p->inputs <= FUSED_INPUTS ? MOST_GROUPS * m->group_size : CHUNK;
    for (int64_t number = first_tile; number < last_tile; number++) {
        find_rows(m, number, &tile);
        memset(sums, 0, (size_t)p->inputs * TILE_ROWS * sizeof(vec));
        for (int64_t column = 0; column < m->cols; column += at_once) {
            int64_t length = m->cols - column < at_once ? m->cols - column : at_once;
            read_meta(m, column / m->group_size, length / m->group_size, &tile);
            if (p->inputs <= FUSED_INPUTS) {
                multiply_packed(m, &tile, column, length, p->rows + column, p->inputs, sums);
            } else {
                decode_tile(m, &tile, column, length, weights_of_tile);
                multiply_tile(weights_of_tile, p, column, length, sums);
            }
        }
        write_tile(p, &tile, sums);
    }
}
