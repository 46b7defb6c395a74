"""Train a small model that sees: a SmolVLM of our own around SmolLM2-135M.

usage: python3 -m lab train-vision -o CHECKPOINT [--state DIRECTORY] [--minutes 60] ...

CHECKPOINT becomes a directory like SmolVLM's published ones (Idefics3's layout), which transformers
and ``edge-llm export`` load. The decoder is SmolLM2-135M-Instruct as ``scripts/quickstart`` has it
and is not trained. A ViT, a projector, and the rows of three tokens that the decoder has not seen
are. They learn drawn pictures (`lab/training/vision_pictures.py`) in two stages:

1. By labels, without the decoder: each patch says what is drawn there, and each of a tile's four
   rows is drawn towards the decoder's own token rows of one answer (colour, what, number, place).
2. By answers, through the decoder: the loss of the answer's tokens goes back through it to the
   rows. A picture's questions share the picture's part of the prompt.

The state is saved every few minutes, and the same command resumes from it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from edge.errors import ConfigError
from export.sources.opening import open_checkpoint
from tools.command import run_main, say
from tools.models.smollm2 import smollm2_gguf

from .finetune import load_model
from .vision_checkpoint import (
    AFTER_QUESTION,
    BEFORE_QUESTION,
    END,
    FAKE,
    GLOBAL,
    IMAGE,
    PATCH_PX,
    TILE_PX,
    VISION,
    extended_tokenizer,
    new_model,
    write_texts,
)
from .vision_pictures import ANSWERS, Drawing, draw
from .vision_score import beside_another

# The answer that each row of a tile learns in the first stage.
LABELS: Sequence[tuple[str, Sequence[str]]] = (
    ("colour", ANSWERS["colour"]),
    ("what", (*ANSWERS["shape"], "digit")),
    ("number", ANSWERS["digit"]),
    ("place", ANSWERS["place"]),
)
NO_LABEL = -100
MARKS_RATE = 3e-3  # learning rate of rows of the token table, which are 0.14 wide
# Classes of the two heads of each patch in the first stage; the last class of each is "nothing".
PATCH_LABELS: Sequence[Sequence[str]] = (ANSWERS["colour"], (*ANSWERS["shape"], *ANSWERS["digit"]))


@dataclass(frozen=True)
class Stage:
    """How long and how fast one of the two stages learns.

    Attributes:
        name: its name in the state's file and in the output.
        steps: steps of the optimizer.
        pictures: pictures per step.
        learning_rate: highest learning rate of the ViT and the projector.
    """

    name: str
    steps: int
    pictures: int
    learning_rate: float


class Sight(nn.Module):  # type: ignore[misc]
    """The trained part: pixels in, rows of a prompt out.

    Attributes:
        vision: Idefics3's ViT.
        connector: its pixel shuffle and projection.
        marks: rows of the tokens `FAKE`, `GLOBAL` and `END`, ``[3, hidden]``.
        heads: heads of the patches, one for each of `PATCH_LABELS`; no part of the checkpoint.
    """

    MARKS = (FAKE, GLOBAL, END)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision = model.model.vision_model.float()
        self.connector = model.model.connector.float()
        with torch.no_grad():  # rows no longer than those of the decoder's own table
            self.connector.modality_projection.proj.weight.mul_(0.05)
            self.vision.embeddings.position_embedding.weight.mul_(10)
        hidden = model.config.text_config.hidden_size
        self.marks = nn.Parameter(torch.zeros(len(self.MARKS), hidden))
        self.heads = nn.ModuleList(
            nn.Linear(VISION["hidden_size"], len(labels) + 1) for labels in PATCH_LABELS
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Run the ViT and the connector on pictures.

        Args:
            pixels: ``[pictures, 3, TILE_PX, TILE_PX]``.

        Returns:
            Rows ``[pictures, ROWS, hidden]`` and the patches that they are made from
            ``[pictures, patches, ViT's hidden]``, both fp32.
        """
        side = TILE_PX // PATCH_PX
        mask = torch.ones(len(pixels), side, side, dtype=torch.bool)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = self.vision(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
            rows = self.connector(seen)
        return rows.float(), seen.float()


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab train-vision", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument(
        "--state", type=Path, metavar="DIRECTORY", help="default: CHECKPOINT with .state after it"
    )
    parser.add_argument("--label-steps", type=int, default=1500, help="default 1500")
    parser.add_argument("--answer-steps", type=int, default=500, help="default 500")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after these (600)")
    parser.add_argument(
        "--pictures", type=int, default=500, help="held out to be asked about at the end (500)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.pictures < len(ANSWERS):
        raise ConfigError(f"--pictures {options.pictures} must be {len(ANSWERS)} or more")
    if options.label_steps < 1 or options.answer_steps < 1 or options.threads < 1:
        raise ConfigError("--label-steps, --answer-steps and --threads must be 1 or more")
    torch.set_num_threads(options.threads)
    training = Training(
        options.state or options.output.with_name(options.output.name + ".state"),
        deadline_s=time.monotonic() + 60 * options.minutes,
        seed=options.seed,
    )
    stages = (
        Stage("labels", options.label_steps, 32, 2e-3),
        Stage("answers", options.answer_steps, 4, 4e-4),
    )
    for stage in stages:
        if not training.run(stage):
            say("The time is over; the same command goes on.")
            break
    counted = training.count_right(options.pictures)
    training.write(options.output)
    report = {"checkpoint": str(options.output), "seen": training.seen, "held_out": counted}
    print(json.dumps(report))


class Training:
    """A model, its training so far, and the files that keep both.

    Args:
        state: directory of the files from which a later run resumes.
        deadline_s: when to stop, by `time.monotonic`.
        seed: seed of the first weights.
    """

    def __init__(self, state: Path, *, deadline_s: float, seed: int) -> None:
        self._state = state
        self._deadline_s = deadline_s
        torch.manual_seed(seed)
        base = str(smollm2_gguf())
        with open_checkpoint(base) as checkpoint:
            self._decoder = load_model(base, checkpoint)
            self.tokenizer = extended_tokenizer(checkpoint.text.tokenizer_json)
        self.model = new_model(self._decoder, self.tokenizer)
        self.sight = Sight(self.model)
        self._text = self.model.model.text_model.to(torch.bfloat16).requires_grad_(False)
        self._table = self._text.embed_tokens.weight
        self._mark_ids = [self.tokenizer.token_to_id(mark) for mark in Sight.MARKS]
        self.sight.marks.data.copy_(self._table[self._mark_ids].float())
        self.classes = [
            torch.stack([self._table[self.ids(f" {a}")].float().mean(0) for a in answers])
            for _, answers in LABELS
        ]
        self._before = self.ids(BEFORE_QUESTION)
        self._after = self.ids(AFTER_QUESTION)
        self.seen: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def run(self, stage: Stage) -> bool:
        """Learn until the stage ends or the time is over.

        Returns:
            Whether the stage has ended.
        """
        path = self._state / f"{stage.name}.pt"
        optimizers = self._optimizers(stage)
        step = 0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.sight.load_state_dict(saved["sight"])
            step = saved["step"]
            say(f"{stage.name}: {step} steps of {stage.steps} are done")
            if step < stage.steps:
                for optimizer, kept in zip(optimizers, saved["optimizers"], strict=True):
                    optimizer.load_state_dict(kept)
        losses: list[float] = []
        said_s = saved_s = time.monotonic()
        while step < stage.steps and time.monotonic() < self._deadline_s:
            first = step * stage.pictures + (10**6 if stage.name == "answers" else 0)
            drawings = [draw("train", first + i) for i in range(stage.pictures)]
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["highest"] * pace(step, stage.steps)
            rows, patches = self.sight(pixels_of(drawings))
            if stage.name == "labels":
                loss = self.label_loss(drawings, rows, patches)
            else:
                loss = self.answer_loss(drawings, rows, step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.sight.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            step += 1
            now_s = time.monotonic()
            if now_s - said_s > 30:
                pace_s = len(losses) * stage.pictures / (now_s - said_s)
                say(f"{stage.name} {step}: loss {np.mean(losses):.4f}, {pace_s:.1f} pictures/s")
                losses, said_s = [], now_s
            if now_s - saved_s > 120:
                self._save(path, optimizers, step)
                saved_s = now_s
        self._save(path, optimizers, step)
        self.seen[stage.name] = step * stage.pictures
        return step >= stage.steps

    def _optimizers(self, stage: Stage) -> list[Any]:
        """Make Muon for the ViT's square matrices, AdamW for the rest.

        A patch has 768 values and a row 3,072, many of them alike, so a step of the weights that
        read
        them moves far: their learning rate is a tenth.
        """
        matrices: list[Tensor] = []
        wide: list[Tensor] = []
        others: list[Tensor] = []
        for name, value in self.sight.named_parameters():
            if "encoder.layers" in name and value.ndim == 2:
                matrices.append(value)
            elif "patch_embedding.weight" in name or "modality_projection" in name:
                wide.append(value)
            elif name != "marks":
                others.append(value)
        rate = stage.learning_rate
        muon = torch.optim.Muon(
            [{"params": matrices, "highest": rate}],
            lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        adam = torch.optim.AdamW(
            [
                {"params": wide, "highest": rate / 10},
                {"params": others, "highest": rate},
                {"params": [self.sight.marks], "highest": MARKS_RATE},
            ],
            lr=rate, betas=(0.9, 0.95), weight_decay=0.0,
        )  # fmt: skip
        return [muon, adam]

    def _save(self, path: Path, optimizers: Sequence[Any], step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        torch.save(
            {
                "sight": self.sight.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
            },
            fresh,
        )
        fresh.replace(path)

    def label_loss(self, drawings: Sequence[Drawing], rows: Tensor, patches: Tensor) -> Tensor:
        """Return how far rows are from their answers' token rows, patches from `PATCH_LABELS`."""
        labels = torch.tensor([labels_of(drawing) for drawing in drawings])
        total = torch.zeros(())
        for place, classes in enumerate(self.classes):
            known = labels[:, place] != NO_LABEL
            if known.any():
                row, label = rows[known, place], labels[known, place]
                total = total + nn.functional.cross_entropy(row_scores(row, classes), label)
                apart = nn.functional.mse_loss(row, classes[label]) / classes.var()
                total = total + 0.3 * apart
        shown = torch.from_numpy(np.stack([patch_labels_of(drawing) for drawing in drawings]))
        for number, head in enumerate(self.sight.heads):
            weight = torch.ones(head.out_features)
            weight[-1] = 0.2  # most patches show nothing
            total = total + nn.functional.cross_entropy(
                head(patches).flatten(0, 1), shown[:, number].flatten(), weight=weight
            )
        return total

    def answer_loss(self, drawings: Sequence[Drawing], rows: Tensor, step: int) -> Tensor:
        """Return the mean loss of the answers' tokens, through the decoder."""
        logits, wanted, _ = self._answers(drawings, rows, step)
        return nn.functional.cross_entropy(logits, wanted)

    def _answers(
        self, drawings: Sequence[Drawing], rows: Tensor, step: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all answers' logits ``[n, vocabulary]``, the right tokens, and their questions."""
        packed = [self.pack(drawing, step) for drawing in drawings]

        def padded(values: Iterable[Sequence[int]], padding: int) -> Tensor:
            tensors = [torch.tensor(each) for each in values]
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)

        labels = padded((p.labels for p in packed), NO_LABEL)
        blocks = padded((p.blocks for p in packed), -1)
        hidden = self.decode(
            padded((p.ids for p in packed), 0),
            rows,
            padded((p.positions for p in packed), 0),
            blocks,
        )
        learned = labels != NO_LABEL
        asked = blocks - 1 + torch.arange(len(packed))[:, None] * len(ANSWERS)
        return self.logits(hidden[learned]), labels[learned], asked[learned]

    def count_right(self, pictures: int) -> dict[str, dict[str, int]]:
        """Ask everything about held-out pictures, beside them and beside another one.

        An answer is right if each of its tokens is the most likely one after those before it, so
        that greedy decoding would write it.
        """
        counted = {kind: {"asked": 0, "right": 0, "right_beside_another": 0} for kind in ANSWERS}
        drawings = [draw("held-out", number) for number in range(pictures)]
        for name, shown in (
            ("right", drawings),
            ("right_beside_another", beside_another(drawings)),
        ):
            for first in range(0, pictures, 8):
                part = drawings[first : first + 8]
                with torch.inference_mode():
                    rows, _ = self.sight(pixels_of(shown[first : first + 8]))
                    logits, wanted, asked = self._answers(part, rows, None)
                missed = {int(each) for each in asked[logits.argmax(-1) != wanted]}
                for place, drawing in enumerate(part):
                    for number, kind in enumerate(drawing.facts):
                        counted[kind][name] += place * len(ANSWERS) + number not in missed
                        counted[kind]["asked"] += name == "right"
        return counted

    def pack(self, drawing: Drawing, step: int | None) -> Packed:
        """Pack a picture and all of its questions into one sequence.

        The phrasings are those of a step, or for None those of the score.
        """
        size = len(self._before)
        packed = Packed(
            list(self._before), list(range(size)), [0] * size, [NO_LABEL] * size
        )  # fmt: skip
        for number, (kind, answer) in enumerate(drawing.facts.items(), 1):
            phrasing = drawing.number + (0 if step is None else step + number)
            asked = self.ids(drawing.question(kind, phrasing))
            answered = [*self.ids(f" {answer}"), self._mark_ids[-1]]
            whole = [*asked, *self._after, *answered]
            unlearned = len(asked) + len(self._after) - 1
            packed.ids.extend(whole[:-1])
            packed.positions.extend(range(size, size + len(whole) - 1))
            packed.blocks.extend([number] * (len(whole) - 1))
            packed.labels.extend([NO_LABEL] * unlearned + answered)
        return packed

    def decode(self, ids: Tensor, rows: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
        """Compute the decoder's last hidden states.

        Args:
            ids: tokens ``[pictures, longest]``.
            rows: rows of the pictures, ``[pictures, ROWS, hidden]``.
            positions: positions of the tokens in their prompts, ``[pictures, longest]``.
            blocks: 0 for the picture's part, then the number of the question; -1 after the end.

        Returns:
            ``[pictures, longest, hidden]``, bf16.
        """
        embeds = self._table[ids].float()
        for place, mark in enumerate(self._mark_ids):
            embeds = torch.where((ids == mark)[..., None], self.sight.marks[place], embeds)
        at_image = ids == self.tokenizer.token_to_id(IMAGE)
        embeds = embeds.masked_scatter(at_image[..., None], rows)
        same = blocks[:, :, None] == blocks[:, None, :]
        seen = (same | (blocks[:, None, :] == 0)) & torch.ones_like(same[0]).tril()
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e9)
        states: Tensor = self._text(
            inputs_embeds=embeds.to(torch.bfloat16), attention_mask=mask[:, None],
            position_ids=positions, use_cache=False,
        ).last_hidden_state  # fmt: skip
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits ``[n, vocabulary]`` of hidden states ``[n, hidden]``."""
        logits = (states @ self._table.T).float()
        marks = (states @ self.sight.marks.to(torch.bfloat16).T).float()
        return logits.index_copy(1, torch.tensor(self._mark_ids), marks)

    def write(self, output: Path) -> None:
        """Write the checkpoint in SmolVLM's layout."""
        table = self._table.data.clone()
        table[self._mark_ids] = self.sight.marks.data.to(table.dtype)
        self._text.embed_tokens.weight.data.copy_(table)
        model = self.model.to(torch.bfloat16)
        model.tie_weights()
        output.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output)
        self.sight.float()
        write_texts(output, self.tokenizer)


@dataclass(frozen=True)
class Packed:
    """Tokens of a picture and its questions, for `Training.decode`."""

    ids: list[int]
    positions: list[int]
    blocks: list[int]
    labels: list[int]


def pace(step: int, steps: int) -> float:
    """Return the learning rate over its highest: up over 50 steps, then down to nothing."""
    return min(1.0, (step + 1) / 50) * (1.0 - step / steps)


def pixels_of(drawings: Sequence[Drawing]) -> Tensor:
    """Return the pixels that transformers' image processor makes: ``[n, 3, edge, edge]``."""
    edge = (TILE_PX, TILE_PX)
    tiles = [np.asarray(d.image.resize(edge, Image.Resampling.LANCZOS)) for d in drawings]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def labels_of(drawing: Drawing) -> list[int]:
    """Return the class of `LABELS` that each row shows, or `NO_LABEL`."""
    facts = drawing.facts
    words = {
        "colour": facts["colour"],
        "what": facts.get("shape", "digit"),
        "number": facts["digit"] if "digit" in facts else facts["count"],
        "place": facts.get("place", ""),
    }
    return [
        list(answers).index(words[name]) if words[name] else NO_LABEL for name, answers in LABELS
    ]


def patch_labels_of(drawing: Drawing) -> NDArray[np.int64]:
    """Return which of `PATCH_LABELS` each patch of a picture is, ``[2, patches]``."""
    side = TILE_PX // PATCH_PX
    third = (np.arange(side) * 2 + 1) * 3 // (2 * side)
    place = third[:, None] * 3 + third[None]
    is_drawn = np.isin(place, drawing.places).ravel()
    what = drawing.facts["digit"] if "digit" in drawing.facts else drawing.facts["shape"]
    return np.stack(
        [
            np.where(is_drawn, list(labels).index(word), len(labels))
            for labels, word in zip(PATCH_LABELS, (drawing.facts["colour"], what), strict=True)
        ]
    )


def row_scores(rows: Tensor, classes: Tensor) -> Tensor:
    """Compute logits ``[n, classes]`` of rows ``[n, hidden]``: the nearer a class, the higher.

    It is not a plain product: "top left" is between "top" and "left", where no product is highest.
    """
    spread = (classes - classes.mean(0)).pow(2).sum(1).mean()
    return (rows[:, None] - classes).pow(2).sum(-1) * (-2.5 / spread)


if __name__ == "__main__":
    run_main(main)
