"""Prompts for the published Qwen2.5-Coder-0.5B-Instruct, and the answers of transformers.

    pip install transformers        # in an environment of its own
    MINICODER_WEIGHTS=FOLDER python tests/published.py      # writes published.json; 10 minutes
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fim import fim_ids, repository_ids  # noqa: E402
from tokenizer import ENDOFTEXT, Tokenizer  # noqa: E402

NEW_TOKENS = 24
WEATHER = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]}}}]


def long_program(functions):
    """A program whose last line can only be completed from a line far above."""
    lines = []
    for i in range(functions):
        lines += [f"def step_{i}(value):", f"    return value * {i * 7 % 23} + {i * 5 % 17}", ""]
    return "\n".join([*lines, f"def step_{functions // 3}_again(value):", "    return value *"])


def prompts(tokenizer):
    """The prompts, {name: ids}."""
    def chat(content, tools=None):
        messages = [{"role": "user", "content": content}]
        text = tokenizer.render_chat(messages, tools, add_generation_prompt=True)
        return tokenizer.encode(text, allow_special=True)

    def fim(prefix, suffix):
        return fim_ids(tokenizer, tokenizer.encode(prefix), tokenizer.encode(suffix))

    encode = tokenizer.encode
    stack = "class Stack:\n    def __init__(self):\n        self.items = []\n"
    return {
        "chat": chat("Write a Python function that reverses a string."),
        "chat in Chinese": chat("写一个判断素数的 Python 函数。"),
        "tool call": chat("What is the weather in Paris?", WEATHER),
        "python": encode("def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n"),
        "c": encode("#include <stdio.h>\n\nint max(int a, int b) {\n"),
        "sql": encode("-- The five customers with the most orders\nSELECT"),
        "infilling": fim(f"{stack}\n    def push(self, item):\n        ",
                         "\n\n    def pop(self):\n        return self.items.pop()\n"),
        "infilling in a repository": repository_ids(
            tokenizer, "shapes", [("shapes/stack.py", stack)], "main.py")
        + fim("from shapes.stack import ", "\n\nstack = Stack()\nprint(stack.items)\n"),
        "4,000 tokens": [tokenizer.special[ENDOFTEXT], *encode(long_program(218))],
        "8,000 tokens": [tokenizer.special[ENDOFTEXT], *encode(long_program(432))]}


def main():
    import torch
    import transformers
    folder = os.environ["MINICODER_WEIGHTS"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {}
    for name, ids in prompts(Tokenizer.load(folder)).items():
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False,
                                 output_logits=True, return_dict_in_generate=True)
        logits = torch.cat(out.logits).float()
        new_ids = out.sequences[0, len(ids):]
        log_probs = logits.log_softmax(-1).gather(1, new_ids[:, None])[:, 0]
        answers[name] = {"prompt_tokens": len(ids), "ids": new_ids.tolist(),
                         "log_probs": [round(value, 4) for value in log_probs.tolist()]}
        print(name, len(ids), new_ids.tolist(), flush=True)
    path = Path(__file__).with_name("published.json")
    data = {"transformers": transformers.__version__, "answers": answers}
    path.write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
