/* Products with bfloat16 matrices as they are: nothing to decode, so reading them is all that takes time.
 *
 * Included once by each instruction set, after exact.h and, of its vectors, `load_bfloats`. A row is added up lane by lane
 * in the order of the columns and by one thread, as in exact.h, so its product depends neither on threads nor on the
 * rows beside it, nor on where in memory the matrix begins.
 */

/* Values of bfloat16, 1 KiB, that are fetched before they are multiplied: a tile is eight streams, more than hardware
 * follows well. It was 38 GB/s with this distance from the first try; others were not tried. */
#define FETCHED_AHEAD 512

/* Write the products of some rows of a tile, all K columns, and some inputs (T, K). */
ALWAYS_INLINE void multiply_plain(const struct product *p, const uint16_t *const *weights, const int64_t *row,
                                  int64_t input, const int rows, const int num_inputs)
{
    int64_t cols = p->matrix->cols, whole = cols / LANES * LANES;
    const float *inputs = p->rows + input * cols;
    vec sums[8][3];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < whole; k += LANES) {
        vec x[3];
#pragma GCC unroll 3
        for (int t = 0; t < num_inputs; t++)
            x[t] = load(inputs + t * cols + k);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            if (k % 32 == 0)
                __builtin_prefetch(weights[i] + k + FETCHED_AHEAD, 0, 3);
            vec w = load_bfloats(weights[i] + k);
#pragma GCC unroll 3
            for (int t = 0; t < num_inputs; t++)
                sums[i][t] = fused(w, x[t], sums[i][t]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int t = 0; t < num_inputs; t++) {
            float total = sum(sums[i][t]);
            for (int64_t k = whole; k < cols; k++)
                total += float_of_bfloat(weights[i][k]) * inputs[t * cols + k];
            if (row[i] < p->matrix->rows)
                put(p, input + t, row[i], total);
        }
}

static void plain_tiles(const struct product *p, int64_t first_tile, int64_t last_tile)
{
    const struct matrix *m = p->matrix;
    for (int64_t number = first_tile; number < last_tile; number++) {
        const uint16_t *weights[TILE_ROWS];
        int64_t row[TILE_ROWS];
        for (int i = 0; i < TILE_ROWS; i++) { /* a row that does not exist looks like the last one */
            row[i] = number * TILE_ROWS + i;
            weights[i] = (const uint16_t *)m->codes + (row[i] < m->rows ? row[i] : m->rows - 1) * m->cols;
        }
        for (int64_t t = 0; t < p->inputs;) {
            int64_t left = p->inputs - t;
            if (left == 1) {
                multiply_plain(p, weights, row, t, TILE_ROWS, 1);
            } else {
                for (int i = 0; i < TILE_ROWS; i += WIDE_ROWS) {
                    if (left == 2)
                        multiply_plain(p, weights + i, row + i, t, WIDE_ROWS, 2);
                    else
                        multiply_plain(p, weights + i, row + i, t, WIDE_ROWS, 3);
                }
            }
            t += left < 3 ? left : 3;
        }
    }
}
