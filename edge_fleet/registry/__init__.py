"""Bundles in OCI registries: references, credentials, the wire, push and pull."""
