"""Runs an experiment by its name: ``python3 -m lab NAME``.

The rooms are ``bench`` (speed), ``peers`` (speed and weights of others), ``quality`` (loss and
right answers), ``training``, ``gpu`` (what ``scripts/gpu-check`` runs) and ``attacks``. Their tests
are beside them and run at night.
"""

from __future__ import annotations

import sys

from tools.environments import DEV, TORCH, Environment, Program, main

OPENVINO = Environment(
    ".venv-openvino", ("laptop",), ("openvino",), variables={"NNCF_CI": "1"}
)  # which keeps NNCF from sending telemetry
AUTOROUND = Environment(".venv-autoround", ("laptop", "smollm2"), ("autoround",))
ROUTERS = Environment(".venv", ("dev", "fleet"))

PROGRAMS = {
    "bench": Program("lab.bench.model", "speed of the 1.5B's shape, or of a bundle"),
    "bench-serving": Program("lab.bench.serving", "many requests at once on one bundle"),
    "bench-start": Program("lab.bench.start", "cold start beside ONNX Runtime's own session"),
    "bench-overhead": Program("lab.bench.overhead", "the TensorRT runner's own time", DEV),
    "bench-server": Program("lab.bench.server", "cost of the HTTP service", DEV),
    "load-server": Program("lab.bench.load", "hostile load on a scripted service", DEV),
    "soak": Program("lab.bench.soak", "hours of load on a real model; writes a report", DEV),
    "relay-cost": Program("lab.bench.relay_cost", "HAProxy and routers before a fleet", ROUTERS),
    "adapter-cost": Program("lab.bench.adapter_cost", "adapters at run time, on the CPU", DEV),
    "peers": Program("lab.peers.peers", "beside llama.cpp, OpenVINO and onnxruntime-genai"),
    "vision-peer": Program("lab.peers.vision_peer", "pictures beside llama.cpp's mtmd"),
    "genai-weights": Program("lab.peers.genai_weights", "onnxruntime-genai's INT4 weights"),
    "openvino-weights": Program(
        "lab.peers.openvino_weights", "OpenVINO's INT4 weights (500 MB of packages)", OPENVINO
    ),
    "auto-round-weights": Program(
        "lab.peers.auto_round_weights", "AutoRound's INT4 weights (1.2 GB)", AUTOROUND
    ),
    "quality": Program("lab.quality.quality", "loss of every recipe on several texts; hours"),
    "quality-table": Program("lab.quality.table", "tables of docs/measured.md"),
    "layer-error": Program("lab.quality.layer_error", "error of one layer by method and text"),
    "fp16-peaks": Program("lab.quality.fp16_peaks", "largest values of the fp16-typed graph"),
    "best-logits": Program("lab.quality.best_logits", "tokens from the best logits alone"),
    "ask-twice": Program("lab.quality.ask_twice", "golden prompts, twice each"),
    "answer-pool": Program("lab.quality.answer_pool", "pool of answers to word problems; days"),
    "answer-rules": Program("lab.quality.answer_rules", "rules of stopping and voting"),
    "adapter-kl": Program("lab.quality.adapter_kl", "adapters beside peft's", TORCH),
    "picture-levels": Program("lab.quality.picture_levels", "pixels beside transformers'", TORCH),
    "planted-bundles": Program(
        "lab.quality.planted_bundles", "damages that a roll-out's gate must reject", DEV
    ),
    "vision-clients": Program("lab.quality.vision_clients", "one picture by every client", DEV),
    "distill": Program("lab.training.distill", "a teacher's answers, as texts to train on"),
    "finetune": Program("lab.training.finetune", "a LoRA adapter on texts (1.2 GB)", TORCH),
    "adapter-tasks": Program("lab.training.adapter_tasks", "texts of three small tasks"),
    "train-eagle3": Program("lab.training.train_eagle3", "an EAGLE-3 head (1.2 GB)", TORCH),
    "train-vision": Program("lab.training.train_vision", "a model that sees (1.2 GB)", TORCH),
    "vision-score": Program("lab.training.vision_score", "right answers about pictures", TORCH),
    "attack-fair": Program("lab.attacks.fair", "one greedy client beside a good one", DEV),
    "attack-storm": Program("lab.attacks.storm", "clients that leave at once", DEV),
    "attack-replay": Program("lab.attacks.replay", "a registry's tag that goes back", DEV),
    "attack-registry-drip": Program("lab.attacks.registry_drip", "a byte at a time", DEV),
    "attack-planted-engine": Program("lab.attacks.planted_engine", "a stranger's engine", DEV),
}

if __name__ == "__main__":
    sys.exit(main("python3 -m lab", PROGRAMS, sys.argv[1:]))
