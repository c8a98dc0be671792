#!/usr/bin/env bash
# run_one_host.sh: several ranks on this machine.
#
#   RANKS=4 SP=2 bash scripts/run_one_host.sh --train book.txt --out out/book ...
#
# RANKS (default: the number of cores, at most 8) processes train one model; SP (default 1) of them share a sequence and
# must divide RANKS. All other words are flags of the trainer. More ranks than cores work, only slower.
set -eu
cd "$(dirname "$0")/.."
CORES=$(getconf _NPROCESSORS_ONLN)
RANKS=${RANKS:-$((CORES < 8 ? CORES : 8))}
ROOT=()
[ "$(id -u)" != 0 ] || ROOT=(--allow-run-as-root)

bash scripts/install.sh build mpi
make -s train_xlstm
exec mpirun "${ROOT[@]}" -np "$RANKS" --oversubscribe --bind-to none \
    ./train_xlstm --threads "$((CORES > RANKS ? CORES / RANKS : 1))" --sp "${SP:-1}" --zero 1 "$@"
