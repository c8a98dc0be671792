// comm_cuda.cuh: comm.data on GPUs (comm.h, doc/parallel.md), and waiting for a GPU that may wait for other ranks.
//
// Two back ends: "nccl", whose calls can be part of CUDA graphs, and "staged", which copies to the host and lets MPI do
// the rest. The second is slow and waits in every call, but lets several ranks share a GPU: tests of many ranks run on
// one (XLSTM_SHARE_GPU=1).
//
// On one host, all-gathers and reduce-scatters are copies between GPUs instead (comm_copies.cuh).
//
// A GPU that waits for a rank that has died would wait for ever, and so would cudaStreamSynchronize: device_wait()
// polls. Calls within a graph leave a note in host memory, so that a message can name what did not end.
#ifndef XLSTMC_COMM_CUDA_CUH
#define XLSTMC_COMM_CUDA_CUH

#include "comm.h"
#include "comm_copies.cuh"
#include "cuda_util.cuh"
#ifdef USE_NCCL
#include <nccl.h>
#endif

enum { MAX_DEVICE_CALLS = 64 };

static struct {
    int graphs;                           // 1: calls may be captured
    const char *calls[MAX_DEVICE_CALLS];  // what there has been
    int num_calls;
    volatile int *under_way;  // [NUM_COMM_GROUPS] pinned: 1 + index of the call that the GPU has begun, 0: none
#ifdef USE_NCCL
    ncclComm_t comms[NUM_COMM_GROUPS];  // NULL: a group of one
#endif
} device_comm = {1};

// ----------------------------------------------------------------------------------------------------------------
// Waiting

#ifdef USE_NCCL
static void nccl_check_(ncclResult_t status, const char *call, const char *file, int line) {
    if (status == ncclSuccess) return;
    die(EXIT_RUN, "%s:%d: step %lld: %s: %s (%s)", file, line, (long long)comm.step, call, ncclGetErrorString(status),
        ncclGetLastError(NULL));
}
#define NCCL_CHECK(call) nccl_check_((call), #call, __FILE__, __LINE__)

static void device_check_errors(void) {  // of the transport, e.g. a connection that is lost
    for (int group = 0; group < NUM_COMM_GROUPS; group++) {
        ncclResult_t state = ncclSuccess;
        if (!device_comm.comms[group]) continue;
        NCCL_CHECK(ncclCommGetAsyncError(device_comm.comms[group], &state));
        if (state != ncclInProgress) nccl_check_(state, "communication", __FILE__, __LINE__);
    }
}
// Lets the kernels of collectives end. It may not come back: a graph that holds collectives holds the communicator.
static void device_abort(void) {
    for (int group = NUM_COMM_GROUPS - 1; group >= 0; group--)
        if (device_comm.comms[group]) ncclCommAbort(device_comm.comms[group]);
}
#else
static void device_check_errors(void) {}
#endif

static const char *device_under_way(const char *what) {
    for (int group = NUM_COMM_GROUPS - 1; group >= 0 && device_comm.under_way; group--) {
        int call = device_comm.under_way[group];
        if (call > 0 && call <= device_comm.num_calls) return device_comm.calls[call - 1];
    }
    return what;
}

// Until all work of the stream is done; `what` names it if nothing more precise is known.
static void device_wait(cudaStream_t stream, const char *what) {
    if (comm.size == 1) {
        CUDA_CHECK(cudaStreamSynchronize(stream));
        return;
    }
    double start = now_seconds();
    cudaError_t status;
    for (int round = 1; (status = cudaStreamQuery(stream)) == cudaErrorNotReady; round++) {
        if (round % 64) continue;
        if (round % (1 << 16) == 0) device_check_errors();
        comm_watch(start, device_under_way(what));
    }
    cuda_check_(status, what, __FILE__, __LINE__);
}

// The number of a call in notes
static int device_call(const char *what) {
    int call = 0;
    while (call < device_comm.num_calls && device_comm.calls[call] != what) call++;
    if (call == device_comm.num_calls && call < MAX_DEVICE_CALLS) device_comm.calls[device_comm.num_calls++] = what;
    return call + 1;
}

static bool device_captures(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status == cudaStreamCaptureStatusActive;
}

// ----------------------------------------------------------------------------------------------------------------
// NCCL

#ifdef USE_NCCL
// Before and behind a call. One that is not captured into a graph may itself wait: its first use makes connections.
static void nccl_begin(CommGroup group, const char *what, cudaStream_t stream) {
    if (device_captures(stream)) stream_write(stream, device_comm.under_way + group, what ? device_call(what) : 0);
    else comm_guard(what);
}
static void nccl_end(CommGroup group, cudaStream_t stream) { nccl_begin(group, NULL, stream); }

static void nccl_all_gather(CommGroup group, const void *src, void *dst, size_t bytes, const char *what, void *stream) {
    nccl_begin(group, what, (cudaStream_t)stream);
    NCCL_CHECK(ncclAllGather(src, dst, bytes, ncclInt8, device_comm.comms[group], (cudaStream_t)stream));
    nccl_end(group, (cudaStream_t)stream);
}

static void nccl_reduce_scatter(CommGroup group, const void *src, void *dst, size_t count, CommType type,
                                const char *what, void *stream) {
    const ncclDataType_t types[] = {ncclFloat32, ncclFloat64, ncclBfloat16};  // of CommType
    nccl_begin(group, what, (cudaStream_t)stream);
    NCCL_CHECK(
        ncclReduceScatter(src, dst, count, types[type], ncclSum, device_comm.comms[group], (cudaStream_t)stream));
    nccl_end(group, (cudaStream_t)stream);
}

static void nccl_all_to_all(CommGroup group, const void *src, const size_t *send, void *dst, const size_t *recv,
                            const char *what, void *stream) {
    size_t from = 0, to = 0;
    nccl_begin(group, what, (cudaStream_t)stream);
    NCCL_CHECK(ncclGroupStart());
    for (int r = 0; r < comm_group_size(group); to += send[r], from += recv[r], r++) {
        ncclComm_t c = device_comm.comms[group];
        if (send[r]) NCCL_CHECK(ncclSend((const char *)src + to, send[r], ncclInt8, r, c, (cudaStream_t)stream));
        if (recv[r]) NCCL_CHECK(ncclRecv((char *)dst + from, recv[r], ncclInt8, r, c, (cudaStream_t)stream));
    }
    NCCL_CHECK(ncclGroupEnd());
    nccl_end(group, (cudaStream_t)stream);
}

static void nccl_send_recv(CommGroup group, const void *src, int to, void *dst, int from, size_t bytes,
                           const char *what, void *stream) {
    ncclComm_t c = device_comm.comms[group];
    if (to < 0 && from < 0) return;
    nccl_begin(group, what, (cudaStream_t)stream);
    NCCL_CHECK(ncclGroupStart());
    if (to >= 0) NCCL_CHECK(ncclSend(src, bytes, ncclInt8, to, c, (cudaStream_t)stream));
    if (from >= 0) NCCL_CHECK(ncclRecv(dst, bytes, ncclInt8, from, c, (cudaStream_t)stream));
    NCCL_CHECK(ncclGroupEnd());
    nccl_end(group, (cudaStream_t)stream);
}

static void nccl_pass_on(CommGroup group, void *all, size_t bytes, int direction, const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    ncclComm_t c = device_comm.comms[group];
    cudaStream_t on = (cudaStream_t)stream;
    nccl_begin(group, what, on);
    NCCL_CHECK(ncclGroupStart());
    for (int r = 0; r < ranks; r++) {
        if (comm_passes(me, r, direction))
            NCCL_CHECK(ncclSend((char *)all + (size_t)me * bytes, bytes, ncclInt8, r, c, on));
        if (comm_passes(r, me, direction))
            NCCL_CHECK(ncclRecv((char *)all + (size_t)r * bytes, bytes, ncclInt8, r, c, on));
    }
    NCCL_CHECK(ncclGroupEnd());
    nccl_end(group, on);
}

static const CommOps comm_nccl = {
    "nccl", nccl_all_gather, nccl_reduce_scatter, nccl_all_to_all, nccl_send_recv, nccl_pass_on, NULL};

// One communicator for the world, for gradients and weights, one for the ranks of a sequence. What a communicator does
// first takes memory and connects: that happens here, before memory is planned.
static void nccl_start(void) {
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER, sp_config = NCCL_CONFIG_INITIALIZER;
    ncclComm_t *comms = device_comm.comms;
    const size_t bytes = 1 << 20;
    char *buffer;
    if (comm.rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
    comm_broadcast(&id, sizeof id, "start of NCCL");
    comm_guard("start of NCCL");
    NCCL_CHECK(ncclCommInitRankConfig(&comms[COMM_WORLD], comm.size, id, comm.rank, &config));
    if (comm.sp_size > 1)
        NCCL_CHECK(ncclCommSplit(comms[COMM_WORLD], comm.dp_rank, comm.sp_rank, &comms[COMM_SP], &sp_config));
    comm_guard(NULL);
    comm_abort_data = device_abort;
    size_t *sizes = (size_t *)xcalloc((size_t)comm.size, sizeof(size_t));
    CUDA_CHECK(cudaMalloc((void **)&buffer, 2 * bytes * (size_t)comm.size));
    CUDA_CHECK(cudaMemset(buffer, 0, 2 * bytes * (size_t)comm.size));
    for (int k = 0; k < comm.size; k++) sizes[k] = bytes;
    for (int group = 0; group < NUM_COMM_GROUPS; group++) {
        char *half = buffer + bytes * (size_t)comm.size;
        if (!comms[group]) continue;
        nccl_all_gather((CommGroup)group, buffer, half, bytes, "first all-gather", NULL);
        device_wait(NULL, "first all-gather");
        if (group == COMM_WORLD)
            nccl_reduce_scatter(COMM_WORLD, buffer, half, bytes / sizeof(float), COMM_F32, "first reduction", NULL);
        else nccl_all_to_all(COMM_SP, buffer, sizes, half, sizes, "first all-to-all", NULL);
        device_wait(NULL, "first collective");
    }
    CUDA_CHECK(cudaFree(buffer));
    free(sizes);
    comm.data = &comm_nccl;
}
#endif

// ----------------------------------------------------------------------------------------------------------------
// Through host memory, for ranks that share a GPU

static void *staging_buffer(int which, size_t bytes) {
    static void *buffers[2];
    static size_t sizes[2];
    if (sizes[which] < bytes) {
        free(buffers[which]);
        buffers[which] = xcalloc(sizes[which] = bytes, 1);
    }
    return buffers[which];
}
static void *staged_out(const void *src, size_t bytes, void *stream) {
    void *host = staging_buffer(0, bytes);
    CUDA_CHECK(cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, (cudaStream_t)stream));
    CUDA_CHECK(cudaStreamSynchronize((cudaStream_t)stream));
    return host;
}
static void staged_in(void *dst, const void *host, size_t bytes, void *stream) {
    CUDA_CHECK(cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, (cudaStream_t)stream));
    CUDA_CHECK(cudaStreamSynchronize((cudaStream_t)stream));
}

static void staged_all_gather(CommGroup group, const void *src, void *dst, size_t bytes, const char *what,
                              void *stream) {
    size_t all = bytes * (size_t)comm_group_size(group);
    void *sent = staged_out(src, bytes, stream), *received = staging_buffer(1, all);
    comm.host->all_gather(group, sent, received, bytes, what, NULL);
    staged_in(dst, received, all, stream);
}
static void staged_reduce_scatter(CommGroup group, const void *src, void *dst, size_t count, CommType type,
                                  const char *what, void *stream) {
    size_t bytes = count * comm_type_bytes(type);
    void *sent = staged_out(src, bytes * (size_t)comm_group_size(group), stream), *received = staging_buffer(1, bytes);
    comm.host->reduce_scatter(group, sent, received, count, type, what, NULL);
    staged_in(dst, received, bytes, stream);
}
static void staged_all_to_all(CommGroup group, const void *src, const size_t *send, void *dst, const size_t *recv,
                              const char *what, void *stream) {
    size_t sends = 0, receives = 0;
    for (int r = 0; r < comm_group_size(group); r++) sends += send[r], receives += recv[r];
    void *sent = staged_out(src, sends, stream), *received = staging_buffer(1, receives);
    comm.host->all_to_all(group, sent, send, received, recv, what, NULL);
    staged_in(dst, received, receives, stream);
}
static void staged_send_recv(CommGroup group, const void *src, int to, void *dst, int from, size_t bytes,
                             const char *what, void *stream) {
    void *sent = to >= 0 ? staged_out(src, bytes, stream) : NULL, *received = staging_buffer(1, bytes);
    comm.host->send_recv(group, sent, to, received, from, bytes, what, NULL);
    if (from >= 0) staged_in(dst, received, bytes, stream);
}

static void staged_pass_on(CommGroup group, void *all, size_t bytes, int direction, const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    char *host = (char *)staged_out(all, bytes * (size_t)ranks, stream);
    comm.host->pass_on(group, host, bytes, direction, what, NULL);
    for (int r = 0; r < ranks; r++)
        if (comm_passes(r, me, direction))
            staged_in((char *)all + (size_t)r * bytes, host + (size_t)r * bytes, bytes, stream);
}

static const CommOps comm_staged = {
    "staged", staged_all_gather, staged_reduce_scatter, staged_all_to_all, staged_send_recv, staged_pass_on, NULL};

// ----------------------------------------------------------------------------------------------------------------
// Start

// Which of `count` devices this rank takes. One that is all a rank can see is its own by the launcher's doing.
static int device_of_rank(int count) {
    const char *share = getenv("XLSTM_SHARE_GPU");
    if (share && *share == '1') return comm.local_rank % count;
    if (comm.local_size > count && count > 1)
        die(EXIT_USAGE, "%d ranks on %s, which has %d GPUs; start one rank a GPU: mpirun -np %d", comm.local_size,
            comm.peers[comm.rank].host, count, count);
    return comm.local_rank < count ? comm.local_rank : 0;
}

// No two ranks of a host on one GPU. `bus`: its address on the host.
static void device_check_shared(const char *bus) {
    enum { ADDRESS = 32 };
    char mine[ADDRESS] = "", *all = (char *)xcalloc((size_t)comm.size, ADDRESS);
    snprintf(mine, sizeof mine, "%s", bus);
    comm.host->all_gather(COMM_WORLD, mine, all, ADDRESS, "comparing GPUs", NULL);
    for (int a = 0; a < comm.size; a++)
        for (int b = 0; b < a; b++)
            if (strcmp(all + a * ADDRESS, all + b * ADDRESS) == 0 &&
                strcmp(comm.peers[a].host, comm.peers[b].host) == 0)
                die(EXIT_USAGE, "ranks %d and %d would share one GPU of %s; start one rank a GPU", b, a,
                    comm.peers[a].host);
    free(all);
}

// All ranks have laid out the first bytes of an allocation alike, zero up to copies_head_bytes(max_bytes): from here on
// what lies there is exchanged by copies, where that is possible. XLSTM_COPIES: 0 forbids it, 1 also lets ranks do it
// that share a GPU.
static void device_share_window(void *window, size_t bytes, size_t max_bytes) {
    const char *wanted = getenv("XLSTM_COPIES");
    copies_start(wanted ? *wanted == '1' : device_comm.graphs, window, bytes, max_bytes, device_comm.under_way,
                 device_call);
}

// Whether gradients and weights travel by copies
static bool device_copies(void) { return comm.data == &comm_copies; }

// Sets comm.data, after cudaSetDevice.
static void device_comm_start(int device) {
    const char *share = getenv("XLSTM_SHARE_GPU");
    char bus[32];
    if (comm.size == 1) return;
    CUDA_CHECK(cudaMallocHost((void **)&device_comm.under_way, NUM_COMM_GROUPS * sizeof(int)));
    for (int group = 0; group < NUM_COMM_GROUPS; group++) device_comm.under_way[group] = 0;
    if (share && *share == '1') {
        device_comm.graphs = 0;
        comm.data = &comm_staged;
        return;
    }
    CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, device));
    device_check_shared(bus);
#ifdef USE_NCCL
    nccl_start();
#else
    die(EXIT_USAGE, "several GPUs need NCCL, and this program was built without it: install libnccl-dev, then make");
#endif
}

#endif
