"""Many devices behind one endpoint.

Each device keeps its own ``edge-llm serve``. `head` chooses a device for every request, and
`device` hands it to the device's own service.
"""
