"""Manages the bundles of one server: opening, routing, replacing, requests in flight."""
