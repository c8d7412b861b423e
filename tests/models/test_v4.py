"""RWKV-4 against transformers' implementation, and parallel against token-by-token evaluation."""

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from rwkv.kernels.elementwise import reference
from rwkv.models import RWKV

try:
    from transformers.initialization import no_init_weights
except ImportError:  # before transformers 5
    from transformers.modeling_utils import no_init_weights

RENAMED = {
    "emb.": "rwkv.embeddings.", "ln_out.": "rwkv.ln_out.", "blocks.": "rwkv.blocks.", ".ln0.": ".pre_ln.", ".att.": ".attention.", ".ffn.": ".feed_forward.",
    "time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance",
}  # fmt: skip


def transformers_model(model: RWKV) -> RwkvForCausalLM:
    """The same weights in transformers' model."""
    s = model.sizes
    config = RwkvConfig(
        vocab_size=s.vocab_size, hidden_size=s.n_embd, num_hidden_layers=s.n_layer, attention_hidden_size=s.dim_att,
        intermediate_size=s.dim_ffn, rescale_every=0, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with no_init_weights():  # its initialisation divides by n_layer - 1
        hf_model = RwkvForCausalLM(config)
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        state[name] = value
    hf_model.load_state_dict(state)
    return hf_model.train()


SIZES = [{}, {"n_layer": 1}, {"n_layer": 3, "n_embd": 24, "dim_att": 40, "dim_ffn": 52}, {"dim_att": 8, "dim_ffn": 20}]


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_and_gradients_match_transformers(make_model, sizes):
    model = make_model(**sizes)
    hf_model = transformers_model(model)
    tokens = torch.randint(50, (3, 29), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(tokens)[0], hf_model(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # fp32, different summation order
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = dict(hf_model.named_parameters())
    for name, parameter in model.named_parameters():
        for a, b in RENAMED.items():
            name = name.replace(a, b)
        expected = gradients[name].grad.view_as(parameter)
        # relative to the largest element: small ones are differences of large ones
        assert float((parameter.grad - expected).abs().max()) <= 2e-5 * float(expected.abs().max().clamp_min(1)), name


@pytest.mark.parametrize("sizes", [*SIZES, {"pre_ffn": True}, {"n_layer": 1, "pre_ffn": True}])
def test_token_by_token_matches_parallel(make_model, sizes):
    model = make_model(**sizes).eval()
    tokens = torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parallel, last = model(tokens)
        state, rows = None, []
        for t in range(tokens.shape[1]):
            logits, state = model(tokens[:, t : t + 1], state)
            rows.append(logits)
    torch.testing.assert_close(torch.cat(rows, 1), parallel, rtol=5e-5, atol=5e-5)  # fp32 matmuls of other shapes
    for ours, theirs in zip(state, last, strict=True):
        torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=5e-5, atol=5e-5)


def test_gradient_checkpointing_same_gradients(make_model):
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))
    gradients = []
    for grad_cp in (False, True):
        model = make_model()
        model.grad_cp = grad_cp
        model(tokens)[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for saved, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(saved, recomputed, rtol=0, atol=0)  # the same operations


@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"pre_ffn": True}], ids=str)
def test_dropout_placement_matches_upstream(make_model, grad_cp, sizes):
    """Dropout applies to the embedding and to the residual stream after every mix."""
    model, p = make_model(**sizes), 0.3
    model.grad_cp, model.dropout = grad_cp, p
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))
    without = model.eval()(tokens)[0].detach()  # no dropout in evaluation
    torch.manual_seed(3)
    found = model.train()(tokens)[0]
    found.square().sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    drop = lambda x: reference.dropout(x, int(torch.randint(1 << 31, ())), p)  # noqa: E731
    x = drop(model.emb(tokens))
    for block, (att_shift, wkv, ffn_shift) in zip(model.blocks, model.initial_state(2), strict=True):
        x = block.ln0(x) if hasattr(block, "ln0") else x
        a = block.ln1(x)
        x = drop(x + (block.att(a, att_shift, wkv)[0] if hasattr(block, "att") else block.ffnPre(a, att_shift)))
        x = drop(x + block.ffn(block.ln2(x), ffn_shift))
    theirs = model.head(model.ln_out(x))
    theirs.square().sum().backward()
    torch.testing.assert_close(found, theirs)
    assert not torch.allclose(found, without, rtol=0.1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)


def test_pre_ffn_replaces_first_time_mix(make_model):
    names = dict(make_model(pre_ffn=True).named_parameters())
    assert "blocks.0.ffnPre.key.weight" in names
    assert "blocks.0.att.key.weight" not in names
    assert "blocks.1.att.key.weight" in names


@pytest.mark.parametrize("sizes", [*SIZES, {"pre_ffn": True}])
@pytest.mark.parametrize("grad_cp", [False, True])
def test_packed_documents_match_separate_documents(make_model, sizes, grad_cp):
    lengths = [[5, 1, 9, 14], [29]]
    tokens = torch.randint(50, (2, 29), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 29, 50, generator=torch.Generator().manual_seed(2))
    reset = torch.zeros(2, 29, dtype=torch.bool)
    reset[0, [0, 5, 6, 15]] = True
    packed, separate = make_model(**sizes), make_model(**sizes)
    packed.grad_cp = grad_cp
    logits, state = packed(tokens, reset=reset)
    (logits * weights).sum().backward()
    for row, parts in enumerate(lengths):
        begin = 0
        for length in parts:
            span = slice(begin, begin + length)
            single, last = separate(tokens[row : row + 1, span])
            # fp32 matmuls of other shapes
            torch.testing.assert_close(logits[row, span], single[0], rtol=1e-5, atol=1e-5)
            (single[0] * weights[row, span]).sum().backward()
            begin += length
        for ours, theirs in zip(state, last, strict=True):
            torch.testing.assert_close([x[row] for x in ours], [x[0] for x in theirs], rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(packed.named_parameters(), separate.parameters(), strict=True):
        # relative to the largest element: small ones are differences of large ones
        assert float((ours.grad - theirs.grad).abs().max()) <= 2e-5 * float(theirs.grad.abs().max().clamp_min(1)), name


def test_no_gradient_across_documents(make_model):
    model = make_model()
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 7] = True
    inputs = []
    model.emb.register_forward_hook(lambda module, arguments, output: inputs.append(output.requires_grad_()) or output)
    for flags, crosses in ((None, True), (reset, False)):
        logits, _ = model(tokens, reset=flags)
        (gradient,) = torch.autograd.grad(logits[:, 7:].square().sum(), inputs[-1])
        assert bool(gradient[:, :7].any()) == crosses
        assert gradient[:, 7:].any()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_saved_activation_bytes_match_docstring(make_model, stored, autocast, trained):
    D, A, F, B, T = 32, 48, 96, 2, 64
    model = make_model(n_layer=3, n_embd=D, dim_att=A, dim_ffn=F)
    for parameter in model.parameters():
        parameter.requires_grad_(trained or parameter.dim() == 3)
        if stored == torch.bfloat16 and parameter.dim() == 2:
            parameter.data = parameter.data.to(stored)
    s = 2 if stored == torch.bfloat16 else 4
    e = 2 if autocast or stored == torch.bfloat16 else 4
    found, parameters = {}, {p.data_ptr() for p in model.parameters()}
    block, x = model.blocks[1], torch.randn(B, T, D).to(stored).requires_grad_()
    state = model.initial_state(B)[1]
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda t: found.__setitem__(t.data_ptr(), t) or t, lambda t: t),
    ):
        block(x, state)
    saved = sum(t.numel() * t.element_size() for at, t in found.items() if at not in parameters and t.numel() > B * T)
    assert saved == B * T * (2 * (s * D + 8) + e * (3 * A + F + 2 * D) + 0.75 * A) + B * 24 * A
