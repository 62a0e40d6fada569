"""pytest tests/test_data.py"""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CODE

from data import (
    Batches,
    check_document_starts,
    documents,
    drop_duplicates,
    drop_near_copies,
    load_documents,
    prepare_data,
    prepare_tokenizer,
    shingles,
    split,
)
from fim import MIDDLE, PREFIX, SUFFIX
from tokenizer import InputError, Tokenizer


def document(text, path, source="s"):
    return {"text": text, "path": path, "source": source, "repo": "r", "language": "python"}


# ---- documents


def test_files_are_read_safely(tmp_path):
    root = tmp_path / "root"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "sub" / "node_modules").mkdir()
    (tmp_path / "secret.py").write_text("secret")
    for name, data in {"b.py": b"\xef\xbb\xbfx = 1\r\n", "a.c": b"int x;\n", "sub/c.py": b"y\n",
                       "big.py": b"x" * 1_000_001, "latin.py": b"\xe9", "nul.py": b"a\0b",
                       "empty.py": b" \n", "picture.png": b"x", "sub/.git/d.py": b"z\n",
                       "sub/node_modules/e.js": b"z\n"}.items():
        (root / name).write_bytes(data)
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.py")
    dropped = Counter()
    found = list(documents(str(root), dropped))
    assert [(d["path"], d["text"], d["language"], d["repo"]) for d in found] == [
        ("a.c", "int x;\n", "c", "root"), ("b.py", "x = 1\n", "python", "root"),
        ("sub/c.py", "y\n", "python", "root")]
    assert dropped == {"over 1 MB": 1, "not UTF-8": 1, "binary": 1, "empty": 1,
                       "link or no plain file": 2}


def test_standard_library_without_tests():
    paths = [d["path"] for d in documents("stdlib")]
    assert {"json/decoder.py", "argparse.py"} <= set(paths) and len(paths) > 300
    assert len(set(paths)) == len(paths) and paths == [d["path"] for d in documents("stdlib")]
    assert not [path for path in paths if {"test", "tests", "encodings"} & set(path.split("/"))]


def test_missing_folder():
    with pytest.raises(InputError, match="--source nowhere: no such folder"):
        list(documents("nowhere"))


def test_exact_duplicates():
    dropped = Counter()
    corpus = [document("x", "b"), document("y", "c"), document("x", "a")]
    assert [d["path"] for d in drop_duplicates(corpus, dropped)] == ["a", "c"]
    assert dropped["exact duplicate"] == 1
    assert drop_duplicates(corpus[::-1], dropped) == drop_duplicates(corpus, dropped)
    both = [document("x", "a", "packages"), document("x", "b", "stdlib")]
    assert drop_duplicates(both, dropped) == both[1:]


def test_split_by_module():
    corpus = [document(f"{m}{f}" * 20, f"m{m}/f{f}.py") for m in range(40) for f in range(3)]
    train, validation = split(corpus)
    modules = [{d["path"].split("/")[0] for d in part} for part in (train, validation)]
    assert len(train) + len(validation) == 120 and not modules[0] & modules[1]
    assert 0.02 <= len(validation) / 120 <= 0.05
    assert split(corpus[::-1])[1] == [d for d in corpus[::-1] if d in validation]


def test_split_of_one_module_is_by_file():
    train, validation = split([document("x" * 9, f"src/f{i}.py") for i in range(30)])
    assert len(validation) == 1 and len(train) == 29


def test_held_out_text_is_the_same_with_packages():
    library = [document("x" * 9, f"m{i}.py", "stdlib") for i in range(40)]
    packages = [document("y" * 9, f"p{i}/a.py", "packages") for i in range(40)]
    train, validation = split(library + packages)
    assert validation == split(library)[1] and len(train) + len(validation) == 80


def test_too_little_to_split():
    with pytest.raises(InputError, match="1 documents are too few"):
        split([document("x", "a.py")])


def test_shingles_are_runs_of_five_words():
    assert len(shingles("a b c d")) == 0
    assert len(shingles("a b c d e f")) == 2
    assert set(shingles("a, b; c d e")) == set(shingles("a b c d\ne"))
    assert not set(shingles("a b c d e")) & set(shingles("b a c d e"))


def test_near_copies_of_held_out_code_are_left_out():
    words = [f"word{i}" for i in range(300)]
    held = document(" ".join(words), "held.py")
    near = document(" ".join(words[:260] + ["other"] * 40), "near.py")      # Jaccard 256/337
    far = document(" ".join(words[:150] + [f"new{i}" for i in range(150)]), "far.py")
    dropped = Counter()
    assert drop_near_copies([near, far, document("x", "short.py")], [held, far | {"text": CODE}],
                            dropped) == [far, document("x", "short.py")]
    assert dropped["like a held-out document"] == 1


def test_prepare_is_made_once(code_folder, tmp_path):
    about = prepare_data(tmp_path / "out", [code_folder])
    prepare_tokenizer(tmp_path / "out", 400)
    assert about["train"]["documents"] + about["validation"]["documents"] == 16
    made = (tmp_path / "out/data/train.jsonl").stat().st_mtime_ns
    assert prepare_data(tmp_path / "out", [code_folder]) == about
    assert (tmp_path / "out/data/train.jsonl").stat().st_mtime_ns == made
    with pytest.raises(InputError, match=r"was made from sources .*code'\], not \['stdlib'\]"):
        prepare_data(tmp_path / "out", ["stdlib"])
    with pytest.raises(InputError, match="was made from vocab_size 400, not 500"):
        prepare_tokenizer(tmp_path / "out", 500)
    prepare_tokenizer(tmp_path / "out", 500, fresh=True)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").vocab_size <= 500
    texts = [d["path"] for part in ("train", "validation")
             for d in load_documents(tmp_path / "out", part)]
    assert len(set(texts)) == 16


def test_prepare_is_the_same_everywhere(code_folder, tmp_path):
    for name in ("one", "two"):
        prepare_data(tmp_path / name, [code_folder])
        prepare_tokenizer(tmp_path / name, 400)
    for file in ("data/train.jsonl", "data/validation.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_empty_corpus(tmp_path):
    with pytest.raises(InputError, match="no source code found there"):
        prepare_data(tmp_path / "out", [tmp_path])
    assert not (tmp_path / "out").exists()


# ---- batches


@pytest.fixture(scope="module")
def corpus():
    long = [document(CODE.replace("item", f"item{i}") * (1 + i % 5), f"{i}.py") for i in range(12)]
    short = [document(f"x = {i}\n" * (1 + i % 3), f"short{i}.py") for i in range(8)]
    return long + short


def make(corpus, tokenizer, **other):
    return Batches(corpus, tokenizer, **{"seq_len": 64, "batch_rows": 8, **other})


def test_rows_without_fim_are_slices_of_the_stream(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer, fim_rate=0.0)
    for index in range(60):
        inputs, targets, starts = batches.row(index)
        ids = batches.slice(index)
        assert inputs.tolist() == ids[:-1] and targets.tolist() == ids[1:]
        opened = np.flatnonzero(inputs == batches.end)
        expected = [max([0, *opened[opened <= i]]) for i in range(64)]
        assert starts.tolist() == expected


@pytest.mark.parametrize("row,message", [
    ([0, 0, 1, 1], "document_starts[1, 2] is 1, expected 0 (as before) or 2"),      # begun before
    ([0, 1, 0, 0], "document_starts[1, 2] is 0, expected 1 (as before) or 2"),      # falls
    ([0, 0, 3, 3], "document_starts[1, 2] is 3"), ([1, 1, 2, 3], "document_starts[1, 0] is 1")])
def test_wrong_document_starts_are_refused(row, message):
    with pytest.raises(ValueError) as error:
        check_document_starts(np.array([[0, 1, 1, 3], row]))
    assert message in str(error.value)


def test_an_epoch_visits_every_slice_once(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer)
    n = batches.rows_per_epoch
    for epoch in range(2):
        slices = sorted(tuple(batches.slice(epoch * n + i)) for i in range(n))
        start = batches.offset
        expected = [tuple(batches.stream[start + i * 64:start + i * 64 + 65].astype(int))
                    for i in range(n)]
        assert slices == sorted(expected)
    first, second = ([tuple(batches.slice(epoch * n + i)) for i in range(n)] for epoch in range(2))
    assert first != second


def test_fim_rows(corpus, small_tokenizer):
    """Every FIM piece is whole inside its row, holds the text of its slice, and is closed."""
    batches = make(corpus, small_tokenizer, fim_rate=1.0)
    special, pieces, lost = small_tokenizer.special, 0, 0
    for index in range(80):
        inputs, targets, starts = (column.tolist() for column in batches.row(index))
        ids = inputs + [targets[-1]]
        assert len(inputs) == len(targets) == len(starts) == 64
        for i in range(63):
            assert targets[i] in (inputs[i + 1], -100, batches.end)
        source = small_tokenizer.decode(batches.slice(index))
        for at in [i for i, token in enumerate(ids) if token == special[PREFIX]]:
            suffix, middle = ids.index(special[SUFFIX], at), ids.index(special[MIDDLE], at)
            close = next(i for i in range(middle, 65)
                         if (targets[i - 1] if i == 64 else ids[i]) in (batches.end, -100))
            assert at < suffix < middle < close and targets[close - 1] == batches.end
            parts = [small_tokenizer.decode(ids[a + 1:b]) for a, b in
                     ((at, suffix), (middle, close), (suffix, middle))]
            assert "".join(parts) in source
            pieces += 1
        lost += targets.count(-100)
    assert pieces > 80 and lost < 0.03 * 80 * 64


def test_fim_rate_is_held(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer, fim_rate=0.5)
    long_pieces = fim = 0
    for index in range(400):
        inputs, targets, starts = batches.row(index)
        if (starts == 0).all():
            long_pieces += 1
            fim += int(batches.tokenizer.special[PREFIX] in inputs[:2])
    assert fim / long_pieces == pytest.approx(0.5, abs=0.08)


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
    with pytest.raises(InputError, match="too few for rows of 4096"):
        make(corpus[:2], small_tokenizer, seq_len=4096)
    with pytest.raises(InputError, match="8 rows a step cannot be shared evenly by 3 processes"):
        make(corpus, small_tokenizer, world=3)
