"""The names of the files that a run leaves in output.dir, for whoever writes or looks for them."""

from typing import Literal

NAME_OF_KIND = {"rhythm": "temporal", "tempo": "tempo"}
EXPERTS = ("single", "high", "low")
"""Every expert that any model of the family has."""


def lora_file_name(
    expert: Literal["high", "low", "single"], kind: Literal["rhythm", "tempo"] = "rhythm"
) -> str:
    """The LoRA file of one expert."""
    noise = {"high": "_high_noise", "low": "_low_noise", "single": ""}[expert]
    return f"wan22_{NAME_OF_KIND[kind]}_lora{noise}.safetensors"


def video_file_name(when: Literal["before", "after"], number: int) -> str:
    """The video of one prompt, without the LoRA or with it; prompts are numbered from 1."""
    return f"sample_{when}_lora{f'_{number}' if number > 1 else ''}.mp4"
