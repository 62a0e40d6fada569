"""pytest tests/test_pretrain.py: the real script for a few steps, and its parts.

Most runs are in this process; those that are killed, and those of two processes, are not.
"""

import argparse
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import bench_training
import pytest
import torch
from conftest import CODE, ROOT, SMALL, fill_weights, run_script, write_code_folder
from safetensors.torch import load_file

from fim import newest_model
from model import CONFIGS, CausalLM, Config, load_model
from pretrain import (Muon, dtype_of_run, finish_run, learning_rate, make_optimizers,
                      next_token_loss, one_step, orthogonalize, shard, start_processes)
from support import distributed
from support.checkpoint import (Log, check_same_run, errors_in_one_line, newest_resume,
                                read_metrics, resume_steps, save_and_exit, starting_point)
from support.files import InputError, read_json
from support.plan import memory_plan
from tokenizer import Tokenizer

# --dtype: not measured, because runs are compared with one another
FAST = ["--device", "cpu", "--steps", "12", "--seq-len", "32", "--batch-tokens", "256",
        "--eval-every", "6", "--save-every", "4", "--dtype", "float32"]


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    return write_code_folder(tmp_path_factory.mktemp("source") / "code")


def flags_of(out, code, *flags):
    return ["pretrain.py", "--out", str(out), "--source", str(code), *FAST, *flags]


def pretrain(out, code, *flags):
    """A run in this process that succeeds -> what it printed."""
    done = run_script(*flags_of(out, code, *flags))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(*command, rank=0, world=1, **environment):
    """A Python process, one of `world` as torchrun would start it."""
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT / "tests", text=True,
                            env={**os.environ, **environment}, stdout=subprocess.PIPE)


def signal_after_step_5(process, number):
    for line in process.stdout:
        if re.match("step +5/", line):
            process.send_signal(number)
    return process.wait(200)


def weights(out, stage="pretrain"):
    return load_model(out / stage, "cpu").state_dict()


def losses(out, stage="pretrain"):
    return [row["loss"] for row in read_metrics(out / stage)]


@pytest.fixture(scope="module")
def finished(code, tmp_path_factory):
    """A whole run of both phases: its root folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, pretrain(out, code)


def test_a_run_leaves_a_checkpoint_folder(finished):
    out, printed = finished
    assert {path.name for path in (out / "pretrain").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "metrics.jsonl", "loss.png", "run.json"}
    assert {path.name for path in out.iterdir()} == {"data", "tokenizer", "pretrain", "repository"}
    config = read_json(out / "pretrain" / "config.json")
    special = Tokenizer.load(out / "pretrain").special
    assert config["eos_token_id"] == special["<|endoftext|>"]
    assert config["max_position_embeddings"] == 32
    assert (out / "pretrain" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_metrics(out / "pretrain")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "bpb" in row] == [6, 12]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["bpb"] < rows[5]["bpb"]
    assert all(0 <= row["data_share"] < 1 for row in rows)
    for words in ("gzip", "ground truth", "left-to-right completion", "--- infilling",
                  "python fim.py FILE --line N --out"):
        assert words in printed
    # at two evaluations of each phase: an infilled and a left-to-right completed example
    assert len(re.findall(r"^    def read_numbers\(path\):⏎ with.*⟦", printed, re.M)) == 2 * 2 * 2
    assert max(len(line) for line in printed.splitlines() if line.startswith("step")) <= 120


def test_the_repository_phase_follows_the_file_phase(finished):
    """The flags are those of the file phase; sequences of the other are four times as long, and the
    learning rate falls once over both."""
    out, printed = finished
    first, second = (read_json(out / stage / "run.json") for stage in ("pretrain", "repository"))
    names = ("steps", "seq_len", "batch_tokens", "lr", "optimizer")
    assert [first[name] for name in names] == [12, 32, 256, 4e-3, "muon"]
    assert [second[name] for name in names] == [9, 128, 256, 4e-3, "muon"]
    rates = [row["lr"] for stage in ("pretrain", "repository") for row in read_metrics(out / stage)]
    assert rates == [learning_rate(step, 12 + 9, 4e-3) for step in range(12 + 9)]
    assert second["init"] == str(out / "pretrain") and newest_model(out) == out / "repository"
    config = read_json(out / "repository" / "config.json")
    assert config["rope_theta"] == 1e5 and config["max_position_embeddings"] == 128
    assert (out / "repository" / "positions.png").read_bytes()[:4] == b"\x89PNG"
    by_position = re.findall(r"^(.*): validation bits per byte by position, .*?: ((?:[\d.]+, )+)",
                             printed, re.M)
    assert [name for name, _ in by_position] == [str(out / "pretrain"), str(out / "repository")]


def test_a_finished_run_is_left_alone(finished, code):
    out, _ = finished
    before = (out / "pretrain" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(out, code).count("is finished; --fresh trains it again") == 2
    assert (out / "pretrain" / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def out(finished, tmp_path):
    """A root folder with the data and the tokenizer, which are the same for every run."""
    for name in ("data", "tokenizer"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    return tmp_path


def test_kill_and_resume_gives_the_same_weights(finished, code, out):
    """SIGKILL after step 5, Ctrl-C in step 9, the newest checkpoint is cut off; then to the end."""
    work = out / "pretrain.unfinished"
    script, *flags = flags_of(out, code)
    process = start(ROOT / script, *flags)
    assert signal_after_step_5(process, signal.SIGKILL) == -signal.SIGKILL
    steps = itertools.count(newest_resume(work) + 1)
    assert newest_resume(work) >= 4

    def interrupted_step(*args):
        if next(steps) == 9:
            signal.raise_signal(signal.SIGINT)
        return one_step(*args)

    with mock.patch("pretrain.one_step", interrupted_step):
        stopped = run_script(*flags_of(out, code))
    assert stopped.returncode == 130 and "to resume: python" in stopped.stdout
    assert resume_steps(work) == [9, 8]
    part = work / "resume" / "step_9" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:part.stat().st_size // 2])

    other = run_script(*flags_of(out, code, "--lr", "0.5"))
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "holds a run with lr 0.004, this one has 0.5" in other.stderr

    printed = pretrain(out, code)
    assert "step_9 is damaged; trying the one before it" in printed
    assert "resuming after step 8 of" in printed
    for stage in ("pretrain", "repository"):
        expected, resumed = weights(finished[0], stage), weights(out, stage)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)
        assert losses(finished[0], stage) == losses(out, stage)


def test_two_processes_and_gradient_accumulation_give_the_losses_of_one(code, out):
    """Two are stopped after step 5, by a signal to one of them; then one process resumes."""
    exact = ["--phase", "file", "--optimizer", "adamw"]
    pretrain(out, code, *exact)
    expected = losses(out)
    script, *flags = flags_of(out, code, *exact, "--device-batch", "2", "--fresh")
    processes = [start(ROOT / script, *flags, rank=rank, world=2) for rank in (0, 1)]
    assert signal_after_step_5(processes[0], signal.SIGTERM) == 128 + signal.SIGTERM
    assert processes[1].wait(200) == 128 + signal.SIGTERM
    assert newest_resume(out / "pretrain.unfinished") >= 5
    assert "resuming after step" in pretrain(out, code, *exact, "--device-batch", "4")
    assert losses(out) == pytest.approx(expected, abs=1e-5)


def train_two_steps(optimizer):
    """Train a small model whose attention is the custom op -> the model, losses and norms."""
    rank, world = distributed.RANK, distributed.WORLD
    config = Config(**{**SMALL, "hidden_size": 128, "num_attention_heads": 2})
    model = fill_weights(CausalLM(config))
    model.attention = "triton"
    shard(model, torch.float32, "cpu")
    optimizers = make_optimizers(model, optimizer)
    ids = (torch.arange(4 * 17).view(4, 17) * 7) % 96
    starts = torch.tensor([[0] * 5 + [5] * 11] * 4)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    batch = {"input_ids": ids[share, :-1], "targets": ids[share, 1:],
             "document_starts": starts[share]}
    numbers = []
    for _ in range(2):
        sums, norm = one_step(model, optimizers, [batch], next_token_loss, 64, 1e-3)
        numbers += [*distributed.sum_over_ranks(float(sums["loss"])), float(norm)]
    return model, numbers


def train_and_save(folder):
    """What each of the two processes of the next test does."""
    start_processes("cpu")
    work = folder / "unfinished"
    work.mkdir(exist_ok=True)
    numbers = {}
    for optimizer in ("adamw", "muon"):
        model, numbers[optimizer] = train_two_steps(optimizer)
    args = argparse.Namespace(before=0, after=0, lora=None)
    finish_run(model, Tokenizer.train([CODE], 300), args, work, folder / "muon")
    distributed.say(json.dumps(numbers))
    os._exit(0)     # as Python ends, a thread of gloo could still release a tensor, and crash


def test_fsdp_of_the_custom_ops_and_of_muon(tmp_path):
    """Two processes with the kernels in the interpreter, one with the reference implementation."""
    code = f"import pathlib, test_pretrain as t; t.train_and_save(pathlib.Path({str(tmp_path)!r}))"
    processes = [start("-c", code, rank=rank, world=2, TRITON_INTERPRET="1") for rank in (0, 1)]
    printed = processes[0].communicate()[0]
    assert processes[0].wait() == processes[1].wait() == 0
    for optimizer, numbers in json.loads(printed).items():
        model, expected = train_two_steps(optimizer)
        assert numbers == pytest.approx(expected, rel=2e-5)
    saved = weights(tmp_path, "muon")           # AdamW makes noise of gradients that are zero
    assert all(torch.allclose(saved[name], value, atol=5e-3)
               for name, value in model.state_dict().items())


def test_starting_from_a_checkpoint(finished, code, tmp_path):
    out, _ = finished
    with mock.patch("pretrain.GENERAL", 3_000):
        printed = pretrain(tmp_path, code, "--init", str(out / "pretrain"), "--lr", "1e-9",
                           "--steps", "2")
    pattern = r"{}.*bpb ([\d.]+),?(?: bpb)? general ([\d.]+)"     # measured before and after
    first, last = ([float(bits) for bits in re.search(pattern.format(start), printed).groups()]
                   for start in ("before: ", r"step +\d+/\d+ "))
    assert last == pytest.approx(first, abs=0.01)
    assert losses(tmp_path)[0] < losses(out)[0] - 0.5
    first, second = weights(out), weights(tmp_path)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    flags = flags_of(tmp_path, code, "--init", str(out / "pretrain"), "--lr", "1e-9",
                     "--steps", "2")
    at = flags.index("--source")
    again = run_script(*flags[:at], *flags[at + 2:])            # with the corpus that is there
    assert again.returncode == 0 and "finished" in again.stdout, again.stderr


def test_lora_trains_an_adapter_and_merges_it(finished, code, out):
    """One process against two that are stopped after step 5, and one that resumes them."""
    base = finished[0] / "pretrain"
    flags = ["--init", str(base), "--lora", "4", "--lr", "0.003"]
    printed = pretrain(out, code, *flags)
    trained = 4 * 4 * (4 * 192 + 2 * (192 + 64) + 3 * (192 + 512))      # layers, rank, m + n
    assert f"of which {trained:,} are trained (LoRA)" in printed and "adamw" in printed
    assert losses(out)[-1] < losses(out)[0] - 0.02
    expected = losses(out)
    merged, before = weights(out), load_model(base, "cpu").state_dict()
    adapter = load_file(out / "pretrain" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 4 * 7 * 2
    for name, weight in before.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in adapter:
            A, B = (adapter[f"{layer}.lora_{matrix}.weight"] for matrix in "AB")
            assert B.abs().max() > 0
            weight = weight + 32 / 4 * B @ A                            # alpha / rank
        assert torch.allclose(merged[name], weight, atol=1e-5)
    config = read_json(out / "pretrain" / "adapter" / "adapter_config.json")
    assert config["r"] == 4 and config["lora_alpha"] == 32 and len(config["target_modules"]) == 7

    script, *flags = flags_of(out, code, *flags, "--device-batch", "2", "--fresh",
                              "--checkpoint-activations")
    processes = [start(ROOT / script, *flags, rank=rank, world=2) for rank in (0, 1)]
    assert signal_after_step_5(processes[0], signal.SIGTERM) == 128 + signal.SIGTERM
    assert processes[1].wait(200) == 128 + signal.SIGTERM
    flags.remove("--fresh")
    assert "resuming after step" in run_script(script, *flags).stdout
    assert losses(out) == pytest.approx(expected, abs=1e-5)
    assert all(torch.allclose(merged[name], weight, atol=1e-4)
               for name, weight in weights(out).items())


def test_lora_with_8_bit_weights_and_half_of_the_update(finished, code, out):
    base = finished[0] / "pretrain"
    flags = ["--init", str(base), "--lr", "0.003", "--steps", "4", "--lora", "4"]
    pretrain(out, code, *flags)
    exact = losses(out)
    half = load_file(out / "pretrain" / "adapter" / "adapter_model.safetensors")
    printed = pretrain(out, code, *flags, "--update-share", "1", "--fresh")
    assert "saved with 100% of the update: bpb " in printed and losses(out) == exact
    for name, weight in load_file(out / "pretrain/adapter/adapter_model.safetensors").items():
        assert torch.equal(half[name], weight / 2 if "lora_B" in name else weight)
    pretrain(out, code, *flags, "--int8", "--fresh")
    assert losses(out) == pytest.approx(exact, abs=0.02) and losses(out) != exact
    before, after = load_model(base, "cpu").state_dict(), weights(out)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    change = after[name] - before[name]
    assert 0 < torch.linalg.matrix_rank(change) <= 4        # merged into what --init has stored


# ---- bad input


@pytest.mark.parametrize("flags,message", [
    (["--steps", "0"], "--steps: must be at least 1"),
    (["--lora", "0"], "--lora: must be at least 1"),
    (["--lora", "4"], "--lora: trains a model that exists; give --init"),
    (["--int8"], "--int8: only frozen weights can be in 8 bits"),
    (["--seed", "-1"], "--seed: must be at least 0"),
    (["--batch-tokens", "100"], "--batch-tokens: must be a multiple of 32"),
    (["--plan", "0"], "--plan: must be at least 1"),
    (["--fim-rate", "5"], "--fim-rate 5.0: must be between 0 and 1"),
    (["--init", "nowhere"], "nowhere: no such folder"),
    (["--phase", "repository"], "run the file phase first"),
    (["--device", "cuda"], "--device cuda:0: not available here"),
    (["--attention", "triton"], "--attention triton: cpu is not a CUDA GPU; --attention sdpa"),
    (["--lr", "1e9", "--optimizer", "adamw"], "the loss is")])
def test_bad_input_ends_in_one_line(code, tmp_path, flags, message):
    done = run_script(*flags_of(tmp_path, code, *flags))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    if "triton" in flags:                               # the next run must not resume this one
        assert not (tmp_path / "pretrain.unfinished").exists()


def test_full_disk(code, out):
    """With files of at most 4 MB, saving fails as on a full disk; nothing is half-written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limits[1]))
    try:
        done = run_script(*flags_of(out, code))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "step_4: cannot be written, is the disk full?" in done.stderr
    assert "No earlier step is kept" in done.stderr
    assert not list((out / "pretrain.unfinished" / "resume").iterdir())


@pytest.mark.parametrize("settings,error,advice", [
    ({}, torch.OutOfMemoryError("CUDA out of memory"), "try --device-batch 4"),
    (dict(device_batch=1), RuntimeError("can't allocate memory: 1 TB"),
     "try --checkpoint-activations, a third more time. Step 0 is kept"),
    (dict(device_batch=1, checkpoint_activations=True), MemoryError(), "try --seq-len 32"),
    ({}, RuntimeError("InvalidCxxCompiler: No working C++ compiler found in x\n\nSet ..."),
     "--compile: InvalidCxxCompiler: No working C++ compiler found in x; install one")])
def test_errors_name_the_flag_to_change(settings, error, advice):
    args = argparse.Namespace(**{"device_batch": 16, "checkpoint_activations": False, "seq_len": 64,
                                 "batch_tokens": 512, **settings})
    with pytest.raises(InputError) as caught, errors_in_one_line(args, Path("nowhere")):
        raise error
    assert advice in str(caught.value)


@pytest.mark.parametrize("loss,norm,message", [
    (20.0, 51.0, "step 31: .*, the gradient norm 51 where 0.5"),
    (math.nan, 0.5, "the loss is nan")])
def test_a_diverged_run_is_stopped(tmp_path, loss, norm, message):
    """The loss is not finite, or the gradient a hundred times as large as usual."""
    log = Log(tmp_path, argparse.Namespace(steps=100, batch_tokens=10), 0, 1, 1)

    def record(step, loss, norm):
        log.record(step, 0.1, 10, {"loss": torch.tensor(loss), "other": torch.tensor(5.0)},
                   torch.tensor(norm), tokens=64, seconds=1.0, waited=0.25)
        log.flush()

    for step in range(1, 31):
        record(step, 20.0, 0.5)
    row = read_metrics(tmp_path)[-1]
    assert [row[name] for name in ("step", "loss", "other", "grad_norm", "tokens_per_second",
                                   "data_share")] == [30, 2.0, 0.5, 0.5, 64.0, 0.25]
    with pytest.raises(InputError, match=message):
        record(31, loss, norm)


# ---- a step


def test_schedule():
    rates = [learning_rate(step, 100, 2.0, warmup=0.1, decay=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[50] == 2.0
    assert rates[75] == pytest.approx(1.0) and rates[99] == pytest.approx(0.04)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer(small_model, kind):
    optimizers = make_optimizers(small_model, kind)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert (sorted(id(p) for group in groups for p in group["params"])
            == sorted(id(p) for p in small_model.parameters()))
    for group in groups:
        assert all((p.dim() == 2) == (group["weight_decay"] > 0) for p in group["params"])
    if kind == "muon":                          # the seven matrices of each block
        of_muon = {id(p) for p in optimizers[0].param_groups[0]["params"]}
        assert of_muon == {id(p) for name, p in small_model.named_parameters()
                           if ".layers." in name and p.dim() == 2} and len(of_muon) == 2 * 7


def test_muon_equals_torchs_in_bf16():
    rng = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=rng))
            for shape in ((48, 32), (32, 48), (32, 32))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(ours, torch.bfloat16, weight_decay=0.1)
    muon.param_groups[0]["lr"] = 0.02
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        muon.step()
        torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_orthogonalize_applies_its_polynomial_to_the_singular_values():
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert 0.6 < s.min() and s.max() < 1.3
    expected = (u * s) @ v
    # 1e-6: the norm may be kept above 0 by adding a small number to it
    torch.testing.assert_close(orthogonalize(matrix, torch.float64), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(orthogonalize(matrix.T, torch.float64), expected.T, atol=1e-6,
                               rtol=0)
    torch.testing.assert_close(orthogonalize(matrix.float(), torch.float32), expected.float(),
                               atol=1e-4, rtol=0)


def sum_of_losses(model, batch):
    return model(batch["input_ids"], targets=batch["targets"]), {}


def test_a_batch_can_be_learned_by_heart():
    model = fill_weights(CausalLM(Config(**SMALL)))
    ids = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30]])
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    optimizers = make_optimizers(model, "muon")
    for _ in range(60):
        sums, norm = one_step(model, optimizers, [batch], sum_of_losses, 7, lr=6e-3)
    assert sums["loss"] / 7 < 0.05 and math.isfinite(norm)


def test_a_step_in_unequal_parts_is_the_same_step():
    """Sequences of 7 and 2 targets, together and one after the other: same loss, norm, weights."""
    ids = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30], [7, 7, 12, 0, 0, 0, 0, 0]])
    targets = torch.where(torch.arange(7) < torch.tensor([[7], [2]]), ids[:, 1:], -100)
    whole = {"input_ids": ids[:, :-1], "targets": targets}
    parts = [{name: rows[i:i + 1] for name, rows in whole.items()} for i in (0, 1)]
    results = []
    for batches in ([whole], parts):
        model = fill_weights(CausalLM(Config(**SMALL)))
        optimizers = [torch.optim.SGD(model.parameters())]      # it shows the gradient itself
        for _ in range(2):
            sums, norm = one_step(model, optimizers, batches, sum_of_losses, 9, lr=3e-3)
        results.append([sums["loss"].detach(), norm, *model.state_dict().values()])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_two_steps_in_parts_are_those_by_hand():
    """Each step follows its own gradient only, clipped to norm 1."""
    ids = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30], [7, 7, 12, 8, 1, 4, 2, 6]])
    whole = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    parts = [{name: rows[i:i + 1] for name, rows in whole.items()} for i in (0, 1)]
    model = fill_weights(CausalLM(Config(**SMALL)))
    by_hand = fill_weights(CausalLM(Config(**SMALL)))
    optimizer = torch.optim.SGD(model.parameters())
    for _ in range(2):
        _, norm = one_step(model, [optimizer], parts, sum_of_losses, 14, lr=0.1)
        loss, _ = sum_of_losses(by_hand, whole)
        gradients = torch.autograd.grad(loss / 14, list(by_hand.parameters()))
        expected_norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-4) and norm > 1
        with torch.no_grad():
            for weight, gradient in zip(by_hand.parameters(), gradients):
                weight -= 0.1 * gradient / expected_norm
    torch.testing.assert_close(list(model.parameters()), list(by_hand.parameters()),
                               atol=1e-5, rtol=1e-5)



# ---- choices and records


@pytest.mark.parametrize("rates,dtype", [((256e9, 160e9), torch.float32),
                                         ((100e9, 300e9), torch.bfloat16)])
def test_the_faster_dtype_is_chosen_and_kept_when_resuming(tmp_path, monkeypatch, rates, dtype):
    """A CPU with bf16 instructions may still be faster in fp32."""
    measured = dict(zip((torch.float32, torch.bfloat16), rates))
    monkeypatch.setattr(distributed, "training_rate", lambda dtype, *shape: measured[dtype])
    args = argparse.Namespace(dtype="auto", fresh=False, device="cpu", device_batch=2, seq_len=64)
    chosen, reason = dtype_of_run(args, Config(**SMALL), tmp_path)
    assert chosen == dtype and reason == (f"measured: {rates[0] / 1e9:.0f} GFLOP/s in float32, "
                                          f"{rates[1] / 1e9:.0f} in bfloat16")
    (tmp_path / "run.json").write_text('{"dtype": "float32"}')
    assert dtype_of_run(args, Config(**SMALL), tmp_path) == (torch.float32, "as this run started")
    args.dtype = "bfloat16"
    assert dtype_of_run(args, Config(**SMALL), tmp_path) == (torch.bfloat16, "--dtype")


def test_plan_for_a_checkpoint(finished):
    flags = ["pretrain.py", "--device", "cpu", "--dtype", "float32", "--plan", "1"]
    of_checkpoint = run_script(*flags, "--init", str(finished[0] / "pretrain")).stdout
    assert of_checkpoint == run_script(*flags, "--size", "tiny").stdout != run_script(*flags).stdout


def test_plan():
    """Counted by hand for the 0.5B shape: 494,032,768 weights, 136,134,656 of them embeddings."""
    args = argparse.Namespace(device_batch=2, seq_len=1024, optimizer="muon", device="cuda",
                              checkpoint_activations=True, lora=None)
    with torch.device("meta"):
        model = CausalLM(CONFIGS["0.5B"])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = memory_plan(CONFIGS["0.5B"], shapes, args, 8, bf16=True, loss_rows=4096)
    assert parts["weights"] == parts["gradients"] == pytest.approx(4 * 494_032_768 / 8 / 1e9)
    assert parts["optimizer"] == pytest.approx(4 * (357_826_560 + 2 * 136_206_208) / 8 / 1e9)
    block = 8 * 896 + 2 * (4 * 896 + 256 + 4 * 4864)
    assert parts["activations"] == pytest.approx(2 * 1024 * (24 * 2 * 896 + block) / 1e9)

    args.lora, args.int8 = 16, False
    parts = memory_plan(CONFIGS["0.5B"], shapes, args, 1, bf16=True, loss_rows=100)
    adapter = 16 * 24 * (4 * 896 + 2 * (896 + 128) + 3 * (896 + 4864))
    assert parts["weights"] == pytest.approx((2 * 494_032_768 + 4 * adapter) / 1e9)
    assert parts["gradients"] + parts["optimizer"] == pytest.approx(3 * 4 * adapter / 1e9)
    assert parts["copies"] == 0 and parts["loss"] == pytest.approx(6 * 100 * 151_936 / 1e9)
    args.int8 = True
    smaller = memory_plan(CONFIGS["0.5B"], shapes, args, 1, bf16=True, loss_rows=100)
    assert parts["weights"] - smaller["weights"] == pytest.approx(
        (357_826_560 - 151_936 * 896) / 1e9)


def test_the_benchmark_measures_a_step():
    args = argparse.Namespace(size="tiny", seq_len=32, rows=2, steps=2, forwards=2)
    speed, share, first = bench_training.measure(
        args, "cpu", {**bench_training.BASE, "compile": False, "optimizer": "adamw"})
    assert speed > 1 and first > 0 and 0 < share < 1


def test_incomplete_records_are_left_out(tmp_path):
    """Lines of metrics.jsonl and a checkpoint that were being written as the run was killed."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"loss": 2}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert [row["step"] for row in read_metrics(tmp_path, last_step=1)] == [1]
    for name in ("step_3", "step_20", "step_30.writing"):
        (tmp_path / "resume" / name).mkdir(parents=True)
    assert newest_resume(tmp_path) == 20 and newest_resume(tmp_path / "none") == 0


@pytest.mark.parametrize("changed", ["tokenizer", "corpus", "model"])
def test_a_run_that_starts_from_something_else_is_not_resumed(small_model, small_tokenizer,
                                                              tmp_path, changed):
    tokens = small_tokenizer.tokens
    first = starting_point(small_model, tokens, tmp_path)
    check_same_run(tmp_path, argparse.Namespace(lr=1), first)
    if changed == "tokenizer":
        tokens = tokens[::-1]
    elif changed == "corpus":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "manifest.json").write_text("{}")
    else:
        small_model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    other = starting_point(small_model, tokens, tmp_path)
    with pytest.raises(InputError, match=f"run with model and data {first}, this one has {other}"):
        check_same_run(tmp_path, argparse.Namespace(lr=1), other)


@pytest.mark.parametrize("world,local_world,start", [
    (1, 1, "python pretrain.py"),
    (32, 8, "torchrun --nproc-per-node 8 --nnodes 4 ... pretrain.py")])
def test_a_stopped_run_prints_how_to_resume(world, local_world, start, tmp_path, monkeypatch,
                                            capsys):
    monkeypatch.setattr("support.checkpoint.WORLD", world)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--fresh", "--steps", "9"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
    with pytest.raises(SystemExit) as end:
        save_and_exit(tmp_path, 5, 5, None, None, [signal.SIGINT])
    assert end.value.code == 130
    assert capsys.readouterr().out == f"stopped after step 5; to resume: {start} --steps 9\n"
