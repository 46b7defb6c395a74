"""Unrolls an EAGLE-3 head in torch over several guesses; `lab.training.train_eagle3` trains it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge.bundle.rope import inverse_frequencies
from edge.model.spec import ModelSpec
from export.sources.eagle3 import head_linears, head_norms

if TYPE_CHECKING:
    from .lessons import Lesson


class HeadModule(nn.Module):  # type: ignore[misc]
    """The head's weights by their published names, and its losses.

    It begins as a short cut through the model: the hidden state is the highest of the three, the
    layer adds little, and norm and lm_head are the model's own if these are known.

    Args:
        spec: the head's numbers.
        table: the model's token table, float16 ``[vocab, hidden]``; it is not trained.
        vocabulary: ids of the tokens that it guesses.
        final_norm: weight of the model's final norm.
        is_tied: whether ``table`` is the model's lm_head, too.
    """

    def __init__(
        self,
        spec: ModelSpec,
        table: NDArray[np.float16],
        vocabulary: NDArray[np.int64],
        final_norm: NDArray[np.float32],
        is_tied: bool,
    ) -> None:
        super().__init__()
        self.spec = spec
        hidden = spec.hidden_size
        weights: dict[str, Tensor] = {}
        for layer in head_linears(spec):
            for name, rows in zip(layer.weights, layer.rows, strict=True):
                weights[name] = torch.randn(rows, layer.shape[0]) * layer.shape[0] ** -0.5
        for name in ("midlayer.self_attn.o_proj.weight", "midlayer.mlp.down_proj.weight"):
            weights[name] *= 0.1
        for norm in head_norms(spec):
            weights[norm.source] = torch.ones(norm.size)
        weights["norm.weight"] = torch.from_numpy(final_norm.copy())
        if is_tied:
            weights["lm_head.weight"] = torch.from_numpy(table[vocabulary].astype(np.float32))
        fused = torch.randn(hidden, 3 * hidden) * 0.1 * (3 * hidden) ** -0.5
        fused[:, 2 * hidden :] += torch.eye(hidden)
        weights["fc.weight"] = fused
        self.names = {name: name.replace(".", "__") for name in weights}
        for name, weight in weights.items():
            self.register_parameter(self.names[name], nn.Parameter(weight))
        self._table = torch.from_numpy(table)
        numbers = np.full(len(table), -1, np.int64)
        numbers[vocabulary] = np.arange(len(vocabulary))
        self._numbers = torch.from_numpy(numbers)
        frequencies = inverse_frequencies(spec.ropes[0], spec.attentions()[0].dim)
        self._frequencies = torch.from_numpy(np.asarray(frequencies, np.float32))

    def trained(self) -> list[nn.Parameter]:
        """All weights."""
        return list(self.parameters())

    def published(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights by their published names."""
        return {name: self._weight(name).detach().numpy() for name in self.names}

    def losses(
        self, lessons: Sequence[Lesson], ahead: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Guess ``ahead`` tokens after each token of some texts.

        Returns:
            For each guess in a row: the mean cross entropy against the model's distribution,
            whether the guess is right ``[texts, tokens]``, and which places count.
        """
        longest = max(len(lesson.ids) for lesson in lessons)

        def padded(values: Any) -> Tensor:
            rows = [np.asarray(value) for value in values]
            result = np.zeros((len(rows), longest, *rows[0].shape[1:]), rows[0].dtype)
            for target, row in zip(result, rows, strict=True):
                target[: len(row)] = row
            return torch.from_numpy(result)

        ids = padded(lesson.ids for lesson in lessons)
        best = self._numbers[padded(lesson.best for lesson in lessons)]
        chances = padded(lesson.probabilities for lesson in lessons) * (best >= 0)
        chances = chances / chances.sum(-1, keepdim=True).clamp(min=1e-6)
        lengths = torch.tensor([len(lesson.ids) for lesson in lessons])[:, None]
        places = torch.arange(longest)[None]
        embeds = self._table[ids].float()
        states = padded(lesson.states for lesson in lessons).float()
        losses, hits, valid = [], [], []
        for k, logits in enumerate(self._unroll(embeds, states, ahead)):
            # The row of token t has the next token beside it, and guesses the one after that.
            wanted, weights = _shift(best, k + 1), _shift(chances, k + 1)
            known = wanted[..., 0] >= 0
            inside = places + k + 1 < lengths
            scores = torch.log_softmax(logits, -1).gather(-1, wanted.clamp(min=0))
            counts = (known & inside).float()
            losses.append(-((scores * weights).sum(-1) * counts).sum() / counts.sum().clamp(min=1))
            hits.append(known & (logits.argmax(-1) == wanted[..., 0]))
            valid.append(inside)
        return losses, hits, valid

    def _unroll(self, embeds: Tensor, states: Tensor, ahead: int) -> Iterator[Tensor]:
        """Yield the logits of each guess in a row, ``[texts, tokens, draft vocab]``.

        At guess ``k`` a row attends to the first pass's rows up to its own, and to its own later
        states. A head that drafts has the same rows.
        """
        hidden = states @ self._weight("fc.weight").T
        count = embeds.shape[1]
        causal = torch.ones(count, count).tril().bool()
        past: list[tuple[Tensor, Tensor]] = []
        for k in range(ahead):
            embed = self._norm(_shift(embeds, k + 1), "midlayer.input_layernorm")
            joined = torch.cat([embed, self._norm(hidden, "midlayer.hidden_norm")], -1)
            hidden = hidden + self._attend(joined, k, past, causal)
            h = self._norm(hidden, "midlayer.post_attention_layernorm")
            gate = torch.nn.functional.silu(h @ self._weight("midlayer.mlp.gate_proj.weight").T)
            wide = gate * (h @ self._weight("midlayer.mlp.up_proj.weight").T)
            hidden = hidden + wide @ self._weight("midlayer.mlp.down_proj.weight").T
            yield self._norm(hidden, "norm") @ self._weight("lm_head.weight").T

    def _attend(
        self, joined: Tensor, k: int, past: list[tuple[Tensor, Tensor]], causal: Tensor
    ) -> Tensor:
        spec, (batch, count, _) = self.spec, joined.shape
        parts = []
        for part, heads in (
            ("q", spec.attentions()[0].heads),
            ("k", spec.attentions()[0].kv_heads),
            ("v", spec.attentions()[0].kv_heads),
        ):
            projected = joined @ self._weight(f"midlayer.self_attn.{part}_proj.weight").T
            parts.append(
                projected.view(batch, count, heads, spec.attentions()[0].dim).transpose(1, 2)
            )
        shared = spec.attentions()[0].heads // spec.attentions()[0].kv_heads
        query = self._rotate(parts[0], k)
        keys = self._rotate(parts[1], k).repeat_interleave(shared, 1)
        values = parts[2].repeat_interleave(shared, 1)
        past.append((keys, values))
        scale = spec.attentions()[0].dim ** -0.5
        first, rest = past[0], past[1:]
        scores = (query @ first[0].transpose(2, 3) * scale).masked_fill(~causal, -1e9)
        own = [(query * each[0]).sum(-1, keepdim=True) * scale for each in rest]
        weights = torch.cat([scores, *own], -1).softmax(-1)
        mixed = weights[..., :count] @ first[1]
        for i, each in enumerate(rest):
            mixed = mixed + weights[..., count + i, None] * each[1]
        merged = mixed.transpose(1, 2).reshape(
            batch, count, spec.attentions()[0].heads * spec.attentions()[0].dim
        )
        return merged @ self._weight("midlayer.self_attn.o_proj.weight").T

    def _rotate(self, x: Tensor, k: int) -> Tensor:
        """Rotate ``[texts, heads, tokens, dim]`` by the rows' positions at guess ``k``."""
        angles = (torch.arange(x.shape[2]) + k)[:, None] * self._frequencies
        cos, sin = (f(angles) * self.spec.ropes[0].attention_factor for f in (torch.cos, torch.sin))
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        root = torch.rsqrt((x * x).mean(-1, keepdim=True) + self.spec.rms_norm_eps)
        return x * root * self._weight(f"{name}.weight")

    def _weight(self, name: str) -> Tensor:
        found: Tensor = getattr(self, self.names[name])
        return found


def _shift(x: Tensor, places: int) -> Tensor:
    """Move tokens to the front, and fill with zeros."""
    return torch.cat([x[:, places:], torch.zeros_like(x[:, :places])], 1)
