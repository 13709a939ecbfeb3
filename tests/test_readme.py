"""The README is true: its settings are the program's, its files are there, its code parses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from conftest import held_by_git
from pydantic import BaseModel

from tempolora.config import Config, load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
GUIDES = sorted(ROOT.glob("docs/*.md"))


def section(title: str) -> str:
    """What stands under a heading of the second level."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# --- Settings -------------------------------------------------------------------------------------


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, default, type) of every setting, sections opened up."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field.default, kind


def choices(kind: Any) -> list[Any]:
    """The values that a type's Literals allow."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in choices(part)]


def table() -> dict[str, tuple[str, str]]:
    """key -> (default, meaning), as the README's table of all keys has them."""
    rows = re.findall(r"^\| `(\w+(?:\.\w+)+)` \| `(.*?)` \| (.*) \|$", section("Settings"), re.M)
    assert len({key for key, _, _ in rows}) == len(rows), "a key stands there twice"
    return {key: (default, meaning) for key, default, meaning in rows}


def test_every_key_is_in_the_table_with_its_true_default_and_no_other_key_is():
    expected = {key: json.dumps(default) for key, default, _ in settings()}
    assert {key: default for key, (default, _) in table().items()} == expected


def test_every_allowed_word_of_a_key_is_in_its_row():
    missing = [
        f"{key}: {choice}"
        for key, _, kind in settings()
        for choice in choices(kind)
        if not re.search(rf"\b{choice}\b", " ".join(table()[key]))
    ]
    assert not missing


def test_the_missions_names_have_their_values_in_the_shipped_config():
    cfg = load_config(ROOT / "configs" / "a14b.json").model_dump(mode="json")
    rows = re.findall(r"^\| ([A-Z_, ]+) \| (.*?) \| (.*) \|$", section("Settings"), re.M)
    names = ", ".join(names for names, _, _ in rows).split(", ")
    assert names == [
        *("MODEL_ID", "NUM_FRAMES", "HEIGHT", "WIDTH", "LORA_RANK"),
        *("SPEC_CUTOFF_HZ", "SPEC_WEIGHT", "TV_WEIGHT", "MAX_STEPS"),
    ]
    for _, values, ours in rows:
        at_present = re.search(r"at present ([\d.]+)", ours)
        given = [at_present[1]] if at_present else values.replace("`", "").split(", ")
        for key, value in zip(re.findall(r"`(.*?)`", ours), given, strict=True):
            part, _, name = key.partition(".")
            assert str(cfg[part][name]) == value, key


def test_every_dotted_key_that_is_named_exists():
    known = {key for key, _, _ in settings()}
    sections = "|".join(Config.model_fields)
    named = set()
    for text in (README, *(path.read_text("utf-8") for path in GUIDES)):
        code = re.findall(r"`([^`\n]+)`", text) + code_blocks(text, "sh")
        named |= set(re.findall(rf"(?:^|(?<=--set ))({sections})\.([\w.]+)", "\n".join(code), re.M))
    named = {f"{part}.{name}" for part, name in named if name != "safetensors"}  # a shard member
    assert named and named <= known


# --- Files ----------------------------------------------------------------------------------------


def tree() -> list[str]:
    """The paths of the file tree, folders with a slash at their end; each line says what it is."""
    paths, folders = [], []
    for line in code_blocks(section("Files"), "text")[0].splitlines():
        indent, name, meaning = re.fullmatch(r"( *)(\S+)  +(\S.*)", line).groups()
        assert meaning and len(indent) % 2 == 0
        folders = folders[: len(indent) // 2]
        assert len(folders) == len(indent) // 2, f"{name} hangs in the air"
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_everything_in_the_file_tree_exists():
    assert not [
        path
        for path in tree()
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]


def test_every_file_is_in_the_file_tree():
    """Of tests/ the folder stands for its files; an __init__.py says nothing that its folder's
    line does not."""
    listed = set(tree())
    missing = [
        path
        for path in held_by_git()
        if path not in listed
        and not path.startswith("tests/")
        and not path.endswith("/__init__.py")
    ]
    assert not missing


def test_links_lead_to_files():
    for page in (ROOT / "README.md", *GUIDES):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
    anchors = {f"#{title.lower()}" for title in re.findall(r"^#+ (\w+)$", README, re.M)}
    assert set(re.findall(r"\]\((#[^)]+)\)", README)) <= anchors


def test_scripts_and_configs_named_in_commands_exist():
    for page in (ROOT / "README.md", *GUIDES):
        named = re.findall(r"\b(?:launch|configs|slurm)/\w+\.\w+", page.read_text("utf-8"))
        assert not [path for path in named if not (ROOT / path).is_file()]


# --- Code -----------------------------------------------------------------------------------------


def test_python_blocks_are_python():
    pages = [README, *(path.read_text("utf-8") for path in GUIDES)]
    blocks = [block for page in pages for block in code_blocks(page, "python")]
    assert len(blocks) >= 3
    for block in blocks:
        compile(re.sub(r"^[%!].*$", "", block, flags=re.M), "<README>", "exec")


def test_json_blocks_are_configurations(tmp_path):
    for block in code_blocks(README, "json"):
        (tmp_path / "config.json").write_text(block, "utf-8")
        load_config(tmp_path / "config.json")


def test_the_notebook_cell_stands_on_settings_that_load():
    cell = code_blocks(section("Notebook"), "python")[0]
    names = dict(re.findall(r"^(\w+) = (.*?)(?:  # .*)?$", cell, re.M))
    overrides = json.loads(names["SETTINGS"])
    cfg = load_config(ROOT / json.loads(names["CONFIG"]), overrides)
    assert cfg.model.id == "tinywan" and cfg.output.dir != load_config(None).output.dir


def test_the_error_that_is_quoted_is_the_error(tmp_path, monkeypatch, capsys):
    from tempolora.cli import main

    quoted = code_blocks(section("Errors"), "text")[0]
    command, answer = quoted.strip().removeprefix("$ tempolora ").split("\n")
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 2
    assert capsys.readouterr().err.strip() == answer
