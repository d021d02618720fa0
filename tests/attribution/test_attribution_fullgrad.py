"""FullGrad: the slow reference, completeness on many kinds of networks, and the warning where it does not hold."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from clearwing.attribution.fullgrad import biased, decompose, left_out
from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.models.classifier import Classifier
from clearwing.types import ClearwingError, Status
from reference import small_images, small_net


def shares_and_error(model: nn.Module, images: Tensor, target: Any = 1) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    trace = record(model, images, biased(model))
    scores = trace.scores(*target) if isinstance(target, tuple) else trace.scores(target)
    shares, linear = decompose(trace, scores)
    return shares, linear, left_out(shares, linear, scores)


def test_fullgrad_equals_the_reference() -> None:
    net, images = small_net(), small_images(2)
    found = explain(net, images, "fullgrad", target=3)
    assert found.channels is None
    with torch.no_grad():
        for n in range(2):
            x, R = images[n : n + 1], torch.eye(4, dtype=torch.float64)[3:]
            shares = reference.full_gradients(net.steps(), x, R)
            at_the_input = x * reference.ruled_gradient(net.steps(), x, R, "plain")
            total = sum(float(share.sum()) for share in [*shares, at_the_input])
            assert total == pytest.approx(float(net(x)[0, 3]), abs=1e-12)  # completeness
            expected = reference.fullgrad([*shares, at_the_input], 8, 8)
            assert torch.allclose(found.maps[n, 0], expected, atol=1e-11)
    assert found.maps.max() > 1


class Activated(nn.BatchNorm2d):
    """Batch norm, dropout and ReLU in one, as timm has it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def random(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64 and evaluation mode, with all its numbers drawn."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(0.5 + drawn.abs() if name.endswith("var") else 0.5 * drawn)
    return net


def deep_head() -> nn.Module:
    head = [nn.Flatten(), nn.Linear(36, 7), nn.ReLU(inplace=True), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)]
    return random(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), *head))


# fmt: off
COMPLETE: dict[str, Callable[[], nn.Module]] = {
    "residual": small_net,
    "deep head": deep_head,
    "frozen": lambda: deep_head().requires_grad_(False),
    "normalised": lambda: Classifier(deep_head(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)).double(),
    "one logit": lambda: Classifier(random(
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 1))
    )),
    "convolutional head": lambda: random(nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )),
    "norm with its ReLU": lambda: random(nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), Activated(4), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False),
    )),
    "no bias": lambda: random(
        nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ),
}
# fmt: on


@pytest.mark.parametrize("kind", COMPLETE)
@pytest.mark.parametrize("target", [0, (1, 0)])
def test_the_shares_sum_to_the_score(kind: str, target: Any) -> None:
    model, images = COMPLETE[kind](), small_images()
    shares, linear, error = shares_and_error(model, images, target)
    logits = model(images).detach()
    scores = logits[:, target] if isinstance(target, int) else logits[:, 1] - logits[:, 0]
    total = linear + sum(share.flatten(1).sum(1) for share in shares.values())
    assert torch.allclose(total, scores, atol=1e-12)
    assert error.max() < 1e-12
    assert scores.abs().max() > 1e-3
    assert not any(tensor.requires_grad for tensor in [*shares.values(), linear, error])
    explain(model, images, "fullgrad", target=target)  # without a warning


def test_every_kind_of_bias_counts() -> None:
    """Without any one of the shares the sum misses the score."""
    model, images = COMPLETE["normalised"](), small_images()
    shares, linear, _ = shares_and_error(model, images)
    scores = model(images)[:, 1].detach()
    assert list(shares) == ["input", "0"]
    for name in shares:
        assert left_out({**shares, name: 0 * shares[name]}, linear, scores).max() > 0.05
    assert left_out(shares, 0 * linear, scores).max() > 0.05


def test_a_normalised_network_is_explained_as_on_normalised_pictures() -> None:
    net, images = deep_head(), small_images()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    inside = explain(Classifier(net, mean, std).double(), images, "fullgrad", target=1)
    normalised = (images - torch.tensor(mean)[:, None, None].double()) / torch.tensor(std)[:, None, None].double()
    assert torch.allclose(inside.maps, explain(net, normalised, "fullgrad", target=1).maps, atol=1e-6)
    assert not torch.allclose(inside.maps, explain(net, images, "fullgrad", target=1).maps, atol=1e-2)


def test_linear_biases_are_found_in_every_mode_and_arithmetic() -> None:
    net, images = deep_head(), small_images()
    expected = explain(net, images, "fullgrad", target=1).maps
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = explain(copy.deepcopy(net), images.clone(), "fullgrad", target=1)  # of tensors made under the mode
            assert torch.allclose(found.maps, expected, atol=1e-12)
    low = [explain(net, images, "fullgrad", target=1, precision=p) for p in ("float32", "bfloat16")]
    low.append(explain(deep_head().bfloat16(), images, "fullgrad", target=1))
    for one in low:  # none warned
        assert F.cosine_similarity(one.maps.double().flatten(), expected.flatten(), dim=0) > 0.99


def test_linear_layers_over_tokens_are_shared_out_to_their_pictures() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.last = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).relu().flatten(2).transpose(1, 2).contiguous()  # (N, T, 4)
            return self.last(self.first(tokens).relu().mean(1))

    _, linear, error = shares_and_error(random(Tokens()), small_images())
    assert error.max() < 1e-12
    assert linear.abs().min() > 0


# where it does not hold


class Normalises(nn.Module):
    """A network that shifts its pictures out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep_head()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.4) / 0.1)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        Normalises(),
    ],
)
def test_one_warning_where_the_shares_miss_the_score(net: nn.Module) -> None:
    net = random(net)
    with pytest.warns(UserWarning, match=r"fullgrad misses \d+% of a score: .* not piecewise linear") as caught:
        explain(net, small_images(), ["fullgrad"], target="top-2", chunk=1)
    assert len(caught) == 1


def test_a_score_that_is_not_piecewise_linear_warns() -> None:
    with pytest.warns(UserWarning, match="fullgrad misses"):
        explain(small_net(), small_images(), "fullgrad", target=lambda z: z.softmax(1)[:, 1])


def test_a_picture_that_is_not_finite_neither_warns_nor_moves_the_others() -> None:
    net, images = small_net(), small_images()
    expected = explain(net, images, "fullgrad", target=1).maps
    images[1, 0, 2, 2] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain(net, images, "fullgrad", target=1)
    assert found.status.flatten().tolist() == [Status.OK, Status.NONFINITE, Status.OK]
    assert torch.allclose(found.maps[::2], expected[::2], atol=1e-12)


def test_a_constant_layer_adds_nothing() -> None:
    net = random(nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    found = explain(net, 0 * small_images() + 1, "fullgrad", target=0).maps
    one = net[0].weight.detach().flatten().abs()
    assert torch.allclose(found, ((one - one.min()) / (one.max() - one.min())).sum())


def test_layers_that_do_not_run_have_no_share() -> None:
    net = small_net()
    net.unused = nn.Conv2d(3, 3, 1).double().eval()
    assert "unused" in biased(net)
    trace = record(net, small_images(), optional=biased(net))
    assert trace.absent == {"unused"}
    assert torch.equal(
        explain(net, small_images(), "fullgrad").maps, explain(small_net(), small_images(), "fullgrad").maps
    )


def test_a_trace_without_the_layers_is_refused() -> None:
    trace = record(small_net(), small_images(), ["layer2"])
    with pytest.raises(ClearwingError, match=r"layer: stem.0; it was not recorded"):
        decompose(trace, trace.scores(0))
