"""The project's own files agree: lock with pyproject, README with Makefile and commands."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import held_by_git
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
LOCK = (ROOT / "requirements.lock").read_text()

# Each lock entry: name==version, perhaps a marker, then its hashes on lines of their own.
LOCKED = {
    canonicalize_name(name): (version, marker, hashes)
    for name, version, marker, hashes in re.findall(
        r"^([\w.-]+)==(\S+)( ; [^\\\n]+)? \\\n((?:    --hash=.*\n)+)", LOCK, re.M
    )
}
# torch is pinned in the Makefile: its wheel differs between machines, so no one hash fits.
TORCH = re.search(r"^TORCH \?= torch==(\S+)$", MAKEFILE, re.M).group(1)


def declared(*extras):
    texts = list(PYPROJECT["project"]["dependencies"])
    for extra in extras:
        texts += PYPROJECT["project"]["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def tracked_files():
    return [ROOT / name for name in held_by_git()]


@pytest.mark.parametrize("requirement", declared("test"), ids=lambda r: r.name)
def test_lock_pins_every_dependency_within_its_range(requirement):
    name = canonicalize_name(requirement.name)
    version = TORCH if name == "torch" else LOCKED[name][0]
    assert requirement.specifier.contains(version)


def test_lock_gives_a_hash_for_every_package():
    pinned = re.findall(r"^[\w.-]+==", LOCK, re.M)
    assert len(pinned) == len(LOCKED)
    assert all("sha256:" in hashes for _, _, hashes in LOCKED.values())


def test_lock_leaves_torch_and_cuda_to_the_machine():
    assert not [n for n in LOCKED if n in ("torch", "triton") or n.startswith(("nvidia-", "cuda-"))]


def test_lock_needs_no_option_or_address():
    assert not re.search(r"^\s*--(?!hash=)|://", LOCK, re.M)


def test_every_import_is_a_declared_dependency():
    """A package that only came along with another may go with its next release."""
    names = {canonicalize_name(r.name) for r in declared("gpu")}
    providers = packages_distributions()
    missing = set()
    for path in [*ROOT.glob("tempolora/**/*.py"), *ROOT.glob("launch/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                top = module.partition(".")[0]
                owners = {canonicalize_name(d) for d in providers.get(top, [top])}
                if top not in sys.stdlib_module_names and not owners & (names | {"tempolora"}):
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing


def test_files_name_no_registry_and_no_machine_path():
    # In pieces, so that this file does not contain what it looks for.
    hosts = ["py" + "pi.org", "python" + "hosted", "npm" + "js.", "deb" + "ian.org/"]
    hosts += ["download.py" + "torch", "conda" + ".anaconda"]
    paths = ["/work/" + part for part in ("main", "shared", ".library", ".device")]
    paths += ["/ro" + "ot/", "/opt/" + "wheels", "/opt/" + "py" + "pi", "/tmp/" + "dev/"]
    bad = re.compile("|".join(re.escape(text) for text in hosts + paths).encode(), re.I)
    found = []
    for path in tracked_files():
        match = bad.search(path.read_bytes())
        if match:
            found.append(f"{path.relative_to(ROOT)}: {match.group().decode()}")
    assert not found


def test_license_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n")
    assert "Copyright (c) 2026 TempoLoRA contributors" in text
    assert PYPROJECT["project"]["license"] == "MIT"


def readme_commands(tool):
    """Words that follow `tool` in the README's code, inline or in blocks."""
    text = (ROOT / "README.md").read_text("utf-8")
    code = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"`([^`\n]+)`", text)
    return set(re.findall(rf"(?:^|[;&|] *|\bbin/){tool} +([a-z][\w-]*)", "\n".join(code), re.M))


def test_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]\w*):(?!=)", MAKEFILE, re.M))
    named = readme_commands("make")
    assert {"demo", "test"} <= named
    assert named <= targets


def test_readme_names_only_commands_that_exist():
    usage = subprocess.run(
        [sys.executable, "-m", "tempolora.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    missing = {c for c in readme_commands("tempolora") if not re.search(rf"\b{c}\b", usage)}
    assert usage and not missing


def test_continuous_integration_runs_make_test():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
