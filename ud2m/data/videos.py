"""Video files and folders of frames in and out, as float tensors [C, T, H, W] in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ud2m.files import atomic_file
from ud2m.images import list_images, read_image, viewable, with_channels, write_image
from ud2m.raster import LIMIT, max_pixels

FRAME_RATE = 25.0
"""Frames per second of a folder of frames, which does not say it."""
RATES = (0.001, 1000)
"""The least and the most frames per second of a video file."""
INSTALL = "pip install 'ud2m[video]', which brings av"
CODEC = "libx264"
FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "yuv4mpegpipe")
"""What is opened, by FFmpeg's names. It knows more, some of which open further files, as playlists do."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A video.

    Attributes:
        frames: [C, T, H, W] in [0, 1].
        rate: frames per second.
        remark: what of the file is not in the frames.
    """

    frames: Tensor
    rate: float
    remark: str = ""


def read_clip(path: str | Path, channels: int | None = 3, rate: float | None = None) -> Clip:
    """Read a folder of frames (``read_image``, by the order of their names), or a video file, by ``av``.

    Frames of a file are turned as its rotation tag says; that it mirrors them, which tags may say too, is not seen.

    Args:
        path: of the folder or file.
        channels: 3 repeats grey; 1 takes the luma of colour; None keeps what a folder's files have.
        rate: frames per second, instead of what the file says.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: for fewer than 2 frames, too many pixels, frames that differ in size or are transparent, a damaged
            file, one without a video or with several, a format that is not of ``FORMATS``, frames per second that are
            none of ``RATES``, or without ``av``.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        clip = Clip(_stacked(_files(path, channels), path), rate or FRAME_RATE)
    elif path.is_file():
        clip = _decoded(path, channels, rate)
    else:
        raise FileNotFoundError(f"there is no video {path}: give a video file, or a folder of frames")
    if clip.frames.shape[1] < 2:
        raise ValueError(f"{path} holds one frame; a video has two or more, and a picture is for other samplers")
    return clip


def _files(folder: Path, channels: int | None) -> list[tuple[str, Tensor]]:
    frames: list[tuple[str, Tensor]] = []
    for file in list_images(folder):
        frame = read_image(file, channels)
        frames.append((file.name, frame))
        check_pixels(folder, len(frames), frame.shape[2], frame.shape[1])
    return frames


def _stacked(frames: list[tuple[str, Tensor]], path: Path) -> Tensor:
    first, shape = frames[0][0], frames[0][1].shape
    for name, frame in frames:
        if frame.shape != shape:
            sizes = [f"{s[2]}x{s[1]} with {s[0]} channel{'s' * (s[0] > 1)}" for s in (shape, frame.shape)]
            raise ValueError(f"the frames of {path} differ: {first} is {sizes[0]}, {name} is {sizes[1]}")
    return torch.stack([frame for _, frame in frames], 1)


def _av(path: Path) -> Any:
    try:
        import av  # an extra
    except ImportError as error:
        raise ValueError(f"{path} needs {INSTALL}; or give a folder of frames") from error
    return av


def _decoded(path: Path, channels: int | None, rate: float | None) -> Clip:
    av = _av(path)
    frames: list[tuple[str, Tensor]] = []
    notes = []
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        # the open file and no name, and no protocols: a playlist would read other files, and addresses
        with path.open("rb") as file, av.open(file, options=options) as container:
            stream = _only_video(container.streams.video, path)
            if container.streams.audio:
                notes.append("audio is left out")
            declared, told = stream.frames, rate or stream.average_rate
            check_pixels(path, max(declared, 1), stream.width, stream.height)
            # damaged parts are errors, which FFmpeg would fill with what stands near them
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(max_pixels())}
            for number, frame in enumerate(container.decode(stream)):
                check_pixels(path, number + 1, frame.width, frame.height)
                if frame.is_corrupt:
                    raise ValueError(f"{path} is damaged: frame {number} is not whole")
                frames.append((f"frame {number}", with_channels(_pixels(frame, path), channels)))
                deep = frame.format.components[0].bits > 8
    except (av.FFmpegError, OSError) as error:  # its own, and those of the file at places that are not in it
        said = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be decoded: {said} (formats that are read: {', '.join(FORMATS)})") from error
    if len(frames) < max(declared, 1):
        raise ValueError(f"{path} is damaged: {len(frames)} of {declared} frames can be decoded")
    if not told or not RATES[0] <= told <= RATES[1]:
        low, high = RATES
        raise ValueError(
            f"{path} has {told or 'an unknown number of'} frames per second; give fps=..., {low} to {high}"
        )
    if deep:
        notes.append("more than 8 bits are read; videos that are written have 8, frames and arrays all")
    return Clip(_stacked(frames, path), float(told), "; ".join(notes))


def _only_video(streams: Sequence[Any], path: Path) -> Any:
    """Return the one video among streams, some of which are pictures of covers."""
    videos = [stream for stream in streams if "attached_pic" not in (stream.disposition.name or "")]
    if not videos:
        raise ValueError(f"{path} holds no video")
    if len(videos) > 1:
        raise ValueError(f"{path} holds {len(videos)} videos; save the one that is meant as a file of its own")
    return videos[0]


def check_pixels(path: Path, count: int, width: int, height: int) -> None:
    """Raise ValueError for more frames than memory is taken for: all together have no more pixels than a picture."""
    most = max_pixels()
    if count * width * height > most:
        raise ValueError(
            f"{path} has too many pixels: {count} frames of {width}x{height} or more, and at most {most} in all are "
            f"decoded; cut it, or set the environment variable {LIMIT}"
        )


def _pixels(frame: Any, path: Path) -> Tensor:
    """Return a decoded frame as [3, H, W], turned as its file asks players to."""
    if any(component.is_alpha for component in frame.format.components):
        raise ValueError(f"{path} has transparent pixels ({frame.format.name}); put it on a background first")
    deep = frame.format.components[0].bits > 8
    values = frame.to_ndarray(format="rgb48le" if deep else "rgb24").astype(np.float32)
    turns, rest = divmod(frame.rotation, 90)  # counterclockwise, as rot90
    if rest:
        raise ValueError(f"{path} is to be turned by {frame.rotation} degrees; write it with multiples of 90 alone")
    return torch.from_numpy(values / (65535 if deep else 255)).permute(2, 0, 1).rot90(turns, (1, 2))


def write_frames(clip: Tensor, folder: Path) -> None:
    """Write a clip [C, T, H, W] as ``000000.png``, ... ; what is no picture as ``viewable`` makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(clip.unbind(1)):
        write_image(viewable(frame)[0], folder / f"{number:06d}.png")


def can_write_videos() -> bool:
    """Return whether ``av`` is installed."""
    try:
        _av(Path())
    except ValueError:
        return False
    return True


def write_video(clip: Tensor, path: Path, rate: float) -> None:
    """Write a clip [C, T, H, W] as an mp4 of 8 bits (H.264, hardly any loss), aside and renamed when it is whole.

    Raises:
        ValueError: without ``av``.
        OSError: when the place cannot be written.
    """
    av = _av(path)
    height, width = clip.shape[-2:]
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(CODEC, rate=_fraction(rate), options={"crf": "10"})
        stream.width, stream.height = width, height
        # chroma of half the size needs even sides
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        for frame in clip.unbind(1):
            values = (with_channels(viewable(frame)[0], 3).clamp(0, 1) * 255).round().byte()
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _fraction(rate: float) -> Fraction:
    """Return a rate in small numbers, those of slow ones too, as files hold it."""
    return Fraction(rate).limit_denominator(1001) if rate >= 1 else 1 / _fraction(1 / rate)
