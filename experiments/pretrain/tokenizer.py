"""A byte-level BPE tokenizer of the embedded model's kind, trained on any text."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<pad>")


def train_tokenizer(documents: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """BPE over bytes with `vocab` tokens (at least 259: bytes and three special ones); `<s>` in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B:1", [("<s>", bpe.token_to_id("<s>"))])
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
