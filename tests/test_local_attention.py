"""Attention in large pictures: a neighbourhood for each position, against dense attention with a mask."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from skimage import data

from ud2m.priors import attention
from ud2m.priors.prior import Prior

CHANNELS, HEADS, WINDOW = 8, 2, 8


@pytest.fixture
def layer(monkeypatch):
    """A layer as UNet2DModel makes it, with local attention of a small window."""
    monkeypatch.setattr(attention, "WINDOW", WINDOW)
    torch.manual_seed(0)
    made = Attention(CHANNELS, heads=HEADS, dim_head=4, bias=True, norm_num_groups=2, residual_connection=True)
    made.rescale_output_factor = 1.5
    return attention.attend_locally(torch.nn.Sequential(made))[0]


def near(length):
    """Return bool [length, length]: which positions of an axis each one sees, from the definition."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        first = i // (WINDOW // 2) * (WINDOW // 2) - WINDOW // 4
        first = max(0, min(first, length - WINDOW))
        seen[i, first : first + WINDOW] = True
    return seen


def masked(layer, x):
    """Return dense attention of all positions, where those out of sight have weight 0."""
    (batch, _, height, width), heads = x.shape, layer.heads
    sight = (near(height)[:, None, :, None] & near(width)[None, :, None, :]).reshape(height * width, -1)
    z = F.group_norm(x, 2, layer.group_norm.weight, layer.group_norm.bias, layer.group_norm.eps).flatten(2).mT
    q, k, v = (f(z).view(batch, -1, heads, 4).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v))
    weights = (q @ k.mT / 2).masked_fill(~sight, float("-inf")).softmax(-1)
    out = layer.to_out[0]((weights @ v).transpose(1, 2).reshape(batch, height * width, -1))
    return (out.mT.view_as(x) + x) / layer.rescale_output_factor


@pytest.mark.parametrize("size", [(9, 8), (16, 24), (21, 11), (6, 30)])
def test_beyond_a_window_it_is_dense_attention_with_a_mask(layer, size):
    if min(size) < WINDOW:  # such an axis is seen as a whole
        size = (WINDOW, size[1])
    x = torch.randn(2, CHANNELS, *size)
    torch.testing.assert_close(layer(x), masked(layer, x), rtol=1e-5, atol=1e-5)


def test_an_axis_shorter_than_a_window_is_seen_as_a_whole(layer):
    x = torch.randn(1, CHANNELS, 3, 4 * WINDOW)
    changed = x.clone()
    changed[..., 0, 0] += 1
    x, changed = (z - z.mean((2, 3), keepdim=True) for z in (x, changed))
    assert (layer(x) - layer(changed))[0, :, 2, 0].abs().max() > 0
    assert torch.equal(layer(x), layer(x))


def test_up_to_a_window_it_is_diffusers_own(layer):
    x = torch.randn(2, CHANNELS, WINDOW, WINDOW - 3)
    local = layer(x)
    layer.set_processor(AttnProcessor2_0())
    assert torch.equal(local, layer(x))


def test_gradients_pass(layer):
    x = torch.randn(1, CHANNELS, 12, 8, dtype=torch.float64)
    layer.double().requires_grad_(False)
    assert torch.autograd.gradcheck(layer, x.requires_grad_(), fast_mode=True)


def test_products_grow_with_the_picture_alone(layer, monkeypatch):
    """Four times the positions take four times the products of queries and keys, not sixteen."""
    pairs, attend = [], F.scaled_dot_product_attention

    def counted(q, k, v):
        pairs.append(q.shape[-2] * k.shape[-2])
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    found = {}
    for side in (16, 32):
        pairs.clear()
        layer(torch.randn(1, CHANNELS, side, side))
        found[side] = sum(pairs)
    assert found == {16: 16**2 * WINDOW**2, 32: 32**2 * WINDOW**2}


@pytest.mark.slow
def test_the_shipped_prior_denoises_a_photograph_as_well_as_with_all_positions(monkeypatch):
    prior = Prior.from_pretrained("photos_prior")
    x0 = torch.from_numpy(data.coffee()[:, :600].copy()).permute(2, 0, 1)[None] / 255
    for sigma in (0.02, 0.1, 0.3):
        noisy = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        psnr = {}
        for window in (32, 1000):
            monkeypatch.setattr(attention, "WINDOW", window)
            with torch.no_grad():
                error = prior(noisy, torch.tensor([sigma])) - x0
            psnr[window] = -10 * error.square().mean().log10().item()
        assert psnr[32] > psnr[1000] - 0.01
