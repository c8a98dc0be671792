#!/usr/bin/env bash
# run_english.sh: a real pretraining run on one GPU: 85M parameters (the shape of the preset 164m: 12 mlstm blocks of
# width 768, 6 heads) on the bytes of English text, for 8 minutes. Prints the curves, a sample, and how many bits the
# model needs a byte of text it has not seen, beside what `xz -9e` needs for the same bytes.
#
#   bash scripts/run_english.sh TEXT...       50 MB or more in all; *.xz is unpacked first
#
# The last 5 % of every file are held out. The first seconds measure the speed, and the number of steps follows from
# it, so that the learning rate comes down as the time ends; with STEPS given, nothing is measured. The validation loss
# is the mean over all windows of SEQ_LEN bytes of the held-out part, each from a fresh state: no window sees the one
# before, as xz does. Two figures for xz: of the held-out part alone, and as what it adds to an archive of the
# training text (xz looks back 64 MiB); the second is measured while the GPU works.
#
# Environment: MINUTES (8), STEPS, RUN (out/english), TRAINER (./train_xlstmcu), MODEL ("--model 164m --ffn 2048"),
# BATCH (16), SEQ_LEN (2048), LR (1e-3), FLAGS (more flags of the trainer), PROMPT ("The "), XZ_ADDED=0 to leave out
# the second figure. An interrupted run is not continued: remove RUN or name another.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: bash scripts/run_english.sh TEXT...   (files, 50 MB or more in all)" >&2; exit 2; }
MINUTES=${MINUTES:-8} RUN=${RUN:-out/english} TRAINER=${TRAINER:-./train_xlstmcu} BATCH=${BATCH:-16}
SEQ_LEN=${SEQ_LEN:-2048} LR=${LR:-1e-3} STEPS=${STEPS:-} PROMPT=${PROMPT:-The }
read -r -a MODEL <<<"${MODEL:---model 164m --ffn 2048}"
read -r -a FLAGS <<<"${FLAGS:-}"
WORK=build/english

die() { echo "run_english.sh: $*" >&2; exit 1; }
# packed [FILE...]: bytes of the files, one after the other, after xz -9e; python3 has the same encoder
packed() {
    if command -v xz >/dev/null; then cat "$@" | xz -9e -c | wc -c
    else
        cat "$@" | python3 -c 'import lzma, sys
c = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
print(sum(len(c.compress(b)) for b in iter(lambda: sys.stdin.buffer.read(1 << 20), b"")) + len(c.flush()))'
    fi
}
unpacked() {
    if command -v xz >/dev/null; then xz -dc "$1"
    else python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer)' "$1"; fi
}
bits() { awk -v bytes="$1" -v of="$2" 'BEGIN { printf "%.4f", 8 * bytes / of }'; }

# ---- text
make -s "$(basename "$TRAINER")"
[ ! -e "$RUN/log.jsonl" ] || die "$RUN holds a run already: remove it, or name another place with RUN=..."
mkdir -p "$WORK"
rm -f "$WORK"/*
for file in "$@"; do
    [ -f "$file" ] || die "$file: no such file"
    plain=$file
    case $file in *.xz) plain=$WORK/plain; unpacked "$file" >"$plain" ;; esac
    bytes=$(wc -c <"$plain")
    train=$((bytes * 95 / 100))
    head -c "$train" "$plain" >>"$WORK/train.txt"
    tail -c +$((train + 1)) "$plain" >>"$WORK/val.txt"
    rm -f "$WORK/plain"
done
TRAIN_BYTES=$(wc -c <"$WORK/train.txt") VAL_BYTES=$(wc -c <"$WORK/val.txt")
[ "$VAL_BYTES" -gt "$SEQ_LEN" ] || die "the held-out part has $VAL_BYTES bytes, which is less than SEQ_LEN"
echo "text: $TRAIN_BYTES bytes for training, $VAL_BYTES held out"

# ---- xz, in the background, each in a process group of its own
PIDS=()
trap 'for pid in "${PIDS[@]}"; do kill -- "-$pid" 2>/dev/null || true; done' EXIT
set -m
packed "$WORK/val.txt" >"$WORK/xz_val" & PIDS+=($!)
if [ "${XZ_ADDED:-1}" != 0 ]; then
    packed "$WORK/train.txt" >"$WORK/xz_train" & PIDS+=($!)
    packed "$WORK/train.txt" "$WORK/val.txt" >"$WORK/xz_both" & PIDS+=($!)
fi
set +m

# ---- training
COMMON=("${MODEL[@]}" --vocab 256 --train "$WORK/train.txt" --batch "$BATCH" --seq-len "$SEQ_LEN" --clip 1)
COMMON+=("${FLAGS[@]}")
if [ -z "$STEPS" ]; then
    # the trainer's rate is a running mean, which 60 steps free from the slow first one; 3 % for what is not training
    RATE=$("$TRAINER" "${COMMON[@]}" --steps 60 | sed -n 's/.* \([0-9][0-9]*\) tok\/s.*/\1/p' | tail -n 1)
    [ -n "$RATE" ] || die "no speed in the trainer's output"
    STEPS=$(awk -v r="$RATE" -v m="$MINUTES" -v n=$((BATCH * SEQ_LEN)) 'BEGIN { printf "%d", 0.97 * 60 * m * r / n }')
    [ "$STEPS" -ge 10 ] || STEPS=10
    echo "speed: $RATE tok/s, so $STEPS steps in $MINUTES minutes"
fi
WARMUP=$((STEPS / 20 < 200 ? STEPS / 20 : 200))
START=$(date +%s)
"$TRAINER" "${COMMON[@]}" --val "$WORK/val.txt" --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" --schedule cosine \
    --final-lr 0.02 --eval-every $((STEPS / 8 + 1)) --eval-batches 20 --save-every 0 --out "$RUN"
SECONDS_TAKEN=$(($(date +%s) - START))
CHECKPOINT=$RUN/step_$(printf %08d "$STEPS")
[ -d "$CHECKPOINT" ] || die "stopped before step $STEPS: no $CHECKPOINT"
bash scripts/plot.sh "$RUN"

# ---- what came out
echo
echo "sample (temperature 0.8), after the prompt \"$PROMPT\":"
echo
"$TRAINER" --load "$CHECKPOINT" --generate 600 --prompt "$PROMPT" --temperature 0.8 2>/dev/null || die "no sample"
# a run of 0 steps only evaluates
LOSS=$("$TRAINER" --load "$CHECKPOINT" --train "$WORK/train.txt" --val "$WORK/val.txt" --batch "$BATCH" --seq-len \
    "$SEQ_LEN" --steps 0 --eval-batches 0 "${FLAGS[@]}" | sed -n 's/.*val loss \([0-9.]*\).*/\1/p' | tail -n 1)
[ -n "$LOSS" ] || die "no validation loss in the trainer's output"
for pid in "${PIDS[@]}"; do wait "$pid" || die "xz failed"; done
PIDS=()
echo
echo "trained on $((STEPS * BATCH * SEQ_LEN)) bytes in $SECONDS_TAKEN s, evaluation and checkpoint included"
echo "held-out bytes: $VAL_BYTES"
echo "model:                       $(awk -v l="$LOSS" 'BEGIN { printf "%.4f", l / log(2) }') bits a byte ($LOSS nats)"
echo "xz -9e of these bytes:       $(bits "$(cat "$WORK/xz_val")" "$VAL_BYTES") bits a byte"
if [ "${XZ_ADDED:-1}" != 0 ]; then
    ADDED=$(($(cat "$WORK/xz_both") - $(cat "$WORK/xz_train")))
    echo "xz -9e after training text:  $(bits "$ADDED" "$VAL_BYTES") bits a byte"
fi
