// floats.cuh: V consecutive elements between memory and registers, as float. V is 1, or a multiple of VEC<F>: then the
// pointer is aligned to 16 bytes and every access has 16 bytes.
#ifndef XLSTMC_FLOATS_CUH
#define XLSTMC_FLOATS_CUH

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

#endif
