"""Priors and models that ship with the package, by name. Imports nothing heavy: a wrong name is answered at once."""

from pathlib import Path

from ud2m.files import is_plain
from ud2m.names import unknown

SHIPPED = Path(__file__).parents[1] / "pretrained"
ARCHITECTURES = Path(__file__).parents[1] / "architectures"
"""Folders of published networks without their weights, for ``Prior.from_pretrained`` on the meta device."""
SCHEDULER_FILE, PSI_FILE = "scheduler_config.json", "psi.safetensors"
PIPELINES: dict[str, dict[str, str]] = {
    "sdxl_dmd2": {
        "reference": "stabilityai/stable-diffusion-xl-base-1.0",
        "vae": "madebyollin/sdxl-vae-fp16-fix",
        "unet_weights": "tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.bin",
        "scheduler": "lcm",
    },
    "sdxl_lcm_lora": {
        "reference": "stabilityai/stable-diffusion-xl-base-1.0",
        "vae": "madebyollin/sdxl-vae-fp16-fix",
        "lora": "latent-consistency/lcm-lora-sdxl",
        "scheduler": "lcm",
    },
    "lcm_sd15": {"reference": "SimianLuo/LCM_Dreamshaper_v7"},
    "wan_causvid": {
        "reference": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "unet_weights": "tianweiy/CausVid/bidirectional_checkpoint2/model.pt",
        "scheduler": "lcm",
    },
}
"""Published pipelines by name: arguments of ``LatentPrior.from_pretrained``. They are fetched from the hub."""
MARKS = {"prior": SCHEDULER_FILE, "model": PSI_FILE, "pipeline": "model_index.json"}
"""The file by which a folder is known, by kind."""


def shipped_folder(name: str) -> Path | None:
    """Return the folder of a prior or model that ships with the package, or None when the name is not one of them."""
    return subfolder(SHIPPED, name)


def subfolder(parent: Path, name: str) -> Path | None:
    """Return the folder of this name directly below another one, or None when there is none."""
    return parent / name if is_plain(name) and (parent / name).is_dir() else None


def check_reference(kind: str, reference: str) -> None:
    """Refuse a name that can be no reference: nothing shipped, no folder, and no hub id, which has a slash.

    Args:
        kind: of ``MARKS``.
        reference: what the user wrote.

    Raises:
        FileNotFoundError: with the nearest name and all shipped ones.
    """
    known = sorted(path.parent.name for path in SHIPPED.glob(f"*/{MARKS[kind]}"))
    if kind == "pipeline":
        known += PIPELINES
    if reference in known or Path(reference).is_dir() or "/" in reference:
        return
    raise FileNotFoundError(f"{unknown(kind, reference, known)}; or give a folder, or a hub id OWNER/NAME")
