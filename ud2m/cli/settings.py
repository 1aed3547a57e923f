"""The settings of the commands, their types and ranges: all that is known of them before PyTorch is imported."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ud2m.names import allowed, as_written, unknown

_WORDS = {"no": False, "off": False, "yes": True, "on": True}
"""What YAML reads as a truth value, and Hydra's command line as a text."""

Flag = Annotated[
    bool, Field(strict=True), BeforeValidator(lambda v: _WORDS.get(v.lower(), v) if isinstance(v, str) else v)
]
Count = Annotated[int, Field(strict=True, ge=1, description="a whole number of at least 1")]
Natural = Annotated[int, Field(strict=True, ge=0, description="a whole number of at least 0")]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1, description="a whole number from 0 to 2^32 - 1")]
Side = Annotated[int, Field(strict=True, ge=16, description="a whole number of at least 16")]
Text = Annotated[str, Field(strict=True, min_length=1, description="a text that is not empty")]
Names = Annotated[list[Text], Field(min_length=1, description="a list of texts, [a,b], of at least one")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a positive number")]
NoiseLevel = Annotated[
    float,
    Field(strict=True, gt=0, le=100, description="a positive noise level of at most 100, where images lie in [0, 1]"),
]
Port = Annotated[int, Field(strict=True, ge=1, le=65535, description="a whole number from 1 to 65535")]
Share = Annotated[float, Field(strict=True, ge=0, le=1, description="a number in [0, 1]")]
Scale = Annotated[float, Field(strict=True, ge=1e-3, le=1e3, description="a number from 0.001 to 1000")]
Symmetries = Annotated[Literal[1, 2, 8], BeforeValidator(lambda v: None if isinstance(v, bool) else v)]
"""True is not 1."""
Device = Annotated[
    str, Field(strict=True, pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps")
]
Precision = Literal["float32", "bfloat16", "float16", "auto"]
Page = Annotated[dict[str, Any], Field(description="the name of a page, or settings of one, KEY.SETTING=VALUE")]


class Settings(BaseModel):
    """What the pages of all commands share; a key that is not there is refused."""

    model_config = ConfigDict(extra="forbid")


class TrainSettings(Settings):
    """Settings of ``ud2m train``."""

    data: Page
    physics: Page | None = None
    network: Page | None = None
    lora: Page | None = None
    loss: Page | None = None
    discriminator: Page | None = None
    training: Page
    trainer: Page
    logger: Page
    prior: Text
    architecture: Text | None
    name: Text
    seed: Seed
    steps: Count
    validate_every: Count
    accumulate: Count
    checkpoint_every: Count | None
    give_up_after: Natural | None
    resume: Flag | Literal["auto"]
    export: Text | None
    estimate: Flag
    device_tflops: Positive
    run_dir: Text


class SampleSettings(Settings):
    """Settings of ``ud2m sample``."""

    data: Page
    physics: Page | None = None
    methods: Page
    model: Text
    prior: Text | None
    input: Text | None
    degraded: Flag
    sigma_y: NoiseLevel | Literal["auto"] | None
    num_samples: Count
    num_steps: Count | None
    grid_power: Scale | None
    eta: Share | Literal["fresh"] | None
    symmetries: Symmetries | None
    step_scale: Scale | None
    chunk_size: Count
    tile: Side | None
    seed: Seed
    device: Device
    precision: Precision
    compile: Text | None
    devices: Count | Literal["auto"]
    num_nodes: Count
    sampler: Page | None = None
    pipeline: Text | None
    image_pipeline: Text | None
    fps: Scale | None
    prompt: Text | None
    estimate: Flag
    skip_broken: Flag
    lpips: Literal["alex", "vgg", "squeeze"] | None
    show: Natural
    crop: Count | None
    compare: Flag
    tune_samples: Count
    output: Text
    overwrite: Flag


class EvaluateSettings(Settings):
    """Settings of ``ud2m evaluate``."""

    name: Text
    methods: Names
    operators: Names
    datasets: Names
    metrics: Names
    prior: Text
    num_samples: Count
    seed: Seed
    tune: Flag
    tune_images: Count
    tune_samples: Count
    tune_by: Names | Text  # Hydra reads it, as a list or a word
    unsupported: Literal["error", "skip"]
    reference: Text | None
    show: Natural
    device: Device
    precision: Precision
    compile: Text | None
    devices: Count | Literal["auto"]
    num_nodes: Count
    results: Text


class AppSettings(Settings):
    """Settings of ``ud2m app``."""

    model: Text
    max_samples: Count
    device: Device
    host: Text
    port: Port


COMMANDS: Mapping[str, type[Settings]] = {
    "train": TrainSettings,
    "sample": SampleSettings,
    "evaluate": EvaluateSettings,
    "app": AppSettings,
}


def check(config: DictConfig, settings: type[Settings]) -> None:
    """Refuse what is no value of a setting, in one line; ``no`` and ``off`` become false in the configuration.

    Raises:
        ValueError: with the key, what it may be, and what was given; for a key that is not there, the nearest one.
    """
    given = {str(key): _plain(config, str(key)) for key in config}
    fields = settings.model_fields
    try:
        values = settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if key not in fields:
            raise ValueError(unknown("key", key, fields)) from error
        if first["type"] == "missing":
            raise ValueError(f"{key} is missing") from error
        raise ValueError(f"{key} must be {allowed(fields[key])}, got {as_written(given[key])}") from error
    with open_dict(config):
        for key, value in given.items():
            if value != getattr(values, key):
                config[key] = getattr(values, key)


def _plain(config: DictConfig, key: str) -> Any:
    node = OmegaConf.to_container(config, resolve=False).get(key)  # type: ignore[union-attr]
    # pages may hold values that are still to be given: only what is no page is resolved
    if isinstance(node, dict):
        return node
    value = config[key]
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value
