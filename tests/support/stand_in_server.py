"""OpenAI's completions interface over a model of transformers, in a thread of this process."""

import contextlib

import torch

from megatron_attnedit.evaluate.tasks.answers import LocalModel
from tests.support.loopback import serving_json


@contextlib.contextmanager
def serving(model, tokenizer, max_model_len=2048):
    """The URL of a running server; ``served`` requests are kept in its second part."""
    answers, served = LocalModel(model, tokenizer, 1), []

    def post(path, asked):
        served.append(asked)
        prompts = asked["prompt"]
        if asked.get("echo"):
            choices = [scored(model, prompt) for prompt in prompts]
        else:
            texts = answers.complete(prompts, asked["max_tokens"])
            stops = asked.get("stop") or []
            choices = [{"text": cut(text, stops)} for text in texts]
        # In any order, as the interface allows.
        numbered = [{"index": i, **choice} for i, choice in enumerate(choices)]
        return 200, {"choices": numbered[::-1]}

    models = {"data": [{"id": "student", "max_model_len": max_model_len}]}
    with serving_json(lambda: (200, models), post) as url:
        yield url, served


def cut(text, stops):
    for stop in stops:
        text = text.split(stop)[0]
    return text


@torch.no_grad()
def scored(model, prompt):
    """Log-probabilities of a prompt's own tokens, and one token more."""
    ids = torch.tensor([prompt])
    logits = model(ids).logits[0].float().log_softmax(-1)
    best = logits.max(-1)
    own = logits[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()
    top = [{"own": a, "best": b} for a, b in zip(own, best.values[:-1].tolist(), strict=True)]
    last = best.values[-1].item()
    log_probs = {"token_logprobs": [None, *own, last], "top_logprobs": [None, *top, {"best": last}]}
    return {"text": "", "logprobs": log_probs}
