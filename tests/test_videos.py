"""Video files and folders of frames: what is read is what was written, and what is no video is one clear line."""

import errno
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ud2m.data.videos import can_write_videos, read_clip, write_frames, write_video
from ud2m.images import write_image

needs_av = pytest.mark.skipif(not can_write_videos(), reason="av is not installed: pip install 'ud2m[video]'")


def moving(frames: int = 6, channels: int = 3, height: int = 32, width: int = 48) -> torch.Tensor:
    """Return a smooth clip [C, T, H, W] that moves: compression keeps it."""
    t, i, j = torch.meshgrid(*(torch.arange(n) / n for n in (frames, height, width)), indexing="ij")
    planes = [0.5 + 0.4 * torch.sin(3 * (i + k * j) + 2 * t) for k in range(channels)]
    return torch.stack(planes)


def written(path, frames, format="rgb24", codec="libx264", pix_fmt="yuv420p", audio=False, rate=30, matrix=None):
    """Write arrays with av, as others would."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.set_display_matrix(matrix)
        sound = container.add_stream("aac", rate=44100) if audio else None
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format)))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate = 44100
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def arrays(clip, top=255, kind=np.uint8):
    return [(frame.permute(1, 2, 0).numpy() * top).round().astype(kind) for frame in clip.unbind(1)]


# --- folders of frames -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_frames_is_read_by_name(tmp_path, channels):
    clip = moving(12, channels)
    write_frames(clip, tmp_path / "frames")
    read = read_clip(tmp_path / "frames", channels)
    torch.testing.assert_close(read.frames, clip, rtol=0, atol=0.6 / 255)
    assert read.rate == 25
    assert read_clip(tmp_path / "frames", 4 - channels, rate=12.5).frames.shape == (4 - channels, 12, 32, 48)


def test_folders_that_hold_no_video_are_one_clear_line(tmp_path):
    write_image(moving()[:, 0], tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds one frame; a video has two or more"):
        read_clip(tmp_path)
    write_image(moving(height=16)[:, 0], tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"differ: a.png is 48x32 with 3 channels, b.png is 48x16 with 3 channels"):
        read_clip(tmp_path)
    write_image(moving(channels=1)[:, 0], tmp_path / "b.png")
    assert read_clip(tmp_path, 3).frames.shape == (3, 2, 32, 48)
    with pytest.raises(ValueError, match=r"a.png is 48x32 with 3 channels, b.png is 48x32 with 1 channel$"):
        read_clip(tmp_path, None)
    Image.new("RGBA", (48, 32), (1, 2, 3, 100)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png .*transparent"):
        read_clip(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no video .*: give a video file, or a folder of frames"):
        read_clip(tmp_path / "missing.mp4")


def test_without_av_a_file_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"clip.mp4 needs pip install 'ud2m\[video\]', which brings av; or give a fol"):
        read_clip(tmp_path / "clip.mp4")
    assert not can_write_videos()


# --- files -------------------------------------------------------------------------------------------------------


@needs_av
@pytest.mark.parametrize(("height", "width"), [(32, 48), (31, 45)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_comes_back(tmp_path, height, width, channels):
    clip = moving(9, channels, height, width)
    write_video(clip, tmp_path / "clip.mp4", 12.5)
    read = read_clip(tmp_path / "clip.mp4", channels)
    assert read.frames.shape == clip.shape
    assert (read.frames - clip).abs().mean() < (0.02 if channels == 3 else 0.01)
    assert read.rate == pytest.approx(12.5)
    assert not read.remark
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@needs_av
@pytest.mark.parametrize("rate", [0.001 / 16, 0.3, 29.97, 1000.0])
def test_slow_and_fast_videos_keep_their_rate(tmp_path, rate):
    write_video(moving(2), tmp_path / "clip.mp4", rate)
    if rate < 0.001:
        with pytest.raises(
            ValueError, match=r"clip\.mp4 has 1/16000 frames per second; give fps=\.\.\., 0\.001 to 1000"
        ):
            read_clip(tmp_path / "clip.mp4")
        assert read_clip(tmp_path / "clip.mp4", rate=1.0).rate == 1
    else:
        assert read_clip(tmp_path / "clip.mp4").rate == pytest.approx(rate, rel=1e-4)


@needs_av
def test_a_file_whose_frames_change_their_size_is_one_clear_line(tmp_path):
    parts = [written(tmp_path / f"{side}.ts", arrays(moving(3, height=side))).read_bytes() for side in (32, 64)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match=r"both\.ts differ: frame 0 is 48x32 with 3 channels, frame \d is 48x64 with"):
        read_clip(tmp_path / "both.ts")


@needs_av
def test_audio_is_left_out_and_said(tmp_path):
    read = read_clip(written(tmp_path / "clip.mp4", arrays(moving()), audio=True))
    assert read.remark == "audio is left out"
    assert read.frames.shape[1] == 6
    assert read.rate == 30


@needs_av
def test_the_rotation_tag_is_honoured(tmp_path):
    """The matrix [a b u; c d v; x y w] of the file format puts pixel (p, q) at (a p + c q + x, b p + d q + y)."""
    one, clip = 1 << 16, moving(3)
    p, q = torch.meshgrid(torch.arange(48), torch.arange(32), indexing="xy")
    for name, (a, b, c, d) in {"left": (0, -1, 1, 0), "right": (0, 1, -1, 0), "over": (-1, 0, 0, -1)}.items():
        column, row = a * p + c * q, b * p + d * q
        column, row = column - column.min(), row - row.min()
        expected = torch.zeros(3, 3, int(row.max()) + 1, int(column.max()) + 1)
        expected[:, :, row, column] = clip
        matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
        found = read_clip(written(tmp_path / f"{name}.mp4", arrays(clip), matrix=matrix)).frames
        assert found.shape == expected.shape
        assert (found - expected).abs().mean() < 0.03
    matrix = [46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30]
    with pytest.raises(ValueError, match=r"aslant\.mp4 is to be turned by -?45 degrees; write it with multiples of 90"):
        read_clip(written(tmp_path / "aslant.mp4", arrays(clip), matrix=matrix))


@needs_av
def test_grey_and_deep_videos_are_read(tmp_path):
    grey = [frame[..., 0] for frame in arrays(moving(channels=1))]
    read = read_clip(written(tmp_path / "grey.mkv", grey, "gray", "ffv1", "gray"))
    torch.testing.assert_close(read.frames, moving(channels=1).expand(3, -1, -1, -1), rtol=0, atol=0.02)
    deep = written(tmp_path / "deep.mkv", arrays(moving(), 65535, np.uint16), "rgb48le", "ffv1", "yuv444p10le")
    read = read_clip(deep)
    assert "more than 8 bits are read" in read.remark
    assert (read.frames - moving()).abs().max() < 1.5 / 255
    assert len(read.frames.unique()) > 256


@needs_av
def test_damaged_files_are_one_clear_line(tmp_path):
    whole = written(tmp_path / "clip.mp4", arrays(moving(40)))
    data = whole.read_bytes()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "head.mp4").write_bytes(data[: len(data) // 2])
    for name in ("noise", "empty", "head"):
        with pytest.raises(ValueError, match=rf"{name}\.mp4 cannot be decoded: "):
            read_clip(tmp_path / f"{name}.mp4")
    index = data.index(b"moov")
    holes = bytearray(data)
    holes[index // 2 : index - 8] = bytes(index - 8 - index // 2)
    (tmp_path / "holes.mp4").write_bytes(holes)
    with pytest.raises(ValueError, match=r"holes\.mp4 (is damaged: \d+ of 40 frames|cannot be decoded)"):
        read_clip(tmp_path / "holes.mp4")


@needs_av
def test_files_that_are_no_videos_of_frames_are_one_clear_line(tmp_path):
    one = written(tmp_path / "one.mp4", arrays(moving(1)))
    with pytest.raises(ValueError, match=r"one\.mp4 holds one frame"):
        read_clip(one)
    opaque = np.full((32, 48, 4), 255, np.uint8)
    with pytest.raises(ValueError, match=r"clear\.mov has transparent pixels \(rgba\)"):
        read_clip(written(tmp_path / "clear.mov", [opaque, opaque], "rgba", "png", "rgba"))
    import av

    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.m4a holds no video"):
        read_clip(tmp_path / "sound.m4a")


# --- files of strangers ------------------------------------------------------------------------------------------


@needs_av
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat", "list.sdp"])
def test_playlists_open_no_further_file(name, tmp_path):
    """FFmpeg recognises them by their content or their name, and would show the other file, or ask an address."""
    other = written(tmp_path / "other.mp4", arrays(moving()))
    texts = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{other}\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }
    path = tmp_path / name
    for text in (f"ffconcat version 1.0\nfile '{other.name}'\n", *texts.values()):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{name} cannot be decoded: .*formats that are read: mov, mp4") as caught:
            read_clip(path)
        assert "\n" not in str(caught.value)


@needs_av
@pytest.mark.parametrize(
    ("ending", "codec"), [("avi", "mpeg4"), ("ts", "libx264"), ("mpg", "mpeg2video"), ("mov", "png")]
)
def test_formats_of_videos_are_read(ending, codec, tmp_path):
    pixels = "rgb24" if codec == "png" else "yuv420p"
    read = read_clip(written(tmp_path / f"clip.{ending}", arrays(moving()), codec=codec, pix_fmt=pixels))
    assert (read.frames - moving()).abs().mean() < 0.03


@needs_av
def test_a_second_video_is_refused_and_a_cover_is_none(tmp_path):
    import av

    for name, cover in (("two.mp4", False), ("cover.mp4", True)):
        with av.open(str(tmp_path / name), "w") as container:
            streams = [container.add_stream("libx264", rate=30), container.add_stream("mjpeg", rate=30)]
            streams[1].pix_fmt = "yuvj420p"
            if cover:
                streams[1].disposition = av.stream.Disposition.attached_pic
            for stream in streams:
                stream.height, stream.width = 32, 48
            for stream in streams:
                for frame in arrays(moving())[: 1 if cover and stream is streams[1] else None]:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                container.mux(stream.encode())
    assert read_clip(tmp_path / "cover.mp4").frames.shape[1] == 6
    with pytest.raises(ValueError, match=r"two\.mp4 holds 2 videos; save the one that is meant"):
        read_clip(tmp_path / "two.mp4")


@needs_av
def test_all_frames_together_are_bounded_before_they_are_decoded(tmp_path, monkeypatch):
    told, untold = tmp_path / "told.mp4", tmp_path / "untold.ts"
    for path in (told, untold):
        written(path, arrays(moving()))
    monkeypatch.setenv("UD2M_MAX_PIXELS", str(6 * 32 * 48))
    for path in (told, untold):
        assert read_clip(path).frames.shape[1] == 6
    monkeypatch.setenv("UD2M_MAX_PIXELS", str(6 * 32 * 48 - 1))
    for path in (told, untold):
        with pytest.raises(ValueError, match="has too many pixels: 6 frames of 48x32 or more, and at most 9215 in all"):
            read_clip(path)
    monkeypatch.setattr("ud2m.data.videos._pixels", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(ValueError, match="has too many pixels"):
        read_clip(told)
    monkeypatch.setenv("UD2M_MAX_PIXELS", "100")
    with pytest.raises(ValueError, match="has too many pixels: 1 frames of 48x32"):
        read_clip(untold)


def test_the_frames_of_a_folder_are_bounded_too(tmp_path, monkeypatch):
    write_frames(moving(), tmp_path / "frames")
    monkeypatch.setenv("UD2M_MAX_PIXELS", str(5 * 32 * 48))
    with pytest.raises(ValueError, match=r"frames has too many pixels: 6 frames of 48x32 or more, .* UD2M_MAX_PIXELS$"):
        read_clip(tmp_path / "frames")


@needs_av
def test_frames_that_a_decoder_would_make_up_are_refused(tmp_path):
    """FFmpeg fills damaged parts of a frame with what stands near them, and marks the frame."""
    import av

    whole = written(tmp_path / "clip.mp4", arrays(moving(40)))
    path, data, marked = tmp_path / "damaged.mp4", whole.read_bytes(), 0
    for place in range(1000, data.index(b"moov") - 20, 23):
        damaged = bytearray(data)
        damaged[place : place + 2] = bytes(2)
        path.write_bytes(damaged)
        try:
            with av.open(str(path)) as container:
                odd = any(frame.is_corrupt for frame in container.decode(video=0))
        except av.FFmpegError:
            odd = True
        if odd:
            marked += 1
            with pytest.raises(ValueError, match=r"damaged\.mp4 (cannot be decoded|is damaged): [^\n]*$"):
                read_clip(path)
    assert marked > 10


@needs_av
def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    write_video(moving(), tmp_path / "clip.mp4", 25)
    before = (tmp_path / "clip.mp4").read_bytes()
    shown = iter([lambda frame: (frame, None)] * 3)

    def full(frame):
        try:
            return next(shown)(frame)
        except StopIteration:
            raise OSError(errno.ENOSPC, "full") from None

    monkeypatch.setattr("ud2m.data.videos.viewable", full)
    with pytest.raises(OSError, match=r"cannot write .*clip\.mp4: no space is left"):
        write_video(moving(), tmp_path / "clip.mp4", 25)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == before
