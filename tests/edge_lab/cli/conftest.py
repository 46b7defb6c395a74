"""The command line in this process."""

from tests.command_line import edge_llm, shelf  # noqa: F401
