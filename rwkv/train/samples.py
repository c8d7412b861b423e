"""Create the training and validation samples selected by the flags."""

from typing import Any

import numpy as np

from rwkv.config import TrainConfig
from rwkv.data import offsets, provenance
from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Contexts, Documents, Samples, ValidationSamples
from rwkv.data.pairs import Pairs
from rwkv.data.token_stream import Stream, split, split_pairs
from rwkv.errors import UserError


def check(c: TrainConfig) -> None:
    """Raise UserError for invalid or incompatible sampling flags. Called after
    `checks.check_numbers`.
    """
    if c.objective == "dpo":
        _check_pairs(c)
    documents = c.doc_training or c.doc_training_seq
    if documents and (c.magic_prime or c.my_pile_shift > 0):
        raise UserError(
            "--doc_training samples documents and --magic_prime samples positions of the token stream: use only one of them"
        )
    if c.my_random_steps and not c.magic_prime:
        raise UserError(
            f"--my_random_steps {c.my_random_steps} applies to prime sampling: pass --magic_prime too, or omit it"
        )
    if c.my_pile_shift > 0 and not (c.magic_prime or c.my_pile_stage):
        raise UserError(
            f"--my_pile_shift {c.my_pile_shift} applies to prime sampling: pass --magic_prime too, or omit it"
        )
    if c.min_ctx_len and not documents:
        raise UserError(f"--min_ctx_len {c.min_ctx_len} applies to --doc_training 1: pass both, or omit it")
    if c.min_ctx_len > c.ctx_len:
        raise UserError(f"--min_ctx_len {c.min_ctx_len} must not be greater than --ctx_len {c.ctx_len}")
    if c.doc_sep < -1:
        raise UserError(f"--doc_sep {c.doc_sep} must be a token id, or -1 for none")
    if c.val_file and c.val_split:
        raise UserError(
            f"--val_file {c.val_file} and --val_split {c.val_split} both define the validation set; use only one of them"
        )
    if c.val_file and c.data_type not in ("binidx", "numpy"):
        raise UserError(
            f"--val_file {c.val_file}: --data_type {c.data_type} has its own vocabulary; use --val_split for validation"
        )
    for name in ("val_every", "keep_best", "patience"):
        if getattr(c, name) and not (c.val_split or c.val_file):
            raise UserError(
                f"--{name} {str(getattr(c, name)).lower()} needs a validation set: pass --val_file, or --val_split, such as 0.01"
            )


def _check_pairs(c: TrainConfig) -> None:
    """Raise UserError for flags that select windows or join documents, with preference pairs."""
    for name in ("magic_prime", "my_pile_shift", "my_random_steps", "my_pile_stage", "min_ctx_len", "chatml_mask"):
        if (value := getattr(c, name)) > 0 or (name == "magic_prime" and value):
            raise UserError(
                f"--{name} {value}: with --objective dpo a sample is one preference pair, padded to ctx_len; omit the flag"
            )


def make(c: TrainConfig, data: Dataset, validation: Dataset | None = None) -> tuple[Samples, ValidationSamples | None]:
    """Training samples, and validation samples from `validation`, or from a part of `data` with
    val_split.

    Raises:
        UserError: training or validation data is too short, magic_prime is invalid, no document
            fits, the loss mask excludes all tokens, or data are preference pairs without objective
            dpo, or the reverse.
    """
    for read in filter(None, (data, validation)):
        _check_kind(c, read)
        if c.doc_sep > (largest := np.iinfo(read.tokens.dtype).max):
            raise UserError(
                f"--doc_sep {c.doc_sep}: no token of {read.prefix} has this id, as its ids are {read.tokens.dtype} (at most {largest}); pass the id"
                " that ends documents, or -1"
            )
    pairs = c.objective == "dpo"
    # an end-of-document token in the middle would shift the pairs
    options: dict[str, Any] = {"separator": -1 if pairs else c.doc_sep, "chatml": bool(c.chatml_mask)}
    if validation is not None:
        try:
            samples = ValidationSamples(
                _source(c, validation, Stream(validation, **options), validation=True), c.val_samples
            )
        except UserError as error:
            raise UserError(f"--val_file {c.val_file}: {error}") from error
        return _source(c, data, Stream(data, **options)), samples
    if not c.val_split:
        return _source(c, data, Stream(data, **options)), None
    spans = split_pairs(data, c.val_split) if pairs else split(data, c.val_split, c.ctx_len)
    train, rest = (Stream(data, one, **options) for one in spans)
    return _source(c, data, train), ValidationSamples(_source(c, data, rest, validation=True), c.val_samples)


def _check_kind(c: TrainConfig, data: Dataset) -> None:
    """Raise UserError if the data are not of the kind that the objective needs."""
    paired = provenance.paired(data)
    if paired and c.objective != "dpo":
        raise UserError(
            f"{data.prefix}: preference pairs, whose rejected answers would be learned like the chosen ones; train with scripts/dpo.py or --objective dpo,"
            " or convert the chosen answers alone"
        )
    if c.objective == "dpo" and not paired:
        raise UserError(
            f"{data.prefix}: not preference pairs, which --objective dpo needs: convert records with prompt, chosen and rejected with"
            " scripts/convert.py, or omit --objective"
        )
    if paired and data.mask is None:
        raise UserError(f"{data.prefix}: preference pairs without a loss mask, which marks the answers; convert again")
    if paired and (data.sizes == 0).any():
        raise UserError(f"{data.prefix}: preference pairs with an empty document; convert again")


def _roles(data: Dataset) -> str:
    """For an error message: the roles in the data according to its manifest, if none is the
    assistant.
    """
    contents = (provenance.read(data.prefix) or {}).get("contents")
    roles = contents.get("roles") if isinstance(contents, dict) else None
    if not isinstance(roles, dict) or not roles or "assistant" in roles:
        return ""
    return f", no message has the role assistant (found: {', '.join(f'{role} {number}' for role, number in roles.items())})"


def _source(c: TrainConfig, data: Dataset, stream: Stream, validation: bool = False) -> Samples:
    if stream.masked and not stream.has_targets():
        raise UserError(
            f"no token of the {'validation set' if validation else 'data'} contributes to the loss: "
            + ("--chatml_mask 1 finds no answer in it" if c.chatml_mask else f"its loss mask is all 0{_roles(data)}")
            + "; inspect the data with scripts/inspect_data.py"
        )
    common: dict[str, Any] = {
        "stream": stream,
        "ctx_len": c.ctx_len,
        "samples": c.epoch_steps * c.micro_bsz,
        "seed": c.random_seed,
        "reset": bool(c.doc_reset),
    }
    if c.objective == "dpo":
        return Pairs(**common | {"reset": False}, sequential=bool(c.doc_training_seq))
    if c.doc_training or c.doc_training_seq:
        return Documents(
            **common, min_tokens=c.min_ctx_len or max(1, c.ctx_len // 4), sequential=bool(c.doc_training_seq)
        )
    if validation:
        return Contexts(**common)
    size = len(stream) - c.my_pile_shift
    prime = offsets.magic_prime(size, c.ctx_len) if c.magic_prime < 0 else c.magic_prime
    if c.magic_prime < 0 and not prime:
        raise UserError(
            f"--magic_prime -1: {size} tokens are fewer than two contexts of {c.ctx_len}; omit it, or lower --ctx_len"
        )
    return Contexts(**common, prime=prime, shift=c.my_pile_shift, random_first=c.my_random_steps)
