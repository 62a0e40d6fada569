"""pytest tests/test_batches.py"""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CODE

import data
from data import Batches
from fim import MIDDLE, PREFIX, SUFFIX, fim_document
from support.files import InputError
from tokenizer import Tokenizer


def document(text, path, source="s"):
    return {"text": text, "path": path, "source": source, "repo": "r", "language": "python",
            "bytes": len(text), "text_bytes": len(text), "kind": "code"}


@pytest.fixture(scope="module")
def corpus():
    long = [document(CODE.replace("item", f"item{i}") * (1 + i % 5), f"{i}.py") for i in range(12)]
    short = [document(f"x = {i}\n" * (1 + i % 3), f"short{i}.py") for i in range(8)]
    return long + short


def make(corpus, tokenizer, **other):
    tokens = data.tokens_in_memory(corpus, tokenizer)
    return Batches(tokens, tokenizer, **{"seq_len": 64, "batch_rows": 8, **other})


def check_document_starts(starts):
    """Each start, (B, T), is its own index or that of the token before it: the attention kernels
    rely on it, and cannot check it themselves without stopping the GPU."""
    before = np.concatenate([np.zeros_like(starts[:, :1]), starts[:, :-1]], axis=1)
    assert ((starts == before) | (starts == np.arange(starts.shape[1]))).all()


def test_without_fim_the_targets_are_those_of_the_reference(corpus, small_tokenizer):
    tokens = data.tokens_in_memory(corpus, small_tokenizer)
    batches = make(corpus, small_tokenizer, fim_rate=0.0)
    file = batches.files["code"]
    starts = [file.start(index) for index in range(60)]
    input_ids, targets = data.plain_batch(tokens["code"], 64, starts)
    for index in range(60):
        sequence = batches.sequence(index)
        assert np.array_equal(sequence[0], input_ids[index])
        assert np.array_equal(sequence[1], targets[index])
        documents = np.flatnonzero(input_ids[index] == batches.end)
        assert sequence[2].tolist() == [max([0, *documents[documents <= i]]) for i in range(64)]


def test_a_sequence_of_segments():
    sequence = data.Sequence()
    sequence.add([5, 6, 7], [6, 7, -100])
    sequence.add([8, 9], [9, 0])
    sequence.pad(2, 1)
    input_ids, targets, starts = (array.tolist() for array in sequence.arrays())
    assert input_ids == [5, 6, 7, 8, 9, 1, 1]
    assert targets == [6, 7, -100, 9, 0, -100, -100]
    assert starts == [0, 0, 0, 3, 3, 5, 5]


@pytest.mark.parametrize("repositories", [False, True])
def test_document_starts_are_what_the_kernels_expect(corpus, small_tokenizer, repositories):
    batches = make(corpus, small_tokenizer, fim_rate=0.5, repositories=repositories)
    for step in range(20):
        for batch in batches(step):
            check_document_starts(batch["document_starts"].numpy())


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


def test_a_mixture_holds_in_every_window(corpus, small_tokenizer):
    """Of any 40 rows in a row 28, 8 and 4, give or take one; each kind goes on where it was."""
    corpus = corpus + [{**d, "kind": kind, "text": f"{kind} " * 3 + d["text"]}
                       for kind in ("text", "math") for d in corpus]
    batches = make(corpus, small_tokenizer, fim_rate=1.0)
    kinds = [batches.chunk(index)[0] for index in range(400)]
    for start in range(360):
        window = kinds[start:start + 40]
        assert [window.count(kind) for kind in ("code", "text", "math")] == pytest.approx(
            [28, 8, 4], abs=1)
    for kind in ("code", "text", "math"):
        chunks = [batches.chunk(i)[1] for i in range(400) if kinds[i] == kind]
        file = batches.files[kind]
        assert chunks == [file.chunk(i) for i in range(len(chunks))]
        fim = [small_tokenizer.special[PREFIX] in batches.sequence(i)[0] for i in range(400)
               if kinds[i] == kind]
        assert any(fim) == (kind == "code")                     # text and math are read as they are
    only = make(corpus, small_tokenizer, mixture=(0, 3, 1))
    assert "-".join(only.round) in ("text-text-math-text", "text-math-text-text")
    with pytest.raises(InputError, match="no documents of the mixture"):
        make([d for d in corpus if d["kind"] == "code"], small_tokenizer, mixture=(0, 1, 1))
    for wrong in ("70", "70:20", "0:0:0", "a:b:c", "1:2:-3"):
        with pytest.raises(InputError, match="as in 70:20:10"):
            data.parse_mixture(wrong)


def test_fim_rows(corpus, small_tokenizer):
    """Every FIM piece is whole inside its row, holds the text of its slice, and is closed."""
    batches = make(corpus, small_tokenizer, fim_rate=1.0)
    special, pieces, lost = small_tokenizer.special, 0, 0
    for index in range(80):
        inputs, targets, starts = (column.tolist() for column in batches.sequence(index))
        ids = inputs + [targets[-1]]
        assert len(inputs) == len(targets) == len(starts) == 64
        for i in range(63):
            assert starts[i + 1] == i + 1 or targets[i] in (inputs[i + 1], -100, batches.end)
        source = small_tokenizer.decode(batches.chunk(index)[1])
        for at in [i for i, token in enumerate(ids) if token == special[PREFIX]]:
            suffix, middle = ids.index(special[SUFFIX], at), ids.index(special[MIDDLE], at)
            close = next(i for i in range(middle + 1, 65) if targets[i - 1] == batches.end)
            assert at < suffix < middle < close and len(set(starts[at:close])) == 1
            parts = [small_tokenizer.decode(ids[a + 1:b]) for a, b in
                     ((at, suffix), (middle, close), (suffix, middle))]
            assert "".join(parts) in source
            pieces += 1
        lost += targets.count(-100)
    assert pieces > 80 and lost < 0.03 * 80 * 64


def test_a_fim_example_is_cut_at_its_ends(corpus, small_tokenizer, monkeypatch):
    """The middle stays whole: the suffix loses its end, then the prefix its start."""
    batches, ids = make(corpus, small_tokenizer), small_tokenizer.encode(CODE)[:40]
    text, special = small_tokenizer.decode(ids), small_tokenizer.special
    lost = Counter()
    for seed in range(300):
        rng, again = (np.random.default_rng(seed) for _ in range(2))
        new = batches.fim_example(ids, rng)
        prefix, middle, suffix = fim_document(text, again)
        at = [new.index(special[name]) for name in (PREFIX, SUFFIX, MIDDLE)]
        parts = [small_tokenizer.decode(new[a + 1:b]) for a, b in zip(at, [*at[1:], None])]
        assert at == sorted(at) and len(new) <= len(ids) and parts[2] == middle
        assert prefix.endswith(parts[0]) and suffix.startswith(parts[1])
        lost["suffix"] += parts[1] != suffix
        lost["prefix"] += parts[0] != prefix
        assert parts[0] == prefix or parts[1] == ""
    assert lost["suffix"] > 200 and 0 < lost["prefix"] < 150
    monkeypatch.setattr(data, "fim_document", lambda text, rng: ("", text, ""))
    assert batches.fim_example(ids, np.random.default_rng(0)) is None       # the middle is too long


def test_fim_rate_is_held(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer, fim_rate=0.5)
    pieces = fim = parts = 0
    for index in range(400):
        if batches.end not in batches.chunk(index)[1][1:-1]:        # all of one document
            inputs, _, starts = batches.sequence(index)
            pieces += 1
            cut = (inputs == batches.tokenizer.special[PREFIX]).sum()
            fim, parts = fim + (cut > 0), parts + cut
            assert (cut > 0) == starts.any()        # what is not FIM stays one document
    assert fim / pieces == pytest.approx(0.5, abs=0.08)
    assert 2 < parts / fim < 4                      # of 16 to 25 tokens, in 64


def test_a_row_depends_on_seed_step_and_place_alone(corpus, small_tokenizer):
    one = make(corpus, small_tokenizer, device_batch=4)
    again = make(corpus, small_tokenizer, device_batch=4)
    again(7)                                                # another history
    two = [make(corpus, small_tokenizer, device_batch=2, rank=rank, world=2) for rank in range(2)]
    for step in (0, 1, 30):
        rows = torch.cat([batch["input_ids"] for batch in one(step)])
        assert torch.equal(rows, torch.cat([batch["input_ids"] for batch in again(step)]))
        assert torch.equal(rows, torch.cat([batch["input_ids"] for b in two for batch in b(step)]))
        count = sum(batch["count"] for batch in one(step))
        assert count == sum(batch["count"] for b in two for batch in b(step))
    other = make(corpus, small_tokenizer, seed=1)
    assert not torch.equal(one(0)[0]["input_ids"], other(0)[0]["input_ids"][:4])


def test_batches_refuse_what_cannot_work(corpus, small_tokenizer):
    with pytest.raises(InputError, match="too few for sequences of 4096"):
        make(corpus[:2], small_tokenizer, seq_len=4096)
    with pytest.raises(InputError, match="8 sequences per step cannot be shared evenly by 3 proc"):
        make(corpus, small_tokenizer, world=3)


def test_fim_of_repositories(corpus, small_tokenizer):
    """Of what a sequence holds of a repository, the last file becomes FIM, after its path."""
    chunks = data.encoded_repositories([corpus * 3], small_tokenizer, 160)
    tokens = np.concatenate(list(data.joined(chunks, small_tokenizer.special["<|endoftext|>"])))
    batches = Batches({"code": tokens}, small_tokenizer, 160, 8, fim_rate=1.0, repositories=True)
    special, paths, cut = small_tokenizer.special, 0, 0
    for index in range(60):
        inputs, targets, starts = (column.tolist() for column in batches.sequence(index))
        source = small_tokenizer.decode(batches.chunk(index)[1])
        for start in sorted(set(starts)):
            stop = max(i for i in range(160) if starts[i] == start) + 1
            places = [i for i in range(start, stop) if inputs[i] == special[PREFIX]]
            if not places:
                continue
            before = small_tokenizer.decode(inputs[start:places[0]])
            assert before in source and data.FILE_SEP not in small_tokenizer.decode(
                inputs[places[0]:stop])
            paths += bool(re.search(r"<.file_sep.>\d+\.py\n+$", before))
            [at] = places                               # what is seen begins anew with each part
            end = next(i for i in range(at, stop) if targets[i] == batches.end)
            prefix, suffix, middle = re.fullmatch(
                r"(?s)<.fim_prefix.>(.*)<.fim_suffix.>(.*)<.fim_middle.>(.*)",
                small_tokenizer.decode(inputs[at:end + 1])).groups()
            assert prefix + middle + suffix in source
            cut += 1
    assert 25 < paths < cut and cut > 120


@pytest.fixture
def out(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    mixed = [{**d, "repo": f"r{i % 2}"} for i, d in enumerate(corpus)]
    mixed += [{**d, "kind": kind, "text": f"{kind} {d['text']}"} for kind in
              ("grounding", "text", "math") for d in corpus[:5]]
    write_train(tmp_path, mixed)
    return tmp_path


def write_train(out, documents):
    (out / "data" / "train.jsonl").write_text("".join(
        json.dumps(document) + "\n" for document in documents))


def test_token_files(out, small_tokenizer):
    """They hold what tokens_in_memory() gives for the same documents, and are written once."""
    folder = data.prepare_tokens(out, small_tokenizer, 160)
    assert folder == data.token_folder(out, small_tokenizer)
    assert re.fullmatch("tokens-[0-9a-f]{8}", folder.name)
    documents = data.load_documents(out, "train")
    expected = data.tokens_in_memory(documents, small_tokenizer)
    tokens = data.map_tokens(folder)
    assert list(tokens) == ["code", "text", "math"] == list(expected)
    for kind, ids in tokens.items():
        assert isinstance(ids, np.memmap) and ids.dtype == np.uint32
        assert np.array_equal(ids, expected[kind])
    end = small_tokenizer.special["<|endoftext|>"]
    texts = small_tokenizer.decode(tokens["math"].tolist()).split("<|endoftext|>")
    assert texts[1:-1] == [d["text"] for d in documents if d["kind"] == "math"]
    repositories = data.map_tokens(folder, 160)["code"]
    chunks = [chunk for name in ("r", "r0", "r1") for chunk in data.repository_chunks(
        [d for d in documents if d["repo"] == name and d["kind"] in ("code", "grounding")],
        small_tokenizer, 160)]
    assert np.array_equal(repositories, np.concatenate(list(data.joined(chunks, end))))
    one = Batches(tokens, small_tokenizer, 64, 8)
    two = Batches(expected, small_tokenizer, 64, 8)
    for index in range(20):
        assert np.array_equal(one.sequence(index), two.sequence(index))
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    data.prepare_tokens(out, small_tokenizer)
    data.prepare_tokens(out, small_tokenizer, 160)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_token_files_follow_the_data_and_the_tokenizer(out, small_tokenizer):
    folder = data.prepare_tokens(out, small_tokenizer, 160)
    other = data.prepare_tokens(out, Tokenizer.train([CODE], 380))
    assert other != folder
    write_train(out, [document("value = 1\n", "a.py")])
    data.prepare_tokens(out, small_tokenizer)
    assert small_tokenizer.decode(data.map_tokens(folder)["code"].tolist()) == (
        "<|endoftext|>value = 1\n<|endoftext|>")
    assert list(data.map_tokens(folder)) == ["code"]
    data.prepare_tokens(out, small_tokenizer, 160)          # that of the old data is not used
    assert "<|repo_name|>r\n<|file_sep|>a.py" in small_tokenizer.decode(
        data.map_tokens(folder, 160)["code"].tolist())


def test_token_files_after_a_kill(out, small_tokenizer, monkeypatch):
    """What is not finished is written again; nothing half-written has the final name."""
    def killed(*args):
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "encoded_repositories", killed)
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
