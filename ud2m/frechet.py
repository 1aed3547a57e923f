"""Features of named networks, and the Fréchet distance between two sets of images in them."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ud2m.metrics import BACKBONES, LPIPSDistance, available_lpips, torch_cache
from ud2m.tensor_file import read_tensors

INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
NETS = (*BACKBONES, INCEPTION)


def build_features(net: str) -> "BackboneFeatures | InceptionFeatures":
    """Return the features called ``net``, one of ``NETS``; raises as their classes do."""
    return InceptionFeatures() if net == INCEPTION else BackboneFeatures(net)


def check_weights(net: str) -> None:
    """Raise FileNotFoundError when the weights are not in the torch cache, ValueError without their package."""
    if net == INCEPTION:
        _fidelity_version()
        file, found = INCEPTION_URL + INCEPTION_FILE, torch_cache(INCEPTION_FILE).is_file()
    else:
        file, found = f"torchvision's {BACKBONES[net][0]}", available_lpips(net)
    if not found:
        raise FileNotFoundError(
            f"the weights of {net} are missing: put {file} into {torch.hub.get_dir()}/checkpoints (TORCH_HOME chooses "
            "the folder)"
        )


class BackboneFeatures(nn.Module):
    """The last feature map of an LPIPS backbone, averaged over locations: [B, C, H, W] in [0, 1] -> [B, F]."""

    def __init__(self, net: str, weights: str | Path | None = None):
        super().__init__()
        self.distance = LPIPSDistance(net, weights)
        self.num_features = self(torch.zeros(1, 3, 64, 64)).shape[1]
        self.smallest = self.distance.smallest
        self.name = f"{self.distance.name}, last features"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features; grey images are repeated."""
        network = self.distance.network
        maps = network.net(network.scaling_layer(2 * images.expand(-1, 3, -1, -1) - 1))
        return maps[-1].mean((2, 3))


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of published FID and KID: Inception of 2015, as torch-fidelity has it, on 8-bit colours.

    [B, C, H, W] in [0, 1] -> [B, 2048]. Images of any size are resized to 299 x 299 as the original does.

    Raises:
        FileNotFoundError: when the weights are not in the torch cache. ValueError: for a file that does not hold them,
            or without torch-fidelity.
    """

    num_features = 2048
    smallest = 1

    def __init__(self) -> None:
        super().__init__()
        check_weights(INCEPTION)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = torch_cache(INCEPTION_FILE)
        try:
            # torch-fidelity unpickles whatever the file holds: a file with more than tensors is refused before
            read_tensors(path)
            with torch.random.fork_rng(devices=[]):  # its draws stay in here
                self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold the weights of Inception; download it anew") from error
        self.name = f"inception-v3-compat, torch-fidelity {_fidelity_version()}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features; grey images are repeated."""
        pixels = (255 * images.expand(-1, 3, -1, -1).clamp(0, 1)).round().to(torch.uint8)
        return self.network(pixels)[0]


def _fidelity_version() -> str:
    try:
        return version("torch-fidelity")
    except PackageNotFoundError as error:
        raise ValueError("features of Inception need torch-fidelity: pip install 'ud2m[fid]'") from error


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
        return self.features.name

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
