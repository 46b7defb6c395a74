"""Plants damages in a bundle, and counts how often the gate of a roll-out rejects them.

The judge is ``edge-llm bundle rollout``'s with its defaults; it stops once the text has rejected,
as it does there. Every damage has a seed, which decides where it is and how large: seed 0 does
most, and four seeds later it is half as much. Only ``noise_in_a_third`` is always as large as its
name says. A bundle that the text rejects needs no golden set, so only good bundles are asked one.

A damage counts if a text of a third kind, which the gate never reads, has at least 10 % more
perplexity. One that doubles the perplexity of a text of the gate's counts at once. Good bundles are
tried on the texts and on random halves of the golden set, as greedy answers are the same each time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from edge.engine_config import EngineConfig
from edge_fleet.rollout.judge import Candidate, Gate, Judge, Measure, WorseError
from edge_lab.measure.defaults import DATA, GATE_TEXTS
from edge_make.progress import silent
from lab.bundles import quickstart_bundle
from tests.makers.manifests import replace_file

WEIGHTS = "decoder.onnx.data"
OTHER = DATA / "prose.txt"
_SURELY = 2.0  # times the perplexity of one text: rejected and counted without the others
Bytes = NDArray[np.uint8]
Damage = Callable[[Bytes, np.random.Generator, float], None]
Figures = dict[str, tuple[float, int]]
_MB = 1 << 20


def _spot(data: Bytes, rng: np.random.Generator, share: float) -> slice:
    count = int(len(data) * share)
    at = int(rng.integers(0, len(data) - count))
    return slice(at, at + count)


def noise_in_a_third(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """A third of the bytes, anywhere, XORed with noise: ``bad1``."""
    del much
    chosen = rng.random(len(data)) < 1 / 3
    data[chosen] ^= rng.integers(1, 256, int(chosen.sum()), np.uint8)


def noise_in_a_stretch(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """Up to a thirtieth of the file, in one piece, is noise."""
    spot = _spot(data, rng, much / 30)
    data[spot] = rng.integers(0, 256, spot.stop - spot.start, np.uint8)


def a_hole(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """Up to a twentieth of the file, in one piece, is zeros."""
    data[_spot(data, rng, much / 20)] = 0


def moved_by_a_byte(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """Up to a twentieth of the file is one byte too late."""
    spot = _spot(data, rng, much / 20)
    data[spot] = np.roll(data[spot], 1)


def two_pieces_exchanged(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """Two pieces of up to 4 MB each have changed places."""
    one, other = _two_pieces(data, rng, much)
    data[one], data[other] = data[other].copy(), data[one].copy()


def a_piece_twice(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """A piece of up to 4 MB is also in the place of another one."""
    one, other = _two_pieces(data, rng, much)
    data[one] = data[other]


def _two_pieces(data: Bytes, rng: np.random.Generator, much: float) -> list[slice]:
    size = int(4 * _MB * much) // 64 * 64
    chosen = rng.choice(len(data) // (4 * _MB), 2, replace=False)
    return [slice(int(at) * 4 * _MB, int(at) * 4 * _MB + size) for at in chosen]


def flipped_signs(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """The highest bit of up to 1 % of the bytes is flipped."""
    data[rng.random(len(data)) < 0.01 * much] ^= 0x80


def lost_low_bits(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """Up to a fifth of the file, in one piece, has lost the low half of each byte."""
    data[_spot(data, rng, much / 5)] &= 0xF0


def stuck_line(data: Bytes, rng: np.random.Generator, much: float) -> None:
    """Bit 6 of every 64th byte, or of fewer, reads as one."""
    data[int(rng.integers(0, 64)) :: int(64 / much)] |= 0x40


DAMAGES: dict[str, Damage] = {
    each.__name__: each
    for each in (
        noise_in_a_third,
        noise_in_a_stretch,
        a_hole,
        moved_by_a_byte,
        two_pieces_exchanged,
        a_piece_twice,
        flipped_signs,
        lost_low_bits,
        stuck_line,
    )
}
_ENGINE = EngineConfig(backend="ort-cpu", num_slots=1, kv_capacity=1024)


class Bench:
    """Measures bundles, and keeps each figure in a file at once.

    Args:
        bundle: the good bundle, with which others are compared.
        output: JSON of all figures; those in it are not measured again.
    """

    def __init__(self, bundle: Path, output: Path) -> None:
        self._bundle = bundle
        self._output = output
        self.found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
        self._gate = Judge(Gate(golden=None), silent)
        self._texts = {
            path.name: Judge(Gate((path,), golden=None), silent) for path in (*GATE_TEXTS, OTHER)
        }

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the figure of a name, and measure it first if need be."""
        if name not in self.found:
            self.found[name] = work()
            part = self._output.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1) + "\n")
            part.replace(self._output)
            print(f"{name}: {json.dumps(self.found[name])}", flush=True)
        return self.found[name]

    def read(self, bundle: Path, old: Figures | None = None) -> Figures:
        """Return nats and tokens of each text, or only of the first if that is enough."""
        who = Candidate(bundle, _ENGINE, None)
        found: Figures = {}
        for name, judge in self._texts.items():
            measure = judge.read(None, who)
            found[name] = (min(measure.nats[0], 1e9), measure.tokens[0])
            if old is not None and _ratios(found, old)[name] >= _SURELY:
                break
        return found

    def damaged(self, name: str, seed: int) -> dict[str, Any]:
        """Judge the bundle with a damage."""
        old = self.once("good", lambda: self.read(self._bundle))
        with tempfile.TemporaryDirectory(dir=self._bundle.parent) as folder:
            bad = Path(folder) / "bundle"
            shutil.copytree(self._bundle, bad, copy_function=os.link)
            data = np.fromfile(bad / WEIGHTS, np.uint8)
            DAMAGES[name](data, np.random.default_rng(seed), 2 ** (-seed / 4))
            (bad / WEIGHTS).unlink()
            (bad / WEIGHTS).touch()
            manifest = (bad / "manifest.json").read_bytes()
            (bad / "manifest.json").unlink()
            (bad / "manifest.json").write_bytes(manifest)
            replace_file(bad, WEIGHTS, data.tobytes())
            new = self.read(bad, old)
        ratios = _ratios(new, old)
        return {"rejected": self._rejects(new, old), "ratio": ratios}

    def _rejects(self, new: Figures, old: Figures) -> bool:
        names = [path.name for path in GATE_TEXTS]
        both = [[figures.get(name, old[name]) for name in names] for figures in (new, old)]
        measures = [
            Measure("", "", tuple(nats for nats, _ in each), tuple(count for _, count in each), 1.0)
            for each in both
        ]
        try:
            self._gate.compare_text(*measures)
        except WorseError:
            return True
        return False


def _ratios(new: Figures, old: Figures) -> dict[str, float]:
    return {
        name: math.exp(min((nats - old[name][0]) / old[name][1], 700.0))
        for name, (nats, _) in new.items()
    }


def _worst(ratio: dict[str, float]) -> float:
    return max(ratio[path.name] for path in GATE_TEXTS if path.name in ratio)


def _counts(ratio: dict[str, float]) -> bool:
    return _worst(ratio) >= _SURELY or ratio[OTHER.name] >= 1.1


def summary(found: dict[str, Any], tries: int) -> list[str]:
    """Write a line per damage: how many of those that count were rejected, and the least ratio."""
    lines = []
    for name in DAMAGES:
        runs = [found[key] for seed in range(tries) if (key := f"{name} {seed}") in found]
        count = [run for run in runs if _counts(run["ratio"])]
        if runs:
            least = min((_worst(run["ratio"]) for run in count), default=math.nan)
            caught = sum(run["rejected"] for run in count)
            lines.append(
                f"{name}: rejected {caught} of {len(count)} that "
                f"raise the perplexity of another text by 10 %, the least {least:.3f} times; "
                f"{len(runs) - len(count)} raise it less"
            )
    return lines


def good(bench: Bench, old: Path, new: Path, tries: int) -> int:
    """Judge a good bundle on the text and random halves of the golden set; count how it passes."""
    judge = Judge(Gate(), silent)

    def ask(bundle: Path) -> Measure:
        def work() -> Any:
            who = Candidate(bundle, _ENGINE, None)
            return msgspec.to_builtins(judge.ask(judge.read(None, who), who))

        return msgspec.convert(bench.once(f"asked {bundle.name}", work), Measure)

    def half(measure: Measure, seed: int) -> Measure:
        run = measure.golden
        assert run is not None
        chosen = sorted(random.Random(seed).sample(range(len(run.items)), len(run.items) // 2))
        items = tuple(run.items[at] for at in chosen)
        return replace(measure, golden=replace(run, items=items))

    before, after, passed = ask(old), ask(new), 0
    for seed in range(tries):
        try:
            judge.compare(half(after, seed), half(before, seed))
            passed += 1
        except WorseError as error:
            print(f"{new.name}, half {seed}: {error}")
    return passed


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser("python3 -m lab planted-bundles", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: quickstart's")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--good", type=Path, nargs="*", default=[])
    parser.add_argument("-o", "--output", type=Path, default=Path("planted.json"))
    options = parser.parse_args()
    bundle = options.bundle or quickstart_bundle()
    bench = Bench(bundle, options.output)
    # The weakest and the strongest first, so that a part says something.
    for seed in sorted(range(options.tries), key=lambda seed: min(seed, 19 - seed)):
        for name in DAMAGES:
            bench.once(f"{name} {seed}", partial(bench.damaged, name, seed))
    print("\n".join(summary(bench.found, options.tries)))
    for each in (bundle, *options.good):
        passed = good(bench, bundle, each, options.tries)
        print(f"{each.name}: passes in {passed} of {options.tries}")


if __name__ == "__main__":
    main()
