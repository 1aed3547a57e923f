"""Draw posterior samples: ``python sample.py model=<name or export folder> [input=...]``. See the README."""

import hydra
from omegaconf import DictConfig

from ud2m.cli.sample import main


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def sample(config: DictConfig) -> None:
    """Hand the composed configuration to the package."""
    main(config)


if __name__ == "__main__":
    sample()
