"""What the tests share: one cache folder and one TinyWan per variant for the whole session."""

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ranks

ROOT = Path(__file__).parents[1]

# Before torch loads, and for every process a test starts: TinyWan's tensors are too small to share,
# and threads that spin while they wait for a busy core cost ten times the work itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's interpreter runs the kernels' own code. Triton looks when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: where workers take whole files, none is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What the imports have made stays: each later collection of garbage passes over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def tempolora_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder, and that of every process a test starts: fresh, unless one is named."""
    named = os.environ.get("TEMPOLORA_CACHE")
    with pytest.MonkeyPatch.context() as patch:
        cache = Path(named) if named else tmp_path_factory.mktemp("cache")
        patch.setenv("TEMPOLORA_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def tinywan(tempolora_cache: Path) -> Callable[[str], Path]:
    """tinywan("ti2v_5b"): the diffusers folder of TinyWan in the shape of that variant."""
    from tempolora.model.tinywan import tinywan_folder  # imports diffusers: only where it is used

    return tinywan_folder


@pytest.fixture(scope="session")
def ranks(tempolora_cache: Path) -> Iterator[Ranks]:
    """Where processes of a run are forked."""
    made = Ranks()
    yield made
    made.close()


def held_by_git() -> list[str]:
    """The files that git holds or would take, by their names in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


SMALL = (
    "data.num_frames=17",
    "lora.target=temporal",
    "train.batch_size=1",
    "train.max_steps=4",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=5",
    "train.warmup_steps=0",
    "train.optimizer=adamw",
    "output.sample_steps=0",
    "output.trackers=[]",
)
"""Laid over configs/toy.json: a run of seconds."""


def overrides(*settings: str) -> list[str]:
    """`--set` arguments for the command line."""
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn clips with prompts.txt, really encoded: 17 frames of 64x64 at 16 fps."""
    from tempolora.data.toy_set import draw_toy_set

    folder = tmp_path_factory.mktemp("toy") / "clips"
    draw_toy_set(folder, fps=16, num_frames=17, height=64, width=64, clips=6, seed=0)
    return folder


@pytest.fixture(scope="session")
def toy_shards(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards that `tempolora precompute` makes of them with TinyWan."""
    from tempolora.cli import main

    folder = tmp_path_factory.mktemp("toy_shards") / "shards"
    sets = overrides(*SMALL, f"data.source={toy_data}", f"data.shards={folder}")
    assert main(["precompute", *sets]) == 0
    return folder
