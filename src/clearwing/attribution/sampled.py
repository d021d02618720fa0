"""Sampled rules: gradients at many copies of the pictures, noisy or on a path from a baseline, made into one answer.

A rule takes (network, images (N, C, H, W), question, generator) and its options. Copies of all pictures run together,
as many as fit in a pass, and are added up at once, so the memory does not grow with their number. What is drawn is
drawn copy by copy and shared by the pictures, so that neither their number nor the size of a pass changes it.
An option out of its range raises ClearwingError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from clearwing.attribution.cams import weighted
from clearwing.attribution.modules import INPUT
from clearwing.attribution.network import Network, check_count, wide
from clearwing.attribution.targets import Question
from clearwing.types import ClearwingError


def smoothgrad(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    samples: int = 25,
    noise: float = 0.15,
) -> Tensor:
    """The mean gradient over noisy copies of a picture, Smilkov et al. 2017 section 3: (N, C, H, W).

    samples: copies of each picture, the paper's n.
    noise: sigma / (x_max - x_min), the standard deviation as a share of the picture's own range of values.
    """
    total = torch.zeros_like(wide(images))
    for copies in _noisy(network, images, generator, samples, noise):
        total += _gradients(network, copies, question).sum(0)
    return total / samples


def vargrad(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    samples: int = 25,
    noise: float = 0.15,
) -> Tensor:
    """The variance of the gradient over noisy copies of a picture, Adebayo et al. 2018: (N, C, H, W).

    The mean of squares less the square of the mean. `samples` and `noise` are those of `smoothgrad`.
    """
    first, total, squares = None, torch.zeros_like(wide(images)), torch.zeros_like(wide(images))
    for copies in _noisy(network, images, generator, samples, noise):
        G = _gradients(network, copies, question)
        first = G[0].clone() if first is None else first
        G = G - first  # a variance does not know of it, and small differences of large squares lose no digits
        total += G.sum(0)
        squares += G.square().sum(0)
    return (squares / samples - (total / samples).square()).clamp(min=0)


def smooth_grad_cam_plus_plus(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    layer: str,
    samples: int = 25,
    noise: float = 0.15,
) -> Tensor:
    """Smooth Grad-CAM++, Omeiza et al. 2019: Grad-CAM++ with derivatives averaged over noisy copies, (N, h, w).

    With D_p the mean over the copies of G^p, the p-th derivative of exp(score) less its factor exp(score):
    alpha_ij = D_2 / (2 D_2 + sum_ab A_ab D_3), w = sum_ij alpha_ij relu(D_1), sum_k w_k A^k less its ReLU, where A is
    the activation of the picture itself. The numerator is that of Grad-CAM++ (Chattopadhay et al. 2018 eq. 19), to
    which this comes down without noise; Omeiza et al. print D_1 there, which has another unit than the denominator.

    `samples` and `noise` are those of `smoothgrad`.
    """
    A = wide(network.record(images, [layer], inputs=False).features[layer])
    D1, D2, D3 = (torch.zeros_like(A) for _ in range(3))
    for copies in _noisy(network, images, generator, samples, noise):
        G = _gradients(network, copies, question, layer)
        for p, D in enumerate((D1, D2, D3), 1):
            D += G.pow(p).sum(0) / samples
    below = 2 * D2 + A.sum((2, 3), keepdim=True) * D3
    alpha = torch.where(below != 0, D2 / below, 0)
    w = (alpha * D1.clamp(min=0)).sum((2, 3))  # (N, C)
    return weighted(w, A)


def integrated_gradients(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    steps: int = 32,
    baseline: float | Tensor | Callable[[Tensor], Tensor] = 0.0,
) -> Tensor:
    """(x - x') times the mean gradient on the line from a baseline x' to x, Sundararajan et al. 2017 eq. 1 and 3.

    The answer (N, C, H, W) sums to score(x) - score(x') up to the error of the steps.

    steps: points on the line, in the middle of equal parts of it. In a network of ReLUs the gradient jumps along the
    line, and Gauss-Legendre points come less near to the integral.
    baseline: one value for all; a tensor that broadcasts to a picture (C, H, W); or a function of images (n, C, H, W)
    that gives a baseline for each, such as a blurred copy.
    """
    check_count("steps", steps)
    x = wide(images)
    start = _baseline(baseline, x)
    alpha = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return _on_paths(network, images, question, alpha, lambda part: start)


def expected_gradients(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    samples: int = 32,
    references: Tensor | None = None,
) -> Tensor:
    """The expectation of (x - x') times the gradient at x' + alpha (x - x'), Erion et al. 2021: (N, C, H, W).

    samples: draws of (x', alpha), the same for each picture. alpha is drawn once in each of so many equal parts of
    [0, 1], and no x' comes again before all have come: each draw is as uniform as the paper's, their mean is nearer.
    references: background pictures (R, C, h, w) to draw x' from, resized where they are of another size. Without them
    x' is a flat picture in the colour of a random place of the picture itself: the score is then shared out against
    pictures of the same colours without any shape, and no one colour is blind, as black is with a black baseline.
    """
    check_count("samples", samples)
    _check_references(references, images)
    x = wide(images)
    alpha = (torch.arange(samples) + torch.rand(samples, generator=generator, dtype=torch.float64)) / samples
    places = x.shape[2] * x.shape[3] if references is None else len(references)
    rounds = [torch.randperm(places, generator=generator) for _ in range(0, samples, places)]
    drawn = torch.cat(rounds)[:samples]

    def start(part: slice) -> Tensor:
        if references is None:
            colours = x.flatten(2)[:, :, drawn[part].to(x.device)]  # (N, C, g)
            return colours.permute(2, 0, 1)[..., None, None]
        some = references.detach()[drawn[part].to(references.device)].to(x)
        if some.shape[2:] != x.shape[2:]:
            some = F.interpolate(some, x.shape[2:], mode="bilinear", antialias=True)
        return some[:, None]

    return _on_paths(network, images, question, alpha, start)


def _on_paths(
    network: Network, images: Tensor, question: Question, alpha: Tensor, start: Callable[[slice], Tensor]
) -> Tensor:
    """The mean over s of (x - x'_s) times the gradient at x'_s + alpha_s (x - x'_s): alpha (S,) -> (N, C, H, W).

    start: a slice of s to the x'_s, which broadcast to (g, N, C, H, W).
    """
    x = wide(images)
    total = torch.zeros_like(x)
    for part in network.groups(len(alpha), len(x)):
        x_s = start(part)
        away = x - x_s
        points = x_s + alpha[part].to(x).reshape(-1, 1, 1, 1, 1) * away
        total += (away * _gradients(network, points.to(images.dtype), question)).sum(0)
    return total / len(alpha)


def _noisy(
    network: Network, images: Tensor, generator: torch.Generator, samples: int, noise: float
) -> Iterator[Tensor]:
    """Noisy copies of all pictures, (g, N, C, H, W) at a time: the same noise on each, times the sigma of its own."""
    check_count("samples", samples)
    if isinstance(noise, bool) or not isinstance(noise, Real) or not isfinite(noise) or noise < 0:
        raise ClearwingError("options", f"noise={noise!r}", "give sigma as a share of a picture's range, such as 0.15")
    x = wide(images)
    sigma = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    for part in network.groups(samples, len(x)):
        drawn = [torch.randn(x.shape[1:], generator=generator) for _ in range(part.start, part.stop)]
        yield (x + sigma * torch.stack(drawn)[:, None].to(x)).to(images.dtype)


def _gradients(network: Network, copies: Tensor, question: Question, source: str = INPUT) -> Tensor:
    """The gradients of each picture's score at its copies (g, N, C, H, W), or at a layer of theirs (g, N, C, h, w)."""
    layers = [] if source == INPUT else [source]
    trace = network.record(copies.flatten(0, 1), layers, inputs=not layers)
    with torch.inference_mode(False), torch.enable_grad():
        scores = question.of(trace.logits.unflatten(0, copies.shape[:2])).flatten()
    return wide(trace.gradients(scores, of=(source,))[source]).unflatten(0, copies.shape[:2])


def _baseline(baseline: float | Tensor | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The baseline as a tensor that broadcasts to x (N, C, H, W)."""
    if isinstance(baseline, Real) and not isinstance(baseline, bool) and isfinite(baseline):
        return torch.full((), float(baseline)).to(x)
    mend = f"give a number, a floating tensor that broadcasts to a picture {tuple(x.shape[1:])}, or a function of "
    mend += "the images that gives as many"
    found = baseline(x) if callable(baseline) else baseline
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ClearwingError("options", f"baseline={baseline!r}", mend)
    whole = x.shape if callable(baseline) else (1, *x.shape[1:])
    if found.ndim > 4 or any(a not in (1, b) for a, b in zip(reversed(found.shape), reversed(whole), strict=False)):
        raise ClearwingError("options", f"a baseline of {tuple(found.shape)}", mend)
    return found.detach().to(x)


def _check_references(references: Tensor | None, images: Tensor) -> None:
    C = images.shape[1]
    mend = f"give floating background pictures (R, {C}, H, W), R at least 1"
    if references is None:
        return
    if not isinstance(references, Tensor) or not references.is_floating_point():
        what = references.dtype if isinstance(references, Tensor) else type(references).__name__
        raise ClearwingError("options", f"references of {what}", mend)
    if references.ndim != 4 or references.shape[1] != C or 0 in references.shape:
        raise ClearwingError("options", f"references of {tuple(references.shape)}", mend)
