"""pytest tests/test_files.py: support/files.py"""

import codecs
import gzip
import json
import os
import sys

import pytest

from support.files import InputError, read_json, read_rows, run

ROWS = [{"text": "é"}, {"text": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("mark,encoding", [
    (b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF32_LE, "utf-32-le")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_json_in_any_encoding(tmp_path, mark, encoding, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(mark + LINES.encode(encoding)))
    assert read_rows(path) == [(1, ROWS[0]), (2, ROWS[1])]
    path.write_bytes(pack(mark + json.dumps(ROWS, indent=1).encode(encoding)))
    assert read_json(path) == ROWS
    assert [row for _, row in read_rows(path)] == ROWS


def test_concatenated_files_with_byte_order_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((codecs.BOM_UTF8 + LINES.encode()) * 2)
    assert read_rows(path) == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[0]), (4, ROWS[1])]


@pytest.mark.parametrize("read,content,message", [
    (read_rows, f"{LINES}\n{{\n".encode(), "line 4: not a JSON object"),
    (read_rows, f"{LINES}\n5\n".encode(), "line 4: not a JSON object"),
    (read_rows, f"{LINES}\nnull\n".encode(), "line 4: not a JSON object"),
    (read_json, b'{"a":\n1,,}', "line 2: not valid JSON"),
    (read_rows, gzip.compress(LINES.encode())[:-5], "gzip file that is damaged or cut off"),
    (read_json, None, "no such file")])
def test_broken_json_is_reported_in_one_line(tmp_path, read, content, message):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"a.jsonl.*{message}"):
        read(path)


@pytest.mark.parametrize("count", [5, 100_000])
def test_a_reader_that_ends_early(monkeypatch, capfd, count):
    """As in `python script.py | head -1`: no message, even if the output fits into the buffer."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as error:
            run(lambda: print("x\n" * count))
    assert error.value.code == 141 and capfd.readouterr().err == ""
