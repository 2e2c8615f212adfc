"""Index backpropagation quantization (IBQ): one code a latent, gradients for the whole codebook.

- A code is the argmax of the dot product between a latent and every codebook row, not the nearest row.
- The forward value is the chosen row; the backward pass sees the softmax over all rows, so that every row learns.
- An entropy term keeps single assignments certain and the use of the codebook even.
- Tokens go through in blocks, whose logits are thrown away and made again for the backward pass: no tensor of tokens
  by codes exists. What is kept for it is one flag for each block and code.
- Where logits are peaked, a product in low precision finds the few codes that can matter; these are computed exactly.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import nn

BLOCK_ELEMENTS = 7 * 2**22
"""Logits held at a time: 112 MiB in float32. Larger blocks make faster products, smaller ones take less memory."""
CHUNK_ELEMENTS = 2**19
"""Logits of a block that are worked on at a time: few enough for the processor's cache."""
CODES_A_PRODUCT = 2**11
"""Codes in one matrix product on a CPU, where a few hundred tokens by all codes run at two thirds of the speed."""


@dataclass
class IBQQuantizerOutput(BaseOutput):
    """What quantizing a batch of latents gives. The losses are `None` unless they were asked for.

    Args:
        embeddings (`torch.Tensor` of shape `(batch_size, dim, height, width)`):
            The chosen codebook rows, differentiable in the latents and in the whole codebook.
        codes (`torch.LongTensor` of shape `(batch_size, height, width)`): The chosen rows' numbers, in `[0, K)`.
        quantization_loss (`torch.Tensor` of shape `()`): Commitment and codebook terms; in value
            `(2 + codebook_loss_weight)` times the mean squared distance between latents and their codes.
        sample_entropy (`torch.Tensor` of shape `()`): Mean entropy of a latent's assignment, in nats.
        average_entropy (`torch.Tensor` of shape `()`): Entropy of the batch's mean assignment, in nats.
        entropy_loss (`torch.Tensor` of shape `()`): `sample_entropy - average_entropy`.
    """

    embeddings: torch.Tensor
    # With a default, accelerate can rebuild the output from a dict, as it does under mixed precision.
    codes: torch.LongTensor | None = None
    quantization_loss: torch.Tensor | None = None
    sample_entropy: torch.Tensor | None = None
    average_entropy: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


def _blocks(rows: slice, width: int, elements: int) -> list[slice]:
    """Parts of the rows, each with so many elements in rows of a width, or one row."""
    step = max(1, elements // max(width, 1))
    return [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


def _chunks(logits: torch.Tensor) -> list[slice]:
    """Parts of a block: for a CPU's cache; elsewhere all at once, since small kernels would cost more."""
    elements = CHUNK_ELEMENTS if logits.device.type == "cpu" else logits.numel()
    return _blocks(slice(0, len(logits)), logits.shape[1], elements)


def token_blocks(num_tokens: int, num_codes: int) -> list[slice]:
    """Blocks of tokens whose logits are held at a time."""
    return _blocks(slice(0, num_tokens), num_codes, BLOCK_ELEMENTS)


def _buffer(tokens: torch.Tensor, num_codes: int, copies: int = 1) -> torch.Tensor:
    """Memory for so many numbers a logit of a block, flat: fresh memory for each block would cost a third of its
    product."""
    width = copies * num_codes
    return tokens.new_empty(min(len(tokens) * width, max(BLOCK_ELEMENTS, width)))


def _product(tokens: torch.Tensor, table: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`tokens @ table.T`, in the beginning of the buffer."""
    logits = buffer.view(tokens.dtype)[: len(tokens) * len(table)].view(len(tokens), len(table))
    step = CODES_A_PRODUCT if tokens.device.type == "cpu" else len(table)
    for start in range(0, len(table), step):
        torch.mm(tokens, table[start : start + step].T, out=logits[:, start : start + step])
    return logits


class Screen:
    """Finds the codes that can matter to any token of a block: those whose logits may come within `reach` of the best.

    Products in bfloat16, where the hardware has them, are several times faster. Rounding moves a logit by at most
    one and a half times bfloat16's epsilon times both lengths, and the reach grows by more than twice that, so that no
    code is missed.
    """

    def __init__(self, table: torch.Tensor, reach: float):
        self.reach = reach
        self.longest = torch.linalg.vector_norm(table, dim=-1).max() if len(table) else table.new_zeros(())
        self.table = table.to(torch.bfloat16) if _multiplies_bfloat16(table.device) else table

    def columns(self, tokens: torch.Tensor, buffer: torch.Tensor) -> torch.LongTensor | None:
        """Numbers of the codes that can matter, or None for all, where leaving some out would not pay."""
        length = self.longest * torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        if 2 * length.max() <= self.reach:
            return None
        logits = _product(tokens.to(self.table.dtype), self.table, buffer)
        reach = self.reach + 4 * torch.finfo(logits.dtype).eps * length
        logits.sub_((logits.amax(dim=-1, keepdim=True) - reach).to(logits.dtype))
        # Written so that a latent that is not a number notices every code.
        return _pays(~(logits.amax(dim=0) < 0))


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _pays(noticed: torch.BoolTensor) -> torch.LongTensor | None:
    """The noticed codes' numbers, or None for all codes where gathering would not pay."""
    columns = noticed.nonzero().squeeze(-1)
    return columns if 2 * len(columns) < len(noticed) else None


@torch.library.custom_op("ett::assign", mutates_args=())
def assign(tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The code of each token `(N, D)` in a table `(K, D)`: the row with the largest dot product."""
    codes = tokens.new_empty(len(tokens), dtype=torch.long)
    screen, buffer = Screen(table, reach=0.0), _buffer(tokens, len(table))
    for rows in token_blocks(len(tokens), len(table)):
        columns = screen.columns(tokens[rows], buffer)
        keys = table if columns is None else table[columns]
        best = _product(tokens[rows], keys, buffer).argmax(dim=-1)
        codes[rows] = best if columns is None else columns[best]
    return codes


@assign.register_fake
def _(tokens, table):
    return tokens.new_empty(len(tokens), dtype=torch.long)


@torch.library.custom_op("ett::index_backpropagation", mutates_args=())
def index_backpropagation(
    tokens: torch.Tensor, table: torch.Tensor, logit_scale: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Assigns each token a code. The dense definition, with `s = tokens @ table.T` and sg for "no gradient":

        codes   = argmax(s);  hard = table[codes]
        soft    = softmax(logit_scale * s) @ sg(table);  embeddings = hard + soft - sg(soft)
        P       = softmax(s / temperature);  entropies = -sum(P log P) over codes;  average = mean(P) over tokens

    Backward pass included, it takes five products of the size of `s` in place of eight, and next to none but the
    screen's where the softmaxes are peaked: a block of tokens leaves out the codes that none of them notices. In both
    softmaxes, what these give together is below the rounding error of the dense definition, each having less than the
    machine's epsilon squared.

    Args:
        tokens: `(N, D)`.
        table: `(K, D)`.

    Returns:
        `embeddings` `(N, D)`, `hard` `(N, D)`, `codes` `(N,)`, `entropies` `(N,)` in nats, `average` `(K,)`, and, for
        the backward pass, `noticed` `(blocks, K)`: which codes matter to which block of tokens.
    """
    num_tokens, num_codes = len(tokens), len(table)
    blocks = token_blocks(num_tokens, num_codes)
    codes = tokens.new_empty(num_tokens, dtype=torch.long)
    entropies, average = tokens.new_empty(num_tokens), tokens.new_zeros(num_codes)
    noticed = torch.zeros(len(blocks), num_codes, dtype=torch.bool, device=tokens.device)
    reach = -2 * math.log(torch.finfo(tokens.dtype).eps) * max(1 / logit_scale, temperature)
    screen, buffer = Screen(table, reach), _buffer(tokens, num_codes)
    for number, rows in enumerate(blocks):
        columns = screen.columns(tokens[rows], buffer)
        keys = table if columns is None else table[columns]
        logits = _product(tokens[rows], keys, buffer)
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        best = logits.argmax(dim=-1)
        total = tokens.new_zeros(len(keys))
        for chunk in _chunks(logits):
            sharp = logits[chunk].div_(temperature)
            probabilities = sharp.softmax(dim=-1)
            total += probabilities.sum(dim=0)
            # The best code's logit is 0, so that its probability is one over the softmax's denominator.
            at_best = probabilities.gather(1, best[chunk].unsqueeze(-1)).squeeze(-1)
            entropies[rows][chunk] = -at_best.log() - sharp.mul_(probabilities).sum(dim=-1)
        everything = slice(None) if columns is None else columns
        noticed[number, everything] = True
        average[everything] += total
        codes[rows] = best if columns is None else columns[best]
    hard = F.embedding(codes, table)
    return hard.clone(), hard, codes, entropies, average / max(num_tokens, 1), noticed


@index_backpropagation.register_fake
def _(tokens, table, logit_scale, temperature):
    num_tokens, num_codes = len(tokens), len(table)
    return (
        tokens.new_empty(tokens.shape),
        tokens.new_empty(tokens.shape),
        tokens.new_empty(num_tokens, dtype=torch.long),
        tokens.new_empty(num_tokens),
        tokens.new_empty(num_codes),
        tokens.new_empty(len(token_blocks(num_tokens, num_codes)), num_codes, dtype=torch.bool),
    )


@torch.library.custom_op("ett::index_backpropagation_backward", mutates_args=())
def index_backpropagation_backward(
    grad_embeddings: torch.Tensor,
    grad_hard: torch.Tensor,
    grad_entropies: torch.Tensor,
    grad_average: torch.Tensor,
    tokens: torch.Tensor,
    table: torch.Tensor,
    codes: torch.Tensor,
    noticed: torch.Tensor,
    logit_scale: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of [`index_backpropagation`] in `tokens` and `table`. With `p` the softmax of the straight-through
    path, `a = grad_embeddings @ table.T` and `w = grad_average / N - grad_entropies * s / temperature`:

        ds = logit_scale * p * (a - sum(p a)) + P * (w - sum(P w)) / temperature
    """
    num_tokens, num_codes = len(tokens), len(table)
    grad_tokens, grad_table = torch.empty_like(tokens), torch.zeros_like(table)
    grad_table.index_add_(0, codes, grad_embeddings + grad_hard)
    grad_average = grad_average / max(num_tokens, 1)
    buffer = _buffer(tokens, num_codes, copies=2)
    for number, block in enumerate(token_blocks(num_tokens, num_codes)):
        columns = _pays(noticed[number])
        keys, weights = (table, grad_average) if columns is None else (table[columns], grad_average[columns])
        for rows in _blocks(block, 2 * len(keys), BLOCK_ELEMENTS):
            both = torch.cat([tokens[rows], logit_scale * grad_embeddings[rows]])
            logits, grad_logits = _product(both, keys, buffer).chunk(2)
            for chunk in _chunks(logits):
                sharp, grad = logits[chunk], grad_logits[chunk]
                sharp.sub_(sharp.amax(dim=-1, keepdim=True))
                _through_softmax(grad, (logit_scale * sharp).softmax(dim=-1))
                probabilities = sharp.div_(temperature).softmax(dim=-1)
                entropy_grad = sharp.mul_(-grad_entropies[rows][chunk].unsqueeze(-1)).add_(weights)
                grad.add_(_through_softmax(entropy_grad, probabilities), alpha=1 / temperature)
            torch.mm(grad_logits, keys, out=grad_tokens[rows])
            if columns is None:
                grad_table.addmm_(grad_logits.T, tokens[rows])
            else:
                grad_table.index_add_(0, columns, grad_logits.T @ tokens[rows])
    return grad_tokens, grad_table


def _through_softmax(grad: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Turns, in place, a gradient in a softmax's values into one in its logits."""
    grad.mul_(probabilities)
    return grad.addcmul_(probabilities, grad.sum(dim=-1, keepdim=True), value=-1)


@index_backpropagation_backward.register_fake
def _(grad_embeddings, grad_hard, grad_entropies, grad_average, tokens, table, *others):
    return torch.empty_like(tokens), torch.empty_like(table)


def _keep_for_backward(ctx, inputs, output):
    tokens, table, ctx.logit_scale, ctx.temperature = inputs
    _, _, codes, _, _, noticed = output
    ctx.mark_non_differentiable(codes, noticed)
    ctx.save_for_backward(tokens, table, codes, noticed)


def _backward(ctx, grad_embeddings, grad_hard, _codes, grad_entropies, grad_average, _noticed):
    tokens, table, codes, noticed = ctx.saved_tensors
    grads = index_backpropagation_backward(
        grad_embeddings,
        grad_hard,
        grad_entropies,
        grad_average,
        tokens,
        table,
        codes,
        noticed,
        ctx.logit_scale,
        ctx.temperature,
    )
    return *grads, None, None


index_backpropagation.register_autograd(_backward, setup_context=_keep_for_backward)


def _mean_over_ranks(local: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks in value; in gradient the rank's own, which DDP averages."""
    if not dist.is_initialized():
        return local
    mean = local.detach().clone()
    dist.all_reduce(mean)
    return local + (mean / dist.get_world_size() - local).detach()


class Codebook(nn.Embedding):
    """An embedding that also hands out its whole table, through its call, so that hooks which fetch offloaded
    weights see every use of them."""

    def forward(self, codes: torch.LongTensor | None = None) -> torch.Tensor:
        return self.weight if codes is None else super().forward(codes)


class IBQQuantizer(nn.Module):
    """Index backpropagation quantization (Shi et al., "Taming Scalable Visual Tokenizer for Autoregressive Image
    Generation", section 3).

    Args:
        num_codes (`int`): Codebook size K.
        dim (`int`): Width D of a code.
        l2_normalize (`bool`): Compare and use latents and codes on the unit sphere.
        logit_scale (`float`): Factor on the logits of the straight-through softmax. On the unit sphere logits lie in
            `[-1, 1]`, where a scale of 1 would spread the gradient evenly over the codebook.
        straight_through_weight (`float`): Weight `w` of a plain straight-through copy beside the softmax: the
            embeddings become `hard + (soft - sg(soft)) + w * (z - sg(z))`. 0, as in IBQ, adds none. The copy changes
            no value, and no loss of the quantizer: only gradients from outside pass through it.
        codebook_loss_weight (`float`): Weight of the term that moves codes towards latents; the commitment term, which
            moves latents towards codes, has weight 1, as in the code that made the public checkpoints.
        entropy_temperature (`float`): Temperature of the entropy term's softmax.
        entropy_over_ranks (`bool`): Whether the average entropy is that of the mean assignment over all ranks, or, as
            in the code that made the public checkpoints, of each rank's own.
    """

    entropy_eps = 1e-5

    def __init__(
        self,
        num_codes: int,
        dim: int,
        l2_normalize: bool = False,
        logit_scale: float = 1.0,
        codebook_loss_weight: float = 0.25,
        entropy_temperature: float = 0.01,
        entropy_over_ranks: bool = False,
        straight_through_weight: float = 0.0,
    ):
        super().__init__()
        self.embedding = Codebook(num_codes, dim)
        self.l2_normalize = l2_normalize
        self.set_gradient_path(logit_scale, straight_through_weight)
        self.codebook_loss_weight = codebook_loss_weight
        self.entropy_temperature = entropy_temperature
        self.entropy_over_ranks = entropy_over_ranks

    def set_gradient_path(self, logit_scale: float, straight_through_weight: float):
        """Sets how gradients pass from embeddings to latents. Codes and values stay the same.

        Raises:
            ValueError: `logit_scale` is not above 0, or `straight_through_weight` is negative.
        """
        if not logit_scale > 0:
            raise ValueError(f"logit_scale is {logit_scale}; expected a number above 0.")
        if not straight_through_weight >= 0:
            raise ValueError(f"straight_through_weight is {straight_through_weight}; expected 0 or a number above 0.")
        self.logit_scale, self.straight_through_weight = logit_scale, straight_through_weight

    def codebook(self) -> torch.Tensor:
        """The table of codes as it is used, of shape `(K, D)`."""
        table = self.embedding()
        return F.normalize(table, dim=-1) if self.l2_normalize else table

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes `(batch_size, height, width)` to embeddings `(batch_size, dim, height, width)`."""
        embeddings = self.embedding(codes)
        if self.l2_normalize:
            embeddings = F.normalize(embeddings, dim=-1)
        return embeddings.permute(0, 3, 1, 2)

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(batch_size, dim, height, width)` as they are compared with the codebook, of shape `(N, dim)`."""
        tokens = latents.permute(0, 2, 3, 1).flatten(0, 2).to(torch.promote_types(latents.dtype, torch.float32))
        return F.normalize(tokens, dim=-1) if self.l2_normalize else tokens

    def forward(self, latents: torch.Tensor, return_losses: bool = True) -> IBQQuantizerOutput:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, dim, height, width)`): The encoder's output.
            return_losses (`bool`): Whether to compute the quantization and entropy losses.
        """
        batch_size, dim, height, width = latents.shape
        losses = {}
        with torch.autocast(latents.device.type, enabled=False):
            tokens = self.tokens(latents)
            table = self.codebook().to(tokens.dtype)
            if return_losses or (torch.is_grad_enabled() and (tokens.requires_grad or table.requires_grad)):
                embeddings, hard, codes, entropies, average, _ = index_backpropagation(
                    tokens, table, self.logit_scale, self.entropy_temperature
                )
                if return_losses:
                    losses = self._losses(tokens, hard, embeddings, entropies, average)
                if self.straight_through_weight:
                    # After the losses, whose commitment term the copy would weaken.
                    embeddings = embeddings + self.straight_through_weight * (tokens - tokens.detach())
            else:
                codes = assign(tokens, table)
                embeddings = F.embedding(codes, table)
        embeddings = embeddings.view(batch_size, height, width, dim).permute(0, 3, 1, 2).to(latents.dtype)
        return IBQQuantizerOutput(embeddings=embeddings, codes=codes.view(batch_size, height, width), **losses)

    def _losses(
        self,
        tokens: torch.Tensor,
        hard: torch.Tensor,
        embeddings: torch.Tensor,
        entropies: torch.Tensor,
        average: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        quantization_loss = (
            F.mse_loss(embeddings, tokens)
            + F.mse_loss(tokens, hard.detach())
            + self.codebook_loss_weight * F.mse_loss(hard, tokens.detach())
        )
        if self.entropy_over_ranks:
            average = _mean_over_ranks(average)
        sample_entropy = entropies.mean()
        average_entropy = -(average * (average + self.entropy_eps).log()).sum()
        return {
            "quantization_loss": quantization_loss,
            "sample_entropy": sample_entropy,
            "average_entropy": average_entropy,
            "entropy_loss": sample_entropy - average_entropy,
        }


__all__ = ["IBQQuantizer", "IBQQuantizerOutput", "index_backpropagation"]
