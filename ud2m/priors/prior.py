"""A frozen pre-trained diffusion network, seen as a denoiser of noisy images in [0, 1], and its LoRA adapter."""

import copy
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import Tensor, nn

from ud2m.precision import fastest_layout, full_precision
from ud2m.priors.adm import NETWORKS
from ud2m.priors.attention import attend_locally
from ud2m.priors.plug_and_play import PriorDenoiser
from ud2m.priors.schedule import VPSchedule, abar
from ud2m.priors.schedulers import PREDICTIONS, read_scheduler
from ud2m.priors.shipped import ARCHITECTURES, SCHEDULER_FILE, shipped_folder, subfolder
from ud2m.priors.store import LABEL, find_files, fingerprint, load_network, read_object, read_weights


@dataclass(frozen=True)
class LoraSpec:
    """What is adapted: LoRA of ``rank`` and scale ``alpha / rank`` on the layers whose name ends with a target.

    ``output_conv`` trains a full copy of the output convolution too, as the authors' code does. ``rank = 0`` adapts
    nothing (psi alone is trained).
    """

    rank: int = 5
    alpha: float = 1.5
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    output_conv: bool = True

    def __post_init__(self):
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(f"LoRA needs rank >= 0 and alpha > 0, got rank={self.rank}, alpha={self.alpha}")
        object.__setattr__(self, "targets", tuple(self.targets))

    def to_dict(self) -> dict:
        """Return the plain values, for a JSON file."""
        return asdict(self) | {"targets": list(self.targets)}


class Prior(nn.Module):
    """Wrap a frozen ``UNet2DModel`` as ``denoiser(x_sigma, sigma) -> x0_hat`` (design: the only place that knows VP).

    With abar = 1 / (1 + 4 sigma^2) the network is called on ``x_t = sqrt(abar) (2 x_sigma - 1)`` at the continuous time
    ``t(sigma)``; for eps-prediction ``x0_hat = x_sigma - sigma eps`` (the scheduler's x0 formula, rescaled to [0, 1]).
    Networks with 2C output channels also predict a variance, which is ignored.

    Args:
        unet: the network; its parameters are frozen here and it stays in eval mode for good (dropout off).
        schedule: noise table the network was trained with.
        prediction: what the network returns: ``epsilon``, ``sample`` (x0) or ``v_prediction``.
        reference: folder or hub id that the weights came from, written into exports.
        label: the class, of a class-conditional network; it is part of the fingerprint.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        schedule: VPSchedule,
        prediction: str = "epsilon",
        reference: str | None = None,
        label: int | None = None,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction type {prediction!r}; allowed: {', '.join(PREDICTIONS)}")
        channels, out = unet.config.in_channels, unet.config.out_channels
        if out not in (channels, 2 * channels):
            raise ValueError(f"the prior maps {channels} channels to {out}; allowed: {channels} or {2 * channels}")
        _check_label(unet, label)
        self.channels = channels
        self.label = label
        self.prediction = prediction
        self.reference = reference
        self.schedule = schedule
        self.lora: LoraSpec | None = None
        on_meta = any(parameter.is_meta for parameter in unet.parameters())
        self.fingerprint = "" if on_meta else fingerprint(unet, schedule, prediction, label)
        self.unet: nn.Module = attend_locally(unet.requires_grad_(False).eval())
        self.in_bfloat16 = self.is_compiled = False
        self._frozen: tuple[UNet2DModel, ...] = ()  # of frozen_network(); in a tuple it is no submodule

    @classmethod
    def from_pretrained(cls, reference: str | Path, label: int | None = None) -> "Prior":
        """Load a shipped prior by name, a diffusers folder or a hub id.

        It holds ``config.json``, safetensors weights and ``scheduler_config.json``, side by side or as ``DDPMPipeline``
        saves them, in ``unet/`` and ``scheduler/``. A class-conditional network takes its class from ``label``, or from
        ``class_label`` in ``scheduler_config.json``.

        Under ``torch.device("meta")`` the weights are not read and need not be there: a folder of ``ARCHITECTURES``, by
        name, does too. Such a prior has shapes and no values.

        Raises:
            FileNotFoundError: when the folder, the hub repository or one of the files is missing.
            ValueError: when the files are not those of a ``UNet2DModel`` of pixels and its variance-preserving noise.
        """
        reference = str(reference)
        on_meta = torch.get_default_device().type == "meta"
        where = str((on_meta and subfolder(ARCHITECTURES, reference)) or shipped_folder(reference) or reference)
        architecture_file, scheduler_file, inside = find_files(where)
        architecture, scheduler = read_object(architecture_file), read_object(scheduler_file)
        network = NETWORKS.get(str(architecture.get("_class_name")))
        if network is None:
            raise ValueError(f"{reference} holds a {architecture.get('_class_name')!r}; a UNet2DModel is needed")
        unet = network.from_config(architecture) if on_meta else load_network(network, where, reference, inside)
        with torch.device("cpu"):
            schedule, prediction = read_scheduler(scheduler, reference)
        label = scheduler.get(LABEL) if label is None else label
        return cls(unet, schedule, prediction, reference, label)

    def forward(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """Return x0_hat [B, C, H, W] for a noisy image x_sigma = x0 + sigma eps and levels sigma [B], image units.

        Sides that are no multiples of the network's total stride are continued by reflection, and cut off again.
        """
        return self._x0_hat(self.unet, x_sigma, sigma)

    def frozen(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """Return what ``forward`` would without an adapter."""
        return self._x0_hat(self.frozen_network(), x_sigma, sigma)

    def frozen_network(self) -> UNet2DModel:
        """Return the network without its adapter.

        Nothing is switched off for it, so that others may call this prior meanwhile: it is a second network, which has
        the weights of the first in common; those that the adapter was merged into are its own, right up to rounding.
        """
        if not self._frozen:
            self._frozen = (_without_adapter(self.unet),)
        return self._frozen[0]

    def pipeline(self) -> DDPMPipeline:
        """Return network and noise, without an adapter, as ``DDPMPipeline`` of diffusers.

        Its ``save_pretrained`` and ``push_to_hub`` write what ``from_pretrained`` here takes too, as the same prior.

        Raises:
            ValueError: where diffusers has no such pipeline, or the prior comes from no folder.
        """
        network = self.frozen_network()
        if type(network) is not UNet2DModel or self.label is not None:
            raise ValueError("a DDPMPipeline holds a UNet2DModel without classes; upload the folder of this prior")
        if self.reference is None:
            raise ValueError("the scheduler of a prior is in its folder, and this one comes from none")
        reference = str(shipped_folder(self.reference) or self.reference)
        scheduler = DDPMScheduler.from_config(read_object(find_files(reference)[1]))
        return DDPMPipeline(network, scheduler)

    def denoiser(self) -> PriorDenoiser:
        """Return this prior, with its adapter if it has one, as a ``deepinv.models.Denoiser``."""
        return PriorDenoiser(self)

    @property
    def stride(self) -> int:
        """Factor by which the network's coarsest features are smaller than the image."""
        return 2 ** (len(self._base().config.block_out_channels) - 1)

    def features(self, x: Tensor, sigma: float = 0.02) -> list[Tensor]:
        """Return the encoder features of the *frozen* network at a low noise level, one [B, c, h, w] per resolution.

        The last feature of every resolution, from fine to coarse; no noise is added to x [B, C, H, W] in [0, 1]. In
        float32 under autocast too, unless the weights are kept in bfloat16: what compares features compares images that
        differ by little, which bfloat16 rounds away.
        """
        level = x.new_full((len(x),), sigma)
        unet = self.frozen_network()
        with full_precision(x.device), self._autocast(x):
            emb = unet.time_embedding(unet.time_proj(self.schedule.time(level)).to(x.dtype))
            if self.label is not None:
                emb = emb + unet.class_embedding(_labels(x, self.label))
            h = unet.conv_in(abar(level).sqrt().view(-1, 1, 1, 1) * (2 * x - 1))
            features = []
            for block in unet.down_blocks:
                h, states = block(hidden_states=h, temb=emb)
                features.append(states[-2] if block.downsamplers is not None else states[-1])
        return features

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError when the network cannot take images of this size."""
        if min(height, width) < self.stride:
            raise ValueError(f"the prior takes images of at least {self.stride} pixels a side, got {height}x{width}")

    def add_lora(self, spec: LoraSpec) -> "Prior":
        """Put trainable LoRA factors (peft) on the frozen network; with B = 0 the function is unchanged at first.

        Raises:
            ValueError: when there is an adapter already, or no layer has one of the target names.
        """
        if self.lora is not None:
            raise ValueError("this prior has an adapter already; load it again to change the adapter")
        if spec.rank == 0:
            self.lora = spec
            return self
        config = peft.LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=list(spec.targets),
            modules_to_save=["conv_out"] if spec.output_conv else None,
        )
        try:
            self.unet = peft.get_peft_model(self.unet, config).eval()
        except ValueError as error:
            raise ValueError(f"the prior has no layer to adapt whose name ends with one of {spec.targets}") from error
        self.lora, self._frozen = spec, ()
        return self

    def checkpoint_layers(self) -> "Prior":
        """Keep the inputs of the network's residual blocks alone for a backward pass, and evaluate them again in it."""
        self._base().enable_gradient_checkpointing()
        return self

    def store_frozen_in_bfloat16(self) -> "Prior":
        """Keep the weights of frozen convolutions and linear layers in bfloat16; the network runs under autocast then.

        Half the memory of the weights, on every call of the network. What is trained, normalisation layers and results
        stay in float32, and so does the fingerprint. Exports are not touched: they refer to the prior as it was.
        """
        for layer in self._base().modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
                layer.to(torch.bfloat16)
        self.in_bfloat16 = True
        return self

    def use_channels_last(self) -> "Prior":
        """Keep weights, and so activations, with channels side by side: what GPUs convolve fastest in low precision."""
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        return self

    def compile_network(self, how: str) -> "Prior":
        """Compile the network by torch.compile on its first call, once for each shape of images.

        Args:
            how: a backend, as ``inductor``, or a mode of inductor, as ``reduce-overhead`` (CUDA graphs).

        Raises:
            ValueError: for what is neither.
        """
        modes = list(torch._inductor.list_mode_options())
        if how not in (*torch.compiler.list_backends(exclude_tags=()), *modes):
            known = ", ".join([*torch.compiler.list_backends(), *modes])
            raise ValueError(f"torch.compile has no backend or mode {how!r}; it has {known}")
        # by shapes: where torch finds another one it would compile for all shapes, which is slower code
        self.unet.compile(dynamic=False, **({"mode": how} if how in modes else {"backend": how}))
        self.is_compiled = True
        return self

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as peft does (``adapter_config.json``, ``adapter_model.safetensors``)."""
        if isinstance(self.unet, peft.PeftModel):
            self.unet.save_pretrained(str(folder))
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
            path = folder / "adapter_config.json"
            config = read_object(path)
            # peft notes where the prior lay on this machine, and keeps a set: any order
            config["base_model_name_or_path"] = self.reference
            config["target_modules"] = sorted(config["target_modules"])
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def load_adapter(self, folder: Path, spec: LoraSpec) -> "Prior":
        """Add an adapter with what ``save_adapter`` wrote; errors as of ``read_adapter``."""
        return self.add_lora(spec).read_adapter(folder, spec)

    def read_adapter(self, folder: Path, of: LoraSpec) -> "Prior":
        """Take over an adapter written by ``save_adapter``; every tensor must fit and none may be missing.

        Args:
            folder: where it is.
            of: its ``LoraSpec``, whose rank may be lower than this one's. Its factors become the first rows of A and
                columns of B, scaled so that the product is the same; the others stay (B is 0 at first).

        Raises:
            ValueError: when it is damaged, or not an adapter of that ``LoraSpec``.
            OSError: when a file is missing.
        """
        spec = self.lora
        if isinstance(self.unet, peft.PeftModel) and spec is not None and of.rank > 0:
            # Not peft's own loader: it asks the hub for a missing file, and takes pickles.
            stored = read_object(Path(folder) / CONFIG_NAME)
            state = read_weights(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
            if (stored.get("r"), stored.get("lora_alpha")) != (of.rank, of.alpha):
                raise ValueError(f"the adapter in {folder} does not fit its config: {CONFIG_NAME} is not of {of}")
            own = {name: value.clone() for name, value in peft.get_peft_model_state_dict(self.unet).items()}
            parts = {name: _begin(value, name, of.rank) for name, value in own.items()}
            if state.keys() != own.keys() or any(state[name].shape != parts[name].shape for name in own):
                odd = sorted(state.keys() ^ own.keys())
                raise ValueError(f"the adapter in {folder} does not fit its config: unmatched tensors {odd[:4]}")
            scale = (of.alpha / of.rank) / (spec.alpha / spec.rank)
            for name, part in parts.items():
                part.copy_(state[name] * scale if ".lora_B." in name else state[name])
            peft.set_peft_model_state_dict(self.unet, own)
        return self

    def merge_adapter(self) -> "Prior":
        """Add the LoRA products into the weights, so that sampling costs what the bare network costs."""
        if isinstance(self.unet, peft.PeftModel):
            self.unet.merge_adapter()
            self._frozen = ()
        return self

    def train(self, mode: bool = True) -> "Prior":
        """Keep the network in eval mode whatever the trainer asks for: dropout of a frozen prior stays off."""
        super().train(mode)
        self.unet.eval()
        return self

    def _autocast(self, x: Tensor) -> AbstractContextManager:
        return torch.autocast(x.device.type, torch.bfloat16) if self.in_bfloat16 else nullcontext()

    def _x0_hat(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        height, width = x_sigma.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        padded = F.pad(x_sigma, (0, right, 0, bottom), mode="reflect") if bottom or right else x_sigma
        padded = padded.contiguous(memory_format=fastest_layout(padded))
        with self._autocast(x_sigma):
            x0_hat = denoise(network, self.schedule, padded, sigma, self.prediction, self.label)
        return x0_hat[..., :height, :width]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Prior":
        super()._apply(fn, recurse)
        self._frozen = ()  # weights of its own are elsewhere now, or of another kind
        return self

    def _base(self) -> UNet2DModel:
        return self.unet.get_base_model() if isinstance(self.unet, peft.PeftModel) else self.unet


def _begin(value: Tensor, name: str, rank: int) -> Tensor:
    """Return the view of a tensor of an adapter that one of lower rank has: the first rows of A, columns of B."""
    for dimension, factor in enumerate((".lora_A.", ".lora_B.")):
        if factor in name:
            return value.narrow(dimension, 0, min(rank, value.shape[dimension]))
    return value


@torch.no_grad()
def _without_adapter(network: nn.Module) -> UNet2DModel:
    """Return the network inside an adapted one: the same parameters, other modules."""
    common: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    common |= {id(m._forward_hooks): OrderedDict() for m in network.modules()}  # these watch the first network
    common |= {id(m._forward_pre_hooks): OrderedDict() for m in network.modules()}
    copied = copy.deepcopy(network, common)
    bare: UNet2DModel = copied.get_base_model() if isinstance(copied, peft.PeftModel) else copied
    for name, layer in list(bare.named_modules()):
        if isinstance(layer, ModulesToSaveWrapper):
            bare.set_submodule(name, layer.original_module)
        elif isinstance(layer, LoraLayer):
            inner = layer.get_base_layer()
            for adapter in layer.merged_adapters:
                inner.weight = nn.Parameter(inner.weight - layer.get_delta_weight(adapter), requires_grad=False)
            bare.set_submodule(name, inner)
    bare.disable_gradient_checkpointing()  # features keep their activations
    return bare


def denoise(
    unet: nn.Module,
    schedule: VPSchedule,
    x_sigma: Tensor,
    sigma: Tensor,
    prediction: str = "epsilon",
    label: int | None = None,
) -> Tensor:
    """Return x0_hat [B, C, H, W] from a variance-preserving network, for x_sigma = x0 + sigma eps and sigma [B].

    ``label`` is the class of all images, for a class-conditional network.
    """
    level = sigma.view(-1, 1, 1, 1)
    signal = abar(level).sqrt()
    x_t = signal * (2 * x_sigma - 1)
    # The time stays a float tensor: diffusers cuts a Python float to an integer, which kills d/d sigma.
    condition = {} if label is None else {"class_labels": _labels(x_t, label)}
    output = unet(x_t, schedule.time(sigma), **condition).sample[:, : x_sigma.shape[1]].to(x_sigma.dtype)
    if prediction == "epsilon":
        return x_sigma - level * output
    if prediction == "sample":
        return (output + 1) / 2
    return (signal * (x_t - 2 * level * output) + 1) / 2


def _labels(x: Tensor, label: int) -> Tensor:
    return torch.full((len(x),), label, device=x.device)


def _check_label(unet: UNet2DModel, label: int | None) -> None:
    """Raise ValueError when the network needs a class and has none, or has none to choose."""
    classes = unet.config.num_class_embeds
    if unet.config.class_embed_type is not None:
        raise ValueError(f"a prior cannot have class_embed_type={unet.config.class_embed_type!r}; allowed: none")
    if classes is None and label is not None:
        raise ValueError(f"the prior is not class-conditional, but got the label {label}; leave it out")
    if classes is not None and (type(label) is not int or not 0 <= label < classes):
        raise ValueError(
            f"the prior is class-conditional and needs a label from 0 to {classes - 1}, got {label!r}; "
            f'pass label=..., or write "{LABEL}" into its {SCHEDULER_FILE}'
        )
