"""Responses that are kept on disk, with what it takes to go on with those that have not ended."""
