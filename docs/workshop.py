"""Tools for a workshop: a copy of the project with a bug to find, or with a function to write.

    python docs/workshop.py bug --copy ../buggy            # one of twenty bugs, which one is secret
    python docs/workshop.py reveal ../buggy                # show it, and the test that finds it
    python docs/workshop.py exercise fim.py fim_ids --copy ../exercise
    python docs/workshop.py list                           # all exercises with their tests

A copy has no models or data, so the first training run in it takes a minute more. It also lacks
this file and its tests, which would name the bug. The project itself is never changed.
docs/workshop.md is the plan for the day.
"""

import argparse
import ast
import difflib
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.files import InputError, run  # noqa: E402

COPIED = ["*.py", "README.md", "pyproject.toml", "requirements.txt", "support", "tests", "docs",
          "assets"]
LEFT_OUT = ["__pycache__", "workshop.py", "test_workshop.py"]
PLANTED = ".planted"            # in a copy: the number of its bug
TRAIN = "python pretrain.py --phase file --steps 60 --eval-every 20 --out run"
# The last model of the project itself, for bugs that show little or nothing in training
MODEL = f"{ROOT}/out/repository"
BITS = f"python evaluate.py --model {MODEL} --text fim.py"
MIDDLES = """python -c "from data import Batches, tokens_in_memory; from tokenizer import Tokenizer
tokenizer = Tokenizer(merges=[])            # each byte is a token
document = {'text': open('fim.py').read(), 'kind': 'code'}
batches = Batches(tokens_in_memory([document], tokenizer), tokenizer, 400, 1, fim_rate=1)
_, targets, _ = batches.sequence(0)
print(tokenizer.decode([i for i in targets if i >= 0]))\""""
TOKENIZER = "from tokenizer import Tokenizer; t = Tokenizer.train(['Hello'] * 9, 290); "
FORMAT = (f'python -c "{TOKENIZER}from fim import fim_ids; '
          "print(t.decode(fim_ids(t, t.encode('before'), t.encode('after'))))\"")
TARGETS = (f'python -c "{TOKENIZER}from sft import chat_ids; '
           "ids, learned = chat_ids(t, [{'role': 'user', 'content': 'Hi'}, "
           "{'role': 'assistant', 'content': 'Hello'}]); "
           "print([t.decode([i]) for i, x in zip(ids, learned) if x])\"")
MARGIN = ('python -c "from torch import tensor as x; from dpo import dpo_loss; '
          'print(dpo_loss(x([-5.]), x([-9.]), x([-5.]), x([-5.])))"')
WORDS = ('python -c "from tokenizer import Tokenizer, encode_word; '
         "t = Tokenizer.train(['banana bandana cabana and a band'] * 9, 290); "
         "ids = {token: i for i, token in enumerate(t.tokens)}; "
         "print(encode_word(b'cabana', ids), t.encode('cabana'))\"")


class Bug(NamedTuple):
    file: str
    before: str                 # occurs once in the file
    after: str
    explanation: str
    symptom: str
    command: str                # shows the symptom, in the copy and in the project
    test: str                   # fails in the copy: arguments of pytest


# Numbers in symptoms: size tiny, AMD EPYC with bf16 instructions, 1 December 2026. Without a bug,
# TRAIN ends with a loss of 5.12, 2.20 bits per byte and a gradient norm of 0.97.
BUGS = [
    Bug("data.py", "sequence.add(segment, segment[1:] + [next_id])",
        "sequence.add(segment, list(segment))",
        "Targets are not shifted by one: the model is asked for the token that it has just read.",
        "After 60 steps the loss is 1.2 instead of 5.1, while validation, which has its own "
        "targets, is worse: 4.49 bits per byte instead of 2.20.",
        TRAIN, "tests/test_batches.py -k without_fim"),
    Bug("data.py", "sequence.add(ids, ids[1:] + [self.end])",
        "sequence.add(ids, ids[1:] + [-100])",
        "FIM examples lack their last target, <|endoftext|>, so nothing teaches a middle to end.",
        "No <|endoftext|> follows the text after <|fim_middle|>. The loss looks normal, but a "
        "model that is trained this way does not stop by itself after a middle.",
        MIDDLES, "tests/test_batches.py -k fim_examples"),
    Bug("kernels.py", "causal = position <= position[S - T:, None]  ",
        "causal = position <= position[S - T:, None] + 1",
        "The causal mask is one position too wide: each token sees the one it has to predict.",
        "1.96 bits per byte after 60 steps instead of 2.20, too good to be true, but infilled "
        "middles are empty: in generation there is no next token to look at.",
        TRAIN, "tests/test_kernels.py -k mask"),
    Bug("kernels.py", "masked_fill_(~(causal & same_document), ", "masked_fill_(~causal, ",
        "Documents that share a sequence see each other: the mask is causal, and nothing else.",
        "Hardly any: 2.21 bits per byte after 60 steps instead of 2.20. Only a comparison with "
        "each document alone shows it.",
        TRAIN, "tests/test_kernels.py -k mask"),
    Bug("model.py", "return torch.addcmul(x * cos, swapped, sin)",
        "return torch.addcmul(x * cos, swapped, -sin)",
        "RoPE rotates in the other direction. A model that is trained this way works as well.",
        "None in training. But a model trained without the bug gets worse: fim.py takes 2.37 bits "
        "per byte instead of 1.76.",
        BITS, "tests/test_model.py -k logits_and_text"),
    Bug("model.py", "position = torch.arange(past, past + T, device=input_ids.device)[None]",
        "position = torch.arange(T, device=input_ids.device)[None]",
        "With a KV cache every new token is rotated as if it were the first one.",
        "Losses are right, but the same model writes another line: only generation has a cache.",
        f"python fim.py fim.py --line 40 --model {MODEL}",
        "tests/test_model.py -k logits_with_a_cache"),
    Bug("model.py", "return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)",
        "return (x.float() / (x.float().square().mean(-1, keepdim=True) + self.eps)\n"
        "                * self.weight.float())",
        "RMSNorm divides by the mean square and not by its root.",
        "Training is much slower: 2.66 bits per byte after 60 steps instead of 2.20.",
        TRAIN, "tests/test_model.py -k logits_and_text"),
    Bug("model.py", "(B * K, H // K * T, d) / math.sqrt(d) ", "(B * K, H // K * T, d) / d ",
        "Scores are divided by d and not by its root, so attention is nearly uniform at first.",
        "Hardly any in training: 2.20 bits per byte in both. But fim.py takes 2.54 bits per byte "
        "instead of 1.76 by a model trained without the bug.",
        BITS, "tests/test_kernels.py -k eager"),
    Bug("fim.py", "return [prefix, *prefix_ids, suffix, *suffix_ids, middle, *middle_ids]",
        "return [prefix, *suffix_ids, suffix, *prefix_ids, middle, *middle_ids]",
        "Prefix and suffix are swapped, in training and at inference alike.",
        "The prompt has the suffix first; a published checkpoint would infill nonsense.",
        FORMAT, "tests/test_fim.py -k format"),
    Bug("fim.py", "while open_blocks and indentation <= open_blocks[-1][0]:",
        "while open_blocks and indentation < open_blocks[-1][0]:",
        "A block does not end at a line that is indented like the line above the block.",
        "Spans of type block reach into the next statement or function.",
        "python fim.py show data.py", "tests/test_fim.py -k blocks"),
    Bug("pretrain.py", "(loss * (WORLD / count)).backward()",
        "(loss * (WORLD / max(1, batch[\"count\"]))).backward()",
        "The loss is averaged over each device batch instead of the whole step, and these means "
        "are added up.",
        "With four device batches the gradient norm is four times as large, 3.8 instead of 0.97 "
        "after 60 steps. The loss is the same only because gradients are clipped.",
        f"{TRAIN} --device-batch 4", "tests/test_pretrain.py -k unequal_parts"),
    Bug("pretrain.py", "        optimizer.zero_grad()               # gradients become None, which "
        "frees their memory\n", "",
        "Gradients are never cleared, so each step adds to those of all steps before it.",
        "Less than one expects, as gradients are clipped and Muon gives each update the same size: "
        "a gradient norm of 1.6 instead of 0.97 after 60 steps, and 2.23 bits per byte.",
        TRAIN, "tests/test_pretrain.py -k by_hand"),
    Bug("pretrain.py", "fall = (steps - step) / max(1, decay * steps)",
        "fall = (steps + step) / max(1, decay * steps)",
        "The learning rate never decays.",
        "lr in the log stays at its peak, and the gain of the last part of a run is missing.",
        TRAIN, "tests/test_pretrain.py -k schedule"),
    Bug("pretrain.py", "x = x / x.norm().clamp(min=1e-7)", "x = x / x.norm().clamp(max=1e-7)",
        "Muon's input is divided by at most 1e-7, so the Newton-Schulz iterations diverge.",
        "The loss is NaN in step 2, and training stops.",
        TRAIN, "tests/test_pretrain.py -k orthogonalize"),
    Bug("sft.py", "is_target = learn_turn or published_mask", "is_target = published_mask",
        "<|im_end|> after an answer is not a target: the model never learns to stop.",
        "Answers are right at first and then continue up to the limit.",
        TARGETS, "tests/test_sft.py -k 'targets or only_answers'"),
    Bug("sft.py", "            is_target = False", "            is_target = True",
        "System prompts and questions are learned, too.",
        "The loss mixes questions and answers, and the model writes questions.",
        TARGETS, "tests/test_sft.py -k 'targets or only_answers'"),
    Bug("dpo.py", "(policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)",
        "(policy_chosen - reference_chosen) - (reference_rejected - policy_rejected)",
        "The rejected answer's gain is added instead of subtracted: both become more likely.",
        "The loss falls, but rewards of rejected answers rise with those of chosen ones.",
        MARGIN, "tests/test_dpo.py -k losses"),
    Bug("evaluate.py", "for i in range(n - c + 1, n + 1))", "for i in range(n - c, n))",
        "pass@k off by one: the product runs over the wrong numbers.",
        "pass@k is too high; for n = 10 and c = 1, pass@1 is not 10 %.",
        "python -c 'from evaluate import pass_at_k; print(pass_at_k(10, 1, 1))'",
        "tests/test_evaluate.py -k pass_at_k"),
    Bug("evaluate.py", "return nats / math.log(2) / sum(", "return nats / sum(",
        "Nats per byte, called bits per byte.",
        "All values are 0.69 times what they should be, and cannot be compared with gzip's.",
        TRAIN, "tests/test_evaluate.py -k each_document"),
    Bug("tokenizer.py", "_, i = min(mergeable)", "_, i = max(mergeable)",
        "The reference encoder applies the latest merge first instead of the earliest one.",
        "Its ids differ from those of tiktoken, which Tokenizer.encode uses.",
        WORDS, "tests/test_tokenizer.py -k reference_encoding"),
]

EXERCISES = [           # file, function, its tests: arguments of pytest
    ("tokenizer.py", "merge_pair", "tests/test_tokenizer.py -k 'merges or overlapping'"),
    ("kernels.py", "online_softmax", "tests/test_kernels.py -k online"),
    ("kernels.py", "attention_mask", "tests/test_kernels.py -k mask"),
    ("model.py", "eager_attention", "tests/test_kernels.py -k eager"),
    ("model.py", "rotate", "tests/test_model.py -k transformers"),
    ("model.py", "sample", "tests/test_model.py -k sample"),
    ("fim.py", "fim_ids", "tests/test_fim.py -k format"),
    ("fim.py", "choose_span", "tests/test_fim.py -k 'blocks or span'"),
    ("evaluate.py", "pass_at_k", "tests/test_evaluate.py -k pass_at_k"),
    ("evaluate.py", "edit_similarity", "tests/test_evaluate.py -k edit"),
    ("data.py", "interleaved", "tests/test_batches.py -k mixture"),
    ("data.py", "near_duplicates", "tests/test_data.py -k 'planted or chain'"),
    ("pretrain.py", "learning_rate", "tests/test_pretrain.py -k schedule"),
    ("pretrain.py", "one_step", "tests/test_pretrain.py -k 'by_heart or parts'"),
    ("pretrain.py", "orthogonalize", "tests/test_pretrain.py -k singular"),
    ("sft.py", "chat_ids", "tests/test_sft.py -k 'targets or learned or mask'"),
    ("sft.py", "packed_sequence", "tests/test_sft.py -k packed"),
    ("dpo.py", "dpo_loss", "tests/test_dpo.py -k losses"),
    ("dpo.py", "closest", "tests/test_dpo.py -k closest"),
]


def copy_project(folder):
    """Copy the project without models, data and caches to a new or empty folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--copy: {folder} exists; give a new folder")
    if folder.resolve().is_relative_to(ROOT):       # a copy would contain itself
        raise InputError(f"--copy: {folder} is inside the project; give a folder next to it")
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name,
                                ignore=shutil.ignore_patterns(*LEFT_OUT))
            else:
                shutil.copy(path, folder)
    return folder


def plant(number, folder):
    """Put bug `number`, from 1, into a copy of the project."""
    bug = BUGS[number - 1]
    file = folder / bug.file
    file.write_text(file.read_text().replace(bug.before, bug.after))
    (folder / PLANTED).write_text(str(number))


def without_body(source, function):
    """A file's text with the body of a function or method replaced, except for its docstring."""
    nodes = [node for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.FunctionDef) and node.name == function]
    [node] = nodes                      # exercises name functions that are unique in their file
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = source.splitlines(keepends=True)
    indentation = " " * node.body[0].col_offset
    lines[body[0].lineno - 1:node.end_lineno] = [f"{indentation}raise NotImplementedError\n"]
    return "".join(lines)


def parse_args():
    parser = argparse.ArgumentParser(description="Plant a bug, or remove a function to write.")
    commands = parser.add_subparsers(dest="command", required=True)
    bug = commands.add_parser("bug", help="copy the project and plant a bug")
    bug.add_argument("number", nargs="?", type=int, help=f"1 to {len(BUGS)} "
                     "(default: at random, one with a visible symptom)")
    bug.add_argument("--copy", required=True, metavar="FOLDER", help="a new folder")
    reveal = commands.add_parser("reveal", help="show the bug of a copy")
    reveal.add_argument("folder")
    exercise = commands.add_parser("exercise", help="copy the project and remove a function's body")
    exercise.add_argument("file")
    exercise.add_argument("function")
    exercise.add_argument("--copy", required=True, metavar="FOLDER", help="a new folder")
    commands.add_parser("list", help="list the exercises")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.command == "list":
        for file, function, tests in EXERCISES:
            print(f"{file:22} {function:16} python -m pytest -q {tests}")
    elif args.command == "bug":
        visible = [number for number, bug in enumerate(BUGS, 1)
                   if not bug.symptom.startswith(("None", "Hardly"))]
        number = random.choice(visible) if args.number is None else args.number
        if not 1 <= number <= len(BUGS):
            raise InputError(f"bug {number}: there are 1 to {len(BUGS)}")
        folder = copy_project(args.copy)
        plant(number, folder)
        print(f"{folder} has a bug. Run this there and in the project, and compare:\n")
        print(f"    {BUGS[number - 1].command}\n")
        if MODEL in BUGS[number - 1].command:
            print("The model comes from `python pretrain.py` in the project.\n")
        print(f"Then: python docs/workshop.py reveal {folder}")
    elif args.command == "reveal":
        planted = Path(args.folder) / PLANTED
        if not planted.exists() or Path(args.folder).resolve() == ROOT:
            raise InputError(f"{args.folder}: no copy made by `python docs/workshop.py bug`; "
                             "run `reveal` in the project, not in the copy")
        bug = BUGS[int(planted.read_text()) - 1]
        before = (ROOT / bug.file).read_text()
        after = before.replace(bug.before, bug.after)
        print("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True),
                                           bug.file, f"{args.folder}/{bug.file}", n=1)))
        print(f"{bug.explanation}\nSymptom: {bug.symptom}\nTest:    python -m pytest -q {bug.test}")
    else:
        tests = {(file, function): tests for file, function, tests in EXERCISES}
        if (args.file, args.function) not in tests:
            raise InputError(f"{args.file} {args.function}: not an exercise; see "
                             "`python docs/workshop.py list`")
        folder = copy_project(args.copy)
        file = folder / args.file
        file.write_text(without_body(file.read_text(), args.function))
        print(f"Write {args.function} in {file}. In {folder}, its tests are:\n")
        print(f"    python -m pytest -q {tests[args.file, args.function]}")


if __name__ == "__main__":
    run(main)
