"""Training on a GPU: losses in fp32 match the CPU, tf32, bf16 and fp16 follow fp32, and inference
matches the CPU.
"""

import json

import pytest
import torch

from rwkv import checkpoint
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx import mask_path
from rwkv.kernels.linear import Matrix
from rwkv.models.version import VERSIONS
from rwkv.train.fit import fit
from rwkv.train.loop.cuda_graph import GraphedBlocks
from rwkv.train.loop.module import TrainingModule
from tests.train.test_host_sync import FIRST, LAST, VARIANTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

RUN = {
    "ctx_len": 64,
    "micro_bsz": 2,
    "epoch_steps": 20,
    "epoch_count": 1,
    "random_seed": 1,
    "lr_init": 1e-3,
    "lr_final": 1e-3,
}
MODEL = {"version": "4", "n_layer": 2, "n_embd": 64, "vocab_size": 300}


@pytest.fixture
def losses(make_data, tmp_path):
    def run(config, name: str, **flags) -> list[float]:
        folder = tmp_path / name
        fit(config(**RUN, data_file=make_data(5000, 300), proj_dir=str(folder), **flags))
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("version", list(VERSIONS))
def test_full_fine_tuning_fp32_matches_cpu(losses, version):
    flags = {**MODEL, "precision": "fp32", "version": version}
    curves = [losses(TrainConfig, device, accelerator=device, **flags) for device in ("cpu", "gpu")]
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)  # different summation order, then 20 steps of Adam


def test_lora_fp32_matches_cpu(losses, make_base):
    base = str(make_base(**MODEL))
    flags = {"load_model": base, "lora": True, "lora_r": 4, "lora_alpha": 8, "precision": "fp32"}
    curves = [losses(LoRAConfig, device, accelerator=device, **flags) for device in ("cpu", "gpu")]
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_low_precision_follows_fp32(losses, precision):
    exact = losses(TrainConfig, "fp32", precision="fp32", accelerator="gpu", **MODEL)
    rounded = losses(TrainConfig, precision, precision=precision, accelerator="gpu", **MODEL)
    assert rounded[-1] < rounded[0]
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)  # matmuls in bf16 have 8 significant bits


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("version", ["4", "7"])
def test_adamw8bit_follows_adam(losses, version, graph):
    flags = {**MODEL, "version": version, "precision": "bf16", "accelerator": "gpu", "cuda_graph": graph}
    exact, rounded = (losses(TrainConfig, name, optimizer=name, **flags) for name in ("adam", "adamw8bit"))
    assert rounded[-1] < rounded[0]
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)  # as for bf16 matmuls
    if graph == "off":
        kept, released = (
            losses(TrainConfig, f"{n}", optimizer="adamw8bit", grad_clip=0.0, release_grads=n, **flags) for n in (0, 1)
        )
        assert released == kept


@pytest.mark.parametrize("version", ["4", "7"])
def test_muon_matches_cpu_and_graph(losses, version):
    flags = {**MODEL, "version": version, "precision": "fp32", "optimizer": "muon"}
    cpu, plain = (losses(TrainConfig, device, accelerator=device, **flags) for device in ("cpu", "gpu"))
    assert cpu[-1] < cpu[0]
    torch.testing.assert_close(plain, cpu, rtol=1e-3, atol=0)  # the iteration amplifies rounding
    graphed = losses(TrainConfig, "graph", accelerator="gpu", cuda_graph="on", **flags)
    torch.testing.assert_close(graphed, plain, rtol=1e-4, atol=0)


def test_gradient_checkpointing_same_losses(losses):
    saved, recomputed = (
        losses(TrainConfig, f"grad_cp{n}", precision="fp32", accelerator="gpu", grad_cp=n, **MODEL) for n in (0, 1)
    )
    torch.testing.assert_close(saved, recomputed, rtol=1e-6, atol=0)


GRAPHED = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "reset": {"doc_reset": 1},
    "grad_cp": {"grad_cp": 1},
    "copies": {"precision": "bf16", "bf16_copies": 1},
    "fp16": {"precision": "fp16"},
    "RWKV-5.2": {"version": "5.2"},
    "RWKV-6": {"version": "6"},
    "RWKV-7": {"version": "7"},
}


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        (method, variant)
        for method in ("full", "lora")
        for variant in GRAPHED
        if (method, variant) != ("lora", "copies")
    ],
)
def test_cuda_graph_same_losses(losses, make_base, method, variant):
    flags = {"precision": "fp32", "accelerator": "gpu", **GRAPHED[variant]}
    config, model = TrainConfig, {**MODEL, "version": flags.pop("version", MODEL["version"])}
    if method == "lora":
        config, model = LoRAConfig, {"load_model": str(make_base(**model)), "lora_dropout": 0.0, "lora_r": 4}
    graphed, plain = (losses(config, use, cuda_graph=use, **flags, **model) for use in ("on", "off"))
    assert len(set(graphed)) == len(graphed)  # each step trains
    torch.testing.assert_close(graphed, plain, rtol=1e-5, atol=0)  # cuBLAS may choose other kernels


def test_cuda_graph_resumes_exactly_with_dropout(losses, make_base):
    flags = {"load_model": str(make_base(**MODEL)), "lora_dropout": 0.2, "precision": "fp32", "accelerator": "gpu"}
    whole = losses(LoRAConfig, "whole", cuda_graph="on", **flags)
    losses(LoRAConfig, "parts", cuda_graph="on", max_steps=7, **flags)
    assert losses(LoRAConfig, "parts", cuda_graph="on", **flags) == whole


@pytest.mark.parametrize("version", ["4", "7"])
def test_cuda_graph_recomputes_with_the_same_dropout(make_base, version):
    """Gradients with --grad_cp 1 are those without it, in the captured pass and in replays."""
    model = checkpoint.load_model(make_base(**{**MODEL, "version": version}), device="cuda").train()
    model.dropout, tokens, found = 0.5, torch.randint(300, (2, 50), device="cuda"), []
    for grad_cp in (False, True):
        model.grad_cp = grad_cp
        blocks = GraphedBlocks(model)
        for seed in (5, 6):
            blocks(tokens)
            model.zero_grad(set_to_none=True)
            torch.cuda.manual_seed(seed)
            y = blocks(tokens)
            y.square().sum().backward()
            found.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert not torch.equal(found[0][0], found[1][0])
    for saved, recomputed in zip(found[:2], found[2:], strict=True):
        for a, b in zip(saved, recomputed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_cuda_graph_sees_new_weights_and_their_copies(make_base):
    """A weight that is written between two replays, as by a checkpoint that is loaded."""
    model = checkpoint.load_model(make_base(**MODEL), device="cuda").train()
    for layer in model.modules():
        if isinstance(layer, Matrix):
            layer.keep_bf16_copy()
    blocks, tokens = GraphedBlocks(model), torch.randint(300, (2, 50), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        first = blocks(tokens).detach().clone()
        with torch.no_grad():
            model.blocks[1].ffn.value.weight.mul_(2)
        second = blocks(tokens).detach().clone()
        expected = model.hidden(tokens)[0].detach()
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, expected, rtol=0.02, atol=0.02)  # cuBLAS may choose other kernels


def test_cuda_graph_draws_dropout_in_every_replay(make_base):
    model = checkpoint.load_model(make_base(**MODEL), device="cuda")
    model.dropout = 0.5
    blocks, tokens = GraphedBlocks(model.train()), torch.randint(300, (2, 50), device="cuda")
    first, second = (blocks(tokens).detach().clone() for _ in range(2))
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(5)
    third = blocks(tokens).detach().clone()
    torch.cuda.manual_seed(5)
    assert torch.equal(blocks(tokens), third)
    shorter = blocks(tokens[:, :20])  # without the graph
    assert shorter.shape == (2, 20, 64)


def test_token_by_token_matches_parallel(make_base):
    model = checkpoint.load_model(make_base(**MODEL), device="cuda")
    tokens = torch.randint(300, (2, 50), device="cuda")
    with torch.no_grad():
        whole, _ = model(tokens)
        state, chunks = None, []
        for t in range(50):
            logits, state = model(tokens[:, t : t + 1], state)
            chunks.append(logits)
        on_cpu, _ = checkpoint.load_model(make_base(**MODEL))(tokens.cpu())
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", [*VARIANTS, "fp16", "without graph", "RWKV-5.2", "RWKV-6", "RWKV-7"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_host_sync(monkeypatch, make_base, make_data, tmp_path, variant, method, masked):
    """torch's sync debug mode raises on any synchronisation from the start of step FIRST to the
    start of step LAST.
    """
    steps = []

    def on_start(self, batch, batch_idx, begin=TrainingModule.on_train_batch_start):
        steps.append(self.step)
        torch.cuda.set_sync_debug_mode("error" if FIRST <= self.step < LAST else "default")
        begin(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "on_train_batch_start", on_start)
    flags = RUN | {
        "ctx_len": 1024,
        "micro_bsz": 4,
        "epoch_steps": 100,
        "max_steps": LAST + 1,
        "accelerator": "gpu",
    }  # enough tokens for a sorting kernel
    gpu_only = {"fp16": {"precision": "fp16"}, "without graph": {"cuda_graph": "off"}}
    gpu_only |= {f"RWKV-{version}": {"version": version, "cuda_graph": "off"} for version in ("5.2", "6", "7")}
    flags |= {"precision": "fp32"} | {**VARIANTS, **gpu_only}[variant]
    flags |= {"tbptt_len": 300} if "tbptt_len" in flags else {}
    config, model = TrainConfig, {**MODEL, "version": flags.pop("version", MODEL["version"])}
    if method == "lora":
        config, model = LoRAConfig, {"load_model": str(make_base(**model)), "lora_dropout": 0.1}
    data = make_data(50000, 300)
    if masked:
        mask_path(data).write_bytes(bytes(i % 3 > 0 for i in range(50000)))
    try:
        fit(config(**flags, **model, data_file=data, proj_dir=str(tmp_path / "run")))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(range(FIRST, LAST)) < set(steps)
