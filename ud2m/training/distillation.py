"""Lightning module: unfold a frozen prior and distil it into a few-step posterior sampler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ud2m.losses.adversarial import DiscriminatorLoss
from ud2m.losses.generator import GeneratorLoss
from ud2m.losses.terms import Prediction
from ud2m.physics import Observation, OperatorFamily, Problem
from ud2m.precision import full_precision
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.random import rand, randn_like
from ud2m.samplers import export
from ud2m.samplers.config import SamplerConfig
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.training.ema import Ema
from ud2m.training.levels import Levels
from ud2m.training.pictures import contact_sheet, log_images
from ud2m.training.steps import SteppedModule, StepSettings
from ud2m.training.validation import Validation
from ud2m.unfolded.ddim import check_eta
from ud2m.unfolded.network import build_network
from ud2m.unfolded.warm_start import start_from_y

CHECKPOINTING = ("none", "modules", "all")
"""What is evaluated again in the backward pass: nothing, LATINO modules (but the last), also residual blocks."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(StepSettings):
    """Learning rates and the plan of the steps (see ``StepSettings``).

    Args:
        lr: peak rate of the adapter. lr_psi: of psi (logarithms). lr_start: of a learned warm start.
        lr_discriminator: of D.
        weight_decay: of the adapter. steps: optimiser steps of the whole run, over which the rates fall to 0.
    """

    lr: float
    lr_psi: float
    lr_start: float
    lr_discriminator: float
    steps: int
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(self.lr, self.lr_psi, self.lr_start, self.lr_discriminator) > 0 or self.weight_decay < 0:
            raise ValueError(
                "learning rates must be positive and weight_decay at least 0, got "
                f"lr={self.lr}, lr_psi={self.lr_psi}, lr_start={self.lr_start}, "
                f"lr_discriminator={self.lr_discriminator}, weight_decay={self.weight_decay}"
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> "OptimizerSettings":
        """Return the settings of a configuration; raises ValueError for unknown or missing ones."""
        try:
            return cls(**options)
        except TypeError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"the optimizer is described by {names}; got {dict(options)} ({error})") from error


class DistillationModule(SteppedModule):
    """Conditional consistency distillation [UD2M, section 3.3] with the energy score beside the paper's losses.

    For x0 from the data, y = A x0 + sigma_y w and x_sigma = x0 + sigma eps, the outputs L(x_sigma, y) are pulled to x0
    by the weighted terms of ``loss``. One unfolded forward pass serves the generator's and the discriminator's update;
    the discriminator sees it detached.

    Args:
        prior: reference of the frozen prior. lora: keyword arguments of ``LoraSpec``, what of it is adapted.
        network: plain description for ``build_network``.
        operator: family that the physics are drawn from. sigma_y: noise level of the observations, image units.
        sigma_y_range: lowest and highest noise level of training, log-uniform per sample; ``sigma_y`` is then that of
            validation and the sampler's default. None: always ``sigma_y``.
        noise: noise level that the observations have where the network is told another one, as 0 in noise-free
            protocols. None: what it is told.
        levels: draws sigma per sample.
        loss: builds the generator's loss from ``features`` and ``discriminator`` (``build_generator_loss``).
        discriminator: builds D from ``channels``; called only when the adversarial term has a weight.
        discriminator_loss: the loss of D.
        optimizer: keyword arguments of ``OptimizerSettings``.
        sampling: N (``num_steps``), ``grid_power`` and ``eta`` of the sampler that validates and is exported.
        validation: keyword arguments of ``Validation``: what is measured, and what selects the best checkpoint.
        info: plain values that the export keeps, such as the configuration of the operator.
        checkpointing: one of ``CHECKPOINTING``: less memory for more time, with the same gradients. kept_modules: the
            last LATINO modules, which it leaves out; at least one, whose turn in the backward pass comes at once.
        frozen_bfloat16: keep the frozen weights in bfloat16 (``Prior.store_frozen_in_bfloat16``), in which the network
            is then validated too.
        channels_last: ``Prior.use_channels_last``.
        compile: backend of torch.compile for the prior's network (``Prior.compile_network``), None to do without. The
            discriminator is not compiled: its penalty is differentiated twice.
        start_from: model whose trained parameters the run begins with (``samplers.export.start_from``). None: the prior's.
        seed: of all randomness.

    Raises:
        ValueError: for numbers out of range; errors of the parts.
    """

    stream_name = "distillation"
    players = ("generator", "discriminator")

    def __init__(
        self,
        prior: str,
        lora: Mapping[str, Any],
        network: Mapping[str, Any],
        operator: OperatorFamily,
        sigma_y: float,
        levels: Levels,
        loss: Callable[..., GeneratorLoss],
        discriminator: Callable[..., nn.Module],
        discriminator_loss: DiscriminatorLoss,
        optimizer: Mapping[str, Any],
        sampling: Mapping[str, Any],
        validation: Mapping[str, Any],
        info: Mapping[str, Any] | None = None,
        sigma_y_range: Sequence[float] | None = None,
        noise: float | None = None,
        seed: int = 0,
        checkpointing: str = "none",
        kept_modules: int = 1,
        frozen_bfloat16: bool = False,
        channels_last: bool = False,
        compile: str | None = None,
        start_from: str | None = None,
    ):
        settings = OptimizerSettings.from_mapping(optimizer)
        super().__init__(settings, seed)
        bounds = None if sigma_y_range is None else (float(sigma_y_range[0]), float(sigma_y_range[1]))
        self.problem = Problem(operator, sigma_y, seed, noise, bounds)
        check_eta(sampling["eta"])
        if checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing must be one of {', '.join(CHECKPOINTING)}, got {checkpointing!r}")
        self.optimizer_settings = settings
        self.prior = Prior.from_pretrained(prior).add_lora(LoraSpec(**lora))
        kept = None if checkpointing == "none" else kept_modules
        self.network = build_network(self.prior, network, kept)
        if start_from is not None:
            export.start_from(self.network, self.prior, start_from)
        if checkpointing == "all":
            self.prior.checkpoint_layers()
        if frozen_bfloat16:
            self.prior.store_frozen_in_bfloat16()
        if channels_last:
            self.prior.use_channels_last()
        if compile is not None:
            self.prior.compile_network(compile)
        self.levels = levels
        self.loss = loss(
            features=self.prior.features, discriminator=lambda: discriminator(channels=self.prior.channels)
        )
        self.discriminator = self.loss.discriminator
        self.discriminator_loss = discriminator_loss
        self.ema = Ema(self.generator_parameters(), settings.ema_decay)
        config = SamplerConfig(**sampling, sigma_y=float(sigma_y), info=dict(info or {}))
        self.sampler = PosteriorSampler(self.network, self.prior, config)
        self.validation = Validation(self.sampler, self.problem, **validation)

    def generator_parameters(self) -> list[nn.Parameter]:
        """Return psi and the adapter (and a learned warm start), each once."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return the LoRA factors and the copy of the output convolution."""
        return [p for p in self.prior.parameters() if p.requires_grad]

    # --- one step ------------------------------------------------------------------------------------------------

    def losses(self, x0: Tensor, streams: list[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both players' losses for clean images x0, and their terms.

        One backward pass serves both: D's parameters are constants of the generator's loss and the outputs are
        constants of D's, so that neither leaves a gradient with the other.
        """
        prediction = self.predict(x0, streams)
        total, terms = self.loss(prediction)
        values = {"total": total.detach()} | terms
        if self.discriminator is None:
            return total, values
        total_d, terms_d = self.discriminator_loss(self.discriminator, prediction, streams)
        return total + total_d, values | terms_d

    def on_train_start(self) -> None:
        """Check that the rates fall to 0 where the run ends.

        Raises:
            ValueError: when the trainer plans another number of steps.
        """
        super().on_train_start()
        if self.total_steps != self.optimizer_settings.steps:
            raise ValueError(
                f"the optimizer plans {self.optimizer_settings.steps} steps, the trainer {self.total_steps}; set steps "
                "and validate_every, and leave trainer.max_epochs and data.samples_per_epoch to follow from them"
            )

    def predict(self, x0: Tensor, streams: list[torch.Generator]) -> Prediction:
        """Observe x0, noise it, and run the unfolded network M times with independent inner noise, as one batch.

        Raises:
            ValueError: for images that the prior or the operator cannot take.
        """
        if x0.shape[1] != self.prior.channels:
            raise ValueError(
                f"the images have {x0.shape[1]} channels, the prior {self.prior.channels}; choose other data"
            )
        self.prior.check_size(x0.shape[2], x0.shape[3])
        batch, outputs = len(x0), self.loss.num_outputs
        with full_precision(self.device):  # the networks alone see less than float32
            observation = self.problem.draw(x0, self.draw_sigma_y(batch, streams).to(x0), streams)
            sigma = self.levels(rand((batch, 2), streams, self.device), self.prior.schedule)
            x_sigma = x0 + sigma.view(-1, 1, 1, 1) * randn_like(x0, streams)
        start = self.network.warm_start(x_sigma, sigma, observation)
        rows = torch.arange(batch, device=self.device).repeat_interleave(outputs)
        samples = self.network(
            x_sigma[rows],
            sigma[rows],
            observation.rows(rows),
            [generator for generator in streams for _ in range(outputs)],
            start=start[rows],
        )
        # Differs from the paper, where D sees A^dagger y: for a blur that is mostly amplified noise.
        condition = x0 if self.discriminator is None else self.condition(observation)
        return Prediction(x0, samples.unflatten(0, (batch, outputs)), sigma, condition)

    def draw_sigma_y(self, batch: int, streams: list[torch.Generator]) -> Tensor:
        """Return noise levels of observations [B], image units."""
        low, high = self.problem.levels
        if low == high:
            return torch.full((batch,), low)
        return low * (high / low) ** rand((batch, 1), streams)[:, 0]

    @torch.no_grad()
    def condition(self, observation: Observation) -> Tensor:
        """Return the warm start from y alone [B, C, H, W], which brings y to image size for the discriminator."""
        return start_from_y(self.network.warm_start, observation)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for psi, adapter and a learned warm start at their rates, and a second one for a discriminator."""
        settings = self.optimizer_settings
        adapter = self.adapter_parameters()
        start = [p for p in self.network.warm_start.parameters() if p.requires_grad]
        others = {id(p) for p in [*adapter, *start]}
        psi = [p for p in self.generator_parameters() if id(p) not in others]
        groups: list[dict[str, Any]] = [{"params": psi, "lr": settings.lr_psi, "weight_decay": 0.0}]
        if adapter:
            groups.append({"params": adapter, "lr": settings.lr, "weight_decay": settings.weight_decay})
        if start:
            groups.append({"params": start, "lr": settings.lr_start, "weight_decay": 0.0})
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups)]
        if self.discriminator is not None:
            rate, betas = settings.lr_discriminator, (0.5, 0.99)
            optimizers.append(torch.optim.AdamW(self.discriminator.parameters(), lr=rate, betas=betas))
        return optimizers

    # --- validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start a score of the sampler itself."""
        self.validation.begin()

    def validation_step(self, x0: Tensor, batch_idx: int) -> None:
        """Draw samples for clean images x0 with the averaged parameters, score them and show the first ones."""
        with self.scoring():
            draws = self.validation.add(x0)
        if batch_idx == 0 and self.trainer.is_global_zero:
            sheet = contact_sheet(x0[:4], draws.observation.y[:4], draws.samples[:4])
            folder = Path(self.trainer.default_root_dir) / "images"
            log_images(self.loggers, folder, {"validation": sheet}, self.steps_done)

    def on_validation_epoch_end(self) -> None:
        """Log the sampler's scores, the selecting one as ``val/score``, and psi."""
        with self.ema.applied():
            self.log_dict({f"psi/{k}": v for k, v in self.network.psi().items()})
        self.log_scores(*self.validation.result())

    # --- results -------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Write the model with averaged parameters as a folder that ``PosteriorSampler.from_pretrained`` loads."""
        with self.ema.applied():
            self.sampler.save_pretrained(folder, overwrite=True)

    def evaluate(self, data: L.LightningDataModule) -> list[dict[str, Any]]:
        """Return one row with the scores of these parameters on the validation images (never the test images).

        They were measured when the checkpoint that the parameters come from was written, and travel with it.
        """
        name = f"UD2M (K={self.network.num_blocks}, N={self.sampler.config.num_steps})"
        return [{"method": name, "nfe": self.sampler.nfe()} | self.scores]

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the trained parameters, their averages and the discriminator; not the frozen prior."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if k in trained or k.startswith(("ema.", "discriminator."))}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: when a name or shape is not of this model.
        """
        own = self.state_dict()
        common = state_dict.keys() & own.keys()
        odd = sorted(state_dict.keys() ^ own.keys()) + [k for k in common if state_dict[k].shape != own[k].shape]
        if odd:
            raise ValueError(
                f"this checkpoint is of another model, unmatched: {', '.join(odd[:4])}; "
                "use the network, lora and loss that it was trained with"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which prior the parameters belong to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["prior_fingerprint"] = self.prior.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another prior."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("prior_fingerprint", "none")
        if found != self.prior.fingerprint:
            raise ValueError(
                f"this checkpoint was trained on a prior with fingerprint {found[:12]}, the prior here has "
                f"{self.prior.fingerprint[:12]}; resume with the same prior"
            )
