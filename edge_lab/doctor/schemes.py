"""Checks what this TensorRT builds: an engine of one layer per precision and operator."""

from __future__ import annotations

import math

from edge.bundle.io_spec import DIALECTS
from edge.bundle.manifest import Manifest
from edge_lab.doctor.scheme_probe import SCHEMES, WIDE, Verdict

from .check import UNAVAILABLE, Check, MachineFacts, version_numbers

_NATIVE_ONLY = ("attention", "kv-update")


def check_schemes(facts: MachineFacts, manifest: Manifest | None = None) -> list[Check]:
    """Check which schemes TensorRT builds on this GPU: one check each, or one that says why not."""
    name, widths = "schemes", _widest(manifest)
    if not facts.cuda.works:
        return [Check(name, "skip", "no GPU that works, so nothing was built")]
    if facts.tensorrt.version is None or facts.tensorrt.error is not None:
        return [Check(name, "skip", "no TensorRT that works, so nothing was built")]
    verdicts, failure = facts.machine.schemes(widths)
    checks = [_judge(verdict, facts.tensorrt.version) for verdict in verdicts]
    if failure is not None:
        tried = {verdict.scheme for verdict in verdicts}
        missing = [scheme for scheme in SCHEMES if scheme not in tried]
        checks.append(
            Check(
                f"scheme {missing[0]}" if missing else name,
                "warn",
                "it was not built"
                + (f", nor were {', '.join(missing[1:])}" if missing[1:] else ""),
                f"the process that built it ended: {failure}",
                SCHEMES[missing[0]].instead if missing else "run edge-llm doctor again",
            )
        )
    return [*checks, *_check_own_plugins(facts, widths)]


def _widest(manifest: Manifest | None) -> tuple[int, int]:
    """Return inputs and outputs of a bundle's largest layer, the lm_head aside."""
    if manifest is None:
        return WIDE
    layers = manifest.quantization.linears.items()
    shapes = [linear.shape for name, linear in layers if name != "lm_head"]
    depth, columns = max(shapes, key=math.prod)
    return depth, columns


def _check_own_plugins(facts: MachineFacts, widths: tuple[int, int]) -> list[Check]:
    verdicts, failure = facts.machine.own_plugins(widths)
    title = "a product with INT4 weights by edge-llm's own kernel"
    instead = "build with --kernels tensorrt"
    checks = [
        Check(f"own kernels {each.scheme}", "ok", f"{title}: {each.detail} in {each.seconds:.1f} s")
        if each.built
        else Check(
            f"own kernels {each.scheme}", "warn", f"{title}: not built", each.detail, instead
        )
        for each in verdicts
    ]
    if failure is not None:
        cause = f"the process that built it ended: {failure}"
        checks.append(Check("own kernels", "warn", f"{title}: not built", cause, instead))
    return checks


def _judge(verdict: Verdict, version: str) -> Check:
    scheme = SCHEMES[verdict.scheme]
    name = f"scheme {verdict.scheme}"
    if verdict.built:
        return Check(name, "ok", f"{scheme.title}: {verdict.detail} in {verdict.seconds:.1f} s")
    since = DIALECTS["native"].min_tensorrt
    if verdict.scheme in _NATIVE_ONLY and version_numbers(version) < since:
        detail = f"TensorRT {since[0]}.{since[1]} has it, this is {version}; {scheme.instead}"
        return Check(name, "skip", f"{scheme.title}: {detail}")
    needed = verdict.scheme == "fp16"
    return Check(
        name,
        "fail" if needed else "warn",
        f"{scheme.title}: refused, so {scheme.needed_by} cannot be built here",
        verdict.detail,
        scheme.instead,
        UNAVAILABLE if needed else 0,
    )
