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
from tempolora.results.names import lora_file_name, video_file_name
from tempolora.results.report import _tick_labels, write_report

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
        for step, value in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    points = " ".join(attrs["points"] for attrs in page_of(folder).all("polyline"))
    assert points and "nan" not in points and "inf" not in points


def test_tick_labels_are_short_and_of_one_form_at_any_size():
    assert _tick_labels([0, 0.00025, 0.0005, 0.00075, 0.001]) == [
        "0",
        "2.5e-4",
        "5e-4",
        "7.5e-4",
        "1e-3",
    ]
    assert _tick_labels([-0.01, 0.0, 0.01]) == ["-0.01", "0", "0.01"]
    assert _tick_labels([0, 500_000, 1_000_000]) == ["0", "5e5", "1e6"]


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


@pytest.mark.parametrize("content", ["", "\n", "[1]\n", '{"step": 1}\n', "oops\n"])
def test_unreadable_metrics_are_a_user_mistake_naming_the_file(tmp_path, content):
    folder = write_run(tmp_path / "out")
    (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        write_report(folder)
