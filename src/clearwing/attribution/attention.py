"""Attention rules: the matrices of all layers and the scores to a map (N, h, w) of the tokens that the head reads."""

from __future__ import annotations

import torch
from torch import Tensor

from clearwing.attribution.fold import token_grid
from clearwing.attribution.network import wide
from clearwing.attribution.trace import Trace
from clearwing.types import ClearwingError


def attention_rollout(trace: Trace, scores: Tensor) -> Tensor:
    """Attention rollout, Abnar and Zuidema 2020 eq. 1: the product over the layers of 0.5 W_att + 0.5 I.

    W_att is the mean over the heads (section 3), rows divided by their sums. It is the same for every class.
    """
    identity = rollout = _identity(trace)
    for A in trace.attention.values():
        mixed = 0.5 * wide(A).mean(1) + 0.5 * identity
        rollout = mixed / mixed.sum(-1, keepdim=True) @ rollout
    return _read(trace, rollout)


def gradient_attention(trace: Trace, scores: Tensor) -> Tensor:
    """Generic attention explainability, Chefer et al. 2021 ICCV: A_bar = E_h((grad A * A)^+), R <- R + A_bar R.

    Eq. 5 and 6, of self-attention. R begins as I and is kept without it, for it says of a token only that it is itself.
    """
    identity = _identity(trace)
    R = torch.zeros_like(identity)
    gradients = trace.gradients(scores, of=tuple(trace.attention))
    for name, A in trace.attention.items():
        A_bar = (wide(gradients[name]) * wide(A)).clamp(min=0).mean(1)
        R = R + A_bar @ (identity + R)
    return _read(trace, R)


def _identity(trace: Trace) -> Tensor:
    """(T, T), in the type of the maps."""
    A = wide(next(iter(trace.attention.values())))
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def _read(trace: Trace, R: Tensor) -> Tensor:
    """Of R (N, T, T) the mean over the rows that the head reads, at the tokens of the picture: (N, h, w).

    The head reads those tokens of the last layer on whose row of attention the logits depend: the class token where
    one is read, class and distillation tokens, or those of the picture where their mean is taken.
    """
    last = list(trace.attention)[-1]
    rows = trace.reached([last])[last].any(3).any(1)  # (N, T)
    found = (rows[:, None].to(R.dtype) @ R)[:, 0] / rows.sum(1, keepdim=True)
    T = found.shape[1]
    size = token_grid(T, trace.images, trace.grid)
    if size is None:
        mend = "which is no grid of the pictures; give grid=(h, w)"
        raise ClearwingError("attention", f"it is over {T} tokens", mend)
    return found[:, T - size[0] * size[1] :].unflatten(1, size)
