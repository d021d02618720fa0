"""Batch norm over the pictures of all processes, so that two halves of a batch are normalised as the whole is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clearwing.types import ClearwingError


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the mean and variance of all processes' pictures.

    PyTorch's `nn.SyncBatchNorm` is what it does on CUDA, and takes no tensors of the CPU. Parameters, buffers and state
    dict are those of `nn.BatchNorm2d`, and so is what it does in eval mode and in a process on its own.
    """

    # What `nn.SyncBatchNorm.forward` looks for. DistributedDataParallel refuses its subclasses on the CPU.
    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W), this process's share -> the same
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(input)
        if input.is_cuda:
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        self._check_input_dim(input)
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        normalised: Tensor = _NormaliseOverAll.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps
        )
        return normalised


class _NormaliseOverAll(torch.autograd.Function):
    """y = γ (x - μ) / √(σ² + ε) + β (Ioffe and Szegedy 2015, algorithm 1), with μ and σ² over all processes.

    The kernels are those of one process's batch norm; what is summed over the processes is summed in float64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)  # sums of bfloat16 values are float32
        m = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
        # With momentum 0 the kernel leaves the buffers as they are; their type is that of its sums.
        untouched = m.new_ones(x.shape[1], dtype=exact)
        mean, var = torch.batch_norm_update_stats(x, untouched, untouched, 0.0)
        mean, var = mean.double(), var.double()
        sums = torch.cat((m, m * mean, m * (var + mean.square())))  # counts, and sums of x and of x²
        torch.distributed.all_reduce(sums)
        m, mean, square = sums[:1], *(sums[1:] / sums[:1]).chunk(2)
        var = (square - mean.square()).clamp_(min=0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (m / (m - 1))).to(running_var.dtype), momentum)
        mean, var = mean.to(exact), var.to(exact)
        ctx.save_for_backward(x, gamma, mean, var, m)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """∂l/∂x = γ/√(σ² + ε) (g - mean(g) - x̂ mean(g x̂)), with g = ∂l/∂y and both means over all processes.

        Those of γ and β are this process's: DistributedDataParallel means them as it does all others.
        """
        (g,) = gradients
        x, gamma, mean, var, m = ctx.saved_tensors
        scale = torch.ones_like(mean) if gamma is None else gamma
        # In eval mode the kernel takes μ and σ² for constants: γ/√(σ² + ε) g, Σ g x̂ and Σ g.
        dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            g, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = torch.cat((dgamma, dbeta)).double()
            torch.distributed.all_reduce(sums)
            mean_gx, mean_g = (sums / m).to(mean.dtype).chunk(2)
            gain = scale * (var + ctx.eps).rsqrt()
            dx -= F.batch_norm(x, mean, var, gain * mean_gx, gain * mean_g, False, 0.0, ctx.eps)
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, dgamma if needs[1] else None, dbeta if needs[2] else None, *[None] * 4


def synchronised(module: nn.Module) -> nn.Module:
    """Make every batch norm of `module` one over all processes, in place; `plain` undoes it.

    Parameters, buffers and the keys of the state dict stay what they are, so an optimiser that holds them goes on.

    Raises ClearwingError for a batch norm that is not exactly `nn.BatchNorm2d`: what else it does would be lost.
    """
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SynchronisedBatchNorm2d
        elif isinstance(layer, _BatchNorm) and type(layer) is not SynchronisedBatchNorm2d:
            mend = "only BatchNorm2d is synchronised; train on one device"
            raise ClearwingError("model", f"has {type(layer).__name__}", mend)
    return module


def plain(module: nn.Module) -> nn.Module:
    """Undo `synchronised`, in place."""
    for layer in module.modules():
        if type(layer) is SynchronisedBatchNorm2d:
            layer.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return module
