"""What tests share: where reference data lies, a small tokenizer, a small model, fixed weights."""

import gzip
import importlib
import json
import math
import os
import signal
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MINICODER_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT))

from model import CausalLM, Config, save_model  # noqa: E402
from support.files import run  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, vocab_size=96, max_position_embeddings=64)
YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# name -> what differs from SMALL; also the cases of golden.json
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


LONG = {"test_data.py", "test_grader.py", "test_kernels.py"}    # they take as long as the others


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Run half of the tests in a copy of this process, as most of them keep one core busy; its
    reports come through a file, when both halves have ended."""
    config, option = session.config, session.config.option
    halves = [[item for item in session.items if (item.path.name in LONG) == own]
              for own in (False, True)]
    if (not all(halves) or option.collectonly or option.usepdb or option.trace or option.setupshow
            or sys.platform == "darwin"):               # where a fork is not safe
        return (yield)
    config._tmp_path_factory.getbasetemp()              # one for both
    threads = max(torch.get_num_threads() // 2, 1)      # who waits for a busy core waits long
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    reports = tempfile.TemporaryFile("w+")
    child = os.fork()
    session.items[:] = halves[child == 0]
    if child == 0:
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()                 # else both would write into one
        capture.start_global_capturing()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Reports(config, reports))
        status = 1
        try:
            result = yield
            status = 0
            return result
        finally:
            os._exit(status)
    try:
        result = yield
    except BaseException:
        os.kill(child, signal.SIGINT)
        os.waitpid(child, 0)
        raise
    status = os.waitpid(child, 0)[1]
    reports.seek(0)
    for line in reports:
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        config.hook.pytest_runtest_logreport(report=report)
    if status and not option.maxfail:                   # with -x it ends at a failure
        pytest.exit("the process with the other half of the tests ended early", 1)
    return result


class Reports:
    """Writes what became of each test into a file, a line each."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        report = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(report), file=self.file, flush=True)


def reference_data(name):
    """The path of a reference file, its .gz unpacked by the caller; skips where it is absent."""
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
        packed = reference_data(f"tokenizer/{name}.gz")
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


@pytest.fixture
def code_folder(tmp_path):
    """A small source tree: eight modules of two files each, all different."""
    for module in "abcdefgh":
        (tmp_path / "code" / module).mkdir(parents=True)
        for n in range(2):
            lines = [f"def {module}_{n}_{i}(value, other={i}):\n"
                     f"    \"\"\"Add {i} to {module}.\"\"\"\n"
                     f"    result = value * {i * 7 + n} + other\n"
                     f"    return result - len('{module * i}')\n\n"
                     for i in range(25)]
            (tmp_path / "code" / module / f"part{n}.py").write_text("\n".join(lines))
    return tmp_path / "code"


def script_folder(out, stage, monkeypatch):
    """A root folder with data and a random model with context for 512 tokens as out/<stage>; what
    sft.py builds and measures is made small."""
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
    less = dict(TASKS=100, FUNCTIONS=20, SPANS=1, ANSWER_TOKENS=4, TEACHER_ANSWERS=2,
                TEACHER_QUESTIONS=4)
    for name, value in less.items():
        monkeypatch.setattr(sft, name, value)
    problems, ladder = sft.held_out_problems, sft.find_problems
    monkeypatch.setattr(sft, "held_out_problems", lambda split: problems(split)[:9])
    monkeypatch.setattr(sft, "find_problems", lambda name: dict(list(ladder(name).items())[:9]))
    return out


class Teacher(BaseHTTPRequestHandler):
    """An OpenAI-compatible server; `answers` of the class says what comes."""

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


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed("fim.py", *flags): a script as on the command line, but without a process of its own,
    whose start takes longer than most tests."""
    def call(script, *flags):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", [str(ROOT / script), *map(str, flags)])
        code = 0
        try:
            run(importlib.import_module(Path(script).stem).main)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return call


def answered(text):
    return 200, {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A local teacher: set .answer, look at .asked."""
    from support import llm_client
    monkeypatch.setenv("MINICODER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llm_client, "RETRY_SECONDS", 0)
    llm_client.first_model.cache_clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    server.keys = [None, "Bearer secret"]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
