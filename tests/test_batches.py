"""pytest tests/test_batches.py"""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import CODE

import data
from data import Batches
from fim import MIDDLE, PREFIX, SUFFIX
from support.files import InputError
from tokenizer import Tokenizer


def document(text, path, **changes):
    return {"text": text, "path": path, "source": "s", "repo": "r", "language": "python",
            "bytes": len(text), "text_bytes": len(text), "kind": "code", **changes}


@pytest.fixture(scope="module")
def corpus():
    long = [document(CODE.replace("item", f"item{i}") * (1 + i % 5), f"{i}.py") for i in range(12)]
    short = [document(f"x = {i}\n" * (1 + i % 3), f"short{i}.py") for i in range(8)]
    return long + short


def make(corpus, tokenizer, **settings):
    tokens = data.tokens_in_memory(corpus, tokenizer)
    return Batches(tokens, tokenizer, **{"seq_len": 64, "batch_rows": 8, **settings})


def check_document_starts(starts):
    """Each start, (T,), is its own index or that of the token before it: the attention kernels rely
    on it, and cannot check it themselves without stopping the GPU."""
    before = np.concatenate([[0], starts[:-1]])
    assert ((starts == before) | (starts == np.arange(len(starts)))).all()


# ---- from token files to sequences


def test_without_fim_the_targets_equal_the_reference(corpus, small_tokenizer):
    tokens = data.tokens_in_memory(corpus, small_tokenizer)
    batches = make(corpus, small_tokenizer, fim_rate=0.0)
    starts = [batches.files["code"].start(index) for index in range(60)]
    input_ids, targets = data.plain_batch(tokens["code"], 64, starts)
    for index in range(60):
        sequence = batches.sequence(index)
        assert np.array_equal(sequence[0], input_ids[index])
        assert np.array_equal(sequence[1], targets[index])
        documents = np.flatnonzero(input_ids[index] == batches.end)
        assert sequence[2].tolist() == [max([0, *documents[documents <= i]]) for i in range(64)]


def test_an_epoch_visits_every_chunk_once(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer)
    file = batches.files["code"]
    n = file.chunks
    epochs = []
    for epoch in range(2):
        chunks = [batches.chunk(epoch * n + i) for i in range(n)]
        expected = [("code", file.ids[file.offset + i * 64:file.offset + i * 64 + 65].tolist())
                    for i in range(n)]
        assert sorted(chunks) == sorted(expected)
        epochs.append(chunks)
    assert epochs[0] != epochs[1]
    assert batches.epochs(n) == {"code": 8.0}


def test_the_mixture_holds_in_every_window(corpus, small_tokenizer):
    """Of any 40 sequences in a row 28, 8 and 4, give or take one."""
    corpus = corpus + [{**d, "kind": kind, "text": f"{kind} " * 3 + d["text"]}
                       for kind in ("text", "math") for d in corpus]
    batches = make(corpus, small_tokenizer, fim_rate=1.0)
    kinds = [batches.chunk(index)[0] for index in range(400)]
    for start in range(360):
        window = kinds[start:start + 40]
        assert [window.count(kind) for kind in ("code", "text", "math")] == pytest.approx(
            [28, 8, 4], abs=1)
    for kind in ("code", "text", "math"):
        indices = [i for i in range(400) if kinds[i] == kind]
        chunks = [batches.files[kind].chunk(n) for n in range(len(indices))]
        assert [batches.chunk(i)[1] for i in indices] == chunks
        fim = [small_tokenizer.special[PREFIX] in batches.sequence(i)[0] for i in indices]
        assert any(fim) == (kind == "code")


def test_a_sequence_depends_on_seed_step_and_index_only(corpus, small_tokenizer):
    one = make(corpus, small_tokenizer, device_batch=4)
    again = make(corpus, small_tokenizer, device_batch=4)
    again(7)                                                # its history does not matter
    two = [make(corpus, small_tokenizer, device_batch=2, rank=rank, world=2) for rank in range(2)]
    for step in (0, 1, 30):
        shares = [batch for batches in two for batch in batches(step)]
        input_ids = torch.cat([batch["input_ids"] for batch in one(step)])
        assert torch.equal(input_ids, torch.cat([batch["input_ids"] for batch in again(step)]))
        assert torch.equal(input_ids, torch.cat([batch["input_ids"] for batch in shares]))
        assert (sum(batch["count"] for batch in one(step))
                == sum(batch["count"] for batch in shares))
    other = make(corpus, small_tokenizer, seed=1)
    assert not torch.equal(one(0)[0]["input_ids"], other(0)[0]["input_ids"][:4])


@pytest.mark.parametrize("settings,message", [
    (dict(seq_len=4096), "too few for sequences of 4096"),
    (dict(world=3), "8 sequences per step cannot be shared evenly by 3 proc"),
    (dict(mixture=(0, 1, 1)), "no documents of the mixture")])
def test_batches_that_cannot_work_are_refused(corpus, small_tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        make(corpus[:3], small_tokenizer, **settings)


@pytest.mark.parametrize("text", ["70", "70:20", "0:0:0", "a:b:c", "1:2:-3"])
def test_a_mixture_is_three_numbers(text):
    with pytest.raises(InputError, match="as in 70:20:10"):
        data.parse_mixture(text)


# ---- fill-in-the-middle


def test_fim_examples_in_a_sequence(corpus, small_tokenizer):
    """Each is whole, holds text of its chunk, is closed, and sees nothing else."""
    batches = make(corpus, small_tokenizer, fim_rate=1.0)
    special = small_tokenizer.special
    examples = lost = 0
    for index in range(80):
        sequence = batches.sequence(index)
        check_document_starts(sequence[2])
        inputs, targets, starts = (column.tolist() for column in sequence)
        ids = inputs + [targets[-1]]
        assert len(inputs) == len(targets) == len(starts) == 64
        for i in range(63):
            assert starts[i + 1] == i + 1 or targets[i] in (inputs[i + 1], -100, batches.end)
        source = small_tokenizer.decode(batches.chunk(index)[1])
        for prefix in [i for i, token in enumerate(ids) if token == special[PREFIX]]:
            suffix, middle = ids.index(special[SUFFIX], prefix), ids.index(special[MIDDLE], prefix)
            close = next(i for i in range(middle + 1, 65) if targets[i - 1] == batches.end)
            assert prefix < suffix < middle < close and len(set(starts[prefix:close])) == 1
            bounds = (prefix, suffix), (middle, close), (suffix, middle)
            parts = [small_tokenizer.decode(ids[a + 1:b]) for a, b in bounds]
            assert "".join(parts) in source
            examples += 1
        lost += targets.count(-100)
    assert examples > 80 and lost < 0.03 * 80 * 64


def test_fim_in_repositories(corpus, small_tokenizer):
    """The last file of each repository in a sequence becomes FIM examples, after its path."""
    chunks = data.encoded_repositories([corpus * 3], small_tokenizer, 160)
    tokens = np.concatenate(list(data.joined(chunks, small_tokenizer.special["<|endoftext|>"])))
    batches = Batches({"code": tokens}, small_tokenizer, 160, 8, fim_rate=1.0, repositories=True)
    prefix_id = small_tokenizer.special[PREFIX]
    paths = examples = 0
    for index in range(60):
        sequence = batches.sequence(index)
        check_document_starts(sequence[2])
        inputs, targets, starts = (column.tolist() for column in sequence)
        source = small_tokenizer.decode(batches.chunk(index)[1])
        for start, stop in pairwise([*sorted(set(starts)), 160]):
            if prefix_id not in inputs[start:stop]:
                continue
            prefix = inputs.index(prefix_id, start)
            before = small_tokenizer.decode(inputs[start:prefix])
            assert before in source and data.FILE_SEP not in small_tokenizer.decode(
                inputs[prefix:stop])
            paths += bool(re.search(r"<.file_sep.>\d+\.py\n+$", before))
            end = next(i for i in range(prefix, stop) if targets[i] == batches.end)
            parts = re.fullmatch(r"(?s)<.fim_prefix.>(.*)<.fim_suffix.>(.*)<.fim_middle.>(.*)",
                                 small_tokenizer.decode(inputs[prefix:end + 1]))
            assert parts[1] + parts[3] + parts[2] in source
            examples += 1
    assert 25 < paths < examples and examples > 120


def test_the_fim_rate_is_met(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer, fim_rate=0.5)
    chunks = fim = examples = 0
    for index in range(400):
        if batches.end not in batches.chunk(index)[1][1:-1]:        # all of one document
            inputs, _, starts = batches.sequence(index)
            count = (inputs == batches.tokenizer.special[PREFIX]).sum()
            chunks += 1
            fim += count > 0
            examples += count
            assert (count > 0) == starts.any()      # without FIM it stays one document
    assert fim / chunks == pytest.approx(0.5, abs=0.08)
    assert 2 < examples / fim < 4                   # of 16 to 25 tokens, in 64


# ---- from documents to token files


def write_train(out, documents):
    (out / "data" / "train.jsonl").write_text("".join(
        json.dumps(document) + "\n" for document in documents))


@pytest.fixture
def out(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    mixed = [{**d, "repo": f"r{i % 2}"} for i, d in enumerate(corpus)]
    mixed += [{**d, "kind": kind, "text": f"{kind} {d['text']}"} for kind in
              ("grounding", "text", "math") for d in corpus[:5]]
    write_train(tmp_path, mixed)
    return tmp_path


def test_token_files_hold_the_documents_in_order(out, small_tokenizer):
    folder = data.prepare_tokens(out, small_tokenizer, 160)
    assert re.fullmatch("tokens-[0-9a-f]{8}", folder.name)
    documents = data.load_documents(out, "train")
    expected = data.tokens_in_memory(documents, small_tokenizer)
    tokens = data.map_tokens(folder)
    assert list(tokens) == ["code", "text", "math"] == list(expected)
    for kind, ids in tokens.items():
        assert isinstance(ids, np.memmap) and ids.dtype == np.uint32
        assert np.array_equal(ids, expected[kind])
    texts = small_tokenizer.decode(tokens["math"].tolist()).split("<|endoftext|>")
    assert texts[1:-1] == [d["text"] for d in documents if d["kind"] == "math"]
    repositories = data.map_tokens(folder, 160)["code"]
    code = [d for d in documents if d["kind"] in ("code", "grounding")]
    chunks = [chunk for name in ("r", "r0", "r1") for chunk in data.repository_chunks(
        [d for d in code if d["repo"] == name], small_tokenizer, 160)]
    end = small_tokenizer.special["<|endoftext|>"]
    assert np.array_equal(repositories, np.concatenate(list(data.joined(chunks, end))))
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    data.prepare_tokens(out, small_tokenizer, 160)                  # writes them only once
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_token_files_follow_the_data_and_the_tokenizer(out, small_tokenizer):
    folder = data.prepare_tokens(out, small_tokenizer, 160)
    assert data.prepare_tokens(out, Tokenizer.train([CODE], 380)) != folder
    write_train(out, [document("value = 1\n", "a.py")])
    data.prepare_tokens(out, small_tokenizer)
    assert list(data.map_tokens(folder)) == ["code"]
    assert small_tokenizer.decode(data.map_tokens(folder)["code"].tolist()) == (
        "<|endoftext|>value = 1\n<|endoftext|>")
    data.prepare_tokens(out, small_tokenizer, 160)
    assert "<|repo_name|>r\n<|file_sep|>a.py" in small_tokenizer.decode(
        data.map_tokens(folder, 160)["code"].tolist())


def test_token_files_after_an_interruption(out, small_tokenizer, monkeypatch):
    """An unfinished file is written again; nothing half-written has the final name."""
    def interrupted(*args):
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "encoded_repositories", interrupted)
        data.prepare_tokens(out, small_tokenizer, 160)
    folder = data.token_folder(out, small_tokenizer)
    assert (folder / "math.bin").exists() and not (folder / "repository_160.bin").exists()
    data.prepare_tokens(out, small_tokenizer, 160)
    assert len(data.map_tokens(folder, 160)["code"]) > 1000


def test_token_files_need_documents(tmp_path, small_tokenizer):
    with pytest.raises(InputError, match="train.jsonl: no such file; run `python data.py` first"):
        data.prepare_tokens(tmp_path, small_tokenizer)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    with pytest.raises(InputError, match='train.jsonl, line 2: expected {"text": "..."}'):
        data.prepare_tokens(tmp_path, small_tokenizer)
