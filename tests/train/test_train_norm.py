"""Batch norm over processes, in one alone; two are in test_train_processes.py."""

import copy

import pytest
import torch
from torch import nn

from clearwing.models.resnet import ResNet6n2
from clearwing.train.norm import SynchronisedBatchNorm2d, plain, synchronised
from clearwing.types import ClearwingError


def test_synchronised_changes_the_class_and_nothing_else():
    model = ResNet6n2(1, 4, widths=(4, 8, 8)).to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    held = [id(p) for p in model.parameters()]
    kinds = [type(layer) for layer in model.modules()]
    x = torch.rand(2, 3, 12, 12)
    expected = copy.deepcopy(model)(x)
    assert synchronised(model) is model
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert all(type(layer) is SynchronisedBatchNorm2d for layer in norms)
    assert [id(p) for p in model.parameters()] == held
    assert torch.equal(copy.deepcopy(model)(x), expected)  # in a process on its own
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert synchronised(model) is plain(model) is model
    assert [type(layer) for layer in model.modules()] == kinds


def test_a_batch_norm_that_does_more_is_refused():
    class WithActivation(nn.BatchNorm2d):
        pass

    for layer in (WithActivation(3), nn.BatchNorm1d(3)):
        with pytest.raises(ClearwingError, match=type(layer).__name__):
            synchronised(nn.Sequential(layer))
