"""pytest tests/test_evaluate.py"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import CODE, ROOT, SMALL, fill_weights

import evaluate
from evaluate import bits_per_byte, complete, compressed_bits_per_byte, read_documents
from model import CausalLM, Config, save_model
from tokenizer import InputError


@pytest.fixture
def model(small_tokenizer):
    return fill_weights(CausalLM(Config(**{**SMALL, "vocab_size": 416}))).eval()


def test_a_model_that_knows_nothing(model, small_tokenizer):
    """All rows equally likely: every token costs log2(416) bits, the <|endoftext|> too."""
    with torch.no_grad():
        model.head.zero_()
    documents = [{"text": "héllo\n"}, {"text": CODE}]
    tokens = sum(len(small_tokenizer.encode(d["text"])) + 1 for d in documents)
    expected = tokens * math.log2(416) / (7 + len(CODE))
    assert bits_per_byte(model, small_tokenizer, documents) == pytest.approx(expected, rel=1e-5)


def test_each_document_is_read_in_rows_after_an_end_of_text(model, small_tokenizer):
    T, end = model.config.max_position_embeddings, small_tokenizer.special["<|endoftext|>"]
    text = CODE * 3
    ids = [end, *small_tokenizer.encode(text), end]
    assert len(ids) > 2 * T
    nats = 0.0
    for start in range(0, len(ids) - 1, T):
        row = torch.tensor([ids[start:start + T + 1]])
        logits = model(row[:, :-1]).log_softmax(-1).detach()
        nats -= float(logits.gather(-1, row[:, 1:, None]).sum())
    expected = nats / math.log(2) / len(text)
    single = bits_per_byte(model, small_tokenizer, [{"text": text}])
    assert single == pytest.approx(expected, rel=1e-5)
    both = bits_per_byte(model, small_tokenizer, [{"text": text}, {"text": text}])
    assert both == pytest.approx(expected, rel=1e-5)


def test_compressors():
    bits = compressed_bits_per_byte(["ab" * 5000, "ab" * 5000])
    assert set(bits) == {"gzip", "bz2", "xz"} and max(bits.values()) < 0.1
    assert compressed_bits_per_byte([CODE])["gzip"] > 2


def test_documents_from_files(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x\r\ny")
    assert read_documents(tmp_path / "a.py") == [{"text": "x\ny", "path": "a.py"}]
    (tmp_path / "b.jsonl").write_text('{"text": "1"}\n{"text": "2", "path": "p"}\n')
    assert [d["text"] for d in read_documents(tmp_path / "b.jsonl")] == ["1", "2"]
    (tmp_path / "b.jsonl").write_text('{"text": "1"}\n{"txt": "2"}\n')
    with pytest.raises(InputError, match='b.jsonl, line 2: expected {"text"'):
        read_documents(tmp_path / "b.jsonl")
    (tmp_path / "c.py").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="c.py: not UTF-8 text"):
        read_documents(tmp_path / "c.py")


def test_command(model, small_tokenizer, tmp_path):
    save_model(model, tmp_path / "m")
    small_tokenizer.save(tmp_path / "m")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": CODE}))
    command = [sys.executable, ROOT / "evaluate.py", "--model", tmp_path / "m", "--device", "cpu"]
    out = subprocess.run([*command, "--text", tmp_path / "a.jsonl"], capture_output=True,
                         text=True, check=True).stdout
    score = bits_per_byte(model, small_tokenizer, [{"text": CODE}])
    assert f"{score:.3f}" in out and "1 documents" in out and "gzip" in out
    done = subprocess.run([*command, "--text", tmp_path / "no"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_batch_says_what_each_prompt_says_alone(model, small_tokenizer):
    """Ends included: a stop string, the tokens run out, a prompt longer than the context."""
    prompts = [small_tokenizer.encode(text) for text in
               ("def", CODE[:40], CODE[:17], CODE * 2, "class Stack:")]
    alone = [complete(model, small_tokenizer, [prompt], 20, ["e", "\n"])[0] for prompt in prompts]
    assert complete(model, small_tokenizer, prompts, 20, ["e", "\n"]) == alone
    for text, _ in alone:
        assert "e" not in text and "\n" not in text
    [(text, stopped)] = complete(model, small_tokenizer, prompts[:1], 20)
    assert not stopped and text.startswith(alone[0][0])


def test_the_newest_model_on_everything(model, small_tokenizer, tmp_path):
    save_model(model, tmp_path / "pretrain")
    small_tokenizer.save(tmp_path / "pretrain")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.jsonl").write_text(json.dumps({"text": CODE}))
    command = [sys.executable, ROOT / "evaluate.py", "--out", tmp_path, "--device", "cpu"]
    done = subprocess.run([*command, "--limit", "3", "--n", "2", "--temperature", "0.8"],
                          capture_output=True, text=True)
    if "weak-sandbox" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "evaluate" / "pretrain.json").read_text())["scores"]
    assert scores["ladder"]["samples"] == 6 and scores["ladder"]["problems"] == 3
    assert 0 <= scores["infilling"]["edit similarity"] < 60
    assert scores["bits per byte"]["gzip"] > 2
    assert "| ladder | pass@1 | 0 |" in (tmp_path / "evaluate" / "pretrain.md").read_text()
    missing = subprocess.run([*command, "--benchmark", "infilling-multi-line"], text=True,
                             capture_output=True, env={**os.environ, "MINICODER_CACHE": "/nowhere"})
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "put HumanEval-MultiLineInfilling.jsonl.gz to /nowhere" in missing.stderr


def test_humaneval_fim(model, small_tokenizer, tmp_path, monkeypatch):
    """The first line of what was filled in counts; the mean is over all samples."""
    rows = [{"prompt": "a", "suffix": "b" * 600, "canonical_solution": "  x = 1", "language": name}
            for name in ("py", "py", "js")]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = []

    def answers(model, tokenizer, prompts, *rest, **options):
        asked.extend(prompts)
        return [("\n  x = 1\ny", True), ("x = 2", False), ("", True)]

    monkeypatch.setattr(evaluate, "complete", answers)
    model.config.max_position_embeddings = 128
    scores = evaluate.humaneval_fim(model, small_tokenizer, tmp_path / "f.jsonl")
    assert scores["humaneval-fim py"] == {"exact match": 0.5, "edit similarity": 90.0,
                                          "stopped": 0.5}
    assert scores["humaneval-fim js"]["edit similarity"] == 0
    assert scores["humaneval-fim all"]["exact match"] == pytest.approx(1 / 3)
    assert all(len(prompt) <= 128 - 64 for prompt in asked)
    (tmp_path / "f.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(InputError, match="expected rows with prompt"):
        evaluate.humaneval_fim(model, small_tokenizer, tmp_path / "f.jsonl")


def test_starts_without_torch():
    code = "import sys; sys.path.insert(0, '.'); import evaluate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n"
