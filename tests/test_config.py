"""One JSON file, checked before anything heavy: every mistake is a sentence naming its key."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tempolora.config import Config, ConfigError, load_config

ROOT = Path(__file__).parents[1]


SHIPPED = ["a14b", "a14b_i2v", "a14b_steady", "a14b_tempo", "ti2v_5b", "toy"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configs_load(name):
    cfg = load_config(ROOT / "configs" / f"{name}.json")
    some = {"ti2v_5b": ("single",), "a14b_tempo": ("high",)}
    assert cfg.experts == some.get(name, ("high", "low"))


def test_the_shipped_a14b_config_is_what_was_promised():
    cfg = load_config(ROOT / "configs" / "a14b.json")
    data, rhythm, lora = cfg.data, cfg.rhythm, cfg.lora
    assert (data.num_frames, data.height, data.width) == (49, 576, 1024)
    assert (rhythm.spec_weight, rhythm.tv_weight, lora.rank) == (0.05, 0.01, 16)
    assert (rhythm.signal, rhythm.spec_cutoff_hz, rhythm.band_hz) == ("readout", 6.0, (0.5, 6.0))
    assert (cfg.train.max_steps, cfg.output.dir) == (800, "wan22_lora_out")
    assert cfg.latent_shape == (16, 13, 72, 128)


def test_the_committed_schema_is_that_of_the_code():
    committed = json.loads((ROOT / "configs" / "schema.json").read_text())
    assert committed == Config.model_json_schema()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lrr=1", "unknown key train.lrr; did you mean 'lr'?"),
        ("trian.lr=1", "unknown key trian; did you mean 'train'?"),
        ("model.files.unet=x", "unknown key model.files.unet; known here: transformer"),
        ("train.lr=fast", 'train.lr: given "fast"; allowed: a valid number'),
        ("train.max_steps=1.5", "train.max_steps: given 1.5; allowed: a valid integer"),
        ("train.max_steps=true", "train.max_steps: given true"),
        ("train.max_steps=0", "train.max_steps: given 0; allowed: greater than or equal to 1"),
        ("train.lr=NaN", "train.lr: given NaN; allowed: a finite number"),
        ("model.variant=wan3", "model.variant: given \"wan3\"; allowed: 't2v_a14b'"),
        ("lora.time_rows=few", "lora.time_rows: given \"few\"; allowed: 'auto'"),
        ("lora.time_rows=45", 'lora.time_rows: given 45; allowed: "auto" or an even number'),
        ("lora.time_rows=7", "lora.time_rows: given 7"),
        ("lora.blocks=[5,5]", "lora.blocks: [5, 5] holds no block"),
        ("data.num_frames=50", "data.num_frames: 50 is not 4k+1; the nearest allowed is 49"),
        ("data.num_frames=1", "data.num_frames: 1 is not 4k+1; the nearest allowed is 5"),
        ("data.height=100", "data.height: 100 is not divisible by 16"),
        ("data.width=1000", "data.width: 1000 is not divisible by 16"),
        ("model.task=i2v", "model.task: t2v_a14b does not do i2v; allowed: t2v"),
        ("rhythm.spec_cutoff_hz=9", "no frequency reaches 9 Hz: 49 frames at 16 fps carry 0.33"),
        ("rhythm.spec_cutoff_hz=7.5", "away from the decoder's comb at 4 and 8 Hz); lower it to"),
        ("rhythm.signal=latent", "no frequency reaches 6 Hz: 49 frames at 16 fps carry 0.33 to 2"),
        ("rhythm.band_hz=[3.8,4.2]", "rhythm.band_hz: no frequency lies in 3.8 to 4.2 Hz"),
        ("rhythm.spec_weight=-1", "rhythm.spec_weight: given -1"),
        ('rhythm.spec_weight={"high": 1}', "rhythm.spec_weight"),
        ("rhythm.band_hz=[0.1,0.2]", "rhythm.band_hz: no frequency lies in 0.1 to 0.2 Hz"),
        ("rhythm.band_hz=[2,1]", "rhythm.band_hz: 2.0 Hz is not below 1.0 Hz"),
        ("data.num_frames=9", "rhythm.spec_weight: 9 frames are too few for a spectrum"),
        ("lr=1", "--set: 'lr=1' is not section.key=value"),
        ("train.lr", "--set: 'train.lr' is not section.key=value"),
    ],
)
def test_a_mistake_is_one_sentence_naming_the_key(override, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_without_meaning_is_refused():
    with pytest.raises(ConfigError, match=r"data\.max_windows: has no meaning"):
        load_config(None, ["data.max_windows=2"])
    with pytest.raises(ConfigError, match=r"parallel\.zero_stage: has no meaning"):
        load_config(None, ["parallel.engine=fsdp", "parallel.zero_stage=2"])
    with pytest.raises(ConfigError, match=r"gradient_clipping is derived here; set train\.max"):
        load_config(None, ['parallel.deepspeed={"gradient_clipping": 2}'])
    linear = '{"zero_optimization": {"memory_efficient_linear": true}}'
    with pytest.raises(ConfigError, match=r"memory_efficient_linear loses gradients"):
        load_config(None, [f"parallel.deepspeed={linear}"])
    with pytest.raises(ConfigError, match=r"train\.host_blocks: has no meaning"):
        load_config(None, ["train.checkpointing=full", "train.host_blocks=2"])
    with pytest.raises(ConfigError, match=r"train\.host_blocks: what an uncompiled block keeps"):
        sets = ["train.checkpointing=selective", "train.compile=false"]
        load_config(None, [*sets, "train.host_blocks=2"])
    with pytest.raises(ConfigError, match=r"lora\.time_rows: has no meaning"):
        load_config(None, ["lora.target=qk", "lora.time_rows=16"])
    with pytest.raises(ConfigError, match=r"model\.expert: ti2v_5b has one transformer"):
        load_config(None, ["model.variant=ti2v_5b", "model.expert=high"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["rhythm.signal=latent", "rhythm.spec_weight=0", "data.num_frames=5"],
            r"rhythm\.tv_weight",
        ),
        (["rhythm.signal=latent", "rhythm.spec_weight=0", "rhythm.sound_weight=1"], "full frame"),
        (["rhythm.band_gain=0", "rhythm.jitter_gain=0"], r"rhythm\.jitter_gain: 0 together with"),
        (["rhythm.spec_form=absolute", "rhythm.jitter_gain=0"], 'nothing of spec_form "absolute"'),
        (["rhythm.rollout_every=5", "model.expert=high"], "does not reach a clean clip"),
        (
            ["model.variant=ti2v_5b", 'rhythm.tv_weight={"high": 1, "low": 2}'],
            r"rhythm\.tv_weight: ti2v_5b has one transformer; give one number",
        ),
    ],
)
def test_a_rhythm_that_cannot_be_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(None, settings)


def test_a_weight_may_differ_between_experts():
    rhythm = load_config(None, ['rhythm.spec_weight={"high": 0.2, "low": 0}']).rhythm
    assert [rhythm.weight("spec", expert) for expert in ("high", "low")] == [0.2, 0]
    assert rhythm.weight("tv", "high") == rhythm.weight("tv", "single") == 0.01


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "must hold one JSON object"),
        ('{"train": {"lr": 1, "lr": 2}}', "the key 'lr' stands there twice"),
    ],
)
def test_a_malformed_file_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json: No such file"):
        load_config(tmp_path / "none.json")


def test_set_lays_values_over_the_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"train": {"lr": 1e-3, "seed": 4}}')
    cfg = load_config(path, ["train.lr=2e-4", "data.shards=my shards", 'output.prompts=["a b"]'])
    assert (cfg.train.lr, cfg.train.seed) == (2e-4, 4)
    assert (cfg.data.shards, cfg.output.prompts) == ("my shards", ("a b",))


def test_a_resolved_config_loads_again():
    cfg = load_config(None, ["lora.blocks=[0,4]", "lora.time_rows=8"])
    assert Config.model_validate_json(cfg.model_dump_json()) == cfg


def test_checking_a_config_imports_nothing_heavy():
    code = (
        "import sys; from tempolora.config import load_config; from tempolora import cli;"
        "from tempolora.model import location; load_config(None);"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr
