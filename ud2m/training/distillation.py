"""Lightning module: unfold a frozen prior and distil it into a few-step posterior sampler."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from ud2m.evaluation import Evaluation, Problem, lpips_if_available
from ud2m.losses import DiscriminatorLoss, GeneratorLoss, NonFiniteLossError, Prediction
from ud2m.noise import rand, randn_like
from ud2m.physics import OperatorFamily, observe, select_samples
from ud2m.pipeline import PosteriorSampler, SamplerConfig
from ud2m.prior import LoraSpec, Prior
from ud2m.training.ema import Ema
from ud2m.training.images import contact_sheet, log_images
from ud2m.training.levels import Levels
from ud2m.training.random_streams import row_streams
from ud2m.training.schedules import warmup_cosine
from ud2m.unfolded import NOTHING_KNOWN, build_network


class DistillationModule(L.LightningModule):
    """Conditional consistency distillation [UD2M, section 3.3] with the energy score beside the paper's losses.

    For x0 from the data, y = A x0 + sigma_y w and x_sigma = x0 + sigma eps, the outputs L(x_sigma, y) are pulled to x0
    by the weighted terms of ``loss``. One unfolded forward pass serves the generator's and the discriminator's update;
    the discriminator sees it detached. Every random number of row j of the data stream is a function of (seed, j), so
    that accumulation, ranks and interruptions change nothing but the order of sums.

    Args:
        prior: reference of the frozen prior. lora: keyword arguments of ``LoraSpec``, what of it is adapted.
        network: plain description for ``build_network``.
        operator: family that the physics are drawn from. sigma_y: noise level of the observations, image units.
        levels: draws sigma per sample.
        loss: builds the generator's loss from ``features`` and ``discriminator`` (``build_generator_loss``).
        discriminator: builds D from ``channels``; called only when the adversarial term has a weight.
        discriminator_loss: the loss of D.
        optimizer: ``lr`` of the adapter, ``lr_psi``, ``lr_discriminator``, ``warmup`` and ``steps`` of the schedule,
            ``accumulate`` batches per step, ``clip`` (largest gradient norm), ``ema_decay``.
        sampling: N (``num_steps``) and ``eta`` of the sampler that validates and is exported.
        validation: ``num_samples`` and ``metric``, the score of the sampler that selects the best checkpoint
            (a key of ``metrics.json``; a leading minus where lower is better).
        info: plain values that the export keeps, such as the configuration of the operator.
        seed: of all randomness.

    Raises:
        ValueError: for numbers out of range; errors of the parts.
    """

    automatic_optimization = False

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
        seed: int = 0,
    ):
        super().__init__()
        if not sigma_y > 0:
            raise ValueError(f"sigma_y must be a positive noise level in image units, got {sigma_y}")
        if optimizer["accumulate"] < 1:
            raise ValueError(f"accumulate must be at least 1 batch per step, got {optimizer['accumulate']}")
        self.prior = Prior.from_pretrained(prior).add_lora(LoraSpec(**lora))
        self.network = build_network(self.prior, network)
        self.operator, self.sigma_y, self.levels = operator, float(sigma_y), levels
        self.loss = loss(
            features=self.prior.features, discriminator=lambda: discriminator(channels=self.prior.channels)
        )
        self.discriminator = self.loss.discriminator
        self.discriminator_loss = discriminator_loss
        self.optimizer_settings = dict(optimizer)
        self.ema = Ema(self.generator_parameters(), optimizer["ema_decay"])
        config = SamplerConfig(**sampling, sigma_y=self.sigma_y, info=dict(info or {}))
        self.sampler = PosteriorSampler(self.network, self.prior, config)
        self.problem = Problem(operator, self.sigma_y, seed)
        self.validation = dict(validation)
        self.seed = seed

    def generator_parameters(self) -> list[nn.Parameter]:
        """Return psi and the adapter (and a learned warm start), each once."""
        return [p for p in self.network.parameters() if p.requires_grad]

    # --- one step ------------------------------------------------------------------------------------------------

    def training_step(self, x0: Tensor, batch_idx: int) -> None:
        """Back-propagate both losses of one batch x0 [B, C, H, W] in [0, 1]; step when enough are accumulated."""
        streams = self.streams(len(x0), batch_idx)
        prediction = self.predict(x0, streams)
        settings = self.optimizer_settings
        try:
            total, values = self.loss(prediction)
            self.manual_backward(total / settings["accumulate"])
            if self.discriminator is not None:
                total_d, values_d = self.discriminator_loss(self.discriminator, prediction, streams)
                self.manual_backward(total_d / settings["accumulate"])
                values |= values_d
        except NonFiniteLossError as error:
            raise FloatingPointError(
                f"training stopped at step {self.steps_done(batch_idx)}: {error}. The last good checkpoint is kept; "
                "lower the learning rate or the weight of this term, or clip harder, and resume"
            ) from error
        self.log_dict({f"loss/{k}": v for k, v in values.items()}, batch_size=len(x0))
        self.log("loss", total.detach(), prog_bar=True, logger=False)
        if (batch_idx + 1) % settings["accumulate"] == 0:
            self.update()

    def streams(self, batch_size: int, batch_idx: int) -> list[torch.Generator]:
        """Return the random streams of the rows of this rank's batch (rows are dealt to the ranks in turn)."""
        batches = self.trainer.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        world, rank = self.trainer.world_size, self.trainer.global_rank
        positions = [(batches * batch_size + row) * world + rank for row in range(batch_size)]
        return row_streams(self.device, positions, self.seed, "distillation")

    def steps_done(self, batch_idx: int) -> int:
        """Return the optimiser steps before this batch."""
        batches = self.trainer.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        return batches // self.optimizer_settings["accumulate"]

    def predict(self, x0: Tensor, streams: list[torch.Generator]) -> Prediction:
        """Observe x0, noise it, and run the unfolded network M times with independent inner noise, as one batch."""
        batch, outputs = len(x0), self.loss.num_outputs
        physics = self.operator.draw(batch, tuple(x0.shape[1:]), streams, self.device)
        sigma_y = x0.new_full((batch,), self.sigma_y)
        y = observe(physics, x0, sigma_y, streams)
        sigma = self.levels(rand((batch, 2), streams, self.device), self.prior.schedule)
        x_sigma = x0 + sigma.view(-1, 1, 1, 1) * randn_like(x0, streams)
        rows = torch.arange(batch, device=self.device).repeat_interleave(outputs)
        samples = self.network(
            x_sigma[rows],
            sigma[rows],
            y[rows],
            select_samples(physics, rows),
            sigma_y[rows],
            [generator for generator in streams for _ in range(outputs)],
        )
        # Differs from the paper, where D sees A^dagger y: for a blur that is mostly amplified noise.
        condition = x0 if self.discriminator is None else self.condition(y, physics, sigma_y, x0)
        return Prediction(x0, samples.unflatten(0, (batch, outputs)), sigma, condition)

    @torch.no_grad()
    def condition(self, y: Tensor, physics: LinearPhysics, sigma_y: Tensor, x0: Tensor) -> Tensor:
        """Return the warm start from y alone [B, C, H, W], which brings y to image size for the discriminator."""
        unknown = torch.full_like(sigma_y, NOTHING_KNOWN)
        return self.network.warm_start(torch.full_like(x0, 0.5), unknown, y, physics, sigma_y)

    def update(self) -> None:
        """Clip, step both optimisers and their schedules, and move the average."""
        optimizers, schedulers = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        for name, optimizer, scheduler in zip(("generator", "discriminator"), optimizers, schedulers, strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.optimizer_settings["clip"])
            self.log(f"grad_norm/{name}", norm)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        self.ema.update()

    def configure_optimizers(self) -> Any:
        """AdamW for adapter and psi (own rate), and a second one for the discriminator when there is one."""
        settings = self.optimizer_settings
        adapter = [p for p in self.prior.parameters() if p.requires_grad]
        psi = [p for name, p in self.network.named_parameters() if not name.startswith("denoiser.")]
        groups = [{"params": psi, "lr": settings["lr_psi"], "weight_decay": 0.0}]
        if adapter:
            groups.append({"params": adapter, "lr": settings["lr"]})
        optimizers = [torch.optim.AdamW(groups, weight_decay=settings["weight_decay"])]
        if self.discriminator is not None:
            optimizers.append(
                torch.optim.AdamW(self.discriminator.parameters(), lr=settings["lr_discriminator"], betas=(0.5, 0.99))
            )
        return optimizers, [warmup_cosine(o, settings["warmup"], settings["steps"]) for o in optimizers]

    # --- validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start a score of the sampler itself."""
        self.evaluation = self.new_evaluation()

    def validation_step(self, x0: Tensor, batch_idx: int) -> None:
        """Draw samples for clean images x0 with the averaged parameters, score them and show the first ones."""
        with self.ema.applied():
            y, samples = self.evaluation.add(x0)
        if batch_idx == 0 and self.trainer.is_global_zero:
            sheet = contact_sheet(x0[:4], y[:4], samples[:4])
            log_images(
                self.loggers, Path(self.trainer.default_root_dir) / "images", {"validation": sheet}, self.validated_step
            )

    def on_validation_epoch_end(self) -> None:
        """Log the sampler's scores, and as ``val/score`` the one that selects the best checkpoint."""
        row = self.evaluation.row()
        self.log_dict({f"val/{k}": v for k, v in row.items() if isinstance(v, float)})
        self.log("val/score", self.selected(row))
        self.log("val_psnr", row["psnr"], prog_bar=True, logger=False)
        self.log_dict({f"psi/{k}": v for k, v in self.network.psi().items()})

    @property
    def validated_step(self) -> int:
        """Optimiser steps done when validation runs, at the end of an epoch."""
        return self.steps_done(int(self.trainer.num_training_batches) - 1) + 1

    def new_evaluation(self) -> Evaluation:
        """Return an empty evaluation of the sampler, with LPIPS where its weights are at hand."""
        distances = lpips_if_available(self.validation["lpips"])
        return Evaluation(self.sampler, self.problem, self.validation["num_samples"], distances)

    def selected(self, row: Mapping[str, Any]) -> float:
        """Return the selecting score of a row, higher is better."""
        metric = self.validation["metric"]
        value = row.get(metric.lstrip("-"))
        if value is None:
            raise ValueError(
                f"validation.metric is {metric!r}, but the sampler's scores are {', '.join(row)}; choose one of them"
                " (lpips needs its weights, r at least two samples)"
            )
        return -value if metric.startswith("-") else value

    # --- results -------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Write the model with averaged parameters as a folder that ``PosteriorSampler.from_pretrained`` loads."""
        with self.ema.applied():
            self.sampler.save_pretrained(folder, overwrite=True)

    def evaluate(self, data: L.LightningDataModule) -> list[dict]:
        """Return one row with the scores of the averaged sampler on the validation images (never the test images)."""
        evaluation = self.new_evaluation()
        with self.ema.applied():
            for x0 in data.val_dataloader():
                evaluation.add(x0.to(self.device))
        row = evaluation.row()
        name = f"UD2M (K={self.network.num_blocks}, N={self.sampler.config.num_steps})"
        return [{"method": name, "nfe": self.sampler.nfe()} | row | {"score": self.selected(row)}]

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the trained parameters, their averages and the discriminator; not the frozen prior."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if k in trained or k.startswith("ema.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` returned; every name must match."""
        odd = sorted(state_dict.keys() ^ self.state_dict().keys())
        if odd:
            raise ValueError(f"this checkpoint is of another model: unmatched parameters {odd[:4]}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which prior the parameters belong to."""
        checkpoint["prior_fingerprint"] = self.prior.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another prior."""
        found = checkpoint.get("prior_fingerprint", "none")
        if found != self.prior.fingerprint:
            raise ValueError(
                f"this checkpoint was trained on a prior with fingerprint {found[:12]}, the prior here has "
                f"{self.prior.fingerprint[:12]}; resume with the same prior"
            )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
