"""Which rank's file of a ``torch`` checkpoint holds what, and under which name."""

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_attnedit.convert.grouped_experts import expert_by_expert
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError

ITERATION = 1  # older Megatron-LM takes 0 for no checkpoint
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LegacyLayout:
    """The layout that the files are for; experts are cut over tensor parallelism, too.

    Raises:
        UserError: a size does not divide the layers, the experts or their width.
    """

    tp: int
    pp: int
    ep: int
    hf: HFConfig

    def __post_init__(self) -> None:
        if self.hf.num_hidden_layers % self.pp:
            raise UserError(
                f"--pipeline-model-parallel-size {self.pp} does not divide "
                f"num_hidden_layers {self.hf.num_hidden_layers}"
            )
        if self.hf.num_experts and self.hf.moe_intermediate_size % self.tp:
            raise UserError(
                f"--tensor-model-parallel-size {self.tp} does not divide moe_intermediate_size "
                f"{self.hf.moe_intermediate_size} of {self.hf.path}"
            )
        if self.hf.num_experts % self.ep or (self.ep > 1 and not self.hf.num_experts):
            raise UserError(
                f"--expert-model-parallel-size {self.ep} does not divide "
                f"num_experts {self.hf.num_experts}"
            )

    @property
    def local_experts(self) -> int:
        """Experts of a rank."""
        return self.hf.num_experts // self.ep

    def args(self) -> argparse.Namespace:
        """What Megatron compares with its own flags before it loads."""
        hf = self.hf
        return argparse.Namespace(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            expert_model_parallel_size=self.ep,
            num_layers=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            ffn_hidden_size=hf.intermediate_size,
            num_attention_heads=hf.num_attention_heads,
            group_query_attention=True,
            num_query_groups=hf.num_key_value_heads,
            # Where MindSpeed-LLM's converter looks; else it takes each head for a group.
            num_key_value_heads=hf.num_key_value_heads,
            kv_channels=hf.head_dim,
            num_experts=hf.num_experts or None,
            untie_embeddings_and_output_weights=not hf.tie_word_embeddings,
            iteration=ITERATION,
        )

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """Tensor, pipeline and expert rank of every file."""
        return itertools.product(range(self.tp), range(self.pp), range(self.ep))

    def folder(self, tp: int, pp: int, ep: int) -> str:
        """Megatron's name of a rank's folder."""
        pipeline = f"_{pp:03d}" if self.pp > 1 else ""
        return f"mp_rank_{tp:02d}{pipeline}" + (f"_{ep:03d}" if self.ep > 1 else "")

    def homes(self, name: str) -> list[tuple[int, int, str]]:
        """Pipeline rank, expert rank and local name of every copy of a parameter."""
        stages = [0 if name == EMBEDDING else self.pp - 1]
        expert_ranks = list(range(self.ep))
        local = name
        if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
            per_stage = self.hf.num_hidden_layers // self.pp
            stage, index = divmod(int(layer[1]), per_stage)
            stages, local = [stage], f"decoder.layers.{index}.{name[layer.end() :]}"
        if expert := re.search(r"\.local_experts\.(\d+)\.", local):
            rank, index = divmod(int(expert[1]), self.local_experts)
            expert_ranks = [rank]
            local = f"{local[: expert.start(1)]}{index}{local[expert.end(1) :]}"
        homes = [(stage, rank, local) for stage in stages for rank in expert_ranks]
        if name == EMBEDDING and self.hf.tie_word_embeddings and self.pp > 1:
            homes += [(self.pp - 1, rank, OUTPUT) for rank in expert_ranks]
        return homes

    def shapes(self, rows: Sequence[ParamMapping]) -> dict[tuple[int, int], Shapes]:
        """By pipeline and expert rank, what a rank holds, experts one by one.

        Raises:
            UserError: the tensor-parallel size cannot cut a row, of a student's attention, say.
        """
        for row in rows:
            if not row.can_be_cut(self.tp):
                raise UserError(
                    f"--tensor-model-parallel-size {self.tp} does not divide "
                    f"{', '.join(row.hf_params)} {list(row.shape)} along dimension {row.tp_dim}"
                )
        held: dict[tuple[int, int], Shapes] = {}
        for row in rows:
            for pp, ep, local in self.homes(row.megatron_param):
                shapes = held.setdefault((pp, ep), {})
                assert local not in shapes, local
                shapes[local] = row.shard_shape(self.tp)
        return held

    def one_by_one(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a rank holds, with views of the experts where Megatron groups them."""
        count, hidden_size = self.local_experts, self.hf.hidden_size
        return {
            part: view
            for name, param in params.items()
            for part, view in expert_by_expert(name, param, count, hidden_size)
        }
