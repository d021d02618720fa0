"""Slow float64 layer-wise relevance propagation, written from its papers without autograd and without gradients.

A network is a list of steps: ("conv", f), ("linear", f) or ("mean", f) with an affine function f of (B, ...), a
convolution together with its batch norm; the word "relu"; ("largest", size), a pool; or ("residual", branch, shortcut)
with two such lists that are added. Relevance itself is carried down, and what each layer absorbs is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import SmallNet


def run(steps: list[Any], x: Tensor) -> Tensor:
    for step in steps:
        if step == "relu":
            x = torch.where(x > 0, x, torch.zeros_like(x))
        elif step[0] == "residual":
            x = run(step[1], x) + run(step[2], x)
        elif step[0] == "largest":
            x = F.max_pool2d(x, step[1])
        else:
            x = step[1](x)
    return x


def relevance(
    steps: list[Any], x: Tensor, R: Tensor, rule: str, epsilon: float, gamma: float = 0.25
) -> tuple[Tensor, float]:
    """The relevance of x (1, ...), where R is that of the output (1, ...), and what was absorbed on the way."""
    absorbed = 0.0
    values = [x]
    for step in steps:
        values.append(run([step], values[-1]))
    for step, value, output in reversed(list(zip(steps, values[:-1], values[1:], strict=True))):
        if step == "relu":
            continue
        if step[0] == "residual":
            branch = run(step[1], value)  # Bach et al. 2015 eq. 56: in proportion to the contributions
            of_branch = torch.where(output != 0, R * branch / output, torch.zeros_like(R))
            of_shortcut = torch.where(output != 0, R * (output - branch) / output, torch.zeros_like(R))
            down, lost = relevance(step[1], value, of_branch, rule, epsilon, gamma)
            beside, lost_beside = relevance(step[2], value, of_shortcut, rule, epsilon, gamma)
            R, absorbed = down + beside, absorbed + lost + lost_beside
        elif step[0] == "largest":
            R = _to_the_largest(value, R, step[1])
        else:
            linear_rule = rule if step[0] == "conv" else "epsilon"
            R, lost = _shared(step[1], value, R, linear_rule, 0.0 if step[0] == "mean" else epsilon, gamma)
            absorbed += lost
    return R, absorbed


def _shared(
    affine: Callable[[Tensor], Tensor], x: Tensor, R: Tensor, rule: str, epsilon: float, gamma: float
) -> tuple[Tensor, float]:
    """Share R_j among the contributions z_ij = x_i w_ij; what the bias and epsilon hold is absorbed."""
    units = torch.eye(math.prod(x.shape), dtype=x.dtype).reshape(-1, *x.shape[1:])
    bias = affine(torch.zeros_like(x))
    w = (affine(units) - bias).flatten(1)  # (I, J)
    z = x.flatten()[:, None] * w
    b = bias.flatten()
    total = z.sum(0) + b
    if rule == "zplus":  # Bach et al. 2015 eq. 60, alpha 1 and beta 0, without the bias
        z, b = z.clamp(min=0), torch.zeros_like(b)
    if rule == "gamma":  # Montavon et al. 2019: what has the sign of the sum counts 1 + gamma times, the bias too
        agrees = total > 0
        z = z * torch.where((z > 0) == agrees, 1 + gamma, 1.0)
        b = b * torch.where((b > 0) == agrees, 1 + gamma, 1.0)
    d = z.sum(0) + b
    away = epsilon * d.square().mean().sqrt()  # Bach et al. 2015 eq. 58
    away = torch.where(d < 0, -away, away)
    per_unit = torch.where(d + away != 0, R.flatten() / (d + away), torch.zeros_like(d))
    return (z * per_unit).sum(1).reshape(x.shape), float(((b + away) * per_unit).sum())


def _to_the_largest(x: Tensor, R: Tensor, size: int) -> Tensor:
    down = torch.zeros_like(x)
    for c in range(R.shape[1]):
        for i in range(R.shape[2]):
            for j in range(R.shape[3]):
                k = int(x[0, c, i * size : (i + 1) * size, j * size : (j + 1) * size].argmax())
                down[0, c, i * size + k // size, j * size + k % size] += R[0, c, i, j]
    return down


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)), He et al. 2016a."""

    def __init__(self, width: int, new: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, new, 3, stride, 1, bias=False),
            nn.BatchNorm2d(new),
            nn.ReLU(inplace=True),
            nn.Conv2d(new, new, 3, 1, 1),
            nn.BatchNorm2d(new),
        )
        self.shortcut = nn.Sequential()
        if new != width:
            self.shortcut.extend([nn.Conv2d(width, new, 1, stride, bias=False), nn.BatchNorm2d(new)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += self.shortcut(x)
        return F.relu_(out)


class ResidualNet(nn.Module):
    """A network (N, 3, 8, 8) -> (N, 4) with a max pool, an identity and a projection shortcut, ReLUs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.layer1, self.layer2 = Residual(4, 4), Residual(4, 6, 2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))

    def steps(self) -> list[Any]:
        blocks = []
        for block in (self.layer1, self.layer2):
            blocks += [("residual", merged(block.branch), merged(block.shortcut)), "relu"]
        return [*merged(self.stem), *blocks, ("mean", lambda x: x.mean((2, 3))), ("linear", self.fc)]


def residual_net(seed: int = 0) -> ResidualNet:
    """A ResidualNet in float64 and evaluation mode; some of its batch norms turn the sign."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ResidualNet().double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.bias):
                    nn.init.normal_(tensor, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.weight)
    return net.eval()


def small_net_steps(net: SmallNet) -> list[Any]:
    """A SmallNet: the batch norm of its block stands before the ReLU, and is a linear layer of its own."""
    block = [("linear", net.layer1.bn), "relu", ("conv", net.layer1.conv)]
    head = [("mean", lambda x: x.mean((2, 3))), ("linear", net.fc)]
    return [*merged(net.stem), ("residual", block, []), *merged(net.layer2), *head]


def merged(modules: nn.Sequential) -> list[Any]:
    """The steps of convolutions with their batch norms, ReLUs and max pools."""
    steps: list[Any] = []
    for module, following in zip_longest(modules, list(modules)[1:]):
        if isinstance(module, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            steps.append(("conv", nn.Sequential(module, following).eval()))
        elif isinstance(module, nn.Conv2d):
            steps.append(("conv", module))
        elif isinstance(module, nn.ReLU):
            steps.append("relu")
        elif isinstance(module, nn.MaxPool2d):
            steps.append(("largest", module.kernel_size))
    return steps
