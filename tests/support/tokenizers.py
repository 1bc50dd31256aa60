"""A small tokenizer of each kind, trained here."""

import pytest

SENTENCE = "the attention of a layer is edited and the student learns from its teacher"


def corpus(documents: int) -> list[str]:
    """Different texts of different lengths, always the same."""
    words = SENTENCE.split()
    return [
        " ".join(words[(i * 7 + j * j) % len(words)] for j in range(5 + i % 11)) + f" {i}."
        for i in range(documents)
    ]


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory):
    """Directory of a byte-level BPE tokenizer with about 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(50), trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    fast.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """File of a SentencePiece BPE model with 80 tokens."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(200)),
        model_prefix=str(prefix),
        vocab_size=80,
        model_type="bpe",
        minloglevel=2,
    )
    return f"{prefix}.model"
