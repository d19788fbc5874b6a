/* Products of a packed matrix and many rows of input, for AVX-512: the codes of sixteen rows of the matrix are put in
 * order once, so that each lane of a vector belongs to one of them, and then multiplied by every row of input with
 * instructions that add up products of small numbers. Nothing is added up across lanes, and a code is never made a float32.
 *
 * A weight is `(code - zero) * scale`. Codes are multiplied alone; of each group's sum, zero times the sum of the input is
 * subtracted, and the difference is multiplied by the scale. Included once by each instruction set, after avx512.h.
 */
#ifndef MANY_H
#define MANY_H

#define BLOCK_ROWS 16
#define BLOCK_COLS 64

/* Sums that are added to in turns: products wait for the latest one in a sum of their own. */
#define CHAINS 4

/* Two tiles, by lanes. */
struct block {
    struct tile tiles[2];
    const uint8_t *bytes[BLOCK_ROWS]; /* rows of bytes; the lanes j * run + b are those of row b's j-th codes */
    int64_t row[BLOCK_ROWS];          /* of the matrix; N or more where there is none */
    const float *scale[BLOCK_ROWS], *zero[BLOCK_ROWS]; /* of some groups */
    const uint8_t *high[BLOCK_ROWS];  /* of 3-bit codes, as in `third_bits` */
    int place[BLOCK_ROWS];
    int is_whole;                     /* whether all rows exist */
};

/* Rows of bytes in a block. */
ALWAYS_INLINE int run_of(const int nbits) { return BLOCK_ROWS * (nbits == 3 ? 2 : nbits) / 8; }

/* The tile of a number, and the next one if it comes before `last`. */
static void find_block(const struct matrix *m, int64_t number, int64_t last, struct block *b)
{
    int64_t run = run_of(m->nbits), in_a_byte = BLOCK_ROWS / run;
    b->is_whole = 1;
    for (int which = 0; which < 2; which++) {
        struct tile *tile = &b->tiles[which];
        find_rows(m, number + which, tile);
        for (int64_t i = 0; i < TILE_ROWS; i++) {
            int64_t byte_row = which * run / 2 + i / in_a_byte, lane = i % in_a_byte * run + byte_row;
            if (number + which >= last)
                tile->row[i] = m->rows;
            b->bytes[byte_row] = tile->bytes[i / in_a_byte];
            b->row[lane] = tile->row[i];
            b->is_whole &= tile->row[i] < m->rows;
            if (m->nbits == 3)
                b->high[lane] = third_bits(m, tile->row[i], &b->place[lane]);
        }
    }
}

/* Scales and zeros of some groups of a block. */
static void read_block_meta(const struct matrix *m, int64_t group, int64_t count, struct block *b)
{
    int64_t run = run_of(m->nbits), in_a_byte = BLOCK_ROWS / run;
    for (int which = 0; which < 2; which++) {
        read_meta(m, group, count, &b->tiles[which]);
        for (int64_t i = 0; i < TILE_ROWS; i++) {
            int64_t lane = i % in_a_byte * run + which * run / 2 + i / in_a_byte;
            b->scale[lane] = b->tiles[which].scale[i];
            b->zero[lane] = b->tiles[which].zero[i];
        }
    }
}

/* A number of each lane. */
ALWAYS_INLINE __m512 of_lanes(const float *const *rows, int64_t group)
{
    float values[BLOCK_ROWS];
    for (int i = 0; i < BLOCK_ROWS; i++)
        values[i] = rows[i][group];
    return _mm512_loadu_ps(values);
}

/* Word i of vector j becomes word j of vector i. */
ALWAYS_INLINE void transpose(const ints *rows, ints *out)
{
    ints a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* b[i + w] has word w of four rows, in each quarter */
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
        ints even_low = _mm512_shuffle_i32x4(b[w], b[4 + w], 0x88), odd_low = _mm512_shuffle_i32x4(b[w], b[4 + w], 0xdd);
        ints even_high = _mm512_shuffle_i32x4(b[8 + w], b[12 + w], 0x88);
        ints odd_high = _mm512_shuffle_i32x4(b[8 + w], b[12 + w], 0xdd);
        out[w] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        out[8 + w] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        out[4 + w] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        out[12 + w] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

/* The codes of 64 columns, or `count`: four columns of each lane in a vector. */
ALWAYS_INLINE void codes_of(const struct block *block, int64_t column, int64_t count, ints *codes, const int nbits)
{
    const int plane = nbits == 3 ? 2 : nbits, run = run_of(nbits);
    __mmask64 wanted = count < BLOCK_COLS ? ((__mmask64)1 << count) - 1 : ~(__mmask64)0;
    ints rows[BLOCK_ROWS];
#pragma GCC unroll 16
    for (int b = 0; b < run; b++) {
        ints bytes = _mm512_maskz_loadu_epi8(wanted, block->bytes[b] + column);
#pragma GCC unroll 8
        for (int j = 0; j < 8 / plane; j++) {
            int lane = j * run + b;
            rows[lane] = field(bytes, 8 - plane * (j + 1), plane);
            if (nbits == 3)
                rows[lane] = with_third_bits(rows[lane], _mm512_maskz_loadu_epi8(wanted, block->high[lane] + column),
                                             block->place[lane]);
        }
    }
    transpose(rows, codes);
}

static void block_codes(const struct matrix *m, const struct block *block, int64_t column, int64_t count, ints *codes)
{
    switch (m->nbits) {
    case 8: codes_of(block, column, count, codes, 8); break;
    case 4: codes_of(block, column, count, codes, 4); break;
    case 3: codes_of(block, column, count, codes, 3); break;
    case 2: codes_of(block, column, count, codes, 2); break;
    default: codes_of(block, column, count, codes, 1);
    }
}

/* As memcpy, for the sizes that runs have. */
ALWAYS_INLINE void copy_run(char *out, const char *values, int64_t bytes)
{
    switch (bytes) {
    case 4: memcpy(out, values, 4); break;
    case 8: memcpy(out, values, 8); break;
    case 16: memcpy(out, values, 16); break;
    case 32: memcpy(out, values, 32); break;
    default: memcpy(out, values, 64);
    }
}

/* Write the sums (T) of each lane. */
static void write_block(const struct product *p, const struct block *b, const __m512 *sums)
{
    int64_t run = run_of(p->matrix->nbits), size = bytes_of(p->out_type), rows = p->matrix->rows;
    float values[MOST_OF_MANY * BLOCK_ROWS];
    char stored[sizeof values];
    memcpy(values, sums, (size_t)p->inputs * sizeof *sums);
    if (b->is_whole && !p->bias)
        floats_to_values(values, p->out_type, p->inputs * BLOCK_ROWS, stored);
    for (int64_t t = 0; t < p->inputs; t++) {
        if (b->is_whole && !p->bias)
            for (int64_t lane = 0; lane < BLOCK_ROWS; lane += run)
                copy_run((char *)p->out + (t * rows + b->row[lane]) * size, stored + (t * BLOCK_ROWS + lane) * size,
                         run * size);
        else
            for (int i = 0; i < BLOCK_ROWS; i++)
                if (b->row[i] < rows)
                    put(p, t, b->row[i], values[t * BLOCK_ROWS + i]);
    }
}

/* Adds the products of some columns, which begin at a group or in the middle of one, to `sums` (T). `is_end`: whether the
 * group ends there. */
typedef void add_function(const struct product *, const ints *codes, int64_t column, int64_t count, int64_t group,
                          int is_end, __m512 scale, __m512 zero, __m512 *sums);

ALWAYS_INLINE void multiply_blocks(const struct product *p, int64_t first_tile, int64_t last_tile, add_function *add)
{
    const struct matrix *m = p->matrix;
    __m512 sums[MOST_OF_MANY];
    struct block block;
    int64_t group_size = m->group_size, at_once = MOST_GROUPS * group_size;
    int64_t part = group_size < BLOCK_COLS ? group_size : BLOCK_COLS;
    for (int64_t number = first_tile; number < last_tile; number += 2) {
        find_block(m, number, last_tile, &block);
        memset(sums, 0, (size_t)p->inputs * sizeof *sums);
        for (int64_t column = 0; column < m->cols; column += BLOCK_COLS) {
            ints codes[BLOCK_COLS / 4];
            int64_t left = m->cols - column, count = left < BLOCK_COLS ? left : BLOCK_COLS;
            if (column % at_once == 0)
                read_block_meta(m, column / group_size, (left < at_once ? left : at_once) / group_size, &block);
            block_codes(m, &block, column, count, codes);
            for (int64_t k = 0; k < count; k += part) {
                int64_t group = (column + k) / group_size, within = group % MOST_GROUPS;
                add(p, codes + k / 4, column + k, part, group, (column + k + part) % group_size == 0,
                    of_lanes(block.scale, within), of_lanes(block.zero, within), sums);
            }
        }
        write_block(p, &block, sums);
    }
}

#endif
