"""Plans the pictures of a bundle: rows of the prompt, and memory beside the decoder's."""

from __future__ import annotations

from dataclasses import dataclass

from edge.bundle.manifest import Manifest


@dataclass(frozen=True)
class PicturePlan:
    """Cost of a picture, as `plan_pictures` computes it.

    Attributes:
        rows_per_tile: rows of the prompt per tile.
        default_rows: rows of a square picture that is cut by default.
        most_rows: rows of a picture that is cut into all tiles of the family.
        encoder_bytes: weights of the encoder in the engine's graph.
        kept_bytes: the most bytes of rows and pixels that are kept, and of pixels that wait.
    """

    rows_per_tile: int
    default_rows: int
    most_rows: int
    encoder_bytes: int
    kept_bytes: int

    def describe(self, prefill_tps: float | None) -> str:
        """Describe it in a few sentences.

        Args:
            prefill_tps: tokens per second of a prompt, where they are predicted.
        """
        time = ""
        if prefill_tps is not None:
            times = [
                f"{rows / prefill_tps * 1e3:,.0f}" for rows in (self.default_rows, self.most_rows)
            ]
            time = f", {times[0]} and {times[1]} ms of prefill"
        return (
            f"Pictures: a square one is {self.default_rows} rows of the prompt by default and "
            f"{self.most_rows} with all tiles (--image-tiles){time}. Beside the memory above: "
            f"{self.encoder_bytes / 1e6:,.0f} MB of the encoder's weights, and up to "
            f"{self.kept_bytes / 1e6:,.0f} MB of rows and pixels. The encoder's time is not "
            "predicted: edge-llm bench BUNDLE --image FILE measures it."
        )


def plan_pictures(manifest: Manifest | None, *, on_cpu: bool) -> PicturePlan | None:
    """Plan the pictures of a bundle; None without a bundle that reads them.

    Args:
        manifest: manifest of the bundle.
        on_cpu: whether ONNX Runtime's CPU will run it.

    Raises:
        BundleError: the section does not fit.
    """
    if manifest is None or "vision" not in manifest.extras:
        return None
    from edge.vision.layout import plan_layout
    from edge.vision.prompt import CPU_TILES
    from edge.vision.rows import KEPT_BYTES, MOST_PIXEL_BYTES
    from edge.vision.section import read_vision

    section = read_vision(manifest)
    assert section is not None, "the manifest has it"
    edge = section.longest_edge_px
    default = plan_layout(edge, edge, section, CPU_TILES if on_cpu else None)
    return PicturePlan(
        section.rows_per_tile,
        default.image_rows(section),
        plan_layout(edge, edge, section, None).image_rows(section),
        section.weight_bytes,
        KEPT_BYTES + MOST_PIXEL_BYTES,
    )
