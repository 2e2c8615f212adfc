"""Products of a layer's matrix with a few rows, as one step of drawing has them, on the CPU."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

MOST_ROWS = 32
LEAST_BYTES = 2**20
"""Smaller matrices stay in the processor's caches, where no way is worth a choice."""

TRIALS = 3

Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def weight_first(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`W x^T` in place of `x W^T`."""
    return torch.mm(weight, rows.t()).t()


def row_by_row(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product of the matrix with each row, as one batch."""
    return torch.bmm(rows.unsqueeze(1), weight.t().expand(len(rows), -1, -1)).squeeze(1)


def onednn(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """oneDNN's product, where `F.linear` would take the BLAS library's."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def ways_for(num_rows: int, dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways to try. In half precision `F.linear` is oneDNN's already."""
    ways = [F.linear, weight_first]
    if dtype == torch.float32:
        ways += [row_by_row] * (num_rows <= 4) + [onednn] * torch.backends.mkldnn.is_available()
    return tuple(ways)


class ThinProducts(TorchFunctionMode):
    """Within it, linear layers multiply up to [`MOST_ROWS`] rows in the fastest of several ways that give the same
    values, but for rounding.

    Which one that is depends on the processor, the number of rows and the precision, and it can be several times as
    fast as the next. So the first products with matrices of one size try each way [`TRIALS`] times, and the rest, in
    the whole process, go the one that took least. Small matrices always go through `F.linear`.
    """

    fastest: dict[tuple, Way] = {}
    _seconds: dict[tuple, list[tuple[float, Way]]] = defaultdict(list)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear or kwargs or not self._is_thin(*args[:2]):
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        rows = x.reshape(-1, x.shape[-1])
        product = self.multiply(rows, weight)
        if bias and bias[0] is not None:
            product = product + bias[0]
        return product.reshape(*x.shape[:-1], -1)

    @staticmethod
    def _is_thin(x: torch.Tensor, weight: torch.Tensor) -> bool:
        return (
            x.numel() <= MOST_ROWS * x.shape[-1]
            and weight.nbytes >= LEAST_BYTES
            and type(weight) in (torch.Tensor, torch.nn.Parameter)
            and x.dtype == weight.dtype
            and weight.is_contiguous()
            and not torch.is_grad_enabled()
        )

    @classmethod
    def multiply(cls, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`(n, in)` by a weight `(out, in)` to `(n, out)`."""
        key = (len(rows), *weight.shape, weight.dtype, torch.get_num_threads())
        if key in cls.fastest:
            return cls.fastest[key](rows, weight)
        tried, ways = cls._seconds[key], ways_for(len(rows), weight.dtype)
        way = ways[len(tried) % len(ways)]
        start = time.perf_counter()
        product = way(rows, weight)
        tried.append((time.perf_counter() - start, way))
        if len(tried) >= TRIALS * len(ways):
            cls.fastest[key] = min(tried, key=lambda trial: trial[0])[1]
            cls._seconds.pop(key, None)
        return product


def has_large_matrices(module: torch.nn.Module) -> bool:
    """Whether there is anything in a module to choose a way for."""
    return any(parameter.nbytes >= LEAST_BYTES for parameter in module.parameters())


def thin_products(num_rows: int, weight: torch.Tensor) -> AbstractContextManager:
    """[`ThinProducts`] for steps of that many rows by weights like this one. Nothing where `F.linear` has won, since
    looking at every function that is called takes some percent of a step; where results have to repeat to the bit, as
    with `torch.use_deterministic_algorithms(True)`; and under autocast, which knows `F.linear` alone."""
    usual = torch.are_deterministic_algorithms_enabled() or torch.is_autocast_enabled("cpu")
    if usual or weight.device.type != "cpu" or num_rows > MOST_ROWS:
        return nullcontext()
    settled = [way for key, way in ThinProducts.fastest.items() if key[0] == num_rows and key[3] == weight.dtype]
    tried = any(key[0] == num_rows and key[3] == weight.dtype for key in ThinProducts._seconds)
    return nullcontext() if settled and not tried and set(settled) == {F.linear} else ThinProducts()


__all__ = ["ThinProducts", "has_large_matrices", "thin_products"]
