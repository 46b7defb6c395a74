"""Serves bundles over HTTP: the OpenAI-compatible API, metrics, the page, and batches of requests.

It stands on `edge` and `edge_lab`. What carries bundles to devices stands on it, in `edge_fleet`.
"""
