"""Exchanges bundles with OCI registries: references, credentials, the wire, push and pull."""
