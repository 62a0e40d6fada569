"""Files, folders and downloads: what every stage does with them, and how a command ends."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import requests
from tqdm import tqdm


class InputError(Exception):
    """Something the user gave cannot be used. The message is the one line that is shown."""


def run(main):
    """Call a script's main(); what is wrong outside the code ends in one line and exit code 2."""
    with contextlib.suppress(AttributeError):           # a stream of a test's own
        sys.stdout.reconfigure(errors="replace")        # names of files may hold anything
    try:
        main()
    except (InputError, OSError) as error:
        line = str(error).replace("\n", "\\n")          # the name of a file may hold one
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def read_text(path, newline=None):
    """The text of a UTF-8 file; InputError if it is missing or something else.
    newline: "" leaves line ends as they are, else each becomes a line feed."""
    try:
        with open(path, encoding="utf-8", newline=newline) as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path):
    """The JSON value in a file; InputError names the file and the line that is broken."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)      # it has none if a number or the nesting is too long
        raise InputError(f"{path}, line {line}: not valid JSON; the file is cut off or damaged, "
                         "copy or download it again") from None


def write_text(path, text):
    """Write a file whole or not at all."""
    beside = Path(f"{path}.writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path, value):
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(path):
    """Yield a folder beside path that becomes path if the block succeeds; else path stays."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        move_folder(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def move_folder(source, target):
    """Flush a finished folder to the disk and rename it to target, in place of what was there."""
    for file in (*source.rglob("*"), source):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def cache_folder():
    """Where downloaded files lie; the environment variable MINICODER_CACHE names another place."""
    return Path(os.environ.get("MINICODER_CACHE", Path.home() / ".cache" / "minicoder"))


def download(url, part, largest):
    """Append to the file part what it lacks of url. requests.RequestException: not all came;
    InputError: more than `largest` bytes."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=60) as reply:
        if reply.status_code == 416 and have:               # nothing is lacking
            return
        if reply.status_code == 429 or reply.status_code >= 500:
            raise requests.RequestException(reply.status_code)
        if reply.status_code >= 400:
            raise InputError(f"{url}: the server answers {reply.status_code}")
        if reply.status_code != 206:                        # it cannot resume: from the start
            have = 0
        size = have + int(reply.headers.get("Content-Length", 0))
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with open(part, "ab" if have else "wb") as file, bar:
            for block in reply.iter_content(1 << 16):
                bar.update(file.write(block))
                if file.tell() > largest:
                    raise InputError(f"{url}: larger than {largest:,} bytes")


def fetch(url, path, sha256=None, largest=1 << 40):
    """Download url to path, whole or not at all; a broken download goes on where it stopped.

    Raises InputError if the server has no such file, it is larger, or its SHA-256 is another one.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (2, 1, 0):                                  # tries
        try:
            download(url, part, largest)
            break
        except requests.RequestException as error:          # a short reply is one of them
            if not left:
                raise InputError(f"{url}: cannot be downloaded ({type(error).__name__}); "
                                 "the same command goes on where it stopped") from None
    if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise InputError(f"{url}: not the expected file (its SHA-256 differs)")
    os.rename(part, path)
    return path


def weight_names(folder):
    """The safetensors files that a checkpoint folder's index lists; without an index, the one."""
    index = Path(folder) / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    data = read_json(index)
    found = data.get("weight_map") if isinstance(data, dict) else None
    names = sorted(set(map(str, found.values()))) if isinstance(found, dict) else []
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise InputError(f"{index}: has no weight_map to safetensors files beside it")
    return names


def hub_folder(name, weights=True):
    """The local folder of a checkpoint: name itself if it is a folder, else fetched and cached.

    name: a path, or a hub name such as Qwen/Qwen2.5-Coder-0.5B. weights=False leaves them out.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise InputError(f"{name}: no such folder (a hub name looks like Qwen/Qwen2.5-Coder-0.5B)")
    folder = cache_folder() / str(name).replace("/", "--")
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")

    def get(file):
        return fetch(f"{host}/{name}/resolve/main/{file}", folder / file)

    try:
        for file in ("config.json", "tokenizer.json"):
            get(file)
    except InputError as error:
        raise InputError(f"{name}: no such folder, nor can it be fetched: {error}") from None
    if weights and not (folder / "model.safetensors").exists():
        with contextlib.suppress(InputError):               # small models have no index
            get("model.safetensors.index.json")
        for file in weight_names(folder):
            get(file)
    return folder


def read_rows(path):
    """The rows of a .jsonl or .json file, also compressed; InputError names file and line."""
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: cut off, or no text") from None
    rows, number = [], 1
    try:
        lines = json.loads(text) if text.startswith("[") else text.split("\n")
        for number, line in enumerate(lines, 1):
            if not isinstance(line, str) or line.strip():
                rows.append((number, {**(json.loads(line) if isinstance(line, str) else line)}))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path}, line {number}: not a JSON object") from None
    return rows
