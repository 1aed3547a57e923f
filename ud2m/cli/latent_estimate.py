"""What sampling with a latent prior would take, from shapes alone: ``sample.py sampler=latino estimate=true``."""

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ud2m.precision import DTYPES, check_precision
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.priors.latent_parts import longest_prompt
from ud2m.training.cost import FLOAT, Autocast, Counter, gigabytes

VIDEO = (25, 768, 1280)
"""Frames, height and width of LVTINO's authors: networks of videos do not tell for which sizes they were made."""
HALF = 2
"""Bytes of a number in bfloat16 and float16."""


@torch.no_grad()
def latent_estimate(config: DictConfig) -> str:
    """Return parameters, operations and memory of one image or video, as a table.

    Its sides are those that the pipeline was trained on, or ``VIDEO`` for one of videos. Memory: the weights,
    and the largest sum of tensors that are alive at once in one evaluation of network, encoder or decoder, without
    gradients. The autoencoder is in float32 unless ``sampler.vae_dtype`` says otherwise.

    Raises:
        FileNotFoundError: when the pipeline's architecture is not at hand.
        ValueError: for an unknown precision.
    """
    prior = LatentPrior.on_meta(str(config.sampler.reference))
    precision, vae_precision = str(config.precision), str(config.sampler.vae_dtype)
    size = VIDEO if prior.video else prior.default_size
    sizes = {}
    for name in (precision, vae_precision):
        check_precision(name)
        sizes[name] = FLOAT if DTYPES.get(name) is None else HALF
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in prior.parts.items()}
    weights = sum(sizes[vae_precision if name == "vae" else precision] * count for name, count in counts.items())
    x = torch.empty(1, prior.channels, *size, device="meta")
    z = torch.empty(1, *prior.latent_shape(size), device="meta")
    calls: dict[str, tuple[Callable[[], Tensor], str]] = {
        "network": (lambda: prior.estimate(z, prior.table.num_times - 1, blank_prompt(prior)), precision),
        "encoder": (lambda: prior.encode(x), vae_precision),
        "decoder": (lambda: prior.decode(z), vae_precision),
    }
    rows = [(f"parameters, {name}", f"{count:,}") for name, count in counts.items()]
    what = "video" if prior.video else "image"
    rows += [(what, f"{'x'.join(map(str, size))}, {prior.channels} channels"), ("weights", gigabytes(weights))]
    most = 0.0
    for name, (call, dtype) in calls.items():
        counter = Counter()
        counter.known |= {tensor.untyped_storage()._cdata for tensor in prior.parts.state_dict().values()}
        with counter, Autocast(None):
            call()
        peak = counter.peak * sizes[dtype] / FLOAT
        most = max(most, peak)
        rows.append((f"{name}, one evaluation", f"{counter.flops / 1e12:.4g} TFLOPs, {gigabytes(peak)} in {dtype}"))
    rows.append((f"memory of one {what}", gigabytes(weights + most)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def blank_prompt(prior: LatentPrior) -> Prompt:
    """Return a prompt without values, of the shapes that the prior's text models give."""
    texts = [prior.parts[name] for name in sorted(prior.parts) if name.startswith("text_encoder")]
    configs: list[Any] = [text.config for text in texts]
    length = longest_prompt(prior.pipeline) or configs[0].max_position_embeddings
    embeds = torch.empty(1, length, sum(config.hidden_size for config in configs), device="meta")
    pooled = torch.empty(1, configs[-1].projection_dim, device="meta") if len(configs) > 1 else None
    return Prompt(embeds, pooled)
