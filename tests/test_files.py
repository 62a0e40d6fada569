"""pytest tests/test_files.py: support/files.py"""

import codecs
import gzip
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from support.files import InputError, read_json, read_rows

ROWS = [{"text": "é"}, {"text": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("mark,encoding", [
    (b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_byte_order_marks(tmp_path, mark, encoding, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(mark + LINES.encode(encoding)))
    assert read_rows(path) == [(1, ROWS[0]), (2, ROWS[1])]
    path.write_bytes(pack(mark + json.dumps(ROWS, indent=1).encode(encoding)))
    assert read_json(path) == ROWS
    assert [row for _, row in read_rows(path)] == ROWS


def test_files_with_byte_order_marks_that_were_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((codecs.BOM_UTF8 + LINES.encode()) * 2)
    assert read_rows(path) == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[0]), (4, ROWS[1])]


def test_broken_json_is_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for broken in ("{", "5", '"text"', "null"):
        path.write_text(f"{LINES}\n{broken}\n")
        with pytest.raises(InputError, match="a.jsonl, line 4: not a JSON object"):
            read_rows(path)
    path.write_text('{"a":\n1,,}')
    with pytest.raises(InputError, match="a.jsonl, line 2: not valid JSON"):
        read_json(path)
    path.write_bytes(gzip.compress(LINES.encode())[:-5])
    with pytest.raises(InputError, match="a.jsonl: a gzip file that is damaged or cut off"):
        read_rows(path)
    with pytest.raises(InputError, match="b.jsonl: no such file"):
        read_json(tmp_path / "b.jsonl")


@pytest.mark.parametrize("count", [5, 100_000])
def test_a_reader_that_has_enough(count):
    """As `python script.py | head -1`: nothing on stderr, even if all fits into the buffer."""
    script = ("import sys; from support.files import run\n"
              f"def main():\n    for i in range({count}): print(i)\n"
              "    sys.stdin.read()\n"
              "run(main)")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if count > 5:
        assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()
