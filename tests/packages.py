"""The packages of the distribution, as `pyproject.toml` names them (held in test_packaging)."""

PACKAGES = ["edge", "edge_make", "edge_lab", "edge_serve", "edge_fleet", "engines", "export"]
