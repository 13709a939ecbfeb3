"""Videos of one prompt beside each other, as HTML: each plays, and below it what a still can show.

A strip of frames, and one row of pixels over time, which is the same row in all of them.
"""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tempolora.results.charts import note

VIDEO_CONTROLS = (
    '<p class="controls"><button id="play" type="button">Pause</button></p>'
    '<p class="caption">Below each video: frames from first to last, then one row of pixels over '
    "time (time runs down). Still things draw vertical lines, motion slants them, flicker draws "
    "horizontal bands.</p>"
)
"""For the first of a page's videos; the button plays and pauses all."""
STRIP_FRAMES, STRIP_WIDTH = 4, 560  # frames in a strip; its width in pixels


def side_by_side(folder: Path, videos: Mapping[str, str], prompt: str) -> str:
    """A card with the videos of a prompt; videos: title -> path below `folder`.

    What is missing or cannot be read is said in its place.
    """
    frames: dict[str, np.ndarray] = {}
    problems: dict[str, str] = {}
    for title, name in videos.items():
        if not (folder / name).is_file():
            problems[title] = f"{name} is not in the folder."
            continue
        try:
            frames[title] = read_frames(folder / name)
        except (av.FFmpegError, ValueError) as error:
            problems[title] = f"{name} cannot be read: {error}"
    row = _liveliest_row(frames.values())
    figures = []
    for title, name in videos.items():
        if title in problems:
            body = note(problems[title])
        else:
            body = _video(name, title, frames[title], row[len(frames[title][0])])
        figures.append(f"<figure><h3>{escape(title)}</h3>{body}</figure>")
    said = f'<p class="prompt"><span class="soft">Prompt:</span> {escape(prompt)}</p>'
    return f'<div class="card videos">{said}<div class="pair">{"".join(figures)}</div></div>'


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video that we wrote, uint8 RGB (F, H, W, 3).

    Raises av.FFmpegError or ValueError where it cannot be read.
    """
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise ValueError("it holds no frames")
    return np.stack(frames)


def _video(name: str, title: str, frames_FHW3: np.ndarray, row: int) -> str:
    count, height = frames_FHW3.shape[:2]
    strip = _png(_frame_strip(frames_FHW3))
    time_slice = _png(frames_FHW3[:, row])
    return (
        f'<video src="{name}" muted loop autoplay playsinline preload="auto"></video>'
        f'<img src="{strip}" alt="{escape(title)}: {STRIP_FRAMES} frames from first to last">'
        f'<img class="slice" src="{time_slice}" alt="{escape(title)}: row {row} over time">'
        f"<figcaption>{count} frames; row {row} of {height} over time</figcaption>"
    )


def _liveliest_row(videos: Iterable[np.ndarray]) -> dict[int, int]:
    """Per frame height the pixel row that changes most over time.

    Videos of one height share their row, so that their slices can be compared.
    """
    change: dict[int, np.ndarray] = {}
    for frames_FHW3 in videos:
        by_row = np.zeros(frames_FHW3.shape[1])
        for before, after in itertools.pairwise(frames_FHW3):
            by_row += np.abs(after.astype(np.int16) - before).mean(axis=(1, 2))
        height = len(by_row)
        change[height] = change.get(height, 0) + by_row / len(frames_FHW3)
    return {height: int(by_row.argmax()) for height, by_row in change.items()}


def _frame_strip(frames_FHW3: np.ndarray) -> np.ndarray:
    chosen = frames_FHW3[np.linspace(0, len(frames_FHW3) - 1, STRIP_FRAMES).round().astype(int)]
    height, width = chosen.shape[1:3]
    small_width = min(width, STRIP_WIDTH // STRIP_FRAMES)
    size = (small_width, max(1, round(height * small_width / width)))
    return np.hstack([np.asarray(Image.fromarray(frame).resize(size)) for frame in chosen])


def _png(image_HW3: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
