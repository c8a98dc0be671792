#!/usr/bin/env bash
# demo.sh: from a fresh Debian or Ubuntu to a language model that writes, in a few minutes on two cores.
#
#   bash scripts/demo.sh
#
# 1. installs a C compiler and make if they are missing (scripts/install.sh)
# 2. builds train_xlstm, or train_xlstmcu where nvcc and an NVIDIA GPU are
# 3. gets six novels by Jane Austen (data/austen.sh); without apt or network it takes this repository's own files
# 4. trains a small hybrid of mLSTM and sLSTM blocks, byte by byte, on five of them, for a fixed number of steps
# 5. prints the validation loss on the sixth, a sample, the loss curve and what to type next
#
# Everything goes to out/demo. Run again, it continues where it was stopped (Ctrl-C saves); once it is done, it shows
# the result again. To start over: rm -r out/demo
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

# The model and its training. The learning rate follows a cosine from LR after WARMUP steps down to LR * FINAL_LR.
BLOCKS='(slstm,mlstm)*2'
DIM=128
HEADS=2
BATCH=8
SEQ_LEN=256
STEPS=1000
LR=4e-3
WARMUP=100
FINAL_LR=0.05
BETA2=0.99
EVAL_EVERY=100
EVAL_BATCHES=10 # on the way; at the end all of the validation text is evaluated
SAMPLE_TOKENS=600
TEMPERATURE=0.7

case ${1-} in
    '') ;;
    -h | --help) sed -n '2,/^set -/{/^#/!d;s/^# \{0,1\}//;p;}' scripts/demo.sh; exit 0 ;;
    *) echo "demo.sh: unknown argument '$1'; usage: bash scripts/demo.sh" >&2; exit 2 ;;
esac
title() { printf '\n== %s\n' "$*"; }

title "compiler and make"
bash scripts/install.sh build
echo "present"

# ---------------------------------------------------------------------------------------------------------------------
NVCC=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
TRAINER=train_xlstm
if [ -f train_xlstm.cu ] && [ -x "$NVCC" ] && nvidia-smi -L >/dev/null 2>&1; then TRAINER=train_xlstmcu; fi
title "building $TRAINER"
make "$TRAINER"

# ---------------------------------------------------------------------------------------------------------------------
# own_text: this repository's sources and documents as data/own/train.txt, every tenth file as data/own/val.txt
own_text() {
    local file n=0
    mkdir -p data/own
    : >data/own/train.txt.tmp
    : >data/own/val.txt.tmp
    while IFS= read -r file; do
        n=$((n + 1))
        if [ $((n % 10)) = 0 ]; then cat "$file" >>data/own/val.txt.tmp; else cat "$file" >>data/own/train.txt.tmp; fi
    done < <(find . \( -name '.?*' -o -path ./build -o -path ./out -o -path ./data/austen \) -prune -o -type f \
        \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.md' -o -name '*.sh' -o -name '*.py' \
        -o -name Makefile \) -print | sort)
    mv data/own/train.txt.tmp data/own/train.txt
    mv data/own/val.txt.tmp data/own/val.txt
}

title "text"
OUT=out/demo
NOVELS=data/austen
TRAIN=$NOVELS/emma.txt,$NOVELS/mansfield_park.txt,$NOVELS/northanger_abbey.txt
TRAIN=$TRAIN,$NOVELS/pride_and_prejudice.txt,$NOVELS/sense_and_sensibility.txt
VAL=$NOVELS/persuasion.txt
PROMPT='She was ' OTHER_PROMPT='Captain '
if ! bash data/austen.sh; then
    echo "The novels cannot be had here (see above), so the model learns this repository's own sources and documents."
    OUT=out/demo_own
    TRAIN=data/own/train.txt
    VAL=data/own/val.txt
    PROMPT='static ' OTHER_PROMPT='// '
    # a run that has begun keeps its text
    if [ ! -d $OUT ] || [ ! -f $TRAIN ] || [ ! -f $VAL ]; then own_text; fi
    echo "training text: $(wc -c <$TRAIN) bytes in $TRAIN; validation text: $(wc -c <$VAL) bytes in $VAL"
fi

# ---------------------------------------------------------------------------------------------------------------------
CHECKPOINT=$OUT/step_$(printf %08d $STEPS)
DONE_BEFORE=''
[ ! -d "$CHECKPOINT" ] || DONE_BEFORE=1
title "training $STEPS steps${DONE_BEFORE:+: done before}"
CODE=0
"./$TRAINER" --train "$TRAIN" --val "$VAL" --blocks "$BLOCKS" --dim $DIM --heads $HEADS --batch $BATCH \
    --seq-len $SEQ_LEN --steps $STEPS --lr $LR --warmup $WARMUP --final-lr $FINAL_LR --beta2 $BETA2 \
    --eval-every $EVAL_EVERY --eval-batches $EVAL_BATCHES --save-every $EVAL_EVERY --keep 2 --out "$OUT" --resume ||
    CODE=$?
if [ $CODE != 0 ]; then
    echo "demo.sh: training ended with an error, see above. Is $OUT of an older version? Then: rm -r $OUT" >&2
    exit $CODE
fi
if [ ! -d "$CHECKPOINT" ]; then
    echo "Stopped before step $STEPS. To continue: bash scripts/demo.sh"
    exit 130
fi

# ---------------------------------------------------------------------------------------------------------------------
title "result: $CHECKPOINT"
bash scripts/plot.sh "$OUT"
echo
# a run of 0 steps only evaluates: the mean over the whole validation text, in nats a byte
"./$TRAINER" --load "$CHECKPOINT" --train "$TRAIN" --val "$VAL" --batch $BATCH --seq-len $SEQ_LEN --steps 0 \
    --eval-batches 0 | sed -n "s|.*\(val loss [0-9.]*\).*|\1 nats a byte on all of $VAL|p"
printf '\nA sample (--temperature %s), after the prompt "%s":\n\n' $TEMPERATURE "$PROMPT"
"./$TRAINER" --load "$CHECKPOINT" --generate $SAMPLE_TOKENS --prompt "$PROMPT" --temperature $TEMPERATURE \
    2>/dev/null

title "what to type next"
cat <<NEXT
let it write on:        ./$TRAINER --load $CHECKPOINT --generate 1000 --prompt '$OTHER_PROMPT'
train on your own text: ./$TRAINER --train my.txt --out out/my
every flag:             ./$TRAINER --help
the tests:              bash scripts/test.sh
this demo once more:    rm -r $OUT && bash scripts/demo.sh
NEXT
