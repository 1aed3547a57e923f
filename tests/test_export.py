import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import ModelCard
from operators import generator
from tiny import SIZE, perturb, save_tiny_prior, tiny_network
from tiny_sampler import SHAPE, build, observation

import ud2m
import ud2m.priors.shipped
import ud2m.samplers.export
import ud2m.samplers.ud2m
from ud2m.physics import Observation
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler


@pytest.fixture(scope="module")
def saved(sampler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "export"
    sampler.save_pretrained(folder)
    return folder


@pytest.fixture
def export(saved, tmp_path):
    """A copy of the export to damage."""
    return shutil.copytree(saved, tmp_path / "export")


def draw(sampler, **options):
    return sampler(*observation(), num_samples=2, generator=generator(4), **options)


# --- export --------------------------------------------------------------------------------------------------


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
    images, sigma = torch.rand(2, 3, SIZE, SIZE), torch.full((2,), 0.2)
    assert not torch.allclose(loaded.prior.frozen(images, sigma), loaded.prior(images, sigma), atol=1e-2)
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


def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(sampler, saved):
    for call in (
        lambda: sampler(*observation(), step_size=2.0),
        lambda: PosteriorSampler.from_pretrained(saved, step_size=2.0),
    ):
        with pytest.raises(
            ValueError, match=r"no option step_size; it has num_steps, grid_power, eta, .*tile, precision, sigma_y"
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
