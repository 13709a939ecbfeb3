"""Do the kernel tests notice a bug? `python tests/mutate_kernels.py` plants one after the other.

Each bug is one replacement in a copy of the package. The tests run on the CPU, in Triton's
interpreter, and must fail; on the copy without a bug they must pass. Exits 1 where they do not.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNEL, LAUNCH, TORCH = "triton_kernels.py", "triton_launch.py", "kernels.py"

MUTANTS = [
    ("stride of v taken from x", KERNEL, "v_t.to(INDEX) * UNIT, v_h", "x_t.to(INDEX) * UNIT, v_h"),
    (
        "height and width strides swapped",
        KERNEL,
        "(n // width) * stride_h",
        "(n // width) * stride_w",
    ),
    (
        "row order: time runs fastest",
        KERNEL,
        "(r % C) * stride_c + (r // C) * stride_t",
        "(r // C) * stride_c + (r % C) * stride_t",
    ),
    ("mask of the column dropped", KERNEL, "inside_R = d < C * T", "inside_R = d >= 0"),
    (
        "mask of the pixels dropped",
        KERNEL,
        "return inside_R[:, None] & inside_N[None, :]",
        "return inside_R[:, None] & (inside_N[None, :] | True)",
    ),
    ("channels past the last one", KERNEL, "inside_R &= d % C < left", "inside_R &= d % C <= left"),
    (
        "last chunk left out",
        KERNEL,
        "CHUNKS: tl.constexpr = (C * T + R - 1) // R",
        "CHUNKS: tl.constexpr = C * T // R if C * T > R else 1",
    ),
    (
        "window of the next tile off by one chunk",
        KERNEL,
        "read += (_read(x, v, i, first_c,",
        "read += (_read(x, v, i + 1, first_c,",
    ),
    ("fetch ahead takes the chunk twice", KERNEL, "x, v, i + AHEAD, c,", "x, v, i, c,"),
    (
        "next tile's channels taken from this one",
        KERNEL,
        "next_c = following // plane_tiles * C",
        "next_c = tile // plane_tiles * C",
    ),
    (
        "factor 2 missing from the gradient's unit",
        KERNEL,
        "unit_ptr + b, unit * 2.0 / pixels)",
        "unit_ptr + b, unit / pixels)",
    ),
    (
        "factor 2 missing when computed again",
        KERNEL,
        "back = unit * 2.0 / pixels if AGAIN",
        "back = unit / pixels if AGAIN",
    ),
    ("16-bit gradient in any unit", LAUNCH, "    if exact:\n", "    if False:\n"),
    (
        "rounded twice where d_flow is no power of two",
        LAUNCH,
        "EXACT=exact",
        "EXACT=False",
    ),
    (
        "descriptor's channel and frame swapped",
        KERNEL,
        "x_desc.load([sample, c, 0, n])",
        "x_desc.load([sample, 0, c, n])",
    ),
    (
        "tile stored at its neighbour",
        KERNEL,
        "g_desc.store([sample, c, 0, first_n]",
        "g_desc.store([sample, c, 0, first_n + N]",
    ),
    (
        "weight of the first sample for all",
        KERNEL,
        "(b * P + p % P if EACH else b + p * 0)",
        "(b * P + p % P if EACH else p * 0)",
    ),
    (
        "row weights of the next row",
        KERNEL,
        "(b * P + p % P if EACH",
        "(b * P + (p + 1) % P if EACH",
    ),
    (
        "flow divided by all frames",
        KERNEL,
        "CHANNELS * (T - FIRST),\n                P",
        "CHANNELS * T,\n                P",
    ),
    (
        "given frame learned after all",
        KERNEL,
        "if i * R < FIRST * C:\n                        chosen",
        "if i * R < 0:\n                        chosen",
    ),
    (
        "given frame counted in the flow",
        KERNEL,
        "squares_R = tl.where(learned_R, squares_R, 0.0)",
        "pass",
    ),
    ("counter not set back", KERNEL, "tl.store(counter_ptr + b, 0)", "pass"),
    (
        "last program's entry dropped",
        KERNEL,
        "inside = (entry < splits) &",
        "inside = (entry < splits - 1) &",
    ),
    (
        "last program's flow dropped",
        KERNEL,
        "tl.load(at, entry < splits, 0.0",
        "tl.load(at, entry < splits - 1, 0.0",
    ),
    (
        "gradient not scaled by d_flow",
        LAUNCH,
        "_scaled(made, d_flow * unit)",
        "_scaled(made, unit)",
    ),
    (
        "samples that match are not told apart",
        KERNEL,
        "if differ == 0:",
        "if differ < 1000:",
    ),
    (
        "combination never computed again",
        KERNEL,
        "tl.abs(weight - expected) <= 5e-7",
        "tl.abs(weight - expected) <= 5e7",
    ),
    (
        "probe not transposed on the way back",
        KERNEL,
        "_dot(u[j], _flip(probe[j], HALVES)",
        "_dot(u[j], probe[j]",
    ),
    ("low halves dropped", KERNEL, "c = tl.dot(a[1], b[0], c)", "pass"),
    ("low halves of the probe dropped", KERNEL, "c = tl.dot(a[0], b[1], c)", "pass"),
    (
        "careful tile's scale not undone in the gradient",
        KERNEL,
        "HALVES) * (inverse * back)",
        "HALVES) * back",
    ),
    (
        "careful tile's scale undone once in the energy",
        KERNEL,
        "energy * (inverse * inverse)",
        "energy * inverse",
    ),
    (
        "strong rows beside quiet ones not noticed",
        KERNEL,
        "careful = (tl.max(largest_R) >",
        "careful = (tl.min(largest_R) >",
    ),
    (
        "strong residuals not noticed",
        KERNEL,
        "tl.max(largest_R) > LARGEST / (CHUNKS * R)",
        "tl.max(largest_R) > LARGEST * LARGEST",
    ),
    (
        "weak residuals not noticed",
        KERNEL,
        "((total > 0) & (total < smallest))",
        "((total > 0) & (total < 0))",
    ),
    ("power of a row's norm lost from its gain", LAUNCH, "2 * exponent_BP)", "exponent_BP)"),
    (
        "probe kept when it has changed",
        LAUNCH,
        "kept.get(key, (None,))[0] == version",
        "key in kept",
    ),
    ("v added", KERNEL, "read[0].to(tl.float32) - read[1]", "read[0].to(tl.float32) + read[1]"),
    (
        "torch: mean over probe rows",
        TORCH,
        "e_BCTHW)\n    return seen_BPHW.square().mean(dim=(2, 3))",
        "e_BCTHW)\n    return seen_BPHW.square().mean(dim=(2, 3)) / probe.shape[-3]",
    ),
    (
        "torch: first frame learned",
        TORCH,
        "e_BCTHW[:, :, first_frame:].square()",
        "e_BCTHW.square()",
    ),
    (
        "torch: channels averaged",
        TORCH,
        "seen_BCPHW.square().sum(dim=1)",
        "seen_BCPHW.square().mean(dim=1)",
    ),
]


def caught(folder: Path, name: str, old: str, new: str) -> tuple[bool, float]:
    """Whether the tests fail on a copy with the bug, and the seconds that they took."""
    shutil.copytree(
        ROOT / "tempolora" / "rhythm", folder / "tempolora" / "rhythm", dirs_exist_ok=True
    )
    path = folder / "tempolora" / "rhythm" / name
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    return fails(folder)


def fails(folder: Path) -> tuple[bool, float]:
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py"]
    ran = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if ran.returncode > 1:
        sys.exit(f"the tests did not run:\n{ran.stdout}{ran.stderr}")
    return ran.returncode != 0, time.monotonic() - start  # negative: a bug that ended the process


def main() -> int:
    """Print a line for each bug; 1 where one was missed or the tests fail without any."""
    missed = 0
    for _, name, old, _ in MUTANTS:
        count = (ROOT / "tempolora" / "rhythm" / name).read_text("utf-8").count(old)
        assert count == 1, f"{old!r} occurs {count} times in {name}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(ROOT / "tempolora", folder / "tempolora")
        (folder / "tests").mkdir()
        for name in ("conftest.py", "ranks.py", "test_kernels.py"):
            shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        failed, seconds = fails(folder)
        sys.stdout.write(f"{'FAILS' if failed else 'passes':<7} {seconds:5.1f} s  no bug\n")
        missed += failed
        for what, name, old, new in MUTANTS:
            noticed, seconds = caught(folder, name, old, new)
            missed += not noticed
            verdict = "caught" if noticed else "MISSED"
            sys.stdout.write(f"{verdict:<7} {seconds:5.1f} s  {what}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(MUTANTS)} bugs, {missed} missed\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
