"""A question, its answer, and a tool with its call, of which every protocol has its form."""

from __future__ import annotations

QUESTION = [{"role": "user", "content": "what"}]
ANSWER = "Let me see.\n</think>\n\nHéllo 🙂"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "of a city", "parameters": SCHEMA}
WEATHER = {"type": "function", "function": FUNCTION}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
THINKING = [{"role": "user", "content": "think"}]
CALLING = [{"role": "user", "content": "two calls"}]
