"""Closed-form starts of proxy blocks: linear algebra on the teacher's calibration features instead of random weights.

Shapes: n images, N tokens each, M = n·N rows, D residual width, A / A' teacher / proxy attention width, h / h' heads,
d = A/h and r = A'/h' their head widths, F / F' teacher / proxy MLP width, k teacher layers behind one proxy. Of a proxy
that merges tokens, N are the merged ones.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import EdgeDiTError
from ..genotype import LayerSpec
from ..models.transformer_edgedit import (
    EdgeDiTAttention,
    EdgeDiTBlock,
    LowRankModulation,
    RelativePositionBias,
    new_modulation,
)
from .least_squares import (
    factor_query_key,
    factor_value_output,
    low_rank,
    refit_gated,
    refit_linear,
    root_and_inverse,
    select_groups,
    weighted_gram,
    with_ones,
    with_ridge,
)

IMAGES = 16  # looked at with gradients, or head by head, at a time


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


def _modulation_importance(block: EdgeDiTBlock, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    """How much each of the 6D values of a layer's modulation moves its output: the mean over images of the squared
    norm of the derivative, estimated with one random direction an image; `(6D,)` float64.
    """
    generator, total = torch.Generator().manual_seed(0), x.new_zeros(block.modulation.out_features, dtype=torch.float64)
    for tokens, condition in zip(x.split(IMAGES), conditioning.split(IMAGES)):
        with torch.enable_grad():
            modulation = block.modulation(condition).detach().requires_grad_(True)
            output = block(tokens, None, modulation.unflatten(1, (6, -1)))
            direction = torch.randn(output.shape, generator=generator).to(output)
            (gradient,) = torch.autograd.grad(output, modulation, direction)
        total += gradient.double().square().sum(0)
    return total / len(x)


def _fit_modulation(proxy: EdgeDiTBlock, rank: int, x: torch.Tensor, conditioning: torch.Tensor) -> None:
    """Replace the proxy's whole modulation, in place, by its mean over the calibration and a remainder of this rank."""
    whole, mean = proxy.modulation, conditioning.double().mean(0)
    weight, bias = whole.weight.double(), whole.bias.double()
    average = weight @ mean + bias
    made = new_modulation(x.shape[-1], rank).to(whole.weight)
    if rank:
        centred = conditioning.double() - mean
        covariance = centred.mT @ centred / len(centred)
        up, down = low_rank(weight, covariance, _modulation_importance(proxy, x, conditioning), rank)
        made.down.weight.copy_(down)
        made.up.weight.copy_(up)
        made.up.bias.copy_(average - up @ (down @ mean))
    else:
        made.bias.copy_(average)
    proxy.modulation = made


def _set_token_merge(block: EdgeDiTBlock, merge: int) -> None:
    """Let a block work on the means of `merge` × `merge` tokens."""
    block.token_merge = merge
    if (bias := block.attn.position_bias) is not None:
        block.attn.position_bias = RelativePositionBias(bias.grid, block.attn.heads, merge).to(bias.table)
        block.attn.position_bias.table = bias.table


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
    own, maps, averaged = copy.deepcopy(proxy.attn.position_bias), [], []
    for layer in layers:
        linear = refit_linear(rows, layer.qkv.flatten(0, 1), layer.block.attn.to_qkv)
        qkv = (with_ones(rows) @ linear.to(rows.dtype)).unflatten(0, normed.shape[:2])
        if own is not None:
            own.table = layer.block.attn.position_bias.table
        averaged.append(_average_values(qkv, heads, None if own is None else own()).flatten(0, 1))  # [M, h, d]
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


@dataclass(frozen=True)
class _Group:
    """Heads that share one attention pattern, the softmax of the weighted sum of their scores, and how many new heads
    (`slots`) carry their values.
    """

    heads: tuple[int, ...]
    weights: torch.Tensor  # [g], summing to 1
    slots: int = 1


def join_heads(cost: torch.Tensor, count: int) -> list[tuple[int, ...]]:
    """`count` groups of heads, of nearly equal sizes, so that the summed `cost` `(h, h)` of all pairs within groups is
    small: greedily joined, then mended by exchanges.
    """
    groups: list[list[int]] = [[i] for i in range(len(cost))]
    most = -(-len(cost) // count)
    price = cost.tolist()

    def between(a: Sequence[int], b: Sequence[int]) -> float:
        return sum(price[i][j] for i in a for j in b)

    while len(groups) > count:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        fitting = [(a, b) for a, b in pairs if len(groups[a]) + len(groups[b]) <= most] or pairs
        a, b = min(fitting, key=lambda pair: between(groups[pair[0]], groups[pair[1]]))
        groups[b] += groups.pop(a)
    better = True
    while better:
        better = False
        for left, right in itertools.combinations(groups, 2):
            for i, j in itertools.product(range(len(left)), range(len(right))):
                with_one, with_other = left[:i] + left[i + 1 :], right[:j] + right[j + 1 :]
                one, other = left[i], right[j]
                now = between([one], with_one) + between([other], with_other)
                if between([other], with_one) + between([one], with_other) < now * (1 - 1e-9):
                    left[i], right[j], better = other, one, True
    return sorted(tuple(sorted(group)) for group in groups)


def _joining_cost(
    scores: torch.Tensor, values: torch.Tensor, energy: torch.Tensor, row_weight: torch.Tensor
) -> torch.Tensor:
    """`(h, h)`: squared error of the output where two heads share the softmax of their scores' mean, weighted by
    `energy` `(h,)`.

    Args:
        scores: `(n, h, N, N)`. values: `(n, h, N, d)`, so turned that their squares are those of the output.
        row_weight: `(n, N)`.
    """
    own = torch.softmax(scores, -1) @ values
    cost = scores.new_zeros(len(energy), len(energy))
    for i in range(len(energy) - 1):
        share = (energy[i] / (energy[i] + energy[i + 1 :])).to(scores).view(-1, 1, 1)
        pattern = torch.softmax(share * scores[:, i : i + 1] + (1 - share) * scores[:, i + 1 :], -1)  # [n, j, N, N]
        errors = (pattern @ values[:, i : i + 1] - own[:, i : i + 1]).square().sum(-1)
        errors = errors + (pattern @ values[:, i + 1 :] - own[:, i + 1 :]).square().sum(-1)  # [n, j, N]
        cost[i, i + 1 :] = cost[i + 1 :, i] = (errors * row_weight.unsqueeze(1)).sum((0, 2))
    return cost


def _padded(used: torch.Tensor, silent: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps `(w, ·)` widened to `rank` columns that add nothing to their product, but can learn: random ones of
    `used`, zeros of `silent`.
    """
    width, columns = used.shape
    more = torch.randn(width, rank - columns, generator=torch.Generator().manual_seed(columns), dtype=used.dtype)
    more = more.to(used.device) * used.square().mean().sqrt()
    return torch.cat([used, more], 1), torch.cat([silent, silent.new_zeros(len(silent), rank - columns)], 1)


def _change_heads(
    attn: EdgeDiTAttention,
    normed: torch.Tensor,
    gate: torch.Tensor,
    target: torch.Tensor,
    heads: int,
    attention_dim: int,
) -> None:
    """Give attention another number of heads, in place, each of width `attention_dim` / `heads`, and refit its output
    to the gated target.

    Fewer heads: those whose patterns can stand in for each other are joined; a joined head's scores are the mean of
    theirs, weighted by what a change of their patterns does to the output, and as low a rank as its width asks for is
    the best (QKᵀ and VO are factored). If they are no wider than before, keeping the most useful ones is tried too, and
    the better is taken. More heads: each head's values are divided among several that share its pattern, by what they
    contribute.
    """
    old, width = attn.heads, attn.to_out.in_features
    head, rank = width // old, attention_dim // heads
    gate = gate.expand_as(normed).flatten(0, 1)
    row_weight, column_weight = _weights_of(gate)
    target = target.flatten(0, 1)
    bias, table = _position_bias(attn), None if attn.position_bias is None else attn.position_bias.table
    qkv = attn.to_qkv(normed).unflatten(-1, (3, old, head))
    out = attn.to_out.weight.double().mT.unflatten(0, (old, head)) * column_weight  # [h, d, D]
    centred = qkv[:, :, 2] - qkv[:, :, 2].mean(1, keepdim=True)
    moments = torch.stack([weighted_gram(centred[:, :, i].flatten(0, 1), row_weight) for i in range(old)])
    energy = torch.einsum("hde,hdk,hek->h", moments, out, out).clamp_min(1e-30)

    def candidates() -> Iterator[list[_Group]]:
        if heads > old:
            averaged = _average_values(qkv.flatten(2), old, bias)
            averaged = averaged - averaged.mean((0, 1))
            worth = []
            for i in range(old):
                root, _ = root_and_inverse(weighted_gram(averaged[:, :, i].flatten(0, 1), row_weight)[None])
                parts = torch.linalg.svdvals(root[0] @ out[i]).square().split(rank)
                worth += [(float(part.sum()), i) for part in parts] + [(0.0, i)] * heads
            slots = [i for _, i in sorted(worth, key=lambda pair: -pair[0])[:heads]]
            yield [_Group((i,), energy.new_ones(1), slots.count(i)) for i in sorted(set(slots))]
            return
        images = slice(0, IMAGES)
        query, key, value = qkv[images].permute(2, 0, 3, 1, 4).unbind(0)  # each [n, h, N, d]
        scores = query @ key.mT / head**0.5 + (0 if bias is None else bias)
        turned = value @ torch.linalg.cholesky(with_ridge(out @ out.mT)).to(value)
        weights = row_weight.view(normed.shape[:2])[images].to(scores)
        groups = join_heads(_joining_cost(scores, turned, energy, weights), heads)
        yield [_Group(group, energy[list(group)] / energy[list(group)].sum()) for group in groups]
        if rank <= head:
            averaged = _average_values(qkv.flatten(2), old, bias).flatten(0, 1)  # [M, h, d]
            centred = (averaged - averaged.mean(0)).flatten(1)
            kept, _ = select_groups(centred, out.flatten(0, 1), row_weight, heads, head)
            yield [_Group((i,), energy.new_ones(1)) for i in kept.tolist()]

    best: tuple[float, nn.Linear, nn.Linear, torch.Tensor | None] | None = None
    weight, shift = (t.double().unflatten(0, (3, old, head)) for t in (attn.to_qkv.weight, attn.to_qkv.bias))
    for groups in candidates():
        rows, outputs, tables = [], [], []  # of the new heads
        for group in groups:
            chosen, size = list(group.heads), len(group.heads)
            parts = qkv[:, :, :, chosen]  # [n, N, 3, g, d]
            share = group.weights.view(-1, 1).to(qkv)
            query, key, value = ((parts[:, :, i] * (share if i == 0 else 1)).flatten(2) for i in range(3))
            pattern_bias = None if bias is None else (bias[:, chosen] * share.unsqueeze(-1)).sum(1, keepdim=True)
            averaged = scaled_dot_product_attention(
                query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), attn_mask=pattern_bias, scale=head**-0.5
            ).squeeze(1)
            # factor_query_key expects scores divided by the root of the joined width.
            query, key = query * size**0.5, key - key.mean(1, keepdim=True)
            of_query, of_key = (weighted_gram(t.flatten(0, 1), row_weight)[None] for t in (query, key))
            p, r = (maps[0] for maps in factor_query_key(of_query, of_key, rank))
            averaged = (averaged - averaged.mean((0, 1))).flatten(0, 1)
            joined = out[chosen].flatten(0, 1)
            total = rank * group.slots
            v, o = (t[0] for t in factor_value_output(weighted_gram(averaged, row_weight)[None], joined[None], total))
            p, r = _padded(p, r, rank)
            v, o = _padded(v, o.mT, total)
            stack, column = (t[:, chosen].flatten(1, 2) for t in (weight, shift))  # [3, g·d, D], [3, g·d]
            scale = (size**0.5 * group.weights).repeat_interleave(head)
            p = p * scale.unsqueeze(1)
            for slot in range(group.slots):
                maps = torch.stack([p, r, v[:, slot * rank : (slot + 1) * rank]]).mT  # [3, r, g·d]
                rows.append(torch.cat([maps @ stack, maps @ column.unsqueeze(-1)], dim=-1))  # [3, r, D + 1]
                outputs.append(o[:, slot * rank : (slot + 1) * rank].mT)
                if bias is not None:
                    tables.append(table[:, chosen] @ group.weights.to(bias))
        linear = torch.stack(rows, dim=1).flatten(0, 2).mT  # [D + 1, 3·h'·r]
        to_qkv = _linear(linear[:-1], linear[-1], attn.to_qkv.weight)
        new_table = None if bias is None else nn.Parameter(torch.stack(tables, dim=1))
        if new_table is not None:
            attn.position_bias.table = new_table
        features = _average_values(to_qkv(normed), heads, _position_bias(attn)).flatten(2).flatten(0, 1)
        start = torch.cat(outputs) / column_weight
        new, constant = refit_gated(features, gate, target, start, attn.to_out.bias)
        fitted = gate * (features @ new.to(features) + constant.to(features))
        error = (fitted - target).double().square().sum().item()
        if best is None or error < best[0]:
            best = error, to_qkv, _linear(new, constant, attn.to_out.weight), new_table
    _, attn.to_qkv, attn.to_out, new_table = best
    if new_table is not None:
        attn.position_bias.table = new_table
    attn.heads = heads


def _fit_mlp(
    proxy: EdgeDiTBlock,
    layers: Sequence[_Layer],
    normed: torch.Tensor,
    gate: torch.Tensor,
    target: torch.Tensor,
    keep: int,
    foretold: bool,
) -> None:
    """Give the proxy the `keep` most useful MLP neurons of all layers and refit their output to the gated target.

    Where the proxy's own MLP input is not a layer's, the layers' preactivations are `foretold` from it by least
    squares.
    """
    mlp, rows = proxy.mlp, normed.flatten(0, 1)
    gate, target = gate.expand_as(normed).flatten(0, 1), target.flatten(0, 1)
    into = torch.cat([mlp.proj_in.weight.mT, mlp.proj_in.bias.unsqueeze(0)])
    if foretold:
        into = torch.cat(
            [refit_linear(rows, layer.preactivation.flatten(0, 1), layer.block.mlp.proj_in) for layer in layers], dim=1
        )
    hidden = mlp.act(with_ones(rows) @ into.to(rows.dtype))  # [M, k·F]
    out, bias = torch.cat([layer.block.mlp.proj_out.weight.mT for layer in layers]), mlp.proj_out.bias
    if keep < hidden.shape[1]:
        if foretold:
            out, bias = refit_gated(hidden, gate, target, out, bias)
        row_weight, column_weight = _weights_of(gate)
        neurons, out = select_groups(hidden, out * column_weight, row_weight, keep)
        hidden, into, out = hidden[:, neurons], into[:, neurons], out / column_weight
    mlp.proj_in = _linear(into[:-1], into[-1], mlp.proj_in.weight)
    out, bias = refit_gated(hidden, gate, target, out, bias)
    mlp.proj_out = _linear(out, bias, mlp.proj_out.weight)


@torch.no_grad()
def closed_form_block(
    sources: Sequence[EdgeDiTBlock], x: torch.Tensor, conditioning: torch.Tensor, layer: LayerSpec
) -> EdgeDiTBlock:
    """A proxy of one or more consecutive teacher layers, fitted to calibration features without a gradient step.

    The modulation is the first layer's, whose input the proxy sees: whole, or its mean over the calibration, with or
    without a remainder of low rank. Merged layers pool their heads and their neurons, of which the most useful are
    kept. If there are fewer heads, similar ones are joined (or the most useful kept); if there are more, each head's
    values are divided among several; if they are narrower, their QKᵀ and VO products are factored at the smaller width.
    The output projection is then refitted. If the MLP is narrower, its most useful neurons are kept; last, its output
    projection is refitted to what the target still lacks, so it also mends the attention's error. A proxy that merges
    tokens is fitted to the means of the teacher's features.

    Args:
        sources: the teacher layers that are replaced, in order, each fed with the output of the one before.
        x: input of the first, `(n, N, D)`; conditioning: `(n, D)`, activated. More rows than the widest layer has
            neurons, please: some times as many for merged layers, and four times as many for merged tokens.
        layer: what the proxy is.

    Raises:
        EdgeDiTError: the proxy is wider than its teacher.
    """
    proxy, hidden_size = copy.deepcopy(sources[0]), x.shape[-1]
    width, neurons, keep = (
        proxy.attn.to_out.in_features,
        proxy.mlp.proj_in.out_features,
        int(hidden_size * layer.mlp_ratio),
    )
    _check_sizes(proxy, layer)
    layers, target = _run(sources, x, conditioning)
    if layer.modulation_rank is not None:
        _fit_modulation(proxy, layer.modulation_rank, x, conditioning)
    if layer.token_merge > 1:
        _set_token_merge(proxy, layer.token_merge)
        x, target = proxy.merge_tokens(x), proxy.merge_tokens(target)
        layers = [
            replace(
                found,
                qkv=proxy.merge_tokens(found.qkv),
                attention=proxy.merge_tokens(found.attention),
                preactivation=proxy.merge_tokens(found.preactivation),
            )
            for found in layers
        ]
    foretold = len(layers) > 1 or layer.modulation_rank is not None or layer.token_merge > 1
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(proxy, conditioning)
    normed = _modulate(proxy.norm1, x, shift_a, scale_a)
    attention = sum(found.attention for found in layers)
    if foretold:
        _merge_attention(proxy, layers, normed, gate_a)
    if layer.num_heads != proxy.attn.heads:
        _change_heads(proxy.attn, normed, gate_a, attention, layer.num_heads, layer.attention_dim)
    elif layer.attention_dim < width:
        _narrow_attention(proxy.attn, normed, gate_a, attention, layer.attention_dim)
    after = x + gate_a * proxy.attn(normed)
    if foretold or layer.attention_dim < width or layer.num_heads != sources[0].attn.heads or keep < neurons:
        normed = _modulate(proxy.norm2, after, shift_m, scale_m)
        _fit_mlp(proxy, layers, normed, gate_m, target - after, keep, foretold)
    return proxy


def _check_sizes(source: EdgeDiTBlock, layer: LayerSpec) -> None:
    """Refuse a proxy that has more of anything than the layer it is made from."""
    hidden_size, width = source.attn.to_out.weight.shape
    neurons, keep = source.mlp.proj_in.out_features, int(hidden_size * layer.mlp_ratio)
    if layer.attention_dim > width or keep > neurons:
        raise EdgeDiTError(
            f"A closed-form proxy cannot be wider than its teacher: attention {layer.attention_dim} of {width}, MLP "
            f"{keep} of {neurons}."
        )
    if layer.modulation_rank is not None and layer.modulation_rank > hidden_size:
        raise EdgeDiTError(
            f"A proxy's modulation_rank {layer.modulation_rank} cannot be above the teacher's width {hidden_size}, the "
            "rank of adaLN's whole projection."
        )
    if not isinstance(source.modulation, nn.Linear) or source.token_merge > 1:
        raise EdgeDiTError(
            f"A proxy is made from a teacher's whole layer; this one has a {type(source.modulation).__name__} for its "
            f"modulation and merges {source.token_merge} × {source.token_merge} tokens."
        )


@torch.no_grad()
def truncated_block(source: EdgeDiTBlock, layer: LayerSpec) -> EdgeDiTBlock:
    """The plain alternative to compare with, from the weights alone: the first channels of every head (of which
    neighbours make a wider one, or pieces narrower ones), the first MLP neurons, adaLN's bias and the largest singular
    values of its weight.
    """
    _check_sizes(source, layer)
    proxy = copy.deepcopy(source)
    hidden_size, width = source.attn.to_out.weight.shape
    keep = int(hidden_size * layer.mlp_ratio)
    channels = _leading_channels(source.attn.heads, width, layer.num_heads, layer.attention_dim)
    rows = torch.cat([channels + i * width for i in range(3)])
    attn, mlp = proxy.attn, proxy.mlp
    attn.to_qkv = _linear(attn.to_qkv.weight[rows].mT, attn.to_qkv.bias[rows], attn.to_qkv.weight)
    attn.to_out = _linear(attn.to_out.weight[:, channels].mT, attn.to_out.bias, attn.to_out.weight)
    if attn.position_bias is not None and layer.num_heads != attn.heads:
        first = channels.view(layer.num_heads, -1)[:, 0] // (width // attn.heads)  # the old head of the first channel
        attn.position_bias.table = nn.Parameter(attn.position_bias.table[:, first].clone())
    attn.heads = layer.num_heads
    mlp.proj_in = _linear(mlp.proj_in.weight[:keep].mT, mlp.proj_in.bias[:keep], mlp.proj_in.weight)
    mlp.proj_out = _linear(mlp.proj_out.weight[:, :keep].mT, mlp.proj_out.bias, mlp.proj_out.weight)
    if layer.modulation_rank is not None:
        whole = source.modulation
        proxy.modulation = new_modulation(hidden_size, layer.modulation_rank).to(whole.weight)
        if isinstance(proxy.modulation, LowRankModulation):
            same = torch.eye(hidden_size, dtype=torch.float64, device=whole.weight.device)
            up, down = low_rank(whole.weight.double(), same, same.new_ones(6 * hidden_size), layer.modulation_rank)
            proxy.modulation.down.weight.copy_(down)
            proxy.modulation.up.weight.copy_(up)
            proxy.modulation.up.bias.copy_(whole.bias)
        else:
            proxy.modulation.bias.copy_(whole.bias)
    if layer.token_merge > 1:
        _set_token_merge(proxy, layer.token_merge)
    return proxy


def _leading_channels(heads: int, width: int, new_heads: int, new_width: int) -> torch.Tensor:
    """Channels `(A',)` of the heads side by side that make the new heads: the first ones of each share."""
    rank = new_width // new_heads
    # No wider than before: the first heads; otherwise equal shares of all channels.
    share = width // heads if rank <= width // heads and new_heads < heads else width // new_heads
    return (torch.arange(new_heads).unsqueeze(1) * share + torch.arange(rank)).flatten()


@torch.no_grad()
def combine_blocks(attention_from: EdgeDiTBlock, mlp_from: EdgeDiTBlock) -> EdgeDiTBlock:
    """A block with the attention (and its modulation) of one proxy and the MLP (and its modulation) of another; both
    modulations are whole, or both static."""
    proxy = copy.deepcopy(attention_from)
    proxy.mlp = copy.deepcopy(mlp_from.mlp)
    ours, theirs = dict(proxy.modulation.named_parameters()), dict(mlp_from.modulation.named_parameters())
    if ours.keys() != theirs.keys() or len(ours) > 2 or proxy.token_merge != mlp_from.token_merge:
        raise EdgeDiTError(
            f"Two proxies with the modulations {type(proxy.modulation).__name__} and "
            f"{type(mlp_from.modulation).__name__} and token merges {proxy.token_merge} and {mlp_from.token_merge} "
            "cannot be combined; both modulations must be whole or static, and both token merges the same."
        )
    for name, values in ours.items():
        half = len(values) // 2  # the last three of the six chunks modulate the MLP
        values[half:] = theirs[name][half:]
    return proxy
