/* Memory that is read and not used: how fast the processor can get at weights, with nothing to compute.
 *
 * Included once by each instruction set, after LANES and ALWAYS_INLINE. Loads are as wide as those of the kernels.
 */

typedef uint64_t words __attribute__((vector_size(4 * LANES)));

/* Bytes fetched before they are read. */
#define READ_AHEAD 1024

/* All words of `nbytes` combined by xor; they are read as `streams` rows that lie one after another, side by side. Bytes
 * that do not fill a line in each row are not read. */
ALWAYS_INLINE uint64_t read_rows(const char *memory, int64_t nbytes, const int streams)
{
    int64_t row = nbytes / streams / 64 * 64;
    words seen[MOST_STREAMS];
    memset(seen, 0, sizeof seen);
    for (int64_t k = 0; k < row; k += 64) {
#pragma GCC unroll 8
        for (int s = 0; s < streams; s++) {
            const char *at = memory + s * row + k;
            __builtin_prefetch(at + READ_AHEAD, 0, 3);
#pragma GCC unroll 4
            for (size_t i = 0; i < 64; i += sizeof(words)) {
                words found;
                memcpy(&found, at + i, sizeof found);
                seen[s] ^= found;
            }
        }
    }
    uint64_t all = 0;
    for (int s = 0; s < streams; s++)
        for (size_t i = 0; i < sizeof(words) / 8; i++)
            all ^= seen[s][i];
    return all;
}

static uint64_t read_memory(const char *memory, int64_t nbytes, int streams)
{
    if (streams == 1)
        return read_rows(memory, nbytes, 1);
    if (streams == 2)
        return read_rows(memory, nbytes, 2);
    if (streams == 4)
        return read_rows(memory, nbytes, 4);
    return read_rows(memory, nbytes, MOST_STREAMS);
}
