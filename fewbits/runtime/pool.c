/* A small pool of threads that share the rows of one call (included by kernels.c).
 *
 * Not OpenMP: torch wheels carry a libgomp of their own, and a second one would be a second set of spinning threads.
 * A call hands out chunks of rows through an atomic counter, and waits only for the workers that joined in before the
 * rows ran out: on a busy machine a worker that is not scheduled costs nothing. A second caller that finds the pool
 * busy works alone.
 */
#include <sched.h>
#include <stdatomic.h>

#define MAX_THREADS 64
#define UNIT_ROWS 4         /* rows that the vector kernels compute together */
#define WORK_PER_THREAD 200000 /* products below which waking another thread costs more than it saves */
#define SPIN 2000 /* pauses (some 30 microseconds) before a thread sleeps: the next layer comes sooner */

typedef void (*row_task)(void *arg, int64_t begin, int64_t end);

static struct {
    pthread_mutex_t owner, lock;
    pthread_cond_t wake;
    int workers; /* threads that exist */
    int fork_handler;
    atomic_uint call; /* counts calls; a change wakes the workers */
    int wanted;       /* workers that may join this call; 0 once its rows have run out */
    row_task task;
    void *arg;
    int64_t rows, chunk;
    atomic_llong next;
    atomic_int running;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

INLINE void pause_cpu(void) {
#if FB_X86
    _mm_pause();
#endif
}

static void take_chunks(void) {
    for (;;) {
        int64_t begin = atomic_fetch_add(&pool.next, pool.chunk);
        if (begin >= pool.rows) return;
        int64_t end = begin + pool.chunk < pool.rows ? begin + pool.chunk : pool.rows;
        pool.task(pool.arg, begin, end);
    }
}

static void *worker(void *argument) {
    int index = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPIN && atomic_load(&pool.call) == seen; i++) pause_cpu();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.call) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.call);
        int join = index < pool.wanted;
        if (join) atomic_fetch_add(&pool.running, 1);
        pthread_mutex_unlock(&pool.lock);
        if (!join) continue;
        take_chunks();
        atomic_fetch_sub(&pool.running, 1);
    }
    return NULL;
}

/* The child of a fork has none of the threads. */
static void forget_threads(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.call, 0);
}

static void grow(int count) {
    if (!pool.fork_handler) pool.fork_handler = pthread_atfork(NULL, NULL, forget_threads) == 0;
    while (pool.workers < count) {
        pthread_t thread;
        /* it waits for the lock that we hold, so that the first call it sees is ours */
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.workers)) return;
        pthread_detach(thread);
        pool.workers++;
    }
}

/* task over rows 0 .. rows, with `work` products a row; chunks are multiples of `unit` rows. */
static void pool_run(row_task task, void *arg, int64_t rows, int64_t work, int64_t unit, int threads) {
    int64_t useful = rows * work / WORK_PER_THREAD;
    int64_t count = threads < useful ? threads : useful;
    if (count > MAX_THREADS) count = MAX_THREADS;
    if (count < 2 || pthread_mutex_trylock(&pool.owner)) {
        task(arg, 0, rows);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    grow((int)count - 1);
    pool.wanted = count - 1 < pool.workers ? (int)count - 1 : pool.workers;
    pool.task = task, pool.arg = arg, pool.rows = rows;
    pool.chunk = (rows / (count * 8) / unit + 1) * unit;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.running, 0);
    atomic_fetch_add(&pool.call, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_chunks();
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0;
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; atomic_load(&pool.running) > 0; i++) {
        if (i < SPIN) pause_cpu();
        else sched_yield();
    }
    pthread_mutex_unlock(&pool.owner);
}
