#!/usr/bin/env bash
# test_parity.sh: loss, logits and all gradients of tiny models against the authors' PyTorch code, which wrote
# dev/test/fixtures (dev/reference/README.md), through --load and --dump as a user has them.
#
#   bash dev/test/test_parity.sh [NAME]        only the fixture NAME, with every tensor's distance
#   PROGRAM=./train_xlstmcu bash dev/test/test_parity.sh        the CUDA trainer, in fp32
#
# Each fixture runs as its args.txt says, with another chunk length, with recomputation, and in a run of 2 threads.
# Prints the worst distances (relative L2) of each run and, last, "N passed, N failed".
set -u
export LC_ALL=C
cd "$(dirname "$0")/../.." || exit 1
FIXTURES=dev/test/fixtures
PROGRAM=${PROGRAM:-./train_xlstm}

build() {
    mkdir -p build && make -s "${PROGRAM#./}" >/dev/null && ${CC:-cc} -std=gnu11 -O1 dev/test/compare.c -o build/compare -lm
}
if ! build; then
    echo "0 passed, 1 failed"
    exit 1
fi
WORK=$(mktemp -d "${TMPDIR:-/tmp}/test_parity.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
PASSED=0 FAILED=0

# parity FIXTURE WHAT FLAGS...
parity() {
    local dir=$FIXTURES/$1 what="$1 $2" name=$1 args
    shift 2
    read -ra args <"$dir/args.txt"
    : >"$WORK/compare.log"
    args+=("$@" --load "$dir" --train "$dir/tokens.bin" --dump "$WORK/dump")
    if "$PROGRAM" "${args[@]}" >"$WORK/run.log" 2>&1 &&
        build/compare "$dir/expected.safetensors" "$WORK/dump" loss=1e-5 logits=1e-5 grad=1e-4 >"$WORK/compare.log" 2>&1
    then
        PASSED=$((PASSED + 1))
    else
        FAILED=$((FAILED + 1))
        echo "FAILED: $what"
        { tail -n 3 "$WORK/run.log"; grep -e FAIL -e error "$WORK/compare.log"; } | sed 's/^/    /'
    fi
    [ "$ONLY" = "$name" ] && cat "$WORK/compare.log"
    printf '%-36s %s\n' "$what" "$(tail -n 1 "$WORK/compare.log")"
    rm -f "$WORK/dump"
}

ONLY=${1:-}
for dir in "$FIXTURES"/*/; do
    name=$(basename "$dir")
    [ -z "$ONLY" ] || [ "$ONLY" = "$name" ] || continue
    if [ "$PROGRAM" != ./train_xlstm ]; then  # the chunk length and the threads are the CPU's
        parity "$name" "" --precision fp32
        parity "$name" "recompute" --precision fp32 --recompute block
        continue
    fi
    parity "$name" "" --threads 1
    parity "$name" "chunk 5" --threads 1 --chunk 5
    parity "$name" "recompute" --threads 1 --recompute block
    parity "$name" "2 threads" --threads 2
done
echo "$PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ] && [ "$PASSED" -gt 0 ]
