/* Products of bytes, a vector of them at a time, which may have several groups: lanes are multiplied by their scales.
 *
 * Included by rounded.h, after:
 *   dot(codes, x, nbits)      four products of a code and an int8 added up in each lane
 *   spread(p, group_size)     lane i gets p[4 * i / group_size]
 */

ALWAYS_INLINE void multiply_bytes(const struct bytes *bytes, const int8_t *x,
                                  float (*scales)[MOST_GROUPS + LANES], int64_t first_group, int64_t length,
                                  int64_t tile_bytes, vec *sums, const int nbits, const int group_size)
{
    const int plane = nbits == 3 ? 2 : nbits, in_a_byte = 8 / plane, num_byte_rows = TILE_ROWS / in_a_byte;
    vec sum[TILE_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
        sum[i] = sums[i];
    for (int64_t k = 0; k < length; k += BYTES) {
#pragma GCC unroll 8
        for (int b = 0; b < num_byte_rows; b++)
            fetch_ahead(bytes->low[b] + k, tile_bytes);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
            byte_vec codes = field(load_bytes(bytes->low[i / in_a_byte] + k), 8 - plane * (i % in_a_byte + 1), plane);
            if (nbits == 3)
                codes = with_third_bits(codes, load_bytes(bytes->high[i] + k), bytes->place[i]);
            vec scale = spread(scales[i] + first_group + k / group_size, group_size);
            sum[i] = fused(to_float(dot(codes, x + k, nbits)), scale, sum[i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
        sums[i] = sum[i];
}
