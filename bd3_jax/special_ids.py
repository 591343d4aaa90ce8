"""What the data says of its tokens, and a language model needs to know."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids with a meaning of their own, all in [0, vocab_size).

    `vocab_size` is V: the tokenizer's vocabulary plus the mask token if it has none of its own; then mask = V - 1.
    """

    bos: int
    eos: int
    mask: int
    vocab_size: int
