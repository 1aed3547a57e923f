"""Lightning module: unfold a frozen prior and distil it into a few-step posterior sampler."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.training.distillation_step import DistillationStep
from ud2m.training.ema import Ema
from ud2m.training.pictures import contact_sheet, log_images
from ud2m.training.steps import SteppedModule, StepSettings
from ud2m.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(StepSettings):
    """Learning rates and the plan of the steps (see ``StepSettings``).

    Args:
        lr: peak rate of the adapter.
        lr_psi: of psi (logarithms).
        lr_start: of a learned warm start.
        lr_discriminator: of D.
        discriminator_warmup: first steps, in which D learns and the generator does not feel it.
        steps: optimiser steps of the whole run, over which the rates fall to 0.
        weight_decay: of the adapter.
        warmup: see ``StepSettings``.
        accumulate: see ``StepSettings``.
        clip: see ``StepSettings``.
        ema_decay: see ``StepSettings``.
    """

    lr: float
    lr_psi: float
    lr_start: float
    lr_discriminator: float
    steps: int
    weight_decay: float = 0.0
    discriminator_warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(self.lr, self.lr_psi, self.lr_start, self.lr_discriminator) > 0 or self.weight_decay < 0:
            raise ValueError(
                "learning rates must be positive and weight_decay at least 0, got "
                f"lr={self.lr}, lr_psi={self.lr_psi}, lr_start={self.lr_start}, "
                f"lr_discriminator={self.lr_discriminator}, weight_decay={self.weight_decay}"
            )
        if not 0 <= self.discriminator_warmup < self.steps:
            raise ValueError(
                f"discriminator_warmup must be at least 0 and below the {self.steps} steps of the run, after which the "
                f"generator would never feel D, got {self.discriminator_warmup}"
            )


class DistillationModule(SteppedModule):
    """Train an unfolded network by ``DistillationStep``, validate the sampler that it makes, and export it.

    Args:
        step: what is computed for a batch.
        sampler: the trained one, of the same network.
        validation: measures the sampler; its number selects the best checkpoint.
        settings: of the optimisers.
    """

    stream_name = "distillation"
    optimized = ("generator", "discriminator")
    settings: OptimizerSettings

    def __init__(
        self, step: DistillationStep, sampler: PosteriorSampler, validation: Validation, settings: OptimizerSettings
    ):
        super().__init__(settings, step.problem.seed)
        self.step, self.sampler, self.validation = step, sampler, validation
        self.network, self.loss, self.discriminator = step.network, step.loss, step.discriminator
        self.ema = Ema(step.generator_parameters(), settings.ema_decay)

    @property
    def prior(self) -> Prior:
        """The adapted prior, which the network holds."""
        return self.step.prior

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return what adapts the frozen prior."""
        return self.step.adapter_parameters()

    def losses(
        self, x0: Tensor, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what ``DistillationStep`` makes of clean images x0, and where it is logged the terms' gradients."""
        judged = self.steps_done >= self.settings.discriminator_warmup
        return self.step(x0, streams, judged, measured=logged)

    def on_train_start(self) -> None:
        """Check that the rates fall to 0 where the run ends.

        Raises:
            ValueError: when the trainer plans another number of steps.
        """
        super().on_train_start()
        if self.total_steps != self.settings.steps:
            raise ValueError(
                f"the optimizer plans {self.settings.steps} steps, the trainer {self.total_steps}; set steps and "
                "validate_every, and leave trainer.max_epochs and data.samples_per_epoch to follow from them"
            )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for psi, adapter and a learned warm start at their rates, and a second one for a discriminator.

        D decays with torch's 0.01 (a factor 1 - 0.01 lr per step), the generator as the settings say.
        """
        settings = self.settings
        adapter = self.adapter_parameters()
        start = [p for p in self.network.warm_start.parameters() if p.requires_grad]
        others = {id(p) for p in [*adapter, *start]}
        psi = [p for p in self.step.generator_parameters() if id(p) not in others]
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
