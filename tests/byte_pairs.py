"""A small tokenizer of the same make as Llama 3's: byte pairs, numbers in pieces of up to three
digits, begin-of-text in front. It is made here, of the project's own text."""

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from data import BACKTRACK, EOS, GOAL, OPERATORS, Tokenizer, prompt_text

BOS = "<|begin_of_text|>"
PIECES = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_pairs() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    texts = [prompt_text([number, 999 - number], number) + GOAL for number in range(1000)]
    texts += [f"12{operator}3={BACKTRACK}" for operator in OPERATORS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False),
    )
    for text in (BOS, EOS, BACKTRACK):
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return Tokenizer(backend)
