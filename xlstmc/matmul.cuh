// matmul.cuh: matrix products by cuBLASLt, written for row-major matrices. For every shape the library's heuristic is
// asked once and its first answer is kept: it depends on the shape and the GPU only, so the same run gives the same
// bits (trying candidates by the clock would not).
#ifndef XLSTMC_MATMUL_CUH
#define XLSTMC_MATMUL_CUH

#include <cuda.h>

#include "cuda_util.cuh"

typedef struct {
    const void *p;     // the first element
    size_t ld;         // elements from one row to the next, as stored
    int trans;         // 1: stored transposed
    long long stride;  // elements from one matrix of a batch to the next
} Matrix;

typedef struct {  // all that the choice of an algorithm depends on; zeroed before it is filled, compared as bytes
    int M, N, K, batch, trans_a, trans_b, type_ab, type_d, has_c;
    int align_a, align_b, align_c, align_d;
    long long ld_a, ld_b, ld_c, ld_d, stride_a, stride_b, stride_c, stride_d;
} MatmulKey;

typedef struct {
    MatmulKey key;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, c, d;
    cublasLtMatmulAlgo_t algo;
    size_t workspace;  // bytes that it wants
} MatmulPlan;

enum { MAX_MATMUL_PLANS = 1024 };
enum { MATMUL_COUNTER = 256, MAX_MATMUL_COUNTERS = 2048 };  // bytes; see matmul_graph_begins
static const size_t MATMUL_COUNTERS = (size_t)MATMUL_COUNTER * MAX_MATMUL_COUNTERS;
static const size_t MATMUL_WORKSPACE = (size_t)64 << 20;  // bytes; Hopper's kernels want 32 MiB

static struct {
    cublasLtHandle_t handle;
    char *workspace;    // counters, then that of all streams but one, then that of the side stream
    cudaStream_t side;  // the one other stream whose products run at the same time; NULL: none
    int counters;       // in use by the graph that is being captured; -1: none is
    int num_plans;
    MatmulPlan *plans;
} matmul_state;

static size_t matmul_workspace_bytes(int streams) { return MATMUL_COUNTERS + (size_t)streams * MATMUL_WORKSPACE; }

// workspace: matmul_workspace_bytes(1), with a side stream of 2
static void matmul_init(void *workspace, cudaStream_t side) {
    matmul_state.counters = -1;
    matmul_state.workspace = (char *)workspace;
    matmul_state.side = side;
    if (matmul_state.handle) return;
    CUBLAS_CHECK(cublasLtCreate(&matmul_state.handle));
    matmul_state.plans = (MatmulPlan *)xcalloc(MAX_MATMUL_PLANS, sizeof(MatmulPlan));
}

static int pointer_alignment(const void *p) {
    uintptr_t bits = (uintptr_t)p | 256;
    return (int)(bits & (~bits + 1));  // the lowest bit that is set
}

static cublasLtMatrixLayout_t matmul_layout(int type, int rows, int cols, long long ld, int batch, long long stride) {
    cublasLtMatrixLayout_t layout;  // column-major: rows and cols change places
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, (cudaDataType_t)type, cols, rows, ld));
    CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
    int64_t step = stride;
    CUBLAS_CHECK(
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step, sizeof step));
    return layout;
}

static void matmul_forget(MatmulPlan *plan) {
    if (plan->operation) {
        CUBLAS_CHECK(cublasLtMatmulDescDestroy(plan->operation));
        for (cublasLtMatrixLayout_t layout : {plan->a, plan->b, plan->c, plan->d})
            CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(layout));
    }
    memset(plan, 0, sizeof *plan);
}

// Row-major C = A B is column-major C^T = B^T A^T: the library gets B first.
static void matmul_plan(MatmulPlan *plan) {
    const MatmulKey *k = &plan->key;
    cublasOperation_t op_b = k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, op_a = k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    plan->a =
        matmul_layout(k->type_ab, k->trans_a ? k->K : k->M, k->trans_a ? k->M : k->K, k->ld_a, k->batch, k->stride_a);
    plan->b =
        matmul_layout(k->type_ab, k->trans_b ? k->N : k->K, k->trans_b ? k->K : k->N, k->ld_b, k->batch, k->stride_b);
    plan->c = matmul_layout(k->type_d, k->M, k->N, k->ld_c, k->batch, k->stride_c);
    plan->d = matmul_layout(k->type_d, k->M, k->N, k->ld_d, k->batch, k->stride_d);
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    const cublasLtMatmulPreferenceAttributes_t names[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    const uint32_t aligned[4] = {(uint32_t)k->align_b, (uint32_t)k->align_a, (uint32_t)k->align_c,
                                 (uint32_t)k->align_d};
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &MATMUL_WORKSPACE, sizeof MATMUL_WORKSPACE));
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // partial sums, too, are added in float
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes,
                                                      sizeof schemes));
    for (int i = 0; i < 4; i++)
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, names[i], &aligned[i], sizeof aligned[i]));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(matmul_state.handle, plan->operation, plan->b, plan->a,
                                                           plan->c, plan->d, preference, 1, &result, &found);
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    if (status != CUBLAS_STATUS_SUCCESS || !found || result.state != CUBLAS_STATUS_SUCCESS)
        die(EXIT_RUN, "cuBLASLt has no algorithm for a product of %d x %d by %d x %d (leading dimensions %lld, %lld)",
            k->M, k->K, k->K, k->N, k->ld_a, k->ld_b);
    plan->algo = result.algo;
    plan->workspace = result.workspaceSize;
}

// d[M, N] = op(a)[M, K] op(b)[K, N] (+ c). c may be d. Sums in float whatever the formats.
template <typename FA, typename FD>
static void matmul_general(FD *d, size_t ld_d, long long stride_d, Matrix a, Matrix b, const FD *c, size_t ld_c, int M,
                           int N, int K, int batch, cudaStream_t stream) {
    MatmulKey key;
    memset(&key, 0, sizeof key);
    key.M = M, key.N = N, key.K = K, key.batch = batch;
    key.trans_a = a.trans, key.trans_b = b.trans, key.has_c = c != NULL;
    key.type_ab = sizeof(FA) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    key.type_d = sizeof(FD) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    key.align_a = pointer_alignment(a.p), key.align_b = pointer_alignment(b.p), key.align_d = pointer_alignment(d);
    key.align_c = c ? pointer_alignment(c) : key.align_d;
    key.ld_a = (long long)a.ld, key.ld_b = (long long)b.ld, key.ld_d = (long long)ld_d;
    key.ld_c = c ? (long long)ld_c : key.ld_d;
    key.stride_a = a.stride, key.stride_b = b.stride, key.stride_c = key.stride_d = stride_d;
    int at = 0;
    while (at < imin(matmul_state.num_plans, MAX_MATMUL_PLANS) &&
           memcmp(&matmul_state.plans[at].key, &key, sizeof key) != 0)
        at++;
    MatmulPlan *plan = &matmul_state.plans[at];
    if (at == imin(matmul_state.num_plans, MAX_MATMUL_PLANS)) {  // a new one; the oldest gives way
        plan = &matmul_state.plans[matmul_state.num_plans++ % MAX_MATMUL_PLANS];
        matmul_forget(plan);
        plan->key = key;
        matmul_plan(plan);
    }
    const float one = 1, zero = 0;
    const int side = stream && stream == matmul_state.side;
    char *workspace = matmul_state.workspace + MATMUL_COUNTERS + side * MATMUL_WORKSPACE;
    size_t bytes = MATMUL_WORKSPACE;
    if (plan->workspace > 0 && plan->workspace <= MATMUL_COUNTER && matmul_state.counters >= 0 &&
        matmul_state.counters < MAX_MATMUL_COUNTERS) {
        workspace = matmul_state.workspace + MATMUL_COUNTER * matmul_state.counters++;
        bytes = MATMUL_COUNTER;
    }
    CUBLAS_CHECK(cublasLtMatmul(matmul_state.handle, plan->operation, &one, b.p, plan->b, a.p, plan->a,
                                c ? &one : &zero, c ? c : d, plan->c, d, plan->d, &plan->algo, workspace, bytes,
                                stream));
}

// Products that hand out their tiles as they go count them in a few bytes of workspace, which cuBLASLt clears before
// each: in a CUDA graph a node and two gaps, 4 to 8 us together. So in a graph every such product has a counter of its
// own, and all are cleared at once where the graph begins. Around the capture:
MAYBE_UNUSED
static void matmul_graph_begins(cudaStream_t stream) {
    CUDA_CHECK(cudaMemsetAsync(matmul_state.workspace, 0, MATMUL_COUNTERS, stream));
    matmul_state.counters = 0;
}

#if CUDART_VERSION >= 13000
#define graph_node_before cudaGraphNodeGetDependencies
#define graph_node_behind cudaGraphNodeGetDependentNodes
#define graph_add_edges cudaGraphAddDependencies
#else
#define graph_node_before cudaGraphNodeGetDependencies_v2
#define graph_node_behind cudaGraphNodeGetDependentNodes_v2
#define graph_add_edges cudaGraphAddDependencies_v2
#endif
// What comes behind a node then comes behind all that was before it.
static void graph_remove_node(cudaGraph_t graph, cudaGraphNode_t node) {
    enum { MOST = 64 };
    cudaGraphNode_t before[MOST], behind[MOST];
    cudaGraphEdgeData edges[MOST];
    size_t num_before = MOST, num_behind = MOST;
    CUDA_CHECK(graph_node_before(node, before, edges, &num_before));
    CUDA_CHECK(graph_node_behind(node, behind, edges, &num_behind));
    for (size_t i = 0; i < num_before; i++)
        for (size_t j = 0; j < num_behind; j++) CUDA_CHECK(graph_add_edges(graph, &before[i], &behind[j], NULL, 1));
    CUDA_CHECK(cudaGraphDestroyNode(node));
}

MAYBE_UNUSED
static void matmul_graph_ends(cudaGraph_t graph) {
    // The runtime's enumeration lacks a kind of node that graphs of several ranks have, and takes it for an error.
    typedef CUresult (*GraphNodeType)(CUgraphNode, CUgraphNodeType *);
    GraphNodeType type_of = (GraphNodeType)driver_function("cuGraphNodeGetType");
    size_t count = 0;
    matmul_state.counters = -1;
    CUDA_CHECK(cudaGraphGetNodes(graph, NULL, &count));
    cudaGraphNode_t *nodes = (cudaGraphNode_t *)xcalloc(count, sizeof *nodes);
    CUDA_CHECK(cudaGraphGetNodes(graph, nodes, &count));
    for (size_t k = 0; k < count; k++) {
        CUgraphNodeType type;
        cudaMemsetParams p;
        if (type_of(nodes[k], &type) != CUDA_SUCCESS) die(EXIT_RUN, "cuGraphNodeGetType failed");
        if (type != CU_GRAPH_NODE_TYPE_MEMSET) continue;
        CUDA_CHECK(cudaGraphMemsetNodeGetParams(nodes[k], &p));
        size_t at = (size_t)((char *)p.dst - matmul_state.workspace);  // huge before it
        if (at < MATMUL_COUNTERS && p.width * p.elementSize * p.height <= MATMUL_COUNTER)
            graph_remove_node(graph, nodes[k]);
    }
    free(nodes);
}

// out[rows, N] = x[rows, K] w[N, K]^T (+ residual[rows, N], which has the row stride of out)
template <typename F, typename FOut>
static void matmul_forward(FOut *out, size_t ld_out, const F *x, size_t ld_x, const F *w, const FOut *residual,
                           int rows, int N, int K, cudaStream_t stream) {
    Matrix a = {x, ld_x, 0, 0}, b = {w, (size_t)K, 1, 0};
    matmul_general<F, FOut>(out, ld_out, 0, a, b, residual, ld_out, rows, N, K, 1, stream);
}

// dx[rows, K] (+)= dout[rows, N] w[N, K]
template <typename F>
static void matmul_inputs(F *dx, size_t ld_dx, int accumulate, const F *dout, size_t ld_dout, const F *w, int rows,
                          int N, int K, cudaStream_t stream) {
    Matrix dy = {dout, ld_dout, 0, 0}, weight = {w, (size_t)K, 0, 0};
    matmul_general<F, F>(dx, ld_dx, 0, dy, weight, accumulate ? dx : NULL, ld_dx, rows, K, N, 1, stream);
}
// dw[N, K] (+)= dout[rows, N]^T x[rows, K]
template <typename F, typename FD>
static void matmul_weights(FD *dw, int accumulate, const F *dout, size_t ld_dout, const F *x, size_t ld_x, int rows,
                           int N, int K, cudaStream_t stream) {
    Matrix dy = {dout, ld_dout, 1, 0}, in = {x, ld_x, 0, 0};
    matmul_general<F, FD>(dw, (size_t)K, 0, dy, in, accumulate ? dw : NULL, (size_t)K, N, K, rows, 1, stream);
}

#endif
