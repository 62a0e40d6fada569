"""Shared by the tests: reference data, a small model and tokenizer, and a script run in-process."""

import contextlib
import gzip
import importlib
import io
import json
import math
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MINICODER_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT))

from model import CausalLM, Config, save_model  # noqa: E402
from support.files import run  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

# One thread, here and in the processes that tests start: the same bits in both, and models this
# small gain nothing from a second thread.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, vocab_size=96, max_position_embeddings=64)
YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# The models of golden.json: name -> changes to SMALL
CASES = {"tied": {}, "untied": dict(tie_word_embeddings=False, rms_norm_eps=1e-5),
         "yarn": dict(rope_scaling=YARN, rope_theta=1e4)}

CODE = '''def mean(numbers):
    """The mean of some numbers."""
    total = 0
    for number in numbers:
        total += number
    return total / len(numbers)


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()
'''


def reference_data(name):
    """The path of a file of the reference data; skips the test if there is none."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} in {DATA} (set MINICODER_DATA)")
    return path


def fill_weights(model):
    """Set each weight by a formula, so that golden values need no weight file."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(model.named_parameters())):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(index * 12.9898 + seed) * 43758.5453
            values = (values - values.floor() - 0.5) / math.sqrt(8)
            if parameter.dim() == 1:
                values = values + 1
            parameter.copy_(values.view(parameter.shape))
    return model


@pytest.fixture
def small_model():
    return fill_weights(CausalLM(Config(**SMALL))).eval()


@pytest.fixture(scope="session")
def small_tokenizer():
    return Tokenizer.train([CODE * 3], 400)


@pytest.fixture(scope="session")
def published_folder(tmp_path_factory):
    """The published vocabulary as a folder with vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("vocab.json", "merges.txt"):
        compressed = reference_data(f"tokenizer/{name}.gz")
        (folder / name).write_bytes(gzip.decompress(compressed.read_bytes()))
    return folder


def write_code_folder(folder):
    """Write a small source tree: eight modules of two files each, all different."""
    for module in "abcdefgh":
        (folder / module).mkdir(parents=True)
        for n in range(2):
            functions = [f"def {module}_{n}_{i}(value, other={i}):\n"
                         f"    \"\"\"Add {i} to {module}.\"\"\"\n"
                         f"    result = value * {i * 7 + n} + other\n"
                         f"    return result - len('{module * i}')\n\n"
                         for i in range(25)]
            (folder / module / f"part{n}.py").write_text("\n".join(functions))
    return folder


@pytest.fixture
def code_folder(tmp_path):
    return write_code_folder(tmp_path / "code")


def script_folder(out, stage, monkeypatch):
    """Fill the root folder `out` with data and a random model as out/<stage>, with a context of 512
    tokens, and reduce what sft.py builds and measures."""
    import sft
    documents = [{
        "text": f"def add_{i}(value):\n    \"\"\"Add {i} to a value and give it back.\"\"\"\n"
                f"    total = value + {i}\n    return total\n", "path": f"a/{i}.py", "repo": "a",
        "language": "python", "source": "x", "kind": "code"} for i in range(30)]
    (out / "data").mkdir()
    for part in ("train", "validation"):
        (out / "data" / f"{part}.jsonl").write_text(
            "".join(json.dumps(document) + "\n" for document in documents))
    [task] = sft.training_tasks(0, 1)
    chat = sft.all_text(sft.task_conversation(task)["messages"])
    tokenizer = Tokenizer.train([CODE, chat] * 3, 500)
    torch.manual_seed(0)
    save_model(CausalLM(Config(32, 2, 4, 2, 48, vocab_size=tokenizer.vocab_size,
                               max_position_embeddings=512)), out / stage)
    tokenizer.save(out / stage)
    smaller = dict(TASKS=100, FUNCTIONS=20, SPANS=1, ANSWER_TOKENS=4)
    monkeypatch.setattr("support.teacher.TEACHER_ANSWERS", 2)
    monkeypatch.setattr("support.teacher.TEACHER_QUESTIONS", 4)
    for name, value in smaller.items():
        monkeypatch.setattr(sft, name, value)
    problems, ladder = sft.held_out_problems, sft.find_problems
    monkeypatch.setattr(sft, "held_out_problems", lambda split: problems(split)[:9])
    monkeypatch.setattr(sft, "find_problems", lambda name: dict(list(ladder(name).items())[:9]))
    return out


def run_script(script, *flags):
    """Run main() of a script as the command line does, but in this process, as the start of another
    takes longer than most tests -> returncode, stdout, stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (mock.patch("sys.argv", [str(ROOT / script), *map(str, flags)]),
          contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr)):
        try:
            run(importlib.import_module(Path(script).stem).main)
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@pytest.fixture
def typed():
    """typed("fim.py", *flags): run_script()."""
    return run_script


class Teacher(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers with server.answer(request body)."""

    def do_GET(self):
        known = self.headers.get("Authorization") in self.server.keys
        self.reply(200 if known else 401, {"data": [{"id": "teacher-7b"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        self.reply(*self.server.answer(body))

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *args):
        pass


def answered(text):
    return 200, {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A local LLM teacher: set .answer, read the requests in .asked."""
    from support import files, llm_client
    monkeypatch.setenv("MINICODER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "RETRY_SECONDS", 0)
    llm_client.first_model.cache_clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.keys = [None, "Bearer secret"]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
