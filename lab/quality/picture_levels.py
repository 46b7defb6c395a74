"""Prints by how many levels of 255 transformers' default pixels differ from ours.

Its default resizes by torchvision. We resize by Pillow, as its other backend does and as the models
were trained. Run it where the dependency group ``parity`` and torchvision are installed::

    python3 -m lab picture-levels [PICTURE...]      its drawn pictures without a file
    python3 -m lab picture-levels --answers CHECKPOINT [--pictures 200] [--threads N]

The second asks a checkpoint of `python3 -m lab train-vision` about pictures held out, with the
pixels of both, and counts the answers that differ.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from edge.vision.decode import decode_picture
from edge.vision.picture import as_picture
from edge.vision.section import VisionSection
from lab.training.vision_pictures import draw
from lab.training.vision_score import held_out_questions, open_checkpoint
from tests.edge.vision.pictures import INTERNVL, SMOLVLM, encode, picture

SIZES = ((640, 480), (1280, 800), (2400, 1600), (300, 900), (100, 100))


def torchvision_pixels(data: bytes, section: VisionSection) -> Any:
    """Return the pixels of a checkpoint's default processor with these settings."""
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


def drawing_levels(checkpoint: Path, images: Sequence[Image.Image]) -> NDArray[Any]:
    """Return by how many levels of 255 the pixels of a checkpoint's two processors differ."""
    import transformers

    tiles = []
    for backend in ("pil", "torchvision"):
        processor = transformers.AutoProcessor.from_pretrained(checkpoint, backend=backend)
        made_by = processor.image_processor
        values = made_by([[image] for image in images], return_tensors="pt")["pixel_values"]
        std = np.array(made_by.image_std, np.float32)[:, None, None]
        tiles.append(values.numpy() * std / made_by.rescale_factor)
    return np.asarray(np.abs(tiles[0] - tiles[1]))


def print_answers(checkpoint: Path, pictures: int, threads: int) -> None:
    """Print how many answers of one model differ between the pixels of Pillow and torchvision."""
    drawings = [draw("held-out", number) for number in range(pictures)]
    levels = drawing_levels(checkpoint, [drawing.image for drawing in drawings])
    print(f"pixels: {levels.mean():.5f} levels on average, {levels.max():.1f} at most")
    questions = held_out_questions(drawings)
    ours, theirs = (
        open_checkpoint(checkpoint, threads, backend)(questions)
        for backend in ("pil", "torchvision")
    )
    print("| pixels of | questions | right | answers that differ |")
    print("|---|---|---|---|")
    differ = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    for name, texts in (("Pillow", ours), ("torchvision", theirs)):
        right = sum(q.is_right(text) for q, text in zip(questions, texts, strict=True))
        print(f"| {name} | {len(questions)} | {right} | {len(differ)} |")
    for place in differ:
        asked = questions[place]
        print(
            f"picture {asked.drawing.number}, {asked.text} {asked.answer!r}: Pillow "
            f"{ours[place]!r}, torchvision {theirs[place]!r}"
        )


def print_levels(files: Sequence[Path]) -> None:
    """Print by how many levels the pixels of both differ."""
    pictures = {str(path): path.read_bytes() for path in files}
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


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab picture-levels", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="PICTURE")
    parser.add_argument("--answers", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--pictures", type=int, default=200, help="for --answers; default 200")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for --answers")
    options = parser.parse_args()
    if options.answers:
        if options.files:
            parser.error("--answers draws its pictures itself; give no PICTURE beside it")
        print_answers(options.answers, options.pictures, options.threads)
    else:
        print_levels(options.files)


if __name__ == "__main__":
    main()
