"""A training process holds what it uses."""

import subprocess
import sys

PROGRAM = """
import sys
import rwkv.train.fit, torch
from rwkv.train.runtime.lightning import pl
model = torch.nn.Linear(2, 2)
adam = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 2)).sum().backward()
adam.step()
pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
unused = ("matplotlib", "sympy", "torch._dynamo.eval_frame", "transformers", "triton", "wandb")
print([name for name in unused if name in sys.modules])
"""


def test_training_imports_nothing_that_it_does_not_use():
    # On torch 1.13.1 Lightning brings three of them, on 2.13 all.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[]"


def test_lightning_is_imported_from_one_place(root):
    for path in sorted((root / "rwkv").rglob("*.py")):
        if path.name not in ("lightning.py", "compat.py"):  # compat's is for types alone
            assert "import pytorch_lightning" not in path.read_text(encoding="utf-8"), path
            assert "from pytorch_lightning" not in path.read_text(encoding="utf-8"), path
