"""What transformers' processors make of a picture, on their Pillow backend."""

from __future__ import annotations

import functools
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edge.vision.section import VisionSection


@functools.cache
def processor(section: VisionSection) -> Any:
    """The image processor with the settings of a checkpoint."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    edge = section.tile_px
    common = {
        "resample": section.resample,
        "image_mean": list(section.mean),
        "image_std": list(section.std),
        "rescale_factor": section.rescale,
    }
    if section.family == "internvl":
        size = {"height": edge, "width": edge}
        patches = {"crop_to_patches": True, "max_patches": section.max_tiles - 1}
        return GotOcr2ImageProcessorPil(size=size, **patches, **common)
    size = {"longest_edge": section.longest_edge_px}
    return SmolVLMImageProcessorPil(size=size, max_image_size={"longest_edge": edge}, **common)


def settings(size: tuple[int, int], section: VisionSection, limit: int | None) -> dict[str, Any]:
    """Settings of the processor that keep the tiles beside the whole picture to a limit."""
    if limit is None:
        return {}
    if section.family == "internvl":
        return {"max_patches": min(max(limit, 1), section.max_tiles - 1)}
    edge = section.longest_edge_px
    while edge > section.tile_px:
        options = {"size": {"longest_edge": edge}}
        _, rows, cols = grid(size, section, options)
        if rows * cols <= limit:
            return options
        edge -= section.tile_px
    return {"do_image_splitting": False}


def grid(
    size: tuple[int, int], section: VisionSection, options: dict[str, Any]
) -> tuple[int, int, int]:
    """Number of tiles, rows and columns, without a pixel: every resize gives an empty picture."""
    from transformers import image_processing_backends as backends

    def resized(image: Any, size: tuple[int, int], **_: Any) -> NDArray[np.uint8]:
        return np.broadcast_to(np.uint8(0), (3, *size))

    real = backends.np_resize
    backends.np_resize = resized
    try:
        image = np.broadcast_to(np.uint8(0), (3, size[1], size[0]))
        judge = processor(section)
        if section.family == "internvl":
            most = options.get("max_patches", section.max_tiles - 1)
            tile = backends.SizeDict(height=section.tile_px, width=section.tile_px)
            tiles = len(judge.crop_image_to_patches(image, 1, most, patch_size=tile))
            return tiles, 0, 0
        if not options.get("do_image_splitting", True):
            return 1, 0, 0
        edges = options.get("size", {"longest_edge": section.longest_edge_px})
        image = judge.resize(image, backends.SizeDict(**edges))
        image = judge.resize_for_vision_encoder(image, section.tile_px)
        tiles, rows, cols = judge.split_images(image, {"longest_edge": section.tile_px})
        return len(tiles), rows, cols
    finally:
        backends.np_resize = real


def text(section: VisionSection, tiles: int, rows: int, cols: int) -> str:
    """What the processor puts in place of the image token."""
    from transformers.models.internvl.processing_internvl import InternVLProcessor
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

    if section.family == "internvl":
        fake = SimpleNamespace(
            start_image_token="<img>",
            end_image_token="</img>",
            image_token="<IMG_CONTEXT>",
            image_seq_length=section.rows_per_tile,
        )
        return str(InternVLProcessor.replace_image_token(fake, {"num_patches": [tiles]}, 0))
    fake = SimpleNamespace(
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
        image_seq_len=section.rows_per_tile,
    )
    found = {"rows": [[rows]], "cols": [[cols]]}
    return str(SmolVLMProcessor.replace_image_token(fake, found, 0))


def pixel_values(data: bytes, section: VisionSection, limit: int | None) -> NDArray[np.float32]:
    """Tiles ``[tiles, 3, tile_px, tile_px]`` of an encoded picture, turned as `load_image` does."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    options = settings(image.size, section, limit)
    values = processor(section)(image, **options, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(values.reshape(-1, *values.shape[-3:]))
