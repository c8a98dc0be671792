#!/usr/bin/env bash
# austen.sh: writes Jane Austen's six novels (4.0 MB, public domain) as text files to data/austen/.
#
#   bash data/austen.sh
#
# Source: the Debian and Ubuntu package r-cran-janeaustenr, downloaded with apt-get and unpacked in a scratch folder:
# nothing is installed, no root is needed, and apt's own lists stay as they are. Needs cc (data/rdb_text.c reads the
# package's R data base; R is not used). Every file's sha256 is checked; files already there and right are kept.
# data/austen/persuasion.txt is the novel that the demo and the examples keep for validation.
# Exit code: 0; 2 if apt-get, cc or the network is missing; 3 if the package does not hold the six novels.
set -euo pipefail
export LC_ALL=C

HERE=$(cd "$(dirname "$0")" && pwd)
OUT=$HERE/austen
PACKAGE=r-cran-janeaustenr
CHECKED_VERSION=1.0.0-1
# name, bytes, sha256 as version 1.0.0-1 gives them
NOVELS="\
emma 883028 7c67b5985c6d0de1efaeb5d342d52cb82c38083c40e2295129e30e87ee690ebe
mansfield_park 883280 98bc90519cdf4ef663ad7de2734bb529435ef24f7abbde6bb1a50898871dafe9
northanger_abbey 433411 51f91bbe0517db8e65cff009b097ce0a1836124c4e0532ac19e6c0cad982abed
persuasion 466854 8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a
pride_and_prejudice 684768 dfc684d4f857fa938268f9ab9c5567b64bd0691251eca959644adeabe6287a4d
sense_and_sensibility 673688 105e1651fe93bed7130078578efd31e0c557d68667ba672ddc876f735b30fe09"

die() {
    local code=$1
    shift
    echo "austen.sh: $*" >&2
    exit "$code"
}

case ${1-} in
    '') ;;
    -h | --help) sed -n '2,/^set -/{/^#/!d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
    *) die 2 "unknown argument '$1'; usage: bash data/austen.sh" ;;
esac

# check DIR: are the six novels there, whole? 0: byte for byte the known ones; 1: something is missing or damaged;
# 2: all there and plausible, but other bytes (named in DIFFERENT)
check() {
    local name bytes sum size
    DIFFERENT=''
    while read -r name bytes sum; do
        [ -f "$1/$name.txt" ] || return 1
        if [ "$(sha256sum <"$1/$name.txt")" != "$sum  -" ]; then
            size=$(wc -c <"$1/$name.txt")
            [ $((size * 20)) -ge $((bytes * 19)) ] && [ $((size * 20)) -le $((bytes * 21)) ] || return 1
            DIFFERENT="$DIFFERENT $name.txt"
        fi
    done <<<"$NOVELS"
    [ -z "$DIFFERENT" ] || return 2
}

# Novels of another package version were accepted once, with their sums written to SHA256SUMS: keep them if unchanged.
STATE=0
check "$OUT" || STATE=$?
if [ $STATE = 0 ] || { [ $STATE = 2 ] && [ -f "$OUT/SHA256SUMS" ] &&
    (cd "$OUT" && sha256sum -c SHA256SUMS >/dev/null 2>&1); }; then
    echo "data/austen: the six novels are already there, checksums right"
    exit 0
fi

CC=${CC:-cc}
command -v "${CC%% *}" >/dev/null || die 2 "no C compiler ($CC); type: bash scripts/install.sh"
for tool in apt-get dpkg-deb; do
    command -v $tool >/dev/null ||
        die 2 "$tool not found: the novels come from a Debian or Ubuntu package ($PACKAGE); see data/README.md"
done
[ -w "$HERE" ] || die 2 "cannot write to $HERE"

SCRATCH=$(mktemp -d "$HERE/.austen.XXXXXX")
trap 'rm -rf "$SCRATCH"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# apt without privileges, without touching the system's lists and caches. Its sandbox user cannot write to our folder.
APT=(apt-get -q -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)
[ "$(id -u)" != 0 ] || APT+=(-o APT::Sandbox::User=root)
mkdir -p "$SCRATCH/lists/partial" "$SCRATCH/cache/archives/partial" "$SCRATCH/deb" "$SCRATCH/text"
OWN=(-o "Dir::State::lists=$SCRATCH/lists" -o "Dir::Cache=$SCRATCH/cache")

download() { (cd "$SCRATCH/deb" && "${APT[@]}" "$@" download "$PACKAGE") >>"$SCRATCH/log" 2>&1; }

echo "downloading the package $PACKAGE (1.6 MB; nothing is installed)"
if ! download; then
    echo "apt's package lists are missing or old: reading new ones into a scratch folder (10 to 40 MB)"
    "${APT[@]}" "${OWN[@]}" update >>"$SCRATCH/log" 2>&1 || true # download tells whether it was enough
    if ! download "${OWN[@]}"; then
        grep -E '^(E|W|Err)' "$SCRATCH/log" | tail -n 2 | sed 's/^/  /' >&2 || true
        die 2 "apt-get cannot download $PACKAGE: no network, or no Debian or Ubuntu main/universe sources"
    fi
fi

DEB=$(find "$SCRATCH/deb" -name "${PACKAGE}_*.deb" | head -n 1)
[ -n "$DEB" ] || die 3 "apt-get downloaded no $PACKAGE"
dpkg-deb -x "$DEB" "$SCRATCH/package" || die 3 "$PACKAGE: cannot be unpacked"
RDB=$SCRATCH/package/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb
[ -f "$RDB" ] || die 3 "$PACKAGE: no data/Rdata.rdb in it"
# shellcheck disable=SC2086 # CC may hold flags
$CC -O1 -o "$SCRATCH/rdb_text" "$HERE/rdb_text.c" || die 2 "cannot compile data/rdb_text.c with $CC"
"$SCRATCH/rdb_text" "$RDB" "$SCRATCH/text" || die 3 "$PACKAGE: its R data base cannot be read"

VERSION=$(dpkg-deb -f "$DEB" Version)
STATE=0
check "$SCRATCH/text" || STATE=$?
case $STATE in
    0) echo "$PACKAGE $VERSION: six novels, checksums right" ;;
    2) echo "austen.sh: warning: $PACKAGE $VERSION (known: $CHECKED_VERSION) gives other bytes in:$DIFFERENT;" \
        "the sizes are within 5 % of the known ones, so they are used" >&2 ;;
    *) die 3 "$PACKAGE $VERSION does not hold the six novels in the expected form" ;;
esac

(cd "$SCRATCH/text" && sha256sum ./*.txt >SHA256SUMS && sync ./*)
BYTES=$(cat "$SCRATCH"/text/*.txt | wc -c)
mkdir -p "$OUT"
mv -f "$SCRATCH"/text/*.txt "$OUT/" && mv -f "$SCRATCH/text/SHA256SUMS" "$OUT/"
echo "wrote data/austen/: six novels, $BYTES bytes; persuasion.txt is kept for validation"
