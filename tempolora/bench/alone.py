"""A measurement in processes of its own, so that caps, peaks and caches are its own."""

import json
import subprocess
from typing import Any

TIMEOUT_S = 900


def figures_of(command: list[str]) -> dict[str, Any]:
    """The JSON that a command prints last, or {"error": what it says}."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {TIMEOUT_S} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1])
    # of several processes the launcher has the last word; the first error says more
    errors = [line.strip() for line in lines if "Error" in line] or lines[-1:]
    return {"error": errors[0] if errors else f"exit status {done.returncode}"}
