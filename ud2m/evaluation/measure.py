"""The one measurement: draw samples for images, with a clock and a count of evaluations, and score them."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ud2m.bars import Advance, Forecast, NetworkEvaluations, progress_bar
from ud2m.evaluation.cells import Result
from ud2m.evaluation.scores import Draws, Score
from ud2m.evaluation.table import without_bounds
from ud2m.evaluation.team import ALONE, Team
from ud2m.evaluation.usage import Stopwatch, peak_memory, reset_peak_memory
from ud2m.physics import Problem
from ud2m.samplers.base import Sampler


def _nothing(*told: Any) -> None:
    pass


class Measurement:
    """Scores of one sampler on one problem, gathered batch by batch.

    Args:
        sampler: draws samples.
        problem: how clean images are observed.
        scores: fresh ones.
        num_samples: S, per observation.
        device: where the images are, and what the clock waits for.
        advance: is told of each network evaluation.
    """

    def __init__(
        self,
        sampler: Sampler,
        problem: Problem,
        scores: Sequence[Score],
        num_samples: int,
        device: torch.device | str = "cpu",
        advance: Advance = lambda count: None,
    ):
        self.advance = advance
        self.sampler, self.problem, self.num_samples = sampler, problem, num_samples
        self.scores = [score.to(device) for score in scores]
        self.count, self.evaluations, self.watch = 0, 0, Stopwatch(device)
        self.peaks: tuple[float | None, ...] = ()
        reset_peak_memory(device)

    @torch.no_grad()
    def add(self, x0: Tensor, first: int | None = None) -> Draws:
        """Observe clean images x0 [B, C, H, W], draw samples and score them; return all of it.

        ``first`` is the number of the first of them; default: as many as there were before.
        """
        first = self.count if first is None else first
        observation = self.problem.observe(x0, first)
        generator = self.problem.sampling_generator(first, x0.device)
        with NetworkEvaluations(self.sampler.networks, self.advance) as counter, self.watch:
            samples = self.sampler(
                observation.y, observation.physics, observation.sigma_y, self.num_samples, generator=generator
            )
        self.count += len(x0)
        # of a clip the sampler's count: one evaluation on all frames, whatever windows and chunks they went through
        passes = self.sampler.nfe() if observation.is_video else None
        self.evaluations += counter.count if passes is None else passes * len(x0) * self.num_samples
        draws = Draws(x0, observation, self.problem.true_noise, samples)
        for score in self.scores:
            score.add(draws)
        return draws

    def add_all(
        self, batches: Iterable[Tensor], team: Team = ALONE, each: Callable[[int, Tensor, Draws | None], Any] = _nothing
    ) -> None:
        """Add all batches of a new measurement, of which each process of a team draws its share.

        Args:
            batches: clean images [B, C, H, W], the same ones in every process.
            team: the processes; each knows all scores in the end.
            each: is told of every batch: number of its first image, images, and what was drawn, if here.
        """
        first = 0
        for number, x0 in enumerate(batches):
            draws = self.add(x0, first) if number % team.size == team.rank else None
            each(first, x0, draws)
            first += len(x0)
        own = self.count, self.evaluations, self.watch.seconds, peak_memory(self.watch.device)
        counts, evaluations, seconds, self.peaks = zip(*team.gathered(own), strict=True)
        self.count, self.evaluations, self.watch.seconds = sum(counts), sum(evaluations), sum(seconds)
        for score in self.scores:
            parts = team.gathered(score.gathered)
            score.gathered = {name: team.in_order([part.get(name, []) for part in parts]) for name in parts[0]}

    def row(self) -> dict[str, Any]:
        """Return the scores' numbers, with ``images``, ``samples``, ``nfe``, ``seconds_per_image`` and ``peak_memory``.

        ``nfe`` and seconds are those of one sample of one image. Where every value of a score is infinite, as the PSNR
        of equal images, its bounds are None.

        Raises:
            ValueError: when there were no images.
        """
        if not self.count:
            raise ValueError("there are no images to evaluate")
        counts = {"images": self.count, "samples": self.num_samples, "nfe": self.nfe}
        peaks = [peak for peak in (*self.peaks, peak_memory(self.watch.device)) if peak is not None]
        return {**counts, **self._numbers(), "peak_memory": max(peaks, default=None)}

    def means(self) -> dict[str, Any]:
        """Return the scores' numbers without intervals, and ``seconds_per_image``."""
        return without_bounds(self._numbers())

    @property
    def nfe(self) -> float | int:
        """Network evaluations of one sample."""
        nfe = self.evaluations / (self.count * self.num_samples)
        return int(nfe) if nfe == int(nfe) else nfe

    def _numbers(self) -> dict[str, Any]:
        numbers = {key: value for score in self.scores for key, value in score.numbers().items()}
        return numbers | {"seconds_per_image": self.watch.seconds / (self.count * self.num_samples)}

    def curves(self) -> dict[str, Any]:
        """Return what is more than one number."""
        return {name: curve for score in self.scores for name, curve in score.curves().items()}


def measure(
    sampler: Sampler,
    problem: Problem,
    batches: Iterable[Tensor],
    scores: Sequence[Score],
    num_samples: int,
    shown: Collection[int] = (),
    forecast: Forecast | None = None,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
) -> Result:
    """Draw samples for all images and score them.

    Args:
        sampler: see ``Measurement``.
        problem: see ``Measurement``.
        batches: clean images [B, C, H, W], in the order of their numbers.
        scores: fresh ones.
        num_samples: S, per observation.
        shown: numbers of the images whose pictures are kept.
        forecast: is told of network evaluations and samples.
        device: where the images are.
        team: processes that share the batches; each returns the result of all.
    """
    forecast = forecast or Forecast(progress_bar(disable=True), 0)
    measurement = Measurement(sampler, problem, scores, num_samples, device, forecast.bar.update)
    pictures: dict[int, dict[str, Tensor]] = {}

    def show(first: int, x0: Tensor, draws: Draws | None) -> None:
        forecast.drawn(len(x0) * num_samples)
        if draws is None:
            return
        for i in set(shown) & set(range(first, first + len(x0))):
            samples = draws.samples
            parts = {"x0": x0, "y": draws.observation.y, "sample": samples[:, 0], "mean": samples.mean(1)}
            parts |= {"std": samples.std(1)} if num_samples > 1 else {}
            pictures[i] = {name: images[i - first].cpu() for name, images in parts.items()}

    measurement.add_all(batches, team, show)
    of_all = {i: picture for part in team.gathered(pictures) for i, picture in part.items()}
    return Result(measurement.row(), measurement.curves(), dict(sorted(of_all.items())))
