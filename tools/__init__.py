"""Guards the product and ships it; python3 -m tools lists the programs."""
