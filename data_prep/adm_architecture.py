"""The U-Nets of openai/guided-diffusion (ADM) and openai/improved-diffusion: their layers, and what was published.

`read_architecture` reads the shapes of a state dict. `layers` lists every layer of such a network under two names: the
one in the checkpoint and the one in a diffusers ``UNet2DModel``. What shapes cannot tell is in `Facts`.

Sources of the numbers: the flags in the READMEs of openai/guided-diffusion, openai/improved-diffusion and
jychoi118/P2-weighting, and ``configs/model_config.yaml`` of DPS2022/diffusion-posterior-sampling.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

Shapes = Mapping[str, tuple[int, ...]]

NORM_GROUPS = 32
"""Groups of every group norm in both repositories; shapes do not tell them."""


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell.

    Attributes:
        in_channels, out_channels: of the network; 2C outputs are a noise and a variance.
        model_channels: length of the sinusoidal embedding of the time.
        widths: channels of each level, from fine to coarse.
        num_res_blocks: residual blocks of a level on the way down; there is one more on the way up.
        attention: whether a level has attention; the middle block always has.
        residual_resampling: levels are joined by residual blocks, not by convolutions.
        scale_shift: the time scales and shifts the second norm of a residual block, instead of being added before it.
        num_classes: of a class-conditional network, or None.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    residual_resampling: bool
    scale_shift: bool
    num_classes: int | None

    @property
    def attention_widths(self) -> set[int]:
        """Channels of the layers with attention."""
        return {width for width, has in zip(self.widths, self.attention, strict=True) if has} | {self.widths[-1]}


@dataclass(frozen=True)
class Facts:
    """What the shapes do not tell.

    Attributes:
        heads, head_width: heads of an attention layer, or channels of a head; exactly one of both is set.
        qkv_order: rows of the joint projection: ``legacy`` (head, q/k/v, channel) or ``new`` (q/k/v, head, channel).
        dropout: rate in training.
        schedule: ``linear`` or ``cosine``, of ``steps`` times.
        rescale_timesteps: the network sees 1000 t / steps in place of t.
        prediction: ``epsilon`` or ``sample``, in the words of diffusers.
    """

    heads: int | None
    head_width: int | None
    qkv_order: str
    dropout: float
    schedule: str
    steps: int
    rescale_timesteps: bool
    prediction: str


@dataclass(frozen=True)
class Published:
    """A published network: the names of its files, its architecture, and what shapes do not tell."""

    files: tuple[str, ...]
    architecture: Architecture
    facts: Facts
    image_size: int


@dataclass(frozen=True)
class Layer:
    """One layer under its two names: ``source`` in the checkpoint, ``target`` in diffusers.

    ``kind``: conv3, conv1, linear, norm, embedding, qkv, projection. ``inputs`` and ``outputs`` are channels.
    """

    source: str
    target: str
    kind: str
    inputs: int
    outputs: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name in the checkpoint."""
        matrix = (self.outputs, self.inputs)
        weight = {
            "conv3": (*matrix, 3, 3),
            "conv1": (*matrix, 1, 1),
            "linear": matrix,
            "norm": (self.outputs,),
            "embedding": (self.inputs, self.outputs),
            "qkv": (*matrix, 1),
            "projection": (*matrix, 1),
        }[self.kind]
        found = {f"{self.source}.weight": weight}
        return found if self.kind == "embedding" else found | {f"{self.source}.bias": (self.outputs,)}


# --- from shapes to an architecture ----------------------------------------------------------------------------------


def read_architecture(shapes: Shapes) -> Architecture:
    """Return the architecture that a state dict of these shapes has.

    A few tensors are enough; whether all others fit is for `expected_shapes` to say.

    Raises:
        ValueError: when it is no U-Net of this family, with the reason.
    """
    if not any(name.startswith("output_blocks.") for name in shapes):
        raise ValueError(
            "the checkpoint has no output_blocks: it is no diffusion U-Net of guided-diffusion or improved-diffusion "
            f"(a classifier, perhaps); it begins with {', '.join(list(shapes)[:4]) or 'nothing'}"
        )
    resamplers = _resamplers(shapes)
    blocks = 1 + max(_indices(shapes, "output_blocks"))
    per_level = min(resamplers, default=blocks - 1) + 1
    levels = blocks // per_level
    gaps = sorted(set(range(max(_indices(shapes, "input_blocks")) + 1)) - _indices(shapes, "input_blocks"))
    if gaps and not resamplers:
        raise ValueError(
            f"input_blocks.{gaps[0]} has no weights: resampling without a convolution (conv_resample=False) has no "
            "counterpart in a UNet2DModel"
        )
    if per_level < 2 or blocks % per_level or set(resamplers) != {per_level * i - 1 for i in range(1, levels)}:
        raise ValueError(
            f"the {blocks} output blocks, with upsampling after {sorted(resamplers)}, are not levels of one length; "
            "only such networks have a counterpart in diffusers"
        )
    first = [f"input_blocks.{1 + per_level * level}" for level in range(levels)]
    widths = tuple(_shape(shapes, f"{block}.0.out_layers.3.weight")[0] for block in first)
    emb = _shape(shapes, f"{first[0]}.0.emb_layers.1.weight")[0]
    return Architecture(
        in_channels=_shape(shapes, "input_blocks.0.0.weight")[1],
        out_channels=_shape(shapes, "out.2.weight")[0],
        model_channels=_shape(shapes, "time_embed.0.weight")[1],
        widths=widths,
        num_res_blocks=per_level - 1,
        attention=tuple(any(name.startswith(f"{block}.1.") for name in shapes) for block in first),
        residual_resampling="in_layers" in resamplers.values(),
        scale_shift=emb == 2 * widths[0],
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
    )


def _indices(shapes: Shapes, part: str) -> set[int]:
    found = {int(match[1]) for name in shapes if (match := re.match(rf"{part}\.(\d+)\.", name))}
    return found or {0}


def _resamplers(shapes: Shapes) -> dict[int, str]:
    """Return the indices of output blocks that end with upsampling, and its first layer: in_layers or conv."""
    pattern = r"output_blocks\.(\d+)\.[1-9]\d*\.(in_layers|conv)\."
    return {int(match[1]): match[2] for name in shapes if (match := re.match(pattern, name))}


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if len(shapes.get(name, ())) < 2:
        found = f"has the shape {list(shapes[name])}" if name in shapes else "is missing"
        raise ValueError(f"cannot read the architecture: {name} {found}; the checkpoint is damaged or of another kind")
    return shapes[name]


# --- from an architecture to layers ----------------------------------------------------------------------------------


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the checkpoint, in its order."""
    return {name: shape for layer in layers(architecture) for name, shape in layer.shapes().items()}


def layers(architecture: Architecture) -> Iterator[Layer]:
    """Yield all layers in the order of the checkpoint."""
    a = architecture
    emb = 4 * a.model_channels
    yield Layer("time_embed.0", "time_embedding.linear_1", "linear", a.model_channels, emb)
    yield Layer("time_embed.2", "time_embedding.linear_2", "linear", emb, emb)
    if a.num_classes is not None:
        yield Layer("label_emb", "class_embedding", "embedding", a.num_classes, emb)
    yield from _down(a)
    width = a.widths[-1]
    yield from _residual(a, "middle_block.0", "mid_block.resnets.0", width, width)
    yield from _attention("middle_block.1", "mid_block.attentions.0", width)
    yield from _residual(a, "middle_block.2", "mid_block.resnets.1", width, width)
    yield from _up(a)
    yield Layer("out.0", "conv_norm_out", "norm", a.widths[0], a.widths[0])
    yield Layer("out.2", "conv_out", "conv3", a.widths[0], a.out_channels)


def _down(a: Architecture) -> Iterator[Layer]:
    yield Layer("input_blocks.0.0", "conv_in", "conv3", a.in_channels, a.widths[0])
    index, channels = 1, a.widths[0]
    for level, width in enumerate(a.widths):
        block = f"down_blocks.{level}"
        for i in range(a.num_res_blocks):
            yield from _residual(a, f"input_blocks.{index}.0", f"{block}.resnets.{i}", channels, width)
            if a.attention[level]:
                yield from _attention(f"input_blocks.{index}.1", f"{block}.attentions.{i}", width)
            index, channels = index + 1, width
        if level < len(a.widths) - 1:
            if a.residual_resampling:
                yield from _residual(a, f"input_blocks.{index}.0", f"{block}.downsamplers.0", width, width)
            else:
                yield Layer(f"input_blocks.{index}.0.op", f"{block}.downsamplers.0.conv", "conv3", width, width)
            index += 1


def _up(a: Architecture) -> Iterator[Layer]:
    skips = skip_widths(a)
    index, channels = 0, a.widths[-1]
    for level in reversed(range(len(a.widths))):
        block, width = f"up_blocks.{len(a.widths) - 1 - level}", a.widths[level]
        for i in range(a.num_res_blocks + 1):
            source = f"output_blocks.{index}"
            yield from _residual(a, f"{source}.0", f"{block}.resnets.{i}", channels + skips.pop(), width)
            if a.attention[level]:
                yield from _attention(f"{source}.1", f"{block}.attentions.{i}", width)
            index, channels = index + 1, width
        if level > 0:
            last = f"{source}.{1 + a.attention[level]}"
            if a.residual_resampling:
                yield from _residual(a, last, f"{block}.upsamplers.0", width, width)
            else:
                yield Layer(f"{last}.conv", f"{block}.upsamplers.0.conv", "conv3", width, width)


def skip_widths(a: Architecture) -> list[int]:
    """Return the channels of all outputs on the way down, which the way up takes from the end."""
    skips = [a.widths[0]]
    for level, width in enumerate(a.widths):
        skips += [width] * (a.num_res_blocks + (level < len(a.widths) - 1))
    return skips


def _residual(a: Architecture, source: str, target: str, inputs: int, outputs: int) -> Iterator[Layer]:
    yield Layer(f"{source}.in_layers.0", f"{target}.norm1", "norm", inputs, inputs)
    yield Layer(f"{source}.in_layers.2", f"{target}.conv1", "conv3", inputs, outputs)
    emb_outputs = outputs * (2 if a.scale_shift else 1)
    yield Layer(f"{source}.emb_layers.1", f"{target}.time_emb_proj", "linear", 4 * a.model_channels, emb_outputs)
    yield Layer(f"{source}.out_layers.0", f"{target}.norm2", "norm", outputs, outputs)
    yield Layer(f"{source}.out_layers.3", f"{target}.conv2", "conv3", outputs, outputs)
    if inputs != outputs:
        yield Layer(f"{source}.skip_connection", f"{target}.conv_shortcut", "conv1", inputs, outputs)


def _attention(source: str, target: str, width: int) -> Iterator[Layer]:
    yield Layer(f"{source}.norm", f"{target}.group_norm", "norm", width, width)
    yield Layer(f"{source}.qkv", target, "qkv", width, 3 * width)
    yield Layer(f"{source}.proj_out", f"{target}.to_out.0", "projection", width, width)


# --- what was published ----------------------------------------------------------------------------------------------


def _widths(model_channels: int, *multipliers: float) -> tuple[int, ...]:
    return tuple(int(multiplier * model_channels) for multiplier in multipliers)


def _at(levels: int, *attention: int) -> tuple[bool, ...]:
    return tuple(level in attention for level in range(levels))


_ADM = Facts(
    heads=None,
    head_width=64,
    qkv_order="legacy",
    dropout=0.0,
    schedule="linear",
    steps=1000,
    rescale_timesteps=False,
    prediction="epsilon",
)
_IMPROVED = Facts(
    heads=4,
    head_width=None,
    qkv_order="legacy",
    dropout=0.0,
    schedule="cosine",
    steps=4000,
    rescale_timesteps=True,
    prediction="epsilon",
)
_ADM_256 = Architecture(
    in_channels=3,
    out_channels=6,
    model_channels=256,
    widths=_widths(256, 1, 1, 2, 2, 4, 4),
    num_res_blocks=2,
    attention=_at(6, 3, 4, 5),
    residual_resampling=True,
    scale_shift=True,
    num_classes=None,
)
_ADM_64 = replace(
    _ADM_256,
    model_channels=192,
    widths=_widths(192, 1, 2, 3, 4),
    num_res_blocks=3,
    attention=_at(4, 1, 2, 3),
    num_classes=1000,
)
_IMPROVED_64 = replace(
    _ADM_64,
    model_channels=128,
    widths=_widths(128, 1, 2, 3, 4),
    attention=_at(4, 2, 3),
    residual_resampling=False,
    num_classes=None,
)

PUBLISHED = (
    Published(("256x256_diffusion_uncond.pt",), _ADM_256, _ADM, 256),
    Published(("lsun_horse_nodropout.pt",), _ADM_256, _ADM, 256),
    Published(("lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt"), _ADM_256, replace(_ADM, dropout=0.1), 256),
    Published(("256x256_diffusion.pt",), replace(_ADM_256, num_classes=1000), _ADM, 256),
    Published(("64x64_diffusion.pt",), _ADM_64, replace(_ADM, qkv_order="new", dropout=0.1, schedule="cosine"), 64),
    Published(
        ("128x128_diffusion.pt",),
        replace(_ADM_256, widths=_widths(256, 1, 1, 2, 3, 4), attention=_at(5, 2, 3, 4), num_classes=1000),
        replace(_ADM, heads=4, head_width=None),
        128,
    ),
    Published(
        ("512x512_diffusion.pt",),
        replace(_ADM_256, widths=_widths(256, 0.5, 1, 1, 2, 2, 4, 4), attention=_at(7, 4, 5, 6), num_classes=1000),
        _ADM,
        512,
    ),
    Published(
        ("ffhq_10m.pt", "ffhq_baseline.pt", "ffhq_p2.pt"),
        replace(
            _ADM_256,
            model_channels=128,
            widths=_widths(128, 1, 1, 2, 2, 4, 4),
            num_res_blocks=1,
            attention=_at(6, 4),
        ),
        _ADM,
        256,
    ),
    Published(("imagenet64_uncond_100M_1500K.pt", "imagenet64_uncond_vlb_100M_1500K.pt"), _IMPROVED_64, _IMPROVED, 64),
    Published(
        ("imagenet64_cond_270M_250K.pt",),
        replace(_IMPROVED_64, model_channels=192, widths=_widths(192, 1, 2, 3, 4), num_classes=1000),
        replace(_IMPROVED, rescale_timesteps=False),
        64,
    ),
    Published(
        ("cifar10_uncond_50M_500K.pt", "cifar10_uncond_vlb_50M_500K.pt"),
        replace(_IMPROVED_64, widths=_widths(128, 1, 2, 2, 2), attention=_at(4, 1, 2)),
        replace(_IMPROVED, dropout=0.3),
        32,
    ),
    Published(
        ("lsun_uncond_100M_1200K_bs128.pt", "lsun_uncond_100M_2400K_bs64.pt"),
        replace(
            _IMPROVED_64,
            widths=_widths(128, 1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention=_at(6, 4),
            scale_shift=False,
        ),
        replace(_IMPROVED, heads=1, schedule="linear", steps=1000, rescale_timesteps=False),
        256,
    ),
)


def recognise(architecture: Architecture, file: str) -> Published | None:
    """Return the published network of this architecture, or None when there is none.

    Several files have the shapes of ``256x256_diffusion_uncond.pt``. They differ in dropout alone, which a frozen
    network does not use: the name of the file decides, and otherwise the first of the table is taken.
    """
    found = [entry for entry in PUBLISHED if entry.architecture == architecture]
    named = [entry for entry in found if file in entry.files]
    return next(iter(named + found), None)
