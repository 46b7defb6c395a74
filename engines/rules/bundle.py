"""Checks bundles against the rules, for ``check --trt``, ``build`` and ``export``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.manifest import Manifest, read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import BuildError, ConfigError
from edge.vision.section import read_vision

from .check import Verdict, check_graph
from .table import VERSIONS, Version, version_of

_OLDEST = VERSIONS[0].release
_RELEASE = re.compile(r"(\d{1,3})\.(\d{1,3})(\.\d+)*\Z")


def parse_versions(text: str) -> list[Version]:
    """Parse the value of ``--trt``: releases such as ``10.3``, ``rtx`` or ``all``, with commas.

    Raises:
        ConfigError: a part is none of these, or a release older than the table.
    """
    found: list[Version] = []
    for name in text.split(","):
        wanted = VERSIONS if name.strip() == "all" else (_parse_version(name.strip()),)
        found += [version for version in wanted if version not in found]
    return found


def _parse_version(name: str) -> Version:
    if name == "rtx":
        return VERSIONS[-1]
    match = _RELEASE.match(name)
    if match is None:
        known = ", ".join(version.name for version in VERSIONS)
        raise ConfigError(f"--trt {name} is no version; give some of {known}, or all")
    release = int(match[1]), int(match[2])
    if release < _OLDEST:
        raise ConfigError(
            f"--trt {name} is too old: edge-llm builds with TensorRT {VERSIONS[0].name} (JetPack "
            "6.1) and newer"
        )
    return version_of("tensorrt", release)


def check_bundle_rules(bundle: Path, versions: list[Version]) -> list[Verdict]:
    """Check a bundle's graphs against the rules of some versions.

    The graphs are hashed first. The weights are not, since only scales are read from them. Findings
    about a vision encoder follow those about the decoder.

    Raises:
        BundleError: there is no bundle, or a graph is not valid.
        IntegrityError: the graph differs from its hash in the manifest.
    """
    manifest = read_manifest(bundle)
    section = read_vision(manifest)
    names = [manifest.graphs.decoder, *([] if section is None else [section.graph])]
    verify_files(bundle, manifest, names)
    found = [check_graph((bundle / name).read_bytes(), bundle, versions) for name in names]
    return [
        replace(
            each[0], findings=tuple(finding for verdict in each for finding in verdict.findings)
        )
        for each in zip(*found, strict=True)
    ]


def refuse_illegal(graph: bytes, bundle: Path, manifest: Manifest, version: Version) -> list[str]:
    """Check a graph before a parser sees it.

    Args:
        graph: the graph to build, e.g. with another capacity than the bundle's.
        bundle: directory of its weights.
        manifest: the bundle's manifest.
        version: the TensorRT that will parse it.

    Returns:
        Warnings, one line each.

    Raises:
        BuildError: this TensorRT does not take it; the message has rule, node and the command that
            helps.
        BundleError: the graph is not valid.
    """
    (verdict,) = check_graph(graph, bundle, [version])
    if not verdict.legal:
        first, *others = verdict.refusals
        more = f" ({len(others)} more rules are broken)" if others else ""
        raise BuildError(
            f"{version} does not take {bundle} ({manifest.dialect}, "
            f"{manifest.quantization.name}): {first}{more}; {first.instead}. All of it: "
            f"edge-llm check {bundle} --trt {version.name}"
        )
    return [str(finding) for finding in verdict.findings]


def verdict_as_dict(verdict: Verdict) -> dict[str, Any]:
    """Convert a verdict to what ``--json`` prints."""
    return {
        "tensorrt": verdict.version.name,
        "where": verdict.version.where,
        "legal": verdict.legal,
        "confirmed": verdict.confirmed,
        "findings": [msgspec.to_builtins(finding) for finding in verdict.findings],
    }
