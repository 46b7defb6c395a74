"""Refuses layers whose parts do not fit each other, or that are larger than any model."""

from __future__ import annotations

from .names import MODULES
from .parts import Add, AnyPart, Attention, GatedMlp, Linear, Norm, Rope, only, unknown_part
from .spec import MAX_LAYERS, ModelSpec

_MOST_WEIGHTS = 1 << 40
_MOST_ROW = 1 << 26  # numbers of a token in the caches of all layers


def layer_faults(model: ModelSpec) -> list[str]:
    """Say what is wrong with a model's layers.

    Whoever reads a manifest asks first: all code behind it takes widths and names as they are.
    """
    if model.num_layers > MAX_LAYERS:
        return [f"{model.num_layers} layers are more than {MAX_LAYERS}"]
    faults, weights, row = [], 0, 0
    for number, run in enumerate(model.layers):
        faults += [f"layers[{number}]: {text}" for text in _Reader(model).read(run.parts)]
        for part in only(run.parts, Linear):
            weights += run.count * part.width * sum(width for _, width in part.outputs)
        for attention in only(run.parts, Attention):
            row += run.count * 2 * attention.kv_heads * attention.dim
    if weights > _MOST_WEIGHTS:
        faults.append(f"its layers have {weights:,} weights, more than {_MOST_WEIGHTS:,}")
    if row > _MOST_ROW:
        faults.append(f"a token takes {row:,} numbers of cache, more than {_MOST_ROW:,}")
    return faults


class _Reader:
    """Follows the widths of the values of one layer, in the order of its parts."""

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._hidden = model.hidden_size
        self._running: int | None = self._hidden
        self._values: dict[str, int] = {}
        self._turned = False
        self._dim = 0  # of a head
        self._names: set[str] = set()
        self._faults: list[str] = []

    def read(self, layer: tuple[AnyPart, ...]) -> list[str]:
        """Return what is wrong with a layer."""
        self._dim = max((each.dim for each in only(layer, Attention)), default=0)
        for part in layer:
            self._part(part)
        if layer[-1] != Add("mlp_residual"):
            self._faults.append("the last part is not add with the name mlp_residual")
        if self._turned and not only(layer, Attention):
            self._faults.append("it has a rope and no attention")
        for kind in (Attention, Rope):
            if len(only(layer, kind)) > 1:
                self._faults.append(f"it has more than one {kind.__name__.lower()}")
        return self._faults

    def _part(self, part: AnyPart) -> None:
        match part:
            case Norm(name=name, size=size, of=of):
                self._name(name, name)
                if of is None:
                    self._takes(name, self._running, size)
                elif self._turned:
                    self._faults.append(f"{name} comes after rope")
                elif self._values.get(of, 0) % size or of not in self._values:
                    self._faults.append(f"{name} does not divide {of} into heads of {size}")
            case Linear(name=name, width=width, outputs=outputs):
                self._name(name, *(output for output, _ in outputs))
                self._takes(name, self._running, width)
                self._running = outputs[0][1] if len(outputs) == 1 else None
                self._values |= dict(outputs) if len(outputs) > 1 else {}
            case Rope(dims=dims, table=table):
                self._turned = True
                if table >= len(self._model.ropes):
                    self._faults.append(f"rope has no table {table}")
                elif dims != self._model.rope_dims(table):
                    self._faults.append(f"rope turns {dims} dimensions by a table of others")
                if dims % 2:
                    self._faults.append(f"rope turns {dims} dimensions, an odd number")
                if dims > self._dim > 0:
                    self._faults.append(f"rope turns {dims} dimensions of heads of {self._dim}")
                self._faults += [
                    f"rope comes where there is no {value}"
                    for value in "qk"
                    if value not in self._values
                ]
            case Attention(heads=heads, kv_heads=kv_heads, dim=dim):
                if heads % kv_heads:
                    self._faults.append(f"{heads} heads are not a multiple of {kv_heads} KV heads")
                for value, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                    self._takes(f"attention's {value}", self._values.pop(value, None), count * dim)
                self._running = heads * dim
            case GatedMlp():
                wide = self._values.pop("gate", None)
                self._takes("gated_mlp", self._values.pop("up", None), wide)
                self._running = wide
            case Add(name=name):
                self._name(name)
                self._takes(name, self._running, self._hidden)
                self._running = self._hidden
            case _:
                unknown_part(part)

    def _name(self, name: str, *modules: str) -> None:
        if name in self._names:
            self._faults.append(f"two parts are named {name}")
        self._names.add(name)
        self._faults += [
            f"{module} has no name in checkpoints" for module in modules if module not in MODULES
        ]

    def _takes(self, name: str, found: int | None, wanted: int | None) -> None:
        if found is None or found != wanted:
            self._faults.append(f"{name} takes a width of {wanted}, and there is {found}")
