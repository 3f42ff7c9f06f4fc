"""What a bank and a latency table say of every replacement: the blocks of the integer programme. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import EdgeDiTError
from ..records import Scored
from ..run.stage import BANK
from ..schema import held_to
from ..search_space import (
    BYTES,
    Cost,
    SearchSpace,
    activation_bytes,
    grid_tokens,
    layer_cost,
    live_values,
    position_weights,
    trunk_cost,
    trunk_live_values,
)
from .device_tables import DeviceTables
from .latency_table import LatencyTable
from .programme import Block, Peak, Programme

if TYPE_CHECKING:
    from ..distill.proxy_bank import ProxyBank

# A lower estimate of peak memory, at the table's batch: all weights, and the layer that holds the most values at once.
# What the runtime's arena takes beyond that is left out.
MEMORY = {"memory": Peak("bytes", "activations")}
WEIGHTS = {"8da8w": "int8", "8da4w": "int4"}  # by precision of a runtime: what its weights take


def replacement_score(entry: Mapping[str, Any]) -> float:
    """What a student loses by a proxy, from its entry in the bank's index: its held-out normalised loss, once for every
    teacher layer that it replaces. A layer of the teacher loses nothing.

    Of the additive scores that a bank gives, docs/search.md compares them with real distances.
    """
    return float(entry["loss_after"]) * len(entry["source"])


def weights_precision(table: LatencyTable | DeviceTables) -> str:
    """The precision, of [`BYTES`], that weights have in what a table was measured on; of several, the first one's."""
    return WEIGHTS.get(table.precision, table.precision)


def costs_of(cost: Cost, times: Mapping[str, float], precision: str, live: int = 0, batch: int = 1) -> dict[str, float]:
    """The costs of a part of a student by name; bytes are those of its weights at a precision, activations those of
    `live` values of each image of a batch.
    """
    return {
        **times,
        "parameters": float(cost.parameters),
        "flops": float(cost.flops),
        "bytes": cost.weights * BYTES[precision],
        "activations": activation_bytes(live, batch, precision),
    }


def blocks_of(
    space: SearchSpace,
    entries: Mapping[str, Mapping[str, Any]],
    table: LatencyTable | DeviceTables,
    config: Mapping[str, Any],
    precision: str | None = None,
) -> list[Block]:
    """A block for every layer of the teacher's, and for every proxy that a bank holds.

    Args:
        space, entries: the bank's. config: the teacher's model config.
        precision: of `bytes`; default that of the table.
    """
    if not entries:
        raise EdgeDiTError(f"The proxy bank holds 0 proxies, so there is nothing to choose among; run {BANK.made_by}.")
    table.check_config(config, space)
    precision, tokens = precision or weights_precision(table), grid_tokens(config)
    blocks = []
    for layer in space.replacements():
        original = space.is_teachers(layer)
        if not original and (key := space.key(layer)) not in entries:
            continue  # of a bank of a few genotypes (`bank.only`)
        if not original:
            held_to(entries[key], Scored, f"The entry {key} of the bank's index", BANK.made_by, "a proxy")
        cost = layer_cost(space.hidden_size, layer.shape, tokens, position_weights(config))
        times = table.layer_costs(layer.shape.timed)
        costs = costs_of(cost, times, precision, live_values(config, layer), table.batch)
        blocks.append(Block(layer, 0.0 if original else replacement_score(entries[key]), costs))
    return blocks


def programme_of(bank: ProxyBank, table: LatencyTable | DeviceTables, precision: str | None = None) -> Programme:
    """The integer programme of a bank's students with the costs latency_ms, parameters, flops, bytes and memory (see
    [`MEMORY`]); with tables of several devices also each one's, `latency_ms[DEVICE]`.

    Args:
        precision: of `bytes`; default that of the table.
    """
    config, space = bank.teacher.config, bank.space
    blocks = blocks_of(space, bank.entries, table, config, precision)
    trunk, live = trunk_cost(config, grid_tokens(config)), trunk_live_values(config)
    fixed = costs_of(trunk, table.trunk_costs, precision or weights_precision(table), live, table.batch)
    return Programme(blocks, space.num_layers, space.hidden_size, fixed, table.worst, MEMORY)
