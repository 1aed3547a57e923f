"""Train and judge samplers where the posterior is known: a Gaussian mixture fitted to patches of the photographs.

    python benchmarks/exact_posteriors.py fit
    python benchmarks/exact_posteriors.py table [--blocks 1 2 4 8] [--steps 1 2 4 8 16] [--loss energy=1 ...]
    python benchmarks/exact_posteriors.py losses
    python benchmarks/exact_posteriors.py sampling

``fit`` stores the mixture (``table`` does it where it is missing). ``table`` trains UD2M for every K of ``--blocks``
and samples with every N of ``--steps``, beside LATINO, DDRM, DiffPIR, DPS and a long Langevin run with the same exact
denoiser. ``losses`` trains one K with one loss after the other, ``sampling`` tries every eta and grid on one trained
network. Rows: the 2-Wasserstein distance to exact posterior draws beside the floor (two independent sets of exact
draws), the same without the bias of finite sets, and the coverage of 90 % intervals. Everything is kept in
``results/exact`` and measured once; docs/evaluation.md says more.
"""

import argparse
import itertools
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from results import store
from ud2m.bars import NetworkEvaluations
from ud2m.data.photos import load_photos
from ud2m.evaluation.calibration import signed_root, wasserstein2
from ud2m.evaluation.cells import CellStore, Result, digest
from ud2m.evaluation.scores import with_interval
from ud2m.evaluation.table import markdown_line
from ud2m.files import write_bytes, write_json
from ud2m.images import LUMINANCE
from ud2m.losses.adversarial import REFERENCE_SIDE, Adversarial, Discriminator, DiscriminatorLoss
from ud2m.losses.generator import GeneratorLoss
from ud2m.losses.terms import L2, EnergyScore, MeanL2, Prediction
from ud2m.physics import GaussianBlur, Inpainting, Observation, OperatorFamily, SuperResolution, observe
from ud2m.priors.gaussian_mixture import AdaptedMixture, GaussianMixture
from ud2m.priors.schedule import VPSchedule
from ud2m.priors.store import weights_fingerprint
from ud2m.random import rand, randn_like
from ud2m.samplers.base import Sampler
from ud2m.samplers.deepinv import DDPM_TABLE, Ddrm, DiffPir, Dps, Langevin
from ud2m.samplers.latino import Latino, LatinoSetting
from ud2m.training.levels import Levels
from ud2m.training.schedules import warmup_cosine
from ud2m.unfolded.ddim import sample_posterior
from ud2m.unfolded.network import UnfoldedNetwork, build_network
from ud2m.unfolded.warm_start import start_from_y

REPOSITORY = Path(__file__).resolve().parents[1]
OPERATORS: dict[str, OperatorFamily] = {
    "blur": GaussianBlur(0.8),
    "super_resolution": SuperResolution(2, "box"),
    "inpainting": Inpainting(0.7),
}
LOSSES = ("energy", "l2", "mean_l2", "adversarial")
STUDY = ("energy=1", "l2=1", "l2=1 adversarial=0.05", "energy=1 adversarial=0.05", "energy=1 mean_l2=1")
ETAS = ("0", "0.5", "1", "fresh")
GRID_POWERS = (1.0, 2.0, 3.0, 5.0)
NETWORK = {
    "rule": {"name": "annealed", "tau_max": 0.4, "floor": 3.0, "width": 1.0, "closing": 0.3},
    "warm_start": {"name": "smoothing", "scales": [4, 2], "deviation": 0.1},
}
LEVEL = 0.9


# --- the prior -------------------------------------------------------------------------------------------------------


def patches(side: int, count: int, seed: int = 0) -> Tensor:
    """Return grey patches [count, 1, side, side] at random places of the training photographs, at half their size."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(LUMINANCE).view(3, 1, 1)
    images = [(weights * image.float() / 255).sum(0) for image in load_photos("train").values()]
    images = [nn.functional.avg_pool2d(image[None], 2)[0] for image in images]
    drawn = []
    for k in range(count):
        image = images[k % len(images)]
        top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in image.shape)
        drawn.append(image[top : top + side, left : left + side])
    return torch.stack(drawn).unsqueeze(1)


def fitted(folder: Path, side: int, components: int, count: int) -> GaussianMixture:
    """Return the mixture of so many components, fitted to ``count`` patches unless it is stored already."""
    path = folder / f"mixture_{side}_{components}_{count}.safetensors"
    if not path.is_file():
        print(f"fitting {components} components to {count} patches of {side}x{side}", flush=True)
        GaussianMixture.fit(patches(side, count), components).save(path)
    return GaussianMixture.load(path)


# --- training --------------------------------------------------------------------------------------------------------


def read_loss(text: str) -> dict[str, float]:
    """Return the weights of ``energy=1 l2=0.5``; raises ValueError for unknown terms."""
    weights = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in LOSSES:
            raise ValueError(f"unknown loss term {name!r}; known: {', '.join(LOSSES)}, e.g. 'energy=1 l2=0.5'")
        weights[name] = float(value)
    return weights


def build_loss(weights: Mapping[str, float], side: int) -> GeneratorLoss:
    """Return the generator's loss; patches of the energy score are whole images."""
    makers: dict[str, Any] = {
        "energy": partial(EnergyScore, side),
        "l2": L2,
        "mean_l2": MeanL2,
        "adversarial": lambda: Adversarial(Discriminator(channels=1, widths=[16, 32])),
    }
    terms: dict[str, tuple[float, Any]] = {name: (weight, makers[name]) for name, weight in weights.items()}
    return GeneratorLoss(terms)


def new_network(mixture: GaussianMixture, blocks: int) -> UnfoldedNetwork:
    """Return K modules around the exact denoiser and a correction that is 0 at first."""
    torch.manual_seed(0)
    return build_network(AdaptedMixture(mixture), {"num_blocks": blocks} | NETWORK)


def train(
    mixture: GaussianMixture,
    operator: OperatorFamily,
    sigma_y: float,
    blocks: int,
    weights: Mapping[str, float],
    iterations: int,
    batch: int = 64,
) -> UnfoldedNetwork:
    """Return a network distilled on exact draws of the mixture, as ``DistillationModule`` does on images."""
    schedule, levels = VPSchedule.from_config(DDPM_TABLE), Levels(num_steps=3, spread=0.5)
    network = new_network(mixture, blocks)
    loss = build_loss(weights, mixture.image_shape[1])
    adapter = {id(parameter) for parameter in network.denoiser.parameters()}
    psi = [parameter for parameter in network.parameters() if id(parameter) not in adapter]
    groups = [{"params": psi, "lr": 1e-2}, {"params": list(network.denoiser.parameters()), "lr": 1e-3}]
    optimizers = [(torch.optim.AdamW(groups, weight_decay=0.0), [p for g in groups for p in g["params"]])]
    # 1 on the plain square of the gradient, whatever the size of the patches (``gradient_square``)
    weight = 4 * REFERENCE_SIDE**2 / math.prod(mixture.image_shape[1:])
    discriminator, discriminator_loss = loss.discriminator, DiscriminatorLoss(gradient_penalty=weight)
    if discriminator is not None:
        own = list(discriminator.parameters())
        optimizers.append((torch.optim.AdamW(own, lr=1e-3, betas=(0.5, 0.99)), own))
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(batch).repeat_interleave(loss.num_outputs)
    for step in tqdm(range(iterations), desc=f"K={blocks}, {' '.join(weights)}", unit="step"):
        x0 = mixture.sample(batch, generator).float()
        physics = operator.draw(batch, tuple(x0.shape[1:]), generator)
        noise = torch.full((batch,), sigma_y)
        y = observe(physics, x0, noise, generator)
        sigma = levels(rand((batch, 2), generator), schedule)
        x_sigma = x0 + sigma.view(-1, 1, 1, 1) * randn_like(x0, generator)
        observation = Observation(y, physics, noise)
        outputs = network(x_sigma[rows], sigma[rows], observation.rows(rows), generator).unflatten(0, (batch, -1))
        condition = x0
        if discriminator is not None:
            condition = start_from_y(network.warm_start, observation).detach()
        prediction = Prediction(x0, outputs, sigma, condition)
        total, _ = loss(prediction)
        if discriminator is not None:
            total = total + discriminator_loss(discriminator, prediction, generator)[0]
        total.backward()
        for optimizer, parameters in optimizers:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, 50, iterations) * group.setdefault("initial_lr", group["lr"])
            optimizer.step()
            optimizer.zero_grad()
    return network.requires_grad_(False)


class Unfolded(Sampler):
    """A trained network with N steps."""

    def __init__(self, network: UnfoldedNetwork, num_steps: int, eta: float | str = 1.0, grid_power: float = 2.0):
        super().__init__([network.denoiser], chunk_size=4096)
        self.network, self.eta = network, eta
        self.levels = VPSchedule.from_config(DDPM_TABLE).grid(num_steps, grid_power)

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        return sample_posterior(self.network, observation, self.levels, self.eta, streams)


class Exact(Sampler):
    """Exact draws of the posterior: whose distance to others is the floor."""

    def __init__(self, mixture: GaussianMixture):
        super().__init__(chunk_size=4096)
        self.mixture = mixture

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        _, numbers = observation.y.flatten(1).unique(dim=0, return_inverse=True)
        drawn = torch.empty(len(observation), *observation.image_shape)
        for number in numbers.unique():
            rows = torch.nonzero(numbers == number)[:, 0]
            one = observation.rows(rows[:1])
            posterior = self.mixture.posterior(one.y, one.physics, float(one.sigma_y))
            drawn[rows] = posterior.sample(len(rows), streams[int(rows[0])]).float()
        return drawn


# --- judging ---------------------------------------------------------------------------------------------------------


def judged(
    method: Sampler, mixture: GaussianMixture, operator: OperatorFamily, sigma_y: float, observations: int, samples: int
) -> dict[str, Any]:
    """Return distances to exact draws with intervals over observations, coverage and NFE.

    ``w2`` between sets of finite size falls when the method's draws are too narrow, below the ``floor`` even.
    ``w2_debiased`` is the root of W2^2(exact, drawn) - W2^2(exact, exact') / 2 - W2^2(drawn, drawn') / 2 (as in
    Sinkhorn divergences, Feydy et al., AISTATS 2019), 0 on average for exact draws; a negative value keeps its sign.

    The coverage is that of exact draws by the central intervals between two of the method's ordered draws whose share
    is nearest to 90 %. Images are clamped to [0, 1] everywhere, exact draws too.
    """
    generator = torch.Generator().manual_seed(7)
    x0 = mixture.sample(observations, generator).float()
    physics = operator.draw(observations, tuple(x0.shape[1:]), generator)
    y = observe(physics, x0, sigma_y, generator)
    exact = Exact(mixture)(y, physics, sigma_y, 2 * samples, generator)
    with NetworkEvaluations(method.networks) as counter:
        drawn = method(y, physics, sigma_y, 2 * samples, generator)
    pairs = [(e.split(samples), d.split(samples)) for e, d in zip(exact, drawn, strict=True)]
    between = torch.tensor([[wasserstein2(a, b) for a, b in zip(e, d, strict=True)] for e, d in pairs])
    floors = torch.tensor([wasserstein2(*e) for e, _ in pairs])
    own = torch.tensor([wasserstein2(*d) for _, d in pairs])
    excess = between.square().mean(1) - (floors.square() + own.square()) / 2
    row = {"nfe": counter.count / (2 * observations * samples)}
    row |= with_interval("w2", between.mean(1)) | {"floor": floors.mean().item()}
    row |= {"w2 / floor": row["w2"] / row["floor"]}
    row |= {name: signed_root(value) for name, value in with_interval("w2_debiased", excess).items()}
    row |= with_interval("coverage_90", covered(drawn, exact))
    return row | {"std": drawn.std(1).mean().item(), "exact std": exact.std(1).mean().item()}


def covered(drawn: Tensor, exact: Tensor) -> Tensor:
    """Return the share of exact draws inside central intervals of the draws of a method, both [B, S, ...], as [B]."""
    count = drawn.shape[1]
    k = max(1, round((1 - LEVEL) * (count + 1) / 2))
    ordered = drawn.sort(1).values
    inside = (exact >= ordered[:, k - 1 : k]) & (exact <= ordered[:, count - k : count - k + 1])
    return inside.flatten(1).double().mean(1)


class Study:
    """One prior, operator and noise level, with what was measured on them."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = Path(options.folder)
        self.mixture = fitted(self.folder, options.side, options.components, options.patches)
        self.operator = OPERATORS[options.operator]
        self.store = CellStore(self.folder / "cells")
        self.rows: list[dict[str, Any]] = []

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return all that determines a row."""
        mixture = weights_fingerprint(self.mixture.state_dict())
        keys = ("operator", "sigma_y", "observations", "samples")
        return {"mixture": mixture, **{key: getattr(self.options, key) for key in keys}, **more}

    def network(self, blocks: int, loss: str) -> UnfoldedNetwork:
        """Return a trained network, from its file where it was trained already."""
        options, weights = self.options, read_loss(loss)
        settings = self.settings(blocks=blocks, loss=weights, iterations=options.iterations, batch=options.batch)
        path = self.folder / "networks" / f"{digest(settings)}.safetensors"
        network = new_network(self.mixture, blocks)
        if not path.is_file():
            network = train(
                self.mixture, self.operator, options.sigma_y, blocks, weights, options.iterations, options.batch
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, save({k: v.contiguous() for k, v in network.state_dict().items()}))
        network.load_state_dict(load_file(path))
        return network.requires_grad_(False)

    def add(self, name: str, method: Any, **settings: Any) -> None:
        """Judge a method unless that was done before, and print its row."""
        options = self.options
        full = self.settings(method=name, **settings)
        result = self.store.load(full)
        if result is None:
            row = judged(method(), self.mixture, self.operator, options.sigma_y, options.observations, options.samples)
            result = Result({"method": name} | settings | row, {}, {})
            self.store.save(full, result)
        self.rows.append(dict(result.row))
        print("\n".join(table_lines(self.rows)[0 if len(self.rows) == 1 else -1 :]), flush=True)

    def table(self) -> None:
        """Judge UD2M for all K and N, and the others."""
        options = self.options
        self.add("exact draws", lambda: Exact(self.mixture))
        for name, method in rivals(self.mixture).items():
            if name not in options.leave_out:
                self.add(name, method)
        for blocks in options.blocks:
            for steps in options.steps:
                self._unfolded(blocks, steps, options.loss)
        self.write("table")

    def losses(self) -> None:
        """Judge one K and N after training with one loss after the other."""
        for loss in STUDY:
            self._unfolded(self.options.blocks[0], self.options.steps[0], loss)
        self.write("losses")

    def sampling(self) -> None:
        """Judge one K and N with every eta and grid."""
        blocks, steps, loss = self.options.blocks[0], self.options.steps[0], self.options.loss
        training = {"loss": loss, "iterations": self.options.iterations, "batch": self.options.batch}
        for eta, power in itertools.product(ETAS, GRID_POWERS):
            self.add(
                f"K={blocks}, N={steps}, eta={eta}, t_n = T (n / N)^{power:g}",
                partial(self._sampler, blocks, loss, steps, read_eta(eta), power),
                **training,
            )
        self.write("sampling")

    def _sampler(self, blocks: int, loss: str, steps: int, eta: float | str, power: float) -> Unfolded:
        return Unfolded(self.network(blocks, loss), steps, eta, power)

    def _unfolded(self, blocks: int, steps: int, loss: str) -> None:
        options = self.options
        name = f"UD2M (K={blocks}, N={steps}, {loss})"
        settings = {"iterations": options.iterations, "batch": options.batch, "eta": options.eta}
        self.add(name, partial(self._sampler, blocks, loss, steps, read_eta(options.eta), 2.0), **settings)

    def write(self, name: str) -> None:
        """Write all rows as JSON and Markdown, and into docs/results where that was asked for."""
        write_json(self.folder / f"{name}.json", self.rows)
        write_bytes(self.folder / f"{name}.md", "\n".join([*table_lines(self.rows), ""]).encode())
        if self.options.store:
            rows = [
                {"method" if key == "Method" else key: text for key, text in cells(row).items()} for row in self.rows
            ]
            command = shlex.join(["python", *sys.argv])
            print(store(self.options.store, command, vars(self.options), rows).relative_to(REPOSITORY))


def rivals(mixture: GaussianMixture) -> dict[str, Any]:
    """Return the methods that need no training, to be made when they are wanted."""
    return {
        "LATINO, 8 levels": lambda: Latino(mixture, LatinoSetting(8, 0.2, 0.02)),
        "DDRM, 20": lambda: Ddrm(mixture, 20, chunk_size=512),
        "DiffPIR, 100": lambda: DiffPir(mixture, 100, chunk_size=512),
        "DPS, 1000": lambda: Dps(mixture, 1000, weight=30.0, chunk_size=512),
        "Langevin, 5000": lambda: Langevin(mixture, 5000, chunk_size=512),
    }


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row as text by column."""

    def number(name: str, digits: int) -> str:
        value, low, high = (f"{row[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
        return f"{value} [{low}, {high}]"

    return {
        "Method": row["method"],
        "NFE": f"{row['nfe']:g}",
        "W2 to the posterior": number("w2", 4),
        "floor": f"{row['floor']:.4f}",
        "W2 / floor": f"{row['w2 / floor']:.2f}",
        "W2, debiased": number("w2_debiased", 4),
        "coverage of 90 %": number("coverage_90", 3),
        "std": f"{row['std']:.4f}",
        "exact std": f"{row['exact std']:.4f}",
    }


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return rows as the lines of a Markdown table."""
    texts = [cells(row) for row in rows]
    head = [markdown_line(texts[0]), "| --- |" + " ---: |" * (len(texts[0]) - 1)]
    return head + [markdown_line(text.values()) for text in texts]


def read_eta(text: str) -> float | str:
    """Return eta: a number or "fresh"."""
    return text if text == "fresh" else float(text)


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("action", choices=("fit", "table", "losses", "sampling"))
    found.add_argument("--folder", default="results/exact")
    found.add_argument("--store", metavar="NAME", help="of a section of docs/results.md to write the rows into")
    found.add_argument("--side", type=int, default=8, help="of the patches, in pixels")
    found.add_argument("--components", type=int, default=20, help="of the mixture")
    found.add_argument("--patches", type=int, default=20000, help="that the mixture is fitted to")
    found.add_argument("--operator", choices=tuple(OPERATORS), default="blur")
    found.add_argument("--sigma-y", type=float, default=0.05)
    found.add_argument("--blocks", type=int, nargs="+", default=[3], help="K")
    found.add_argument("--steps", type=int, nargs="+", default=[3], help="N")
    found.add_argument("--eta", default="1.0", help="0 to 1, or fresh")
    found.add_argument("--loss", default="energy=1", help=f"weights of {', '.join(LOSSES)}")
    found.add_argument("--iterations", type=int, default=2000, help="steps of training")
    found.add_argument("--batch", type=int, default=64)
    found.add_argument("--observations", type=int, default=32)
    found.add_argument("--samples", type=int, default=256, help="per observation")
    found.add_argument("--leave-out", nargs="*", default=[], choices=tuple(rivals(None)), metavar="RIVAL")  # type: ignore[arg-type]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one action."""
    options = parser().parse_args(arguments)
    for name in ("side", "components", "patches", "iterations", "batch", "observations", "samples"):
        if getattr(options, name) < 2:
            raise ValueError(f"{name} must be at least 2, got {getattr(options, name)}")
    study = Study(options)
    if options.action != "fit":
        getattr(study, options.action)()
    print(json.dumps({"folder": str(study.folder)}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
