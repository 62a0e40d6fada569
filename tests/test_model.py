"""pytest tests/test_model.py"""

import dataclasses
import json
import os

import pytest
import torch
from conftest import CASES, ROOT, SMALL, YARN, fill_weights
from safetensors.torch import load_file, save_file

from model import (CONFIGS, CausalLM, Config, Int8Linear, add_lora, generate, generate_naive,
                   load_model, merge_lora, parameter_count, quantize, rotary_frequencies, sample,
                   save_model, to_int8)
from support import distributed
from support.batching import Batch
from support.files import InputError

GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text())
PROMPTS = [[5, 17, 3], [9, 1, 30, 77, 2, 64, 8], [42]]
IDS = torch.tensor([PROMPTS[1]])


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
    assert torch.equal(frequencies[:24], plain[:24])            # unchanged up to pair 23,
    assert torch.allclose(frequencies[40:], plain[40:] / 4)     # divided by the factor from 40 on
    assert (frequencies[24:40] < plain[24:40]).all()


def test_packed_documents_do_not_see_each_other(small_model):
    ids = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    starts = torch.tensor([[0] * 3 + [3] * 7])
    together = small_model(ids, starts)[0]
    alone = torch.cat([small_model(torch.tensor([prompt]))[0] for prompt in PROMPTS[:2]])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(small_model(ids)[0, 3:], alone[3:], atol=1e-2)


def test_activation_checkpointing_gives_the_same_gradients(small_model):
    calls = []
    small_model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for small_model.model.checkpointing in (False, True):
        small_model.zero_grad()
        small_model(IDS[:, :-1], targets=IDS[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in small_model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients))
    assert len(calls) == 1 + 2                              # the block is computed twice


def test_bf16_activations_with_fp32_weights(small_model):
    exact = small_model(IDS)
    small_model.compute_dtype = torch.bfloat16
    logits = small_model(IDS)
    assert logits.dtype == torch.bfloat16 and small_model.head.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.05


# ---- generation


def test_generation_with_a_cache_equals_naive_generation(small_model):
    """Also for prompts of unequal lengths in one batch."""
    expected = [generate_naive(small_model, prompt, 20) for prompt in PROMPTS]
    assert generate(small_model, PROMPTS, 20) == expected
    for prompt, ids in zip(PROMPTS, expected):
        assert generate(small_model, [prompt], 20) == [ids]


def test_logits_with_a_cache_are_those_without(small_model):
    """Read in parts of several sizes; a wrong position would change the logits of later tokens."""
    ids = torch.tensor([PROMPTS[1] * 4])                                        # (1, 28)
    cache = small_model.new_cache(torch.zeros(1, 1, dtype=torch.long))
    with torch.no_grad():
        parts = [small_model(part, cache=cache) for part in ids.split([9, 1, 1, 12, 5], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), small_model(ids), atol=1e-5, rtol=0)


def test_samples_of_a_prompt_share_its_forward_pass(small_model, monkeypatch):
    shapes = []
    forward = CausalLM.forward

    def recorded(self, ids, *rest, **flags):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *rest, **flags)

    monkeypatch.setattr(CausalLM, "forward", recorded)
    together = generate(small_model, PROMPTS[:2], 12, samples=3, temperature=1.0,
                        seeds=range(5, 11))
    assert shapes[:2] == [(2, len(PROMPTS[1])), (6, 1)]
    assert together == [generate(small_model, [PROMPTS[i // 3]], 12, temperature=1.0,
                                 seeds=[5 + i])[0]
                        for i in range(6)]
    assert len(set(map(tuple, together))) == 6


def test_stop_ids_end_a_sample_and_are_not_returned(small_model):
    [full] = generate(small_model, [PROMPTS[0]], 12)
    stop = full[5]
    [short] = generate(small_model, [PROMPTS[0]], 12, stop_ids={stop})
    assert short == full[:full.index(stop)]


def test_each_sample_stops_by_itself(small_model):
    streamed = [[], [], []]
    def on_token(i, token):
        streamed[i].append(token)
        return len(streamed[i]) == streamed[i][0] % 4 + 2

    new = generate(small_model, PROMPTS, 9, on_token=on_token)
    assert [len(ids) for ids in new] == [ids[0] % 4 + 2 for ids in new]
    for prompt, ids in zip(PROMPTS, new):               # although the batch shrinks meanwhile
        assert ids == generate(small_model, [prompt], 9)[0][:len(ids)]
    assert streamed == new


def test_ids_beyond_the_vocabulary_are_never_chosen(small_model):
    new = generate(small_model, PROMPTS, 40, temperature=5.0, vocab_size=7)
    assert {token for ids in new for token in ids} <= set(range(7))


def test_samples_depend_on_the_seed_only(small_model):
    def samples(seed, top_k=0):
        return generate(small_model, PROMPTS, 12, temperature=1.0, top_k=top_k,
                        seeds=range(seed, seed + 9))

    assert samples(1) == samples(1) != samples(2)
    assert samples(3, top_k=1) == generate(small_model, PROMPTS, 12)


def test_sample_draws_each_id_as_often_as_it_should():
    logits = torch.tensor([0.1, 0.2, 0.4, 0.3]).log().expand(1000, 4)
    uniform = (torch.arange(1000) + 0.5)[:, None] / 1000

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        ids = sample(logits.clone(), temperature, top_k, top_p, uniform)
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
def test_save_and_load(tmp_path, monkeypatch, case):
    model = fill_weights(CausalLM(Config(**{**SMALL, **CASES[case]}))).eval()
    # over itself, while it is memory-mapped, and over the other kind of files
    for shard_bytes, sharded in ((5e9, False), (5e9, False), (9000, True), (5e9, False)):
        monkeypatch.setattr("support.files.SHARD_BYTES", shard_bytes)
        save_model(model, tmp_path)
        files = [path.name for path in tmp_path.glob("*.safetensors*")]
        assert (files != ["model.safetensors"]) == sharded
        loaded = load_model(tmp_path, "cpu")
        assert loaded.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
        assert torch.equal(loaded(IDS), model(IDS))
        model = loaded
    assert load_model(tmp_path, "cpu", torch.bfloat16).head.dtype == torch.bfloat16


def test_a_tied_checkpoint_may_contain_the_head_as_well(small_model, tmp_path):
    save_model(small_model, tmp_path)
    tensors = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    assert "lm_head.weight" not in tensors and len(tensors) == 12 * 2 + 2
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path, "cpu")(IDS), small_model(IDS))


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
    theta = published.pop("rope_theta")                     # as newer transformers write it
    path.write_text(json.dumps({**published, "eos_token_id": [151645, 151643],
                                "rope_scaling": None,
                                "rope_parameters": {**YARN, "rope_theta": theta}}))
    config = Config.from_json(path)
    assert config.rope_theta == 1e6 and config.rope_scaling["factor"] == 4.0
    assert config.eos_token_id == [151645, 151643]


@pytest.mark.parametrize("change,message", [
    ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": 3}, "heads are not a multiple of key-value heads"),
    ({"hidden_size": 33}, "hidden_size is not a multiple of 4 heads"),
    ({"hidden_act": "gelu"}, "hidden_act is not silu"),
    ({"use_sliding_window": True}, "use_sliding_window is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is not yarn with a factor"),
    ({"rope_scaling": {"type": "yarn", "factor": "four"}},
     "rope_scaling has a value that is not a number")])
def test_other_configs_are_refused(small_model, tmp_path, change, message):
    save_model(small_model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, "cpu")


@pytest.mark.parametrize("original", [{}, {"original_max_position_embeddings": 64}])
def test_yarn_of_the_model_card_extends_the_context(small_model, tmp_path, original):
    """The card adds factor 4 to config.json and leaves max_position_embeddings as it was."""
    save_model(small_model, tmp_path)
    path = tmp_path / "config.json"
    scaling = {"type": "yarn", "factor": 4.0, **original}
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": scaling}))
    config = Config.from_json(path)
    assert config.context_length == 256 and config.max_position_embeddings == 64
    # raising the context afterwards leaves the rotation as it is
    longer = dataclasses.replace(config, max_position_embeddings=256)
    for before, after in zip(rotary_frequencies(config), rotary_frequencies(longer)):
        assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))


def test_sequences_join_and_leave_a_batch(small_model):
    """Continuous batching: whoever is beside it, each sample is what it would be alone."""
    prompts = [*PROMPTS, PROMPTS[1] * 4, [7], PROMPTS[0]]      # a later one longer than all before
    alone = [generate(small_model, [prompt], 15)[0] for prompt in prompts]
    ended = []
    for batch_size in (1, 2, 3, None):
        streamed = [[] for _ in prompts]

        def on_token(i, token, streamed=streamed):
            streamed[i].append(token)
            return len(streamed[i]) == streamed[i][0] % 9 + 3

        together = generate(small_model, prompts, 15, batch_size=batch_size, on_token=on_token,
                            on_end=lambda i, ids: ended.append(i))
        lengths = [min(15, ids[0] % 9 + 3) for ids in alone]
        assert together == [ids[:n] for ids, n in zip(alone, lengths)]
    assert sorted(ended) == sorted(list(range(len(prompts))) * 4)


def test_samples_that_join_later_keep_their_random_numbers(small_model):
    options = dict(samples=3, temperature=1.0, seeds=range(5, 14))
    assert generate(small_model, PROMPTS, 9, batch_size=2, **options) == generate(
        small_model, PROMPTS, 9, **options)


def test_unused_positions_are_dropped_from_the_cache(small_model):
    with torch.inference_mode():
        batch = Batch(small_model)
        batch.join([PROMPTS[1] * 5, PROMPTS[0]])
        assert batch.cache.length == 35 and batch.cache.starts.tolist() == [[0], [32]]
        batch.step(torch.tensor([1, 2]), [1])
        assert batch.cache.length == 4 and batch.cache.starts.tolist() == [[0]]
        ids = torch.tensor([PROMPTS[0] + [2]])
        assert torch.allclose(batch.logits, small_model(ids)[:, -1], atol=1e-5)


def test_8_bit_weights(small_model):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 5
    int8, scale = to_int8(x)
    assert int8.abs().amax(1).tolist() == [127] * 3                 # the largest of each row
    assert ((int8 * scale - x).abs() <= scale / 2 + 1e-6).all()
    assert to_int8(torch.zeros(2, 4))[0].tolist() == [[0] * 4] * 2

    weight, bias = torch.randn(16, 64), torch.randn(16)
    layer = Int8Linear(weight, bias)
    exact = (x @ weight.T + bias)
    assert (layer(x) - exact).norm() < 0.02 * exact.norm()
    assert layer(x[None]).shape == (1, 3, 16)

    ids = torch.tensor([PROMPTS[1]])
    exact = small_model(ids).log_softmax(-1)
    before = small_model.head.detach().clone()
    quantize(small_model)
    assert small_model.dtype_name == "int8"
    assert not list(small_model.model.layers[0].mlp.parameters())
    assert (small_model(ids).log_softmax(-1) - exact).abs().max() < 0.05
    assert torch.allclose(small_model.head, before, atol=0.01)      # for losses
    loss = small_model(ids[:, :-1], targets=ids[:, 1:]).detach()
    assert float(loss) == pytest.approx(
        -float(exact[0, :-1].gather(1, ids[0, 1:, None]).sum()), abs=0.1)
    assert generate(small_model, PROMPTS, 9) == [generate(small_model, [p], 9)[0] for p in PROMPTS]


@pytest.mark.parametrize("int8", [False, True])
def test_lora(small_model, int8):
    """It starts as the base model; only A and B have gradients; merged weights give the same."""
    weights = {name: weight.clone() for name, weight in small_model.state_dict().items()}
    if int8:
        quantize(small_model)
    before = small_model(IDS).detach()
    trained = dict(add_lora(small_model, 4, seed=1).named_parameters())
    assert torch.equal(small_model(IDS), before)
    small_model(IDS[:, :-1], targets=IDS[:, 1:]).backward()
    with_gradient = {name for name, weight in trained.items() if weight.grad is not None}
    assert with_gradient == {name for name in trained if ".lora_" in name}
    layer = "model.layers.0.mlp.up_proj"
    assert trained[f"{layer}.lora_B.weight"].grad.abs().max() > 0       # of A it is 0, as B is
    for name in with_gradient:
        torch.nn.init.normal_(trained[name], std=0.1)
    adapter = {name: trained[name].detach() for name in with_gradient}
    logits = small_model(IDS)
    assert (logits - before).abs().max() > 0.1
    merge_lora(weights, adapter, 4)
    merged = CausalLM(small_model.config)
    merged.load_state_dict(weights)
    assert torch.allclose(merged(IDS), logits, atol=0.3 if int8 else 1e-5)


def test_gradients_pass_through_8_bit_weights():
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(6, 8), torch.randn(6))
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * layer(x).detach() @ (layer.int8 * layer.scale.T)
    assert torch.allclose(x.grad, expected, atol=1e-5)


def test_dtype_for_inference_is_measured(small_model, tmp_path, monkeypatch):
    save_model(small_model.bfloat16(), tmp_path)
    for seconds, dtype in (((2, 1, 3), "bfloat16"), ((1, 2, 3), "float32"), ((2, 3, 1), "int8")):
        remaining = dict(zip((torch.float32, torch.bfloat16, "int8"), seconds))

        def measured(make_layer, *shape):
            layer, dtype = make_layer(torch.ones(2, 3))
            return remaining["int8" if isinstance(layer, Int8Linear) else dtype]

        monkeypatch.setattr(distributed, "inference_seconds", measured)
        model = load_model(tmp_path, "cpu", "auto", int8=True)
        assert model.dtype_name == dtype and "times as long" in model.dtype_reason
        assert load_model(tmp_path, "cpu", "auto").dtype_name != "int8"     # only where allowed
    monkeypatch.setattr(distributed, "available_bytes", lambda: 1000)
    assert load_model(tmp_path, "cpu", "auto").head.dtype == torch.bfloat16     # no room for fp32
    monkeypatch.undo()
    load_model(tmp_path, "cpu", "auto", int8=True)                              # really measured
    save_model(small_model.float(), tmp_path)
    assert load_model(tmp_path, "cpu", "auto").head.dtype == torch.float32      # never lowered


def test_generation_config_is_preserved(small_model, tmp_path):
    """Training keeps the stop ids and sampling settings of an instruct model."""
    save_model(small_model, tmp_path / "a")
    path = tmp_path / "a" / "generation_config.json"
    assert json.loads(path.read_text()) == {"bos_token_id": 151643, "eos_token_id": 151643,
                                            "max_new_tokens": 2048}
    published = {"do_sample": True, "eos_token_id": [5, 3], "temperature": 0.7, "top_k": 20}
    path.write_text(json.dumps(published))
    save_model(load_model(tmp_path / "a", "cpu"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == published
    path.unlink()
    assert load_model(tmp_path / "a", "cpu").generation_config["eos_token_id"] == 151643


def test_a_checkpoint_of_several_dtypes_is_loaded_in_that_of_the_embedding(tmp_path):
    model = fill_weights(CausalLM(Config(**SMALL, tie_word_embeddings=False))).bfloat16()
    save_model(model, tmp_path)
    logits = load_model(tmp_path, "cpu")(IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name or "lm_head" in name else tensor
             for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(IDS), logits)
    assert load_model(tmp_path, "cpu", torch.float32).head.dtype == torch.float32


def test_file_permissions_follow_the_umask(small_model, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(small_model, tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


UP = "model.layers.1.mlp.up_proj.weight"


def change_tensors(path, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("damage,message", [
    (lambda path: path.unlink(), "no such file"),
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), "safetensors: cut off or damaged"),
    (lambda path: path.with_name("model.safetensors.index.json").write_text('{"weight_map": []}'),
     "has no weight_map to safetensors files"),
    (lambda path: change_tensors(path, lambda tensors: tensors.pop(UP)),
     f"1 tensors are missing, the first is {UP}"),
    (lambda path: change_tensors(path, lambda tensors: tensors.update({UP: torch.zeros(3, 32)})),
     r"up_proj.weight has shape \(3, 32\), config.json asks for \(48, 32\)"),
    (lambda path: change_tensors(path, lambda tensors: tensors.update({UP: tensors[UP].int()})),
     "up_proj.weight holds torch.int32, not floats"),
    (lambda path: change_tensors(path, lambda tensors: tensors.update(extra=torch.zeros(1))),
     "extra has shape .* no such tensor")])
def test_damaged_checkpoints(small_model, tmp_path, damage, message):
    save_model(small_model, tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, "cpu")
