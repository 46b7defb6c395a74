"""Puts many devices behind one endpoint.

Each device keeps its own ``edge-llm serve``. HAProxy, whose configuration this package writes, or
vllm-router chooses a device for every request.
"""
