"""Keeps responses on disk, with the state that continues those that have not ended."""
