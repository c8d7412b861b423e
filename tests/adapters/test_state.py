"""Tuned states against PyPI's `rwkv` and float64 loops; packed documents begin with them; files."""

import json
import re

import pytest
import torch
import v5_loop
import v6_loop
import v7_loop
from safetensors.torch import load_file

from rwkv import adapter_files
from rwkv.adapters import lora, state
from rwkv.checkpoint import load_model, save_model
from rwkv.errors import UserError
from rwkv.generate import Session
from rwkv.merge import merge
from rwkv.models.version import VERSIONS
from rwkv.serve import served
from tests.oracle import ask, needs_oracle
from tests.test_generate import ByteTokenizer

# torch 1.13's load has no mmap. RWKV-5.2 and 6 read time_state from the model's file; RWKV-4 and 7
# take it as a state.
PROGRAM = """
import json, os, sys, torch
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": sys.argv[2]}
load = torch.load
torch.load = lambda *a, mmap=None, **k: load(*a, **k)
sys.path.insert(0, sys.argv[1])
from rwkv.model import RWKV
for name, folder, tokens in json.loads(sys.argv[3]):
    model, state = RWKV(folder + ("/merged" if name in ("5.2", "6") else "/base"), "cpu fp32"), None
    tuned = [value for key, value in sorted(load(folder + "/state.pth").items())]
    if name == "7":
        state = model.generate_zero_state()
        for i, value in enumerate(tuned):
            state[3 * i + 1] = value
    if name == "4":
        zeros = torch.zeros(model.args.n_embd)
        state = [part for value in tuned for part in (zeros, *value, zeros)]
    torch.save(model.forward(tokens, state, full_output=True)[0], folder + "/theirs.pt")
"""
LOOPS = {"5.2": v5_loop.forward, "6": v6_loop.forward, "7": v7_loop.forward}
TOKENS = torch.randint(1, 50, (3, 21), generator=torch.Generator().manual_seed(1))


def tuned_values(model, seed=0):
    """A state of random values; for RWKV-4 that after some tokens with random values."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in state.shapes_of(model.sizes).items()}
    if model.version.NAME == "4":
        for tensor in found.values():
            tensor[1:] = tensor[1:].abs()
    return found


def attached(model, tensors=None):
    state.attach(model)
    for name, tensor in (tensors or tuned_values(model)).items():
        model.get_parameter(name).data.copy_(tensor)
    return model


@pytest.fixture(params=VERSIONS)
def make(request, make_model):
    return lambda **sizes: make_model(version=request.param, **{"n_embd": 32, **sizes})


@needs_oracle
@pytest.mark.parametrize("of_v7", [False, True])
def test_files_give_the_same_logits_in_pypi_rwkv(make_model, tmp_path, of_v7):
    cases, ours = [], {}
    for name in ["7"] if of_v7 else ["4", "5.2", "6"]:
        folder = tmp_path / name
        folder.mkdir()
        model = make_model(version=name, n_embd=128, **({} if name == "4" else {"head_size": 64})).eval()
        save_model(folder / "base.pth", model, {})
        torch.save(tuned_values(model), folder / "state.pth")
        merge(str(folder / "merged.pth"), [str(folder / "state.pth")], [1.0], folder / "base.pth")
        start = adapter_files.load_state(folder / "state.pth", model)
        with torch.no_grad():
            ours[name] = model(TOKENS[:1], start)[0][0]
            merged = load_model(folder / "merged.pth").eval()
            # a reset to the state instead of the state itself: fp32, different order of sums
            torch.testing.assert_close(merged(TOKENS[:1])[0][0], ours[name], rtol=1e-4, atol=1e-4)
            assert (model(TOKENS[:1])[0][0] - ours[name]).abs().max() > 0.1
        cases.append((name, str(folder), TOKENS[0].tolist()))
    ask(PROGRAM, int(of_v7), json.dumps(cases))
    for name, logits in ours.items():
        theirs = torch.load(tmp_path / name / "theirs.pt")
        torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)  # fp32, different order of sums


@pytest.mark.filterwarnings("ignore:(?s).*reference loop")  # no compiled kernels for fp64
@pytest.mark.parametrize("grad_cp", [False, True])
def test_gradients_match_float64(make, grad_cp):
    model = make()
    lora.inject(model, [state.PART], 1, 1)
    lora.mark_trainable(model, [state.PART])
    attached(model)
    factors = torch.randn(3, 21, 50, generator=torch.Generator().manual_seed(2))
    p = {name: x.detach().double() for name, x in model.named_parameters()}
    for name in state.shapes_of(model.sizes):
        p[name].requires_grad_()
    if loop := LOOPS.get(model.version.NAME):
        (loop(p, TOKENS) * factors).sum().backward()
    else:  # the reference implementation, with gradients by autograd
        other = attached(make()).double()
        (other(TOKENS)[0] * factors).sum().backward()
        p = dict(other.named_parameters())
    model.grad_cp = grad_cp
    (model(TOKENS)[0] * factors).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in state.shapes_of(model.sizes)), name
        if parameter.grad is not None:
            largest = float(p[name].grad.abs().max())
            # fp32 against fp64
            torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("grad_cp", [False, True])
def test_packed_documents_equal_documents_apart(make, grad_cp):
    """With reset, documents in one row give the logits and the gradient of separate rows."""
    model = attached(make())
    model.grad_cp = grad_cp
    trained = [model.get_parameter(name) for name in state.shapes_of(model.sizes)]
    lengths, reset = (6, 1, 14), torch.zeros(3, 21, dtype=torch.bool)
    reset[:, [6, 7]] = True
    factors = torch.randn(3, 21, 50, generator=torch.Generator().manual_seed(2))
    packed = model(TOKENS, reset=reset)[0]
    of_packed = torch.autograd.grad((packed * factors).sum(), trained)
    apart = torch.cat([model(part)[0] for part in TOKENS.split(lengths, 1)], 1)
    of_apart = torch.autograd.grad((apart * factors).sum(), trained)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)  # fp32, different order of sums
    for one, other in zip(of_packed, of_apart, strict=True):  # sums over all documents
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    carried = model(TOKENS[:, :9], model.initial_state(3))[1]  # resets return to it, not to the carried state
    torch.testing.assert_close(
        model(TOKENS[:, 9:], carried, torch.ones(3, 12, dtype=torch.bool))[0][:, :1],
        model(TOKENS[:, 9:10])[0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_new_state_is_the_empty_one(make):
    model = make()
    before = model(TOKENS)[0]
    state.attach(model)
    # RWKV-4: another scale of the same state
    torch.testing.assert_close(model(TOKENS)[0], before, rtol=1e-4, atol=1e-4)
    assert all(
        model.version.lr_scale(name, stage_2) == 1 for name in state.shapes_of(model.sizes) for stage_2 in (0, 1)
    )
    assert not any(model.version.decays(name, shape) for name, shape in state.shapes_of(model.sizes).items())


def test_negative_denominators_count_as_zero(make_model):
    model = make_model(version="4")
    values = tuned_values(model)
    values["blocks.0.att.time_state"][1] = -1
    with_zeros = {name: value.clone() for name, value in values.items()}
    with_zeros["blocks.0.att.time_state"][1] = 0
    logits = attached(model, values)(TOKENS)[0]
    assert torch.equal(logits, attached(model, with_zeros)(TOKENS)[0])
    attached(model, values)
    model(TOKENS)[0].square().sum().backward()
    assert model.blocks[0].att.time_state.grad[1].any()  # it can grow again


def test_weighted_sum_with_adapters(make, tmp_path):
    """LoRA and two states merge into one model."""
    model = make()
    save_model(tmp_path / "base.pth", model, {})
    states = [tuned_values(model, seed) for seed in (1, 2)]
    for i, tensors in enumerate(states):
        torch.save(tensors, tmp_path / f"{i}.pth")
    key = model.get_parameter("blocks.1.ffn.key.weight")
    a, b = torch.randn(4, key.shape[1]), torch.randn(key.shape[0], 4)
    pairs = {f"blocks.{i}.ffn.key.lora_{half}": x for i in (0, 1) for half, x in (("A", a), ("B", b))}
    torch.save(pairs, tmp_path / "lora.pth")
    paths = [str(tmp_path / name) for name in ("0.pth", "lora.pth", "1.pth")]
    done = merge(str(tmp_path / "merged.pth"), paths, [0.5, 1.0, 0.25], tmp_path / "base.pth", 8, check_tokens=20)
    assert done.difference < 1e-3  # fp32 rounding of W + BA; logits of about 10
    found = load_model(tmp_path / "merged.pth")
    torch.testing.assert_close(found.get_parameter("blocks.1.ffn.key.weight"), key + 2 * b @ a)
    for name in states[0]:
        expected = 0.5 * states[0][name] + 0.25 * states[1][name]
        torch.testing.assert_close(found.get_parameter(name), expected)


def test_session_begins_with_the_state(make, tmp_path):
    model = make(vocab_size=257).eval()
    torch.save(tuned_values(model), tmp_path / "state.pth")
    given = Session(model, ByteTokenizer(), state=adapter_files.load_state(tmp_path / "state.pth", model))
    assert not model.sizes.time_state
    adapter_files.attach_state(tmp_path / "state.pth", model)
    own = Session(model, ByteTokenizer())
    for session in (given, own):
        session.read("abc")
    with torch.no_grad():
        expected = model(torch.tensor([ByteTokenizer().encode("abc")]))[0][0, -1]  # no EOD before it
    for session in (given, own):
        torch.testing.assert_close(session.logits, expected, rtol=1e-4, atol=1e-4)


def test_files_that_do_not_fit(make, make_model, tmp_path):
    model = make()
    tensors = tuned_values(model)
    name, first = "blocks.0.att.time_state", tmp_path / "state.pth"
    for wrong, message in (
        ({**tensors, name: tensors[name][:1]}, r"wrong shape: blocks\.0\.att\.time_state"),
        ({name: tensors[name]}, r"missing: blocks\.1\.att\.time_state"),
        ({**tensors, "blocks.2.att.time_state": tensors[name]}, r"unexpected: blocks\.2\.att\.time_state"),
        ({**tensors, name: tensors[name] * torch.nan}, "contains NaN"),
        ({"blocks.0.ffn.key.lora_A": torch.ones(1, 32), "blocks.0.ffn.key.lora_B": torch.ones(1, 1)}, "as --lora"),
        ({**tensors, "blocks.0.att.ts_state": torch.ones(32)}, "fullstate"),
    ):
        torch.save(wrong, first)
        (tmp_path / "state.pth.json").write_text('{"alpha": 1}' if "lora" in message else "{}")
        with pytest.raises(UserError, match=message):
            adapter_files.load_state(first, model)
    torch.save(tensors, first)
    save_model(tmp_path / "base.pth", model, {})
    (tmp_path / "state.pth.json").write_text(json.dumps({"kind": "state", "base_sha256": "0" * 64}))
    with pytest.raises(UserError, match="of another base"):
        adapter_files.attach_state(first, model, tmp_path / "base.pth")
    with pytest.raises(UserError, match=re.escape("--state; or write both into one file with scripts/merge_lora.py")):
        load_model(first)


def test_adapter_with_a_state_takes_no_second_one(make_base, script, tmp_path):
    """Neither state wins silently. (merge adds them, with weights.)"""
    base = make_base()
    for name, parts in (("both.pth", ["att", "state"]), ("lora.pth", ["att"])):
        model = load_model(base)
        lora.inject(model, parts, 4, 8)
        adapter_files.save_adapter(tmp_path / name, model, {"r": 4, "alpha": 8.0, "parts": parts}, {})
    torch.save(tuned_values(load_model(base)), tmp_path / "state.pth")
    flags = ["--model", base, "--lora", "both.pth", "--state", "state.pth"]
    message = "both.pth and state.pth: the adapter has a tuned state itself"
    assert message in script("generate.py", *flags, "--ask", "Why?", status=1).stderr
    assert message in script("export.py", *flags, "--output", "out.pth", status=1).stderr
    named = {"lora": str(tmp_path / "both.pth")}, {"poet:lora": str(tmp_path / "state.pth")}
    with pytest.raises(UserError, match="the adapter has a tuned state itself"):
        served.load(str(base), "base", *named)
    script("export.py", "--model", base, "--lora", "lora.pth", "--state", "state.pth", "--output", "out.pth")
    assert load_model(tmp_path / "out.pth").sizes.time_state


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_exported_with_its_model(make_base, script, tmp_path, version):
    sizes = {} if version == "4" else {"n_embd": 32, "head_size": 16}
    base = make_base(version=version, **sizes)
    tuned = tuned_values(load_model(base))
    torch.save(tuned, tmp_path / "state.pth")
    for ending in ("pth", "safetensors"):
        result = script("export.py", "--model", base, "--state", tmp_path / "state.pth", "--output", f"out.{ending}")
        unread = ending == "pth" and version != "6"
        assert (f"PyPI's rwkv does not read the tuned state of an RWKV-{version} model" in result.stdout) == unread
        model = load_model(tmp_path / f"out.{ending}")
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in tuned.items())
    script("export.py", "--model", "out.pth", "--output", "again.safetensors")  # a model with a state
    assert load_model(tmp_path / "again.safetensors").sizes.time_state
    result = script("export.py", "--model", "out.pth", "--output", "out-hf", "--format", "transformers", status=1)
    assert ("att.time_state" in result.stderr) == (version != "6")  # 6 has no such folder at all
    assert ("pth, safetensors, st, or scripts/serve.py" in result.stderr) == (version == "7")
    if version == "4":  # https://github.com/cryscan/web-rwkv, src/runtime/v4.rs: no time_state
        rejected = script("export.py", "--model", "out.pth", "--output", "out.st", status=1).stderr
        assert "which st of RWKV-4 cannot store; use --format pth, safetensors, or scripts/serve.py" in rejected


def test_exported_for_web_rwkv(make_base, script, tmp_path):
    """Under the same name, transposed (rwkv.formats.web_rwkv)."""
    base = make_base(version="7", n_embd=32, head_size=16)
    tuned = tuned_values(load_model(base))
    torch.save(tuned, tmp_path / "state.pth")
    script("export.py", "--model", base, "--state", tmp_path / "state.pth", "--output", "out.st")
    written = load_file(tmp_path / "out.st")
    for name, tensor in tuned.items():
        assert torch.equal(written[name], tensor.mT.half())
