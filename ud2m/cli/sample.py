"""Draw samples, write pictures, numbers and the report: what ``sample.py`` runs."""

import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from ud2m.bars import Advance, Forecast, NetworkEvaluations, progress_bar
from ud2m.cli import plain
from ud2m.cli.devices import Devices
from ud2m.cli.errors import user_facing
from ud2m.cli.methods import build_sampler, combinations
from ud2m.cli.objects import TARGET, build, in_words, resolved
from ud2m.cli.train import quiet_libraries, resolve
from ud2m.data import ImageDataModule
from ud2m.data.module import evenly_spaced
from ud2m.evaluation.comparison import best_label, best_settings, difference
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import Draws, Score, build_score, distance_score, fitting_scores, left_out, lpips_metric
from ud2m.evaluation.table import without_bounds
from ud2m.evaluation.team import ALONE, Team
from ud2m.files import SETTINGS, UNFINISHED, check_free, inside, parse_json, read_tensors, resumable_folder, write_json
from ud2m.images import (
    PixelFormat,
    image_files,
    list_images,
    noise_factor,
    pixel_format,
    read_image,
    with_channels,
)
from ud2m.listing import listed, none_left
from ud2m.losses import FeatureDistance
from ud2m.names import unknown
from ud2m.physics import Observation, OperatorFamily, Problem, estimate_sigma_y, measured, misfit
from ud2m.priors.prior import Prior
from ud2m.reports.page import write_page
from ud2m.reports.samples import Entry, Report, Section, samples_page, write_pictures
from ud2m.reports.text_tables import format_table
from ud2m.samplers.base import Sampler
from ud2m.samplers.ud2m import PosteriorSampler

AUTO = "auto"
OPTIONS = ("num_steps", "grid_power", "eta", "symmetries", "step_scale", "chunk_size", "tile", "precision")
"""Keys that are options of the sampler."""
METRICS = ("psnr", "ssim")
"""Besides LPIPS, the distance of the prior's features and the residual."""

REPORT, METRICS_FILE, NUMBERS_FILE = "report.html", "metrics.json", "numbers.json"
ENTRY, ROWS = ".entry.pt", ".rows"
"""What lies in the folder until the job is done: the shown pictures without rounding, and finished rows."""
TAKEN = (REPORT, METRICS_FILE, SETTINGS)
"""Names in the output folder that no picture's results may have."""
NOT_RECORDED = ("output", "overwrite", "devices", "num_nodes")
"""Keys that results do not depend on."""
UNTOLD = ("images", "samples", "peak_memory")
"""Numbers of a measurement that its row in this report does not have."""
MANY = 20
"""Pictures from which a bar shows how far their check is."""

Numbers = dict[str, Any]
Rows = list[Numbers]


@user_facing
def main(config: DictConfig, kind: "type[SamplingRun] | None" = None) -> None:
    """Run one sampling job, with a model unless another kind is given.

    It goes into the folder ``output``, which appears when everything is written.
    """
    quiet_libraries()
    output, devices = Path(config.output), Devices(config)
    if devices.first:
        check_free(output.resolve(), config.overwrite)
    job = (kind or SamplingRun)(config, devices.device)
    if devices.first:
        job.check()
    try:
        target = resumable_folder(output, job.recorded, config.overwrite) if devices.first else nullcontext()
        with target as folder, devices.team() as team:
            rows = job.run(team.gathered(folder)[0], team)
    except BaseException:
        left = output.with_name(output.name + UNFINISHED)
        if devices.first and left.is_dir():
            print(f"what is done is in {left}; the same command with output={output} goes on", file=sys.stderr)
        raise
    if devices.first:
        print(format_table(rows))
        if job.broken:
            print(listed(list(job.broken.values())))
        for reason in [] if config.degraded else left_out(job.lpips):
            print(reason)
        print(f"report: {output / REPORT}")


@dataclass(frozen=True, eq=False)
class Case:
    """One observation to draw samples for.

    Attributes:
        name: of its results.
        observation: of one image.
        x0: the clean image [1, C, H, W] if known.
        pixels: of the file that it comes from, and of those that are made of it.
        remark: what is said when its turn comes.
    """

    name: str
    observation: Observation
    x0: Tensor | None = None
    pixels: PixelFormat | None = None
    remark: str = ""


@dataclass(frozen=True, eq=False)
class Group:
    """Observations that a section of the report is about; each is made when its turn comes.

    Attributes:
        title: of the section.
        text: below it.
        names: of their results.
        case: makes one, by its number.
        shown: how many of the first ones the report holds; it links the others.
        files: that they are made of, if they are.
        scored: their numbers among the test images, if they are of those that all methods are scored on.
    """

    title: str
    text: str
    names: Sequence[str]
    case: Callable[[int], Case]
    shown: int
    files: Sequence[Path] = ()
    scored: Sequence[int] = ()

    def without(self, left_out: Collection[int]) -> "Group":
        """Return the same group without some of its pictures, by their numbers."""
        kept = [k for k in range(len(self.names)) if k not in left_out]
        names, files = [self.names[k] for k in kept], [self.files[k] for k in kept]
        return replace(self, names=names, files=files, case=lambda k: self.case(kept[k]))

    @property
    def alone(self) -> bool:
        """Whether there is one file, whose results need no folder of its name."""
        return len(self.files) == 1

    def stamp(self, number: int) -> list[int] | None:
        """Return what changes when the file of a picture does, if it has one."""
        if not self.files:
            return None
        status = self.files[number].stat()
        return [status.st_size, status.st_mtime_ns]


class SamplingRun:
    """The objects of one sampling job.

    Args:
        config: of conf/sample.yaml.
        device: of this process.

    Raises:
        ValueError: for settings that do not fit together.
        FileNotFoundError: for missing models.
    """

    sampler: Any
    prior: Any
    """Both of the kind of run."""

    def __init__(self, config: DictConfig, device: torch.device):
        self.config, self.device = config, device
        options = {key: config[key] for key in OPTIONS}
        self.sampler = PosteriorSampler.from_pretrained(config.model, config.prior, self.device, **options)
        trained, chosen = self.sampler.config.info.get("physics", {}), given_operator(config)
        changed: Numbers = {}
        if chosen is not None and TARGET not in (chosen.get("operator") or {}):
            trained, chosen = changed_operator(trained, chosen), None
            changed["physics"] = trained
        self.described = chosen.operator if chosen else trained.get("operator", {})
        self.operator: OperatorFamily = (
            build(chosen.operator, "physics.operator", OperatorFamily)
            if chosen
            else trained_operator(trained.get("operator", {}), bool(config.degraded), bool(changed))
        )
        default = chosen.sigma_y if chosen else trained.get("sigma_y", self.sampler.config.sigma_y)
        noise = chosen.get("noise") if chosen else trained.get("noise")
        self.problem = Problem(self.operator, given_noise_level(config, default), config.seed, noise)
        self.lpips = [] if config.lpips is None else [lpips_metric(config.lpips)]
        self.prior = Prior.from_pretrained(config.prior or str(self.sampler.prior.reference)).to(self.device)
        if config.compile is not None:
            self.sampler.compile(config.compile)
            self.prior.compile_network(config.compile)
        self.plan({**changed, "trained": vars(self.sampler.config), "model": self.sampler.fingerprint})

    def plan(self, about: Numbers) -> None:
        """Say what is to be sampled, and keep the settings, with what is known about the weights."""
        config = self.config
        config_given = {key: value for key, value in plain(config).items() if key not in NOT_RECORDED}
        self.recorded = config_given | about
        self.data: ImageDataModule | None = None if config.input is not None else self.test_data()
        self.broken: dict[int, str] = {}
        compared = plain(config)["methods"].values() if config.compare and self.data is None else ()
        self.rivals: dict[str, Sampler] = {page["label"]: self.build(page["target"]) for page in compared}
        self.groups = [self.own_files()] if self.data is None else list(self.shown_test_images(self.data))

    @property
    def name(self) -> str:
        """What the sampler is called in tables."""
        return f"UD2M (K={self.sampler.network.num_blocks}, N={self.sampler.config.num_steps})"

    def check(self) -> None:
        """Make every observation, and everything that follows its sampling once with blank samples of each shape.

        Raises:
            ValueError: for whatever would otherwise end the job after its sampling has begun.
        """
        names = [name for group in self.groups if not group.alone for name in group.names]
        twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if twice:
            shared = ", ".join(sorted(twice))
            raise ValueError(f"two pictures share a name ({shared}); rename one, since results are named after them")
        for name in names:
            if self.place(Path(), name).parts[0] in TAKEN:
                raise ValueError(f"the results of {name} would take the place of {name} itself; rename that picture")
        rehearsed = set[Any]()
        for group in self.groups:
            for number in progress_bar(range(len(group.names)), desc="checking", disable=len(group.names) < MANY):
                try:
                    case = group.case(number)
                    shapes = (tuple(case.observation.y.shape), case.observation.image_shape)
                    if shapes not in rehearsed:
                        self.rehearse(case)
                        rehearsed.add(shapes)
                except ValueError as error:
                    if not (self.config.skip_broken and group.files):
                        raise
                    self.broken[number] = str(error)
            if group.files and len(self.broken) == len(group.files):
                raise ValueError(none_left(list(self.broken.values())))

    def rehearse(self, case: Case) -> None:
        """Do what follows the sampling of an observation, with blank samples."""
        try:
            for sampler in (*self.rivals.values(), self.sampler):
                sampler.check_call(case.observation, self.count(sampler))
            blank = case.observation.y.new_zeros(1, min(self.config.num_samples, 2), *case.observation.image_shape)
            entry = self.entry(case, blank)
            with TemporaryDirectory() as folder:
                self.write(Path(folder), case, blank, entry)
            samples_page(Report("", "", [], {}, [Section("", "", [entry])]))
        except (ValueError, FloatingPointError) as error:
            raise ValueError(f"{case.name}: {error}") from error

    def run(self, folder: Path, team: Team = ALONE) -> Rows:
        """Fill the output folder and return the rows of ``metrics.json``; what lies in it already is not done again.

        Each process of a team does its share, and the first one what belongs to all; the others return no rows.
        """
        rows = [] if self.data is None else self.rows(self.data, folder / ROWS, team)
        broken = team.gathered(self.broken)[0]  # the first process alone has checked them
        groups = [group.without(broken) if group.files else group for group in self.groups]
        for group in groups:
            self.draw(group, folder, team)
        team.gathered("all pictures are written")
        if team.rank > 0:
            return []
        parts = [self.section(group, folder) for group in groups]
        if self.data is None:
            rows = self.own_rows(parts[0][1])
        sections = [section for section, _ in parts] + self.further_sections(folder)
        report = Report(*self.headline(), rows, self.recorded, sections)
        write_page(folder / REPORT, samples_page(report))
        write_json(folder / METRICS_FILE, rows)
        shutil.rmtree(folder / ROWS, ignore_errors=True)
        for entry in folder.rglob(ENTRY):
            entry.unlink()
        return rows

    def further_sections(self, folder: Path) -> list[Section]:
        """Return what the report shows after the pictures."""
        return []

    @property
    def measurement(self) -> str:
        """Operator and noise level in words."""
        noise = "estimated" if self.config.sigma_y == AUTO else f"= {self.problem.sigma_y:g}"
        return f"operator {in_words(resolved(self.described))}, sigma_y {noise} for images in [0, 1]"

    def headline(self) -> tuple[str, str]:
        """Return title and summary of the report."""
        return (
            f"UD2M posterior samples: {self.config.model}",
            f"{self.config.num_samples} samples per observation, {self.sampler.nfe()} network evaluations each "
            f"(K = {self.sampler.network.num_blocks} modules, N = {self.sampler.config.num_steps} steps); "
            f"{self.measurement}. Bright places of the standard deviation are those that the observation does not "
            "determine.",
        )

    def count(self, sampler: Sampler) -> int:
        """Return how many samples a sampler draws for an observation: one where they do not differ."""
        return int(self.config.num_samples) if sampler.draws else 1

    def scores(self, num_samples: int, shape: Sequence[int], known: bool = True) -> list[Score]:
        """Return fresh scores for images (C, H, W): the residual always, the others where the images are known."""
        residual = build_score("residual")
        if not known:
            return [residual]
        features = distance_score("prior_features", FeatureDistance(self.prior.features))
        return [*fitting_scores([*METRICS, *self.lpips, "r"], num_samples, shape), features, residual]

    # --- the user's files ----------------------------------------------------------------------------------------

    def own_files(self) -> Group:
        """Return what the files of ``input`` ask for."""
        files = list_images(self.config.input)
        if (folder := Path(self.config.input).expanduser()).is_dir():
            tqdm.write(str(image_files(folder, below=False)))
        names = [path.stem for path in files]
        return Group("Images", "", names, lambda k: self.file_case(files[k], k), self.config.show, files)

    def file_case(self, path: Path, index: int) -> Case:
        """Return what one input file asks for."""
        try:
            if self.config.degraded:
                return Case(path.stem, self.observed(path), None, pixel_format(path))
            image = self.picture(path, self.prior.channels)
            x0 = self.fitting(image)
            cut = "" if x0.shape == image.shape else f"cut to {x0.shape[2]}x{x0.shape[3]}, what the operator can take"
            return replace(self.case(path.stem, x0, index, pixel_format(path)), remark=cut)
        except ValueError as error:
            named = str(path) in str(error)  # as readers do, and operators do not
            raise ValueError(str(error) if named else f"{path}: {error}") from error

    @property
    def multiple(self) -> int:
        """Of which the sides of what is degraded are multiples."""
        return self.operator.multiple

    def fitting(self, image: Tensor) -> Tensor:
        """Return a picture or clip without the last rows and columns that cannot be taken."""
        height, width = (side - side % self.multiple for side in image.shape[-2:])
        return image[..., :height, :width] if min(height, width) > 0 else image

    def observed(self, path: Path) -> Observation:
        """Return an observation of one image that was made elsewhere."""
        known, level = self.operator.read_observation(path, self.prior.channels, self.device), self.problem.sigma_y
        if known is None:
            picture, channels = read_image(path, channels=None), self.operator.y_channels(self.prior.channels)
            y = with_channels(picture, channels).unsqueeze(0).to(self.device)
            known, level = (y, self.known_operator(y)), level * noise_factor(picture, channels)
        y, physics = known
        return Observation.of(y, physics, estimate_sigma_y(physics, y) if self.config.sigma_y == AUTO else level)

    def picture(self, path: Path, channels: int) -> Tensor:
        """Return a file as an image [1, channels, H, W]."""
        return read_image(path, channels=channels).unsqueeze(0).to(self.device)

    def known_operator(self, y: Tensor) -> Any:
        """Return the operator of an observation y [1, ...] that was made elsewhere."""
        if self.operator.random:
            raise ValueError(
                f"{type(self.operator).__name__} draws another operator each time and cannot explain an input that is "
                "degraded already; give the one it was made with, e.g. physics=mask physics.mask=mask.png"
            )
        y_shape: Any = tuple(y.shape[1:])
        shape: Any = self.operator.image_shape(y_shape)
        return self.operator.draw(1, shape, device=y.device)

    def own_rows(self, records: Sequence[Numbers]) -> Rows:
        """Return the rows of the files' samples, from the records of all files."""
        rivals = [{"method": name} | averages([record["rivals"][name] for record in records]) for name in self.rivals]
        own = averages([record["numbers"] for record in records])
        return [*rivals, {"method": self.name, "nfe": self.sampler.nfe()} | own]

    @torch.no_grad()
    def rival_samples(self, sampler: Sampler, case: Case, bar: tqdm) -> tuple[Tensor, Numbers]:
        """Return a rival's samples [1, S, C, H, W] for an observation, with their scores."""
        observation, count = case.observation, self.count(sampler)

        def advance(evaluations: int) -> None:
            bar.total += evaluations  # they are not known before
            bar.update(evaluations)

        generator = torch.Generator(observation.y.device).manual_seed(self.config.seed)
        with NetworkEvaluations(sampler.networks, advance) as counter:
            samples = sampler.sample(observation, count, generator)
        return samples, {"nfe": counter.count / count} | self.numbers(case, samples)

    # --- test images ---------------------------------------------------------------------------------------------

    def test_data(self) -> ImageDataModule:
        """Return the data set whose test images are scored and shown."""
        data: ImageDataModule = build(self.config.data, "data", ImageDataModule)
        if data.channels != self.prior.channels:
            raise ValueError(f"data has {data.channels} channels, the prior {self.prior.channels}; choose other data")
        return data

    def rows(self, data: ImageDataModule, folder: Path, team: Team) -> Rows:
        """Score all test images (with the other methods if asked); finished rows are kept in ``folder``."""
        test = [x0.to(self.device) for x0 in data.test_dataloader()]
        own = {"ud2m": lambda: [self.row(self.name, self.sampler, test, team)[0]]}
        jobs = own if not self.config.compare else self.others(data, test, folder, team) | own
        return [row for name, job in jobs.items() for row in kept(folder / f"{name}.json", job, team)]

    def others(
        self, data: ImageDataModule, test: Sequence[Tensor], folder: Path, team: Team
    ) -> dict[str, Callable[[], Rows]]:
        """Return what makes the rows of each of ``methods``, one for each number by which its setting is chosen.

        Its samples of the shown test images go into ``folder``.
        """
        validation = [x0.to(self.device) for x0 in data.val_dataloader()]

        def rows(name: str, page: Mapping[str, Any]) -> Rows:
            found, made = [], {}
            for label, target, extra in self.settings(page, validation, team):
                sampler = self.build(target)
                row, pictures = self.row(label, sampler, test, team)
                found.append(row | extra)
                if team.rank == 0:
                    made[label] = self.shown_samples(sampler, pictures)
            if team.rank == 0:
                folder.mkdir(exist_ok=True)
                torch.save(made, folder / f"{name}.pt")
            return found

        return {name: partial(rows, name, page) for name, page in plain(self.config)["methods"].items()}

    @torch.no_grad()
    def shown_samples(self, sampler: Sampler, measured: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return a sample of a method for each shown picture by its name: that of its measurement, or drawn for it."""
        made: dict[str, Tensor] = {}
        for group in self.groups:
            if group.scored:
                made |= {name: measured[k]["sample"] for name, k in zip(group.names, group.scored, strict=True)}
                continue
            for number, name in enumerate(group.names):
                observation = group.case(number).observation
                generator = torch.Generator(observation.y.device).manual_seed(self.config.seed)
                made[name] = sampler.sample(observation, 1, generator)[0, 0].cpu()
        return made

    def rival_pictures(self, folder: Path) -> dict[str, Mapping[str, Tensor]]:
        """Return what the other methods have made of the shown test images, by method and name of the image."""
        files = [folder / ROWS / f"{name}.pt" for name in plain(self.config)["methods"]]
        return {label: made for file in files if file.is_file() for label, made in read_tensors(file).items()}

    def settings(
        self, page: Mapping[str, Any], validation: Sequence[Tensor], team: Team
    ) -> Iterator[tuple[str, Any, dict]]:
        """Yield label, target and what is written beside the row of the best settings of a method."""
        if not page.get("tune"):
            yield page["label"], page["target"], {}
            return
        candidates = list(combinations(page["target"], page["tune"]))
        by = ["psnr_mean", *(self.lpips if fitting_scores(self.lpips, 1, validation[0].shape[1:]) else [])]
        samples = self.config.tune_samples
        work = len(candidates) * sum(len(x0) for x0 in validation) * samples
        searching = f"{page['label']}: searching its best setting"
        with progress_bar(desc=searching, unit="evaluation", disable=team.rank > 0) as bar:
            told = Forecast(bar, work)
            best = best_settings(candidates, self.build, self.problem, validation, by, samples, told, team)
        for key, target in best.items():
            yield best_label(page["label"], key), target, {"setting": difference(target, candidates)}

    def build(self, target: Mapping[str, Any]) -> Sampler:
        """Return the sampler of a page of conf/method."""
        return build_sampler(target, self.prior, self.device, self.config.precision, self.config.compile)

    def row(
        self, name: str, sampler: Sampler, test: Sequence[Tensor], team: Team
    ) -> tuple[Numbers, Mapping[int, Mapping[str, Tensor]]]:
        """Return the row of a sampler on the test images, and its pictures of the shown ones."""
        count = self.count(sampler)
        scores, shown = self.scores(count, test[0].shape[1:]), [k for group in self.groups for k in group.scored]
        with progress_bar(desc=name, unit="evaluation", disable=team.rank > 0) as bar:
            told = Forecast(bar, count * sum(map(len, test)))
            result = measure(sampler, self.problem, test, scores, count, shown, told, self.device, team)
        numbers = {key: value for key, value in without_bounds(result.row).items() if key not in UNTOLD}
        return {"method": name} | numbers, result.pictures

    def shown_test_images(self, data: ImageDataModule) -> Iterator[Group]:
        """Yield evenly spaced test images, and one larger image."""
        images = data.evaluation_set("test")
        picked = evenly_spaced(len(images), self.config.show)
        if picked:
            yield Group(
                "Test images",
                "Evenly spaced over the test images.",
                [images.names[i] for i in picked],
                lambda k: self.case(images.names[picked[k]], images[picked[k]].unsqueeze(0), picked[k]),
                len(picked),
                scored=picked,
            )
        if self.config.crop is not None:
            yield self.larger_image(self.config.crop)

    def larger_image(self, side: int) -> Group:
        """Return one test image of side ``crop``, larger than what the model was trained on."""
        settings = resolved(self.config.data) | {"tile_size": side, "test_limit": 1}
        images = build(settings, "data", ImageDataModule).evaluation_set("test")
        name = f"{images.names[0]}-{side}"
        text = "The network was trained on small crops and is used at this size without change."
        title = f"A larger picture: {side}x{side}"
        return Group(title, text, [name], lambda k: self.case(name, images[0].unsqueeze(0), 0), 1)

    # --- one observation -----------------------------------------------------------------------------------------

    def case(self, name: str, image: Tensor, index: int, pixels: PixelFormat | None = None) -> Case:
        """Observe a clean image [1, C, H, W], as scoring does."""
        x0 = image.to(self.device)
        return Case(name, self.problem.observe(x0, index), x0, pixels)

    def place(self, folder: Path, name: str) -> Path:
        """Return the folder of the results of an image, by its name."""
        return inside(folder, name, "the name of an image")

    def places(self, group: Group, folder: Path) -> list[Path]:
        """Return the folders of the results of a group's pictures."""
        return [folder if group.alone else self.place(folder, name) for name in group.names]

    def draw(self, group: Group, folder: Path, team: Team) -> None:
        """Make this process's share of the results that are not there."""
        places = self.places(group, folder)
        missing = [k for k in range(len(places)) if self.known(group, k, places[k]) is None]
        own, expected = team.dealt(missing), self.config.num_samples * self.sampler.nfe()
        with progress_bar(total=expected * len(own), unit="evaluation", disable=team.rank > 0 or not missing) as bar:
            for k, number in enumerate(own, 1):
                bar.set_description(f"picture {k} of {len(own)}", refresh=False)
                bar.total -= expected
                self.results(group, number, places[number], bar)

    def section(self, group: Group, folder: Path) -> tuple[Section, list[Numbers]]:
        """Return a section of the report and the records of all its pictures."""
        places, quiet = self.places(group, folder), progress_bar(total=0, disable=True)
        records = [self.results(group, k, places[k], quiet) for k in range(len(places))]
        entries = [Entry(**read_tensors(place / ENTRY)) for place in places[: group.shown]]
        if self.data is not None:
            made = self.rival_pictures(folder)
            entries = [replace(e, rivals={label: of[e.name] for label, of in made.items()}) for e in entries]
        further = {group.names[k]: records[k]["numbers"] for k in range(group.shown, len(records))}
        return Section(group.title, group.text, entries, {} if group.alone else further), records

    def known(self, group: Group, number: int, place: Path) -> Numbers | None:
        """Return the record of an observation whose results are there already."""
        file = place / NUMBERS_FILE
        if not file.is_file():
            return None
        record = cast(Numbers, parse_json(file.read_text()))
        return record if record["file"] == group.stamp(number) else None

    def results(self, group: Group, number: int, place: Path, bar: tqdm) -> Numbers:
        """Sample for an observation, write its results, and return their record; that alone where it is there."""
        known = self.known(group, number, place)
        if known is not None:
            return known
        record, shown, state = place / NUMBERS_FILE, number < group.shown, group.stamp(number)
        case = group.case(number)
        samples = self.sample(case, bar)
        rivals = {name: self.rival_samples(sampler, case, bar) for name, sampler in self.rivals.items()}
        pictures = {name: drawn[0, 0] for name, (drawn, _) in rivals.items()}
        entry = replace(self.entry(case, samples), rivals=pictures)
        for note in filter(None, (case.remark, entry.note)):
            tqdm.write(f"{case.name}: {note}")
        self.write(place, case, samples, entry)
        if shown:
            torch.save(vars(entry), place / ENTRY)
        self.keep(case, place, entry)
        scores = {name: numbers for name, (_, numbers) in rivals.items()}
        write_json(record, {"numbers": entry.numbers, "rivals": scores, "note": entry.note, "file": state})
        return cast(Numbers, parse_json(record.read_text()))

    def write(self, place: Path, case: Case, samples: Tensor, entry: Entry) -> None:
        """Write the files of an observation whose samples [1, S, C, H, W] were just drawn."""
        write_pictures(place, entry, case.pixels)

    def keep(self, case: Case, place: Path, entry: Entry) -> None:
        """Write what else there is of an observation that was just sampled for; by default nothing."""

    def advance_of(self, bar: tqdm) -> Advance:
        """Return what is told of network evaluations when they are made: the bar."""
        return bar.update

    @torch.no_grad()
    def sample(self, case: Case, bar: tqdm) -> Tensor:
        """Draw samples [1, S, C, H, W] for one observation; the bar counts its network evaluations."""
        observation = case.observation
        bar.total += self.config.num_samples * (self.sampler.evaluations_of(observation) or self.sampler.nfe())
        bar.refresh()
        generator = torch.Generator(observation.y.device).manual_seed(self.config.seed)
        try:
            y, physics, sigma_y = observation.y, observation.physics, observation.sigma_y
            return self.sampler(y, physics, sigma_y, self.config.num_samples, generator, self.advance_of(bar))
        except (ValueError, FloatingPointError) as error:
            raise ValueError(f"{case.name}: {error}") from error

    def numbers(self, case: Case, samples: Tensor) -> Numbers:
        """Return the scores of samples [1, S, C, H, W] of an observation."""
        observation, x0 = case.observation, case.x0
        draws = Draws(samples.mean(1) if x0 is None else x0, observation, self.problem.true_noise, samples)
        told = {} if x0 is not None else {"sigma_y": float(observation.sigma_y)}
        return scored(self.scores(samples.shape[1], observation.image_shape, x0 is not None), draws) | told

    @torch.no_grad()
    def entry(self, case: Case, samples: Tensor) -> Entry:
        """Return the part of the report that samples of an observation have, with their scores."""
        y, physics, numbers = case.observation.y, case.observation.physics, self.numbers(case, samples)
        mask = measured(physics, y)
        holes = None if bool((mask == 1).all()) else mask.expand_as(y)[0].amax(0) > 0
        mean, std = samples[0].mean(0), samples[0].std(0) if samples.shape[1] > 1 else None
        reference, note = (None, misfit(physics, numbers["residual"])) if case.x0 is None else (case.x0[0], "")
        return Entry(case.name, reference, y[0], samples[0], mean, std, numbers, note, holes)


def scored(scores: Sequence[Score], draws: Draws) -> dict[str, Any]:
    """Return the numbers of fresh scores on one batch."""
    found: dict[str, Any] = {}
    for score in scores:
        score.to(draws.x0.device).add(draws)
        found |= {key: v for key, v in without_bounds(score.numbers()).items() if isinstance(v, float)}
    return found


def kept(path: Path, make: Callable[[], Rows], team: Team = ALONE) -> Rows:
    """Return the rows in a file, made by a team and written by its first process where it is not there."""
    if team.gathered(path.is_file())[0]:
        return cast(Rows, parse_json(path.read_text()))
    rows = make()
    if team.rank > 0:
        return rows
    path.parent.mkdir(exist_ok=True)
    write_json(path, rows)
    return cast(Rows, parse_json(path.read_text()))


def averages(numbers: Sequence[Numbers]) -> Numbers:
    """Return the mean of each number; None where a picture has none, as SSIM of a small one or PSNR of equal images."""
    columns: dict[str, list[Any]] = {
        key: [row.get(key) for row in numbers] for key in dict.fromkeys(key for row in numbers for key in row)
    }
    return {key: None if None in values else sum(values) / len(values) for key, values in columns.items()}


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


def changed_operator(trained: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Return the page of the model's own operator with ``physics.KEY=...`` that was given without ``physics=NAME``.

    Raises:
        ValueError: for a key that such a page does not have.
    """
    known = ("operator", "sigma_y", "noise")
    for key in changes:
        if key not in known:
            raise ValueError(
                f"{unknown('key in physics', key, known)}; choose the operator that has it with physics=NAME"
            )
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(trained, changes)))


def trained_operator(description: Mapping[str, Any], brought: bool = False, changed: bool = False) -> OperatorFamily:
    """Return the operator family that a model was trained for, from its export: ``{"class": ..., **options}``.

    Where observations are brought, it is that of a camera (``OperatorFamily.of_scene``). Where options were
    ``changed``, a fault is that of who changed them, not of the export.

    An export may not be trusted, so only families of operators are made; others come from ``physics=``.

    Raises:
        ValueError: when the description names no such family of this package.
    """
    try:
        made: OperatorFamily = build(_with_targets(description), "physics.operator", OperatorFamily, OperatorFamily)
    except ValueError as error:
        if changed:
            raise
        reason = f"the operator that the model names cannot be made ({error})"
        raise ValueError(f"{reason}; choose one: physics=...") from error
    return made.of_scene() if brought else made


def _with_targets(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_targets(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    return {TARGET if key == "class" else key: _with_targets(part) for key, part in value.items()}


if __name__ == "__main__":
    raise SystemExit("error: run `ud2m sample` or `python -m ud2m sample`")
