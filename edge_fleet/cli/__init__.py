"""Defines the verbs pull, bundle and fleet."""
