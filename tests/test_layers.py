"""The house: imports go down only, and nothing from disk is ever executed."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tempolora"
MODULES = sorted(PACKAGE.rglob("*.py"))

BASE = {"config", "files", "launched", "progress", "timebase", "variants", ""}
MAY_IMPORT = {
    "rhythm": BASE - {"config", "files", "launched", "progress"} | {"rhythm"},
    "data": BASE | {"rhythm", "data"},
    "model": BASE | {"model"},
    "train": BASE | {"rhythm", "data", "model", "train"},
    "results": BASE | {"rhythm", "model", "data", "results"},
}


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else path.stem
    known = {p.name for p in PACKAGE.iterdir() if p.is_dir()} | {
        p.stem for p in PACKAGE.glob("*.py")
    }
    used = {room(name) for name in imports(path) if name.split(".")[0] == "tempolora"} & known
    if here in MAY_IMPORT:
        assert used <= MAY_IMPORT[here]
    elif here in BASE:
        assert used <= {"config", "timebase", "variants"}
    assert "cli" not in used - {here}


def test_only_the_writer_of_shards_meets_both_video_and_tensors():
    """Nothing that decodes video meets anything that trains: shards are all they share."""
    for path in (PACKAGE / "train").glob("*.py"):
        decoding = {
            "clips",
            "decode",
            "resample",
            "audio",
            "toy_set",
            "video",
            "precompute",
            "fit_readout",
        }
        used = {name.split(".")[2] for name in imports(path) if name.startswith("tempolora.data.")}
        assert not used & decoding, path


def test_only_wan_py_imports_diffusers_wan():
    for path in MODULES:
        names = {name for name in imports(path) if name and name.startswith("diffusers")}
        if path.name != "wan.py":
            assert not any("wan" in name.lower() or "Autoencoder" in name for name in names), path


def test_rhythm_knows_no_model_and_no_file_format():
    allowed = {
        "torch",
        "math",
        "numpy",
        "scipy",
        "tempolora",
        "einops",
        "dataclasses",
        "collections",
    }
    allowed |= {"triton", "matplotlib"}  # kernels, and figures that the caller saves
    for path in (PACKAGE / "rhythm").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_nothing_unpickles_evaluates_or_trusts_remote_code():
    for path in MODULES:
        assert not {"pickle", "marshal", "shelve", "dill"} & {
            n.split(".")[0] for n in imports(path)
        }
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in {"eval", "exec", "os.system"}, path
            assert keywords.get("trust_remote_code", "False") == "False", path
            assert keywords.get("shell", "False") == "False", path
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            if name in {"np.load", "numpy.load"}:
                assert keywords.get("allow_pickle") == "False", path


def test_every_module_says_its_idea():
    assert sys.version_info >= (3, 11)
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path
