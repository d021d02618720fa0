"""The loop: it learns, it repeats to the bit, it resumes, and it stops with a clear word."""

import copy
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clearwing.train.devices import make_fabric
from clearwing.train.ema import EMA
from clearwing.train.fit import FitState, balanced_weights, classification, fit, steady_statistics
from clearwing.train.optim import SAM, optimizer, parameter_groups
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


def batches(epoch, start=0):
    """Red and green pictures, told apart by their mean colour."""
    for batch in range(start, 4):
        generator = torch.Generator().manual_seed(10 * epoch + batch)
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


@pytest.mark.parametrize("stop", [1, 4, 6, 8, 13])
def test_a_resumed_run_equals_the_uninterrupted_one(stop):
    """Killed after any step, also in the middle of an epoch, with an average of the weights."""
    whole = network()
    average = EMA(whole, 0.9)
    rows = train(whole, 4, ema=average).rows

    class KilledError(Exception):
        pass

    kept = {}

    def save(state):
        kept.update(model=copy.deepcopy(part.state_dict()), opt=copy.deepcopy(opt.state_dict()))
        kept.update(ema=copy.deepcopy(ema.state_dict()), state=copy.deepcopy(state.numbers()))
        if state.step == stop:
            raise KilledError

    part = network()
    opt, ema = optimizer(part, "sgd", 0.1), EMA(part, 0.9)
    with pytest.raises(KilledError):
        train(part, 4, opt=opt, ema=ema, save=save, save_every=0.0)
    again = network()
    again.load_state_dict(kept["model"])
    opt, ema = optimizer(again, "sgd", 0.1), EMA(again, 0.9)
    opt.load_state_dict(kept["opt"])
    ema.load_state_dict(kept["ema"])
    state = train(again, 4, state=FitState.from_numbers(kept["state"]), opt=opt, ema=ema)
    for one, two in ((whole, again), (average.module, ema.module)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    curve = [(row["train_loss"], row["train_accuracy"], row["step"]) for row in rows]
    assert [(row["train_loss"], row["train_accuracy"], row["step"]) for row in state.rows] == curve


def test_two_small_batches_make_one_step_as_one_large_batch_does():
    """With batch norm in eval, for it sees each batch alone; the second group is short of a batch."""

    def whole(epoch, start):
        every = list(batches(epoch))
        yield Batch(torch.cat([b.images for b in every[:3]]), torch.cat([b.labels for b in every[:3]]))
        yield every[3]

    settings = {"schedule": schedule("constant"), "fabric": make_fabric("cpu", "float32")}
    one, two = network(), network()
    for module, given, count in ((one, whole, 1), (two, batches, 3)):
        opt = optimizer(module, "sgd", 0.1)
        state = fit(
            module,
            given,
            classification(),
            optimizer=opt,
            plan=Steps(4),
            accumulate=count,
            prepare=lambda module, epoch: module.eval(),
            **settings,
        )
        assert (state.epoch, state.step) == (2, 4)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_cut_to_the_norm_asked_for():
    module = network()
    before = [p.detach().clone() for p in module.parameters()]
    fit(
        module,
        batches,
        classification(),
        optimizer=torch.optim.SGD(module.parameters(), 1.0),
        schedule=schedule("constant"),
        plan=Steps(1),
        fabric=make_fabric("cpu", "float32"),
        clip=0.01,
    )
    moved = torch.cat([(p - b).flatten() for p, b in zip(module.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_sharpness_aware_steps_take_the_gradient_at_the_worst_point_near_by():
    """Foret et al. 2021, eq. 2 and 3, by hand for the first step."""
    rho, lr = 0.1, 0.5
    module, byhand = network(), network().train()
    batch = next(batches(0))

    def gradients(net):
        value, _ = classification()(net, batch)
        return torch.autograd.grad(value, list(net.parameters()))

    with torch.no_grad():
        at = [p.clone() for p in byhand.parameters()]
    g = gradients(byhand)
    norm = torch.cat([x.flatten() for x in g]).norm()
    with torch.no_grad():
        for p, x in zip(byhand.parameters(), g, strict=True):
            p += rho * x / norm
    worst = gradients(byhand)
    fit(
        module,
        batches,
        classification(),
        optimizer=torch.optim.SGD(module.parameters(), lr),
        schedule=schedule("constant"),
        plan=Steps(1),
        fabric=make_fabric("cpu", "float32"),
        sam=SAM(rho),
    )
    for p, start, x in zip(module.parameters(), at, worst, strict=True):
        torch.testing.assert_close(p, start - lr * x, atol=1e-6, rtol=1e-4)
    assert module[1].num_batches_tracked == 1  # the second pass over the batch moves no statistics


def test_steady_statistics_do_not_move_and_go_on_afterwards():
    module = network().train()
    before = copy.deepcopy(module.state_dict())
    images = next(batches(0)).images
    with steady_statistics(module):
        module(images)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    module(images)
    assert not torch.equal(module.state_dict()["1.running_mean"], before["1.running_mean"])


def test_it_ends_when_there_is_enough_and_validates_the_average():
    module, seen = network(), []
    average = EMA(module, 0.9)

    def validate(given):
        seen.append(given is average.module)
        return {"val_loss": 1.0}

    state = train(module, 9, ema=average, validate=validate, enough=lambda rows: len(rows) == 2)
    assert state.epoch == 2
    assert seen == [True, True]


@pytest.mark.parametrize(("save_every", "expected"), [(math.inf, [1, 4]), (0.0, [1, 2, 3, 4])])
def test_epochs_much_shorter_than_a_save_are_not_all_saved(monkeypatch, save_every, expected):
    now = [0.0]
    monkeypatch.setattr("clearwing.train.fit.time", SimpleNamespace(monotonic=lambda: now[0]))
    kept = []

    def save(state):
        now[0] += 1.0
        if not state.batch:
            kept.append(state.epoch)

    class Clock:
        def step(self, epoch, row):
            now[0] += 1.0

        def epoch(self, row):
            pass

    train(network(), 4, save=save, save_every=save_every, watchers=[Clock()])
    assert kept == expected


def test_a_signal_ends_the_run_between_two_steps_with_its_state_saved():
    kept = []

    class Signalled:
        def step(self, epoch, row):
            if epoch == 2:
                signal.raise_signal(signal.SIGTERM)

        def epoch(self, row):
            pass

    before = signal.getsignal(signal.SIGTERM)
    state = train(network(), 4, watchers=[Signalled()], save=lambda state: kept.append(state.numbers()))
    assert state.interrupted
    assert (kept[-1]["epoch"], kept[-1]["step"], kept[-1]["batch"]) == (1, 5, 1)
    assert kept[-1]["sums"][2] == 8  # the pictures of the step that was taken
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_at_once():
    class Impatient:
        def step(self, epoch, row):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        def epoch(self, row):
            pass

    with pytest.raises(KeyboardInterrupt):
        train(network(), 4, watchers=[Impatient()])


def test_a_run_that_was_stopped_in_its_last_step_still_has_its_last_epoch():
    class Last:
        def step(self, epoch, row):
            if epoch == 2 and row["pictures"] == 32:
                signal.raise_signal(signal.SIGTERM)

        def epoch(self, row):
            pass

    module, validated = network(), []
    opt = optimizer(module, "sgd", 0.1)
    kept = train(module, 2, opt=opt, watchers=[Last()]).numbers()
    assert (kept["step"], kept["batch"], len(kept["rows"])) == (8, 4, 1)

    def validate(module):
        validated.append(True)
        return {"val_accuracy": 0.5}

    state = train(module, 2, opt=opt, state=FitState.from_numbers(kept), validate=validate)
    assert (state.epoch, state.step, len(state.rows), validated) == (2, 8, 2, [True])
    assert state.rows[-1]["seconds"] >= kept["seconds"] > 0
    again = train(module, 2, opt=opt, state=FitState.from_numbers(state.numbers()), validate=validate)
    assert (len(again.rows), validated) == (2, [True])  # and once it is over, nothing more


def test_what_was_enough_stays_enough_when_it_is_resumed():
    module = network()
    state = train(module, 9, enough=lambda rows: len(rows) == 2)
    again = train(module, 9, state=FitState.from_numbers(state.numbers()), enough=lambda rows: len(rows) >= 2)
    assert again.epoch == 2


def test_frozen_parameters_stay_and_thaw_later():
    module = network()
    before = module[0].weight.detach().clone()
    after = {}

    def prepare(net, epoch):
        net.train()
        net[0].requires_grad_(epoch > 0)
        after[epoch] = net[0].weight.detach().clone()

    train(module, 2, prepare=prepare)
    assert torch.equal(after[1], before)
    assert not torch.equal(module[0].weight, before)


def test_balanced_weights_make_every_class_count_the_same():
    counts = torch.tensor([30, 10, 0, 20])
    weights = balanced_weights(counts)
    assert (weights * counts).tolist() == pytest.approx([20, 20, 0, 20])
    labels = torch.repeat_interleave(torch.arange(4), counts)
    assert weights[labels].mean().item() == pytest.approx(1.0)
    logits = torch.zeros(60, 4)
    value, _ = classification(0.0, weights)(nn.Identity(), Batch(logits, labels))
    assert value.item() == pytest.approx(math.log(4), rel=1e-6)


def test_mixed_pictures_are_learned_by_their_shares():
    logits = torch.tensor([[2.0, 0.5, -1.0]])
    batch = Batch(logits, torch.tensor([0]), targets=torch.tensor([[0.7, 0.0, 0.3]]))
    value, correct = classification()(nn.Identity(), batch)
    assert value.item() == pytest.approx(-(batch.targets * logits.log_softmax(1)).sum().item(), abs=1e-6)
    assert correct.item() == 1


def test_ctrl_c_keeps_what_was_learned():
    class Impatient:
        def step(self, epoch, row):
            if epoch == 2:
                signal.raise_signal(signal.SIGINT)

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
    groups = parameter_groups(network(), 0.5, lr=0.1)
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
            lambda epoch, start: iter(()),
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
