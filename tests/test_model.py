"""pytest tests/test_model.py"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CASES, ROOT, SMALL, YARN, fill_weights
from safetensors.torch import load_file, save_file

from model import (
    CONFIGS,
    CausalLM,
    Config,
    KVCache,
    generate,
    generate_naive,
    load_model,
    make_attention,
    parameter_count,
    rotary_frequencies,
    sample,
    save_model,
)
from support import distributed
from support.files import InputError

GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text())
PROMPTS = [[5, 17, 3], [9, 1, 30, 77, 2, 64, 8], [42]]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_text_of_transformers(case):
    model = fill_weights(CausalLM(Config(**{**SMALL, **CASES[case]}))).eval()
    logits = model(torch.tensor([GOLDEN["prompt"]]))[0]
    assert (logits - torch.tensor(GOLDEN[case]["logits"])).abs().max() < 1e-5
    assert generate(model, [GOLDEN["prompt"]], 12) == [GOLDEN[case]["greedy"]]


@pytest.mark.parametrize("size,parameters", [
    ("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512),
    ("14B", 14_770_033_664), ("32B", 32_763_876_352)])
def test_parameter_counts_of_the_published_sizes(size, parameters):
    with torch.device("meta"):
        assert parameter_count(CausalLM(CONFIGS[size])) == parameters


def test_yarn_constants():
    scaling = {**YARN, "original_max_position_embeddings": 32768}
    config = dataclasses.replace(CONFIGS["7B"], rope_scaling=scaling)
    plain, _ = rotary_frequencies(CONFIGS["7B"])
    frequencies, scale = rotary_frequencies(config)
    assert scale == pytest.approx(1.138629436112)
    assert torch.equal(frequencies[:24], plain[:24])            # pairs up to 23 are kept,
    assert torch.allclose(frequencies[40:], plain[40:] / 4)     # from 40 on slowed by the factor
    assert (frequencies[24:40] < plain[24:40]).all()


def test_documents_in_a_row_do_not_see_each_other(small_model):
    ids = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    starts = torch.tensor([[0] * 3 + [3] * 7])
    together = small_model(ids, starts)[0]
    alone = torch.cat([small_model(torch.tensor([prompt]))[0] for prompt in PROMPTS[:2]])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(small_model(ids)[0, 3:], alone[3:], atol=1e-2)


def test_no_token_sees_the_future(small_model):
    ids = torch.tensor([PROMPTS[1]])
    changed = ids.clone()
    changed[0, 4] = 55
    before, after = small_model(ids)[0], small_model(changed)[0]
    assert torch.equal(before[:4], after[:4]) and not torch.allclose(before[4], after[4])


def test_plain_formula_and_sdpa_agree():
    """Short rows on a CPU go by the formula, longer ones by SDPA."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 12, 4, 8, generator=generator).bfloat16()
    k, v = (torch.randn(2, 12, 2, 8, generator=generator).bfloat16() for _ in range(2))
    for starts in (None, torch.tensor([[0] * 5 + [5] * 7] * 2)):
        plain = make_attention("eager", starts, 2, 12, 0, q)(q, k, v)
        exact = make_attention("sdpa", starts, 2, 12, 0, q.float())(q.float(), k.float(), v.float())
        assert (plain - exact).abs().max() < 0.03


def test_loss_equals_the_logits_it_never_holds(small_model):
    ids = torch.tensor([PROMPTS[1]])
    targets = torch.tensor([[1, 30, -100, 2, 64, 8, 11]])
    log_probabilities = small_model(ids).detach().log_softmax(-1)[0]
    expected = torch.tensor([0 if t == -100 else log_probabilities[i, t]
                             for i, t in enumerate(targets[0].tolist())])
    assert torch.allclose(small_model(ids, targets=targets, reduce="none")[0], expected, atol=1e-5)
    assert torch.allclose(small_model(ids, targets=targets), -expected.sum(), atol=1e-4)


def test_checkpointed_activations_give_the_same_gradients(small_model):
    """Only the blocks' inputs are kept: a block runs twice, and nothing else changes."""
    ids, calls = torch.tensor([PROMPTS[1]]), []
    small_model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for small_model.model.checkpointing in (False, True):
        small_model.zero_grad()
        small_model(ids[:, :-1], targets=ids[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in small_model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients))
    assert len(calls) == 1 + 2


def test_bf16_activations_over_fp32_weights(small_model):
    ids = torch.tensor([PROMPTS[1]])
    exact = small_model(ids)
    small_model.compute_dtype = torch.bfloat16
    logits = small_model(ids)
    assert logits.dtype == torch.bfloat16 and small_model.head.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.05


# ---- generation


def test_cached_generation_is_the_naive_one(small_model):
    for prompt in PROMPTS:
        assert generate(small_model, [prompt], 20) == [generate_naive(small_model, prompt, 20)]


def test_batch_of_unequal_prompts_gives_what_each_gives_alone(small_model):
    together = generate(small_model, PROMPTS, 20)
    assert together == [generate(small_model, [prompt], 20)[0] for prompt in PROMPTS]
    logits = small_model(torch.tensor([PROMPTS[0]]))[:, -1]
    cache = KVCache(small_model, 1, 8)
    padded = small_model(torch.tensor([[0, 0] + PROMPTS[0]]), torch.tensor([[0, 1, 2, 2, 2]]),
                         cache=cache, last=True)[:, -1]
    assert torch.allclose(logits, padded, atol=1e-5)


def test_the_samples_of_a_prompt_share_its_reading(small_model, monkeypatch):
    read = []
    forward = CausalLM.forward

    def noted(self, ids, *rest, **flags):
        read.append(tuple(ids.shape))
        return forward(self, ids, *rest, **flags)

    monkeypatch.setattr(CausalLM, "forward", noted)
    together = generate(small_model, PROMPTS[:2], 12, samples=3, temperature=1.0, seed=5)
    assert read[:2] == [(2, len(PROMPTS[1])), (6, 1)]
    assert together == [generate(small_model, [PROMPTS[i // 3]], 12, temperature=1.0, seed=5 + i)[0]
                        for i in range(6)]
    assert len(set(map(tuple, together))) == 6


def test_prompt_read_in_two_parts(small_model):
    cache = KVCache(small_model, 1, 7)
    small_model(torch.tensor([PROMPTS[1][:4]]), cache=cache)
    logits = small_model(torch.tensor([PROMPTS[1][4:]]), cache=cache)
    assert torch.allclose(logits, small_model(torch.tensor([PROMPTS[1]]))[:, 4:], atol=1e-5)


def test_stop_ids_end_a_row_and_are_not_returned(small_model):
    [free] = generate(small_model, [PROMPTS[0]], 12)
    stop = free[5]
    [short] = generate(small_model, [PROMPTS[0]], 12, stop_ids={stop})
    assert short == free[:free.index(stop)]


def test_rows_stop_by_themselves(small_model):
    seen = []
    new = generate(small_model, PROMPTS, 9, stop=lambda ids: len(ids) == ids[0] % 4 + 2,
                   on_token=lambda row, token: seen.append((row, token)))
    assert [len(ids) for ids in new] == [ids[0] % 4 + 2 for ids in new]
    for prompt, ids in zip(PROMPTS, new):               # though the batch shrinks beneath it
        assert ids == generate(small_model, [prompt], 9)[0][:len(ids)]
    assert [[token for r, token in seen if r == row] for row in range(3)] == new


def test_rows_without_a_token_are_never_chosen(small_model):
    new = generate(small_model, PROMPTS, 40, temperature=5.0, vocab_size=7)
    assert {token for ids in new for token in ids} <= set(range(7))


def test_sampling_depends_on_the_seed_alone(small_model):
    def draw(seed):
        return generate(small_model, PROMPTS, 12, temperature=1.0, seed=seed)
    assert draw(1) == draw(1) and draw(1) != draw(2)
    assert generate(small_model, PROMPTS, 12, temperature=1.0, top_k=1, seed=3) == generate(
        small_model, PROMPTS, 12)


def test_sample_takes_each_id_as_often_as_it_should():
    logits = torch.tensor([0.1, 0.2, 0.4, 0.3]).log().expand(1000, 4)
    chance = (torch.arange(1000) + 0.5)[:, None] / 1000

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        ids = sample(logits.clone(), temperature, top_k, top_p, chance)
        return [round(x, 3) for x in (torch.bincount(ids, minlength=4) / 1000).tolist()]

    assert shares() == [0.1, 0.2, 0.4, 0.3]
    assert shares(top_k=2) == pytest.approx([0, 0, 4 / 7, 3 / 7], abs=2e-3)
    assert shares(top_p=0.75) == pytest.approx([0, 2 / 9, 4 / 9, 3 / 9], abs=2e-3)  # .4 + .3 < .75
    assert shares(top_k=2, top_p=0.5) == [0, 0, 1, 0]                       # .4 is .57 of .7
    assert shares(top_p=0.65) == pytest.approx([0, 0, 4 / 7, 3 / 7], abs=2e-3)
    assert shares(top_p=0.0001) == shares(top_p=0) == [0, 0, 1, 0]
    assert shares(temperature=0.5) == pytest.approx([1 / 30, 4 / 30, 16 / 30, 9 / 30], abs=2e-3)
    assert shares(temperature=0) == [0, 0, 1, 0]


def test_empty_prompts_are_refused(small_model):
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(InputError, match="empty prompt"):
            generate(small_model, prompts, 3)


# ---- checkpoint folders


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shard_bytes", [5e9, 9000])
def test_save_and_load(tmp_path, monkeypatch, case, shard_bytes):
    monkeypatch.setattr("support.files.SHARD_BYTES", shard_bytes)
    model = fill_weights(CausalLM(Config(**{**SMALL, **CASES[case]}))).eval()
    save_model(model, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes > 1e6)
    monkeypatch.setattr("support.files.SHARD_BYTES", 9000 if shard_bytes > 1e6 else 5e9)
    save_model(model, tmp_path)                             # over the other kind: nothing is left
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, "cpu")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    assert torch.equal(loaded(torch.tensor(PROMPTS[1:2])), model(torch.tensor(PROMPTS[1:2])))
    assert load_model(tmp_path, "cpu", torch.bfloat16).head.dtype == torch.bfloat16


def test_saving_over_the_files_that_are_mapped(small_model, tmp_path):
    save_model(small_model, tmp_path)
    loaded = load_model(tmp_path, "cpu")
    save_model(loaded, tmp_path)
    assert torch.equal(load_model(tmp_path, "cpu").head, small_model.head)


def test_tied_file_that_carries_the_head_twice(small_model, tmp_path):
    save_model(small_model, tmp_path)
    tensors = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    assert "lm_head.weight" not in tensors and len(tensors) == 12 * 2 + 2
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.tensor(PROMPTS[1:2])
    assert torch.equal(load_model(tmp_path, "cpu")(ids), small_model(ids))


def test_published_config_is_read(tmp_path):
    published = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 13824,
        "max_position_embeddings": 32768, "max_window_layers": 48,
        "model_type": "qwen2", "num_attention_heads": 40, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 152064}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published))
    assert Config.from_json(path) == CONFIGS["14B"]
    theta = published.pop("rope_theta")
    path.write_text(json.dumps({**published, "eos_token_id": [151645, 151643],
                                "rope_scaling": None,
                                "rope_parameters": {**YARN, "rope_theta": theta}}))
    config = Config.from_json(path)
    assert config.rope_theta == 1e6 and config.rope_scaling["factor"] == 4.0
    assert config.eos_token_id == [151645, 151643]
    path.write_text(json.dumps({**published, "rope_scaling": {}}))          # as good as none
    empty = CausalLM(Config(**{**SMALL, "rope_scaling": Config.from_json(path).rope_scaling}))
    assert torch.equal(empty.model.inv_freq, CausalLM(Config(**SMALL)).model.inv_freq)


@pytest.mark.parametrize("change,message", [
    ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"rope_scaling": "yarn"}, "rope_scaling is not yarn with a factor"),
    ({"num_key_value_heads": 3}, "heads are not a multiple of key-value heads"),
    ({"hidden_size": 33}, "hidden_size is not a multiple of 4 heads"),
    ({"hidden_act": "gelu"}, "hidden_act is not silu"),
    ({"head_dim": 64}, "head_dim is not hidden/heads"),
    ({"use_sliding_window": True}, "use_sliding_window is not supported"),
    ({"num_attention_heads": 32, "num_key_value_heads": 16}, "head_dim is 1, an odd number"),
    ({"rope_scaling": {"type": "yarn", "factor": "four"}},
     "rope_scaling has a value that is not a number"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is not yarn with a factor")])
def test_other_configs_are_refused(small_model, tmp_path, change, message):
    save_model(small_model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, "cpu")


def test_yarn_of_the_model_card_extends_the_context(small_model, tmp_path):
    """Factor 4, and max_position_embeddings as it was."""
    save_model(small_model, tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    assert Config.from_json(path).context_length == data["max_position_embeddings"] == 64
    for original in (64, None):
        scaling = {"type": "yarn", "factor": 4.0}
        if original:
            scaling["original_max_position_embeddings"] = original
        path.write_text(json.dumps({**data, "rope_scaling": scaling}))
        config = Config.from_json(path)
        assert config.context_length == 256 and config.max_position_embeddings == 64
        # the positions stay those of the original length if the context is raised afterwards
        longer = dataclasses.replace(config, max_position_embeddings=256)
        for before, after in zip(rotary_frequencies(config), rotary_frequencies(longer)):
            assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    path.write_text(json.dumps({**data, "max_position_embeddings": 1000, "rope_scaling": scaling}))
    assert Config.from_json(path).context_length == 4000


def test_checkpoints_of_several_dtypes(tmp_path):
    """One dtype in memory: that of the embedding matrix."""
    config = Config(**SMALL, tie_word_embeddings=False)
    model = fill_weights(CausalLM(config)).bfloat16()
    save_model(model, tmp_path)
    expected = load_model(tmp_path, "cpu")(torch.tensor([[1, 2, 3]]))
    tensors = load_file(tmp_path / "model.safetensors")
    for change in ("bias", "norm", "lm_head"):
        mixed = {name: tensor.float() if change in name else tensor
                 for name, tensor in tensors.items()}
        save_file(mixed, tmp_path / "model.safetensors")
        model = load_model(tmp_path, "cpu")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model(torch.tensor([[1, 2, 3]])), expected)
        assert len(generate(model, [[1, 2, 3]], 4)[0]) == 4
        assert load_model(tmp_path, "cpu", torch.float32).head.dtype == torch.float32


def test_dtype_for_inference_is_measured(small_model, tmp_path, monkeypatch):
    save_model(small_model.bfloat16(), tmp_path)
    for seconds, dtype in (((2, 1), torch.bfloat16), ((1, 2), torch.float32)):
        measured = dict(zip((torch.float32, torch.bfloat16), seconds))
        monkeypatch.setattr(distributed, "inference_seconds",
                            lambda dtype, *shape: measured[dtype])
        model = load_model(tmp_path, "cpu", "auto")
        assert model.head.dtype == dtype and "times as long as bfloat16" in model.dtype_reason
    monkeypatch.setattr(distributed, "available_bytes", lambda: 1000)
    assert load_model(tmp_path, "cpu", "auto").head.dtype == torch.bfloat16     # no room for fp32
    assert load_model(tmp_path, "cpu").head.dtype == torch.bfloat16
    monkeypatch.undo()
    assert 0 < distributed.inference_seconds(torch.bfloat16, 32, 48, 2) < 60
    save_model(small_model.float(), tmp_path)
    assert load_model(tmp_path, "cpu", "auto").head.dtype == torch.float32      # never lowered


def test_generation_config_is_kept(small_model, tmp_path):
    """An instruct model's stop ids and sampling settings outlive training."""
    published = {"bos_token_id": 3, "pad_token_id": 3, "do_sample": True, "eos_token_id": [5, 3],
                 "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    save_model(small_model, tmp_path / "a")
    path = tmp_path / "a" / "generation_config.json"
    assert json.loads(path.read_text()) == {"bos_token_id": 151643, "eos_token_id": 151643,
                                            "max_new_tokens": 2048}
    path.write_text(json.dumps(published))
    save_model(load_model(tmp_path / "a", "cpu"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == published
    path.unlink()
    assert load_model(tmp_path / "a", "cpu").generation_config["eos_token_id"] == 151643
    path.write_text("[]")
    with pytest.raises(InputError, match="generation_config.json: expected an object"):
        load_model(tmp_path / "a", "cpu")


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_permissions_follow_the_umask(small_model, tmp_path, monkeypatch, umask, mode):
    monkeypatch.setattr("support.files.SHARD_BYTES", 9000)
    before = os.umask(umask)
    try:
        save_model(small_model, tmp_path)
    finally:
        os.umask(before)
    files = list(tmp_path.iterdir())
    assert len(files) > 4 and {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_an_unreadable_checkpoint_is_reported_as_such(small_model, tmp_path):
    save_model(small_model, tmp_path)
    (tmp_path / "model.safetensors").chmod(0)
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); from model import load_model\n"
            "if os.getuid() == 0:\n"           # root may read everything: lose that power
            "    import ctypes; ctypes.CDLL(None).prctl(24, 1); ctypes.CDLL(None).prctl(24, 2)\n"
            "    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
            "    assert ctypes.CDLL(None).capset(header, data) == 0\n"
            "load_model(sys.argv[2], 'cpu')")
    done = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path], capture_output=True,
                          text=True)
    assert "model.safetensors: cannot be read, its permissions do not allow it" in done.stderr


def test_damaged_checkpoints(small_model, tmp_path):
    save_model(small_model, tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="model.safetensors: cut off or damaged"):
        load_model(tmp_path, "cpu")
    path.write_bytes(b"")
    with pytest.raises(InputError, match="model.safetensors: cut off or damaged"):
        load_model(tmp_path, "cpu")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 32)}, path)
    message = r"up_proj.weight has shape \(3, 32\), config.json asks for \(48, 32\)"
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, "cpu")
    save_file({**tensors, name: torch.zeros(48, 32, dtype=torch.int32)}, path)
    for dtype in (None, torch.float32):
        with pytest.raises(InputError, match="up_proj.weight holds torch.int32, not floats"):
            load_model(tmp_path, "cpu", dtype)
    with pytest.raises(InputError, match="--device meta: not available here"):
        load_model(tmp_path, "meta")
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(InputError, match=f"1 tensors are missing, the first is {name}"):
        load_model(tmp_path, "cpu")
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="extra has shape .* no such tensor"):
        load_model(tmp_path, "cpu")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": ["a"]}')
    with pytest.raises(InputError, match="has no weight_map to safetensors files"):
        load_model(tmp_path, "cpu")
    index.unlink()
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path, "cpu")
