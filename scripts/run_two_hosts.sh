#!/usr/bin/env bash
# run_two_hosts.sh: ranks on the machines of a host file.
#
#   RANKS_PER_HOST=4 SP=2 bash scripts/run_two_hosts.sh HOSTFILE --train book.txt --out /shared/book ...
#   TRAINER=train_xlstmcu RANKS_PER_HOST=8 bash scripts/run_two_hosts.sh HOSTFILE ...      a rank a GPU
#
# HOSTFILE: one host a line. This directory, with the program built, must be at the same path on all hosts, --out on a
# file system they share, and the hosts must be reachable by ssh without a password. NETWORK (default: Open MPI chooses)
# names the network interface to use, e.g. eth0, for NCCL, too. SIGTERM to mpirun lets the ranks save: they get a
# minute.
set -eu
cd "$(dirname "$0")/.."
HOSTFILE=${1:?usage: bash scripts/run_two_hosts.sh HOSTFILE FLAGS...}
shift
PER_HOST=${RANKS_PER_HOST:-4}
TRAINER=${TRAINER:-train_xlstm}
HOSTS=$(grep -Evc '^[[:space:]]*(#|$)' "$HOSTFILE")
INTERFACE=()
[ -z "${NETWORK:-}" ] ||
    INTERFACE=(--mca btl_tcp_if_include "$NETWORK" -x "NCCL_SOCKET_IFNAME=$NETWORK")

[ -x "$TRAINER" ] || { echo "run_two_hosts.sh: build the program first, on every host: make" >&2; exit 2; }
exec mpirun --hostfile "$HOSTFILE" -np $((HOSTS * PER_HOST)) --map-by "ppr:$PER_HOST:node" --bind-to none \
    "${INTERFACE[@]}" --mca odls_base_sigkill_timeout 60 -x OMP_NUM_THREADS \
    "$PWD/$TRAINER" --sp "${SP:-1}" --zero 1 --comm-timeout 300 --resume "$@"
