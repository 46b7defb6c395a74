"""Adapters, draft heads and a model that sees, trained on a CPU."""
