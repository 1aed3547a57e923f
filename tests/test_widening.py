"""A network with more channels computes what the trained one does, and then learns more."""

import pytest
import torch
from tiny import tiny_unet

from ud2m.priors.widening import widen

WIDE = {2: [16, 32], 3: [24, 48]}


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_wider_network_computes_the_same(factor):
    trained = tiny_unet(block_out_channels=[8, 16])
    network = tiny_unet(seed=1, block_out_channels=WIDE.get(factor, [8, 16]))
    widen(network, trained)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0.0, 7.5, 600.0])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t).sample, trained(x, t).sample, rtol=1e-4, atol=1e-5)


def test_copies_of_a_channel_learn_different_things():
    network = tiny_unet(seed=1, block_out_channels=[16, 32])
    widen(network, tiny_unet(block_out_channels=[8, 16]))
    network(torch.randn(2, 3, 16, 16), torch.tensor([5.0, 50.0])).sample.square().mean().backward()
    weight = network.mid_block.resnets[0].conv1.weight
    assert torch.equal(network.conv_in.weight[::2], network.conv_in.weight[1::2])  # equal values,
    for gradient in (network.conv_in.weight.grad, weight.grad):  # unequal gradients
        difference = (gradient[::2] - gradient[1::2]).norm()
        assert difference > 0.1 * gradient.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [12, 16], "norm_num_groups": 4},  # not a multiple
        {"block_out_channels": [16, 16]},  # another multiple at every depth
        {"block_out_channels": [16, 32], "layers_per_block": 2},
        {"block_out_channels": [16, 32], "attention_head_dim": 16},  # other heads: loads, computes something else
        {"block_out_channels": [16, 32], "norm_num_groups": 8},
    ],
    ids=["fraction", "uneven", "deeper", "heads", "groups"],
)
def test_other_architectures_are_refused(changes):
    with pytest.raises(ValueError, match=r"architecture is another one|computes something else"):
        widen(tiny_unet(seed=1, **changes), tiny_unet(norm_num_groups=4))
