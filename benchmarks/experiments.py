"""Configurations and training modules of experiments, for benchmarks of a step."""

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import ud2m.cli  # noqa: F401 (registers the resolvers of conf/)
from ud2m.cli.commands import conf_folder
from ud2m.cli.objects import build
from ud2m.training import DistillationModule


def composed(experiment: str, *overrides: str) -> DictConfig:
    """Return the configuration of ``python train.py experiment=...``."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # settings may depend on the names of the chosen pages
    return config


def training_module(experiment: str, *overrides: str) -> DistillationModule:
    """Return the training module that ``python train.py experiment=...`` would train."""
    return build(composed(experiment, *overrides).training, "training")
