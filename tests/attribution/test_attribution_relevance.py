"""Layer-wise relevance propagation: the slow reference, zennit, what is conserved, and what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import reference_lrp
from clearwing.attribution.methods import explain
from clearwing.models.classifier import Classifier
from clearwing.models.resnet import Projection, ResNet6n2
from clearwing.types import ClearwingError
from reference import small_images, small_net
from reference_lrp import residual_net, small_net_steps

RULES = ["epsilon", "gamma", "zplus"]


def relevance(net: nn.Module, images: Tensor, rule: str, target: Any = 1, **options: float) -> Tensor:
    """(N, C, H, W)"""
    found = explain(net, images, f"lrp-{rule}", target=target, options=options)
    assert torch.allclose(found.maps, found.channels.sum(2), rtol=0, atol=1e-14)
    return found.channels[:, 0]


def signed_images(n: int = 2) -> Tensor:
    return small_images(n) - 0.3


def randomised(net: nn.Module) -> nn.Module:
    """The network in float64 and evaluation mode, its batch norms away from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                for tensor in (module.running_mean, module.bias):
                    nn.init.normal_(tensor, std=0.2)
                for tensor in (module.running_var, module.weight):
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return net.double().eval()


def fused(net: nn.Module) -> nn.Module:
    """A copy in which every batch norm is part of the convolution before it."""
    net, conv = copy.deepcopy(net), ""
    for name, module in list(net.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.BatchNorm2d):
            block = net.get_submodule(parent)
            setattr(block, conv, fuse_conv_bn_eval(block.get_submodule(conv), module))
            setattr(block, child, nn.Identity())
        if isinstance(module, nn.Conv2d):
            conv = child
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    return net


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(make())


# against a reference written from the papers, and a peer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["small", "residual"])
def test_every_rule_equals_the_reference_and_its_account(rule: str, name: str) -> None:
    """What arrives at the pixels and what the reference saw absorbed on the way are the score."""
    net = small_net() if name == "small" else residual_net()
    steps = small_net_steps(net) if name == "small" else net.steps()
    images = signed_images()
    with torch.no_grad():
        logits = reference_lrp.run(steps, images)
        assert torch.allclose(logits, net(images), atol=1e-13)
        for target, epsilon, gamma in ((0, 1e-6, 0.25), (2, 0.25, 1.0)):
            more = {"gamma": gamma} if rule == "gamma" else {}
            found = relevance(net, images, rule, target, epsilon=epsilon, **more)
            for n in range(2):
                R = torch.zeros(1, 4, dtype=torch.float64)
                R[0, target] = logits[n, target]
                expected, absorbed = reference_lrp.relevance(steps, images[n : n + 1], R, rule, epsilon, gamma)
                assert torch.allclose(found[n], expected[0], rtol=0, atol=1e-14)
                assert found[n].sum() + absorbed == pytest.approx(float(logits[n, target]), abs=1e-12)
                assert expected.abs().max() > 1e-5


def zennit_relevance(net: nn.Module, images: Tensor, rule: str, canonizers: Any = ()) -> Tensor:
    composites, rules, layers = (pytest.importorskip(f"zennit.{part}") for part in ("composites", "rules", "layer"))
    types, attribution = pytest.importorskip("zennit.types"), pytest.importorskip("zennit.attribution")

    def stable(z: Tensor) -> Tensor:
        away = 1e-6 * z.square().mean(tuple(range(1, z.ndim)), keepdim=True).sqrt()
        return z + torch.where(z < 0, -away, away)

    of_convolutions = {
        "epsilon": lambda: rules.Epsilon(epsilon=stable),
        "gamma": lambda: rules.Gamma(gamma=0.25, stabilizer=stable),
        "zplus": lambda: rules.ZPlus(stabilizer=stable, zero_params="bias"),
    }
    layer_map = [
        (types.Activation, rules.Pass()),
        (layers.Sum, rules.Norm(stabilizer=1e-12)),
        (types.AvgPool, rules.Norm(stabilizer=1e-12)),
        (types.Convolution, of_convolutions[rule]()),
        (nn.Linear, rules.Epsilon(epsilon=stable)),
    ]
    composite = composites.LayerMapComposite(layer_map, canonizers=list(canonizers))
    with attribution.Gradient(model=copy.deepcopy(net), composite=composite) as attributor:
        return attributor(images, lambda logits: logits * F.one_hot(torch.tensor(1), logits.shape[1]))[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_zennit(rule: str) -> None:
    def plain() -> nn.Module:
        convolutions = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5, 4))

    net, images = built(plain), signed_images()
    peer = zennit_relevance(net, images, rule)
    close = 1e-5 if rule == "gamma" else 1e-8  # its gamma moves the divisor away from zero otherwise
    assert torch.allclose(relevance(net, images, rule), peer, rtol=0, atol=close * float(peer.abs().max()))
    resnet, images = built(lambda: torchvision.models.resnet18(num_classes=4)), small_images(1, size=32)
    # it is given the fused network: its own canonizer leaves 1 / sqrt(1 + 1e-5) in every batch norm
    canonizer = pytest.importorskip("zennit.torchvision").ResNetCanonizer()
    peer = zennit_relevance(fused(resnet), images, rule, [canonizer])
    assert torch.allclose(relevance(resnet, images, rule), peer, rtol=0, atol=close * float(peer.abs().max()))


# identities


def test_without_biases_all_relevance_is_conserved() -> None:
    net = residual_net()
    with torch.no_grad():
        for module in net.modules():
            for tensor in (getattr(module, "bias", None), getattr(module, "running_mean", None)):
                if tensor is not None:
                    tensor.zero_()
    images = signed_images()
    scores = net(images)[:, 1].detach()
    assert scores.abs().min() > 1e-2
    for rule in ("epsilon", "gamma"):  # of z+ some has nowhere to go here
        assert torch.allclose(relevance(net, images, rule, epsilon=1e-12).sum((1, 2, 3)), scores, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_torchvision_networks_conserve_but_for_the_bias_of_the_head(rule: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18(num_classes=4).eval()  # its fresh batch norms have no bias
    images = small_images(size=32).float()
    found = explain(net, images, f"lrp-{rule}", target=2)
    assert torch.allclose(found.maps.sum((1, 2, 3)), found.logits[:, 2] - net.fc.bias[2], rtol=1e-3)


def test_epsilon_near_zero_is_input_times_gradient() -> None:
    for net in (small_net(), residual_net()):
        images = signed_images().requires_grad_()
        (G,) = torch.autograd.grad(net(images)[:, 1].sum(), images)
        assert torch.allclose(relevance(net, images, "epsilon", epsilon=1e-12), (images * G).detach(), atol=1e-9)
        assert torch.allclose(relevance(net, images, "gamma", gamma=0, epsilon=1e-12), (images * G).detach(), atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_batch_norm_counts_as_part_of_its_convolution(rule: str) -> None:
    net, images = residual_net(), signed_images()
    found = relevance(net, images, rule)
    assert torch.allclose(found, relevance(fused(net), images, rule), rtol=0, atol=1e-14)
    assert found.abs().max() > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_relevance_is_linear_in_the_target(rule: str) -> None:
    net, images = residual_net(), signed_images()
    one, two = (relevance(net, images, rule, target) for target in (1, 2))
    assert torch.allclose(relevance(net, images, rule, (1, 2)), one - two, atol=1e-14)
    assert torch.allclose(relevance(net, images, rule, lambda z: 3 * z[:, 1] + z[:, 2]), 3 * one + two, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_relevance_is_read_behind_the_normalisation(rule: str) -> None:
    mean, std = torch.tensor([0.3, 0.5, 0.4]).double(), torch.tensor([0.2, 0.3, 0.25]).double()
    images = small_images()
    found = relevance(Classifier(residual_net(), mean, std).eval(), images, rule)
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(found, relevance(residual_net(), normalised, rule), rtol=0, atol=1e-13)
    outside = Classifier(residual_net(), mean, std).eval()
    outside.forward = lambda x: outside.backbone(_without_graph(lambda y: (y - outside.mean) / outside.std, x))
    assert torch.equal(relevance(outside, images, rule), found)


def _without_graph(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x)


# networks of many kinds


class Plain(nn.Module):
    """A network (N, 3, 8, 8) -> (N, 4) with something between its two convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.two(self.between(self.one(x)))).mean((2, 3)))


@pytest.mark.parametrize("rule", RULES)
def test_a_module_that_runs_twice_equals_two_of_it(rule: str) -> None:
    class Twice(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.fc(F.relu(self.two(F.relu(self.two(F.relu(self.one(x)))))).mean((2, 3)))

    class Apart(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.head = copy.deepcopy(self.two), copy.deepcopy(self.fc)
            self.more = copy.deepcopy(self.two)
            self.begin = copy.deepcopy(self.one)

        def forward(self, x: Tensor) -> Tensor:
            second = F.relu(self.more(F.relu(self.again(F.relu(self.begin(x))))))
            return Plain.forward(self, x) + self.head(second.mean((2, 3)))

    one, two, images = built(Twice), built(Apart), signed_images()
    assert torch.allclose(relevance(one, images, rule), relevance(two, images, rule), rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_norm_that_is_not_next_to_the_convolution_stands_alone(rule: str) -> None:
    """An in-place ReLU writes on the very tensor that the convolution gave."""
    parts = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    net, images = built(lambda: nn.Sequential(*parts, nn.Flatten(), nn.Linear(144, 4))), signed_images(1)
    steps = [("conv", net[0]), "relu", ("linear", net[2]), "relu", ("linear", net[4:])]
    with torch.no_grad():
        R = net(images) * F.one_hot(torch.tensor(1), 4)
        expected, _ = reference_lrp.relevance(steps, images, R, rule, 1e-6)
    assert torch.allclose(relevance(net, images, rule), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_a_convolution_may_feed_more_than_its_batch_norm(rule: str) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.fc((F.relu(self.bn(y)) + F.relu(y)).mean((2, 3)))

    net, images = built(Forked), signed_images(1)
    fork = ("residual", [("conv", nn.Sequential(net.conv, net.bn)), "relu"], [("conv", net.conv), "relu"])
    steps = [fork, ("mean", lambda x: x.mean((2, 3))), ("linear", net.fc)]
    with torch.no_grad():
        R = net(images) * F.one_hot(torch.tensor(1), 4)
        expected, _ = reference_lrp.relevance(steps, images, R, rule, 1e-6)
    assert torch.allclose(relevance(net, images, rule), expected, rtol=0, atol=1e-14)


class Spelled(nn.Module):
    """A ResidualNet's first stage and head in functions, around its modules' weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self.net.stem[:2]
        x = F.conv2d(input=x, weight=conv.weight, bias=conv.bias, padding="same")
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        x = self.net.layer2(self.net.layer1(F.max_pool2d(F.relu(x), 2)))
        return F.linear(x.mean((2, 3)), self.net.fc.weight, self.net.fc.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("rule", RULES)
def test_functions_and_subclasses_count_as_what_they_compute(rule: str) -> None:
    net, images = residual_net(), signed_images()
    assert torch.equal(relevance(Spelled(net).eval(), images, rule), relevance(net, images, rule))
    one, two = built(Plain), built(Plain)
    one.two.__class__ = Standardised
    with torch.no_grad():
        two.two.weight -= two.two.weight.mean()
    assert torch.allclose(relevance(one, images, rule), relevance(two, images, rule), rtol=0, atol=1e-15)
    narrow = built(lambda: ResNet6n2(1, 4, widths=(4, 6, 8)))  # its projections have a forward of their own
    plain = copy.deepcopy(narrow)
    for module in plain.modules():
        if isinstance(module, Projection):
            module.__class__ = nn.Conv2d
    assert torch.allclose(relevance(narrow, images, rule), relevance(plain, images, rule), rtol=0, atol=1e-14)
    in_channels_last = explain(narrow.float(), small_images(size=32).float(), f"lrp-{rule}", target=1)
    assert in_channels_last.maps.isfinite().all()


def test_of_pictures_with_other_channels_than_the_first_layer_the_sum_is_given() -> None:
    class Grey(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.expand(-1, 3, -1, -1))

    net, images = built(Grey), signed_images()[:, :1]
    found = explain(net, images, "lrp-zplus", target=1)
    assert found.channels is None
    expected = relevance(built(Plain), images.expand(-1, 3, -1, -1), "zplus").sum(1)
    assert torch.allclose(found.maps[:, 0], expected, rtol=0, atol=1e-15)


def test_another_thread_may_run_the_model_meanwhile() -> None:
    net, images = residual_net(), signed_images()

    def gradient() -> Tensor:
        own = images.clone().requires_grad_()
        return torch.autograd.grad(net(own)[:, 1].sum(), own)[0]

    expected, plain = relevance(net, images, "zplus"), gradient()
    seen: list[Tensor] = []

    def run_beside(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(gradient()))
            thread.start()
            thread.join()

    handle = net.layer1.register_forward_hook(run_beside)
    try:
        assert torch.equal(relevance(net, images, "zplus"), expected)
    finally:
        handle.remove()
    assert len(seen) >= 1
    assert all(torch.equal(one, plain) for one in seen)


# what is refused


class Squeezed(Plain):
    def __init__(self) -> None:
        super().__init__(lambda x: F.relu(x) * F.relu(x).mean((2, 3), keepdim=True))


class Dynamic(Plain):
    """The weights of its second convolution are made of activations."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x))
        return self.fc(F.conv2d(y, y.mean(0)[:, :, :, None].sum(1)[:, None], groups=4).mean((2, 3)))


class Beside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5) + self.fc(self.two(self.one(x / 2)).mean((2, 3)))


class Streams(Plain):
    """The colours go their own ways, out of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = x.split(1, dim=1)
        return super().forward(one) + super().forward(two) + super().forward(three)


class Halved(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(x, 2))


class Written(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x))
        z = self.two(y)
        y += 1
        return self.fc((y + z).mean((2, 3)))


class Ending(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("model: Gelu x 1; LRP is for networks of 2-d conv", lambda: Plain(F.gelu)),
        ("model: NativeLayerNorm x 1, Silu x 1; ", lambda: Plain(lambda x: F.layer_norm(F.silu(x), (8, 8)))),
        ("model: Hardtanh x 1; ", lambda: Plain(F.relu6)),
        ("model: Mul x 1; ", Squeezed),
        ("model: Pow x 1; ", lambda: Plain(lambda x: x**2)),
        ("model: Div x 1; ", lambda: Plain(lambda x: x / x.abs().detach().add(1) / (1 + x.mean()))),
        ("model: Bmm x 1", lambda: Plain(lambda x: x @ x)),
        ("model: weights made of activations x 1; ", Dynamic),
        ("model: NativeBatchNorm x 1; ", lambda: Plain(nn.BatchNorm2d(4, track_running_stats=False).eval())),
        ("model: NativeBatchNorm x 1; ", lambda: Plain(lambda x: F.instance_norm(x))),
        ("model: Softmax x 1; ", Ending),
        ("model: a convolution without a graph; ", lambda: Plain(lambda x: x.detach())),
        ("model: the pictures reach the logits beside its first layer; ", Beside),
        ("model: the pictures reach the logits beside its first layer; ", Streams),
        (r"model: its first layer is given \(2, 3, 4, 4\); .* as 8 x 8", Halved),
        (r"model: its first layer is given \(2, 192\); ", lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4))),
        ("model: the input of a convolution is overwritten in place; ", Written),
        ("model: no layer of Sequential has a rule; ", lambda: nn.Sequential(nn.AvgPool2d(8), nn.Flatten())),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_would_be_quietly_wrong_is_refused(message: str, make: Callable[[], nn.Module], frozen: bool) -> None:
    net = built(make).requires_grad_(not frozen)
    with pytest.raises(ClearwingError, match=message):
        explain(net, signed_images(), "lrp-zplus")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("options", [{"epsilon": 0}, {"epsilon": "a"}, {"gamma": -1}, {"gamma": float("nan")}])
def test_settings_that_make_no_rule_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ClearwingError, match=f"options: {next(iter(options))}=.*; give a number"):
        explain(small_net(), small_images(), "lrp-gamma", options=options)
