"""The records of a folder as the results of docs/evidence.md: claims, a summary, figures, gifs.

What stands outside of the two marks, the thresholds above all, is never touched. All figures of all
arms go to docs/evidence_tables.md.
"""

from pathlib import Path
from typing import Any

from tempolora.config import ConfigError
from tempolora.files import replacing
from tempolora.study import compare
from tempolora.study.arms import BASE, DATA, PRIMARY, REST, arm
from tempolora.study.compare import REFERENCE, Runs, cell
from tempolora.study.experiment import read_records, record_path
from tempolora.study.knob_page import draw_knob, knob_section
from tempolora.study.pictures import draw_scatter, draw_spectra, write_gif
from tempolora.study.sound_page import sound_section

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
CONFIRMATION = (10, 11, 12)  # seeds; all others are for development
EXCESS = {
    "jitter_log2": "above 6 Hz",
    "face_jitter_log2": "faces",
    "texture_jitter_log2": "textures",
    "comb_log2": "comb",
    "band_log2": "0.5 to 6 Hz",
    "amplitude_log2": "amplitude",
}
MOVING = {
    "flicker": "flicker, levels",
    "visible_flicker": "visible flicker, %",
    "tempo_error": "tempo error, octaves",
    "speed_log2": "speed, log2 px/s (walk, pan)",
    "jerk_log2": "jerk, log2 px/s³ (walk, pan)",
    "track_jitter_log2": "track above 6 Hz, log2 px (walk, pan)",
    "tracked": "tracked, share",
    "warping_error": "warping error, levels",
}
LOOKING = {
    "colour_error": "colour error, dE",
    "area_error": "area error, log2",
    "shape_error": "shape error",
    "drift_colour": "drift of colour, dE",
    "drift_shape": "drift of shape",
    "drift_picture": "drift of the mean picture, levels",
    "still_drift": "single-frame drift, levels",
    "still_colour": "single-frame colour, dE",
}
SUMMARY = {
    "jitter_log2": "above 6 Hz, log2 over clean",
    "amplitude_log2": "amplitude, log2 over clean",
    "tempo_error": "tempo error, octaves",
    "shape_error": "shape error",
    "drift_colour": "drift of colour, dE",
    "still_drift": "single-frame drift, levels",
}
TABLES = "evidence_tables.md"
ABOUT_TABLES = """What the columns are: [evidence.md](evidence.md#what-is-measured). Written by
`python -m tempolora.study page`."""
OF_WALK_AND_PAN = {"speed_log2", "jerk_log2", "track_jitter_log2"}


def write_page(out: Path, docs: Path, plain: str, ours: str) -> Path:
    """Fill the marked part of docs/evidence.md; the file. Tables, figures and gifs go beside it.

    Raises ConfigError where there are no records, or no page with marks.
    """
    records = list(read_records(out))
    if not records:
        raise ConfigError(f"--out: {out} holds no record; run the study first")
    page = docs / "evidence.md"
    head, tail = _around_marks(page)
    chosen = {
        "Development": [r for r in records if r["seed"] not in CONFIRMATION],
        "Confirmation": [r for r in records if r["seed"] in CONFIRMATION],
    }
    parts, tables = [], [f"# All figures of the study\n\n{ABOUT_TABLES}\n"]
    for title, some in chosen.items():
        if not some:
            parts.append(f"### {title} seeds\n\nNot run.\n")
            continue
        runs = compare.by_arm(some)
        parts.append(_section(title, runs, plain, ours))
        tables.append(_tables(title, runs, plain))
    shown = compare.by_arm(chosen["Confirmation"] or chosen["Development"])
    draw_spectra(shown, [*DATA, BASE, plain, ours], docs / "evidence_spectra.png")
    draw_scatter(shown, docs / "evidence_scatter.png")
    if ours not in shown:
        raise ConfigError(f"--ours: {out} holds no record of {ours!r}; run it, or name another arm")
    model, seed = min(shown[ours])
    names = {"baseline": BASE, "plain_lora": plain, "tempolora": ours}
    for name, of in names.items():
        clips = record_path(out, model, arm(of), seed, ".clips.safetensors")
        write_gif(clips, docs / f"{name}.gif")
    parts.append(_pictures(names, seed))
    parts += ["\n".join(section(out)) for section in (knob_section, sound_section)]
    draw_knob(out, docs)
    results = "\n".join(parts)
    with replacing(docs / TABLES) as temporary:
        temporary.write_text("\n".join(tables), "utf-8")
    with replacing(page) as temporary:
        temporary.write_text(f"{head}{BEGIN}\n\n{results}\n{END}{tail}", "utf-8")
    return page


def _around_marks(page: Path) -> tuple[str, str]:
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--docs: cannot read {page}: {error.strerror}") from None
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"--docs: {page} lacks the marks {BEGIN} and {END}")
    return head, tail


def _section(title: str, runs: Runs, plain: str, ours: str) -> str:
    lines = [f"### {title} seeds", "", *_about(runs), ""]
    lines += [*_claims(runs, plain, ours), "", *_summary(runs, _order(runs)), ""]
    return "\n".join(lines)


def _tables(title: str, runs: Runs, plain: str) -> str:
    order = _order(runs)
    lines = [f"## {title} seeds", "", *_about(runs), ""]
    lines += ["### Arms", "", *_sizes(runs, order), ""]
    excess = f"### Power, log2 over clean data through the VAE (`{REFERENCE}`)"
    lines += [excess, "", *_table(runs, order, EXCESS, REFERENCE), ""]
    lines += ["### Motion and flicker", "", *_table(runs, order, MOVING), ""]
    lines += ["### Looks", "", *_table(runs, order, LOOKING), ""]
    for other in (BASE, plain):
        lines += [f"### Less `{other}` of the same captions and noise", ""]
        for columns in (EXCESS, MOVING, LOOKING):
            kept = {k: v for k, v in columns.items() if k not in ("warping_error",)}
            lines += [*_table(runs, [n for n in order if n != other], kept, other), ""]
    lines += ["### Strength of the adapter and tempo", "", *_knobs(runs, order), ""]
    return "\n".join(lines)


def _order(runs: Runs) -> list[str]:
    known = [*PRIMARY, *REST]
    return [n for n in known if n in runs] + sorted(name for name in runs if name not in known)


def _summary(runs: Runs, order: list[str]) -> list[str]:
    lines = [
        f"| arm | seeds | {' | '.join(SUMMARY.values())} |",
        "| --- |" + " --- |" * (len(SUMMARY) + 1),
    ]
    for name in order:
        cells = []
        for metric in SUMMARY:
            less = {REFERENCE: -1.0} if metric in EXCESS and name != REFERENCE else {}
            own = metric in EXCESS and name == REFERENCE
            cells.append("0" if own else cell(compare.combine(runs, {name: 1.0} | less, metric)))
        lines.append(f"| `{name}` | {len(runs[name])} | {' | '.join(cells)} |")
    return lines


def _about(runs: Runs) -> list[str]:
    records = [record for seeds in runs.values() for record in seeds.values()]
    models = sorted({Path(record["config"]["model"]["id"]).name for record in records})
    seeds = sorted({record["seed"] for record in records})
    samples = sorted({record["config"]["study"]["samples"] for record in records})
    return [
        f"Model {', '.join(models)}; seeds {', '.join(map(str, seeds))}; "
        f"{', '.join(map(str, samples))} samples for each arm and seed. Mean and 95 % interval."
    ]


def _claims(runs: Runs, plain: str, ours: str) -> list[str]:
    lines = [f"Plain is `{plain}`, ours `{ours}`.", ""]
    lines += ["| claim | condition | figure | verdict |", "| --- | --- | --- | --- |"]
    for found in compare.findings(runs, plain, ours):
        lines.append(
            f"| {found.claim} | {found.condition} | {cell(found.figure)} | {found.verdict} |"
        )
    return lines


def _sizes(runs: Runs, order: list[str]) -> list[str]:
    lines = ["| arm | seeds | rank | parameters, high + low | last flow loss, high, low |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name in order:
        record: dict[str, Any] = next(iter(runs[name].values()))
        counts = " + ".join(f"{n:,}" for n in record.get("parameters", {}).values())
        flow = ", ".join(f"{value:.4f}" for value in record.get("flow", {}).values())
        lines.append(
            f"| `{name}` | {len(runs[name])} | {record.get('rank', '')} | {counts} | {flow} |"
        )
    return lines


def _table(
    runs: Runs, order: list[str], columns: dict[str, str], less: str | None = None
) -> list[str]:
    """Means of metrics, `less` those of another arm on the same samples."""
    lines = [
        "| arm | " + " | ".join(columns.values()) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in order:
        weights = {name: 1.0} if less is None else {name: 1.0, less: -1.0}
        if name == less:
            continue
        cells = [
            cell(
                compare.combine(
                    runs,
                    weights,
                    metric,
                    compare.STRIDE_KINDS if metric in OF_WALK_AND_PAN else (),
                )
            )
            for metric in columns
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _knobs(runs: Runs, order: list[str]) -> list[str]:
    lines = ["| arm | slope of log2 Hz over strength | of each seed |", "| --- | --- | --- |"]
    for name in order:
        values_SN = compare.slopes(runs, name)
        if values_SN is not None:
            each = ", ".join(f"{mean:+.3f}" for mean in values_SN.mean(axis=1))
            lines.append(f"| `{name}` | {cell(compare.figure(values_SN))} | {each} |")
    return lines


def _pictures(names: dict[str, str], seed: int) -> str:
    gifs = [f"![{name}]({name}.gif)" for name in names]
    return "\n".join(
        [
            "### Pictures",
            "",
            "![Spectra before and after](evidence_spectra.png)",
            "",
            "![Flicker against motion](evidence_scatter.png)",
            "",
            "The same six captions and the same noise, seed "
            f"{seed}: {', '.join(f'{key} (`{of}`)' for key, of in names.items())}.",
            "",
            "| " + " | ".join(names) + " |",
            "|" + " --- |" * len(names),
            "| " + " | ".join(gifs) + " |",
            "",
        ]
    )
