"""The model card of a sampler: what ``README.md`` says where the model is shared."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

SCORES = {"psnr_mean": "PSNR of the mean [dB]", "psnr": "PSNR [dB]", "ssim": "SSIM", "lpips": "LPIPS", "r": "r"}
"""Scores of a row of ``metrics.json`` that a card shows; ``r`` is 1 for calibrated samples."""


TEXT = """# {name}

A few-step posterior sampler for imaging inverse problems: an unfolded and distilled diffusion model
([UD2M](https://arxiv.org/abs/2507.02686), trained with the `ud2m` package). For an observation y = A x + sigma_y w it
draws samples of p(x | y) in {nfe} network evaluations.

| | |
|---|---|
{facts}

## Use

```python
from ud2m import (PosteriorSampler)

sampler = PosteriorSampler.from_pretrained("{name}")
samples = sampler(y, physics, sigma_y={sigma_y:g}, num_samples=8)  # [B, 8, C, H, W] in [0, 1]
```

`adapter_model.safetensors` is a LoRA as peft writes it, and fits the prior's network without this package:

```python
from diffusers import UNet2DModel
from peft import PeftModel

network = PeftModel.from_pretrained(UNet2DModel.from_pretrained("{prior}"), "{name}")
```

## Scores

{scores}

The sampler is as good as its prior and its training: what the observation does not determine is drawn from what the
prior knows. Do not read made-up details as measured ones.
"""


def model_card(name: str, content: Mapping[str, Any], nfe: int, metrics: Sequence[Mapping[str, Any]] = ()) -> ModelCard:
    """Return the card of an export.

    Args:
        name: hub id of the model.
        content: of its ``config.json``.
        nfe: network evaluations per sample.
        metrics: rows of ``metrics.json``.
    """
    sampler, network, prior = content["sampler"], content["network"], content["prior"]
    info = sampler["info"]
    facts = {
        "modules K, steps N": f"{network['num_blocks']}, {sampler['num_steps']}",
        "start, rule": f"{network['warm_start']['name']}, {network['rule']['name']}",
        "operator": f"`{json.dumps(info.get('physics', {}).get('operator', 'not said'))}`",
        "noise level sigma_y": f"{sampler['sigma_y']:g} (images in [0, 1])",
        "prior": f"`{prior['reference']}`, fingerprint `{prior['fingerprint'][:12]}`",
        "LoRA": f"rank {content['lora']['rank']}, alpha {content['lora']['alpha']:g}",
        "experiment": f"`{info.get('experiment', 'not said')}`",
        "training data": f"`{info.get('data', 'not said')}`",
    }
    text = TEXT.format(
        name=name,
        nfe=nfe,
        prior=prior["reference"],
        sigma_y=sampler["sigma_y"],
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        scores=table(metrics) or "None were given.",
    )
    return ModelCard(f"---\n{card_data(name, info, metrics).to_yaml()}\n---\n\n{text}")


def card_data(name: str, info: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> ModelCardData:
    """Return the metadata of a card; the hub reads the scores of the last row from it."""
    last = metrics[-1] if metrics else {}
    data = str(info.get("data", "not said"))
    results = [
        EvalResult("image-to-image", data, data, metric_type=key, metric_name=SCORES[key], metric_value=last[key])
        for key in SCORES
        if isinstance(last.get(key), int | float)
    ]
    return ModelCardData(
        library_name="ud2m",
        pipeline_tag="image-to-image",
        tags=["inverse-problems", "posterior-sampling", "diffusion", "lora"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def table(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown; empty without rows."""
    shown = [key for key in SCORES if any(isinstance(row.get(key), int | float) for row in metrics)]
    if not shown:
        return ""
    lines = [["method", "NFE", *(SCORES[key] for key in shown)]]
    for row in metrics:
        values = [f"{row[key]:.4g}" if isinstance(row.get(key), int | float) else "-" for key in shown]
        lines.append([str(row.get("method", "-")), str(row.get("nfe", "-")), *values])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
