"""What other trainers do about time, as losses beside ours.

Each is called with the loss so far, the predicted and the true velocity, and gives the loss to
train on. Shapes: B batch, C channel, T latent frame, H, W height and width, P patch, D width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrameDifference(nn.Module):
    """VideoX-Fun's motion sub loss (its training scripts' --motion_sub_loss, ratio 0.25).

    (1 - ratio) loss + ratio * mean square of the difference in time of v_hat - v. Its script for
    Wan 2.2 (scripts/wan2.2/train_lora.py at 65df69c) takes the difference over the second axis,
    which there is the channels; here it is over time, as in those for CogVideoX and as meant.
    """

    ratio = 0.25

    def close(self) -> None:
        """There is nothing to undo."""

    def forward(self, loss: Tensor, v_hat_BCTHW: Tensor, v_BCTHW: Tensor) -> Tensor:
        change = (v_hat_BCTHW - v_BCTHW).diff(dim=2).square().mean()
        return (1 - self.ratio) * loss + self.ratio * change


class NeighbourFrames(nn.Module):
    """SimpleTuner's CREPA: what a block makes of a frame shall resemble its neighbours' features.

    Cross-frame Representation Alignment, eq. 6 of arXiv 2506.09229, as in SimpleTuner's
    `crepa.py`:  -lambda mean_f [cos(h_f, y_f) + exp(-1 / tau) (cos(h_f, y_f-1) + cos(h_f, y_f+1))]
    with lambda 0.5, tau 1 and a trained projection of h. The paper's y are DINOv2's features of
    the clean clip; no weights are downloaded here, so y are a later block's features without
    their gradient, SimpleTuner's own option `crepa_use_backbone_features`. h is at the depth that
    it advises for Wan, block 8 of 30.
    """

    weight, tau, depth = 0.5, 1.0, 8 / 30

    def __init__(self, transformer: nn.Module, seed: int) -> None:
        super().__init__()
        config, blocks = transformer.config, transformer.blocks
        width = config.num_attention_heads * config.attention_head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.project.to(next(transformer.parameters()).device)
        self._seen: dict[str, Tensor] = {}
        student = min(round(self.depth * len(blocks)), len(blocks) - 2)
        self._hooks = [
            blocks[student].register_forward_hook(self._keep("student")),
            blocks[-1].register_forward_hook(self._keep("teacher")),
        ]

    def close(self) -> None:
        """Leave the transformer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, hidden_BLD: Tensor) -> None:
            self._seen[name] = hidden_BLD

        return hook

    def forward(self, loss: Tensor, v_hat_BCTHW: Tensor, v_BCTHW: Tensor) -> Tensor:
        frames = v_BCTHW.shape[2]
        h_BTPD, y_BTPD = (
            F.normalize(features.float(), dim=-1).unflatten(1, (frames, -1))
            for features in (self.project(self._seen["student"]), self._seen["teacher"].detach())
        )
        return loss - self.weight * self.alignment(h_BTPD, y_BTPD)

    def alignment(self, h_BTPD: Tensor, y_BTPD: Tensor) -> Tensor:
        """Mean over frames of the cosines with the own and both neighbours' features, ()."""

        def cosines(h: Tensor, y: Tensor) -> Tensor:
            return (h * y).sum(-1).mean(-1).sum(1)

        near = math.exp(-1 / self.tau)
        total_B = cosines(h_BTPD, y_BTPD)
        total_B = total_B + near * cosines(h_BTPD[:, :-1], y_BTPD[:, 1:])
        total_B = total_B + near * cosines(h_BTPD[:, 1:], y_BTPD[:, :-1])
        return (total_B / h_BTPD.shape[1]).mean()


def build_extra(name: str | None, transformer: nn.Module, seed: int) -> nn.Module | None:
    """The loss of this name, or None."""
    if name is None:
        return None
    if name == "frame_difference":
        return FrameDifference()
    return {"neighbour_frame": NeighbourFrames}[name](transformer, seed)
