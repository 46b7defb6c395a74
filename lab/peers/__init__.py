"""Other projects, measured in turns with ours, and their weights."""
