"""The planner: what it predicts, what it chooses, and what it says where nothing fits."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tempolora import cli
from tempolora.bench.plan import KNOWN, compare, fitted, read_rows
from tempolora.config import ConfigError, load_config
from tempolora.train.plan import (
    Settings,
    candidates,
    card_of,
    changed,
    fitting,
    kept_blocks_in,
    next_setting,
    predict,
    smallest,
)
from tempolora.train.rates import CONSTANTS, GIB, GPUS, H200, VALUES
from tempolora.train.work import work_of

ROOT = Path(__file__).parents[1]
OPEN = ("train.checkpointing=auto", "train.compile=true")
FULL = Settings("plain", "bf16", "gpu", "full")


def config(*overrides, name="a14b"):
    return load_config(ROOT / "configs" / f"{name}.json", list(overrides))


def best(memory_gib, *overrides, **card):
    cfg = config(*OPEN, *overrides)
    plans = fitting(cfg, card_of(memory_gib * GIB, **card))
    return plans[0] if plans else None


POINTS = read_rows(KNOWN, ROOT / "configs" / "a14b.json")


@pytest.mark.parametrize("row", POINTS, ids=lambda row: row["name"])
def test_what_was_measured_is_predicted_within_ten_per_cent(row):
    line = compare(row, VALUES)
    for key in ("peak_gib", "seconds"):
        assert line[key] is None or abs(line[key]["error"]) < 0.1, key


def test_parts_add_up_to_the_peak_and_none_is_negative():
    for plan in candidates(config(*OPEN), card_of(139 * GIB)):
        assert sum(plan.parts.values()) == plan.peak
        assert min(plan.parts.values()) >= 0


def test_at_139_gib_blocks_are_kept_and_at_8_gib_everything_lies_on_the_host():
    large, small = best(139).settings, best(8).settings
    assert (large.checkpointing, large.placement) == ("selective", "gpu")
    assert 0 < large.kept_blocks < 40
    assert (small.checkpointing, small.placement) == ("offload", "host")
    assert best(6) is None


def test_each_kept_block_is_the_nine_tensors_counted_by_hand():
    """Input, q, k, v, self-attention's output, its projection, cross-attention's q and its
    projection: eight of width D; one of width F."""
    cfg, settings = config(), replace(FULL, checkpointing="selective")
    kept = [
        predict(cfg, replace(settings, kept_blocks=n)).parts["activations kept"] for n in (0, 40)
    ]
    bare = predict(cfg, FULL).parts["activations kept"]
    width, hidden = 29952 * 5120 * 2, 29952 * 13824 * 2
    assert bare == 40 * width
    assert kept[1] - kept[0] == 40 * (6 * width + hidden)
    beside = kept[0] - bare - 40 * width  # log-sum-exp, and the text's k and v
    assert beside == 40 * (29952 * 40 * 4 + 2 * 512 * 5120 * 2)


def test_training_keeps_the_blocks_that_were_planned():
    """Both count in one place; training from what is free when weights and adapters are there."""
    card = card_of(139 * GIB)
    plan = next(p for p in fitting(config(*OPEN), card) if p.settings.checkpointing == "selective")
    room = card.room - plan.parts["weights"] - plan.parts["LoRA"]
    chosen = changed(config(*OPEN), plan.settings.keys() | {"parallel.engine": "plain"})
    assert kept_blocks_in(room, chosen) == plan.settings.kept_blocks


def test_the_host_holds_what_was_counted_by_hand():
    """The blocks' matrices; two inputs of each block, its self-attention's output and the sums of
    that's rows: 26 and 34 GiB."""
    settings = replace(FULL, placement="host", checkpointing="offload")
    plan = predict(config(), settings)
    matrices, kept = 40 * 2 * (8 * 5120**2 + 2 * 5120 * 13824), 40 * 3 * 29952 * 5120 * 2
    sums = 40 * 4 * 29952 * 40
    assert plan.pinned == matrices + kept + sums
    assert (matrices / GIB, kept / GIB) == (pytest.approx(26.2, 0.01), pytest.approx(34.3, 0.01))
    assert plan.peak == pytest.approx(6.5 * GIB, rel=0.05)  # as recompute.py counts


def test_attention_that_is_kept_takes_no_second_forward_pass():
    full, offload = (
        predict(config(), replace(FULL, checkpointing=level)) for level in ("full", "offload")
    )
    forward = work_of(config(), "high").flops.attention_forward / H200.attention_forward
    saved = full.seconds - offload.seconds
    assert 0.9 * forward < saved < forward  # but for what its transfers cost


@pytest.mark.parametrize(
    ("engine", "levels"), [("fsdp", {"full"}), ("deepspeed", {"none", "full"})]
)
def test_auto_takes_only_what_was_tried_with_an_engine(engine, levels):
    cfg = config(*OPEN, "model.base=auto", f"parallel.engine={engine}")
    chosen = [p.settings for p in candidates(cfg, card_of(139 * GIB, gpus=2))]
    assert {s.checkpointing for s in chosen} == levels
    assert {s.placement for s in chosen} == {"gpu"}
    assert engine == "fsdp" or {s.base for s in chosen} == {"bf16"}


@pytest.mark.parametrize("gpus", [1, 4])
def test_more_memory_is_never_slower(gpus):
    plans = [best(memory, gpus=gpus) for memory in range(8, 200, 12)]
    seconds = [plan.seconds for plan in plans if plan is not None]
    assert len(seconds) > 12
    assert seconds == sorted(seconds, reverse=True)
    full = replace(FULL, engine="ddp" if gpus > 1 else "plain")
    assert seconds[-1] < 0.8 * predict(config(*OPEN), full, gpus=gpus).seconds


@pytest.mark.parametrize("level", ["none", "selective", "full", "offload"])
def test_longer_larger_and_more_clips_need_more_memory_and_time(level):
    settings = replace(FULL, checkpointing=level)
    small = predict(config(), settings)
    for override in ("data.num_frames=53", "data.height=592", "data.width=1040"):
        plan = predict(config(override), settings)
        assert plan.peak > small.peak and plan.seconds > small.seconds
    twice = predict(config("train.batch_size=2"), settings)
    assert twice.peak > small.peak
    assert twice.seconds == pytest.approx(2 * small.seconds, rel=0.01)
    steps = predict(config("train.gradient_accumulation=3"), settings)
    assert steps.peak == small.peak and steps.seconds == pytest.approx(3 * small.seconds)


def test_a_sharded_base_takes_its_share_and_two_gathered_blocks():
    whole = predict(config(), FULL).parts["weights"]
    halves = predict(config(), replace(FULL, engine="fsdp"), gpus=2).parts["weights"]
    block = work_of(config(), "high").block_weights("bf16")
    assert halves == pytest.approx(whole / 2 + 2 * block)
    assert predict(config(), replace(FULL, engine="ddp"), gpus=2).parts["weights"] == whole
    host = predict(config(), replace(FULL, placement="host"))  # slots for two blocks
    largest, matrices = 2 * 2 * 5120 * 13824, host.pinned / 40
    streamed = whole - 40 * matrices
    assert host.parts["weights"] == pytest.approx(streamed + 6 * largest)


def test_what_the_host_cannot_pin_is_not_chosen():
    assert best(12).pinned > 37 * GIB
    assert best(12, host=30 * GIB) is None
    assert best(24, host=30 * GIB).settings.checkpointing == "full"
    assert best(20, host=30 * GIB, gpus=2) is None  # each process pins weights of its own


def test_fp8_is_taken_by_auto_only_where_bf16_does_not_fit_on_the_gpu():
    assert best(139, "model.base=auto").settings.base == "bf16"
    squeezed = best(30, "model.base=auto", "model.placement=gpu").settings
    assert (squeezed.base, squeezed.placement) == ("fp8", "gpu")
    old = best(30, "model.base=auto", gpu=GPUS["A100"]).settings
    assert (old.base, old.placement) == ("bf16", "host")
    with pytest.raises(ConfigError, match="an A100 has no fp8"):
        best(80, "model.base=fp8", gpu=GPUS["A100"])


def test_a_choice_that_excludes_itself_is_refused():
    with pytest.raises(ConfigError, match='base: "fp8" does not go with DeepSpeed'):
        candidates(config("model.base=fp8", "parallel.engine=deepspeed"), card_of(80 * GIB, gpus=2))


@pytest.mark.parametrize("memory", [7.7, 9, 20, 40])
@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_the_advice_names_a_setting_that_fits(memory, level):
    cfg, card = config(f"train.checkpointing={level}", "model.placement=gpu"), card_of(memory * GIB)
    assert not fitting(cfg, card)
    keys, plan = next_setting(cfg, card)
    assert keys and "auto" not in keys.values()
    followed = fitting(changed(cfg, keys), card)
    assert followed and followed[0].peak == plan.peak <= card.room


def test_where_no_setting_helps_the_advice_is_a_smaller_clip_or_nothing():
    keys, _ = next_setting(config(*OPEN, "data.num_frames=121"), card_of(9 * GIB))
    assert set(keys) & {"data.num_frames", "data.height"}
    assert next_setting(config(*OPEN), card_of(1 * GIB)) is None


def test_advice_after_running_out_of_memory_needs_less_than_what_ran_out():
    cfg, card = config("train.checkpointing=selective"), card_of(139 * GIB)
    ran_out = smallest(cfg, card).peak + 40 * GIB
    keys, plan = next_setting(cfg, card, below=ran_out)
    assert (
        keys == {"train.checkpointing": "selective", "train.kept_blocks": 0} and plan.peak < ran_out
    )


# --- Fitting --------------------------------------------------------------------------------------


def test_fitting_finds_the_constants_that_made_the_measurements():
    rows = read_rows(KNOWN, ROOT / "configs/a14b.json")
    truth = VALUES | {"eager_flight": 40.0, "compiled_flight": 12.0, "eager_traffic": 20.0}
    for row in rows:
        made = compare(row | {"peak_gib": 1.0, "seconds": 1.0}, truth)
        row |= {key: made[key]["predicted"] for key in ("peak_gib", "seconds")}
    found = fitted(rows)
    for name in ("eager_flight", "compiled_flight", "eager_traffic", "compiled_traffic"):
        assert found[name] == pytest.approx(truth[name], rel=0.01), name
    for name, constant in CONSTANTS.items():
        if not constant.fitted:
            assert found[name] == constant.value


def test_the_shipped_constants_are_those_of_the_fit():
    rows = read_rows(KNOWN, ROOT / "configs/a14b.json")
    for name, value in fitted(rows).items():
        assert value == pytest.approx(VALUES[name], rel=0.01), name


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"peak": 1}, "unknown key 'peak'"),
        ({"frames": 49}, "neither peak_gib nor seconds"),
        ({"peak_gib": 1, "overrides": ["train.checkpointing=auto"]}, "is auto; say what was run"),
        ({"peak_gib": 1, "frames": 48}, "data.num_frames: 48"),
    ],
)
def test_a_row_that_says_too_little_is_refused(row, sentence, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ConfigError, match=sentence):
        read_rows(path, ROOT / "configs/a14b.json")


# --- The command ----------------------------------------------------------------------------------


def plan(*arguments, sets=OPEN):
    config_file = str(ROOT / "configs" / "a14b.json")
    flags = [part for setting in sets for part in ("--set", setting)]
    return cli.main(["plan", "--config", config_file, *flags, *arguments])


def test_the_command_prints_a_table_and_writes_the_same_for_machines(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan("--gpu-memory", "139", "--json", str(file)) == 0
    page, found = capsys.readouterr().out, json.loads(file.read_text())
    assert found["fits"] and found["settings"]["checkpointing"] == "selective"
    assert sum(found["parts_gib"].values()) == pytest.approx(found["peak_gib"])
    assert f"{found['peak_gib']:.2f} GiB" in page
    assert "seconds are those of an H200, as no --gpu is named" in page
    chosen = [line for line in page.splitlines() if line.startswith("* ")]
    assert len(chosen) == 1 and "selective" in chosen[0]


@pytest.mark.parametrize("gpus", ["1", "2"])
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "configs").glob("*.json") if path.stem != "schema")
)
def test_every_config_that_is_shipped_can_be_planned(name, gpus, capsys):
    config = ["--config", str(ROOT / "configs" / f"{name}.json")]
    assert cli.main(["plan", *config, "--gpu-memory", "24", "--gpus", gpus]) == 0
    assert "it fits" in capsys.readouterr().out


def test_what_does_not_fit_ends_with_1_and_says_what_to_set(capsys):
    assert plan("--gpu-memory", "24", "--gpu", "rtx 4090", sets=["model.placement=gpu"]) == 1
    page = capsys.readouterr().out
    assert "seconds are an estimate for an RTX4090, from its data sheet" in page
    assert "it does not fit; set model.placement=host (" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "0"], "--gpu-memory: given 0; allowed: 1 to"),
        (["--gpu-memory", "nan"], "--gpu-memory: given nan"),
        (["--gpu-memory", "80", "--host-memory", "-1"], "--host-memory: given -1"),
        (["--gpu-memory", "80", "--gpus", "0"], "--gpus: given 0"),
        (["--gpu-memory", "80", "--gpu", "voodoo"], "nothing is known of 'voodoo'; known: H200"),
        (["--gpu-memory", "80", "--set", "parallel.engine=fsdp"], '"fsdp" has nothing to share'),
        (["--gpu-memory", "80", "--set", "lora.blocks=[0,41]"], "this model has 40 blocks"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    assert plan(*arguments) == 2
    line = capsys.readouterr().err.strip()
    assert sentence in line and "\n" not in line


def test_planning_loads_neither_torch_nor_diffusers():
    arguments = ["plan", "--config", str(ROOT / "configs" / "a14b.json"), "--gpu-memory", "80"]
    code = (
        f"import sys; from tempolora import cli; cli.main({arguments!r});"
        "sys.exit(bool({'torch', 'diffusers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
