"""The rotation of RoPE, as every cache applies it."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, H, head_dim] turned by its tokens' angles, cos and sin [..., T, head_dim / 2]; the dtype stays x's.

    Channels are paired as Hugging Face checkpoints are laid out: i with i + head_dim / 2.
    """
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # [..., T, 1, head_dim / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
