"""The published Wan 2.2 architectures as plain dictionaries, so that no hub is needed to build one.

Single-file checkpoints carry no configuration and random initialisation has no folder at all: both
build from here. TinyWan is these same dictionaries with smaller numbers. Values are those of the
`config.json` files in the Wan-AI/Wan2.2-*-Diffusers folders and in google/umt5-xxl.
"""

from typing import Any

_A14B: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}

TRANSFORMER: dict[str, dict[str, Any]] = {
    "t2v_a14b": _A14B,
    # 16 noisy + 4 mask + 16 condition channels go in
    "i2v_a14b": {**_A14B, "in_channels": 36},
    "ti2v_5b": {
        **_A14B,
        "num_attention_heads": 24,
        "in_channels": 48,
        "out_channels": 48,
        "ffn_dim": 14336,
        "num_layers": 30,
    },
}

# fmt: off
_WAN_2_1_MEAN = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
]
_WAN_2_1_STD = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
]
_WAN_2_2_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
_WAN_2_2_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on

_VAE_2_1: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": _WAN_2_1_MEAN,
    "latents_std": _WAN_2_1_STD,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
_VAE_2_2: dict[str, Any] = {
    **_VAE_2_1,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "latents_mean": _WAN_2_2_MEAN,
    "latents_std": _WAN_2_2_STD,
    "is_residual": True,
    "in_channels": 12,  # 3 colours x 2 x 2 pixels: the patches are folded into channels first
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}

VAE: dict[str, dict[str, Any]] = {
    "t2v_a14b": _VAE_2_1,
    "i2v_a14b": _VAE_2_1,
    "ti2v_5b": _VAE_2_2,
}

TEXT_ENCODER: dict[str, Any] = {  # UMT5-XXL, encoder only
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def architecture(variant: str, part: str) -> dict[str, Any]:
    """Published configuration of 'transformer', 'transformer_2', 'vae' or 'text_encoder'."""
    if part == "text_encoder":
        return TEXT_ENCODER
    return (VAE if part == "vae" else TRANSFORMER)[variant]
