"""One step of distillation: what is computed for a batch of clean images, without optimisers or a trainer."""

from typing import cast

import torch
from torch import Tensor, nn

from ud2m.losses.adversarial import DiscriminatorLoss
from ud2m.losses.generator import GeneratorLoss
from ud2m.losses.terms import Prediction
from ud2m.physics import Observation, Problem
from ud2m.precision import full_precision
from ud2m.priors.prior import Prior
from ud2m.random import rand, randn_like
from ud2m.training.levels import Levels
from ud2m.unfolded.network import UnfoldedNetwork
from ud2m.unfolded.warm_start import start_from_y


class DistillationStep:
    """Conditional consistency distillation [UD2M, section 3.3] with the energy score beside the paper's losses.

    For x0 from the data, y = A x0 + sigma_y w and x_sigma = x0 + sigma eps, the outputs L(x_sigma, y) are pulled to x0
    by the weighted terms of ``loss``. One unfolded forward pass serves the generator's and the discriminator's update;
    the discriminator sees it detached.

    Args:
        network: L, whose denoiser is the prior with its adapter.
        problem: draws operators, noise levels and noise.
        levels: draws sigma per sample.
        loss: of the generator.
        discriminator_loss: of the discriminator, where a term of ``loss`` has one.
    """

    def __init__(
        self,
        network: UnfoldedNetwork,
        problem: Problem,
        levels: Levels,
        loss: GeneratorLoss,
        discriminator_loss: DiscriminatorLoss,
    ):
        self.network, self.problem, self.levels = network, problem, levels
        self.loss, self.discriminator_loss = loss, discriminator_loss

    @property
    def prior(self) -> Prior:
        """The adapted prior, which the network holds."""
        return cast(Prior, self.network.denoiser)

    @property
    def discriminator(self) -> nn.Module | None:
        """D, or None without an adversarial term."""
        return self.loss.discriminator

    @property
    def modules(self) -> nn.ModuleList:
        """All that has weights."""
        return nn.ModuleList([self.network, self.loss, *([] if self.discriminator is None else [self.discriminator])])

    def generator_parameters(self) -> list[nn.Parameter]:
        """Return psi and the adapter (and a learned warm start), each once."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return the LoRA factors and the copy of the output convolution."""
        return [p for p in self.prior.parameters() if p.requires_grad]

    def __call__(
        self, x0: Tensor, streams: list[torch.Generator], judged: bool = True, measured: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the generator's and the discriminator's losses, and their terms (detached) by name.

        One backward pass serves both: D's parameters are constants of the generator's loss and the outputs are
        constants of D's, so that neither leaves a gradient with the other.

        Args:
            x0: clean images [B, C, H, W] in [0, 1].
            streams: sources of randomness, one for each image.
            judged: False: D learns, and the generator does not feel it.
            measured: also return ``gradient/NAME``, what each weighted term asks of the outputs.

        Raises:
            ValueError: as ``predict``.
            NonFiniteLossError: naming the term.
        """
        prediction = self.predict(x0, streams)
        total, terms = self.loss(prediction, judged, measured)
        values = {"total": total.detach()} | terms
        if self.discriminator is None:
            return total, values
        total_d, terms_d = self.discriminator_loss(self.discriminator, prediction, streams)
        return total + total_d, values | terms_d

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
        with full_precision(x0.device):  # the networks alone see less than float32
            observation = self.problem.draw(x0, self.draw_sigma_y(batch, streams).to(x0), streams)
            sigma = self.levels(rand((batch, 2), streams, x0.device), self.prior.schedule)
            x_sigma = x0 + sigma.view(-1, 1, 1, 1) * randn_like(x0, streams)
        start = self.network.warm_start(x_sigma, sigma, observation)
        rows = torch.arange(batch, device=x0.device).repeat_interleave(outputs)
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
