"""What the planner takes from measurements, in one place: its constants, and how fast GPUs are.

`python -m tempolora.bench plan --fit` prints the fitted ones anew from measured rows.

D is the width, F that of the feed-forward layers; a unit of D is one bf16 value of that width for
each token of a microstep.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Constant:
    """fitted: `--fit` may move it. source: the measurement it comes from, or that it is none."""

    value: float
    unit: str
    source: str
    fitted: bool = True


_T2V = "H200, T2V-A14B 49x576x1024, rank 16 on time rows"

CONSTANTS = {
    "eager_flight": Constant(
        29.1, "D", f"{_T2V}, full, eager: 48.8 GiB; and TI2V-5B 49x704x1280: 15.9 GiB"
    ),
    "compiled_flight": Constant(17.35, "D", f"{_T2V}, full, compiled: 45.6 GiB"),
    "thirds_flight": Constant(
        1.0,
        "of 13 D, or 3 D + 4 F if that is more",
        f"{_T2V}, offload and host: 6.38 GiB allocated, 7.28 reserved under a cap of 7.3",
        False,
    ),
    "fp8_flight": Constant(0.5, "F", "not measured: the widest tensor in 8 bits beside itself"),
    "eager_traffic": Constant(
        14.2, "reads and writes of 11 D + 3 F in a pass", f"{_T2V}, full, eager: 10.98 s"
    ),
    "compiled_traffic": Constant(
        5.53, "reads and writes of 11 D + 3 F in a pass", f"{_T2V}, full, compiled: 9.44 s"
    ),
    "fp8_time": Constant(
        0.53,
        "of a bf16 product's",
        "H200, products of the A14B's shapes: 1.39 to 1.54 PFLOP/s",
        False,
    ),
    "nf4_time": Constant(
        1.0,
        "of a bf16 product's",
        "not measured: to restore a weight is to write it once for a product over all tokens",
        False,
    ),
    "exposed": Constant(0.047, "of a transfer", f"{_T2V}, full and host: 9.49 s"),
    "slack_gib": Constant(0.1, "GiB", "the allocator's rounding; not measured apart", False),
    "context_gib": Constant(0.3, "GiB", "not measured: CUDA context, outside of the peak", False),
    "sample_flight": Constant(
        0.62, "11 D + 3 F", "H200, sampling T2V-A14B at 49x576x1024: 30.0 GiB", False
    ),
    "ddp_share": Constant(1.0, "of one GPU's speed", "2 H200s: 9.189 s, alone 9.194", False),
    "streamed_share": Constant(
        0.98, "of one GPU's speed", "not measured: as fsdp, which moves weights too", False
    ),
    "fsdp_share": Constant(0.98, "of one GPU's speed", "2 H200s: 9.368 s", False),
    "deepspeed_share": Constant(0.92, "of one GPU's speed", "2 H200s: 10.005 s", False),
}

VALUES = {name: constant.value for name, constant in CONSTANTS.items()}

DECODE_BYTES = {8: 10_290, 16: 10_700}
"""Of the VAE's decoder for a pixel of a frame, by spatial stride: 6.7 and 8.0 GiB at 576x1024."""
TILE_PIXELS = 256 * 256
"""Of a frame that diffusers' VAE decodes at a time when tiled."""
ENCODE_BYTES = 7_970
"""Of the encoder: 5.1 GiB at 49x576x1024 with the Wan 2.1 VAE; taken for the other one as well."""
VAE_WEIGHTS = {8: 0.25e9, 16: 1.41e9}
"""bf16 bytes."""
TEXT_ENCODER, TEXT_EMBEDDING, TEXT_BLOCKS, TEXT_DIM = 11.36e9, 2.1e9, 24, 4096
"""bf16 bytes of UMT5-XXL's encoder and of its embedding; blocks and width."""
TEXT_FLIGHT = 0.2e9
"""Bytes of its activations for one prompt; an estimate."""


@dataclass(frozen=True)
class Gpu:
    """FLOP/s, bytes/s. measured: or from data sheets, at the shares that an H200 reaches."""

    name: str
    matmul: float
    fp8: bool
    attention_forward: float
    attention_backward: float
    copy: float
    host_link: float
    measured: bool = False


H200 = Gpu("H200", 780e12, True, 628e12, 555e12, 4.15e12, 55e9, measured=True)
_PEAK, _BANDWIDTH = 989e12, 4.8e12  # of the H200, by its data sheet


def _by_data_sheet(name: str, peak: float, fp8: bool, bandwidth: float, link: float) -> Gpu:
    share = peak / _PEAK
    return Gpu(
        name,
        H200.matmul * share,
        fp8,
        H200.attention_forward * share,
        H200.attention_backward * share,
        H200.copy * bandwidth / _BANDWIDTH,
        link,
    )


# Dense bf16 with fp32 accumulation, and memory bandwidth, by NVIDIA's data sheets: H100 SXM, A100
# 80GB SXM, L40S; the white papers of the Ada GPU architecture (RTX 4090) and of GA102 (RTX 3090).
# PCIe 4 is taken at half the rate that was measured over PCIe 5.
GPUS = {
    "H200": H200,
    "H100": _by_data_sheet("H100", 989e12, True, 3.35e12, 50e9),
    "A100": _by_data_sheet("A100", 312e12, False, 2.039e12, 25e9),
    "L40S": _by_data_sheet("L40S", 362e12, True, 0.864e12, 25e9),
    "RTX4090": _by_data_sheet("RTX4090", 165.2e12, True, 1.008e12, 25e9),
    "RTX3090": _by_data_sheet("RTX3090", 71e12, False, 0.936e12, 25e9),
}
