// comm.h: the processes ("ranks") that train one model together, and what they tell each other.
//
//   world = DP x SP     SP ranks share one sequence, neighbours first: sp_rank = rank % SP; the DP = size / SP groups of
//                       them have different sequences. Weights and gradients belong to the world (doc/parallel.md).
//
// A program has two back ends, each a CommOps: comm.host moves host memory (losses, checksums, decisions), comm.data
// what the model is made of. On the CPU both are the same: "self" with one rank, else "mpi". The CUDA trainer takes
// comm.host from here and sets comm.data to functions on NCCL, whose `stream` is the CUDA stream to work on.
//
// Every rank calls the same functions in the same order, from one thread. Sums are taken in the order of ranks, so the
// same command gives the same bits. A rank that dies or is silent for --comm-timeout seconds ends the whole job, with
// one line that names host, rank, step and what was waited for; every rank then ends with an exit code other than 0.
#ifndef XLSTMC_COMM_H
#define XLSTMC_COMM_H

#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

#include "util.h"

typedef enum { COMM_WORLD, COMM_SP, NUM_COMM_GROUPS } CommGroup;
typedef enum { COMM_F32, COMM_F64 } CommType;

// What a back end does. Ranks are those of the group; `what` names the call in messages; stream: of a device, else
// NULL.
typedef struct {
    const char *name;
    // dst [ranks][bytes]: what every rank has at src. In place: src = dst + rank * bytes.
    void (*all_gather)(CommGroup group, const void *src, void *dst, size_t bytes, const char *what, void *stream);
    // dst [count]: the sum over ranks of the part of src [ranks][count] that is this rank's. dst may be that part.
    void (*reduce_scatter)(CommGroup group, const void *src, void *dst, size_t count, CommType type, const char *what,
                           void *stream);
    // src: send[r] bytes for every rank r, dst: recv[r] bytes from it, both one behind the other.
    void (*all_to_all)(CommGroup group, const void *src, const size_t *send, void *dst, const size_t *recv,
                       const char *what, void *stream);
    // bytes to rank `to` and as many from rank `from`; -1: to or from nobody.
    void (*send_recv)(CommGroup group, const void *src, int to, void *dst, int from, size_t bytes, const char *what,
                      void *stream);
} CommOps;

typedef struct {
    char host[64];
    int64_t pid;
    uint64_t pid_space;  // process numbers mean the same where this and the host are equal
} CommPeer;

typedef struct {
    int rank, size;              // in the world
    int dp_rank, dp_size;        // which group of SP ranks, of how many
    int sp_rank, sp_size;        // which segment of the sequence, of how many
    int local_rank, local_size;  // among the ranks of this host
    double timeout;              // seconds; --comm-timeout
    int64_t step;                // for messages
    const CommOps *host, *data;
    CommPeer *peers;  // [size]; NULL with one rank
} Comm;

// ----------------------------------------------------------------------------------------------------------------
// One rank

static void self_all_gather(CommGroup group, const void *src, void *dst, size_t bytes, const char *what, void *stream) {
    (void)group, (void)what, (void)stream;
    if (src != dst) memcpy(dst, src, bytes);
}
static void self_reduce_scatter(CommGroup group, const void *src, void *dst, size_t count, CommType type,
                                const char *what, void *stream) {
    self_all_gather(group, src, dst, count * (type == COMM_F32 ? sizeof(float) : sizeof(double)), what, stream);
}
static void self_all_to_all(CommGroup group, const void *src, const size_t *send, void *dst, const size_t *recv,
                            const char *what, void *stream) {
    (void)recv;
    self_all_gather(group, src, dst, send[0], what, stream);
}
static void self_send_recv(CommGroup group, const void *src, int to, void *dst, int from, size_t bytes,
                           const char *what, void *stream) {
    (void)group, (void)src, (void)to, (void)dst, (void)from, (void)bytes, (void)what, (void)stream;
}

// Ends what comm.data has under way on a device, before the job ends because of another rank; NULL: nothing to end
static void (*comm_abort_data)(void) MAYBE_UNUSED = NULL;

static const CommOps comm_self = {"self", self_all_gather, self_reduce_scatter, self_all_to_all, self_send_recv};
static Comm comm = {0, 1, 0, 1, 0, 1, 0, 1, 600, 0, &comm_self, &comm_self, NULL};

MAYBE_UNUSED
static int comm_group_size(CommGroup group) { return group == COMM_WORLD ? comm.size : comm.sp_size; }
MAYBE_UNUSED
static int comm_group_rank(CommGroup group) { return group == COMM_WORLD ? comm.rank : comm.sp_rank; }
// Rank in the world of a rank of the group.
MAYBE_UNUSED
static int comm_world_rank(CommGroup group, int rank) {
    return group == COMM_WORLD ? rank : comm.dp_rank * comm.sp_size + rank;
}

// ----------------------------------------------------------------------------------------------------------------
// MPI. Everything is made of messages between two ranks, so that whoever is missing has a name; waiting polls, so that
// it can end. Signals of life: the process number of a rank on this host, and a note that every rank which ends in
// order sends to all others (they then end without a word of their own).

#ifdef USE_MPI
enum { COMM_TAG_FAREWELL = NUM_COMM_GROUPS, COMM_TAG_WAITING };
enum { COMM_MESSAGE = 1 << 30 };  // bytes: MPI counts with int

typedef struct {
    MPI_Request *requests;
    int *from;  // rank in the world a request receives from, -1: it sends
    int count, capacity;
} MpiWait;
static MpiWait mpi_pending;

static void comm_sleep(double seconds) {
    struct timespec t = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
    nanosleep(&t, NULL);
}

// Ends the job: the other ranks are told, MPI_Abort makes mpirun stop whoever does not listen. The alarm ends this
// process even if that hangs.
static void mpi_end_job(int code) {
    MPI_Request request;
    signal(SIGALRM, SIG_DFL);
    alarm(5);
    for (int r = 0; r < comm.size; r++)
        if (r != comm.rank && MPI_Isend(&code, 1, MPI_INT, r, COMM_TAG_FAREWELL, MPI_COMM_WORLD, &request) == 0)
            MPI_Request_free(&request);
    for (int k = 0, flag; k < 20; k++) {  // lets the notes leave
        MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &flag, MPI_STATUS_IGNORE);
        comm_sleep(1e-3);
    }
    if (comm_abort_data) comm_abort_data();
    MPI_Abort(MPI_COMM_WORLD, code);
    _exit(code);
}

// Ends this process without a word if another rank has ended the job.
static void mpi_heed_farewell(void) {
    int flag = 0, code = EXIT_RUN;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, COMM_TAG_FAREWELL, MPI_COMM_WORLD, &flag, &status) != 0 || !flag) return;
    MPI_Recv(&code, 1, MPI_INT, status.MPI_SOURCE, COMM_TAG_FAREWELL, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    fflush(stderr);
    _exit(code);
}

// die() of a rank. What all ranks find wrong, rank 0 says: the others wait a moment for it.
static void mpi_die(int code, const char *line) {
    for (int k = 0; comm.rank != 0 && k < 100; k++) {
        mpi_heed_farewell();
        comm_sleep(0.01);
    }
    if (comm.rank == 0) fprintf(stderr, "error: %s\n", line);
    else fprintf(stderr, "error: rank %d on %s: %s\n", comm.rank, comm.peers[comm.rank].host, line);
    die_clean_up();
    mpi_end_job(code);
}

static int mpi_peer_is_dead(int rank) {
    const CommPeer *me = &comm.peers[comm.rank], *peer = &comm.peers[rank];
    return strcmp(me->host, peer->host) == 0 && me->pid_space == peer->pid_space && kill((pid_t)peer->pid, 0) != 0 &&
           errno == ESRCH;
}

// `rank` is the one that is missing, -1: MPI itself failed. Others get a second to say the same of whom they wait for:
// who waits for a rank that waits itself does not know the culprit.
static void mpi_fail(const char *what, int rank, const char *reason) {
    char missing[128] = "";
    if (rank >= 0) format_into(missing, sizeof missing, "rank %d on %s ", rank, comm.peers[rank].host);
    fflush(stdout);
    fprintf(stderr, "error: rank %d of %d on %s, step %lld, %s: %s%s; the job ends, --resume continues it\n", comm.rank,
            comm.size, comm.peers ? comm.peers[comm.rank].host : "?", (long long)comm.step, what, missing, reason);
    die_clean_up();
    comm_sleep(1);
    mpi_end_job(EXIT_RUN);
}

static void mpi_fail_if_dead(const char *what, int rank) {
    if (rank == comm.rank || !mpi_peer_is_dead(rank)) return;
    comm_sleep(0.1);
    mpi_heed_farewell();  // it may have ended in order, with a last word
    mpi_fail(what, rank, "has died");
}

static void mpi_fail_silent(const char *what, int rank) {
    char reason[64];
    format_into(reason, sizeof reason, "was silent for %g s (--comm-timeout)", comm.timeout);
    mpi_fail(what, rank, reason);
}

// The first rank that does not wait as this one does, -1: all do. Ranks whose time is over tell each other so.
static int mpi_silent_rank(void) {
    int *waits = (int *)xcalloc((size_t)comm.size, sizeof(int)), flag = 0, silent = -1;
    MPI_Request request;
    MPI_Status status;
    for (int r = 0; r < comm.size; r++)
        if (r != comm.rank && MPI_Isend(&flag, 0, MPI_INT, r, COMM_TAG_WAITING, MPI_COMM_WORLD, &request) == 0)
            MPI_Request_free(&request);
    for (int k = 0; k < 100; k++, comm_sleep(0.01)) {
        mpi_heed_farewell();
        if (MPI_Iprobe(MPI_ANY_SOURCE, COMM_TAG_WAITING, MPI_COMM_WORLD, &flag, &status) != 0 || !flag) continue;
        MPI_Recv(&flag, 0, MPI_INT, status.MPI_SOURCE, COMM_TAG_WAITING, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        waits[status.MPI_SOURCE] = 1;
    }
    for (int r = comm.size - 1; r >= 0; r--)
        if (r != comm.rank && !waits[r]) silent = r;
    free(waits);
    return silent;
}

static void mpi_check(int code, const char *what) {
    char reason[MPI_MAX_ERROR_STRING];
    int len;
    if (code == MPI_SUCCESS) return;
    if (MPI_Error_string(code, reason, &len) != MPI_SUCCESS) strcpy(reason, "unknown error of MPI");
    mpi_fail(what, -1, reason);
}

// One message of any length: requests are added to mpi_pending.
static void mpi_post(int receive, int rank, int tag, void *data, size_t bytes, const char *what) {
    MpiWait *w = &mpi_pending;
    for (size_t at = 0; at < bytes; at += COMM_MESSAGE) {
        int n = bytes - at < COMM_MESSAGE ? (int)(bytes - at) : (int)COMM_MESSAGE;
        if (w->count == w->capacity) {
            w->capacity = 2 * w->capacity + 16;
            w->requests = (MPI_Request *)realloc(w->requests, (size_t)w->capacity * sizeof *w->requests);
            w->from = (int *)realloc(w->from, (size_t)w->capacity * sizeof *w->from);
            if (!w->requests || !w->from) die(EXIT_RUN, "out of memory: %d messages", w->capacity);
        }
        w->from[w->count] = receive ? rank : -1;
        if (receive)
            mpi_check(MPI_Irecv((char *)data + at, n, MPI_BYTE, rank, tag, MPI_COMM_WORLD, &w->requests[w->count]),
                      what);
        else
            mpi_check(MPI_Isend((char *)data + at, n, MPI_BYTE, rank, tag, MPI_COMM_WORLD, &w->requests[w->count]),
                      what);
        w->count++;
    }
}

// Waits for all pending messages. At first without sleeping, since most waits are short; the core is offered to
// others, since there may be more ranks than cores.
static void mpi_wait(const char *what) {
    MpiWait *w = &mpi_pending;
    double start = now_seconds(), looked = start, now;
    for (int round = 0, done = 0;; round++) {
        mpi_check(MPI_Testall(w->count, w->requests, &done, MPI_STATUSES_IGNORE), what);
        if (done) break;
        if (round < 200) sched_yield();
        else comm_sleep(round < 1000 ? 2e-5 : 5e-4);
        if (round % 16 || (now = now_seconds()) - looked < 0.02) continue;
        looked = now;
        mpi_heed_farewell();
        for (int k = 0; k < w->count; k++) {
            if (w->from[k] < 0 || w->requests[k] == MPI_REQUEST_NULL) continue;
            mpi_fail_if_dead(what, w->from[k]);
            if (now - start > comm.timeout) mpi_fail_silent(what, w->from[k]);
        }
        if (now - start > comm.timeout) mpi_fail(what, -1, "nobody took a message within --comm-timeout");
    }
    w->count = 0;
}

static void mpi_all_to_all(CommGroup group, const void *src, const size_t *send, void *dst, const size_t *recv,
                           const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    size_t from = 0, to = 0;
    (void)stream;
    for (int r = 0; r < ranks; from += recv[r++])
        if (r != me) mpi_post(1, comm_world_rank(group, r), group, (char *)dst + from, recv[r], what);
    from = 0;
    for (int r = 0; r < ranks; to += send[r], from += recv[r++]) {
        if (r != me) mpi_post(0, comm_world_rank(group, r), group, (char *)src + to, send[r], what);
        else memcpy((char *)dst + from, (const char *)src + to, send[r]);
    }
    mpi_wait(what);
}

static void mpi_all_gather(CommGroup group, const void *src, void *dst, size_t bytes, const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    (void)stream;
    for (int r = 0; r < ranks; r++)
        if (r != me) mpi_post(1, comm_world_rank(group, r), group, (char *)dst + (size_t)r * bytes, bytes, what);
    for (int r = 0; r < ranks; r++)
        if (r != me) mpi_post(0, comm_world_rank(group, r), group, (void *)src, bytes, what);
    if ((char *)dst + (size_t)me * bytes != src) memcpy((char *)dst + (size_t)me * bytes, src, bytes);
    mpi_wait(what);
}

static void mpi_send_recv(CommGroup group, const void *src, int to, void *dst, int from, size_t bytes, const char *what,
                          void *stream) {
    (void)stream;
    if (from >= 0) mpi_post(1, comm_world_rank(group, from), group, dst, bytes, what);
    if (to >= 0) mpi_post(0, comm_world_rank(group, to), group, (void *)src, bytes, what);
    mpi_wait(what);
}

static void mpi_reduce_scatter(CommGroup group, const void *src, void *dst, size_t count, CommType type,
                               const char *what, void *stream) {
    static char *parts = NULL;  // [ranks][count]
    static size_t size = 0;
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    size_t bytes = count * (type == COMM_F32 ? sizeof(float) : sizeof(double));
    (void)stream;
    if (size < (size_t)ranks * bytes) {
        free(parts);
        size = (size_t)ranks * bytes;
        parts = (char *)xcalloc(size, 1);
    }
    for (int r = 0; r < ranks; r++)
        if (r != me) mpi_post(1, comm_world_rank(group, r), group, parts + (size_t)r * bytes, bytes, what);
    for (int r = 0; r < ranks; r++)
        if (r != me) mpi_post(0, comm_world_rank(group, r), group, (char *)src + (size_t)r * bytes, bytes, what);
    memcpy(parts + (size_t)me * bytes, (const char *)src + (size_t)me * bytes, bytes);
    mpi_wait(what);
    for (size_t k = 0; k < count; k++) {  // in the order of ranks
        if (type == COMM_F32) {
            float sum = 0;
            for (int r = 0; r < ranks; r++) sum += ((const float *)(parts + (size_t)r * bytes))[k];
            ((float *)dst)[k] = sum;
        } else {
            double sum = 0;
            for (int r = 0; r < ranks; r++) sum += ((const double *)(parts + (size_t)r * bytes))[k];
            ((double *)dst)[k] = sum;
        }
    }
}

static const CommOps comm_mpi = {"mpi", mpi_all_gather, mpi_reduce_scatter, mpi_all_to_all, mpi_send_recv};

static void mpi_start(void) {
    CommPeer me;
    struct stat info;
    memset(&me, 0, sizeof me);
    if (MPI_Init(NULL, NULL) != MPI_SUCCESS) die(EXIT_RUN, "MPI does not start; does mpirun belong to this MPI?");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank), "start");
    mpi_check(MPI_Comm_size(MPI_COMM_WORLD, &comm.size), "start");
    if (gethostname(me.host, sizeof me.host - 1) != 0) strcpy(me.host, "?");
    me.pid = (int64_t)getpid();
    if (stat("/proc/self/ns/pid", &info) == 0) me.pid_space = (uint64_t)info.st_ino;
    comm.dp_size = comm.size;
    comm.dp_rank = comm.rank;
    comm.peers = (CommPeer *)xcalloc((size_t)comm.size, sizeof *comm.peers);
    mpi_check(MPI_Allgather(&me, sizeof me, MPI_BYTE, comm.peers, sizeof me, MPI_BYTE, MPI_COMM_WORLD), "start");
    comm.local_size = 0;
    for (int r = 0; r < comm.size; r++) {
        if (strcmp(comm.peers[r].host, me.host) != 0) continue;
        comm.local_rank += r < comm.rank;
        comm.local_size++;
    }
    if (comm.size == 1) return;
    comm.host = comm.data = &comm_mpi;
    die_in_world = mpi_die;
}
#endif

// ----------------------------------------------------------------------------------------------------------------
// Starting and ending

static int comm_env(const char *name) {  // 0: not set
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

// First thing in main. MPI is started only where mpirun (or Slurm with MPI) started this process: a program alone costs
// nothing. Ranks but the first have their standard output closed: what is to be said to people, one says.
MAYBE_UNUSED
static void comm_start(void) {
    const char *const of_mpi[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK"};
    const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"};
    int by_mpi = 0, expected = 0;
    for (int k = 0; k < 4; k++) by_mpi |= getenv(of_mpi[k]) != NULL;
    for (int k = 0; k < 4 && !expected; k++) expected = comm_env(sizes[k]);
#ifdef USE_MPI
    const char *advice = "start it with mpirun -np N, or with srun --mpi=pmix";
    if (by_mpi) mpi_start();
#else
    const char *advice = "it was built without MPI: bash scripts/install.sh mpi, then make";
    (void)by_mpi;
#endif
    if (expected > 1 && comm.size != expected)
        die(EXIT_USAGE, "this is one of %d processes, but they do not know each other; %s", expected, advice);
    if (comm.rank != 0 && !freopen("/dev/null", "w", stdout)) die(EXIT_RUN, "/dev/null: %s", strerror(errno));
    notes_wanted = comm.rank == 0;
}

// Cuts the world into groups of `sp` ranks, which must divide it.
MAYBE_UNUSED
static void comm_layout(int sp) {
    comm.sp_size = sp;
    comm.dp_size = comm.size / sp;
    comm.sp_rank = comm.rank % sp;
    comm.dp_rank = comm.rank / sp;
}

// ----------------------------------------------------------------------------------------------------------------
// Waiting for a device, which may wait for other ranks: such waits poll, and call comm_watch() on the way.

// Ends the job if a rank has ended it or died, or if this one has waited since `start` for too long.
MAYBE_UNUSED
static void comm_watch(double start, const char *what) {
#ifdef USE_MPI
    static double looked = 0;
    double now = now_seconds();
    if (now - looked < 0.02) return;
    looked = now;
    mpi_heed_farewell();
    for (int r = 0; r < comm.size; r++) mpi_fail_if_dead(what, r);
    if (now - start <= comm.timeout) return;
    int silent = mpi_silent_rank();
    if (silent < 0) mpi_fail(what, -1, "no rank came further within --comm-timeout");
    mpi_fail_silent(what, silent);
#else
    (void)start, (void)what;
#endif
}

// Around a call that may wait for other ranks and cannot poll: what: what it does; NULL: it is over.
static char comm_guard_line[512];
static void comm_guard_ends(int number) {
    (void)number;
    if (write(STDERR_FILENO, comm_guard_line, strlen(comm_guard_line)) < 0) _exit(EXIT_RUN);
    _exit(EXIT_RUN);
}
MAYBE_UNUSED
static void comm_guard(const char *what) {
    if (!what) {
        alarm(0);
        return;
    }
    snprintf(comm_guard_line, sizeof comm_guard_line,
             "error: rank %d of %d on %s, step %lld, %s: no answer for %g s (--comm-timeout); the job ends, --resume "
             "continues it\n",
             comm.rank, comm.size, comm.peers ? comm.peers[comm.rank].host : "?", (long long)comm.step, what,
             comm.timeout);
    signal(SIGALRM, comm_guard_ends);
    alarm((unsigned)(comm.timeout + 1));
}

// ----------------------------------------------------------------------------------------------------------------
// On host memory, over the world; with one rank they do nothing

// x[k] becomes the sum over ranks, the same bits on each.
MAYBE_UNUSED
static void comm_sum(double *x, int n, const char *what) {
    if (comm.size == 1) return;
    double *all = (double *)xcalloc((size_t)comm.size * (size_t)n, sizeof(double));
    comm.host->all_gather(COMM_WORLD, x, all, (size_t)n * sizeof(double), what, NULL);
    for (int k = 0; k < n; k++) {
        x[k] = 0;
        for (int r = 0; r < comm.size; r++) x[k] += all[(size_t)r * (size_t)n + (size_t)k];
    }
    free(all);
}

// Floats of which each is zero on all ranks but one (dumped logits): afterwards all ranks have all of them.
MAYBE_UNUSED
static void comm_merge(float *x, size_t n, const char *what) {
    enum { PIECE = 1 << 16 };
    if (comm.size == 1) return;
    float *all = (float *)xcalloc((size_t)comm.size * PIECE, sizeof(float));
    for (size_t at = 0; at < n; at += PIECE) {
        size_t count = n - at < PIECE ? n - at : (size_t)PIECE;
        comm.host->all_gather(COMM_WORLD, x + at, all, count * sizeof(float), what, NULL);
        for (size_t k = 0; k < count; k++)
            for (int r = 0; r < comm.size; r++) x[at + k] += r == comm.rank ? 0 : all[(size_t)r * count + k];
    }
    free(all);
}

// 1 if `mine` is not 0 on any rank.
MAYBE_UNUSED
static int comm_any(int mine, const char *what) {
    double sum = mine != 0;
    comm_sum(&sum, 1, what);
    return sum > 0;
}

MAYBE_UNUSED
static void comm_barrier(const char *what) { comm_any(0, what); }

// Everybody gets what rank 0 has.
MAYBE_UNUSED
static void comm_broadcast(void *data, size_t bytes, const char *what) {
    size_t *send = (size_t *)xcalloc(2 * (size_t)comm.size, sizeof(size_t)), *recv = send + comm.size;
    char *copies = (char *)xcalloc(comm.rank == 0 ? (size_t)comm.size : 1, bytes);
    recv[0] = bytes;
    for (int r = 0; comm.rank == 0 && r < comm.size; r++) {
        memcpy(copies + (size_t)r * bytes, data, bytes);
        send[r] = bytes;
    }
    if (comm.size > 1) comm.host->all_to_all(COMM_WORLD, copies, send, data, recv, what, NULL);
    free(copies);
    free(send);
}

// An exit code and its message, from the first rank whose code is not 0 to all. Returns that code, 0 if there is none.
MAYBE_UNUSED
static int comm_agree(int code, char *why, size_t why_size, const char *what) {
    enum { LINE = 1024 };
    if (comm.size == 1) return code;
    size_t record = sizeof(int) + LINE;
    char *mine = (char *)xcalloc(record, 1), *all = (char *)xcalloc((size_t)comm.size, record);
    memcpy(mine, &code, sizeof code);
    if (code) snprintf(mine + sizeof code, LINE, "%s", why);
    comm.host->all_gather(COMM_WORLD, mine, all, record, what, NULL);
    for (int r = 0; r < comm.size; r++) {
        memcpy(&code, all + (size_t)r * record, sizeof code);
        if (!code) continue;
        snprintf(why, why_size, "%.*s", LINE - 1, all + (size_t)r * record + sizeof code);
        break;
    }
    free(mine);
    free(all);
    return code;
}

// Last thing before a regular end.
MAYBE_UNUSED
static void comm_finish(void) {
#ifdef USE_MPI
    int started = 0;
    MPI_Initialized(&started);
    if (!started) return;
    comm_barrier("end of the run");
    MPI_Finalize();
#endif
}

#endif
