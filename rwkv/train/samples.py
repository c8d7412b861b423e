"""Create the training and validation samples selected by the flags."""

from typing import Any

from rwkv.config import TrainConfig
from rwkv.data import offsets, provenance
from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Contexts, Documents, Samples, ValidationSamples
from rwkv.data.token_stream import Stream, split
from rwkv.errors import UserError


def check(c: TrainConfig) -> None:
    """Raise UserError for invalid or incompatible sampling flags. `checks.numbers` runs first."""
    documents = c.doc_training or c.doc_training_seq
    if documents and (c.magic_prime or c.my_pile_shift > 0):
        raise UserError(
            "--doc_training samples documents and --magic_prime samples positions of the token stream: use only one of them"
        )
    if c.my_random_steps and not c.magic_prime:
        raise UserError(
            f"--my_random_steps {c.my_random_steps} applies to prime sampling: pass --magic_prime too, or omit it"
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


def make(c: TrainConfig, data: Dataset, validation: Dataset | None = None) -> tuple[Samples, ValidationSamples | None]:
    """Training samples, and validation samples from `validation`, or from a part of `data` with
    val_split.

    Raises:
        UserError: training or validation data is too short, magic_prime is invalid, no document
            fits, or the loss mask excludes all tokens.
    """
    options: dict[str, Any] = {"separator": c.doc_sep, "chatml": bool(c.chatml_mask)}
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
    train, rest = (Stream(data, spans, **options) for spans in split(data, c.val_split, c.ctx_len))
    return _source(c, data, train), ValidationSamples(_source(c, data, rest, validation=True), c.val_samples)


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
