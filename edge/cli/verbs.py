"""Lists the verbs as ``edge-llm --help`` shows them: in groups, a line of 60 characters each.

The lines are here, and not only in the verbs' own modules, so that the help loads none of those.
"""

from __future__ import annotations

GROUPS = {
    "Get a model": {
        "recommend": "Choose a model and a precision for a device",
        "plan": "Predict memory and speed before anything is made",
        "pull": "Download, export and build a model in one go",
        "export": "Turn a checkpoint into a bundle",
        "build": "Build the TensorRT engine of a bundle",
        "list": "List the bundles of this machine",
        "inspect": "Show what a bundle or an engine is",
        "adapter": "Keep adapters (LoRA) beside a bundle",
        "rm": "Remove a bundle with its engines",
    },
    "Use it": {
        "run": "Answer one prompt",
        "chat": "Talk to it in the terminal",
        "embed": "Turn texts into vectors",
        "batch": "Answer a file of requests",
        "cache": "Keep the KV cache of prompts on disk",
    },
    "Serve it": {
        "serve": "Serve models over HTTP to OpenAI's clients",
        "config": "Show the service's settings and where each is from",
        "key": "Make an API key for the service",
    },
    "Measure it": {
        "bench": "Measure speed, memory and energy",
        "eval": "Measure quality, and what was lost of it",
        "verify": "Compare an engine with the same graph on the CPU",
        "check": "Compile and audit a bundle without a GPU",
        "watch": "Compare a bundle or a service with what it was",
    },
    "Ship it": {
        "bundle": "Sign bundles, push, pull and roll them out",
        "fleet": "Serve many devices behind one endpoint",
    },
    "Get help": {
        "doctor": "Say what is wrong with this machine, and the cure",
        "prove": "Prove in 15 minutes what this device does",
        "trtexec-explain": "Translate an old trtexec line",
        "man": "Print the manual page",
    },
}
"""Maps each group to its verbs and their lines, in the order of a model's life."""
