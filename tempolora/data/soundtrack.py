"""The sound of any file, to guide sampling by and to be heard with the video.

Read like a clip: in a process of its own, `python -m tempolora.data.soundtrack`, because a bad file
can crash or hang a decoder.
"""

import json
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

from tempolora import ConfigError
from tempolora.data.clips import DecoderFailed, run_worker

RATE_HZ = 48_000
OPTION = "--soundtrack"


def read_soundtrack(path: Path, duration_s: float, timeout_s: float) -> np.ndarray:
    """The first `duration_s` seconds of a file's sound, float32 (samples, 2) at RATE_HZ.

    Shorter sound is not made longer. Raises ConfigError for a file that is missing, holds no sound
    that decodes, or is silent all that time, and where the decoder takes longer than `timeout_s`
    seconds.
    """
    from tempolora.data.audio import has_sound  # with scipy, which the decoder does without

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{OPTION}: there is no file {path}")
    with tempfile.TemporaryDirectory(prefix="tempolora-sound-") as folder:
        request = {"path": str(path.resolve()), "duration_s": duration_s, "folder": folder}
        try:
            request = json.dumps(request)
            said = run_worker("tempolora.data.soundtrack", request, str(path), timeout_s)
            answer = json.loads((Path(folder) / "answer.json").read_text(encoding="utf-8"))
        except DecoderFailed as reason:
            raise ConfigError(f"{OPTION}: {reason}") from None
        except (OSError, ValueError):
            raise ConfigError(f"{OPTION}: {path}: the decoder left no answer{said}") from None
        if answer["refused"]:
            raise ConfigError(f"{OPTION}: {path}: {answer['refused']}")
        audio = np.load(Path(folder) / "audio.npy", allow_pickle=False)
    if not has_sound(audio):
        raise ConfigError(
            f"{OPTION}: {path}: the first {duration_s:.1f} s, the video's length, are silent, so "
            "there is nothing to follow; cut the silence off"
        )
    return audio


def main() -> None:
    request = json.loads(sys.stdin.read())
    refused = _decode(request["path"], request["duration_s"], Path(request["folder"]))
    answer = json.dumps({"refused": refused})
    (Path(request["folder"]) / "answer.json").write_text(answer, encoding="utf-8")


def _decode(path: str, duration_s: float, folder: Path) -> str | None:
    """Write audio.npy, or say why there is none."""
    wanted = round(duration_s * RATE_HZ)
    resampler = av.AudioResampler(format="flt", layout="stereo", rate=RATE_HZ)
    chunks, decoded = [], 0
    try:
        # a playlist must not make ffmpeg fetch what it names
        with av.open(path, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.audio:
                return "it has no sound track"
            for frame in container.decode(container.streams.audio[0]):
                frame.pts = None  # a format's late start is no silence
                for part in resampler.resample(frame):
                    chunks.append(part.to_ndarray().reshape(-1, 2))
                    decoded += len(chunks[-1])
                if decoded >= wanted:
                    break
            chunks += [part.to_ndarray().reshape(-1, 2) for part in resampler.resample(None)]
    except av.error.FFmpegError as error:
        return f"its sound does not decode ({error.strerror})"
    except ValueError as error:  # the resampler's, where the format changes on the way
        return f"its sound does not decode ({error})"
    audio = np.concatenate(chunks)[:wanted] if chunks else np.zeros((0, 2), np.float32)
    if not len(audio):
        return "its sound track is empty"
    if not np.isfinite(audio).all():
        return "its sound has samples that are not numbers"
    np.save(folder / "audio.npy", audio.clip(-1, 1), allow_pickle=False)
    return None


if __name__ == "__main__":
    main()
