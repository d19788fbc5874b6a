/* Products with matrices of floats as they are: nothing to decode, so reading them is all that takes time.
 *
 * Included once by each instruction set, after exact.h and, of its vectors, `load_bfloats` and `load_halves`; those that
 * define AT_ONCE also have what rows_wide.h needs. A row is
 * added up lane by lane in the order of the columns and by one thread, as in exact.h, so its product depends neither on
 * threads nor on the rows beside it, nor on where in memory the matrix begins.
 */

ALWAYS_INLINE vec load_values(const char *p, const enum float_type type)
{
    if (type == FLOAT32)
        return load((const float *)(const void *)p);
    return type == BFLOAT16 ? load_bfloats((const uint16_t *)(const void *)p)
                            : load_halves((const uint16_t *)(const void *)p);
}

static float value_at(const char *p, enum float_type type)
{
    if (type == FLOAT32)
        return *(const float *)(const void *)p;
    uint16_t bits = *(const uint16_t *)(const void *)p;
    return type == BFLOAT16 ? float_of_bfloat(bits) : float_of_half(bits);
}

/* `multiply_plain` writes the products of some rows of a tile, all K columns, and some inputs (T, K). */
#if defined(AT_ONCE)
#include "rows_wide.h"
#else
#include "rows.h"
#endif

ALWAYS_INLINE void plain_tiles_of(const struct product *p, int64_t first_tile, int64_t last_tile,
                                  const enum float_type type)
{
    const struct matrix *m = p->matrix;
    const int size = type == FLOAT32 ? 4 : 2;
    for (int64_t number = first_tile; number < last_tile; number++) {
        const char *weights[TILE_ROWS];
        int64_t row[TILE_ROWS];
        for (int i = 0; i < TILE_ROWS; i++) { /* a row that does not exist looks like the last one */
            row[i] = number * TILE_ROWS + i;
            weights[i] = (const char *)m->codes + (row[i] < m->rows ? row[i] : m->rows - 1) * m->cols * size;
        }
        for (int64_t t = 0; t < p->inputs;) {
            int64_t left = p->inputs - t;
            if (left == 1) {
                multiply_plain(p, weights, row, t, TILE_ROWS, 1, type);
            } else {
                for (int i = 0; i < TILE_ROWS; i += WIDE_ROWS) {
                    if (left == 2)
                        multiply_plain(p, weights + i, row + i, t, WIDE_ROWS, 2, type);
                    else
                        multiply_plain(p, weights + i, row + i, t, WIDE_ROWS, 3, type);
                }
            }
            t += left < 3 ? left : 3;
        }
    }
}

static void plain_tiles(const struct product *p, int64_t first_tile, int64_t last_tile)
{
    switch (p->matrix->type) {
    case FLOAT32: plain_tiles_of(p, first_tile, last_tile, FLOAT32); break;
    case BFLOAT16: plain_tiles_of(p, first_tile, last_tile, BFLOAT16); break;
    default: plain_tiles_of(p, first_tile, last_tile, FLOAT16);
    }
}
