// mma.cuh: products of one warp, as every chip since sm_80 has them: D[16, 8] += A[16, 16] B[16, 8] in bf16 with sums
// in float, and the loads of their operands. With g = lane / 4, t = lane % 4 a thread holds D[g][2t], D[g][2t + 1], D[g
// + 8][2t], D[g + 8][2t + 1]; of A the pairs from column 2t on of rows g and g + 8, then the same from 2t + 8 on; of B
// rows 2t, 2t + 1 of column g, then rows 2t + 8, 2t + 9.
#ifndef XLSTMC_MMA_CUH
#define XLSTMC_MMA_CUH

#include "cuda_util.cuh"

// Four 8 x 8 matrices; lane 8i + r gives the address of row r of matrix i. Transposed: a register holds two elements of
// a column of the matrix in memory.
__device__ inline void ldmatrix(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
__device__ inline void ldmatrix_trans(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
__device__ inline void ldmatrix(unsigned (&r)[4], const bf16 *p) { ldmatrix(r, (unsigned)__cvta_generic_to_shared(p)); }
__device__ inline void ldmatrix_trans(unsigned (&r)[4], const bf16 *p) {
    ldmatrix_trans(r, (unsigned)__cvta_generic_to_shared(p));
}
__device__ inline void mma(float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma(c, make_uint4(a[0], a[1], a[2], a[3]), b0, b1);
}

#endif
