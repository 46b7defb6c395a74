"""Makes data that tests and the product compare with, by other projects' tools."""
