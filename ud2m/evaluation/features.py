"""Networks that judge images, with their weights from where they are: LPIPS, DISTS, and features of sets."""

import copy
import socket
import warnings
from functools import cache
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lpips
import torch
from torch import Tensor, nn
from torchmetrics.functional.image.dists import DISTSNetwork

from ud2m.evaluation.metrics import check_shapes
from ud2m.files import read_tensors
from ud2m.precision import full_precision
from ud2m.random import global_draws

# torchvision's ImageNet weights of each LPIPS backbone, and the smallest side its pooling layers can take.
BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "vgg": ("vgg16-397923af.pth", 16),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
}


INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
NETS = (*BACKBONES, INCEPTION)
URLS = {net: f"https://download.pytorch.org/models/{file}" for net, (file, _) in BACKBONES.items()}
URLS[INCEPTION] = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
"""Where the weights of each network are published."""
CONNECT_SECONDS = 10.0


class LPIPSDistance(nn.Module):
    """LPIPS 0.1 (Zhang et al., 2018) of the lpips package, with the backbone weights loaded from where they are.

    sum_l mean over locations of w_l . (f_l(x) / |f_l(x)| - f_l(r) / |f_l(r)|)^2, f_l the layers of an ImageNet
    backbone. Frozen and always in eval mode; differentiable in the images.

    Args:
        net: ``alex`` (31 pixels a side or more), ``vgg`` (16) or ``squeeze`` (17).
        weights: file with torchvision's weights of the backbone. By default the torch cache is used
            (``$TORCH_HOME/hub/checkpoints``); a file that is not there is downloaded.

    Raises:
        ValueError: for an unknown net, or a file that does not hold its weights.
        FileNotFoundError: when the weights can be neither found nor downloaded; says where to put which file.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None):
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"unknown LPIPS net {net!r}; allowed: {', '.join(BACKBONES)}")
        self.net, self.smallest = net, BACKBONES[net][1]
        with warnings.catch_warnings(), global_draws():
            warnings.simplefilter("ignore")  # its advice and its draws stay in here
            # with a random backbone: the package itself would download one
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
        if torch.get_default_device().type == "meta":  # shapes without values
            return
        path = cached(net) if weights is None else Path(weights)
        if weights is not None and not path.is_file():
            raise FileNotFoundError(_missing(net, path))
        state = _read(path) if path.is_file() else _download(net, path)
        # The package cuts torchvision's features into slices: slice2.3.weight there is features.3.weight here.
        names = {name: "features." + name.split(".", 1)[1] for name in self.network.net.state_dict()}
        try:
            self.network.net.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold torchvision's weights of the LPIPS net {net}: {error}") from error

    @property
    def name(self) -> str:
        """What to write beside a value: net, package and version."""
        return f"{self.net}, lpips {version('lpips')}"

    def train(self, mode: bool = True) -> "LPIPSDistance":
        """Stay in eval mode whatever is asked for: the linear layers of the package hold dropout."""
        return super().train(False)

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """Return the distance [B] of images [B, 1 or 3, H, W] in [0, 1] to their references; grey is repeated.

        Never computed under autocast: features of bfloat16 make another distance.

        Raises:
            ValueError: when shapes differ, channels are not 1 or 3, or the image is too small for the net.
        """
        check_shapes(x, reference)
        if x.shape[1] not in (1, 3) or min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"LPIPS ({self.net}) takes grey or RGB images of at least {self.smallest} pixels a side, got "
                f"{list(x.shape)}; the distance of the prior's features (loss/distance=prior) takes others"
            )
        with full_precision(x.device):
            return self.network(_coloured(x), _coloured(reference), normalize=True).flatten()


def lpips_distance(net: str) -> LPIPSDistance:
    """Return a distance of one's own, to be moved at will; building the network takes seconds, and is done once."""
    return copy.deepcopy(_built_lpips(net, torch.hub.get_dir()))


@cache
def _built_lpips(net: str, folder: str) -> LPIPSDistance:
    return LPIPSDistance(net)


class DISTSDistance(nn.Module):
    """DISTS (Ding et al., IEEE TPAMI 2020) of torchmetrics, on VGG-16 from the torch cache; 0 for equal images.

    1 - sum over layers and channels of alpha l + beta s, with l the similarity of the means of both feature maps and s
    that of their structure: unlike LPIPS it forgives textures that differ pixel by pixel.

    Raises:
        FileNotFoundError: when the weights of VGG-16 are not in the torch cache.
    """

    smallest = 16

    def __init__(self) -> None:
        super().__init__()
        check_weights("vgg")
        with global_draws():  # its draws stay in here
            self.network = DISTSNetwork().eval().requires_grad_(False)
        self.name = f"vgg, torchmetrics {version('torchmetrics')}"

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """Return the distance [B] of images [B, 1 or 3, H, W] in [0, 1] to their references; grey is repeated.

        Raises:
            ValueError: when shapes differ.
        """
        check_shapes(x, reference)
        with full_precision(x.device):
            return self.network(_coloured(x), _coloured(reference)).reshape(len(x))


def cached(net: str) -> Path:
    """Return where the torch cache keeps the weights of one of ``NETS`` (``TORCH_HOME`` chooses the folder)."""
    return Path(torch.hub.get_dir(), "checkpoints", URLS[net].rpartition("/")[2])


def check_weights(net: str) -> None:
    """Raise FileNotFoundError when the weights are not in the torch cache, ValueError without their package."""
    if net == INCEPTION:
        _fidelity_version()
    if not cached(net).is_file():
        raise FileNotFoundError(_missing(net, cached(net)))


def _missing(net: str, path: Path, why: str = "") -> str:
    return (
        f"the weights of {net} are missing: those of {path} do not exist{why}; put {cached(net).name} there, or "
        f"{URLS[net]} into {cached(net).parent} (TORCH_HOME chooses the folder)"
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"cannot read LPIPS weights from {path}: damaged or not a torch file; replace it") from error


def _download(net: str, path: Path) -> dict[str, Tensor]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch.hub sets no limit, and would hang behind some firewalls
    try:
        return torch.hub.load_state_dict_from_url(URLS[net], map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise FileNotFoundError(_missing(net, path, f" and cannot be downloaded ({error})")) from error
    finally:
        socket.setdefaulttimeout(before)


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


class LPIPSFeatures(nn.Module):
    """All feature maps that LPIPS compares: images [B, 1 or 3, H, W] in [0, 1] -> list of [B, c_l, h_l, w_l].

    As terms of a loss they are computed in the training's precision: bfloat16 takes 0.6 of the time, and errs alike in
    all that is compared.

    Args:
        net: see ``LPIPSDistance``, as are the errors.
        weights: see there.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None):
        super().__init__()
        self.distance = LPIPSDistance(net, weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps, fine to coarse; grey images are repeated."""
        network = self.distance.network
        return list(network.net(network.scaling_layer(2 * _coloured(images) - 1)))


class BackboneFeatures(nn.Module):
    """The last feature map of an LPIPS backbone, averaged over locations: [B, C, H, W] in [0, 1] -> [B, F]."""

    def __init__(self, net: str):
        super().__init__()
        self.features = LPIPSFeatures(net)
        self.num_features = self(torch.zeros(1, 3, 64, 64)).shape[1]
        self.smallest = self.features.distance.smallest
        self.name = f"{self.features.distance.name}, last features"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features, never computed under autocast; grey images are repeated."""
        with full_precision(images.device):
            return self.features(images)[-1].mean((2, 3))


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of published FID and KID: Inception of 2015, as torch-fidelity has it, on 8-bit colours.

    [B, C, H, W] in [0, 1] -> [B, 2048]. Images of any size are resized to 299 x 299 as the original does.

    Raises:
        FileNotFoundError: when the weights are not in the torch cache.
        ValueError: for a file that does not hold them, or without torch-fidelity.
    """

    num_features = 2048
    smallest = 1

    def __init__(self) -> None:
        super().__init__()
        check_weights(INCEPTION)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = cached(INCEPTION)
        try:
            # torch-fidelity unpickles whatever the file holds: a file with more than tensors is refused before
            read_tensors(path)
            with global_draws():  # its draws stay in here
                self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold the weights of Inception; download it anew") from error
        self.name = f"inception-v3-compat, torch-fidelity {_fidelity_version()}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features; grey images are repeated."""
        pixels = (255 * _coloured(images).clamp(0, 1)).round().to(torch.uint8)
        return self.network(pixels)[0]


def _fidelity_version() -> str:
    try:
        return version("torch-fidelity")
    except PackageNotFoundError as error:
        raise ValueError("features of Inception need torch-fidelity: pip install torch-fidelity") from error
