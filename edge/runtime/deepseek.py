"""Defines `DeepSeekModel`: the runtime under the names that DeepSeek-R1 tutorials use."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from edge.bundle.engine_file import find_engines
from edge.bundle.library import roots
from edge.bundle.model_names import bundle_name, hub_id, nearest_model
from edge.bundle.quant_rules import RULES, fold_quant
from edge.engine_config import BackendName
from edge.errors import BundleError, ConfigError, RequestError
from edge.text.reasoning import THINK_END, THINK_START

from .llm import LLM, Prompt
from .sampling_params import SamplingParams

_DEFAULT_LENGTH = 200
_PARAMETERS = tuple(item.name for item in fields(SamplingParams) if item.name != "max_tokens")
# Options of code for transformers or for an engine, and what to use here instead.
_INSTEAD = {
    "num_return_sequences": "use model.llm.submit(messages, n=...) for several answers",
}
_DEVICES = ("auto", "cpu", "cuda", "gpu", "cuda:0")
_log = logging.getLogger(__name__)


class DeepSeekModel:
    """A DeepSeek-R1 distill by version and precision.

    The bundle is looked up where bundles are kept (`edge.bundle.library.roots`), as e.g.
    ``deepseek-r1-distill-qwen-1.5b-int8``.

    Args:
        version: ``1.5B``, ``7B`` or ``8B`` (the Llama distill), or another name of
            `edge.bundle.model_names.hub_id`.
        precision: a ``--quant`` of the export, in any case.
        device: ``auto``, ``cpu``, or ``cuda`` (also ``gpu``, ``cuda:0``), which is a TensorRT
            engine of the bundle, else ONNX Runtime on the GPU.

    Raises:
        ConfigError: the version, precision or device is unknown.
        BundleError: there is no such bundle; the message has the command that makes it.
    """

    def __init__(
        self, version: str = "1.5B", precision: str = "int8", device: str = "auto"
    ) -> None:
        source = hub_id(version if "r1" in version.lower() else f"deepseek-r1:{version}")
        if source is None:
            raise ConfigError(f"unknown version {version!r}; {nearest_model(version)}")
        quant, place = fold_quant(precision), device.lower()
        if quant not in RULES:
            raise ConfigError(f"unknown precision {precision!r}; use one of {', '.join(RULES)}")
        if place not in _DEVICES:
            raise ConfigError(
                f"unknown device {device!r}; use one of {', '.join(_DEVICES)}; of several GPUs "
                "CUDA_VISIBLE_DEVICES chooses"
            )
        name = bundle_name(source, quant)
        candidates = [root / name for root in roots()]
        found = next((path for path in candidates if path.is_dir()), None)
        if found is None:
            raise BundleError(
                f"no bundle at {' or '.join(map(str, candidates))}; make it with: "
                f"edge-llm export {source} -o {candidates[0]} --quant {quant}"
            )
        self.bundle = found
        backend: BackendName = "auto"
        if place == "cpu":
            backend = "ort-cpu"
        elif place != "auto":
            backend = "tensorrt" if find_engines(self.bundle) else "ort-cuda"
        self.llm = LLM(self.bundle, backend=backend)
        self._warned = False

    def generate(
        self,
        context: Prompt,
        max_length: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        **params: Any,
    ) -> str:
        """Generate the answer to a text or a list of messages.

        A text is one user message. The reasoning is part of the returned text, between
        ``<think>`` and ``</think>``, as the model writes it; an answer that ends inside the
        reasoning has no ``</think>``.

        Args:
            context: a text, or chat messages.
            max_length: tokens of prompt and answer together, as in ``transformers``; 200 unless
                ``max_new_tokens`` is given.
            temperature: None takes the model's own generation config.
            top_k: None takes the model's own generation config.
            max_new_tokens: tokens of the answer, in place of ``max_length``.
            do_sample: false takes the likeliest token each time, true draws it; None follows
                ``temperature``.
            **params: any other field of `SamplingParams` but ``max_tokens``.

        Raises:
            RequestError: a parameter is unknown or wrong, two contradict each other, or the prompt
                leaves no room in ``max_length``.
        """
        for name in params:
            if name not in _PARAMETERS:
                raise _unknown_option(name)
        if max_new_tokens is not None and max_length is not None:
            raise RequestError(
                "give max_length, which counts prompt and answer together, or max_new_tokens, "
                "which counts the answer, not both"
            )
        messages: Prompt = (
            [{"role": "user", "content": context}] if isinstance(context, str) else context
        )
        length = _DEFAULT_LENGTH if max_length is None else max_length
        room = self._room(messages, length) if max_new_tokens is None else max_new_tokens
        result = self.llm.generate(
            messages,
            SamplingParams(
                temperature=self._temperature(temperature, do_sample),
                top_k=top_k,
                max_tokens=room,
                **params,
            ),
        )
        cut = result.finish_reason == "length" and len(result.tokens) >= room
        if cut and max_new_tokens is None and not self._warned:
            self._warned = True
            _log.warning(
                "max_length=%d cut the answer off: it counts prompt and answer together; give "
                "max_new_tokens=2000 (said once)",
                length,
            )
        if not result.reasoning:
            return result.text
        if THINK_END not in self.llm.tokenizer.decode(token.id for token in result.tokens):
            return f"{THINK_START}\n{result.reasoning}"  # it ended inside the reasoning
        return f"{THINK_START}\n{result.reasoning}\n{THINK_END}\n\n{result.text}"

    def _room(self, messages: Prompt, max_length: int) -> int:
        """Count the tokens that a prompt leaves of ``max_length``."""
        room = max_length - len(self.llm.encode(messages))
        if room < 1:
            raise RequestError(
                f"the prompt has {max_length - room} tokens, max_length is {max_length}; "
                "raise max_length: it counts prompt and answer together"
            )
        return room

    def _temperature(self, temperature: float | None, do_sample: bool | None) -> float | None:
        """Return the temperature that both options mean together."""
        if do_sample is None:
            return temperature
        if not isinstance(do_sample, bool):
            raise RequestError(f"do_sample must be True or False, not {do_sample!r}")
        if temperature is not None and (temperature > 0) != do_sample:
            raise RequestError(
                f"do_sample={do_sample} contradicts temperature={temperature}: 0 takes the "
                "likeliest token, more draws it; drop one of the two"
            )
        if not do_sample:
            return 0.0
        if temperature is None and self.llm.manifest.sampling.temperature == 0:
            return 1.0  # the default of transformers
        return temperature

    def close(self) -> None:
        """Free the engine."""
        self.llm.close()

    def __enter__(self) -> DeepSeekModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _unknown_option(name: str) -> RequestError:
    from edge.other_names import instead_of

    known = ("max_new_tokens", "max_length", "do_sample", *_PARAMETERS)
    instead = _INSTEAD.get(name) or instead_of(name, known, "see edge.SamplingParams for all")
    return RequestError(f"generate has no option {name}: {instead}")
