# checks.bash: counts what a test script tries, and what several of them need; to be sourced. PASSED and FAILED;
# check.log in the present folder.
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
must() { # must COMMAND...: what other checks need; a failure if it fails, no check otherwise
    "$@" >run.log 2>&1 && return
    FAILED=$((FAILED + 1))
    echo "FAILED: $*"
    tail -n 5 run.log | sed 's/^/    /'
}
gone() { # gone SECONDS PID...: no process of these is left after so many seconds
    local end=$((SECONDS + $1)) pid alive
    shift
    while alive=0; for pid; do kill -0 "$pid" 2>/dev/null && alive=1; done; [ $alive = 1 ]; do
        if [ $SECONDS -gt $end ]; then
            echo "still there: $(ps -o pid=,stat=,args= -p "$(echo "$*" | tr ' ' ,)")"
            return 1
        fi
        sleep 0.05
    done
}
