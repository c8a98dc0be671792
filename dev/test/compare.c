// compare.c: compares two safetensors files tensor by tensor, for the parity test.
//
//   build/compare EXPECTED ACTUAL PREFIX=TOLERANCE...        e.g. logits=1e-5 grad=1e-4 loss=1e-5
//
// Prints the relative L2 distance |a - e| / |e| of every tensor and the worst of each prefix. Every tensor must be in
// both files, in the same shape, and its name must begin with one of the prefixes. Exit code 0 if all are within
// tolerance, 1 if not, 2 or 3 if a file is not there or damaged.
//
// The recurrent kernel and the bias of an slstm block may stand in EXPECTED in the layout of the authors' plain
// implementation (doc/checkpoint.md); they are then compared in ours.

#include <math.h>

#include "../../xlstmc/safetensors.h"

typedef struct {
    const char *prefix;
    size_t length;
    double tolerance, worst;
} Limit;

static void open_or_die(SafeTensors *s, const char *path) {
    char why[400];
    int code = safetensors_open(s, path, why, sizeof why);
    if (code) die(code, "%s", why);
}

static float *values_or_die(const SafeTensors *s, const SafeTensor *t) {
    char why[400];
    float *x = (float *)xcalloc(t->count, sizeof(float));
    int code = safetensors_read(s, t, 0, t->count, x, why, sizeof why);
    if (code) die(code, "%s", why);
    return x;
}

static int same_shape(const SafeTensor *a, const SafeTensor *b) {
    int same = a->ndim == b->ndim;
    for (int k = 0; same && k < a->ndim; k++) same = a->shape[k] == b->shape[k];
    return same;
}

// x[groups][rows][cols][inner] -> x[groups][cols][rows][inner]
static void swap_axes(float *x, size_t groups, size_t rows, size_t cols, size_t inner) {
    size_t size = rows * cols * inner;
    float *copy = (float *)xcalloc(size, sizeof(float));
    for (size_t g = 0; g < groups; g++) {
        memcpy(copy, x + g * size, sizeof(float) * size);
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0; c < cols; c++)
                memcpy(x + g * size + (c * rows + r) * inner, copy + (r * cols + c) * inner, sizeof(float) * inner);
    }
    free(copy);
}

// The recurrent kernel of the block that an slstm bias belongs to; NULL if the tensor is no such bias.
static const SafeTensor *kernel_of_bias(const SafeTensors *s, const char *name) {
    static const char bias[] = "slstm_cell._bias_", kernel[] = "slstm_cell._recurrent_kernel_";
    char other[512];
    size_t length = strlen(name), tail = sizeof bias - 1;
    if (length < tail || strcmp(name + length - tail, bias) != 0) return NULL;
    format_into(other, sizeof other, "%.*s%s", (int)(length - tail), name, kernel);
    return safetensors_find(s, other);
}

// Brings x from the plain layout, if the recurrent kernel is [heads, 4d, d], to ours. Returns 1 if the shapes then
// agree.
static int to_our_layout(const SafeTensors *s, const SafeTensor *expected, const SafeTensor *actual, float *x) {
    const SafeTensor *kernel = kernel_of_bias(s, expected->name);
    if (kernel && kernel->ndim == 3 && kernel->shape[1] == 4 * kernel->shape[2])
        swap_axes(x, 1, 4, kernel->shape[0], kernel->shape[2]);  // [4, heads, d] -> [heads, 4, d]
    if (same_shape(expected, actual)) return 1;
    if (!strstr(expected->name, "_recurrent_kernel_") || expected->ndim != 3 || actual->ndim != 3) return 0;
    const size_t *e = expected->shape, *a = actual->shape;
    if (e[0] != a[0] || e[1] != a[2] || e[2] != a[1]) return 0;
    swap_axes(x, e[0], e[1], e[2], 1);
    return 1;
}

// Relative L2 distance; infinite if anything is not finite.
static double relative_l2(const float *a, const float *e, size_t n) {
    double difference = 0, size = 0;
    for (size_t k = 0; k < n; k++) {
        difference += ((double)a[k] - e[k]) * ((double)a[k] - e[k]);
        size += (double)e[k] * e[k];
    }
    if (!isfinite(difference) || !isfinite(size)) return INFINITY;
    return difference == 0 ? 0 : sqrt(difference / size);
}

static Limit *limit_of(Limit *limits, int count, const char *name) {
    for (int k = 0; k < count; k++)
        if (strncmp(name, limits[k].prefix, limits[k].length) == 0) return &limits[k];
    return NULL;
}

static int compare_tensor(const SafeTensors *expected, const SafeTensors *actual, const SafeTensor *e, Limit *limit) {
    const SafeTensor *a = safetensors_find(actual, e->name);
    if (!a || !limit) {
        printf("FAIL %-60s %s\n", e->name, a ? "no tolerance given for such a name" : "missing");
        return 0;
    }
    float *x = values_or_die(expected, e), *y = values_or_die(actual, a);
    int same = to_our_layout(expected, e, a, x);
    double error = same ? relative_l2(y, x, e->count) : INFINITY;
    int ok = error <= limit->tolerance;
    printf("%s %-60s %.1e <= %.0e%s\n", ok ? "ok  " : "FAIL", e->name, error, limit->tolerance, same ? "" : " (shape)");
    if (error > limit->worst) limit->worst = error;
    free(x);
    free(y);
    return ok;
}

int main(int argc, char **argv) {
    SafeTensors expected, actual;
    int count = argc - 3, good = 1;
    if (count < 1) die(EXIT_USAGE, "usage: compare EXPECTED ACTUAL PREFIX=TOLERANCE...");
    Limit *limits = (Limit *)xcalloc((size_t)count, sizeof(Limit));
    for (int k = 0; k < count; k++) {
        const char *at = strchr(argv[k + 3], '=');
        char *end = NULL;
        double tolerance = at ? strtod(at + 1, &end) : 0;
        if (!at || end == at + 1 || *end)
            die(EXIT_USAGE, "%s is not PREFIX=TOLERANCE, such as logits=1e-5", argv[k + 3]);
        Limit limit = {argv[k + 3], (size_t)(at - argv[k + 3]), tolerance, -1};
        limits[k] = limit;
    }
    open_or_die(&expected, argv[1]);
    open_or_die(&actual, argv[2]);
    for (size_t k = 0; k < expected.num_tensors; k++) {
        const SafeTensor *e = &expected.tensors[k];
        if (!compare_tensor(&expected, &actual, e, limit_of(limits, count, e->name))) good = 0;
    }
    for (size_t k = 0; k < actual.num_tensors; k++) {
        if (safetensors_find(&expected, actual.tensors[k].name)) continue;
        printf("FAIL %-60s not expected\n", actual.tensors[k].name);
        good = 0;
    }
    for (int k = 0; k < count; k++)
        if (limits[k].worst < 0) good = 0;  // nothing was compared: not what was asked for
    printf("%s", good ? "ok  " : "FAIL");
    for (int k = 0; k < count; k++) printf("  %.*s %.1e", (int)limits[k].length, limits[k].prefix, limits[k].worst);
    printf("\n");
    safetensors_close(&expected);
    safetensors_close(&actual);
    free(limits);
    return !good;
}
