"""What the tests share: one cache folder and one TinyWan per variant for the whole session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch loads, and for every process a test starts: TinyWan's tensors are too small to share,
# and threads that spin while they wait for a busy core cost ten times the work itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
