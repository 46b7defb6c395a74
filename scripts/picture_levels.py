"""Prints by how many levels of 255 transformers' default pixels differ from those that we give.

Its default resizes by torchvision, and needs it; we resize by Pillow, as its other backend does and
as the models were trained. Run where the dependency group ``parity`` and torchvision are::

    python -m scripts.picture_levels [PICTURE...]      its drawn pictures without a file
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from edge.vision.decode import decode_picture
from edge.vision.picture import as_picture
from edge.vision.section import VisionSection
from tests.edge.vision.pictures import INTERNVL, SMOLVLM, encode, picture

SIZES = ((640, 480), (1280, 800), (2400, 1600), (300, 900), (100, 100))


def torchvision_pixels(data: bytes, section: VisionSection) -> Any:
    """What the default processor of a checkpoint with these settings gives."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor

    edge = section.tile_px
    options: dict[str, Any] = {
        "resample": section.resample,
        "image_mean": list(section.mean),
        "image_std": list(section.std),
    }
    if section.family == "internvl":
        options |= {"size": {"height": edge, "width": edge}, "crop_to_patches": True}
        processor = GotOcr2ImageProcessor(max_patches=section.max_tiles - 1, **options)
    else:
        size = {"longest_edge": section.longest_edge_px}
        processor = SmolVLMImageProcessor(
            size=size, max_image_size={"longest_edge": edge}, **options
        )
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    values = processor(image, return_tensors="pt")["pixel_values"].numpy()
    return values.reshape(-1, *values.shape[-3:])


def main() -> None:
    pictures = {path: Path(path).read_bytes() for path in sys.argv[1:]}
    for width, height in () if pictures else SIZES:
        drawn = picture(width, height)
        pictures[f"{width} x {height}, sharp"] = encode(drawn)
        soft = drawn.filter(ImageFilter.GaussianBlur(2))  # as a lens does
        pictures[f"{width} x {height}, soft"] = encode(soft)
    print("| picture | model | mean | 99th percentile | most | pixels that differ |")
    print("|---|---|---|---|---|---|")
    for name, data in pictures.items():
        for model, section in (("SmolVLM", SMOLVLM), ("InternVL3", INTERNVL)):
            ours = decode_picture(as_picture(data), section).normalised()
            theirs = torchvision_pixels(data, section)
            std = np.array(section.std, np.float32)[:, None, None]
            levels = np.abs(ours - theirs) * std / section.rescale
            print(
                f"| {name} | {model} | {levels.mean():.3f} | {np.percentile(levels, 99):.1f} "
                f"| {levels.max():.1f} | {(levels > 0.5).mean():.1%} |"
            )


if __name__ == "__main__":
    main()
