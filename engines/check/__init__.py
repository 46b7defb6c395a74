"""Holds a bundle against TensorRT without building the engine that will run."""
