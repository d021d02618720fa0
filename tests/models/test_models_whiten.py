"""The whitened stem: its filters against a slow reference, its responses white, the rest as it was."""

import pytest
import torch
from torch import nn

from clearwing.models.classifier import Classifier
from clearwing.models.whiten import whiten_stem
from clearwing.models.zoo import build
from clearwing.types import ClearwingError


def pictures(n=12, channels=3, size=12, seed=0):
    """Blurred noise: neighbours go together, as in photographs."""
    noise = torch.rand(n, channels, size + 2, size + 2, generator=torch.Generator().manual_seed(seed))
    mixed = noise + 0.5 * noise.mean(1, keepdim=True)
    blurred = nn.functional.avg_pool2d(mixed, 3, stride=1)
    return ((blurred - blurred.min()) / (blurred.max() - blurred.min())).double()


def network(width=64, channels=3, **settings):
    torch.manual_seed(0)
    middle = {"mean": [0.5] * channels, "std": [0.2] * channels, "in_channels": channels}
    return build("resnet8", 3, widths=(width, width, width), **middle, **settings).double()


def stem(model, images):
    """What leaves the first batch norm, where no border is seen: one row for each place."""
    conv, norm = model.backbone.conv1, model.backbone.bn1
    x = (images - model.mean) / model.std
    x = norm(nn.functional.conv2d(x, conv.weight, stride=conv.stride))
    return x.transpose(0, 1).flatten(1).T


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("width", "channels", "used"), [(64, 3, 27), (16, 3, 8), (32, 1, 9), (5, 3, 2)])
def test_the_responses_are_white(width, channels, used, training):
    """Covariance l / (l + eps) in each used direction, none between them; the negatives are the negatives."""
    model, images, eps = network(width, channels), pictures(channels=channels), 1e-2
    whiten_stem(model, images, eps)
    responses = stem(model.train(training), images).detach()
    covariance = torch.cov(responses[:, :used].T, correction=0)
    values = slow_eigenvalues(images, 3)[:used]
    torch.testing.assert_close(covariance, torch.diag(values / (values + eps)), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(responses[:, used : 2 * used], -responses[:, :used])
    assert responses.mean(0).abs().max() < 1e-9


def slow_eigenvalues(images, k):
    """Of the covariance of all k x k patches, with loops over their places; largest first."""
    x = (images - 0.5) / 0.2
    places = [(row, column) for row in range(x.shape[2] - k + 1) for column in range(x.shape[3] - k + 1)]
    patches = torch.cat([x[:, :, row : row + k, column : column + k].flatten(1) for row, column in places])
    return torch.linalg.svdvals(patches - patches.mean(0)) ** 2 / len(patches)


def test_the_remaining_filters_and_all_else_stay():
    model = network(64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    whiten_stem(model, pictures())
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    norm = {f"backbone.bn1.{name}" for name in ("weight", "running_mean", "running_var")}
    assert changed == {"backbone.conv1.weight"} | norm
    for key in ("backbone.conv1.weight", "backbone.bn1.weight"):
        assert torch.equal(after[key][54:], before[key][54:])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.backbone.conv1.weight.requires_grad


def test_responses_of_the_filters_themselves_have_the_deviation_one():
    model, images = network(64), pictures()
    whiten_stem(model, images, eps=1e-6)
    model.backbone.bn1 = nn.Identity()
    deviation = stem(model, images).detach().std(0)[:54]
    torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=0.01, rtol=0)


def test_the_big_stem_takes_the_leading_half():
    torch.manual_seed(0)
    model = build("resnet18", 3, stem="imagenet", mean=[0.5] * 3, std=[0.2] * 3).double()
    images = pictures(n=40, size=17)
    whiten_stem(model, images, eps=1e-2)
    w = model.backbone.conv1.weight.detach().flatten(1)
    assert torch.equal(w[32:], -w[:32])
    e = nn.functional.normalize(w[:32])
    torch.testing.assert_close(e @ e.T, torch.eye(32).double())
    covariance = torch.cov(stem(model.eval(), images).detach()[:, :32].T, correction=0)
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), atol=1e-9, rtol=0)
    assert covariance.diagonal().min() > 0.9


def test_it_is_the_same_each_time_in_chunks_and_in_float32(monkeypatch):
    first, again, chunked, single = network(), network(), network(), network().float()
    whiten_stem(first, pictures())
    whiten_stem(again, pictures())
    whiten_stem(single, pictures().float())
    monkeypatch.setattr("clearwing.models.whiten.CHUNK", 1)
    whiten_stem(chunked, pictures())
    weight = first.backbone.conv1.weight
    assert torch.equal(weight, again.backbone.conv1.weight)
    torch.testing.assert_close(weight, chunked.backbone.conv1.weight)
    torch.testing.assert_close(weight.float(), single.backbone.conv1.weight, atol=1e-3, rtol=0)
    harmonic = 1 / torch.arange(1.0, 28.0).double()
    assert bool((weight[:27].flatten(1) @ harmonic > 0).all())


def test_one_colour_everywhere_gives_finite_filters():
    model = network()
    whiten_stem(model, torch.full((4, 3, 8, 8), 0.3).double())
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("images", "argument"),
    [
        (torch.rand(4, 1, 8, 8), "images"),
        (torch.rand(3, 8, 8), "images"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "images"),
        (torch.rand(0, 3, 8, 8), "images"),
        (torch.rand(9, 3, 2, 2), "images"),
        (torch.rand(3, 3, 5, 5), "images"),
        (torch.full((4, 3, 8, 8), float("nan")), "images"),
    ],
)
def test_pictures_that_will_not_do_are_refused(images, argument):
    model = network()
    before = model.backbone.conv1.weight.detach().clone()
    with pytest.raises(ClearwingError) as error:
        whiten_stem(model, images)
    assert error.value.argument == argument
    assert torch.equal(model.backbone.conv1.weight, before)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 8, 3), nn.ReLU()],
        [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)],
        [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)],
        [nn.Conv2d(3, 9, 3, groups=3), nn.BatchNorm2d(9)],
        [nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)],
        [nn.Flatten()],
    ],
)
def test_other_stems_are_refused(layers):
    model = Classifier(nn.Sequential(*layers), mean=[0.5] * 3, std=[0.2] * 3)
    with pytest.raises(ClearwingError, match="model"):
        whiten_stem(model, torch.rand(4, 3, 8, 8))
