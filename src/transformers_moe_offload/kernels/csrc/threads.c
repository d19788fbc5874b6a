/* Work that is shared out among the threads of torch's OpenMP runtime, which are awake between torch's operations: threads
 * of our own would spin beside them.
 *
 * A team always has as many threads as torch's own: the runtime ends threads that a smaller team has no use for, and
 * starts new ones for the next team that is larger, which takes ten times as long as a product. Threads that are too many
 * leave at once.
 */

#include <stdatomic.h>
#include <stddef.h>

#include "work.h"

static parallel_function *parallel;
static int (*most_threads)(void);

/* GOMP_parallel and omp_get_max_threads of the runtime, or NULL where there is none. */
EXPORT void moe_set_parallel(parallel_function *function, int (*max_threads)(void))
{
    parallel = max_threads ? function : NULL;
    most_threads = max_threads;
}

struct crew {
    void (*work)(void *);
    void *data;
    int wanted;
    atomic_int entered;
};

static void enter(void *data)
{
    struct crew *crew = data;
    if (atomic_fetch_add_explicit(&crew->entered, 1, memory_order_relaxed) < crew->wanted)
        crew->work(crew->data);
}

void on_threads(int threads, void (*work)(void *), void *data)
{
    if (threads <= 1 || !parallel) {
        work(data);
        return;
    }
    struct crew crew = {.work = work, .data = data, .wanted = threads};
    int team = most_threads();
    atomic_init(&crew.entered, 0);
    parallel(enter, &crew, (unsigned)(team > threads ? team : threads), 0);
}
