"""What sampling with a latent prior would take, from shapes alone: ``sample.py sampler=latino estimate=true``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ud2m.precision import DTYPES, check_precision
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.priors.latent_parts import longest_prompt
from ud2m.samplers.lvtino import check_channels
from ud2m.training.cost import FLOAT, Autocast, Counter, gigabytes

VIDEO = (25, 768, 1280)
"""Frames, height and width of LVTINO's authors: networks of videos do not tell for which sizes they were made."""
HALF = 2
"""Bytes of a number in bfloat16 and float16."""


@torch.no_grad()
def latent_estimate(config: DictConfig) -> str:
    """Return parameters, operations and memory of one image or video, as a table for each pipeline.

    Its sides are those that the pipeline was trained on, or ``VIDEO`` for one of videos, whose frames an image prior
    beside it sees ``chunk_size`` at once. Memory: all weights, and the largest sum of tensors that are alive at once in
    one evaluation of network, encoder or decoder, without gradients. Autoencoders are in float32 unless
    ``sampler.vae_dtype`` says otherwise.

    Raises:
        FileNotFoundError: when a pipeline's architecture is not at hand.
        ValueError: for an unknown precision, a sampler without a pipeline, and an image prior of other channels.
    """
    sampler = config.sampler
    if "reference" not in sampler:
        raise ValueError("estimate=true belongs to samplers with a pipeline; this one has no network")
    prior = LatentPrior.on_meta(str(sampler.reference))
    size = VIDEO if prior.video else prior.default_size
    parts = [_Part(config, prior, 1, size)]
    if "image_reference" in sampler and sampler.eta < 1:
        images = LatentPrior.on_meta(str(sampler.image_reference))
        check_channels(images, prior.channels)
        parts.append(_Part(config, images, min(sampler.chunk_size, size[0]), size[1:]))
    most = sum(part.weights for part in parts) + max(part.peak for part in parts)
    parts[-1].rows.append((f"memory of one {'video' if prior.video else 'image'}", gigabytes(most)))
    width = max(len(name) for part in parts for name, _ in part.rows)
    return "\n\n".join("\n".join(f"{name:<{width}}  {value}" for name, value in part.rows) for part in parts)


class _Part:
    """What one prior takes: bytes of its weights, the largest peak of its evaluations, and all of it in rows."""

    def __init__(self, config: DictConfig, prior: LatentPrior, count: int, size: Sequence[int]):
        precision, vae_precision = str(config.precision), str(config.sampler.vae_dtype)
        sizes = {}
        for name in (precision, vae_precision):
            check_precision(name)
            sizes[name] = FLOAT if DTYPES.get(name) is None else HALF
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in prior.parts.items()}
        self.weights = sum(sizes[vae_precision if name == "vae" else precision] * n for name, n in counts.items())
        x = torch.empty(count, prior.channels, *size, device="meta")
        z = torch.empty(count, *prior.latent_shape(tuple(size)), device="meta")
        prompt = blank_prompt(prior).expand(count)
        calls: dict[str, tuple[Callable[[], Tensor], str]] = {
            "network": (lambda: prior.estimate(z, prior.table.num_times - 1, prompt), precision),
            "encoder": (lambda: prior.encode(x), vae_precision),
            "decoder": (lambda: prior.decode(z), vae_precision),
        }
        self.rows = [("pipeline", str(prior.reference))]
        self.rows += [(f"parameters, {name}", f"{number:,}") for name, number in counts.items()]
        at_once = f"{count} of " if count > 1 else ""
        shape = f"{at_once}{'x'.join(map(str, size))}, {prior.channels} channels"
        self.rows += [("video" if prior.video else "image", shape), ("weights", gigabytes(self.weights))]
        self.peak = 0.0
        for name, (call, dtype) in calls.items():
            counter = Counter()
            counter.known |= {tensor.untyped_storage()._cdata for tensor in prior.parts.state_dict().values()}
            with counter, Autocast(None):
                call()
            peak = counter.peak * sizes[dtype] / FLOAT
            self.peak = max(self.peak, peak)
            self.rows.append(
                (f"{name}, one evaluation", f"{counter.flops / 1e12:.4g} TFLOPs, {gigabytes(peak)} in {dtype}")
            )


def blank_prompt(prior: LatentPrior) -> Prompt:
    """Return a prompt without values, of the shapes that the prior's text models give."""
    texts = [prior.parts[name] for name in sorted(prior.parts) if name.startswith("text_encoder")]
    configs: list[Any] = [text.config for text in texts]
    length = longest_prompt(prior.pipeline) or configs[0].max_position_embeddings
    embeds = torch.empty(1, length, sum(config.hidden_size for config in configs), device="meta")
    pooled = torch.empty(1, configs[-1].projection_dim, device="meta") if len(configs) > 1 else None
    return Prompt(embeds, pooled)
