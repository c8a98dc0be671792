// floats.cuh: consecutive elements between memory and registers, as float. load_floats and store_floats move V of them,
// in accesses of 16 bytes, or one (V = 1). load_group and store_group move N in one access of 8 or 16 bytes where the
// pointer allows it: for layers that think in fours, and offsets that are aligned to four elements only.
#ifndef XLSTMC_FLOATS_CUH
#define XLSTMC_FLOATS_CUH

#include <type_traits>

#include "cuda_util.cuh"

template <int V, typename F>
__device__ inline void load_floats(float (&dst)[V], const F *p) {
    if constexpr (V == 1) {
        dst[0] = to_float(*p);
    } else {
        static_assert(V % VEC<F> == 0, "whole vectors");
#pragma unroll
        for (int k = 0; k < V; k += VEC<F>) {
            Vec<F> v = load_vec(p + k);
#pragma unroll
            for (int j = 0; j < VEC<F>; j++) dst[k + j] = v[j];
        }
    }
}

template <int V, typename F>
__device__ inline void store_floats(F *p, const float (&src)[V]) {
    if constexpr (V == 1) {
        *p = from_float<F>(src[0]);
    } else {
        static_assert(V % VEC<F> == 0, "whole vectors");
#pragma unroll
        for (int k = 0; k < V; k += VEC<F>) {
            Vec<F> v;
#pragma unroll
            for (int j = 0; j < VEC<F>; j++) v.set(j, src[k + j]);
            store_vec(p + k, v);
        }
    }
}

// 1 if rows of the given stride (in elements) can be read four elements at a time from p on.
template <typename F>
static inline bool quads_aligned(const F *p, size_t stride) {
    return (uintptr_t)p % (4 * sizeof(F)) == 0 && stride % 4 == 0;
}

// N neighbouring elements of 8 or 16 bytes together, moved by one instruction.
template <typename F, int N>
union Neighbours {
    typename std::conditional<N * sizeof(F) == 16, uint4, uint2>::type bits;
    F x[N];
};

// As load_floats, of what nobody needs again soon: it leaves the caches before the rest does
template <int V, typename F>
__device__ inline void load_floats_once(float (&dst)[V], const F *p) {
    if constexpr (V == 1) {
        dst[0] = to_float(*p);
    } else {
        static_assert(V == VEC<F>, "one vector");
        Neighbours<F, V> v;
        v.bits = __ldcs((const decltype(v.bits) *)p);
#pragma unroll
        for (int k = 0; k < V; k++) dst[k] = to_float(v.x[k]);
    }
}

// VECTOR: p is aligned to N elements. Otherwise one element after the other, from anywhere.
template <bool VECTOR, typename F, int N>
__device__ inline void load_group(float (&dst)[N], const F *p) {
    if constexpr (VECTOR) {
        Neighbours<F, N> v;
        static_assert(sizeof v.bits == N * sizeof(F), "8 or 16 bytes");
        v.bits = *(const decltype(v.bits) *)p;
#pragma unroll
        for (int k = 0; k < N; k++) dst[k] = to_float(v.x[k]);
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) dst[k] = to_float(p[k]);
    }
}
template <bool VECTOR, typename F, int N>
__device__ inline void store_group(F *p, const float (&src)[N]) {
    if constexpr (VECTOR) {
        Neighbours<F, N> v;
        static_assert(sizeof v.bits == N * sizeof(F), "8 or 16 bytes");
#pragma unroll
        for (int k = 0; k < N; k++) v.x[k] = from_float<F>(src[k]);
        *(decltype(v.bits) *)p = v.bits;
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) p[k] = from_float<F>(src[k]);
    }
}
template <bool VECTOR, typename F, int N>
__device__ inline void add_to_group(F *p, const float (&add)[N]) {  // p[k] += add[k]
    float x[N];
    load_group<VECTOR>(x, p);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] += add[k];
    store_group<VECTOR>(p, x);
}

// Sum over the block, in thread 0, in a fixed order. Every thread must call it; blockDim.x is a multiple of 32.
__device__ inline double block_sum_double(double x) {
    __shared__ double sums[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
    for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
    __syncthreads();  // the sums of the last call have been read
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; threadIdx.x == 0 && w < warps; w++) total += sums[w];
    return total;
}

#endif
