/* The norm of rows by their root mean square.
 *
 * Included once by each instruction set, after tile.h and its vectors. A row is added up lane by lane in the order of
 * its columns.
 */

static float round_to(float value, enum float_type type)
{
    return type == BFLOAT16 ? float_of_bfloat(bfloat_of_float(value))
        : type == FLOAT16   ? float_of_half(half_of_float(value))
                            : value;
}

/* row (cols) and weight (cols) as floats -> out (cols): row / sqrt(mean(row^2) + epsilon), rounded to a type if
 * `rounds`, times weight + shift. */
static void norm(const float *row, const float *weight, int64_t cols, const struct norm *how, enum float_type type,
                 float *out)
{
    vec squares = load((const float[LANES]){0});
    int64_t k = 0;
    for (; k + LANES <= cols; k += LANES)
        squares = fused(load(row + k), load(row + k), squares);
    float total = sum(squares);
    for (; k < cols; k++)
        total += row[k] * row[k];
    float scale = 1.0f / sqrtf(total / (float)cols + (float)how->epsilon);
    for (k = 0; k < cols; k++)
        out[k] = row[k] * scale;
    if (how->rounds && type != FLOAT32)
        for (k = 0; k < cols; k++)
            out[k] = round_to(out[k], type);
    if (weight)
        for (k = 0; k < cols; k++)
            out[k] *= weight[k] + (float)how->shift;
}
