#!/usr/bin/env bash
# Fetch what run.sh needs on a machine without a network, where there is one:
#
#     bash benchmarks/gpu/prepare.sh [FOLDER of photographs]
#
# Pure Python wheels, in the versions of this environment, go to benchmarks/gpu/wheels, photographs to
# benchmarks/gpu/photographs. Both are ignored by git; with the repository they stay below 60 MiB.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
here=benchmarks/gpu
# of the dependencies those that a machine with PyTorch, torchvision, lightning, torchmetrics, peft, safetensors,
# huggingface_hub, scipy, scikit-image, scikit-learn, matplotlib, h5py, einops, pytest lacks, with what they need themselves
LACKING="diffusers deepinv lpips hydra-core omegaconf antlr4-python3-runtime webdataset braceexpand natsort
         importlib_metadata zipp"
rm -rf "$here/wheels"
mkdir -p "$here/wheels"
# shellcheck disable=SC2046,SC2086 # words
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$here/wheels" $("$PYTHON" -c '
import sys
from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in sys.argv[1:]))' $LACKING)
if compgen -G "$here/wheels/*.whl" | grep -v -- '-none-any.whl$'; then
    echo "error: these wheels are not for every machine" >&2
    exit 1
fi
"$PYTHON" -c '
import sys
from setuptools.build_meta import prepare_metadata_for_build_wheel
prepare_metadata_for_build_wheel(sys.argv[1])' "$PWD/$here/wheels" >/dev/null
rm -rf "$here"/wheels/*.egg-info
if [ $# -gt 0 ]; then
    "$PYTHON" "$here/pack.py" "$1" "$here/photographs"
fi
du -sh "$here"/wheels "$here"/photographs 2>/dev/null || true
