"""The experiments of the paper: their constants, what differs between them, and each from end to end in miniature."""

import json
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import REPOSITORY
from data_sets import DATA_SETS
from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import save_tiny_prior
from tiny_training import command_line, composed, write_images

import ud2m.cli  # noqa: F401  # its resolvers
from ud2m.losses.generator import GeneratorLoss
from ud2m.priors.schedule import VPSchedule
from ud2m.priors.shipped import SHIPPED
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.unfolded.warm_start import PinvStart, RamStart, SmoothingStart, load_ram

OPERATORS = ("gaussian_blur", "uniform_blur", "super_resolution", "jpeg", "inpainting", "general")
"""Those of the paper."""
PAPER = [(f"experiment={data}", f"physics={operator}") for data in DATA_SETS for operator in OPERATORS]
IMAGENET = PAPER[: len(OPERATORS)]
# what an experiment of version 0.1, of this name, composed to: numbers and names (but the general family has grown)
BEFORE = json.loads((REPOSITORY / "tests" / "data" / "experiments_0_1.json").read_text())
NOW = {
    "ffhq256_inpaint70": ["experiment=ffhq256", "physics=inpainting"],
    "imagenet256_jpeg10_ram": ["experiment=imagenet256", "physics=jpeg", "settings=paper_ram"],
    "lsun_bedroom256_sr4_energy": ["experiment=lsun_bedroom256", "physics=super_resolution", "settings=energy"],
    "imagenet256_general": ["experiment=imagenet256", "physics=general"],
    "imagenet256_general_energy": [
        "experiment=imagenet256",
        "physics=general",
        "settings=energy",
        "network=conditioned",
    ],
}
RANDOM_RAM = "network.warm_start.weights=null"


def plain(*overrides, folder, prior="x"):
    """Return the whole configuration as plain values."""
    with composed(*overrides, f"prior={prior}", folder=folder) as config:
        values = OmegaConf.to_container(config, resolve=True)
    del values["run_dir"]  # names the experiment and the time
    return values


def flat(tree, above=""):
    """Return the leaves of nested dictionaries by their dotted names."""
    if not isinstance(tree, dict) or not tree:
        return {above: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{above}.{name}".lstrip(".")).items()}


def changed(one, other):
    one, other = flat(one), flat(other)
    return {name for name in one.keys() | other.keys() if one.get(name, "-") != other.get(name, "-")}


# --- constants -------------------------------------------------------------------------------------------------------


def test_one_experiment_per_data_set_of_256():
    files = {path.stem for path in (REPOSITORY / "conf" / "experiment").rglob("*.yaml")}
    assert {name for name in files if "256" in name} == set(DATA_SETS)


@pytest.mark.parametrize("name", BEFORE)
def test_the_experiments_of_version_0_1_are_choices_now(name, tmp_path):
    prior = BEFORE[name]["prior"]
    found = flat(plain(*NOW[name], folder=tmp_path, prior=prior))
    before = dict(BEFORE[name])
    if before.get("network.conditioning"):
        before["network.conditioning"] = [*before["network.conditioning"], "hidden"]  # psi has learnt to tell masks
    assert {key: found.get(key, "missing") for key in before} == before


def test_a_run_is_named_after_what_was_chosen(tmp_path):
    overrides = ["experiment=imagenet256", "physics=jpeg", "settings=energy"]
    with composed(*overrides, folder=tmp_path) as config:
        assert config.name == "imagenet256_jpeg_energy"
        assert config.run_dir.startswith("runs/imagenet256_jpeg_energy/")


@pytest.mark.parametrize("overrides", [*PAPER, ("experiment=mnist_sr4",)], ids=" ".join)
def test_published_settings(overrides, tmp_path):
    config = plain(*overrides, folder=tmp_path)
    published = {
        "network.num_blocks": 3,
        "training.sampling.num_steps": 3,
        "training.levels.num_steps": 3,
        "lora.rank": 5,
        "lora.alpha": 1.5,
        "training.optimizer.lr": 1e-4,
        "training.optimizer.lr_discriminator": 1e-4,
        "loss.perceptual": 0.1,
        "loss.gradient_penalty": 10.0,
        "loss.energy": 0.0,
        "network.rule.name": "paper",
        "network.warm_start.name": "pinv",
    }
    found = flat(config)
    assert {name: found[name] for name in published} == published
    assert config["discriminator"]["widths"] == [32, 64, 128, 256, 128, 64]
    assert set(config["lora"]["targets"]) == {"to_q", "to_k", "to_v", "to_out.0"}
    assert config["lora"]["output_conv"]
    table = VPSchedule.from_config({"beta_schedule": "linear"})
    levels = table.grid(3, config["training"]["sampling"]["grid_power"])
    torch.testing.assert_close(table.time(levels), torch.tensor([999.0, 444.0, 111.0]), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("page", "operator"),
    [
        ("gaussian_blur", {"_target_": "ud2m.physics.GaussianBlur", "width": 1.6}),
        ("uniform_blur", {"_target_": "ud2m.physics.UniformBlur", "size": 9}),
        ("super_resolution", {"_target_": "ud2m.physics.SuperResolution", "factor": 4}),
        ("jpeg", {"_target_": "ud2m.physics.Jpeg", "quality": 10}),
        ("inpainting", {"_target_": "ud2m.physics.Inpainting", "missing": 0.7}),
        ("general", {"_target_": "ud2m.physics.Mixture"}),
    ],
)
def test_the_operators_are_those_of_the_paper(page, operator, tmp_path):
    config = plain("experiment=imagenet256", f"physics={page}", folder=tmp_path)
    assert operator.items() <= config["physics"]["operator"].items()
    assert config["data"]["crop_size"] == 256


@pytest.mark.slow
@pytest.mark.parametrize("overrides", PAPER, ids=" ".join)
def test_settings_change_what_their_names_say(overrides, tmp_path):
    config, ram, energy = (
        plain(*overrides, f"settings={name}", folder=tmp_path) for name in ("paper", "paper_ram", "energy")
    )
    info = {"name", "training.info.experiment"}
    assert ram["network"]["warm_start"] == {"name": "ram", "weights": "download", "trainable": True}
    assert {n for n in changed(config, ram) if ".warm_start." not in n} == info
    groups = ("network", "loss", "discriminator", "training.network", "training.loss", "training.discriminator")
    groups += ("training.optimizer", "training.sampling", "training.levels.grid_power")
    assert {n for n in changed(config, energy) if not n.startswith(groups)} == info
    assert (energy["loss"]["energy"], energy["loss"]["l2"], energy["network"]["rule"]["name"]) == (1.0, 0.0, "annealed")


@pytest.mark.parametrize("data", ["lsun_bedroom256", "ffhq256"])
def test_data_sets_differ_in_data_and_prior_alone(data, tmp_path):
    here, there = (plain(f"experiment={name}", folder=tmp_path) for name in (data, "imagenet256"))
    allowed = {"name", "training.info.experiment", "architecture", "data.root", "data.held_out"}
    assert changed(here, there) == allowed


def test_a_set_of_settings_fits_any_experiment(tmp_path):
    config = plain("experiment=photos_gaussian_blur", "settings=paper", folder=tmp_path)
    assert (config["network"]["rule"]["name"], config["lora"]["rank"], config["loss"]["l2"]) == ("paper", 5, 1.0)
    assert config["steps"] == 3000  # the experiment's own values stay


# --- in miniature ----------------------------------------------------------------------------------------------------


def test_the_micro_prior_has_the_block_types_of_the_real_one():
    sys.path.insert(0, str(REPOSITORY / "data_prep"))
    import adm_architecture
    import convert_prior

    (entry,) = (e for e in adm_architecture.PUBLISHED if "256x256_diffusion_uncond.pt" in e.files)
    with torch.device("meta"):
        real = convert_prior.build(entry.architecture, entry.facts, 256)
        micro = UNet2DModel.from_config(UNet2DModel.load_config(SHIPPED / "micro_prior"))
    kinds = [{type(module).__name__ for module in network.modules()} for network in (real, micro)]
    assert kinds[0] == kinds[1]
    options = ("out_channels", "downsample_type", "upsample_type", "resnet_time_scale_shift", "norm_eps", "act_fn")
    assert {o: real.config[o] for o in options} == {o: micro.config[o] for o in options}


@pytest.mark.parametrize("settings", ["paper", "energy"])
@pytest.mark.parametrize("overrides", IMAGENET, ids=" ".join)
def test_every_experiment_takes_a_step(overrides, settings, tmp_path):
    module = one_step(tmp_path, *overrides, f"settings={settings}")
    start = SmoothingStart if settings == "energy" else PinvStart
    assert isinstance(module.network.warm_start, start)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", IMAGENET, ids=" ".join)
def test_ram_takes_every_operator(overrides, tmp_path):
    module = one_step(tmp_path, *overrides, "settings=paper_ram", RANDOM_RAM)
    assert isinstance(module.network.warm_start, RamStart)
    assert module.sampler.nfe() == 12


def one_step(folder, *overrides):
    """Compute the losses of two images, and their gradients, with the micro prior."""
    with composed("scale=tiny", *overrides, folder=folder) as config:
        module = instantiate(config.training, _convert_="all")
    assert isinstance(module.loss, GeneratorLoss)
    x0 = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    total, _ = module.losses(x0, [torch.Generator().manual_seed(k) for k in range(2)])
    total.backward()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad and "warm_start" not in n}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    return module


def script(name, *arguments):
    """Run a script of the repository in this process, which saves the imports."""
    with patch.object(sys, "argv", [name, *arguments]):
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")


def train_and_sample(folder: Path, *overrides: str) -> list[dict]:
    """Train in miniature, load the export, sample with it by command; return the rows of the samples."""
    assert command_line(*overrides, f"run_dir={folder}") == 0
    assert PosteriorSampler.from_pretrained(folder / "export").config.num_steps == 3
    data = ["data.crop_size=32", "data.test_limit=2", "num_samples=2", "show=1", "lpips=null"]
    script("sample.py", f"model={folder / 'export'}", f"output={folder / 'samples'}", *data)
    assert (folder / "samples" / "report.html").is_file()
    return json.loads((folder / "samples" / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [*IMAGENET, NOW["imagenet256_general_energy"]], ids=" ".join)
def test_every_experiment_runs_from_end_to_end(overrides, tmp_path):
    (row,) = train_and_sample(tmp_path / "run", *overrides, "scale=tiny")
    assert row["nfe"] == 9
    assert row["psnr"] > 5


@pytest.mark.parametrize("training", sorted(path.stem for path in (REPOSITORY / "conf" / "training").glob("*.yaml")))
def test_every_training_composes_in_miniature(training, tmp_path):
    """Some have no loss whose distance could be overridden, and draw no samples whose number could be set."""
    with composed(f"training={training}", "scale=tiny", folder=tmp_path) as config:
        assert config.steps == 2
        drawn = {"num_samples": 2, "lpips": None} if training in ("distillation", "bridge") else {}
        assert drawn.items() <= (config.training.get("validation") or {}).items()


@pytest.mark.slow
def test_the_demo_trains_with_valid_boundaries(tmp_path):
    """Samples of one batch need other numbers of steps of the solver, since their noise levels differ."""
    chosen = ["experiment=demo", "physics.operator.boundary=valid", "scale=tiny", "steps=4", "validate_every=2"]
    (row,) = train_and_sample(tmp_path / "run", *chosen)
    assert row["psnr"] > 15


@pytest.mark.slow
def test_an_experiment_with_ram_runs_from_end_to_end(tmp_path):
    torch.save(load_ram(None, (1, 2, 3)).state_dict(), tmp_path / "ram.pth.tar")
    # frozen: checkpoints of 34 million trained parameters take a minute to write
    ram = [f"network.warm_start.weights={tmp_path / 'ram.pth.tar'}", "network.warm_start.trainable=false"]
    chosen = ["experiment=imagenet256", "physics=super_resolution", "settings=paper_ram", "scale=tiny"]
    (row,) = train_and_sample(tmp_path / "run", *chosen, *ram)
    assert row["nfe"] == 12


@pytest.mark.slow
def test_an_experiment_reads_its_shards(tmp_path):
    sys.path.insert(0, str(REPOSITORY / "data_prep"))
    import make_shards

    for split, count in (("train", 6), ("val", 4)):
        images = write_images(tmp_path / "images" / split, count, 48)
        make_shards.main([str(images), str(tmp_path / "shards" / split), "--size", "32", "--workers", "1"])
    shards = [f"data.{key}={tmp_path / 'shards' / split}" for key, split in (("root", "train"), ("held_out", "val"))]
    data = ["data=imagenet256", *shards, "data.crop_size=32"]
    chosen = ["experiment=imagenet256", "settings=energy", "scale=tiny"]
    (row,) = train_and_sample(tmp_path / "run", *chosen, *data)
    assert row["nfe"] == 9


def test_in_miniature_data_sets_are_one(tmp_path):
    chosen = ["physics=super_resolution", "scale=tiny"]
    first = plain("experiment=imagenet256", *chosen, folder=tmp_path)
    for other in ("lsun_bedroom256", "ffhq256", "mnist_sr4"):
        tiny = plain(f"experiment={other}", *chosen, folder=tmp_path)
        assert changed(first, tiny) <= {"name", "training.info.experiment", "architecture"}


@pytest.mark.slow
def test_the_experiment_with_digits_takes_a_step(tmp_path):
    prior = save_tiny_prior(tmp_path / "prior", in_channels=1, out_channels=1)
    overrides = ["experiment=mnist_sr4", f"prior={prior}", "loss/distance=prior"]
    with composed(*overrides, folder=tmp_path) as config:
        module = instantiate(config.training, _convert_="all")
    total, _ = module.losses(torch.rand(1, 1, 32, 32), [torch.Generator().manual_seed(0)])
    assert total.isfinite()
