"""An agent with two tools, on any server of OpenAI's API: ask, run what the model calls, ask again.

pip install openai
python docs/examples/agent.py 'How much disk space is free in /var?'
"""

import json
import os
import shutil
import sys
from pathlib import Path

from openai import OpenAI


def free_space_gb(path: str) -> float:
    """Free disk space of a directory, in GB."""
    return round(shutil.disk_usage(path).free / 1e9, 1)


def list_directory(path: str) -> list[str]:
    """Names of the files in a directory."""
    return sorted(entry.name for entry in Path(path).iterdir())[:50]


FUNCTIONS = {function.__name__: function for function in (free_space_gb, list_directory)}
PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string", "description": "an absolute path"}},
    "required": ["path"],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": function.__doc__,
            "parameters": PARAMETERS,
        },
    }
    for name, function in FUNCTIONS.items()
]


def main(question: str, max_turns: int = 5) -> str:
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": question}]
    for turn in range(max_turns):
        # A small model may describe a call instead of making one: demand the first.
        choice = "required" if turn == 0 else "auto"
        reply = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice=choice, temperature=0
        )
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(
            message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})
        )
        for call in message.tool_calls:
            try:
                result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            except (OSError, TypeError, ValueError, KeyError) as error:
                # The model reads it and can try otherwise; a KeyError says little without its type.
                result = f"error: {type(error).__name__}: {error}"
            print(f"{call.function.name}({call.function.arguments}) -> {result}", file=sys.stderr)
            messages.append(
                {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}
            )
    return f"No answer after {max_turns} turns."


if __name__ == "__main__":
    print(main(" ".join(sys.argv[1:]) or "How much disk space is free in /?"))
