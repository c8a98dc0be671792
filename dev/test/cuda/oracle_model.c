// oracle_model.c: the whole CPU trainer for test_xlstm.cu, behind its backend interface. In double: in float its own
// gradients are up to 6e-4 from the true ones where sums cancel, no nearer than those of the GPU.
#define REAL_DOUBLE
#include "../../../train_xlstm.c"

const Backend *oracle_backend(void) { return &cpu_backend; }
