"""Small models of every version, random and trained, as files."""

import pytest
import torch

from rwkv import checkpoint
from rwkv.models import RWKV
from rwkv.models.version import VERSIONS

SIZES = {"n_layer": 2, "n_embd": 128, "vocab_size": 300}
TEXT = b"RWKV is an RNN that trains in parallel like a transformer and generates with a state of constant size. "


@pytest.fixture(scope="session")
def model_file(make_model, tmp_path_factory):
    """The file of a model of a version with SIZES: random weights (make_model), or `trained` to
    repeat TEXT.
    """
    folder, made = tmp_path_factory.mktemp("models"), {}

    def make(version: str, trained: bool = False, dtype: torch.dtype = torch.float32, **more):
        key = f"{version}-{trained}-{dtype}-{more}"
        if key not in made:
            sizes = {**SIZES, **({"head_size": 64} if version != "4" else {}), **more}
            model = _trained(version, sizes) if trained else make_model(version=version, noise=0.1, **sizes)
            with torch.no_grad():
                # the likeliest token is a whole letter, after which llama.cpp answers
                model.head.weight[129:] *= 0.5 if trained else 0
            made[key] = folder / f"{len(made)}-rwkv{version}.pth"
            checkpoint.save_model(made[key], model.to(dtype), {})
        return made[key]

    return make


def _trained(version: str, sizes: dict[str, int]) -> RWKV:
    torch.manual_seed(1)
    model = RWKV(VERSIONS[version].Sizes(**sizes))
    model.initialise(emb_scale=1e-2)
    tokens = torch.tensor([[byte + 1 for byte in TEXT]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(25):
        logits = model(tokens[:, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2  # about 5.7 before
    return model.requires_grad_(False)
