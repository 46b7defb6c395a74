"""The verbs pull, bundle and fleet."""
