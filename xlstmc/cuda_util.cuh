// cuda_util.cuh: what all CUDA kernels share: checked calls, the two number formats, 16-byte vectors, sums over a warp
// and a block, and the arena that device memory is planned with.
//
// Kernels are templates on F, the format of activations: float, or bf16 with all arithmetic in float. A launcher stands
// below its kernel, takes the stream last, and checks the launch.
#ifndef XLSTMC_CUDA_UTIL_CUH
#define XLSTMC_CUDA_UTIL_CUH

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "util.h"

typedef __nv_bfloat16 bf16;

// ----------------------------------------------------------------------------------------------------------------
// Checked calls

static void cuda_check_(cudaError_t status, const char *call, const char *file, int line) {
    if (status == cudaSuccess) return;
    die(EXIT_RUN, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(status));
}
#define CUDA_CHECK(call) cuda_check_((call), #call, __FILE__, __LINE__)
#define LAUNCH_CHECK() cuda_check_(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)

static void cublas_check_(cublasStatus_t status, const char *call, const char *file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    die(EXIT_RUN, "%s:%d: %s: cuBLAS status %d", file, line, call, (int)status);
}
#define CUBLAS_CHECK(call) cublas_check_((call), #call, __FILE__, __LINE__)

enum { NO_RESET = -(1 << 30) };  // doc_start of a token before which no document began in this window

MAYBE_UNUSED
static int imin(int a, int b) { return a < b ? a : b; }
MAYBE_UNUSED
static int imax(int a, int b) { return a > b ? a : b; }
MAYBE_UNUSED
static int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }

// ----------------------------------------------------------------------------------------------------------------
// Kernels that follow each other closely (programmatic dependent launch, Hopper and later). One that is launched by
// launch_early comes to the multiprocessors as soon as all blocks of the one before it in the stream have ended, before
// what they wrote has reached everyone. What takes a microsecond or two between two kernels, and what the later one
// does before it needs memory, is then done by the time its turn comes. (It could come earlier, while blocks of the one
// before still work: that costs these more than it gains.)
//
// Every such kernel calls wait_for_earlier in all threads before it reads or writes global memory: that returns when
// the kernel before has ended and its results are seen, and since that one has waited, too, all before it.

__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the kernels of this program know how to wait (all are compiled for the same architectures), and the driver
// how to keep such launches in a graph
MAYBE_UNUSED
static bool kernels_wait(const void *kernel) {
    static int known = -1;
    if (known >= 0) return known;
    int driver;
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    known = attributes.ptxVersion >= 90 && CUDART_VERSION >= 12040 && driver >= 12040;
    return known;
}

// Whether the GPU takes clusters of so many of these blocks; on Hopper up to 8, and 16 where it is cut so
MAYBE_UNUSED
static bool clusters_fit(const void *kernel, int cluster, dim3 block, size_t shared_bytes) {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    int active;
    if (cluster <= 8) return true;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = cluster, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute, config.numAttrs = 1;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&active, kernel, &config));
    return active > 0;
}

// launch_early in clusters of so many blocks along x, which fit
template <typename Kernel, typename... Args>
static void launch_early_clusters(Kernel *kernel, dim3 grid, int cluster, dim3 block, size_t shared_bytes,
                                  cudaStream_t stream, const Args &...args) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = attributes;
    if (cluster > 1) {
        cudaLaunchAttribute *of_cluster = &attributes[config.numAttrs++];
        of_cluster->id = cudaLaunchAttributeClusterDimension;
        of_cluster->val.clusterDim.x = cluster, of_cluster->val.clusterDim.y = of_cluster->val.clusterDim.z = 1;
    }
    if (kernels_wait((const void *)kernel)) {
        cudaLaunchAttribute *early = &attributes[config.numAttrs++];
        early->id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early->val.programmaticStreamSerializationAllowed = 1;
    }
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}
template <typename Kernel, typename... Args>
static void launch_early(Kernel *kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         const Args &...args) {
    launch_early_clusters(kernel, grid, 1, block, shared_bytes, stream, args...);
}

// ----------------------------------------------------------------------------------------------------------------
// Number formats

static __host__ __device__ inline float to_float(float x) { return x; }
static __host__ __device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <typename F>
__host__ __device__ inline F from_float(float x);
template <>
__host__ __device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__host__ __device__ inline bf16 from_float<bf16>(float x) {
    return __float2bfloat16(x);
}

// VEC<F> elements are 16 bytes: the widest load and store of a thread.
template <typename F>
constexpr int VEC = 16 / (int)sizeof(F);

template <typename F>
struct alignas(16) Vec {
    F x[VEC<F>];
    __device__ float operator[](int k) const { return to_float(x[k]); }
    __device__ void set(int k, float value) { x[k] = from_float<F>(value); }
};
template <typename F>
__device__ inline Vec<F> load_vec(const F *p) {  // p must be aligned to 16 bytes
    union {
        uint4 bits;
        Vec<F> vec;
    } u = {*(const uint4 *)p};
    return u.vec;
}
template <typename F>
__device__ inline void store_vec(F *p, const Vec<F> &v) {
    *(uint4 *)p = *(const uint4 *)&v;
}

// 1 if rows of the given stride (in elements) can be read in 16-byte vectors from p on.
template <typename F>
static inline bool vector_aligned(const F *p, size_t stride) {
    return (uintptr_t)p % 16 == 0 && stride % VEC<F> == 0;
}

// ----------------------------------------------------------------------------------------------------------------
// Sums. Fixed order: the same inputs give the same bits.

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int k = 16; k > 0; k /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, k));
    return x;
}
// Sum over the block, in all threads. Every thread must call it; blockDim.x is a multiple of 32, at most 1024.
__device__ inline float block_sum(float x) {
    __shared__ float sums[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();  // the sums of the last call have been read
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? sums[lane] : 0.0f);
}
__device__ inline float block_max(float x) {
    __shared__ float tops[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) tops[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? tops[lane] : -INFINITY);
}

// The fast division errs by 2 ulp; a division rounded to the last bit would be a branch an element.
__device__ inline float sigmoidf(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ inline float siluf(float x) { return x * sigmoidf(x); }
__device__ inline float silu_gradf(float x) {
    float s = sigmoidf(x);
    return s * (1.0f + x * (1.0f - s));
}

// dst[c] += sum over parts of partial[part, c], in a fixed order. Kernels that sum over rows (gradients of scales
// and biases) let each block of a fixed number of blocks, `parts`, write the sums of its own rows.
template <int N>  // columns of a block, and parts that it reads at once
__device__ inline void add_partials_block(float *dst, const float *partial, int parts, size_t width) {
    __shared__ float sums[N][N + 1];
    size_t c = (size_t)blockIdx.x * N + threadIdx.x;
    float sum = 0;
    for (int p = threadIdx.y; p < parts && c < width; p += N) sum += partial[p * width + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || c >= width) return;
    for (int k = 1; k < N; k++) sum += sums[k][threadIdx.x];
    dst[c] += sum;
}
template <int N>
static __global__ void __launch_bounds__(N *N)
    add_partials_kernel(float *dst, const float *partial, int parts, size_t width) {
    add_partials_block<N>(dst, partial, parts, width);
}
template <int N = 32>
static void add_partials(float *dst, const float *partial, int parts, size_t width, cudaStream_t stream) {
    add_partials_kernel<N><<<ceil_div(width, N), dim3(N, N), 0, stream>>>(dst, partial, parts, width);
    LAUNCH_CHECK();
}

// A function of the driver, found at run time, so that nothing is linked with the driver
MAYBE_UNUSED
static void *driver_function(const char *name) {
    void *found = NULL;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
#else
    CUDA_CHECK(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result));
#endif
    if (result != cudaDriverEntryPointSuccess || !found)
        die(EXIT_RUN, "the CUDA driver has no %s; a driver for CUDA 12.0 or newer is needed", name);
    return found;
}

// ----------------------------------------------------------------------------------------------------------------
// Device memory: every buffer is taken from an arena, first with no memory behind it to learn the size, then for real

typedef struct {
    char *base;  // NULL: only count
    size_t used;
} Arena;

template <typename X>
static X *take(Arena *a, size_t count) {  // aligned to 256 bytes
    X *p = a->base ? (X *)(a->base + a->used) : NULL;
    a->used += (count * sizeof(X) + 255) / 256 * 256;
    return p;
}

// ----------------------------------------------------------------------------------------------------------------
// x, but the compiler does not know it: what is computed from it is computed where it is used, in a loop again and
// again, rather than before the loop and held in registers that the sums need.
__device__ inline unsigned not_hoisted(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}

#endif
