/* Preloaded into a process, adds an offset to its wall clock, and to nothing else.

   The offset, in whole seconds, is the first 8 bytes of the file PDSERVE_WALLCLOCK, mapped by
   all processes of a cluster, so that all of them jump at once.  Monotonic time is untouched.
   A wait until a wall-clock time is given to the kernel in the kernel's own time, as a caller
   that has read the shifted clock means it; one begun before a jump keeps its length. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t none;
static const volatile int64_t *shared = &none;

__attribute__((constructor)) static void map_offset(void)
{
    const char *path = getenv("PDSERVE_WALLCLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, 8, PROT_READ, MAP_SHARED, file, 0);
    if (page == MAP_FAILED)
        abort();
    shared = page;
    close(file);
}

static int is_wall(clockid_t clock)
{
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (status == 0 && is_wall(clock))
        now->tv_sec += *shared;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec fine;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

static struct timespec unshifted(const struct timespec *until)
{
    struct timespec true_until = *until;
    true_until.tv_sec -= *shared;
    return true_until;
}

int pthread_cond_timedwait(
    pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until)
{
    /* glibc keeps which clock a condition goes by in this bit. */
    clockid_t clock = condition->__data.__wrefs & 2 ? CLOCK_MONOTONIC : CLOCK_REALTIME;
    struct timespec true_until = is_wall(clock) ? unshifted(until) : *until;
    return pthread_cond_clockwait(condition, mutex, clock, &true_until);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until)
{
    struct timespec true_until = unshifted(until);
    return sem_clockwait(semaphore, CLOCK_REALTIME, &true_until);
}

long syscall(long number, ...)
{
    static long (*real)(long, long, long, long, long, long, long);
    va_list list;
    long a[6];
    struct timespec true_until;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (!real)
        real = (long (*)(long, long, long, long, long, long, long))dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET
        && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
        true_until = unshifted((const struct timespec *)a[3]);
        a[3] = (long)&true_until;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
