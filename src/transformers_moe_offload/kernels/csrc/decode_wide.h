/* Weights out of a tile, AT_ONCE columns at a time: codes stay bytes until they become numbers.
 *
 * Included by exact.h, after:
 *   AT_ONCE, ints             codes of so many columns, as bytes: a multiple of LANES
 *   DECODED_ROWS              rows of a tile, 8 or 4, that are decoded together without leaving the registers
 *   load_codes, shifted, low_bits(codes, nbits)
 *   with_third(codes, high, place): 2-bit codes, and the bit of `high` at that place
 *   struct values, values_of(scale, zero)
 *   weights(codes, part, values): those of LANES columns, `part` times LANES from the first
 */

ALWAYS_INLINE void decode(const struct matrix *m, const struct tile *tile, int64_t column, int64_t length,
                          const float *inputs, vec *sums, float *out, const int num_inputs, const int nbits,
                          const int third_in_one, const int group_size)
{
    const int plane = nbits == 3 ? 2 : nbits, in_a_byte = 8 / plane;
    const int64_t tile_bytes = TILE_ROWS / in_a_byte * m->cols;
    (void)third_in_one; /* looking for each row's third bits costs little beside AT_ONCE columns */
    for (int first = 0; first < TILE_ROWS; first += DECODED_ROWS) {
        const uint8_t *bytes[DECODED_ROWS], *high[DECODED_ROWS];
        int shift[DECODED_ROWS], place[DECODED_ROWS];
        vec sum[DECODED_ROWS][FUSED_INPUTS];
#pragma GCC unroll 8
        for (int i = 0; i < DECODED_ROWS; i++) {
            bytes[i] = tile->bytes[(first + i) / in_a_byte] + column;
            shift[i] = 8 - plane * ((in_a_byte > DECODED_ROWS ? first + i : i) % in_a_byte + 1);
            if (nbits == 3)
                high[i] = third_bits(m, tile->row[first + i], &place[i]) + column;
#pragma GCC unroll 2
            for (int t = 0; t < num_inputs; t++)
                sum[i][t] = sums[t * TILE_ROWS + first + i];
        }
        for (int64_t group = 0; group < length / group_size; group++) {
            int64_t start = group * group_size;
            struct values values[DECODED_ROWS];
            for (int k = 0; k < group_size && (start + k) % 64 == 0; k += 64)
#pragma GCC unroll 8
                for (int i = 0; i < DECODED_ROWS; i += in_a_byte)
                    fetch_ahead(bytes[i] + start + k, tile_bytes);
#pragma GCC unroll 8
            for (int i = 0; i < DECODED_ROWS; i++)
                values[i] = values_of(tile->scale[first + i][group], tile->zero[first + i][group]);
            for (int64_t k = start; k < start + group_size; k += AT_ONCE) {
#pragma GCC unroll 8
                for (int i = 0; i < DECODED_ROWS; i++) {
                    ints codes = shifted(load_codes(bytes[i / in_a_byte * in_a_byte] + k), shift[i]);
                    if (nbits == 3)
                        codes = with_third(codes, load_codes(high[i] + k), place[i]);
                    codes = low_bits(codes, nbits);
#pragma GCC unroll 4
                    for (int part = 0; part < AT_ONCE / LANES; part++) {
                        int64_t place_of_part = k + part * LANES;
                        vec w = weights(codes, part, values[i]);
                        if (!num_inputs)
                            store(out + (first + i) * CHUNK + place_of_part, w);
#pragma GCC unroll 2
                        for (int t = 0; t < num_inputs; t++)
                            sum[i][t] = fused(w, load(inputs + t * m->cols + place_of_part), sum[i][t]);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < DECODED_ROWS; i++)
#pragma GCC unroll 2
            for (int t = 0; t < num_inputs; t++)
                sums[t * TILE_ROWS + first + i] = sum[i][t];
    }
}
