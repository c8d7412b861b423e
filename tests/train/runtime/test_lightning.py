"""Lightning is imported from one place, which corrects its rank on several machines."""


def test_lightning_imported_in_one_module(root):
    for path in sorted((root / "rwkv").rglob("*.py")):
        if path.name not in ("lightning.py", "compat.py"):  # compat's is for types alone
            assert "import pytorch_lightning" not in path.read_text(encoding="utf-8"), path
            assert "from pytorch_lightning" not in path.read_text(encoding="utf-8"), path
