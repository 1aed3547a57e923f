import json
import shutil
from pathlib import Path

import deepinv
import peft
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import ModelCard
from operators import generator
from tiny import LORA, SIZE, adapted, perturb, save_tiny_prior, tiny_network

import ud2m
import ud2m.priors.shipped
import ud2m.samplers.export
import ud2m.samplers.ud2m
from ud2m.physics import GaussianBlur, Inpainting, Observation, SuperResolution, observe, select_samples
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

SHAPE = (3, SIZE, SIZE)
CONFIG = {
    "num_steps": 2,
    "eta": 0.5,
    "step_scale": 1.5,
    "sigma_y": 0.05,
    "info": {"physics": {"operator": {"width": 1.6}}, "steps": 7},
}


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory):
    return save_tiny_prior(tmp_path_factory.mktemp("prior") / "tiny")


def build(prior_folder, rank=LORA["rank"], num_blocks=3):
    """Return a sampler in the state in which training leaves it."""
    prior = Prior.from_pretrained(prior_folder)
    prior = adapted(prior, rank=rank) if rank else prior.add_lora(LoraSpec(rank=0))
    network = tiny_network(prior, num_blocks)
    perturb((p for name, p in network.named_parameters() if name.startswith("blocks.")), scale=0.3)
    return PosteriorSampler(network, SamplerConfig(**CONFIG))


@pytest.fixture(scope="module")
def sampler(prior_folder):
    return build(prior_folder)


@pytest.fixture(scope="module")
def saved(sampler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "export"
    sampler.save_pretrained(folder)
    return folder


@pytest.fixture
def export(saved, tmp_path):
    """A copy of the export to damage."""
    return shutil.copytree(saved, tmp_path / "export")


def observation(family=None, batch=2, shape=SHAPE, sigma_y=0.05):
    x0 = torch.rand(batch, *shape, generator=generator(0))
    physics = (family or Inpainting()).draw(batch, shape, generator(1))
    return observe(physics, x0, sigma_y, generator(2)), physics


# --- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [GaussianBlur(), SuperResolution(), Inpainting()])
@pytest.mark.parametrize("eta", [0, 1.0, "fresh"])
def test_samples_are_images_that_differ(sampler, family, eta):
    y, physics = observation(family)
    samples = sampler(y, physics, 0.05, num_samples=4, num_steps=2, eta=eta, generator=generator())
    assert samples.shape == (2, 4, *SHAPE)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert ((samples > 0) & (samples < 1)).float().mean() > 0.4  # of use for comparisons of samples
    assert samples.std(1).mean() > 1e-3
    assert not samples.requires_grad


def test_the_generator_decides(sampler):
    y, physics = observation()
    first, again, other = (sampler(y, physics, num_samples=2, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        free = sampler(y, physics)
        assert not torch.equal(sampler(y, physics), free)
        torch.manual_seed(5)
        assert torch.equal(sampler(y, physics), free)


def test_observations_of_equal_content_get_different_samples(sampler):
    y, physics = observation(GaussianBlur(), 1)
    samples = sampler(y.expand(2, -1, -1, -1), physics, num_samples=1, generator=generator())
    assert not torch.allclose(samples[0], samples[1], atol=1e-2)


@pytest.mark.parametrize("family", [GaussianBlur(), Inpainting()])
def test_chunks_change_nothing(sampler, family):
    y, physics = observation(family, 3)
    noise = torch.tensor([0.02, 0.05, 0.2])
    whole, *parts = (
        sampler(y, physics, noise, num_samples=3, generator=generator(), chunk_size=size) for size in (64, 9, 4, 1)
    )
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [2, 3, 64])
def test_every_sample_meets_its_own_observation(sampler, chunk_size):
    y, physics = observation(Inpainting(), 3)
    assert len(physics.mask) == 3
    noise, rows = torch.tensor([0.02, 0.05, 0.2]), []

    def keep(_, inputs):
        x_sigma, sigma, seen, streams = inputs
        assert len(x_sigma) == len(sigma) == len(seen) == len(seen.physics.mask) == len(streams) <= chunk_size
        rows.extend(zip(seen.y, seen.physics.mask, seen.sigma_y, strict=True))

    hook = sampler.network.register_forward_pre_hook(keep)
    sampler(y, physics, noise, num_samples=2, num_steps=1, chunk_size=chunk_size)
    hook.remove()
    assert len(rows) == 6
    for k, (y_row, mask, sigma_y) in enumerate(rows):
        assert torch.equal(y_row, y[k // 2])
        assert torch.equal(mask, physics.mask[k // 2])
        assert sigma_y == noise[k // 2]


def test_a_sample_is_explained_by_its_own_mask(sampler):
    """Through the whole call: the same seeds with one observation at a time give the same samples."""
    y, physics = observation(Inpainting(), 2)
    together = sampler(y, physics, num_samples=2, generator=generator(3))
    rows = torch.arange(2)
    stream = generator(3)
    alone = [
        sampler(y[i : i + 1], select_samples(physics, rows[i : i + 1]), num_samples=2, generator=stream) for i in rows
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_call_leaves_no_state(sampler):
    y, physics = observation()
    before = {name: value.clone() for name, value in sampler.network.state_dict().items()}
    states = [module.training for module in sampler.network.modules()]
    first = sampler(y, physics, num_samples=2, generator=generator(), chunk_size=1)
    assert torch.equal(sampler(y, physics, num_samples=2, generator=generator(), chunk_size=1), first)
    assert all(torch.equal(value, before[name]) for name, value in sampler.network.state_dict().items())
    assert [module.training for module in sampler.network.modules()] == states
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("num_steps", "num_blocks"), [(1, 1), (3, 1), (2, 3), (None, 2)])
@pytest.mark.parametrize("chunk_size", [64, 2])
def test_network_evaluations_are_those_claimed(prior_folder, num_steps, num_blocks, chunk_size):
    sampler = build(prior_folder, num_blocks=num_blocks)
    batches = []
    unet = sampler.prior.unet.get_base_model()
    unet.register_forward_hook(lambda module, inputs, _: batches.append(len(inputs[0])))
    y, physics = observation()
    sampler(y, physics, num_samples=3, num_steps=num_steps, chunk_size=chunk_size)
    assert sum(batches) == 2 * 3 * sampler.nfe(num_steps)
    assert sampler.nfe(num_steps) == num_blocks * (num_steps or 2)
    assert len(batches) == -(-6 // chunk_size) * sampler.nfe(num_steps)


def test_defaults_are_those_of_the_config(sampler):
    y, physics = observation()
    default = sampler(y, physics, generator=generator())
    explicit = sampler(y, physics, 0.05, 1, generator(), num_steps=2, eta=0.5)
    assert torch.equal(default, explicit)
    for change in ({"num_steps": 3}, {"eta": 1}, {"sigma_y": 0.1}, {"step_scale": 2.0}):
        assert not torch.allclose(sampler(y, physics, generator=generator(), **change), default, atol=1e-3)


def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(sampler, saved):
    for call in (
        lambda: sampler(*observation(), step_size=2.0),
        lambda: PosteriorSampler.from_pretrained(saved, step_size=2.0),
    ):
        with pytest.raises(
            ValueError, match=r"no option step_size; it has num_steps, grid_power, eta, .*tile, sigma_y"
        ):
            call()


def test_options_of_loading_are_those_of_a_call_and_none_is_the_models(saved):
    options = {"num_steps": 3, "eta": "fresh", "step_scale": 0.7, "symmetries": 2, "chunk_size": 1, "tile": None}
    expected = draw(PosteriorSampler.from_pretrained(saved), **options)
    loaded = PosteriorSampler.from_pretrained(saved, **options)
    assert torch.equal(draw(loaded), expected)
    assert loaded.nfe() == 3 * 3
    assert loaded.images_at_once(Observation.of(*observation(), 0.05)) == 1
    nones = PosteriorSampler.from_pretrained(saved, **dict.fromkeys(options))
    assert nones.config == PosteriorSampler.from_pretrained(saved).config


def test_samplers_of_other_weights_or_options_are_told_apart(saved, prior_folder):
    one, other = (PosteriorSampler.from_pretrained(saved) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != PosteriorSampler.from_pretrained(saved, num_steps=1).fingerprint
    perturb(other.network.blocks.parameters())
    assert one.fingerprint != other.fingerprint


def test_levels_visited_are_those_of_the_grid(sampler):
    sampler = PosteriorSampler(sampler.network, SamplerConfig(num_steps=3, grid_power=4.0))
    visited = []
    handle = sampler.network.register_forward_pre_hook(lambda _, inputs: visited.append(inputs[1][0].item()))
    sampler(*observation(), generator=generator())
    handle.remove()
    times = sampler.prior.schedule.time(torch.tensor(visited))
    torch.testing.assert_close(times, 999 * torch.tensor([1, 2 / 3, 1 / 3]) ** 4, rtol=1e-3, atol=1e-2)


def test_operators_of_deepinv_are_served(sampler):
    y, ours = observation(Inpainting())
    theirs = deepinv.physics.Inpainting(SHAPE, mask=ours.mask)
    expected = sampler(y, ours, num_samples=2, generator=generator())
    torch.testing.assert_close(sampler(y, theirs, num_samples=2, generator=generator()), expected, rtol=0, atol=1e-5)


def test_images_larger_than_those_of_training_are_sampled(sampler):
    y, physics = observation(GaussianBlur(), 1, (3, 2 * SIZE, 3 * SIZE))
    assert sampler(y, physics).shape == (1, 1, 3, 2 * SIZE, 3 * SIZE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_observations_of_another_precision_are_served(sampler, dtype):
    y, physics = observation()
    y = y.to(dtype)
    expected = sampler(y.float(), physics, 0.05, generator=generator())
    assert torch.equal(sampler(y, physics, 0.05, generator=generator()), expected)


@pytest.mark.parametrize("name", ["num_samples", "num_steps", "chunk_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_counts_below_one_are_refused(sampler, name, value):
    with pytest.raises(ValueError, match=rf"{name}.* must be an integer of at least 1, got {value}"):
        sampler(*observation(), **{name: value})


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), [0.1, 0.0], [0.1, 0.1, 0.1]])
def test_noise_levels_that_are_none_are_refused(sampler, value):
    with pytest.raises(ValueError, match=r"sigma_y must be a positive noise level .* \(2\)"):
        sampler(*observation(), sigma_y=torch.tensor(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("eta", [-1, 2.0, "old"])
def test_other_values_of_eta_are_refused(sampler, eta):
    with pytest.raises(ValueError, match="eta must be"):
        sampler(*observation(), eta=eta)


def test_noise_levels_are_one_per_observation():
    y = torch.zeros(3, 1, 4, 4)
    assert Observation.of(y, None, 0.5).sigma_y.tolist() == [0.5] * 3
    assert Observation.of(y, None, torch.tensor([0.5])).sigma_y.tolist() == [0.5] * 3
    assert Observation.of(y, None, torch.tensor([1.0, 2.0, 3.0])).sigma_y.tolist() == [1, 2, 3]


def test_a_grey_image_does_not_fit_a_colour_prior(sampler):
    with pytest.raises(ValueError, match=r"draws images with 3 channels, this operator acts on \(1, 16, 16\)"):
        sampler(*observation(shape=(1, SIZE, SIZE)))


def test_a_size_that_the_network_cannot_take_is_refused(sampler):
    with pytest.raises(ValueError, match="at least 2 pixels a side, got 1x16"):
        sampler(*observation(shape=(3, 1, 16)))


def test_a_picture_of_any_size_is_sampled(sampler):
    y, physics = observation(shape=(3, 19, 23))
    assert sampler(y, physics, num_samples=2).shape == (len(y), 2, 3, 19, 23)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, r"num_steps \(N\)"),
        ({"num_steps": "3"}, r"num_steps \(N\)"),
        ({"grid_power": 0}, "grid_power"),
        ({"grid_power": "steep"}, "grid_power"),
        ({"step_scale": 0.0}, "step_scale"),
        ({"step_scale": float("inf")}, "step_scale"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"tile": 8}, r"tile .* at least 16"),
        ({"eta": "old"}, "eta must be"),
        ({"eta": None}, "eta must be"),
        ({"sigma_y": 0.0}, "sigma_y"),
        ({"sigma_y": "x"}, "sigma_y"),
        ({"sigma_y": float("nan")}, "sigma_y"),
        ({"info": []}, "info"),
    ],
)
def test_impossible_defaults_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**(CONFIG | change))


# --- export --------------------------------------------------------------------------------------------------


def draw(sampler, **options):
    return sampler(*observation(), num_samples=2, generator=generator(4), **options)


def test_the_package_offers_the_sampler():
    assert ud2m.PosteriorSampler is PosteriorSampler
    with pytest.raises(AttributeError, match="no attribute 'Sampler'"):
        ud2m.Sampler  # noqa: B018


@pytest.mark.parametrize("rank", [2, 0])
def test_an_export_draws_the_same_samples(prior_folder, tmp_path, rank):
    sampler = build(prior_folder, rank)
    trained = draw(sampler)
    sampler.save_pretrained(tmp_path / "export")
    assert torch.equal(draw(sampler), trained)
    loaded = PosteriorSampler.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(draw(loaded), trained, rtol=0, atol=1e-4)  # its adapter is merged, this one is not
    sampler.prior.merge_adapter()
    assert torch.equal(draw(loaded), draw(sampler))
    assert torch.equal(draw(PosteriorSampler.from_pretrained(str(tmp_path / "export"))), draw(loaded))


def test_the_adapter_and_psi_of_an_export_matter(saved):
    loaded = PosteriorSampler.from_pretrained(saved)
    expected = draw(loaded)
    with loaded.prior.adapter_disabled():
        assert not torch.allclose(draw(loaded), expected, atol=1e-2)
    perturb(loaded.network.blocks.parameters(), scale=0.3)
    assert not torch.allclose(draw(loaded), expected, atol=1e-2)


def test_exporting_what_was_loaded_changes_nothing(saved, tmp_path):
    loaded = PosteriorSampler.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "psi.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()
    assert torch.equal(draw(PosteriorSampler.from_pretrained(tmp_path / "again")), draw(loaded))


def test_an_export_keeps_its_description(sampler, saved):
    loaded = PosteriorSampler.from_pretrained(saved)
    assert vars(loaded.config) == vars(sampler.config)
    assert loaded.network.spec == sampler.network.spec
    assert loaded.network.psi() == sampler.network.psi()
    assert loaded.prior.lora == sampler.prior.lora
    assert loaded.prior.reference == sampler.prior.reference
    assert type(loaded.network.warm_start) is type(sampler.network.warm_start)
    assert loaded.network.warm_start.scales == sampler.network.warm_start.scales
    assert not any(p.requires_grad for p in loaded.network.parameters())
    assert not any(module.training for module in loaded.network.modules())


def test_an_export_is_json_and_safetensors_and_small(saved, prior_folder):
    files = {path.name for path in saved.iterdir()}
    assert {"config.json", "psi.safetensors", "adapter_config.json", "adapter_model.safetensors"} <= files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md", ""}
    weights = sum(path.stat().st_size for path in saved.iterdir())
    assert weights < sum(path.stat().st_size for path in Path(prior_folder).iterdir())
    described = json.loads((saved / "config.json").read_text())["prior"]
    assert described == {"reference": prior_folder, "fingerprint": Prior.from_pretrained(prior_folder).fingerprint}


def test_an_export_replaces_nothing_unasked(sampler, export):
    before = (export / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="already holds files"):
        sampler.save_pretrained(export)
    assert (export / "config.json").read_bytes() == before
    sampler.save_pretrained(export, overwrite=True)
    assert torch.equal(draw(PosteriorSampler.from_pretrained(export)), draw(PosteriorSampler.from_pretrained(export)))


def test_an_interrupted_export_leaves_nothing(sampler, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(ud2m.samplers.export, "save_file", fail)
    with pytest.raises(RuntimeError, match="stop"):
        sampler.save_pretrained(tmp_path / "export")
    assert not any(tmp_path.iterdir())


def test_a_shipped_model_is_found_by_name(sampler, prior_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ud2m.priors.shipped, "SHIPPED", tmp_path)
    shutil.copytree(prior_folder, tmp_path / "tiny_prior")
    prior = Prior.from_pretrained("tiny_prior")
    assert prior.reference == "tiny_prior"
    PosteriorSampler(tiny_network(prior)).save_pretrained(tmp_path / "tiny_model")
    loaded = PosteriorSampler.from_pretrained("tiny_model")
    assert loaded.prior.reference == "tiny_prior"


# --- damaged, moved and hostile exports ----------------------------------------------------------------------

FILES = ["config.json", "psi.safetensors", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.98])
def test_truncated_exports_are_reported(export, file, share):
    """``share`` of the file is left; None: it is missing."""
    data = (export / file).read_bytes()
    (export / file).unlink()
    if share is not None:
        (export / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        PosteriorSampler.from_pretrained(export)
    message = str(caught.value)
    assert str(export) in message
    assert any(word in message for word in ("damaged", "incomplete", "truncated", "not an export"))


def test_a_missing_model_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere"):
        PosteriorSampler.from_pretrained(tmp_path / "nowhere")


def test_a_moved_prior_is_found_where_the_caller_says(sampler, prior_folder, tmp_path):
    moved = shutil.copytree(prior_folder, tmp_path / "old")
    there = build(moved)
    there.save_pretrained(tmp_path / "export")
    moved = shutil.move(moved, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"(?s)export.*no prior at .*old.*prior="):
        PosteriorSampler.from_pretrained(tmp_path / "export")
    loaded = PosteriorSampler.from_pretrained(tmp_path / "export", prior=moved)
    assert torch.equal(draw(loaded), draw(PosteriorSampler.from_pretrained(tmp_path / "export", prior=prior_folder)))


def test_another_prior_is_refused(saved, tmp_path):
    other = save_tiny_prior(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=rf"{saved} was trained on a prior with fingerprint .*{other} has"):
        PosteriorSampler.from_pretrained(saved, prior=other)


def rewrite(export, change):
    config = json.loads((export / "config.json").read_text())
    change(config)
    (export / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("format"),
        lambda c: c.update(format=2),
        *(lambda c, key=key: c.pop(key) for key in ("network", "lora", "prior", "sampler")),
        *(lambda c, key=key: c.update({key: 3}) for key in ("network", "lora", "prior", "sampler")),
        *(lambda c, key=key: c.update({key: []}) for key in ("network", "lora", "prior", "sampler")),
        lambda c: c["prior"].pop("fingerprint"),
        lambda c: c["prior"].pop("reference"),
        lambda c: c["prior"].update(reference=None),
        lambda c: c["network"].update(num_blocks=2),
        lambda c: c["network"].update(num_blocks=4),
        lambda c: c["network"].update(num_blocks=0),
        lambda c: c["network"].update(rule={"name": "unknown"}),
        lambda c: c["network"].update(warm_start={"name": "unknown"}),
        lambda c: c["network"]["rule"].update(more=1),
        lambda c: c["lora"].update(rank=3),
        lambda c: c["lora"].update(rank="2"),
        lambda c: c["lora"].update(alpha=8.0),
        lambda c: c["lora"].update(targets=["to_q"]),
        lambda c: c["lora"].update(targets=3),
        lambda c: c["lora"].update(more=1),
        lambda c: c["sampler"].update(num_steps=0),
        lambda c: c["sampler"].update(num_steps="3"),
        lambda c: c["sampler"].update(eta="old"),
        lambda c: c["sampler"].update(sigma_y=-1),
        lambda c: c["sampler"].update(more=1),
    ],
)
def test_configs_that_do_not_fit_are_refused(export, change):
    rewrite(export, change)
    with pytest.raises(ValueError) as caught:
        PosteriorSampler.from_pretrained(export)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "{}", '{"format": 1}'])
def test_other_json_is_no_export(export, text):
    (export / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not (an export of format 1|a complete export)"):
        PosteriorSampler.from_pretrained(export)


@pytest.mark.parametrize(
    "place",
    [
        ("network", "rule"),
        ("network", "warm_start"),
        ("network",),
        ("lora",),
        ("sampler",),
        ("sampler", "info"),
        ("sampler", "info", "physics", "operator"),
        ("prior",),
        (),
    ],
)
def test_a_hostile_config_runs_no_code(export, tmp_path, place):
    bomb = {"_target_": "torch.save", "obj": 1, "f": str(tmp_path / "exploded")}

    def plant(config):
        for key in place:
            config = config[key]
        config.update(bomb)

    rewrite(export, plant)
    try:
        loaded = PosteriorSampler.from_pretrained(export)
    except ValueError:
        assert place
    else:
        draw(loaded)
    assert not (tmp_path / "exploded").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("file", "instead"),
    [
        ("psi.safetensors", "psi.safetensors"),
        ("psi.safetensors", "psi.bin"),
        ("adapter_model.safetensors", "adapter_model.safetensors"),
        ("adapter_model.safetensors", "adapter_model.bin"),
        ("config.json", "config.json"),
    ],
)
def test_a_pickle_instead_of_a_file_runs_no_code(export, tmp_path, file, instead):
    (export / file).unlink()
    torch.save({"weight": Bomb(tmp_path / "exploded")}, export / instead)
    with pytest.raises((ValueError, FileNotFoundError)):
        PosteriorSampler.from_pretrained(export)
    assert not (tmp_path / "exploded").exists()


# --- sharing -------------------------------------------------------------------------------------------------


ROWS = [{"method": "UD2M (K=3, N=2)", "nfe": 6, "psnr": 21.5, "psnr_mean": 23.25, "lpips": None, "r": 0.9, "step": 4}]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: what is uploaded lies in it, and is downloaded from it."""
    root = tmp_path / "hub"

    def create(repo_id, private=None, token=None, exist_ok=False):
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload(repo_id, folder_path, token=None):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(ud2m.samplers.ud2m, "create_repo", create)
    monkeypatch.setattr(ud2m.samplers.ud2m, "upload_folder", upload)
    monkeypatch.setattr(ud2m.samplers.export, "snapshot_download", lambda reference: str(root / reference))
    return root


def test_a_model_on_the_hub_draws_the_same_samples(sampler, hub, prior_folder):
    address = sampler.push_to_hub("me/model", ROWS, prior="me/prior")
    assert address == "https://hub/me/model"
    files = {path.name for path in (hub / "me" / "model").iterdir()}
    assert files == {"README.md", "config.json", "adapter_config.json", "adapter_model.safetensors", "psi.safetensors"}
    y, physics = observation()
    loaded = PosteriorSampler.from_pretrained("me/model", prior=prior_folder)
    samples = [s(y, physics, num_samples=2, generator=generator()) for s in (sampler, loaded)]
    torch.testing.assert_close(*samples, rtol=0, atol=1e-5)
    # no path of this machine travels along
    for path in (hub / "me" / "model").glob("*.[jm]*"):
        assert str(prior_folder) not in path.read_text()


def test_the_card_says_what_the_model_is(sampler, hub, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(ROWS))
    sampler.push_to_hub("me/model", tmp_path / "metrics.json", prior="me/prior")
    card = ModelCard.load(hub / "me" / "model" / "README.md")
    assert card.data.library_name == "ud2m"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "psnr_mean": 23.25,
        "psnr": 21.5,
        "r": 0.9,
    }
    for words in (
        "| modules K, steps N | 3, 2 |",
        '`{"width": 1.6}`',
        "in 6 network evaluations",
        f"`me/prior`, fingerprint `{sampler.prior.fingerprint[:12]}`",
        'PosteriorSampler.from_pretrained("me/model")',
        "| UD2M (K=3, N=2) | 6 | 23.25 | 21.5 | 0.9 |",
    ):
        assert words in card.text, words
    sampler.push_to_hub("me/model", prior="me/prior")
    assert "None were given." in (hub / "me" / "model" / "README.md").read_text()


def test_the_adapter_on_the_hub_fits_the_network_with_plain_peft(sampler, hub, prior_folder):
    sampler.push_to_hub("me/model", prior="me/prior")
    network = UNet2DModel.from_pretrained(prior_folder, torch_dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(network, hub / "me" / "model").eval()
    x, t = torch.rand(2, *SHAPE, generator=generator()), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t).sample, sampler.prior.unet(x, t).sample, rtol=0, atol=1e-5)


def test_what_others_could_not_use_is_not_shared(sampler, hub, tmp_path):
    with pytest.raises(ValueError, match=r"the prior of this model is .*tiny, which others do not have: upload"):
        sampler.push_to_hub("me/model")
    (tmp_path / "metrics.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"metrics\.json is truncated or not JSON"):
        sampler.push_to_hub("me/model", tmp_path / "metrics.json", prior="me/prior")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no list of scores"):
        sampler.push_to_hub("me/model", tmp_path / "metrics.json", prior="me/prior")
    assert not hub.exists()
