"""Fréchet distance between two sets of images in the features of a named backbone."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ud2m.metrics import LPIPSDistance


class BackboneFeatures(nn.Module):
    """The last feature map of an LPIPS backbone, averaged over locations: [B, C, H, W] in [0, 1] -> [B, F]."""

    def __init__(self, net: str, weights: str | Path | None = None):
        super().__init__()
        self.distance = LPIPSDistance(net, weights)
        self.num_features = self(torch.zeros(1, 3, 64, 64)).shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features; grey images are repeated."""
        network = self.distance.network
        maps = network.net(network.scaling_layer(2 * images.expand(-1, 3, -1, -1) - 1))
        return maps[-1].mean((2, 3))


class FrechetDistance:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) between the features of samples and of references.

    The formula of FID (Heusel et al., 2017; torchmetrics' code) with the features of an LPIPS backbone in place
    of Inception's, so that its numbers compare with each other and with no published FID. Like FID it is biased upwards
    where images are few; the bias is the same for all methods that are judged on the same images.

    Args:
        net: ``alex`` (256 features), ``vgg`` or ``squeeze`` (512). weights: as for ``LPIPSDistance``.

    Raises:
        FileNotFoundError: when the weights of the backbone can be neither found nor downloaded.
    """

    def __init__(self, net: str = "alex", weights: str | Path | None = None):
        self.features = BackboneFeatures(net, weights)
        self.metric = FrechetInceptionDistance(self.features, normalize=True)
        self.count = 0

    @property
    def name(self) -> str:
        """What to write beside a value."""
        return f"{self.features.distance.name}, last features"

    def check(self, count: int) -> None:
        """Raise ValueError unless ``count`` references determine a covariance: more of them than features."""
        if count <= self.features.num_features:
            raise ValueError(
                f"a Fréchet distance in {self.features.num_features} features needs more references than that, got "
                f"{count}; take more images or smaller pieces"
            )

    def add(self, samples: Tensor, x0: Tensor) -> None:
        """Take samples [B, S, C, H, W] and their references [B, C, H, W]."""
        self.count += len(x0)
        self.metric.update(samples.flatten(0, 1), real=False)
        self.metric.update(x0, real=True)

    def value(self) -> float:
        """Return the distance.

        Raises:
            ValueError: as ``check``.
        """
        self.check(self.count)
        return self.metric.compute().item()
