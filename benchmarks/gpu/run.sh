#!/usr/bin/env bash
# Prove and measure the project on one GPU, within minutes and without a network (docs/gpu.md):
#
#     bash benchmarks/gpu/run.sh check|bench|train|all [minutes=12] [scale=tiny] [prior=NAME] [photographs=FOLDER] [models=NAME,...]
#
# Results go to the folder $OUT (by default benchmarks/gpu/out). What the machine lacks is taken from
# benchmarks/gpu/wheels, which prepare.sh has filled; nothing is installed into its Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=benchmarks/gpu
export PYTHON=${PYTHON:-python3} OUT=${OUT:-$here/out} PYTHONUNBUFFERED=1
path=$PWD
if compgen -G "$here/wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --root-user-action ignore --target "$site" "$here"/wheels/*.whl
    path=$path:$site:$PWD/$here/wheels # there lies what says which version of ud2m this is
fi
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" "$here/kit.py" "$@"
