"""The converter of guided-diffusion and improved-diffusion checkpoints: labels, files, and what it refuses."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from tiny_adm import (
    GIVEN,
    PUBLISHED,
    SMALL,
    convert_prior,
    deviation,
    expected_shapes,
    read_architecture,
    save,
    small_state,
)

from ud2m.priors.prior import LoraSpec, Prior

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(small_state(), tmp_path_factory.mktemp("checkpoint") / "small.pt")


# --- class labels ----------------------------------------------------------------------------------------------------


CONDITIONAL = replace(SMALL, num_classes=5)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    path = save(small_state(CONDITIONAL), folder / "checkpoint.pt")
    convert_prior.convert(path, folder / "open", GIVEN)
    return folder, convert_prior.convert(path, folder / "fixed", GIVEN, label=3)


def test_a_label_is_fixed_in_the_folder_or_given(conditional):
    folder, done = conditional
    x, sigma = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5])
    fixed = Prior.from_pretrained(folder / "fixed")
    given = Prior.from_pretrained(folder / "open", label=3)
    other = Prior.from_pretrained(folder / "fixed", label=4)
    with torch.no_grad():
        assert torch.equal(fixed(x, sigma), given(x, sigma))
        assert deviation(other(x, sigma), fixed(x, sigma)) > 1e-2
    assert done.fingerprint == fixed.fingerprint == given.fingerprint != other.fingerprint


def test_features_see_the_label(conditional):
    folder, _ = conditional
    prior = Prior.from_pretrained(folder / "fixed")
    x, level = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.05])
    caught = []
    prior.unet.down_blocks[-1].attentions[-1].register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        prior(x, level)
        torch.testing.assert_close(prior.features(x, 0.05)[-1], caught[0])
        other = Prior.from_pretrained(folder / "fixed", label=0).features(x, 0.05)[-1]
    assert deviation(other, caught[0]) > 1e-2


def test_an_adapter_keeps_the_label(conditional):
    prior = Prior.from_pretrained(conditional[0] / "fixed")
    x, sigma = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([0.3])
    with torch.no_grad():
        expected, features = prior(x, sigma), prior.features(x)
        prior.add_lora(LoraSpec())
        assert torch.equal(prior(x, sigma), expected)
        assert all(torch.equal(a, b) for a, b in zip(prior.features(x), features, strict=True))


@pytest.mark.parametrize("label", [None, -1, 5, "3", True, 1.0])
def test_a_label_that_is_no_class_is_refused(conditional, label):
    with pytest.raises(ValueError, match="class-conditional and needs a label from 0 to 4"):
        Prior.from_pretrained(conditional[0] / "open", label=label)


def test_a_label_without_classes_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"no class 3 \(--label\); allowed: none, it is not class-conditional"):
        convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN, label=3)
    convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN)
    with pytest.raises(ValueError, match="not class-conditional, but got the label 3"):
        Prior.from_pretrained(tmp_path / "prior", label=3)


def test_a_label_out_of_range_is_refused_by_the_converter(tmp_path):
    path = save(small_state(CONDITIONAL), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"no class 5 \(--label\); allowed: 0 to 4"):
        convert_prior.convert(path, tmp_path / "prior", GIVEN, label=5)


# --- what is refused -------------------------------------------------------------------------------------------------


def spoilt(how):
    state = small_state()
    if how == "missing":
        del state["input_blocks.3.1.proj_out.bias"], state["out.0.weight"]
    elif how == "left over":
        state |= {"input_blocks.1.1.norm.weight": torch.ones(32), "ema.decay": torch.ones(1)}
    else:
        state["middle_block.1.qkv.bias"] = torch.zeros(64)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing: input_blocks.3.1.proj_out.bias, out.0.weight$"),
        ("left over", r"left over: .*ema\.decay"),
        ("shape", r"of another shape: middle_block\.1\.qkv\.bias \[64\] instead of \[192\]"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        convert_prior.convert(save(spoilt(how), tmp_path / "checkpoint.pt"), tmp_path / "prior", GIVEN)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt"}


@pytest.mark.parametrize("name", list(expected_shapes(SMALL)))
def test_every_missing_tensor_is_named(name):
    shapes = expected_shapes(SMALL)
    del shapes[name]
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert_prior.check_shapes(shapes, expected_shapes(read_architecture(shapes)))


def test_long_lists_are_cut():
    expected = expected_shapes(SMALL)
    with pytest.raises(ValueError, match=rf"time_embed\.0\.weight, .* and {len(expected) - 12} more$"):
        convert_prior.check_shapes({}, expected)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (
            {},
            "--heads or --head-width, --qkv-order, --dropout, --schedule, --steps, --prediction",
        ),
        (GIVEN | {"head_width": None, "dropout": None}, "--heads or --head-width, --dropout"),
        (GIVEN | {"steps": 4000}, "--rescale-timesteps or --no-rescale-timesteps"),
    ],
)
def test_options_are_not_guessed(checkpoint, tmp_path, given, missing):
    with pytest.raises(ValueError, match=rf"no published network.*Missing: {missing}\. "):
        convert_prior.convert(checkpoint, tmp_path / "prior", given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4}, "--heads or --head-width, not both"),
        ({"head_width": 48}, "--head-width 48 does not divide an attention layer of 64 channels"),
        ({"head_width": 0}, "--head-width 0 does not divide"),
        ({"head_width": None, "heads": -2}, "--heads -2 does not divide"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"steps": 1}, "--steps must be at least 2, got 1"),
    ],
)
def test_impossible_options_are_refused(checkpoint, tmp_path, change, message):
    facts = {"rescale_timesteps": False}
    with pytest.raises(ValueError, match=message):
        convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN | facts | change)


def without(state, *starts):
    return {name: value for name, value in state.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: small_state(replace(SMALL, in_channels=6)), "an upsampler"),
        (lambda: small_state(replace(SMALL, out_channels=4)), "maps 3 channels to 4; allowed: 3 or 6"),
        (lambda: without(small_state(), "output_blocks", "out."), "a classifier, perhaps"),
        (lambda: {"a": torch.ones(1), "b": torch.ones(1)}, "begins with a, b"),
        (
            lambda: without(
                small_state(replace(SMALL, residual_resampling=False)), "input_blocks.2", "output_blocks.1.2"
            ),
            r"input_blocks\.2 has no weights.*conv_resample=False",
        ),
        (lambda: without(small_state(), "output_blocks.3"), "are not levels of one length"),
        (lambda: {"state_dict": small_state(), "step": 3}, "state_dict, step are no tensors"),
        (lambda: [torch.ones(1)], "holds a list; a state dict"),
        (lambda: small_state() | {"out.2.bias": torch.full((6,), math.nan)}, r"not finite .*: out\.2\.bias"),
        (lambda: small_state() | {"out.2.bias": torch.ones(6, dtype=torch.int64)}, r"out\.2\.bias"),
        (lambda: small_state() | {"time_embed.0.weight": torch.ones(3)}, r"time_embed\.0\.weight has the shape \[3\]"),
    ],
)
def test_other_files_are_refused(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        convert_prior.convert(save(state(), tmp_path / "checkpoint.pt"), tmp_path / "prior", GIVEN)
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.4, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, share, zipped):
    path = tmp_path / "checkpoint.pt"
    torch.save(small_state(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*truncated, or no file of torch\.save") as error:
        convert_prior.convert(path, tmp_path / "prior", GIVEN)
    assert "\n" not in str(error.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "exploded",))

    path = save({"out.2.bias": Bomb()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        convert_prior.convert(path, tmp_path / "prior", GIVEN)
    assert not (tmp_path / "exploded").exists()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["save_file", "write_json", "load"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path, monkeypatch, moment, error):
    function = getattr(convert_prior, moment)

    def interrupted(*arguments, **options):
        function(*arguments, **options)
        raise error("stop")

    monkeypatch.setattr(convert_prior, moment, interrupted)
    with pytest.raises(error):
        convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_on_request(checkpoint, tmp_path):
    folder = tmp_path / "prior"
    convert_prior.convert(checkpoint, folder, GIVEN)
    before = (folder / "scheduler_config.json").read_text()
    with pytest.raises(FileExistsError, match=r"already holds files; .*--overwrite"):
        convert_prior.convert(checkpoint, folder, GIVEN | {"schedule": "cosine"})
    assert (folder / "scheduler_config.json").read_text() == before
    convert_prior.convert(checkpoint, folder, GIVEN | {"schedule": "cosine"}, overwrite=True)
    assert (folder / "scheduler_config.json").read_text() != before


def test_files_of_old_pytorch_and_half_precision_are_read(checkpoint, tmp_path):
    expected = convert_prior.convert(checkpoint, tmp_path / "a", GIVEN).fingerprint
    path = tmp_path / "old.pt"
    torch.save(small_state(), path, _use_new_zipfile_serialization=False)
    assert convert_prior.convert(path, tmp_path / "b", GIVEN).fingerprint == expected
    halves = {name: value.half() for name, value in small_state().items()}
    convert_prior.convert(save(halves, tmp_path / "half.pt"), tmp_path / "c", GIVEN)
    stored = load_file(tmp_path / "c" / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert torch.equal(stored["conv_in.weight"], halves["input_blocks.0.0.weight"].float())


def test_bfloat16_says_what_it_costs(checkpoint, tmp_path):
    full = convert_prior.convert(checkpoint, tmp_path / "full", GIVEN)
    half = convert_prior.convert(checkpoint, tmp_path / "half", GIVEN, torch.bfloat16)
    assert full.rounding is None
    assert {value.dtype for value in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.bfloat16}
    one, other = (Prior.from_pretrained(folder) for folder in (tmp_path / "full", tmp_path / "half"))
    assert other.fingerprint == half.fingerprint != full.fingerprint
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0])
    with torch.no_grad():
        assert half.rounding == pytest.approx(deviation(other.unet(x, t).sample, one.unet(x, t).sample), rel=1e-3)
    assert 1e-4 < half.rounding < 0.1


def test_a_converted_prior_trains_an_adapter(checkpoint, tmp_path):
    convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN)
    prior = Prior.from_pretrained(tmp_path / "prior").add_lora(LoraSpec())
    x, sigma = torch.rand(1, 3, 16, 16), torch.tensor([0.3], requires_grad=True)
    prior(x, sigma).square().sum().backward()
    assert sigma.grad.abs() > 0
    # B is zero at first, so that only it has a gradient; there are four layers with attention
    trained = [name for name, p in prior.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert sum("to_out" in name for name in trained) == 4


def command_line(*arguments):
    script = [sys.executable, str(REPOSITORY / "data_prep" / "convert_prior.py"), *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.slow
def test_the_command(checkpoint, tmp_path):
    options = "--head-width 16 --qkv-order legacy --dropout 0 --schedule linear --steps 1000 --prediction epsilon"
    done = command_line(checkpoint, tmp_path / "prior", *options.split())
    assert done.returncode == 0, done.stderr
    assert Prior.from_pretrained(tmp_path / "prior").fingerprint in done.stdout
    refused = command_line(tmp_path / "nowhere.pt", tmp_path / "other")
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [f"error: there is no checkpoint {tmp_path}/nowhere.pt; name the .pt file"]


MEMORY = """
import resource, sys
sys.path.insert(0, "data_prep")
import convert_prior
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_prior.main(sys.argv[1:])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_stays_below_twice_the_checkpoint(tmp_path, dtype):
    """At full size, of ffhq_10m: above what the programs themselves take."""
    (entry,) = (entry for entry in PUBLISHED if "ffhq_10m.pt" in entry.files)
    state = {name: torch.full(shape, 0.01) for name, shape in expected_shapes(entry.architecture).items()}
    path = save(state, tmp_path / "ffhq_10m.pt")
    script = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "prior"), "--dtype", dtype]
    done = subprocess.run(script, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2.2 * path.stat().st_size
