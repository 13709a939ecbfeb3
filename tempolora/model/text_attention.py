"""Attention to the text whose backward pass fills a GPU.

An attention kernel's backward goes through the keys in parallel and through the queries one after
the other. Wan's text has 512 keys and a video tens of thousands of queries, so most of a GPU waits.
Queries do not know of each other here: folded into the batch, with the same keys for each part,
they give the same result from many times as many pieces of work.

Shapes: B batch, L video token, S text token, D width.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

MOST_PARTS = 16
TILE = 128  # queries that a kernel takes at a time: parts of whole tiles waste none


def fold_text_attention(transformer: nn.Module) -> None:
    """Let the cross-attention of every block of a Wan transformer fold its queries.

    Blocks that also attend to an image are left as they are.
    """
    for block in transformer.blocks:
        if block.attn2.add_k_proj is None:
            block.attn2.set_processor(FoldedTextAttention())


def parts(queries: int) -> int:
    """Into how many equal parts that many queries are folded: at most MOST_PARTS."""
    divisors = [n for n in range(MOST_PARTS, 0, -1) if not queries % n]
    whole = [n for n in divisors if not queries // n % TILE]
    return (whole or divisors)[0]


class FoldedTextAttention:
    """diffusers' WanAttnProcessor for attention to the text alone."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        """Video (B, L, D) attending to text (B, S, D): (B, L, D)."""
        assert attention_mask is None and rotary_emb is None, "Wan's text has neither"
        folds = parts(hidden_states.shape[1])
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        seen = F.scaled_dot_product_attention(
            _heads(query.unflatten(1, (folds, -1)).flatten(0, 1), attn.heads),
            *(_heads(x.repeat_interleave(folds, dim=0), attn.heads) for x in (key, value)),
        )
        seen = seen.transpose(1, 2).flatten(2, 3).unflatten(0, (-1, folds)).flatten(1, 2)
        out: Any = attn.to_out
        return out[1](out[0](seen))


def _heads(x_BLD: Tensor, heads: int) -> Tensor:
    return x_BLD.unflatten(2, (heads, -1)).transpose(1, 2)
