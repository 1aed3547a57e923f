"""The U-Nets of guided-diffusion as plain functions of a state dict, and weights for them: an oracle for the converter.

It follows the description of the network (Dhariwal and Nichol, 2021, and the configurations of the README of
openai/guided-diffusion) and shares nothing with the converter or with diffusers.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS, EPS = 32, 1e-5


def gaussian(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return the standard normal float32 numbers that belong to a name (README of the reference outputs)."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return tensors that depend on their own name and shape alone (the same README)."""
    found = {}
    for name, shape in shapes.items():
        value = gaussian(name, shape)
        if len(shape) >= 2:
            value = value / np.float32(math.sqrt(math.prod(shape[1:])))
        else:
            value = np.float32(0.1) * value + np.float32(name.endswith("weight"))
        found[name] = torch.from_numpy(value)
    return found


@dataclass
class Reference:
    """The network of a state dict; every other value is a flag of its training command."""

    state: Mapping[str, Tensor]
    num_res_blocks: int
    heads: int | None = None
    head_width: int | None = None
    new_order: bool = False

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the output for images x [B, C, H, W] at times t [B]."""
        half = self.state["time_embed.0.weight"].shape[1] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t.float()[:, None] * frequencies
        emb = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", emb)))
        if labels is not None:
            emb = emb + self.state["label_emb.weight"][labels]
        h, kept = x, []
        for index in range(self.count("input_blocks")):
            down = index > 0 and index % (self.num_res_blocks + 1) == 0
            h = self.block(f"input_blocks.{index}", h, emb, "down" if down else None)
            kept.append(h)
        h = self.block("middle_block", h, emb)
        for index in range(self.count("output_blocks")):
            h = self.block(f"output_blocks.{index}", torch.cat([h, kept.pop()], dim=1), emb, "up")
        return self.conv("out.2", F.silu(self.norm("out.0", h)))

    def count(self, part: str) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.state if name.startswith(part))

    def block(self, name: str, h: Tensor, emb: Tensor, resampling: str | None = None) -> Tensor:
        """Apply the layers of a block; on the way up a second residual layer is the one that resamples."""
        for place in range(3):
            layer = f"{name}.{place}"
            if f"{layer}.in_layers.0.weight" in self.state:
                active = resampling if resampling == "down" or place > 0 else None
                h = self.residual(layer, h, emb, active)
            elif f"{layer}.qkv.weight" in self.state:
                h = h + self.attention(layer, h)
            elif f"{layer}.op.weight" in self.state:
                h = self.conv(f"{layer}.op", h, stride=2)
            elif f"{layer}.conv.weight" in self.state:
                h = self.conv(f"{layer}.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            elif f"{layer}.weight" in self.state:
                h = self.conv(layer, h)
        return h

    def residual(self, name: str, x: Tensor, emb: Tensor, resampling: str | None) -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resampling == "up" and name.split(".")[0] == "output_blocks":
            x, h = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (x, h))
        elif resampling == "down":
            x, h = (F.avg_pool2d(v, 2) for v in (x, h))
        h = self.conv(f"{name}.in_layers.2", h)
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if e.shape[1] == 2 * h.shape[1]:
            scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.state else x)

    def attention(self, name: str, h: Tensor) -> Tensor:
        batch, width, height, columns = h.shape
        heads = self.heads or width // (self.head_width or width)
        rows = self.conv(f"{name}.qkv", self.norm(f"{name}.norm", h).flatten(2))
        if self.new_order:
            q, k, v = rows.view(batch, 3, heads, width // heads, -1).unbind(1)
        else:
            q, k, v = rows.view(batch, heads, 3, width // heads, -1).unbind(2)
        score = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(width // heads)
        mixed = torch.einsum("bhts,bhcs->bhct", score.softmax(-1), v).reshape(batch, width, -1)
        return self.conv(f"{name}.proj_out", mixed).view(batch, width, height, columns)

    def conv(self, name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        function = F.conv1d if weight.ndim == 3 else F.conv2d
        return function(h, weight, bias, stride=stride, padding=weight.shape[-1] // 2)

    def linear(self, name: str, h: Tensor) -> Tensor:
        return F.linear(h, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, GROUPS, self.state[f"{name}.weight"], self.state[f"{name}.bias"], EPS)
