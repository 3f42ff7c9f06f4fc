"""Closed-form starts of proxy blocks: linear algebra on the teacher's calibration features instead of random weights.

Shapes: n images, N tokens each, M = n·N rows, D residual width, A / A' teacher / proxy attention width, h heads, d = A/h and r = A'/h
their head widths, F / F' teacher / proxy MLP width.
"""

from __future__ import annotations

import copy

import torch

from ..errors import EdgeDiTError
from ..models.transformer_edgedit import EdgeDiTBlock

RIDGE = 1e-4  # relative to the mean diagonal of a Gram matrix


def _root_and_inverse(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root and its inverse of second moments `(h, d, d)`, with a small ridge."""
    values, vectors = torch.linalg.eigh(moment)
    floor = RIDGE * values.mean(-1, keepdim=True).clamp_min(1e-12)
    values = values.clamp_min(0) + floor
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return root, inverse


def factor_query_key(query_moment: torch.Tensor, key_moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `(h, d, r)` P, R such that (qP)(kR)ᵀ/√r is the best rank-r stand-in of qkᵀ/√d on inputs with these second moments.

    Whitening turns the expected squared error of the scores into a Frobenius norm, so a truncated SVD of C_q^½ C_k^½ is optimal. The
    change of the softmax scale from 1/√d to 1/√r is absorbed. Keys should be centred over the tokens of an image: a softmax does not
    see what all keys share.
    """
    width = query_moment.shape[-1]
    root_q, inverse_q = _root_and_inverse(query_moment)
    root_k, inverse_k = _root_and_inverse(key_moment)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    half = values[:, :rank].sqrt().unsqueeze(-2) * (rank / width) ** 0.25
    return inverse_q @ left[..., :rank] * half, inverse_k @ right.mT[..., :rank] * half


def factor_value_output(value_moment: torch.Tensor, out_weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Map `(h, d, r)` of the values and new output weights `(h, r, D)`: the best rank-r stand-in of o·W on averaged values o with this
    second moment `(h, d, d)`; `out_weight` is `(h, d, D)`."""
    root, inverse = _root_and_inverse(value_moment)
    left, values, right = torch.linalg.svd(root @ out_weight, full_matrices=False)
    return inverse @ left[..., :rank], values[:, :rank].unsqueeze(-1) * right[:, :rank]


def select_neurons(hidden: torch.Tensor, out_weight: torch.Tensor, row_weight: torch.Tensor, keep: int, rounds: int = 16) -> torch.Tensor:
    """Indices `(keep,)`, sorted, of the MLP neurons whose removal hurts least when the others are refitted.

    Optimal-brain-surgeon scores ‖w_j‖² / [G⁻¹]_jj on the weighted Gram matrix G of the activations, some neurons a round.

    Args:
        hidden: activations `(M, F)`; out_weight: `(F, D)`; row_weight: `(M,)`, importance of a row (its mean squared gate).
    """
    hidden = hidden.double()
    gram = hidden.mT @ (hidden * row_weight.double().unsqueeze(1))
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    weight = out_weight.double()
    target = gram @ weight
    alive = torch.arange(hidden.shape[1])
    for step in range(rounds):
        wanted = keep + (len(alive) - keep) * (rounds - 1 - step) // (rounds - step)
        inverse = torch.linalg.inv(gram[alive][:, alive])
        refitted = inverse @ target[alive]
        score = refitted.pow(2).sum(1) / inverse.diagonal()
        alive = alive[score.topk(wanted).indices.sort().values]
    return alive


def refit_gated(
    features: torch.Tensor,
    gate: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    iterations: int = 30,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(F, D)` and bias `(D,)` that minimise Σ (gate ⊙ (features·W + b) − target)², kept near the given ones by a small ridge.

    The gate of adaLN weighs every element differently, so the columns do not share a Gram matrix; conjugate gradients need only products
    with `features`, and the Gram matrix weighted by the rows' mean squared gate preconditions them.

    Args:
        features: `(M, F)`; gate, target: `(M, D)`.
    """
    features = torch.cat([features.double(), features.new_ones(len(features), 1, dtype=torch.float64)], dim=1)
    gate, target = gate.double(), target.double()
    start = torch.cat([weight.double(), bias.double().unsqueeze(0)])
    square = gate.pow(2)
    rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    mean = square.mean().clamp_min(1e-30)
    gram = features.mT @ (features * rows)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    column_scale = (columns / mean).clamp_min(1e-6)

    def operator(w: torch.Tensor) -> torch.Tensor:
        return features.mT @ (square * (features @ w)) + ridge * column_scale * w

    def precondition(residual: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(residual, factor) / column_scale

    # Solve for the change of the weights, so that the ridge pulls towards where they were.
    change = torch.zeros_like(start)
    residual = features.mT @ (gate * (target - gate * (features @ start)))
    direction = precondition(residual)
    energy = (residual * direction).sum()
    first = energy.clone()
    for _ in range(iterations):
        if energy <= 1e-12 * first:
            break
        image = operator(direction)
        step = energy / (direction * image).sum()
        change += step * direction
        residual -= step * image
        corrected = precondition(residual)
        energy, last = (residual * corrected).sum(), energy
        direction = corrected + energy / last * direction
    solved = start + change
    return solved[:-1], solved[-1]


def _attention_parts(block: EdgeDiTBlock, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value and averaged values, each `(n, N, h, d)`, of modulated inputs `(n, N, D)`."""
    batch, tokens, _ = normed.shape
    query, key, value = block.attn.to_qkv(normed).view(batch, tokens, 3, block.attn.heads, -1).unbind(2)
    averaged = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)
    return query, key, value, averaged


def _narrow_attention(block: EdgeDiTBlock, normed: torch.Tensor, gate: torch.Tensor, attention_dim: int) -> None:
    """Replace the block's attention by one of inner width `attention_dim` fitted to its gated output."""
    old, heads = block.attn, block.attn.heads
    hidden_size, width = old.to_out.weight.shape
    rank, head = attention_dim // heads, width // heads
    query, key, _, averaged = _attention_parts(block, normed)
    gated_target = (gate * old.to_out(averaged.flatten(2))).flatten(0, 1)

    def moment(t: torch.Tensor) -> torch.Tensor:  # (n, N, h, d) → (h, d, d)
        rows = t.flatten(0, 1).transpose(0, 1).double()
        return rows.mT @ rows / rows.shape[1]

    p, r = factor_query_key(moment(query), moment(key - key.mean(1, keepdim=True)), rank)
    out = old.to_out.weight.double().mT.view(heads, head, hidden_size)
    v, o = factor_value_output(moment(averaged - averaged.mean((0, 1), keepdim=True)), out, rank)
    weight = old.to_qkv.weight.double().view(3, heads, head, hidden_size)
    bias = old.to_qkv.bias.double().view(3, heads, head, 1)
    narrow = EdgeDiTBlock(hidden_size, attention_dim, heads, 1.0).attn
    for index, change in enumerate((p, r, v)):
        rows = slice(index * attention_dim, (index + 1) * attention_dim)
        narrow.to_qkv.weight.data[rows] = (change.mT @ weight[index]).reshape(attention_dim, hidden_size).float()
        narrow.to_qkv.bias.data[rows] = (change.mT @ bias[index]).reshape(attention_dim).float()
    block.attn = narrow
    features = _attention_parts(block, normed)[3].flatten(2).flatten(0, 1)
    new_weight, new_bias = refit_gated(
        features, gate.expand_as(normed).flatten(0, 1), gated_target, o.reshape(attention_dim, hidden_size), old.to_out.bias.double()
    )
    narrow.to_out.weight.data.copy_(new_weight.mT)
    narrow.to_out.bias.data.copy_(new_bias)


@torch.no_grad()
def closed_form_block(
    sources: list[EdgeDiTBlock],
    x: torch.Tensor,
    conditioning: torch.Tensor,
    attention_dim: int,
    mlp_ratio: float,
) -> EdgeDiTBlock:
    """A proxy of one or two consecutive teacher layers, fitted to calibration features without a gradient step.

    The base is the source layer whose own output comes nearest to the target. If the attention is narrower, each head's QKᵀ and VO
    products are factored at the smaller width and the output projection refitted; if the MLP is narrower, its most useful neurons are
    kept; last, the MLP's output projection is refitted to what the target still lacks, so it also mends the attention's error and the
    part of a merged layer that is missing.

    Args:
        sources: the teacher layers that are replaced, in order.
        x: input of the first, `(n, N, D)`; conditioning: `(n, D)`, activated.
        attention_dim, mlp_ratio: sizes of the proxy.
    """
    target = x
    for block in sources:
        target = block(target, conditioning)
    errors = [(block(x, conditioning) - target).pow(2).mean().item() for block in sources]
    proxy = copy.deepcopy(sources[errors.index(min(errors))])
    hidden_size = x.shape[-1]
    if attention_dim > proxy.attn.to_out.in_features or mlp_ratio * hidden_size > proxy.mlp.proj_in.out_features:
        raise EdgeDiTError(
            f"A closed-form proxy cannot be wider than its teacher: attention {attention_dim} of {proxy.attn.to_out.in_features}, "
            f"MLP {int(mlp_ratio * hidden_size)} of {proxy.mlp.proj_in.out_features}."
        )
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = proxy.modulation(conditioning).unsqueeze(1).chunk(6, dim=-1)

    normed = proxy.norm1(x) * (1 + scale_a) + shift_a
    if attention_dim < proxy.attn.to_out.in_features:
        _narrow_attention(proxy, normed, gate_a, attention_dim)
    after_attention = x + gate_a * proxy.attn(normed)

    normed = proxy.norm2(after_attention) * (1 + scale_m) + shift_m
    hidden = proxy.mlp.act(proxy.mlp.proj_in(normed)).flatten(0, 1)  # [M, F]
    keep = int(hidden_size * mlp_ratio)
    if keep < hidden.shape[1]:
        rows = gate_m.pow(2).mean(-1).expand(-1, x.shape[1]).flatten()
        neurons = select_neurons(hidden, proxy.mlp.proj_out.weight.mT, rows, keep)
        narrow = EdgeDiTBlock(hidden_size, hidden_size, 1, mlp_ratio).mlp
        narrow.proj_in.weight.data.copy_(proxy.mlp.proj_in.weight[neurons])
        narrow.proj_in.bias.data.copy_(proxy.mlp.proj_in.bias[neurons])
        narrow.proj_out.weight.data.copy_(proxy.mlp.proj_out.weight[:, neurons])
        narrow.proj_out.bias.data.copy_(proxy.mlp.proj_out.bias)
        proxy.mlp, hidden = narrow, hidden[:, neurons]
    weight, bias = refit_gated(
        hidden,
        gate_m.expand_as(x).flatten(0, 1),
        (target - after_attention).flatten(0, 1),
        proxy.mlp.proj_out.weight.mT,
        proxy.mlp.proj_out.bias,
    )
    proxy.mlp.proj_out.weight.data.copy_(weight.mT)
    proxy.mlp.proj_out.bias.data.copy_(bias)
    return proxy


@torch.no_grad()
def truncated_block(source: EdgeDiTBlock, attention_dim: int, mlp_ratio: float) -> EdgeDiTBlock:
    """The plain alternative to compare with: the first `attention_dim` / heads channels of every head and the first MLP neurons."""
    hidden_size, width = source.attn.to_out.weight.shape
    heads, keep = source.attn.heads, int(hidden_size * mlp_ratio)
    proxy = EdgeDiTBlock(hidden_size, attention_dim, heads, mlp_ratio)
    proxy.modulation.load_state_dict(source.modulation.state_dict())
    rank = attention_dim // heads
    channels = (torch.arange(heads).unsqueeze(1) * (width // heads) + torch.arange(rank)).flatten()
    rows = torch.cat([channels + i * width for i in range(3)])
    proxy.attn.to_qkv.weight.copy_(source.attn.to_qkv.weight[rows])
    proxy.attn.to_qkv.bias.copy_(source.attn.to_qkv.bias[rows])
    proxy.attn.to_out.weight.copy_(source.attn.to_out.weight[:, channels])
    proxy.attn.to_out.bias.copy_(source.attn.to_out.bias)
    proxy.mlp.proj_in.weight.copy_(source.mlp.proj_in.weight[:keep])
    proxy.mlp.proj_in.bias.copy_(source.mlp.proj_in.bias[:keep])
    proxy.mlp.proj_out.weight.copy_(source.mlp.proj_out.weight[:, :keep])
    proxy.mlp.proj_out.bias.copy_(source.mlp.proj_out.bias)
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
