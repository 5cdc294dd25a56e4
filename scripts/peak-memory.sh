#!/usr/bin/env bash
# Runs a command and says how much memory each process named `cm` below it held at most (VmHWM), the largest last.
#
#   scripts/peak-memory.sh COMMAND [ARGS…]
#
# It looks five times a second, so what a process takes in its last fifth may be missed. Its exit code is the command's.
set -uo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
"$@" &
root=$!
declare -A most

# The process $1 and all below it.
tree() {
    echo "$1"
    local child
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        tree "$child"
    done
}

while kill -0 "$root" 2>/dev/null; do
    for pid in $(tree "$root"); do
        if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = cm ]; then
            peak=$(awk '/^VmHWM/ { print $2 }' "/proc/$pid/status" 2>/dev/null)
            [ -n "$peak" ] && most[$pid]=$peak
        fi
    done
    sleep 0.2
done
wait "$root"
code=$?
for pid in "${!most[@]}"; do
    awk -v pid="$pid" -v kb="${most[$pid]}" 'BEGIN { printf "%d %.2f GB\n", pid, kb * 1024 / 1e9 }'
done | sort -k 2 -n
exit "$code"
