"""How much moves when: curves over video frames, in the clock of real playback."""

from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def motion_energy(frames_FHW3: Tensor) -> Tensor:
    """Mean absolute change of luminance into each frame, (F,) in 0..1; the first entry is 0.

    frames_FHW3: uint8 RGB.
    """
    luma_FHW = (frames_FHW3.float() / 255) @ frames_FHW3.new_tensor(LUMA, dtype=float).float()
    change_F = luma_FHW.new_zeros(len(luma_FHW))
    change_F[1:] = luma_FHW.diff(dim=0).abs().mean(dim=(1, 2))
    return change_F
