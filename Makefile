# Builds the trainers and their tests.
#
#   make              train_xlstm and data/tokenize; train_xlstmcu too where nvcc is
#   make test         builds and runs every test; the last line is "N passed, N failed"
#   make tests        builds the test programs only
#   make test-gpu     builds and runs the tests that need a GPU
#   make clean        removes what was built
#
#   V=1               shows the commands
#   DEBUG=1           no optimisation, debug information
#   SANITIZE=1        address and undefined-behaviour sanitizers
#   NO_OMP=1          without OpenMP (one thread)
#   NO_OPENBLAS=1     the built-in matrix product even where OpenBLAS is
#   NO_MPI=1          one process only, even where MPI is
#   NO_NCCL=1         one GPU only, even where NCCL is
#   SM=90a            CUDA code for one chip (80, 86, 89, 90a, ...); SM=all for all of them and newer ones. Default: the
#                     chip of the GPU here, or all if there is none
#   CC=clang CFLAGS=... LDFLAGS=...    as usual; CFLAGS come after our own
#
# Libraries are found by compiling and linking a program that uses them. A change of flags, compiler or libraries
# rebuilds. Objects go to build/.

ifeq ($(origin CC),default)
CC := cc
endif
BUILD := build
Q := $(if $(V),,@)
GOALS := $(or $(MAKECMDGOALS),all)

# ---------------------------------------------------------------------------------------------------------------------
# What is there

H := \#
# $(call try,program,flags): 1 if the C program compiles and links with the flags
try = $(shell printf '$(1)\n' | $(CC) -x c - -o /dev/null $(2) >/dev/null 2>&1 && echo 1)
# $(call first,program,candidates): the first candidate that works. Within a candidate | stands for a space.
first = $(subst |, ,$(firstword $(foreach c,$(2),$(if $(call try,$(1),$(subst |, ,$(c))),$(c)))))
empty :=
space := $(empty) $(empty)

ifneq ($(filter-out clean,$(GOALS)),)
EMPTY_MAIN := int main(void) { return 0; }
NATIVE := $(call first,$(EMPTY_MAIN),-march=native -mcpu=native)
BREW := $(firstword $(wildcard /opt/homebrew/opt /usr/local/opt))

ifndef NO_OMP
OMP_MAIN := $(H)include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }
OMP := $(call first,$(OMP_MAIN),-fopenmp \
    $(if $(BREW),-Xpreprocessor|-fopenmp|-I$(BREW)/libomp/include|-L$(BREW)/libomp/lib|-lomp))
endif

BLAS_MAIN := $(H)include <cblas.h>\nint main(void) { openblas_set_num_threads(1); return (int)cblas_sasum(0, 0, 1); }
ifndef NO_OPENBLAS
PKG_BLAS := $(shell pkg-config --cflags --libs openblas 2>/dev/null)
BLAS := $(call first,$(BLAS_MAIN),$(subst $(space),|,$(strip $(PKG_BLAS))) \
    -lopenblas -I/usr/include/openblas|-lopenblas \
    $(if $(BREW),-I$(BREW)/openblas/include|-L$(BREW)/openblas/lib|-lopenblas))
endif

# MPI: what mpicc would add to the compiler's command line (Open MPI, then MPICH and its relatives), or pkg-config
MPI_MAIN := $(H)include <mpi.h>\nint main(void) { return MPI_Finalize(); }
ifndef NO_MPI
MPI_WORDS = $(subst $(space),|,$(strip $(filter -I% -D% -L% -l% -Wl% -pthread,$(1))))
MPI := $(call first,$(MPI_MAIN),$(call MPI_WORDS,$(shell mpicc --showme:compile 2>/dev/null; \
        mpicc --showme:link 2>/dev/null)) \
    $(call MPI_WORDS,$(shell mpicc -show 2>/dev/null)) \
    $(call MPI_WORDS,$(shell pkg-config --cflags --libs ompi-c 2>/dev/null)) \
    $(call MPI_WORDS,$(shell pkg-config --cflags --libs mpich 2>/dev/null)))
endif

CUDA_OF_NVCC := $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v nvcc 2>/dev/null)))
CUDA_HOME ?= $(or $(wildcard $(CUDA_PATH)),$(CUDA_OF_NVCC),$(wildcard /usr/local/cuda))
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null))

# NCCL, beside the toolkit or in it
NCCL_MAIN := $(H)include <nccl.h>\nint main(void) { ncclUniqueId id; return ncclGetUniqueId(&id); }
ifneq ($(if $(NO_NCCL),,$(NVCC)),)
NCCL := $(call first,$(NCCL_MAIN),-I$(CUDA_HOME)/include|-L$(CUDA_HOME)/lib64|-lnccl)
endif
GIT := $(shell git describe --always --dirty 2>/dev/null)
endif

# ---------------------------------------------------------------------------------------------------------------------
# Flags. No -ffast-math: the guards against NaN and the order of sums must stay as written.

OPTIMISE := -O3 $(NATIVE) -fno-math-errno -fno-trapping-math -ffp-contract=fast
ifdef DEBUG
OPTIMISE := -O0 -g
endif
ifdef SANITIZE
OPTIMISE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
endif
WARN := -Wall -Wextra $(if $(OMP),,-Wno-unknown-pragmas) \
    $(if $(findstring clang,$(shell $(CC) --version 2>/dev/null)),-Wno-pass-failed)
libs_of = $(filter -L% -l% -Wl%,$(1))
ALL_CFLAGS := $(strip -std=gnu11 $(OPTIMISE) $(WARN) $(filter-out -L% -l%,$(OMP)) $(CFLAGS))
MPI_CFLAGS := $(if $(MPI),-DUSE_MPI $(filter-out -L% -l% -Wl%,$(MPI)))
MPI_LIBS := $(call libs_of,$(MPI))
BLAS_CFLAGS := $(if $(BLAS),-DUSE_OPENBLAS $(filter-out -L% -l%,$(BLAS)))
BLAS_LIBS := $(call libs_of,$(BLAS))
LIBS := $(call libs_of,$(OMP)) -lm
# For the first line of log.jsonl. A new commit alone rebuilds nothing: if no file changed, the program is the same.
ABOUT := -DBUILD_FLAGS='"$(subst ",,$(ALL_CFLAGS))"' -DBUILD_GIT='"$(GIT)"'

# ---------------------------------------------------------------------------------------------------------------------
# Programs

.PHONY: all tests test print-tests print-mpi print-mpi-libs print-nvcc clean FORCE
.DELETE_ON_ERROR:

CUDA_PROGRAMS := $(if $(and $(NVCC),$(wildcard train_xlstm.cu)),train_xlstmcu)
all: train_xlstm data/tokenize $(CUDA_PROGRAMS) | summary

.PHONY: summary
summary:
	@echo "compiler $(CC) | OpenMP $(if $(OMP),yes,no) | OpenBLAS $(if $(BLAS),yes,no: built-in matmul) |" \
	    "MPI $(if $(MPI),yes,no: one process) |" \
	    "nvcc $(if $(NVCC),$(NVCC) SM=$(SM) | NCCL $(if $(NCCL),yes,no: one GPU),no)$(if $(DEBUG), | DEBUG)$(if \
	    $(SANITIZE), | SANITIZE)"

# What everything depends on: rewritten only when it changes.
FLAGS := $(CC) $(subst ',,$(ALL_CFLAGS) $(BLAS_CFLAGS) $(BLAS_LIBS) $(MPI_CFLAGS) $(MPI_LIBS) $(LIBS) $(LDFLAGS))
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(FLAGS)' | cmp -s - $@ || echo '$(FLAGS)' >$@

# $(eval $(call program,PROGRAM,SOURCE,CFLAGS,LIBS)): one source file, one program
define program
$(1): $(BUILD)/obj/$(notdir $(1)).o
	@echo "  link     $$@"
	$(Q)$(CC) $(ALL_CFLAGS) $$< -o $$@ $(4) $(LIBS) $(LDFLAGS)
$(BUILD)/obj/$(notdir $(1)).o: $(2) $(BUILD)/flags
	@mkdir -p $$(@D)
	@echo "  compile  $(2) -> $$@"
	$(Q)$(CC) $(ALL_CFLAGS) $(3) -MMD -MP -c $$< -o $$@
endef

$(eval $(call program,train_xlstm,train_xlstm.c,$(BLAS_CFLAGS) $(MPI_CFLAGS) $(ABOUT),$(BLAS_LIBS) $(MPI_LIBS)))
$(eval $(call program,data/tokenize,data/tokenize.c))

# Tests of the mathematics: in double, in float, and in float with OpenBLAS where it is. The built-in matmul is part of
# what they check, so all other tests do without OpenBLAS.
TESTS := test_xlstm test_xlstm_float $(if $(BLAS),test_xlstm_openblas) test_files fuzz_files test_loop
HELPERS := faulty_trainer compare
$(eval $(call program,$(BUILD)/test_xlstm,test_xlstm.c,-DTESTING -DREAL_DOUBLE $(MPI_CFLAGS),$(MPI_LIBS)))
$(eval $(call program,$(BUILD)/test_xlstm_float,test_xlstm.c,-DTESTING $(MPI_CFLAGS),$(MPI_LIBS)))
$(eval $(call program,$(BUILD)/test_xlstm_openblas,test_xlstm.c,-DTESTING $(BLAS_CFLAGS),$(BLAS_LIBS)))
# dev/test/NAME.c, dev/fuzz/NAME.c -> build/NAME, quick to compile; dev/bench, which measures, as the trainer
$(foreach source,$(wildcard dev/test/*.c dev/fuzz/*.c),\
    $(eval $(call program,$(BUILD)/$(basename $(notdir $(source))),$(source),-DTESTING -O1 $(MPI_CFLAGS),$(MPI_LIBS))))
$(foreach source,$(wildcard dev/bench/*.c),\
    $(eval $(call program,$(BUILD)/$(basename $(notdir $(source))),$(source),-DTESTING $(BLAS_CFLAGS),$(BLAS_LIBS))))

# CUDA: one translation unit a program. The tests also hold the CPU trainer, compiled as C in dev/test/cuda/oracle_*.c.
SM ?= $(or $(subst 90,90a,$(subst .,,$(firstword $(shell nvidia-smi --query-gpu=compute_cap \
    --format=csv,noheader 2>/dev/null)))),all)
ifeq ($(SM),all)
GENCODE := -gencode 'arch=compute_80,code=[sm_80,sm_86,sm_89]' -gencode arch=compute_90a,code=sm_90a \
    -gencode arch=compute_90,code=compute_90
else
GENCODE := -gencode arch=compute_$(SM),code=sm_$(SM)
endif
NVCC_FLAGS := -std=c++17 -O3 --threads 2 $(GENCODE) -Xcompiler -Wall,-Wno-unused-function \
    $(if $(filter -fopenmp,$(OMP)),-Xcompiler -fopenmp) $(NVCCFLAGS)
# Several GPUs: of the words for MPI nvcc understands these
RANKS_FLAGS := $(if $(MPI),-DUSE_MPI $(filter -I% -D%,$(MPI))) $(if $(NCCL),-DUSE_NCCL)
RANKS_LIBS := $(if $(MPI),$(filter -L% -l%,$(MPI))) $(if $(NCCL),-lnccl)
CUDA_LIBS := -L$(CUDA_HOME)/lib64 -Xlinker -rpath,$(CUDA_HOME)/lib64 -lcublasLt
ABOUT_CUDA := -DBUILD_FLAGS='"$(NVCC_FLAGS)"' -DBUILD_GIT='"$(GIT)"'
CUDA_SOURCES := train_xlstm.cu $(wildcard xlstmc/*)

# rewritten only when it changes, as $(BUILD)/flags
$(BUILD)/nvcc_flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(NVCC) $(NVCC_FLAGS) $(RANKS_FLAGS)' | cmp -s - $@ || echo '$(NVCC) $(NVCC_FLAGS) $(RANKS_FLAGS)' >$@

train_xlstmcu: $(CUDA_SOURCES) $(BUILD)/nvcc_flags
	@echo "  nvcc     train_xlstm.cu -> $@  (SM=$(SM))"
	$(Q)$(NVCC) $(NVCC_FLAGS) $(RANKS_FLAGS) $(ABOUT_CUDA) train_xlstm.cu -o $@ $(CUDA_LIBS) $(RANKS_LIBS)

ORACLES := $(patsubst dev/test/cuda/%.c,$(BUILD)/obj/%.o,$(wildcard dev/test/cuda/oracle_*.c))
$(BUILD)/obj/oracle_%.o: dev/test/cuda/oracle_%.c $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "  compile  $<"
	$(Q)$(CC) $(ALL_CFLAGS) -Wno-unused-function -DTESTING -MMD -MP -c $< -o $@
$(BUILD)/test_xlstm_cu: test_xlstm.cu $(CUDA_SOURCES) $(wildcard dev/test/cuda/*.cuh) $(ORACLES) $(BUILD)/nvcc_flags
	@echo "  nvcc     test_xlstm.cu -> $@  (SM=$(SM))"
	$(Q)$(NVCC) $(NVCC_FLAGS) test_xlstm.cu $(ORACLES) -o $@ $(CUDA_LIBS) \
	    $(addprefix -Xcompiler ,$(filter-out -l% -L%,$(OMP))) $(LIBS)
# dev/bench/NAME.cu -> build/NAME
$(BUILD)/%: dev/bench/%.cu $(wildcard dev/bench/*.h) $(CUDA_SOURCES) $(BUILD)/nvcc_flags
	@echo "  nvcc     $< -> $@  (SM=$(SM))"
	$(Q)$(NVCC) $(NVCC_FLAGS) $< -o $@ $(CUDA_LIBS)

# The ladders: dev/cuda/NAME.cu -> build/NAME
$(BUILD)/%: dev/cuda/%.cu $(wildcard dev/cuda/*.cuh) $(CUDA_SOURCES) $(BUILD)/nvcc_flags
	@echo "  nvcc     $< -> $@  (SM=$(SM))"
	$(Q)$(NVCC) $(NVCC_FLAGS) $< -o $@ $(CUDA_LIBS)

# The kernels behind a C interface (xlstmc/xlstm_kernels.h), for one chip: the GPU here, or sm_90a. What the assembler
# says of each kernel (registers, stack, spills) stays beside the library; dev/test/cuda/kernel_resources.sh reads it.
KERNELS_SM ?= $(if $(filter all,$(SM)),90a,$(SM))
KERNELS_FLAGS := -std=c++17 -O3 -gencode arch=compute_$(KERNELS_SM),code=sm_$(KERNELS_SM) -shared -Xptxas -v \
    -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wno-unused-function $(NVCCFLAGS)
$(BUILD)/kernels_flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(NVCC) $(KERNELS_FLAGS)' | cmp -s - $@ || echo '$(NVCC) $(KERNELS_FLAGS)' >$@
$(BUILD)/libxlstm_kernels.so: xlstmc/xlstm_kernels.cu $(wildcard xlstmc/*) $(BUILD)/kernels_flags
	@echo "  nvcc     $< -> $@  (SM=$(KERNELS_SM))"
	$(Q)$(NVCC) $(KERNELS_FLAGS) $< -o $@ 2>$@.ptxas || { cat $@.ptxas >&2; exit 1; }

# dev/bench/kernel_times.cpp, where the toolkit has CUPTI; CUPTI=DIR if that lies elsewhere
CUPTI ?= $(CUDA_HOME) $(CUDA_HOME)/extras/CUPTI
CUPTI_HEADER := $(firstword $(wildcard $(CUPTI:=/include/cupti.h)))
CUPTI_LIB := $(firstword $(foreach folder,lib64 lib,$(wildcard $(CUPTI:=/$(folder)/libcupti.so*))))
ifneq ($(and $(NVCC),$(CUPTI_HEADER),$(CUPTI_LIB)),)
$(BUILD)/libkernel_times.so: dev/bench/kernel_times.cpp
	@mkdir -p $(@D)
	@echo "  compile  $< -> $@"
	$(Q)$(NVCC) -std=c++17 -O2 -shared -cudart none -Xcompiler -fPIC,-Wall,-Wextra -I$(dir $(CUPTI_HEADER)) $< -o $@ \
	    $(CUPTI_LIB) -Xlinker -rpath,$(dir $(CUPTI_LIB))
endif

.PHONY: test-gpu
test-gpu: all $(BUILD)/test_xlstm_cu $(BUILD)/compare
	$(BUILD)/test_xlstm_cu
	bash dev/test/cuda/gpu_runs.sh
	PROGRAM=./train_xlstmcu bash dev/test/bad_input.sh
	bash dev/test/cuda/gpu_ranks.sh

tests: all $(addprefix $(BUILD)/,$(TESTS) $(HELPERS))

test:
	+@bash scripts/test.sh

# for scripts
print-tests:
	@echo $(TESTS)
print-mpi:
	@echo $(MPI_CFLAGS)
print-mpi-libs:
	@echo $(MPI_LIBS)
print-nvcc:
	@echo $(NVCC)

clean:
	rm -rf $(BUILD) train_xlstm train_xlstmcu data/tokenize

FORCE:
-include $(wildcard $(BUILD)/obj/*.d)
