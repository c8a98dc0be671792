#!/usr/bin/env bash
# gpu_ranks.sh: several ranks of train_xlstmcu against one: gradients, loss curves, bytes, checkpoints, ranks that die.
#
#   bash dev/test/cuda/gpu_ranks.sh              (make test-gpu runs it)
#   bash dev/test/cuda/gpu_ranks.sh nccl kill    only the parts named: share, rounded, nccl, kill
#
# share: 2, 3 and 4 ranks on one GPU, which exchange through host memory or copy into each other's buffers: the kernels
# and all that is around them. rounded: gradients that travel in bf16, on one GPU and on two.
# nccl, kill: 2 ranks on 2 GPUs, by copies and over NCCL; left out where there is one GPU. KILLS (default 1): how often
# a rank is killed, and how often one is stopped. Prints what failed and, last, "N passed, N failed".
set -u
export LC_ALL=C OMP_NUM_THREADS=2
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
cd "$(dirname "$0")/../../.." || exit 1
ROOT=$PWD GPU=$PWD/train_xlstmcu
PARTS=" ${*:-share rounded nccl kill} "
KILLS=${KILLS:-1}
WORK=$(mktemp -d "${TMPDIR:-/tmp}/gpu_ranks.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
if ! command -v mpirun >/dev/null || ! ldd "$GPU" | grep -q libmpi; then
    echo "no MPI here: nothing to test; 0 passed, 0 failed"
    exit 0
fi
GPUS=$(nvidia-smi -L | grep -c '^GPU')
cd "$WORK" || exit 1

# shellcheck source=dev/test/checks.bash
. "$ROOT/dev/test/checks.bash"
ranks() { # ranks N COMMAND...
    local n=$1
    shift
    timeout 100 mpirun -np "$n" "$@"
}
part() { [[ $PARTS == *" $1 "* ]]; }
step() { printf '%s/step_%08d' "$1" "$2"; }
losses() { sed -n 's/.*"step": \([0-9]*\), "loss": \([^,]*\),.*/\1 \2/p' "$1/log.jsonl"; }
# of the first steps only: later ones depend on how weights were rounded, step 19 by 3.5 % with one text
norms() { sed -n 's/.*"step": \([0-9]*\),.*"grad_norm": \([^,]*\),.*/\1 \2/p' "$1/log.jsonl" | head -n 10; }
curves() { # curves LIMIT WANT GOT: the same steps, and losses to LIMIT; lists of losses
    awk -v limit="$1" 'NR == FNR { want[$1] = $2; steps++; next }
        { d = ($2 - want[$1]) / want[$1]; if (d < 0) d = -d; if (!($1 in want) || !(d <= limit)) print "step " $1 ": " d
          if (d > worst) worst = d; n++ }
        END { print "largest difference " worst; exit !(n > 0 && n == steps && worst <= limit) }' "$2" "$3"
}

cat "$ROOT"/xlstmc/flags.h "$ROOT"/xlstmc/trainer.h >text.txt
head -c 9000 "$ROOT"/xlstmc/log.h >val.txt
# 12 sequences a step go to 1, 2, 3 and 4 groups; 203 tokens divide by no number of ranks here
MODEL=(--blocks "mlstm,slstm,mlstm_v1" --dim 64 --heads 2)
DATA=(--train text.txt --val val.txt --reset-docs --eot 10 --batch 1 --seq-len 203 --tokens-per-step 2436
    --comm-timeout 30)
# the kernels cut these sequences in segments, too
LONG=(--train text.txt --batch 1 --seq-len 5003 --tokens-per-step 60036 --comm-timeout 30)
RUN=("${MODEL[@]}" "${DATA[@]}" --steps 20 --warmup 3 --lr 3e-3 --save-every 10 --eval-every 10)

# What one rank computes
alone() {
    must "$GPU" "${RUN[@]}" --precision fp32 --out one32
    must "$GPU" "${RUN[@]}" --out one16
    losses one32 >one32.txt
    losses one16 >one16.txt
    must "$GPU" "${DATA[@]}" --load "$(step one32 10)" --precision fp32 --dump one32.dump
    must "$GPU" "${LONG[@]}" --load "$(step one32 10)" --precision fp32 --dump long32.dump
    must "$GPU" "${LONG[@]}" --load "$(step one32 10)" --dump long16.dump
}
compare() { # compare WANT GOT LIMIT...: dumps; prints the worst tensors
    "$ROOT/build/compare" "$@" >compare.log || { grep FAIL compare.log | sort -g -k 3 | tail -n 5; false; }
}
# gradients N SP ZERO
gradients() {
    must ranks "$1" "$GPU" "${DATA[@]}" --load "$(step one32 10)" --precision fp32 --sp "$2" --zero "$3" --dump got.dump
    check "$1 ranks, --sp $2 --zero $3: loss, logits, gradients in fp32" \
        compare one32.dump got.dump loss=1e-5 logits=1e-5 grad=1e-4
}
long_gradients() {
    must ranks "$1" "$GPU" "${LONG[@]}" --load "$(step one32 10)" --precision fp32 --sp "$2" --zero "$3" --dump got.dump
    check "$1 ranks, --sp $2 --zero $3, 5003 tokens: fp32" compare long32.dump got.dump loss=1e-5 logits=1e-5 grad=1e-4
    must ranks "$1" "$GPU" "${LONG[@]}" --load "$(step one32 10)" --sp "$2" --zero "$3" --dump got.dump
    check "$1 ranks, --sp $2 --zero $3, 5003 tokens: bf16" compare long16.dump got.dump loss=1e-3 logits=2e-2 grad=5e-2
}
whole_run() { # whole_run N SP ZERO [FLAGS...]: in bf16
    local n=$1 sp=$2 zero=$3 out="run_$1$2$3"
    shift 3
    rm -rf "$out"
    must ranks "$n" "$GPU" "${RUN[@]}" --sp "$sp" --zero "$zero" "$@" --out "$out"
    losses "$out" >got.txt
    check "$n ranks, --sp $sp --zero $zero $*: the loss curve of one, bf16" curves 2e-2 one16.txt got.txt
}
checkpoints() { # checkpoints N SP: what N ranks saved goes on with one, and back
    must ranks "$1" "$GPU" "${RUN[@]}" --precision fp32 --sp "$2" --zero 1 --out save32
    losses save32 >got.txt
    check "$1 ranks, --sp $2 --zero 1: the loss curve of one, fp32" curves 1e-4 one32.txt got.txt
    mkdir go_one go_more && cp -r "$(step save32 10)" go_one/ && cp -r "$(step one32 10)" go_more/
    must "$GPU" "${RUN[@]}" --precision fp32 --out go_one --resume
    check "saved by $1 ranks, continued by one" curves 1e-4 <(tail -n 10 one32.txt) <(losses go_one)
    must ranks "$1" "$GPU" "${RUN[@]}" --precision fp32 --sp "$2" --zero 1 --out go_more --resume
    check "saved by one rank, continued by $1" curves 1e-4 <(tail -n 10 one32.txt) <(losses go_more)
    must ranks "$1" "$GPU" "${DATA[@]}" --load "$(step one32 10)" --precision fp32 --steps 0 --zero 1 \
        --save-dtype fp32 --out loaded
    check "$1 ranks read and write the weights of one: the same bytes" \
        cmp "$(step one32 10)/model.safetensors" "$(step loaded 0)/model.safetensors"
}

if part share || part nccl; then alone; fi

# In bf16, beside one rank that adds up in float: 2436 tokens are several micro-steps, then gradients are rounded before
# they leave; with one micro-step products of mLSTM blocks write them so.
TEXT=(--train text.txt --batch 1 --seq-len 203 --comm-timeout 30)
PLAIN=(--blocks "mlstm,mlstm_v1" --dim 64 --heads 2 "${TEXT[@]}")
rounded() { # rounded N ZERO TOKENS LIMIT [EXPECTED]: passes if all gradients are within LIMIT, with EXPECTED 1: if not
    local got=0 flags=("${TEXT[@]}" --tokens-per-step "$3" --load "$(step plain 10)")
    [ -e "plain$3.dump" ] || must "$GPU" "${flags[@]}" --dump "plain$3.dump"
    must ranks "$1" "$GPU" "${flags[@]}" --zero "$2" --dump got.dump
    compare "plain$3.dump" got.dump loss=1e-5 logits=1e-5 "grad=$4" || got=1
    cat compare.log
    [ $got = "${5:-0}" ]
}
plain_run() { # plain_run OUT N ZERO TOKENS
    must ranks "$2" "$GPU" "${PLAIN[@]}" --tokens-per-step "$4" --steps 20 --warmup 3 --lr 3e-3 --save-every 20 \
        --zero "$3" --out "$1"
}
refused() { # refused WORDS COMMAND...: exit code 2 and one line that has these words
    local code=0 words=$1
    shift
    "$@" >refused.log 2>&1 || code=$?
    cat refused.log
    [ $code = 2 ] && [ "$(grep -c '^error: ' refused.log)" = 1 ] && grep -q -- "$words" refused.log
}
rounded_gradients() { # of two ranks, however they exchange
    check "2 ranks, several micro-steps: gradients in bf16" rounded 2 0 2436 4e-3
    check "2 ranks, one micro-step: gradients in bf16" rounded 2 1 406 4e-3
    check "they are rounded" rounded 2 0 406 1e-5 1
    XLSTM_REDUCE=fp32 check "2 ranks, XLSTM_REDUCE=fp32" rounded 2 0 2436 1e-5
    plain_run plain_0 2 0 406
    plain_run plain_1 2 1 406
    losses plain_0 >got.txt
    check "2 ranks, gradients in bf16: the loss curve of one" curves 2e-2 plain.txt got.txt
    check "2 ranks, gradients in bf16: the norms of one" curves 1e-2 <(norms plain) <(norms plain_0)
    check "gradients in bf16: --zero 0 and 1 give the same bytes" diff -r "$(step plain_0 20)" "$(step plain_1 20)"
}
if part rounded; then
    must "$GPU" "${PLAIN[@]}" --tokens-per-step 406 --steps 20 --warmup 3 --lr 3e-3 --save-every 10 --out plain
    losses plain >plain.txt
fi

# ---------------------------------------------------------------------------------------------------------------------
# Ranks that share one GPU

if part share; then
    export XLSTM_SHARE_GPU=1
    for layout in "2 1 1" "2 2 0" "3 3 1" "4 2 1" "4 4 0"; do
        read -r n sp zero <<<"$layout"
        gradients "$n" "$sp" "$zero"
    done
    long_gradients 2 2 1
    long_gradients 3 3 0
    export XLSTM_COPIES=1
    gradients 3 3 0
    gradients 3 1 1
    export XLSTM_QUIET=1 # otherwise in long steps only
    gradients 3 3 1
    gradients 4 2 0
    long_gradients 2 2 1
    unset XLSTM_COPIES XLSTM_QUIET
    export XLSTM_FOLD_BY_GATHER=2 # otherwise with more than 8 ranks only
    gradients 3 3 1
    gradients 4 4 0
    long_gradients 4 4 1
    unset XLSTM_FOLD_BY_GATHER
    whole_run 4 2 1
    whole_run 3 3 1 --recompute block
    CARRY=("${RUN[@]}" --precision fp32 --carry-state --steps 6 --save-every 3)
    must "$GPU" "${CARRY[@]}" --out carry1
    must ranks 4 "$GPU" "${CARRY[@]}" --sp 2 --zero 1 --out carry4
    check "--carry-state: the loss curve of one" curves 1e-4 <(losses carry1) <(losses carry4)
    mkdir carry2 && cp -r "$(step carry4 3)" carry2/
    must ranks 2 "$GPU" "${CARRY[@]}" --sp 2 --out carry2 --resume
    check "--carry-state: saved by 4 ranks, continued by 2" curves 1e-4 <(losses carry1 | tail -n 3) <(losses carry2)
    checkpoints 4 2
    rm -rf save32 go_one go_more loaded
    unset XLSTM_SHARE_GPU
fi

if part rounded; then
    export XLSTM_SHARE_GPU=1
    rounded_gradients
    check "3 ranks, one micro-step: gradients in bf16" rounded 3 1 609 4e-3
    plain_run plain_3 3 0 609
    export XLSTM_COPIES=1 XLSTM_BUCKET=8192 # elements, so that there are 15 buckets
    check "2 ranks, many buckets: gradients in bf16" rounded 2 1 2436 4e-3
    check "3 ranks, one micro-step, copies: gradients in bf16" rounded 3 0 609 4e-3
    XLSTM_REDUCE=fp32 check "2 ranks, many buckets, XLSTM_REDUCE=fp32" rounded 2 0 406 1e-5
    plain_run plain_c 2 0 406
    check "the norms of one, many buckets" curves 1e-2 <(norms plain) <(norms plain_c)
    check "gradients in bf16: copies and host memory give the same bytes" \
        diff -r "$(step plain_0 20)" "$(step plain_c 20)"
    plain_run plain_c3 3 1 609
    check "3 ranks: copies with --zero 1 and host memory with --zero 0 give the same bytes" \
        diff -r "$(step plain_3 20)" "$(step plain_c3 20)"
    unset XLSTM_COPIES XLSTM_BUCKET XLSTM_SHARE_GPU
    XLSTM_REDUCE=int8 check "XLSTM_REDUCE=int8 is refused" refused "fp32 or bf16" "$GPU" "${PLAIN[@]}" --steps 1 \
        --out refused
    XLSTM_REDUCE=bf16 check "XLSTM_REDUCE=bf16 with --precision fp32 is refused" refused "--precision fp32" "$GPU" \
        "${PLAIN[@]}" --steps 1 --precision fp32 --out refused
    rm -rf plain_?*
fi

# ---------------------------------------------------------------------------------------------------------------------
# A GPU a rank

if [ "$GPUS" -lt 2 ]; then
    PARTS=
    echo "one GPU: nothing over NCCL is tested"
fi
if part rounded && [ "$GPUS" -ge 2 ]; then
    rounded_gradients
    XLSTM_COPIES=0 XLSTM_BUCKET=8192 plain_run plain_n 2 0 406
    check "gradients in bf16: NCCL and copies give the same bytes" diff -r "$(step plain_0 20)" "$(step plain_n 20)"
fi
if part nccl; then
    for layout in "2 1 0" "2 1 1" "2 2 0" "2 2 1"; do
        read -r n sp zero <<<"$layout"
        gradients "$n" "$sp" "$zero"
        whole_run "$n" "$sp" "$zero"
    done
    long_gradients 2 2 1
    for sp in 1 2; do
        check "--sp $sp: --zero 0 and 1 give the same bytes" diff -r "$(step run_2${sp}0 20)" "$(step run_2${sp}1 20)"
    done
    mv run_221 first_221
    XLSTM_COPIES=0 gradients 2 2 1
    for layout in "2 1 0" "2 2 1"; do
        read -r n sp zero <<<"$layout"
        [ "$sp" = 1 ] && mv run_210 first_210
        XLSTM_COPIES=0 whole_run "$n" "$sp" "$zero"
        check "--sp $sp --zero $zero: NCCL and copies give the same bytes" \
            diff -r "$(step first_2$sp$zero 20)" "$(step run_2$sp$zero 20)"
    done
    whole_run 2 2 1
    check "the same command twice: the same bytes" diff -r "$(step first_221 20)" "$(step run_221 20)"
    mv run_221 kept_221
    XLSTM_QUIET=1 whole_run 2 2 1
    check "what long steps do changes no byte" diff -r "$(step kept_221 20)" "$(step run_221 20)"
    whole_run 2 2 1 --recompute block
    check "recomputation changes no byte" diff -r "$(step kept_221 20)" "$(step run_221 20)"
    checkpoints 2 2
    must ranks 2 "$GPU" "${RUN[@]}" --steps 2 --sample-every 1 --eval-every 1 --out looked
    check "samples and validation on the way" [ "$(grep -c '"val_loss"' looked/log.jsonl)" = 3 ]
fi

# ---------------------------------------------------------------------------------------------------------------------
# A rank that dies or hangs: the other ends in time, and says who, where, when and in which call

strike() { # strike SIGNAL NUMBER: sends it to one of 2 ranks at some time
    local job code=0 pids victim n=$2 sp=$(($2 % 2 + 1)) start
    rm -rf struck
    mpirun -np 2 "$GPU" "${RUN[@]}" --sp "$sp" --zero 1 --steps 1000000 --save-every 0 --eval-every 0 \
        --comm-timeout 5 --out struck >run.log 2>run.err &
    job=$!
    for ((wait = 0; wait < 600; wait++)); do
        [ "$(losses struck 2>/dev/null | wc -l)" -ge 3 ] && break
        sleep 0.05
    done
    sleep 0.$((n * 37 % 90 + 10))
    read -ra pids < <(pgrep -P $job | tr '\n' ' ')
    [ ${#pids[@]} = 2 ] || { echo "${#pids[@]} ranks found"; cat run.err; kill $job; return 1; }
    victim=$((n / 2 % 2))
    start=$(date +%s.%N)
    kill "-$1" "${pids[$victim]}"
    gone 10 "${pids[$((1 - victim))]}" || { kill -9 "${pids[@]}"; kill $job; return 1; }
    awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "gone after %.1f s: ", b - a }' >>strikes.txt
    wait $job || code=$?
    head -n 1 run.err >>strikes.txt
    [ $code != 0 ] || { echo "exit code 0"; return 1; }
    [ "$1" = KILL ] && return 0 # mpirun may be quicker than the message
    grep -q "^error: rank [01] of 2 on $(hostname), step [0-9]*, [^:]*: rank [01] on $(hostname) " run.err ||
        { cat run.err; return 1; }
}
if part kill; then
    for ((k = 0; k < KILLS; k++)); do
        check "kill -9 of a rank, $k" strike KILL $k
        check "a rank that hangs, $k" strike STOP $k
    done
    cat strikes.txt
fi

echo "gpu_ranks: $PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
