#!/usr/bin/env bash
# test.sh: builds everything and runs every test.
#
#   bash scripts/test.sh        (also: make test)
#
# Installs a compiler, make, OpenBLAS and Open MPI with apt-get if they are missing and that is allowed; without
# OpenBLAS or MPI the tests that need it are left out. CUDA files are compiled for all major targets where nvcc is; that
# takes no GPU. The last line is "N passed, N failed", the sum over all test programs; exit code 1 if any failed, 2 if
# nothing can be built here.
set -u
cd "$(dirname "$0")/.." || exit 2
export LC_ALL=C

bash scripts/install.sh build || exit 2
bash scripts/install.sh blas || echo "test.sh: going on without OpenBLAS"
bash scripts/install.sh mpi || echo "test.sh: going on without MPI"

PASSED=0 FAILED=0
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
START=$SECONDS

# run NAME COMMAND...: adds up the command's own "N passed, N failed". A command that ends badly without having counted
# a failure, or counts nothing, is one failure itself.
run() {
    local name=$1 start=$SECONDS code=0 counts passed failed
    shift
    "$@" >"$LOG" 2>&1 || code=$?
    counts=$(grep -Eo '[0-9]+ passed, [0-9]+ failed' "$LOG" | tail -n 1)
    passed=${counts%% *}
    failed=${counts#*, }
    failed=${failed%% *}
    if [ -z "$counts" ] || { [ $code != 0 ] && [ "$failed" = 0 ]; }; then
        passed=${passed:-0}
        failed=$((${failed:-0} + 1))
        echo "$name ended with exit code $code" >>"$LOG"
    fi
    PASSED=$((PASSED + passed))
    FAILED=$((FAILED + failed))
    [ "$failed" = 0 ] || { grep -A 4 '^ *FAIL' "$LOG" || tail -n 20 "$LOG"; } | head -n 100
    printf '%-28s %5d passed, %d failed  (%d s)\n' "$name" "$passed" "$failed" $((SECONDS - start))
}

# compiles NAME COMMAND...: passes if the command succeeds
compiles() {
    local name=$1
    shift
    # shellcheck disable=SC2016 # the inner shell expands it
    run "$name" bash -c '"$@" && echo "1 passed, 0 failed"' _ "$@"
}

compiles "build" make -j"$(getconf _NPROCESSORS_ONLN)" tests
NVCC=$(make -s print-nvcc)
# The library of kernels is compiled beside the tests. Do its registers suffice? Assemblers before CUDA 13's do not manage
LIBRARY=
if [ -n "$NVCC" ] && "$NVCC" --version | grep -Eq 'release (1[3-9]|[2-9][0-9])'; then
    nice -n 19 make KERNELS_SM=90a build/libxlstm_kernels.so >/dev/null 2>&1 &
    LIBRARY=$!
fi
if [ "$FAILED" = 0 ]; then
    if command -v g++ >/dev/null; then
        compiles "shared headers as C++17" \
            g++ -std=c++17 -Wall -Wextra -Wno-unused-function -Werror -fsyntax-only -x c++ xlstmc/trainer.h
    fi
    for name in $(make -s print-tests); do run "$name" "build/$name"; done
    for script in dev/test/*.sh; do run "${script##*/}" bash "$script"; done
fi

# The trainer, which holds every kernel, was built above for all chips (no GPU is needed for that, only nvcc). Of the
# GPU's tests, benchmarks and ladders, syntax and types are checked, if nvcc can do that alone.
if [ -n "$NVCC" ]; then
    CHECK=(-cuda)
    "$NVCC" --help | grep -q fdevice-syntax-only && CHECK=(-fdevice-syntax-only -c)
    compiles "other CUDA files" xargs -P "$(getconf _NPROCESSORS_ONLN)" -I FILE \
        "$NVCC" -std=c++17 -arch=sm_80 "${CHECK[@]}" FILE -o /dev/null \
        < <(printf '%s\n' test_xlstm.cu xlstmc/xlstm_kernels.cu dev/bench/*.cu dev/cuda/*.cu)
    if [ -n "$LIBRARY" ]; then
        wait "$LIBRARY"
        compiles "library of kernels" make KERNELS_SM=90a build/libxlstm_kernels.so  # if it failed: says why
        run "kernel_resources.sh" bash dev/test/cuda/kernel_resources.sh
    fi
fi

echo "all tests in $((SECONDS - START)) s"
echo "$PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
