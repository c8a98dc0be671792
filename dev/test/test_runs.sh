#!/usr/bin/env bash
# test_runs.sh: whole runs of the trainer on tiny models: equal commands give equal bytes, interrupted runs end like
# uninterrupted ones, and faults leave the last checkpoint as it was.
#
#   bash dev/test/test_runs.sh        (make builds what it needs)
#
# Prints what failed and, last, "N passed, N failed".
set -u
export LC_ALL=C
unset OMP_NUM_THREADS OMP_THREAD_LIMIT
cd "$(dirname "$0")/../.." || exit 1
ROOT=$PWD
make -s train_xlstm build/faulty_trainer data/tokenize >/dev/null || { echo "0 passed, 1 failed"; exit 1; }
TRAIN=$ROOT/train_xlstm
FAULTY=$ROOT/build/faulty_trainer
WORK=$(mktemp -d "${TMPDIR:-/tmp}/test_runs.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
cd "$WORK" || exit 1

# shellcheck source=dev/test/checks.bash
. "$ROOT/dev/test/checks.bash"
finish() {
    echo "test_runs: $PASSED passed, $FAILED failed"
    [ "$FAILED" = 0 ]
    exit
}
exits() { # exits CODE COMMAND...: the command ends with this code
    local code=$1 got=0
    shift
    "$@" >run.log 2>run.err || got=$?
    [ "$got" = "$code" ] || { echo "exit code $got instead of $code: $*"; cat run.err; return 1; }
}
same() { diff -r "$1" "$2"; }
step() { printf '%s/step_%08d' "$1" "$2"; }
not() { ! "$@"; }
has() { grep -q -e "$1" "$2" || { echo "no '$1' in $2"; cat "$2"; return 1; }; }
empty_of() { [ -z "$(find "$1" -name "$2" 2>/dev/null)" ] || { echo "$1 holds $2"; return 1; }; }
losses() { sed -n 's/.*"step": \([0-9]*\), "loss": \([^,]*\),.*/\1 \2/p' "$1/log.jsonl"; }

# text: the sources of the loop, always there; shards: the same with documents
cat "$ROOT"/xlstmc/flags.h "$ROOT"/xlstmc/trainer.h >text.txt
head -c 9000 "$ROOT"/xlstmc/log.h >val.txt
for k in 1 2 3 4 5 6 7 8 9; do head -c $((k * 700)) text.txt | tail -c 700 >doc$k.txt; done
must "$ROOT/data/tokenize" --out docs doc*.txt --val doc1.txt

MODEL="--blocks mlstm,slstm,mlstm_v1 --dim 16 --heads 2"
# shellcheck disable=SC2206 # words on purpose
TINY=($MODEL --train text.txt --batch 2 --seq-len 24 --steps 8 --warmup 2 --lr 3e-3 --threads 1 --save-every 4)

# ---------------------------------------------------------------------------------------------------------------------
# Equal commands, equal bytes

for threads in 1 2; do
    must "$TRAIN" "${TINY[@]}" --threads $threads --out a$threads
    must "$TRAIN" "${TINY[@]}" --threads $threads --out b$threads
    check "the same command twice, $threads threads" same "$(step a$threads 8)" "$(step b$threads 8)"
done
must "$TRAIN" "${TINY[@]}" --val val.txt --eval-every 1 --sample-every 1 --sample-len 9 --save-every 3 --out looked
check "evaluation, samples and --save-every change no byte" same "$(step a1 8)" "$(step looked 8)"
for length in 1 2; do # less than the convolution's window
    check "sequences of $length" exits 0 "$TRAIN" "${TINY[@]}" --seq-len $length --out length$length
done
must "$TRAIN" "${TINY[@]}" --recompute block --out recomputed
check "recomputation changes no byte" same "$(step a1 8)" "$(step recomputed 8)"
must "$TRAIN" "${TINY[@]}" --seed 43 --out seed
check "another seed, another model" not cmp -s "$(step a1 8)/model.safetensors" "$(step seed 8)/model.safetensors"

# ---------------------------------------------------------------------------------------------------------------------
# N steps at once = N/2 steps, resumed

resume_equals() { # resume_equals NAME FLAGS...: from the middle of an uninterrupted run, and after half a run
    local name=$1
    shift
    rm -rf whole half
    must "$TRAIN" "${TINY[@]}" "$@" --out whole
    mkdir half
    cp -r "$(step whole 4)" half/
    must "$TRAIN" "${TINY[@]}" "$@" --out half --resume
    check "resume: $name" same "$(step whole 8)" "$(step half 8)"
    rm -rf whole half
    must "$TRAIN" "${TINY[@]}" "$@" --schedule constant --out whole
    must "$TRAIN" "${TINY[@]}" "$@" --schedule constant --steps 4 --out half
    must "$TRAIN" "${TINY[@]}" "$@" --schedule constant --out half --resume
    check "resume after a finished half: $name" same "$(step whole 8)" "$(step half 8)"
}
resume_equals "shuffled text"
resume_equals "shuffled text, 2 threads" --threads 2
resume_equals "several epochs" --train doc1.txt,doc2.txt
resume_equals "accumulation" --tokens-per-step 96
resume_equals "weights in bf16" --save-dtype bf16
resume_equals "documents" --train docs_train.bin --reset-docs
resume_equals "carried states" --carry-state
resume_equals "carried states, documents" --carry-state --train docs_train.bin --reset-docs --tokens-per-step 144
resume_equals "carried states, several rounds" --carry-state --train doc1.txt --seq-len 48 --tokens-per-step 192
check "states are saved under --carry-state" test -f "$(step whole 8)/state.safetensors"

# 14 samples: as 14 streams of one sample no state is ever carried, as one stream of 14 it is
SAMPLES=(--train doc1.txt --seq-len 48)
must "$TRAIN" "${TINY[@]}" "${SAMPLES[@]}" --tokens-per-step 672 --no-shuffle --out short1
must "$TRAIN" "${TINY[@]}" "${SAMPLES[@]}" --tokens-per-step 672 --carry-state --out short2
check "streams begin with fresh states" cmp "$(step short1 8)/model.safetensors" "$(step short2 8)/model.safetensors"
must "$TRAIN" "${TINY[@]}" "${SAMPLES[@]}" --batch 1 --no-shuffle --out long1
must "$TRAIN" "${TINY[@]}" "${SAMPLES[@]}" --batch 1 --carry-state --out long2
check "states are carried within a stream" not cmp -s "$(step long1 8)/model.safetensors" \
    "$(step long2 8)/model.safetensors"

must "$TRAIN" "${TINY[@]}" --out killed --steps 200 --save-every 1 --keep 3
for k in 1 2 3 4 5; do # the same run, killed five times
    "$TRAIN" "${TINY[@]}" --out killed2 --steps 200 --save-every 1 --keep 3 --resume >run.log 2>&1 &
    sleep 0.$((k + 1))
    kill -9 $! 2>/dev/null
    wait $! 2>/dev/null
done
must "$TRAIN" "${TINY[@]}" --out killed2 --steps 200 --save-every 1 --keep 3 --resume
check "killed five times and resumed" same "$(step killed 200)" "$(step killed2 200)"
check "nothing half-written is left" empty_of killed2 'tmp.*'
check "log of a run killed five times" cmp <(losses killed) <(losses killed2)

cp -r a1 again
check "all steps done: exit code 0" exits 0 "$TRAIN" "${TINY[@]}" --out again --resume
check "all steps done: nothing changed" same a1 again
check "--resume without a run starts at step 0" exits 0 "$TRAIN" "${TINY[@]}" --out new --resume
check "--resume without a run says so" has "starting at step 0" run.log
check "--resume without a run trains" same "$(step a1 8)" "$(step new 8)"
must "$TRAIN" "${TINY[@]}" --lr 1e-3 --schedule wsd --train doc1.txt --steps 9 --out new --resume
check "changes are reported: --lr" has "--lr: 0.003 in the checkpoint, now 0.001" run.log
check "changes are reported: --schedule" has "--schedule: cosine in the checkpoint, now wsd" run.log
check "changes are reported: --train" has "--train: other data" run.log
check "another model is refused" exits 2 "$TRAIN" "${TINY[@]}" --blocks mlstm --out a1 --resume
check "carried states of other streams are refused" exits 2 "$TRAIN" "${TINY[@]}" --carry-state --train doc1.txt \
    --seq-len 24 --steps 9 --out half --resume
cp -r a1 damaged
printf 'x' | dd of="$(step damaged 8)/model.safetensors" bs=1 seek=5000 conv=notrunc 2>/dev/null
check "a damaged newest checkpoint: the one before is taken" exits 0 "$TRAIN" "${TINY[@]}" --out damaged --steps 9 \
    --resume
check "a damaged checkpoint is named" has "step_00000008" run.err
check "... and the run continues after the one before" has '"resume": 4' damaged/log.jsonl

# ---------------------------------------------------------------------------------------------------------------------
# Logs

must "$TRAIN" "${TINY[@]}" --val val.txt --eval-every 2 --out log --save-every 3
head -n 1 log/log.jsonl >first.jsonl
check "log: the configuration comes first" has '^{"config": {.*"batch": 2.*"model": {.*"device": "' first.jsonl
check "log: one line a step" [ "$(losses log | awk '{print $1}' | tr '\n' ' ')" = "1 2 3 4 5 6 7 8 " ]
check "log: evaluations at 0, 2, 4, 6 and 8" [ "$(grep -c val_loss log/log.jsonl)" = 5 ]
losses log >before
rm -rf "$(step log 8)"
must "$TRAIN" "${TINY[@]}" --val val.txt --eval-every 2 --out log --save-every 3 --resume
check "log: resume is recorded" has '^{"resume": 6, "config": {' log/log.jsonl
check "log: lines after the checkpoint are written once" cmp before <(losses log)
check "log: the evaluations too" [ "$(grep -c val_loss log/log.jsonl)" = 5 ]
check "log: one event file a start" [ "$(find log -name 'events.out.tfevents.*' | wc -l)" -eq 2 ]
must "$TRAIN" "${TINY[@]}" --val val.txt --eval-every 4
check "terminal: val loss with four digits" has 'val loss [0-9]\.[0-9][0-9][0-9][0-9] ' run.log
check "terminal: without --out nothing is written" empty_of . 'step_*[!0-9]*'

# The same sequences in other micro-steps: the same curve
must "$TRAIN" "${TINY[@]}" --batch 6 --out wide
must "$TRAIN" "${TINY[@]}" --batch 1 --tokens-per-step 144 --out narrow
check "micro-steps: the same losses to 1e-5" awk '
    NR == FNR { want[$1] = $2; next }
    { d = $2 - want[$1]; if (d < 0) d = -d; if (d > 1e-5 * want[$1]) exit 1; count++ }
    END { if (count != 8) exit 1 }' <(losses wide) <(losses narrow)
must "$TRAIN" "${TINY[@]}" --carry-state --batch 6 --out wide_carry
must "$TRAIN" "${TINY[@]}" --carry-state --batch 2 --tokens-per-step 144 --out narrow_carry
check "micro-steps: the same losses with carried states" awk '
    NR == FNR { want[$1] = $2; next }
    { d = $2 - want[$1]; if (d < 0) d = -d; if (d > 1e-5 * want[$1]) exit 1; count++ }
    END { if (count != 8) exit 1 }' <(losses wide_carry) <(losses narrow_carry)

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: how many, and under faults

must "$TRAIN" "${TINY[@]}" --save-every 1 --keep 2 --out keep
check "--keep 2 leaves the newest two" [ "$(echo keep/step_*)" = "keep/step_00000007 keep/step_00000008" ]
check "--keep changes no byte" same "$(step a1 8)" "$(step keep 8)"
must "$TRAIN" "${TINY[@]}" --steps 5 --save-every 0 --out last
check "the last step is always saved" [ "$(ls -d last/step_*)" = "last/step_00000005" ]
must "$TRAIN" "${TINY[@]}" --steps 0 --out zero
check "--steps 0 saves the initial model" [ "$(ls -d zero/step_*)" = "zero/step_00000000" ]
check "a directory with a run is refused" exits 2 "$TRAIN" "${TINY[@]}" --out last
check "... with a word about --resume" has "\-\-resume" run.err

term() { # term SIGNAL OUT: sends the signal once two steps are logged; the exit code
    local pid
    "$TRAIN" "${TINY[@]}" --steps 100000 --out "$2" --save-every 0 >run.log 2>run.err &
    pid=$!
    while [ "$(losses "$2" 2>/dev/null | wc -l)" -lt 2 ] && kill -0 $pid 2>/dev/null; do sleep 0.05; done
    kill "-$1" $pid
    wait $pid
}
for signal in TERM INT; do
    # a background job of a script ignores SIGINT, so it is sent only where it arrives
    [ $signal = TERM ] || set -m
    check "SIG$signal: exit code 0" term $signal "sig$signal"
    set +m
    stopped=$(losses "sig$signal" | tail -n 1 | cut -d' ' -f1)
    check "SIG$signal: the last step is saved" test -f "$(step "sig$signal" "${stopped:-0}")/manifest.json"
    must "$TRAIN" "${TINY[@]}" --steps $((stopped + 2)) --out "sig$signal" --resume
    check "SIG$signal: --resume continues" test -d "$(step "sig$signal" $((stopped + 2)))"
done
twice() {
    local pid code=0
    FAULTS=slow@3 "$FAULTY" "${TINY[@]}" --out twice >run.log 2>run.err &
    pid=$!
    while [ "$(losses twice 2>/dev/null | wc -l)" -lt 2 ] && kill -0 $pid 2>/dev/null; do sleep 0.05; done
    kill -TERM $pid
    sleep 0.2
    kill -TERM $pid
    SECONDS=0
    wait $pid || code=$?
    [ $code = 143 ] && [ $SECONDS -lt 5 ] || { echo "code $code after $SECONDS s"; return 1; }
}
check "a second SIGTERM ends at once" twice

second_writer() {
    local pid
    FAULTS=slow@2 "$FAULTY" "${TINY[@]}" --out writer >run.log 2>run.err &
    pid=$!
    while [ "$(losses writer 2>/dev/null | wc -l)" -lt 1 ] && kill -0 $pid 2>/dev/null; do sleep 0.05; done
    exits 2 "$TRAIN" "${TINY[@]}" --out writer --resume
    local result=$?
    kill -9 $pid
    wait $pid 2>/dev/null
    [ $result = 0 ] && has writer run.err
}
check "a second writer is refused" second_writer

for fault in loss grad; do
    must env FAULTS=$fault@5 "$FAULTY" "${TINY[@]}" --save-every 1 --out nan_$fault
    for file in model optimizer; do
        at_4=$(step nan_$fault 4)/$file.safetensors at_5=$(step nan_$fault 5)/$file.safetensors
        check "NaN guard, $fault: $file unchanged" cmp "$at_4" "$at_5"
        check "NaN guard, $fault: $file moves on" not cmp -s "$at_5" "$(step nan_$fault 6)/$file.safetensors"
    done
    check "NaN guard, $fault: logged" has '"step": 5,.*"skipped": true' nan_$fault/log.jsonl
    check "NaN guard, $fault: counted" has '"skipped": 1' "$(step nan_$fault 8)/trainer.json"
done
must env FAULTS=loss@2 "$FAULTY" "${TINY[@]}" --out skipped
mkdir skipped2 && cp -r "$(step skipped 4)" skipped2/
must "$FAULTY" "${TINY[@]}" --out skipped2 --resume
check "NaN guard: a resumed run knows what was skipped" same "$(step skipped 8)" "$(step skipped2 8)"
must env FAULTS=state@3 "$FAULTY" "${TINY[@]}" --carry-state --out nan_state
check "NaN guard: carried states recover" [ "$(grep -c '"skipped": true' nan_state/log.jsonl)" = 1 ]
cp -r "$(step a1 4)" kept_step
NINE=loss@1,loss@2,loss@3,loss@4,loss@5,loss@6,loss@7,loss@8,loss@9
diverges() {
    rm -rf ten && mkdir ten && cp -r "$(step a1 4)" ten/
    exits 1 env FAULTS=$NINE,loss@10,loss@11 "$FAULTY" "${TINY[@]}" --steps 40 --save-every 50 --out ten --resume
}
check "ten steps in a row without a finite loss end the run" diverges
check "... in one line" [ "$(wc -l <run.err)" = 1 ]
check "... and the last checkpoint is as it was" same kept_step "$(step ten 4)"
check "... and the newest" [ "$(ls -d ten/step_*)" = "$(step ten 4)" ]
must env FAULTS=$NINE "$FAULTY" "${TINY[@]}" --steps 12 --out nine
check "nine in a row do not" test -d "$(step nine 12)"

# A file that may not grow stands for the full disk: the write fails and the message names what and why.
full_disk() {
    rm -rf full && mkdir full && cp -r "$(step a1 4)" full/
    # limit in blocks of 1024 bytes: less than the optimizer's file, more than the log
    (ulimit -f 20 && exec "$TRAIN" "${TINY[@]}" --out full --resume) >run.log 2>run.err
    [ $? = 2 ] && [ "$(wc -l <run.err)" = 1 ] && has "full/.*too large" run.err
}
check "disk full while saving: exit code 2, path and reason" full_disk
check "disk full while saving: the earlier checkpoint is as it was" same kept_step "$(step full 4)"
check "disk full while saving: nothing half-written" empty_of full 'tmp.*'
check "disk full while saving: no new checkpoint" [ "$(ls -d full/step_*)" = "$(step full 4)" ]
must "$TRAIN" "${TINY[@]}" --out full --resume
check "... and with room again --resume ends like an undisturbed run" same "$(step a1 8)" "$(step full 8)"
full_log() {
    rm -rf full && mkdir full && cp -r "$(step a1 4)" full/
    (ulimit -f 1 && exec "$TRAIN" "${TINY[@]}" --out full --resume) >run.log 2>run.err
    [ $? = 2 ] && [ "$(wc -l <run.err)" = 1 ] && has "full/log.jsonl.*too large" run.err
}
check "disk full while logging: exit code 2, path and reason" full_log
check "disk full while logging: the checkpoint is as it was" same kept_step "$(step full 4)"
if unshare -rm true 2>/dev/null; then # a real one, where we may mount
    real_full_disk() {
        mkdir -p small
        unshare -rm bash -c 'mount -t tmpfs -o size=400k none small && cd small || exit 9
            "$@" --out run >../run.log 2>../run.err; code=$?
            ls run >../listing; exit $code' \
            _ "$TRAIN" "${TINY[@]}" --train "$WORK/text.txt" --steps 100 --save-every 1
        [ $? = 2 ] && [ "$(wc -l <run.err)" = 1 ] && has "No space left" run.err &&
            has step_00000001 listing && not grep tmp listing
    }
    check "a full file system: exit code 2, reason, nothing half-written" real_full_disk
fi

# ---------------------------------------------------------------------------------------------------------------------
# --dump, --generate, --load

check "--dump needs neither --out nor --val" exits 0 "$TRAIN" "${TINY[@]}" --dump first.safetensors
DUMPED=$(sed -n 's/.*: loss \([0-9.]*\),.*/\1/p' run.log)
check "--dump: the loss of the first step" awk -v a="$DUMPED" -v b="$(losses a1 | sed -n 's/^1 //p')" \
    'BEGIN { d = a - b; exit !(a > 0 && d < 2e-6 && d > -2e-6) }'
check "--dump: loss, logits, gradients" has '"grad.lm_head.weight"' <(head -c 20000 first.safetensors | tr -d '\0')
check "--dump changes nothing" same "$(step a1 8)" "$(step b1 8)"
LOAD=(--load "$(step a1 8)" --train text.txt --batch 2 --seq-len 24)
check "--load trains on from weights" exits 0 "$TRAIN" "${LOAD[@]}" --steps 1 --out loaded
check "--load takes the weights" exits 0 "$TRAIN" "${LOAD[@]}" --steps 0 --out loaded0
check "--load: weights byte for byte" cmp "$(step a1 8)/model.safetensors" "$(step loaded0 0)/model.safetensors"

"$TRAIN" --load "$(step a1 8)" --generate 40 --prompt 'static int ' >gen1 2>err1
"$TRAIN" --out a1 --resume --generate 40 --prompt 'static int ' >gen2 2>err2
check "--generate: --load and --resume write the same" cmp gen1 gen2
check "--generate: prints the prompt and what follows, nothing else" [ "$(head -c 11 gen1)" = "static int " ]
check "--generate: the speed goes to stderr" has '^40 tokens in .* tokens/s' err1
"$TRAIN" --load "$(step a1 8)" --generate 40 --prompt 'static int ' --seed 7 >gen3 2>err1
check "--generate: another seed, another text" not cmp -s gen1 gen3
"$TRAIN" --load "$(step a1 8)" --generate 5 --temperature 0 --prompt x >gen1 2>err1
"$TRAIN" --load "$(step a1 8)" --generate 5 --top-k 1 --prompt x >gen2 2>err1
check "--generate: temperature 0 is top-k 1" cmp gen1 gen2
must "$TRAIN" "${TINY[@]}" --train docs_train.bin --val docs_val.bin --steps 1 --out ids --sample-every 1 --vocab 300
"$TRAIN" --load "$(step ids 1)" --generate 4 >gen1 2>err1
check "--generate: ids where tokens are no bytes" has '^[0-9]* [0-9]* [0-9]* [0-9]* $' gen1
check "--generate writes nothing into --out" same "$(step a1 8)" "$(step b1 8)"

finish
