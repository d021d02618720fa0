"""Perturbation methods: slow references, identities, peers, the shortcut of Ablation-CAM, and the state left behind."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Occlusion
from torch import Tensor, nn

import reference
from clearwing.attribution import perturb
from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.types import ClearwingError, Status
from reference import small_images, small_net

METHODS = ["score-cam", "ablation-cam", "rise", "occlusion"]
FEW = {"masks": 9, "cells": 3}
LAYERS = ["stem", "layer1", "layer2"]


def maps(net: nn.Module, images: Tensor, method: str, layer: str | None = None, **more: Any) -> Tensor:
    """Signed maps (N, M, H, W); RISE with few masks."""
    if method == "rise":
        more["options"] = FEW | more.get("options", {})
    layer = layer if method.endswith("cam") else None
    return explain(net, images, method, layer, relu=False, **more).maps


def activation(net: nn.Module, images: Tensor, layer: str) -> Tensor:
    return record(net, images, [layer]).features[layer].detach()


def score(net: nn.Module, c: int, share: bool = False) -> Callable[[Tensor], float]:
    def f(picture: Tensor) -> float:
        with torch.no_grad():
            logits = net(picture[None])[0]
        return float((logits.softmax(0) if share else logits)[c])

    return f


def above(net: Any, layer: str, c: int) -> Callable[[Tensor], float]:
    def f(A: Tensor) -> float:
        with torch.no_grad():
            return float(reference.forward(net.steps(layer), A[None])[0, c])

    return f


# against references written from the papers


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("budget", [None, 2])
def test_cams_equal_the_references(layer: str, budget: int | None) -> None:
    net, images = small_net(), small_images(2)
    found = {
        name: maps(net, images, name, layer, target=1, options={"budget": budget})
        for name in ("score-cam", "ablation-cam")
    }
    for n, A in enumerate(activation(net, images, layer)):
        spread = [float(a.max() - a.min()) for a in A]
        size = [float(a.abs().sum()) for a in A]
        wide, large = (
            sorted(range(len(A)), key=lambda k: -measure[k])[: budget or len(A)] for measure in (spread, size)
        )
        score_cam = reference.score_cam(score(net, 1), images[n], A, wide)
        ablation_cam = reference.ablation_cam(above(net, layer, 1), A, large)
        for name, coarse in (("score-cam", score_cam), ("ablation-cam", ablation_cam)):
            assert torch.allclose(found[name][n, 0], reference.upsample(coarse, 8, 8), rtol=0, atol=1e-12)
            assert coarse.abs().max() > 1e-2


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7)])
def test_rise_equals_the_reference(height: int, width: int) -> None:
    net, images = small_net(), small_images(2, size=9)[:, :, :height, :width]
    with torch.no_grad():
        net.fc.weight *= 0.1  # probabilities far from 0 and 1
    found = maps(net, images, "rise", target=1, seed=5, options={"probability": 0.4})
    drawn = torch.rand(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    cell = math.ceil(height / 3), math.ceil(width / 3)
    masks = []
    for row in drawn:
        indent = tuple(int(row[i] * (cell[i] + 1)) for i in range(2))
        grid = torch.tensor([[float(row[2 + 3 * i + j] < 0.4) for j in range(3)] for i in range(3)]).double()
        masks.append(reference.rise_mask(grid, indent, height, width))
    for n in range(2):
        expected = reference.rise(score(net, 1, share=True), images[n], masks, 0.4)
        assert torch.allclose(found[n, 0], expected, rtol=0, atol=1e-12)
        assert expected.max() > 1e-4


@pytest.mark.parametrize(("window", "stride", "value"), [(2, 2, 0.0), (3, 2, 0.5), (4, 1, -1.0), (7, 7, 0.0)])
def test_occlusion_equals_the_reference(window: int, stride: int, value: float) -> None:
    net, images = small_net(), small_images(2)[:, :, :7]
    options = {"window": window, "stride": stride, "value": value}
    found = maps(net, images, "occlusion", target=0, options=options)
    for n in range(2):
        expected = reference.occlusion(score(net, 0), images[n], window, stride, value)
        assert torch.allclose(found[n, 0], expected, rtol=0, atol=1e-12)
        assert expected.abs().max() > 1e-2


# against an installed peer


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (4, 2)])
def test_occlusion_equals_captum_where_the_windows_tile(window: int, stride: int) -> None:
    net, images = small_net().float(), small_images(2).float()
    peer = Occlusion(net).attribute(images, (3, window, window), (3, stride, stride), baselines=0.2, target=3)
    options = {"window": window, "stride": stride, "value": 0.2}
    assert torch.allclose(maps(net, images, "occlusion", target=3, options=options)[:, 0], peer[:, 0], atol=1e-5)


# identities


def test_at_the_last_stage_the_weights_of_ablation_cam_are_known() -> None:
    """With mean pooling and a linear head y - y_k = w_k mean(A^k)."""
    net, images = small_net(), small_images()
    A = activation(net, images, "layer2")
    y = net(images).detach()[:, 3]
    weights = net.fc.weight[3].detach() * A.mean((2, 3)) / y.abs()[:, None]
    expected = torch.stack([reference.upsample(coarse, 8, 8) for coarse in torch.einsum("nk,nkhw->nhw", weights, A)])
    assert torch.allclose(maps(net, images, "ablation-cam", "layer2", target=3)[:, 0], expected, atol=1e-13)


def test_ablation_cam_of_a_contrast_turns_round_with_it() -> None:
    net, images = small_net(), small_images()
    one, other = (maps(net, images, "ablation-cam", "layer1", target=pair) for pair in ((1, 2), (2, 1)))
    assert torch.allclose(one, -other, atol=1e-13)
    assert one.abs().max() > 1e-3


def test_a_score_of_zero_divides_nothing() -> None:
    net, images = small_net(), small_images()
    with torch.no_grad():
        net.fc.weight[0], net.fc.bias[0] = 0, 0
    e = explain(net, images, "ablation-cam", "layer1", target=0)
    assert e.status.tolist() == [[Status.ZERO]] * 3


def test_rise_of_a_constant_score_is_zero_and_of_one_pixel_points_at_it() -> None:
    options = {"masks": 4000, "cells": 4, "probability": 0.3}
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double().eval(), small_images(1)
    found = maps(net, images, "rise", target=lambda z: z[:, 0] * 0 + 2.0, options=options, chunk=500)
    assert torch.allclose(found, torch.zeros_like(found), atol=1e-12)  # whatever the noise of the masks
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[1, 8 * 2 + 5] = 1.0  # the pixel at (2, 5) of the first channel
    found = maps(net, images + 1, "rise", target=lambda z: z[:, 1], options=options, chunk=500)[0, 0]
    assert (int(found.argmax()) // 8, int(found.argmax()) % 8) == (2, 5)
    variance = found[2, 5] / (images[0, 0, 2, 5] + 1) * 0.3  # x E[(M - E M) M] / E[M]
    assert 0 < variance < 0.3 * 0.7  # less than a coin's, for the upsampling smooths


def test_occlusion_of_an_additive_network_is_what_the_window_held() -> None:
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double().eval(), small_images(2)
    held = (images * net[1].weight[1].detach().reshape(3, 8, 8)).sum(1)
    expected = nn.functional.avg_pool2d(held, 2).repeat_interleave(2, 1).repeat_interleave(2, 2) * 4
    found = maps(net, images, "occlusion", target=1, options={"window": 2, "stride": 2})
    assert torch.allclose(found[:, 0], expected, atol=1e-13)


def test_channels_that_are_constant_have_no_weight_in_score_cam() -> None:
    net, images = small_net(), small_images()
    plain = maps(net, images, "score-cam", "layer2", target=1)
    with torch.no_grad():
        net.layer2[1].weight[2], net.layer2[1].bias[2] = 0.0, 5.0  # a large constant channel
        net.layer2[1].weight[3], net.layer2[1].bias[3] = 0.0, -1.0  # a dead one
    found = maps(net, images, "score-cam", "layer2", target=1)
    A = activation(net, images, "layer2")
    for n in range(3):
        coarse = reference.score_cam(score(net, 1), images[n], A[n], range(5))
        assert torch.allclose(found[n, 0], reference.upsample(coarse, 8, 8), atol=1e-12)
    assert not torch.allclose(found, plain)
    with torch.no_grad():
        net.layer2[1].weight[:] = 0.0
    assert explain(net, images, "score-cam", "layer2").status.tolist() == [[Status.ZERO]] * 3


@pytest.mark.parametrize("method", ["score-cam", "ablation-cam"])
def test_a_budget_of_all_channels_is_no_budget(method: str) -> None:
    net, images = small_net(), small_images()
    whole = maps(net, images, method, "layer1", target=1)
    for budget in (6, 600):
        assert torch.equal(maps(net, images, method, "layer1", target=1, options={"budget": budget}), whole)
    assert not torch.allclose(maps(net, images, method, "layer1", target=1, options={"budget": 5}), whole)


def test_a_budget_bounds_the_pictures_that_run() -> None:
    net, images, seen = small_net(), small_images(2), list[int]()
    net.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    maps(net, images, "score-cam", "layer1", target=1, options={"budget": 3})
    masked = sum(seen)
    seen.clear()
    maps(net, images, "score-cam", "layer1", target=1)
    assert sum(seen) - masked == 2 * (6 - 3)


# batches, progress, targets


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_a_pass_changes_nothing(method: str) -> None:
    net, images = small_net(), small_images(5)
    target = torch.tensor([3, 1, 0, 2, 1])
    whole = maps(net, images, method, "layer1", target=target)
    for chunk in (1, 2, 7, 64):
        assert torch.allclose(maps(net, images, method, "layer1", target=target, chunk=chunk), whole, atol=1e-13)
    singles = [maps(net, images[n : n + 1], method, "layer1", target=int(target[n])) for n in range(5)]
    assert torch.allclose(torch.cat(singles), whole, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_progress_rises_to_the_end(method: str, chunk: int) -> None:
    told: list[tuple[float, float]] = []
    maps(small_net(), small_images(), method, "layer1", chunk=chunk, progress=lambda *done: told.append(done))
    done = [share for share, _ in told]
    assert {total for _, total in told} == {3}
    assert done == sorted(done)
    assert done[-1] == 3
    assert len({share for share in done if share % 1}) >= (2 if chunk == 3 else 6) or method == "ablation-cam"


@pytest.mark.parametrize("method", METHODS)
def test_contrasts_and_functions_are_asked(method: str) -> None:
    net, images = small_net(), small_images()
    contrast = maps(net, images, method, "layer1", target=(1, 3))

    def by_hand(z: Tensor) -> Tensor:
        z = z.softmax(1) if method == "rise" else z  # RISE asks for probabilities, and a function for what it wants
        return z[:, 1] - z[:, 3]

    assert torch.allclose(maps(net, images, method, "layer1", target=by_hand), contrast, atol=1e-13)
    assert not torch.allclose(maps(net, images, method, "layer1", target=1), contrast)


@pytest.mark.parametrize("method", ["ablation-cam", "occlusion"])
def test_differences_of_scores_are_not_lost_to_bfloat16(method: str) -> None:
    net, images = small_net(), small_images()
    found = [maps(net, images, method, "layer1", target=1, precision=p) for p in ("float32", "bfloat16")]
    assert torch.equal(*found)


# the shortcut of Ablation-CAM


class Around(nn.Module):
    """A network around small convolutions `one` and `two`; how they are joined is told by the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.relu, self.fc = nn.ReLU(), nn.LazyLinear(3)
            self.double().eval()(small_images(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(self.relu(self.one(x))))

    def join(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Residual(Around):
    def join(self, x: Tensor) -> Tensor:
        return self.relu(self.two(x) + x).mean((2, 3))


class InPlace(Around):
    """The target is on the shortcut, and the branch of one picture cannot take it in place."""

    def join(self, x: Tensor) -> Tensor:
        branch = x.clone()
        branch += self.two(x)
        return branch.relu().mean((2, 3))


class Dense(Around):
    def join(self, x: Tensor) -> Tensor:
        return torch.cat((self.two(x), x), 1).relu().mean((2, 3))


class Frames(Around):
    """Counts the pictures on its way in: with more later on it answers, but for their mean."""

    def forward(self, x: Tensor) -> Tensor:
        f = self.two(self.relu(self.one(x))).relu()
        pooled = f.reshape(len(x), -1, *f.shape[1:]).mean((1, 3, 4))
        return self.fc(pooled) + 0 * f.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("kind", "layer", "resumes"),
    [
        (Residual, "one", True),
        (Residual, "two", True),
        (Residual, "relu#0", True),
        (Residual, "relu#1", True),
        (Residual, "relu#-2", True),
        (InPlace, "one", True),
        (InPlace, "two", False),
        (Dense, "one", True),
        (Dense, "two", False),
        (Frames, "one", False),
        (Frames, "two", False),
    ],
)
def test_only_what_follows_the_layer_runs_where_that_is_right(
    kind: type[Around], layer: str, resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images, tried = kind(), small_images(), list[bool]()
    plain = perturb._resumes
    monkeypatch.setattr(perturb, "_resumes", lambda *args: tried.append(plain(*args)) or tried[-1])
    found = explain(net, images, "ablation-cam", layer, target=1, relu=False).maps
    assert tried == [resumes]
    monkeypatch.setattr(perturb, "_resumes", lambda *args: False)
    whole = explain(net, images, "ablation-cam", layer, target=1, relu=False).maps
    assert torch.allclose(found, whole, atol=1e-13)
    for n, A in enumerate(activation(net, images, layer)):
        picture, (module, call) = images[n], record(net, images, [layer]).places[layer]
        coarse = reference.ablation_cam(_put_back(net, picture, module, call), A, range(4))
        assert torch.allclose(found[n, 0], reference.upsample(coarse, 8, 8), atol=1e-12)
        assert coarse.abs().max() > 1e-4


def _put_back(net: nn.Module, picture: Tensor, module: nn.Module, call: int) -> Callable[[Tensor], float]:
    """The score of a picture as a function of what one call of a module puts out."""

    def f(A: Tensor) -> float:
        calls: list[int] = []
        handle = module.register_forward_hook(
            lambda *_: A[None] if (calls.append(0), len(calls) - 1)[1] == call else None
        )
        with torch.no_grad():
            found = float(net(picture[None])[0, 1])
        handle.remove()
        return found

    return f


def test_ablation_cam_of_tokens_leaves_the_class_token_as_it_is() -> None:
    class Tokens(Around):
        def forward(self, x: Tensor) -> Tensor:
            t = self.one(x).flatten(2).mT
            t = self.relu(torch.cat((t.mean(1, keepdim=True), t), 1))
            return self.fc((t[:, 1:] * (1 + t[:, :1])).square().mean(1))

    net, images = Tokens(), small_images(2)
    found = maps(net, images, "ablation-cam", "relu", target=1)
    for n, A in enumerate(activation(net, images, "relu")):
        token = net.relu(net.one(images[n : n + 1]).mean((2, 3)))

        def f(A: Tensor, token: Tensor = token) -> float:
            return float(net.fc((A.flatten(1).mT * (1 + token)).square().mean(0))[1].detach())

        assert torch.allclose(found[n, 0], reference.ablation_cam(f, A, range(4)), rtol=0, atol=1e-12)
        assert found[n].abs().max() > 1e-4


def test_the_trunk_runs_a_few_times_only() -> None:
    net, images, seen = small_net(), small_images(4), list[int]()
    net.stem.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    maps(net, images, "ablation-cam", "layer2", target=1, chunk=4)
    assert seen == [4, 4, 1, 1, 1, 1, 1]  # plain, recorded, the trial, and all five channels of each picture at once


def test_a_picture_that_is_not_finite_says_so_and_leaves_the_others_alone() -> None:
    net, images = small_net(), small_images()
    images[0, 0, 3, 3] = torch.nan
    for method in METHODS:
        options = FEW if method == "rise" else {}
        e = explain(net, images, method, "layer1" if method.endswith("cam") else None, target=1, options=options)
        assert e.status[:, 0].tolist() == [Status.NONFINITE, Status.OK, Status.OK]
        assert torch.allclose(
            e.maps[1:], explain(net, images[1:], method, e.layer, target=1, options=options).maps, atol=1e-13
        )


# state, doors


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind_after_exceptions_too(method: str) -> None:
    net, images = small_net(), small_images()
    rng, pixels = torch.get_rng_state(), images.clone()
    calls: list[int] = []

    def fails(z: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("on purpose")
        return z[:, 0]

    maps(net, images, method, "layer1")
    with pytest.raises(RuntimeError, match="on purpose"):
        maps(net, images, method, "layer1", target=fails)
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(images, pixels)
    assert all(p.grad is None for p in net.parameters())


def test_two_threads_with_one_network_get_their_own_maps() -> None:
    net, images = small_net(), small_images(4)
    alone = {method: maps(net, images, method, "layer1", target=1) for method in METHODS}
    wrong: list[str] = []

    def work(methods: list[str]) -> None:
        for method in methods * 3:
            if not torch.equal(maps(net, images, method, "layer1", target=1), alone[method]):
                wrong.append(method)

    threads = [threading.Thread(target=work, args=(order,)) for order in (METHODS, METHODS[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        ("options: budget=0; give a whole number, at least 1", "score-cam", {"budget": 0}),
        ("options: budget=True; give", "ablation-cam", {"budget": True}),
        ("options: budget=2.0; give", "ablation-cam", {"budget": 2.0}),
        ("options: masks=0; give", "rise", {"masks": 0}),
        ("options: cells='7'; give", "rise", {"cells": "7"}),
        ("options: probability=1; give a number between 0 and 1", "rise", {"probability": 1}),
        ("options: probability=nan; give", "rise", {"probability": math.nan}),
        ("options: window=9; give a whole number, 1 to 8", "occlusion", {"window": 9}),
        ("options: stride=3; give a whole number, 1 to 2", "occlusion", {"window": 2, "stride": 3}),
        ("options: value=inf; give the number", "occlusion", {"value": math.inf}),
    ],
)
def test_options_that_cannot_be_are_refused(message: str, method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ClearwingError, match=message):
        explain(small_net(), small_images(), method, options=options)
