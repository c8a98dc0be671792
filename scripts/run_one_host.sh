#!/usr/bin/env bash
# run_one_host.sh: several ranks on this machine.
#
#   RANKS=4 SP=2 bash scripts/run_one_host.sh --train book.txt --out out/book ...                      on its cores
#   TRAINER=./train_xlstmcu SP=2 bash scripts/run_one_host.sh --train 'shards/*.bin' --out out/x ...   on its GPUs
#
# RANKS processes train one model; by default as many as there are GPUs, or cores, but 8 at most. SP (default 1) of them
# share a sequence and must divide RANKS. All other words are flags of the trainer. On cores, more ranks than there are
# work, only slower; on GPUs they do not.
set -eu
cd "$(dirname "$0")/.."
TRAINER=${TRAINER:-./train_xlstm}
CORES=$(getconf _NPROCESSORS_ONLN)
PLACES=$((CORES < 8 ? CORES : 8)) # for a rank each
case $TRAINER in
    *cu) PLACES=$(nvidia-smi -L | grep -c '^GPU') || { echo "run_one_host.sh: no GPU here" >&2; exit 2; } ;;
esac
RANKS=${RANKS:-$PLACES}
ROOT=()
[ "$(id -u)" != 0 ] || ROOT=(--allow-run-as-root)

bash scripts/install.sh build mpi
make -s "$(basename "$TRAINER")"
exec mpirun "${ROOT[@]}" -np "$RANKS" --oversubscribe --bind-to none \
    "$TRAINER" --threads "$((CORES > RANKS ? CORES / RANKS : 1))" --sp "${SP:-1}" --zero 1 "$@"
