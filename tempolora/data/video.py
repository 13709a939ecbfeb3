"""Frames to an mp4 that every player opens: the one place that encodes video.

The toy set (`data/toy.py`), the resampling bench and the samples of a training run are all
written here, with the colour matrix tagged so that what is read back is what was drawn.
"""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

BT709 = 1  # the code point that ISO/IEC 23091-2 gives matrix, primaries and transfer of BT.709


def write_mp4(
    path: Path,
    frames: np.ndarray,
    fps: Fraction | float,
    audio: np.ndarray | None = None,
    rate: int | None = None,
    *,
    crf: int = 12,
) -> None:
    """Encode uint8 RGB `frames` (F, H, W, 3) at `fps` (Hz) as H.264, with an AAC track if given.

    `audio` is float in [-1, 1], (samples,) mono or (samples, channels), at `rate` Hz; its first
    sample sounds with the first frame. H and W must be even (4:2:0). The file appears under its
    own name only once it is whole. Raises ValueError for a wrong shape or type.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (F, H, W, 3), got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"height and width must be even, got {frames.shape[1:3]}")
    if (audio is None) != (rate is None):
        raise ValueError("audio and rate go together")
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(partial, "w", format="mp4", options={"movflags": "+faststart"}) as container:
            video = _add_video(container, frames, fps, crf)
            sound = None
            if audio is not None:
                layout = "mono" if audio.ndim == 1 or audio.shape[1] == 1 else "stereo"
                sound = container.add_stream("aac", rate=rate, layout=layout)
            for rgb in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                container.mux(video.encode(_to_bt709(frame)))
            container.mux(video.encode())
            if sound is not None:
                _encode_audio(container, sound, audio, rate)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _add_video(container, frames: np.ndarray, fps: Fraction | float, crf: int):
    rate = Fraction(fps).limit_denominator(1001)
    # Without x264's macroblock tree: with it small frames give another file each time, and videos
    # are measured, and trained on, as they come from the file.
    options = {"crf": str(crf), "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.time_base = 1 / rate
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = ColorRange.MPEG
    return stream


def _to_bt709(frame: av.VideoFrame) -> av.VideoFrame:
    return frame.reformat(
        format="yuv420p",
        src_colorspace=Colorspace.DEFAULT,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )


def _encode_audio(container, stream, audio: np.ndarray, rate: int) -> None:
    planar = np.atleast_2d(np.asarray(audio, np.float32).T)
    chunk = 1024  # the frame length of AAC-LC
    for start in range(0, planar.shape[1], chunk):
        samples = np.ascontiguousarray(planar[:, start : start + chunk])
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
        frame.sample_rate = rate
        frame.pts = start
        frame.time_base = Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
