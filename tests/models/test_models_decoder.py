"""Decoder and Segmenter: shapes, the classifier untouched, nothing left behind."""

import copy

import pytest
import torch
from torch import nn

from clearwing.models.decoder import WIDEST, Decoder, Segmenter
from clearwing.models.evidence import with_evidence
from clearwing.models.guided import guided_filter
from clearwing.models.zoo import build
from clearwing.types import ClearwingError

LAYERS = ["layer1", "layer2", "layer3"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = build("resnet8", 3, widths=(4, 6, 8), input_size=24)
    for module in network.modules():  # as if trained: what batch norm keeps matters
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture
def segmenter(model):
    torch.manual_seed(1)
    return Segmenter(model, Decoder((4, 6, 8), width=5), LAYERS).eval()


@pytest.fixture
def evident(model):
    """One whose decoder also takes where the features see the class."""
    torch.manual_seed(1)
    return Segmenter(model, Decoder((5, 7, 10), width=5), LAYERS, "fc").eval()


def pictures(n=3, size=24, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def hooks(module):
    return [hook for part in module.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


class Listening(Decoder):
    """A decoder that keeps what it was given."""

    def forward(self, features, size=None):
        self.given = [x.clone() for x in features]
        return super().forward(features, size)


# Decoder.


@pytest.mark.parametrize("width", [1, 7])
def test_a_decoder_gives_one_logit_a_place_of_the_finest_features(width):
    decoder = Decoder((4, 6, 8), width)
    features = [torch.randn(5, 4, 32, 24), torch.randn(5, 6, 16, 12), torch.randn(5, 8, 8, 6)]
    logits = decoder(features)
    assert logits.shape == (5, 32, 24)
    assert logits.min() < 0 or logits.max() > 0
    assert (decoder.channels, decoder.width) == ((4, 6, 8), width)


@pytest.mark.parametrize("sides", [[(33, 21), (17, 11), (9, 6)], [(7, 7)], [(5, 9), (1, 1)]])
def test_features_may_have_any_sizes(sides):
    decoder = Decoder((3,) * len(sides), 4).eval()
    features = [torch.randn(2, 3, *side) for side in sides]
    assert decoder(features).shape == (2, *sides[0])
    logits = decoder(features, (40, 30))
    expected = nn.functional.interpolate(decoder(features)[:, None], (40, 30), mode="bilinear")[:, 0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_every_level_reaches_the_mask():
    torch.manual_seed(0)
    decoder = Decoder((3, 3, 3), 4).double().eval()
    features = [torch.randn(1, 3, side, side, dtype=torch.float64, requires_grad=True) for side in (16, 8, 4)]
    decoder(features).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in features)
    decoder.zero_grad()
    features[0].grad = None
    decoder(features)[0, 0, 0].backward()
    assert features[2].grad[0, :, -1, -1].abs().sum() > 0  # the context: from corner to corner
    assert len(decoder.below) == decoder.context == 2
    blind = Decoder((3, 3, 3), 4, context=0).double().eval()
    features[2].grad = None
    blind(features)[0, 0, 0].backward()
    assert not features[2].grad[0, :, -1, -1].any()


def test_coarser_levels_are_wider_up_to_a_limit():
    decoder = Decoder((3, 3), width=2, context=4)
    assert [merge[0].out_channels for merge in decoder.merges] == [2, 4, 8, 16, 16]
    assert decoder.below[-1][0].out_channels == 2 * WIDEST


def by_hand(decoder, features):
    """The sum of every level with the one below, written out from the docstring: no loop over module lists."""

    def unit(part, x):
        return part[2](part[1](part[0](x)))

    def up(x, like):
        return nn.functional.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    fine, coarse = (unit(part, x) for part, x in zip(decoder.laterals, features, strict=True))
    below = unit(decoder.below[0], coarse)
    coarse = unit(decoder.merges[1], coarse + up(decoder.narrow[1](below), coarse))
    fine = unit(decoder.merges[0], fine + up(decoder.narrow[0](coarse), fine))
    return decoder.head(fine)[:, 0]


def test_a_decoder_is_the_sums_by_hand():
    torch.manual_seed(0)
    decoder = Decoder((3, 5), 4, context=1).double().eval()
    features = [torch.randn(2, 3, 9, 12, dtype=torch.float64), torch.randn(2, 5, 5, 6, dtype=torch.float64)]
    with torch.no_grad():
        torch.testing.assert_close(decoder(features), by_hand(decoder, features), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), r"channels: \(\); give the channels of at least one layer"),
        (((4, 0),), r"channels: \(4, 0\)"),
        (((4,), 0), "width: 0; give a number of at least 1"),
        (((4,), 4, -1), "context: -1; give a number of levels, 0 for none"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ClearwingError, match=message):
        Decoder(*arguments)


# Segmenter.


@pytest.mark.parametrize("size", [24, 27])  # and one that no stride divides
@pytest.mark.parametrize("which", ["segmenter", "evident"])
def test_the_logits_are_exactly_the_classifiers_and_the_mask_has_the_pictures_size(request, model, which, size):
    images, segmenter = pictures(size=size), request.getfixturevalue(which)
    with torch.no_grad():
        expected = model(images)
        logits, masks = segmenter(images)
    assert torch.equal(logits, expected)
    assert masks.shape == (3, size, size)


def test_with_a_head_the_decoder_takes_the_evidence_of_the_predicted_class(model, evident):
    images = pictures()
    with torch.no_grad():
        model.backbone.fc.bias.sub_(model(images).mean(0))  # so that the pictures are of several classes
        logits, found = evident.features(images)
        plain = Segmenter(model, Decoder((4, 6, 8)), LAYERS).eval().features(images)[1]
        expected = with_evidence(plain, model.backbone.fc.weight[logits.argmax(1)])
        assert len(logits.argmax(1).unique()) > 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        model.backbone.fc.weight[logits.argmax(1).unique()] *= torch.linspace(-1, 1, 8)  # what is read is as it is now
        changed, found = evident.features(images)
        again = with_evidence(plain, model.backbone.fc.weight[changed.argmax(1)])
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        assert not torch.equal(again[2], expected[2])
    assert not [name for name in evident.state_dict() if not name.startswith(("model.", "decoder."))]


def test_layers_may_be_named_as_the_classifier_or_its_backbone_knows_them(model, segmenter):
    other = Segmenter(model, segmenter.decoder, [f"backbone.{layer}" for layer in LAYERS]).eval()
    with torch.no_grad():
        assert torch.equal(other(pictures())[1], segmenter(pictures())[1])


def test_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(ClearwingError, match="layers: layer9; the classifier has no such module"):
        Segmenter(model, Decoder((4, 8)), ["layer1", "layer9"])
    with pytest.raises(ClearwingError, match=r"layers: \('layer1',\); the decoder takes 2"):
        Segmenter(model, Decoder((4, 8)), ["layer1"])
    with pytest.raises(ClearwingError, match="head: classifier; the classifier has no such module"):
        Segmenter(model, Decoder((4,)), ["layer1"], "classifier")
    for name in ("layer1", "bn1", "conv1"):
        with pytest.raises(ClearwingError, match=f"head: {name}; give a linear module, or a 1x1 convolution"):
            Segmenter(model, Decoder((5, 10)), ["layer1", "layer3"], name)
    mend = "head: fc, of 8 channels; the decoder takes the mean of 6 channels from it, and two maps"
    with pytest.raises(ClearwingError, match=mend):
        Segmenter(model, Decoder((5, 8)), ["layer1", "layer3"], "fc")


class OneLogit(nn.Module):
    """The two classes of one logit z: (-z/2, z/2)."""

    def __init__(self, bias):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 1, 1)
        nn.init.constant_(self.head.bias, bias)

    def forward(self, images):
        z = self.head(self.conv(images).mean((2, 3), keepdim=True)).flatten(1)
        return torch.cat([-z, z], 1) / 2


@pytest.mark.parametrize(("bias", "sign"), [(-50, -1), (50, 1)])
def test_a_head_of_one_logit_speaks_for_both_classes(bias, sign):
    torch.manual_seed(0)
    network = OneLogit(bias).eval()
    segmenter = Segmenter(network, Decoder((8,), 4), ["conv"], "head").eval()
    with torch.no_grad():
        logits, (found,) = segmenter.features(pictures())
        rows = sign * network.head.weight.flatten(1).expand(3, -1) / 2
        (expected,) = with_evidence([network.conv(pictures())], rows)
    assert (logits.argmax(1) == (sign > 0)).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_head_may_be_reparametrised(model, evident):
    with torch.no_grad():
        expected = evident(pictures())[1]
        nn.utils.parametrizations.weight_norm(model.backbone.fc)
        torch.testing.assert_close(evident(pictures())[1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", ["segmenter", "evident"])
def test_a_batch_equals_one_by_one(request, which):
    segmenter = request.getfixturevalue(which).double()
    images = pictures().double()
    with torch.inference_mode():
        logits, masks = segmenter(images)
        alone = [segmenter(images[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat([one[0] for one in alone]), logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([one[1] for one in alone]), masks, rtol=0, atol=1e-12)


def test_an_in_place_relu_behind_a_layer_does_not_change_its_features():
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    network = nn.Sequential(first, nn.ReLU(inplace=True), last, nn.ReLU(inplace=True), head).eval()
    listening = Listening((4, 4), 3)
    segmenter = Segmenter(network, listening, ["0", "2"]).eval()
    images = pictures()
    with torch.no_grad():
        logits, _ = segmenter(images)
        features = [first(images)]
        features.append(last(features[0].relu()))
        assert features[0].min() < 0
        for given, expected in zip(listening.given, features, strict=True):
            assert torch.equal(given, expected)
        assert torch.equal(logits, network(images))


def test_no_hooks_are_left_behind(model, segmenter):
    segmenter(pictures())
    assert not hooks(segmenter)
    with pytest.raises(ClearwingError, match="images"):
        segmenter(torch.rand(2, 5, 24, 24))  # the classifier refuses it
    assert not hooks(segmenter)

    def broken(*_):
        raise RuntimeError("half way")

    handle = model.backbone.layer3.register_forward_hook(broken)  # after the others have been heard
    with pytest.raises(RuntimeError, match="half way"):
        segmenter(pictures())
    handle.remove()
    assert not hooks(segmenter)
    segmenter.decoder.head = nn.Conv2d(99, 1, 1)
    with pytest.raises(RuntimeError):
        segmenter(pictures())
    assert not hooks(segmenter)


def test_the_classifier_is_never_trained(model, segmenter):
    before = copy.deepcopy(model.state_dict())
    segmenter.train()
    assert segmenter.decoder.training
    assert not any(part.training for part in model.modules())
    optimizer = torch.optim.SGD(segmenter.parameters(), lr=0.1)
    for seed in range(2):
        logits, masks = segmenter(pictures(seed=seed))
        assert not logits.requires_grad
        masks.square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in segmenter.decoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(int(value) for name, value in segmenter.decoder.state_dict().items() if "num_batches" in name)
    segmenter.eval()
    assert not any(part.training for part in segmenter.modules())


def test_a_training_classifier_is_set_to_evaluation(model):
    segmenter = Segmenter(model.train(), Decoder((4,)), ["layer1"])
    assert not any(part.training for part in model.modules())
    assert segmenter.training


@pytest.mark.parametrize("which", ["segmenter", "evident"])
def test_a_deep_copy_stands_alone(request, which):
    segmenter = request.getfixturevalue(which)
    twin = copy.deepcopy(segmenter)
    with torch.no_grad():
        expected = segmenter(pictures())
        assert all(torch.equal(a, b) for a, b in zip(twin(pictures()), expected, strict=True))
        for parameter in twin.parameters():  # what the copy hears is its own classifier's
            parameter.mul_(2)
        changed = twin(pictures())
        assert not torch.equal(changed[1], expected[1])
        assert all(torch.equal(a, b) for a, b in zip(segmenter(pictures()), expected, strict=True))
    inside = set(map(id, twin.modules()))
    assert all(id(module) in inside for module in twin._modules_of_layers)
    assert not hooks(twin)


def test_the_mask_follows_the_pictures_edges(segmenter):
    images = pictures()
    with torch.no_grad():
        plain = segmenter.decoder(segmenter.features(images)[1], images.shape[2:]).sigmoid()
        found = segmenter(images)[1].sigmoid()
        fine = torch.nn.functional.interpolate(images, scale_factor=2.0, mode="bilinear").clamp(0, 1)
        logits, finer = segmenter(images, fine)
    torch.testing.assert_close(found, guided_filter(plain, images).clamp(1e-4, 1 - 1e-4), rtol=0, atol=1e-5)
    expected = guided_filter(plain, images, fine=fine).clamp(1e-4, 1 - 1e-4)
    assert finer.shape[1:] == fine.shape[2:]
    torch.testing.assert_close(finer.sigmoid(), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits, segmenter(images)[0])
    with pytest.raises(ClearwingError, match=r"fine: \(2, 3, 48, 48\); give the same pictures as \(3, 3, 24, 24\)"):
        segmenter(images, fine[:2])
    assert (found - plain).abs().max() > 1e-3
