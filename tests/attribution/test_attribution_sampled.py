"""Sampled rules: their slow references, a peer with the same noise, their identities, the doors of their options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn

import reference
from clearwing.attribution.methods import METHODS, explain
from clearwing.attribution.trace import record
from clearwing.types import ClearwingError
from reference import SmallNet, small_images, small_net

NOISY = ["smoothgrad", "vargrad", "smooth-grad-cam++"]
SHARED = ["integrated-gradients", "expected-gradients"]  # they share out the score
EVERY = [*NOISY, *SHARED]
FEW = {"samples": 6, "steps": 6}


def gradient_of(net: SmallNet, k: int, layer: str = "") -> Callable[[Tensor], Tensor]:
    """The gradient of logit k at the picture, or at a layer's output, written out without autograd."""
    R = torch.eye(4, dtype=torch.float64)[k : k + 1]
    return lambda x: reference.ruled_gradient(net.steps(layer), x, R, "plain")


def noise_of(seed: int, samples: int, shape: tuple[int, ...] = (3, 8, 8)) -> list[Tensor]:
    """The noise that the seed stands for: copy by copy in float32, the same for every picture."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).double() for _ in range(samples)]


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).double().eval()


# against references written from the papers


def test_noisy_methods_equal_the_references() -> None:
    net, images = small_net(), small_images(2)
    options = {"samples": 3, "noise": 0.3}
    found = explain(net, images, NOISY, ["layer1"], target=2, options=options, seed=5, relu=False)
    for n in range(2):
        x = images[n : n + 1]
        copies = reference.noisy(x, noise_of(5, 3), 0.3)
        with torch.no_grad():
            mean = reference.smoothgrad(gradient_of(net, 2), copies)[0]
            variance = reference.vargrad(gradient_of(net, 2), copies)[0]
        A, *some = (record(net, x, ["layer1"]).features["layer1"].detach() for x in [x, *copies])
        with torch.no_grad():
            G = [gradient_of(net, 2, "layer1")(one)[0] for one in some]
        cam = reference.smooth_grad_cam_plus_plus(A[0], G)
        assert torch.allclose(found["smoothgrad"].channels[n, 0], mean, rtol=0, atol=1e-12)
        assert torch.allclose(found["smoothgrad"].maps[n, 0], reference.strongest(mean), rtol=0, atol=1e-12)
        assert torch.allclose(found["vargrad"].channels[n, 0], variance, rtol=0, atol=1e-12)
        assert torch.allclose(found["smooth-grad-cam++@layer1"].maps[n, 0], reference.upsample(cam, 8, 8), atol=1e-12)
        assert min(mean.abs().max(), variance.max(), cam.abs().max()) > 1e-4


def test_methods_on_paths_equal_the_references() -> None:
    net, images = small_net(), small_images(2)
    references = small_images(3, seed=9)
    options = {"steps": 4, "baseline": 0.25, "samples": 4, "references": references}
    found = explain(net, images, SHARED, target=1, options=options, seed=7)
    plain = explain(net, images, "expected-gradients", target=1, options={"samples": 4}, seed=7)
    generator = torch.Generator().manual_seed(7)
    u = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    state = generator.get_state()
    drawn = [int(r) for _ in range(2) for r in torch.randperm(3, generator=generator)]  # all three, then all again
    generator.set_state(state)
    places = torch.randperm(64, generator=generator).tolist()
    for n in range(2):
        x = images[n : n + 1]
        middle = [(torch.full_like(x, 0.25), (s + 0.5) / 4) for s in range(4)]
        against = [(references[r : r + 1], (s + u[s]) / 4) for s, r in enumerate(drawn[:4])]
        flat = [
            (x[:, :, place // 8, place % 8, None, None].expand_as(x), (s + u[s]) / 4)
            for s, place in enumerate(places[:4])
        ]
        for e, draws in (
            (found["integrated-gradients"], middle),
            (found["expected-gradients"], against),
            (plain, flat),
        ):
            with torch.no_grad():
                phi = reference.expected_gradients(gradient_of(net, 1), x, draws)[0]
            assert torch.allclose(e.channels[n, 0], phi, rtol=0, atol=1e-12)
            assert torch.allclose(e.maps[n, 0], phi.sum(0), rtol=0, atol=1e-12)
            assert phi.abs().max() > 1e-3


# against an installed peer, where it is right


def test_they_equal_captum_with_the_same_noise_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).double().eval()
    x = small_images(1)
    found = explain(net, x, ["smoothgrad", "vargrad"], target=2, options={"samples": 5, "noise": 0.2}, seed=3)
    sigma = 0.2 * float(x.max() - x.min())
    monkeypatch.setattr(
        torch, "normal", lambda mean, std: torch.stack(noise_of(3, 5)) * std
    )  # captum cannot be given it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum sets requires_grad on the input, and says so
        for name in ("smoothgrad", "vargrad"):
            peer = NoiseTunnel(Saliency(net))
            expected = peer.attribute(x.clone(), name, 5, stdevs=sigma, target=2, abs=False).detach()
            assert torch.allclose(found[name].channels[:, 0], expected, rtol=0, atol=1e-13)
            assert expected.abs().max() > 1e-4
        e = explain(net, x, "integrated-gradients", target=2, options={"steps": 7, "baseline": 0.1})
        expected = IntegratedGradients(net).attribute(x, 0.1, target=2, n_steps=7, method="riemann_middle")
    assert torch.allclose(e.channels[:, 0], expected, rtol=1e-6, atol=0)  # captum's steps are float32


# identities


def test_without_noise_they_are_the_gradient_and_no_variance() -> None:
    net, images = small_net(), small_images()
    found = explain(net, images, [*NOISY, "saliency"], ["layer1"], options={"noise": 0, "samples": 7}, relu=False)
    gradient = found["saliency"].channels
    assert torch.allclose(found["smoothgrad"].channels, gradient, rtol=1e-14, atol=1e-15)
    assert found["vargrad"].channels.abs().max() < 1e-28
    trace = record(net, images, ["layer1"])
    G = trace.gradients(trace.scores(found["saliency"].classes[:, 0]))["layer1"]
    for n in range(3):
        cam = reference.smooth_grad_cam_plus_plus(trace.features["layer1"][n].detach(), [G[n]])
        assert torch.allclose(found["smooth-grad-cam++@layer1"].maps[n, 0], reference.upsample(cam, 8, 8), atol=1e-13)
    if "grad-cam++" in METHODS:
        own = explain(net, images, "grad-cam++", "layer1", relu=False)
        assert torch.allclose(found["smooth-grad-cam++@layer1"].maps, own.maps, rtol=1e-12, atol=1e-12)


def test_noise_is_a_share_of_the_pictures_own_range() -> None:
    """On a quadratic score the gradient is 2x, so its variance is 4 sigma^2 for each picture's own sigma."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((x.square().sum((1, 2, 3)), x.sum((1, 2, 3))), 1)

    images = small_images(2) * torch.tensor([1.0, 5.0])[:, None, None, None] - 2
    e = explain(Square().eval(), images, ["vargrad", "smoothgrad"], target=0, options={"samples": 200, "noise": 0.1})
    sigma = 0.1 * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    assert torch.allclose(e["vargrad"].channels.mean((1, 2, 3, 4)), 4 * sigma**2, rtol=0.05)
    assert torch.allclose(
        e["smoothgrad"].channels[:, 0], 2 * images, rtol=0, atol=2 * 5 * float(sigma.max()) / 200**0.5
    )


def test_integrated_gradients_share_out_the_score_and_the_better_the_more_steps() -> None:
    net, images = small_net(), small_images(2)
    baseline = torch.full_like(images, 0.5)
    errors = []
    for steps in (2, 16, 128, 512):
        options = {"steps": steps, "baseline": 0.5}
        e = explain(net, images, "integrated-gradients", target=1, options=options, chunk=512)
        with torch.no_grad():
            shared = (net(images) - net(baseline))[:, 1]
        errors.append(float((e.maps.sum((1, 2, 3)) - shared).abs().max() / shared.abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-1] < 1e-3


def test_on_a_linear_network_integrated_gradients_are_input_x_gradient() -> None:
    net, images = linear(), small_images()
    for steps in (1, 5):
        found = explain(net, images, ["integrated-gradients", "input-x-gradient"], options={"steps": steps})
        one, two = (e.channels for e in found.values())
        assert torch.allclose(one, two, rtol=0, atol=1e-14)
        assert one.abs().max() > 1e-3


def test_a_baseline_is_a_number_a_tensor_or_a_function() -> None:
    net, images = small_net(), small_images()

    def maps(baseline: Any) -> Tensor:
        options = {"steps": 3, "baseline": baseline}
        return explain(net, images, "integrated-gradients", target=0, options=options, chunk=2).maps

    for baseline in (
        torch.tensor(0.5),
        torch.full((3, 1, 1), 0.5),
        torch.full((1, 3, 8, 8), 0.5),
        lambda x: x * 0 + 0.5,
    ):
        assert torch.allclose(maps(baseline), maps(0.5), rtol=0, atol=1e-14)
    assert torch.equal(maps(lambda x: x), torch.zeros_like(images[:, :1]))
    assert not torch.allclose(maps(0.5), maps(0), atol=1e-3)


def test_with_one_reference_expected_gradients_are_integrated_gradients() -> None:
    images, reference_ = small_images(), small_images(1, seed=4)
    options: dict[str, Any] = {"samples": 5, "steps": 5, "baseline": reference_}
    options["references"] = reference_.expand(6, -1, -1, -1)
    one, two = (e.channels for e in explain(linear(), images, SHARED, options=options).values())
    assert torch.allclose(one, two, rtol=0, atol=1e-13)
    many = {**options, "samples": 400, "steps": 400}
    one, two = (e.channels for e in explain(small_net(), images, SHARED, options=many, chunk=600).values())
    assert torch.allclose(one, two, rtol=0, atol=0.01 * float(one.abs().max()))


def test_expected_gradients_share_out_the_score_against_the_mean_of_the_references() -> None:
    images, references = small_images(), small_images(5, seed=4)
    net = small_net()
    options = {"samples": 1500, "references": references}
    e = explain(net, images, "expected-gradients", target=1, options=options, chunk=600)
    with torch.no_grad():
        shared = net(images)[:, 1] - net(references)[:, 1].mean()
    assert torch.allclose(e.maps.sum((1, 2, 3)), shared, rtol=0, atol=0.1 * float(shared.abs().max()))
    without = explain(net, torch.full_like(images, 0.4), "expected-gradients", target=1, options={"samples": 6})
    assert torch.equal(without.maps, torch.zeros_like(without.maps))  # a flat picture is its own reference


def test_the_copies_of_a_pass_and_the_pictures_beside_do_not_matter() -> None:
    net, images = small_net(), small_images(5)
    most: list[int] = []
    handle = net.register_forward_pre_hook(lambda module, args: most.append(len(args[0])))
    whole = explain(net, images, EVERY, ["layer1"], target=2, options=FEW, chunk=60)
    assert max(most) == 30  # six copies of five pictures in one pass
    for chunk in (1, 2, 5):
        most.clear()
        found = explain(net, images, EVERY, ["layer1"], target=2, options=FEW, chunk=chunk)
        assert max(most) == chunk
        for key, e in whole.items():
            assert torch.allclose(found[key].maps, e.maps, rtol=0, atol=1e-13)
    handle.remove()
    alone = explain(net, images[3:4], EVERY, ["layer1"], target=2, options=FEW)
    for key, e in whole.items():
        assert torch.allclose(alone[key].maps[0], e.maps[3], rtol=0, atol=1e-13)
    other = explain(net, images, EVERY, ["layer1"], target=2, options=FEW, seed=1)
    moved = [key for key, e in whole.items() if not torch.allclose(other[key].maps, e.maps, rtol=0, atol=1e-6)]
    assert moved == [key for key in whole if key != "integrated-gradients"]


# targets, precision, views, progress


def test_contrasts_and_functions() -> None:
    net, images = small_net(), small_images(2)

    def found(target: Any) -> dict[str, Tensor]:
        answers = explain(net, images, EVERY, ["layer1"], target=target, options=FEW, relu=False)
        return {key: e.maps if e.channels is None else e.channels for key, e in answers.items()}

    contrast, function = found((1, 3)), found(lambda z: z[:, 1] - z[:, 3])
    one, three, top = found(1), found(3), found("top-4")
    order = net(images).argsort(1, descending=True)
    for key, maps in contrast.items():
        assert torch.allclose(function[key], maps, rtol=0, atol=1e-13)
        assert not torch.allclose(one[key], maps, rtol=0, atol=1e-3)
        for n in range(2):
            assert torch.allclose(top[key][n, order[n].tolist().index(3)], three[key][n, 0], rtol=0, atol=1e-13)
        if key in ("smoothgrad", *SHARED):
            assert torch.allclose(one[key] - three[key], maps, rtol=0, atol=1e-12)


def test_bfloat16() -> None:
    def found(net: nn.Module, **more: Any) -> dict[str, Any]:
        return explain(net, small_images(), EVERY, ["layer1"], target=1, options=FEW, **more)

    exact, half, low = found(small_net()), found(small_net(), precision="bfloat16"), found(small_net().bfloat16())
    single = found(small_net(), precision="float32")
    for key, e in exact.items():
        for other, least in ((single, 1 - 1e-9), (half, 0.95), (low, 0.95)):
            assert other[key].maps.dtype == torch.float32
            assert F.cosine_similarity(other[key].maps.double().flatten(), e.maps.flatten(), dim=0) > least, key


def test_views_and_progress() -> None:
    told: list[float] = []
    options = {**FEW, "references": small_images(3, seed=2, size=9)}  # resized to each view
    found = explain(
        small_net(),
        small_images(2),
        EVERY,
        ["layer1"],
        options=options,
        average=("flip", 0.75),
        chunk=2,
        progress=lambda done, of: told.append(done / of),
    )
    assert all(e.maps.isfinite().all() and e.maps.abs().max() > 1e-4 for e in found.values())
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    assert len(set(told)) > 4 * len(EVERY)  # within a method too


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_references_and_baselines_of_every_kind_of_tensor(mode: Callable[[], Any]) -> None:
    net, images = small_net(), small_images(2)
    references, baseline = small_images(3, seed=2), torch.full((3, 1, 1), 0.5)
    options = {**FEW, "references": references, "baseline": baseline}
    expected = explain(net, images, SHARED, options=options)
    with mode():
        options = {**FEW, "references": references.clone(), "baseline": baseline.clone()}
        found = explain(net, images.clone(), SHARED, options=options)
    asked = references.clone().requires_grad_()
    again = explain(net, images, SHARED, options={**options, "references": asked})
    for name, e in expected.items():
        assert torch.allclose(found[name].maps, e.maps, rtol=0, atol=1e-14)
        assert torch.allclose(again[name].maps, e.maps, rtol=0, atol=1e-14)
        assert not again[name].maps.requires_grad
    assert asked.grad is None


# doors


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        ("options: samples=0; give a whole number, at least 1", "smoothgrad", {"samples": 0}),
        ("options: samples=2.5; give a whole number", "vargrad", {"samples": 2.5}),
        ("options: samples=True; give a whole number", "smooth-grad-cam++", {"samples": True}),
        ("options: samples='9'; give a whole number", "expected-gradients", {"samples": "9"}),
        ("options: steps=-1; give a whole number", "integrated-gradients", {"steps": -1}),
        ("options: noise=-0.1; give sigma as a share", "smoothgrad", {"noise": -0.1}),
        ("options: noise=nan; give sigma as a share", "vargrad", {"noise": float("nan")}),
        ("options: noise='0.1'; give sigma as a share", "smooth-grad-cam++", {"noise": "0.1"}),
        ("options: noise; did you mean|options: noise; choose", "integrated-gradients", {"noise": 0.1}),
        ("options: baseline=inf; give a number", "integrated-gradients", {"baseline": float("inf")}),
        ("options: baseline='black'; give a number", "integrated-gradients", {"baseline": "black"}),
        (
            r"options: a baseline of \(4, 8, 8\); .* \(3, 8, 8\)",
            "integrated-gradients",
            {"baseline": torch.rand(4, 8, 8)},
        ),
        (r"options: a baseline of \(2, 3, 8, 8\)", "integrated-gradients", {"baseline": torch.rand(2, 3, 8, 8)}),
        (r"options: a baseline of \(1, 3, 4, 8\)", "integrated-gradients", {"baseline": lambda x: x[:1, :, :4]}),
        ("options: baseline=<function", "integrated-gradients", {"baseline": lambda x: 0.5}),
        (
            r"options: references of \(3, 8, 8\); .*\(R, 3, H, W\)",
            "expected-gradients",
            {"references": torch.rand(3, 8, 8)},
        ),
        (r"options: references of \(0, 3, 8, 8\)", "expected-gradients", {"references": torch.rand(0, 3, 8, 8)}),
        (r"options: references of \(2, 1, 8, 8\)", "expected-gradients", {"references": torch.rand(2, 1, 8, 8)}),
        ("options: references of torch.uint8", "expected-gradients", {"references": torch.zeros(2, 3, 8, 8).byte()}),
        ("options: references of list", "expected-gradients", {"references": [1]}),
    ],
)
def test_options_that_are_wrong_are_refused(message: str, method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ClearwingError, match=message):
        explain(small_net(), small_images(2), method, options=options)
