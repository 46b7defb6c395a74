"""Names a model's bundle in a team's own registry, for pull and push alike.

``deepseek-r1:1.5b`` in INT4 is ``REGISTRY/deepseek-r1:1.5b-int4``, and a hub's ``owner/name`` is
``REGISTRY/owner/name:int4``. The name of a bundle for only one JetPack ends with ``-jetpack6``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from edge.bundle.library import CATALOGUE, HUB_HOST
from edge.bundle.manifest import Manifest
from edge.errors import ConfigError
from edge_make.published import PUBLISHED

from .reference import Reference, parse_reference

REGISTRY_VARIABLE = "EDGE_LLM_REGISTRY"
TENSORRT = {"jetpack6": "10.3", "jetpack7": "10.16"}
"""The TensorRT of each JetPack that `edge_lab.telemetry.read_target` knows."""


@dataclass(frozen=True)
class TeamRegistry:
    """A team's registry of bundles.

    Attributes:
        place: ``HOST[:PORT]``, and a path if one was given.
        plain_http: whether to speak HTTP without TLS (`client.Registry`).
    """

    place: str
    plain_http: bool | None

    def reference(self, hub_id: str, quantization: str, suffix: str = "") -> Reference:
        """Name the bundle of a model.

        Args:
            hub_id: hub id or address of the model, or of an already quantized checkpoint of it.
            quantization: quantization, as in ``--quant``.
            suffix: end of the tag, from `suffixes` or `suffix_of`.

        Raises:
            ConfigError: no registry takes this hub id as a name.
        """
        for short, known in CATALOGUE.items():
            meant = PUBLISHED.get(known, known) if quantization == "source" else known
            if meant.lower() == hub_id.lower():
                repository, _, size = short.partition(":")
                tag = f"{size}-{quantization}{suffix}"
                return parse_reference(f"{self.place}/{repository}:{tag}")
        name = hub_id.lower().removeprefix(HUB_HOST).replace(":", "-")
        return parse_reference(f"{self.place}/{name}:{quantization}{suffix}")

    def reference_of(self, manifest: Manifest) -> Reference:
        """Name a bundle as a pull of its model looks for it.

        Raises:
            ConfigError: it comes from no model of a hub, or from one that was changed.
        """
        source, why = manifest.source, None
        if source.kind != "hub":
            why = f"exported from {source.location} and not from a hub"
        elif source.adapter is not None:
            why = f"made with the adapter {source.adapter.name}"
        elif manifest.vocabulary is not None:
            why = "made with a reduced vocabulary"
        if why is not None:
            raise ConfigError(
                f"{manifest.name} was {why}, so no short name means it; give a REFERENCE"
            )
        hub_id = source.location.removeprefix("modelscope:")
        return self.reference(hub_id, manifest.quantization.name, suffix_of(manifest))


def team_registry() -> TeamRegistry | None:
    """Read ``EDGE_LLM_REGISTRY``: ``HOST[:PORT][/PATH]``, or with ``http://`` one without TLS.

    Raises:
        ConfigError: the value is not of this form.
    """
    text = os.environ.get(REGISTRY_VARIABLE)
    if not text:
        return None
    scheme, _, place = text.rpartition("://")
    place = place.rstrip("/")
    try:
        if scheme not in ("", "http", "https"):
            raise ConfigError(scheme)
        parse_reference(f"{place}/name:tag")
    except ConfigError:
        raise ConfigError(
            f"{REGISTRY_VARIABLE} is {text!r}, which is no registry; write HOST[:PORT][/PATH] in "
            "lower case, or http://HOST... for one without TLS"
        ) from None
    return TeamRegistry(place, {"": None, "http": True, "https": False}[scheme])


def suffix_of(manifest: Manifest) -> str:
    """Return the end of a bundle's tag: the only JetPack that takes it, or nothing.

    Bundles in the native dialect, which only JetPack 7 takes, run on CPUs, too, and have none.
    """
    names = [name for name in TENSORRT if takes(manifest, name)]
    return f"-{names[0]}" if len(names) == 1 and manifest.dialect != "native" else ""


def suffixes(machine: str | None) -> list[str]:
    """List the ends that the tag of a bundle for this machine may have, best first.

    Args:
        machine: this machine's JetPack, from `edge_lab.telemetry.read_target`.
    """
    return ["", *(f"-{name}" for name in TENSORRT)] if machine is None else [f"-{machine}", ""]


def takes(manifest: Manifest, machine: str | None) -> bool:
    """Whether a machine's TensorRT takes a bundle; true for a machine without TensorRT."""
    return machine is None or TENSORRT[machine] in (manifest.tensorrt or ())
