"""The commands ``ud2m train``, ``ud2m sample``, ``ud2m evaluate`` and ``ud2m app``.

Their settings are composed, and refused where they cannot be, before PyTorch is imported: that takes seconds.
"""

import os
import re
import sys
import textwrap
from importlib.metadata import version
from itertools import takewhile

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from ud2m.cli import as_override
from ud2m.cli.errors import user_facing
from ud2m.cli.pages import check_app, check_evaluation, check_sampling, check_training
from ud2m.cli.process import prepare_process
from ud2m.cli.sweep import survives_sweep
from ud2m.cli.words import conf_folder, explained, readable

USAGE = """ud2m COMMAND [KEY=VALUE ...]

  ud2m train      train a sampler, or a prior; -m sweeps
  ud2m sample     draw posterior samples for test images or your own files
  ud2m evaluate   compare methods on operators and data sets
  ud2m app        show a page in the browser, to try pictures on
  ud2m models     list the models that ship with the package

ud2m COMMAND --help explains the keys; ud2m --version. Documentation: README.md and docs/."""

FLAGS = (
    "--cfg job prints the settings of all pages, --config-dir FOLDER adds your own pages, "
    "--hydra-help explains further flags."
)
_KEY = re.compile(r"(?:  - )?(\w+): +(\S.*?) +# (.*)")
WIDTH = 120
COMMAND = "UD2M_COMMAND"
"""Set to the command that runs, for the processes that it starts."""


def start() -> None:
    """Run ``ud2m COMMAND [KEY=VALUE ...]``."""
    name, *arguments = [*repeated(), *sys.argv[1:]] or ["--help"]
    if name in TASKS:
        os.environ[COMMAND] = name
        sys.argv[1:] = arguments
        run_command(name)
    elif name in ("-h", "--help"):
        print(USAGE)
    elif name == MODELS:
        list_models()
    elif name == "--version":
        print(f"ud2m {version('ud2m')}")
    else:
        print(f"error: no command {name!r}; there are {', '.join((*TASKS, MODELS))} (ud2m --help)", file=sys.stderr)
        sys.exit(1)


def repeated() -> list[str]:
    """Return the command's name in a process that Lightning starts beside this one: it repeats what follows alone."""
    return [os.environ[COMMAND]] if COMMAND in os.environ and "LOCAL_RANK" in os.environ else []


def run_command(name: str) -> None:
    """Compose the settings of a command from the arguments of the program and run it; or explain it, for ``--help``."""
    if {"-h", "--help"} & set(sys.argv):
        print(help_of(name))
    elif "--version" in sys.argv:
        print(f"ud2m {version('ud2m')}")
    else:
        prepare_process()
        _start(name)


@user_facing
def _start(name: str) -> None:
    conf, given = conf_folder(), sys.argv[1:]
    sys.argv[1:] = [as_override(word) for word in readable(name, given, conf)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints several lines of its own and exits
    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(TASKS[name])()
    except HydraException as error:
        raise ValueError(explained(error, name, given, conf)) from error


def help_of(name: str) -> str:
    """Return what a command does: the comments of its page, with the names that its groups of pages offer."""
    page = (conf_folder() / f"{name}.yaml").read_text()
    lines = page.partition("\nhydra:")[0].splitlines()
    head = [line[2:] for line in takewhile(lambda line: line.startswith("#"), lines)]
    found = [match.groups() for match in map(_KEY.fullmatch, lines) if match]
    keys = [f"  {f'{key}={value}':<33}  {meaning}" for key, value, meaning in found]
    pages = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in conf_folder().iterdir()}
    chosen = [group for group in pages if re.search(rf"(?:- |conf/){group}\b", page)]
    names = [
        textwrap.fill(f"{group}: {', '.join(pages[group])}", WIDTH, initial_indent="  ", subsequent_indent="      ")
        for group in sorted(chosen)
    ]
    offered = ["Pages:", *names] if names else []
    return "\n".join([*head, "", "Keys and defaults:", *keys, "", *offered, FLAGS])


@survives_sweep
def _train(config: DictConfig) -> float | None:
    check_training(config)
    from ud2m.cli.train import main

    return main(config)


@user_facing
def _sample(config: DictConfig) -> None:
    check_sampling(config)
    from ud2m.cli.sample import SamplingRun, main

    if config.get("sampler") is None:
        main(config, SamplingRun)
    elif config.estimate:
        from ud2m.cli.latent_estimate import latent_estimate

        print(latent_estimate(config))
    else:
        from ud2m.cli.sample_video import run_of

        main(config, run_of(config))


@user_facing
def _evaluate(config: DictConfig) -> None:
    check_evaluation(config)
    from ud2m.cli.evaluate import main

    main(config)


@user_facing
def _app(config: DictConfig) -> None:
    check_app(config)
    from ud2m.cli.app import main

    main(config)


@user_facing
def list_models() -> None:
    """Print the models that ship with the package."""
    from ud2m.cli.models import models

    print(models())


MODELS = "models"
TASKS = {"train": _train, "sample": _sample, "evaluate": _evaluate, "app": _app}
