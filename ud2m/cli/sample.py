"""Draw samples, write pictures, numbers and the report: what ``sample.py`` runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

import ud2m.physics
from ud2m.cli.errors import user_facing
from ud2m.cli.train import quiet_libraries
from ud2m.data import ImageDataModule
from ud2m.evaluation.comparison import compare, sampler_row
from ud2m.evaluation.measure import Distance, lpips_if_available, takes
from ud2m.evaluation.metrics import psnr, ssim
from ud2m.evaluation.table import format_table
from ud2m.files import atomic_folder, write_json
from ud2m.images import PixelFormat, list_images, pixel_format, read_image, write_image
from ud2m.losses.terms import FeatureDistance
from ud2m.physics import DataTerm, OperatorFamily, estimate_sigma_y, measured, misfit, residual, select_samples
from ud2m.physics.problem import Problem
from ud2m.priors.prior import Prior
from ud2m.reports.samples import Entry, Report, Section, write_report
from ud2m.samplers.ud2m import PosteriorSampler

AUTO = "auto"
OPTIONS = ("num_steps", "eta", "symmetries", "step_scale", "chunk_size", "tile")
"""Keys that a call of the sampler takes as they are."""


@dataclass(frozen=True)
class Case:
    """One observation to draw samples for.

    Args:
        y: [1, ...]. physics: its operator. sigma_y: its noise level. x0: the clean image [1, C, H, W] if known.
        pixels: of the file that it comes from, and of those that are made of it.
    """

    name: str
    y: Tensor
    physics: DataTerm
    sigma_y: float
    x0: Tensor | None
    pixels: PixelFormat | None = None


@user_facing
def main(config: DictConfig) -> None:
    """Run one sampling job into the folder ``output``, which appears when everything is written."""
    quiet_libraries()
    output = Path(config.output)
    with atomic_folder(output, overwrite=config.overwrite) as folder:
        rows = Job(config).run(folder)
    print(format_table(rows))
    print(f"report: {output / 'report.html'}")


class Job:
    """The objects of one sampling job."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.sampler = PosteriorSampler.from_pretrained(config.model, config.prior, config.device)
        trained = self.sampler.config.info.get("physics", {})
        chosen = given_operator(config)
        self.operator = instantiate(chosen.operator) if chosen else trained_operator(trained.get("operator", {}))
        default = chosen.sigma_y if chosen else self.sampler.config.sigma_y
        self.sigma_y = default if config.sigma_y in (None, AUTO) else config.sigma_y
        if isinstance(self.sigma_y, str) or not self.sigma_y > 0:
            raise ValueError(
                f"sigma_y must be a positive noise level, images lie in [0, 1], or {AUTO}; got {self.sigma_y}"
            )
        if config.sigma_y == AUTO and not (config.input is not None and config.degraded):
            raise ValueError(
                f"sigma_y={AUTO} estimates the noise of your own observation: give input=... degraded=true"
            )
        noise = chosen.get("noise") if chosen else trained.get("noise")
        self.problem = Problem(self.operator, self.sigma_y, config.seed, noise)
        self.prior = Prior.from_pretrained(config.prior or str(self.sampler.prior.reference)).to(config.device)
        self.options = {key: config[key] for key in OPTIONS}
        self.distances = distances(self.prior, config.lpips)

    def run(self, folder: Path) -> list[dict[str, Any]]:
        """Fill the output folder and return the rows of ``metrics.json``."""
        rows, sections = self.own_files(folder) if self.config.input is not None else self.test_images(folder)
        write_json(folder / "metrics.json", rows)
        settings = plain(self.config) | {"trained": vars(self.sampler.config)}
        write_json(folder / "config.json", settings)
        write_report(folder / "report.html", Report(*self.headline(), rows, settings, sections))
        return rows

    def headline(self) -> tuple[str, str]:
        """Return title and summary of the report."""
        steps = self.config.num_steps or self.sampler.config.num_steps
        noise = "estimated" if self.config.sigma_y == AUTO else f"= {self.sigma_y:g}"
        return (
            f"UD2M posterior samples: {self.config.model}",
            f"{self.config.num_samples} samples per observation, {self.sampler.nfe(steps)} network evaluations each "
            f"(K = {self.sampler.network.num_blocks} modules, N = {steps} steps); operator "
            f"{type(self.operator).__name__}, sigma_y {noise} for images in [0, 1]. Bright places of the "
            "standard deviation are those that the observation does not determine.",
        )

    # --- the user's files ----------------------------------------------------------------------------------------

    def own_files(self, folder: Path) -> tuple[list[dict[str, Any]], list[Section]]:
        """Sample for the files of ``input``; one row of averages over them."""
        cases = list(self.file_cases())
        names = [case.name for case in cases]
        if len(set(names)) < len(names):
            raise ValueError(f"two input files share a name ({names}); rename one, since results are named after them")
        targets = [folder / case.name if len(cases) > 1 else folder for case in cases]
        results = [self.sample(*pair) for pair in zip(tqdm(cases, desc="images"), targets, strict=True)]
        numbers = [entry.numbers for entry in results]
        row = {k: sum(n[k] for n in numbers) / len(numbers) for k in numbers[0]}
        name = self.headline()[0].split(":")[0]
        row = {"method": name, "nfe": self.sampler.nfe(self.config.num_steps)} | row
        return [row], [Section("Images", "", results)]

    def file_cases(self) -> Iterator[Case]:
        """Yield what each input file asks for."""
        for index, path in enumerate(list_images(self.config.input)):
            try:
                if self.config.degraded:
                    y, physics = self.observed(path)
                    yield Case(path.stem, y, physics, self.noise_level(y, physics), None, pixel_format(path))
                else:
                    image = self.clean(path)
                    y, physics = self.problem.observe(image, index)
                    yield Case(path.stem, y, physics, self.sigma_y, image, pixel_format(path))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

    def clean(self, path: Path) -> Tensor:
        """Return a clean picture [1, C, H, W], without the rows and columns that the operator cannot take."""
        image = self.picture(path, self.prior.channels)
        height, width = (side - side % self.operator.multiple for side in image.shape[-2:])
        if (height, width) != image.shape[-2:] and min(height, width) > 0:
            tqdm.write(f"{path.name}: cut to {height}x{width}, multiples of {self.operator.multiple}")
            return image[..., :height, :width]
        return image

    def observed(self, path: Path) -> tuple[Tensor, DataTerm]:
        """Return an observation [1, ...] that was made elsewhere, and its operator."""
        known = self.operator.read_observation(path, self.prior.channels, self.config.device)
        if known is not None:
            return known
        y = self.picture(path, self.operator.y_channels(self.prior.channels))
        return y, self.known_operator(y)

    def picture(self, path: Path, channels: int) -> Tensor:
        """Return a file as an image [1, channels, H, W]."""
        return read_image(path, channels=channels).unsqueeze(0).to(self.config.device)

    def noise_level(self, y: Tensor, physics: DataTerm) -> float:
        """Return the given or estimated noise level of an observation y [1, C, h, w] that was made elsewhere."""
        return estimate_sigma_y(physics, y).item() if self.config.sigma_y == AUTO else self.sigma_y

    def known_operator(self, y: Tensor) -> DataTerm:
        """Return the operator of an observation y [1, C, h, w] that was made elsewhere."""
        if self.operator.random:
            raise ValueError(
                f"{type(self.operator).__name__} draws another operator each time and cannot explain an input that is "
                "degraded already; give the one it was made with, e.g. physics=mask physics.mask=mask.png"
            )
        return self.operator.draw(1, self.operator.image_shape((y.shape[1], y.shape[2], y.shape[3])), device=y.device)

    # --- test images ---------------------------------------------------------------------------------------------

    def test_images(self, folder: Path) -> tuple[list[dict[str, Any]], list[Section]]:
        """Score all test images of the data set (with the other methods if asked) and show some of them."""
        data: ImageDataModule = instantiate(self.config.data, _convert_="all")
        if data.channels != self.prior.channels:
            raise ValueError(f"data has {data.channels} channels, the prior {self.prior.channels}; choose other data")
        batches = [x0.to(self.config.device) for x0 in data.test_dataloader()]
        count = self.config.num_samples
        if self.config.compare:
            validation = [x0.to(self.config.device) for x0 in data.val_dataloader()]
            rows = compare(
                self.sampler, self.prior, self.problem, validation, batches, count, self.distances, **self.options
            )
        else:
            rows = [sampler_row(self.sampler, self.problem, batches, count, self.distances, **self.options)]
        return rows, self.shown_test_images(data, folder)

    def shown_test_images(self, data: ImageDataModule, folder: Path) -> list[Section]:
        """Return the sections of the report: evenly spaced test images, and one larger image."""
        images = data.evaluation_set("test")
        picked = sorted({k * len(images) // self.config.show for k in range(min(self.config.show, len(images)))})
        shown = [self.case(images.names[i], images[i], i) for i in picked]
        entries = [self.sample(case, folder / case.name) for case in tqdm(shown, desc="pictures")]
        sections = [Section("Test images", "Evenly spaced over the test images.", entries)] if entries else []
        if self.config.crop is not None:
            sections.append(self.larger_image(folder))
        return sections

    def larger_image(self, folder: Path) -> Section:
        """Sample for one test image of side ``crop``, larger than what the model was trained on."""
        settings = {**self.config.data, "tile_size": self.config.crop, "test_limit": 1}
        images = instantiate(settings, _convert_="all").evaluation_set("test")
        case = self.case(f"{images.names[0]}-{self.config.crop}", images[0], 0)
        text = "The network was trained on small crops and is used at this size without change."
        title = f"A larger picture: {self.config.crop}x{self.config.crop}"
        return Section(title, text, [self.sample(case, folder / case.name)])

    def case(self, name: str, image: Tensor, index: int) -> Case:
        """Observe a clean image [C, H, W], as scoring did."""
        x0 = image.unsqueeze(0).to(self.config.device)
        return Case(name, *self.problem.observe(x0, index), self.sigma_y, x0)

    # --- one observation -----------------------------------------------------------------------------------------

    def sample(self, case: Case, folder: Path) -> Entry:
        """Draw samples for one observation, write its pictures into ``folder`` and return its part of the report."""
        generator = torch.Generator(case.y.device).manual_seed(self.config.seed)
        try:
            samples = self.sampler(
                case.y, case.physics, case.sigma_y, self.config.num_samples, generator=generator, **self.options
            )[0]
        except ValueError as error:
            raise ValueError(f"{case.name}: {error}") from error
        mean = samples.mean(0)
        std = samples.std(0) if len(samples) > 1 else None
        numbers = {k: v.mean().item() for k, v in self.numbers(case, samples).items()}
        write_pictures(folder, case.y[0], samples, mean, std, case.pixels)
        mask = measured(case.physics, case.y)
        holes = None if bool((mask == 1).all()) else mask.expand_as(case.y)[0].amax(0) > 0
        reference = None if case.x0 is None else case.x0[0]
        note = misfit(case.physics, numbers["residual"])
        if note:
            tqdm.write(f"{case.name}: {note}")
        return Entry(case.name, reference, case.y[0], samples, mean, std, numbers, note=note, measured=holes)

    def numbers(self, case: Case, samples: Tensor) -> dict[str, Tensor]:
        """Return the scores of samples [S, C, H, W]: the data residual always, the others where x0 is known."""
        y = case.y.expand(len(samples), *case.y.shape[1:])
        physics = select_samples(case.physics, torch.zeros(len(samples), dtype=torch.int64))
        values = {"residual": residual(physics, samples, y, case.sigma_y)}
        if case.x0 is None:
            return values | {"sigma_y": torch.tensor(case.sigma_y)}
        x0 = case.x0.expand_as(samples)
        scores = {"psnr_mean": psnr(samples.mean(0, keepdim=True), case.x0), "psnr": psnr(samples, x0)}
        distances = {name: d(samples, x0) for name, d in self.distances.items() if takes(d, x0)}
        return scores | {"ssim": ssim(samples, x0)} | distances | values


def distances(prior: Prior, lpips_net: str | None) -> dict[str, Distance]:
    """Return LPIPS where it is wanted and its weights are at hand, and always the distance of the prior's features."""
    lpips = {} if lpips_net is None else lpips_if_available(lpips_net)
    return lpips | {"prior_features": FeatureDistance(prior.features)}


def given_operator(config: DictConfig) -> DictConfig | None:
    """Return the page of ``physics=...``, if given, with all values filled in.

    A missing one is noticed here under the name that a user sets it by.
    """
    if config.get("physics") is None:
        return None
    values = OmegaConf.to_container(config.physics, resolve=True, throw_on_missing=True)
    return cast(DictConfig, OmegaConf.create(values))


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def trained_operator(description: Mapping[str, Any]) -> OperatorFamily:
    """Return the operator family that a model was trained for, from its export: ``{"class": ..., **options}``.

    The export may be a stranger's, so only families of ``ud2m.physics`` are made; others come from ``physics=``.

    Raises:
        ValueError: when the description names no such family.
    """
    options = dict(description)
    module, _, name = str(options.pop("class", "")).rpartition(".")
    family = getattr(ud2m.physics, name, None) if module == "ud2m.physics" else None
    if not (isinstance(family, type) and issubclass(family, OperatorFamily)):
        raise ValueError(f"the model names no operator of this package ({name or 'none'}); choose one: physics=...")
    return family(**{key: _parts(value) for key, value in options.items()})


def _parts(value: Any) -> Any:
    """Return an option of an operator, with the operators that it consists of."""
    if isinstance(value, list):
        return [_parts(part) for part in value]
    return trained_operator(value) if isinstance(value, Mapping) and "class" in value else value


def write_pictures(
    folder: Path, y: Tensor, samples: Tensor, mean: Tensor, std: Tensor | None, pixels: PixelFormat | None
) -> None:
    """Write ``observation.png``, ``samples/*.png``, ``mean.png`` and ``std.png`` (white is the largest deviation).

    All but the last have the depth and the colour profile of the file that they were made of.
    """
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_image(y, folder / "observation.png", pixels)
    for k, sample in enumerate(samples):
        write_image(sample, folder / "samples" / f"{k:03d}.png", pixels)
    write_image(mean, folder / "mean.png", pixels)
    deviation = torch.zeros_like(mean) if std is None else std
    write_image(deviation / deviation.max().clamp(min=1e-6), folder / "std.png")
