#!/usr/bin/env bash
# test_ranks.sh: several ranks with mpirun against one: mathematics, whole runs, checkpoints, ranks that die.
#
#   bash dev/test/test_ranks.sh                  (make builds what it needs)
#   KILLS=20 bash dev/test/test_ranks.sh kill    only the part whose name is given: math, runs, errors, kill, mutations
#
# KILLS (default 1): how often a rank is killed, and how often one is stopped. More ranks than cores are no problem.
# Prints what failed and, last, "N passed, N failed".
set -u
export LC_ALL=C OMP_NUM_THREADS=1
# ranks beyond the number of cores; on any core; root, as in a container
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
cd "$(dirname "$0")/../.." || exit 1
ROOT=$PWD
make -s train_xlstm build/faulty_trainer build/compare build/test_xlstm build/test_xlstm_float >/dev/null ||
    { echo "0 passed, 1 failed"; exit 1; }
if ! command -v mpirun >/dev/null || [ -z "$(make -s print-mpi)" ]; then
    echo "no MPI here: nothing to test; 0 passed, 0 failed"
    exit 0
fi
PART=${1:-}
KILLS=${KILLS:-1}
TRAIN=$ROOT/build/faulty_trainer # as train_xlstm, but with small buckets and faults on demand
WORK=$(mktemp -d "${TMPDIR:-/tmp}/test_ranks.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
cd "$WORK" || exit 1

# shellcheck source=dev/test/checks.bash
. "$ROOT/dev/test/checks.bash"
ranks() { # ranks N COMMAND...
    local n=$1
    shift
    timeout 120 mpirun -np "$n" "$@"
}
launch() { # launch N COMMAND...: without mpirun, as torchrun does it; their numbers in pids
    local n=$1 r port=$((20000 + RANDOM % 10000))
    shift
    pids=()
    for ((r = 0; r < n; r++)); do
        RANK=$r WORLD_SIZE=$n MASTER_ADDR=localhost MASTER_PORT=$port timeout 120 "$@" &
        pids+=($!)
    done
}
torch_ranks() { # torch_ranks N COMMAND...: the worst exit code
    local pids pid code=0
    launch "$@"
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    return $code
}
exits() { # exits CODE COMMAND...
    local code=$1 got=0
    shift
    "$@" >run.log 2>run.err || got=$?
    [ "$got" = "$code" ] || { echo "exit code $got instead of $code: $*"; cat run.err; return 1; }
}
has() { grep -q -e "$1" "$2" || { echo "no '$1' in $2"; cat "$2"; return 1; }; }
not() { ! "$@"; }
part() { [ -z "$PART" ] || [ "$PART" = "$1" ]; }
step() { printf '%s/step_%08d' "$1" "$2"; }
losses() { sed -n 's/.*"step": \([0-9]*\), "loss": \([^,]*\),.*/\1 \2/p' "$1/log.jsonl"; }
same_losses() { # same_losses WANT GOT: the same steps, losses to 1e-4
    awk 'NR == FNR { want[$1] = $2; steps++; next }
         { d = $2 - want[$1]; if (d < 0) d = -d; if (!($1 in want) || !(d <= 1e-4 * want[$1])) { print; bad = 1 } n++ }
         END { if (bad || n != steps || n == 0) exit 1 }' "$1" "$2"
}

cat "$ROOT"/xlstmc/flags.h "$ROOT"/xlstmc/trainer.h >text.txt
head -c 5000 "$ROOT"/xlstmc/log.h >val.txt
# 12 sequences a step go to 1, 2, 3 and 4 groups; 35 tokens divide by no number of ranks here
MODEL=(--blocks "mlstm,slstm,mlstm_v1" --dim 16 --heads 2)
DATA=(--train text.txt --val val.txt --reset-docs --eot 10 --batch 1 --seq-len 35 --tokens-per-step 420)
RUN=("${MODEL[@]}" "${DATA[@]}" --steps 20 --warmup 3 --lr 3e-3 --save-every 10 --eval-every 10)

# ---------------------------------------------------------------------------------------------------------------------
# Gradients, logits, updates, carried states: test_math_ranks.h

math() { # math N PROGRAM: adds up its own counts
    local counts failed
    ranks "$1" "$ROOT/build/$2" ranks >math.log 2>&1
    counts=$(grep -Eo '[0-9]+ passed, [0-9]+ failed' math.log || echo "0 passed, 1 failed")
    failed=${counts#*, }
    PASSED=$((PASSED + ${counts%% *})) FAILED=$((FAILED + ${failed%% *}))
    grep -e FAIL -e error math.log
    echo "$2, $1 ranks: $counts, $(sed -n 's/^[doublefat]*, //p' math.log)"
}
if part math; then
    for n in 2 3 4 8; do math $n test_xlstm; done
    math 4 test_xlstm_float
fi

# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

if part runs; then
    must "$TRAIN" "${RUN[@]}" --out one
    losses one >one.txt
    grep -o '"val_loss": [^,]*' one/log.jsonl >val.one
    for layout in "1 1 1" "2 1 1" "2 2 0" "3 1 1" "3 3 1" "4 2 1" "4 2 0" "8 4 1" "8 8 0"; do
        read -r n sp zero <<<"$layout"
        must ranks "$n" "$TRAIN" "${RUN[@]}" --sp "$sp" --zero "$zero" --out "run_$n$sp$zero"
        losses "run_$n$sp$zero" >got.txt
        check "$n ranks, --sp $sp --zero $zero: the loss curve of one" same_losses one.txt got.txt
    done
    check "one rank under mpirun: the same bytes" diff -r "$(step one 20)" "$(step run_111 20)"
    check "--zero 0 and 1: the same bytes" diff -r "$(step run_420 20)" "$(step run_421 20)"
    must ranks 4 "$TRAIN" "${RUN[@]}" --sp 2 --zero 1 --out again
    check "the same command twice: the same bytes" diff -r "$(step run_421 20)" "$(step again 20)"
    check "standard output is that of one rank" [ "$(grep -c '^done: 20 steps' run.log)" = 1 ]
    must torch_ranks 4 "$TRAIN" "${RUN[@]}" --sp 2 --zero 1 --out without
    check "without mpirun, over TCP: the same bytes" diff -r "$(step run_421 20)" "$(step without 20)"
    check "... and what is said is said once" [ "$(grep -c '^done: 20 steps' run.log)" = 1 ]
    # shellcheck disable=SC2016 # awk's own
    check "validation loss of 4 ranks" awk '
        NR == FNR { want[FNR] = $2; next }
        { d = $2 - want[FNR]; if (d < 0) d = -d; if (d > 1e-4 * want[FNR]) exit 1; n++ }
        END { if (n != 3) exit 1 }' val.one <(grep -o '"val_loss": [^,]*' run_421/log.jsonl)

    # what 4 ranks saved after 10 steps, continued by others
    for n in 1 2 3; do
        mkdir "go_$n" && cp -r "$(step run_421 10)" "go_$n/"
        must ranks "$n" "$TRAIN" "${RUN[@]}" --sp "$n" --zero 1 --out "go_$n" --resume
        losses "go_$n" >got.txt
        check "saved by 4 ranks, continued by $n" same_losses <(tail -n 10 one.txt) got.txt
    done
    must ranks 3 "$TRAIN" "${DATA[@]}" --load "$(step run_421 10)" --steps 0 --save-dtype fp32 --out loaded
    check "3 ranks read and write the weights of 4: the same bytes" \
        cmp "$(step run_421 10)/model.safetensors" "$(step loaded 0)/model.safetensors"
    LOAD=("${DATA[@]}" --load "$(step one 10)")
    must "$TRAIN" "${LOAD[@]}" --dump one.dump
    must ranks 4 "$TRAIN" "${LOAD[@]}" --sp 2 --zero 1 --dump four.dump
    check "--dump by 4 ranks" "$ROOT/build/compare" one.dump four.dump loss=1e-5 logits=1e-5 grad=1e-4
    CARRY=("${RUN[@]}" --carry-state --steps 6 --save-every 3)
    must "$TRAIN" "${CARRY[@]}" --out carry1
    must ranks 4 "$TRAIN" "${CARRY[@]}" --sp 2 --zero 1 --out carry4
    check "--carry-state: the loss curve of one" same_losses <(losses carry1) <(losses carry4)
    mkdir carry3 && cp -r "$(step carry4 3)" carry3/
    must ranks 3 "$TRAIN" "${CARRY[@]}" --out carry3 --resume
    check "--carry-state: saved by 4 ranks, continued by 3" same_losses <(losses carry1 | tail -n 3) <(losses carry3)
fi

# ---------------------------------------------------------------------------------------------------------------------
# What a user gets wrong, and a rank that meets an error

if part errors; then
    check "--sp must divide the ranks" exits 2 ranks 4 "$TRAIN" "${RUN[@]}" --sp 3
    check "... named in one line" [ "$(grep -c '^error: .*--sp 3' run.err)" = 1 ]
    check "too short a sequence" exits 2 ranks 4 "$TRAIN" "${RUN[@]}" --sp 4 --seq-len 11 --tokens-per-step 132
    check "... is named" has '--seq-len 11' run.err
    check "--tokens-per-step counts all groups" exits 2 ranks 4 "$TRAIN" "${RUN[@]}" --tokens-per-step 350
    check "... and says so" has 'x 4 groups of ranks = 140; nearest: 280 or 420' run.err
    check "--generate is for one" exits 2 ranks 2 "$TRAIN" --load x --generate 5
    check "ranks that do not know each other" exits 2 env WORLD_SIZE=4 "$TRAIN" "${RUN[@]}"
    check "... are told how to" has 'mpirun' run.err
    check "without mpirun: one rank's error is the exit code" exits 3 env FAULTS=die@3 \
        bash -c "$(declare -f launch torch_ranks); torch_ranks 3 \"\$@\"" _ "$TRAIN" "${RUN[@]}"
    check "... and named, in one line" [ "$(grep -c '^error: rank 2 on .*: a fault on demand' run.err)" = 1 ]
    check "... by nobody else" [ "$(grep -c '^error: ' run.err)" = 1 ]
    must ranks 2 "$TRAIN" "${RUN[@]}" --steps 1 --out used
    check "a used --out is refused" exits 2 ranks 2 "$TRAIN" "${RUN[@]}" --out used
    check "... in one line" [ "$(grep -c '^error: ' run.err)" = 1 ]
    check "one rank's error is the exit code" exits 3 env FAULTS=die@3 mpirun -np 4 "$TRAIN" "${RUN[@]}" --sp 2
    check "... and named with rank and host" has "^error: rank 3 on $(hostname): a fault on demand" run.err
    check "no finite loss: all skip" exits 0 env FAULTS=loss@2 mpirun -np 3 "$TRAIN" "${RUN[@]}" --steps 3 --out skip
    check "... and log it" [ "$(grep -c '"skipped": true' skip/log.jsonl)" = 1 ]
fi

# ---------------------------------------------------------------------------------------------------------------------
# Ranks that die or hang: all others end in time, and say who, where, when and in which call

strike() { # strike SIGNAL NUMBER: sends it to one of 4 ranks at some time
    local job code=0 pids victim n=$2 done_steps
    rm -rf struck
    mpirun -np 4 "$TRAIN" "${RUN[@]}" --sp 2 --zero 1 --steps 1000000 --comm-timeout 2 --out struck \
        >run.log 2>run.err &
    job=$!
    for ((wait = 0; wait < 400; wait++)); do
        [ "$(losses struck 2>/dev/null | wc -l)" -ge 2 ] && break
        sleep 0.05
    done
    sleep 0.$((n * 37 % 90 + 10))
    read -ra pids < <(pgrep -P $job | tr '\n' ' ')
    victim=${pids[$((n % 4))]}
    [ ${#pids[@]} = 4 ] || { echo "${#pids[@]} ranks found"; kill $job; return 1; }
    kill "-$1" "$victim"
    gone 7 "${pids[@]}" || { kill -9 "${pids[@]}" 2>/dev/null; kill $job; return 1; }
    wait $job || code=$?
    [ $code != 0 ] || { echo "exit code 0"; return 1; }
    has "^error: rank [0-3] of 4 on $(hostname), step [0-9]*, [^:]*: rank [0-3] on $(hostname) " run.err || return 1
    done_steps=$(losses struck | tail -n 1 | cut -d' ' -f1)
    "$TRAIN" "${RUN[@]}" --steps $((done_steps / 10 * 10 + 1)) --out struck --resume  # what was saved is sound
}
if part kill; then
    for ((k = 0; k < KILLS; k++)); do
        check "kill -9 of a rank, $k" strike KILL $k
        check "a rank that hangs, $k" strike STOP $k
    done
    strike_torch() { # strike_torch SIGNAL: without mpirun
        local pids victim pid code
        rm -rf struck
        launch 4 "$TRAIN" "${RUN[@]}" --sp 2 --zero 1 --steps 1000000 --comm-timeout 2 --out struck >run.log 2>run.err
        for ((wait = 0; wait < 400; wait++)); do
            [ "$(losses struck 2>/dev/null | wc -l)" -ge 2 ] && break
            sleep 0.05
        done
        victim=$(pgrep -P "${pids[1]}") # below timeout
        kill "-$1" "$victim"
        gone 7 "${pids[0]}" "${pids[2]}" "${pids[3]}" || code=1
        kill -9 "$victim" 2>/dev/null
        for pid in "${pids[@]}"; do wait "$pid" && { echo "exit code 0"; code=1; }; done
        [ -z "${code:-}" ] && has "^error: rank [0-3] of 4 on $(hostname), step [0-9]*, [^:]*: rank [0-3] on" run.err
    }
    check "without mpirun: kill -9 of a rank" strike_torch KILL
    check "without mpirun: a rank that hangs" strike_torch STOP
    stop_one() {
        local job code=0 pids
        rm -rf struck
        mpirun -np 4 "$TRAIN" "${RUN[@]}" --sp 2 --steps 1000000 --save-every 0 --out struck >run.log 2>run.err &
        job=$!
        for ((wait = 0; wait < 400; wait++)); do
            [ "$(losses struck 2>/dev/null | wc -l)" -ge 2 ] && break
            sleep 0.05
        done
        read -ra pids < <(pgrep -P $job | tr '\n' ' ')
        kill -TERM "${pids[2]}"
        wait $job || code=$?
        [ $code = 0 ] && [ -f "$(step struck "$(losses struck | tail -n 1 | cut -d' ' -f1)")/manifest.json" ]
    }
    check "SIGTERM to one rank: all finish the step, save and end with 0" stop_one
fi

# ---------------------------------------------------------------------------------------------------------------------
# The tests above can fail: programs with one error each must not pass

spoil() { # spoil FILE OLD NEW: replaces one piece of text in the copy of the sources
    OLD=$2 NEW=$3 awk '{ at = index($0, ENVIRON["OLD"])
        if (at) { $0 = substr($0, 1, at - 1) ENVIRON["NEW"] substr($0, at + length(ENVIRON["OLD"])); found++ } print }
        END { exit found != 1 }' "$ROOT/$1" >spoiled && mv spoiled "source/$1"
}
mutant() { # mutant NAME SOURCE FILE OLD NEW FLAGS...: builds ./mutant
    local name=$1 source=$2
    rm -rf source && mkdir -p source/dev
    cp -r "$ROOT"/train_xlstm.c "$ROOT"/test_xlstm.c "$ROOT"/xlstmc source/
    cp -r "$ROOT"/dev/test source/dev/
    check "mutation: $name: the line is there" spoil "$3" "$4" "$5"
    shift 5
    # shellcheck disable=SC2046,SC2086 # flags
    must ${CC:-cc} -std=gnu11 -O0 -w -fopenmp -DTESTING "$@" $(cd "$ROOT" && make -s print-mpi) "source/$source" \
        -o mutant $(cd "$ROOT" && make -s print-mpi-libs) -lm
}
fails() { # mutations of the mathematics are found
    ranks 3 ./mutant ranks_plain >mutant.log 2>&1 && return 1
    grep -q '^FAIL' mutant.log
}
wrong_gradients() {
    ranks 2 ./mutant "${RUN[@]}" --sp 2 --dump two.dump &&
        not "$ROOT/build/compare" one.dump two.dump loss=1e-5 logits=1e-5 grad=1e-4
}
if part mutations; then
    math_mutant() {
        mutant "$1" test_xlstm.c train_xlstm.c "$2" "$3" -DREAL_DOUBLE
        check "mutation: $1" fails
    }
    math_mutant "without the forget gates' tail" "double anchor = dot(" "double anchor = t1 == T ? 0 : dot("
    math_mutant "fold in the wrong order" "x = (real)exp(G + *m_left - m), y = (real)exp(*m_right - m)" \
        "x = (real)exp(*m_left - m), y = (real)exp(G + *m_right - m)"
    math_mutant "without the gradient of the halo" "conv_backward_tail(dx, ld_dx, dwindow, C, s);" ";"
    math_mutant "gradients of states not scaled" "C[k] = left_C[k] + keep * C[k];" "C[k] = left_C[k] + C[k];"
    must "$TRAIN" "${RUN[@]}" --dump one.dump
    mutant "local token weights" dev/test/faulty_trainer.c xlstmc/trainer.h \
        "scale = 1.0 / (double)t->flags.tokens_per_step" \
        "scale = 1.0 / ((double)t->len * comm.sp_size * (double)t->sequences_per_step)"
    check "mutation: local token weights" wrong_gradients
fi

echo "test_ranks: $PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
