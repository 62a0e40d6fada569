"""Write golden.json: what other libraries compute, for tests that run without them.

    pip install transformers tokenizers     # in an environment of its own
    python tests/make_golden.py

    pip install trl==0.16.0 transformers==4.50.3 datasets==3.5.0    # in another one
    python tests/make_golden.py preferences
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import CASES, CODE, DATA, SMALL, fill_weights

from tokenizer import PATTERN, SPECIAL_TOKENS

CHAT = [{"role": "user", "content": "Add 1 to n."},
        {"role": "assistant", "content": "```python\nn + 1\n```"},
        {"role": "user", "content": "And 2?"},
        {"role": "assistant", "content": "n + 2\n"}]
PROMPT = [5, 17, 3, 88, 42, 9, 61, 30, 2, 77, 54, 11]


def logits(changes):
    """Logits and greedy text of a small model of transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    settings = {"tie_word_embeddings": True, **SMALL, **changes}
    scaling = settings.pop("rope_scaling", None) or {"rope_type": "default"}
    theta = settings.pop("rope_theta", 1e6)
    config = Qwen2Config(**settings, rope_parameters={**scaling, "rope_theta": theta})
    model = fill_weights(Qwen2ForCausalLM(config)).eval()
    with torch.no_grad():
        out = model(torch.tensor([PROMPT])).logits[0]
        greedy = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False,
                                eos_token_id=None, pad_token_id=0)[0, len(PROMPT):]
    rounded = [[round(x, 7) for x in row] for row in out.tolist()]
    return {"logits": rounded, "greedy": greedy.tolist()}


def merges():
    """The merges that tokenizers learns from CODE."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=400 - 22, min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([CODE * 3], trainer)
    return [list(pair) if not isinstance(pair, str) else pair.split(" ")
            for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def chat():
    """The ids of CHAT by the published template and vocabulary, and the indices of the assistant's
    answers, each with its <|im_end|>."""
    from transformers import Qwen2TokenizerFast
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt"):
            compressed = (DATA / "tokenizer" / f"{name}.gz").read_bytes()
            (Path(folder) / name).write_bytes(gzip.decompress(compressed))
        published = Qwen2TokenizerFast.from_pretrained(folder)
    published.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:]})
    template = (DATA / "tokenizer" / "Qwen2.5-Instruct.chat_template.jinja").read_text()
    text = published.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    encoded = published(text, return_offsets_mapping=True)
    answers = [(text.index(turn["content"]), turn["content"] + "<|im_end|>") for turn in CHAT[1::2]]
    learned = [i for i, (start, _) in enumerate(encoded["offset_mapping"])
               if any(first <= start < first + len(answer) for first, answer in answers)]
    return {"messages": CHAT, "ids": encoded["input_ids"], "learned": learned}


def preferences():
    """TRL's losses, rewards and gradients for log-probabilities, summed over answers or averaged.
    """
    from trl import DPOTrainer
    rows = [(torch.rand(5, generator=torch.Generator().manual_seed(i)) - 1.2) * 40
            for i in range(4)]
    lengths = torch.tensor([[12.0, 7, 30, 21, 9], [10.0, 9, 28, 33, 9]])
    golden = []
    for kind, loss_type in (("sigmoid", "sigmoid"), ("length", "sigmoid"), ("ipo", "ipo")):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu"), reference_free=False, beta=0.3,
            f_divergence_type="reverse_kl", f_divergence_params=None, label_smoothing=0,
            loss_type=loss_type)
        inputs = [row / (1 if kind == "sigmoid" else lengths[i % 2]) for i, row in enumerate(rows)]
        inputs = [row.clone().requires_grad_() for row in inputs]
        losses, chosen, rejected = DPOTrainer.dpo_loss(trainer, *inputs)
        losses.sum().backward()
        golden.append({"kind": kind, "beta": 0.3, "inputs": [row.tolist() for row in inputs],
                       "losses": losses.tolist(), "chosen": chosen.tolist(),
                       "rejected": rejected.tolist(),
                       "gradients": [row.grad.tolist() for row in inputs[:2]]})
    return golden


if __name__ == "__main__":
    path = Path(__file__).with_name("golden.json")
    golden = json.loads(path.read_text()) if path.exists() else {}
    if sys.argv[1:] == ["preferences"]:
        golden["preferences"] = preferences()
    else:
        golden.update({"prompt": PROMPT, "merges": merges(), "chat": chat(),
                       **{name: logits(changes) for name, changes in CASES.items()}})
    path.write_text(json.dumps(golden) + "\n")
