"""The networks of published pixel-space priors as diffusers' ``UNet2DModel``, with what that class lacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn


class AdmUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` with three more options, which some published networks of OpenAI need.

    Saved and loaded as any diffusers model; ``config.json`` names this class.

    Args:
        num_heads: heads of every attention layer, whatever its width (diffusers: a fixed width of a head).
        time_channels: length of the sinusoidal embedding (diffusers: the width of the first level).
        time_scale: the network sees ``time_scale t`` in place of t.
        kwargs: those of ``UNet2DModel``.

    Raises:
        ValueError: when a width is no multiple of the number of heads.
    """

    def __init__(
        self, num_heads: int | None = None, time_channels: int | None = None, time_scale: float = 1.0, **kwargs: Any
    ):
        # without a width of a head diffusers makes one head of each layer, which is split below
        super().__init__(**(kwargs if num_heads is None else kwargs | {"attention_head_dim": None}))
        self.register_to_config(num_heads=num_heads, time_channels=time_channels, time_scale=time_scale)
        if time_channels is not None:
            self.time_proj.num_channels = time_channels
            first = self.time_embedding.linear_1
            self.time_embedding.linear_1 = nn.Linear(time_channels, first.out_features)
        self.time_proj.scale = time_scale
        for attention in (module for module in self.modules() if isinstance(module, Attention)):
            if num_heads is not None:
                if attention.inner_dim % num_heads:
                    raise ValueError(f"an attention layer of {attention.inner_dim} channels has no {num_heads} heads")
                attention.heads = num_heads
                attention.scale = (attention.inner_dim // num_heads) ** -0.5

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Tell diffusers which keys of ``config.json`` are arguments: it cannot see those in ``kwargs``."""
        return UNet2DModel._get_init_keys(UNet2DModel) | {*ADM_OPTIONS}


ADM_OPTIONS = ("num_heads", "time_channels", "time_scale")
NETWORKS = {"UNet2DModel": UNet2DModel, "AdmUNet2DModel": AdmUNet2DModel}


def build_unet(architecture: Mapping[str, Any]) -> UNet2DModel:
    """Return a randomly initialised network from the keyword arguments of diffusers' ``UNet2DModel``."""
    try:
        return UNet2DModel(
            **{
                k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
                for k, v in architecture.items()
            }
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"diffusers cannot build this UNet2DModel: {error}") from error
