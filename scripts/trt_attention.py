"""Does NVIDIA's own code take our two plugins of attention, and what launches does it make of them?

As `trt_plugin`, with its stand-ins; `trt_bindings.py` runs both.
"""

from __future__ import annotations

import sys

import tensorrt_bindings as trt

from edge.backends.tensorrt.launch_rules import JOIN, PARTS, PluginRule
from engines.kernels import plugin
from engines.kernels.attention import attention, join_tactics, part_tactics
from engines.kernels.own_plugins import element_types
from engines.kernels.package import Ptx
from scripts.trt_plugin import (
    MOVING,
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

# Sequences, groups, heads of each, tokens, width, rows of the cache.
CASES = (
    (1, 2, 6, 1, 128, 4096),
    (1, 2, 6, 512, 128, 4096),
    (4, 2, 6, 8, 128, 300),
    (3, 1, 1, 7, 64, 64),
    (8, 8, 4, 1, 64, 131_072),
    (2, 3, 3, 2048, 64, 8192),
)


def problems_of(
    rule: PluginRule, case: tuple[int, int, int, int, int, int], ptx: dict[str, Ptx]
) -> list[str]:
    """Ask a new plugin about one attention; what is wrong with its answers."""
    job = attention(*case)
    made = make(rule)
    reads, writes = tuple(rule.inputs), tuple(rule.outputs)
    shapes = [job.buffers[each][0] for each in reads]
    types = [type_of(job.buffers[each][1]) for each in (*reads, *writes)]
    sizes = Sizes()
    found = list(made.get_output_data_types(types[: len(reads)], [len(each) for each in shapes]))
    if found != types[len(reads) :]:
        return [f"the outputs are {found}"]
    inputs = [
        [Size(size, constant=axis not in MOVING.get(each, ())) for axis, size in enumerate(shape)]
        for each, shape in zip(reads, shapes, strict=True)
    ]
    outputs = made.get_output_shapes(inputs, [], sizes)
    given = [tuple(size.value for size in output) for output in outputs]
    if given != [job.buffers[each][0] for each in writes]:
        return [f"the outputs' shapes are {given}"]
    if not all(output[-1].is_constant() for output in outputs):
        return ["the width of an output is not known when the engine is built"]
    ports = [
        describe(job.buffers[each][0], kind)
        for each, kind in zip((*reads, *writes), types, strict=True)
    ]
    combinations = made.get_supported_format_combinations(ports, len(reads))
    taken = [(each.type, each.format) for each in combinations]
    if taken != [(each, trt.TensorFormat.LINEAR) for each in types]:
        return [f"the formats are {taken}"]
    made.configure_plugin(ports[: len(reads)], ports[len(reads) :])
    tiles = (part_tactics if rule is PARTS else join_tactics)(case[4])
    if sorted(made.get_valid_tactics()) != list(range(1, len(tiles) + 1)):
        return [f"the tactics are {made.get_valid_tactics()}"]
    problems: list[str] = []
    for place in range(len(tiles)):
        made.set_tactic(place + 1)
        launch, numbers = Launch(), Numbers()
        made.get_launch_params(inputs, ports, len(reads), launch, numbers, sizes)
        descriptions = [port.desc for port in ports]
        kernel = made.get_kernel(descriptions[: len(reads)], descriptions[len(reads) :])
        wanted = attention(*case, **{"tile" if rule is PARTS else "join": place})
        half = wanted.launches[0 if rule is PARTS else 1]
        problems += compare_launch(half, ptx[half.variant.name], launch, numbers, kernel)
    return problems


def main() -> int:
    """Register the plugins twice and ask them about every case; 1 if an answer is wrong."""
    module = load_module()
    names = [
        tile.variant.name
        for width in (64, 128)
        for tile in (*part_tactics(width), *join_tactics(width))
    ]
    ptx = {
        name: Ptx(f"PTX of {name}", f"entry{place}", 128, 512 * place)
        for place, name in enumerate(names)
    }
    for _ in range(2):
        plugin.register(module, ptx, element_types(trt))
    failed = False
    for case in CASES:
        for rule in (PARTS, JOIN):
            for problem in problems_of(rule, case, ptx):
                failed = True
                print(f"{rule.name}, {case}: {problem}", file=sys.stderr)
    print(f"TensorRT {trt.__version__}: the plugins of attention are taken")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
