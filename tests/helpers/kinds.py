"""One layer of every kind that a genotype may hold, on DiT-debug/2's sizes (width 32, 2 heads, 4 layers)."""

ORIGINAL = {"attention_dim": 32, "num_heads": 2, "mlp_ratio": 4.0}
CHANGES = {
    "fewer, wider heads": {"num_heads": 1},
    "more, narrower heads": {"num_heads": 4},
    "fewer heads, as wide": {"num_heads": 1, "attention_dim": 16},
    "narrower attention": {"attention_dim": 16},
    "MLP ratio 1": {"mlp_ratio": 1.0},
    "MLP ratio 3": {"mlp_ratio": 3.0},
    "static": {"modulation_rank": 0},
    "rank 4": {"modulation_rank": 4},
    "merged tokens": {"token_merge": 2},
    "all at once": {
        "attention_dim": 24,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "modulation_rank": 2,
        "token_merge": 2,
    },
}
MIXED = [  # a whole network of four teacher layers, with every kind in it
    {"source": [0], "attention_dim": 32, "num_heads": 4, "mlp_ratio": 1.0},
    {"source": [1], "attention_dim": 32, "num_heads": 1, "mlp_ratio": 3.0, "modulation_rank": 0},
    {"source": [2, 3], "attention_dim": 16, "num_heads": 2, "mlp_ratio": 2.0, "modulation_rank": 4, "token_merge": 2},
]


def layer_of(source: tuple[int, ...], change: str) -> dict:
    """The plain form of a layer with one of [`CHANGES`]."""
    return {"source": list(source), **ORIGINAL, **CHANGES[change]}
