"""Pictures in a prompt: what only bundles with a vision encoder load."""
