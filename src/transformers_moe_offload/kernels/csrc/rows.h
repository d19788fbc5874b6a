/* Products of rows of floats, a vector of each row after another. Included by plain.h. */

ALWAYS_INLINE void multiply_plain(const struct product *p, const char *const *weights, const int64_t *row,
                                  int64_t input, const int rows, const int num_inputs, const enum float_type type)
{
    const int size = type == FLOAT32 ? 4 : 2;
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
            if (size * k % 64 == 0)
                fetch_ahead((const uint8_t *)weights[i] + size * k, TILE_ROWS * cols * size);
            vec w = load_values(weights[i] + size * k, type);
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
                total += value_at(weights[i] + size * k, type) * inputs[t * cols + k];
            if (row[i] < p->matrix->rows)
                put(p, input + t, row[i], total);
        }
}
