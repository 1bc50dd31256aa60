"""Completions by a model of transformers in this process.

Every row of a batch draws from a generator of its own: adding Gumbel noise to log-probabilities
and taking the largest is drawing from the distribution (Gumbel 1954; Maddison et al. 2014,
arXiv:1411.0030, section 2). So a completion depends on its seed, not on the rows beside it.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.data.tokenizer import sha256_of
from megatron_attnedit.errors import UserError, one_line
from megatron_attnedit.generate.completions import CUT_OFF, Completion, Task
from megatron_attnedit.generate.settings import Sampling


class RowNoise:
    """A processor of logits after which the largest one is a draw.

    Args:
        seeds: One a row.
        sampling: Temperature, top-k and top-p, in this order, as in vLLM.
        device: Of the logits.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, device: torch.device) -> None:
        from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

        self._temperature = sampling.temperature
        self._warpers: list[Any] = []
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[b, v]`` with noise; unchanged at temperature 0."""
        if not self._temperature:
            return scores
        scores = scores.float() / self._temperature
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = torch.stack(
            [
                torch.empty(scores.shape[1], device=scores.device).exponential_(generator=generator)
                for generator in self._generators
            ]
        )
        return scores.log_softmax(-1) - noise.log()


@dataclass
class LocalModel:
    """A loaded model.

    Attributes:
        directory: Where it is from.
        model: Of transformers.
        tokenizer: Its own, with a chat template.
        sampling: How it draws.
        batch_size: Prompts at a time.
    """

    directory: Path
    model: Any
    tokenizer: Any
    sampling: Sampling
    batch_size: int

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(f"--model {self.directory}: its tokenizer has no chat template")

    def describe(self) -> dict[str, Any]:
        """Name, class and a hash of the weights."""
        files = sorted(self.directory.glob("*.safetensors"))
        return {
            "through": "transformers",
            "model": self.directory.resolve().name,
            "architecture": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights_sha256": sha256_of(files),
        }

    def complete(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Completion | BadRow]]:
        """See ``completions.Model``."""
        iterator = iter(tasks)
        while batch := list(itertools.islice(iterator, self.batch_size)):
            prompts = [self._ids(task) for task in batch]
            asked = [i for i, ids in enumerate(prompts) if not isinstance(ids, BadRow)]
            answers = iter(self._generate([prompts[i] for i in asked], [batch[i] for i in asked]))
            for task, ids in zip(batch, prompts, strict=True):
                yield task, ids if isinstance(ids, BadRow) else next(answers)

    def _ids(self, task: Task) -> list[int] | BadRow:
        where = task.prompt.where
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                task.prompt.messages,
                tools=task.prompt.tools,
                add_generation_prompt=True,
                return_dict=False,
                **self.sampling.variables(),
            )
        except Exception as error:  # templates raise what they like
            reason = f"the chat template refuses it: {one_line(error)}"
            return BadRow(f"{where}: {reason}", "refused by the template")
        longest = self.model.config.max_position_embeddings
        if len(ids) + self.sampling.max_new_tokens > longest:
            reason = f"{len(ids)} tokens and --max-new-tokens are more than {longest} positions"
            return BadRow(f"{where}: {reason}", "longer than the model's positions")
        return ids

    @torch.no_grad()
    def _generate(self, prompts: Any, tasks: list[Task]) -> list[Completion]:
        if not prompts:
            return []
        width = max(map(len, prompts))
        device, pad = self.model.device, self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)
        real = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device
        )
        ends = self._ends()
        found = self.model.generate(
            ids,
            attention_mask=real,
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=ends,
            pad_token_id=pad,
            logits_processor=[RowNoise([task.seed for task in tasks], self.sampling, device)],
        )[:, width:].tolist()
        return [self._completion(row, set(ends)) for row in found]

    def _completion(self, row: list[int], ends: set[int]) -> Completion:
        end = next((i for i, token in enumerate(row) if token in ends), None)
        text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
        message = {"role": "assistant", "content": text}
        return Completion(message, CUT_OFF if end is None else "stop")

    def _ends(self) -> list[int]:
        given = getattr(self.model.generation_config, "eos_token_id", None)
        found = {self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
        return sorted(token for token in found if token is not None)
