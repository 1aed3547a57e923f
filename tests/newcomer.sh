#!/usr/bin/env bash
# Run README's commands as a newcomer would: in order, from a clone and from a wheel, in folders with blanks in their names.
#
#     bash tests/newcomer.sh [FOLDER]
#
# The commands are read from README.md, so this cannot fall behind it. Trainings take four steps, samples and
# comparisons on few pieces of the test photographs. The environment is new, and borrows the installed dependencies of
# PYTHON (.venv/bin/python) instead of downloading them again. It takes some minutes and is not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
WORK=${1:-$(mktemp -d)}
CLONE="$WORK/a clone" PLACE="$WORK/a place of its own" ENVIRONMENT="$WORK/an environment"
mkdir -p "$PLACE"

git clone -q . "$CLONE"
"$PYTHON" -m venv --without-pip "$ENVIRONMENT"
SITE=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$SITE/borrowed.pth"
"$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$WORK/wheels" "$CLONE" 2> "$WORK/wheel.txt" || { cat "$WORK/wheel.txt"; exit 1; }
"$PYTHON" -m pip --python "$ENVIRONMENT/bin/python" install -q --no-deps --force-reinstall "$WORK"/wheels/ud2m-*.whl
PATH="$ENVIRONMENT/bin:$PATH"

# inputs FOLDER: the files that README's commands name, made of a photograph
inputs() {
    python - "$1" <<'END'
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.data import chelsea

folder, cat = Path(sys.argv[1]), chelsea()
rng = np.random.default_rng(0)
for name in ("photo.png", "photo.jpg", "blurred.png", "damaged.png"):
    Image.fromarray(cat[100:164, 150:214]).save(folder / name)
Image.fromarray((255 * (rng.random((64, 64)) < 0.7)).astype(np.uint8)).save(folder / "mask.png")
Image.fromarray(np.full((5, 5), 200, np.uint8)).save(folder / "psf.png")
Image.fromarray((255 * np.eye(32)).astype(np.uint8)).save(folder / "digit.png")
for split in ("images/train", "images/val", "images/test", "folder"):
    (folder / split).mkdir(parents=True)
    for k in range(4):
        Image.fromarray(cat[40 * k : 40 * k + 64, 90 * k : 90 * k + 64]).save(folder / split / f"{k}.png")
END
}

# small COMMAND: the same, in miniature
small() {
    case $1 in
        *resume=true*) echo "$1" ;;
        *"train.py"*) echo "$1 steps=4 validate_every=4 data.batch_size=2 data.val_limit=1 data.num_workers=0" ;;
        *"sampler="*) echo "$1 num_samples=2 lpips=null" ;;
        *"sample.py"*) echo "$1 num_samples=2 lpips=null data.test_limit=1 data.val_limit=1 tune_samples=1 show=1" ;;
        *evaluate*) echo "$1 num_samples=2 tune=false show=1" ;;
        *) echo "$1" ;;
    esac
}

# everything FOLDER FILTER: README's commands there, each changed by sed's FILTER
everything() {
    cd "$1"
    inputs "$1"
    while read -r command; do
        command=$(small "$command" | sed "$2; s#/path/to/folder#'$1/folder'#; s#/path/to/images#'$1/images'#")
        echo "> $command"
        eval "$command" < /dev/null > "$WORK/output.txt" 2>&1 || { cat "$WORK/output.txt"; echo "failed: $command"; exit 1; }
    done < <(awk '/^```bash/ {on = 1; next} /^```/ {on = 0} on' "$CLONE/README.md" | grep -E '^(python (train|sample)\.py|ud2m) ')
}

(everything "$CLONE" "s/^ud2m /python -m ud2m /")
(everything "$PLACE" "s/^python train.py/ud2m train/; s/^python sample.py/ud2m sample/")
echo "all commands of README.md ran, from a clone and from a wheel: $WORK"
