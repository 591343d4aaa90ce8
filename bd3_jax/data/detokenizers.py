"""Undo the tokenisation in which some corpora are distributed (`do n't , he said .` -> `don't, he said.`).

Perplexities on these corpora depend on it, so the rules and their order are those behind the published numbers
(Block Diffusion, table 5; Sahoo et al., arXiv 2406.07524, table 3). They are not tidied up: rules that act on one
occurrence and miss the next stay so.
"""

import re
from collections.abc import Callable

Detokenizer = Callable[[str], str]


def wikitext(text: str) -> str:
    """`= = Title = =`, `1 @,@ 000`, `( a )`, spaced punctuation."""
    text = _replace(text, ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
    text = _replace(text, *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"))
    for opening, closing in ("()", "[]", "{}", '""', "''"):
        text = _strip_inside(text, opening, closing)
    text = _replace(text, ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"))
    return _replace(text, (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))


def ptb(text: str) -> str:
    """Penn Treebank: split clitics, `N` for numbers, `<unk>`."""
    text = _replace(text, (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/"))
    text = re.sub(" N(?= )", " 1", text)
    return _replace(text, ("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))


def lm1b(text: str) -> str:
    """One Billion Words: every mark is a word of its own."""
    text = _replace(text, ("http : / / ", "http://"), ("https : / / ", "https://"))
    text = re.sub(r" '(\w+)", r"'\1", text)
    for end in " $":
        text = re.sub(rf" (\w+) \.{end}", r" \1." + end.strip("$"), text)
    for mark in "?!":
        text = re.sub(rf" \{mark}$", mark, text.replace(f" {mark} ", f"{mark} "))
    text = _replace(text, (" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/"))
    for quote in "\"'":
        text = re.sub(f"{quote} ([^{quote}]+) {quote}", rf"{quote}\1{quote}", text)
    text = re.sub(r"\( ([^()]+) \)", r"(\1)", text)
    text = re.sub(r"\[ ([^\[\]]+) \]", r"[\1]", text)
    return _replace(text, ("$ ", "$"), ("£ ", "£"))


def lambada(text: str) -> str:
    """Straight double quotes; a line of its own, as GPT-2 was evaluated."""
    return "\n" + _replace(text, ("“", '"'), ("”", '"')).strip()


def scientific_papers(text: str) -> str:
    return lm1b(wikitext(text))


def unchanged(text: str) -> str:
    return text


def _replace(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _strip_inside(text: str, opening: str, closing: str) -> str:
    """`( a )` -> `(a)`: white space next to paired brackets or quotes."""
    parts, done = [], 0
    while (first := text.find(opening, done)) >= 0 and (last := text.find(closing, first + 1)) >= 0:
        parts += [text[done : first + 1], text[first + 1 : last].strip(), closing]
        done = last + 1
    return "".join([*parts, text[done:]])
