/* Products of rows of floats, a line of memory of each row after another, for vectors much smaller than that.
 *
 * Included by plain.h, after `load_two(p, type, two)`, which loads two vectors of floats that lie one after another.
 */

ALWAYS_INLINE void multiply_plain(const struct product *p, const char *const *weights, const int64_t *row,
                                  int64_t input, const int rows, const int num_inputs, const enum float_type type)
{
    const int size = type == FLOAT32 ? 4 : 2, in_line = 64 / size;
    int64_t cols = p->matrix->cols, whole = cols / LANES * LANES, k = 0;
    const float *inputs = p->rows + input * cols;
    vec sums[8][3];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int t = 0; t < num_inputs; t++)
            sums[i][t] = all_of(0);
    for (; k + in_line <= cols; k += in_line) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
            fetch_ahead((const uint8_t *)weights[i] + size * k, TILE_ROWS * cols * size);
        for (int64_t part = k; part < k + in_line; part += 2 * LANES) {
            vec x[3][2];
#pragma GCC unroll 3
            for (int t = 0; t < num_inputs; t++)
                load_two((const char *)(inputs + t * cols + part), FLOAT32, x[t]);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                vec w[2];
                load_two(weights[i] + size * part, type, w);
#pragma GCC unroll 3
                for (int t = 0; t < num_inputs; t++)
                    sums[i][t] = fused(w[1], x[t][1], fused(w[0], x[t][0], sums[i][t]));
            }
        }
    }
    for (; k < whole; k += LANES)
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            vec w = load_values(weights[i] + size * k, type);
#pragma GCC unroll 3
            for (int t = 0; t < num_inputs; t++)
                sums[i][t] = fused(w, load(inputs + t * cols + k), sums[i][t]);
        }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int t = 0; t < num_inputs; t++) {
            float total = sum(sums[i][t]);
            for (k = whole; k < cols; k++)
                total += value_at(weights[i] + size * k, type) * inputs[t * cols + k];
            if (row[i] < p->matrix->rows)
                put(p, input + t, row[i], total);
        }
}
