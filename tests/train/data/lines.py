"""Valid lines of every kind of training data. Holds no tests."""

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}

TEXT = {"text": "It was a bright cold day in April."}

CHAT = {
    "system_prompt": "Be brief.",
    "only_last": False,
    "messages": [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red.", "weight": 0},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": "Blue.", "weight": 1},
    ],
}

SYNONYMS = {"interactions": [{"role": "user", "text": "Hello"}, {"role": "assistant", "text": "Hi"}]}

TOOLS = {
    "messages": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Rain in Oslo?"},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "a1B2c3D4e",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"town": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "a1B2c3D4e", "name": "weather", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And in Rome?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "z9Y8x7W6v", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}],
        },
    ],
    "tools": [WEATHER],
}

REASONING = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Think first."}]},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Two and two."}], "closed": True},
                {"type": "text", "text": "4"},
            ],
        },
    ]
}

PAIR = {
    "messages": [{"role": "user", "content": "Say hello."}],
    "chosen": "Hello!",
    "rejected": {"role": "assistant", "content": "No."},
}

WHOLE_PAIR = {
    "prompt": "Say hello.",
    "chosen": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}],
    "rejected": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "No."}],
}

# Those of reasoning are for v13; all others every version from v3 on takes.
EVERY_VERSION: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "chat": CHAT,
    "synonyms": SYNONYMS,
    "tools": TOOLS,
    "pair": PAIR,
    "whole pair": WHOLE_PAIR,
}
EVERY_LINE = EVERY_VERSION | {"reasoning": REASONING}
