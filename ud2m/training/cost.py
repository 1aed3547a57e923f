"""What a training step costs, from shapes alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ud2m.training.distillation_step import DistillationStep

FLOAT = 4
"""Bytes of a float32 number."""
STATES = 4
"""Numbers per trained parameter besides itself: gradient, two moments of AdamW, average."""


@dataclass(frozen=True)
class Pass:
    """What one step on a batch computes and keeps.

    Attributes:
        flops: of the step, forward and backward (a multiplication and an addition are two).
        activations: bytes that the forward pass keeps for the backward pass.
        calls: evaluations of the prior's network.
        call_flops: forward, of all of them.
        call_activations: bytes that one of them keeps.
    """

    flops: float
    activations: float
    calls: int
    call_flops: float
    call_activations: float


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        frozen: parameters that stay as they are.
        trained: parameters of the generator that are trained.
        discriminator: parameters of the discriminator.
        flops: of one image.
        flops_recomputing: the same when each evaluation of the prior's network is computed again in the backward pass,
            so that the activations of one are kept at a time.
        activations: bytes that the forward pass of one image keeps.
        activations_recomputing: the same with recomputing.
        batch: images per step.
        devices: that share them.
        tflops: 10^12 operations per second that a device reaches.
    """

    frozen: int
    trained: int
    discriminator: int
    flops: float
    flops_recomputing: float
    activations: float
    activations_recomputing: float
    batch: int
    devices: int
    tflops: float

    @property
    def communicated(self) -> int:
        """Bytes of gradients that the devices average in a step."""
        return FLOAT * (self.trained + self.discriminator)

    def seconds(self, recomputing: bool = False) -> float:
        """Return the time of 1000 steps."""
        flops = self.flops_recomputing if recomputing else self.flops
        return 1000 * self.batch * flops / (self.devices * self.tflops * 1e12)

    def memory(self, recomputing: bool = False) -> float:
        """Return the bytes on a device: weights, trained parameters with their states, activations of its images."""
        activations = self.activations_recomputing if recomputing else self.activations
        trained = (1 + STATES) * (self.trained + self.discriminator)
        return FLOAT * (self.frozen + trained) + activations * self.batch / self.devices

    def table(self) -> str:
        """Return what is printed."""
        both = {"": False, ", computed again in the backward pass": True}
        rows = [
            ("parameters, frozen", f"{self.frozen:,}"),
            ("parameters, trained", f"{self.trained:,}"),
            ("parameters, discriminator", f"{self.discriminator:,}"),
            ("images per step", f"{self.batch}, on {self.devices} device(s)"),
            ("weights, frozen", f"{gigabytes(FLOAT * self.frozen)} in float32"),
        ]
        for words, recomputing in both.items():
            flops = self.flops_recomputing if recomputing else self.flops
            kept = self.activations_recomputing if recomputing else self.activations
            rows += [
                (f"FLOPs per step{words}", f"{self.batch * flops / 1e12:.4g} TFLOPs"),
                (f"activations per image{words}", f"{gigabytes(kept)} in float32"),
                (f"memory per device{words}", f"{gigabytes(self.memory(recomputing))} in float32"),
                (f"time per 1000 steps{words}", f"{self.seconds(recomputing) / 3600:.3g} h at {self.tflops:g} TFLOP/s"),
            ]
        rows.append(("gradients communicated per step", f"{self.communicated / 1e6:.4g} MB"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def gigabytes(count: float) -> str:
    """Return bytes in words."""
    return f"{count / 1e9:.3g} GB"


class Counter(TorchDispatchMode):
    """Count operations by the formulas of ``torch.utils.flop_counter``, and answer every check of values with yes.

    Not its ``FlopCounterMode``: that tracks modules by hooks, which a gradient of a gradient (the penalty of D) cannot
    pass. Checks are answered since tensors of the meta device have no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` and count it."""
        kwargs, packet, aten = kwargs or {}, func._overloadpacket, torch.ops.aten
        if packet is aten._local_scalar_dense:
            return True
        if packet is aten.nonzero:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if packet not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def cost_of(step: DistillationStep, shape: tuple[int, ...]) -> Pass:
    """Return what a step on a batch of this shape [B, C, H, W] computes and keeps."""
    modules = step.modules
    own = {storage(tensor) for tensor in [*modules.parameters(), *modules.buffers()]}
    kept: dict[int, Tensor] = {}
    calls: list[tuple[float, float]] = []

    def keep(tensor: Tensor) -> Tensor:
        if storage(tensor) not in own:
            kept[storage(tensor)] = tensor  # held, so that no other tensor takes its place
        return tensor

    def now() -> tuple[float, float]:
        return counter.flops, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def begin(*_: Any) -> None:
        calls.append(now())

    def end(*_: Any) -> None:
        flops, activations = now()
        calls[-1] = (flops - calls[-1][0], activations - calls[-1][1])

    hooks = [step.prior.register_forward_pre_hook(begin), step.prior.register_forward_hook(end)]
    streams = [torch.Generator().manual_seed(row) for row in range(shape[0])]
    try:
        with Counter() as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            total, _ = step(torch.empty(shape, device="meta"), streams)
            activations = now()[1]
            total.backward()
    finally:
        for hook in hooks:
            hook.remove()
        modules.zero_grad(set_to_none=True)
    call_flops = sum(flops for flops, _ in calls)
    return Pass(counter.flops, activations, len(calls), call_flops, max(size for _, size in calls))


def storage(tensor: Tensor | nn.Parameter) -> int:
    """Return what identifies the memory of a tensor, also of one that has none."""
    return tensor.untyped_storage()._cdata
