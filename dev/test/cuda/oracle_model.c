// oracle_model.c: the whole CPU trainer for test_xlstm.cu, behind its backend interface.
#include "../../../train_xlstm.c"

const Backend *oracle_backend(void) { return &cpu_backend; }
