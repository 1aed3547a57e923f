"""Train: ``python train.py experiment=<name> [overrides]``; ``-m`` sweeps. See conf/ and the README."""

import hydra
from omegaconf import DictConfig

from ud2m.cli.train import main


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def train(config: DictConfig) -> float | None:
    """Hand the composed configuration to the package."""
    return main(config)


if __name__ == "__main__":
    train()
