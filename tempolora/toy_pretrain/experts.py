"""Train TinyWan's two experts: text to video, on drawn clips that flicker and jitter.

The clips are encoded once and stay on the device; a step draws its samples, noise and sigmas there,
so that on a GPU it is one CUDA graph. Captions say what is drawn and never how it flickers.

Shapes: N clip, B sample of a batch, C channel, T, h, w latent frame, height and width, L token,
D text channel, K caption.
"""

import logging
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tempolora.data.toy import captions, draw_scenes, render
from tempolora.model import tinywan, wan
from tempolora.toy_pretrain.vae import repeated
from tempolora.train.flow import interpolate, sample_sigma, velocity
from tempolora.variants import NEGATIVE_PROMPT, TEXT_TOKENS, VARIANTS

log = logging.getLogger(__name__)

FPS, FRAMES, SIZE = 16.0, 49, 64
BATCH = 128
LENGTHS = {13: 0.7, 9: 0.15, 5: 0.15}  # latent frames of a batch and how often
DROPPED = 0.15  # of captions: half for none, half for Wan's own negative prompt
LEARNING_RATE, WARMUP_STEPS, EMA = 1e-3, 500, 0.999
TOGETHER = 128  # clips that are drawn and encoded at a time


@dataclass(frozen=True)
class Pool:
    """Encoded clips and the embeddings of their captions, on one device.

    The last two captions are those that stand for none. All are padded to the length of the longest
    and one more token, which stands for all the padding that Wan has after it (count_padding).
    """

    latents_NCThw: Tensor
    caption_N: Tensor
    text_KLD: Tensor


@torch.no_grad()
def encode_pool(vae: nn.Module, count: int, seed: int) -> Pool:
    """Draw `count` clips and encode them with the VAE, their captions with TinyWan's own encoder.

    All on the VAE's device.
    """
    scenes = draw_scenes(count, np.random.default_rng([seed, 0]))
    size = {"fps": FPS, "num_frames": FRAMES, "height": SIZE, "width": SIZE}
    latents = []
    for start in tqdm(range(0, count, TOGETHER), "encoding", disable=None):
        some = scenes[slice(start, start + TOGETHER)].to(vae.device)
        latents.append(wan.encode_video(vae, render(some, style="flickering", **size)).half())
    paced = captions(scenes, tempo_words=True)  # every other caption names the tempo
    said = [pair[n % 2] for n, pair in enumerate(zip(captions(scenes), paced))]
    kept = sorted(set(said))
    tokenizer, encoder = tinywan.text_parts()
    encoder.to(vae.device)
    prompts = [*kept, "", NEGATIVE_PROMPT]
    texts = [
        text
        for start in range(0, len(prompts), TOGETHER)
        for text in wan.encode_prompts(tokenizer, encoder, prompts[start : start + TOGETHER])
    ]
    longest = max(len(text) for text in texts)
    place = {caption: n for n, caption in enumerate(kept)}
    return Pool(
        torch.cat(latents),
        torch.tensor([place[caption] for caption in said], device=vae.device),
        wan.pad_text(texts)[:, : longest + 1].half(),
    )


def train_expert(expert: str, pool: Pool, steps: int, seed: int, architecture: dict) -> nn.Module:
    """The expert after `steps` steps of flow matching in its own range of sigma: its running mean.

    AdamW in float32, the model under bfloat16 autocast on a GPU.
    """
    device, variant = pool.latents_NCThw.device, VARIANTS[tinywan.TRAINED]
    torch.manual_seed(seed)
    transformer = wan.new_transformer(architecture).to(device).train()
    mean = deepcopy(transformer).requires_grad_(False).eval()
    weights, means = list(transformer.parameters()), list(mean.parameters())
    cuda = device.type == "cuda"
    rate, renewed = torch.zeros(2, device=device)  # where a captured step reads them
    optimizer = torch.optim.AdamW(
        weights, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=cuda
    )
    clips, (captions_there, length, _) = len(pool.latents_NCThw), pool.text_KLD.shape
    count_padding(transformer, length)
    if cuda:
        torch._dynamo.config.recompile_limit = 4 * len(LENGTHS)
        for block in transformer.blocks:
            block.compile(dynamic=False)

    def step(frames: int) -> tuple[Tensor, ...]:
        chosen_B = torch.randint(clips, (BATCH,), device=device)
        x0 = pool.latents_NCThw[chosen_B, :, :frames].float()
        dropped_B = torch.rand(BATCH, device=device)
        none_B = captions_there - 2 + (dropped_B < DROPPED / 2).long()
        caption_B = torch.where(dropped_B < DROPPED, none_B, pool.caption_N[chosen_B])
        text_BLD = pool.text_KLD[caption_B].float()
        sigma_B = sample_sigma(torch.rand(BATCH, device=device), variant, expert, "uniform")
        noise = torch.randn_like(x0)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            v_hat = wan.predict_velocity(
                transformer, interpolate(x0, noise, sigma_B), sigma_B, text_BLD
            )
        loss = (v_hat - velocity(x0, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            behind = torch._foreach_sub(weights, means)
            torch._foreach_mul_(behind, renewed)
            torch._foreach_add_(means, behind)
        return loss.detach(), norm

    do_step = {frames: repeated(partial(step, frames), device) for frames in LENGTHS}
    order = np.random.default_rng([seed, 1]).choice(list(LENGTHS), steps, p=list(LENGTHS.values()))
    losses: list[Tensor] = []
    for done, frames in enumerate(tqdm(order, expert, disable=None)):
        optimizer.param_groups[0]["lr"].fill_(LEARNING_RATE * share(done, steps))
        renewed.fill_(1 - min(EMA, (1 + done) / (10 + done)))
        loss, norm = do_step[int(frames)]()
        losses.append(loss.clone())
        if (done + 1) % 500 == 0 or done + 1 == steps:
            if not math.isfinite(norm.item()):
                raise FloatingPointError(f"step {done + 1}: the gradient is not finite")
            log.info("step %d: flow %.4f", done + 1, torch.stack(losses).mean().item())
            losses.clear()
    return mean


def count_padding(transformer: nn.Module, tokens: int) -> None:
    """Let the last of so few text tokens stand for all of Wan's padding up to 512.

    Padding is the same vector everywhere and attended to like words: one such token counts for n
    where its logits are log(n) higher. The outcome is the same.
    """
    for block in transformer.blocks:
        block.attn2.processor = partial(_attend, block.attn2.processor, TEXT_TOKENS - tokens + 1)


def _attend(processor: Callable, count: int, attn: nn.Module, x: Tensor, text_BLD: Tensor, *_):
    bias_L = torch.zeros(text_BLD.shape[1], device=x.device, dtype=x.dtype)
    bias_L[-1] = math.log(count)
    return processor(attn, x, text_BLD, bias_L.expand(len(x), 1, x.shape[1], -1))


def share(step: int, steps: int) -> float:
    """Of the learning rate: a short rise, then a cosine down to 0."""
    return min((step + 1) / WARMUP_STEPS, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
