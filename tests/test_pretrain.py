"""pytest tests/test_pretrain.py: the real script for a few steps; several processes, and what is
killed, in processes of their own."""

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bench_training
import pytest
import torch
from conftest import CODE, ROOT, SMALL, fill_weights

from fim import newest_model
from model import CONFIGS, CausalLM, Config, load_model
from pretrain import (
    Muon,
    dtype_of_run,
    finish_run,
    flops_per_token,
    learning_rate,
    main,
    make_optimizers,
    one_step,
    orthogonalize,
    watch,
)
from support import distributed
from support.checkpoint import (
    Log,
    check_same_run,
    errors_in_one_line,
    log_line,
    newest_resume,
    read_metrics,
    resume_steps,
    save_and_exit,
    starting_point,
)
from support.distributed import choose_training_dtype
from support.files import InputError, read_json, run
from support.plan import memory_plan
from tokenizer import Tokenizer

FAST = ["--device", "cpu", "--steps", "12", "--seq-len", "32", "--batch-tokens", "256",
        "--eval-every", "6", "--save-every", "4",
        "--dtype", "float32"]               # not measured: runs are compared with one another
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out, code, *flags, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                  "--master-port", str(20000 + os.getpid() % 20000)]
    return [*map(str, start), str(ROOT / "pretrain.py"), "--out", str(out), "--source", str(code),
            *FAST, *flags]


def pretrain(out, code, *flags, processes=1, fails=False, phase="file"):
    line = command(out, code, *(["--phase", phase] if phase else []), *flags, processes=processes)
    done = in_here(line[1:]) if processes == 1 else subprocess.run(
        line, capture_output=True, text=True, env=ONE_THREAD, timeout=200)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def in_here(argv):
    """Run the script without a process of its own, whose start takes as long as the steps do."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)                    # as the others, for the same bits
    code = 0
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            run(main)
        except SystemExit as end:
            code = end.code
    torch.set_num_threads(threads)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def weights(out, stage="pretrain"):
    return load_model(out / stage, "cpu").state_dict()


def losses(out, stage="pretrain"):
    return [row["loss"] for row in read_metrics(out / stage)]


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    from conftest import code_folder
    return code_folder.__wrapped__(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def finished(code, tmp_path_factory):
    """A whole run, both phases: its root folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, pretrain(out, code, phase=None).stdout


def test_a_run_leaves_a_checkpoint_folder(finished):
    out, printed = finished
    assert {path.name for path in (out / "pretrain").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "metrics.jsonl", "loss.png", "run.json"}
    assert {path.name for path in out.iterdir()} == {"data", "tokenizer", "pretrain", "repository"}
    config = json.loads((out / "pretrain" / "config.json").read_text())
    special = Tokenizer.load(out / "pretrain").special
    assert config["eos_token_id"] == special["<|endoftext|>"]
    assert config["max_position_embeddings"] == 32
    rows = read_metrics(out / "pretrain")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["step"] for row in rows if "bpb" in row] == [6, 12]
    assert rows[-1]["bpb"] < rows[5]["bpb"]
    for words in ("gzip", "ground truth", "left-to-right completion", "--- infilling",
                  "python fim.py FILE --line N --out"):
        assert words in printed
    assert len(re.findall(r"^    def read_numbers\(path\):⏎ with.*⟦", printed, re.M)) == 2 * (2 + 2)
    assert all(0 <= row["data_share"] < 1 for row in rows)
    assert max(len(line) for line in printed.splitlines() if line.startswith("step")) <= 120


def test_a_finished_run_is_left_alone(finished, code):
    out, _ = finished
    before = (out / "pretrain" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(out, code, phase=None).stdout.count("is finished; --fresh trains it again") == 2
    assert (out / "pretrain" / "model.safetensors").stat().st_mtime_ns == before


def test_both_phases_follow_one_another(finished):
    """What was given is meant for the file phase; rows of the other are four times as long, and the
    learning rate falls once over both."""
    out, printed = finished
    first, second = (read_json(out / stage / "run.json") for stage in ("pretrain", "repository"))
    names = ("steps", "seq_len", "batch_tokens", "lr")
    assert [first[name] for name in names] == [12, 32, 256, 4e-3]
    assert [second[name] for name in names] == [9, 128, 256, 4e-3]
    rates = [row["lr"] for stage in ("pretrain", "repository") for row in read_metrics(out / stage)]
    assert rates == [learning_rate(step, 12 + 9, 4e-3) for step in range(12 + 9)]
    assert first["optimizer"] == second["optimizer"] and second["init"] == str(out / "pretrain")
    assert (out / "repository" / "positions.png").read_bytes()[:4] == b"\x89PNG"
    by_position = re.findall(r"^(.*): validation bits per byte by position, .*?: ((?:[\d.]+, )+)",
                             printed, re.M)
    assert [name for name, _ in by_position] == [str(out / "pretrain"), str(out / "repository")]


def test_kill_and_resume_gives_the_same_weights(finished, code, tmp_path):
    """SIGKILL after the first checkpoint, Ctrl-C after that, the last one torn; then to the end."""
    for number, code_wanted in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = subprocess.Popen(command(tmp_path / "out", code), stdout=subprocess.PIPE,
                                   text=True, env=ONE_THREAD)
        printed = ""
        for line in process.stdout:
            printed += line
            if re.match(r"step +5/" if number == signal.SIGKILL else r"step +9/", line):
                process.send_signal(number)
        assert process.wait(60) == code_wanted
        assert newest_resume(tmp_path / "out" / "pretrain.unfinished") >= 4
    assert "to resume: python" in printed
    newest, older = resume_steps(tmp_path / "out" / "pretrain.unfinished")
    torn = tmp_path / "out" / "pretrain.unfinished" / "resume" / f"step_{newest}" / "__0_0.distcp"
    torn.write_bytes(torn.read_bytes()[:torn.stat().st_size // 2])
    printed = pretrain(tmp_path / "out", code, phase=None).stdout
    assert f"step_{newest} is damaged; trying the one before it" in printed
    assert f"resuming after step {older} of" in printed
    for stage in ("pretrain", "repository"):
        whole, resumed = weights(finished[0], stage), weights(tmp_path / "out", stage)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert losses(finished[0], stage) == losses(tmp_path / "out", stage)


def test_processes_and_accumulation_do_not_change_the_losses(code, tmp_path):
    exact = ["--dtype", "float32", "--optimizer", "adamw"]
    pretrain(tmp_path / "one", code, *exact)
    pretrain(tmp_path / "four", code, *exact, "--device-batch", "2", processes=2)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert len(one) == len(four) and max(abs(a - b) for a, b in zip(one, four)) < 1e-5
    assert len(weights(tmp_path / "four")) == 50


def test_two_processes_are_stopped_and_resumed(code, tmp_path):
    """Muon on sharded matrices: not the bits of one process, but the same curve. On the way one
    process is killed, which ends the other in one line, and torchrun is told to stop."""
    out = tmp_path / "two"
    work = out / "pretrain.unfinished"
    two = command(out, code, "--phase", "file", processes=2)
    process = subprocess.Popen(two, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"step +6/", line):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and newest_resume(work) >= 4
    reasons = [line for line in errors.splitlines() if line.startswith("pretrain.py: ")]
    assert not reasons or "another process has ended" in reasons[0]
    process = subprocess.Popen(two, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"step +9/", line):
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0 and newest_resume(work) >= 8
    pretrain(out, code, processes=2)
    pretrain(tmp_path / "one", code)
    one, two = losses(tmp_path / "one"), losses(out)
    assert len(one) == len(two) and max(abs(a - b) for a, b in zip(one, two)) < 0.05


def test_starting_from_a_checkpoint(finished, code, tmp_path):
    out, _ = finished
    with mock.patch("pretrain.GENERAL", 3_000):
        done = pretrain(tmp_path / "on", code, "--init", str(out / "pretrain"), "--lr", "1e-9")
    pattern = r"{}.*bpb ([\d.]+),?(?: bpb)? general ([\d.]+)"     # measured before and after
    first, last = ([float(bits) for bits in re.search(pattern.format(start), done.stdout).groups()]
                   for start in ("before: ", r"step +\d+/\d+ "))
    assert last == pytest.approx(first, abs=0.01)
    assert losses(tmp_path / "on")[0] < losses(out)[0] - 0.5
    first, second = weights(out), weights(tmp_path / "on")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_the_repository_phase_goes_on_from_the_file_phase(finished, code, tmp_path):
    """Longer rows of whole repositories, slower rotation, a folder of its own, the newest model."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "repository")
    flags = ["--seq-len", "128", "--batch-tokens", "512", "--steps", "6", "--fim-rate", "1"]
    done = pretrain(out, code, *flags, phase="repository")
    assert "before: bpb " in done.stdout
    config = read_json(out / "repository" / "config.json")
    assert config["rope_theta"] == 1e5 and config["max_position_embeddings"] == 128
    assert newest_model(out) == out / "repository"
    first = load_model(out / "pretrain", "cpu").state_dict()
    second = load_model(out / "repository", "cpu").state_dict()
    assert first.keys() == second.keys()
    assert not all(torch.equal(first[name], second[name]) for name in first)
    done = pretrain(tmp_path / "none", code, *flags, fails=True, phase="repository")
    assert "run the file phase first" in done.stderr and done.stderr.count("\n") == 1


# ---- bad input


@pytest.mark.parametrize("flags,message", [
    (["--steps", "0"], "--steps: must be at least 1"),
    (["--batch-tokens", "100"], "--batch-tokens: must be a multiple of 32"),
    (["--plan", "0"], "--plan: must be at least 1"),
    (["--init", "nowhere"], "nowhere: no such folder"),
    (["--lr", "1e9", "--optimizer", "adamw", "--fresh"], "the loss is"),
    (["--seed", "-1"], "--seed: must be at least 0"),
    (["--fim-rate", "5"], "--fim-rate 5.0: must be between 0 and 1"),
    (["--attention", "triton", "--fresh"], "--attention triton: cpu is not a CUDA GPU; --attention "
                                           "sdpa runs anywhere"),
    (["--device", "cuda"], "--device cuda:0: not available here")])
def test_one_line_for_what_is_wrong(finished, code, tmp_path, typed, flags, message):
    done = typed(*command(tmp_path, code, "--phase", "file", *flags)[1:])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    if "triton" in flags:                                   # else the next call would go on with it
        assert not (tmp_path / "pretrain.unfinished").exists()


def test_another_run_in_the_folder(code, tmp_path):
    process = subprocess.Popen(command(tmp_path, code, "--phase", "file"), stdout=subprocess.PIPE,
                               text=True, env=ONE_THREAD)
    for line in process.stdout:
        if line.startswith("step  5"):
            process.terminate()
    assert process.wait(60) == 143
    done = pretrain(tmp_path, code, "--lr", "0.5", fails=True)
    assert "holds a run with lr 0.004, this one has 0.5" in done.stderr
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_full_disk(code, tmp_path):
    """No file may pass 4 MB: saving fails as on a full disk, in one line, nothing half is left."""
    limited = ["bash", "-c", "ulimit -f 4096; trap '' XFSZ; exec \"$@\"", "-"]
    done = subprocess.run([*limited, *command(tmp_path, code)], capture_output=True, text=True,
                          env=ONE_THREAD)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "step_4: cannot be written, is the disk full?" in done.stderr
    assert "No earlier step is kept" in done.stderr
    assert not list((tmp_path / "pretrain.unfinished" / "resume").iterdir())


# ---- parts


def test_out_of_memory_names_the_flag_to_lower():
    args = argparse.Namespace(device_batch=16, checkpoint_activations=False, seq_len=64,
                              batch_tokens=512)         # 8 rows in all
    work = Path("nowhere")

    def message(error):
        with pytest.raises(InputError) as caught, errors_in_one_line(args, work):
            raise error
        return str(caught.value)

    assert "try --device-batch 4" in message(torch.OutOfMemoryError("CUDA out of memory"))
    assert "Step 0 is kept" in message(MemoryError())
    args.device_batch, args.beta = 2, 0.1               # of dpo.py: one pair
    assert "try --checkpoint-activations" in message(MemoryError())
    args.device_batch = 1
    assert "try --checkpoint-activations" in message(RuntimeError("can't allocate memory: 1 TB"))
    args.checkpoint_activations = True
    assert "try --seq-len 32" in message(MemoryError())
    assert "--compile: InvalidCxxCompiler: No working C++ compiler found in x; install one" in (
        message(RuntimeError("InvalidCxxCompiler: No working C++ compiler found in x\n\nSet ...")))
    with pytest.raises(RuntimeError, match="a mistake"), errors_in_one_line(args, work):
        raise RuntimeError("a mistake")


def test_a_lost_run_is_stopped(tmp_path):
    """A step is judged when it is read: not finite, or a hundred times the usual gradient."""
    log = Log(tmp_path, argparse.Namespace(steps=100, batch_tokens=10), 0, 1, 1)
    for step in range(1, 31):
        log.record(step, 0.1, 10, {"loss": torch.tensor(20.0), "other": torch.tensor(5.0)},
                   torch.tensor(0.5), tokens=64, seconds=1.0, waited=0.25)
        log.flush()
    row = read_metrics(tmp_path)[-1]
    assert [row[name] for name in ("step", "loss", "other", "grad_norm", "tokens_per_second",
                                      "data_share")
            ] == [30, 2.0, 0.5, 0.5, 64.0, 0.25]
    log.record(31, 0.1, 10, {"loss": torch.tensor(20.0)}, torch.tensor(51.0), tokens=64,
               seconds=1.0, waited=0.0)
    with pytest.raises(InputError, match="step 31: .*, the gradient norm 51 where 0.5"):
        log.flush()
    log.record(32, 0.1, 10, {"loss": torch.tensor(math.nan)}, torch.tensor(0.5), tokens=64,
               seconds=1.0, waited=0.0)
    with pytest.raises(InputError, match="step 32: the loss is nan"):
        log.flush()


def test_plan():
    """Counted by hand for the 0.5B shape: 494,032,768 weights, 136,134,656 of them its table."""
    args = argparse.Namespace(device_batch=2, seq_len=1024, optimizer="muon", device="cuda",
                              checkpoint_activations=True)
    with torch.device("meta"):
        model = CausalLM(CONFIGS["0.5B"])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = memory_plan(CONFIGS["0.5B"], shapes, args, 8, bf16=True, loss_rows=4096)
    assert parts["weights"] == parts["gradients"] == pytest.approx(4 * 494_032_768 / 8 / 1e9)
    assert parts["optimizer"] == pytest.approx(4 * (357_826_560 + 2 * 136_206_208) / 8 / 1e9)
    block = 8 * 896 + 2 * (4 * 896 + 256 + 4 * 4864)
    assert parts["activations"] == pytest.approx(2 * 1024 * (24 * 2 * 896 + block) / 1e9)


def test_the_bench_measures_a_step():
    args = argparse.Namespace(size="tiny", seq_len=32, rows=2, steps=2, forwards=2)
    speed, share, first = bench_training.measure(
        args, "cpu", {**bench_training.BASE, "compile": False, "optimizer": "adamw"})
    assert speed > 1 and first > 0 and 0 < share < 1


def test_schedule():
    rates = [learning_rate(step, 100, 2.0, warmup=0.1, decay=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[50] == 2.0
    assert rates[75] == pytest.approx(1.0) and rates[99] == pytest.approx(0.04)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer(small_model, kind):
    optimizers = make_optimizers(small_model, kind)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in small_model.parameters())
    for group in groups:
        assert all((p.dim() == 2) == (group["weight_decay"] > 0) for p in group["params"])
    names = {id(p): name for name, p in small_model.named_parameters()}
    if kind == "muon":
        inner = {names[id(p)] for p in optimizers[0].param_groups[0]["params"]}
        assert len(inner) == 14
        assert not [name for name in inner if "embed" in name or "bias" in name]


def test_muon_is_torchs_in_bf16_and_the_polynomial_of_singular_values():
    """Bit for bit over three steps; elsewhere it does to singular values what it says it does."""
    rng = torch.Generator().manual_seed(0)
    shapes = (48, 32), (32, 48), (32, 32)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, torch.bfloat16, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    mine.param_groups[0]["lr"] = 0.02
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    matrix = torch.randn(48, 32, generator=rng, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    wanted = (u * s) @ v
    assert 0.6 < s.min() and s.max() < 1.3
    torch.testing.assert_close(orthogonalize(matrix, torch.float64), wanted, atol=1e-9, rtol=0)
    torch.testing.assert_close(orthogonalize(matrix.float(), torch.float32), wanted.float(),
                               atol=1e-4, rtol=0)


def test_a_batch_can_be_learned_by_heart():
    model = CausalLM(Config(**SMALL))
    fill_weights(model)
    ids = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30]])
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "count": 7, "document_starts": None}

    def loss_fn(model, batch):
        return model(batch["input_ids"], targets=batch["targets"]), {}

    optimizers = make_optimizers(model, "muon")
    for _ in range(120):
        sums, norm = one_step(model, optimizers, [batch], loss_fn, 7, lr=3e-3)
    assert sums["loss"] / 7 < 0.05 and math.isfinite(norm)


def test_a_step_in_unequal_parts_is_the_same_step():
    """Rows of 7 and 2 targets, together and one after the other: the same loss, norm, weights."""
    ids = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30], [7, 7, 12, 0, 0, 0, 0, 0]])
    targets = torch.where(torch.arange(7) < torch.tensor([[7], [2]]), ids[:, 1:], -100)
    whole = {"input_ids": ids[:, :-1], "targets": targets}
    parts = [{name: rows[i:i + 1] for name, rows in whole.items()} for i in (0, 1)]
    found = []
    for batches in ([whole], parts):
        model = fill_weights(CausalLM(Config(**SMALL)))
        optimizers = [torch.optim.SGD(model.parameters())]      # it shows the gradient itself
        for _ in range(2):
            sums, norm = one_step(model, optimizers, batches, lambda model, batch: (
                model(batch["input_ids"], targets=batch["targets"]), {}), 9, lr=3e-3)
        found.append([sums["loss"].detach(), norm, *model.state_dict().values()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_flops_per_token():
    tied = Config(256, 4, 4, 2, 704, 4096)
    untied = Config(256, 4, 4, 2, 704, 4096, tie_word_embeddings=False)
    assert flops_per_token(tied, 1000, 256) == 6 * 1000 + 6 * 4 * 256 * 256
    assert flops_per_token(untied, 4096 * 256 + 7, 0) == 42


def test_dtype_is_chosen_with_a_reason():
    assert choose_training_dtype("cpu", "float32", 64, 8, 8) == (torch.float32, "--dtype")
    dtype, why = choose_training_dtype("mps", "auto", 64, 8, 8)
    assert dtype == torch.float32 and "bfloat16" in why


@pytest.mark.parametrize("rates,dtype", [((256e9, 160e9), torch.float32),
                                         ((100e9, 300e9), torch.bfloat16)])
def test_the_faster_dtype_is_chosen(monkeypatch, rates, dtype):
    """A CPU with bf16 instructions may still be faster in fp32."""
    measured = dict(zip((torch.float32, torch.bfloat16), rates))
    monkeypatch.setattr(distributed, "training_rate", lambda dtype, *shape: measured[dtype])
    fp32, bf16 = (round(rate / 1e9) for rate in rates)
    assert choose_training_dtype("cpu", "auto", 4096, 192, 512) == (
        dtype, f"measured: {fp32} GFLOP/s in float32, {bf16} in bfloat16")


def test_a_resumed_run_keeps_its_dtype(tmp_path, monkeypatch):
    """Even if the measurement now comes out the other way."""
    args = argparse.Namespace(dtype="auto", fresh=False, device="cpu", device_batch=2, seq_len=64)
    config = Config(**SMALL)
    for rates, dtype in (((9, 1), torch.float32), ((1, 9), torch.bfloat16)):
        measured = dict(zip((torch.float32, torch.bfloat16), rates))
        monkeypatch.setattr(distributed, "training_rate", lambda dtype, *shape: measured[dtype])
        assert dtype_of_run(args, config, tmp_path)[0] == dtype
    (tmp_path / "run.json").write_text('{"dtype": "float32"}')
    assert dtype_of_run(args, config, tmp_path) == (torch.float32, "as this run started")
    args.fresh = True
    assert dtype_of_run(args, config, tmp_path)[0] == torch.bfloat16


def test_rates_are_measured():
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e6 < distributed.training_rate(dtype, 64, 32, 48) < 1e15


def test_torn_metrics_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert [row["step"] for row in read_metrics(tmp_path, last_step=1)] == [1]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n5\n{"loss": 2}\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="run.json: expected the settings of a run"):
        check_same_run(tmp_path, argparse.Namespace(lr=1), "abc")


def test_a_run_is_known_by_what_it_starts_from(small_model, small_tokenizer, tmp_path):
    """Another model, tokenizer or corpus under the same names is not gone on with."""
    first = starting_point(small_model, small_tokenizer.tokens, tmp_path)
    assert first == starting_point(small_model, small_tokenizer.tokens, tmp_path)
    check_same_run(tmp_path, argparse.Namespace(lr=1), first)
    check_same_run(tmp_path, argparse.Namespace(lr=1), first)
    seen = {first, starting_point(small_model, Tokenizer.train([CODE * 3], 300).tokens, tmp_path)}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    seen.add(starting_point(small_model, small_tokenizer.tokens, tmp_path))
    with torch.no_grad():
        small_model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    seen.add(starting_point(small_model, small_tokenizer.tokens, tmp_path))
    assert len(seen) == 4
    for other in seen - {first}:
        with pytest.raises(InputError, match=f"a run with model and data {first}, this one has "):
            check_same_run(tmp_path, argparse.Namespace(lr=1), other)


@pytest.mark.parametrize("world,here,start", [
    (1, None, "python pretrain.py"), (8, 8, "torchrun --nproc-per-node 8 pretrain.py"),
    (32, 8, "torchrun --nproc-per-node 8 --nnodes 4 ... pretrain.py")])
def test_how_to_go_on(world, here, start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.checkpoint.WORLD", world)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--fresh", "--steps", "9"])
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    with pytest.raises(SystemExit) as end:
        save_and_exit(tmp_path, 5, 5, None, None, [signal.SIGINT])
    assert end.value.code == 130
    assert capsys.readouterr().out == f"stopped after step 5; to resume: {start} --steps 9\n"


def test_a_short_context_is_watched_too(small_tokenizer, capsys):
    model = CausalLM(Config(**{**SMALL, "vocab_size": 416, "max_position_embeddings": 16}))
    watch(fill_weights(model), small_tokenizer)
    assert capsys.readouterr().out.count("⟦") == 2


def test_a_new_file_phase_leaves_nothing_of_an_old_repository_phase(small_model, small_tokenizer,
                                                                    tmp_path):
    old = tmp_path / "repository.unfinished"
    (old / "resume" / "step_4").mkdir(parents=True)
    (tmp_path / "pretrain.unfinished").mkdir()
    (tmp_path / "pretrain.unfinished" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    finish_run(small_model, small_tokenizer, argparse.Namespace(before=0, after=9),
           tmp_path / "pretrain.unfinished", tmp_path / "pretrain")
    assert newest_resume(old) == 0 and old.exists() and (tmp_path / "pretrain").exists()


def test_newest_checkpoint_is_a_whole_one(tmp_path):
    for name in ("step_3", "step_20", "step_30.writing"):
        (tmp_path / "resume" / name).mkdir(parents=True)
    assert newest_resume(tmp_path) == 20 and newest_resume(tmp_path / "none") == 0


def test_log_line_is_never_wide():
    row = dict(step=1_239_999, loss=12.3456, bpb=1.234, lr=3e-4, grad_norm=99.5, mfu=0.5,
               tokens_per_second=12_345_678.9, memory_gb=123.4)
    assert len(log_line(row, 1_240_000, 1e6)) <= 120
    row.update({"bpb text": 1.234, "bpb math": 1.234, "bpb general": 1.234})
    line = log_line(row, 1_240_000, 1e6)
    assert len(line) <= 120 and "general 1.234" in line


def test_picture(finished):
    assert (finished[0] / "pretrain" / "loss.png").read_bytes()[:4] == b"\x89PNG"
