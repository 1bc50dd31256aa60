"""What a run may be told about its data."""

from dataclasses import dataclass

from megatron_attnedit.training.options import option


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Flags are the field names with dashes."""

    train_data_path: list[str] = option(
        [], "prefix of .bin/.idx files, or weight prefix weight prefix ...", is_path=True
    )
    valid_data_path: list[str] = option(
        [], "the same for validation; empty: no validation", is_path=True
    )
    data_cache_path: str = option(
        "", "folder for data indices; default: data-cache inside --save", is_path=True
    )
    max_epochs: float = option(
        0.0, "times that the training data may be read; 0: any number", minimum=0
    )
    eod_mask_loss: bool = option(False, "leave end-of-document tokens out of the loss")
    reset_attention_mask: bool = option(
        False, "tokens of a sample see those of their own document only"
    )
    reset_position_ids: bool = option(False, "positions restart in each document of a sample")
