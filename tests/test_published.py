"""The published Qwen2.5-Coder-0.5B-Instruct gives the text and the log-probabilities that
transformers gives.

MINICODER_WEIGHTS names its folder; published.py wrote published.json. The tests take 15 minutes.
"""

import json
import os

import pytest
import torch
from conftest import ROOT
from published import NEW_TOKENS, prompts

from fim import load
from model import generate
from support.batching import Batch

PATH = ROOT / "tests" / "published.json"
GOLDEN = json.loads(PATH.read_text())["answers"]
pytestmark = pytest.mark.skipif("MINICODER_WEIGHTS" not in os.environ,
                                reason="MINICODER_WEIGHTS does not name a checkpoint folder")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, "int8"], ids=str)
def published(request):
    return load(os.environ["MINICODER_WEIGHTS"], "cpu", request.param)


def log_probs(model, prompt, ids):
    """The log-probability of each of these ids after a prompt, and whether it is the most likely
    one: (len(ids),) each."""
    with torch.inference_mode():
        batch = Batch(model)                # gives the last logits only; all would take gigabytes
        batch.join([prompt])
        after_prompt = batch.logits                                             # (1, V)
        rest = model(torch.tensor([ids[:-1]]), cache=batch.cache)[0]            # (len(ids) - 1, V)
        logits = torch.cat([after_prompt, rest]).float()
    likely = logits.argmax(-1) == torch.tensor(ids)
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0], likely


@pytest.mark.parametrize("name", GOLDEN)
def test_log_probabilities_and_text(published, name):
    """float32 gives the same text, the other dtypes nearly the same log-probabilities."""
    model, tokenizer = published
    prompt, expected = prompts(tokenizer)[name], GOLDEN[name]
    assert len(prompt) == expected["prompt_tokens"]
    computed, likely = log_probs(model, prompt, expected["ids"])
    error = (computed - torch.tensor(expected["log_probs"])).abs()
    if model.dtype_name == "float32":
        assert error.max() < 1e-3 and likely.all()
        assert generate(model, [prompt], NEW_TOKENS) == [expected["ids"]]
    else:
        assert error.mean() < {"bfloat16": 0.05, "int8": 0.15}[model.dtype_name]
        assert likely.float().mean() >= {"bfloat16": 0.9, "int8": 0.8}[model.dtype_name]


def test_text_in_a_batch_of_unequal_prompts(published):
    model, tokenizer = published
    if model.dtype_name != "float32":
        pytest.skip("rounding may change which id is the most likely")
    short = {name: ids for name, ids in prompts(tokenizer).items() if len(ids) < 1000}
    together = generate(model, list(short.values()), NEW_TOKENS, batch_size=4)
    assert together == [GOLDEN[name]["ids"] for name in short]
