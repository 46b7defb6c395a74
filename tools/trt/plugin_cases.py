"""Cases that `plugin` and `plugin_v3` ask our plugins about, and the right launches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from edge.backends.tensorrt.launch_rules import (
    JOIN,
    PARTS,
    PRODUCT,
    TOP_K_MERGE,
    TOP_K_PARTS,
    PluginRule,
)
from engines.kernels.attention import attention
from engines.kernels.launch import Buffers, Launch, product, w4_tactics
from engines.kernels.own_plugins import TACTICS
from engines.kernels.top_k import top_k

# Sequences, tokens, depth, columns, group, planes, bias.
PRODUCTS = (
    (1, 1, 1536, 2048, 32, 1, True),
    (1, 1, 8960, 1536, 128, 1, False),
    (2, 3, 128, 200, 64, 2, True),
    (8, 1, 64, 1, 32, 2, False),
    (1, 512, 256, 151936, 32, 2, False),
    (4, 128, 64, 65, 64, 1, True),
)
# Sequences, groups, heads of each, tokens, width, rows of the cache.
ATTENTIONS = (
    (1, 2, 6, 1, 128, 4096),
    (1, 2, 6, 512, 128, 4096),
    (4, 2, 6, 8, 128, 300),
    (3, 1, 1, 7, 64, 64),
    (8, 8, 4, 1, 64, 131_072),
    (2, 3, 3, 2048, 64, 8192),
)
# Sequences, rows of logits of each, logits, and how many are kept.
SEARCHES = ((1, 1, 151_936, 256), (8, 1, 32_000, 257), (2, 3, 320, 8), (1, 16, 262_144, 1024))
# Axes that depend on sequences and tokens, which are not known when the engine is built.
MOVING: dict[PluginRule, dict[str, tuple[int, ...]]] = {
    PRODUCT: {"x": (0, 1)},
    PARTS: {
        **dict.fromkeys(("query", "new_keys", "new_values"), (0, 2)),
        **dict.fromkeys(("keys", "values"), (0,)),
        "positions": (0, 1),
    },
    JOIN: {"partial": (0,), "stats": (0,), "positions": (0, 1), "query": (0, 2)},
    TOP_K_PARTS: {"logits": (0, 1)},
    TOP_K_MERGE: {"keys": (0, 1), "stats": (0, 1)},
}


@dataclass(frozen=True)
class Case:
    """A plugin for tensors of some shapes.

    Attributes:
        rule: rule of the plugin.
        value: value of its attribute.
        tensors: shapes and types of its inputs and outputs, as the kernels have them.
        launches: the right launches, by tactic.
    """

    rule: PluginRule
    value: int
    tensors: Buffers
    launches: tuple[Launch, ...]

    def __str__(self) -> str:
        return f"{self.rule.name} of {[self.tensors[name][0] for name in self.rule.inputs]}"


def make_cases() -> Iterator[Case]:
    """Make the cases of every plugin."""
    for batch, seq, depth, columns, group, planes, bias in PRODUCTS:
        # Where there is one column and no bias, the plugin adds a zero.
        added = bias or columns == 1
        jobs = [
            product(tactic, batch * seq, columns, depth, group=group, bias=added)
            for tactic in w4_tactics(planes)
        ]
        tensors = _unfold(jobs[0].buffers, batch, ("x", "y"))
        yield Case(PRODUCT, planes, tensors, tuple(job.launches[0] for job in jobs))
    for sizes in ATTENTIONS:
        for half, rule in enumerate((PARTS, JOIN)):
            width = sizes[4]
            jobs = [attention(*sizes, tile=n, join=n) for n in range(len(TACTICS[rule](width)))]
            yield Case(rule, width, jobs[0].buffers, tuple(job.launches[half] for job in jobs))
    for batch, num_logits, columns, keep in SEARCHES:
        job = top_k(batch * num_logits, columns, keep)
        tensors = _unfold(job.buffers, batch, job.buffers.keys() - {"keep"})
        for half, rule in enumerate((TOP_K_PARTS, TOP_K_MERGE)):
            yield Case(rule, keep, tensors, job.launches[half : half + 1])


def _unfold(buffers: Buffers, batch: int, names: Collection[str]) -> Buffers:
    """Split the kernels' rows into sequences and rows of each, as in the graph."""
    return {
        name: ((batch, shape[0] // batch, *shape[1:]), dtype) if name in names else (shape, dtype)
        for name, (shape, dtype) in buffers.items()
    }
