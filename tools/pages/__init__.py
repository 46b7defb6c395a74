"""Makes pictures and tables of the documentation."""
