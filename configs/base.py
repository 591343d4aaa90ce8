"""Every setting, its default and its meaning: the paper's recipe for a small model.

The config string is `OBJECTIVE[,block_size=B]`, for instance `--config=configs/quickstart.py:bd3lm,block_size=8`.
"""

from ml_collections import ConfigDict

from bd3_jax.errors import UserError

# Objective -> (sampler, nucleus P), the paper's choices.
_SAMPLING = {
    "ar": ("autoregressive", 0.9),
    "mdlm": ("first_hitting", 0.9),
    "bd3lm": ("first_hitting", 0.9),
    "sedd": ("analytic", 0.99),
}


def get_config(string: str = "bd3lm,block_size=16") -> ConfigDict:
    objective, block_size = parse(string)
    sampler, nucleus = _SAMPLING[objective]
    return ConfigDict(
        dict(
            objective=objective,  # ar, mdlm, sedd or bd3lm
            block_size=block_size,  # B: tokens per block of bd3lm, a divisor of model.length; 0 elsewhere
            init_from="",  # weights to start from: a workdir, published folder, file or hub id; empty: random ones
            seed=0,  # of initialisation, data order, noise and dropout
            profile_steps=0,  # so many steps, from the 11th of a session on, are traced into WORKDIR/profile
            model=dict(
                length=1024,  # L: tokens per row, the training context
                width=768,  # d
                num_layers=12,
                num_heads=12,
                cond_dim=128,  # width of the time embedding that feeds adaLN (unused by ar)
                dropout=0.1,  # on both residual branches
                dtype="auto",  # of activations: float32, bfloat16, or auto (bfloat16 except on CPU)
                attention="auto",  # dense (yardstick), decomposed (never [2L, 2L]); on TPU flash, splash; on GPU triton
                attention_chunk=0,  # queries per chunk; 0: 64 on CPU, 256 elsewhere; of kernels 512 on TPU, 64 on GPUs
                scan_unroll=0,  # layers unrolled per iteration of the scan over layers; 0: 1, all for sampling on CPU
                remat="none",  # of a layer, the backward pass computes again: none, block (what is cheap), full
                max_logits=0,  # that a device holds at once in a loss; 0: 2^24 on CPU, 2^26 elsewhere
            ),
            noise=dict(
                schedule="loglinear",  # loglinear, square, square_root, log, cosine, scaled_loglinear
                low=1e-3,  # t ~ U[low, high] in training
                high=1.0,
                resample=False,  # keep each block's masked fraction within [low, high]
                ignore_bos=True,  # position 0 is never masked and carries no loss
            ),
            data=dict(
                mode="prepared",  # prepared: read rows of bd3 prepare; streaming: tokenise the corpus while reading
                corpus="wikipedia_summaries",  # a row of bd3_jax/data/corpora.py
                source="",  # file or folder already downloaded; empty: the corpus' usual place
                field="",  # of records in jsonl and parquet files that holds the text; empty: the corpus' usual one
                directory="data/wikipedia_summaries",  # where the prepared rows are written and read
                tokenizer="",  # a name from bd3_jax/data/tokenizers.py, or a path; empty: the corpus' usual one
                vocab_size=2000,  # of a tokenizer that is trained on the corpus
                insert_special=False,  # BOS and EOS around every row
                insert_eos=True,  # EOS after every document
            ),
            optimizer=dict(
                learning_rate=3e-4,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                clip_norm=1.0,  # of the global gradient norm
                warmup_steps=2500,  # linear, from 0
                decay="constant",  # after the warm-up: constant, or cosine to 0 at training.num_steps
                ema_decay=0.9999,  # of the averaged weights that evaluation and sampling use
            ),
            training=dict(
                num_steps=1_000_000,
                batch_size=512,  # sequences per update, over all devices
                microbatches=1,  # parts of a batch, one after the other: the gradients of an update are their mean
                noise_copies=1,  # K: noised copies of every row, which share its clean half (bd3lm)
                max_skipped=10,  # updates in a row with a loss or gradient that is not finite, before training stops
                log_every=100,  # steps between records of the training loss
                eval_every=5000,  # steps between validations
                sample_every=0,  # steps between samples, drawn as `sampling` says and recorded; 0: none
                checkpoint_every=5000,
                keep_checkpoints=2,  # the last so many
                keep_every=0,  # besides, those of every so many steps for good, a multiple of checkpoint_every; 0: none
                keep_best=0,  # besides, so many with the lowest NLL, of those at whose step there was a validation
                sigterm_status=143,  # exit status after SIGTERM; 0 would say that all is done
                wandb_project="",  # project of Weights & Biases (package wandb) that gets the metrics too; empty: none
            ),
            search=dict(  # of the interval of noise with the least variance, at every validation (mdlm, bd3lm)
                enabled=False,  # else the interval stays as it is
                widths=(0.5, 0.6, 0.7, 0.8, 0.9),  # of the candidates, which begin at 0, 0.05, ...
                num_batches=100,  # of eval.split, from its first row on
                batch_size=16,
            ),
            eval=dict(
                split="validation",
                batch_size=16,
                num_batches=100,  # of a validation during training; 0: the whole split, as --mode=eval always reads it
                # of the NELBO: monte_carlo, or low_variance (mdlm, bd3lm); or in B passes the exact likelihood of a
                # sampler that unmasks left_to_right, or the most_confident position first
                estimator="monte_carlo",
                without_special="never",  # BOS and EOS taken out of the rows, and these cut anew: never, training (in
                # validations during it) or always
                both_estimators=True,  # the other one too, where there is another; not of --suite
                seed=0,
                weights="ema",  # ema or raw, in --mode=eval; a validation during training always takes ema
            ),
            sampling=dict(
                # mdlm, bd3lm: first_hitting, ancestral, confidence, threshold, entropy_bounded or remasking;
                # sedd: analytic; ar: autoregressive
                sampler=sampler,
                num_samples=4,
                batch_size=4,  # sequences drawn at a time; rounded up to a multiple of mesh.data * mesh.fsdp
                prompt="",  # text that every sample starts with; it is never changed
                infill="",  # instead: a text with gaps, as in 'The [MASK*3] of the city', to be filled
                max_length=1024,  # tokens per sample, the prompt and BOS included
                num_steps=1000,  # T of ancestral, remasking and analytic; per block for bd3lm
                tokens_per_step=1,  # of confidence: how many of the likeliest draws each network call keeps
                threshold=0.9,  # of threshold: draws likelier than this are kept, at least one a call
                entropy_bound=0.1,  # of entropy_bounded: nats that draws at one call may miss of each other
                remasking=1.0,  # of remasking: eta, how readily drawn tokens are taken back; 0: never
                nucleus=nucleus,  # P: draw from the most probable tokens that hold at most P together, one at least
                top_k=0,  # draw from the k most probable tokens; 0: from all
                temperature=1.0,  # divides the logits; 1e-3 or more
                variable_length=False,  # a sample ends after its second EOS if it has over 256 tokens, or at max_length
                min_entropy=-1.0,  # nats, of the last 256 tokens; below it a sample is degenerate: discarded and drawn
                # anew, or cut off if variable_length. 0: any will do; -1: 4 with a vocabulary like GPT-2's, else 0
                kv_cache=True,  # keep keys and values of finished blocks (ar, bd3lm)
                seed=0,
                weights="ema",  # ema or raw
            ),
            mesh=dict(
                data=-1,  # devices that split the batch alone; -1: all that fsdp and tensor leave
                fsdp=1,  # devices that split the batch, parameters and optimiser state
                tensor=1,  # devices that split heads and MLP columns
            ),
        )
    )


def set_recipe(config: ConfigDict) -> None:
    """How long the paper trains, once objective, block size and length are set: 1 M steps.

    A BD3-LM begins as one block, 850 K steps, and goes on for 150 K with blocks of its own, searching the interval of
    its noise. Checkpoints of every 100 K steps and the best one are kept.
    """
    config.training.update(keep_every=100_000, keep_best=1)
    if config.objective == "bd3lm":
        config.training.num_steps = 850_000
        if config.block_size < config.model.length:
            config.training.num_steps = 150_000
            config.noise.resample = True
            config.search.enabled = True


def parse(string: str) -> tuple[str, int]:
    """'bd3lm,block_size=8' -> ('bd3lm', 8)."""
    objective, *options = string.split(",")
    if objective not in _SAMPLING:
        raise UserError(f"config string {string!r}: found {objective!r}, allowed: {', '.join(_SAMPLING)}")
    block_size = 0
    for option in options:
        name, _, value = option.partition("=")
        if name != "block_size" or not value.isdigit():
            raise UserError(f"config string {string!r}: found {option!r}, allowed: block_size=B")
        block_size = int(value)
    if objective == "bd3lm" and not block_size:
        raise UserError(f"config string {string!r}: bd3lm needs a block size, as in 'bd3lm,block_size=16'")
    return objective, block_size
