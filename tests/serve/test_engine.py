"""Batched decoding generates what each request would generate alone."""

import pytest
import torch

from rwkv import adapter_files, checkpoint
from rwkv.adapters import lora
from rwkv.errors import UserError
from rwkv.generate import Session
from rwkv.models.state import leaves
from rwkv.sampling import Sampling
from rwkv.serve import served
from rwkv.serve.engine import Engine
from rwkv.serve.requests import Full
from tests.serve import models
from tests.serve.models import Collected

GREEDY = Sampling(temperature=0)
TOKENIZER = models.Bytes()
TEXTS = ["Hello", "User: What is LoRA?\n\nAssistant:", "你好", "x" * 40, "The quick brown fox. " * 15]


def prompt(text: str) -> list[int]:
    return [0, *TOKENIZER.encode(text)]


def run(engine: Engine, requests: list[Collected], joining: int = 1) -> None:
    """Run requests that join one after the other, `joining` in each step."""
    waiting = list(requests)
    while waiting or not engine.idle():
        engine.submit([one.request for one in waiting[:joining]])
        waiting = waiting[joining:]
        engine.step()


def alone(model, text: str, sampling: Sampling, tokens: int, seed: int = 0, state=None) -> str:
    session = Session(model, TOKENIZER)
    if state is not None:
        session.state = state
    session.read(text)
    return "".join(session.write(sampling, tokens, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module", params=["4", "5.2", "6", "7"])
def files(request, make_model, tmp_path_factory):
    """A base, an adapter and a tuned state of each version."""
    folder = tmp_path_factory.mktemp("served")
    base = models.base(make_model, folder, request.param)
    tuned = models.adapter(folder / "tuned.pth", base, ["att", "ffn", "time", "ln"])
    other = models.adapter(folder / "other.pth", base, ["att"], seed=2)
    tensors = models.state(folder / "state.pth", base)
    states = {"poet": str(folder / "state.pth"), "both:tuned": str(folder / "state.pth")}
    loaded = served.load(str(base), "base", {"tuned": str(tuned), "other": str(other)}, states)
    return base, tuned, loaded, tensors


def test_batch_equals_single_session(files):
    """Prompts of different lengths, two models and two ways of sampling, joining and leaving at
    different times.
    """
    base, tuned, loaded, _ = files
    engine = Engine(loaded, TOKENIZER, max_batch=4)  # so that some wait
    sampled = Sampling(0.8, 0.7, presence_penalty=0.3, frequency_penalty=0.2)
    cases = []
    for i, text in enumerate(TEXTS):
        for model, sampling in zip(("base", "tuned"), (GREEDY, sampled) if i % 2 else (sampled, GREEDY), strict=True):
            cases.append((model, text, sampling, 4 + 3 * i, i))
    requests = [
        Collected(model=m, prompt=prompt(text), sampling=s, max_tokens=n, seed=seed) for m, text, s, n, seed in cases
    ]
    run(engine, requests)
    separate = {"base": checkpoint.load_model(base), "tuned": adapter_files.load_tuned(base, tuned)[0]}
    for (model, text, sampling, tokens, seed), found in zip(cases, requests, strict=True):
        assert found.text == alone(separate[model], text, sampling, tokens, seed), (model, text)
        assert found.finish in ("length", "stop")


def test_adapters_share_base_weights(files):
    """All parameters except the adapters' own are the same memory; the base is unchanged."""
    base, tuned, loaded, _ = files
    own = set(adapter_files.inspect_adapter(tuned, base)[0])
    shared = 0
    for name, parameter in loaded["tuned"].model.named_parameters():
        if name in own:
            assert name.rpartition(".")[2].startswith("lora_") or not torch.equal(
                parameter, loaded["base"].model.get_parameter(name)
            )
        else:
            assert parameter.data_ptr() == loaded["base"].model.get_parameter(name).data_ptr(), name
            shared += 1
    assert shared >= 10
    stored = checkpoint.read_tensors(base)
    assert all(torch.equal(value, stored[name]) for name, value in loaded["base"].model.named_parameters())


def test_tuned_state(files):
    """Files, as RWKV-PEFT's, have states as [value, key]; RWKV-5 and 6 use [key, value]. No EOD
    precedes the text.
    """
    _, _, loaded, tensors = files
    for name, model in (("poet", "base"), ("both", "tuned")):
        weights = loaded[model].model
        value = [tensors[f"blocks.{i}.att.time_state"][None] for i in range(2)]
        value = value if weights.version.NAME in ("4", "7") else [x.transpose(2, 3) for x in value]
        start = tuple((a, s, f) for (a, _, f), s in zip(weights.initial_state(1), value, strict=True))
        found = Collected(model=name, prompt=TOKENIZER.encode("Hello"), sampling=GREEDY, max_tokens=12)
        plain = Collected(model=model, prompt=TOKENIZER.encode("Hello"), sampling=GREEDY, max_tokens=12)
        run(Engine(loaded, TOKENIZER), [found, plain])
        assert found.text == alone(weights, "Hello", GREEDY, 12, state=start) != plain.text


def test_cached_prefixes_change_nothing(files):
    loaded = files[2]
    engine = Engine(loaded, TOKENIZER, cache_bytes=1 << 22)
    system = "System: You answer in one short sentence, and never in two.\n\nUser: "
    texts = [system + question for question in ("How are you?", "Why?", "Who are you?", "Why?")]
    found = [Collected(model="base", prompt=prompt(text), sampling=GREEDY, max_tokens=8) for text in texts]
    for one in found:
        run(engine, [one])
    assert [one.text for one in found] == [alone(loaded["base"].model, text, GREEDY, 8) for text in texts]
    shared = len(prompt(system))
    # the second prompt saves the state after what it shares with the first, the third begins there
    assert [one.request.cached for one in found] == [0, 0, shared, len(prompt(texts[3]))]
    other = Collected(model="tuned", prompt=prompt(texts[3]), sampling=GREEDY, max_tokens=8)
    run(engine, [other])
    assert other.request.cached == 0  # states belong to a model


@pytest.fixture(scope="module")
def seven(make_model):
    return served.Served("base", make_model(version="7", **models.SIZES))


def engine_of(one: served.Served, **options) -> Engine:
    return Engine({"base": one}, TOKENIZER, **options)


def collect(text: str = "Hi", max_tokens: int = 5, **more) -> Collected:
    return Collected(**{"model": "base", "prompt": prompt(text), "sampling": GREEDY, "max_tokens": max_tokens, **more})


def test_generated_tokens_are_cached(seven):
    engine = engine_of(seven, cache_bytes=1 << 22)
    first = collect("A long enough beginning of a conversation about states", 9, logprobs=0)
    run(engine, [first])
    generated = [token.id for token in first.tokens]
    following = collect(prompt=[*first.request.prompt, *generated, *TOKENIZER.encode("\n\nUser: And then?")])
    run(engine, [following])
    # the last token was sampled, but not read
    assert following.request.cached == len(first.request.prompt) + len(generated) - 1


def test_long_prompt_does_not_stall_others(seven):
    engine = engine_of(seven)
    short, long = collect("Hi", 30), collect("word " * 400, 1)
    engine.submit([short.request])
    engine.step()
    engine.submit([long.request])
    for _ in range(5):
        before = short.request.generated
        engine.step()
        assert short.request.generated == before + 1  # a token in every step, while the prompt is read
    assert not long.finish


def test_full_queue_takes_all_or_none(seven):
    engine = engine_of(seven, max_batch=2, max_queue=3)
    five = [collect() for _ in range(5)]
    engine.submit([one.request for one in five[:4]])
    with pytest.raises(Full):
        engine.submit([collect().request, collect().request])
    engine.submit([five[4].request])
    with pytest.raises(Full):
        engine.submit([collect().request])
    run(engine, [])
    assert [one.finish for one in five] == ["length"] * 5


def test_cancelled_requests_leave_the_batch(seven):
    engine = engine_of(seven, max_batch=2)
    requests = [collect(max_tokens=500), collect(max_tokens=12), collect()]  # the last one waits
    engine.submit([one.request for one in requests])
    for _ in range(3):
        engine.step()
    engine.cancel(requests[0].request)
    engine.cancel(requests[2].request)
    run(engine, [])
    assert [one.finish for one in requests] == ["cancelled", "length", "cancelled"]
    assert requests[1].text == alone(seven.model, "Hi", GREEDY, 12)


def test_nan_ends_one_request_only(seven, monkeypatch):
    engine, requests = engine_of(seven), [collect(max_tokens=4), collect("Ho", 4)]
    head = seven.model.head.forward

    def broken(x):
        logits = head(x)
        logits[0] = torch.nan
        return logits

    engine.submit([one.request for one in requests])
    engine.step()
    monkeypatch.setattr(seven.model.head, "forward", broken)
    engine.step()
    monkeypatch.undo()
    run(engine, [])
    assert [one.finish for one in requests] == ["error", "length"]
    assert "NaN or Inf" in requests[0].error
    assert requests[1].text == alone(seven.model, "Ho", GREEDY, 4)


def test_failure_ends_requests_but_not_the_engine(seven, monkeypatch, capsys):
    engine, failing, later = engine_of(seven), collect(), collect()
    monkeypatch.setattr(seven.model, "hidden", lambda *arguments: 1 / 0)
    run(engine, [failing])
    monkeypatch.undo()
    assert (failing.finish, "ZeroDivisionError" in failing.error) == ("error", True)
    assert "ZeroDivisionError" in capsys.readouterr().err
    run(engine, [later])
    assert later.finish == "length"


def test_stop_text_and_logprobs(seven):
    """The tokens of a stop text are not reported; log-probabilities are those of the model."""
    whole = collect(max_tokens=20)
    run(engine_of(seven), [whole])
    stop = whole.text[8:11]
    found = collect(max_tokens=20, stop=(stop,), logprobs=3)
    run(engine_of(seven), [found])
    assert found.finish == "stop"
    assert found.text == whole.text[: whole.text.index(stop)]
    assert b"".join(token.bytes for token in found.tokens).decode(errors="replace").startswith(found.text)
    assert all(token.offset < len(found.text) for token in found.tokens)
    ids = found.request.prompt + [token.id for token in found.tokens]
    with torch.no_grad():
        logprobs = seven.model(torch.tensor([ids]))[0][0].log_softmax(-1)
    for i, token in enumerate(found.tokens, len(found.request.prompt) - 1):
        values, tokens = logprobs[i].topk(3)
        assert [one for one, _ in token.top] == tokens.tolist()
        # fp32, other shapes of the matmuls
        torch.testing.assert_close(torch.tensor([value for _, value in token.top]), values, rtol=1e-4, atol=1e-4)
        assert token.id == tokens[0]
        assert token.logprob == token.top[0][1]


def test_bf16_states_join(make_model):
    """A batch has one dtype: states of new sequences have that of matmuls."""
    model = make_model(version="7", **models.SIZES)
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16()
    engine = Engine({"base": served.Served("base", model)}, TOKENIZER, torch.bfloat16)
    requests = [collect("a", 4), collect("bb", 4)]
    run(engine, requests)
    assert [one.finish for one in requests] == ["length"] * 2
    assert {leaf.dtype for leaf in leaves(served.initial_state(engine.served["base"], torch.bfloat16))} == {
        torch.bfloat16,
        torch.float32,
    }


def test_names():
    assert served.named_files("lora", "a=x/y.pth, out/mine/rwkv-0.pth") == {
        "a": "x/y.pth",
        "rwkv-0": "out/mine/rwkv-0.pth",
    }
    for flag, message in (("a=x,a=y", "two of the files are named a"), ("a=", "no file after a=")):
        with pytest.raises(UserError, match=message):
            served.named_files("lora", flag)
    with pytest.raises(UserError, match="two models are named base"):
        served.check_names("base", {"base": "x"}, {})
    with pytest.raises(UserError, match="not a valid model name"):
        served.check_names("a b", {}, {})
    with pytest.raises(UserError, match="no adapter named none"):
        served.check_names("base", {"a": "x"}, {"s:none": "y"})


def test_wrong_state_rejected(make_model, tmp_path):
    base = models.base(make_model, tmp_path, "7")
    torch.save({"blocks.0.att.time_state": torch.zeros(2, 16, 16)}, tmp_path / "s.pth")
    with pytest.raises(UserError, match=r"missing: blocks\.1\.att\.time_state"):
        served.load(str(base), states={"s": str(tmp_path / "s.pth")})


def test_adapter_with_tuned_state_and_dora(make_model, tmp_path):
    base = models.base(make_model, tmp_path, "7")
    model = checkpoint.load_model(base)
    lora.inject(model, ["att", "state"], 4, 8, dora=True)
    for name in lora.adapter_names(model, ["att", "state"]):
        model.get_parameter(name).data += 0.2
    entries = {"r": 4, "alpha": 8.0, "parts": ["att", "state"]}
    adapter_files.save_adapter(tmp_path / "a.pth", model, entries, {})
    loaded = served.load(str(base), adapters={"a": str(tmp_path / "a.pth")})
    assert loaded["a"].begins_tuned
    assert not loaded["base"].begins_tuned
    assert not loaded["base"].model.sizes.time_state
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(
        loaded["a"].model(tokens)[0], adapter_files.load_tuned(base, tmp_path / "a.pth")[0](tokens)[0]
    )
