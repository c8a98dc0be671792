#!/usr/bin/env bash
# kernel_resources.sh: what the assembler made of the kernels of build/libxlstm_kernels.so: for sm_90a, none with a stack
# frame or spilled registers or products that wait for each other for want of registers (C7512), and all named after the
# pass that they belong to. Needs nvcc, no GPU and no other tool.
#
#   make KERNELS_SM=90a build/libxlstm_kernels.so && bash dev/test/cuda/kernel_resources.sh [LOG]
#
# LOG is what nvcc -Xptxas -v printed; make leaves it in build/libxlstm_kernels.so.ptxas. The last line is "N passed, N
# failed": four checks a kernel. Exit code 1 if one failed.
set -u
cd "$(dirname "$0")/../../.." || exit 2
LOG=${1:-build/libxlstm_kernels.so.ptxas}
if [ ! -f "$LOG" ]; then
    echo "kernel_resources.sh: $LOG is not there; run: make KERNELS_SM=90a build/libxlstm_kernels.so" >&2
    exit 2
fi
DEMANGLE='cat'
! command -v c++filt >/dev/null || DEMANGLE=c++filt

# A report reads: Compiling entry function 'NAME' for 'sm_90a', Function properties for NAME, N bytes stack frame, N
# bytes spill stores, N bytes spill loads, Used N registers, ...
awk '
function check(good, text) {
    if (good) passed++
    else { failed++; print "FAIL " name ": " text }
}
/Compiling entry function/ {
    split($0, quoted, "\047")
    name = quoted[2]
    plain = name
    sub(/^_ZL?[0-9]+/, "", plain)
    names[++kernels] = name
    check(quoted[4] == "sm_90a", "built for " quoted[4] ", not sm_90a")
    check(plain ~ /^(mlstm_fwd|mlstm_bwd|slstm_)/, "the name begins with none of mlstm_fwd, mlstm_bwd, slstm_")
}
/[(]C7512[)]/ {
    split($0, quoted, "\047")
    serialized[quoted[2]] = 1
}
/Function properties for/ { name = $NF }
/bytes stack frame/ {
    reports++
    check($1 == 0 && $5 == 0 && $9 == 0, $1 " bytes of stack, " $5 " + " $9 " bytes of spills")
}
END {
    for (k = 1; k <= kernels; k++) {
        name = names[k]
        check(!(name in serialized), "its products are serialized")
    }
    name = FILENAME
    check(kernels > 0 && reports >= kernels, kernels + 0 " kernels, " reports + 0 " reports of their resources")
    printf "%d kernels\n%d passed, %d failed\n", kernels, passed, failed
    exit failed > 0
}' "$LOG" | $DEMANGLE
exit "${PIPESTATUS[0]}"
