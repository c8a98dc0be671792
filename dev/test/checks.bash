# checks.bash: counts what a test script tries; to be sourced. PASSED and FAILED; check.log in the present folder.
# shellcheck shell=bash disable=SC2034 # the scripts print the counts
PASSED=0 FAILED=0
check() { # check NAME COMMAND...: passes if the command succeeds
    local name=$1
    shift
    if "$@" >check.log 2>&1; then PASSED=$((PASSED + 1)); return; fi
    FAILED=$((FAILED + 1))
    echo "FAILED: $name"
    tail -n 6 check.log | sed 's/^/    /'
}
