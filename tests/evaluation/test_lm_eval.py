"""lm-evaluation-harness on small local tasks, offline; skipped if it is not installed (make
lm-eval).
"""

import functools
import json
import os
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from rwkv.config import EvaluateConfig
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.evaluation import harness
from rwkv.generate import Sampling, Session

QUESTIONS = [
    ("The sky is", ["blue", "a fish"], 0),
    ("二 plus 二", [" four", " 五"], 1),
    ("Fire is ", ["cold", "hot"], 1),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
KINDS = {
    "choice": (
        "multiple_choice",
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\nmetric_list: [{metric: acc, aggregation: mean}]',
    ),
    "rolling": (
        "loglikelihood_rolling",
        'doc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]',
    ),
    "answer": (
        "generate_until",
        'doc_to_target: "{{written}}"\ngeneration_kwargs: {until: ["\\n\\n"], max_gen_toks: 5, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean}]",
    ),
}


@pytest.fixture(scope="module")
def installed():
    before = list(sys.path)
    if not harness.find():
        pytest.skip("lm-evaluation-harness is not installed (make lm-eval)")
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(n_layer=1, n_embd=8, vocab_size=65536).eval()


@pytest.fixture(scope="module")
def results(installed, model, tmp_path_factory):
    """Results of the three tasks, with the last answers being what the model writes."""
    folder, rows = tmp_path_factory.mktemp("tasks"), []
    for question, choices, label in QUESTIONS:
        session = Session(model, WorldTokenizer())
        session.read(question)
        written = "".join(session.write(Sampling(0), 5, ["\n\n"]))
        rows.append({"question": question, "choices": choices, "label": label, "written": written})
    rows[0]["written"] = "something else"
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, rest) in KINDS.items():
        text = TASK.format(name=name, data=folder / "data.jsonl", kind=kind, rest=rest)
        (folder / f"{name}.yaml").write_text(text)
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    with mock.patch.dict(os.environ, offline):
        config = EvaluateConfig(model="m", tasks=",".join(KINDS), include_path=str(folder), micro_bsz=2)
        harness.check(config)
        return harness.run(config, model, None), config


def nats(model, context, text):
    """The loss of a text after a context, from logits of one pass."""
    tokenizer = WorldTokenizer()
    stripped = context.rstrip()  # lm_eval moves spaces at the end of the context to the continuation
    before = tokenizer.encode(stripped)
    whole = tokenizer.encode(context + text)
    ids = torch.tensor([0, *before, *whole[len(before) :]])
    with torch.no_grad():
        logits = model(ids[None, :-1])[0][0]
    return F.cross_entropy(logits, ids[1:], reduction="none")[len(before) :].sum().item()


def test_choices_are_those_of_the_lowest_loss(results, model):
    found, _ = results
    right = 0
    for question, choices, label in QUESTIONS:
        # lm_eval puts a space between question and choice
        losses = [nats(model, question, f" {choice}") for choice in choices]
        right += losses.index(min(losses)) == label
    assert found["choice", "acc"][0] == pytest.approx(right / 3)


def test_perplexity_of_texts(results, model):
    found, _ = results
    total = sum(nats(model, "", question) for question, _, _ in QUESTIONS)
    size = sum(len(question.encode()) for question, _, _ in QUESTIONS)
    expected = total / size / torch.log(torch.tensor(2.0)).item()
    assert found["rolling", "bits_per_byte"][0] == pytest.approx(expected, rel=1e-4)


def test_generated_answers(results):
    assert results[0]["answer", "exact_match"][0] == pytest.approx(2 / 3)


def test_errors(results, make_model, monkeypatch):
    _, config = results
    from lm_eval import tasks

    # without the thousands of definitions of lm_eval, whose reading takes a minute
    own = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path=None, include_defaults=True: own(include_path=include_path)
    )
    with pytest.raises(UserError, match="unknown task nothing"):
        harness.check(EvaluateConfig(tasks="choice,nothing", include_path=config.include_path))
    with pytest.raises(UserError, match="50 tokens are not the World vocabulary; pass a tokenizer.json"):
        harness.run(config, make_model(), None)
    with pytest.raises(UserError, match="--include_path nowhere: no such folder"):
        harness.check(EvaluateConfig(tasks="choice", include_path="nowhere"))


def test_not_installed(monkeypatch):
    monkeypatch.setattr(harness, "find", lambda: False)
    with pytest.raises(
        UserError, match="lm-evaluation-harness is not installed; install it with .*(make|pip install) lm-eval"
    ):
        harness.check(EvaluateConfig(tasks="x"))
