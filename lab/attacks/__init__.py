"""Attacks on a running service, a registry and a bundle, each of which must fail."""
