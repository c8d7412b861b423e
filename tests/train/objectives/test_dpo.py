"""DPO's loss against TRL's formula on given log-probabilities, and gradients of models against
plain loops in float64.
"""

import copy
import functools

import pytest
import torch
import v5_loop
import v6_loop
import v7_loop
from torch.nn.functional import logsigmoid

from rwkv.adapters import lora
from rwkv.config import DPOConfig
from rwkv.data.binidx import Dataset
from rwkv.data.pairs import Pairs
from rwkv.data.token_stream import Stream
from rwkv.models.version import VERSIONS
from rwkv.train.objectives.dpo import DPO
from tests import preference_pairs

LOOPS = {"5.2": v5_loop.forward, "6": v6_loop.forward, "7": v7_loop.forward}
OPTIONS = [{}, {"dpo_beta": 2.0}, {"dpo_label_smoothing": 0.2}, {"dpo_length_norm": 1, "dpo_beta": 5.0}]


def formula(policy, reference, lengths, options):
    """The `sigmoid` loss of TRL's DPOTrainer, with its label_smoothing, and its rewards; with
    length normalisation on average log-probabilities. Tensors [B, 2]: chosen, rejected.
    """
    beta, smoothing = options.get("dpo_beta", 0.1), options.get("dpo_label_smoothing", 0.0)
    if options.get("dpo_length_norm"):
        policy, reference = policy / lengths, reference / lengths
    logits = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    losses = -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing
    rewards = beta * (policy - reference)
    return losses.mean(), rewards


class Given:
    """A model whose head returns given log-probabilities."""

    def __init__(self, log_probabilities):
        self.head = lambda *_, **__: log_probabilities.flatten()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_formula(options):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-20 * torch.rand(5, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, 9, (5, 2), generator=generator)
    mask = torch.arange(8) < lengths[..., None]
    exact = policy.clone().requires_grad_()
    expected, rewards = formula(exact, reference, lengths, options)
    expected.backward()
    given = policy.float().requires_grad_()
    tokens = torch.zeros(5, 2, 8, dtype=torch.int64)
    found = DPO(DPOConfig(**options)).loss(
        Given(given), lambda x, reset: x, [tokens, tokens, mask, reference.float()], False
    )
    found.mean.backward()
    close = {"rtol": 1e-5, "atol": 1e-6}  # fp32 against fp64
    torch.testing.assert_close(found.mean.double(), expected, **close)
    torch.testing.assert_close(given.grad.double(), exact.grad, **close)
    margins = rewards[:, 0] - rewards[:, 1]
    means = [margins.mean(), (margins > 0).double().mean(), *rewards.mean(0)]
    torch.testing.assert_close(found.metrics.double(), torch.stack(means).detach(), **close)
    assert found.count == 5


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("pairs") / "p_text_document"
    data = Dataset(preference_pairs.write(prefix, preference_pairs.random_pairs(4)))
    found = Pairs(Stream(data), 24, 4, sequential=True)
    found.reference = -20 * torch.rand(4, 2, generator=torch.Generator().manual_seed(1))
    return found


def batch_of(samples):
    return [torch.stack(parts) for parts in zip(*(samples[i] for i in range(len(samples))), strict=True)]


def answers_of(log_softmax, x, y, mask):
    """The sum over each answer's tokens, by a plain loop over sequences without padding: [B, 2]."""
    rows = []
    for tokens, targets, counted in zip(x.flatten(0, 1), y.flatten(0, 1), mask.flatten(0, 1), strict=True):
        length = int(counted.nonzero().max()) + 1
        by_token = log_softmax(tokens[:length])
        rows.append(sum(by_token[t, targets[t]] for t in range(length) if counted[t]))
    return torch.stack(rows).view(-1, 2)


@pytest.mark.filterwarnings("ignore:(?s).*reference loop")  # no compiled kernels for fp64
@pytest.mark.parametrize("trained", ["lora", "all"])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_of_a_model_match_float64(make_model, samples, version, trained):
    model = make_model(version=version, n_embd=32)
    if trained == "lora":
        lora.inject(model, ["att", "ffn"], 2, 4)
        lora.mark_trainable(model, ["att", "ffn", "time"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.1)
    options = {"dpo_label_smoothing": 0.1, "dpo_beta": 0.5}
    x, y, mask, reference = batch = batch_of(samples)
    found = DPO(DPOConfig(**options)).loss(model, lambda x, reset: model.hidden(x, reset=reset)[0], batch, False)
    found.mean.backward()

    if loop := LOOPS.get(version):
        exact = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
        dense = {name: p for name, p in exact.items() if ".lora_" not in name}
        for name in [name.removesuffix(".lora_A") for name in exact if name.endswith(".lora_A")]:
            product = exact[f"{name}.lora_B"] @ exact[f"{name}.lora_A"]
            dense[f"{name}.weight"] = dense[f"{name}.weight"] + 2 * product  # alpha / r = 2
        logits = functools.partial(loop, dense)
    else:  # the reference implementation, with gradients by autograd
        plain = copy.deepcopy(model).double()
        exact, logits = dict(plain.named_parameters()), lambda tokens: plain(tokens)[0]
    policy = answers_of(lambda tokens: logits(tokens[None])[0].log_softmax(-1), x, y, mask)
    expected, _ = formula(policy, reference.double(), mask.sum(2), options)
    expected.backward()
    torch.testing.assert_close(found.mean.double(), expected.detach(), rtol=1e-4, atol=1e-5)  # fp32 against fp64
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            largest = float(exact[name].grad.abs().max())
            torch.testing.assert_close(
                parameter.grad.double(),
                exact[name].grad,
                rtol=1e-3,
                atol=1e-3 * largest,
                msg=lambda m, n=name: f"{n}: {m}",
            )
            compared += 1
    assert compared > 10


def test_padding_pairs_do_not_count(samples):
    """A rank's last validation batch may have pairs without targets."""
    x, y, mask, reference = batch_of(samples)
    policy = (-20 * torch.rand(4, 2)).requires_grad_()
    objective, hidden = DPO(DPOConfig()), lambda x, reset: x
    half = objective.loss(Given(policy[:2]), hidden, [x[:2], y[:2], mask[:2], reference[:2]], False)
    mask = mask.clone()
    mask[2:] = False
    reference = reference.clone()
    reference[2:] = torch.nan  # never computed
    both = objective.loss(Given(policy), hidden, [x, y, mask, reference], False)
    assert both.count == half.count == 2
    assert torch.equal(both.mean, half.mean)
    assert torch.equal(both.metrics, half.metrics)
    none = objective.loss(Given(policy), hidden, [x, y, mask & False, reference], False)
    assert (none.count, float(none.mean.detach())) == (0, 0.0)
