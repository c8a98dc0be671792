// comm_peers.h: comm.host for several ranks, part of comm.h. Everything is made of messages between two ranks, so that
// whoever is missing has a name; waiting polls, so that it can end. MPI carries the messages, or TCP where there is no
// mpirun. Signs of life: the process number of a rank on this host, the connection, and a farewell that every rank
// which ends the job sends to all others (they then end without a word of their own).
#ifndef XLSTMC_COMM_PEERS_H
#define XLSTMC_COMM_PEERS_H

#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

typedef struct {
    // Begins a message to or from a rank of the world; data stays in place until test() has returned 1. Messages
    // between two ranks arrive in the order in which they were sent.
    void (*post)(int receive, int rank, int tag, void *data, size_t bytes, const char *what);
    int (*test)(const char *what);  // 1: all that was posted is done
    int (*missing)(int k);          // the rank that message k is still to come from; -1: another kind; -2: no such k
    void (*heed)(void);             // ends this process if another rank has ended the job
    int (*silent)(void);            // the first rank that does not wait as this one does; -1: not known
    void (*end_job)(int code);      // tells all others; does not return
    void (*finish)(void);           // regular end
} Carrier;
static const Carrier *carrier = NULL;

static void comm_sleep(double seconds) {
    struct timespec t = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
    nanosleep(&t, NULL);
}

// ----------------------------------------------------------------------------------------------------------------
// When a rank fails

// The alarm ends this process even if saying farewell hangs, or comm_abort_data does.
static int peer_exit_code;
static void peer_alarm(int number) {
    (void)number;
    _exit(peer_exit_code);
}
static void peer_end_job(int code) {
    peer_exit_code = code;
    signal(SIGALRM, peer_alarm);
    alarm(2);
    carrier->end_job(code);
    _exit(code);
}

// die() of a rank. What all ranks find wrong, rank 0 says: the others wait a moment for it.
static void peer_die(int code, const char *line) {
    for (int k = 0; comm.rank != 0 && k < 100; k++) {
        carrier->heed();
        comm_sleep(0.01);
    }
    if (comm.rank == 0) fprintf(stderr, "error: %s\n", line);
    else fprintf(stderr, "error: rank %d on %s: %s\n", comm.rank, comm.peers[comm.rank].host, line);
    die_clean_up();
    peer_end_job(code);
}

static int peer_is_dead(int rank) {
    const CommPeer *me = &comm.peers[comm.rank], *peer = &comm.peers[rank];
    return strcmp(me->host, peer->host) == 0 && me->pid_space == peer->pid_space && kill((pid_t)peer->pid, 0) != 0 &&
           errno == ESRCH;
}

// `rank` is the one that is missing, -1: nobody in particular. Others get a second to say the same of whom they wait
// for: who waits for a rank that waits itself does not know the culprit.
static void peer_fail(const char *what, int rank, const char *reason) {
    char missing[128] = "";
    if (rank >= 0) format_into(missing, sizeof missing, "rank %d on %s ", rank, comm.peers[rank].host);
    fflush(stdout);
    fprintf(stderr, "error: rank %d of %d on %s, step %lld, %s: %s%s; the job ends, --resume continues it\n", comm.rank,
            comm.size, comm.peers ? comm.peers[comm.rank].host : "?", (long long)comm.step, what, missing, reason);
    die_clean_up();
    comm_sleep(1);
    peer_end_job(EXIT_RUN);
}

static void peer_fail_dead(const char *what, int rank) {
    for (int k = 0; k < 10; k++) {  // it may have ended in order, with a last word
        comm_sleep(0.02);
        carrier->heed();
    }
    peer_fail(what, rank, "has died");
}

static void peer_fail_if_dead(const char *what, int rank) {
    if (rank != comm.rank && peer_is_dead(rank)) peer_fail_dead(what, rank);
}

static void peer_fail_silent(const char *what, int rank) {
    char reason[64];
    format_into(reason, sizeof reason, "was silent for %g s (--comm-timeout)", comm.timeout);
    peer_fail(what, rank, reason);
}

// ----------------------------------------------------------------------------------------------------------------
// The functions of comm.host

// Waits for all messages. At first without sleeping, since most waits are short; the core is offered to others, since
// there may be more ranks than cores.
static void peer_wait(const char *what) {
    double start = now_seconds(), looked = start, now;
    for (int round = 0; !carrier->test(what); round++) {
        if (round < 200) sched_yield();
        else comm_sleep(round < 1000 ? 2e-5 : 5e-4);
        if (round % 16 || (now = now_seconds()) - looked < 0.02) continue;
        looked = now;
        carrier->heed();
        for (int k = 0, from; (from = carrier->missing(k)) >= -1; k++) {
            if (from < 0) continue;
            if (peer_is_dead(from)) {  // what it sent before may still be on its way
                comm_sleep(0.1);
                if (carrier->test(what)) return;
                if (carrier->missing(k) == from) peer_fail_dead(what, from);
            }
            if (now - start > comm.timeout) peer_fail_silent(what, from);
        }
        if (now - start > comm.timeout) peer_fail(what, -1, "nobody took a message within --comm-timeout");
    }
}

static void peer_all_to_all(CommGroup group, const void *src, const size_t *send, void *dst, const size_t *recv,
                            const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    size_t from = 0, to = 0;
    (void)stream;
    for (int r = 0; r < ranks; from += recv[r++])
        if (r != me) carrier->post(1, comm_world_rank(group, r), group, (char *)dst + from, recv[r], what);
    from = 0;
    for (int r = 0; r < ranks; to += send[r], from += recv[r++]) {
        if (r != me) carrier->post(0, comm_world_rank(group, r), group, (char *)src + to, send[r], what);
        else memcpy((char *)dst + from, (const char *)src + to, send[r]);
    }
    peer_wait(what);
}

static void peer_all_gather(CommGroup group, const void *src, void *dst, size_t bytes, const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    (void)stream;
    for (int r = 0; r < ranks; r++)
        if (r != me) carrier->post(1, comm_world_rank(group, r), group, (char *)dst + (size_t)r * bytes, bytes, what);
    for (int r = 0; r < ranks; r++)
        if (r != me) carrier->post(0, comm_world_rank(group, r), group, (void *)src, bytes, what);
    if ((char *)dst + (size_t)me * bytes != src) memcpy((char *)dst + (size_t)me * bytes, src, bytes);
    peer_wait(what);
}

static void peer_send_recv(CommGroup group, const void *src, int to, void *dst, int from, size_t bytes,
                           const char *what, void *stream) {
    (void)stream;
    if (from >= 0) carrier->post(1, comm_world_rank(group, from), group, dst, bytes, what);
    if (to >= 0) carrier->post(0, comm_world_rank(group, to), group, (void *)src, bytes, what);
    peer_wait(what);
}

static void peer_pass_on(CommGroup group, void *all, size_t bytes, int direction, const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    (void)stream;
    for (int r = 0; r < ranks; r++)
        if (comm_passes(r, me, direction))
            carrier->post(1, comm_world_rank(group, r), group, (char *)all + (size_t)r * bytes, bytes, what);
    for (int r = 0; r < ranks; r++)
        if (comm_passes(me, r, direction))
            carrier->post(0, comm_world_rank(group, r), group, (char *)all + (size_t)me * bytes, bytes, what);
    peer_wait(what);
}

static float peer_from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static uint16_t peer_to_bf16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void peer_reduce_scatter(CommGroup group, const void *src, void *dst, size_t count, CommType type,
                                const char *what, void *stream) {
    static char *parts = NULL;  // [ranks][count]
    static size_t size = 0;
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    size_t bytes = count * comm_type_bytes(type);
    (void)stream;
    if (size < (size_t)ranks * bytes) {
        free(parts);
        size = (size_t)ranks * bytes;
        parts = (char *)xcalloc(size, 1);
    }
    for (int r = 0; r < ranks; r++)
        if (r != me) carrier->post(1, comm_world_rank(group, r), group, parts + (size_t)r * bytes, bytes, what);
    for (int r = 0; r < ranks; r++)
        if (r != me) carrier->post(0, comm_world_rank(group, r), group, (char *)src + (size_t)r * bytes, bytes, what);
    memcpy(parts + (size_t)me * bytes, (const char *)src + (size_t)me * bytes, bytes);
    peer_wait(what);
    for (size_t k = 0; k < count; k++) {  // in the order of ranks
        if (type == COMM_F32) {
            float sum = 0;
            for (int r = 0; r < ranks; r++) sum += ((const float *)(parts + (size_t)r * bytes))[k];
            ((float *)dst)[k] = sum;
        } else if (type == COMM_BF16) {
            float sum = 0;
            for (int r = 0; r < ranks; r++) sum += peer_from_bf16(((const uint16_t *)(parts + (size_t)r * bytes))[k]);
            ((uint16_t *)dst)[k] = peer_to_bf16(sum);
        } else {
            double sum = 0;
            for (int r = 0; r < ranks; r++) sum += ((const double *)(parts + (size_t)r * bytes))[k];
            ((double *)dst)[k] = sum;
        }
    }
}

static const CommOps comm_peers = {
    "peers", peer_all_gather, peer_reduce_scatter, peer_all_to_all, peer_send_recv, peer_pass_on, NULL};

static int comm_env(const char *name) {  // 0: not set
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

static CommPeer peer_me(void) {
    CommPeer me;
    struct stat info;
    memset(&me, 0, sizeof me);
    if (gethostname(me.host, sizeof me.host - 1) != 0) strcpy(me.host, "?");
    me.pid = (int64_t)getpid();
    if (stat("/proc/self/ns/pid", &info) == 0) me.pid_space = (uint64_t)info.st_ino;
    return me;
}

// Once comm.rank, comm.size and comm.peers are there
static void peers_start(const Carrier *by) {
    comm.dp_size = comm.size;
    comm.dp_rank = comm.rank;
    comm.local_rank = comm.local_size = 0;
    for (int r = 0; r < comm.size; r++) {
        if (strcmp(comm.peers[r].host, comm.peers[comm.rank].host) != 0) continue;
        comm.local_rank += r < comm.rank;
        comm.local_size++;
    }
    carrier = by;
    if (comm.size == 1) return;
    comm.host = comm.data = &comm_peers;
    die_in_world = peer_die;
}

// ----------------------------------------------------------------------------------------------------------------
// MPI

#ifdef USE_MPI
enum { COMM_TAG_FAREWELL = NUM_COMM_GROUPS, COMM_TAG_WAITING };
enum { COMM_MESSAGE = 1 << 30 };  // bytes: MPI counts with int

static struct {
    MPI_Request *requests;
    int *from;  // rank in the world a request receives from, -1: it sends
    int count, capacity;
} mpi_pending;

static void mpi_check(int code, const char *what) {
    char reason[MPI_MAX_ERROR_STRING];
    int len;
    if (code == MPI_SUCCESS) return;
    if (MPI_Error_string(code, reason, &len) != MPI_SUCCESS) strcpy(reason, "unknown error of MPI");
    peer_fail(what, -1, reason);
}

static void mpi_post(int receive, int rank, int tag, void *data, size_t bytes, const char *what) {
    for (size_t at = 0; at < bytes; at += COMM_MESSAGE) {
        int n = bytes - at < COMM_MESSAGE ? (int)(bytes - at) : (int)COMM_MESSAGE, k = mpi_pending.count++;
        if (k == mpi_pending.capacity) {
            mpi_pending.capacity = 2 * k + 16;
            size_t capacity = (size_t)mpi_pending.capacity;
            mpi_pending.requests = (MPI_Request *)realloc(mpi_pending.requests, capacity * sizeof(MPI_Request));
            mpi_pending.from = (int *)realloc(mpi_pending.from, capacity * sizeof(int));
            if (!mpi_pending.requests || !mpi_pending.from) die(EXIT_RUN, "out of memory: %zu messages", capacity);
        }
        mpi_pending.from[k] = receive ? rank : -1;
        MPI_Request *request = &mpi_pending.requests[k];
        if (receive) mpi_check(MPI_Irecv((char *)data + at, n, MPI_BYTE, rank, tag, MPI_COMM_WORLD, request), what);
        else mpi_check(MPI_Isend((char *)data + at, n, MPI_BYTE, rank, tag, MPI_COMM_WORLD, request), what);
    }
}

static int mpi_test(const char *what) {
    int done = 0;
    mpi_check(MPI_Testall(mpi_pending.count, mpi_pending.requests, &done, MPI_STATUSES_IGNORE), what);
    if (done) mpi_pending.count = 0;
    return done;
}

static int mpi_missing(int k) {
    if (k >= mpi_pending.count) return -2;
    return mpi_pending.requests[k] == MPI_REQUEST_NULL ? -1 : mpi_pending.from[k];
}

static void mpi_heed(void) {
    int flag = 0, code = EXIT_RUN;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, COMM_TAG_FAREWELL, MPI_COMM_WORLD, &flag, &status) != 0 || !flag) return;
    MPI_Recv(&code, 1, MPI_INT, status.MPI_SOURCE, COMM_TAG_FAREWELL, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    fflush(stderr);
    _exit(code);
}

// Ranks whose time is over tell each other so.
static int mpi_silent(void) {
    int *waits = (int *)xcalloc((size_t)comm.size, sizeof(int)), flag = 0, silent = -1;
    MPI_Request request;
    MPI_Status status;
    for (int r = 0; r < comm.size; r++)
        if (r != comm.rank && MPI_Isend(&flag, 0, MPI_INT, r, COMM_TAG_WAITING, MPI_COMM_WORLD, &request) == 0)
            MPI_Request_free(&request);
    for (int k = 0; k < 100; k++, comm_sleep(0.01)) {
        mpi_heed();
        if (MPI_Iprobe(MPI_ANY_SOURCE, COMM_TAG_WAITING, MPI_COMM_WORLD, &flag, &status) != 0 || !flag) continue;
        MPI_Recv(&flag, 0, MPI_INT, status.MPI_SOURCE, COMM_TAG_WAITING, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        waits[status.MPI_SOURCE] = 1;
    }
    for (int r = comm.size - 1; r >= 0; r--)
        if (r != comm.rank && !waits[r]) silent = r;
    free(waits);
    return silent;
}

// MPI_Abort makes mpirun stop whoever does not listen.
static void mpi_end_job(int code) {
    MPI_Request request;
    for (int r = 0; r < comm.size; r++)
        if (r != comm.rank && MPI_Isend(&code, 1, MPI_INT, r, COMM_TAG_FAREWELL, MPI_COMM_WORLD, &request) == 0)
            MPI_Request_free(&request);
    for (int k = 0, flag; k < 20; k++) {  // lets the notes leave
        MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &flag, MPI_STATUS_IGNORE);
        comm_sleep(1e-3);
    }
    if (comm_abort_data) comm_abort_data();
    MPI_Abort(MPI_COMM_WORLD, code);
}

static void mpi_finish(void) { MPI_Finalize(); }

static void mpi_start(void) {
    static const Carrier by_mpi = {mpi_post, mpi_test, mpi_missing, mpi_heed, mpi_silent, mpi_end_job, mpi_finish};
    CommPeer me = peer_me();
    if (MPI_Init(NULL, NULL) != MPI_SUCCESS) die(EXIT_RUN, "MPI does not start; does mpirun belong to this MPI?");
    carrier = &by_mpi;
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank), "start");
    mpi_check(MPI_Comm_size(MPI_COMM_WORLD, &comm.size), "start");
    comm.peers = (CommPeer *)xcalloc((size_t)comm.size, sizeof *comm.peers);
    mpi_check(MPI_Allgather(&me, sizeof me, MPI_BYTE, comm.peers, sizeof me, MPI_BYTE, MPI_COMM_WORLD), "start");
    peers_start(&by_mpi);
}
#endif

#include "comm_tcp.h"

#endif
