"""Attention whose cost per pixel does not grow with the picture: beyond a size, positions see their neighbourhood."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

WINDOW = 32
"""Side of the neighbourhood, in positions of the layer; networks of the field meet 32 x 32 or fewer in training."""


class LocalAttention(AttnProcessor2_0):
    """Self-attention of blocks of half a window's side with the window around each.

    Where the layer is no larger than a window it is diffusers' own, exactly. Beyond, each of h w positions sees
    WINDOW^2 of them instead of h w: as many as networks were trained with, and the cost per position stays the same.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,  # this and the next two: what diffusers calls every processor with
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the layer's output [B, C, h, w]."""
        height, width = hidden_states.shape[-2:]
        if max(height, width) <= WINDOW:
            return super().__call__(attn, hidden_states)
        x = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        q, k, v = (
            layer(x).unflatten(1, (height, width)).unflatten(3, (attn.heads, -1)).permute(0, 3, 1, 2, 4)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )  # [B, heads, h, w, c]
        seen = torch.empty_like(q)
        for rows, near_rows in blocks(height):
            for columns, near_columns in blocks(width):
                place, near = (..., rows, columns, slice(None)), (..., near_rows, near_columns, slice(None))
                found = F.scaled_dot_product_attention(*(part.flatten(2, 3) for part in (q[place], k[near], v[near])))
                seen[place] = found.unflatten(2, q[place].shape[2:4])
        out = attn.to_out[1](attn.to_out[0](seen.permute(0, 2, 3, 1, 4).flatten(3))).permute(0, 3, 1, 2)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def attend_locally(network: nn.Module) -> nn.Module:
    """Give all attention layers of a network of diffusers ``LocalAttention``, and return it."""
    for layer in network.modules():
        if isinstance(layer, Attention):
            layer.set_processor(LocalAttention())
    return network


def blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of one axis, each with the window around it, which is moved inside at the ends."""
    side = WINDOW // 2
    for start in range(0, length, side):
        first = max(0, min(start - side // 2, length - WINDOW))
        yield slice(start, start + side), slice(first, first + WINDOW)
