"""Checks that a parsed network is the decoder that was exported: pure functions of a `NetworkView`.

Each check is for a fault that raises no error but gives wrong or slow answers: an attention that
TensorRT imported as causal from the first key on, a lost mask, a cache that is not updated in
place, unpacked weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from edge.adapters.graph_inputs import ADAPTER, adapter_inputs
from edge.backends.tensorrt.launch_rules import BLOCK
from edge.bundle import io_spec
from edge.bundle.engine_file import KvRead, LayerCount, OutsideTensor, WeightBytes
from edge.bundle.manifest import Manifest
from edge.model.parts import Attention, only
from edge_make.engine_layers import engine_dtype
from engines.compiler.network import AttentionView, LayerView, NetworkView, TensorView
from engines.config import BuildShapes
from engines.graph.own_attention import attention_name
from engines.graph.own_top_k import KEYS, STATS, TOP_K

# What a plan holds beside the weights for each profile (kernels and code), measured with TensorRT
# for RTX 1.7: 3 MB for 2 layers, 18 MB for 28 and 30; with three profiles 31 MB for 30.
_PLAN_FIXED_BYTES = 8 << 20
_PLAN_LAYER_BYTES = 1 << 20
_BITS = {"int4": 4, "int8": 8, "fp16": 16, "bf16": 16, "fp32": 32, "int32": 32}
_FLOAT_PRODUCT, _HIGH_PRODUCT = ".float_product", ".high_product"
_ROTATED, _DIVISOR = ".input.blocks.rotated", ".input.divisor"
_OFFSET_PRODUCT = ".offset_product"
_PARTIAL = ".partial"  # the suffix that `engines.graph.own_attention` gives its partial sums
_PASSED_THROUGH = ("shuffle", "cast", "identity")


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        problems: one sentence for each problem; empty if the network passed.
        weights: stored type of each linear layer's weights, counted by type.
        layers: number of layers by kind and output type.
        attentions: number of attentions.
    """

    problems: tuple[str, ...]
    weights: tuple[WeightBytes, ...]
    layers: tuple[LayerCount, ...]
    attentions: int


def audit_network(
    network: NetworkView,
    manifest: Manifest,
    shapes: BuildShapes,
    kv_read: KvRead = "slice",
    own_linears: Sequence[str] = (),
    own_attentions: Sequence[str] = (),
    own_top_k: bool = False,
    outside: Mapping[str, OutsideTensor] = {},
) -> Audit:
    """Compare a network with the manifest and the contract of `edge.bundle.io_spec`.

    Args:
        network: the network as TensorRT parsed it.
        manifest: the bundle's manifest.
        shapes: the shapes that the build asked for.
        kv_read: how attention reads the cache.
        own_linears: linear layers that must be plugins (`engines.graph.own_kernels`).
        own_attentions: attentions that must be plugins (`engines.graph.own_attention`).
        own_top_k: whether the search for the best logits must be one (`engines.graph.own_top_k`).
        outside: weights that must be inputs of the network (`engines.graph.external_weights`).
    """
    stored = _stored_weights(network)
    own = _plugin_weights(network, outside)
    problems = [
        *_check_interface(network, manifest, shapes, kv_read, outside),
        *_check_attentions(network, manifest, kv_read, len(own_attentions)),
        *_check_own_attentions(network, manifest, own_attentions),
        *_check_own_top_k(network, own_top_k),
        *_check_cache(network, manifest),
        *_check_weights(stored, manifest, own_linears),
        *_check_inputs(network, stored, manifest),
        *_check_own(own, manifest, own_linears),
    ]
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, tensor in stored.items():
        if name.endswith(_ROTATED):
            continue
        counts[tensor.dtype] += 1
        sizes[tensor.dtype] += tensor.volume * _BITS.get(tensor.dtype, 8) // 8
    for tensor in own.values():  # words of INT4 weights [blocks, planes, columns, 4]
        counts["int4"] += tensor.shape[1]
        sizes["int4"] += tensor.volume * _BITS["int32"] // 8
    layers = Counter(
        (layer.kind, layer.outputs[0].dtype) for layer in network.layers if layer.outputs
    )
    return Audit(
        tuple(problems),
        tuple(WeightBytes(dtype, counts[dtype], sizes[dtype]) for dtype in sorted(counts)),
        tuple(LayerCount(*key, count) for key, count in sorted(layers.items())),
        len(_live_attentions(network)),
    )


def check_plan_bytes(
    plan_bytes: int,
    manifest: Manifest,
    num_profiles: int,
    kernels_bytes: int = 0,
    own_linears: Collection[str] = (),
) -> list[str]:
    """Check that a plan is about as large as its packed weights; unpacked they take 2 to 4 times.

    A plan may hold float and W8A8 weights once per profile, in different layouts, and all weights
    once more for a third profile. That does not count as unpacking (measured with TensorRT for RTX
    1.7: W8A8 once with one profile, twice with two; INT8 in planes 188 MB with two, 351 MB with
    three).

    Args:
        plan_bytes: size of the plan.
        manifest: the bundle's manifest.
        num_profiles: number of optimization profiles in the engine.
        kernels_bytes: the most bytes that own kernels may add for each profile.
        own_linears: linear layers whose weights are not in the plan (`external_weights`).

    Returns:
        The problems, one sentence each.
    """
    all_linears = manifest.quantization.linears
    expected = _weights_bytes(manifest) - sum(all_linears[name].num_bytes for name in own_linears)
    linears = [each for name, each in all_linears.items() if name not in own_linears]
    again = sum(each.num_bytes for each in linears if each.scheme.kind in ("float", "w8a8"))
    again += (num_profiles - 2) * sum(each.num_bytes for each in linears)
    kernels = _PLAN_FIXED_BYTES + _PLAN_LAYER_BYTES * manifest.model.num_layers + kernels_bytes
    allowed = expected + again + num_profiles * kernels
    if plan_bytes > allowed:
        return [
            f"the plan has {plan_bytes:,} bytes, but its weights {expected:,} and at most "
            f"{allowed:,} were expected: some weights were unpacked"
        ]
    packed = sum(linear.num_bytes for linear in linears)
    if plan_bytes < packed:
        return [f"the plan has {plan_bytes:,} bytes, less than its linear layers' {packed:,}"]
    return []


def _weights_bytes(manifest: Manifest) -> int:
    return manifest.files[f"{manifest.graphs.decoder}.data"].num_bytes


def _check_interface(
    network: NetworkView,
    manifest: Manifest,
    shapes: BuildShapes,
    kv_read: KvRead,
    outside: Mapping[str, OutsideTensor],
) -> list[str]:
    dimensions = (manifest.model, manifest.dialect, manifest.dtype, shapes.capacity)
    spec = (*dimensions, manifest.int8_layers)
    problems = []
    weights = [io_spec.TensorSpec(name, each.shape, each.dtype) for name, each in outside.items()]
    for kind, found, expected in (
        (
            "input",
            network.inputs,
            [*io_spec.decoder_inputs(*spec), *adapter_inputs(manifest, manifest.dtype), *weights],
        ),
        ("output", network.outputs, io_spec.decoder_outputs(*spec, best_logits=shapes.best_logits)),
    ):
        by_name = {tensor.name: tensor for tensor in found}
        for want in expected:
            shape = tuple(-1 if isinstance(dim, str) else dim for dim in want.shape)
            if want.name == io_spec.KV_POSITIONS and kv_read != "slice":
                shape = (shapes.capacity,)
            have = by_name.pop(want.name, None)
            if have is None:
                problems.append(f"the {kind} {want.name} is missing")
            elif have.dtype != want.dtype or not _fits(have.shape, shape):
                problems.append(
                    f"the {kind} {want.name} is {have.dtype} {list(have.shape)}, not "
                    f"{want.dtype} {list(shape)}"
                )
        problems += [f"there is a further {kind}, {name}" for name in by_name]
    return problems


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    # A parser may keep an output's static sizes dynamic until the profiles are known.
    return len(found) == len(wanted) and all(
        have in (want, -1) for have, want in zip(found, wanted, strict=True)
    )


def _check_attentions(
    network: NetworkView, manifest: Manifest, kv_read: KvRead, num_own: int
) -> list[str]:
    live = _live_attentions(network)
    native = manifest.dialect == "native"
    expected = len(manifest.model.attentions()) - num_own if native else 0
    problems = []
    if len(live) != expected:
        problems.append(f"there are {len(live)} attentions, not {expected}")
    for each in live:
        if kv_read == "lengths":
            if each.causal != "lower_right" or each.lengths is None or each.mask is not None:
                problems.append(
                    f"attention {each.name} is not one with lengths: causal {each.causal}, "
                    f"lengths {each.lengths}, mask {each.mask and each.mask.name}"
                )
            continue
        if each.causal != "none":
            problems.append(
                f"attention {each.name} is causal ({each.causal}): in decode the query would see "
                "the first key only"
            )
        if each.mask is None:
            problems.append(f"attention {each.name} has no mask: it sees the future and padding")
            continue
        if each.mask.dtype != "bool":
            problems.append(f"attention {each.name} has a mask of {each.mask.dtype}, not bool")
        origins = set(network.ancestors(each.mask.name))
        problems += [
            f"the mask of attention {each.name} does not depend on {name}"
            for name in (io_spec.POSITION_IDS, io_spec.KV_POSITIONS)
            if name not in origins
        ]
    return problems


def _check_own_attentions(
    network: NetworkView, manifest: Manifest, own_attentions: Sequence[str]
) -> list[str]:
    """Check that each plugin reads the rows of its own layer, and knows the positions."""
    plugins = [each for each in network.layers if each.kind == "plugin_v3" and each.outputs]
    parts = {
        each.outputs[0].name.removesuffix(_PARTIAL): each
        for each in plugins
        if each.outputs[0].name.endswith(_PARTIAL)
    }
    joined = {
        each.inputs[0].name.removesuffix(_PARTIAL)
        for each in plugins
        if each.inputs[0] is not None and each.outputs[0].name in network.live
    }
    problems = [f"{name}: a plugin that nobody asked for" for name in parts.keys() - own_attentions]
    for i in range(manifest.model.num_layers):
        name = attention_name(i)
        if name not in own_attentions:
            continue
        if name not in parts or name not in joined:
            problems.append(f"{name}: no two plugins")
            continue
        reads = [each.name if each is not None else "" for each in parts[name].inputs]
        rows = _rows_of(network, manifest, i)
        if tuple(reads[1:5]) != rows:
            problems.append(f"{name}: the plugin reads {reads[1:5]}, not {list(rows)}")
        if io_spec.POSITION_IDS not in network.ancestors(*reads[5:6]):
            problems.append(f"{name}: the plugin does not know {io_spec.POSITION_IDS}")
    return problems


def _check_own_top_k(network: NetworkView, own_top_k: bool) -> list[str]:
    """Check that two plugins find the best logits among those put out, and nothing else does."""
    best = (io_spec.BEST_VALUES, io_spec.BEST_IDS, io_spec.BEST_REST)
    problems = []
    for reads, writes in (((io_spec.LOGITS,), (KEYS, STATS)), ((KEYS, STATS), best)):
        layers = [network.producers.get(name) for name in writes]
        layer, *others = (
            None if each is None or each.kind != "plugin_v3" else each for each in layers
        )
        if not own_top_k:
            if layer is not None:
                problems.append(f"{TOP_K}: a plugin that nobody asked for")
        elif layer is None or any(other is not layer for other in others):
            problems.append(f"{TOP_K}: no plugin makes {', '.join(writes)}")
        elif tuple(each.name for each in layer.inputs[: len(reads)] if each) != reads:
            problems.append(f"{TOP_K}: the plugin that makes {writes[0]} does not read {reads[0]}")
    live = {
        layer.kind for layer in network.layers if {o.name for o in layer.outputs} & network.live
    }
    if own_top_k and "topk" in live:
        problems.append(f"{TOP_K}: a search beside that of the plugins")
    return problems


def _rows_of(network: NetworkView, manifest: Manifest, layer: int) -> tuple[str, ...]:
    """List a layer's cached keys and values, and those of the step."""
    if manifest.dialect != "native":
        past = io_spec.past_key(layer), io_spec.past_value(layer)
        return (*past, io_spec.new_key(layer), io_spec.new_value(layer))
    cache = io_spec.present_key(layer), io_spec.present_value(layer)
    return (*cache, *(_updating(network.producers.get(name)) for name in cache))


def _updating(layer: LayerView | None) -> str:
    """Describe what a layer writes into a cache."""
    rows = None if layer is None or len(layer.inputs) < 2 else layer.inputs[1]
    return "" if rows is None else rows.name


def _live_attentions(network: NetworkView) -> list[AttentionView]:
    """List the attentions that feed an output; a replaced one no longer feeds anything."""
    return [each for each in network.attentions if each.output in network.live]


def _check_cache(network: NetworkView, manifest: Manifest) -> list[str]:
    if manifest.dialect != "native":
        return []
    problems = []
    for i, parts in manifest.model.each_layer():
        if not only(parts, Attention):
            continue
        for past, present in (
            (io_spec.past_key(i), io_spec.present_key(i)),
            (io_spec.past_value(i), io_spec.present_value(i)),
        ):
            layer = network.producers.get(present)
            if layer is None or layer.kind != "kv_cache_update":
                kind = "nothing" if layer is None else f"a layer of kind {layer.kind}"
                problems.append(f"{present} comes from {kind}, not from a KV-cache update")
                continue
            first = layer.inputs[0]
            if first is None or first.name != past:
                problems.append(f"{present} updates {first and first.name}, not {past}")
            cursor = layer.inputs[2]
            if cursor is None or io_spec.WRITE_INDICES not in network.ancestors(cursor.name):
                problems.append(f"{present} is not written at {io_spec.WRITE_INDICES}")
    return problems


def _stored_weights(network: NetworkView) -> dict[str, TensorView]:
    """Find the constants in matrix products that reach an output, by linear layer name."""
    found = {}
    for layer in network.layers:
        if layer.kind != "matrix_multiply" or not layer.outputs:
            continue
        if layer.outputs[0].name not in network.live:
            continue
        weight = _constant_behind(network, layer.inputs[1])
        if weight is not None:
            # Products of float channels, of high planes and of rotations keep their suffixes.
            found[_linear_of(layer.outputs[0].name)] = weight
    return found


def _linear_of(output: str) -> str:
    name = output.removesuffix(".product").removesuffix(".out")
    return "lm_head" if name == io_spec.LOGITS else name


def _plugin_weights(
    network: NetworkView, outside: Mapping[str, OutsideTensor]
) -> dict[str, TensorView]:
    """Find the packed weights of plugins that reach an output, by linear layer name."""
    found = {}
    for layer in network.layers:
        if layer.kind != "plugin_v3" or not layer.outputs:
            continue
        if layer.outputs[0].name not in network.live or layer.outputs[0].name == KEYS:
            continue
        weight = layer.inputs[1]
        if weight is not None and weight.name in outside:
            # Its output has the name of the last node it replaced: a product or a sum.
            name = layer.outputs[0].name.removesuffix(f"{_HIGH_PRODUCT}.added")
            name = name.removesuffix(f"{ADAPTER}.added")
            found[_linear_of(name)] = weight
    return found


def _constant_behind(network: NetworkView, tensor: TensorView | None) -> TensorView | None:
    while tensor is not None:
        layer = network.producers.get(tensor.name)
        if layer is None:
            return None
        if layer.kind == "constant":
            return tensor
        if layer.kind not in (*_PASSED_THROUGH, "dequantize"):
            return None
        tensor = layer.inputs[0]
    return None


def _check_own(
    found: dict[str, TensorView], manifest: Manifest, own_linears: Sequence[str]
) -> list[str]:
    problems = [f"{name}: a plugin that nobody asked for" for name in found.keys() - own_linears]
    for name in own_linears:
        linear = manifest.quantization.linears[name]
        planes = 2 if linear.scheme.planes else 1
        wanted = (linear.shape[0] // BLOCK, planes, linear.shape[1], BLOCK * 4 // 32)
        weight = found.get(name)
        if weight is None:
            problems.append(f"{name}: no plugin with stored weights")
        elif (weight.dtype, weight.shape) != ("int32", wanted):
            problems.append(
                f"{name}: the plugin's weights are {weight.dtype} {list(weight.shape)}, not int32 "
                f"{list(wanted)}"
            )
    return problems


def _check_weights(
    stored: dict[str, TensorView], manifest: Manifest, own_linears: Sequence[str]
) -> list[str]:
    problems = []
    for name, linear in manifest.quantization.linears.items():
        problems += _check_offsets(stored.get(f"{name}{_OFFSET_PRODUCT}"), name, manifest)
        problems += _check_float_channels(stored.get(f"{name}{_FLOAT_PRODUCT}"), name, manifest)
        if name in own_linears:
            problems += [
                f"{product}: a matrix product of what a plugin computes"
                for product in (name, f"{name}{_HIGH_PRODUCT}")
                if product in stored
            ]
            continue
        dtype = engine_dtype(linear.scheme, manifest.dtype)
        for product in (name, f"{name}{_HIGH_PRODUCT}") if linear.scheme.planes else (name,):
            found = stored.get(product)
            if found is None:
                problems.append(f"{product}: no matrix product with stored weights")
            elif found.dtype != dtype:
                problems.append(
                    f"{product}: its weights are {found.dtype}, the bundle says {dtype}"
                )
            elif found.volume != linear.shape[0] * linear.shape[1]:
                problems.append(
                    f"{product}: {found.volume} weights, the bundle says "
                    f"{linear.shape[0]} x {linear.shape[1]}"
                )
        if not linear.scheme.planes and f"{name}{_HIGH_PRODUCT}" in stored:
            problems.append(f"{name}: its weights are in two planes, the bundle says {dtype}")
    return problems


def _check_inputs(
    network: NetworkView, stored: dict[str, TensorView], manifest: Manifest
) -> list[str]:
    """Check that inputs are rotated, or divided and multiplied again, as their weights need it."""
    uses: Counter[str] = Counter()
    for layer in network.layers:
        if layer.outputs and layer.outputs[0].name in network.live:
            uses.update(each.name for each in layer.inputs if each is not None)
    problems = []
    for name, linear in manifest.quantization.linears.items():
        matrix = stored.get(f"{name}{_ROTATED}")
        volume = 0 if matrix is None else matrix.volume
        if volume != linear.rotation_block**2:
            problems.append(
                f"{name}: its inputs are rotated by {volume} numbers, the bundle says "
                f"{linear.rotation_block} x {linear.rotation_block}"
            )
        found, wanted = uses[f"{name}{_DIVISOR}"], 2 * linear.per_token
        if found != wanted:
            problems.append(
                f"{name}: {found} layers use each token's range, the bundle says {wanted}"
            )
    return problems


def _check_offsets(found: TensorView | None, name: str, manifest: Manifest) -> list[str]:
    linear = manifest.quantization.linears[name]
    width, out = linear.shape
    wanted = width // (linear.scheme.group_size or width) if linear.offsets else 0
    volume = 0 if found is None else found.volume
    if volume != wanted * out:
        return [f"{name}: {volume} offsets of groups, the bundle says {wanted} x {out}"]
    if found is not None and found.dtype != manifest.dtype:
        return [f"{name}: its offsets of groups are {found.dtype}, not {manifest.dtype}"]
    return []


def _check_float_channels(found: TensorView | None, name: str, manifest: Manifest) -> list[str]:
    linear = manifest.quantization.linears[name]
    wanted, volume = len(linear.float_channels), 0 if found is None else found.volume
    if volume != wanted * linear.shape[1]:
        return [
            f"{name}: {volume} weights of channels in float, the bundle says "
            f"{wanted} x {linear.shape[1]}"
        ]
    if found is not None and found.dtype != manifest.dtype:
        return [f"{name}: its channels in float are {found.dtype}, not {manifest.dtype}"]
    return []
