"""Does NVIDIA's own code take our two plugins of the best logits, and what launches does it make?

As `trt_plugin`, with its stand-ins; `trt_bindings.py` runs both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import tensorrt_bindings as trt

from edge.backends.tensorrt.launch_rules import TOP_K_MERGE, TOP_K_PARTS, PluginRule
from engines.kernels import plugin
from engines.kernels.launch import Job
from engines.kernels.own_plugins import element_types
from engines.kernels.package import Ptx
from engines.kernels.top_k import top_k
from engines.kernels.variants import BY_NAME
from scripts.trt_plugin import (
    Launch,
    Numbers,
    Size,
    Sizes,
    compare_launch,
    describe,
    load_module,
    make,
    type_of,
)

# Sequences, rows of logits of each, logits, and how many are kept.
CASES = ((1, 1, 151_936, 256), (8, 1, 32_000, 257), (2, 3, 320, 8), (1, 16, 262_144, 1024))


def problems_of(
    rule: PluginRule, case: tuple[int, int, int, int], ptx: dict[str, Ptx]
) -> Iterator[str]:
    """Ask a new plugin about rows of logits; what is wrong with its answers."""
    batch, num_logits, columns, keep = case
    job = top_k(batch * num_logits, columns, keep)
    made = make(rule)
    reads, writes = tuple(rule.inputs), tuple(rule.outputs)
    types = [type_of(job.buffers[each][1]) for each in (*reads, *writes)]
    shapes = [shape_of(job, each, batch, num_logits) for each in (*reads, *writes)]
    ranks = [len(shape) for shape in shapes]
    found = list(made.get_output_data_types(types[: len(reads)], ranks[: len(reads)]))
    if found != types[len(reads) :]:
        yield f"the outputs are {found}"
    sizes = Sizes()
    inputs = [
        [Size(size, constant=len(shape) == 1 or axis > 1) for axis, size in enumerate(shape)]
        for shape in shapes[: len(reads)]
    ]
    outputs = made.get_output_shapes(inputs, [], sizes)
    given = [tuple(size.value for size in output) for output in outputs]
    if given != shapes[len(reads) :]:
        yield f"the outputs' shapes are {given}"
    if not all(output[-1].is_constant() for output in outputs):
        yield "the last size of an output is not known when the engine is built"
    ports = [
        describe(shape, kind, dynamic=0 if len(shape) == 1 else 2)
        for shape, kind in zip(shapes, types, strict=True)
    ]
    combinations = made.get_supported_format_combinations(ports, len(reads))
    if [(each.type, each.format) for each in combinations] != [
        (each, trt.TensorFormat.LINEAR) for each in types
    ]:
        yield f"the formats are {combinations}"
    made.configure_plugin(ports[: len(reads)], ports[len(reads) :])
    if made.get_valid_tactics() != [1]:
        yield f"the tactics are {made.get_valid_tactics()}"
    made.set_tactic(1)
    launch, numbers = Launch(), Numbers()
    made.get_launch_params(inputs, ports, len(reads), launch, numbers, sizes)
    descriptions = [port.desc for port in ports]
    kernel = made.get_kernel(descriptions[: len(reads)], descriptions[len(reads) :])
    wanted = job.launches[0 if rule is TOP_K_PARTS else 1]
    yield from compare_launch(wanted, ptx[wanted.variant.name], launch, numbers, kernel)


def shape_of(job: Job, name: str, batch: int, num_logits: int) -> tuple[int, ...]:
    """The shape of a tensor, of sequences and rows of each."""
    rows, *rest = job.buffers[name][0]
    return (batch, num_logits, *rest) if rest else (rows,)


def main() -> int:
    """Register the plugins twice and ask them about every case; 1 if an answer is wrong."""
    module = load_module()
    ptx = {
        name: Ptx(f"PTX of {name}", f"entry{place}", 256, 512 * place)
        for place, name in enumerate(BY_NAME)
    }
    for _ in range(2):
        plugin.register(module, ptx, element_types(trt))
    failed = False
    for case in CASES:
        for rule in (TOP_K_PARTS, TOP_K_MERGE):
            for problem in problems_of(rule, case, ptx):
                failed = True
                print(f"{rule.name}, {case}: {problem}", file=sys.stderr)
    print(f"TensorRT {trt.__version__}: the plugins of the best logits are taken")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
