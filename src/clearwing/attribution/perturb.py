"""Perturbation rules: hide parts of the pictures or of a layer, run the network again, and see what the scores become.

A rule takes (network, images (N, C, H, W), question, generator), at a layer also its name, and its options. Variants of
all pictures run together, as many as fit in a pass, and none is kept, so the memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil, isfinite
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clearwing.attribution.network import Network, check_count, wide
from clearwing.attribution.targets import Question
from clearwing.attribution.views import upsample
from clearwing.types import ClearwingError


def score_cam(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    layer: str,
    budget: int | None = None,
) -> Tensor:
    """Score-CAM, Wang et al. 2020 algorithm 1: a map (N, h, w).

    H^k = s(Up(A^k)), each channel upsampled and brought to [0, 1]; S^k = f(X o H^k) - f(X_b) with f the score (of a
    class, its logit); alpha = softmax of S over the channels; sum_k alpha_k A^k less its ReLU. The softmax does not see
    what all S^k share, so f(X_b) need not be computed, and no baseline X_b can be chosen. A channel that is constant
    gives no mask, and has no weight.

    budget: the most masks of a picture; the channels with the largest max - min are taken, the others have no weight.
    """
    _check_budget(budget)
    A = wide(network.record(images, [layer], inputs=False).features[layer])  # (N, C, h, w)
    channels, spread = _largest(A.amax((2, 3)) - A.amin((2, 3)), budget)  # (K, N)
    A = A[torch.arange(len(A), device=A.device), channels]  # (K, N, h, w)
    S = torch.zeros_like(spread)
    for part in network.groups(*S.shape):
        H = upsample(A[part], images.shape[2], images.shape[3])
        low, high = H.amin((2, 3), keepdim=True), H.amax((2, 3), keepdim=True)
        H = (H - low) / torch.where(high == low, 1, high - low)
        S[part] = _ask(network, images * H[:, :, None].to(images.dtype), question.of)
    alpha = S.masked_fill(spread == 0, -torch.inf).softmax(0)
    return (torch.where(spread == 0, 0, alpha)[..., None, None] * A).sum(0)


def ablation_cam(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    layer: str,
    budget: int | None = None,
) -> Tensor:
    """Ablation-CAM, Desai and Ramaswamy 2020: w_k = (y - y_k) / |y|, sum_k w_k A^k less its ReLU, a map (N, h, w).

    y is the score, and y_k the score when A^k is zero (of tokens, those of the picture: a class token stays). The paper
    divides by y, which for a score below zero would show the evidence against the class as evidence for it: hence the
    magnitude. A score of exactly zero divides nothing.

    Where the network allows it, which is tried first, only what follows the layer runs for each channel: one picture
    enters, and variants of what left the layer go on. In a residual block the other branch holds that one picture,
    which broadcasts. Else whole passes are run. Not under bfloat16 autocast, whose last digit of y is more than most
    y - y_k.

    budget: the most channels of a picture to try; those with the largest sum |A^k| are, the others have no weight.
    """
    _check_budget(budget)
    network = _in_full(network)
    trace = network.record(images, [layer], inputs=False)
    A, logits, place = wide(trace.features[layer]), wide(trace.logits), trace.places[layer]
    del trace  # and its graph
    y = question.of(logits)  # (N,)
    channels, _ = _largest(A.abs().sum((2, 3)), budget)  # (K, N)
    resumes = _resumes(network, images[:1], place, logits[:1])
    if resumes:  # a variant takes the room of a layer's output; a stem puts out 4 times a picture or more
        network = replace(network, batch=network.batch * max(1, 4 * images[0].numel() // A[0].numel()))

    def ablated(n: int, chosen: Tensor) -> Tensor:
        """The logits of picture n without each of the chosen channels (S,): (S, K)."""
        pictures = images[n : n + 1] if resumes else images[n : n + 1].expand(len(chosen), -1, -1, -1)
        return network.logits_from(pictures, place, partial(_without, channels=chosen), len(chosen))

    w = A.new_zeros(channels.shape)
    for part in network.groups(len(channels), 1):
        y_k = question.of(torch.stack([ablated(n, channels[part, n]) for n in range(len(A))], 1))  # (S, N)
        w[part] = y - y_k
    w /= torch.where(y == 0, 1, y.abs())
    return (w[..., None, None] * A[torch.arange(len(A), device=A.device), channels]).sum(0)


def rise(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    masks: int = 1000,
    cells: int = 7,
    probability: float = 0.5,
) -> Tensor:
    """RISE, Petsiuk et al. 2018 eq. 6 less its mean: 1 / (E[M] n) sum_i (f(I o M_i) - f) M_i, a map (N, H, W).

    f(.) is a probability, f its mean over the masks. Without it (eq. 6) every map lies on that floor, and the noise of
    how often a place was seen is added to it; with it zero says that to see this place changes nothing.

    A mask (section 3.2): cells x cells draws of 0 or 1, upsampled to (cells + 1) times the size of a cell, and a window
    of the picture's size at a random place in it. What is hidden is 0. The masks are the same for every picture.

    masks: their number n; the paper's are 4000 to 8000. cells: on a side, as in the paper. probability: of a cell to
    be seen, which is E[M]. Of a caller's function of the logits f is the function itself.
    """
    check_count("masks", masks)
    check_count("cells", cells)
    if not _number(probability) or not 0 < probability < 1:
        raise ClearwingError("options", f"probability={probability!r}", "give a number between 0 and 1, such as 0.5")
    drawn = torch.rand(masks, cells * cells + 2, generator=generator, dtype=torch.float64).to(images.device)
    total = torch.zeros_like(wide(images[:, 0]))
    seen, mean = torch.zeros_like(total[0]), torch.zeros_like(total[:, 0, 0])
    for part in network.groups(masks, len(images)):
        grids = (drawn[part, 2:] < probability).to(total.dtype).unflatten(1, (cells, cells))
        M = _windows_of(grids, drawn[part, :2], images.shape[2], images.shape[3])
        f = _ask(network, images * M[:, None, None].to(images.dtype), question.shares)
        total += torch.einsum("sn,shw->nhw", f, M)
        seen += M.sum(0)
        mean += f.sum(0) / masks
    return (total - mean[:, None, None] * seen) / (probability * masks)


def occlusion(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    window: int | None = None,
    stride: int | None = None,
    value: float = 0.0,
) -> Tensor:
    """Occlusion, Zeiler and Fergus 2014 section 4.2: how far the score falls when a square is hidden, a map (N, H, W).

    A pixel has the mean over the windows that cover it. The last window of a row ends with the picture, so that every
    pixel is covered. Not under bfloat16 autocast, for falls are smaller than its last digit.

    window: side of the square in pixels; None is an eighth of the picture's shorter side. stride: from one to the next;
    None is half a window. value: what the square is filled with.
    """
    H, W = images.shape[2:]
    window = max(1, min(H, W) // 8) if window is None else window
    check_count("window", window, min(H, W))
    stride = max(1, window // 2) if stride is None else stride
    check_count("stride", stride, window)
    if not _number(value):
        raise ClearwingError("options", f"value={value!r}", "give the number to fill the window with, such as 0.0")
    network = _in_full(network)
    rows, columns = (_spans(side, window, stride).to(images.device) for side in (H, W))  # (R, H), (Q, W)
    y = question.of(network.logits(images))
    drop = y.new_zeros(len(rows) * len(columns), len(images))
    for part in network.groups(*drop.shape):
        index = torch.arange(part.start, part.stop, device=images.device)
        hidden = rows[index // len(columns), :, None] & columns[index % len(columns), None]  # (S, H, W)
        drop[part] = y - _ask(network, torch.where(hidden[:, None, None], value, images), question.of)
    rows, columns = rows.to(drop), columns.to(drop)
    covering = rows.sum(0)[:, None] * columns.sum(0)
    return torch.einsum("rqn,rh,qw->nhw", drop.unflatten(0, (len(rows), len(columns))), rows, columns) / covering


def _in_full(network: Network) -> Network:
    """The network in float32 where bfloat16 was asked for; a bfloat16 network stays what it is."""
    return replace(network, precision=network.precision and "float32")


def _ask(network: Network, variants: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores (S, N) of variants (S, N, C, H, W)."""
    return score(network.logits(variants.flatten(0, 1)).unflatten(0, variants.shape[:2]))


def _largest(sizes: Tensor, budget: int | None) -> tuple[Tensor, Tensor]:
    """The channels (K, N) of largest size (N, C), the largest first, and these sizes; at most `budget`.

    Channels that have no size in any picture are left out: masked or ablated, they change nothing.
    """
    most = int((sizes != 0).sum(1).max())
    sizes, channels = sizes.sort(dim=1, descending=True, stable=True)
    kept = most if budget is None else min(most, budget)
    return channels[:, :kept].T, sizes[:, :kept].T


def _resumes(network: Network, picture: Tensor, place: tuple[nn.Module, int], logits: Tensor) -> bool:
    """Whether the pass of one picture goes on rightly with several variants of what left the layer.

    Tried with the output, zeros and the output again: the first and the last must give the plain logits (1, K).
    """

    def change(feature: Tensor) -> Tensor:
        return torch.cat((feature, torch.zeros_like(feature), feature))

    try:
        found = network.logits_from(picture, place, change, 3)
    except (RuntimeError, ValueError, IndexError, AssertionError):  # what a network says of shapes that do not fit
        return False
    rounding = torch.finfo(picture.dtype).eps ** 0.5
    return bool(((found[::2] - logits).abs() <= rounding * logits.abs().amax()).all())


def _without(feature: Tensor, channels: Tensor) -> Tensor:
    """What left a layer (1 or S, C, h, w), without one of the channels (S,) in each of S copies."""
    copies = feature.expand(len(channels), *feature.shape[1:]).clone()
    copies[torch.arange(len(channels), device=feature.device), channels] = 0
    return copies


def _windows_of(grids: Tensor, places: Tensor, H: int, W: int) -> Tensor:
    """Masks (S, H, W) of grids (S, cells, cells), cut out at places (S, 2) in [0, 1) of the room there is."""
    cells = grids.shape[1]
    cell = ceil(H / cells), ceil(W / cells)
    fine = F.interpolate(grids[:, None], [(cells + 1) * side for side in cell], mode="bilinear")[:, 0]
    y, x = ((places[:, i] * (cell[i] + 1)).long() for i in range(2))  # indents from 0 to the size of a cell
    return fine.unfold(1, H, 1).unfold(2, W, 1)[torch.arange(len(grids), device=grids.device), y, x]


def _spans(side: int, window: int, stride: int) -> Tensor:
    """Where windows along a side lie, bool (R, side); the last ends with the side."""
    starts = torch.tensor([*range(0, side - window, stride), side - window])[:, None]
    place = torch.arange(side)
    return (place >= starts) & (place < starts + window)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _check_budget(budget: int | None) -> None:
    if budget is not None:
        check_count("budget", budget)
