"""The loops that tutorials use, kept as they are found: the peers of benchmarks/train.py and benchmarks/cifar.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import clearwing as cw


class InMemory(Dataset):
    """Pictures as torchvision.datasets.CIFAR10 holds them: decoded arrays, made PIL pictures one by one."""

    def __init__(self, pictures: cw.Pictures, transform: transforms.Compose) -> None:
        self.arrays = pictures.images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C) uint8
        self.labels = pictures.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


@dataclass(frozen=True)
class PlainRecipe:
    """What a plain loop is told."""

    batch: int
    lr: float
    weight_decay: float
    flip: bool
    cutout: int
    schedule: str  # "one-cycle" or "cosine"


KUANGLIU = PlainRecipe(128, 0.1, 5e-4, True, 0, "cosine")
"""pytorch-cifar: SGD 0.9, lr 0.1, weight decay 5e-4, cosine, crop and flip; there over 200 epochs."""
TUTORIAL = PlainRecipe(64, 0.00385, 0.0, True, 16, "one-cycle")
"""Learning-rate finder, then one-cycle with its peak in epoch 5 of 20, divided by 100 at both ends; no weight decay."""


class Cutout:
    """A square of zeros after normalisation, its centre anywhere (DeVries and Taylor 2017)."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        _, H, W = picture.shape
        y, x = (int(torch.randint(n, ())) for n in (H, W))
        top, left = y - self.side // 2, x - self.side // 2
        picture[:, max(top, 0) : max(top + self.side, 0), max(left, 0) : max(left + self.side, 0)] = 0
        return picture


def loader(pictures: cw.Pictures, recipe: PlainRecipe, train: bool, workers: int = 2) -> DataLoader:
    """DataLoader with workers, as the tutorials have it."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    steps: list[object] = []
    if train:
        steps += [transforms.RandomCrop(32, padding=4)]
        steps += [transforms.RandomHorizontalFlip()] if recipe.flip else []
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    steps += [Cutout(recipe.cutout)] if train and recipe.cutout else []
    data = InMemory(pictures, transforms.Compose(steps))
    batch = recipe.batch if train else 250
    return DataLoader(data, batch, shuffle=train, num_workers=workers, persistent_workers=workers > 0)


def plain_epochs(
    net: nn.Module, batches: DataLoader, recipe: PlainRecipe, epochs: int, device: str = "cpu"
) -> Iterator[float]:
    """Train epoch by epoch in float32 with the layout that pictures come in; yields the seconds of each epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    criterion = nn.CrossEntropyLoss()
    torch.backends.cudnn.benchmark = device.startswith("cuda")  # as kuangliu's main.py
    schedule: torch.optim.lr_scheduler.LRScheduler
    if recipe.schedule == "one-cycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            recipe.lr,
            total_steps=epochs * len(batches),
            pct_start=0.25,
            div_factor=100,
            final_div_factor=1,  # of the initial rate, which is a hundredth of the peak already
            cycle_momentum=False,
            anneal_strategy="linear",
        )
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        began = time.perf_counter()
        net.train()
        train_loss, correct, total = 0.0, 0, 0
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            outputs = net(inputs)
            loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            if recipe.schedule == "one-cycle":
                schedule.step()
            train_loss += loss.item()
            correct += outputs.max(1)[1].eq(targets).sum().item()
            total += targets.size(0)
        if recipe.schedule == "cosine":
            schedule.step()
        yield time.perf_counter() - began


@torch.no_grad()
def accuracy(net: nn.Module, batches: DataLoader, device: str = "cpu") -> float:
    """The share of pictures that the network names rightly."""
    net.eval()
    right = [(net(x.to(device)).argmax(1).cpu() == y).double() for x, y in batches]
    return torch.cat(right).mean().item()
