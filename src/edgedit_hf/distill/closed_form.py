"""Closed-form starts of proxy blocks: linear algebra on the teacher's calibration features instead of random weights.

Large products run in the features' precision and on their device, sums over rows and factorisations in float64.

Shapes: n images, N tokens each, M = n·N rows, D residual width, A / A' teacher / proxy attention width, h heads, d =
A/h and r = A'/h their head widths, F / F' teacher / proxy MLP width, k teacher layers behind one proxy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import EdgeDiTError
from ..models.transformer_edgedit import EdgeDiTAttention, EdgeDiTBlock

RIDGE = 1e-4  # relative to the mean diagonal of a Gram matrix: against singularity
# Fits must hold on features they have not seen, so their ridge grows with what the data leaves open: strength ·
# features / rows. On a digits teacher with 16 to 1,024 calibration images these strengths lost least throughout; no
# constant ridge did.
SELECTION_RIDGE, REFIT_RIDGE = 0.03, 0.3
ROWS = 4096  # summed in the features' precision at a time


def weighted_gram(features: torch.Tensor, row_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_m w_m f_m f_mᵀ of rows `(M, F)` as `(F, F)` float64; `row_weight` is `(M,)`."""
    gram = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    weights = features.new_ones(len(features)) if row_weight is None else row_weight.to(features.dtype)
    for rows, weight in zip(features.split(ROWS), weights.split(ROWS)):
        gram += rows.mT @ (rows * weight.unsqueeze(1))
    return gram


def _add_ridge(gram: torch.Tensor, features: torch.Tensor, strength: float) -> torch.Tensor:
    """Add to the diagonal of the Gram matrix of `features` `(M, F)`, in place; returns what was added (0-d)."""
    count, width = features.shape
    added = max(RIDGE, strength * width / count) * gram.diagonal().mean().clamp_min(1e-30)
    gram.diagonal().add_(added)
    return added


def _with_ones(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def _root_and_inverse(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root and its inverse of second moments `(h, d, d)`, with a small ridge."""
    values, vectors = torch.linalg.eigh(moment)
    floor = RIDGE * values.mean(-1, keepdim=True).clamp_min(1e-12)
    values = values.clamp_min(0) + floor
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return root, inverse


def factor_query_key(
    query_moment: torch.Tensor, key_moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `(h, d, r)` P, R such that (qP)(kR)ᵀ/√r is the best rank-r stand-in of qkᵀ/√d on inputs with these second
    moments.

    Whitening turns the expected squared error of the scores into a Frobenius norm, so a truncated SVD of C_q^½ C_k^½ is
    optimal. The change of the softmax scale from 1/√d to 1/√r is absorbed. Keys should be centred over the tokens of an
    image: a softmax does not see what all keys share.
    """
    width = query_moment.shape[-1]
    root_q, inverse_q = _root_and_inverse(query_moment)
    root_k, inverse_k = _root_and_inverse(key_moment)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    half = values[:, :rank].sqrt().unsqueeze(-2) * (rank / width) ** 0.25
    return inverse_q @ left[..., :rank] * half, inverse_k @ right.mT[..., :rank] * half


def factor_value_output(
    value_moment: torch.Tensor, out_weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map `(h, d, r)` of the values and new output weights `(h, r, D)`: the best rank-r stand-in of o·W on averaged
    values o with this second moment `(h, d, d)`; `out_weight` is `(h, d, D)`."""
    root, inverse = _root_and_inverse(value_moment)
    left, values, right = torch.linalg.svd(root @ out_weight, full_matrices=False)
    return inverse @ left[..., :rank], values[:, :rank].unsqueeze(-1) * right[:, :rank]


def select_groups(
    features: torch.Tensor, out_weight: torch.Tensor, row_weight: torch.Tensor, keep: int, group: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which neurons (`group` 1) or heads (`group` d) to keep, so that the output of all, features·W, is best matched
    after a refit.

    Optimal brain surgeon (Hassibi & Stork, 1993) on the Gram matrix of the features, a few groups a round (heads one by
    one): the loss of leaving out group g is tr(W_gᵀ [(G⁻¹)_gg]⁻¹ W_g); the weights of the others and G⁻¹ are then
    updated in closed form, which costs less than inverting anew.

    Args:
        features: `(M, g·group)`; out_weight: `(g·group, D)`; row_weight: `(M,)`, importance of a row (its mean squared
            gate).

    Returns:
        Indices `(keep,)` of the kept groups, sorted, and the refitted weights of their features `(keep·group, D)`,
        float64.
    """
    gram = weighted_gram(features, row_weight)
    _add_ridge(gram, features, SELECTION_RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = out_weight.double()
    alive = torch.arange(features.shape[1] // group, device=features.device)
    within = torch.arange(group, device=features.device)
    while (count := len(alive)) > keep:
        blocks = inverse.view(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [g, group, group]
        parts = weight.view(count, group, -1)
        order = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2)).argsort()
        dropped = min(count - keep, max(1, count // 32)) if group == 1 else 1
        out, stay = order[:dropped], order[dropped:].sort().values
        gone, kept = ((t.unsqueeze(1) * group + within).flatten() for t in (out, stay))
        cross = inverse[kept][:, gone]
        change = torch.linalg.solve(inverse[gone][:, gone], torch.cat([cross.mT, weight[gone]], dim=1))
        weight = weight[kept] - cross @ change[:, len(kept) :]
        inverse = inverse[kept][:, kept] - cross @ change[:, : len(kept)]
        alive = alive[stay]
    return alive, weight


def refit_gated(
    features: torch.Tensor,
    gate: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ridge: float = REFIT_RIDGE,
    iterations: int = 30,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(F, D)` and bias `(D,)` that minimise Σ (gate ⊙ (features·W + b) − target)², kept near the given ones by
    a ridge.

    The gate of adaLN weighs every element differently, so the columns do not share a Gram matrix; conjugate gradients
    need only products with `features`, and the Gram matrix weighted by the rows' mean squared gate preconditions them.

    Args:
        features: `(M, F)`; gate, target: `(M, D)`.
        ridge: strength; the ridge itself is this · F / M of the Gram matrix's mean diagonal.
    """
    features = _with_ones(features)
    gate, target = gate.to(features.dtype), target.to(features.dtype)
    start = torch.cat([weight, bias.unsqueeze(0)]).to(features)
    square = gate.pow(2)
    rows, columns = square.mean(1), square.mean(0, keepdim=True).double()
    gram = weighted_gram(features, rows)
    added = _add_ridge(gram, features, ridge)
    factor = torch.linalg.cholesky(gram).to(features.dtype)  # a preconditioner need not be exact
    column_scale = (columns / columns.mean().clamp_min(1e-30)).clamp_min(1e-6)

    def operator(w: torch.Tensor) -> torch.Tensor:
        return (features.mT @ (square * (features @ w.to(features.dtype)))).double() + added * column_scale * w

    def precondition(residual: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(residual.to(factor.dtype), factor) / column_scale

    # Solve for the change of the weights, so that the ridge pulls towards where they were.
    change = torch.zeros_like(start, dtype=torch.float64)
    residual = (features.mT @ (gate * (target - gate * (features @ start)))).double()
    direction = precondition(residual)
    energy = (residual * direction).sum()
    first = energy.clone()
    for _ in range(iterations):
        if energy <= 1e-7 * first:
            break
        image = operator(direction)
        step = energy / (direction * image).sum()
        change += step * direction
        residual -= step * image
        corrected = precondition(residual)
        energy, last = (residual * corrected).sum(), energy
        direction = corrected + energy / last * direction
    solved = start.double() + change
    return solved[:-1], solved[-1]


def refit_linear(features: torch.Tensor, target: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Weights with the bias as last row, `(F + 1, K)` float64, of features `(M, F)` → target `(M, K)` by least squares,
    kept near those of `linear`."""
    features = _with_ones(features)
    start = torch.cat([linear.weight.mT, linear.bias.unsqueeze(0)]).to(features)
    gram = weighted_gram(features)
    _add_ridge(gram, features, REFIT_RIDGE)
    residual = (features.mT @ (target - features @ start)).double()
    return start.double() + torch.cholesky_solve(residual, torch.linalg.cholesky(gram))


# -------------------------------------------------------------------- blocks


def _linear(weight: torch.Tensor, bias: torch.Tensor, like: torch.Tensor) -> nn.Linear:
    """A linear layer with weights given as `(in, out)`, in the precision and on the device of `like`."""
    linear = nn.Linear(*weight.shape, device="meta")
    state = {"weight": weight.mT.to(like, copy=True).contiguous(), "bias": bias.to(like, copy=True).contiguous()}
    linear.load_state_dict(state, assign=True)
    return linear


def _average_values(qkv: torch.Tensor, heads: int, bias: torch.Tensor | None) -> torch.Tensor:
    """What attention makes of queries, keys and values `(n, N, 3·h·d)`: averaged values `(n, N, h, d)`; `bias`: `(1, h,
    N, N)`.
    """
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).transpose(1, 3).unbind(2)  # each [n, h, N, d]
    return scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


def _position_bias(attn: EdgeDiTAttention) -> torch.Tensor | None:
    return None if attn.position_bias is None else attn.position_bias()


@dataclass
class _Layer:
    """What one teacher layer computes on the calibration features: `(n, N, ·)`."""

    block: EdgeDiTBlock
    qkv: torch.Tensor
    attention: torch.Tensor  # its gated update
    preactivation: torch.Tensor  # of the MLP


def _modulate(norm: nn.Module, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, norm(x), 1 + scale)


def _modulation(block: EdgeDiTBlock, conditioning: torch.Tensor) -> Sequence[torch.Tensor]:
    """Shift, scale and gate of attention and MLP, each `(n, 1, D)`."""
    return block.modulation(conditioning).unsqueeze(1).chunk(6, dim=-1)


def _run(
    sources: Sequence[EdgeDiTBlock], x: torch.Tensor, conditioning: torch.Tensor
) -> tuple[list[_Layer], torch.Tensor]:
    """The teacher layers on `x`, looked at from inside, and their output."""
    layers = []
    for block in sources:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(block, conditioning)
        normed = _modulate(block.norm1, x, shift_a, scale_a)
        attention = gate_a * block.attn(normed)
        after = x + attention
        preactivation = block.mlp.proj_in(_modulate(block.norm2, after, shift_m, scale_m))
        layers.append(_Layer(block, block.attn.to_qkv(normed), attention, preactivation))
        x = torch.addcmul(after, gate_m, block.mlp.proj_out(block.mlp.act(preactivation)))
    return layers, x


def _weights_of(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of rows (mean squared gate, `(M,)`) and of columns (root mean squared gate, `(D,)` float64) of a gate
    `(M, D)`.
    """
    square = gate.double().pow(2)
    return square.mean(1), square.mean(0).sqrt().clamp_min(1e-12)


def _merge_attention(proxy: EdgeDiTBlock, layers: Sequence[_Layer], normed: torch.Tensor, gate: torch.Tensor) -> None:
    """Give the proxy the h most useful heads of all layers, fed from its own input, and refit their output.

    Queries, keys and values of later layers are foretold from the first one's input by least squares.
    """
    heads, rows = proxy.attn.heads, normed.flatten(0, 1)
    maps, averaged = [], []
    for layer in layers:
        linear = refit_linear(rows, layer.qkv.flatten(0, 1), layer.block.attn.to_qkv)
        qkv = (_with_ones(rows) @ linear.to(rows.dtype)).unflatten(0, normed.shape[:2])
        averaged.append(_average_values(qkv, heads, _position_bias(layer.block.attn)).flatten(0, 1))  # [M, h, d]
        maps.append(linear.unflatten(1, (3, heads, -1)))
    features = torch.cat(averaged, dim=1)  # [M, k·h, d]
    width = features.shape[2]
    gate, target = gate.expand_as(normed).flatten(0, 1), sum(layer.attention for layer in layers).flatten(0, 1)
    out = torch.cat([layer.block.attn.to_out.weight.mT for layer in layers])
    out, bias = refit_gated(features.flatten(1), gate, target, out, proxy.attn.to_out.bias)
    row_weight, column_weight = _weights_of(gate)
    kept, out = select_groups((features - features.mean(0)).flatten(1), out * column_weight, row_weight, heads, width)
    linear = torch.cat(maps, dim=2)[:, :, kept].flatten(1)
    proxy.attn.to_qkv = _linear(linear[:-1], linear[-1], proxy.attn.to_qkv.weight)
    if proxy.attn.position_bias is not None:
        tables = torch.cat([layer.block.attn.position_bias.table for layer in layers], dim=1)
        proxy.attn.position_bias.table = nn.Parameter(tables[:, kept].clone())
    out, bias = refit_gated(features[:, kept].flatten(1), gate, target, out / column_weight, bias)
    proxy.attn.to_out = _linear(out, bias, proxy.attn.to_out.weight)


def _narrow_attention(
    attn: EdgeDiTAttention, normed: torch.Tensor, gate: torch.Tensor, target: torch.Tensor, attention_dim: int
) -> None:
    """Reduce the inner width of attention, in place, by factoring each head's QKᵀ and VO, and refit its output to the
    gated target.
    """
    heads = attn.heads
    hidden_size, width = attn.to_out.weight.shape
    rank, head = attention_dim // heads, width // heads
    gate = gate.expand_as(normed).flatten(0, 1)
    row_weight, column_weight = _weights_of(gate)
    qkv = attn.to_qkv(normed)
    query, key, _ = qkv.unflatten(-1, (3, heads, head)).unbind(2)  # each [n, N, h, d]
    averaged = _average_values(qkv, heads, _position_bias(attn))

    def moment(t: torch.Tensor) -> torch.Tensor:  # (n, N, h, d) → (h, d, d)
        return torch.stack([weighted_gram(t[:, :, i].flatten(0, 1), row_weight) for i in range(heads)])

    p, r = factor_query_key(moment(query), moment(key - key.mean(1, keepdim=True)), rank)
    out = attn.to_out.weight.double().mT.unflatten(0, (heads, head)) * column_weight
    v, o = factor_value_output(moment(averaged - averaged.mean((0, 1))), out, rank)
    weight = attn.to_qkv.weight.double().unflatten(0, (3, heads, head))
    bias = attn.to_qkv.bias.double().unflatten(0, (3, heads, head, 1))
    changes = torch.stack([p, r, v]).mT  # [3, h, r, d]
    attn.to_qkv = _linear((changes @ weight).flatten(0, 2).mT, (changes @ bias).flatten(), attn.to_qkv.weight)
    features = _average_values(attn.to_qkv(normed), heads, _position_bias(attn)).flatten(2).flatten(0, 1)
    new, bias = refit_gated(features, gate, target.flatten(0, 1), (o / column_weight).flatten(0, 1), attn.to_out.bias)
    attn.to_out = _linear(new, bias, attn.to_out.weight)


def _fit_mlp(
    proxy: EdgeDiTBlock,
    layers: Sequence[_Layer],
    normed: torch.Tensor,
    gate: torch.Tensor,
    target: torch.Tensor,
    keep: int,
) -> None:
    """Give the proxy the `keep` most useful MLP neurons of all layers and refit their output to the gated target.

    The preactivations of merged layers are foretold from the proxy's own MLP input by least squares.
    """
    mlp, rows = proxy.mlp, normed.flatten(0, 1)
    gate, target = gate.expand_as(normed).flatten(0, 1), target.flatten(0, 1)
    into = torch.cat([mlp.proj_in.weight.mT, mlp.proj_in.bias.unsqueeze(0)])
    if len(layers) > 1:
        into = torch.cat(
            [refit_linear(rows, layer.preactivation.flatten(0, 1), layer.block.mlp.proj_in) for layer in layers], dim=1
        )
    hidden = mlp.act(_with_ones(rows) @ into.to(rows.dtype))  # [M, k·F]
    out, bias = torch.cat([layer.block.mlp.proj_out.weight.mT for layer in layers]), mlp.proj_out.bias
    if keep < hidden.shape[1]:
        if len(layers) > 1:
            out, bias = refit_gated(hidden, gate, target, out, bias)
        row_weight, column_weight = _weights_of(gate)
        neurons, out = select_groups(hidden, out * column_weight, row_weight, keep)
        hidden, into, out = hidden[:, neurons], into[:, neurons], out / column_weight
    mlp.proj_in = _linear(into[:-1], into[-1], mlp.proj_in.weight)
    out, bias = refit_gated(hidden, gate, target, out, bias)
    mlp.proj_out = _linear(out, bias, mlp.proj_out.weight)


@torch.no_grad()
def closed_form_block(
    sources: Sequence[EdgeDiTBlock],
    x: torch.Tensor,
    conditioning: torch.Tensor,
    attention_dim: int,
    mlp_ratio: float,
) -> EdgeDiTBlock:
    """A proxy of one or more consecutive teacher layers, fitted to calibration features without a gradient step.

    The modulation is the first layer's, whose input the proxy sees. Merged layers pool their heads and their neurons,
    of which the most useful are kept. If the attention is narrower, each head's QKᵀ and VO products are factored at the
    smaller width and the output projection refitted; if the MLP is narrower, its most useful neurons are kept; last,
    the MLP's output projection is refitted to what the target still lacks, so it also mends the attention's error.

    Args:
        sources: the teacher layers that are replaced, in order, each fed with the output of the one before.
        x: input of the first, `(n, N, D)`; conditioning: `(n, D)`, activated. More rows than the widest layer has
            neurons, please: some times as many for merged layers.
        attention_dim, mlp_ratio: sizes of the proxy.

    Raises:
        EdgeDiTError: the proxy is wider than its teacher.
    """
    proxy, hidden_size = copy.deepcopy(sources[0]), x.shape[-1]
    width, neurons, keep = proxy.attn.to_out.in_features, proxy.mlp.proj_in.out_features, int(hidden_size * mlp_ratio)
    if attention_dim > width or keep > neurons:
        raise EdgeDiTError(
            f"A closed-form proxy cannot be wider than its teacher: attention {attention_dim} of {width}, MLP {keep} "
            f"of {neurons}."
        )
    layers, target = _run(sources, x, conditioning)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(proxy, conditioning)
    normed = _modulate(proxy.norm1, x, shift_a, scale_a)
    if len(layers) > 1:
        _merge_attention(proxy, layers, normed, gate_a)
    if attention_dim < width:
        _narrow_attention(proxy.attn, normed, gate_a, sum(layer.attention for layer in layers), attention_dim)
    after = x + gate_a * proxy.attn(normed)
    if len(layers) > 1 or attention_dim < width or keep < neurons:
        _fit_mlp(proxy, layers, _modulate(proxy.norm2, after, shift_m, scale_m), gate_m, target - after, keep)
    return proxy


@torch.no_grad()
def truncated_block(source: EdgeDiTBlock, attention_dim: int, mlp_ratio: float) -> EdgeDiTBlock:
    """The plain alternative to compare with: the first `attention_dim` / heads channels of every head and the first MLP
    neurons.
    """
    proxy = copy.deepcopy(source)
    hidden_size, width = source.attn.to_out.weight.shape
    heads, keep = source.attn.heads, int(hidden_size * mlp_ratio)
    channels = (torch.arange(heads).unsqueeze(1) * (width // heads) + torch.arange(attention_dim // heads)).flatten()
    rows = torch.cat([channels + i * width for i in range(3)])
    attn, mlp = proxy.attn, proxy.mlp
    attn.to_qkv = _linear(attn.to_qkv.weight[rows].mT, attn.to_qkv.bias[rows], attn.to_qkv.weight)
    attn.to_out = _linear(attn.to_out.weight[:, channels].mT, attn.to_out.bias, attn.to_out.weight)
    mlp.proj_in = _linear(mlp.proj_in.weight[:keep].mT, mlp.proj_in.bias[:keep], mlp.proj_in.weight)
    mlp.proj_out = _linear(mlp.proj_out.weight[:, :keep].mT, mlp.proj_out.bias, mlp.proj_out.weight)
    return proxy


@torch.no_grad()
def combine_blocks(attention_from: EdgeDiTBlock, mlp_from: EdgeDiTBlock) -> EdgeDiTBlock:
    """A block with the attention (and its modulation) of one proxy and the MLP (and its modulation) of another."""
    proxy = copy.deepcopy(attention_from)
    proxy.mlp = copy.deepcopy(mlp_from.mlp)
    half = proxy.modulation.out_features // 2  # the last three of the six chunks modulate the MLP
    proxy.modulation.weight[half:] = mlp_from.modulation.weight[half:]
    proxy.modulation.bias[half:] = mlp_from.modulation.bias[half:]
    return proxy
