// comm_copies.cuh: all-gather and reduce-scatter between the GPUs of one host, by copy engines.
//
// Kernels that communicate take multiprocessors, and a matrix product that fills a GPU in one go then takes two. Copy
// engines take none. So a rank opens the memory of its neighbours (CUDA IPC) and copies straight into their buffers;
// only the sums of a reduce-scatter are a kernel, a short one. Meetings before and behind the copies are memory
// operations of streams, no kernels either:
//
//   ready   I have reached this call, my buffers may be written      (everyone tells everyone, everyone waits for all)
//   copy    my part into the buffers of the others
//   done    what I had to write is written
//
// A reduce-scatter needs no ready: it has two places for what arrives, which take turns, as do the flags of its done.
// Whoever copies has heard that the others are done with the call before, so they have summed what the one before that
// brought.
//
// Links that are awake take power, 2 % of an H100's products, and they stay awake for more than 10 ms behind each copy
// (dev/cuda/NOTES.md). In long steps, what is passed on one way therefore goes through the host's memory, and gradients
// wait for the first block's (quiet_links in train_xlstm.cu).
//
// All of it can be part of a CUDA graph. It works on the "window", the first bytes of the one allocation, which are
// laid out alike on all ranks: a place in it is the same distance from the window's begin everywhere.
#ifndef XLSTMC_COMM_COPIES_CUH
#define XLSTMC_COMM_COPIES_CUH

#include <assert.h>
#include <cuda.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "comm.h"
#include "floats.cuh"

// ----------------------------------------------------------------------------------------------------------------
// Memory operations of streams

typedef CUresult (*StreamMemoryOps)(CUstream, unsigned, CUstreamBatchMemOpParams *, unsigned);

static StreamMemoryOps stream_memory_ops(void) {
    static StreamMemoryOps ops;
    if (ops) return ops;
    return ops = (StreamMemoryOps)driver_function("cuStreamBatchMemOp");
}

static CUstreamBatchMemOpParams memory_op(CUstreamBatchMemOpType type, volatile void *word, unsigned value) {
    CUstreamBatchMemOpParams op;
    memset(&op, 0, sizeof op);
    if (type == CU_STREAM_MEM_OP_WRITE_VALUE_32) {
        op.writeValue.operation = type;
        op.writeValue.address = (CUdeviceptr)word;
        op.writeValue.value = value;
    } else {
        op.waitValue.operation = type;
        op.waitValue.address = (CUdeviceptr)word;
        op.waitValue.value = value;
        op.waitValue.flags = CU_STREAM_WAIT_VALUE_EQ;
    }
    return op;
}

static void memory_ops(cudaStream_t stream, CUstreamBatchMemOpParams *ops, int count) {
    CUresult status = stream_memory_ops()((CUstream)stream, (unsigned)count, ops, 0);
    if (status != CUDA_SUCCESS) die(EXIT_RUN, "cuStreamBatchMemOp: error %d", (int)status);
}

// The stream writes `value` to a word of device or pinned memory.
static void stream_write(cudaStream_t stream, volatile void *word, int value) {
    CUstreamBatchMemOpParams op = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, word, (unsigned)value);
    memory_ops(stream, &op, 1);
}

// ----------------------------------------------------------------------------------------------------------------
// The window

enum { READY, DONE, SENT, SENT_TOO, FREE, THERE, NUM_MEETINGS };  // SENT + turn: of a reduce-scatter

static struct {
    char **of;        // [size] where the windows of all ranks are seen from here; NULL: no copies
    size_t bytes;     // of each
    unsigned *flags;  // in the window: [NUM_COMM_GROUPS][NUM_MEETINGS][size], 1: that rank has come
    char *received;   // in the window: [2][size][max_bytes] what a reduce-scatter gets from the others
    size_t max_bytes;
    int turn;     // which of the two
    char *slots;  // host memory: [size][2 directions][slot_bytes] what each rank passes on; NULL: by links
    size_t slot_bytes;
    const CommOps *otherwise;  // for what lies outside
    CUstreamBatchMemOpParams *ops;
    volatile int *under_way;      // [NUM_COMM_GROUPS] pinned: the number of the call that has begun, 0: it has ended
    int (*number)(const char *);  // of a call
} copies;

// Bytes that the window must begin with
static size_t copies_flag_bytes(void) {
    return (NUM_COMM_GROUPS * NUM_MEETINGS * (size_t)comm.size * sizeof(unsigned) + 255) / 256 * 256;
}
static size_t copies_head_bytes(size_t max_bytes) {
    return comm.size == 1 ? 0 : copies_flag_bytes() + 2 * (size_t)comm.size * max_bytes;
}

static char *copies_address(CommGroup group, int rank, const void *mine) {
    return copies.of[comm_world_rank(group, rank)] + ((const char *)mine - copies.of[comm.rank]);
}
static unsigned *copies_row(CommGroup group, int meeting) {
    return copies.flags + ((size_t)group * NUM_MEETINGS + meeting) * (size_t)comm.size;
}
static int copies_reach(const void *begin, size_t bytes) {
    size_t at = (size_t)((const char *)begin - copies.of[comm.rank]);
    return (const char *)begin >= copies.of[comm.rank] && at + bytes <= copies.bytes;
}

// Every flag goes from 0 to 1 by its rank, and back by the one who waited. Nobody sets it again before: a rank that was
// waited for may be a meeting ahead, but not two, and no two meetings in a row have the same flags. READY and DONE take
// turns, as do SENT and SENT_TOO; from one replay of a graph to the next all have agreed on a norm. READY notes that
// the call has begun, the others that it has ended.
static void copies_meet(CommGroup group, int meeting, const char *what, cudaStream_t stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group), n = 0;
    volatile int *note = copies.under_way + group;
    if (meeting == READY)
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, note, (unsigned)copies.number(what));
    unsigned *row = copies_row(group, meeting);
    for (int k = 1; k < ranks; k++) {
        int r = (me + k) % ranks;
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, copies_address(group, r, row + me), 1);
    }
    for (int r = 0; r < ranks; r++) {
        if (r == me) continue;
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WAIT_VALUE_32, row + r, 1);
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, row + r, 0);
    }
    if (meeting != READY) copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, note, 0);
    memory_ops(stream, copies.ops, n);
}

// ----------------------------------------------------------------------------------------------------------------
// The functions of comm.data

static void copies_all_gather(CommGroup group, const void *src, void *dst, size_t bytes, const char *what,
                              void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    cudaStream_t on = (cudaStream_t)stream;
    char *part = (char *)dst + (size_t)me * bytes;
    if (!copies_reach(dst, (size_t)ranks * bytes)) {
        copies.otherwise->all_gather(group, src, dst, bytes, what, stream);
        return;
    }
    copies_meet(group, READY, what, on);
    for (int k = 1; k < ranks; k++)
        CUDA_CHECK(
            cudaMemcpyAsync(copies_address(group, (me + k) % ranks, part), src, bytes, cudaMemcpyDeviceToDevice, on));
    if (part != src) CUDA_CHECK(cudaMemcpyAsync(part, src, bytes, cudaMemcpyDeviceToDevice, on));
    copies_meet(group, DONE, what, on);
}

// dst [count] = the sum over ranks, in their order, of own (of rank `me`) and received [ranks][count] (of the others),
// in float. dst may be own. 16 bytes at a time.
template <typename T>
static __global__ void __launch_bounds__(256)
    copies_sum_kernel(T *dst, const T *own, const T *__restrict__ received, int ranks, int me, size_t count) {
    const size_t step = (size_t)gridDim.x * blockDim.x * VEC<T>;
#pragma unroll 2
    for (size_t k = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC<T>; k < count; k += step) {
        float sum[VEC<T>];
        for (int r = 0; r < ranks; r++) {
            float x[VEC<T>];
            load_floats(x, r == me ? own + k : received + count * (size_t)r + k);
#pragma unroll
            for (int j = 0; j < VEC<T>; j++) sum[j] = r == 0 ? x[j] : sum[j] + x[j];
        }
        store_floats(dst + k, sum);
    }
}

template <typename T>
static void copies_sum(void *dst, const void *own, const void *received, int ranks, int me, size_t count,
                       cudaStream_t stream) {
    // Short blocks: what else runs does not have to wait long for a multiprocessor.
    copies_sum_kernel<<<ceil_div(count, 512 * VEC<T>), 256, 0, stream>>>((T *)dst, (const T *)own, (const T *)received,
                                                                         ranks, me, count);
    LAUNCH_CHECK();
}

static void copies_reduce_scatter(CommGroup group, const void *src, void *dst, size_t count, CommType type,
                                  const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group);
    cudaStream_t on = (cudaStream_t)stream;
    const char *parts = (const char *)src;
    size_t bytes = count * comm_type_bytes(type);
    if (type == COMM_F64 || bytes > copies.max_bytes || bytes % 16) {
        copies.otherwise->reduce_scatter(group, src, dst, count, type, what, stream);
        return;
    }
    const int turn = copies.turn;
    char *received = copies.received + turn * (size_t)comm.size * copies.max_bytes;
    copies.turn = !turn;
    stream_write(on, copies.under_way + group, copies.number(what));
    for (int k = 1; k < ranks; k++) {
        int r = (me + k) % ranks;
        CUDA_CHECK(cudaMemcpyAsync(copies_address(group, r, received + (size_t)me * bytes), parts + (size_t)r * bytes,
                                   bytes, cudaMemcpyDeviceToDevice, on));
    }
    copies_meet(group, SENT + turn, what, on);
    parts += (size_t)me * bytes;
    if (type == COMM_BF16) copies_sum<bf16>(dst, parts, received, ranks, me, count, on);
    else copies_sum<float>(dst, parts, received, ranks, me, count, on);
}

static char *copies_slot(CommGroup group, int rank, int direction) {
    return copies.slots + (2 * (size_t)comm_world_rank(group, rank) + (direction > 0)) * copies.slot_bytes;
}

// One way: a rank is told by each that gets its part that there is room for it (FREE), and tells it of the copy
// (THERE). Through the host, the part then goes to its slot, from where the others get it: whoever has room for the
// next one has done so.
static void copies_expect(CommGroup group, int direction, void *stream) {
    int me = comm_group_rank(group), n = 0;
    unsigned *row = copies_row(group, FREE);
    for (int r = 0; r < comm_group_size(group); r++)
        if (comm_passes(r, me, direction))
            copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, copies_address(group, r, row + me), 1);
    if (n > 0) memory_ops((cudaStream_t)stream, copies.ops, n);
}

static void copies_pass_on(CommGroup group, void *all, size_t bytes, int direction, const char *what, void *stream) {
    int ranks = comm_group_size(group), me = comm_group_rank(group), n = 0;
    cudaStream_t on = (cudaStream_t)stream;
    volatile int *note = copies.under_way + group;
    char *part = (char *)all + (size_t)me * bytes;
    unsigned *row = copies_row(group, FREE);
    int sends = 0;
    assert(copies_reach(all, (size_t)ranks * bytes) && (!copies.slots || bytes <= copies.slot_bytes));
    copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, note, (unsigned)copies.number(what));
    for (int r = 0; r < ranks; r++) {
        if (!comm_passes(me, r, direction)) continue;
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WAIT_VALUE_32, row + r, 1);
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, row + r, 0);
        sends++;
    }
    memory_ops(on, copies.ops, n);
    if (copies.slots && sends)
        CUDA_CHECK(cudaMemcpyAsync(copies_slot(group, me, direction), part, bytes, cudaMemcpyDeviceToHost, on));
    for (int r = 0; r < ranks; r++)
        if (!copies.slots && comm_passes(me, r, direction))
            CUDA_CHECK(cudaMemcpyAsync(copies_address(group, r, part), part, bytes, cudaMemcpyDeviceToDevice, on));
    n = 0;
    row = copies_row(group, THERE);
    for (int r = 0; r < ranks; r++)
        if (comm_passes(me, r, direction))
            copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, copies_address(group, r, row + me), 1);
    for (int r = 0; r < ranks; r++) {
        if (!comm_passes(r, me, direction)) continue;
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WAIT_VALUE_32, row + r, 1);
        copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, row + r, 0);
    }
    copies.ops[n++] = memory_op(CU_STREAM_MEM_OP_WRITE_VALUE_32, note, 0);
    memory_ops(on, copies.ops, n);
    for (int r = 0; r < ranks; r++)
        if (copies.slots && comm_passes(r, me, direction))
            CUDA_CHECK(cudaMemcpyAsync((char *)all + (size_t)r * bytes, copies_slot(group, r, direction), bytes,
                                       cudaMemcpyHostToDevice, on));
}

static CommOps comm_copies;

// ----------------------------------------------------------------------------------------------------------------
// Start

// Sets comm.data to copies if that is wanted and possible: all ranks on one host, and their GPUs see each other's
// memory. memory: the beginning of an allocation; its first `bytes` are the window, they are 0 up to
// copies_head_bytes(max_bytes), and both numbers are the same on all ranks. under_way, number: see copies.
static void copies_start(int wanted, void *memory, size_t bytes, size_t max_bytes, volatile int *under_way,
                         int (*number)(const char *)) {
    int apart = !wanted;
    cudaIpcMemHandle_t mine, *all;
    if (comm.size == 1) return;
    for (int r = 0; r < comm.size; r++) apart |= strcmp(comm.peers[r].host, comm.peers[0].host) != 0;
    if (comm_any(apart || cudaIpcGetMemHandle(&mine, memory) != cudaSuccess, "looking for GPUs of one host")) {
        cudaGetLastError();  // what is not there is no error
        return;
    }
    all = (cudaIpcMemHandle_t *)xcalloc((size_t)comm.size, sizeof *all);
    copies.of = (char **)xcalloc((size_t)comm.size, sizeof *copies.of);
    comm.host->all_gather(COMM_WORLD, &mine, all, sizeof mine, "opening the memory of other GPUs", NULL);
    for (int r = 0; r < comm.size; r++) {
        void *opened = memory;
        if (r != comm.rank && cudaIpcOpenMemHandle(&opened, all[r], cudaIpcMemLazyEnablePeerAccess) != cudaSuccess)
            apart = 1;
        copies.of[r] = (char *)opened;
    }
    free(all);
    if (comm_any(apart, "opening the memory of other GPUs")) {
        cudaGetLastError();
        return;
    }
    copies.bytes = bytes;
    copies.flags = (unsigned *)memory;
    copies.received = (char *)memory + copies_flag_bytes();
    copies.max_bytes = max_bytes;
    copies.under_way = under_way;
    copies.number = number;
    copies.ops = (CUstreamBatchMemOpParams *)xcalloc(3 * (size_t)comm.size, sizeof *copies.ops);
    copies.otherwise = comm.data;
    comm_copies = *comm.data;
    comm_copies.name = "copies";
    comm_copies.all_gather = copies_all_gather;
    comm_copies.reduce_scatter = copies_reduce_scatter;
    comm_copies.pass_on = copies_pass_on;
    comm_copies.expect = copies_expect;
    comm.data = &comm_copies;
}

// From now on parts of up to slot_bytes are passed on through memory of the host that all ranks map; if it cannot be
// had, they go on by links. Called by all ranks.
static void copies_start_slots(size_t slot_bytes) {
    const char *what = "sharing memory of the host";
    char name[64] = "";
    const size_t slot = (slot_bytes + 4095) / 4096 * 4096, bytes = 2 * (size_t)comm.size * slot;
    if (comm.rank == 0) format_into(name, sizeof name, "/dev/shm/xlstm-%d-%.0f", (int)getpid(), 1e6 * now_seconds());
    comm_broadcast(name, sizeof name, what);
    int file = comm.rank == 0 ? open(name, O_RDWR | O_CREAT | O_EXCL, 0600) : -1;
    int failed = comm_any(comm.rank == 0 && (file < 0 || posix_fallocate(file, 0, (off_t)bytes) != 0), what);
    if (!failed && comm.rank > 0) file = open(name, O_RDWR);
    void *at = failed || file < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    failed |= at == MAP_FAILED || cudaHostRegister(at, bytes, cudaHostRegisterPortable) != cudaSuccess;
    failed = comm_any(failed, what);
    if (comm.rank == 0) unlink(name);
    if (file >= 0) close(file);
    if (failed) {
        cudaGetLastError();  // what is not there is no error
        return;
    }
    copies.slots = (char *)at, copies.slot_bytes = slot;
}

#endif
