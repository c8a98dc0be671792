#!/usr/bin/env bash
# gpu_runs.sh: whole runs of train_xlstmcu on a GPU: parity with the authors' code, the CPU trainer's loss curve, equal
# commands give equal bytes, runs go over from the CPU to the GPU and back, every preset family trains, bad input.
#
#   bash dev/test/cuda/gpu_runs.sh        (make test-gpu runs it)
#   TEXT=/absolute/path/to/text.txt bash dev/test/cuda/gpu_runs.sh        another text than the sources
#
# Prints what failed and, last, "N passed, N failed".
set -u
export LC_ALL=C
cd "$(dirname "$0")/../../.." || exit 1
ROOT=$PWD CPU=$PWD/train_xlstm GPU=$PWD/train_xlstmcu
PASSED=0 FAILED=0
WORK=$(mktemp -d "${TMPDIR:-/tmp}/gpu_runs.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
check() { # check NAME COMMAND...: passes if the command succeeds
    local name=$1
    shift
    if "$@" >"$WORK/check.log" 2>&1; then PASSED=$((PASSED + 1)); return; fi
    FAILED=$((FAILED + 1))
    echo "FAILED: $name"
    tail -n 5 "$WORK/check.log" | sed 's/^/    /'
}
quiet() { "$@" >"$WORK/run.log" 2>&1 || { tail -n 3 "$WORK/run.log"; return 1; }; }
step() { printf '%s/step_%08d' "$1" "$2"; }
same() { diff -r "$1" "$2"; }
losses() { sed -n 's/.*"step": \([0-9]*\), "loss": \([^,]*\),.*/\1 \2/p' "$1/log.jsonl"; }
says() { # says CODE WORD COMMAND...: one line on stderr that holds WORD, and this exit code
    local code=$1 word=$2 got=0
    shift 2
    "$@" >"$WORK/out.log" 2>"$WORK/err.log" || got=$?
    [ "$got" = "$code" ] && grep -q -e "$word" "$WORK/err.log" && [ "$(grep -vc '^note' "$WORK/err.log")" = 1 ] ||
        { echo "exit code $got:"; cat "$WORK/err.log"; return 1; }
}
# curves LIMIT A B: the losses of two runs differ by at most LIMIT (relative) at every step
curves() {
    join <(losses "$2" | sort -k1,1) <(losses "$3" | sort -k1,1) |
        awk -v limit="$1" '{ d = ($2 - $3) / $2; if (d < 0) d = -d; if (d > worst) worst = d; n++ }
            END { printf "largest difference %.1e over %d steps\n", worst, n; exit !(n > 0 && worst <= limit) }'
}

echo "parity with the authors' code, fp32:"
counts=$(PROGRAM=./train_xlstmcu bash dev/test/test_parity.sh | tee "$WORK/parity.log" | tail -n 1)
grep -v '^[0-9]* passed' "$WORK/parity.log"
PASSED=$((PASSED + ${counts%% *}))
FAILED=$((FAILED + $(echo "$counts" | sed 's/.*, \([0-9]*\) failed/\1/')))

cd "$WORK" || exit 1
if [ -n "${TEXT:-}" ]; then cp "$TEXT" text.txt; else cat "$ROOT"/xlstmc/*.h "$ROOT"/*.c >text.txt; fi
head -c 60000 "$ROOT/README.md" >val.txt
MODEL=(--blocks '(slstm,mlstm)*2' --dim 128 --heads 2 --train text.txt --batch 8 --seq-len 256 --warmup 20 --lr 1e-3
    --schedule constant)

# ---------------------------------------------------------------------------------------------------------------------
# The same bytes; resuming

quiet "$GPU" "${MODEL[@]}" --steps 200 --save-every 100 --out bf16
quiet "$GPU" "${MODEL[@]}" --steps 200 --save-every 100 --val val.txt --eval-every 50 --sample-every 70 --out again
check "the same command twice, and looking at the model changes nothing" same "$(step bf16 200)" "$(step again 200)"
mkdir half && cp -r "$(step bf16 100)" half/
quiet "$GPU" "${MODEL[@]}" --steps 200 --save-every 100 --resume --out half
check "resumed in the middle" same "$(step bf16 200)" "$(step half 200)"
quiet "$GPU" "${MODEL[@]}" --steps 20 --recompute block --out recompute
quiet "$GPU" "${MODEL[@]}" --steps 20 --out kept
check "recomputation changes no byte" same "$(step kept 20)" "$(step recompute 20)"
CARRY=(--carry-state --reset-docs --eot 10)
quiet "$GPU" "${MODEL[@]}" "${CARRY[@]}" --steps 20 --save-every 10 --out carry
mkdir carry_half && cp -r "$(step carry 10)" carry_half/
quiet "$GPU" "${MODEL[@]}" "${CARRY[@]}" --steps 20 --save-every 10 --resume --out carry_half
check "carried states, resumed in the middle" same "$(step carry 20)" "$(step carry_half 20)"

ignores_chunk() { # one note, and the log does not record a chunk length
    "$GPU" "${MODEL[@]}" --steps 1 --chunk 32 --out length 2>length.err || return 1
    grep -q '^note: --chunk 32 ' length.err && ! grep '"chunk"' length/log.jsonl
}
check "--chunk: says that it has no effect" ignores_chunk

# ---------------------------------------------------------------------------------------------------------------------
# One step of every family, the widest heads among them

for preset in demo 114m 164m 406m 1.4b v1-125m-7to1 v1-350m v1-760m v1-1.3b; do
    check "a step of $preset" quiet "$GPU" --model $preset --vocab 256 --train text.txt --batch 1 --seq-len 300 --steps 2
done

# ---------------------------------------------------------------------------------------------------------------------
# Bad input

check "does not fit: names a batch that does" says 2 'would fit' \
    "$GPU" --model 406m --vocab 256 --train text.txt --batch 64 --seq-len 4096 --steps 1
check "heads too wide" says 2 '--heads' "$GPU" --blocks slstm --dim 2048 --heads 1 --train text.txt --steps 1
check "no GPU" says 2 'no GPU' env CUDA_VISIBLE_DEVICES= "$GPU" --train text.txt --steps 1
LARGE=(--blocks mlstm --train text.txt --seq-len 2 --steps 2) # 65535 sequences and heads, and one more
check "as many sequences as a grid takes" quiet "$GPU" "${LARGE[@]}" --dim 60 --heads 15 --batch 4369
check "more sequences than a grid takes" says 2 '--batch' "$GPU" "${LARGE[@]}" --dim 64 --heads 16 --batch 4096
mkdir old # a driver of CUDA 11.4, as far as the CUDA runtime can see
echo 'int cuDriverGetVersion(int *v) { return *v = 11040, 0; } int cuInit(unsigned f) { return f; }' >old/driver.c
quiet "${CC:-cc}" -shared -fPIC old/driver.c -o old/libcuda.so.1
check "driver too old" says 2 'driver is older' \
    env LD_LIBRARY_PATH="$WORK/old:${LD_LIBRARY_PATH:-}" "$GPU" --train text.txt --steps 1
check "--help" quiet "$GPU" --help

# ---------------------------------------------------------------------------------------------------------------------
# The CPU's loss curve; from the CPU to the GPU and back

quiet "$CPU" "${MODEL[@]}" --threads 4 --steps 200 --save-every 100 --out cpu
quiet "$GPU" "${MODEL[@]}" --steps 200 --save-every 100 --precision fp32 --out fp32
check "fp32 follows the CPU's loss to 1e-3" curves 1e-3 cpu fp32
tail -n 1 check.log
check "bf16 follows the CPU's loss to 2e-2" curves 2e-2 cpu bf16
tail -n 1 check.log

mkdir to_gpu to_cpu && cp -r "$(step cpu 100)" to_gpu/ && cp -r "$(step fp32 100)" to_cpu/
quiet "$GPU" "${MODEL[@]}" --steps 120 --precision fp32 --resume --out to_gpu
quiet "$CPU" "${MODEL[@]}" --threads 4 --steps 120 --resume --out to_cpu
check "begun on the CPU, continued on the GPU" curves 1e-3 cpu to_gpu
check "begun on the GPU, continued on the CPU" curves 1e-3 cpu to_cpu
"$CPU" --load "$(step cpu 200)" --generate 100 --temperature 0 --prompt 'static ' >cpu.gen 2>/dev/null
"$GPU" --load "$(step cpu 200)" --generate 100 --temperature 0 --prompt 'static ' --precision fp32 >gpu.gen 2>/dev/null
check "generates what the CPU generates" cmp cpu.gen gpu.gen

# Weights loaded in bf16 are all there: the loss of a dump beside that in fp32
for precision in fp32 bf16; do
    quiet "$GPU" --load "$(step cpu 200)" --train text.txt --batch 8 --seq-len 256 --precision $precision \
        --dump $precision.dump
done
check "loaded in bf16 as in fp32" "$ROOT/build/compare" fp32.dump bf16.dump loss=5e-3 logits=3e-2 grad=1

echo "gpu_runs: $PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
