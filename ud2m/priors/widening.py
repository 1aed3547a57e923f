"""Networks with f times the channels of a trained one that compute the same function (Net2WiderNet, Chen et al., 2016).

Every channel c of the trained network becomes the f neighbours f c, ..., f c + f - 1, whose values are equal. Groups
of a group normalisation then hold the same values f times, so its means and variances stay; a layer that reads the
channels shares its weight w among the f copies, with random shares that sum to 1: w = sum_j s_j w. Unequal shares give
the copies unequal gradients, else they would stay equal in all of training.
"""

import torch
from diffusers import UNet2DModel
from torch import Tensor

SPREAD = 0.5
"""Standard deviation of the shares, in units of their mean 1 / f."""


def widen(network: UNet2DModel, trained: UNet2DModel, seed: int = 0) -> None:
    """Give ``network`` weights with which it computes what ``trained`` computes.

    Args:
        network: of the architecture of ``trained``, with f times its ``block_out_channels``, f a whole number.
        trained: the weights to begin with.
        seed: of the shares.

    Raises:
        ValueError: when the architectures differ in more than this, or the copy does not compute the same.
    """
    factor = max(1, network.config.block_out_channels[0] // trained.config.block_out_channels[0])
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: weight.shape for name, weight in network.state_dict().items()}
    weights = {
        name: _widened(name, weight, shapes.get(name, weight.shape), factor, generator)
        for name, weight in trained.state_dict().items()
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()[:160]
        raise ValueError(f"its architecture is another one, and not one of fewer channels ({reason})") from error
    _check_equal(network, trained, generator)


def _widened(name: str, weight: Tensor, shape: torch.Size, factor: int, generator: torch.Generator) -> Tensor:
    """Return ``weight`` with ``factor`` times the rows and columns where ``shape`` has more of them."""
    whole_heads = any(part in name for part in (".to_q.", ".to_k.", ".to_v."))
    if weight.shape[0] != shape[0]:
        # The channels of one attention head stay together: copies are whole heads, else q^T k would be f times larger.
        weight = torch.cat([weight] * factor) if whole_heads else weight.repeat_interleave(factor, 0)
    if weight.ndim == 1 or weight.shape[1] == shape[1]:
        return weight
    if name == "time_embedding.linear_1.weight":
        # Sines and cosines of more frequencies: every f-th is an old one, the others are not read yet.
        wide = weight.new_zeros(len(weight), factor * weight.shape[1])
        wide[:, ::factor] = weight
        return wide
    shares = SPREAD * torch.randn((factor, *weight.shape), generator=generator)
    shares = (1 + shares - shares.mean(0)) / factor
    copies = (shares * weight).unbind(0)
    return torch.cat(copies, 1) if ".to_out." in name else torch.stack(copies, 2).flatten(1, 2)


@torch.no_grad()
def _check_equal(network: UNet2DModel, trained: UNet2DModel, generator: torch.Generator) -> None:
    """Compare both networks at one input."""
    size = 2 ** (len(trained.config.block_out_channels) - 1) * 2
    x = torch.randn(1, trained.config.in_channels, size, size, generator=generator)
    expected, found = (net(x, torch.tensor([10.0])).sample for net in (trained, network))
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise ValueError(
            f"its wider copy computes something else (largest difference {(found - expected).abs().max():.2g}); widen "
            "a network of diffusers' UNet2DModel with attention_head_dim and norm_num_groups unchanged"
        )
