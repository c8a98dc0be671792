// comm.h: the processes ("ranks") that train one model together, and what they tell each other.
//
//   world = DP x SP     SP ranks share one sequence, neighbours first: sp_rank = rank % SP; the DP = size / SP groups
//                       of them have different sequences. Weights and gradients belong to the world (doc/parallel.md).
//
// A program has two back ends, each a CommOps: comm.host moves host memory (losses, checksums, decisions), comm.data
// what the model is made of. On the CPU both are the same: "self" with one rank, else "peers" (comm_peers.h). The CUDA
// trainer takes comm.host from here and sets comm.data to functions on NCCL (comm_cuda.cuh), whose `stream` is the CUDA
// stream to work on.
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

#include "util.h"

typedef enum { COMM_WORLD, COMM_SP, NUM_COMM_GROUPS } CommGroup;
typedef enum { COMM_F32, COMM_F64, COMM_BF16 } CommType;  // bf16: summed in float, the sum is rounded
static size_t comm_type_bytes(CommType type) { return type == COMM_F64 ? 8 : type == COMM_F32 ? 4 : 2; }

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
    // all [ranks][bytes]: this rank's part, at its place, goes to all ranks behind it (direction 1) or before it (-1);
    // the parts of those on the other side arrive. Nobody waits for ranks it gets nothing from.
    void (*pass_on)(CommGroup group, void *all, size_t bytes, int direction, const char *what, void *stream);
    // Once before each pass_on, by all ranks: from here on the others' parts may arrive. NULL: no use.
    void (*expect)(CommGroup group, int direction, void *stream);
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
    self_all_gather(group, src, dst, count * comm_type_bytes(type), what, stream);
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
static void self_pass_on(CommGroup group, void *all, size_t bytes, int direction, const char *what, void *stream) {
    (void)group, (void)all, (void)bytes, (void)direction, (void)what, (void)stream;
}

// Ends what comm.data has under way on a device, before the job ends because of another rank; NULL: nothing to end
static void (*comm_abort_data)(void) MAYBE_UNUSED = NULL;

static const CommOps comm_self = {
    "self", self_all_gather, self_reduce_scatter, self_all_to_all, self_send_recv, self_pass_on, NULL};
static Comm comm = {0, 1, 0, 1, 0, 1, 0, 1, 600, 0, &comm_self, &comm_self, NULL};

MAYBE_UNUSED
static int comm_group_size(CommGroup group) { return group == COMM_WORLD ? comm.size : comm.sp_size; }
MAYBE_UNUSED
static int comm_group_rank(CommGroup group) { return group == COMM_WORLD ? comm.rank : comm.sp_rank; }
// 1: in a pass_on, rank `to` gets the part of rank `from`.
MAYBE_UNUSED
static int comm_passes(int from, int to, int direction) { return direction > 0 ? from < to : from > to; }
// Rank in the world of a rank of the group.
MAYBE_UNUSED
static int comm_world_rank(CommGroup group, int rank) {
    return group == COMM_WORLD ? rank : comm.dp_rank * comm.sp_size + rank;
}

#include "comm_peers.h"

// ----------------------------------------------------------------------------------------------------------------
// Starting and ending

// First thing in main. Ranks come from mpirun or Slurm's pmix, and then speak MPI, or from a launcher that only tells
// each its number and where the first one is, as torchrun and plain srun do, and then speak TCP. A program alone starts
// neither. Ranks but the first have their standard output closed: what is to be said to people, one says.
MAYBE_UNUSED
static void comm_start(void) {
    const char *const of_mpi[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK"};
    const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"};
    int by_mpi = 0, expected = 0;
    for (int k = 0; k < 4; k++) by_mpi |= getenv(of_mpi[k]) != NULL;
    for (int k = 0; k < 4 && !expected; k++) expected = comm_env(sizes[k]);
#ifdef USE_MPI
    if (by_mpi) mpi_start();
    else tcp_start();
#else
    tcp_start();
    if (by_mpi && expected > 1 && comm.size != expected)
        die(EXIT_USAGE,
            "mpirun starts %d processes, but this program was built without MPI: bash scripts/install.sh "
            "mpi, then make",
            expected);
#endif
    if (expected > 1 && comm.size != expected)
        die(EXIT_USAGE,
            "this is one of %d processes, but they do not know each other; start it with mpirun -np N, or "
            "with torchrun or srun, which set RANK and MASTER_ADDR, or SLURM_PROCID",
            expected);
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
    static double looked = 0;
    double now = now_seconds();
    if (comm.size == 1 || now - looked < 0.02) return;
    looked = now;
    carrier->heed();
    for (int r = 0; r < comm.size; r++) peer_fail_if_dead(what, r);
    if (now - start <= comm.timeout) return;
    int silent = comm.size == 2 ? 1 - comm.rank : carrier->silent();
    if (silent < 0) peer_fail(what, -1, "no rank came further within --comm-timeout");
    peer_fail_silent(what, silent);
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
    if (comm.size > 1) comm_barrier("end of the run");
    if (carrier) carrier->finish();
}

#endif
