"""Measure edge-llm beside its peers: one machine, one model, in turns; prints Markdown tables.

usage: python3 -m lab peers [--model qwen2.5-coder-1.5b] [--bundle 'LABEL=BUNDLE OPTIONS' ...]
                     [--peers llama.cpp]
                     [--parts generate,serving] [--rounds 3] [--work .peers]

Every engine reads the same GGUF file: edge-llm exports a bundle from it (default options),
llama.cpp requantizes it to Q4_0, OpenVINO GenAI reads that. Only figures of one run compare.

- generate: each round starts each engine once, by its own instrument (`edge-llm bench`,
  `llama-bench`, OpenVINO's metrics): prefill of 512 tokens, and 128 new tokens after 128. Figures
  are medians over rounds, ratios medians of the rounds' ratios.
- serving: `edge-llm serve` and `llama-server` at once, asked in turns by 1 to 16 clients, which
  stream greedy answers of a fixed length: prompts of 60 tokens, then of 16 to 2,000.
- drafts, only on request: both servers with and without a smaller model that drafts, quantized like
  the larger one. Each runs with its own defaults. They are asked in turns for greedy answers to one
  question each for code, chat and prose.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from edge import __version__
from edge_lab.measure.draft_bench import TEXTS
from lab.bench.serving import PROSE
from tools.command import say
from tools.models.real_models import MODELS, fetch
from tools.models.smollm2 import smollm2_gguf

LLAMA_CPP_PYTHON = "0.3.36"
OPENVINO_GENAI = "2026.4.1.0"
ORT_GENAI = ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.24.0")
PEERS = ("llama.cpp", "openvino", "genai")
PREFILL, CONTEXT, NEW_TOKENS = 512, 128, 128
CAPACITY = 2304  # rows per slot on both sides: the longest prompt and its answer


class Answer(NamedTuple):
    """A client's view of one streamed answer, in seconds since it asked."""

    ttft_s: float
    itl_s: list[float]
    tokens: int
    prompt_tokens: int
    drafted: int  # counted by llama-server only; edge-llm counts in its metrics
    right: int


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    gguf = model_file(options)
    given = [each.split("=", 1) for each in options.bundle]
    bundles = {label: shlex.split(words) for label, words in given} or {
        "edge-llm": [str(default_bundle(options, options.model, gguf))]
    }
    llama = build_llama_cpp(options.work) if "llama.cpp" in options.peers else None
    q4_0 = quantize(options, options.model, gguf, build_llama_cpp(options.work))
    result: dict[str, Any] = {"machine": machine(options.peers), "model": options.model}
    if "generate" in options.parts:
        engines = {label: edge_bench(words, options.threads) for label, words in bundles.items()}
        if llama is not None:
            engines["llama.cpp Q4_0"] = llama_bench(llama, q4_0, options.threads)
        if "openvino" in options.peers:
            python = openvino(options.work)
            engines["OpenVINO GenAI Q4_0"] = openvino_bench(python, q4_0, options.threads)
        if "genai" in options.peers:
            python = genai_python(options.work)
            built = genai_model(options, python, gguf)
            engines["onnxruntime-genai int4"] = genai_bench(python, built, options.threads)
        result["generate"] = generate(engines, options.rounds)
    if "serving" in options.parts:
        tokenizer = Tokenizer.from_file(
            str(Path(next(iter(bundles.values()))[0]) / "tokenizer.json")
        )
        result["serving"] = serving(options, bundles, llama, q4_0, tokenizer)
    if "drafts" in options.parts:
        result["drafts"] = drafts(options, next(iter(bundles.values())), llama, q4_0)
    print(json.dumps(result), file=sys.stderr)
    print(tables(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python3 -m lab peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", choices=[*MODELS, "smollm2"])
    parser.add_argument(
        "--models", type=Path, default=Path(".models"), help="of scripts/real-models"
    )
    parser.add_argument("--bundle", action="append", default=[], metavar="'LABEL=BUNDLE OPTIONS'")
    parser.add_argument("--peers", default="llama.cpp", help=f"of {','.join(PEERS)}")
    parser.add_argument("--parts", default="generate,serving")
    parser.add_argument("--draft-model", default="qwen2.5-coder-0.5b", choices=[*MODELS])
    parser.add_argument("--draft-bundle", type=Path, help="default: made as --bundle's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,2,4,8,16")
    parser.add_argument("--prompt-tokens", default="60,16-2000", help="a length, or LOW-HIGH")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--serve-option", action="append", default=[], help="for edge-llm serve")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path(".peers"))
    options = parser.parse_args()
    options.peers, options.parts = options.peers.split(","), options.parts.split(",")
    for given, known in (
        (options.peers, PEERS),
        (options.parts, ("generate", "serving", "drafts")),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
    for each in options.bundle:
        if "=" not in each:
            parser.error(f"--bundle {each} is not LABEL=BUNDLE OPTIONS")
    return options


def machine(peers: Sequence[str]) -> dict[str, Any]:
    """Return the facts that a reader needs to place the figures."""
    genai = ORT_GENAI[0].partition("==")[2]
    versions = {"llama.cpp": LLAMA_CPP_PYTHON, "openvino": OPENVINO_GENAI, "genai": genai}
    info = Path("/proc/cpuinfo").read_text()
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in info.splitlines())
    }
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    wanted = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": fields.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in wanted if flag in flags],
        "versions": {
            "edge-llm": __version__,
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            **{f"{peer} (PyPI)": versions[peer] for peer in peers},
        },
        "load_average": round(os.getloadavg()[0], 2),
    }


# The measured models: made once, kept in --work.


def run(command: Sequence[object]) -> str:
    """Return a command's standard output; if it fails, end this script with its last words."""
    words = [str(word) for word in command]
    say(" ".join(words))
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {words[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def edge_llm(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "edge.cli", *arguments]


def model_file(options: argparse.Namespace) -> Path:
    return smollm2_gguf() if options.model == "smollm2" else fetch(options.model, options.models)


def default_bundle(options: argparse.Namespace, model: str, gguf: Path) -> Path:
    """Make the bundle of a user who asks for nothing but INT4."""
    bundle = Path(options.work) / f"{model}-int4"
    if not bundle.exists():
        run(edge_llm("export", gguf, "-o", bundle, "--quant", "int4"))
    return bundle


def build_llama_cpp(
    work: Path, programs: Sequence[str] = ("llama-server", "llama-bench", "llama-quantize")
) -> Path:
    """Build llama.cpp from llama-cpp-python's source package, for this very CPU.

    Programs that an earlier call did not ask for are added to the same build.
    """
    build = work / f"llama.cpp-{LLAMA_CPP_PYTHON}"
    if all((build / "bin" / name).exists() for name in programs):
        return build / "bin"
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            sys.exit(
                f"error: llama.cpp is compiled here, and {tool} is not on the path; on Debian and "
                "Ubuntu: apt-get install cmake g++"
            )
    package = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    run([*pip, "--dest", work, package])
    archive = work / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
    shutil.unpack_archive(archive, work, filter="data")
    source = work / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    parts = ("BUILD_UI", "USE_PREBUILT_UI", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP")
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"]
    flags += [f"-DLLAMA_{part}=OFF" for part in parts]
    run(["cmake", "-S", source, "-B", build, *flags])
    run(["cmake", "--build", build, "--parallel", os.cpu_count(), "--target", *programs])
    return build / "bin"


def quantize(options: argparse.Namespace, model: str, gguf: Path, llama: Path) -> Path:
    output = Path(options.work) / f"{model}-q4_0.gguf"
    if not output.exists():
        run([llama / "llama-quantize", "--allow-requantize", gguf, output, "Q4_0"])
    return output


def openvino(work: Path) -> Path:
    """Return the Python of OpenVINO's own environment."""
    python = work / "venv-openvino" / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", python.parents[1]])
        run([python, "-m", "pip", "install", "-q", f"openvino-genai=={OPENVINO_GENAI}", "numpy"])
    return python


def genai_python(work: Path) -> Path:
    """Return the Python of onnxruntime-genai's own environment, with its model builder's needs."""
    python = work / "venv-genai" / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", python.parents[1]])
        packages = [*ORT_GENAI, "onnx", "onnx_ir", "torch", "accelerate", "gguf", "numpy"]
        run([python, "-m", "pip", "install", "-q", *packages])
    return python


# By hand: transformers does not save what it has read from a GGUF file.
_FROM_GGUF = """
import json, sys, pathlib, torch, transformers
from safetensors.torch import save_file
gguf, output = map(pathlib.Path, sys.argv[1:])
read = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
model = transformers.AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float16)
tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
if model.config.tie_word_embeddings:
    del tensors["lm_head.weight"]
output.mkdir(exist_ok=True)
save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
model.generation_config.save_pretrained(output)
transformers.AutoTokenizer.from_pretrained(**read).save_pretrained(output)
config = model.config.to_dict() | {"architectures": [type(model).__name__]}
del config["quantization_config"]
(output / "config.json").write_text(json.dumps(config))
"""


def genai_model(options: argparse.Namespace, python: Path, gguf: Path) -> Path:
    """Make the model by onnxruntime-genai's own builder, INT4 with its own defaults."""
    output = Path(options.work) / f"{options.model}-genai-int4"
    if not (output / "genai_config.json").exists():
        floats = Path(options.work) / f"{options.model}-hf"
        if not (floats / "config.json").exists():
            run([python, "-c", _FROM_GGUF, gguf, floats])
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        run([*builder, "-m", floats, "-o", output, "-c", Path(options.work) / "genai-cache"])
    return output


# One stream.


class Speed(NamedTuple):
    """Tokens per second in one round."""

    prefill: float
    decode: float


def edge_bench(bundle: list[str], threads: int) -> Any:
    def once() -> Speed:
        found = []
        for prompt, new in ((PREFILL, 2), (CONTEXT, NEW_TOKENS)):
            command = edge_llm("bench", *bundle, "--backend", "ort-cpu", "--num-threads", threads)
            command += ["--prompt-tokens", prompt, "--output-tokens", new, "--repeats", 3, "--json"]
            found.append(json.loads(run(command)))
        return Speed(found[0]["prefill_tps"], found[1]["decode_tps"])

    return once


def llama_bench(llama: Path, model: Path, threads: int) -> Any:
    def once() -> Speed:
        command = [llama / "llama-bench", "-m", model, "-t", threads, "-r", 3, "-o", "json"]
        prefill = json.loads(run([*command, "-p", PREFILL, "-n", 0]))
        decode = json.loads(run([*command, "-p", 0, "-n", NEW_TOKENS, "-d", CONTEXT]))
        return Speed(median(prefill[0]["samples_ts"]), median(decode[0]["samples_ts"]))

    return once


_OPENVINO = """
import json, sys, numpy as np, openvino as ov, openvino_genai as og
from statistics import median
path, threads, prefill, context, new = sys.argv[1], *map(int, sys.argv[2:])
pipeline = og.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY")
def metrics(prompt, tokens, seed=0):  # a prompt that it has seen costs it nothing
    config = og.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
    config.apply_chat_template = False
    ids = np.random.default_rng((prompt, seed)).integers(300, 40000, (1, prompt))
    inputs = og.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    return pipeline.generate(inputs, config).perf_metrics
metrics(context, 4)
prefills = [prefill / metrics(prefill, 2, i).get_ttft().mean * 1e3 for i in range(3)]
decodes = [1e3 / metrics(context, new, i + 1).get_tpot().mean for i in range(3)]
print(json.dumps([median(prefills), median(decodes)]))
"""


def openvino_bench(python: Path, model: Path, threads: int) -> Any:
    def once() -> Speed:
        command = [python, "-c", _OPENVINO, model, threads, PREFILL, CONTEXT, NEW_TOKENS]
        return Speed(*json.loads(run(command).splitlines()[-1]))

    return once


_GENAI = """
import json, sys, time, numpy as np, onnxruntime_genai as og
from statistics import median
path, threads, prefill, context, new = sys.argv[1], *map(int, sys.argv[2:])
config = og.Config(path)
session = {"session_options": {"intra_op_num_threads": threads}}
config.overlay(json.dumps({"model": {"decoder": session}}))
model = og.Model(config)
def times(prompt, tokens):
    params = og.GeneratorParams(model)
    length = prompt + tokens
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    ids = np.random.default_rng(prompt).integers(300, 40000, prompt).astype(np.int32)
    seen = [time.perf_counter()]
    generator.append_tokens(ids)
    for _ in range(tokens):
        generator.generate_next_token()
        generator.get_next_tokens()
        seen.append(time.perf_counter())
    return seen
times(context, 4)
found = [times(prefill, 1) for _ in range(3)]
prefills = [prefill / (seen[1] - seen[0]) for seen in found]
found = [times(context, new) for _ in range(3)]
decodes = [(new - 1) / (seen[-1] - seen[1]) for seen in found]
print(json.dumps([median(prefills), median(decodes)]))
"""


def genai_bench(python: Path, model: Path, threads: int) -> Any:
    def once() -> Speed:
        command = [python, "-c", _GENAI, model, threads, PREFILL, CONTEXT, NEW_TOKENS]
        return Speed(*json.loads(run(command).splitlines()[-1]))

    return once


def generate(engines: dict[str, Any], rounds: int) -> dict[str, list[Speed]]:
    """Run each engine in turn, once a round; every other round goes backwards."""
    found: dict[str, list[Speed]] = {name: [] for name in engines}
    for index in range(rounds):
        names = list(engines)[:: 1 if index % 2 == 0 else -1]
        for name in names:
            found[name].append(engines[name]())
            say(f"round {index + 1}: {name}: {found[name][-1]}")
    return found


# Many streams.


@contextmanager
def server(command: Sequence[object], port: int, ready: str, log: Path) -> Iterator[int]:
    """Run a server until the end of the block, once its path ``ready`` answers 200."""
    say(" ".join(map(str, command)))
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 300
        while not _answers(port, ready):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def serving(
    options: argparse.Namespace,
    bundles: dict[str, list[str]],
    llama: Path | None,
    model: Path,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """Make a row for each kind of prompt, number of clients and server."""
    counts = [int(count) for count in options.clients.split(",")]
    slots = min(8, max(counts))
    rows: list[dict[str, Any]] = []
    commands = [(label, serve(options, bundle, slots)) for label, bundle in bundles.items()]
    if llama is not None:
        commands.append(("llama-server Q4_0", llama_serve(options, llama, model, slots)))
    with _servers(options, commands) as servers:
        for name, port in servers.items():
            ask(port, tokenizer.encode("warm up " + PROSE).ids[:32], 8, name)
        for prompts, count in itertools.product(options.prompt_tokens.split(","), counts):
            order = list(servers.items())[:: 1 if len(rows) // len(servers) % 2 == 0 else -1]
            for name, port in order:
                rows.append(
                    {"prompts": prompts, "clients": count, "server": name}
                    | load(port, name, count, prompts, options.answer_tokens, tokenizer)
                )
                say(json.dumps(rows[-1]))
    return rows


def serve(options: argparse.Namespace, bundle: list[str], slots: int) -> list[object]:
    command = edge_llm("serve", *bundle, "--backend", "ort-cpu", "--num-slots", slots)
    command += ["--kv-capacity", CAPACITY, "--num-threads", options.threads]
    return [*command, *options.serve_option]


def llama_serve(options: argparse.Namespace, llama: Path, model: Path, slots: int) -> list[object]:
    command = [llama / "llama-server", "-m", model, "-np", slots, "-c", slots * CAPACITY]
    return [*command, "-t", options.threads, "-tb", options.threads]


@contextmanager
def _servers(
    options: argparse.Namespace, commands: Sequence[tuple[str, list[object]]]
) -> Iterator[dict[str, int]]:
    """Run all these servers at once; yield the port of each."""
    with ExitStack() as stack:
        found: dict[str, int] = {}
        for port, (name, command) in enumerate(commands, 18400):
            ready = "/health" if name.startswith("llama-server") else "/ready"
            log = options.work / f"server-{len(found)}.log"
            running = server([*command, "--port", port], port, ready, log)
            found[name] = stack.enter_context(running)
        yield found


def load(
    port: int, name: str, clients: int, prompts: str, answer_tokens: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Run clients that ask again once they are answered, the same questions of every server."""
    low, _, high = prompts.partition("-")
    rounds = max(2, 6 // clients)
    answers: list[Answer] = []
    failures: list[BaseException] = []

    def client(index: int) -> None:
        rng = random.Random(f"{prompts} {clients} {index}")
        for turn in range(rounds):
            length = round(math.exp(rng.uniform(math.log(int(low)), math.log(int(high or low)))))
            text = f"{rng.randrange(10**9)} {clients} {index} {turn}. " + PROSE * (length // 50 + 1)
            ids = tokenizer.encode(text).ids[:length]
            try:
                answers.append(ask(port, ids, answer_tokens, name))
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures.append(error)

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        sys.exit(f"error: {len(failures)} requests to {name} failed: {failures[0]!r}")
    ttft = np.percentile([answer.ttft_s for answer in answers], [50, 99])
    itl = np.percentile([gap for answer in answers for gap in answer.itl_s], [50, 99])
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "ttft_p50_s": float(ttft[0]),
        "ttft_p99_s": float(ttft[1]),
        "itl_p50_ms": float(itl[0]) * 1e3,
        "itl_p99_ms": float(itl[1]) * 1e3,
    }


def ask(port: int, ids: list[int], tokens: int, name: str) -> Answer:
    """Ask for one streamed completion of exactly this many tokens."""
    body = {
        "prompt": ids,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if name.startswith("llama-server"):
        body["cache_prompt"] = False
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"{response.status}: {response.read()[:500]!r}")
    times: list[float] = []
    usage: dict[str, int] = {}
    timings: dict[str, int] = {}
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(str(event["error"]))
        if event.get("choices") and event["choices"][0].get("text"):
            times.append(time.perf_counter() - started)
        usage = event.get("usage") or usage
        timings = event.get("timings") or timings
    connection.close()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Answer(
        times[0],
        gaps,
        usage["completion_tokens"],
        usage["prompt_tokens"],
        timings.get("draft_n", 0),
        timings.get("draft_n_accepted", 0),
    )


# Drafts.


def drafts(
    options: argparse.Namespace, bundle: list[str], llama: Path | None, model: Path
) -> list[dict[str, Any]]:
    """Make a row for each text and server: decode speed of every round, guesses run and right."""
    if llama is None:
        sys.exit("error: the part drafts compares with llama.cpp; leave it in --peers")
    gguf = fetch(options.draft_model, options.models)
    smaller = options.draft_bundle or default_bundle(options, options.draft_model, gguf)
    smaller_q4_0 = quantize(options, options.draft_model, gguf, llama)
    plain = llama_serve(options, llama, model, 1)
    commands = [
        ("edge-llm", serve(options, bundle, 1)),
        ("edge-llm, drafts", serve(options, [*bundle, "--draft", str(smaller)], 1)),
        ("llama-server Q4_0", plain),
        (
            "llama-server Q4_0, drafts",
            [*plain, "--model-draft", smaller_q4_0, "--spec-type", "draft-simple"],
        ),
    ]
    tokenizer = Tokenizer.from_file(str(Path(bundle[0]) / "tokenizer.json"))
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (text, name): {"text": text, "server": name, "tokens_per_s": [], "drafted": 0, "right": 0}
        for text, (name, _) in itertools.product(TEXTS, commands)
    }
    with _servers(options, commands) as servers:
        for turn in range(options.rounds + 1):  # the first one warms up
            order = list(servers.items())[:: 1 if turn % 2 == 0 else -1]
            for (text, question), (name, port) in itertools.product(TEXTS.items(), order):
                prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                before = _drafted(port, name)
                answer = ask(port, tokenizer.encode(prompt).ids, options.answer_tokens, name)
                after = _drafted(port, name)
                if turn == 0:
                    continue
                row = rows[text, name]
                row["tokens_per_s"].append((answer.tokens - 1) / sum(answer.itl_s))
                row["drafted"] += answer.drafted + after[0] - before[0]
                row["right"] += answer.right + after[1] - before[1]
                say(json.dumps(row))
    return list(rows.values())


def _drafted(port: int, name: str) -> tuple[int, int]:
    """Read how many tokens an edge-llm server has guessed since its start, and how many right."""
    if name.startswith("llama-server"):
        return 0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    drafted, right = (
        next((float(v) for key, v in values.items() if key.startswith(f"edgellm_{which}_tokens")))
        for which in ("drafted", "accepted")
    )
    return int(drafted), int(right)


# The output.


def tables(result: dict[str, Any]) -> str:
    """Write the results in Markdown."""
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    flags = ", ".join(about["flags"])
    lines = [
        f"{result['model']} on {about['cores']} cores of {about['cpu']} ({flags}), "
        f"{about['date']}; {versions}.",
        "",
    ]
    if speeds := result.get("generate"):
        reference = next((name for name in speeds if name.startswith("llama.cpp")), None)
        lines += ["| | prefill of 512, tok/s | decode after 128, tok/s | ratio to llama.cpp |"]
        lines += ["|---|---|---|---|"]
        for name, rounds in speeds.items():
            prefill, decode = (median(column) for column in zip(*rounds, strict=True))
            ratio = "not measured"
            if reference is not None:
                pairs = list(zip(rounds, speeds[reference], strict=True))
                ratio = " and ".join(
                    f"{median(mine[at] / peer[at] for mine, peer in pairs):.2f}" for at in (0, 1)
                )
            lines.append(f"| {name} | {prefill:.0f} | {decode:.1f} | {ratio} |")
        lines.append("")
    if rows := result.get("serving"):
        lines += [
            "| prompts, tokens | clients | server | whole, tok/s | TTFT P50 / P99, s "
            "| ITL P50 / P99, ms |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['prompts']} | {row['clients']} | {row['server']} | {row['tokens_per_s']:.1f} "
            f"| {row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.2f} "
            f"| {row['itl_p50_ms']:.0f} / {row['itl_p99_ms']:.0f} |"
            for row in rows
        ]
        lines.append("")
    if rows := result.get("drafts"):
        speeds = {(row["text"], row["server"]): row["tokens_per_s"] for row in rows}
        lines += ["| text | server | decode, tok/s | over its own plain | over llama-server alike "]
        lines[-1] += "| right, of guesses run |"
        lines += ["|---|---|---|---|---|---|"]
        for row in rows:
            text, name, drafted = row["text"], row["server"], row["server"].endswith(", drafts")
            plain = speeds[text, name.removesuffix(", drafts")]
            peer = speeds[text, "llama-server Q4_0" + (", drafts" if drafted else "")]
            guesses = f"{row['right']} of {row['drafted']}" if drafted else ""
            lines.append(
                f"| {text} | {name} | {median(row['tokens_per_s']):.1f} "
                f"| {_ratio(row['tokens_per_s'], plain) if drafted else ''} "
                f"| {_ratio(row['tokens_per_s'], peer) if name.startswith('edge') else ''} "
                f"| {guesses} |"
            )
    return "\n".join(lines)


def _ratio(mine: Sequence[float], peer: Sequence[float]) -> str:
    """Return the median of the rounds' ratios."""
    return f"{median(a / b for a, b in zip(mine, peer, strict=True)):.2f}"


if __name__ == "__main__":
    main()
