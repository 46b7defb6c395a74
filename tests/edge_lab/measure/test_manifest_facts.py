"""Numbers of the manifest: an exported bundle has them, and wrong ones are found."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs, to_builtins

from edge.bundle.kv_scales import read_scales, scales_section
from edge.bundle.manifest import read_manifest
from edge.bundle.memory_facts import read_memory_facts
from edge.errors import BundleError
from edge_lab.measure.manifest_facts import check_facts
from tests.conftest import Bundles


@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_memory_facts_equal_a_count_of_an_older_bundle(quant: str, tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", quant=quant)
    manifest = read_manifest(bundle)
    older = structs.replace(manifest, extras={})
    assert "memory" in manifest.extras
    assert read_memory_facts(manifest) == read_memory_facts(older)
    check_facts(bundle, manifest)
    check_facts(bundle, older)


def test_the_manifest_is_believed(tiny_bundles: Bundles) -> None:
    manifest = read_manifest(tiny_bundles("qwen2"))
    facts = structs.replace(read_memory_facts(manifest), host_loading_bytes=7)
    said = structs.replace(manifest, extras={"memory": to_builtins(facts)})
    assert read_memory_facts(said).host_loading_bytes == 7


@pytest.mark.parametrize("table", ["weights", "host", "host_loading_bytes"])
def test_memory_that_does_not_add_up_is_found(table: str, tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2")
    manifest = read_manifest(bundle)
    section: dict[str, Any] = to_builtins(read_memory_facts(manifest))
    if table == "host_loading_bytes":
        section[table] = section[table] * 2
    else:
        section[table] = {**section[table], "mlp": section[table]["mlp"] // 2}
    with pytest.raises(BundleError, match=r"the manifest says that .* takes .*export"):
        check_facts(bundle, structs.replace(manifest, extras={"memory": section}))


@pytest.mark.parametrize("section", [{}, {"weights": {"nose": 1}, "host": {}}])
def test_a_section_that_does_not_fit_is_refused(
    section: dict[str, Any], tiny_bundles: Bundles
) -> None:
    manifest = read_manifest(tiny_bundles("qwen2"))
    with pytest.raises(BundleError, match="section memory does not fit"):
        read_memory_facts(structs.replace(manifest, extras={"memory": section}))


def test_other_scales_than_the_graphs_are_found(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    manifest = read_manifest(bundle)
    check_facts(bundle, manifest)
    scales = dict(read_scales(bundle, manifest, manifest.graphs.cpu))
    scales["0.value"] = scales["0.value"] * 2
    extras = {**manifest.extras, "kv_scales": scales_section(scales)}
    with pytest.raises(BundleError, match=r"other scales .* than decoder"):
        check_facts(bundle, structs.replace(manifest, extras=extras))
