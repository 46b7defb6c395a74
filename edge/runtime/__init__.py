"""The runtime: requests, slots, sampling, scheduling, and what plugs into them."""
