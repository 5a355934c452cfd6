"""Log-probabilities of tokens: the one definition that sampling, scoring and training share.

The log-softmax is computed in float32 (float64 for float64 logits), row by row, after the logits were divided by the
temperature. `linear_token_logprobs` gives the same bits as `token_logprobs` on the logits of a linear head, without
a tensor of the logits of all rows. On CPUs in float32 and bfloat16 all of it is done by upslope.kernels.rows.
"""

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upslope.kernels import rows as fused
from upslope.kernels import usable
from upslope.kernels.products import least_rows, pad_rows
from upslope.kernels.rows import accumulate_

from ._checks import check_range, check_rank, clean_rows, floats, nan_unless, select, shape

CHUNK_ROWS = 1024
KEPT_LOGITS_BYTES = 512 * 2**20


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, at least float32. [..., V] -> [..., V].

    ValueError: temperature not positive.
    """
    check_range(0.0, open_low=True, temperature=temperature)
    if _fused(logits):
        return _LogSoftmax.apply(logits, temperature)
    (logits,) = floats(logits)
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token]: [B, T, V], [B, T] -> [B, T], or any other leading dimensions.

    No shift is made: logits[b, t] must be those that predict tokens[b, t]. A row of NaN gives NaN, and gradient 0 if
    it is masked afterwards. ValueError: shapes do not fit, tokens are not integers in 0..V-1, temperature <= 0.
    """
    _check_tokens(tokens_BT, logits_BTV.shape[:-1], logits_BTV.shape[-1], logits=logits_BTV)
    ok_BT, logits_BTV = clean_rows(logits_BTV)
    return nan_unless(ok_BT, _gather(log_softmax(logits_BTV, temperature), tokens_BT))


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H = -sum_v p_v log p_v in nats of p = softmax(logits / temperature). [..., V] -> [...].

    This is the entropy of the distribution at that temperature. Logits of -inf contribute 0.
    """
    check_range(0.0, open_low=True, temperature=temperature)
    ok, logits = clean_rows(logits)
    fused = _fused(logits)
    return nan_unless(ok, _Entropy.apply(logits, temperature) if fused else _entropy(log_softmax(logits, temperature)))


@overload
def linear_token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    *,
    chunk: int = ...,
    temperature: float = ...,
    with_entropy: Literal[False] = ...,
    with_mean: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    *,
    chunk: int = ...,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_mean: bool = ...,
) -> Tensor | tuple[Tensor, ...]: ...


def linear_token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    *,
    chunk: int = CHUNK_ROWS,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_mean: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """token_logprobs(hidden @ weight.T, tokens, temperature), `chunk` rows at a time: never builds [N, V].

    [N, D], [V, D], [N] -> [N], at least float32. with_entropy and with_mean return a tuple: logp_N, then entropy_N,
    then mean_logp_N = 1/V sum_v log p_v (what label smoothing adds, `supervised_losses.nll`). Differentiable once in
    hidden and weight: backward skips rows whose gradient is 0, and accumulates the weight's gradient over the chunks
    in float32 (or float64) before casting it to the weight's dtype. Up to KEPT_LOGITS_BYTES of logits stay in memory
    for it, in the dtype of the inputs; those of further chunks are computed again, to the same bits.

    Logits are computed in the dtype of the inputs. A row's result does not depend on how many rows stand beside it:
    chunks of fewer than 12 rows are padded to 4, 8 or 12, the counts from which the matrix products of CPUs agree.
    ValueError: shapes do not fit, dtypes differ, tokens out of range, chunk < 1, temperature <= 0.
    """
    check_rank(2, hidden_ND=hidden_ND, weight_VD=weight_VD)
    if hidden_ND.shape[1] != weight_VD.shape[1] or hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden_ND and weight_VD must agree in D and dtype: {shape(hidden_ND)} {hidden_ND.dtype}, "
            f"{shape(weight_VD)} {weight_VD.dtype}"
        )
    _check_tokens(tokens_N, hidden_ND.shape[:1], weight_VD.shape[0], hidden_ND=hidden_ND, weight_VD=weight_VD)
    check_range(1, chunk=chunk)
    check_range(0.0, open_low=True, temperature=temperature)
    room = KEPT_LOGITS_BYTES if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad) else 0
    logp_N, entropy_N, mean_N = _LinearTokenLogprobs.apply(
        hidden_ND, weight_VD, tokens_N, temperature, chunk, with_entropy, with_mean, room
    )
    if not (with_entropy or with_mean):
        return logp_N
    return (logp_N, *([entropy_N] if with_entropy else []), *([mean_N] if with_mean else []))


def _check_tokens(tokens: Tensor, rows: torch.Size, vocabulary: int, **others: Tensor) -> None:
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.shape != rows:
        named = ", ".join(f"{k} {shape(x)}" for k, x in others.items())
        raise ValueError(f"tokens must be integers, one per row of {named}: got {tokens.dtype} {shape(tokens)}")
    if tokens.numel():
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"tokens must lie in 0..{vocabulary - 1}, got {low}..{high}")


def _gather(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)


def _fused(logits: Tensor) -> bool:
    return usable(logits) and logits.dim() > 0 and logits.numel() > 0


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        logp = fused.log_softmax(logits, temperature)
        ctx.save_for_backward(logp)
        ctx.options = logits.dtype, temperature
        return logp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (logp,) = ctx.saved_tensors
        dtype, temperature = ctx.options
        d_scaled = torch.ops.aten._log_softmax_backward_data(grad_outputs[0], logp, -1, logp.dtype)
        return (d_scaled / temperature).to(dtype), None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.temperature = temperature
        rows = logits.reshape(-1, logits.shape[-1])
        tokens = torch.zeros(rows.shape[0], dtype=torch.long)
        entropies = fused.statistics(rows, tokens, temperature, with_entropy=True).entropy
        assert entropies is not None
        return entropies.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (logits,) = ctx.saved_tensors
        logp = log_softmax(logits, ctx.temperature)
        above = select(~logp.detach().isneginf(), logp) + _entropy(logp).unsqueeze(-1)
        return (-logp.exp() * above * (grad_outputs[0] / ctx.temperature).unsqueeze(-1)).to(logits.dtype), None


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * select(~logp.detach().isneginf(), logp)).sum(-1)


def _head(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T with a row count from which a row's bits do not depend on the count."""
    return F.linear(pad_rows(hidden, least=least_rows(weight.numel())), weight)[: hidden.shape[0]]


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk))


def _statistics(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, with_mean: bool
) -> fused.Statistics:
    if _fused(logits):
        return fused.statistics(logits, tokens, temperature, with_entropy=with_entropy, with_mean=with_mean)
    logp = log_softmax(logits, temperature)
    return fused.Statistics(
        _gather(logp, tokens),
        entropy=_entropy(logp) if with_entropy else None,
        mean=logp.mean(-1) if with_mean else None,
    )


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
        with_mean: bool,
        room: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        tokens = tokens.long()
        logp = torch.empty(hidden.shape[0], dtype=exact, device=hidden.device)
        entropies = torch.empty_like(logp) if with_entropy else logp.new_empty(0)
        means = torch.empty_like(logp) if with_mean else logp.new_empty(0)
        ctx.found, ctx.kept = [], []
        for part in _chunks(hidden.shape[0], chunk):
            logits = _head(hidden[part], weight)
            found = _statistics(logits, tokens[part], temperature, with_entropy, with_mean)
            logp[part] = found.logp
            if found.entropy is not None:
                entropies[part] = found.entropy
            if found.mean is not None:
                means[part] = found.mean
            room -= logits.nbytes
            ctx.found.append(found)
            ctx.kept.append(logits if room >= 0 else None)
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.options = (temperature, chunk, with_entropy, with_mean)
        return logp, entropies, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_logp, grad_entropy, grad_mean = grad_outputs
        hidden, weight, tokens = ctx.saved_tensors
        temperature, chunk, with_entropy, with_mean = ctx.options
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        used = grad_logp != 0
        if with_entropy:
            used = used | (grad_entropy != 0)
        if with_mean:
            used = used | (grad_mean != 0)
        exact = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = None
        for i, part in enumerate(_chunks(hidden.shape[0], chunk)):
            # taken out, because it is overwritten: a second backward computes it again
            logits, ctx.kept[i] = ctx.kept[i], None
            inside = used[part].nonzero().squeeze(1)
            if not len(inside):
                continue
            whole = len(inside) == len(used[part])
            rows = part if whole else inside + part.start
            h = hidden[rows]
            if logits is None:
                logits = _head(h, weight)
            elif not whole:
                logits = logits[inside]
            d_logits = _logits_gradient(
                logits,
                tokens[rows],
                ctx.found[i] if whole else ctx.found[i].of(inside),
                temperature,
                grad_logp[rows],
                grad_entropy[rows] if with_entropy else None,
                grad_mean[rows] if with_mean else None,
            )
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if not needs_weight:
                continue
            # float32 adds inside the product; lower precisions add the chunks' products in float32
            if d_weight is None:
                d_weight = d_logits.t() @ h
            elif weight.dtype == exact:
                d_weight.addmm_(d_logits.t(), h)
            else:
                d_weight, product = d_weight.to(exact), d_logits.t() @ h
                accumulate_(d_weight, product)
        if needs_weight:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def _logits_gradient(
    logits: Tensor,
    tokens: Tensor,
    found: fused.Statistics,
    temperature: float,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    grad_mean: Tensor | None,
) -> Tensor:
    """d/d logits of sum(grad_logp * logp[token] + grad_entropy * H + grad_mean * mean_v logp_v), in their dtype.

    [n, V], may reuse the logits' memory. With z = logits / temperature: d logp_k / d z_v = 1[v = k] - p_v,
    d H / d z_v = -p_v (log p_v + H), and the mean over the vocabulary has 1/V - p_v.
    """
    if _fused(logits):
        return fused.logits_gradient_(logits, tokens, found, temperature, grad_logp, grad_entropy, grad_mean)
    logp, grad_logp = log_softmax(logits, temperature), grad_logp / temperature
    grad_entropy, grad_mean = (None if x is None else x / temperature for x in (grad_entropy, grad_mean))
    p = logp.exp()
    both = grad_logp if grad_mean is None else grad_logp + grad_mean
    if grad_entropy is None:
        gradient = p.mul_(-both.unsqueeze(1))
    else:
        shifted = logp.add_(_entropy(logp).unsqueeze(1)).mul_(grad_entropy.unsqueeze(1)).add_(both.unsqueeze(1))
        gradient = p.mul_(shifted).neg_()
    if grad_mean is not None:
        gradient.add_((grad_mean / logp.shape[1]).unsqueeze(1))
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    gradient[rows, tokens] += grad_logp
    return gradient.to(logits.dtype)
