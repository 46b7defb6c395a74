"""Holds our plugins and calls against NVIDIA's own Python bindings."""
