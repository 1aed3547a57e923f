import pytest
import torch
from torch.nn.functional import softplus

from ud2m.losses.adversarial import Discriminator

PAPER = (32, 64, 128, 256, 128, 64)


def test_published_widths_halve_three_times_and_keep_their_number():
    discriminator = Discriminator(3, PAPER)
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [*PAPER, 1]
    assert [c.stride[0] for c in convolutions] == [1, 2, 2, 2, 1, 1, 1]
    assert discriminator(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (28, 28), (33, 47)])
def test_any_size_from_the_total_stride_on(size):
    discriminator = Discriminator(1, (4, 8, 16), condition_channels=2)
    logits = discriminator(torch.rand(2, 1, *size), torch.rand(2, 2, *size))
    assert logits.shape == (2, 1, size[0] // 4, size[1] // 4)


def test_samples_do_not_see_each_other():
    # A statistic over the batch (batch norm) would make the penalty of one sample depend on the others.
    discriminator = Discriminator(3, (4, 8)).double().train()
    x, condition = torch.rand(2, 5, 3, 16, 16, dtype=torch.float64)
    alone = torch.cat([discriminator(x[i : i + 1], condition[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(discriminator(x, condition), alone)


def test_depends_on_the_condition():
    discriminator, x = Discriminator(3, (4, 8)), torch.rand(1, 3, 16, 16)
    assert not torch.allclose(discriminator(x, torch.zeros_like(x)), discriminator(x, torch.ones_like(x)))


def test_second_derivative_reaches_every_layer_but_the_last_bias():
    discriminator, x = Discriminator(1, (4, 8)).double(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    x.requires_grad_()
    logits = discriminator(x, torch.zeros_like(x)).sum()
    torch.autograd.grad(logits, x, create_graph=True)[0].square().sum().backward()
    names = {n for n, p in discriminator.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert names == {"layers.4.bias"}  # an offset of D has no gradient in x


def test_returns_logits_that_push_the_loss_below_the_floor_of_a_second_sigmoid():
    # Bright images are real. With a sigmoid inside D the same loss could not fall below log(1 + 1/e) + log 2.
    torch.manual_seed(0)
    discriminator = Discriminator(1, (8, 16))
    real, fake = 0.8 + 0.1 * torch.rand(16, 1, 8, 8), 0.1 + 0.1 * torch.rand(16, 1, 8, 8)
    optimiser = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for _ in range(60):
        loss = softplus(-discriminator(real, real)).mean() + softplus(discriminator(fake, real)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert discriminator(real, real).min() > 1
    assert discriminator(fake, real).max() < 0
    assert loss < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"channels": 3, "widths": ()}, r"widths=\[\]"),
        ({"channels": 3, "widths": (8, 0)}, r"widths=\[8, 0\]"),
        ({"channels": 3, "condition_channels": 0}, "condition_channels=0"),
    ],
)
def test_impossible_architectures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Discriminator(**arguments)


def test_wrong_inputs_are_refused():
    discriminator = Discriminator(3, (4, 8, 16))
    with pytest.raises(ValueError, match="got 1 and 3"):
        discriminator(torch.rand(1, 1, 8, 8), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at least 4x4"):
        discriminator(torch.rand(1, 3, 3, 8), torch.rand(1, 3, 3, 8))
    with pytest.raises(ValueError, match="one size"):
        discriminator(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4))
