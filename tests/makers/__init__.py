"""Makes what tests read: tiny checkpoints, adapters, manifests, keys and golden files."""
