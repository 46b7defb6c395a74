"""Quantize the tiny test model with other projects' tools, and keep their output.

The tools want different versions of each other's libraries, so each runs in an environment of its
own, from the repository's root:

    python -m venv one && one/bin/pip install torch llmcompressor auto-round nvidia-modelopt
    python -m venv two && two/bin/pip install torch setuptools wheel ninja
    two/bin/pip install --no-build-isolation gptqmodel
    one/bin/python -m tools.goldens.quantized ct-w4a16 ct-w8a8-static ...
    two/bin/python -m tools.goldens.quantized gptq awq ...

`tests.makers.quantized_golden` describes a file's content. The reference in it is the tool's own:
the weights are those that its module multiplies with, and the logits are of the float model with
them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.makers.quantized_golden import IDS, NUM_LOGITS, QuantizedGolden, read_raw, write_base
from tests.makers.tiny_models import FIRST_CONTROL_ID

_GROUP = 32
_SAMPLES, _SAMPLE_TOKENS = 32, 64


def calibration_ids() -> torch.Tensor:
    ids = np.random.RandomState(1).randint(0, FIRST_CONTROL_ID, size=(_SAMPLES, _SAMPLE_TOKENS))
    return torch.from_numpy(ids.astype(np.int64))


def float_model(directory: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).eval()


# ------------------------------------------------------------------------------- llm-compressor


def compress(modifier: Callable[[], Any]) -> Callable[[Path, Path], list[str]]:
    def run(base: Path, out: Path) -> list[str]:
        from datasets import Dataset
        from llmcompressor import oneshot

        model = float_model(base, torch.bfloat16)
        rows = [
            {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}
            for ids in calibration_ids()
        ]
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=modifier(),
            max_seq_length=_SAMPLE_TOKENS,
            num_calibration_samples=_SAMPLES,
        )
        model.save_pretrained(out, save_compressed=True)
        return ["llmcompressor", "compressed-tensors"]

    return run


def compressed(
    scheme: dict[str, Any],
    kind: str = "QuantizationModifier",
    targets: str = "Linear",
    ignore: tuple[str, ...] = (),
) -> Callable[[], Any]:
    def make() -> Any:
        from llmcompressor.modifiers import gptq, quantization

        module = gptq if kind == "GPTQModifier" else quantization
        groups = {"group_0": {"targets": [targets], **scheme}}
        return getattr(module, kind)(config_groups=groups, ignore=["lm_head", *ignore])

    return make


def weights(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    size = {"group_size": _GROUP} if strategy == "group" else {}
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        **size,
        **more,
    }


def inputs(**more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, **more}


def nvfp4() -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"])


def fp8() -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    # gate_up is then a layer with two kinds of parts.
    ignore = ["lm_head", "re:.*gate_proj$", "re:.*down_proj$"]
    return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignore)


# ------------------------------------------------------------------------------------ AutoRound


def auto_round(format: str, **options: Any) -> Callable[[Path, Path], list[str]]:
    def run(base: Path, out: Path) -> list[str]:
        from auto_round import AutoRound

        model = float_model(base, torch.float16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        data = [
            {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            for ids in calibration_ids()
        ]
        tool = AutoRound(
            model,
            tokenizer,
            bits=4,
            group_size=_GROUP,
            dataset=data,
            iters=8,
            seqlen=_SAMPLE_TOKENS,
            nsamples=_SAMPLES,
            batch_size=8,
            device_map="cpu",
            low_gpu_mem_usage=False,
            **options,
        )
        tool.quantize_and_save(str(out), format=format)
        return ["auto-round"]

    return run


# ------------------------------------------------------------------------------------ GPTQModel


def gptq_model(**options: Any) -> Callable[[Path, Path], list[str]]:
    def run(base: Path, out: Path) -> list[str]:
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        model = GPTQModel.load(
            str(base), QuantizeConfig(group_size=_GROUP, **options), device="cpu"
        )
        rows = [
            {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}
            for ids in calibration_ids()
        ]
        model.quantize(
            rows,
            batch_size=8,
            **({"backend": BACKEND.AWQ_TORCH} if options.get("method") == "awq" else {}),
        )
        model.save(str(out))
        return ["gptqmodel"]

    return run


# -------------------------------------------------------------------------------------- ModelOpt


def modelopt(config_name: str) -> Callable[[Path, Path], list[str]]:
    def run(base: Path, out: Path) -> list[str]:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        model = float_model(base, torch.bfloat16)

        def forward(m: Any) -> None:
            m(calibration_ids()[:8])

        mtq.quantize(model, getattr(mtq, config_name), forward)
        export_hf_checkpoint(model, export_dir=out)
        return ["nvidia-modelopt"]

    return run


VARIANTS: dict[str, Callable[[Path, Path], list[str]]] = {
    "ct-w4a16": compress(compressed({"weights": weights(4, "group")}, "GPTQModifier")),
    "ct-w4a16-asym": compress(compressed({"weights": weights(4, "group", symmetric=False)})),
    "ct-w8a16": compress(compressed({"weights": weights(8, "channel")}, targets=r"re:.*mlp\.")),
    "ct-w8a8-static": compress(
        compressed(
            {
                "weights": weights(8, "channel"),
                "input_activations": inputs(strategy="tensor", dynamic=False),
            },
            ignore=(r"re:.*down_proj$",),
        )
    ),
    "ct-w8a8-dynamic": compress(
        compressed(
            {
                "weights": weights(8, "channel"),
                "input_activations": inputs(strategy="token", dynamic=True),
            }
        )
    ),
    "ct-fp8": compress(fp8),
    "ct-nvfp4": compress(nvfp4),
    "auto-round-gptq": auto_round("auto_round:auto_gptq", sym=True),
    "auto-round-awq": auto_round("auto_round:auto_awq", sym=False),
    "auto-round-gptqmodel": auto_round("auto_round:gptqmodel", sym=False),
    "gptq": gptq_model(bits=4, sym=True, desc_act=False),
    "gptq-asym-act-order": gptq_model(bits=4, sym=False, desc_act=True),
    "gptq-v2": gptq_model(bits=4, sym=True, desc_act=False, format="gptq_v2"),
    "awq": gptq_model(bits=4, sym=False, desc_act=False, method="awq", format="gemm"),
    "modelopt-fp8": modelopt("FP8_DEFAULT_CFG"),
    "modelopt-nvfp4": modelopt("NVFP4_DEFAULT_CFG"),
}


# ------------------------------------------------------------------------------------ reference


def load_quantized(name: str, directory: Path) -> Any:
    """Open a checkpoint as the tool that wrote it does."""
    if name.startswith(("gptq", "awq")):
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND.AWQ_TORCH if name == "awq" else BACKEND.GPTQ_TORCH
        loaded = GPTQModel.load(str(directory), backend=backend, device="cpu", dtype=torch.float16)
        return loaded.model
    if name.startswith("ct-"):
        config = transformers.CompressedTensorsConfig(run_compressed=False)
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            quantization_config=config,
            dtype=torch.float32,
            attn_implementation="eager",
        )
    return transformers.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")


def modelopt_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Dequantize with ModelOpt's own tensors: `transformers` does not open its checkpoints."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    stored = load_file(weights_file(directory))
    found = {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        scale = stored[f"{name}_scale"]
        if scale.dtype != torch.float8_e4m3fn:
            found[name] = stored[name].to(torch.float32) * scale
            continue
        out, half = stored[name].shape
        packed = NVFP4QTensor(torch.Size((out, 2 * half)), torch.float32, stored[name])
        found[name] = packed.dequantize(
            scale=scale, double_scale=stored[f"{name}_scale_2"], block_sizes={-1: 16}
        )
    return found


def auto_round_awq_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Dequantize with AutoRound's own function: its AWQ kernels are for other devices."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    stored = load_file(weights_file(directory))
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    return {
        f"{name}.weight": dequantize_gemm(
            *(stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")), 4, _GROUP
        ).T.contiguous()
        for name in modules
    }


def compressed_weights(path: Path) -> dict[str, torch.Tensor]:
    """Dequantize by compressed-tensors itself: transformers 5 rounds what it opens to bf16."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    stored, args = load_file(path), QuantizationArgs(**weights(8, "channel"))
    return {
        name: dequantize(stored[name], stored[f"{name}_scale"].to(torch.float32), args=args)
        for name in stored
        if f"{name}_scale" in stored
    }


@torch.no_grad()  # type: ignore[untyped-decorator]
def effective_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights that each quantized module multiplies with, ``[out, in]``."""
    found = {}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.element_size() < 2:
            width = getattr(module, "in_features", None) or module.infeatures
            bias, module.bias = module.bias, None
            weight = module(torch.eye(width, dtype=torch.float16)).T
            module.bias = bias
        found[f"{name}.weight"] = weight.contiguous()
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def reference_logits(
    base: Path,
    stored: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    *,
    dynamic: bool,
) -> NDArray[np.float32]:
    """Compute the logits of the float model with the tool's weights, in fp32."""
    model = float_model(base, torch.float32)
    state = model.state_dict()
    for name in state:
        tensor = weights.get(name, stored.get(name))
        assert tensor is not None, name
        state[name] = tensor.to(torch.float32)
    model.load_state_dict(state)
    per_token = rounded_per_token() if dynamic else None
    for name, module in model.named_modules():
        if per_token is not None and f"{name}.weight" in weights:
            module.register_forward_pre_hook(per_token)
        scale = stored.get(f"{name}.input_scale")
        # FP8's and FP4's static ranges are not followed: those weights are used with float inputs.
        if scale is not None and stored[f"{name}.weight"].dtype == torch.int8:
            module.register_forward_pre_hook(rounded_inputs(scale.to(torch.float32)))
    logits: NDArray[np.float32] = (
        model(torch.from_numpy(IDS)[None]).logits[0, -1, :NUM_LOGITS].numpy()
    )
    return logits


def rounded_inputs(scale: torch.Tensor) -> Callable[[Any, Any], Any]:
    return lambda _, args: (torch.clamp(torch.round(args[0] / scale), -128, 127) * scale,)


def rounded_per_token() -> Callable[[Any, Any], Any]:
    """Round inputs as compressed-tensors does if their scales are dynamic."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(**inputs(strategy="token", dynamic=True))

    def hook(module: Any, values: Any) -> Any:
        scale, zero = compute_dynamic_scales_and_zp(values[0], args, module)
        # A token's largest input is 127.5 steps: the division's rounding makes it -127 or -128.
        return (fake_quantize(values[0], scale * (1 - 2**-18), zero, args),)

    return hook


def weights_file(directory: Path) -> Path:
    (path,) = directory.rglob("*.safetensors")
    return path


def make(name: str, directory: Path) -> QuantizedGolden:
    base, out = write_base(directory / "base"), directory / name
    packages = VARIANTS[name](base, out)
    path = weights_file(out)
    config = json.loads((path.parent / "config.json").read_text())["quantization_config"]
    before, after = read_raw(base / "model.safetensors"), read_raw(path)
    if name.startswith("modelopt"):
        weights = modelopt_weights(path.parent)
    elif name == "ct-w8a8-dynamic":
        weights = compressed_weights(path)
    elif name == "auto-round-awq":
        weights = auto_round_awq_weights(path.parent)
    else:
        weights = effective_weights(load_quantized(name, path.parent))
    (kind,) = {weight.dtype for weight in weights.values()}
    return QuantizedGolden(
        tools={package: version(package) for package in [*packages, "torch"]},
        config=config,
        tensors={key: raw for key, raw in after.items() if before.get(key) != raw},
        removed=sorted(before.keys() - after.keys()),
        weights_type=str(kind).removeprefix("torch."),
        weights_sha256={
            # The sum turns both zeros into one.
            key: hashlib.sha256((weight + 0).view(torch.uint8).numpy().tobytes()).hexdigest()
            for key, weight in weights.items()
        },
        logits=reference_logits(base, load_file(path), weights, dynamic="dynamic" in name),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(VARIANTS), metavar="NAME")
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as directory:
            golden = make(name, Path(directory))
            golden.save(name)
        print(f"{name}: {golden.tools}, {golden.weights_type}")


if __name__ == "__main__":
    main()
