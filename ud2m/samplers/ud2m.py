"""Our sampler: what users call, ``PosteriorSampler``."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import create_repo, upload_folder
from torch import Tensor, nn

from ud2m.bars import Advance
from ud2m.files import MARKER
from ud2m.physics import DataTerm, Observation, told_level
from ud2m.precision import find_device
from ud2m.priors.prior import Prior
from ud2m.priors.shipped import shipped_folder
from ud2m.priors.store import weights_fingerprint
from ud2m.samplers.base import Sampler
from ud2m.samplers.card import model_card
from ud2m.samplers.config import SamplerConfig
from ud2m.samplers.export import read_export, read_metrics, refer_to_prior, write_export
from ud2m.samplers.reconstructor import PosteriorReconstructor
from ud2m.unfolded.ddim import sample_posterior
from ud2m.unfolded.denoisers import in_precision, symmetric, tile_count, tiled
from ud2m.unfolded.network import UnfoldedNetwork


class PosteriorSampler(Sampler):
    """Draw posterior samples p(x | y) in K N network evaluations.

    Example::

        sampler = PosteriorSampler.from_pretrained("photographs_gaussian_blur")
        samples = sampler(y, physics, sigma_y=0.01, num_samples=8)   # [B, 8, C, H, W] in [0, 1]

    Args:
        network: L, whose denoiser is a prior with its adapter.
        config: options of sampling.
    """

    def __init__(self, network: UnfoldedNetwork, config: SamplerConfig | None = None):
        self.network, self.prior, self.config = network, cast(Prior, network.denoiser), config or SamplerConfig()
        starts: list[nn.Module] = [network.warm_start] if network.warm_start.evaluations else []
        super().__init__([self.prior, *starts], self.config.chunk_size, self.config.of_networks)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.prior.parameters()).device

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Which model this is, and how it samples: a SHA-256 of all its weights, and its options."""
        return f"{weights_fingerprint(self.network.state_dict())} {self.config} {self.network.spec}"

    def to(self, device: torch.device | str) -> "PosteriorSampler":
        """Move the network."""
        self.network.to(device)
        return self

    def with_options(self, **options: Any) -> "PosteriorSampler":
        """Return a sampler with the same network and other options; those that are None stay as they are.

        Raises:
            ValueError: as ``SamplerConfig.with_options``.
        """
        return PosteriorSampler(self.network, self.config.with_options(**options)) if options else self

    def nfe(self, num_steps: int | None = None) -> int:
        """Return the network evaluations per sample, K N (and N more where a network makes the warm start)."""
        return self.network.evaluations * (num_steps or self.config.num_steps)

    def __call__(
        self,
        y: Tensor,
        physics: DataTerm,
        sigma_y: float | Tensor | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        progress: bool | Advance = False,
        **options: Any,
    ) -> Tensor:
        """Return samples [B, num_samples, C, H, W] in [0, 1] for observations y [B, ...] = A x + sigma_y w.

        Args:
            y: observations, in image units.
            physics: a linear operator of deepinv that fits y.
            sigma_y: noise level of y, a number or [B]; default: ``physics.noise_model.sigma`` where there is one, else
                the level the model was trained with.
            num_samples: samples per observation.
            generator: source of randomness (on any device); each sample draws from its own stream, so that it depends
                on the chunk size by rounding alone.
            progress: True: a bar counts network evaluations; or a function that is told of each.
            options: of ``SamplerConfig`` for this call, as ``num_steps``, ``eta``, ``tile``; None: the default.

        Raises:
            ValueError: for numbers out of range, or an image size that the prior cannot take.
        """
        sampler = self.with_options(**options)
        return sampler.sample(sampler.observation(y, physics, sigma_y), num_samples, generator, progress)

    def observation(self, y: Tensor, physics: DataTerm, sigma_y: float | Tensor | None = None) -> Observation:
        """Return what is known of x in a call with these arguments."""
        if sigma_y is None:
            told = told_level(physics)
            sigma_y = self.config.sigma_y if told is None else told
        dtype = next(self.network.blocks.parameters()).dtype  # of psi: frozen weights may be stored in less
        return Observation.of(y, physics, sigma_y).to(dtype)

    def evaluations_of(self, observation: Observation) -> int:
        """Return the network evaluations that one sample takes, those of tiles one by one."""
        tiles = tile_count(observation.image_shape[1:], self.config.tile)
        return self.config.num_steps * (self.network.num_blocks * tiles + self.network.warm_start.evaluations)

    def images_at_once(self, observation: Observation) -> int:
        """Return how many images the network sees at once: fewer where they are cut into tiles.

        Raises:
            ValueError: for images that the prior cannot take.
        """
        shape = observation.image_shape
        self._check_image(shape)
        return self.config.chunk(*shape[1:])

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        config = self.config
        evaluated = in_precision(self.network.denoiser, self.precision)
        denoiser = symmetric(tiled(evaluated, config.tile), config.symmetries, streams)

        def network(x_sigma: Tensor, sigma: Tensor, observation: Observation, generator: Any) -> Tensor:
            return self.network(x_sigma, sigma, observation, generator, denoiser=denoiser, step_scale=config.step_scale)

        levels = self.prior.schedule.grid(config.num_steps, config.grid_power)
        return sample_posterior(network, observation, levels, config.eta, streams)

    def _check_image(self, image_shape: tuple[int, ...]) -> None:
        if len(image_shape) != 3 or image_shape[0] != self.prior.channels:
            raise ValueError(
                f"the prior draws images with {self.prior.channels} channels, this operator acts on {image_shape}; "
                "load a model with a matching prior or convert the image"
            )
        self.prior.check_size(*image_shape[1:])

    def reconstructor(self, num_samples: int = 8, **options: Any) -> PosteriorReconstructor:
        """Return a ``deepinv.models.Reconstructor``: the mean of so many samples, at the noise level of the physics.

        Args:
            num_samples: S, samples per observation.
            options: of ``SamplerConfig``, in place of this sampler's.

        Raises:
            ValueError: for options that no call could use.
        """
        return PosteriorReconstructor(self.with_options(**options), num_samples, [self.network])

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the export folder: ``config.json``, adapter (peft), psi (safetensors), the prior by reference."""
        write_export(folder, self.network, self.config, overwrite)

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
            private: of a new repository.
            token: of the hub; default: that of ``hf auth login``.

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
        rows = read_metrics(Path(metrics)) if isinstance(metrics, str | Path) else metrics
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "export"
            self.save_pretrained(folder)
            (folder / MARKER).unlink()
            content = refer_to_prior(folder, reference)
            model_card(repo_id, content, self.nfe(), rows).save(folder / "README.md")
            create_repo(repo_id, private=private, token=token, exist_ok=True)
            return str(upload_folder(repo_id=repo_id, folder_path=folder, token=token))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        prior: str | Path | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> "PosteriorSampler":
        """Load a model by the name of a shipped one, an export folder, or a hub id.

        Args:
            model: e.g. ``"photographs_gaussian_blur"`` or ``runs/.../export``.
            prior: where the prior is, when it moved since the export; its fingerprint must still be the same.
            device: where it computes; ``auto``: a GPU where there is one.
            options: of ``SamplerConfig``, in place of the model's; None: the model's.

        Raises:
            FileNotFoundError: when nothing is there.
            ValueError: when the export is damaged or made for another prior, or the device is not there.
        """
        network, config = read_export(str(model), prior)
        return cls(network.to(find_device(str(device))), config.with_options(**options))
