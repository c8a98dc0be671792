#!/usr/bin/env bash
# sanitize.sh: compute-sanitizer on the CUDA kernels: memcheck, racecheck and initcheck. Needs a GPU and the tool.
#
#   make build/test_xlstm_cu train_xlstmcu && bash dev/test/cuda/sanitize.sh
#   bash dev/test/cuda/sanitize.sh memcheck                                            those whose name holds this
#   COMPUTE_SANITIZER=/path/to/compute-sanitizer bash dev/test/cuda/sanitize.sh        another one than in PATH
#
# What is left out, because the tool does not see how it is ordered:
#   racecheck  the kernels for Hopper (mlstm_scan.cuh, slstm_hopper.cuh), whose warps and blocks hand over by TMA,
#              mbarriers and st.async: their tests are the results, the same bits again, and memcheck
#              sLSTM heads that one block holds (slstm_block): it exchanges outputs with itself through words in shared
#              memory that carry the number of their step, and the reader waits for that. The barriers of these kernels
#              are those of slstm_team, where the words are in global memory
#   initcheck  what TMA writes counts as never written, also by the kernels of cuBLASLt. So a whole training step is
#              checked in fp32 alone, whose products do not use it. In bf16 the model tests fill all memory with NaN
#
# Prints what failed and, last, "N passed, N failed".
set -u
export LC_ALL=C
ONLY=${1:-}
cd "$(dirname "$0")/../../.." || exit 2
ROOT=$PWD TESTS=$PWD/build/test_xlstm_cu TRAIN=$PWD/train_xlstmcu
TOOL=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
for program in "$TESTS" "$TRAIN" "$TOOL"; do
    [ -x "$program" ] || { echo "sanitize.sh: $program is not there" >&2; exit 2; }
done
WORK=$(mktemp -d "${TMPDIR:-/tmp}/sanitize.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
cd "$WORK" || exit 2
# shellcheck source=dev/test/checks.bash
. "$ROOT/dev/test/checks.bash"
sanitized() { # sanitized OPTIONS -- PROGRAM...: no report, and the program itself succeeds
    local options=()
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    timeout 100 "$TOOL" --error-exitcode 99 --print-limit 5 "${options[@]}" "$@" >tool.log 2>&1
    local code=$?
    grep -v '^ *ok' tool.log | tail -n 30
    [ $code = 0 ]
}
run() { # run NAME ...: check, with the time that it took
    [[ $1 == *"$ONLY"* ]] || return 0
    local start=$SECONDS name=$1 failed=$FAILED
    check "$name" sanitized "${@:2}"
    echo "$name: $([ "$failed" = "$FAILED" ] && echo clean || echo FAILED)  ($((SECONDS - start)) s)"
}

MEMCHECK=(--tool memcheck)
RACECHECK=(--tool racecheck --racecheck-report all --kernel-regex-exclude kns=scan
    --kernel-regex-exclude kns=cluster)
INITCHECK=(--tool initcheck)
LAYERS=(matmul norm gated conv blocks4 embedding classifier adamw mlstm_step)

run "memcheck: layers" "${MEMCHECK[@]}" -- "$TESTS" "${LAYERS[@]}" small
run "memcheck: cells" "${MEMCHECK[@]}" -- "$TESTS" mlstm_cell slstm small
run "memcheck: models" "${MEMCHECK[@]}" -- "$TESTS" models small
run "racecheck: layers" "${RACECHECK[@]}" -- "$TESTS" "${LAYERS[@]}" small
run "racecheck: mLSTM" "${RACECHECK[@]}" -- "$TESTS" mlstm_cell small
run "racecheck: sLSTM" "${RACECHECK[@]}" -- "$TESTS" slstm_team small
head -c 3000 "$ROOT/README.md" >text.txt
STEP=(--blocks "mlstm,mlstm_v1,slstm" --train text.txt --batch 2 --seq-len 150 --steps 1 --reset-docs --eot 10)
run "initcheck: a step, fp32" "${INITCHECK[@]}" -- "$TRAIN" "${STEP[@]}" --dim 48 --heads 2 --precision fp32 --out fp32

echo "sanitize: $PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
