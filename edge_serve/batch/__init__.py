"""Answers a file of requests, in OpenAI's Batch format, here or by any server of OpenAI's API."""

from .run import BatchResult, run_batch

__all__ = ["BatchResult", "run_batch"]
