#!/usr/bin/env bash
# Trains EDM, CD, iCT and ECT on Fashion-MNIST and on the bundled emoji on one GPU, and publishes figures, pictures,
# curves and images a second into docs/results.md and docs/pictures/. EDM is the teacher that CD trains first.
#
#   scripts/gpu.sh CM FASHION [SECONDS]
#
# CM       the program (target/release/cm); LD_LIBRARY_PATH must name a libtorch with CUDA
# FASHION  the folder of Fashion-MNIST's four IDX files
# SECONDS  time for each of the eight trainings; at the default of 65 the whole fits ten minutes
#
# DEVICE (cuda) and OUT (out/gpu) may be set. What has been published stays if a later run fails.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 2 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
cm=$1 fashion=$2 seconds=${3:-65}
device=${DEVICE:-cuda} out=${OUT:-out/gpu}
failed=()

for data in fashion emoji; do
    images=()
    [ "$data" = fashion ] && images=(--images "$fashion")
    for recipe in cd ict ect; do
        echo "== $data, $recipe"
        "$cm" demo --data "$data" ${images[@]+"${images[@]}"} --recipe "$recipe" --device "$device" \
            --seconds "$seconds" --out "$out/$data-$recipe" --publish || failed+=("$data-$recipe")
    done
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
