// hopper.cuh: what an sm_90a multiprocessor has beyond its predecessors, one thin function each: barriers in shared
// memory (mbarrier), copies of boxes of a tensor by the TMA unit, products of a warpgroup (wgmma), registers that move
// from one warpgroup to another. PTX ISA, chapters "mbarrier", "cp.async.bulk.tensor", "wgmma.mma_async".
//
// All tiles are panels of 64 rows and 64 bf16 columns, 8 KB, aligned to 1 KB, in the 128-byte swizzle that TMA writes
// and wgmma reads: row r begins at byte 128 r, and its eight 16-byte pieces change places: piece p lies where
// p ^ (r % 8) would.
#ifndef XLSTMC_HOPPER_CUH
#define XLSTMC_HOPPER_CUH

#include <cuda.h>

#include "cuda_util.cuh"

// Kernels for Hopper have a body only where the compiler's target is sm_90a.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE 1
#endif

enum { PANEL_BYTES = 8192, PANEL_ROW = 128 };

__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
// Byte of piece p (16 bytes) of row r within a panel
__device__ __forceinline__ unsigned panel_piece(int r, int p) { return r * PANEL_ROW + ((p ^ (r & 7)) << 4); }

// ----------------------------------------------------------------------------------------------------------------
// Barriers. A phase ends when `count` threads have arrived and all announced bytes have landed; who waits names the
// parity of the phase: the k-th phase has parity k % 2, and a wait for parity 1 of a fresh barrier returns at once.

__device__ __forceinline__ void barrier_init(unsigned bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {  // visible to the TMA unit
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(unsigned bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned bar, int parity) {
    unsigned done;
    do {
        asm volatile(
            "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
    } while (!done);
}
// Of `threads` threads of the block that name the same id, 1 to 15
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Ordinary stores to shared memory become visible to TMA and wgmma; by each thread that stored.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers that move between warpgroups; elsewhere than on Hopper all threads keep what they have.
template <int REGISTERS>
__device__ __forceinline__ void registers_grow() {
#ifdef HOPPER_CODE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS>
__device__ __forceinline__ void registers_shrink() {
#ifdef HOPPER_CODE
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// Clusters: blocks that reach into each other's shared memory

__device__ __forceinline__ int cluster_rank(void) {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_barrier(void) {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ unsigned peer_address(unsigned address, int rank) {  // the same place in another block
    unsigned peer;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}
__device__ __forceinline__ double peer_double(unsigned address) {
    double x;
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(x) : "r"(address) : "memory");
    return x;
}

// ----------------------------------------------------------------------------------------------------------------
// TMA: boxes of 64 tokens x 64 columns of one head of a tensor [B, T, NH, width] with row stride ld. What lies beyond
// the width or T is read as zero and not written.

__device__ __forceinline__ void tma_load(unsigned panel, const CUtensorMap *map, unsigned bar, int column, int head,
                                         int t0, int b) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(panel),
        "l"(map), "r"(column), "r"(head), "r"(t0), "r"(b), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void tma_store(const CUtensorMap *map, unsigned panel, int column, int head, int t0, int b) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(panel), "r"(column), "r"(head), "r"(t0), "r"(b)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// The first copy by a map takes as long as one from memory longer, unless it has been asked for
__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
template <int PENDING>  // until all but so many of this thread's stores have read their panel
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Consecutive bytes; addresses and their number are multiples of 16
__device__ __forceinline__ void bulk_load(unsigned to, const void *from, int bytes, unsigned bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}

__device__ __forceinline__ void bulk_store(void *to, unsigned from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// The driver's function that encodes a tensor map
typedef CUresult (*TensorMapEncode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                    const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
MAYBE_UNUSED
static TensorMapEncode tensor_map_encode(void) {
    static TensorMapEncode encode;
    if (encode) return encode;
    return encode = (TensorMapEncode)driver_function("cuTensorMapEncodeTiled");
}

// p [B, T, NH, width] with row stride ld; p aligned to 16 bytes, width and ld multiples of 8.
MAYBE_UNUSED
static CUtensorMap head_tensor_map(const bf16 *p, int B, int T, int NH, int width, size_t ld) {
    CUtensorMap map;
    const cuuint64_t dims[4] = {(cuuint64_t)width, (cuuint64_t)NH, (cuuint64_t)T, (cuuint64_t)B};
    const cuuint64_t strides[3] = {width * sizeof(bf16), ld * sizeof(bf16), T * ld * sizeof(bf16)};
    const cuuint32_t box[4] = {64, 1, 64, 1}, steps[4] = {1, 1, 1, 1};
    CUresult status = tensor_map_encode()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)p, dims, strides, box,
                                          steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) die(EXIT_RUN, "cuTensorMapEncodeTiled: error %d", (int)status);
    return map;
}

// ----------------------------------------------------------------------------------------------------------------
// wgmma: D[64, N] += A[64, 16] B[16, N] by the 128 threads of a warpgroup, asynchronously. Warp w of the four holds
// rows 16w .. 16w + 15 of D; a thread holds D[g][8j + 2t], D[g][8j + 2t + 1], D[g + 8][8j + 2t], D[g + 8][8j + 2t + 1]
// in d[4j .. 4j + 3], with g = lane / 4, t = lane % 4. Operands in shared memory are named by a descriptor. One that is
// stored by rows of k (its k runs along a panel's row) advances 32 bytes for 16 k; one that is stored by rows of m or
// n advances 2048 bytes for 16 k (these are "transposed").

__device__ __forceinline__ void wgmma_fence() {  // registers of the accumulators were written by other instructions
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The operand `offset` bytes, a multiple of 16, behind an address of this block's shared memory. Panels that follow
// each other along m or n, for transposed operands, are one panel apart. Eight rows: 1024 bytes.
__device__ __forceinline__ uint64_t wgmma_operand(unsigned address, int offset = 0) {
    return (uint64_t)(1024 >> 4 | 1 << 30) << 32 | (PANEL_BYTES >> 4 << 16) + (address >> 4) + (offset >> 4);
}
// An operand of eight columns, "transposed": eight numbers for each k, 16 bytes, one k after the other
__device__ __forceinline__ uint64_t wgmma_narrow_operand(unsigned address, int offset = 0) {
    return (uint64_t)(128 >> 4) << 32 | (128 >> 4 << 16) + (address >> 4) + (offset >> 4);
}

// The lists of registers that the instruction's text needs
#define WGMMA_NAMES_4 "{%0, %1, %2, %3}, "
#define WGMMA_NAMES_32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define WGMMA_NAMES_64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define WGMMA_NAMES_96 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
#define WGMMA_NAMES_128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define WGMMA_D8(i)                                                                                      \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define WGMMA_D32(i) WGMMA_D8(i), WGMMA_D8(i + 8), WGMMA_D8(i + 16), WGMMA_D8(i + 24)
#define WGMMA_ACC_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define WGMMA_ACC_32 WGMMA_D32(0)
#define WGMMA_ACC_64 WGMMA_D32(0), WGMMA_D32(32)
#define WGMMA_ACC_96 WGMMA_D32(0), WGMMA_D32(32), WGMMA_D32(64)
#define WGMMA_ACC_128 WGMMA_D32(0), WGMMA_D32(32), WGMMA_D32(64), WGMMA_D32(96)

#define WGMMA_SS(N, COUNT, A, B, SUM, TA, TB)                                                        \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #SUM ", 0;\n"                              \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " WGMMA_NAMES_##COUNT    \
                 "%" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                              \
                 : WGMMA_ACC_##COUNT                                                                 \
                 : "l"(a), "l"(b), "r"((int)sum), "n"(TRANS_A), "n"(TRANS_B))
#define WGMMA_RS(N, COUNT, A0, A1, A2, A3, B, SUM, TB)                                               \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #SUM ", 0;\n"                              \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " WGMMA_NAMES_##COUNT    \
                 "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}\n"       \
                 : WGMMA_ACC_##COUNT                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)sum), "n"(TRANS_B))

// d += A B, or d = A B if not sum; both operands in shared memory
template <int TRANS_A, int TRANS_B>
__device__ __forceinline__ void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, bool sum) {
    WGMMA_SS(64, 32, 32, 33, 34, 35, 36);
}
template <int TRANS_A, int TRANS_B>
__device__ __forceinline__ void wgmma_ss(float (&d)[64], uint64_t a, uint64_t b, bool sum) {  // N = 128
    WGMMA_SS(128, 64, 64, 65, 66, 67, 68);
}
template <int TRANS_A, int TRANS_B>
__device__ __forceinline__ void wgmma_ss(float (&d)[4], uint64_t a, uint64_t b, bool sum) {  // N = 8
    WGMMA_SS(8, 4, 4, 5, 6, 7, 8);
}
// A in registers, as D lies: a[0] rows g, k 2t and 2t + 1; a[1] rows g + 8; a[2], a[3] the same with k + 8
template <int TRANS_B, int COUNT>
__device__ __forceinline__ void wgmma_rs(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b, bool sum) {
    static_assert(COUNT == 4 || COUNT == 32 || COUNT == 64 || COUNT == 96 || COUNT == 128, "N = 8, 64 .. 256");
    if constexpr (COUNT == 4) WGMMA_RS(8, 4, 4, 5, 6, 7, 8, 9, 10);
    if constexpr (COUNT == 32) WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (COUNT == 64) WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, 70);
    if constexpr (COUNT == 96) WGMMA_RS(192, 96, 96, 97, 98, 99, 100, 101, 102);
    if constexpr (COUNT == 128) WGMMA_RS(256, 128, 128, 129, 130, 131, 132, 133, 134);
}

// ----------------------------------------------------------------------------------------------------------------
// Four 8 x 8 matrices between registers and shared memory, each row 16 bytes at an address that lane 8 i + r names for
// matrix i, row r. Transposed: a register holds two elements of a column of the matrix in memory.

__device__ __forceinline__ void matrices_store(unsigned address, unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}
__device__ __forceinline__ void matrices_store_transposed(unsigned address, unsigned r0, unsigned r1, unsigned r2,
                                                          unsigned r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}
__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; what is below 2^-126 is 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ unsigned pack_two(float x, float y) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *(unsigned *)&pair;
}
__device__ __forceinline__ float2 unpack_two(unsigned pair) {  // the lower half first
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

#endif
