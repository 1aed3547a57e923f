"""What users call: ``PosteriorSampler``, its export folder and its loading."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, upload_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ud2m.files import MARKER, atomic_folder
from ud2m.physics import DataTerm, image_shape
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.priors.store import shipped_folder
from ud2m.samplers.base import check_count, check_positive, draw_in_chunks, noise_levels
from ud2m.samplers.card import model_card
from ud2m.samplers.export import (
    CONFIG_FILE,
    FORMAT,
    PSI_FILE,
    _export_folder,
    _load_prior,
    _read_config,
    _read_metrics,
    _refer,
)
from ud2m.unfolded.ddim import check_eta, sample_posterior
from ud2m.unfolded.denoisers import check_symmetries
from ud2m.unfolded.network import UnfoldedNetwork, build_network


@dataclass
class SamplerConfig:
    """Defaults of a call and where the model comes from; stored in ``config.json`` of an export.

    ``num_steps`` (N), ``eta``, ``symmetries`` and ``step_scale`` are the defaults of sampling, ``grid_power`` the
    exponent of its levels (``VPSchedule.grid``), which are those of training; ``sigma_y`` is the noise level of
    training and ``info`` what else is known of it (information, not a limit).
    """

    num_steps: int = 3
    grid_power: float = 2.0
    eta: float | str = 1.0
    symmetries: int = 1
    step_scale: float = 1.0
    sigma_y: float = 0.01
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for defaults that no call could use."""
        check_count("num_steps (N)", self.num_steps)
        check_eta(self.eta)
        check_symmetries(self.symmetries)
        check_positive("step_scale", self.step_scale)
        check_positive("grid_power", self.grid_power)
        if not isinstance(self.sigma_y, int | float) or not 0 < self.sigma_y < math.inf:
            raise ValueError(f"sigma_y must be a positive noise level in image units, got {self.sigma_y!r}")
        if not isinstance(self.info, dict):
            raise ValueError(f"info must be a dictionary, got {self.info!r}")


class PosteriorSampler:
    """Draw posterior samples p(x | y) in K N network evaluations.

    Example::

        sampler = PosteriorSampler.from_pretrained("photos_gaussian_blur")
        samples = sampler(y, physics, sigma_y=0.01, num_samples=8)   # [B, 8, C, H, W] in [0, 1]
    """

    def __init__(self, network: UnfoldedNetwork, prior: Prior, config: SamplerConfig | None = None):
        self.network = network
        self.prior = prior
        self.config = config or SamplerConfig()

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.prior.parameters()).device

    def to(self, device: torch.device | str) -> "PosteriorSampler":
        """Move the network."""
        self.network.to(device)
        return self

    def nfe(self, num_steps: int | None = None) -> int:
        """Return the network evaluations per sample, K N (and N more where a network makes the warm start)."""
        return self.network.evaluations * (num_steps or self.config.num_steps)

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        physics: DataTerm,
        sigma_y: float | Tensor | None = None,
        num_samples: int = 1,
        num_steps: int | None = None,
        eta: float | str | None = None,
        generator: torch.Generator | None = None,
        chunk_size: int = 64,
        tile: int | None = None,
        symmetries: int | None = None,
        step_scale: float | None = None,
    ) -> Tensor:
        """Return samples [B, num_samples, C, H, W] in [0, 1] for observations y [B, ...] = A x + sigma_y w.

        Args:
            y: observations, in image units.
            physics: a linear operator of deepinv that fits y.
            sigma_y: noise level of y, a number or [B]; default: the level the model was trained with.
            num_samples: samples per observation. num_steps: N. eta: see ``ud2m.unfolded.ddim.step_deviation``.
            generator: source of randomness (on any device); each sample draws from its own stream, so that it does not
                depend on the chunk size.
            chunk_size: how many images the network sees at once; bounds the memory.
            tile: pictures larger than tile x tile pixels go through the network in overlapping tiles of that size
                (``ud2m.unfolded.denoisers``), and fewer at once: it sees at most chunk_size tile^2 pixels. None: the whole picture.
            symmetries: the network sees images in 1, 2 or 8 random orientations (``ud2m.unfolded.denoisers``).
            step_scale: factor on the modules' delta_k, > 0. More gives samples that differ more and look sharper, less
                gives single samples that are closer to the posterior mean.

        Raises:
            ValueError: for numbers out of range, or an image size that the prior cannot take.
        """
        num_steps = self.config.num_steps if num_steps is None else num_steps
        eta = self.config.eta if eta is None else eta
        symmetries = self.config.symmetries if symmetries is None else symmetries
        step_scale = self.config.step_scale if step_scale is None else step_scale
        check_eta(eta)
        check_symmetries(symmetries)
        check_positive("step_scale", step_scale)
        for name, value in {"num_samples": num_samples, "num_steps (N)": num_steps, "chunk_size": chunk_size}.items():
            check_count(name, value)
        y = y.to(next(self.network.blocks.parameters()).dtype)  # of psi: frozen weights may be stored in less
        sigma_y = noise_levels(self.config.sigma_y if sigma_y is None else sigma_y, y)
        shape = image_shape(physics, y)
        self._check_image(shape)
        levels = self.prior.schedule.grid(num_steps, self.config.grid_power)
        if tile is not None:
            chunk_size = max(1, min(chunk_size, chunk_size * tile**2 // (shape[1] * shape[2])))
        network = partial(self.network, tile=tile, symmetries=symmetries, step_scale=step_scale)

        def draw(y: Tensor, physics: DataTerm, sigma_y: Tensor, streams: list[torch.Generator]) -> Tensor:
            return sample_posterior(network, y, physics, sigma_y, levels, shape, eta, streams)

        return draw_in_chunks(draw, y, physics, sigma_y, num_samples, chunk_size, generator)

    def _check_image(self, image_shape: tuple[int, ...]) -> None:
        if len(image_shape) != 3 or image_shape[0] != self.prior.channels:
            raise ValueError(
                f"the prior draws images with {self.prior.channels} channels, this operator acts on {image_shape}; "
                "load a model with a matching prior or convert the image"
            )
        self.prior.check_size(*image_shape[1:])

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the export folder: ``config.json``, adapter (peft), psi (safetensors), the prior by reference."""
        spec = self.prior.lora or LoraSpec(rank=0)
        content = {
            "format": FORMAT,
            "network": self.network.spec,
            "lora": spec.to_dict(),
            "prior": {"reference": self.prior.reference, "fingerprint": self.prior.fingerprint},
            "sampler": vars(self.config),
        }
        with atomic_folder(folder, overwrite=overwrite) as partial:
            self.prior.save_adapter(partial)
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in self.network.own_state().items()}, partial / PSI_FILE
            )
            (partial / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors writes files that only their owner can read

    def push_to_hub(
        self,
        repo_id: str,
        metrics: str | Path | Sequence[Mapping[str, Any]] = (),
        prior: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the export with a model card to the Hugging Face hub and return its address.

        Args:
            repo_id: ``user/name``; the repository is made where it is not there.
            metrics: rows of the scores that the card shows, or the ``metrics.json`` of the run.
            prior: hub id under which others find the prior, where this process has loaded it from a folder.
            private: of a new repository. token: of the hub; default: that of ``hf auth login``.

        Raises:
            ValueError: when others could not find the prior, or the metrics are none.
            HfHubHTTPError: when the hub refuses.
        """
        reference = prior or self.prior.reference
        if reference is None or (Path(reference).is_dir() and shipped_folder(reference) is None):
            raise ValueError(
                f"the prior of this model is {reference or 'not stored anywhere'}, which others do not have: upload "
                "that folder (hf upload) and name its hub id with prior=..."
            )
        rows = _read_metrics(Path(metrics)) if isinstance(metrics, str | Path) else metrics
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "export"
            self.save_pretrained(folder)
            (folder / MARKER).unlink()
            content = _refer(folder, reference)
            model_card(repo_id, content, self.nfe(), rows).save(folder / "README.md")
            create_repo(repo_id, private=private, token=token, exist_ok=True)
            return str(upload_folder(repo_id=repo_id, folder_path=folder, token=token))

    @classmethod
    def from_pretrained(
        cls, reference: str | Path, prior: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> "PosteriorSampler":
        """Load a model by the name of a shipped one, an export folder, or a hub id.

        Args:
            reference: e.g. ``"photos_gaussian_blur"`` or ``runs/.../export``.
            prior: where the prior is, when it moved since the export; its fingerprint must still be the same.

        Raises:
            FileNotFoundError: when nothing is there. ValueError: when the export is damaged or made for another prior.
        """
        folder = _export_folder(str(reference))
        content = _read_config(folder)
        try:
            lora = LoraSpec(**content["lora"])
            config = SamplerConfig(**content["sampler"])
            where, expected = content["prior"]["reference"], content["prior"]["fingerprint"]
            spec = content["network"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / CONFIG_FILE} is not a complete export: {error}; export the model again"
            ) from error
        base = _load_prior(folder, prior or where)
        if base.fingerprint != expected:
            raise ValueError(
                f"the export {folder} was trained on a prior with fingerprint {expected[:12]}, but "
                f"{base.reference} has {base.fingerprint[:12]}; pass the folder of the right prior"
            )
        try:
            base.load_adapter(folder, lora)
            network = build_network(base, spec)
            network.load_own_state(load_file(folder / PSI_FILE))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"the export {folder} is damaged or incomplete ({error}); export the model again"
            ) from error
        base.merge_adapter()
        return cls(network.requires_grad_(False).to(device).eval(), base, config)
