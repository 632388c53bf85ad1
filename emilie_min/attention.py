"""The one place where attention happens: UNet and autoencoder both call it, so this is where to hook it."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017). q: (B, heads, N, d); k, v: (B, heads, M, d) -> like q."""
    return F.scaled_dot_product_attention(q, k, v)
