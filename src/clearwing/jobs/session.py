"""One call of `train`: what is made once and used by batches, validation and saving."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from clearwing.config import TrainConfig
from clearwing.data.augment import seed_of
from clearwing.data.loader import Pictures, epoch_order
from clearwing.data.mix import mixed
from clearwing.data.stream import Stream
from clearwing.jobs.choices import Chosen, augmentation, read_plan
from clearwing.jobs.progress import Progress, TensorBoard, TrainingBar
from clearwing.models.classifier import Classifier
from clearwing.run import Run, write_json
from clearwing.settings import seconds
from clearwing.train.collectives import share, whole_logits
from clearwing.train.ema import EMA
from clearwing.train.fit import FitState, Sums, Watcher, balanced_weights, classification, fit
from clearwing.train.norm import synchronised
from clearwing.train.optim import SAM, freeze, thawed, train_mode
from clearwing.train.optim import optimizer as make_optimizer
from clearwing.train.predict import predict_logits
from clearwing.train.schedule import Budget, FirstEpoch, Plan, Replay, Steps, schedule
from clearwing.types import Batch, ClearwingError, atomic_path

if TYPE_CHECKING:
    from clearwing.jobs.timeline import Timeline


class Session:
    """A network, its pictures and its optimiser on the way from the first step, or the last saved one, to the last."""

    def __init__(
        self,
        config: TrainConfig,
        chosen: Chosen,
        run: Run,
        model: Classifier,
        pictures: Pictures | Stream,
        watched: Pictures | None,
        fabric: Any,
        progress: Progress,
        began: float,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.chosen, self.run, self.pictures, self.watched = config, chosen, run, pictures, watched
        self.fabric, self.progress, self.began, self.clock = fabric, progress, began, clock
        if fabric.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes stay the same from step to step
        self.first = fabric.is_global_zero  # it alone writes
        network: nn.Module = synchronised(model) if fabric.world_size > 1 else model
        self.model = network.to(fabric.device).to(memory_format=torch.channels_last)
        self.augment = augmentation(config, chosen, tuple(model.mean.flatten().tolist()))
        self.optimizer = make_optimizer(
            self.model,
            config.optimizer,
            chosen.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            head_factor=config.head_factor,
        )
        if config.freeze:
            freeze(self.model, config.freeze)  # refused here where there are not so many stages
        self.ema = EMA(self.model, config.ema) if config.ema else None
        self.steps = self.steps_an_epoch()
        self.plan = self.make_plan()
        self.state = FitState()
        self.resumed_at = 0  # steps that were taken before
        self.best: tuple[float, float] | None = None  # (accuracy, -loss) of the best epoch
        self.best_weights: dict[str, Tensor] | None = None  # its weights, until they are written
        self.board: TensorBoard | None = None
        self.timeline: Timeline | None = None

    @property
    def drops_remainder(self) -> bool:
        """Whether the last batch is left out: one picture would teach batch norm nothing but noise."""
        n, batch = len(self.pictures), self.chosen.batch_size
        return n > batch and (n % batch == 1 or n % batch < self.fabric.world_size)

    def steps_an_epoch(self) -> int:
        n, batch = len(self.pictures), self.chosen.batch_size
        if n < 2 * self.fabric.world_size:
            raise ClearwingError("DATA", f"{n} pictures to train on", f"give {2 * self.fabric.world_size} or more")
        batches = n // batch if self.drops_remainder else -(-n // batch)
        return -(-batches // self.config.accumulate)

    def make_plan(self) -> Plan:
        if self.config.replay is not None:
            return Replay(read_plan(self.config))
        if self.config.time_budget is None:
            return Steps(self.steps * (self.chosen.epochs or 1))
        total = seconds(self.config.time_budget)
        # Starting Python and leaving the process are outside of what is timed here.
        spent = self.clock() - self.began
        left = total - spent - min(8.0, 0.05 * total)
        if left <= 0:
            mend = f"starting and reading the pictures took {spent:.0f} s; give {2 * spent + 10:.0f}s or more"
            raise ClearwingError("--time-budget", self.config.time_budget, mend)
        kind = Budget if self.config.plan == "share" else FirstEpoch
        return kind(left, clock=self.clock)

    def train(self) -> FitState:
        """Run to the end of the plan; the state says how far it came."""
        if self.config.resume:
            self.restore()
        self.tell_what_begins()
        watchers = self.watchers()
        compiled = self.compiler() if self.config.compile else None
        if self.watched is not None and isinstance(self.plan, Budget):
            self.reserve_validation(self.plan, self.watched)
        config = self.config
        try:
            fit(
                self.model,
                self.batches,
                self.loss(),
                optimizer=self.optimizer,
                schedule=schedule(config.schedule, config.warmup),
                plan=self.plan,
                fabric=self.fabric,
                accumulate=config.accumulate,
                clip=config.clip,
                sam=SAM(config.sam) if config.sam else None,
                ema=self.ema,
                prepare=self.prepare,
                validate=self.validate if self.watched is not None else None,
                # Under a time budget the time belongs to learning; counted epochs must not depend on the clock.
                validation_share=0.05 if isinstance(self.plan, Budget) else math.inf,
                enough=partial(stalled, patience=config.patience) if config.patience else None,
                watchers=watchers,
                save=self.save,
                save_every=seconds(config.save_every, "--save-every"),
                compiled=compiled,
                state=self.state,
            )
        finally:
            if self.board is not None:
                self.board.close()
        return self.state

    @property
    def handed_on(self) -> nn.Module:
        """The network that the run is about: the average of the weights where one is kept."""
        return self.model if self.ema is None else self.ema.module

    def tell_what_begins(self) -> None:
        devices = f"{self.fabric.world_size} x " if self.fabric.world_size > 1 else ""
        self.progress.say(
            f"{self.chosen.model['name']}: {sum(p.numel() for p in self.model.parameters()):,} parameters, "
            f"{len(self.pictures):,} pictures of {len(self.run.class_names)} classes at {self.chosen.size} px, "
            f"batch {self.chosen.batch_size}, {devices}{self.fabric.device}, {self.fabric._precision.precision}"
        )

    def watchers(self) -> list[Watcher]:
        """Who is told: the first process's bar, TensorBoard and timeline."""
        if not self.first:
            return []
        watchers: list[Watcher] = [TrainingBar(self.progress, len(self.pictures))]
        if self.config.tensorboard:
            self.board = TensorBoard(self.run.file("tensorboard"))
            watchers.append(self.board)
        if self.config.explain and self.watched is not None:
            from clearwing.jobs.timeline import Timeline  # it draws: seconds that other runs need not spend

            self.timeline = Timeline(
                self.run,
                self.watched,
                self.config.explain,
                progress=self.progress,
                board=self.board,
                autocast=self.fabric.autocast,
            )
            if self.state.step == 0:
                self.timeline.after_epoch(self.handed_on, 0)
        return watchers

    def loss(self) -> Any:
        weights = None
        if self.config.class_weights == "balanced":
            counts = self.pictures.class_counts(len(self.run.class_names))
            weights = balanced_weights(counts).to(self.fabric.device)
        return classification(self.config.label_smoothing, weights)

    def compiler(self) -> Callable[[nn.Module], nn.Module] | None:
        """torch.compile, tried on a copy: None, with a word, where this machine cannot."""
        # of the shape and type that training has: what is compiled here is what it takes
        shape = self.chosen.batch_size // self.fabric.world_size, self.config.channels, *2 * (self.chosen.train_size,)
        images = torch.zeros(shape, device=self.fabric.device).contiguous(memory_format=torch.channels_last)
        try:
            trial = compile_module(copy.deepcopy(self.model).train())
            with self.fabric.autocast():
                trial(self.fabric._precision.convert_input(images)).float().sum().backward()
        except (RuntimeError, OSError) as error:  # no C++ compiler, no Triton: torch's own errors are RuntimeErrors
            reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
            self.progress.say(f"--compile: {type(error).__name__}: {reason}; going on without it")
            return None
        return compile_module

    def prepare(self, module: nn.Module, epoch: int) -> None:
        """The mode of an epoch: frozen stages keep their weights and their statistics."""
        if self.config.freeze:
            freeze(module, thawed(self.config.freeze + 1, epoch, self.config.thaw))
        train_mode(module)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """An epoch's batches from the one numbered `start`; what is drawn depends on seed, epoch and batch alone."""
        config, K = self.config, len(self.run.class_names)
        augment = self.augment
        if config.cutout_off and self.plan.share(self.state.epoch_step) >= 1 - config.cutout_off - 1e-9:
            augment = dataclasses.replace(augment, cutout=0)
        order = None
        if isinstance(self.pictures, Pictures):
            balanced, labels = config.sampling == "balanced", self.pictures.labels
            order = epoch_order(len(self.pictures), config.seed, epoch, labels=labels, balanced=balanced)
        batches = self.pictures.batches(
            self.chosen.batch_size,
            device=self.fabric.device,
            order=order,
            augment=augment,
            seed=config.seed,
            epoch=epoch,
            start=start,
            part=(self.fabric.global_rank, self.fabric.world_size),
            drop_last=self.drops_remainder,
            ahead=1,
        )
        if not (config.mixup or config.cutmix):
            return batches
        return (
            mixed(batch, K, mixup=config.mixup, cutmix=config.cutmix, seed=seed_of(config.seed, epoch, start + b))
            for b, batch in enumerate(batches)
        )

    def reserve_validation(self, plan: Budget, watched: Pictures) -> None:
        """Hold back the time of a validation, estimated from one batch, for a run that ends in its first epoch."""
        some = watched.subset(min(len(watched), 32))
        predict_logits(self.handed_on, some, self.fabric)  # the first call is slower
        began = self.clock()
        predict_logits(self.handed_on, some, self.fabric)
        spent = (self.clock() - began) * len(watched) / len(some) / self.fabric.world_size
        if self.timeline is not None:
            began = self.clock()
            self.timeline.look(self.handed_on, 0)
            spent += self.clock() - began
        plan.hold_back(1.5 * spent + 0.5)

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the watched split, each process on its share; and the timeline."""
        if self.watched is None:
            return {}
        began, N = self.clock(), len(self.watched)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        order = torch.tensor(share(N, rank, world)) if world > 1 else None
        logits, _ = predict_logits(module, self.watched, self.fabric, order=order)
        logits, labels = whole_logits(self.fabric, logits, N, len(self.run.class_names)), self.watched.labels
        if labels is None:
            return {}
        figures = {
            "val_loss": nn.functional.cross_entropy(logits, labels).item(),
            "val_accuracy": (logits.argmax(1) == labels).double().mean().item(),
        }
        score = figures["val_accuracy"], -figures["val_loss"]
        if self.first and (self.best is None or score > self.best):
            self.best, self.best_weights = score, {k: v.clone() for k, v in self.handed_on.state_dict().items()}
        if self.timeline is not None:
            figures |= self.timeline.after_epoch(self.handed_on, self.state.epoch + 1)
        if isinstance(self.plan, Budget):
            # The last epoch is validated and saved once more after training; a half more for a busier moment.
            self.plan.hold_back(1.5 * (self.clock() - began) + 1.0)
        return figures

    def save(self, state: FitState) -> None:
        """Write what resuming needs, and then what the run hands on, which can be made of it: a kill in between loses
        nothing."""
        if not self.first:
            return
        kept = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "fit": state.numbers(),
            "plan": self.plan.state(),
            "best": None if self.best is None else list(self.best),
            "best_weights": self.best_weights,
            "rng": torch.get_rng_state(),
        }
        if self.fabric.device.type == "cuda":
            kept["cuda_rng"] = torch.cuda.get_rng_state(self.fabric.device)
        packed = io.BytesIO()  # written by torch itself, a full disk would be a RuntimeError without a word of it
        torch.save(kept, packed)
        with atomic_path(self.run.file("state.pt")) as temporary:
            temporary.write_bytes(packed.getbuffer())
        self.hand_on(state)

    def hand_on(self, state: FitState) -> None:
        """Write the weights, the best ones where they are new, the rows and the plan."""
        self.run.save_weights(self.handed_on.state_dict())
        if self.best_weights is not None:
            self.run.save_weights(self.best_weights, "best")
            self.best_weights = None
        if state.rows:
            self.run.write_metrics(state.rows)
        plan = self.plan.state()
        if "history" in plan:
            write_json(self.run.file("plan.json"), {"seed": self.config.seed, "progress": plan["history"]})

    def restore(self) -> None:
        """Go on from state.pt; from the beginning where a run was killed before it saved one."""
        path = self.run.file("state.pt")
        if not path.is_file():
            self.progress.say("nothing to resume: nothing was saved yet; starting from the beginning")
            return
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            mend = "is damaged and cannot be gone on from; start afresh with --overwrite"
            raise ClearwingError("--resume", path, mend) from error
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(kept["ema"])
        self.plan.restore(kept["plan"])
        self.best = None if kept["best"] is None else (kept["best"][0], kept["best"][1])
        self.best_weights = kept.get("best_weights")
        self.state = FitState.from_numbers(kept["fit"])
        self.resumed_at = self.state.step
        if not self.first:
            self.state.sums = Sums()  # the first process has those of all
        torch.set_rng_state(kept["rng"])
        if "cuda_rng" in kept and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(kept["cuda_rng"], self.fabric.device)
        if self.first:
            self.hand_on(self.state)  # where the run was killed between the two
        within = f" and {self.state.batch} batches" if self.state.batch else ""
        self.progress.say(f"going on after {self.state.epoch} epochs{within}")


def compile_module(module: nn.Module) -> nn.Module:
    """torch.compile of a network (its type is a callable's)."""
    return cast(nn.Module, torch.compile(module))


def stalled(rows: list[dict[str, Any]], patience: int) -> bool:
    """Whether the lowest loss on the watched split is `patience` or more epochs old."""
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    return len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])
