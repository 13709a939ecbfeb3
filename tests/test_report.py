"""The report: everything a run left behind is in one page, and what is missing is said."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tempolora.config import Config, ConfigError
from tempolora.data.video import write_mp4
from tempolora.results.charts import tick_labels
from tempolora.results.names import lora_file_name, video_file_name
from tempolora.results.report import write_report

FPS, FRAMES, HEIGHT, WIDTH = 16, 17, 48, 64


def write_run(folder: Path, steps: int = 40, experts: tuple[str, ...] = ("high", "low")) -> Path:
    """An output folder as training leaves it, videos and LoRA files left out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config().model_dump(mode="json")
    config["output"]["prompts"] = ['a <b>bell</b> & "rope"']
    (folder / "config.json").write_text(json.dumps(config))
    lines = [metrics_line(expert, step, step) for expert in experts for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def metrics_line(expert: str, step: int, loss: float) -> str:
    return (
        json.dumps(
            {
                "expert": expert,
                "step": step,
                "loss": loss,
                "flow": loss * 0.9,
                "spectral": loss * 0.1,
                "tv": loss * 0.01,
                "grad_norm": 1.0,
                "lr": 1e-4,
                "sigma": 0.5,
                "seconds": 0.25,
                "samples_per_s": 4.0,
            }
        )
        + "\n"
    )


def write_video(path: Path, moving_row: int) -> None:
    """A grey clip in which one band of rows alone has something moving in it."""
    frames = np.full((FRAMES, HEIGHT, WIDTH, 3), 90, np.uint8)
    for f in range(FRAMES):
        frames[f, moving_row - 4 : moving_row + 4, 3 * f : 3 * f + 8] = (250, 60, 40)
    write_mp4(path, frames, FPS)


def write_lora(path: Path, rank: int = 4) -> None:
    tensors = {}
    for block in range(3):
        name = f"diffusion_model.blocks.{block}.self_attn.q"
        tensors[f"{name}.lora_A.weight"] = np.zeros((rank, 32), np.float32)
        tensors[f"{name}.lora_B.weight"] = np.zeros((32, rank), np.float32)
    save_file(tensors, path, metadata={"expert": "high", "note": "<script>alert(1)</script>"})


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every element is closed in order."""

    VOID = frozenset({"meta", "img", "br", "line", "polyline"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


SIGMAS = {  # the middles of nine equal parts of each expert's time, as training names them
    "high": (0.890, 0.915, 0.935, 0.950, 0.963, 0.974, 0.983, 0.990, 0.997),
    "low": (0.200, 0.443, 0.572, 0.667, 0.726, 0.776, 0.813, 0.841, 0.863),
    "single": (0.227, 0.500, 0.658, 0.761, 0.833, 0.888, 0.929, 0.962, 0.988),
}


def write_watched_run(
    folder: Path, experts: tuple[str, ...] = ("high", "low"), steps: int = 40
) -> Path:
    """A run that says of itself what training says now; its loss is its step."""
    write_run(folder, steps=0)
    lines = []
    for expert in experts:
        lines.append({"expert": expert, "step": 0} | held_out(expert, 0))
        for step in range(1, steps + 1):
            line = json.loads(metrics_line(expert, step, step))
            line["grad_share"] = {"spectral": 0.1, "tv": 0.02}
            line["motion"] = 0.75 if step % 2 else 1.25
            line["flow_by_sigma"] = {f"{SIGMAS[expert][step % 9]:.3f}": step * 0.1}
            if step in (20, steps):
                line |= held_out(expert, step)
            lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def held_out(expert: str, step: int) -> dict:
    """Losses that fall with the step, but at the last sigma rise."""
    losses = [(9 - place) * (1 - step / 400) for place in range(8)] + [1 + step / 400]
    by_sigma = {f"{s:.3f}": loss for s, loss in zip(SIGMAS[expert], losses, strict=True)}
    return {"held_out": sum(losses) / 9, "held_out_by_sigma": by_sigma}


def edit_config(folder: Path, section: str, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[section] |= values
    (folder / "config.json").write_text(json.dumps(config))


def figure_of(folder: Path, title: str) -> str:
    """The HTML of the figure with this title."""
    figures = write_report(folder).read_text(encoding="utf-8").split('<figure class="card chart">')
    figure = next(html for html in figures if html.startswith(f"<h3>{title}</h3>"))
    return figure.split("</figure>")[0]


def drawn_lines(figure: str, kind: str) -> list[np.ndarray]:
    """The heights of each line, in the numbers that the labels beside the axis give them."""
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', figure)
    heights, values = np.array(labels, float).T
    slope, start = np.polyfit(heights - 4, values, 1)  # text stands 4 below its line
    lines = re.findall(rf'class="{kind} [^"]*" points="([^"]+)"', figure)
    return [start + slope * np.array([p.split(",") for p in t.split()], float)[:, 1] for t in lines]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def row_of(page_html: str, first_cell: str) -> list[str]:
    """The cells of the table row that begins with `first_cell`."""
    row = re.search(rf"<tr><td>{re.escape(first_cell)}</td>.*?</tr>", page_html)[0]
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run") / "out")
    write_video(folder / "sample_before_lora.mp4", moving_row=12)
    write_video(folder / "sample_after_lora.mp4", moving_row=12)
    for expert in ("high", "low"):
        write_lora(folder / lora_file_name(expert))
    return folder


def test_page_refers_to_the_two_videos_and_to_nothing_else_outside_itself(full_run):
    page = page_of(full_run)
    sources = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    outside = [source for source in sources if not source.startswith("data:")]
    assert outside == ["sample_before_lora.mp4", "sample_after_lora.mp4"]
    html = (full_run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(", html)
    assert [path.name for path in full_run.glob(".*")] == []


def test_videos_play_muted_and_looped(full_run):
    for attrs in page_of(full_run).all("video"):
        assert {"muted", "loop", "autoplay", "playsinline"} <= attrs.keys()


def test_time_slice_shows_the_row_that_moves(full_run):
    html = write_report(full_run).read_text(encoding="utf-8")
    source = re.search(r'class="slice" src="data:image/png;base64,([^"]+)"', html)[1]
    slice_FW3 = np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))).astype(int)
    assert slice_FW3.shape == (FRAMES, WIDTH, 3)
    red = (slice_FW3[..., 0] - slice_FW3[..., 2]) > 80
    centres = np.array([np.flatnonzero(line).mean() for line in red])
    # drawn 8 wide at x = 3 f: chroma is stored at half width, so 2 pixels of slack
    np.testing.assert_allclose(centres, 3 * np.arange(FRAMES) + 3.5, atol=2)


def test_user_text_is_escaped(full_run):
    html = write_report(full_run).read_text(encoding="utf-8")
    assert "<b>bell</b>" not in html and "alert(1)</script>" not in html
    assert 'a <b>bell</b> & "rope"' in Page(html).text


def test_final_losses_are_means_of_the_last_tenth(full_run):
    html = write_report(full_run).read_text(encoding="utf-8")
    # 40 steps whose loss is their number: the last four are 37, 38, 39, 40
    cells = row_of(html, "high-noise")
    assert cells[1:3] == ["40 of 800", "38.5"]
    assert cells[6] == "4"  # 0.25 s a step


def test_lora_table_gives_rank_and_layers(full_run):
    html = write_report(full_run).read_text(encoding="utf-8")
    for expert in ("high", "low"):
        name = lora_file_name(expert)
        assert row_of(html, f"<code>{name}</code>")[2:] == ["4", "3"]
        size = (full_run / name).stat().st_size
        assert row_of(html, f"<code>{name}</code>")[1] == f"{size / 1024:.4g} KiB"


def test_a_tempo_run_shows_its_own_files_and_what_their_strength_means(tmp_path):
    folder = write_run(tmp_path / "out", experts=("high",))
    config = json.loads((folder / "config.json").read_text())
    config["lora"]["kind"] = "tempo"
    (folder / "config.json").write_text(json.dumps(config))
    write_lora(folder / "wan22_tempo_lora_high_noise.safetensors")
    for when in ("before", "after"):
        write_video(folder / f"sample_{when}_lora.mp4", moving_row=12)
    html = write_report(folder).read_text(encoding="utf-8")
    assert "not there yet" not in html and "none yet" not in html
    assert "<code>wan22_tempo_lora_high_noise.safetensors</code>" in html
    assert "asked for twice the speed" in html


def test_every_expert_and_term_has_its_curve(full_run):
    page = page_of(full_run)
    charts = [attrs["aria-label"] for attrs in page.all("svg") if "aria-label" in attrs]
    for term in ("loss", "flow", "spectral", "tv", "grad_norm", "lr"):
        assert f"{term} over optimizer steps" in charts
    assert len(page.all("polyline")) == len(charts) * 2 * 2  # raw and smooth, high and low


def test_a_step_written_twice_counts_once_with_its_later_line(tmp_path):
    folder = write_run(tmp_path / "out", steps=20, experts=("single",))
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(metrics_line("single", step, 1000 + step) for step in (19, 20, 21))
    html = write_report(folder).read_text(encoding="utf-8")
    assert row_of(html, "transformer")[1:3] == ["21 of 800", "1020"]  # last tenth: 20 and 21
    assert "2 logged steps stand twice" in html


def test_step_0_is_measured_before_training_and_no_step_of_it(tmp_path):
    folder = write_watched_run(tmp_path / "out", experts=("single",))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"expert": "single", "step": 0} | held_out("single", 0)) + "\n")
    html = write_report(folder).read_text(encoding="utf-8")
    assert row_of(html, "transformer")[1:3] == ["40 of 800", "38.5"]
    assert "stand twice" not in html
    assert [len(line) for line in drawn_lines(figure_of(folder, "Loss"), "raw")] == [40]


def test_an_expert_that_was_only_measured_has_done_no_step(tmp_path):
    folder = write_watched_run(tmp_path / "out", experts=("high",))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"expert": "low", "step": 0} | held_out("low", 0)) + "\n")
    cells = row_of(write_report(folder).read_text(encoding="utf-8"), "low-noise")
    # loss, flow, spectral and smoothness terms; held-out before and after; steps/s
    assert cells[1:] == ["0 of 800", *["none"] * 4, "5", "none", "not logged", "none yet"]


def test_summary_gives_the_held_out_loss_before_and_as_last_measured(tmp_path):
    folder = write_watched_run(tmp_path / "out")
    html = write_report(folder).read_text(encoding="utf-8")
    before, after = held_out("high", 0)["held_out"], held_out("high", 40)["held_out"]
    assert row_of(html, "high-noise")[6:8] == [f"{before:.4g}", f"{after:.4g}"]
    assert "Held-out before" in html and "Held-out after" in html


def test_held_out_loss_is_drawn_where_and_as_it_was_measured(tmp_path):
    folder = write_watched_run(tmp_path / "out")
    for title in ("Held-out loss, high-noise", "Held-out loss, low-noise"):
        (line,) = drawn_lines(figure_of(folder, title), "smooth")
        expected = [held_out("high", step)["held_out"] for step in (0, 20, 40)]
        np.testing.assert_allclose(line, expected, atol=0.002)  # drawn to a tenth of 1/200 of it


@pytest.mark.parametrize(("change", "least", "most"), [(0.1, 80, 158), (0.001, 1, 8)])
def test_held_out_axis_shows_a_tenth_and_does_not_blow_up_a_thousandth(
    tmp_path, change, least, most
):
    folder = write_watched_run(tmp_path / "out", steps=1, experts=("single",))
    path = folder / "metrics.jsonl"
    before, after = path.read_text().splitlines()
    lines = [
        json.loads(before) | {"held_out": 4.0},
        json.loads(after) | {"held_out": 4 - 4 * change},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = figure_of(folder, "Held-out loss")
    points = re.search(r'class="smooth line-0" points="([^"]+)"', figure)[1]
    first, last = (float(point.split(",")[1]) for point in points.split())
    assert least <= last - first <= most  # of the plot's 158 units
    assert "The axis need not begin at 0." in figure


@pytest.mark.parametrize("experts", [("single",), ("high", "low")])
def test_held_out_by_sigma_shows_the_last_measurement_against_the_first(tmp_path, experts):
    folder = write_watched_run(tmp_path / "out", experts=experts)
    figure = figure_of(folder, "Held-out loss by sigma")
    lines = drawn_lines(figure, "smooth")
    assert len(lines) == 2 * len(experts)
    for index, expert in enumerate(experts):
        for line, step in zip(lines[2 * index :], (40, 0), strict=False):
            expected = list(held_out(expert, step)["held_out_by_sigma"].values())
            np.testing.assert_allclose(line, expected, atol=0.01)
    assert re.findall(r'class="smooth line-0( dash-1)?"', figure) == ["", " dash-1"]
    assert re.search(r"dash-0.*?as last measured.*?dash-1.*?before training", figure)
    assert figure.count("at step 40: lower at 8 of 9 sigmas; change -10 to +10 %") == len(experts)


def test_sigmas_of_two_experts_stand_apart_and_in_order(tmp_path):
    figure = figure_of(write_watched_run(tmp_path / "out"), "Held-out loss by sigma")
    places = {}
    for colour, dots in re.findall(r'class="dots line-(\d)" d="([^"]+)"', figure):
        places[colour] = [float(x) for x in re.findall(r"M([\d.]+) ", dots)]
    assert len(places["0"]) == len(places["1"]) == 9
    assert max(places["1"]) < min(places["0"])  # the low-noise expert's sigmas lie below
    np.testing.assert_allclose(np.diff(places["1"] + places["0"]), 270 / 18, atol=0.11)
    labels = re.findall(r'text-anchor="middle">(0\.\d{3})<', figure)
    assert labels == sorted(labels) and labels[0] == "0.200" and len(labels) == 6


def test_flow_by_sigma_is_the_mean_of_the_last_quarter(tmp_path):
    figure = figure_of(write_watched_run(tmp_path / "out"), "Flow term by sigma")
    seen = [np.mean([0.1 * s for s in range(31, 41) if s % 9 == place]) for place in range(9)]
    for line in drawn_lines(figure, "smooth"):
        np.testing.assert_allclose(line, seen, atol=0.01)
    assert "last quarter of the steps (high-noise 31 to 40, low-noise 31 to 40)" in figure


def test_gradient_shares_are_one_chart_with_a_labelled_line_a_term(tmp_path):
    figure = figure_of(write_watched_run(tmp_path / "out"), "Gradient shares")
    lines = drawn_lines(figure, "smooth")
    np.testing.assert_allclose([line.mean() for line in lines], [0.1, 0.1, 0.02, 0.02], atol=1e-3)
    styles = re.findall(r'class="smooth (line-\d(?: dash-\d)?)"', figure)
    assert styles == ["line-0", "line-1", "line-0 dash-1", "line-1 dash-1"]
    assert re.search(r"dash-0.*?Spectral term.*?dash-1.*?Smoothness term", figure)


def test_motion_is_drawn_with_a_line_at_1(tmp_path):
    figure = figure_of(write_watched_run(tmp_path / "out"), "Motion")
    level = re.search(r'class="level" x1="56" x2="326" y1="([\d.]+)" y2="\1"', figure)[1]
    tick = re.search(r'y="([\d.]+)" text-anchor="end">1<', figure)[1]
    assert float(tick) - 4 == pytest.approx(float(level))
    np.testing.assert_allclose(drawn_lines(figure, "raw")[0][:2], [0.75, 1.25], atol=0.01)


def test_motion_far_below_1_still_shows_where_1_is(tmp_path):
    folder = write_watched_run(tmp_path / "out", experts=("single",))
    path = folder / "metrics.jsonl"
    path.write_text(re.sub(r'"motion": [\d.]+', '"motion": 0.01', path.read_text()))
    figure = figure_of(folder, "Motion")
    level = float(re.search(r'class="level" x1="56" x2="326" y1="([\d.]+)"', figure)[1])
    assert 8 <= level < 20  # the top of the plot


@pytest.mark.parametrize(
    "title",
    [
        "Held-out loss, low-noise",
        "Held-out loss by sigma",
        "Flow term by sigma",
        "Gradient shares",
        "Motion",
        "Spectral term",
        "Smoothness term",
    ],
)
def test_a_chart_says_what_to_look_for(tmp_path, title):
    figure = figure_of(write_watched_run(tmp_path / "out"), title)
    assert "Look for" in re.search(r"<figcaption>(.*)</figcaption>", figure)[1]


def test_a_run_without_the_new_numbers_claims_nothing_of_them(tmp_path):
    folder = write_run(tmp_path / "out")
    page = page_of(folder)
    for words in ("Gradient shares", "Motion", "by sigma", "Held-out before", "Scaled", "Look for"):
        assert words not in page.text
    assert "sound" not in page.text.split("Configuration")[0]
    assert "held_out is not in metrics.jsonl" in page.text


@pytest.mark.parametrize(
    ("every", "clips", "why"),
    [
        (0, 3, "train.validate_every is 0"),
        (200, 0, "data.held_out is 0"),
        (200, None, "data.held_out is not set, and of few clips none is kept"),
    ],
)
def test_no_held_out_loss_is_said_with_its_reason(tmp_path, every, clips, why):
    folder = write_run(tmp_path / "out")
    edit_config(folder, "train", validate_every=every)
    edit_config(folder, "data", held_out=clips)
    assert f"held_out is not in metrics.jsonl ({why})." in page_of(folder).text


def test_terms_seldom_on_are_drawn_when_logged_and_missed_only_when_on(tmp_path):
    folder = write_watched_run(tmp_path / "out", experts=("single",))
    assert "Rollout term" not in page_of(folder).text
    edit_config(folder, "rhythm", rollout_every=50, sound_weight={"high": 0.0, "low": 0.1})
    text = page_of(folder).text
    assert "rollout is not in metrics.jsonl (rhythm.rollout_every is 50)." in text
    missing = "rhythm.sound_weight is 0.0 (high-noise), 0.1 (low-noise)"
    assert f"sound is not in metrics.jsonl ({missing})." in text
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tv": 0.4,', '"tv": 0.4, "sound": 3, "rollout": 2,'))
    html = write_report(folder).read_text(encoding="utf-8")
    assert row_of(html, "transformer")[6:8] == ["3", "2"]
    assert f"{missing}." in figure_of(folder, "Sound term")
    assert "Look for a fall toward 0" in figure_of(folder, "Rollout term")


def test_the_absolute_form_is_not_described_as_an_error(tmp_path):
    folder = write_watched_run(tmp_path / "out")
    edit_config(folder, "rhythm", spec_form="absolute")
    assert "a video that freezes lowers it too" in figure_of(folder, "Spectral term")
    assert "freezes" not in figure_of(folder, "Smoothness term")


def test_no_videos_is_said_with_its_reason(tmp_path):
    folder = write_run(tmp_path / "out")
    assert "sample_before_lora.mp4 and sample_after_lora.mp4 are not" in page_of(folder).text
    config = json.loads((folder / "config.json").read_text())
    config["output"]["sample_steps"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    page = page_of(folder)
    assert "No videos: output.sample_steps is 0." in page.text
    assert page.all("video") == [] and page.all("button") == []


def test_one_missing_or_broken_video_is_said_beside_the_other(tmp_path):
    folder = write_run(tmp_path / "out")
    write_video(folder / "sample_before_lora.mp4", moving_row=20)
    assert "sample_after_lora.mp4 is not in the folder" in page_of(folder).text
    (folder / "sample_after_lora.mp4").write_bytes(b"not a video")
    page = page_of(folder)
    assert "sample_after_lora.mp4 cannot be read" in page.text
    assert [attrs["src"] for attrs in page.all("video")] == ["sample_before_lora.mp4"]
    (folder / "sample_before_lora.mp4").write_bytes(b"")
    page = page_of(folder)
    assert page.all("video") == [] and page.all("button") == []


def test_missing_lora_file_and_switched_off_term_are_said(tmp_path):
    folder = write_run(tmp_path / "out", experts=("high",))
    config = json.loads((folder / "config.json").read_text())
    config["rhythm"]["spec_weight"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["spectral"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page_of(folder).text
    assert f"{lora_file_name('high')} is not there yet" in text
    assert lora_file_name("low") not in text
    assert "spectral is not in metrics.jsonl (rhythm.spec_weight is 0.0)." in text


def test_an_outlier_is_counted_and_does_not_set_the_axis(tmp_path):
    folder = write_run(tmp_path / "out", steps=0)
    losses = [1.0] * 100
    losses[50] = 1e6
    lines = [metrics_line("single", step, loss) for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert "1 of 100 points lie above" in page_of(folder).text


@pytest.mark.parametrize("values", [[0.0], [0.0] * 5, [-1.0, 1.0], [1e-9, 2e-9], [3.0, None, 4.0]])
def test_any_finite_values_can_be_drawn(tmp_path, values):
    folder = write_run(tmp_path / "out", steps=0)
    lines = [
        json.dumps({"expert": "single", "step": step, "loss": value}) + "\n"
        for step, value in enumerate(values, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    points = " ".join(attrs["points"] for attrs in page_of(folder).all("polyline"))
    assert points and "nan" not in points and "inf" not in points


def test_tick_labels_are_short_and_of_one_form_at_any_size():
    assert tick_labels([0, 0.00025, 0.0005, 0.00075, 0.001]) == [
        "0",
        "2.5e-4",
        "5e-4",
        "7.5e-4",
        "1e-3",
    ]
    assert tick_labels([-0.01, 0.0, 0.01]) == ["-0.01", "0", "0.01"]
    assert tick_labels([0, 500_000, 1_000_000]) == ["0", "5e5", "1e6"]


def test_torn_lines_are_left_out_and_named_wherever_they_stand(tmp_path):
    folder = write_run(tmp_path / "out", steps=4, experts=("single",))
    torn = b'{"expert": "single", "st'
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(torn + b"\n")
        file.write(metrics_line("single", 5, 5).encode())
        file.write(torn + metrics_line("single", 6, 1e6).encode())  # glued to the line after it
        file.write(metrics_line("single", 7, 7).encode())
        file.write(b"\0" * 300 + b"\xff\n")  # what a power cut may leave
        file.write(b'{"expert": ["single"], "step": 8}\n')
        file.write(metrics_line("single", 9, 9).encode())
        file.write(torn)  # the run still writes
    html = write_report(folder).read_text(encoding="utf-8")
    assert "left out: 5 (line 5, 7, 9, 10, 12)." in html
    assert row_of(html, "transformer")[1:3] == ["9 of 800", "9"]
    assert "1e+06" not in html


def test_many_torn_lines_are_counted_and_the_first_named(tmp_path):
    folder = write_run(tmp_path / "out", steps=1, experts=("single",))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("{\n" * 30)
    assert "30 (line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 18 more)" in page_of(folder).text


def test_every_prompt_stands_with_its_pair_of_videos(tmp_path):
    folder = write_run(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["output"]["prompts"] = ["a bell", "a <i>rope</i>"]
    (folder / "config.json").write_text(json.dumps(config))
    names = [video_file_name(when, number) for number in (1, 2) for when in ("before", "after")]
    assert names[1:3] == ["sample_after_lora.mp4", "sample_before_lora_2.mp4"]
    for name in names[:3]:
        write_video(folder / name, moving_row=20)
    page = page_of(folder)
    assert [attrs["src"] for attrs in page.all("video")] == names[:3]
    first, second = page.text.split("Prompt: ")[1:]
    assert first.startswith("a bell") and "is not in the folder" not in first
    assert second.startswith("a <i>rope</i>")
    assert "sample_after_lora_2.mp4 is not in the folder" in second
    assert len(page.all("button")) == 1


def test_without_prompts_the_page_says_whose_words_were_sampled(tmp_path):
    folder = write_run(tmp_path / "out")
    write_video(folder / "sample_before_lora.mp4", moving_row=20)
    config = json.loads((folder / "config.json").read_text())
    config["output"]["prompts"] = []
    (folder / "config.json").write_text(json.dumps(config))
    assert "Prompt: the first caption of the data set" in page_of(folder).text


def test_report_imports_nothing_heavy():
    code = "import sys, tempolora.results.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "diffusers", "transformers", "peft"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_folder_without_a_run_is_a_user_mistake(tmp_path, missing):
    folder = write_run(tmp_path / "out")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "[1]\n",
        '{"step": 1}\n',
        "oops\n",
        '{"expert": "high", "step": 0, "held_out": 1}\n',
    ],
)
def test_unreadable_metrics_are_a_user_mistake_naming_the_file(tmp_path, content):
    folder = write_run(tmp_path / "out")
    (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        write_report(folder)
