#!/usr/bin/env bash
# Checks on a GPU what cannot be checked without one: libcm_cuda.so, with it ranks on GPUs, through NCCL, and sampling by
# CUDA graphs. Builds nothing.
#
#   scripts/gpu-check.sh CM [OUT]
#
# CM   the program (target/release/cm), with libcm_cuda.so beside it or named by CM_CUDA_OBJECT; LD_LIBRARY_PATH must
#      name a libtorch with all CUDA libraries, unless the program was built with one
# OUT  folder for the runs (out/gpu-check), made anew
#
# A line for each check, `holds` or `FAILS`; exit code 1 if any fails. With one GPU the ranks are a group of one, which
# is connected (CM_DIST_ALONE=1); with two or more also two ranks. A minute or two. DEVICE=cpu tries this script.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
cm=$1 out=${2:-out/gpu-check} device=${DEVICE:-cuda}
rm -rf "$out"
mkdir -p "$out"
failures=0

# verdict NAME STATUS DETAIL
verdict() {
    if [ "$2" -eq 0 ]; then
        echo "holds  $1: $3"
    else
        echo "FAILS  $1: $3"
        failures=$((failures + 1))
    fi
}

# The last line that a command wrote, for a verdict.
last() {
    tail -n 1 "$1" | cut -c 1-300
}

# train NAME VARIABLES LAUNCHER SETTINGS: twenty steps on the digits, every one of them logged.
train() {
    # shellcheck disable=SC2086
    env $2 "$cm" $3 train --config digits-ct --device "$device" --out "$out/$1" --set train.total_steps=20 \
        --set run.log_every=1 --set run.checkpoint_every=20 --set run.sample_every=0 $4 >"$out/$1.txt" 2>&1
}

# alike A B: the largest relative difference of the losses that two runs logged, and whether it is below 1e-3.
alike() {
    paste -d ';' "$out/$1/progress.csv" "$out/$2/progress.csv" | awk -F ';' '
        NR == 1 { n = split($1, names, ","); for (i = 1; i <= n; i++) if (names[i] == "loss") at = i; next }
        { split($1, a, ","); split($2, b, ","); d = (a[at] - b[at]) / a[at]; if (d < 0) d = -d; if (d > most) most = d; rows++ }
        END { printf "%d losses, relative difference at most %.1e\n", rows, most; exit !(at && rows >= 20 && most < 1e-3) }'
}

# ran NAME STATUS REFERENCE: the verdict on a run that is to have the losses of another.
ran() {
    if [ "$2" -ne 0 ]; then
        verdict "$1" 1 "$(last "$out/$1.txt")"
    else
        local said
        said=$(alike "$3" "$1")
        verdict "$1" $? "$said"
    fi
}

port=$((20000 + RANDOM % 20000))
one="RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port CM_DIST_ALONE=1"

"$cm" doctor >"$out/doctor.txt" 2>&1
object=$(grep '^CUDA object' "$out/doctor.txt" || echo "cm doctor names no CUDA object")
case $object in *"serves this program"*) verdict object 0 "$object" ;; *) verdict object 1 "$object" ;; esac

shared="--set train.shard_state=true"
train plain "" "" ""
verdict plain $? "$(last "$out/plain.txt")"
train nccl-one "$one" "" ""
ran nccl-one $? plain
train nccl-one-sharded "$one MASTER_PORT=$((port + 1))" "" "$shared"
ran nccl-one-sharded $? plain

gpus=$(grep -c . <(nvidia-smi -L 2>/dev/null))
if [ "$gpus" -ge 2 ] || [ "$device" = cpu ]; then
    train nccl-two "" "launch --nproc 2 --" ""
    ran nccl-two $? plain
    train nccl-two-sharded "" "launch --nproc 2 --" "$shared"
    ran nccl-two-sharded $? plain
else
    echo "left out: two ranks on two GPUs ($gpus here)"
fi
if [ "$device" != cpu ]; then
    # One rank more than there are GPUs must end in one line.
    train too-many "" "launch --nproc $((gpus + 1)) --" ""
    code=$?
    [ $code -ne 0 ] && grep -q 'start no more ranks on it than that' "$out/too-many.txt"
    verdict too-many $? "$(grep -m 1 LOCAL_RANK "$out/too-many.txt" || last "$out/too-many.txt")"
fi

# sample NAME OPTIONS: what --seeds and --batch say.
sample() {
    local name=$1
    shift
    "$cm" sample "$out/plain" --device "$device" --out "$out/$name" "$@" >"$out/$name.txt" 2>&1
}

took() {
    grep 'images in' "$out/$1.txt" | sed 's/,.*//'
}

# pixels A B: how many of the pictures of one folder have other bytes in the other, and how long both took.
pixels() {
    local differ=0 all=0 file
    for file in "$out/$1"/*.png; do
        all=$((all + 1))
        cmp -s "$file" "$out/$2/$(basename "$file")" || differ=$((differ + 1))
    done
    echo "$differ of $all pictures differ; $(took "$1"), against $(took "$2")"
    [ "$all" -gt 0 ] && [ "$differ" -eq 0 ]
}

graph=--cuda-graph
[ "$device" = cpu ] && graph=""
# Three batches of one size and one of another, at one noise level and at several: the same bytes with and without.
batches="--seeds 0-99 --batch 32"
for kind in f32 bf16; do
    for steps in "" "--sampler multistep --sigmas 80,2.0,0.8"; do
        name=graph-$kind${steps:+-multistep}
        # shellcheck disable=SC2086
        sample "plain-$name" $batches --dtype $kind $steps
        # shellcheck disable=SC2086
        if sample "$name" $batches --dtype $kind $steps $graph; then
            said=$(pixels "$name" "plain-$name")
            verdict "$name" $? "$said"
        else
            verdict "$name" 1 "$(last "$out/$name.txt")"
        fi
    done
done

# One image at a time, where starting work is what takes the time; recording is in it.
singles="--seeds 0-511 --batch 1"
# shellcheck disable=SC2086
sample speed-plain $singles && sample speed-graph $singles $graph
seconds() {
    took "$1" | sed 's/.* in \(.*\) s/\1/'
}
awk -v a="$(seconds speed-graph)" -v b="$(seconds speed-plain)" 'BEGIN { exit !(a > 0 && a < b) }'
verdict graph-speed $? "$(took speed-graph), against $(took speed-plain)"

exit $((failures > 0))
