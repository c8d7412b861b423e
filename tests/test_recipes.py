"""Every recipe is valid, fits the card in its name, and trains a model that is scaled down."""

import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from rwkv import checkpoint
from rwkv.cards import memory_of_card
from rwkv.cli import parse
from rwkv.config import DPOConfig, FinetuneConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.data.binidx_writer import writer
from rwkv.hub import known
from rwkv.memory.auto import USABLE
from rwkv.memory.estimate import estimate
from rwkv.memory.plan import plan_of
from rwkv.train.callbacks import metrics
from rwkv.train.fit import fit
from tests import preference_pairs

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CONFIGS = {"lora": LoRAConfig, "state": StateConfig, "dpo": DPOConfig, "finetune": FinetuneConfig}
HOST = {"cpu": 8}  # GB of memory, as the recipe's comment says


def heading(recipe: Path) -> str:
    """The comment at the beginning of a recipe."""
    return recipe.read_text(encoding="utf-8").partition("\n\n")[0]


def config_of(recipe: Path, *arguments: str) -> TrainConfig:
    job = re.search(r"make (lora|state|dpo|finetune) ", heading(recipe))[1]
    return parse(CONFIGS[job], "", ["--config", str(recipe), *arguments])


def named(recipe: Path) -> tuple[str, str]:
    """The model and the GB of the card in a recipe's name, such as chat-0.4b-8gb."""
    _, size, card = recipe.stem.split("-")
    return f"rwkv7-g1-{size}", card


@pytest.fixture(scope="module")
def small(make_model, tmp_path_factory):
    """A small model, a binidx of 400 documents with 40 tokens each, and one of preference pairs."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model(version="7", n_layer=2, n_embd=64, head_size=64, vocab_size=256)
    checkpoint.save_model(folder / "base.pth", model, {})
    with writer(folder / "data") as out:
        for document in range(400):
            out.add([(document * 7 + token) % 255 + 1 for token in range(39)] + [0])
    preference_pairs.write(folder / "pairs_text_document", preference_pairs.random_pairs(60))
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_card(recipe):
    config, (model, card) = config_of(recipe), named(recipe)
    assert config.load_model == f"models/{model}.pth"
    sizes = next(sizes for name, _, sizes in known.models() if name == model)
    gpu = card != "cpu"
    found = estimate(plan_of(config, sizes, gpu, config.precision if gpu else "fp32"))
    memory = memory_of_card(card.removesuffix("gb")) if gpu else HOST[card]
    assert found.total / 1e9 <= USABLE * memory
    stated = float(re.search(r"Memory: ([\d.]+) GB", heading(recipe))[1])
    assert stated == pytest.approx(found.total / 1e9, rel=0.1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(recipe, small, tmp_path):
    data = "pairs_text_document" if config_of(recipe).objective == "dpo" else "data"
    batches = 2 * config_of(recipe).accumulate_grad_batches
    config = replace(
        config_of(recipe, "--data_file", str(small / data)),
        load_model=str(small / "base.pth"),
        proj_dir=str(tmp_path / "run"),
        ctx_len=64,
        min_ctx_len=min(64, config_of(recipe).min_ctx_len),
        micro_bsz=1,
        epoch_steps=batches,
        epoch_count=1,
        accelerator="cpu",
        precision="fp32",
        random_seed=1,
        val_samples=2,
    )
    with mock.patch.object(metrics, "plot", lambda curve, image, title, unit: image.touch()):
        result = fit(config)
    assert result.steps == 2
    before = checkpoint.read_tensors(small / "base.pth")
    after = checkpoint.read_tensors(result.checkpoint)
    if isinstance(config, LoRAConfig):
        assert any(".lora_B" in name and bool(tensor.any()) for name, tensor in after.items())
    elif config.trains == "initial state":
        assert all(name.endswith("att.time_state") and bool(tensor.any()) for name, tensor in after.items())
    else:
        assert not before["head.weight"].equal(after["head.weight"])


def test_every_task_size_and_card_has_recipes():
    names = [recipe.stem.split("-") for recipe in RECIPES]
    tasks, sizes, cards = (set(column) for column in zip(*names, strict=True))
    assert tasks == {"chat", "roleplay", "documents", "continue", "state", "preference"}
    assert sizes == {"0.1b", "0.4b", "1.5b", "2.9b", "7.2b"}
    assert cards == {"cpu", "8gb", "12gb", "24gb", "80gb"}
    of_card = {card: {task for task, _, other in names if other == card} for card in cards}
    assert of_card["24gb"] == {"chat", "roleplay", "documents", "continue", "state"}
    assert of_card["8gb"] == of_card["24gb"]
    of_task = {task: {card for other, _, card in names if other == task} for task in tasks}
    assert all(len(of_task[task]) >= 3 for task in tasks - {"preference"})


def test_heading_explains_the_start():
    for recipe in RECIPES:
        model, _ = named(recipe)
        text = heading(recipe)
        assert f"make model MODEL={model}\n" in text
        assert f'ARGS="--config recipes/{recipe.name} --data_file mine.jsonl"' in text
        assert all(line.startswith("#") and len(line) <= 110 for line in text.splitlines()), recipe


@pytest.mark.parametrize("page", ["docs/recipes.md", "docs/zh/recipes.md"])
def test_recipes_listed(page):
    rows = re.findall(r"^\| `(\S+)` \| .* \| ([\d.]+) \|$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    stated = [(path.stem, re.search(r"Memory: ([\d.]+) GB", heading(path))[1]) for path in RECIPES]
    assert sorted(rows) == stated
