#!/usr/bin/env bash
# install.sh: installs what is missing on Debian and Ubuntu, and only that. Never asks anything.
#
#   bash scripts/install.sh [build] [blas] [mpi]
#
#   build   a C compiler with its headers, and make: all that the CPU trainer needs (the default)
#   blas    OpenBLAS: a faster matrix product for wide models; optional
#   mpi     Open MPI: several processes with mpirun; optional
#
# What counts as present is tried out (compiled and linked), not looked up in a package list. Missing packages come with
# apt-get: as root directly, as a user with passwordless sudo through sudo, else the line to type is printed.
# Exit code: 0 when everything asked for is there, 2 when something is missing (after saying what to do).
set -euo pipefail

usage() { sed -n '2,/^set -/{/^#/!d;s/^# \{0,1\}//;p;}' "$0"; }

CC=${CC:-cc}

# compiles FLAGS...: can the compiler build and link the C program on stdin?
# shellcheck disable=SC2086 # CC may hold flags
compiles() { command -v "${CC%% *}" >/dev/null && $CC -x c - -o /dev/null "$@" >/dev/null 2>&1; }

have_cc() { echo '#include <stdio.h>
int main(void) { return puts(""); }' | compiles; }
have_blas() { echo '#include <cblas.h>
int main(void) { float x = 0; return (int)cblas_sdot(1, &x, 1, &x, 1); }' |
    compiles -I/usr/include/openblas -lopenblas; }
have_mpi() { command -v mpicc >/dev/null && command -v mpirun >/dev/null && echo '#include <mpi.h>
int main(void) { return MPI_Finalize(); }' | mpicc -x c - -o /dev/null >/dev/null 2>&1; }

# missing WANT...: sets PACKAGES (for apt) and WHAT (for people), empty when nothing is missing
missing() {
    PACKAGES=() WHAT=''
    for want in "$@"; do
        case $want in
            build)
                have_cc || { PACKAGES+=(gcc libc6-dev) && WHAT+=", a C compiler"; }
                command -v make >/dev/null || { PACKAGES+=(make) && WHAT+=", make"; } ;;
            blas) have_blas || { PACKAGES+=(libopenblas-dev) && WHAT+=", OpenBLAS"; } ;;
            mpi) have_mpi || { PACKAGES+=(libopenmpi-dev openmpi-bin) && WHAT+=", Open MPI"; } ;;
            -h | --help) usage; exit 0 ;;
            *) echo "install.sh: unknown word '$want'; usage: bash scripts/install.sh [build] [blas] [mpi]" >&2
                exit 2 ;;
        esac
    done
    WHAT=${WHAT#, }
}

[ $# -gt 0 ] || set -- build
missing "$@"
[ ${#PACKAGES[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "install.sh: missing: $WHAT; apt-get is not there either: install them with your system's package manager" >&2
    exit 2
fi
INSTALL="apt-get install -y --no-install-recommends ${PACKAGES[*]}"
if [ "$(id -u)" = 0 ]; then AS_ROOT=(env)
elif sudo -n true 2>/dev/null; then AS_ROOT=(sudo -n env)
else
    SUDO=$(command -v sudo >/dev/null && echo "sudo sh -c" || echo "su -c")
    echo "install.sh: missing: $WHAT. As an ordinary user this script cannot install it; type:" >&2
    echo "  $SUDO 'apt-get update && $INSTALL'" >&2
    exit 2
fi

echo "missing: $WHAT; installing with apt-get: ${PACKAGES[*]}"
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
apt() { "${AS_ROOT[@]}" DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120 -o Acquire::Retries=1 \
    -o Acquire::http::Timeout=20 "$@" </dev/null >>"$LOG" 2>&1; }
install() { apt install -y --no-install-recommends "${PACKAGES[@]}"; }
# package lists can be absent (fresh containers) or name versions that are gone: then, and only then, they are renewed
if ! install; then
    echo "reading new package lists (apt-get update)"
    apt update || true # the next line tells whether it was enough
    if ! install; then
        grep -E '^(E|Err)' "$LOG" | tail -n 3 | sed 's/^/  /' >&2 || true
        echo "install.sh: apt-get could not install ${PACKAGES[*]}; see the lines above, then type: $INSTALL" >&2
        exit 2
    fi
fi
missing "$@"
if [ ${#PACKAGES[@]} -gt 0 ]; then
    echo "install.sh: still missing after apt-get: $WHAT (is CC=$CC right?)" >&2
    exit 2
fi
