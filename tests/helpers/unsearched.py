"""A run without a search, as far as choosing a student needs it."""

from pathlib import Path

import numpy as np
import torch

from edgedit_hf import EdgeDiTPipeline, EdgeDiTTransformer2DModel, ProxyBank
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.runtimes.timing import environment
from edgedit_hf.search.latency_table import LatencyTable, trunk_of
from edgedit_hf.search_space import SearchSpace


def write_unsearched(folder: Path, teacher: EdgeDiTTransformer2DModel) -> ProxyBank:
    """A run with a teacher, a bank of untrained proxies with random losses, and a latency table, but no search; gives
    its bank.
    """
    EdgeDiTPipeline(teacher, make_scheduler("epsilon")).save_pretrained(folder / "teacher")
    space = SearchSpace.for_config(teacher.config)
    bank, draw = ProxyBank.create(folder / "bank", teacher, space), np.random.default_rng(0)
    torch.manual_seed(0)
    entries = {}
    for layer in space.proxies():
        loss = float(draw.lognormal(-5, 2))
        record = {"loss_before": 1.0, "loss_after": loss, "steps": 0, "seed": 0, "init": "random"}
        entries[bank.key(layer)] = bank.write_proxy(layer, bank.new_block(layer), record)
    bank.write_index(entries)
    write_table(folder, teacher, space)
    return bank


def write_table(folder: Path, teacher: EdgeDiTTransformer2DModel, space: SearchSpace) -> LatencyTable:
    """A latency table with times of its own making, of int8 and batches of 4."""
    times = {"original": 3.0, "mlp": 2.0, "attention": 2.25, "both": 1.5}
    blocks = [
        {"option": name, **dict(zip(("attention_dim", "num_heads", "mlp_ratio"), space.option_shape(name))), "ms": ms}
        for name, ms in times.items()
    ]
    table = LatencyTable(
        {
            **{"format": 1, "runtime": "onnxruntime", "precision": "int8", "batch": 4, "threads": 1},
            **{"space": space.to_dict(), "trunk": trunk_of(teacher.config), "trunk_ms": 0.5, "blocks": blocks},
            "environment": environment(1),
        }
    )
    table.to_json(folder / "latency" / "table.json")
    return table
