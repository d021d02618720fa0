"""Slow float64 versions of the explanation methods, written from their papers without autograd.

A network is a list of steps: a function of (B, ...) that is affine (convolution, linear, mean pooling, batch
norm in evaluation); the word "relu"; or ("residual", branch, shortcut) with two such lists that are added. `SmallNet`
is both such a list and a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Steps = Sequence[Any]


def forward(steps: Steps, x: Tensor) -> Tensor:
    for step in steps:
        if step == "relu":
            x = torch.where(x > 0, x, torch.zeros_like(x))
        elif isinstance(step, tuple):
            x = forward(step[1], x) + forward(step[2], x)
        else:
            x = step(x)
    return x


def gradient(score: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a function (B, ...) -> (B,) at one tensor (1, ...): a picture for each shifted value."""
    shifts = step * torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape[1:])
    return ((score(at + shifts) - score(at - shifts)) / (2 * step)).reshape(at.shape)


def ruled_gradient(steps: Steps, x: Tensor, R: Tensor, rule: str) -> Tensor:
    """Carry R, the gradient at the output, back to x with a ReLU rule: "plain", "guided" or "deconvnet".

    Springenberg et al. 2015, figure 1: (f > 0) R; (f > 0) (R > 0) R; (R > 0) R, with f the value that enters the ReLU.
    """
    values = [x]
    for step in steps:
        values.append(forward([step], values[-1]))
    for step, value in zip(reversed(steps), reversed(values[:-1]), strict=True):
        if step == "relu":
            passes = torch.ones_like(R) if rule == "deconvnet" else (value > 0).to(R.dtype)
            keeps = torch.ones_like(R) if rule == "plain" else (R > 0).to(R.dtype)
            R = passes * keeps * R
        elif isinstance(step, tuple):
            R = ruled_gradient(step[1], value, R, rule) + ruled_gradient(step[2], value, R, rule)
        else:
            R = _transposed(step, value.shape, R)
    return R


def _transposed(affine: Callable[[Tensor], Tensor], shape: Sequence[int], R: Tensor) -> Tensor:
    """The transposed matrix of an affine step times R; its columns are its answers to the unit vectors."""
    units = torch.eye(math.prod(shape), dtype=R.dtype).reshape(-1, *shape[1:])
    columns = affine(units) - affine(torch.zeros(*shape, dtype=R.dtype))
    return (columns * R).flatten(1).sum(1).reshape(shape)


def grad_cam(A: Tensor, G: Tensor) -> Tensor:
    """Selvaraju et al. 2017: eq. 1 and eq. 2 less its ReLU; A, G (K, h, w) of one picture -> (h, w)."""
    K, h, w = A.shape
    L = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        alpha = 0.0
        for i in range(h):
            for j in range(w):
                alpha += float(G[k, i, j]) / (h * w)
        L += alpha * A[k]
    return L


def layer_cam(A: Tensor, G: Tensor) -> Tensor:
    """Jiang et al. 2021: each place has its own weight, the positive part of its gradient."""
    K, h, w = A.shape
    M = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        for i in range(h):
            for j in range(w):
                M[i, j] += max(float(G[k, i, j]), 0.0) * A[k, i, j]
    return M


def upsample(coarse: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, pixel centres at half-integers, the border repeated: (h, w) -> (H, W)."""
    h, w = coarse.shape
    fine = torch.zeros(height, width, dtype=coarse.dtype)
    for y in range(height):
        v = min(max((y + 0.5) * h / height - 0.5, 0.0), h - 1.0)
        top, bottom, b = int(v), min(int(v) + 1, h - 1), v - int(v)
        for x in range(width):
            u = min(max((x + 0.5) * w / width - 0.5, 0.0), w - 1.0)
            left, right, a = int(u), min(int(u) + 1, w - 1), u - int(u)
            fine[y, x] = (1 - b) * ((1 - a) * coarse[top, left] + a * coarse[top, right])
            fine[y, x] += b * ((1 - a) * coarse[bottom, left] + a * coarse[bottom, right])
    return fine


def rectified(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.zeros_like(values))


def strongest(channels: Tensor) -> Tensor:
    """Simonyan et al. 2014 section 3.1: M_ij = max_c |w_cij|; (C, H, W) -> (H, W)."""
    C, H, W = channels.shape
    M = torch.zeros(H, W, dtype=channels.dtype)
    for c in range(C):
        for i in range(H):
            for j in range(W):
                M[i, j] = max(float(M[i, j]), abs(float(channels[c, i, j])))
    return M


class PreActivation(nn.Module):
    """x + conv(relu(bn(x))), He et al. 2016b: the ReLU stands on the branch alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.bn(x)))


class SmallNet(nn.Module):
    """A network (N, 3, 8, 8) -> (N, 4) that is also a list of steps, with a pre-activation block and ReLUs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.layer1 = PreActivation(6)
        self.layer2 = nn.Sequential(nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.fc = nn.Linear(5, 4)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))))

    def steps(self, after: str = "") -> list[Any]:
        """The steps that follow a stage; without one, all."""
        stem = [self.stem[0], self.stem[1], "relu"]
        block = [("residual", [self.layer1.bn, "relu", self.layer1.conv], [])]
        layer2 = [self.layer2[0], self.layer2[1], "relu"]
        follow = {"": [*stem, *block, *layer2], "stem": [*block, *layer2], "layer1": layer2, "layer2": []}
        return [*follow[after], self.head]


def small_net(seed: int = 0) -> SmallNet:
    """A SmallNet in float64 and evaluation mode, its batch norms far from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SmallNet().double()
        nn.init.normal_(net.fc.weight, std=3.0)  # maps and gradients of about 1
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.bias):
                    nn.init.normal_(tensor, std=0.3)
                for tensor in (module.running_var, module.weight):
                    nn.init.uniform_(tensor, 0.5, 2.0)
    return net.eval()


def small_images(n: int = 3, seed: int = 1, size: int = 8) -> Tensor:
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
