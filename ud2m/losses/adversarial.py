"""The discriminator, its own loss, and the generator's term that is judged by it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, softplus

from ud2m.losses.terms import Features, LossTerm, Prediction, _check_weight, _finite, _full
from ud2m.precision import full_precision

REFERENCE_SIDE = 256
"""Side of the images, in pixels, for which the weight of the gradient penalty is given."""


class Discriminator(nn.Module):
    """Map an image and its condition (y at image size) to a patch map of raw logits, D(x, condition).

    A 3x3 stem of the first width, then one convolution per further width: 4x4 with stride 2 where the width
    rises, 3x3 with stride 1 where it does not, so that ``(32, 64, 128, 256, 128, 64)``, the widths of the
    UD2M authors' code, halves the image three times. No sigmoid: the loss takes logits (a second sigmoid
    would keep it above 0.69). No batch norm: the gradient penalty is a statement about single samples. SiLU
    is smooth, as the penalty differentiates twice.

    Args:
        channels: C of the images.
        condition_channels: those of the condition, C unless given.
        widths: channels of the hidden layers.

    Raises:
        ValueError: when a number of channels or a width is below 1 or no width is given.
    """

    def __init__(
        self, channels: int, widths: Sequence[int] = (32, 64, 128, 256), condition_channels: int | None = None
    ):
        super().__init__()
        condition_channels = channels if condition_channels is None else condition_channels
        if not widths or min(channels, condition_channels, *widths) < 1:
            raise ValueError(
                "the discriminator needs at least one width, and widths and channels of at least 1; "
                f"got widths={list(widths)}, channels={channels}, condition_channels={condition_channels}"
            )
        self.channels, self.condition_channels = channels, condition_channels
        self.min_size = 2 ** sum(after > before for before, after in pairwise(widths))
        inputs = channels + condition_channels
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1), nn.SiLU()]
        for before, after in pairwise(widths):
            kernel, stride = (4, 2) if after > before else (3, 1)
            layers += [nn.Conv2d(before, after, kernel, stride, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return logits [B, 1, h, w] (above 0: real) for images and conditions of one size, about [0, 1].

        Raises:
            ValueError: when channels or sizes do not fit, or the image is smaller than the total stride.
        """
        if (x.shape[1], condition.shape[1]) != (self.channels, self.condition_channels):
            raise ValueError(
                f"the discriminator takes {self.channels} channels of the image and "
                f"{self.condition_channels} of the condition, got {x.shape[1]} and {condition.shape[1]}"
            )
        if x.shape[2:] != condition.shape[2:] or min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f"image and condition must have one size of at least {self.min_size}x{self.min_size}, got "
                f"{tuple(x.shape[2:])} and {tuple(condition.shape[2:])}; use larger crops or fewer widths"
            )
        # Centred inputs: without normalisation layers a mean of 0.5 would reach every layer.
        return self.layers(2 * torch.cat([x, condition], dim=1) - 1)


class FeatureDiscriminator(nn.Module):
    """Map an image and its condition to raw logits by small heads on the features f_l of a frozen network.

    Projected GANs (Sauer et al., 2021, arXiv 2111.01007) with the prior's encoder as the frozen network, which knows
    the textures of clean images from the first step: D has the heads alone to learn. Per resolution l the vector
    [f_l(x), f_l(condition)] of every location is divided by its root mean square and goes through a 1x1 convolution, a
    3x3 one and a 1x1 one to a logit, with SiLU between them. Samples do not see each other, and D is smooth, as
    ``Discriminator``.

    Args:
        channels: C of the images and of the condition.
        features: images [B, C, H, W] in [0, 1] -> list of feature maps [B, c_l, h_l, w_l].
        width: channels of the heads.

    Raises:
        ValueError: when a number of channels or the width is below 1.
    """

    def __init__(self, channels: int, features: Features, width: int = 32):
        super().__init__()
        if min(channels, width) < 1:
            raise ValueError(f"channels and width must be at least 1, got channels={channels}, width={width}")
        self.channels, self.features = channels, features
        with torch.no_grad():
            maps = features(torch.zeros(1, channels, 64, 64))
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * found.shape[1], width, 1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, 1, 1),
            )
            for found in maps
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return logits [B, n] (above 0: real), one per location of every resolution, for images of one size in [0, 1].

        Raises:
            ValueError: when channels or sizes do not fit.
        """
        if x.shape[1] != self.channels or x.shape != condition.shape:
            raise ValueError(
                f"image and condition must have one size and {self.channels} channels, got {tuple(x.shape)} and "
                f"{tuple(condition.shape)}; discriminator=small takes others"
            )
        logits = []
        for head, of_x, of_condition in zip(self.heads, self.features(x), self.features(condition), strict=True):
            joint = torch.cat([_full(of_x), _full(of_condition)], dim=1)
            logits.append(head(joint.shape[1] ** 0.5 * normalize(joint, dim=1, eps=1e-4)).flatten(1))
        return torch.cat(logits, dim=1)


class Adversarial(LossTerm):
    """Non-saturating logistic loss of the generator, softplus(-D(L, condition)) (Goodfellow et al., 2014).

    D returns logits. Its parameters enter as constants: this term leaves no gradient in them. D is evaluated in float32
    whatever the rest is in: outputs differ from images by about sigma_y, which bfloat16 rounds away.

    Args:
        discriminator: (images, condition) -> logits of any shape [N, ...].
    """

    discriminator: nn.Module

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        # Not registered: it belongs to the training module, whose optimiser and checkpoint must meet it once.
        self.__dict__["discriminator"] = discriminator

    def forward(self, prediction: Prediction) -> Tensor:
        """Return the mean over samples, outputs and logits."""
        constants = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        images = (prediction.flat_outputs, prediction.repeat(prediction.condition))
        with full_precision(prediction.x0.device):
            return softplus(-torch.func.functional_call(self.discriminator, constants, images)).mean()


class DiscriminatorLoss(nn.Module):
    """Logistic loss of the discriminator with a zero-centred gradient penalty at interpolates.

    softplus(-D(x0, y)) + softplus(D(L, y)) + w_gs |grad_x D(u x0 + (1 - u) L, y)|^2, u ~ U(0, 1) per sample.
    D returns logits: the first two terms are log 4 for an undecided D and fall to 0 for a perfect one. The
    outputs are detached, and D is evaluated in float32 (see ``Adversarial``). The square is that of
    ``gradient_square``, whose size does not depend on that of the crops; of the M exchangeable outputs only the first
    is interpolated: two derivatives cost.

    Args:
        gradient_penalty: w_gs >= 0, the number of the paper at any size; with 0 the penalty is not computed.
    """

    def __init__(self, gradient_penalty: float = 10.0):
        super().__init__()
        _check_weight("gradient_penalty", gradient_penalty)
        self.gradient_penalty = float(gradient_penalty)

    def forward(
        self,
        discriminator: Callable[[Tensor, Tensor], Tensor],
        prediction: Prediction,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and its unweighted parts ``discriminator`` and ``gradient_penalty`` (detached).

        Beside them ``accuracy/real`` and ``accuracy/generated``: shares of logits on the right side of 0.

        Args:
            discriminator: (images, condition) -> logits.
            prediction: the generator's, still with its graph.
            generator: of u, one for all or one per sample.

        Raises:
            NonFiniteLossError: naming the part that is not finite.
        """
        real, fake = prediction.x0, prediction.flat_outputs.detach()
        with full_precision(real.device):
            of_real = discriminator(real, prediction.condition)
            of_fake = discriminator(fake, prediction.repeat(prediction.condition))
        values = {"discriminator": _finite("discriminator", softplus(-of_real).mean() + softplus(of_fake).mean())}
        total = values["discriminator"]
        if self.gradient_penalty > 0:
            u = _uniform(real, generator)
            mixed = torch.lerp(prediction.outputs[:, 0].detach(), real, u)
            penalty = gradient_square(discriminator, mixed, prediction.condition).mean()
            values["gradient_penalty"] = _finite("gradient_penalty", penalty)
            total = total + self.gradient_penalty * penalty
        right = {"real": of_real > 0, "generated": of_fake < 0}
        accuracies = {f"accuracy/{kind}": share.float().mean() for kind, share in right.items()}
        return total, {name: value.detach() for name, value in values.items()} | accuracies


def gradient_square(discriminator: Callable[[Tensor, Tensor], Tensor], x: Tensor, condition: Tensor) -> Tensor:
    """Return |grad_x D(x, condition)|^2 per sample [B], for x in [-1, 1] and of 256x256 pixels; differentiable in D.

    D is averaged over its logits and the square summed over C, H, W. The same D then has a square that falls as
    1 / (H W), since the average has more terms. So it is multiplied by H W / 256^2, and by 1/4 since images here lie in
    [0, 1]: a weight means what it means for the priors of 256x256 pixels that [UD2M] trains.

    In full precision whatever the rest is in: this gradient is not scaled, and vanishes in float16. Attention in D is
    that of plain products: torch's fused kernels cannot be differentiated twice.
    """
    x = x.detach().requires_grad_()
    with full_precision(x.device), sdpa_kernel(SDPBackend.MATH):
        logits = discriminator(x, condition).reshape(len(x), -1).mean(1)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1) * x.shape[2] * x.shape[3] / REFERENCE_SIDE**2 / 4


def _uniform(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Return u ~ U(0, 1) as [B, 1, 1, 1], one number per sample of x."""
    if generator is None or isinstance(generator, torch.Generator):
        u = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
    else:
        u = torch.cat([torch.rand(1, generator=g, device=x.device, dtype=x.dtype) for g in generator])
    return u.view(-1, 1, 1, 1)
