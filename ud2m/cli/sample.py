"""Draw samples, write pictures, numbers and the report: what ``sample.py`` runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ud2m.cli import plain
from ud2m.cli.errors import user_facing
from ud2m.cli.methods import build_sampler, combinations
from ud2m.cli.objects import TARGET, build, resolved
from ud2m.cli.train import quiet_libraries, resolve
from ud2m.data import ImageDataModule
from ud2m.data.module import evenly_spaced
from ud2m.evaluation.comparison import best_settings, difference
from ud2m.evaluation.measure import Measurement
from ud2m.evaluation.scores import Draws, Score, build_score, distance_score, fitting_scores, lpips_metric
from ud2m.evaluation.table import column_of, without_bounds
from ud2m.files import atomic_folder, inside, write_json
from ud2m.images import PixelFormat, list_images, pixel_format, read_image
from ud2m.losses import FeatureDistance
from ud2m.physics import Observation, OperatorFamily, Problem, estimate_sigma_y, measured, misfit
from ud2m.precision import find_device
from ud2m.priors.prior import Prior
from ud2m.reports.page import write_page
from ud2m.reports.samples import Entry, Report, Section, samples_page, write_pictures
from ud2m.reports.text_tables import format_table
from ud2m.samplers.base import Sampler
from ud2m.samplers.ud2m import PosteriorSampler

AUTO = "auto"
OPTIONS = ("num_steps", "eta", "symmetries", "step_scale", "chunk_size", "tile", "precision")
"""Keys that are options of the sampler."""
METRICS = ("psnr", "ssim")
"""Besides LPIPS, the distance of the prior's features and the residual."""

Rows = list[dict[str, Any]]


@user_facing
def main(config: DictConfig) -> None:
    """Run one sampling job into the folder ``output``, which appears when everything is written."""
    quiet_libraries()
    output = Path(config.output)
    with atomic_folder(output, overwrite=config.overwrite) as folder:
        rows = SamplingRun(config).run(folder)
    print(format_table(rows))
    print(f"report: {output / 'report.html'}")


@dataclass(frozen=True, eq=False)
class Case:
    """One observation to draw samples for.

    Attributes:
        name: of its results.
        observation: of one image.
        x0: the clean image [1, C, H, W] if known.
        pixels: of the file that it comes from, and of those that are made of it.
    """

    name: str
    observation: Observation
    x0: Tensor | None = None
    pixels: PixelFormat | None = None


class SamplingRun:
    """The objects of one sampling job.

    Args:
        config: of conf/sample.yaml.

    Raises:
        ValueError: for settings that do not fit together.
        FileNotFoundError: for missing models.
    """

    def __init__(self, config: DictConfig):
        self.config, self.device = config, find_device(config.device)
        options = {key: config[key] for key in OPTIONS}
        self.sampler = PosteriorSampler.from_pretrained(config.model, config.prior, self.device, **options)
        trained = self.sampler.config.info.get("physics", {})
        chosen = given_operator(config)
        self.operator: OperatorFamily = (
            build(chosen.operator, "physics.operator", OperatorFamily)
            if chosen
            else trained_operator(trained.get("operator", {}))
        )
        default = chosen.sigma_y if chosen else self.sampler.config.sigma_y
        noise = chosen.get("noise") if chosen else trained.get("noise")
        self.problem = Problem(self.operator, given_noise_level(config, default), config.seed, noise)
        self.lpips = [] if config.lpips is None else [lpips_metric(config.lpips)]
        self.prior = Prior.from_pretrained(config.prior or str(self.sampler.prior.reference)).to(self.device)

    @property
    def name(self) -> str:
        """What the sampler is called in tables."""
        return f"UD2M (K={self.sampler.network.num_blocks}, N={self.sampler.config.num_steps})"

    def run(self, folder: Path) -> Rows:
        """Fill the output folder and return the rows of ``metrics.json``."""
        rows, sections = self.own_files(folder) if self.config.input is not None else self.test_images(folder)
        write_json(folder / "metrics.json", rows)
        settings = plain(self.config) | {"trained": vars(self.sampler.config)}
        write_json(folder / "config.json", settings)
        report = Report(*self.headline(), rows, settings, sections)
        write_page(folder / "report.html", samples_page(report))
        return rows

    def headline(self) -> tuple[str, str]:
        """Return title and summary of the report."""
        noise = "estimated" if self.config.sigma_y == AUTO else f"= {self.problem.sigma_y:g}"
        return (
            f"UD2M posterior samples: {self.config.model}",
            f"{self.config.num_samples} samples per observation, {self.sampler.nfe()} network evaluations each "
            f"(K = {self.sampler.network.num_blocks} modules, N = {self.sampler.config.num_steps} steps); operator "
            f"{type(self.operator).__name__}, sigma_y {noise} for images in [0, 1]. Bright places of the "
            "standard deviation are those that the observation does not determine.",
        )

    def scores(self, num_samples: int, shape: Sequence[int], known: bool = True) -> list[Score]:
        """Return fresh scores for images (C, H, W): the residual always, the others where the images are known."""
        residual = build_score("residual")
        if not known:
            return [residual]
        features = distance_score("prior_features", FeatureDistance(self.prior.features))
        return [*fitting_scores([*METRICS, *self.lpips, "r"], num_samples, shape), features, residual]

    # --- the user's files ----------------------------------------------------------------------------------------

    def own_files(self, folder: Path) -> tuple[Rows, list[Section]]:
        """Sample for the files of ``input``; one row of averages over them."""
        cases = list(self.file_cases())
        names = [case.name for case in cases]
        if len(set(names)) < len(names):
            raise ValueError(f"two input files share a name ({names}); rename one, since results are named after them")
        targets = [self.place(folder, case.name) if len(cases) > 1 else folder for case in cases]
        entries = [self.sample(*pair) for pair in zip(tqdm(cases, desc="images"), targets, strict=True)]
        numbers = [entry.numbers for entry in entries]
        row = {k: sum(n[k] for n in numbers) / len(numbers) for k in numbers[0]}
        return [{"method": self.name, "nfe": self.sampler.nfe()} | row], [Section("Images", "", entries)]

    def file_cases(self) -> Iterator[Case]:
        """Yield what each input file asks for."""
        for index, path in enumerate(list_images(self.config.input)):
            try:
                if self.config.degraded:
                    yield Case(path.stem, self.observed(path), None, pixel_format(path))
                else:
                    yield self.case(path.stem, self.clean(path), index, pixel_format(path))
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

    def observed(self, path: Path) -> Observation:
        """Return an observation of one image that was made elsewhere."""
        known = self.operator.read_observation(path, self.prior.channels, self.device)
        if known is None:
            y = self.picture(path, self.operator.y_channels(self.prior.channels))
            known = y, self.known_operator(y)
        y, physics = known
        auto = self.config.sigma_y == AUTO
        return Observation.of(y, physics, estimate_sigma_y(physics, y) if auto else self.problem.sigma_y)

    def picture(self, path: Path, channels: int) -> Tensor:
        """Return a file as an image [1, channels, H, W]."""
        return read_image(path, channels=channels).unsqueeze(0).to(self.device)

    def known_operator(self, y: Tensor) -> Any:
        """Return the operator of an observation y [1, C, h, w] that was made elsewhere."""
        if self.operator.random:
            raise ValueError(
                f"{type(self.operator).__name__} draws another operator each time and cannot explain an input that is "
                "degraded already; give the one it was made with, e.g. physics=mask physics.mask=mask.png"
            )
        return self.operator.draw(1, self.operator.image_shape((y.shape[1], y.shape[2], y.shape[3])), device=y.device)

    # --- test images ---------------------------------------------------------------------------------------------

    def test_images(self, folder: Path) -> tuple[Rows, list[Section]]:
        """Score all test images of the data set (with the other methods if asked) and show some of them."""
        data: ImageDataModule = build(self.config.data, "data", ImageDataModule)
        if data.channels != self.prior.channels:
            raise ValueError(f"data has {data.channels} channels, the prior {self.prior.channels}; choose other data")
        test = [x0.to(self.device) for x0 in data.test_dataloader()]
        others = self.others(data, test) if self.config.compare else []
        return [*others, self.row(self.name, self.sampler, test)], self.shown_test_images(data, folder)

    def others(self, data: ImageDataModule, test: Sequence[Tensor]) -> Rows:
        """Return a row for each of ``methods``, and for each number by which its setting is chosen."""
        validation = [x0.to(self.device) for x0 in data.val_dataloader()]
        return [
            self.row(label, self.build(target), test) | extra
            for page in plain(self.config)["methods"].values()
            for label, target, extra in self.settings(page, validation)
        ]

    def settings(self, page: Mapping[str, Any], validation: Sequence[Tensor]) -> Iterator[tuple[str, Any, dict]]:
        """Yield label, target and what is written beside the row of the best settings of a method."""
        if not page.get("tune"):
            yield page["label"], page["target"], {}
            return
        candidates = list(combinations(page["target"], page["tune"]))
        by = ["psnr_mean", *(self.lpips if fitting_scores(self.lpips, 1, validation[0].shape[1:]) else [])]
        samples = self.config.tune_samples
        work = len(candidates) * sum(len(x0) for x0 in validation) * samples
        with tqdm(total=work, desc=f"{page['label']}: searching its best setting", unit="sample") as bar:
            best = best_settings(candidates, self.build, self.problem, validation, by, samples, bar.update)
        for key, target in best.items():
            words = column_of(key).heading.split(" of ")[0]
            yield f"{page['label']}, best {words}", target, {"setting": difference(target, candidates)}

    def build(self, target: Mapping[str, Any]) -> Sampler:
        """Return the sampler of a page of conf/method."""
        return build_sampler(target, self.prior, self.device)

    def row(self, name: str, sampler: Sampler, test: Sequence[Tensor]) -> dict[str, Any]:
        """Return the row of a sampler on the test images."""
        count = self.config.num_samples if sampler.draws else 1
        scores = self.scores(count, test[0].shape[1:])
        measurement = Measurement(sampler, self.problem, scores, count, self.device)
        for x0 in tqdm(test, desc=name, unit="batch"):
            measurement.add(x0)
        return {"method": name, "nfe": measurement.nfe} | measurement.means()

    def shown_test_images(self, data: ImageDataModule, folder: Path) -> list[Section]:
        """Return the sections of the report: evenly spaced test images, and one larger image."""
        images = data.evaluation_set("test")
        picked = evenly_spaced(len(images), self.config.show)
        shown = [self.case(images.names[i], images[i].unsqueeze(0), i) for i in picked]
        entries = [self.sample(case, self.place(folder, case.name)) for case in tqdm(shown, desc="pictures")]
        sections = [Section("Test images", "Evenly spaced over the test images.", entries)] if entries else []
        if self.config.crop is not None:
            sections.append(self.larger_image(folder))
        return sections

    def larger_image(self, folder: Path) -> Section:
        """Sample for one test image of side ``crop``, larger than what the model was trained on."""
        settings = resolved(self.config.data) | {"tile_size": self.config.crop, "test_limit": 1}
        images = build(settings, "data", ImageDataModule).evaluation_set("test")
        case = self.case(f"{images.names[0]}-{self.config.crop}", images[0].unsqueeze(0), 0)
        text = "The network was trained on small crops and is used at this size without change."
        title = f"A larger picture: {self.config.crop}x{self.config.crop}"
        return Section(title, text, [self.sample(case, self.place(folder, case.name))])

    # --- one observation -----------------------------------------------------------------------------------------

    def case(self, name: str, image: Tensor, index: int, pixels: PixelFormat | None = None) -> Case:
        """Observe a clean image [1, C, H, W], as scoring does."""
        x0 = image.to(self.device)
        return Case(name, self.problem.observe(x0, index), x0, pixels)

    def place(self, folder: Path, name: str) -> Path:
        """Return the folder of the results of an image, by its name."""
        return inside(folder, name, "the name of an image")

    @torch.no_grad()
    def sample(self, case: Case, folder: Path) -> Entry:
        """Draw samples for one observation, write its pictures into ``folder`` and return its part of the report."""
        observation, x0, count = case.observation, case.x0, self.config.num_samples
        y, physics = observation.y, observation.physics
        generator = torch.Generator(y.device).manual_seed(self.config.seed)
        try:
            samples = self.sampler(y, physics, observation.sigma_y, count, generator=generator)
        except (ValueError, FloatingPointError) as error:
            raise ValueError(f"{case.name}: {error}") from error
        draws = Draws(samples.mean(1) if x0 is None else x0, observation, self.problem.true_noise, samples)
        numbers: dict[str, float] = {}
        for score in self.scores(count, observation.image_shape, x0 is not None):
            score.to(y.device).add(draws)
            numbers |= {key: v for key, v in without_bounds(score.numbers()).items() if isinstance(v, float)}
        if x0 is None:
            numbers["sigma_y"] = float(observation.sigma_y)
        note = misfit(physics, numbers["residual"])
        if note:
            tqdm.write(f"{case.name}: {note}")
        mask = measured(physics, y)
        holes = None if bool((mask == 1).all()) else mask.expand_as(y)[0].amax(0) > 0
        mean, std = samples[0].mean(0), samples[0].std(0) if count > 1 else None
        reference = None if x0 is None else x0[0]
        entry = Entry(case.name, reference, y[0], samples[0], mean, std, numbers, note, holes)
        write_pictures(folder, entry, case.pixels)
        return entry


def given_noise_level(config: DictConfig, default: float) -> float:
    """Return the noise level of ``sigma_y=...``, or the default.

    Raises:
        ValueError: for something else than a positive number, and for ``auto`` where there is nothing to estimate.
    """
    if config.sigma_y == AUTO and not (config.input is not None and config.degraded):
        raise ValueError(f"sigma_y={AUTO} estimates the noise of your own observation: give input=... degraded=true")
    sigma_y = default if config.sigma_y in (None, AUTO) else config.sigma_y
    if not isinstance(sigma_y, int | float) or not sigma_y > 0:
        raise ValueError(f"sigma_y must be a positive noise level, images lie in [0, 1], or {AUTO}; got {sigma_y}")
    return sigma_y


def given_operator(config: DictConfig) -> DictConfig | None:
    """Return the page of ``physics=...``, if given, with all values filled in.

    A missing one is noticed here under the name that a user sets it by.
    """
    if config.get("physics") is None:
        return None
    return resolve(config.physics)


def trained_operator(description: Mapping[str, Any]) -> OperatorFamily:
    """Return the operator family that a model was trained for, from its export: ``{"class": ..., **options}``.

    An export may not be trusted, so only families of operators are made; others come from ``physics=``.

    Raises:
        ValueError: when the description names no such family of this package.
    """
    try:
        made: OperatorFamily = build(_with_targets(description), "operator", OperatorFamily, OperatorFamily)
    except ValueError as error:
        reason = f"the operator that the model names cannot be made ({error})"
        raise ValueError(f"{reason}; choose one: physics=...") from error
    return made


def _with_targets(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_targets(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    return {TARGET if key == "class" else key: _with_targets(part) for key, part in value.items()}


if __name__ == "__main__":
    raise SystemExit("error: run `ud2m sample` or `python -m ud2m sample`")
