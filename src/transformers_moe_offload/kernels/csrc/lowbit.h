/* What the kernels are told: a packed matrix, the rows it multiplies, and where the products go.
 *
 * The layout of a matrix is that of packed.py. Letters: T rows of input, N rows and K columns of the matrix, g group
 * size, G = K / g groups in a row, R rows of bytes.
 */
#ifndef LOWBIT_H
#define LOWBIT_H

#include <stdint.h>

#define META_BLOCK 128 /* as in packed.py */

enum float_type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

static inline int64_t bytes_of(enum float_type type) { return type == FLOAT32 ? 4 : 2; }

/* `nbits` of a matrix that is not packed: its `codes` are floats (N, K) of a type, and it has no scales and zeros. */
#define PLAIN 16

struct matrix {
    int64_t rows, cols;
    int nbits, group_size, meta_nbits;
    enum float_type type;                    /* of PLAIN matrices */
    const uint8_t *codes, *high;             /* high: of 3-bit codes only */
    const void *scale, *zero;                /* uint16_t holding float16, or uint8_t */
    const uint16_t *scale_range, *zero_range; /* of 8-bit scales and zeros only */
};

/* Rows of input as int8: x is about `scale[k / g] * codes[k]`. Columns and groups are padded with zeros. */
struct rounded_rows {
    int64_t cols, groups;
    int8_t *codes;      /* (T, cols) */
    float *scale, *sum; /* (T, groups); sum is scale times the sum of the group's codes */
};

/* Rows of input in bfloat16, and the sum of each group of theirs. */
struct bfloat_rows {
    const uint16_t *rows; /* (T, K) */
    int64_t groups;
    float *sum; /* (T, groups) */
};

struct product {
    const struct matrix *matrix;
    int64_t inputs;              /* T */
    const float *rows;           /* (T, K), for `exact` */
    struct rounded_rows rounded; /* for `rounded` and `many_rounded` */
    struct bfloat_rows bfloats;  /* for `many_bfloats`, else NULL */
    const float *bias;           /* (N), added to products; NULL where there is none */
    void *out;                   /* (T, N) */
    enum float_type out_type;
};

/* What is computed between the two products of an expert, as kernels/grouped.py says; `count` results are made of as
 * many products, or of a gate and an up each. */
struct activation {
    int64_t function; /* 0 silu, 1 gelu, 2 gelu_tanh, 3 relu, 4 relu2 */
    int64_t has_gate, is_interleaved, has_limit;
    double limit, slope, shift;
};

/* How rows are normalised, as norm.h says. */
struct norm {
    double epsilon, shift;
    int rounds;
};

/* Some tokens of a text, to which heads that share keys and values attend. */
struct span {
    enum float_type type;
    int64_t head_dim, heads, count; /* heads: HEADS_AT_ONCE at most; count: of tokens */
    float scaling;
    const char *keys, *values;      /* (count, D) */
    int64_t key_step, value_step;   /* bytes between tokens */
    const float *queries;           /* (heads, D) */
    float *most, *total;            /* of each head, `most_step` apart: its largest score, the sum of its weights */
    float *sums;                    /* of each head, `sums_step` apart: of values by weight (D) */
    int64_t most_step, sums_step;
};

#define HEADS_AT_ONCE 4
#define MOST_TOKENS_AT_ONCE 256

/* Columns that are added up at once. */
#define WEIGHED_AT_ONCE 512

/* Most experts of a token, and most pairs, in one step of a layer. */
#define MOST_CHOICES 64
#define MOST_PAIRS 512

/* The rows of a matrix are multiplied a tile at a time: as many rows of bytes as hold TILE_ROWS rows of codes. */
#define TILE_ROWS 8

/* Most rows of input that one call to a kernel takes, and to those for many. */
#define MOST_INPUTS 48
#define MOST_OF_MANY 128

/* With more rows than that, kernels for many are used where there are some: a token has the same bits in a decode step and
 * beside up to seven others. */
#define FEW_INPUTS 8

/* Most rows of memory that are read side by side, to measure how fast that is. */
#define MOST_STREAMS 8

/* The kernels of one instruction set. */
struct kernels {
    const char *name;
    void (*exact)(const struct product *, int64_t first_tile, int64_t last_tile);
    void (*rounded)(const struct product *, int64_t first_tile, int64_t last_tile);
    void (*plain)(const struct product *, int64_t first_tile, int64_t last_tile); /* of PLAIN matrices */
    void (*round)(const struct product *, const float *rows);
    void (*to_float)(const void *values, enum float_type, int64_t count, float *out);
    void (*activate)(const struct activation *, const float *gates, const float *ups, int64_t step, int64_t count,
                     float *out);
    void (*weigh)(const float *const *rows, const float *weights, int64_t count, int64_t first, int64_t last,
                  void *out, enum float_type);
    void (*norm)(const float *row, const float *weight, int64_t cols, const struct norm *, enum float_type, float *out);
    void (*from_float)(const float *values, enum float_type, int64_t count, void *out);
    void (*softmax)(float *values, int64_t count);
    void (*sigmoid)(float *values, int64_t count);
    void (*attend)(const struct span *);
    uint64_t (*read_memory)(const char *memory, int64_t nbytes, int streams);
    /* Of packed matrices and many rows; NULL where there are none. */
    void (*many_rounded)(const struct product *, int64_t first_tile, int64_t last_tile);
    void (*many_bfloats)(const struct product *, int64_t first_tile, int64_t last_tile);
    void (*sum_bfloats)(const uint16_t *values, int64_t groups, int group_size, float *out);
};

extern const struct kernels portable_kernels;
#if defined(__x86_64__)
extern const struct kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
void many_bfloats(const struct product *, int64_t first_tile, int64_t last_tile); /* of avx512_bf16.c, as is */
void sum_bfloats(const uint16_t *values, int64_t groups, int group_size, float *out);
#endif
#if defined(__aarch64__)
extern const struct kernels neon_kernels;
#if !defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD)
#define HAS_NEON_DOT /* before 16, clang only knows the instructions if all of a file may use them */
extern const struct kernels neon_dot_kernels;
#endif
#endif

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Bits of a code in the plane `codes`: 3-bit codes have their third bit in `high`. */
static inline int plane_nbits(int nbits) { return nbits == 3 ? 2 : nbits; }

static inline int64_t byte_rows(const struct matrix *m) { return ceil_div(m->rows, 8 / plane_nbits(m->nbits)); }

static inline int64_t tile_byte_rows(const struct matrix *m) { return TILE_ROWS * plane_nbits(m->nbits) / 8; }

#endif
