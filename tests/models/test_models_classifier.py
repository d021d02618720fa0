"""Classifier and wrap: normalisation inside, one-logit heads, dict and tuple outputs, and the error lines."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from clearwing.models.classifier import Classifier, wrap
from clearwing.models.resnet import ResNet6n2
from clearwing.types import ClearwingError


def head(classes: int = 3, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


class Answer(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor


class Says(nn.Module):
    """A network whose answer is dressed by a function."""

    def __init__(self, dress, classes=3):
        super().__init__()
        self.net, self.dress = head(classes), dress

    def forward(self, x):
        return self.dress(self.net(x))


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_normalisation_lives_inside():
    module, mean, std = head(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = Classifier(module, mean, std)
    by_hand = torch.stack([(IMAGES[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    assert torch.allclose(model(IMAGES), module(by_hand), atol=1e-6)
    assert model.mean.shape == model.std.shape == (1, 3, 1, 1)
    assert model.num_classes == 3
    assert model.in_channels == 3


def test_without_mean_and_std_pictures_go_in_as_they_are():
    module = head()
    assert torch.equal(wrap(module)(IMAGES), module(IMAGES))


def test_mean_and_std_are_saved_and_move_with_the_weights():
    model = Classifier(head(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    other = Classifier(head())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert model.double()(IMAGES).dtype == torch.float64
    assert wrap(head().double(), mean=(0, 0, 0)).mean.dtype == torch.float64


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
@pytest.mark.parametrize("pictures", [1, 2, 5])
def test_one_logit_becomes_two_with_the_sigmoid_kept(shape, pictures):
    module = Says(lambda z: z.reshape(shape), classes=1).double()
    model = wrap(module, class_names=("healthy", "ill"))
    images = IMAGES[:pictures].double()
    logits = model(images)
    z = module(images).flatten()
    assert logits.shape == (pictures, 2)
    assert torch.allclose(logits.softmax(1)[:, 1], z.sigmoid(), atol=1e-15)
    assert torch.allclose(logits[:, 1] - logits[:, 0], z, atol=1e-15)


@pytest.mark.parametrize(
    ("dress", "output"),
    [
        (lambda z: {"logits": z, "features": z[:, :1]}, "logits"),
        (lambda z: (z[:, :1], z), 1),
        (lambda z: [z, z[:, :1]], -2),
        (lambda z: Answer(z[:, :1], z), "logits"),
    ],
)
def test_dicts_tuples_and_objects(dress, output):
    module = Says(dress)
    assert torch.equal(wrap(module, output=output)(IMAGES), module.net(IMAGES))
    with pytest.raises(ClearwingError, match="output"):
        wrap(module)(IMAGES)
    with pytest.raises(ClearwingError, match=r"output: (scores|7)"):
        wrap(module, output="scores" if output == "logits" else 7)(IMAGES)


def test_a_key_for_a_plain_tensor_is_refused():
    with pytest.raises(ClearwingError, match="returned Tensor"):
        wrap(head(), output="logits")(IMAGES)
    with pytest.raises(ClearwingError, match="returned NoneType"):
        wrap(Says(lambda z: None))(IMAGES)


@pytest.mark.parametrize(
    "dress", [lambda z: z[:, :, None, None], lambda z: z.mean(), lambda z: z[:2], lambda z: z[:, :0]]
)
def test_outputs_of_another_shape_name_the_shape_and_the_mend(dress):
    module = Says(dress)
    with pytest.raises(ClearwingError) as error:
        wrap(module)(IMAGES)
    assert str(tuple(module(IMAGES).shape)) in error.value.value
    assert "(N, K)" in error.value.mend


def test_wrapping_again_replaces_settings_and_keeps_the_rest():
    model = wrap(head(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), ("a", "b", "c"), 8)
    again = wrap(model, mean=(0, 0, 0), class_names=("x", "y", "z"))
    assert again.backbone is model.backbone
    assert again.class_names == ("x", "y", "z")
    assert again.input_size == 8
    assert torch.equal(again.std, model.std)
    assert torch.equal(again.mean, torch.zeros(1, 3, 1, 1))
    assert model.class_names == ("a", "b", "c")
    assert torch.equal(wrap(model)(IMAGES), model(IMAGES))


def test_modes_are_kept():
    module = head().eval()
    assert not wrap(module).training
    module.train()
    module[1].eval()
    model = wrap(module)
    assert model.training
    assert not module[1].training


def test_class_names_must_be_as_many_as_the_classes():
    with pytest.raises(ClearwingError, match=r"class_names: 2 names; the network has 3 classes"):
        Classifier(ResNet6n2(1, 3), class_names=("a", "b"))
    model = wrap(head(), class_names=("a", "b"))
    with pytest.raises(ClearwingError, match=r"class_names: 2 names; the network has 3 classes"):
        model(IMAGES)
    with pytest.raises(ClearwingError, match="class_names: a; named twice"):
        wrap(head(), class_names=("a", "b", "a"))


def test_num_classes_is_known_from_names_network_or_first_call():
    assert wrap(head(), class_names=("a", "b", "c")).num_classes == 3
    assert Classifier(ResNet6n2(1, 7)).num_classes == 7
    model = wrap(head())
    assert model.num_classes is None
    model(IMAGES)
    assert model.num_classes == 3


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"mean": (0.5,)}, "mean"),
        ({"std": (1, 1)}, "std"),
        ({"std": (1, 0, 1)}, "std"),
        ({"std": (1, -1, 1)}, "std"),
        ({"mean": (0, float("nan"), 0)}, "mean"),
        ({"mean": "imagenet"}, "mean"),
    ],
)
def test_wrong_mean_or_std_is_refused(settings, argument):
    with pytest.raises(ClearwingError) as error:
        wrap(head(), **settings)
    assert error.value.argument == argument


def test_mean_and_std_of_a_network_without_convolutions():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    assert wrap(flat).in_channels is None
    assert torch.equal(wrap(flat)(IMAGES), flat(IMAGES))
    assert torch.equal(wrap(flat, (0, 0, 0), (1, 1, 1))(IMAGES), flat(IMAGES))
    with pytest.raises(ClearwingError, match="3 and 1 values"):
        wrap(flat, (0, 0, 0))


def test_pictures_that_do_not_fit_are_refused():
    model = wrap(head(), (0.1, 0.2, 0.3))
    with pytest.raises(ClearwingError, match="3 channels"):
        model(IMAGES[:, :1])  # broadcasting would make three channels of one in silence
    with pytest.raises(ClearwingError, match="floating"):
        model((IMAGES * 255).to(torch.uint8))
    with pytest.raises(ClearwingError, match=r"\(N, C, H, W\)"):
        model(IMAGES[0])


def test_a_network_whose_first_convolution_is_not_its_stem():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.later, self.stem = nn.Conv2d(4, 2, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.later(self.stem(x)).mean((2, 3))

    model = wrap(Odd(), (0, 0, 0), (1, 1, 1))
    assert model(IMAGES).shape == (5, 2)


def test_only_modules_are_wrapped():
    with pytest.raises(ClearwingError, match="module: function"):
        wrap(lambda x: x)
