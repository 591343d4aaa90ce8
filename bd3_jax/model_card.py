"""The README.md beside exported weights: what they are, what they were trained on, how to use them."""

from etils import epath

from bd3_jax.checkpoints.architecture import TOKENIZERS
from bd3_jax.checkpoints.source import Weights
from bd3_jax.data.manifest import load_manifest
from bd3_jax.errors import UserError
from bd3_jax.metrics import read_all, weights_of
from bd3_jax.pretrained import Pretrained

_UNKNOWN = "not stated by the source"

_OBJECTIVES = {
    "ar": "autoregressive",
    "mdlm": "masked diffusion (MDLM, arXiv 2406.07524)",
    "sedd": "absorbing score-entropy diffusion (SEDD, arXiv 2310.16834)",
    "bd3lm": "block diffusion (BD3-LM, arXiv 2503.09573)",
}

# Test perplexity on OpenWebText (Block Diffusion, table 4).
_PERPLEXITY = {
    f"kuleshov-group/bd3lm-owt-block_size{size}": value for size, value in ((4, 20.73), (8, 21.68), (16, 22.27))
}


def model_card(loaded: Pretrained, name: str) -> str:
    """Markdown under the title `name`, with the front matter that the Hugging Face hub reads."""
    a = loaded.architecture
    searched = a.searched and (loaded.run is None or loaded.config.search.enabled)
    facts = {
        "objective": f"{a.objective}: {_OBJECTIVES[a.objective]}",
        "block size B": str(a.block_size),
        "context L": f"{a.length} tokens",
        "network": f"{a.num_layers} layers, width {a.width}, {a.num_heads} heads, "
        + (f"adaLN with {a.cond_dim} features, " if a.adaln else "no adaLN, ")
        + f"{_count(loaded):,} parameters, float32",
        "vocabulary V": f"{a.vocab_size:,} with the mask" + (f" (id {a.ids.mask})" if a.ids else ""),
        "noise": f"{a.schedule}, t in [{a.low}, {a.high}]"
        + (" (searched)" if searched else "")
        + f"; position 0 is {'never' if a.ignore_bos else 'also'} masked",
        "weights": "exponential moving average" if loaded.weights == "ema" else "raw, not averaged",
        "source": f"`{loaded.source}`",
        **_training(loaded),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
library_name: bd3_jax
tags: [diffusion, text-generation, {a.objective}]
---

# {name}

| | |
| --- | --- |
{rows}

## Use

```python
import bd3_jax

model = bd3_jax.load_pretrained("{name}")  # this folder
model.sample(num_samples=2)
model.perplexity(["Some text."])
```

`bd3 train --config=... --config.init_from={name}` starts training from it.
"""


def _training(loaded: Pretrained) -> dict[str, str]:
    """Tokenizer, corpus, EOS policy, steps and evaluation, as far as they are known."""
    if loaded.run is None:
        hub = loaded.source
        owt = hub.startswith(("kuleshov-group/", "louaaron/sedd")) and ("owt" in hub or "sedd" in hub)
        no_injection = "noeos" in hub or hub in _PERPLEXITY or "bd3lm-owt" in hub
        return {
            "tokenizer": TOKENIZERS.get(loaded.architecture.vocab_size, _UNKNOWN),
            "EOS": "after every document, none around rows" if owt and no_injection else _UNKNOWN,
            "training corpus": "OpenWebText" if owt else _UNKNOWN,
            "training steps": _UNKNOWN,
            "evaluation": f"test perplexity {_PERPLEXITY[hub]} on OpenWebText (published: Block Diffusion, table 4)"
            if hub in _PERPLEXITY
            else _UNKNOWN,
        }
    data, training = loaded.config.data, loaded.config.training
    own = loaded.tokenizer.fingerprint[:12] if loaded.tokenizer else "not found"
    steps = f"{loaded.step:,} of {training.batch_size} sequences"
    if loaded.config.init_from:
        steps += f", from the weights of `{loaded.config.init_from}`"
    return {
        "tokenizer": f"{data.tokenizer or 'that of the corpus, see tokenizer.json'} (fingerprint {own})",
        "EOS": f"{'after every document' if data.insert_eos else 'not between documents'}; "
        f"{'BOS and EOS around every row' if data.insert_special else 'none around rows'}",
        "training corpus": data.corpus + _licence(loaded.run),
        "training steps": steps,
        "evaluation": _evaluation(loaded.run, loaded.weights, loaded.step or 0),
    }


def _licence(workdir: epath.Path) -> str:
    """Of the corpus' text, where the run's manifest names one."""
    try:
        licence = load_manifest(workdir).licence
    except (OSError, UserError):
        return ""
    return f"; licence of the text: {licence}"


def _evaluation(workdir: epath.Path, weights: Weights, step: int) -> str:
    """Those weights' evaluations at the last step, up to `step`, that has any: the newest of each split and method."""
    try:
        records = [record for record in read_all(workdir) if "eval/perplexity" in record]
        records = [record for record in records if weights_of(record) == weights and record["step"] <= step]
        records = [record for record in records if record["step"] == records[-1]["step"]]
        newest = {(record["eval/split"], record["eval/estimator"]): record for record in records}
        return "; ".join(
            f"perplexity {record['eval/perplexity']:.3f} +- {record['eval/perplexity_standard_error']:.3f} "
            f"({estimator}) on {record['eval/tokens']:,} tokens of the {split} split, after {record['step']:,} steps"
            for (split, estimator), record in newest.items()
        ) or _UNKNOWN  # fmt: skip
    except (OSError, ValueError, KeyError, IndexError, TypeError, UserError):
        return _UNKNOWN


def _count(loaded: Pretrained) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
