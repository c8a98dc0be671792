#!/usr/bin/env bash
# run_two_hosts.sh: ranks on the machines of a host file.
#
#   RANKS_PER_HOST=4 SP=2 bash scripts/run_two_hosts.sh HOSTFILE --train book.txt --out /shared/book ...
#
# HOSTFILE: one host a line. This directory, with the program built, must be at the same path on all hosts, --out on a
# file system they share, and the hosts must be reachable by ssh without a password. NETWORK (default: Open MPI chooses)
# names the network interface to use, e.g. eth0. SIGTERM to mpirun lets the ranks save: they get a minute.
set -eu
cd "$(dirname "$0")/.."
HOSTFILE=${1:?usage: bash scripts/run_two_hosts.sh HOSTFILE FLAGS...}
shift
PER_HOST=${RANKS_PER_HOST:-4}
HOSTS=$(grep -Evc '^[[:space:]]*(#|$)' "$HOSTFILE")
INTERFACE=()
[ -z "${NETWORK:-}" ] || INTERFACE=(--mca btl_tcp_if_include "$NETWORK")

[ -x train_xlstm ] || { echo "run_two_hosts.sh: build the program first, on every host: make" >&2; exit 2; }
exec mpirun --hostfile "$HOSTFILE" -np $((HOSTS * PER_HOST)) --map-by "ppr:$PER_HOST:node" --bind-to none \
    "${INTERFACE[@]}" --mca odls_base_sigkill_timeout 60 -x OMP_NUM_THREADS \
    "$PWD/train_xlstm" --sp "${SP:-1}" --zero 1 --comm-timeout 300 --resume "$@"
