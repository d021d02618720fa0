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


Gradient = Callable[[Tensor], Tensor]  # (1, C, H, W) -> the gradient of the score there, of the same shape


def noisy(x: Tensor, noise: Sequence[Tensor], share: float) -> list[Tensor]:
    """Smilkov et al. 2017: x + N(0, sigma^2), the noise level sigma / (x_max - x_min) being given; noise of sigma 1."""
    sigma = share * (float(x.max()) - float(x.min()))
    return [x + sigma * one for one in noise]


def smoothgrad(gradient: Gradient, copies: Sequence[Tensor]) -> Tensor:
    """Smilkov et al. 2017: 1/n sum_1^n M(x + N(0, sigma^2))."""
    M = torch.zeros_like(copies[0])
    for copy in copies:
        M += gradient(copy) / len(copies)
    return M


def vargrad(gradient: Gradient, copies: Sequence[Tensor]) -> Tensor:
    """Adebayo et al. 2018: Var(M(x + g_i)), the mean squared distance from the mean."""
    mean, V = smoothgrad(gradient, copies), torch.zeros_like(copies[0])
    for copy in copies:
        V += (gradient(copy) - mean) ** 2 / len(copies)
    return V


def expected_gradients(gradient: Gradient, x: Tensor, draws: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Erion et al. 2021: the mean of (x - x') times the gradient at x' + alpha (x - x'), over draws of (x', alpha).

    Integrated gradients, Sundararajan et al. 2017 eq. 1, where x' is the baseline and alpha runs over [0, 1].
    """
    phi = torch.zeros_like(x)
    for start, alpha in draws:
        phi += (x - start) * gradient(start + alpha * (x - start)) / len(draws)
    return phi


def smooth_grad_cam_plus_plus(A: Tensor, copies: Sequence[Tensor]) -> Tensor:
    """Omeiza et al. 2019, with the numerator of Grad-CAM++; A and the copies' G (K, h, w) of one picture -> (h, w).

    For Y = exp(S), whose p-th derivative is exp(S) G^p (Chattopadhay et al. 2018 eq. 16 to 18); exp(S) cancels.
    """
    K, h, w = A.shape
    L = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        weight = 0.0
        for i in range(h):
            for j in range(w):
                D1, D2, D3 = (sum(float(G[k, i, j]) ** p for G in copies) / len(copies) for p in (1, 2, 3))
                below = 2 * D2 + float(A[k].sum()) * D3
                weight += max(D1, 0.0) * (D2 / below if below != 0 else 0.0)
        L += weight * A[k]
    return L


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


# the CAM family and FullGrad


def grad_cam_plus_plus(A: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Chattopadhay et al. 2018, from the derivatives of Y by each A^k_ij, all (K, h, w): alpha, w and the map."""
    K, h, w = A.shape
    L = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        total = float(A[k].sum())
        weight = 0.0
        for i in range(h):
            for j in range(w):
                below = 2 * float(second[k, i, j]) + total * float(third[k, i, j])
                alpha = float(second[k, i, j]) / below if below != 0 else 0.0
                weight += alpha * max(float(first[k, i, j]), 0.0)
        L += weight * A[k]
    return L


def derivatives(score: Callable[[Tensor], Tensor], at: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first, second and third derivative of a function (B, ...) -> (B,) by each value of a tensor (1, ...)."""
    shifts = step * torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape[1:])
    right, left, here = score(at + shifts), score(at - shifts), score(at)
    first = (right - left) / (2 * step)
    second = (right - 2 * here + left) / step**2
    third = (score(at + 2 * shifts) - 2 * right + 2 * left - score(at - 2 * shifts)) / (2 * step**3)
    return first.reshape(at.shape), second.reshape(at.shape), third.reshape(at.shape)


def xgrad_cam(A: Tensor, G: Tensor) -> Tensor:
    """Fu et al. 2020: a channel's weight is the mean of its gradient, weighted by the activation."""
    L = torch.zeros(A.shape[1:], dtype=A.dtype)
    for a, g in zip(A, G, strict=True):
        shares = a / a.sum() if float(a.sum()) != 0 else torch.zeros_like(a)
        L += float((shares * g).sum()) * a
    return L


def hires_cam(A: Tensor, G: Tensor) -> Tensor:
    """Draelos and Carin 2020: every place and channel by itself, then the sum of the channels."""
    return sum((g * a for a, g in zip(A, G, strict=True)), torch.zeros(A.shape[1:], dtype=A.dtype))


def element_wise(A: Tensor, G: Tensor) -> Tensor:
    """The same of the positive products alone."""
    return sum((rectified(g * a) for a, g in zip(A, G, strict=True)), torch.zeros(A.shape[1:], dtype=A.dtype))


def eigen_cam(A: Tensor) -> Tensor:
    """Muhammad and Yeasin 2020: O = U S V^T of the places by channels, O V_1, turned to agree with O 1."""
    h, w = A.shape[1:]
    places = torch.stack([A[:, i, j] for i in range(h) for j in range(w)])  # O, (h w, K)
    projection = places @ torch.linalg.svd(places).Vh[0]
    if float(projection @ places.sum(1)) < 0:
        projection = -projection
    return projection.reshape(h, w)


def full_gradients(steps: Steps, x: Tensor, R: Tensor) -> list[Tensor]:
    """Srinivas and Fleuret 2019: every affine step's bias times the gradient at its output.

    R is the gradient at the end of the steps. What an affine step makes of zeros is its bias.
    """
    values = [x]
    for step in steps:
        values.append(forward([step], values[-1]))
    shares = []
    for step, value in zip(reversed(steps), reversed(values[:-1]), strict=True):
        if isinstance(step, tuple):
            shares += full_gradients(step[1], value, R) + full_gradients(step[2], value, R)
        elif step != "relu":
            shares.append(R * step(torch.zeros_like(value)))
        R = ruled_gradient([step], value, R, "plain")
    return shares


def fullgrad(shares: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Srinivas and Fleuret 2019: the shares (1, K, h, w) of one picture -> (H, W); those without places go."""
    S = torch.zeros(height, width, dtype=shares[0].dtype)
    for share in shares:
        if share.ndim == 4:
            psi = share[0].abs()
            psi = (psi - psi.min()) / (psi.max() - psi.min())
            for channel in psi:
                S += upsample(channel, height, width)
    return S


def score_cam(f: Callable[[Tensor], float], X: Tensor, A: Tensor, chosen: Sequence[int]) -> Tensor:
    """Wang et al. 2020 algorithm 1 with X_b = 0, on the chosen channels: f of (C, H, W), A (K, h, w) -> (h, w).

    Channels that are constant are passed over, as they give no mask.
    """
    masks = {}
    for k in chosen:
        up = upsample(A[k], X.shape[1], X.shape[2])
        if up.max() > up.min():
            masks[k] = (up - up.min()) / (up.max() - up.min())
    S = {k: f(X * H) - f(torch.zeros_like(X)) for k, H in masks.items()}
    below = sum(math.exp(s) for s in S.values())
    L = torch.zeros(A.shape[1:], dtype=A.dtype)
    for k, s in S.items():
        L += math.exp(s) / below * A[k]
    return L


def ablation_cam(f: Callable[[Tensor], float], A: Tensor, chosen: Sequence[int]) -> Tensor:
    """Desai and Ramaswamy 2020, w_k = (y - y_k) / |y|: f of a layer's (K, h, w), for the chosen channels -> (h, w)."""
    L = torch.zeros(A.shape[1:], dtype=A.dtype)
    for k in chosen:
        ablated = A.clone()
        ablated[k] = 0.0
        L += (f(A) - f(ablated)) / abs(f(A)) * A[k]
    return L


def rise_mask(grid: Tensor, indent: tuple[int, int], height: int, width: int) -> Tensor:
    """Petsiuk et al. 2018 section 3.2: a grid (h, w) upsampled to (h + 1) C_H x (w + 1) C_W, and cropped."""
    (h, w), (y, x) = grid.shape, indent
    fine = upsample(grid, (h + 1) * math.ceil(height / h), (w + 1) * math.ceil(width / w))
    return fine[y : y + height, x : x + width]


def rise(f: Callable[[Tensor], float], X: Tensor, masks: Sequence[Tensor], p: float) -> Tensor:
    """Petsiuk et al. 2018 eq. 6, of f less its mean: X (C, H, W), masks (H, W) with the expectation p -> (H, W)."""
    mean = sum(f(X * M) for M in masks) / len(masks)
    S = torch.zeros(X.shape[1:], dtype=X.dtype)
    for M in masks:
        S += (f(X * M) - mean) * M
    return S / (p * len(masks))


def occlusion(f: Callable[[Tensor], float], X: Tensor, window: int, stride: int, value: float) -> Tensor:
    """Zeiler and Fergus 2014: the mean fall of f over the squares on a pixel; the last ends with the picture."""
    _, H, W = X.shape
    total, count = torch.zeros(H, W, dtype=X.dtype), torch.zeros(H, W, dtype=X.dtype)
    for top in sorted({*range(0, H - window, stride), H - window}):
        for left in sorted({*range(0, W - window, stride), W - window}):
            hidden = X.clone()
            hidden[:, top : top + window, left : left + window] = value
            total[top : top + window, left : left + window] += f(X) - f(hidden)
            count[top : top + window, left : left + window] += 1
    return total / count


class TinyBlock(nn.Module):
    """One block of `TinyViT`, of two heads."""

    def __init__(self, spelled: str) -> None:
        super().__init__()
        self.spelled = spelled
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # (N, heads, T, d) each
        if self.spelled == "fused":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.spelled == "function":
            out = F.softmax(q @ k.mT / 2, dim=-1) @ v
        else:
            out = (q @ k.mT / 2).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """A vision transformer (N, 3, H, W) -> (N, 4) with patches of 4 x 4 pixels, for every even split into them.

    prefix: tokens before those of the picture. read: "first" token, "both" of the first two, "mean" of the picture's.
    spelled: attention "fused", or a softmax as a "function" or a "method".
    """

    def __init__(self, prefix: int = 1, read: str = "first", spelled: str = "fused") -> None:
        super().__init__()
        self.embed, self.prefix = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, prefix, 8))
        self.blocks = nn.Sequential(TinyBlock(spelled), TinyBlock(spelled))
        self.norm, self.head, self.read = nn.LayerNorm(8), nn.Linear(8, 4), read

    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat((self.prefix.expand(len(x), -1, -1), self.embed(x).flatten(2).mT), 1)

    def answer(self, x: Tensor) -> Tensor:
        x, p = self.norm(x), self.prefix.shape[1]
        read = {"first": slice(1), "both": slice(2), "mean": slice(p, None)}[self.read]
        return self.head(x[:, read].mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.blocks(self.tokens(x)))


def tiny_vit(prefix: int = 1, read: str = "first", spelled: str = "fused", seed: int = 0) -> TinyViT:
    """A TinyViT in float64 and evaluation mode, of attention far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyViT(prefix, read, spelled).double()
        for block in net.blocks:
            nn.init.normal_(block.qkv.weight)
        nn.init.normal_(net.head.weight)
    return net.eval()


def attention_pass(net: TinyViT, x: Tensor, given: dict[int, Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, K) of a TinyViT and its attention (B, heads, T, T); those of `given` stand in for a layer's own."""
    x, matrices = net.tokens(x), []
    for number, block in enumerate(net.blocks):
        q, k, v = block.qkv(block.norm1(x)).split(8, dim=2)
        A = torch.zeros(len(x), 2, x.shape[1], x.shape[1], dtype=x.dtype)
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            weights = torch.exp(torch.einsum("bie,bje->bij", q[..., part], k[..., part]) / math.sqrt(4))
            A[:, head] = weights / weights.sum(2, keepdim=True)
        A = A if given is None else given.get(number, A)
        matrices.append(A)
        out = torch.cat([torch.einsum("bij,bje->bie", A[:, h], v[..., 4 * h : 4 * h + 4]) for h in range(2)], 2)
        x = x + block.proj(out)
        x = x + block.mlp(block.norm2(x))
    return net.answer(x), matrices


def attention_rollout(matrices: Sequence[Tensor]) -> Tensor:
    """Abnar and Zuidema 2020, eq. 1 with A = 0.5 W_att + 0.5 I, of one picture's (heads, T, T) -> (T, T)."""
    T = matrices[0].shape[-1]
    rollout = torch.eye(T, dtype=matrices[0].dtype)
    for W in matrices:
        A = torch.zeros_like(rollout)
        for i in range(T):
            for j in range(T):
                A[i, j] = 0.5 * sum(float(head[i, j]) for head in W) / len(W) + 0.5 * (i == j)
            A[i] /= A[i].sum()
        rollout = A @ rollout
    return rollout


def gradient_attention(matrices: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Chefer et al. 2021, eq. 5 and 6, of one picture's (heads, T, T) -> R (T, T)."""
    T = matrices[0].shape[-1]
    R = torch.eye(T, dtype=matrices[0].dtype)
    for A, G in zip(matrices, gradients, strict=True):
        A_bar = torch.zeros_like(R)
        for i in range(T):
            for j in range(T):
                A_bar[i, j] = sum(max(float(g[i, j] * a[i, j]), 0.0) for a, g in zip(A, G, strict=True)) / len(A)
        R = R + A_bar @ R
    return R
