"""Lists what hubs have for the models of `edge.bundle.library.CATALOGUE`."""

from __future__ import annotations

REVISIONS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "916b56a44061fd5cd7d6a8fb632557ed4f724f60",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "6a6f4aa4197940add57724a7707d069478df56b1",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "6e8885a6ff5c1dc5201574c8fd700323f23c25fa",
}
"""Commit of the Hugging Face hub for models of the `CATALOGUE`; others are taken as they are today.

Public projects that pin these models name these commits independently of each other (searched in
November 2026); the hub was not asked. A hub that does not have the commit refuses it.
"""
PUBLISHED = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "RedHatAI/DeepSeek-R1-Distill-Qwen-1.5B-"
    "quantized.w4a16",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "RedHatAI/DeepSeek-R1-Distill-Qwen-7B-"
    "quantized.w4a16",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "RedHatAI/DeepSeek-R1-Distill-Llama-8B-"
    "quantized.w4a16",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "Intel/DeepSeek-R1-0528-Qwen3-8B-int4-AutoRound",
}
"""Checkpoint with 4-bit integers that ``--quant source`` takes for a model of the `CATALOGUE`.

Red Hat's are GPTQ by llm-compressor (symmetric, groups of 128), by their model cards and Neural
Magic's "Quantized DeepSeek-R1 Models" of February 2025; Intel's is the example of vLLM's and
SGLang's pages on AutoRound. The hub was not asked.
"""
