"""JPEG as an observation: an image known up to the quantisation of its DCT coefficients."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import Physics
from torch import Tensor

from ud2m.physics.family import OperatorFamily
from ud2m.physics.immutable import Immutable
from ud2m.physics.iterative import ConvergenceWarning
from ud2m.physics.jpeg_codec import (
    FACTORS,
    YCBCR,
    Layout,
    dct_matrix,
    encode,
    from_blocks,
    padded,
    quality_tables,
    to_blocks,
)
from ud2m.physics.measurement import estimate_sigma_y, image_shape, kept_gain, mean_gain, misfit, observe, residual
from ud2m.physics.rows import at_least_float32, per_sample
from ud2m.random import Generators, rand
from ud2m.raster import read_header, read_picture

TOLERANCE = 1e-3
"""Change of a sweep, in grey levels of 255, at which the projection onto the quantisation cell stops."""
MAX_SWEEPS = 100
MARGIN = 1.0
"""Grey levels by which a cell is made smaller: rounding to 8 bits must not take a coefficient across its border."""


class JpegCodec(Immutable, Physics):
    """y = baseline JPEG of x, decoded without rounding: the centre of the quantisation cell, as an image.

    With T the (linear) map from pixels to DCT coefficients (colour transform, averages of chroma, DCT of 8x8 blocks)
    and steps q, an encoder stores k = round(T x / q). y is the image with T y = q k, in units of x but not clamped to
    [0, 1]; its sides are padded to whole blocks, so that every coefficient can be had back from y. ``A`` computes k in
    the encoder's own integers (``jpeg_codec``).

    What y says of x is that T x lies in the cell q (k +- 1/2): the likelihood is the cell's indicator, and its prox is
    the projection onto the cell, whatever gamma is. It is no linear operator and has no noise level. Where the sides of
    x are no multiples of the blocks, it is padded by its last row and column, projected and cropped.

    Args:
        tables: quantisation steps [1 or B, C, 8, 8].
        image_shape: (C, H, W), C = 1 or 3.
        factors: pixels (down, across) per chroma value.
        device: where the operator lives.
    """

    per_sample = ("tables",)
    ycbcr: tuple[tuple[float, ...], ...] = YCBCR
    tables: Tensor
    img_size: tuple[int, int, int]

    def __init__(
        self,
        tables: Tensor,
        image_shape: tuple[int, int, int],
        factors: tuple[int, int] = (1, 1),
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.img_size = image_shape
        self.layout = Layout(image_shape[1], image_shape[2], image_shape[0], factors)
        self.register_buffer("tables", tables.float())
        self.to(device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the decoded picture y [B, C, H', W'], sides padded to whole blocks; no gradient passes."""
        self.update_parameters(**kwargs)
        if tuple(x.shape[1:]) != self.img_size:
            raise ValueError(f"this JPEG encoder was made for images {list(self.img_size)}, got {list(x.shape)}")
        return self.decode(self.encode(x.detach())).to(x.dtype)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return what a viewer shows: y without its padding, in [0, 1]."""
        self.update_parameters(**kwargs)
        return self.cropped(y).clamp(0, 1)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return the point of the quantisation cell that is nearest to z (``CellProjection``).

        Args:
            z: [B, C, H, W].
            y: as ``A`` gives it.
            gamma: the precision of other data terms; the indicator of a cell has none, and its derivative is 0.
            kwargs: parameters of the operator, as deepinv's ``update_parameters`` takes them.
        """
        self.update_parameters(**kwargs)
        mean = z.to(at_least_float32(z, y))
        weight = torch.as_tensor(gamma, dtype=mean.dtype, device=mean.device)
        known = levels(padded(mean, *self.layout.full))
        nearest = CellProjection.apply(known, y.to(mean.dtype), weight, self)
        return self.cropped((nearest + 128) / 255).to(z.dtype)

    def cropped(self, y: Tensor) -> Tensor:
        """Return y without the padding of its sides."""
        return y[..., : self.layout.height, : self.layout.width]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the quantised coefficients of each component [B, rows, columns, 8, 8] that a file of x stores."""
        return encode(x, self.layout, self.tables)

    def decode(self, coefficients: Sequence[Tensor]) -> Tensor:
        """Return y for quantised coefficients of each component [B, rows, columns, 8, 8]."""
        height, width = self.layout.full
        planes = []
        for component, k in enumerate(coefficients):
            matrix = dct_matrix(k.dtype, k.device)
            plane = from_blocks(matrix.T @ (k * self.steps(component, k)) @ matrix)
            down, across = self.layout.of(component)
            plane = padded(plane, height // down, width // across)
            planes.append(plane.repeat_interleave(down, -2).repeat_interleave(across, -1))
        image = torch.stack(planes, 1)
        if self.layout.channels == 3:
            image = torch.einsum("dc,bchw->bdhw", torch.tensor(self.ycbcr).to(image).inverse(), image)
        return (image + 128) / 255

    def forward_component(self, x: Tensor, component: int) -> Tensor:
        """Return T_i x, blocks [B, rows, columns, 8, 8] of a component, of padded ``levels`` x."""
        plane = torch.einsum("c,bchw->bhw", self._weights(component, x), x)
        matrix = dct_matrix(x.dtype, x.device)
        return matrix @ to_blocks(self.reduced(plane, component)) @ matrix.T

    def adjoint_component(self, blocks: Tensor, component: int) -> Tensor:
        """Return T_i^T of a component's blocks, [B, C, H', W']."""
        matrix = dct_matrix(blocks.dtype, blocks.device)
        plane = self.enlarged(from_blocks(matrix.T @ blocks @ matrix), component)
        return torch.einsum("c,bhw->bchw", self._weights(component, blocks), plane)

    def reduced(self, plane: Tensor, component: int) -> Tensor:
        """Return a component's plane [B, H', W'] at its own resolution: means of ``factors`` pixels."""
        down, across = self.layout.of(component)
        return plane.unflatten(-1, (-1, across)).unflatten(-3, (-1, down)).mean((-3, -1))

    def enlarged(self, plane: Tensor, component: int) -> Tensor:
        """Return the adjoint of ``reduced``."""
        down, across = self.layout.of(component)
        return plane.repeat_interleave(down, -2).repeat_interleave(across, -1) / (down * across)

    def gain(self, component: int) -> float:
        """Return g_i with T_i T_i^T = g_i I."""
        down, across = self.layout.of(component)
        power = sum(w**2 for w in self.ycbcr[component]) if self.layout.channels == 3 else 1.0
        return power / (down * across)

    def cells(self, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the lowest and highest T_i x that explain y, per component; infinite where no block is stored."""
        cells = []
        for component in range(self.layout.channels):
            table = self.steps(component, y)
            centre = (self.forward_component(levels(y), component) / table).round() * table
            half = table / 2 - (table / 4).clamp(max=MARGIN)
            rows, columns = (side // 8 for side in self.layout.stored(component))
            outside = torch.ones(centre.shape[1:3], dtype=torch.bool, device=y.device)
            outside[:rows, :columns] = False
            half = half.masked_fill(outside[..., None, None], torch.inf)
            cells.append((centre - half, centre + half))
        return cells

    def steps(self, component: int, like: Tensor) -> Tensor:
        """Return the quantisation steps of a component, [1 or B, 1, 1, 8, 8]."""
        return self.tables[:, component, None, None].to(like)

    def violations(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the share of DCT coefficients that come out different when x [B, C, H, W] is encoded again, [B]."""
        known = levels(y.double())
        wrong = []
        for component, k in enumerate(self.encode(x.detach())):
            rows, columns = k.shape[1:3]
            stored = self.forward_component(known, component)[:, :rows, :columns] / self.steps(component, known)
            wrong.append((stored.round() != k).flatten(1))
        return torch.cat(wrong, 1).to(x.dtype).mean(1)

    def _weights(self, component: int, like: Tensor) -> Tensor:
        weights = self.ycbcr[component] if self.layout.channels == 3 else (1.0,)
        return torch.tensor(weights, dtype=like.dtype, device=like.device)


class DecodedJpeg(JpegCodec):
    """The easy surrogate: what a decoder shows is taken for x + sigma_y w, A = I."""

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |u - y|^2 / 2 + |u - z|^2 / 2 = z + (y - z) / (1 + 1 / gamma), y without padding."""
        self.update_parameters(**kwargs)
        mean = z.to(at_least_float32(z, y))
        return (mean + (self.cropped(y) - mean) / (1 + 1 / per_sample(gamma, mean))).to(z.dtype)


def levels(image: Tensor) -> Tensor:
    """Return grey levels around 0: in these units T x has no offset, since Y weighs to 1 and chroma to 0."""
    return 255 * image - 128


class CellProjection(torch.autograd.Function):
    """Projection of padded ``levels`` [B, C, H', W'] onto the quantisation cell of y, and its derivative.

    The nearest x with l_i <= T_i x <= u_i for all components i. One component alone has T_i T_i^T = g_i I and a
    closed form; the colour transform makes them overlap, so they take turns with a dual variable each (Dykstra's
    algorithm, which is exact ascent of the dual in turn), until a sweep changes nothing by more than ``TOLERANCE`` grey
    levels; grey needs a single one. The angles between the components let the error fall about fivefold per sweep.

    The derivative is the projection onto the directions that leave every active bound where it is, by the same sweeps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, codec: JpegCodec) -> Tensor:
        """Return the nearest point of the cell."""
        cells = codec.cells(y)
        nearest, duals = take_turns(codec, x, lambda i, t: t.clamp(*cells[i]))
        ctx.codec, ctx.weight_like = codec, weight
        ctx.save_for_backward(*(dual != 0 for dual in duals))
        return nearest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to x (its tangential part) and weight (0)."""
        active = ctx.saved_tensors
        tangential, _ = take_turns(ctx.codec, gradients[0], lambda i, t: t.masked_fill(active[i], 0.0))
        return tangential, None, torch.zeros_like(ctx.weight_like), None


def take_turns(codec: JpegCodec, x: Tensor, nearest: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the projection of x onto the set where ``nearest(i, T_i x) = T_i x`` for all components, and the duals."""
    limit = TOLERANCE / 128 * x.flatten(1).abs().amax(1).clamp(min=torch.finfo(x.dtype).tiny)
    components = range(codec.layout.channels)
    duals = [torch.zeros_like(codec.forward_component(x, i)) for i in components]
    active = torch.ones_like(limit, dtype=torch.bool)  # a sample's result must not depend on the others of its batch
    for _ in range(MAX_SWEEPS if len(components) > 1 else 1):
        change = torch.zeros_like(limit)
        for i in components:
            without = codec.forward_component(x, i) + codec.gain(i) * duals[i]
            step = (without - nearest(i, without)) / codec.gain(i) - duals[i]
            step = step.masked_fill(~active.view(-1, *(1,) * (step.ndim - 1)), 0)
            x = x - codec.adjoint_component(step, i)
            duals[i] = duals[i] + step
            change = torch.maximum(change, step.flatten(1).abs().amax(1))
        active = change > limit  # NaN is no reason to go on
        if not active.any():
            return x, duals
    excess = (change / limit).max().item()
    if len(components) > 1 and excess > 100:  # a tenth of a grey level
        warnings.warn(
            f"the projection onto the cell of a JPEG stopped after {MAX_SWEEPS} sweeps, with changes of {excess:.1g} "
            "times the tolerance",
            ConvergenceWarning,
            stacklevel=4,
        )
    return x, duals


class Jpeg(OperatorFamily):
    """y = the JPEG file of x, of a given quality.

    Args:
        quality: quality factor of the Independent JPEG Group, in 1..100; two numbers: another one for every sample,
            uniform between them.
        subsampling: of chroma in colour images: "4:2:0", "4:2:2" or "4:4:4".
        likelihood: "cell", what a file really says, or "gaussian", the surrogate (``DecodedJpeg``).

    Raises:
        ValueError: for values out of range.
    """

    codec: type[JpegCodec] = JpegCodec

    def __init__(self, quality: int | Sequence[int] = 10, subsampling: str = "4:2:0", likelihood: str = "cell"):
        if likelihood not in ("cell", "gaussian"):
            raise ValueError(f"likelihood must be cell or gaussian, got {likelihood!r}")
        if likelihood == "gaussian":
            self.codec = DecodedJpeg
        low, high = quality if isinstance(quality, Sequence) else (quality, quality)
        for bound in (low, high):
            quality_tables(bound, 3)
        if low > high:
            raise ValueError(f"the first JPEG quality factor must not be above the second, got {quality}")
        if subsampling not in FACTORS:
            raise ValueError(f"subsampling must be one of {', '.join(FACTORS)}, got {subsampling!r}")
        self.tables = torch.stack([quality_tables(q, 3) for q in range(low, high + 1)])
        self.factors = FACTORS[subsampling]
        self.random = low < high

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError for images that are neither grey nor in colour."""
        super().check(image_shape)
        if image_shape[0] not in (1, 3):
            raise ValueError(f"JPEG holds images with 1 or 3 channels, got {image_shape[0]}")

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> JpegCodec:
        """Return an encoder, with tables for every sample where the quality is random."""
        self.check(image_shape)
        tables = self.tables
        if self.random:
            which = rand((batch_size, 1), generator)[:, 0].cpu() * len(tables)
            tables = tables[which.long().clamp(max=len(tables) - 1)]
        factors = self.factors if image_shape[0] == 3 else (1, 1)
        return self.codec(tables[:, : image_shape[0]], image_shape, factors, device)

    def read_observation(self, path: str | Path, channels: int, device: torch.device | str) -> tuple[Tensor, JpegCodec]:
        """Return y and the encoder of a JPEG file: its own coefficients, tables and averages of chroma.

        Raises:
            OSError: when it cannot be read.
            ValueError: for another kind of file, one whose colours this code cannot take, or without jpeglib.
        """
        return read_jpeg(path, channels, device, self.codec)


def read_jpeg(
    path: str | Path, channels: int, device: torch.device | str = "cpu", kind: type[JpegCodec] = JpegCodec
) -> tuple[Tensor, JpegCodec]:
    """Return y [1, C, H', W'] and the encoder of a JPEG file, read with jpeglib.

    A grey file for ``channels`` = 3 is refused, and so is a colour file for 1, and one with an orientation: turned,
    blocks would no longer lie where the encoder put them.

    Raises:
        OSError: see ``Jpeg.read_observation``.
        ValueError: see ``Jpeg.read_observation``.
    """
    try:
        import jpeglib
    except ImportError as error:
        raise ValueError(f"the coefficients of {path} are read with jpeglib: pip install 'ud2m[jpeg]'") from error
    header = read_header(Path(path), path)
    if header.format not in ("JPEG", "MPO"):
        raise ValueError(f"{path} is no JPEG file but {header.format}; physics=jpeg reads the coefficients of one")
    if header.orientation != 1:
        raise ValueError(
            f"{path} is to be turned (EXIF orientation {header.orientation}), which blocks of 8x8 pixels cannot be; "
            "turn it without loss (jpegtran -rotate, -flip), or remove its orientation to have it sampled as it lies"
        )
    read_picture(Path(path), path)  # jpeglib has no limit on pixels, and takes cut files
    try:
        file = jpeglib.read_dct(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged JPEG file: {error}") from error
    components = [c for c in (file.Y, file.Cb, file.Cr) if c is not None]
    if len(components) != channels or file.jpeg_color_space.name not in ("JCS_YCbCr", "JCS_GRAYSCALE"):
        raise ValueError(
            f"{path} has {len(components)} components ({file.jpeg_color_space.name}), the model needs {channels} "
            f"({'YCbCr' if channels == 3 else 'grey'}); convert the decoded picture and use physics=denoising"
        )
    factors = (int(file.samp_factor[0][0]), int(file.samp_factor[0][1])) if channels == 3 else (1, 1)
    if factors not in FACTORS.values() or any(tuple(f) != (1, 1) for f in file.samp_factor[1:].tolist()):
        raise ValueError(
            f"{path} averages chroma in the unusual way {file.samp_factor.tolist()}; supported: {', '.join(FACTORS)}"
        )
    tables = torch.stack([torch.from_numpy(file.qt[n].astype("float64")) for n in file.quant_tbl_no[:channels]])
    codec = kind(tables.unsqueeze(0), (channels, file.height, file.width), factors)
    y = codec.decode([torch.from_numpy(c.astype("float64")).unsqueeze(0) for c in components])
    return y.float().to(device), codec.to(device)


@image_shape.register
def _(physics: JpegCodec, y: Tensor) -> tuple[int, int, int]:
    return physics.img_size


@observe.register
def _(physics: JpegCodec, x0: Tensor, sigma_y: Tensor | float, generator: Generators = None) -> Tensor:
    """Return the decoded file: the quantisation is all the noise there is."""
    return physics.A(x0)


@residual.register
def _(physics: JpegCodec, x: Tensor, y: Tensor, sigma_y: Tensor | float) -> Tensor:
    """Return the share of DCT coefficients that come out different when x is encoded again; 0 where x explains y."""
    return physics.violations(x, y)


@mean_gain.register
@kept_gain.register
def _(physics: JpegCodec, like: Tensor) -> Tensor:
    """Return 1: a file says something of every pixel."""
    return like.new_ones(len(like))


@misfit.register
def _(physics: JpegCodec, value: float) -> str:
    if value <= 0.05:
        return ""
    return f"{100 * value:.0f} % of the samples' DCT coefficients are others than the file's"


@estimate_sigma_y.register
def _(physics: JpegCodec, y: Tensor) -> Tensor:
    raise ValueError("a JPEG file has no noise level to estimate; give sigma_y, the rms error of the decoded picture")
