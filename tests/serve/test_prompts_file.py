"""generate --prompts: answers in order, the same as one by one; invalid lines and flags are
rejected.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rwkv import checkpoint
from rwkv.config import ConvertConfig, GenerateConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert.pipeline import convert
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.generate import Chat, Session
from rwkv.sampling import Sampling
from rwkv.serve import prompts_file
from rwkv.serve.engine import Engine
from rwkv.serve.served import Served
from tests.serve import models

ROOT = Path(__file__).parents[2]
RECORDS = [
    {"ask": "What is LoRA?", "id": 7},
    {"prompt": "Once upon a time"},
    {"messages": [{"role": "user", "content": "What is LoRA?"}]},
    {"ask": "你好"},
    {"prompt": "x"},
]


@pytest.fixture(scope="module")
def base(make_model, tmp_path_factory):
    return models.base(make_model, tmp_path_factory.mktemp("base"), "7", models.WORLD)


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("generate_script", ROOT / "scripts/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_answers_equal_single_sessions(base, main, tmp_path, write_jsonl, capsys):
    prompts, output = write_jsonl(*RECORDS), tmp_path / "answers.jsonl"
    config = GenerateConfig(
        model=str(base), prompts=str(prompts), output=str(output), batch=2, seed=3, temperature=0.1, max_tokens=10
    )
    main(config)
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    model, sampling = checkpoint.load_model(base), Sampling(0.1)
    for i, (record, answer) in enumerate(zip(RECORDS, found, strict=True)):
        session, generator = Session(model, WorldTokenizer()), torch.Generator().manual_seed(3 + i)
        if "prompt" in record:
            session.read(record["prompt"])
            texts = session.write(sampling, 10, generator=generator)
        else:
            texts = Chat(session).ask(record.get("ask", "What is LoRA?"), sampling, 10, generator)
        reason = answer["finish_reason"]
        assert answer == {**record, "answer": "".join(texts), "finish_reason": reason}
        assert reason == ("length" if session.ended == "length" else "stop")
    assert capsys.readouterr().out.startswith(f"5 answers in {output}")
    with pytest.raises(UserError, match="exists; use another --output, or --force true"):
        main(config)


def test_compare_answers_with_the_base_too(base, main, tmp_path, write_jsonl, capsys):
    """The same answers as of two calls, with the model alone and with the adapter."""
    adapter = models.adapter(tmp_path / "adapter.pth", base, ["att", "ffn"])
    flags = {"model": str(base), "prompts": str(write_jsonl(*RECORDS)), "seed": 3, "max_tokens": 10, "batch": 2}
    found = {}
    for name, more in (
        ("base", {}),
        ("tuned", {"lora": str(adapter)}),
        ("both", {"lora": str(adapter), "compare": True}),
    ):
        main(GenerateConfig(**flags, **more, output=str(tmp_path / name)))
        found[name] = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    for base_only, tuned, both in zip(*found.values(), strict=True):
        assert both.pop("base_answer") == base_only["answer"]
        assert both.pop("base_finish_reason") == base_only["finish_reason"]
        assert both == tuned
    assert [x["answer"] for x in found["base"]] != [x["answer"] for x in found["tuned"]]
    capsys.readouterr()
    main(
        GenerateConfig(
            model=str(base), lora=str(adapter), compare=True, prompt="Once upon a time", seed=4, max_tokens=10
        )
    )
    printed = capsys.readouterr().out
    main(GenerateConfig(model=str(base), prompt="Once upon a time", seed=4, max_tokens=10))
    alone = capsys.readouterr().out
    main(GenerateConfig(model=str(base), lora=str(adapter), prompt="Once upon a time", seed=4, max_tokens=10))
    assert printed == f"[{base}]\n{alone}[{base} + {adapter}]\n{capsys.readouterr().out}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ask": 1}', '"ask" is of type int, not a string'),
        ('{"text": "x"}', "one of the keys prompt, ask, messages; it has none"),
        ('{"ask": "x", "prompt": "x"}', "it has prompt, ask"),
        ('{"ask": "x", "answer": "y"}', 'it has "answer", which the output adds'),
        ('{"messages": [{"role": "x"}]}', r"messages\[0\].role: role must be one of"),
        ('{"ask": "x"', "not JSON"),
        ("", "no prompts"),
    ],
)
def test_invalid_files(base, main, tmp_path, line, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"ask": "fine"}}\n\n{line}\n' if line else "\n")
    where = "prompts.jsonl, line 3: " if line else "prompts.jsonl: "
    with pytest.raises(UserError, match=f"{where}.*{message}"):
        main(GenerateConfig(model=str(base), prompts=str(prompts), output=str(tmp_path / "out.jsonl")))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_invalid_flags(main, tmp_path, write_jsonl):
    prompts = str(write_jsonl(*RECORDS))
    for flags, message in (
        ({"output": ""}, "--prompts and --output belong together"),
        ({"ask": "x"}, "pass only one of them"),
        ({"batch": 0}, "--batch 0"),
        ({"compare": True}, "pass --lora or --state"),
        ({"compare": True, "lora": "x.pth", "prompts": "", "output": ""}, "--compare is not for chats"),
        ({"output": prompts}, "the file of prompts itself"),
        ({"output": str(tmp_path)}, "a folder"),
        ({"prompts": "none.jsonl"}, "none.jsonl: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            main(GenerateConfig(**{"model": "none.pth", "prompts": prompts, "output": str(tmp_path / "o"), **flags}))


CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": None, "b": {"type": "number"}}}}]
WITH_TOOLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "reasoning_content": "I add.", "tool_calls": [{"function": CALL}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "2+2?"},
]


@pytest.mark.parametrize("think", ["none", "fast", "full"])
@pytest.mark.parametrize("length", [2, 4, 6])
def test_tools_and_thoughts_as_converted(base, tmp_path, write_jsonl, think, length):
    """The prompt is the beginning of the converted conversation with the next answer."""
    chat, engine = WITH_TOOLS[:length], Engine({"base": Served("base", checkpoint.load_model(base))}, WorldTokenizer())
    record = {"messages": chat, "tools": TOOLS}
    (prompt,) = prompts_file.read(write_jsonl(record), engine, "base", think)
    answered = {"role": "assistant", "content": "4", **({"reasoning_content": "hm"} if think == "full" else {})}
    data = write_jsonl({**record, "messages": [*chat, answered]}, name="data.jsonl")
    template = "world" if think == "none" else "g1"
    pairs = convert(ConvertConfig(input=str(data), workers=1, chat_template=template)).pairs
    document = Dataset(pairs[0][0]).document(0).tolist()
    assert prompt.tokens == [0, *document][: len(prompt.tokens)]
    answer = WorldTokenizer().decode(document[len(prompt.tokens) - 1 : -1])  # without EOD
    assert answer == {"none": " 4", "fast": ">\n4", "full": ">\nhm\n</think>\n4"}[think] + "\n\n"
    assert prompt.stop == ("\n\nUser:", "\n\nTool:")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tools": "add"}, '"tools" is not a list'),
        ({"messages": WITH_TOOLS[:3]}, "the last message is the assistant's"),
        ({"messages": [{"role": "tool", "content": 3}]}, 'message 1 of "messages" has no text'),
    ],
)
def test_invalid_tools(base, write_jsonl, changed, message):
    engine = Engine({"base": Served("base", checkpoint.load_model(base))}, WorldTokenizer())
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        prompts_file.read(write_jsonl({"messages": WITH_TOOLS, "tools": TOOLS, **changed}), engine, "base")


def test_failed_generation_writes_nothing(base, main, tmp_path, write_jsonl):
    tensors = checkpoint.read_tensors(base)
    tensors["head.weight"] = torch.full_like(tensors["head.weight"], 3e38)  # overflows
    torch.save(tensors, tmp_path / "broken.pth")
    prompts, output = write_jsonl(*RECORDS), tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match=r"prompt \d: the model's logits are NaN or Inf.*Nothing was written"):
        main(GenerateConfig(model=str(tmp_path / "broken.pth"), prompts=str(prompts), output=str(output)))
    assert not output.exists()
