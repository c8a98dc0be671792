#!/usr/bin/env bash
# data_tools.sh: tests of data/tokenize, data/austen.sh, scripts/plot.sh and scripts/install.sh. Needs no network: where
# apt-get would be called, a stand-in takes its place.
#
#   bash dev/test/data_tools.sh        (make builds what it needs)
#
# Prints what failed and, last, "N passed, N failed".
set -u
export LC_ALL=C
cd "$(dirname "$0")/../.." || exit 1
ROOT=$PWD
make -s data/tokenize >/dev/null || { echo "0 passed, 1 failed"; exit 1; }
WORK=$(mktemp -d "${TMPDIR:-/tmp}/data_tools.XXXXXX")
trap 'chmod -R u+w "$WORK"; rm -rf "$WORK"' EXIT
mkdir "$WORK/here" && cd "$WORK/here" || exit 1

PASSED=0 FAILED=0
check() { # check NAME COMMAND...: the command must succeed
    local name=$1
    shift
    if "$@" >../check.out 2>&1; then PASSED=$((PASSED + 1)); return; fi
    FAILED=$((FAILED + 1))
    echo "FAILED: $name"
    head -c 1500 ../check.out | sed 's/^/    /'
}
saving() { "$@" >../saved 2>&1; }
same() { [ "$1" = "$2" ] || { printf 'got      %s\nexpected %s\n' "$1" "$2"; return 1; }; }
snapshot() { find . -type f -exec cksum {} + | sort; find . -type d | sort; }

bad() { # bad CODE WORD COMMAND...: must end with CODE and a message that holds WORD, and leave all files as they are
    local code=$1 word=$2 got=0 before
    shift 2
    before=$(snapshot)
    "$@" >../out 2>../err </dev/null || got=$?
    check "exit code of: $*" same "$got" "$code"
    check "'$word' on stderr of: $*" grep -qF -e "$word" ../err
    check "files after: $*" same "$(snapshot)" "$before"
}

# ---------------------------------------------------------------------------------------------------------------------
# data/tokenize
T=$ROOT/data/tokenize
tokens() { od -A n -v -j 1024 -t u2 "$1" | tr -s ' \n' ' '; }
header() { od -A n -v -t d4 -N 24 "$1" | tr -s ' \n' ' '; }
SEP='<|endoftext|>'

printf 'ab\n%s\n\303\251' "$SEP" >one.txt
check "tokenize" "$T" --out a one.txt
check "documents open with 256, the separator is gone" same "$(tokens a_train.bin)" " 256 97 98 10 256 195 169 "
check "header" same "$(header a_train.bin)" " 20240520 1 7 257 256 0 "
check "size" same "$(wc -c <a_train.bin)" $((1024 + 14))

# an empty document (two separators), one with \r\n, one at the end without \n; text that only begins like a separator
printf '%s\n%s\r\nx\n%s' "$SEP" "$SEP" "$SEP" >separators.txt
printf '<|endof\n %s\n%s \n' "$SEP" "$SEP" >nearly.txt
check "tokenize edge cases" "$T" --out b separators.txt nearly.txt
NEARLY=$(od -A n -v -t u1 nearly.txt | tr -s ' \n' ' ')
check "empty documents leave no trace, near separators are text" same "$(tokens b_train.bin)" " 256 120 10 256$NEARLY"

check "tokenize --val" "$T" --out c --val 'near*.txt' one.txt nearly.txt
check "a validation file does not train" same "$(tokens c_train.bin)" "$(tokens a_train.bin)"
check "it validates" same "$(tokens c_val.bin)" " 256$NEARLY"

printf '0123456789' >ten.txt
check "tokenize --val-fraction" "$T" --out d --val-fraction 0.3 ten.txt
check "the first 70 % train" same "$(tokens d_train.bin)" " 256 48 49 50 51 52 53 54 "
check "the last 30 % validate" same "$(tokens d_val.bin)" " 256 55 56 57 "

head -c 2500 /dev/zero | tr '\0' 'z' >long.txt
check "tokenize --shard-tokens" "$T" --out e --shard-tokens 1000 long.txt
check "shards" same "$(cd "$WORK/here" && ls e_*)" "$(printf 'e_train_00000%d.bin\n' 0 1 2)"
check "the last shard's count" same "$(header e_train_000002.bin)" " 20240520 1 501 257 256 0 "
bad 2 "e_train_000000.bin exists" "$T" --out e one.txt
check "tokenize --force" "$T" --out e --force one.txt
check "--force removes the earlier run's shards" same "$(ls e_*)" "e_train.bin"

: >empty.txt
printf '%s\n' "$SEP" >separator.txt
printf 'text\n%s' "$SEP" >tail.txt
mkdir directory locked
bad 2 "missing.txt" "$T" --out z missing.txt
bad 2 "empty.txt" "$T" --out z one.txt empty.txt
bad 2 "separator.txt" "$T" --out z one.txt separator.txt
bad 2 "directory" "$T" --out z directory
bad 2 "--out" "$T" one.txt
bad 2 "--out" "$T" --out directory/ one.txt
bad 2 "nowhere" "$T" --out nowhere/z one.txt
bad 2 "no input" "$T" --out z
bad 2 "missing.txt" "$T" --out z one.txt --val missing.txt
bad 2 "train on" "$T" --out z one.txt --val one.txt
bad 2 "exclude" "$T" --out z one.txt --val ten.txt --val-fraction 0.1
bad 2 "--shard-tokens" "$T" --out z one.txt --shard-tokens 4k
bad 2 "--shard-tokens" "$T" --out z one.txt --shard-tokens -1
bad 2 "--val-fraction" "$T" --out z one.txt --val-fraction 1
bad 2 "--val-fraction" "$T" --out z one.txt --val-fraction nan
bad 2 "--val-fraction" "$T" --out z tail.txt --val-fraction 0.3
bad 2 "--nonsense" "$T" --out z one.txt --nonsense
bad 2 "needs a value" "$T" one.txt --out
if [ "$(id -u)" != 0 ]; then # root may write anywhere
    chmod u-w locked
    bad 2 "locked/z" "$T" --out locked/z one.txt
fi

# ---------------------------------------------------------------------------------------------------------------------
# data/austen.sh, with stand-ins for apt-get, dpkg-deb and the decoder's compiler
mkdir -p project/data project/xlstmc stub
cp "$ROOT/data/austen.sh" "$ROOT/data/rdb_text.c" project/data/
cp "$ROOT/xlstmc/util.h" project/xlstmc/
# shellcheck disable=SC2016 # the stand-ins expand it
{
    printf '#!/bin/sh\n[ -z "$OFFLINE" ] || { echo "E: no network" >&2; exit 100; }\n' >stub/apt-get
    printf 'case "$*" in *download*) : >r-cran-janeaustenr_9.deb ;; esac\n' >>stub/apt-get
    printf '#!/bin/sh\nif [ "$1" = -f ]; then echo 9; exit; fi\n' >stub/dpkg-deb
    printf 'd=$3/usr/lib/R/site-library/janeaustenr/data; mkdir -p "$d"; echo x >"$d/Rdata.rdb"\n' >>stub/dpkg-deb
    # the decoder writes novels of SIZE percent of the right number of bytes
    printf '#!/bin/sh\n[ "$1" = -O1 ] && { cp "$0" "$3"; exit; }\n' >stub/fake-cc
    printf 'sed -n "s/^\\([a-z_]*\\) \\([0-9]*\\) [0-9a-f]\\{64\\}\\"*$/\\1 \\2/p" "%s/data/austen.sh" |\n' "$ROOT" >>stub/fake-cc
    printf 'while read -r name bytes; do head -c $((bytes * SIZE / 100)) /dev/zero >"$2/$name.txt"; done\n' >>stub/fake-cc
}
chmod +x stub/*
austen() { env PATH="$WORK/here/stub:$PATH" "$@" bash project/data/austen.sh; }
bad 2 "no network" austen OFFLINE=1
bad 2 "compiler" austen CC=no-such-compiler
bad 3 "cannot be read" austen CC="${CC:-cc}"
bad 3 "does not hold" austen CC=fake-cc SIZE=80
check "another version's novels are taken" saving austen CC=fake-cc SIZE=98
check "with a warning" grep -q 'warning.*other bytes.*emma.txt' ../saved
check "all six and their sums, nothing else" same "$(find project/data -type f | wc -l)" 9
check "and kept the next time" austen OFFLINE=1
echo changed >>project/data/austen/emma.txt
bad 2 "no network" austen OFFLINE=1

# ---------------------------------------------------------------------------------------------------------------------
# scripts/plot.sh
mkdir run
{
    echo '{"config":{"steps":3,"lr":0.1},"step_every":1}'
    printf '{"step":%d,"loss":%s,"lr":0.1}\n' 1 4.5 2 3.5 3 nan 4 2.5
    echo '{"step":4,"val_loss":2.75}'
    printf '{"step":4,"lo'
} >run/log.jsonl
check "plot" saving bash "$ROOT/scripts/plot.sh" run
check "a curve in the terminal" grep -q '4.500 |  *\.' ../saved
check "its last point" grep -Eq '2\.500 \|.*\.$' ../saved
check "the validation loss in the SVG file" grep -qF 'run (val loss 2.7500)' run/loss.svg
check "three training points, the NaN left out" same \
    "$(grep -o 'stroke-opacity.*points="[^"]*"' run/loss.svg | sed 's/.*points=//' | tr ' ' '\n' | wc -l)" 3
check "the SVG file ends" same "$(tail -n 1 run/loss.svg)" "</svg>"
check "two runs" bash "$ROOT/scripts/plot.sh" -o two.svg run run/log.jsonl
echo '{"config":{}}' >nothing.jsonl
bad 2 "nothing.jsonl" bash "$ROOT/scripts/plot.sh" nothing.jsonl
bad 2 "missing" bash "$ROOT/scripts/plot.sh" missing
bad 2 "nowhere" bash "$ROOT/scripts/plot.sh" -o nowhere/x.svg run

# ---------------------------------------------------------------------------------------------------------------------
# scripts/install.sh
check "nothing to install" bash "$ROOT/scripts/install.sh" build
bad 2 "nonsense" bash "$ROOT/scripts/install.sh" nonsense
bad 2 "gcc" env CC=no-such-compiler PATH="$WORK/here/stub:$PATH" OFFLINE=1 bash "$ROOT/scripts/install.sh"
# shellcheck disable=SC2016 # the stand-ins expand it
{
    printf '#!/bin/sh\n[ "$1" = -u ] && echo 1000\n' >stub/id
    printf '#!/bin/sh\nexit 1\n' >stub/sudo
}
chmod +x stub/id stub/sudo
bad 2 "sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev'" \
    env CC=no-such-compiler PATH="$WORK/here/stub:$PATH" bash "$ROOT/scripts/install.sh"

if command -v shellcheck >/dev/null; then
    check "shellcheck" shellcheck -S warning "$ROOT"/scripts/*.sh "$ROOT"/data/*.sh "$ROOT"/dev/test/*.sh
fi
echo "$PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
