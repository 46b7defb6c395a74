"""Many devices behind one endpoint.

Each device keeps its own ``edge-llm serve``. HAProxy, whose file is written here, or vllm-router
chooses a device for every request.
"""
