"""The planner against measurements, and its constants fitted to them anew.

    python -m tempolora.bench plan --measured FILE.json [--config configs/a14b.json] [--fit]

FILE holds a list of rows: `{"name": ..., "config": "configs/a14b.json", "overrides":
["train.compile=true"], "frames": 49, "height": 576, "width": 1024, "gpus": 1, "peak_gib": 45.6,
"seconds": 9.44, "fit": false}`; config, gpus, fit and either of the measurements may be left out.
Each row's configuration must say what was run: nothing in it may be left at `auto` but the engine.
`--fit` moves the fitted constants of tempolora/train/rates.py by least squares of the relative
errors of the rows marked `fit`, prints them, and judges the others by them. Without a file the
points that the shipped constants come from are taken.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tempolora.config import Config, ConfigError, load_config
from tempolora.train.plan import AUTO_KEYS, Settings, key_of, predict
from tempolora.train.rates import CONSTANTS, GIB, VALUES

KNOWN = Path(__file__).with_name("plan_points.json")
KEYS = {"name", "config", "overrides", "frames", "height", "width", "gpus", "fit"}
MEASURED = {"peak_gib", "seconds"}
ROUNDS = 4  # streaming makes seconds a maximum of two: linear only piece by piece
HOLD = 1e-3  # how much a constant is held to what it was, so that unmeasured ones stay


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench plan", description=__doc__)
    parser.add_argument("--measured", type=Path, default=KNOWN, help="JSON file of rows")
    parser.add_argument("--config", type=Path, default=Path("configs/a14b.json"))
    parser.add_argument("--fit", action="store_true", help="fit the constants to rows marked fit")
    parser.add_argument("--json", type=Path, help="write the comparison for machines")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.measured, options.config)
        values = fitted(rows) if options.fit else VALUES
    except ConfigError as error:
        parser.error(str(error))
    if options.fit:
        print("constant | was | fitted | unit")
        for name, constant in CONSTANTS.items():
            if constant.fitted:
                print(f"{name} | {constant.value:g} | {values[name]:.4g} | {constant.unit}")
    compared = [compare(row, values) for row in rows]
    print("setting | GiB predicted, measured, error | s/step predicted, measured, error | fitted")
    for line in compared:
        print(
            f"{line['name']} | {_cell(line, 'peak_gib', 1)} | {_cell(line, 'seconds', 2)} | "
            f"{'yes' if line['fit'] else ''}"
        )
    for fit, words in ((False, "not used for fitting"), (True, "used for fitting")):
        errors = [
            abs(c["peak_gib"]["error"]) for c in compared if c["fit"] is fit and c["peak_gib"]
        ]
        if errors:
            within = sum(error <= 0.1 for error in errors)
            print(
                f"peak, {len(errors)} settings {words}: {within} within 10 %, "
                f"largest error {max(errors):.1%}"
            )
    if options.json:
        options.json.write_text(json.dumps(compared, indent=1) + "\n", "utf-8")


def read_rows(path: Path, config: Path) -> list[dict[str, Any]]:
    """The measured rows with their configuration under "cfg".

    Raises ConfigError for a row that cannot be understood.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--measured: cannot read {path}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--measured: {path} must hold a list of rows")
    for number, row in enumerate(rows, 1):
        where = f"--measured: {path}: row {number}"
        if unknown := sorted(set(row) - KEYS - MEASURED):
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}")
        if not MEASURED & set(row):
            raise ConfigError(f"{where}: neither peak_gib nor seconds is there")
        sizes = {"num_frames": "frames", "height": "height", "width": "width"}
        overrides = [f"data.{key}={row[name]}" for key, name in sizes.items() if name in row]
        overrides += row.get("overrides", [])
        row["cfg"] = cfg = load_config(Path(row.get("config", config)), overrides)
        if left := [key for key in AUTO_KEYS if key_of(cfg, key) == "auto"]:
            raise ConfigError(f"{where}: {left[0]} is auto; say what was run")
        if cfg.train.checkpointing == "selective" and cfg.train.kept_blocks is None:
            raise ConfigError(f"{where}: train.kept_blocks is chosen by itself; say what it was")
        row.setdefault("name", " ".join(row.get("overrides", [])) or str(number))
    return rows


def _predicted(row: dict[str, Any], values: Mapping[str, float]) -> dict[str, float]:
    cfg: Config = row["cfg"]
    gpus, engine = row.get("gpus", 1), cfg.parallel.engine
    if engine == "auto":
        engine = "plain" if gpus == 1 else "ddp"
    train = cfg.train
    blocks = (train.kept_blocks or 0, train.host_blocks)
    settings = Settings(engine, cfg.model.base, cfg.model.placement, train.checkpointing, *blocks)
    plan = predict(cfg, settings, gpus, values=values)
    return {"peak_gib": plan.peak / GIB, "seconds": plan.seconds}


def compare(row: dict[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Predicted, measured and the relative error of each measurement of a row."""
    predicted = _predicted(row, values)
    line: dict[str, Any] = {"name": row["name"], "fit": bool(row.get("fit", False))}
    for key in ("peak_gib", "seconds"):
        line[key] = None
        if row.get(key) is not None:
            error = predicted[key] / row[key] - 1
            line[key] = {"predicted": predicted[key], "measured": row[key], "error": error}
    return line


def fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The constants of least squared relative error over rows marked `fit`; those that no such row
    depends on stay as they are."""
    marked = [row for row in rows if row.get("fit")]
    if not marked:
        raise ConfigError("--fit: no row is marked fit: true")
    names = [name for name, constant in CONSTANTS.items() if constant.fitted]
    values = dict(VALUES)

    def errors(at: Mapping[str, float]) -> np.ndarray:
        lines = [compare(row, at) for row in marked]
        return np.array([line[key]["error"] for line in lines for key in MEASURED if line[key]])

    for _ in range(ROUNDS):
        now = errors(values)
        steps = [0.01 * VALUES[name] for name in names]
        slopes = np.stack(
            [
                (errors(values | {name: values[name] + step}) - now) / step
                for name, step in zip(names, steps, strict=True)
            ],
            axis=1,
        )
        scale = np.array([VALUES[name] for name in names])
        held = HOLD * np.eye(len(names))
        moved = [(VALUES[name] - values[name]) / VALUES[name] * HOLD for name in names]
        change, *_ = np.linalg.lstsq(
            np.vstack([slopes * scale, held]), np.concatenate([-now, moved]), rcond=None
        )
        for name, by in zip(names, change * scale, strict=True):
            values[name] += float(by)
    return values


def _cell(line: dict[str, Any], key: str, digits: int) -> str:
    found = line[key]
    if found is None:
        return ""
    return f"{found['predicted']:.{digits}f}, {found['measured']:.{digits}f}, {found['error']:+.1%}"
