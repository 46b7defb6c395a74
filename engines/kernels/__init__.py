"""Own kernels for NVIDIA GPUs, compiled ahead of time from Triton (docs/kernels.md)."""
