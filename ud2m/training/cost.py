"""What a training step costs, from shapes alone."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ud2m.training.distillation_step import DistillationStep

FLOAT = 4
"""Bytes of a float32 number."""
MOMENTS = 2
"""Numbers that AdamW keeps per trained parameter."""
PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What ``trainer.precision`` has networks evaluated in, where that is not float32."""
LOWER = ("conv2d", "linear", "matmul", "bmm", "scaled_dot_product_attention")
FULL = ("group_norm", "layer_norm", "softmax")
"""What autocast of a GPU computes in less than float32, and always in float32; all else takes what comes."""
CPU_TFLOPS = 0.05
"""TFLOP/s that a core of a CPU reaches with convolutions in float32, about."""


@dataclass(frozen=True)
class Pass:
    """What one step on a batch computes and holds.

    Attributes:
        flops: of the step, forward and backward (a multiplication and an addition are two).
        peak: largest number of bytes that are held at once, beside what was there before.
    """

    flops: float
    peak: float


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        frozen: parameters that stay as they are.
        trained: parameters of the generator that are trained.
        discriminator: parameters of the discriminator.
        weights: bytes of all of them, as they are stored, and of other frozen networks.
        flops: of one image.
        activations: bytes that one image needs at most at once.
        shared: bytes that a step needs besides, whatever the number of images.
        precision: of the networks, as ``trainer.precision`` has it.
        checkpointing: what is evaluated again in the backward pass.
        batch: images per optimiser step.
        accumulate: batches that they are dealt to.
        devices: that share them.
        tflops: 10^12 operations per second that a device reaches.
    """

    frozen: int
    trained: int
    discriminator: int
    weights: float
    flops: float
    activations: float
    shared: float
    precision: str
    checkpointing: str
    batch: int
    accumulate: int
    devices: int
    tflops: float

    @property
    def communicated(self) -> int:
        """Bytes of gradients that the devices average in a step."""
        return FLOAT * (self.trained + self.discriminator)

    @property
    def seconds(self) -> float:
        """The time of 1000 steps."""
        return 1000 * self.batch * self.flops / (self.devices * self.tflops * 1e12)

    @property
    def memory(self) -> float:
        """The bytes on a device: weights, the moments of AdamW and averages of what is trained, activations."""
        states = FLOAT * (MOMENTS * (self.trained + self.discriminator) + self.trained)
        images = self.batch / (self.accumulate * self.devices)
        return self.weights + states + self.shared + self.activations * images

    def table(self) -> str:
        """Return what is printed."""
        on_cpu = self.seconds * self.devices * self.tflops / CPU_TFLOPS
        rows = [
            ("parameters, frozen", f"{self.frozen:,}"),
            ("parameters, trained", f"{self.trained:,}"),
            ("parameters, discriminator", f"{self.discriminator:,}"),
            ("precision, checkpointing", f"{self.precision}, {self.checkpointing}"),
            ("images per step", f"{self.batch}, on {self.devices} device(s)"),
            ("weights of all networks", gigabytes(self.weights)),
            ("FLOPs per step", f"{self.batch * self.flops / 1e12:.4g} TFLOPs"),
            ("activations per image", gigabytes(self.activations)),
            ("memory per device", gigabytes(self.memory)),
            ("time per 1000 steps", f"{duration(self.seconds)} at {self.tflops:g} TFLOP/s"),
            ("time per 1000 steps, one core", f"{duration(on_cpu)} at {CPU_TFLOPS:g} TFLOP/s, as of a CPU"),
            ("gradients communicated per step", f"{self.communicated / 1e6:.4g} MB"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", ADVICE])


ADVICE = """If the memory does not fit: training.checkpointing=modules (or all) computes activations again in the
backward pass, a smaller data.batch_size with a larger accumulate keeps the images per step, trainer=ddp
trainer.devices=N shares them, and trainer.precision=bf16-mixed halves most activations (docs/clusters.md)."""


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which it is one at least."""
    unit, length = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if seconds >= s), ("s", 1))
    return f"{seconds / length:.3g} {unit}"


def gigabytes(count: float) -> str:
    """Return bytes in words."""
    return f"{count / 1e9:.3g} GB"


class Counter(TorchDispatchMode):
    """Count operations, and the bytes that are held at once; answer every check of values with yes.

    Operations are counted by the formulas of ``torch.utils.flop_counter``. Not by its ``FlopCounterMode``: that tracks
    modules by hooks, which a gradient of a gradient (the penalty of D) cannot pass. Checks are answered since tensors
    of the meta device have no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.held = self.peak = 0.0
        self.known: set[int] = set()

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
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return result

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until nothing refers to it any more."""
        memory = tensor.untyped_storage()
        if memory._cdata not in self.known:
            self.known.add(memory._cdata)
            self.held += memory.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(memory, self.drop, memory._cdata, memory.nbytes())

    def drop(self, name: int, size: int) -> None:
        """Forget the memory of a tensor."""
        self.known.discard(name)
        self.held -= size


class Autocast(TorchFunctionMode):
    """What GPUs do that the meta device does not: autocast, and attention in one piece.

    The latter keeps its inputs and its output for the backward pass, and computes the products in between again.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` as a GPU would."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.dtype is not None and name in (*LOWER, *FULL):
            dtype = self.dtype if name in LOWER else torch.float32
            args = [cast(value, dtype) for value in args]
            kwargs = {key: cast(value, dtype) for key, value in kwargs.items()}
        if name == "scaled_dot_product_attention":
            inputs = [*args[:3], *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)]
            return torch.ops.aten._scaled_dot_product_flash_attention(*inputs, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a tensor of floats in another precision, and anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def as_on_a_gpu(network: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluate a network of the meta device as a GPU does under autocast to ``dtype`` (None: float32), inside.

    Each part of it, too: checkpointing evaluates parts again in the backward pass.
    """
    mode, depth = Autocast(dtype), 0

    def begin(*_: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            mode.__enter__()

    def end(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            mode.__exit__(None, None, None)

    hooks = [part.register_forward_pre_hook(begin) for part in network.modules()]
    # always: a part that is evaluated again stops, by an exception, where nothing more of it is needed
    hooks += [part.register_forward_hook(end, always_call=True) for part in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cost_of(step: DistillationStep, shape: tuple[int, ...], precision: str = "32-true") -> Pass:
    """Return what a step on a batch of this shape [B, C, H, W] computes and holds; ``step`` is on the meta device.

    The peak is rather too high: gradients are summed up in new memory here, and in place where nobody looks on.
    """
    modules, counter = step.modules, Counter()
    counter.known |= {tensor.untyped_storage()._cdata for tensor in [*modules.parameters(), *modules.buffers()]}
    streams = [torch.Generator().manual_seed(row) for row in range(shape[0])]
    try:
        with counter, as_on_a_gpu(step.prior, PRECISIONS.get(precision)):
            total, _ = step(torch.empty(shape, device="meta"), streams)
            total.backward()
    finally:
        modules.zero_grad(set_to_none=True)
    return Pass(counter.flops, counter.peak)
