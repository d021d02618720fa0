"""Groups cover every parameter once at the right rate; freezing keeps; SGD and SAM against slow references."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from clearwing.models.zoo import build
from clearwing.train.optim import SAM, freeze, optimizer, parameter_groups, stages, thawed, train_mode
from clearwing.types import ClearwingError


def network(**settings):
    torch.manual_seed(0)
    return build("resnet8", 3, widths=(4, 6, 8), **settings)


def step(model, opt, seed=0):
    """One step on random pictures."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    opt.zero_grad()
    model(images).square().sum().backward()
    opt.step()


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("downsample", ["block", "conv"])
def test_stages_of_our_networks(downsample):
    model = network(downsample=downsample)
    net = model.backbone
    expected = [
        [net.conv1, net.bn1, net.relu],
        [net.layer1],
        [net.down2, net.layer2],
        [net.down3, net.layer3, net.avgpool],
        [net.fc],
    ]
    assert [[id(m) for m in part] for part in stages(model)] == [[id(m) for m in part] for part in expected]


def test_stages_of_other_networks():
    with torch.device("meta"):
        theirs = torchvision.models.resnet50()
        plain = torchvision.models.vgg11()
    assert len(stages(theirs)) == 6
    assert stages(theirs)[-1] == [theirs.fc]
    assert stages(plain) == [[plain.features, plain.avgpool], [plain.classifier]]
    linear = nn.Linear(2, 2)
    assert stages(linear) == [[linear]]
    named = nn.Sequential()
    for name in ("stem", "body", "head"):
        named.add_module(name, nn.Linear(2, 2))
    assert len(stages(named)) == 3


class Token(nn.Module):
    """A parameter of its own, and one that two layers share."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 2))
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.head.weight = self.body.weight


@pytest.mark.parametrize("make", [network, Token, lambda: torchvision.models.resnet18(num_classes=2)])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_groups_cover_each_parameter_once(make, layer_decay):
    module = make()
    groups = parameter_groups(module, 0.1, lr=1.0, layer_decay=layer_decay)
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in module.parameters())
    assert len({group["name"] for group in groups}) == len(groups)
    assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"])


def test_equal_rates_are_two_groups():
    groups = parameter_groups(network(), 0.5, lr=0.2)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("all: weights", 0.2, 0.5),
        ("all: biases and norms", 0.2, 0.0),
    ]


def test_discriminative_rates_by_hand():
    model = network()
    opt = optimizer(model, "sgd", 0.8, layer_decay=0.5, head_factor=10.0)
    rates = {id(p): group["lr"] for group in opt.param_groups for p in group["params"]}
    net = model.backbone
    for part, rate in ((net.conv1, 0.05), (net.bn1, 0.05), (net.layer1, 0.1), (net.layer2, 0.2), (net.layer3, 0.4)):
        assert [rates[id(p)] for p in part.parameters()] == pytest.approx([rate] * len(list(part.parameters())))
    assert {rates[id(p)] for p in net.fc.parameters()} == {8.0}
    assert [group["name"] for group in opt.param_groups][:3] == [
        "stem: weights",
        "stem: biases and norms",
        "layer1: weights",
    ]


def test_what_the_user_froze_is_in_no_group():
    model = network()
    model.backbone.layer1.requires_grad_(False)
    held = {id(p) for group in parameter_groups(model, 0.1, lr=1.0) for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------- freezing


def test_freezing_keeps_weights_and_statistics_and_thawing_needs_no_new_groups():
    model = network()
    opt = optimizer(model, "sgd", 0.1)
    parts = [nn.ModuleList(part) for part in stages(model)]
    for count in (3, 1, 2, 0):  # the middle one freezes again what was trained
        freeze(model, count)
        train_mode(model)
        before = [copy.deepcopy(part.state_dict()) for part in parts]
        for seed in range(2):
            step(model, opt, seed)
        kept = [same(part.state_dict(), old) for part, old in zip(parts, before, strict=True)]
        assert kept == [True] * count + [False] * (5 - count)
        assert model.training
        assert parts[0][1].training == (count == 0)


def test_a_norm_without_weights_in_a_frozen_stage_stays_too():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(2, 2))
    freeze(net, 1)
    train_mode(net)
    assert not net[1].training
    assert net[3].training


def test_the_count_of_frozen_stages_is_checked():
    for count in (-1, 5):
        with pytest.raises(ClearwingError, match="stem, layer1, layer2, layer3, fc; freeze 0 to 4"):
            freeze(network(), count)
    with pytest.raises(ClearwingError, match="thaw"):
        thawed(5, 0, -1)


def test_thawing_goes_from_the_head_to_the_stem():
    assert [thawed(5, epoch, 2) for epoch in range(10)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert [thawed(4, epoch, 0) for epoch in (0, 99)] == [3, 3]


# -------------------------------------------------------------------------------------------------------- optimisers


def test_sgd_against_its_equations():
    """b = mu b + g, w = w - lr (g + mu b) with g + wd w in place of g for weights (Sutskever et al. 2013, as torch)."""
    model = nn.Linear(3, 2).double()
    opt = optimizer(model, "sgd", 0.1, momentum=0.9, weight_decay=0.3)
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    b = {name: torch.zeros_like(p) for name, p in w.items()}
    for seed in range(3):
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        model(x).pow(3).sum().backward()
        for name, p in model.named_parameters():
            g = p.grad + (0.3 * w[name] if name == "weight" else 0)
            b[name] = 0.9 * b[name] + g
            w[name] = w[name] - 0.1 * (g + 0.9 * b[name])
        opt.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), w[name])


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_the_same_steps_give_the_same_bits(name):
    models = [network(), network()]
    for model in models:
        opt = optimizer(model, name, 0.01)
        for seed in range(3):
            step(model, opt, seed)
    assert same(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_change_of_memory_layout_does_not_change_the_step(name):
    """The kernels of torch walk memory, so state in another layout than its parameter would be mixed up."""
    results = []
    for late in (False, True):
        model = network().double()
        opt = optimizer(model, name, 0.01)
        step(model, opt)
        if late:
            model.to(memory_format=torch.channels_last)
        step(model, opt)
        model.to(memory_format=torch.channels_last)
        step(model, opt)
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key])


def test_momentum_may_begin_later_for_a_part_of_a_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = optimizer(model, "sgd", 0.1, weight_decay=0.0)
    model[0].requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    model[0].requires_grad_(True)
    opt.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    expected = model[0].weight.detach() - 0.1 * 1.9 * model[0].weight.grad
    opt.step()
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_nesterov_can_be_left_out():
    assert optimizer(network(), "sgd", 0.1).param_groups[0]["nesterov"]
    assert not optimizer(network(), "sgd", 0.1, nesterov=False).param_groups[0]["nesterov"]
    assert not optimizer(network(), "sgd", 0.1, momentum=0.0).param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"name": "sdg"}, "optimizer"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"head_factor": 0.0}, "head_factor"),
    ],
)
def test_wrong_settings_are_refused(settings, argument):
    with pytest.raises(ClearwingError) as error:
        optimizer(network(), **{"name": "sgd", "lr": 0.1, **settings})
    assert error.value.argument == argument


def test_nothing_to_train_is_refused():
    with pytest.raises(ClearwingError, match="no trainable parameter"):
        optimizer(network().requires_grad_(False), "sgd", 0.1)


# --------------------------------------------------------------------------------------------------------------- SAM


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_against_the_equations(adaptive):
    """e = rho g / ||g|| (Foret et al. 2021, eq. 2, p = 2); adaptive: e = rho T^2 g / ||T g||, T = |w| (Kwon et al.)."""
    model = network().double()
    model(torch.rand(4, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    model.backbone.fc.bias.grad = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    scale = {name: before[name].abs() if adaptive else 1.0 for name in grads}
    norm = sum(float(((scale[name] * g) ** 2).sum()) for name, g in grads.items()) ** 0.5
    sam = SAM(0.3, adaptive)
    sam.climb(model.parameters())
    for name, p in model.named_parameters():
        e = 0.3 * scale[name] ** 2 * grads[name] / norm if name in grads else 0.0
        torch.testing.assert_close(p.detach(), before[name] + e)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    sam.descend()
    assert same(dict(model.named_parameters()), before)


def test_sam_takes_its_calls_in_order_alone():
    model, sam = nn.Linear(2, 2), SAM(0.1)
    with pytest.raises(ClearwingError, match="call backward"):
        sam.climb(model.parameters())
    with pytest.raises(ClearwingError, match="without climb"):
        sam.descend()
    model(torch.ones(1, 2)).sum().backward()
    sam.climb(model.parameters())
    with pytest.raises(ClearwingError, match="twice"):
        sam.climb(model.parameters())
    with pytest.raises(ClearwingError, match="radius"):
        SAM(0.0)
