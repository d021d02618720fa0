"""The average against a slow float64 reference; it resumes to the bit, and touches nothing else."""

import copy

import pytest
import torch
from torch import nn

from clearwing.models.zoo import build
from clearwing.train.ema import EMA
from clearwing.types import ClearwingError


def network():
    torch.manual_seed(0)
    return build("resnet8", 3, widths=(4, 6, 8))


def move(module, seed):
    """Other weights and statistics, as after a step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
            else:
                tensor.add_(1)


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_against_a_slow_reference(every):
    module = network().double()
    ema = EMA(module, 0.6, every)
    average = {key: value.clone() for key, value in module.state_dict().items()}
    for t in range(1, 13):
        move(module, t)
        ema.update(module)
        if t % every == 0:
            d = min(0.6, (1 + t) / (10 + t)) ** every
            for key, value in module.state_dict().items():
                counts = not value.is_floating_point()
                average[key] = value.clone() if counts else d * average[key] + (1 - d) * value
        for key, value in ema.module.state_dict().items():
            torch.testing.assert_close(value, average[key])
    assert ema.t == 12


def test_the_copy_is_apart_in_eval_and_asks_for_no_gradient():
    module = network().to(memory_format=torch.channels_last)
    before = copy.deepcopy(module.state_dict())
    ema = EMA(module, 0.9)
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m.training for m in ema.module.modules())
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert ema.module.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    ema.module.backbone.fc.bias.data.fill_(7.0)
    ema.update(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_it_resumes_to_the_bit(tmp_path):
    module = network()
    whole = EMA(module, 0.5, every=2)
    for t in range(3):
        move(module, t)
        whole.update(module)
    torch.save(whole.state_dict(), tmp_path / "ema.pt")
    resumed = EMA(network(), 0.5, every=2)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for t in range(3, 8):
        move(module, t)
        whole.update(module)
        resumed.update(module)
    assert resumed.t == whole.t == 8
    for one, two in zip(whole.module.state_dict().values(), resumed.module.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_frozen_weights_stay_to_the_bit_and_a_wrapped_network_will_do():
    module = network()
    ema = EMA(module, 0.9)
    for _ in range(5):
        ema.update(nn.Sequential(module))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), ema.module.parameters(), strict=True))


def test_a_layout_changed_later_is_no_matter():
    module = network()
    one, two = EMA(module, 0.5), EMA(module, 0.5)
    move(module, 1)
    one.update(module)
    module.to(memory_format=torch.channels_last)
    two.update(module)
    for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("settings", "argument"), [((1.0,), "ema"), ((-0.1,), "ema"), ((0.9, 0), "every")])
def test_wrong_settings_are_refused(settings, argument):
    with pytest.raises(ClearwingError) as error:
        EMA(nn.Linear(1, 1), *settings)
    assert error.value.argument == argument
