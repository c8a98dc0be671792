#!/usr/bin/env bash
# run_shakespeare.sh: nanoGPT's small CPU setting on tiny Shakespeare: at most 0.85M parameters, context 64, 1.6M training
# tokens, the first 90 % of the text for training. Prints the validation loss in nats a character (the text is ASCII, so a
# byte is a character): the mean over all windows of 64 of the last 10 %, each from a fresh state.
#
#   bash scripts/run_shakespeare.sh input.txt [OUT]      input.txt: the text of karpathy/char-rnn, 1,115,394 bytes
#
# 0.82M parameters, 3,125 steps of 8 x 64 tokens: 1.5 minutes on 2 cores. The result stands in doc/results.md.
set -eu
cd "$(dirname "$0")/.."
TEXT=${1:?usage: bash scripts/run_shakespeare.sh input.txt [OUT]}
OUT=${2:-out/shakespeare}
BYTES=$(wc -c <"$TEXT")
TRAIN=$((BYTES * 9 / 10))

make -s train_xlstm
mkdir -p build
head -c "$TRAIN" "$TEXT" >build/shakespeare_train.txt
tail -c +$((TRAIN + 1)) "$TEXT" >build/shakespeare_val.txt
./train_xlstm --blocks "slstm*3" --dim 144 --heads 1 --train build/shakespeare_train.txt --val build/shakespeare_val.txt \
    --batch 8 --seq-len 64 --steps 3125 --lr 4e-3 --warmup 156 --schedule linear --final-lr 0 --beta2 0.99 \
    --eval-every 625 --eval-batches 0 --save-every 0 --out "$OUT"
./train_xlstm --out "$OUT" --resume --generate 400 --prompt "ROMEO:" --temperature 0.8
