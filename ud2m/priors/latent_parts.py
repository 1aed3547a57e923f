"""The parts of a small latent model of images or videos: built from plain options, and written as diffusers has it."""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, UMT5Config, UMT5EncoderModel

from ud2m.files import parse_json, write_bytes, write_json
from ud2m.priors.pipelines import CLASS, latent_channels

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP's tokenizer cuts a text into words (Radford et al., 2021)."""
BYTES = 512
"""Tokens of all bytes, within a word and at its end: no text is unknown to the tokenizer."""
CAPTIONS, MOST_CAPTIONS = "captions.txt", 100
"""File of a pipeline's folder with captions that it was trained with, one a line, and how many are kept."""


def build_vae(options: Mapping[str, Any]) -> Any:
    """Return an untrained autoencoder from the arguments of its class, the first of ``VAES`` unless named.

    Raises:
        ValueError: for another class, and for arguments that it cannot take.
    """
    return _built(VAES, options)


def build_latent_network(options: Mapping[str, Any]) -> Any:
    """Return an untrained network, of a class of ``NETWORKS``; otherwise as ``build_vae``."""
    return _built(NETWORKS, options)


def build_text_encoder(options: Mapping[str, Any]) -> Any:
    """Return an untrained text model, of a class of ``TEXT_MODELS``; otherwise as ``build_vae``.

    Its vocabulary holds ``BYTES`` tokens and start and end, and more for words.
    """
    if options.get("vocab_size", BYTES) < BYTES + 2:
        raise ValueError(f"vocab_size must be at least {BYTES + 2}, for all bytes, start and end, got {options}")
    return _built(TEXT_MODELS, {**options, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})


VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLWan": AutoencoderKLWan}
NETWORKS = {"UNet2DConditionModel": UNet2DConditionModel, "WanTransformer3DModel": WanTransformer3DModel}
TEXT_MODELS = {
    "CLIPTextModel": lambda **options: CLIPTextModel(CLIPTextConfig(**options)),
    "UMT5EncoderModel": lambda **options: UMT5EncoderModel(UMT5Config(**options)),
}


def _built(kinds: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    name = options.get(CLASS, next(iter(kinds)))
    if name not in kinds:
        raise ValueError(f"{CLASS} must be one of {', '.join(kinds)}, got {name!r}")
    try:
        return kinds[name](**{key: value for key, value in options.items() if key != CLASS})
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise ValueError(f"{name} cannot be built from {dict(options)}: {error}") from error


def learn_tokenizer(texts: Iterable[str], vocab_size: int, length: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair merges are learnt from texts.

    Args:
        texts: one or more captions each.
        vocab_size: tokens, of which ``BYTES`` and two are taken before words.
        length: tokens of a prompt at most, start and end among them.
    """
    tokenizer = Tokenizer(BPE(unk_token=END, end_of_word_suffix="</w>"))
    # as in transformers' CLIPTokenizer, which reads the result
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=max(vocab_size - BYTES, 0) + len(alphabet),
        min_frequency=1,
        special_tokens=[START, END],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    merges = [tuple(pair) for pair in parse_json(tokenizer.to_str())["model"]["merges"]]
    return tokenizer_of(merges[: vocab_size - BYTES - 2], length)


def tokenizer_of(merges: Sequence[tuple[str, str]], length: int) -> CLIPTokenizer:
    """Return the CLIP tokenizer with these merges, for prompts of ``length`` tokens at most."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [START, END, *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    pairs: Any = [tuple(pair) for pair in merges]  # their hint says strings, their code takes pairs
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=length)


def merges_of(tokenizer: CLIPTokenizer) -> list[list[str]]:
    """Return the merges of a tokenizer, which ``tokenizer_of`` takes."""
    return [list(pair) for pair in parse_json(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def assemble(
    vae: Any, text_encoder: Any, tokenizer: CLIPTokenizer, network: Any, scheduler: Mapping[str, Any]
) -> DiffusionPipeline:
    """Return the pipeline for a network of ``NETWORKS``, and the other parts; ``scheduler``: its noise table."""
    table = {key: value for key, value in scheduler.items() if key != CLASS}
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    if isinstance(network, WanTransformer3DModel):
        return WanPipeline(**parts, transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(**table))
    return StableDiffusionPipeline(
        **parts,
        unet=network,
        scheduler=DDIMScheduler(**table, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def latent_scale(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Return m and s of the scaled latents (z - m) s, from the autoencoder's configuration."""
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shape = (1, -1, *[1] * (like.ndim - 2))
        mean, std = (like.new_tensor(config[key]).view(shape) for key in ("latents_mean", "latents_std"))
        return mean, config.get("scaling_factor") or 1 / std
    return config.get("shift_factor") or 0.0, config.scaling_factor


def begin_clear(vae: Any) -> None:
    """Let an untrained autoencoder begin with latents of a deviation of about 1 and little noise.

    The usual initial weights make latents of about 0.1 under noise of 1: a decoder whose normalised layers see hardly
    anything of them learns the mean image first, and leaves it late.
    """
    last, channels = vae.quant_conv or vae.encoder.conv_out, latent_channels(vae)
    with torch.no_grad():
        last.weight[:channels] *= 10
        last.bias[channels:] = -6


def measured_scale(vae: Any, mean: Tensor, power: Tensor) -> dict[str, Any]:
    """Return what to write into the configuration, so that scaled latents have variance 1.

    Args:
        vae: an autoencoder with one factor, or with mean and standard deviation of each channel.
        mean: of the channels of its latents [c].
        power: their mean squares [c].
    """
    if "scaling_factor" in vae.config:
        return {"scaling_factor": power.mean().rsqrt().item()}
    return {"latents_mean": mean.tolist(), "latents_std": (power - mean.square()).sqrt().tolist()}


def to_latents(vae: Any, x0: Tensor) -> Tensor:
    """Return the scaled posterior means of images or videos x0 in [0, 1]."""
    mode = vae.encode(2 * x0 - 1).latent_dist.mode()
    mean, scale = latent_scale(vae, mode)
    return (mode - mean) * scale


def decode_unclipped(vae: Any, z: Tensor) -> Tensor:
    """Return D(z) before it is clipped to [-1, 1], as video autoencoders do it: what is clipped has no gradient."""
    parts: list[Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda _module, _given, output: parts.append(output))
    try:
        vae.decode(z)
    finally:
        handle.remove()
    x = torch.cat(parts, 2) if z.ndim == 5 else parts[0]
    patch = vae.config.get("patch_size")
    return x if patch is None else unpatchify(x, patch)


def encode_texts(pipeline: DiffusionPipeline, texts: Sequence[str], device: torch.device) -> tuple[Any, ...]:
    """Return what the pipeline's own ``encode_prompt`` returns for texts, without guidance."""
    taken = inspect.signature(pipeline.encode_prompt).parameters
    given = {
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "max_sequence_length": longest_prompt(pipeline),
        "do_classifier_free_guidance": False,
    }
    arguments = {key: value for key, value in given.items() if key in taken}
    return pipeline.encode_prompt(list(texts), device=device, **arguments)


def longest_prompt(pipeline: DiffusionPipeline) -> int | None:
    """Return the tokens that a pipeline pads texts to: its default, or fewer where its tokenizers take fewer.

    None for those that leave it to their tokenizer.
    """
    parameter = inspect.signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
    if parameter is None:
        return None
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers if tokenizer is not None]
    return min(parameter.default, max(lengths, default=parameter.default))


def save_half(part: Any, folder: Path) -> None:
    """Write a network of diffusers or transformers in float16."""
    with in_half([part]):
        part.save_pretrained(str(folder), safe_serialization=True)


def most_frequent(captions: Iterable[str]) -> tuple[str, ...]:
    """Return the different captions, the most frequent first, ``MOST_CAPTIONS`` at most."""
    return tuple(text for text, _ in Counter(captions).most_common(MOST_CAPTIONS))


def read_pipeline_captions(folder: Path) -> tuple[str, ...]:
    """Return the captions that a pipeline's folder holds; none where it has no file of them.

    Raises:
        ValueError: for a file that is no text.
    """
    file = folder / CAPTIONS
    try:
        return tuple(filter(None, file.read_text("utf-8").splitlines())) if file.is_file() else ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text in UTF-8, with one caption a line: {error}") from error


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, captions: Sequence[str] = ()) -> None:
    """Write a pipeline with its networks in float16, and captions beside it, as a folder that diffusers alone loads.

    Text models stay as they are: transformers would load them in float16, and diffusers the others in float32.
    """
    if captions:
        write_bytes(folder / CAPTIONS, "".join(f"{text}\n" for text in captions).encode())
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    with in_half([part for name, part in parts.items() if not name.startswith("text_encoder")]):
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    for file in folder.rglob("*.json"):
        content = parse_json(file.read_text())
        if content.pop("_name_or_path", None):  # where the parts lay on this machine
            write_json(file, content)


@contextmanager
def in_half(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Keep networks in float16 inside the context; their own values are back after it."""
    kept = [(tensor, tensor.data) for part in parts for tensor in (*part.parameters(), *part.buffers())]
    try:
        for tensor, value in kept:
            tensor.data = value.half() if value.is_floating_point() else value
        yield
    finally:
        for tensor, value in kept:
            tensor.data = value
