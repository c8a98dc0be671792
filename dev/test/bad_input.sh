#!/usr/bin/env bash
# bad_input.sh: what a user can get wrong, as a table: the exit code (2: flag, input or place; 3: damaged file), what
# the one line on stderr must name, and the command. Nothing may be written, overwritten or left behind.
#
#   bash dev/test/bad_input.sh        (make builds what it needs)
#   PROGRAM=./train_xlstmcu bash dev/test/bad_input.sh        the CUDA trainer; needs a GPU
#
# Prints what failed and, last, "N passed, N failed".
set -u
export LC_ALL=C
unset OMP_NUM_THREADS
cd "$(dirname "$0")/../.." || exit 1
ROOT=$PWD
PROGRAM=${PROGRAM:-./train_xlstm}
make -s "${PROGRAM#./}" data/tokenize >/dev/null || { echo "0 passed, 1 failed"; exit 1; }
TRAIN=$ROOT/${PROGRAM#./}
WORK=$(mktemp -d "${TMPDIR:-/tmp}/bad_input.XXXXXX")
trap 'chmod -R u+w "$WORK"; rm -rf "$WORK"' EXIT
mkdir "$WORK/here" && cd "$WORK/here" || exit 1

PASSED=0 FAILED=0
snapshot() { find . -type f -exec cksum {} + | sort; find . -type d | sort; }

bad() { # bad CODE WORD FLAGS...: the trainer must end with CODE and one line that holds WORD
    local code=$1 word=$2 got=0 before why=''
    shift 2
    before=$(snapshot)
    timeout 60 "$TRAIN" --steps 1 --threads 1 "$@" >../out 2>../err </dev/null || got=$?
    [ $got = "$code" ] || why="exit code $got instead of $code"
    [ "$(wc -l <../err)" = 1 ] || why="$why; $(wc -l <../err) lines on stderr instead of one"
    grep -q -e '^error: ' ../err && grep -qF -e "$word" ../err || why="$why; no '$word' in the message"
    [ "$before" = "$(snapshot)" ] || why="$why; files have changed"
    [ -n "$why" ] || { PASSED=$((PASSED + 1)); return; }
    FAILED=$((FAILED + 1))
    echo "FAILED: ${PROGRAM#./} $*"
    echo "    ${why#; }"
    head -c 600 ../err | sed 's/^/    /'
}
must() { "$@" >../out 2>../err || { echo "FAILED: $*"; cat ../err; FAILED=$((FAILED + 1)); }; }

# little-endian numbers for headers
le() { # le BYTES NUMBER...
    local bytes=$1 number k
    shift
    for number; do
        # shellcheck disable=SC2059 # the format is the byte
        for ((k = 0; k < bytes; k++)); do printf "\\x$(printf %02x $((number >> (8 * k) & 255)))"; done
    done
}
shard() { # shard MAGIC VERSION COUNT VOCAB EOT TOKEN...: a shard of 16-bit tokens
    le 4 "$1" "$2" "$3" "$4" "$5"
    head -c 1004 /dev/zero
    shift 5
    le 2 "$@"
}
V1=20240520

# good input, which the rows below spoil one by one
for ((k = 0; k < 300; k++)); do echo "line $k of a text that is good enough to train on"; done >good.txt
SMALL="--blocks mlstm,slstm --dim 8 --heads 2 --batch 2 --seq-len 16"
# shellcheck disable=SC2206 # words on purpose
S=($SMALL) G=($SMALL --train good.txt)
must "$TRAIN" "${G[@]}" --steps 2 --save-every 1 --out run
must "$ROOT/data/tokenize" --out good good.txt
DIR=run/step_00000002

# ---------------------------------------------------------------------------------------------------------------------
# Flags

bad 2 --train
bad 2 --bogus "${G[@]}" --bogus
bad 2 --step "${G[@]}" --step 3
bad 2 word "${G[@]}" word
bad 2 -z "${G[@]}" -z
bad 2 --steps --train good.txt --steps
bad 2 --steps --train good.txt --steps --resume
bad 2 --out --train good.txt --out ''
bad 2 --resume "${G[@]}" --resume=yes
for value in 4k -1 '' 1e3 ' 7' 7x 0x10 nan 99999999999999999999 3.5; do
    for flag in steps batch seq-len warmup seed save-every eval-batches vocab threads tokens-per-step; do
        [ $flag = seed ] && [ "$value" = 99999999999999999999 ] && continue
        bad 2 --$flag "${G[@]}" --$flag "$value"
    done
done
bad 2 --seed "${G[@]}" --seed 99999999999999999999
for value in 4k -1 '' x nan inf 1e999 0x1p3 '1 '; do
    for flag in lr weight-decay clip final-lr beta1 temperature; do bad 2 --$flag "${G[@]}" --$flag "$value"; done
done
bad 2 --batch "${G[@]}" --batch 0
bad 2 --seq-len "${G[@]}" --seq-len 0
bad 2 --threads "${G[@]}" --threads 0
bad 2 --beta2 "${G[@]}" --beta2 1
bad 2 --eps "${G[@]}" --eps 0
bad 2 --final-lr "${G[@]}" --final-lr 1.5
bad 2 --top-p "${G[@]}" --top-p 0
bad 2 --top-p "${G[@]}" --top-p 1.01
bad 2 --zero "${G[@]}" --zero 2
bad 2 --generate "${G[@]}" --generate 0
bad 2 --schedule "${G[@]}" --schedule cos
bad 2 --gate "${G[@]}" --gate tanh
bad 2 --save-dtype "${G[@]}" --save-dtype fp16
bad 2 --recompute "${G[@]}" --recompute all
bad 2 --precision "${G[@]}" --precision fp8
[ "$PROGRAM" != ./train_xlstm ] || bad 2 --precision "${G[@]}" --precision bf16
bad 2 --sp "${G[@]}" --sp 2
bad 2 mpirun "${G[@]}" --sp 2
bad 2 --batch "${G[@]}" --batch 65536 --seq-len 65536

# combinations
bad 2 --model "${G[@]}" --model demo
bad 2 --load "${G[@]}" --load $DIR
bad 2 --load --model demo --load $DIR --train good.txt
bad 2 --resume "${G[@]}" --resume
bad 2 --generate "${S[@]}" --generate 5
bad 2 --out --out nowhere --resume --generate 5
bad 2 --dump --load $DIR --generate 5 --dump x
bad 2 "4096 or 6144" --train good.txt --tokens-per-step 5000
bad 2 "nearest: 2048" --train good.txt --tokens-per-step 100
bad 2 --tokens-per-step "${G[@]}" --tokens-per-step 33
bad 2 --prompt "${G[@]}" --vocab 300 --prompt hello
bad 2 --eot "${G[@]}" --eot 256
bad 2 --carry-state "${G[@]}" --carry-state --batch 2000

# ---------------------------------------------------------------------------------------------------------------------
# Models

bad 2 --model --train good.txt --model demo2
bad 2 --blocks --train good.txt --blocks mlstm,lstm
bad 2 "lstm" --train good.txt --blocks mlstm,lstm
for blocks in ',' 'mlstm,' 'mlstm*' 'mlstm*0' 'mlstm*-1' 'mlstm*4k' '(mlstm' 'mlstm)' '()*2' '*3' 'mlstm*2000' \
    '((mlstm*99)*99)*99' 'mlstm*99999999999999999999'; do
    bad 2 --blocks --train good.txt --blocks "$blocks"
done
bad 2 --heads --train good.txt --blocks mlstm --dim 16 --heads 3
bad 2 --heads --train good.txt --blocks slstm --dim 15 --heads 2
bad 2 --heads --train good.txt --blocks mlstm --dim 4 --heads 4
bad 2 --dim --train good.txt --model demo --dim 256
bad 2 --dim --train good.txt --dim 256
bad 2 --heads --train good.txt --model demo --heads 2
bad 2 --vocab --load $DIR --train good.txt --vocab 300
bad 2 --dim --load $DIR --train good.txt --dim 16
bad 2 --heads --load $DIR --train good.txt --heads 1
bad 2 --ffn --load $DIR --train good.txt --ffn 99
bad 2 --gate --load $DIR --train good.txt --gate sig
bad 2 --dim "${G[@]}" --dim 0
bad 2 --dim "${G[@]}" --dim 100000

# ---------------------------------------------------------------------------------------------------------------------
# Data: every row for --train and for --val

printf '' >empty.txt
printf '' >empty.bin
printf 'short' >short.txt
head -c 700 good_train.bin >header_cut.bin
head -c 2001 good_train.bin >odd_cut.bin
head -c 2000 good_train.bin >cut.bin
{ cat good_train.bin; printf 'xx'; } >longer.bin
shard 12345 1 20 0 0 $(seq 20) >magic.bin
shard $V1 2 20 0 0 $(seq 20) >version.bin
shard $V1 1 21 0 0 $(seq 20) >count.bin
shard $V1 1 40 0 0 $(seq 39) 300 >token.bin
shard $V1 1 40 50000 0 $(seq 40) >vocab.bin
shard $V1 1 40 $((1 << 31)) 0 $(seq 40) >vocab_negative.bin
shard $V1 1 3 0 0 1 2 3 >few.bin
shard 20240522 1 40 0 0 $(seq 40) >eval.bin
le 2 $(seq 40) >headerless.bin
le 2 $(seq 39) 300 >raw_token.bin
printf 'abc' >raw_odd.bin
mkdir folder.txt
cp good.txt good.md
for flag in train val; do
    B=("${S[@]}")
    [ $flag = train ] || B=("${G[@]}")
    bad 2 missing.txt "${B[@]}" --$flag missing.txt
    bad 2 --$flag "${B[@]}" --$flag missing.txt
    bad 2 'none*.bin' "${B[@]}" --$flag 'none*.bin'
    bad 2 --$flag "${B[@]}" --$flag ''
    bad 2 --$flag "${B[@]}" --$flag ,
    bad 2 --$flag "${B[@]}" --$flag good.txt,
    bad 2 missing.txt "${B[@]}" --$flag good.txt,missing.txt
    bad 2 folder.txt "${B[@]}" --$flag folder.txt
    bad 2 good.md "${B[@]}" --$flag good.md
    bad 2 --seq-len "${B[@]}" --$flag empty.txt
    bad 2 --seq-len "${B[@]}" --$flag short.txt
    bad 2 --seq-len "${B[@]}" --$flag few.bin
    bad 3 empty.bin "${B[@]}" --$flag empty.bin
    bad 3 header_cut.bin "${B[@]}" --$flag header_cut.bin
    bad 3 cut.bin "${B[@]}" --$flag cut.bin
    bad 3 odd_cut.bin "${B[@]}" --$flag odd_cut.bin
    bad 3 longer.bin "${B[@]}" --$flag longer.bin
    bad 3 magic.bin "${B[@]}" --$flag magic.bin
    bad 3 version.bin "${B[@]}" --$flag version.bin
    bad 3 count.bin "${B[@]}" --$flag count.bin
    bad 3 eval.bin "${B[@]}" --$flag eval.bin
    bad 3 vocab_negative.bin "${B[@]}" --$flag vocab_negative.bin
    bad 3 raw: "${B[@]}" --$flag headerless.bin
    bad 3 raw_odd.bin "${B[@]}" --$flag raw:raw_odd.bin
    bad 2 token.bin "${B[@]}" --vocab 256 --$flag token.bin
    bad 2 --vocab "${B[@]}" --vocab 256 --$flag token.bin
    bad 2 raw_token.bin "${B[@]}" --vocab 256 --$flag raw:raw_token.bin
done
bad 2 --seq-len --train good.txt --seq-len 20000 --batch 1
bad 2 --seq-len "${G[@]}" --seq-len 20000 --batch 1
bad 2 token.bin "${S[@]}" --train token.bin,good.txt --vocab 257
bad 2 --vocab --load $DIR --train good_train.bin --seq-len 16

# ---------------------------------------------------------------------------------------------------------------------
# Directories to load from

spoil() { # spoil NAME FILE SED...: a copy of the checkpoint in which sed has changed one file
    local name=$1 file=$2
    shift 2
    mkdir -p "$name"
    cp $DIR/config.json $DIR/model.safetensors "$name/"
    sed "$@" "$DIR/$file" >"$name/$file"
    ! cmp -s "$DIR/$file" "$name/$file" || { echo "FAILED: $name is not spoilt"; FAILED=$((FAILED + 1)); }
}
header() { # header NAME JSON [BYTES]: a copy whose safetensors file has this header and so many bytes of data
    mkdir -p "$1"
    cp $DIR/config.json "$1/"
    { le 8 ${#2}; printf '%s' "$2"; head -c "${3:-0}" /dev/zero; } >"$1/model.safetensors"
}
load() { bad "$1" "$3" --load "$2" --train good.txt --batch 2 --seq-len 16; }

bad 2 nowhere --load nowhere --train good.txt
mkdir no_config no_weights
cp $DIR/model.safetensors no_config/
cp $DIR/config.json no_weights/
load 2 no_config config.json
load 2 no_weights no_weights
load 2 good.txt good.txt
spoil c_malformed config.json 's/{/{{/'
load 3 c_malformed config.json
spoil c_cut config.json '5,$d'
load 3 c_cut config.json
spoil c_type config.json 's/"hidden_size": 8/"hidden_size": "8"/'
load 3 c_type hidden_size
spoil c_real config.json 's/"hidden_size": 8/"hidden_size": 8.5/'
load 3 c_real hidden_size
spoil c_negative config.json 's/"num_heads": 2/"num_heads": -2/'
load 3 c_negative num_heads
spoil c_huge config.json 's/"vocab_size": 256/"vocab_size": 99999999999/'
load 3 c_huge vocab_size
spoil c_missing config.json '/"vocab_size"/d'
load 3 c_missing vocab_size
spoil c_alias config.json 's/"embedding_dim": 8/"embedding_dim": 16/'
load 3 c_alias embedding_dim
spoil c_type_name config.json 's/"slstm"/"lstm"/'
load 3 c_type_name block_types
spoil c_twice config.json 's/"num_heads": 2/"num_heads": 2, "num_heads": 4/'
load 3 c_twice config.json
spoil c_heads config.json 's/"num_heads": 2/"num_heads": 3/'
load 2 c_heads heads
spoil c_bias config.json 's/"use_bias": false/"use_bias": true/'
load 2 c_bias use_bias
spoil c_tied config.json 's/"tie_word_embeddings": false/"tie_word_embeddings": true/'
load 2 c_tied tie_word_embeddings
spoil c_fused config.json 's/"weight_mode": "single"/"weight_mode": "fused"/'
load 2 c_fused weight_mode
mkdir c_large
cp $DIR/model.safetensors c_large/
{ printf '{"a":"'; head -c 30000000 /dev/zero | tr '\0' x; printf '"}'; } >c_large/config.json
load 3 c_large config.json

spoil w_renamed model.safetensors 's/lm_head\.weight/lm_heaX.weight/'
load 3 w_renamed lm_hea
spoil w_shape model.safetensors 's/\("lm_head.weight": *{"dtype": *"F32", *"shape": *\[\)256\(, *\)8\]/\18\2256]/'
load 3 w_shape lm_head.weight
spoil w_dtype model.safetensors 's/\("lm_head.weight": *{"dtype": *"\)F32"/\1I32"/'
load 3 w_dtype lm_head.weight
spoil w_dtype2 model.safetensors 's/\("lm_head.weight": *{"dtype": *"\)F32"/\1F33"/'
load 3 w_dtype2 w_dtype2
spoil w_json model.safetensors 's/"shape":/"shape";/'
load 3 w_json w_json
spoil w_offset model.safetensors 's/\("data_offsets": *\[\)0,/\14,/'
load 3 w_offset w_offset
spoil w_fewer config.json -e 's/"num_hidden_layers": 2/"num_hidden_layers": 1/; s/"num_blocks": 2/"num_blocks": 1/' \
    -e '/^ *"slstm"$/d; s/"mlstm",$/"mlstm"/'
load 3 w_fewer blocks.1
mkdir w_cut w_longer w_tiny w_nan
for dir in w_cut w_longer w_tiny w_nan; do cp $DIR/config.json $dir/; done
head -c 6000 $DIR/model.safetensors >w_cut/model.safetensors
load 3 w_cut w_cut
{ cat $DIR/model.safetensors; printf x; } >w_longer/model.safetensors
load 3 w_longer w_longer
printf '{}' >w_tiny/model.safetensors
load 3 w_tiny w_tiny
cp $DIR/model.safetensors w_nan/
last=$(($(wc -c <w_nan/model.safetensors) - 4))
printf '\xff\xff\xff\xff' | dd of=w_nan/model.safetensors bs=1 conv=notrunc seek=$last 2>/dev/null
load 3 w_nan w_nan

F32='"dtype":"F32","shape"'
header h_empty '{}'
load 3 h_empty h_empty
header h_array '[]'
load 3 h_array h_array
header h_overlap "{\"a\":{$F32:[2],\"data_offsets\":[0,8]},\"b\":{$F32:[2],\"data_offsets\":[4,12]}}" 12
load 3 h_overlap h_overlap
header h_hole "{\"a\":{$F32:[2],\"data_offsets\":[0,8]},\"b\":{$F32:[2],\"data_offsets\":[12,20]}}" 20
load 3 h_hole h_hole
header h_size "{\"a\":{$F32:[3],\"data_offsets\":[0,8]}}" 8
load 3 h_size h_size
header h_end "{\"a\":{$F32:[2],\"data_offsets\":[0,8]}}" 4
load 3 h_end h_end
header h_backwards "{\"a\":{$F32:[2],\"data_offsets\":[8,0]}}" 8
load 3 h_backwards h_backwards
header h_overflow "{\"a\":{$F32:[4294967296,4294967296,4],\"data_offsets\":[0,8]}}" 8
load 3 h_overflow h_overflow
header h_negative "{\"a\":{$F32:[-2],\"data_offsets\":[0,8]}}" 8
load 3 h_negative h_negative
header h_twice "{\"a\":{$F32:[1],\"data_offsets\":[0,4]},\"a\":{$F32:[1],\"data_offsets\":[4,8]}}" 8
load 3 h_twice h_twice
header h_deep "$(printf '[%.0s' $(seq 5000))"
load 3 h_deep h_deep
mkdir h_large h_lie
for dir in h_large h_lie; do cp $DIR/config.json $dir/; done
{ le 8 100000001; printf '{'; head -c 100000000 /dev/zero | tr '\0' ' '; } >h_large/model.safetensors
load 3 h_large h_large
{ le 8 $((1 << 62)); printf '{}'; } >h_lie/model.safetensors
load 3 h_lie h_lie
rm -r h_large c_large

# ---------------------------------------------------------------------------------------------------------------------
# Places

bad 2 "--out run" "${G[@]}" --out run
bad 2 --resume "${G[@]}" --out run
bad 2 "--out good.txt" "${G[@]}" --out good.txt
bad 2 good.txt/sub "${G[@]}" --out good.txt/sub
[ ! -d /proc/self ] || bad 2 /proc/run "${G[@]}" --out /proc/run
bad 2 --blocks "${G[@]}" --blocks mlstm --steps 9 --out run --resume
bad 2 --blocks "${G[@]}" --blocks mlstm,slstm,mlstm --steps 9 --out run --resume
bad 2 --dim "${G[@]}" --dim 16 --steps 9 --out run --resume
bad 2 --vocab --vocab 300 --train good.txt --steps 9 --out run --resume
bad 2 --model --model demo --train good.txt --steps 9 --out run --resume
bad 2 --gate --gate sig --train good.txt --steps 9 --out run --resume
bad 2 nowhere/dump "${G[@]}" --dump nowhere/dump
bad 2 folder.txt "${G[@]}" --dump folder.txt
mkdir all_damaged
cp -r $DIR all_damaged/
touch all_damaged/lock
printf x >>all_damaged/step_00000002/model.safetensors
bad 3 all_damaged "${G[@]}" --steps 9 --out all_damaged --resume
if [ "$(id -u)" != 0 ]; then # root may write anywhere
    mkdir read_only
    chmod a-w read_only
    bad 2 read_only "${G[@]}" --out read_only
    bad 2 read_only "${G[@]}" --out read_only/run
    cp good.txt secret.txt
    chmod a-r secret.txt
    bad 2 secret.txt "${S[@]}" --train secret.txt
fi

echo "bad_input: $PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
