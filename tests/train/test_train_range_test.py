"""The LR range test: on a problem whose best rate is known, and that it leaves no trace."""

import copy
import math

import pytest
import torch
from torch import nn

from clearwing.train.devices import make_fabric
from clearwing.train.fit import classification
from clearwing.train.optim import optimizer
from clearwing.train.range_test import range_test, suggest
from clearwing.types import Batch, ClearwingError


class Quadratic(nn.Module):
    """L(w) = 1/2 sum of h w^2: gradient descent converges below 2 / max h and diverges above."""

    def __init__(self, curvatures=(1.0, 4.0, 20.0)):
        super().__init__()
        self.h = torch.tensor(curvatures)
        self.w = nn.Parameter(torch.ones(len(curvatures)))

    def forward(self, images):
        return (self.h * self.w**2).sum() / 2 + images.mean()


def plain_loss(module, batch):
    return module(batch.images), torch.zeros(())


def noise(scale):
    """Batches whose pictures add noise of this size to the loss."""

    def batches(epoch, start):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(8):
            yield Batch(scale * torch.randn(1, generator=generator))

    return batches


def search(module, batches=None, loss=plain_loss, opt=None, **settings):
    opt = opt or torch.optim.SGD(module.parameters(), lr=0.1)
    fabric = make_fabric("cpu", "float32")
    return range_test(module, batches or noise(0.0), loss, optimizer=opt, fabric=fabric, **settings)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_the_suggestion_for_a_quadratic_lies_below_the_edge_of_stability(scale):
    found = search(Quadratic(), noise(scale), low=1e-5, high=10.0)
    edge = 2 / 20
    assert edge / 50 < found.suggestion < edge
    assert edge / 100 < found.minimum_tenth < edge
    assert found.diverged
    assert edge < found.lrs[-1] < 10
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) < 100
    assert all(map(math.isfinite, found.losses))
    assert f"{found.suggestion:.2g}" in str(found)


def test_rates_and_average_are_those_of_their_definitions():
    found = search(Quadratic(), low=1e-4, high=1e-2, steps=30, smooth=0.8)
    assert found.lrs == pytest.approx([1e-4 * 100 ** (i / 29) for i in range(30)])
    w, h = [1.0, 1.0, 1.0], [1.0, 4.0, 20.0]
    average = 0.0
    for i, lr in enumerate(found.lrs):  # gradient descent by hand, and Kingma and Ba's correction
        loss = sum(a * b * b for a, b in zip(h, w, strict=True)) / 2
        average = 0.8 * average + 0.2 * loss
        assert found.losses[i] == pytest.approx(loss, rel=1e-5)
        assert found.smoothed[i] == pytest.approx(average / (1 - 0.8 ** (i + 1)), rel=1e-5)
        w = [b - lr * a * b for a, b in zip(h, w, strict=True)]
    assert not found.diverged
    assert "the loss still falls at 0.01: look at higher rates, too" in str(found)


def test_groups_keep_their_ratio_to_the_reference():
    module, seen = Quadratic(), []
    other = nn.Parameter(torch.ones(1))
    groups = [{"params": module.w, "lr": 0.3}, {"params": other, "lr": 0.1}]
    opt = torch.optim.SGD(groups)
    opt.register_step_pre_hook(lambda o, *_: seen.append([group["lr"] for group in o.param_groups]))
    lrs = search(module, opt=opt, low=1e-5, high=1e-3, steps=20).lrs
    assert seen == [pytest.approx([lr, lr / 3]) for lr in lrs]
    seen.clear()
    search(module, opt=opt, reference=0.1, low=1e-5, high=1e-3, steps=20)
    assert seen == [pytest.approx([3 * lr, lr]) for lr in lrs]


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def pictures(epoch, start):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        labels = torch.randint(2, (8,), generator=generator)
        images = 0.3 * torch.rand(8, 3, 6, 6, generator=generator)
        images[torch.arange(8), labels] += 0.5
        yield Batch(images, labels)


def values(tree):
    """The tensors and numbers of nested state, by path."""
    if isinstance(tree, dict):
        return {f"{key}/{k}": v for key, item in tree.items() for k, v in values(item).items()}
    if isinstance(tree, list):
        return values(dict(enumerate(tree)))
    return {"": tree}


@pytest.mark.parametrize(("name", "high"), [("sgd", 10.0), ("adamw", 1e30)])
def test_everything_is_as_before(name, high):
    module = network().eval()
    opt = optimizer(module, name, 0.1)
    module(next(pictures(0, 0)).images).sum().backward()
    opt.step()  # momentum that would be disturbed
    module[1].train()  # modes that differ from layer to layer
    opt.zero_grad()
    before = values(copy.deepcopy({"module": module.state_dict(), "optimizer": opt.state_dict()}))
    modes = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    found = search(module, pictures, classification(), opt, high=high, steps=24)
    after = values({"module": module.state_dict(), "optimizer": opt.state_dict()})
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key
    assert [part.training for part in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert found == search(module, pictures, classification(), opt, high=high, steps=24)


def test_a_loss_that_is_not_finite_ends_the_test_and_is_left_out():
    found = search(Quadratic((1.0,)), low=1e-3, high=1e30, steps=40, stop=1e300, smooth=0.5)
    assert found.diverged
    assert len(found.losses) < 40
    assert all(map(math.isfinite, (*found.losses, *found.smoothed)))


def test_other_errors_are_not_taken_for_divergence():
    with pytest.raises(ClearwingError, match=r"batch\.labels: None; training needs labels"):
        search(network(), lambda epoch, start: [Batch(torch.zeros(2, 3, 6, 6))], classification())


def test_gradients_are_accumulated_over_batches_of_a_step():
    one = search(Quadratic(), noise(0.1), low=1e-4, high=1e-2, steps=20, accumulate=2)
    assert len(one.losses) == 20
    generator = torch.Generator().manual_seed(0)
    added = (0.1 * torch.randn(1, generator=generator) + 0.1 * torch.randn(1, generator=generator)).item() / 2
    assert one.losses[0] == pytest.approx(12.5 + added, rel=1e-5)  # the mean of the first two batches


def test_noise_alone_gives_no_suggestion():
    generator = torch.Generator().manual_seed(0)
    losses = [2 + 0.1 * torch.randn(100, generator=generator).double() for _ in range(200)]
    found = [suggest(range(100), each.tolist())[1] for each in losses]
    assert sum(rate is not None for rate in found) <= 12
    module = Quadratic()
    frozen = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    found = search(module, noise(0.1), opt=frozen)
    assert found.suggestion is None
    assert found.minimum_tenth is None
    assert str(found).startswith("no suggestion: between 1e-06 and 10 the loss does not fall by more than its noise")


def test_the_suggestion_is_the_same_under_noise():
    position = torch.arange(100).double()
    clean = 2.3 - 1.5 * torch.sigmoid((position - 55) / 4) + 3 * torch.sigmoid((position - 85) / 2)
    lrs = [1e-6 * 1e7 ** (i / 99) for i in range(100)]
    best = suggest(lrs, clean.tolist())
    assert lrs[50] < best[1] < lrs[65]  # the average lags by a few steps
    for seed in range(5):
        noise = 0.1 * torch.randn(100, generator=torch.Generator().manual_seed(seed)).double()
        _, steepest, lowest = suggest(lrs, (clean + noise).tolist())
        assert 0.4 < steepest / best[1] < 2.5
        assert 0.4 < lowest / best[2] < 2.5


@pytest.mark.parametrize("losses", [[], [2.0], [2.0, 1.0, 3.0], [2.0] * 50])
def test_too_little_to_see_gives_no_suggestion(losses):
    smoothed, steepest, lowest = suggest([10.0**i for i in range(len(losses))], losses)
    assert len(smoothed) == len(losses)
    assert steepest is lowest is None


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"low": 0.0}, "low, high: 0, 10; give two rates, 0 < low < high"),
        ({"low": 1.0, "high": 0.1}, "low, high: 1, 0.1; give two rates"),
        ({"steps": 5}, "steps: 5; give at least 20"),
        ({"smooth": 1.0}, "smooth: 1.0; give a weight"),
        ({"stop": 1.0}, "stop: 1.0; give a factor"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, line):
    with pytest.raises(ClearwingError, match=line):
        search(Quadratic(), **settings)


def test_a_loss_that_is_never_finite_is_an_error():
    with pytest.raises(ClearwingError, match="loss: nan; not finite at step 1"):
        search(Quadratic(), noise(math.nan))
