"""Files, folders and downloads, and how a command ends."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import zlib
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from urllib3.util import Retry


class InputError(Exception):
    """Input from the user that cannot be used. The message is the one line that is shown."""


def run(main):
    """Call a script's main(); bad input ends in one line on stderr and exit code 2."""
    with contextlib.suppress(AttributeError):           # under pytest it is not a text file
        sys.stdout.reconfigure(errors="replace")        # file names may not be UTF-8
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                             # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (InputError, OSError) as error:
        line = str(error).replace("\n", "\\n")          # file names may contain line feeds
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def read_text(path, newline=None):
    """The text of a UTF-8 file; InputError if it is missing or not UTF-8.
    newline: "" keeps line ends as they are, None makes each a line feed."""
    try:
        with open(path, encoding="utf-8", newline=newline) as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json_text(path):
    """The text of a .json or .jsonl file, which may be compressed (gzip). A byte order mark, as
    some editors and shells write it, is removed; it also tells UTF-16 and UTF-32 apart."""
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode(json.detect_encoding(data))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: a gzip file that is damaged or cut off; copy or download it "
                         "again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path):
    """The JSON value in a file; InputError names the file and the line that is broken."""
    try:
        return json.loads(read_json_text(path))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)      # none if a number is too long or nesting too deep
        raise InputError(f"{path}, line {line}: not valid JSON; the file is incomplete or damaged, "
                         "copy or download it again") from None


def read_rows(path):
    """The objects of a .jsonl file, or of a .json file with a list of them, which may be
    compressed: a list of (line number, dict). InputError names file and line."""
    text = read_json_text(path)
    rows = []
    number = 1
    try:
        lines = json.loads(text) if text.startswith("[") else text.split("\n")
        for number, line in enumerate(lines, 1):
            if isinstance(line, str):
                line = line.removeprefix("\ufeff").strip()      # after `cat` of several files
                if not line:
                    continue
                line = json.loads(line)
            rows.append((number, {**line}))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path}, line {number}: not a JSON object") from None
    return rows


def write_text(path, text):
    """Write a file completely or not at all."""
    beside = Path(f"{path}.writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path, value):
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def made_from(folder, settings):
    """The manifest of a folder; InputError if it was made from other settings."""
    manifest = read_json(folder / "manifest.json")
    for name, value in settings.items():
        if manifest.get(name) != value:
            raise InputError(f"{folder} was made from {name} {manifest.get(name)}, not {value}; "
                             "give another --out, or --fresh to replace it")
    return manifest


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
    """Flush a finished folder to the disk and rename it to target, replacing an older one."""
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


# Folders without source code of the project itself: copies of other projects, and what tools build
# from the sources. Hidden folders (.git, .tox) are skipped as well. Names such as venv, env and
# target are not listed because they may be ordinary packages (the standard library has a package
# venv). Virtual environments and caches of any name are recognized by a file in them (pyvenv.cfg,
# conda-meta; CACHEDIR.TAG, which Cargo writes).
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "bower_components", "site-packages",
                   "dist-packages", "vendor", "third_party", "build", "dist"}
SKIPPED_IF_INSIDE = {"pyvenv.cfg", "conda-meta", "CACHEDIR.TAG"}


def walk_files(root, skipped=SKIPPED_FOLDERS, on_error=None, on_skip=None):
    """Yield the path of every file below root: the files of a folder before its subfolders, both
    sorted. Links to folders are not followed.

    Hidden folders, those with a name in `skipped` and those that contain a file of
    SKIPPED_IF_INSIDE are left out; on_skip is called with the path of each. on_error is called with
    the OSError of a folder that cannot be listed.
    """
    for folder, subfolders, files in os.walk(root, onerror=on_error):
        folder = Path(folder)
        hidden = folder.name.startswith(".")
        marked = not SKIPPED_IF_INSIDE.isdisjoint(files + subfolders)
        if folder != Path(root) and (hidden or marked or folder.name in skipped):
            subfolders.clear()                              # os.walk does not go into them
            if on_skip:
                on_skip(folder)
            continue
        subfolders.sort()
        for name in sorted(files):
            yield folder / name


def cache_folder():
    """Where downloaded files are kept; MINICODER_CACHE in the environment names another folder."""
    return Path(os.environ.get("MINICODER_CACHE", Path.home() / ".cache" / "minicoder"))


# ------------------------------------------------------------------------------------------------
# HTTP: one client for downloads and for LLM servers (llm_client.py)

RETRIES = 4                 # of a request that fails
RETRY_SECONDS = 1           # the unit of the pauses between them: 0, 2, 4 and 8
LONGEST_PAUSE = 60          # seconds, whatever the server asks for
BUSY = (408, 429, 500, 502, 503, 504)       # HTTP statuses after which a retry may help


class PatientRetry(Retry):
    """Pauses as long as the server asks in Retry-After, up to LONGEST_PAUSE."""

    def get_retry_after(self, response):
        seconds = super().get_retry_after(response)
        return seconds and min(seconds, LONGEST_PAUSE)


def http_session():
    """A requests.Session that repeats a request while the server is busy; if there is no
    connection, only once, so that a wrong address is reported without delay."""
    retry = PatientRetry(RETRIES, connect=1, status_forcelist=BUSY, allowed_methods=None,
                         backoff_factor=RETRY_SECONDS, raise_on_status=False)
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=retry))
    session.mount("https://", HTTPAdapter(max_retries=retry))
    return session


def download(url, part, largest):
    """Append to the file `part` the bytes of url that it lacks.

    Raises requests.RequestException if the transfer breaks off, InputError if the server refuses it
    or if there are more than `largest` bytes.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with (http_session() as session,
          session.get(url, headers=headers, stream=True, timeout=60) as reply):
        if reply.status_code == 416 and have:               # the file is complete
            return
        if reply.status_code >= 400:
            raise InputError(f"{url}: the server answers {reply.status_code}")
        if reply.status_code != 206:                        # the server cannot resume: start again
            have = 0
        size = have + int(reply.headers.get("Content-Length", 0))
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with open(part, "ab" if have else "wb") as file, bar:
            for block in reply.iter_content(1 << 16):
                bar.update(file.write(block))
                if file.tell() > largest:
                    raise InputError(f"{url}: larger than {largest:,} bytes")


def fetch(url, path, sha256=None, largest=1 << 40):
    """Download url to path unless it is there. After an interruption the next call resumes.

    Raises InputError if there is no such file, if it is too large, or if its SHA-256 differs.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download(url, part, largest)
    except requests.RequestException as error:              # also if the server sends too little
        raise InputError(f"{url}: cannot be downloaded ({type(error).__name__}); "
                         "the same command continues where it stopped") from None
    if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise InputError(f"{url}: not the expected file (its SHA-256 differs)")
    os.rename(part, path)
    return path


def weight_names(folder):
    """The safetensors files in the index of a checkpoint folder; without an index, the only one."""
    index = Path(folder) / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    try:
        names = sorted(set(map(str, read_json(index)["weight_map"].values())))
    except (KeyError, TypeError, AttributeError):
        names = []
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise InputError(f"{index}: has no weight_map to safetensors files beside it")
    return names


def hub_folder(name, weights=True):
    """The local folder of a checkpoint, which is downloaded unless name is a folder.

    name: a path, or a hub name such as Qwen/Qwen2.5-Coder-0.5B. weights: whether they are needed.
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


# ------------------------------------------------------------------------------------------------
# Hugging Face's checkpoint folders

SHARD_BYTES = 5e9       # larger checkpoints are written as several files with an index
YARN_NUMBERS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
                "beta_slow")        # all but the first may be missing or null


def read_config(path, fields):
    """Read the config.json of a Qwen2 model -> {name: value} of these dataclass fields.

    Missing values get the defaults of transformers. Raises InputError for another kind of model or
    a value that is missing or out of range.
    """
    data = read_json(path)

    def require(condition, problem):
        if not condition:
            raise InputError(f"{path}: {problem}")

    model_type = data.get("model_type") if isinstance(data, dict) else type(data).__name__
    require(model_type == "qwen2", f"model_type is {model_type!r}, expected 'qwen2'")
    rope = data.get("rope_parameters") or {}                # since transformers 5
    require(isinstance(rope, dict), "rope_parameters is not a dictionary")
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    data = {"tie_word_embeddings": False, "rope_theta": rope.get("rope_theta", 1e4),
            "rope_scaling": scaling, "rms_norm_eps": 1e-6,
            **{name: value for name, value in data.items() if value is not None}}
    config = {}
    for field in fields:
        value = config[field.name] = data.get(field.name, field.default)
        require(value is not dataclasses.MISSING, f"lacks {field.name}")
        number = (int, float) if field.type is float else int
        if field.type in (int, float) and "token_id" not in field.name:
            require(isinstance(value, number) and value > 0, f"{field.name} is {value!r}")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, remainder = divmod(config["hidden_size"], heads)
    require(remainder == 0, f"hidden_size is not a multiple of {heads} heads")
    require(heads % kv_heads == 0, "heads are not a multiple of key-value heads")
    require(data.get("head_dim") in (None, head_dim), "head_dim is not hidden/heads")
    require(head_dim % 2 == 0, f"head_dim is {head_dim}, an odd number")
    require(data.get("hidden_act", "silu") == "silu", "hidden_act is not silu")
    require(not data.get("use_sliding_window"), "use_sliding_window is not supported")
    scaling = config["rope_scaling"]
    if scaling:
        require(isinstance(scaling, dict) and "yarn" in scaling.values() and scaling.get("factor"),
                "rope_scaling is not yarn with a factor")
        numbers = [scaling[name] for name in YARN_NUMBERS if scaling.get(name) is not None]
        require(all(isinstance(value, (int, float)) and value > 0 for value in numbers),
                "rope_scaling has a value that is not a number above 0")
        if scaling.get("original_max_position_embeddings") is None:
            # stated here so that a longer max_position_embeddings does not change the positions
            original = config["max_position_embeddings"]
            config["rope_scaling"] = {**scaling, "original_max_position_embeddings": original}
    return config


def read_tensors(folder, shapes, ignored):
    """The tensors of a checkpoint folder as {name: tensor}, memory-mapped.

    shapes: the expected shape of each; ignored: names of tensors that are not read.
    """
    state = {}
    for file in (folder / name for name in weight_names(folder)):
        if not file.exists():
            raise InputError(f"{file}: no such file; the checkpoint is incomplete")
        if not os.access(file, os.R_OK):
            raise InputError(f"{file}: cannot be read, its permissions do not allow it")
        try:
            with safe_open(file, framework="pt") as tensors:
                names = sorted(set(tensors.keys()) - ignored)
            for name in names:
                # one open file per tensor, so that each can be released on its own
                with safe_open(file, framework="pt") as tensors:
                    tensor = tensors.get_tensor(name)
                shape, expected = tuple(tensor.shape), shapes.get(name, "no such tensor")
                if shape != expected:
                    raise InputError(f"{file}: {name} has shape {shape}, config.json asks for "
                                     f"{expected}")
                if not tensor.is_floating_point():
                    raise InputError(f"{file}: {name} holds {tensor.dtype}, not floats")
                state[name] = tensor
        except SafetensorError as error:
            raise InputError(f"{file}: cut off or damaged ({error}); "
                             "copy or download it again") from None
    missing = sorted(set(shapes) - set(state))
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return state


def write_tensors(folder, state, name="model", config="config.json"):
    """Write {name: tensor} as model.safetensors, or above SHARD_BYTES as several files with an
    index. The files get the permissions of the config file, which must exist: safetensors would
    let only the owner read them."""
    shards = [{}]
    size = 0
    for tensor_name, tensor in state.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][tensor_name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        stem = f"{name}-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else name
        weight_map.update(dict.fromkeys(shard, f"{stem}.safetensors"))
        # written under another name, as the tensors may be mapped from the file to be replaced
        writing = folder / f"{stem}.writing"
        try:
            save_file(shard, writing, metadata={"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"{folder}: cannot be written, is the disk full? ({error})") from None
        shutil.copymode(folder / config, writing)
        os.replace(writing, folder / f"{stem}.safetensors")
    for old in folder.glob(f"{name}*.safetensors*"):          # left by a checkpoint in other shards
        if old.name not in weight_map.values():
            old.unlink()
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        write_json(folder / f"{name}.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


# ------------------------------------------------------------------------------------------------
# Hugging Face's vocabulary files. Each byte is written as a visible character (GPT-2's table): a
# printable byte, of which there are 188, as itself, all other bytes as the characters from 256 on


def characters_of(byte_order):
    """{byte: its character}; byte_order: all bytes in the order of their ids."""
    printable = sorted(byte_order[:188]) == byte_order[:188]
    assert printable, "byte_order must begin with the 188 printable bytes"
    return {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(byte_order)}


def read_vocabulary(folder, byte_order, required):
    """Read tokenizer.json, or vocab.json and merges.txt -> (merges, {special token: id}).

    required: the special tokens that must be there. Raises InputError for other kinds of tokenizers
    and damaged files.
    """
    byte_of = {char: byte for byte, char in characters_of(byte_order).items()}
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            data = read_json(path)
            vocabulary = data["model"]["vocab"]
            lines = data["model"]["merges"]
            special = {token["content"]: token["id"] for token in data["added_tokens"]}
        else:
            path = folder / "merges.txt"
            vocabulary = read_json(folder / "vocab.json")
            lines = [line for line in read_text(path).split("\n")[1:] if line]
            special = {name: len(vocabulary) + i for i, name in enumerate(required)}
        pairs = [line.split(" ") if isinstance(line, str) else line for line in lines]
        names = [*byte_of, *(left + right for left, right in pairs)]
        misplaced = [i for i, name in enumerate(names) if vocabulary.get(name) != i]
        merges = [tuple(bytes(byte_of[char] for char in part) for part in (left, right))
                  for left, right in pairs]
        consecutive = sorted(special.values()) == [*range(len(names), len(names) + len(special))]
        named = all(name.encode() for name in special)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: not a byte-level BPE tokenizer of Qwen's kind") from None
    missing = [name for name in required if name not in special]
    if missing:
        raise InputError(f"{path}: lacks {len(missing)} of Qwen2.5's special tokens, "
                         f"the first is {missing[0]}")
    if misplaced or not consecutive or not named:
        first = misplaced[0] if misplaced else len(names)
        raise InputError(f"{path}: vocabulary, merges and special tokens do not fit together, "
                         f"first at id {first}; copy or download it again")
    return merges, special


def write_vocabulary(folder, byte_order, merges, special, *, hidden, pattern, end, chat_template):
    """Write tokenizer.json and tokenizer_config.json. hidden: the special tokens that decoding may
    skip; pattern: splits text into pre-tokens; end: the token that ends a document."""
    char_of = characters_of(byte_order)
    pairs = [["".join(char_of[byte] for byte in part) for part in pair] for pair in merges]
    names = [*char_of.values(), *(left + right for left, right in pairs)]
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": name in hidden}
             for name, i in sorted(special.items(), key=lambda item: item[1])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"}, "post_processor": byte_level, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {name: i for i, name in enumerate(names)},
                  "merges": [f"{left} {right}" for left, right in pairs]}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"}
                                 for token in added},
        "bos_token": None, "eos_token": end, "pad_token": end, "unk_token": None,
        "chat_template": chat_template, "clean_up_tokenization_spaces": False,
        "errors": "replace", "model_max_length": 32768, "split_special_tokens": False})
