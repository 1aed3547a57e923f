"""Networks compiled for sampling: one graph, the same samples, and one shape for all chunks of a call."""

import pytest
import torch
from tiny import adapted, tiny_network, tiny_prior

from ud2m.cli.errors import correctable, message
from ud2m.physics import GaussianBlur
from ud2m.samplers.config import SamplerConfig
from ud2m.samplers.deepinv import DiffPir
from ud2m.samplers.ud2m import PosteriorSampler

SHAPE = (3, 16, 16)


def problem():
    physics = GaussianBlur(1.0).draw(1, SHAPE)
    return physics.A(torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))), physics


def drawn(sampler, **options):
    return sampler(*problem(), 0.05, num_samples=3, generator=torch.Generator().manual_seed(1), **options)


def graphs(prior, precision):
    """Return how many graphs torch makes of the network, and how often it gives up between them."""
    x = torch.rand(1, prior.channels, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found = torch._dynamo.explain(prior.unet)(x, prior.schedule.time(torch.tensor([0.1])))
    return found.graph_count, found.graph_break_count


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapted_network_is_one_graph(precision):
    assert graphs(adapted(tiny_prior()).merge_adapter(), precision) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photos_gaussian_blur", "photos_general"])
def test_the_network_of_a_shipped_model_is_one_graph(name):
    assert graphs(PosteriorSampler.from_pretrained(name).prior, "bfloat16") == (1, 0)


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_samples():
    sampler = PosteriorSampler(tiny_network(adapted(tiny_prior())), SamplerConfig(num_steps=1, precision="float32"))
    expected = drawn(sampler)
    torch.testing.assert_close(drawn(sampler.compile("aot_eager")), expected, atol=2e-5, rtol=0)


def ours():
    return PosteriorSampler(tiny_network(adapted(tiny_prior())), SamplerConfig(num_steps=2, precision="float32"))


def rival():
    return DiffPir(tiny_prior(), num_steps=3, chunk_size=4, precision="float32")


@pytest.mark.slow
@pytest.mark.parametrize(("make", "options"), [(ours, {"chunk_size": 4}), (rival, {})])
def test_chunks_of_a_call_have_one_shape(make, options):
    sampler = make()
    expected, sizes = drawn(sampler, **options), []
    sampler.compile("inductor").prior.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    with torch.compiler.set_stance("force_eager"):  # the code as it is: compiling takes minutes
        found = drawn(sampler, **options)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert set(sizes) == {4}  # of 6 samples


def test_what_torch_does_not_know_is_refused_with_what_it_does():
    with pytest.raises(ValueError, match=r"no backend or mode 'turbo'; it has .*inductor.*reduce-overhead"):
        tiny_prior().compile_network("turbo")


@pytest.mark.parametrize(
    "said", ["No working C++ compiler found in cpp.cxx: g++", "Cannot find a working triton installation."]
)
def test_a_missing_compiler_is_one_line(said):
    error = RuntimeError(f"backend='inductor' raised:\nInductorError: {said}\n\nSet TORCHDYNAMO_VERBOSE=1\n")
    assert correctable(error)
    assert "\n" not in message(error)
    assert message(error).endswith("leave the compilation out (compile=null, in training training.compile=null)")
