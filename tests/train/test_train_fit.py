"""The loop: it learns, it repeats to the bit, it resumes, and it stops with a clear word."""

import copy

import pytest
import torch
from torch import nn

from clearwing.train.fit import FitState, classification, fit, make_fabric
from clearwing.train.optim import optimizer, parameter_groups
from clearwing.train.schedule import Steps, schedule
from clearwing.types import Batch, ClearwingError


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def batches(epoch):
    """Red and green pictures, told apart by their mean colour."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        images = 0.3 * torch.rand(8, 3, 6, 6, generator=generator)
        labels = torch.randint(2, (8,), generator=generator)
        images[torch.arange(8), labels] += 0.5
        yield Batch(images, labels)


def train(module, epochs, state=None, opt=None, name="sgd", **more):
    opt = opt or optimizer(module, name, 0.1)
    settings = {"optimizer": opt, "schedule": schedule("one-cycle"), "fabric": make_fabric("cpu", "float32")}
    return fit(module, batches, classification(), plan=Steps(4 * epochs), state=state, **settings, **more)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_it_learns(name):
    module = network()
    state = train(module, 8, name=name)
    assert state.epoch == 8
    assert state.step == 32
    assert state.rows[-1]["train_loss"] < state.rows[0]["train_loss"]
    assert state.rows[-1]["train_accuracy"] > 0.9
    assert not module.training


def test_it_repeats_to_the_bit():
    one, two = network(), network()
    train(one, 2)
    train(two, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_resumed_run_equals_the_uninterrupted_one():
    whole = network()
    train(whole, 4)

    class KilledError(Exception):
        pass

    kept = {}

    def save(state):
        kept.update(model=copy.deepcopy(part.state_dict()), opt=copy.deepcopy(opt.state_dict()))
        kept.update(state=FitState(state.epoch, state.step, list(state.rows)))
        if state.epoch == 2:
            raise KilledError

    part = network()
    opt = optimizer(part, "sgd", 0.1)
    with pytest.raises(KilledError):
        train(part, 4, opt=opt, save=save)
    again = network()
    again.load_state_dict(kept["model"])
    opt = optimizer(again, "sgd", 0.1)
    opt.load_state_dict(kept["opt"])
    state = train(again, 4, state=kept["state"], opt=opt)
    assert len(state.rows) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_ctrl_c_keeps_what_was_learned():
    class Impatient:
        def step(self, epoch, row):
            if epoch == 2:
                raise KeyboardInterrupt

        def epoch(self, row):
            pass

    module = network()
    before = copy.deepcopy(module.state_dict())
    state = train(module, 4, watchers=[Impatient()])
    assert state.interrupted
    assert state.epoch == 1
    assert state.step == 5
    assert not torch.equal(module.state_dict()["5.weight"], before["5.weight"])


def test_a_loss_that_is_not_finite_stops_with_a_clear_word():
    def loss(module, batch):
        value = module(batch.images).sum() * float("nan")
        return value, torch.zeros(())

    module = network()
    with pytest.raises(ClearwingError, match="loss: nan; not finite at step 1; try a smaller --lr") as caught:
        fit(
            module,
            batches,
            loss,
            optimizer=optimizer(module, "sgd", 0.1),
            schedule=schedule("constant"),
            plan=Steps(4),
            fabric=make_fabric("cpu", "float32"),
        )
    assert caught.value.exit_code == 1


def test_validation_sees_the_module_in_eval_mode_and_the_last_epoch_is_always_validated():
    seen = []

    def validate(module):
        seen.append(module.training)
        return {"val_accuracy": 0.5}

    state = train(network(), 3, validate=validate, validation_share=0.0)
    assert seen == [False] * len(seen)
    assert state.rows[-1]["val_accuracy"] == 0.5
    assert [("val_accuracy" in row) for row in state.rows] == [True, False, True]


def test_biases_and_norms_do_not_decay():
    groups = parameter_groups(network(), 0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2, 4}
    assert {p.ndim for p in groups[1]["params"]} == {1}


def test_what_cannot_be_trained_is_refused():
    module = network().requires_grad_(False)
    with pytest.raises(ClearwingError, match="no trainable parameter"):
        optimizer(module, "sgd", 0.1)
    with pytest.raises(ClearwingError, match="optimizer: sdg; did you mean sgd"):
        optimizer(network(), "sdg", 0.1)
    with pytest.raises(ClearwingError, match="--device: cude"):
        make_fabric("cude")
    with pytest.raises(ClearwingError, match="batches: none in this epoch"):
        fit(
            network(),
            lambda epoch: iter(()),
            classification(),
            optimizer=optimizer(network(), "sgd", 0.1),
            schedule=schedule("constant"),
            plan=Steps(1),
            fabric=make_fabric("cpu", "float32"),
        )


def test_label_smoothing_is_that_of_the_paper():
    logits, labels = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0])
    value, correct = classification(0.3)(nn.Identity(), Batch(logits, labels))
    target = torch.tensor([0.7 + 0.1, 0.1, 0.1])
    assert value.item() == pytest.approx(-(target * logits.log_softmax(1)).sum().item(), abs=1e-6)
    assert correct.item() == 1
