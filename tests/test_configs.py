import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from data_sets import DATA_SETS
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf
from tiny import save_tiny_prior
from tiny_training import composed, write_images

from ud2m.cli.train import build_trainer, prepare
from ud2m.data import ImageDataModule
from ud2m.physics import OperatorFamily
from ud2m.training import AutoencoderModule, BridgeModule, DistillationModule, PriorModule

CONF = REPOSITORY / "conf"
# those of the paper have a file of their own
OTHERS = {*DATA_SETS, "mnist_sr4"}
# those that begin with the export of another one: test_latent_training.py
OTHERS |= {"digits_latent", "digits_consistency", "latent_consistency"}
OTHERS |= {"moving_digits_latent", "moving_digits_consistency"}
EXPERIMENTS = sorted({path.stem for path in (CONF / "experiment").glob("*.yaml")} - OTHERS)
IMAGE = 32


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    """Folders of micro priors by number of channels."""
    folder = tmp_path_factory.mktemp("priors")
    return {c: save_tiny_prior(folder / str(c), in_channels=c, out_channels=c) for c in (1, 3)}


def load_data(config, request):
    """Return the data module; MNIST is not downloaded for a test."""
    if config.data._target_.endswith(("MnistData", "MovingDigitsData")):
        shared = request.getfixturevalue("shared")
        config.data.root = str(shared / "data" / "mnist")
    return instantiate(config.data, _convert_="all")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_instantiates_and_takes_a_step(experiment, priors, tmp_path, request):
    with composed(f"experiment={experiment}", f"run_dir={tmp_path}", folder=tmp_path) as config:
        assert config.name == experiment
        config.prior = priors[config.data.channels]
        if OmegaConf.is_missing(config.data, "root"):  # images of one's own
            write_images(tmp_path / "images", 12, side=128)
            config.data.root = str(tmp_path / "images")
        resolved = prepare(config, tmp_path)
        assert OmegaConf.load(tmp_path / "config.yaml") == resolved
        data = load_data(resolved, request)
        module = instantiate(resolved.training, _convert_="all")
        trainer = build_trainer(resolved, tmp_path, [])
    assert isinstance(data, ImageDataModule)
    assert isinstance(module, AutoencoderModule | DistillationModule | PriorModule | BridgeModule)
    assert {type(logger) for logger in trainer.loggers} == {CSVLogger, TensorBoardLogger}
    steps = trainer.max_epochs * (data.samples_per_epoch // data.batch_size) // module.settings.accumulate
    assert steps == resolved.steps
    x0 = next(iter(data.test_dataloader()))[:1]
    streams = [torch.Generator().manual_seed(0)]
    total, _ = module.losses(x0, streams)
    assert total.isfinite()


@pytest.mark.parametrize("choice", choices("physics"))
def test_every_operator_instantiates(choice, priors, tmp_path):
    path = [f"physics.{choice}={tmp_path / 'mask.png'}"] if choice in ("mask", "kernel") else []
    if path:
        from ud2m.images import write_image

        write_image((torch.rand(1, IMAGE, IMAGE) < 0.5).float(), tmp_path / "mask.png")
    path += ["physics.class=Denoising"] if choice == "deepinv" else []
    if choice == "mask_collection":
        masks = np.packbits(np.random.default_rng(0).integers(0, 2, (3, IMAGE, IMAGE), dtype=np.uint8))
        np.savez(tmp_path / "masks.npz", **{"20-30% freeform": masks})
        path = [f"physics.masks={tmp_path / 'masks.npz'}", f"physics.operator.size={IMAGE}"]
    with composed(f"physics={choice}", *path, f"prior={priors[3]}", folder=tmp_path) as config:
        operator = instantiate(config.physics.operator, _convert_="all")
    assert isinstance(operator, OperatorFamily)
    shape = (3, 9, 2 * IMAGE, 2 * IMAGE) if choice.startswith("video") else (3, IMAGE, IMAGE)
    physics = operator.draw(2, shape, torch.Generator().manual_seed(0))
    assert physics.A(torch.rand(2, *shape)).isfinite().all()


@pytest.mark.parametrize(
    "override",
    [
        *(f"{group}={choice}" for group in ("network", "lora", "discriminator") for choice in choices(group)),
        *(f"loss/{group}={choice}" for group in ("distance", "features") for choice in choices(f"loss/{group}")),
        *(f"loss.{term}=0.1" for term in ("l2", "perceptual", "energy", "feature_energy", "adversarial")),
    ],
)
def test_every_part_can_be_chosen(override, priors, tmp_path, request, monkeypatch):
    if override in ("loss/distance=lpips", "loss/features=lpips"):
        monkeypatch.setenv("TORCH_HOME", str(request.getfixturevalue("shared") / "torch_home"))
    overrides = [override, f"prior={priors[3]}", "loss.adversarial=0.01"]
    if override.startswith("loss/features"):
        overrides.append("loss.feature_energy=0.1")
    if override in ("network=ram", "network=paper_ram"):
        overrides.append("network.warm_start.weights=null")  # the real architecture, with random weights
    with composed(*overrides, folder=tmp_path) as config:
        module = instantiate(config.training, _convert_="all")
    x0 = torch.rand(1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    total, _ = module.losses(x0, [torch.Generator().manual_seed(0)])
    total.backward()
    # RAM has heads for other numbers of channels too
    unused = {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}
    assert all("warm_start.network" in name and override.endswith("ram") for name in unused)


SEEING = {
    "ddrm_blur",
    "ddrm_jpeg",
    "ddrm_pool",
    "ddrm_super_resolution",
    "denoising",
    "gaussian_blur",
    "jpeg",
    "kernel",
}
SEEING |= {"motion_blur", "super_resolution", "uniform_blur"}
"""Pages of operators that see every region of an image."""


@pytest.mark.parametrize("choice", choices("physics"))
def test_the_start_is_as_coarse_as_the_operator_asks_for(choice, tmp_path):
    with composed(f"physics={choice}", folder=tmp_path) as config:
        scales = config.network.warm_start.scales
    assert scales == ([8, 4, 2] if choice in SEEING else [32, 16, 8, 4, 4, 2, 2, 2])


@pytest.mark.parametrize(
    ("experiment", "used"),
    [("photos_prior", set()), ("photos_bridge", {"physics", "network"})],
    ids=["prior", "bridge"],
)
def test_a_training_leaves_out_the_pages_that_it_does_not_use(experiment, used, tmp_path):
    groups = {"physics", "network", "lora", "loss", "discriminator"}
    with composed(f"experiment={experiment}", folder=tmp_path) as config:
        assert {group for group in groups & set(config) if config[group]} == used
    # those that are chosen by name are in the way of nothing
    chosen = ["physics=general", "network=conditioned", "lora=paper", "loss=default", "discriminator=paper"]
    with composed(f"experiment={experiment}", *chosen, folder=tmp_path) as config:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_accumulation_reaches_every_module(experiment, priors, tmp_path):
    with composed(f"experiment={experiment}", "accumulate=3", folder=tmp_path) as config:
        config.prior = priors[config.data.channels]
        module = instantiate(config.training, _convert_="all")
    assert module.settings.accumulate == 3


def test_the_wandb_logger_composes_beside_the_default_ones(tmp_path):
    with composed("logger=wandb", folder=tmp_path) as config:
        assert set(config.logger) == {"csv", "tensorboard", "wandb"}


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(MissingConfigException, match="Could not find 'experiment/phtos'"):
        composed("experiment=phtos", folder=tmp_path).__enter__()
    with pytest.raises(ConfigCompositionException, match="Could not override 'stepz'"):
        composed("stepz=3", folder=tmp_path).__enter__()


def test_composing_leaves_no_trace(tmp_path):
    with composed(folder=tmp_path):
        assert HydraConfig.initialized()
    assert not HydraConfig.initialized()


@pytest.mark.parametrize("command", ["train", "sample", "demo", "evaluate"])
def test_no_command_leaves_an_empty_log_file(command):
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose(command, return_hydra_config=True)
    assert set(config.hydra.job_logging.handlers) == {"console"}
    assert config.hydra.job_logging.root.level == "WARNING"
