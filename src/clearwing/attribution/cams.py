"""CAM rules: the activation A and the gradient G of the score, both (N, C, h, w), to a raw map (N, h, w).

A rule leaves out the last ReLU, the upsampling and the scale: `clearwing.attribution.methods` does the first two for
every rule alike, and only what draws a map scales it.
"""

from __future__ import annotations

from torch import Tensor


def grad_cam(A: Tensor, G: Tensor) -> Tensor:
    """Grad-CAM, Selvaraju et al. 2017: alpha_k = mean_ij G^k_ij (eq. 1), sum_k alpha_k A^k (eq. 2 less its ReLU)."""
    alpha = G.mean((2, 3))  # (N, C)
    return (alpha[:, None] @ A.flatten(2)).unflatten(2, A.shape[2:])[:, 0]


def layer_cam(A: Tensor, G: Tensor) -> Tensor:
    """LayerCAM, Jiang et al. 2021: w^k_ij = relu(G^k_ij), M_ij = sum_k w^k_ij A^k_ij less its ReLU."""
    return (G.clamp(min=0) * A).sum(1)
