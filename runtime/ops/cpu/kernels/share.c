#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "common.h"

/* Threads that share the tasks of a loop: each claims some, and the caller waits for claimed tasks alone.
 *
 * OpenMP's caller waits until every thread has come, also one whose processor does other work at the moment: beside other
 * processes that is most of the time of a token. Here a thread without a processor claims nothing.
 *
 * next: the number of the loop in the upper half, the first task that nobody has claimed in the lower one. A claim is one
 * exchange of it, which fails when the loop is over; what was read of a loop before a claim therefore belongs to it. */
#define SPINS 500               /* looks, some 10 microseconds, until a thread that waits goes to sleep */
#define MOST 256                /* threads */
#define CLOSED UINT32_MAX       /* lower half of `next` between two loops */

static struct {
    _Alignas(64) _Atomic uint64_t next;
    _Alignas(64) _Atomic uint32_t done;         /* tasks */
    _Atomic int caller_sleeps;
    _Alignas(64) _Atomic int sleeping;          /* helpers */
    _Alignas(64) _Atomic(Task) task;
    _Atomic(void *) arguments;
    _Atomic uint32_t count, threads;            /* of tasks, and of threads that may claim them, the caller's too */
} loop;

static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;
static int helpers;             /* threads that were started, numbered from 1 */

static void sleep_while(void *word, uint32_t value) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0); }

static void wake(void *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

static void *number_word(void) { return (char *)&loop.next + 4; }

/* Does tasks until all are claimed. Returns the number of the loop. First claims are long, because weights are read fastest in
 * the order of memory, and the last are short, so that all threads end together. */
static uint32_t take_part(uint32_t thread) {
    uint64_t seen = atomic_load(&loop.next);
    for (;;) {
        Task task = atomic_load_explicit(&loop.task, memory_order_acquire);
        void *arguments = atomic_load_explicit(&loop.arguments, memory_order_acquire);
        uint32_t count = atomic_load_explicit(&loop.count, memory_order_acquire);
        uint32_t threads = atomic_load_explicit(&loop.threads, memory_order_acquire);
        uint32_t from = (uint32_t)seen;
        if (from >= count || thread >= threads) return seen >> 32;
        uint32_t claimed = (count - from) / (2 * threads) + 1;
        if (!atomic_compare_exchange_weak(&loop.next, &seen, seen + claimed)) continue;
        task(arguments, from, from + claimed);
        if (atomic_fetch_add(&loop.done, claimed) + claimed == count && atomic_load(&loop.caller_sleeps)) wake(&loop.done);
        seen += claimed;
    }
}

static void *help(void *thread) {
    for (;;) {
        uint32_t last = take_part((uintptr_t)thread);
        int looks = 0;
        for (; looks < SPINS && atomic_load(&loop.next) >> 32 == last; looks++) _mm_pause();
        if (looks < SPINS) continue;
        atomic_fetch_add(&loop.sleeping, 1);
        sleep_while(number_word(), last);
        atomic_fetch_sub(&loop.sleeping, 1);
    }
    return NULL;
}

static void wait_for_claimed(uint32_t count) {
    for (int looks = 0; looks < SPINS; looks++) {
        if (atomic_load(&loop.done) == count) return;
        _mm_pause();
    }
    atomic_store(&loop.caller_sleeps, 1);
    for (uint32_t done; (done = atomic_load(&loop.done)) != count;) sleep_while(&loop.done, done);
    atomic_store(&loop.caller_sleeps, 0);
}

/* A forked process has no helpers, and perhaps the lock of a caller that it has not. */
static void after_fork(void) {
    helpers = 0;
    memset(&loop, 0, sizeof loop);
    pthread_mutex_init(&one_caller, NULL);
}

/* Where OpenMP's threads are bound to places, the caller is bound to one, and its threads would all be there. */
static void bind_to_place(pthread_t thread, int number) {
    int processors[CPU_SETSIZE], places = omp_get_num_places();
    if (!places || omp_get_proc_bind() == omp_proc_bind_false) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    omp_get_place_proc_ids(number % places, processors);
    for (int i = 0; i < omp_get_place_num_procs(number % places); i++) CPU_SET(processors[i], &set);
    pthread_setaffinity_np(thread, sizeof set, &set);
}

static void start_helpers(int wanted) {
    static int registered;
    if (!registered) registered = !pthread_atfork(NULL, NULL, after_fork);
    for (pthread_t thread; helpers < wanted; helpers++) {
        if (pthread_create(&thread, NULL, help, (void *)(uintptr_t)(helpers + 1))) return;
        bind_to_place(thread, helpers + 1);
        pthread_detach(thread);
    }
}

/* task(arguments, from, to) for parts of 0..count, by as many threads as OpenMP would take */
void share(uint32_t count, Task task, void *arguments) {
    int threads = omp_get_max_threads();
    if (threads > MOST) threads = MOST;
    if (threads == 1 || count == 1 || pthread_mutex_trylock(&one_caller)) { task(arguments, 0, count); return; }
    if (helpers < threads - 1) start_helpers(threads - 1);
    uint64_t number = (atomic_load(&loop.next) >> 32) + 1;
    atomic_store_explicit(&loop.done, 0, memory_order_release);
    atomic_store_explicit(&loop.task, task, memory_order_release);
    atomic_store_explicit(&loop.arguments, arguments, memory_order_release);
    atomic_store_explicit(&loop.count, count, memory_order_release);
    atomic_store_explicit(&loop.threads, threads, memory_order_release);
    atomic_store(&loop.next, number << 32);
    if (atomic_load(&loop.sleeping)) wake(number_word());
    take_part(0);
    wait_for_claimed(count);
    atomic_store(&loop.next, number << 32 | CLOSED);
    pthread_mutex_unlock(&one_caller);
}
