"""Products of a layer's matrix with a few rows, as one step of generation has them, on the CPU."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

MOST_ROWS = 16


class ThinProducts(TorchFunctionMode):
    """Within it, linear layers compute `W x^T` instead of `x W^T` for up to [`MOST_ROWS`] rows: the same values, for
    which the CPU's libraries read the matrix at several times the speed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and args[0].numel() <= MOST_ROWS * args[0].shape[-1]:
            x, weight, *bias = args
            product = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
            if bias and bias[0] is not None:
                product = product + bias[0]
            return product.reshape(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


__all__ = ["ThinProducts"]
