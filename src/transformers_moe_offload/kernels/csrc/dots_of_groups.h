/* Products of bytes, added up as integers over a whole group and then multiplied by its scale.
 *
 * Included by rounded.h, after:
 *   BYTES                     at most the smallest group, so no vector has several groups
 *   CODE_OFFSET(nbits)        what `field` has subtracted from codes: x times it is missing in the sums
 *   dots, no_dots(), added_dots(total, codes, x, nbits): products of BYTES codes and int8, added to the total
 *   ints_of(total, nbits)     LANES integers that have the total's sum
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
    for (int64_t group = 0; group < length / group_size; group++) {
        int64_t start = group * group_size;
        dots total[TILE_ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++)
            total[i] = no_dots();
        for (int64_t k = start; k < start + group_size && k % 64 == 0; k += 64)
#pragma GCC unroll 8
            for (int b = 0; b < num_byte_rows; b++)
                fetch_ahead(bytes->low[b] + k, tile_bytes);
        for (int64_t k = start; k < start + group_size; k += BYTES) {
#pragma GCC unroll 8
            for (int i = 0; i < TILE_ROWS; i++) {
                byte_vec codes =
                    field(load_bytes(bytes->low[i / in_a_byte] + k), 8 - plane * (i % in_a_byte + 1), plane);
                if (nbits == 3)
                    codes = with_third_bits(codes, load_bytes(bytes->high[i] + k), bytes->place[i]);
                total[i] = added_dots(total[i], codes, x + k, nbits);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++)
            sum[i] = fused(to_float(ints_of(total[i], nbits)), all_of(scales[i][first_group + group]), sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
        sums[i] = sum[i];
}
