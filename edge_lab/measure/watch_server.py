"""Asks a running server for its counters and for answers to a golden set.

It asks only the server that the operator named: it uses no proxy and follows no redirect.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from edge.errors import BackendError, ConfigError
from edge.files import MALFORMED, exists, read_file
from edge_make.key_file import read_key_file
from edge_make.progress import Progress, silent

from .drift import WATCH_USER, Counts, check_counts, decode_counts
from .evaluate import EvalText
from .watch import ModelAnswer, cut_text

TIMEOUT_S = 600.0
_MAX_BYTES = 16 << 20
_TIMING = re.compile(r"(\w+);dur=(\d+(?:\.\d+)?)")


class TrafficState(msgspec.Struct, forbid_unknown_fields=True):
    """State that a watch keeps of a server's counters between two runs.

    Attributes:
        seen: the counters when the last run started, so without that run's requests.
        pending: requests of earlier windows that were too few to be compared.
    """

    seen: Counts = msgspec.field(default_factory=Counts)
    pending: Counts = msgspec.field(default_factory=Counts)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the key belongs to the server that was named."""


class ServerAnswerer:
    """A running server.

    Args:
        url: where the server is, e.g. ``http://127.0.0.1:8000``.
        api_key: sent as a bearer token; None sends none.
        model: the model to ask; None is the server's default.
        thinking: let it reason before it answers.
        timeout_s: how long one answer may take.
        user: the name that requests give for their user.

    Attributes:
        model: the model to ask, as above; it may be set later.

    Raises:
        ConfigError: the URL is not that of a server.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        thinking: bool = False,
        timeout_s: float = TIMEOUT_S,
        user: str = WATCH_USER,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a server; write http://127.0.0.1:8000")
        self._url = f"{parts.scheme}://{parts.netloc}"
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self.model = model
        self._user = user
        self._thinking = thinking
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def answer(self, prompt: str, max_tokens: int) -> ModelAnswer:
        """Answer one message of a user, greedily.

        Raises:
            ConfigError: the server refuses the request or the key.
            BackendError: it cannot be reached, or its answer cannot be read.
        """
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "enable_thinking": self._thinking,
        }
        body = self._with_model(body | {"user": self._user})
        found, timing = self._exchange("/v1/chat/completions", body)
        try:
            (choice,) = found["choices"]
            message = choice["message"]
            tokens = int(found["usage"]["completion_tokens"])
            return ModelAnswer(
                message["content"] or "",
                message.get("reasoning_content") or "",
                tokens,
                str(choice["finish_reason"]),
                _tpot_s(timing, tokens),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._other_form(error) from error

    def eval_text(self, path: Path, tokens: int) -> EvalText:
        """Cut the beginning of a text into windows of the model's tokens.

        Raises:
            ConfigError: it cannot be read, or the server refuses it.
            BackendError: the server cannot be reached, or its answer cannot be read.
        """
        # One token of every window's room is for the answer, which nobody reads.
        _, capacity = self.tokenize("")
        return cut_text(path, lambda text: self.tokenize(text)[0], capacity - 1, tokens)

    def perplexity(self, text: EvalText, progress: Progress = silent) -> float:
        """Compute the perplexity, teacher-forced, from the log-probabilities the server echoes.

        Args:
            text: windows of the model's tokens.
            progress: is called with the tokens scored (step ``score``).

        Raises:
            ConfigError: the server refuses a window.
            BackendError: it cannot be reached, or its answer cannot be read.
        """
        total, count = 0.0, 0
        progress("score", 0, text.num_scored, "tokens")
        for window in text.windows:
            body = {
                "prompt": window,
                "echo": True,
                "logprobs": 0,
                "max_tokens": 1,
                "temperature": 0,
                "user": self._user,
            }
            found = self._ask("/v1/completions", self._with_model(body))
            try:
                (choice,) = found["choices"]
                scores = choice["logprobs"]["token_logprobs"][1 : len(window)]
                total += sum(float(score) for score in scores)
            except (KeyError, TypeError, ValueError) as error:
                raise self._other_form(error) from error
            count += len(scores)
            progress("score", count, text.num_scored, "tokens")
        if count != text.num_scored:
            raise BackendError(
                f"{self._url} scored {count} of {text.num_scored} tokens; is it edge-llm serve?"
            )
        return math.exp(-total / count)

    def tokenize(self, text: str) -> tuple[list[int], int]:
        """Turn a text into token ids, and say how many tokens fit into the cache.

        Raises:
            ConfigError, BackendError: `answer` would raise the same.
        """
        found = self._ask("/tokenize", self._with_model({"prompt": text}))
        try:
            return [int(token) for token in found["tokens"]], int(found["max_model_len"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._other_form(error) from error

    def counts(self) -> Counts:
        """Return the counts of what clients asked for since the server started.

        Raises:
            ConfigError: the server refuses the key, or counts on another grid.
            BackendError: it cannot be reached.
        """
        return counts_of_stats(self.stats(), f"{self._url}/stats")

    def stats(self) -> Any:
        """Return the answer of ``/stats``.

        Raises:
            ConfigError: the server refuses the key.
            BackendError: it cannot be reached.
        """
        return self._ask("/stats")

    def _with_model(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self.model is None else body | {"model": self.model}

    def _other_form(self, error: Exception) -> BackendError:
        return BackendError(f"{self._url} sent an answer of another form: {error!r}")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._exchange(path, body)[0]

    def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[Any, str]:
        """Send a request; return the answer and its ``Server-Timing``."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                text, timing = response.read(_MAX_BYTES), response.headers["server-timing"] or ""
            return msgspec.json.decode(text), timing
        except urllib.error.HTTPError as error:
            message = error.read(_MAX_BYTES).decode("utf-8", "replace")[:300]
            refusal = ConfigError if error.code < 500 and error.code != 429 else BackendError
            raise refusal(
                f"{self._url}{path} answered {error.code}: {message or error.reason}"
            ) from error
        except (OSError, http.client.HTTPException, *MALFORMED) as error:
            raise BackendError(
                f"{self._url}{path} gave no answer: {error}; is the service running there?"
            ) from error


def _tpot_s(timing: str, tokens: int) -> float | None:
    """Read the seconds per token after the first from a ``Server-Timing`` in ms; None without."""
    found = dict(_TIMING.findall(timing))
    decode_ms = float(found.get("total", 0.0)) - float(found.get("ttft", math.inf))
    return decode_ms / 1e3 / (tokens - 1) if tokens > 1 and decode_ms > 0 else None


def counts_of_stats(stats: Any, where: str) -> Counts:
    """Read the counters of what clients asked for from an answer of ``/stats``.

    Raises:
        ConfigError: it has none.
    """
    asked = stats.get("asked") if isinstance(stats, dict) else None
    if asked is None:
        raise ConfigError(f"{where} has no counters of requests; is it /stats of edge-llm serve?")
    return decode_counts(msgspec.json.encode(asked), where)


def read_stats_file(path: Path) -> Counts:
    """Read the counters from a saved answer of ``/stats``.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    try:
        stats = msgspec.json.decode(read_file(path, _MAX_BYTES))
    except (OSError, *MALFORMED) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return counts_of_stats(stats, str(path))


def read_state(path: Path) -> TrafficState:
    """Read the state that the last run left; a fresh one if there was none.

    Raises:
        ConfigError: the file cannot be read, or is not a state.
    """
    if not exists(path):
        return TrafficState()
    try:
        state = msgspec.json.decode(read_file(path, _MAX_BYTES), type=TrafficState)
    except (OSError, *MALFORMED) as error:
        raise ConfigError(f"{path} is no state of a watch: {error}; remove it") from error
    for counts in (state.seen, state.pending):
        check_counts(counts, str(path))
    return state


def read_api_key(path: Path) -> str:
    """Read the first key in a key file that is not given only as its hash.

    Raises:
        ConfigError: `read_key_file` refuses the file, or it has only hashes.
    """
    keys = [entry.key for entry in read_key_file(path) if entry.key is not None]
    if not keys:
        raise ConfigError(
            f"{path} has only hashes of API keys, and the watch has to send one; add a key for it "
            "as NAME:KEY"
        )
    return keys[0]
