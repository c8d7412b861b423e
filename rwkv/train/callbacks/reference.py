"""Log-probabilities of the answers by DPO's reference model: the model at the start of the run.

At the start, and when a run is resumed, before its training state is restored, the model has the
weights that the run began with. So a second model is never needed, and the values of pairs that a
longer run needs can be added later. They are kept in the run's folder, so that a resumed run
does not compute them again.
"""

import hashlib
import json
from contextlib import nullcontext
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwkv.config import TrainConfig
from rwkv.data import offsets
from rwkv.data.dataset import Samples, ValidationSamples
from rwkv.data.pairs import Pairs
from rwkv.data.progress_bar import progress_bar
from rwkv.files import atomic_write, disk_errors
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.objectives.dpo import log_probabilities
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.runtime import strategy
from rwkv.train.runtime.lightning import pl
from rwkv.weights import safetensors_file

NAME = "reference.safetensors"
_FLAGS = ("ctx_len", "val_split", "dropout")  # besides files, what the values depend on


class Reference(pl.Callback):
    """Sets `Pairs.reference` of the training and the validation pairs before training starts.

    Args:
        manifest: of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        tracked: TrackedFolder,
        manifest: dict[str, Any],
        training: Samples,
        validation: ValidationSamples | None,
    ):
        self._config, self._folder, self._manifest = config, tracked, manifest
        self._training, self._validation = training, validation

    def on_fit_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        wanted: dict[str, tuple[Any, list[int]]] = {"training": (self._training, self._in_training())}
        if self._validation is not None:
            wanted["validation"] = (self._validation.source, self._in_validation(self._validation, trainer.world_size))
        stored = trainer.strategy.broadcast(self._stored() if trainer.global_rank == 0 else {})
        changed = False
        for name, (pairs, order) in wanted.items():
            if name in stored and stored[name].shape == pairs.reference.shape:
                pairs.reference = stored[name]
            changed = _complete(module, pairs, order, self._config.micro_bsz, name) or changed
        if changed and trainer.global_rank == 0:
            self._store({name: pairs.reference for name, (pairs, _) in wanted.items()})

    def _in_training(self) -> list[int]:
        """The pairs of the samples of the run, in order, until every pair of the data was used."""
        pairs, c = self._training, self._config
        assert isinstance(pairs, Pairs)
        first, per_step = schedule.first_sample(c), schedule.samples_per_step(c)
        enough = pairs.per_pass if first % pairs.per_pass == 0 else 2 * pairs.per_pass
        count = per_step * min(schedule.total_steps(c), -(-enough // per_step))
        return [pairs.pair(first + i) for i in range(count)]

    @staticmethod
    def _in_validation(validation: ValidationSamples, ranks: int) -> list[int]:
        """The pairs of all validation samples of all ranks, in order."""
        total, per_pass = validation.total, validation.source.per_pass
        return [offsets.spread(min(i, total - 1), total, per_pass) for i in range(-(-total // ranks) * ranks)]

    def _key(self) -> str:
        """Identifies the weights and the data that the values belong to."""
        run = self._manifest
        files = {
            "base": (run["base"] or {}).get("sha256"),
            "adapter": (run["adapter"] or {}).get("sha256"),
            **{
                name: {part: x for part, x in (run[name] or {}).items() if part != "prefix"}
                for name in ("data", "validation")
            },
        }
        flags = {name: getattr(self._config, name) for name in _FLAGS}
        described = json.dumps([files, flags, run["precision"]], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def _stored(self) -> dict[str, Tensor]:
        """The values in the run's folder; empty if there are none, or of other weights or data."""
        path = self._folder.path() / NAME
        try:
            found = load_file(path)
        except (OSError, safetensors.SafetensorError):  # none, or corrupt: computed again
            return {}
        key = found.pop("key", torch.zeros(0, dtype=torch.uint8))
        return found if bytes(key.tolist()).decode("ascii", "replace") == self._key() else {}

    def _store(self, values: dict[str, Tensor]) -> None:
        path = self._folder.path() / NAME
        key = torch.tensor(list(self._key().encode("ascii")), dtype=torch.uint8)
        with disk_errors(path, "The values are computed at the next start"), atomic_write(path) as temporary:
            temporary.touch()
            safetensors_file.save({**values, "key": key}, temporary)


class _Chosen(Dataset):
    """The items of some pairs."""

    def __init__(self, pairs: Pairs, chosen: list[int]):
        self._pairs, self._chosen = pairs, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self._pairs.item(*self._pairs.sequential_window(self._chosen[index]))


def _complete(module: TrainingModule, pairs: Pairs, order: list[int], size: int, name: str) -> bool:
    """Set the missing values of the pairs in `order`; returns whether there were any.

    A value is computed in the batch in which its pair is first used, so that it does not depend on
    how long the run is, nor on earlier starts.

    Args:
        order: the pairs of consecutive samples of all ranks.
        size: pairs in a batch of a rank.
    """
    missing = set(pairs.reference.isnan().any(1).nonzero().flatten().tolist()) & set(order)
    if not missing:
        return False
    ranks, found = module.trainer.world_size, dict.fromkeys(missing)
    blocks = []
    for begin in range(0, len(order), size * ranks):
        block = order[begin : begin + size * ranks]
        new = {pair: place for place, pair in reversed([*enumerate(block)]) if pair in found}
        for pair in new:
            del found[pair]
        if new:
            blocks.append((block, new))
    if module.trainer.global_rank == 0:
        say(f"reference: computing the log-probabilities of {len(missing):,} {name} pairs")
    for (_, new), values in zip(blocks, _compute(module, pairs, [block for block, _ in blocks], size), strict=True):
        for pair, place in new.items():
            pairs.reference[pair] = values[place]
    return True


@torch.no_grad()
def _compute(module: TrainingModule, pairs: Pairs, blocks: list[list[int]], size: int) -> list[Tensor]:
    """The log-probabilities of the pairs of each block by the model without dropout, fp32
    [len(block), 2]; every rank computes its batch of a block. Does not change the state of the
    random number generators.
    """
    rank, ranks = module.trainer.global_rank, module.trainer.world_size
    batches = [_Chosen(pairs, block[rank::ranks]) for block in blocks]
    own = (next(iter(DataLoader(batch, size, generator=torch.Generator()))) for batch in batches)
    training, found = module.model.training, []
    module.model.eval()
    with (
        module.trainer.precision_plugin.forward_context(),
        progress_bar(sum(map(len, blocks)), "reference", " pairs", 0.5) if rank == 0 else nullcontext() as bar,
    ):
        for block, item in zip(blocks, own, strict=True):
            x, y, loss_mask, _ = module.transfer_batch_to_device(item, module.device, 0)
            values = torch.zeros(len(block), 2, device=module.device)
            values[rank::ranks] = log_probabilities(module.model, module.plain_hidden, x, y, loss_mask)
            found.append(strategy.total(values).cpu())
            if bar:
                bar.update(len(block))
    module.model.train(training)
    return found
