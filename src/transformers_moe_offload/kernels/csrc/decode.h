/* Weights out of a tile, LANES columns at a time: codes become numbers, or places in a table, lane by lane.
 *
 * Included by exact.h, after:
 *   load_codes, shifted
 *   struct values, values_of(scale, zero, nbits), weights(codes, values, nbits): codes may have bits above theirs
 *   with_third(codes, high, place): 2-bit codes, which may have bits above theirs, and the bit of `high` at that place
 */

ALWAYS_INLINE void decode(const struct matrix *m, const struct tile *tile, int64_t column, int64_t length,
                          const float *inputs, vec *sums, float *out, const int num_inputs, const int nbits,
                          const int third_in_one, const int group_size)
{
    const int plane = nbits == 3 ? 2 : nbits, in_a_byte = 8 / plane, num_byte_rows = TILE_ROWS / in_a_byte;
    const uint8_t *bytes[TILE_ROWS], *high[TILE_ROWS];
    int place[TILE_ROWS];
    vec sum[TILE_ROWS][FUSED_INPUTS];
    struct values values[TILE_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
        if (i < num_byte_rows)
            bytes[i] = tile->bytes[i] + column;
        if (nbits == 3)
            high[third_in_one ? i / in_a_byte : i] = third_bits(m, tile->row[i], &place[i]) + column;
#pragma GCC unroll 2
        for (int t = 0; t < num_inputs; t++)
            sum[i][t] = sums[t * TILE_ROWS + i];
    }
    for (int64_t group = 0; group < length / group_size; group++) {
        int64_t start = group * group_size;
        for (int k = 0; k < group_size && (start + k) % 64 == 0; k += 64)
#pragma GCC unroll 8
            for (int b = 0; b < num_byte_rows; b++)
                fetch_ahead(bytes[b] + start + k, num_byte_rows * m->cols);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++)
            values[i] = values_of(tile->scale[i][group], tile->zero[i][group], nbits);
        for (int64_t k = start; k < start + group_size; k += LANES) {
#pragma GCC unroll 8
            for (int i = 0; i < TILE_ROWS; i++) {
                ints codes = shifted(load_codes(bytes[i / in_a_byte] + k), 8 - plane * (i % in_a_byte + 1));
                if (nbits == 3)
                    codes = with_third(codes, load_codes(high[third_in_one ? i / in_a_byte : i] + k), place[i]);
                vec w = weights(codes, values[i], nbits);
                if (!num_inputs)
                    store(out + i * CHUNK + k, w);
#pragma GCC unroll 2
                for (int t = 0; t < num_inputs; t++)
                    sum[i][t] = fused(w, load(inputs + t * m->cols + k), sum[i][t]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 2
        for (int t = 0; t < num_inputs; t++)
            sums[t * TILE_ROWS + i] = sum[i][t];
}
