"""The arithmetic that every pass runs in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clearwing.attribution.methods import explain
from reference import small_images


def test_reduced_float32_products_are_off_during_the_call_and_back_after_it() -> None:
    backend: Any = torch.backends.mkldnn
    seen: list[str] = []

    class Looks(nn.Module):
        def __init__(self, fails: bool) -> None:
            super().__init__()
            self.conv, self.fails = nn.Conv2d(3, 4, 3), fails

        def forward(self, x: Tensor) -> Tensor:
            seen.append(backend.matmul.fp32_precision)
            if self.fails and len(seen) > 2:
                raise RuntimeError("on purpose")
            return self.conv(x).mean((2, 3))

    before = torch.get_float32_matmul_precision(), backend.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        reduced = backend.matmul.fp32_precision
        assert reduced != "ieee"
        explain(Looks(False).eval(), small_images(1).float(), layers="conv")
        assert seen == ["ieee"]
        assert backend.matmul.fp32_precision == reduced
        with pytest.raises(RuntimeError, match="on purpose"):
            explain(Looks(True).eval(), small_images(3).float(), layers="conv", chunk=1)
        assert seen == ["ieee"] * 3
        assert backend.matmul.fp32_precision == reduced
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
        backend.matmul.fp32_precision = before[1]
