"""cdpo.py as claims.

Expected values never come from cdpo.py itself but from a hand calculation, float64 numpy, numerical
differentiation, or the enumeration of a world that is small enough to list.

    python -m pytest -q test_cdpo.py
    python test_cdpo.py --beta 0.1 --seed 3     # one run in the tiny world, measured by enumeration
"""

import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import cdpo
from cdpo import dpo_loss, estimate, relabel, solve_dual

F64 = functools.partial(torch.tensor, dtype=torch.float64)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other


# ---- C-DPO in 30 lines ---------------------------------------------------------------------------


def c_dpo(reward, cost, ref_logps, beta, cost_limit):
    """Algorithm 1 for a policy that is a table of logits; r, c, log π_ref (prompts, responses)."""
    lam = 0.0
    logits = ref_logps.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    pairs = torch.combinations(torch.arange(cost.shape[1]))  # of responses to the same prompt

    def of_pairs(values):
        return values[:, pairs].flatten(0, 1)  # (prompts · pairs, 2)

    for iteration in range(8):
        prob = relabel(of_pairs(reward), of_pairs(cost), lam)  # (12)

        for step in range(200):
            logps = logits.log_softmax(dim=1)
            loss = dpo_loss(of_pairs(logps), of_pairs(ref_logps), prob, beta)  # (13)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        logps = logits.detach().log_softmax(dim=1)
        y = torch.multinomial(logps.exp(), 5000, replacement=True)  # samples of the policy
        r, c, log_ratio = (x.gather(1, y) for x in (reward, cost, logps - ref_logps))
        print(f"iteration {iteration}: λ {lam:.3f}, E[c] ≤ {estimate(c, 0.95):+.3f} at 95%")
        lam = solve_dual(r, c, beta, cost_limit, log_ratio=log_ratio)  # (14), its minimum at once

    return logps.exp(), lam


def pasted(*functions):
    """A project that has these functions and nothing else but torch and math."""
    project = {"torch": torch, "math": math}
    for function in functions:
        exec(inspect.getsource(function), project)  # noqa: S102
    return project


def test_c_dpo_in_30_lines_from_the_pasted_functions_reaches_the_constrained_optimum():
    project = pasted(relabel, dpo_loss, solve_dual, estimate, c_dpo)
    rng, beta, limit = np.random.default_rng(0), 0.5, 0.0
    reward, noise, log_ref = rng.normal(0, 1, (3, 8, 40))  # 8 prompts × 40 responses
    cost = 0.7 * reward + 0.7 * noise + 0.3  # what helps tends to harm
    log_ref -= np.logaddexp.reduce(log_ref, axis=1, keepdims=True)
    lam_star = bisected_lambda(reward, cost, beta, limit, log_ref=log_ref)
    optimum = softmax(log_ref + (reward - lam_star * cost) / beta)
    torch.manual_seed(0)
    policy, lam = project["c_dpo"](F64(reward), F64(cost), F64(log_ref), beta, limit)
    policy = policy.numpy()
    assert lam == pytest.approx(lam_star, abs=0.03) and lam_star > 0.3
    assert (policy * cost).sum(1).mean() == pytest.approx(limit, abs=0.03)
    assert (policy * np.log(policy / optimum)).sum(1).mean() < 0.01  # KL, nats


# ---- The mathematics, by independent routes ------------------------------------------------------


def log_sigmoid(x):
    return -np.logaddexp(0.0, -np.asarray(x, dtype=np.float64))


def softmax(z):
    weight = np.exp(z - z.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def tilted_cost(reward, cost, lam, beta, log_ref=0.0):
    """E[c] of π_λ ∝ π_ref·exp((r − λc)/β), its mean over prompts. (n, m) → number"""
    return (softmax(log_ref + (reward - lam * cost) / beta) * cost).sum(1).mean()


def bisected_lambda(reward, cost, beta, limit, lam_max=100.0, log_ref=0.0):
    """The multiplier by bisection on E[c] − limit, which falls in λ."""
    low, high = 0.0, lam_max
    for _ in range(100):
        middle = (low + high) / 2
        if tilted_cost(reward, cost, middle, beta, log_ref) > limit:
            low = middle
        else:
            high = middle
    return high


def test_score_losses_agree_with_equations_3_and_5_in_numpy():
    first, second = np.random.default_rng(0).normal(0, 3, (2, 60))
    loss = cdpo.bradley_terry_loss(F64(first), F64(second))
    assert loss.item() == pytest.approx(-log_sigmoid(first - second).mean(), abs=1e-12)
    s_worse, s_better = np.tile([[1, 1, -1], [1, -1, -1]], 20)  # no safe one worse than an unsafe
    expected = -log_sigmoid(first - second)
    expected -= log_sigmoid(s_worse * first) + log_sigmoid(s_better * second)
    loss = cdpo.cost_loss(F64(first), F64(second), F64(s_worse), F64(s_better))
    assert loss.shape == () and loss.item() == pytest.approx(expected.mean(), abs=1e-12)


def test_losses_and_their_gradients_stay_finite_and_linear_at_huge_scores():
    # exp(1e4) overflows; −log σ(−x) is x there, so the values are known by hand
    logps = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    (low, high), one = logps.T, torch.ones(1)
    for loss, value in [
        (cdpo.bradley_terry_loss(low, high), 2e4),
        (cdpo.cost_loss(low, high, one, -one), 4e4),
        (dpo_loss(logps, torch.zeros_like(logps), one, 1.0), 2e4),
        (dpo_loss(logps, torch.zeros_like(logps), 0 * one, 1.0), 0.0),  # no 0·log(0)
    ]:
        assert loss.item() == pytest.approx(value)
        assert torch.autograd.grad(loss, logps, retain_graph=True)[0].isfinite().all()


def test_soft_labels_are_the_preference_of_the_lagrangian_reward():
    reward, cost = np.random.default_rng(2).normal(0, 2, (2, 40, 2))
    for lam in (0.0, 0.3, 2.0):
        odds = np.exp(reward - lam * cost)  # Bradley–Terry: odds of a win
        p = relabel(F64(reward), F64(cost), lam)
        assert p.numpy() == pytest.approx(odds[:, 0] / odds.sum(1), abs=1e-12)
    huge = F64([[1e4, -1e4], [-1e4, 1e4]])  # odds beyond any float
    assert relabel(huge, 0 * huge, 1.0).tolist() == [1.0, 0.0]


def test_soft_relabel_is_the_expectation_of_sampled_labels():
    reward, cost, lam, draws = [1.0, -0.5], [0.7, 0.2], 0.8, 40_000
    p = 1 / (1 + math.exp(-(1.0 - 0.8 * 0.7) + (-0.5 - 0.8 * 0.2)))
    generator, before = torch.Generator().manual_seed(0), torch.get_rng_state()
    labels = relabel(F64([reward] * draws), F64([cost] * draws), lam, "sample", generator)
    assert labels.shape == (draws,) and set(labels.tolist()) == {0.0, 1.0}
    assert labels.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


def test_hard_labels_pick_the_higher_lagrangian_reward_and_split_ties():
    # r_λ by hand, λ = 0.5: (1, 0), (−1, 0), (0, 0); (2, 3), (−1, −4), (3, 3): none of the last is 0
    reward = F64([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 4.0], [0.0, -3.0], [4.0, 3.0]])
    cost = F64([[0.0, 0.0], [4.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [2.0, 0.0]])
    assert relabel(reward, cost, 0.5, "hard").tolist() == [1.0, 0.0, 0.5, 0.0, 1.0, 0.5]
    with pytest.raises(ValueError):
        relabel(reward, cost, 0.5, mode="sfot")


def test_soft_dpo_loss_is_the_expectation_of_dpos_own_over_every_labelling():
    policy, ref = np.random.default_rng(5).normal(-30, 5, (2, 4, 2))
    p, beta, expected = np.array([0.1, 0.5, 0.8, 0.97]), 0.2, 0.0
    gain = beta * ((policy - ref)[:, 0] - (policy - ref)[:, 1])
    for labels in itertools.product((0.0, 1.0), repeat=4):
        labels = np.array(labels)
        plain = -log_sigmoid(np.where(labels == 1, gain, -gain)).mean()  # arXiv 2305.18290
        expected += np.where(labels == 1, p, 1 - p).prod() * plain
    soft = dpo_loss(F64(policy), F64(ref), F64(p), beta)
    assert soft.shape == () and soft.item() == pytest.approx(expected, abs=1e-12)
    same = dpo_loss(F64(policy), F64(policy), F64(p), beta)
    assert same.item() == pytest.approx(math.log(2), abs=1e-12)  # whatever the labels


def test_lambda_step_by_hand_for_costs_of_any_shape():
    for shape in [(6,), (3, 1, 2)]:
        cost = F64([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]).reshape(shape)  # mean 4
        for limit, lam in ((1.5, 0.45), (5.5, 0.05), (4.0, 0.2), (9.0, 0.0)):
            assert cdpo.lambda_step(0.2, cost, limit, 0.1) == pytest.approx(lam, abs=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_dual_value_is_the_highest_lagrangian_and_its_slope_the_slack_of_pi_lambda(scale):
    rng, eps = np.random.default_rng(9), 1e-6
    (reward, cost), lam, beta, limit = scale * rng.normal(0, 1, (2, 6, 9)), 1.7, 0.05, 0.3 * scale

    def lagrangian(z):  # of the policy softmax(z) beside a uniform π_ref
        policy, log_pi = softmax(z), z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        objective = reward - beta * (log_pi + np.log(9)) - lam * (cost - limit)
        return (policy * objective).sum(1).mean()

    best = (reward - lam * cost) / beta  # up to 1e4: its exponential would overflow
    for dtype, accuracy in [(torch.float64, 1e-9), (torch.float32, 1e-4)]:
        value = cdpo.dual_value(F64(reward).to(dtype), F64(cost).to(dtype), lam, beta, limit)
        assert value.item() == pytest.approx(lagrangian(best), rel=accuracy)
    others = [lagrangian(best + rng.normal(0, 1, best.shape)) for _ in range(200)]
    assert lagrangian(best) >= max(others)
    ends = [cdpo.dual_value(F64(reward), F64(cost), lam + d, beta, limit) for d in (-eps, eps)]
    slack = limit - tilted_cost(reward, cost, lam, beta)  # (14)
    assert float(ends[1] - ends[0]) / (2 * eps) == pytest.approx(slack, rel=1e-3)


def dual_problem(number):
    """Scores and β of many scales; E[c] at λ = 0 and at 100, and the lowest."""
    rng = np.random.default_rng(number)
    scale, beta = 10 ** rng.uniform([-2, -2], [2, 0])
    cost = scale * (rng.normal(0, 1, (6, 12)) + rng.normal(0, 0.5, (6, 1)))
    reward = scale * 10 ** rng.uniform(-0.5, 0.5) * rng.normal(0, 1, (6, 12))
    start, end = (tilted_cost(reward, cost, lam, beta) for lam in (0.0, 100.0))
    return reward, cost, float(beta), float(scale), start, end, cost.min(1).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_dual_is_the_bisected_multiplier_at_any_scale(dtype):
    for number in range(100):
        reward, cost, beta, _, start, end, _ = dual_problem(number)
        limit = float(end + np.random.default_rng(number).uniform(0.05, 0.95) * (start - end))
        problem = torch.tensor(reward, dtype=dtype), torch.tensor(cost, dtype=dtype), beta, limit
        lam, (reward, cost) = solve_dual(*problem), (x.double().numpy() for x in problem[:2])
        assert lam == pytest.approx(bisected_lambda(reward, cost, beta, limit), rel=1e-6), number


def test_solve_dual_is_zero_for_a_slack_limit_and_says_what_can_be_reached_for_another():
    for number in range(20):
        reward, cost, beta, scale, start, _, lowest = dual_problem(number)
        assert solve_dual(F64(reward), F64(cost), beta, start + 0.1 * scale) == 0.0
        at_end = tilted_cost(reward, cost, 0.5, beta)  # of lam_max = 0.5
        with pytest.raises(ValueError) as error:
            solve_dual(F64(reward), F64(cost), beta, lowest - 0.1 * scale, 0.5)
        named = re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", str(error.value))
        for value in (lowest, at_end):  # to four digits
            assert any(float(x) == pytest.approx(value, rel=5e-4) for x in named), error.value
    for broken in ((reward * math.nan, cost), (reward, cost * math.inf)):
        with pytest.raises(ValueError, match="not finite"):
            solve_dual(*map(F64, broken), beta, 0.0)


def test_estimate_and_ci95_by_hand_are_clustered_by_prompt():
    # prompt means 0, 2, 4: mean 2, std 2, standard error 2/√3; samples within prompts differ
    values, error = F64([[-5.0, 5.0], [1.0, 3.0], [4.0, 4.0]]), 2 / math.sqrt(3)
    assert estimate(values) == estimate(values, 0.5) == pytest.approx(2.0, abs=1e-12)
    assert estimate(values, 0.95) == pytest.approx(2 + 1.644854 * error, abs=1e-5)
    interval = [2 - 1.959964 * error, 2 + 1.959964 * error]
    assert cdpo.ci95(values) == pytest.approx(interval, abs=1e-5)


def test_predict_by_hand():
    # λ = 2, β = 0.5, (r − λc)/β − log_ratio: 0 and ln 3 for both prompts, so weights 1/4 and 3/4
    cost, log_ratio = F64([[1.0, 2.0], [-1.0, 3.0]]), F64([[0.3, 0.1], [-1.0, 0.5]])
    reward = 2 * cost + 0.5 * F64([0.0, math.log(3)])
    for r, ratio in ((reward, None), (reward + 0.5 * log_ratio, log_ratio)):
        found = cdpo.predict(r, cost, 2.0, 0.5, ratio)
        means = (r * F64([0.25, 0.75])).sum(1).tolist()
        assert found["cost"] == pytest.approx((1.75 + 2.0) / 2, abs=1e-12)
        assert found["reward"] == pytest.approx(sum(means) / 2, abs=1e-12)
        assert found["ess"] == pytest.approx(1 / (1 / 16 + 9 / 16), abs=1e-12)
        kl = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
        assert found["kl"] == pytest.approx(kl, abs=1e-12)
    sure = cdpo.predict(F64([[900.0, 0.0, 0.0]]), F64([[1.0, 0.0, 0.0]]), 0.0, 1.0)
    assert (sure["ess"], sure["cost"]) == (1.0, 1.0) and sure["kl"] == pytest.approx(math.log(3))


def test_reweighted_samples_of_another_policy_stand_for_samples_of_pi_ref():
    # π_ref and π over five responses; π's samples, each exactly as often as π has it
    reward, cost = np.random.default_rng(16).normal(0, 1, (2, 4, 5))
    ref, pi, beta = np.array([5, 1, 2, 7, 5]) / 20, np.array([1, 8, 5, 2, 4]) / 20, 0.6
    y = np.repeat(np.arange(5), [1, 8, 5, 2, 4])
    log_ratio = F64(np.tile(np.log(pi / ref)[y], (4, 1)))
    drawn = F64(reward[:, y]), F64(cost[:, y])
    expected = bisected_lambda(reward, cost, beta, -0.4, log_ref=np.log(ref))
    lam = solve_dual(*drawn, beta, -0.4, log_ratio=log_ratio)
    assert lam > 0.1 and lam == pytest.approx(expected, rel=1e-9)
    assert solve_dual(*drawn, beta, -0.4) != pytest.approx(expected, rel=0.05)  # as if π_ref's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_public_function_works_when_pasted_beside_torch_and_math_alone(dtype):
    a, b = torch.randn(2, 5, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    one, limit = torch.ones(5, dtype=dtype), (b.amin(1).mean().item() + b.mean().item()) / 2
    rows = random_rows([(5, [3, 4]), (2, [1, 0, 6])])
    for name, *arguments in [
        ("bradley_terry_loss", a[:, 0], b[:, 0]),
        ("cost_loss", a[:, 0], b[:, 0], one, -one),
        ("relabel", a, b, 0.3, "sample"),
        ("dpo_loss", a, b, one / 2, 0.1),
        ("lambda_step", 0.1, b, 0.0, 0.1),
        ("dual_value", a, b, 0.3, 0.1, 0.0),
        ("solve_dual", a, b, 1.0, limit, 100.0, a / 9),
        ("implicit_reward", a, b, 0.1),
        ("estimate", a, 0.9),
        ("ci95", a),
        ("predict", a, b, 0.3, 0.5, a / 9),
        ("collate_rows", rows, 7),
        ("sequence_logps", tiny_model("llama"), cdpo.collate_rows(rows)),
    ]:
        results = []
        for function in (getattr(cdpo, name), pasted(getattr(cdpo, name))[name]):
            torch.manual_seed(0)
            results.append(function(*arguments))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        if name in ("lambda_step", "solve_dual", "estimate"):
            assert type(results[0]) is float, name


# ---- Rows of a prompt and its responses ----------------------------------------------------------

EOS = 2
SHAPE = {"vocab_size": 50, "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": 1}
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
KINDS = pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
LENGTHS = [(6, [4]), (1, [1, 1]), (9, [1, 12, 3]), (3, [8, 1, 5, 2, 2])]  # prompt, its responses
LENGTHS += [(12, [5, 5, 1, 7, 2, 3, 3, 8]), (4, [2, 6, 1, 3, 5, 4, 2, 1, 3, 6, 2, 4, 1, 5, 3, 2])]


def config_for(kind, **settings):
    shape = SHAPE | (GPT2 if kind == "gpt2" else DECODER)
    return transformers.AutoConfig.for_model(kind, **{**shape, **settings})


def tiny_model(kind, **settings):
    # weights of 0.3: at the usual 0.02 logits hardly depend on the context: a wrong mask would pass
    torch.manual_seed(0)
    config = config_for(kind, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()


def random_rows(lengths=LENGTHS):
    """Random ids; every prompt and response ends with the padding id (= eos), unless empty."""
    rng = random.Random(15)

    def text(n):
        return [rng.randrange(50) for _ in range(n - 1)] + [EOS][:n]

    return [(text(prompt), [text(n) for n in responses]) for prompt, responses in lengths]


def separate_logps(model, rows):
    """The plain way: each prompt + response by itself, unpadded, all logits."""
    values = []
    for prompt, responses in rows:
        for y in responses:
            logps = model(input_ids=torch.tensor([prompt + y])).logits[0].log_softmax(-1)
            values.append(sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(y)))
    return torch.stack(values)


@pytest.mark.parametrize("pad_id, chunk", [(EOS, 2**20), (7, 8)])  # tokens at the vocabulary
@KINDS
def test_rows_equal_separate_sequences_in_log_probs_and_gradients(kind, pad_id, chunk):
    model, rows = tiny_model(kind), random_rows()
    model.config.vocab_size = 2**27 // chunk
    seen, embeddings = [], model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, _: seen.append(args[0].numel()))
    shared = cdpo.sequence_logps(model, cdpo.collate_rows(rows, pad_id=pad_id))
    handle.remove()
    assert seen == [len(rows) * max(len(x) + sum(map(len, ys)) for x, ys in rows)]  # a prompt once
    separate = separate_logps(model, rows)
    assert shared.shape == (35,) and shared.dtype == torch.float32
    assert (shared - separate).abs().max() < 1e-4
    # weights at random, so that no response's gradient can hide behind another's
    weight = torch.randn(35, generator=torch.Generator().manual_seed(1))
    one = torch.autograd.grad((weight * shared).sum(), list(model.parameters()))
    other = torch.autograd.grad((weight * separate).sum(), list(model.parameters()))
    for (name, _), x, y in zip(model.named_parameters(), one, other):
        assert (x - y).norm() <= 1e-3 * y.norm(), name


def test_an_empty_response_is_scored_at_the_prompts_end_and_an_empty_prompt_refused(tmp_path):
    rows = random_rows([(5, [3, 0, 4]), (2, [0])])
    logps = cdpo.sequence_logps(tiny_model("llama"), cdpo.collate_rows(rows))
    assert (logps == 0).tolist() == [False, True, False, True]
    write_classifier(tmp_path, "llama")
    model = cdpo.ScoreModel.from_pretrained(tmp_path).eval()
    scores = cdpo.response_scores(model, cdpo.collate_rows(rows)).tolist()
    for prompt, y in [(prompt, y) for prompt, responses in rows for y in responses]:  # in order
        ids = torch.tensor([prompt + y])
        assert scores.pop(0) == pytest.approx(model(ids, torch.ones_like(ids)).item(), abs=1e-4)
    with pytest.raises(ValueError, match="empty prompt"):
        cdpo.collate_rows([([3], [[4]]), ([], [[4, 5]])])


def test_log_probs_of_a_bfloat16_model_are_taken_in_float32():
    # DPO trains on differences that bfloat16 rounds away; one-token responses show the rounding
    model, rows = tiny_model("llama").bfloat16(), random_rows([(5, [1, 1])] * 16)
    logps = cdpo.sequence_logps(model, cdpo.collate_rows(rows, pad_id=EOS))
    assert logps.dtype == torch.float32
    assert (logps != logps.bfloat16().float()).float().mean() > 0.8


def row_of(lengths, pairs, scores=None):
    """A row with a prompt of four tokens and responses that their text tells apart."""
    ids = [[100 + i] * n for i, n in enumerate(lengths)]
    scores = map(torch.tensor, scores or ())
    texts, pairs = [f"y{i}" for i in range(len(ids))], torch.tensor(pairs).view(-1, 6).long()
    return cdpo.Row("x", texts, ([7] * 4, ids), pairs, *scores)


def test_a_long_prompt_gives_several_rows_each_labelled_pair_whole_in_one(tmp_path):
    rng = random.Random(3)
    couples = [tuple(rng.sample("abcdefghijklmnopqrstuvwxyz", 2)) for _ in range(60)]
    couples += couples[:5]  # repeated pairs count each time
    entries = [{**GOOD, "response_0": a, "response_1": b} for a, b in couples]
    ((whole,),) = rows_from(written(tmp_path / "d.jsonl", entries))
    assert len(whole.pairs) == whole.weight == 65 and len(whole.responses) == 26
    head, ys = whole.ids
    (parts,), found = rows_from(tmp_path / "d.jsonl", row_length=len(head) + 12), []
    for part in parts:
        assert part.ids[0] == head and part.length <= len(head) + 12
        assert len(part.responses) == len(set(part.responses)) and part.weight == len(part.pairs)
        assert part.ids[1] == [ys[whole.responses.index(text)] for text in part.responses]
        for chosen, rejected, worse, better, *signs in part.pairs.tolist():
            assert (worse, better, signs) == (chosen, rejected, [1, -1])
            found.append((part.responses[rejected], part.responses[chosen]))
    assert len(parts) > 5 and sorted(found) == sorted(couples)


def test_equal_samples_all_count_and_make_no_pair():
    samples = cdpo.Row("x", ["a", "b", "a", "c"], ([1], [[5], [6], [5], [7]]), [])
    pairs = cdpo.pairs_of(samples, True).tolist()
    assert pairs == [[0, 1], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert (samples.weight, samples.length) == (2, 5)  # of m/2 pairs


def test_micro_batches_keep_their_padded_tokens_within_the_budget():
    rng = random.Random(0)
    for size in (1, 3, 64, 200):
        lengths = [int(rng.lognormvariate(5.5, 0.8)) for _ in range(size)]
        groups = cdpo.micro_batches(lengths, 1024)
        assert sorted(i for group in groups for i in group) == list(range(size))
        assert max(lengths) in [lengths[i] for i in groups[0]]  # what is too large shows at once
        padded = [len(group) * max(lengths[i] for i in group) for group in groups if group]
        assert all(n <= 1024 or len(group) == 1 for n, group in zip(padded, groups))


HARM = {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}
GOOD = {"prompt": "mix oil", "response_0": "wait", "response_1": "burn", "better_response_id": 1}
GOOD |= HARM
NEED = [*GOOD]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_from(path, need=NEED, **settings):
    """The rows of each prompt of a dataset, by the program's reader and the byte tokenizer."""
    tokenizer = cdpo.load_tokenizer(transformers.ByT5Tokenizer())
    return cdpo.load_rows(cdpo.Config(**settings), tokenizer, str(path), "dataset", need)


def test_score_losses_are_oriented_as_the_labels_are(tmp_path):
    entries = [
        {**GOOD, "response_0": "a", "response_1": "b"},  # b helps more, and is the harmful one
        # a is called unsafe here though safe above: a label belongs to its pair, not to a response
        {**GOOD, "response_0": "c", "response_1": "a", "better_response_id": 0},
        {**GOOD, "response_0": "c", "response_1": "a", "safer_response_id": 1},
    ]
    entries[2] |= {"is_response_0_safe": False, "is_response_1_safe": False}
    ((row,),) = rows_from(written(tmp_path / "d.jsonl", entries))
    assert row.responses == ["a", "b", "c"] and row.weight == 3
    a, b, c = values = 0.3, 1.0, -2.0
    loss, accuracy = cdpo.reward_loss(row, torch.tensor(values))
    by_hand = -log_sigmoid([b - a, c - a, a - c]).sum() / 3
    assert loss.item() == pytest.approx(by_hand) and accuracy.item() == pytest.approx(2 / 3)
    loss, accuracy = cdpo.harm_loss(row, torch.tensor(values))
    first = [b - a, b, -a]  # b worse and unsafe, a better and safe
    second = [a - c, a, -c]  # a worse and unsafe, c better and safe
    third = [c - a, c, a]  # c worse, both unsafe
    by_hand = -log_sigmoid(first + second + third).sum() / 3
    assert loss.item() == pytest.approx(by_hand) and accuracy.item() == pytest.approx(2 / 3)


def test_dpo_on_a_row_is_the_mean_over_all_pairs_or_over_the_datasets():
    reward, cost, ref, logps = [1.0, 0.0, 2.0], [0.5, -1.0, 2.0], [-3.0, -4.0, -5.0], [-2, -5, -4.5]
    compared, beta = [(0, 1), (0, 1), (2, 0)], 0.3
    row = row_of([1, 2, 3], [(i, j, i, j, 1, -1) for i, j in compared], (reward, cost, ref))
    for all_pairs, couples in [(True, [(0, 1), (0, 2), (1, 2)]), (False, compared)]:
        expected = 0.0
        for i, j in couples:
            p = np.exp(log_sigmoid(reward[i] - 0.8 * cost[i] - reward[j] + 0.8 * cost[j]))
            h = beta * (logps[i] - ref[i] - logps[j] + ref[j])
            expected -= (p * log_sigmoid(h) + (1 - p) * log_sigmoid(-h)) / 3
        cfg = cdpo.Config(beta=beta, all_pairs=all_pairs)
        loss, _ = cdpo.relabelled_dpo(cfg, 0.8, 0)(row, torch.tensor(logps))
        assert loss.item() == pytest.approx(expected)


def test_pecan_takes_the_help_of_a_helpful_policy_as_r_and_minus_a_safe_ones_as_c(monkeypatch):
    logps = {"ref": [-10.0, -10.0], "helpful": [-8.0, -11.0], "safe": [-12.0, -9.0]}
    monkeypatch.setattr(cdpo, "infer", lambda cfg, source, *_: [torch.tensor(logps[source])])
    row = row_of([1, 1], [(0, 1, 0, 1, 1, -1)])  # y0 helps more and harms more
    cfg, models = cdpo.Config(beta=0.5, method="pecan"), ("ref", "helpful", "safe")
    run = cdpo.Run(cfg, Path(), None, [row], [], [], *models)
    (scored,) = cdpo.score(run, [row])
    assert scored.reward.tolist() == [1.0, -0.5]  # the helpful policy likes y0
    assert scored.cost.tolist() == [1.0, -0.5]  # and the safe one avoids it

    trained = []

    def train_stage(run, name, rows, loss_fn):
        logps = torch.tensor([-10.0, -10.0], requires_grad=True)
        loss_fn(rows[0], logps)[0].backward()
        winner = {"helpful": 0, "safe": 1}[name]
        assert logps.grad[winner] < 0 < logps.grad[1 - winner], name
        trained.append(name)

    monkeypatch.setattr(cdpo, "train_stage", train_stage)
    cdpo.pecan_stages(run)
    assert trained == ["helpful", "safe"]


def test_sft_weighs_a_response_by_how_often_people_compared_it():
    row = row_of([2, 3, 4], [(0, 1, 0, 1, 1, -1), (0, 2, 0, 2, 1, -1)])
    loss, _ = cdpo.sft_loss(row, torch.tensor([-5.0, -7.0, -11.0]))
    assert loss.item() == pytest.approx((5 + 7 + 5 + 11) / (2 + 3 + 2 + 4))


def kept_iterates(folder, *entries, cost_limit=0.0):
    """Feeds hand-made iterates (λ, reward, cost, KL) to the loop. → numbers of those kept so far"""
    run = cdpo.Run(cdpo.Config(beta=0.1), folder, None, [], [], [], *"rrc")
    shutil.rmtree(folder / "policy", ignore_errors=True)
    history = []
    for number, (lam, reward, cost, kl) in enumerate(entries):
        (folder / "iterate").mkdir(exist_ok=True)
        (folder / "iterate" / "name").write_text(str(number))
        entry = {"lambda": lam, "reward_mean": reward, "cost_bound": cost, "kl": kl}
        cdpo.keep_the_better(run, history, entry | {"iteration": number}, cost_limit)
    assert (folder / "policy" / "name").read_text() == str(history[-1]["kept"])
    return [entry["kept"] for entry in history]


def test_the_iterate_kept_has_the_highest_objective_less_an_exact_penalty(tmp_path):
    kept = functools.partial(kept_iterates, tmp_path)
    # a good policy 0.006 over the limit is not given up for a collapsed one under it
    assert kept((1.3, 3.4, 0.006, 5.0), (1.4, 2.4, -0.11, 18.9)) == [0, 0]
    # nor one that meets the limit for what breaking it earns: at λ = 1 the price is above 1
    assert kept((1.0, 1.0, 0.0, 0.0), (1.0, 2.0, 1.0, 0.0)) == [0, 0]
    # of those that meet it the higher reward − β·KL, slack earns nothing; the limit may be any
    assert kept((1.0, 1.0, -1.0, 0.0), (1.0, 1.1, -0.1, 0.5)) == [0, 1]
    assert kept((1.0, 1.0, -0.1, 0.0), (1.0, 1.4, -0.1, 5.0)) == [0, 0]
    assert kept((1.0, 1.0, -0.9, 0.0), (1.0, 1.1, -0.1, 0.0), cost_limit=-0.5) == [0, 0]
    # of those that break it the one that breaks it less, though it earns a little less
    assert kept((1.0, 1.0, 1.0, 0.0), (1.0, 0.5, 0.5, 0.0), (1.0, 0.4, 0.6, 0.0)) == [0, 1, 1]


def loop_of(policies, lams, cost_limit=0.0, m=20_000):
    """A Loop whose iterations fitted policies exp(share · (r − λc)/β), share 1 where converged."""
    torch.manual_seed(0)
    reward, cost, log_ref = F64(np.random.default_rng(3).normal(0, 1, (3, 6, 30)))
    cost, log_ref, beta = cost + 0.7 * reward + 0.4, log_ref.log_softmax(1), 0.5
    loop = cdpo.Loop(lams[-1])
    for share, lam in zip(policies, lams):
        log_ratio = (log_ref + share * (reward - lam * cost) / beta).log_softmax(1) - log_ref
        y = torch.multinomial((log_ref + log_ratio).exp(), m, replacement=True)
        drawn = cdpo.Samples([], *(x.gather(1, y) for x in (reward, cost, log_ratio)))
        loop.samples.append(drawn)
        loop.history.append({"lambda": lam, "cost_bound": float(drawn.cost.mean())})
    world = [x.numpy() for x in (reward, cost)]
    star = bisected_lambda(*world, beta, cost_limit, log_ref=log_ref.numpy())
    return cdpo.next_lambda(cdpo.Config(beta=beta), loop, cost_limit), star


def test_the_dual_step_goes_to_the_multiplier_at_once_from_samples_of_any_policy():
    for policies, lams in (([0.0], [0.0]), ([1.0], [0.3]), ([0.5, 1.0], [2.0, 0.5])):
        lam, star = loop_of(policies, lams)
        assert lam == pytest.approx(star, abs=0.04) and star > 0.4


def test_a_gap_that_lasts_raises_lambda_boundedly_and_lambda_falls_by_half_of_the_way():
    lam, star = loop_of([0.5, 0.5], [0.8, 0.8])  # twice as far behind: over the limit
    assert (0.8 + star) / 2 + 0.02 < lam < 1.6
    beyond, _ = loop_of([2.0, 2.0], [0.8, 0.8])  # a policy beyond π_λ is safer than it must be
    assert beyond == pytest.approx((0.8 + star) / 2, abs=0.03)
    lam, _ = loop_of([1.0], [0.8], cost_limit=-50.0)  # no response costs so little: 1.5·λ + β/std
    assert 1.2 < lam < 2.0


# ---- Text, tokens and data -----------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template=CHATML):
    """Bytes and a few merges."""
    names, byte_level = ["<|im_start|>", "<|im_end|>"], tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    options = {"initial_alphabet": byte_level.ByteLevel.alphabet(), "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=names, **options)
    tokenizer.train_from_iterator(["\n\n\n", "the answer is here"] * 9, trainer)
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def test_a_prompt_goes_through_the_tokenizers_own_template_and_an_answer_ends_with_the_eos():
    tokenizer, answers = cdpo.load_tokenizer(chat_tokenizer()), ["Fine.", " spaced out \n"]
    counts = Counter()
    head, ys = cdpo.encode(tokenizer, "Hi", answers, counts=counts)
    turn = [{"role": "user", "content": "Hi"}]
    template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    assert head == template(turn, add_generation_prompt=True) and not counts
    for text, y in zip(answers, ys):
        assert tokenizer.decode(y) == text + "<|im_end|>"  # nothing is stripped
        assert (head + y) == template([*turn, {"role": "assistant", "content": text}])[:-1]
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    head, _ = cdpo.encode(chat_tokenizer(dated + CHATML), "How?", [])
    assert re.match(r"\d\d \w{3} 20(1\d|2[0-5])<", tokenizer.decode(head))  # a past year


def test_a_tokenizer_without_a_template_gets_beavers_and_a_given_one_wins(tmp_path):
    beaver = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"
    nasty = "\"Q\" 'it''s' \\n {x} {{ y }} {% z %} {# c #}\n é 😀 {prompt}\n}} A:\n\n"
    byte, prompt = transformers.ByT5Tokenizer, "mix {prompt} {{oil}} \\"
    cases = [(byte, None, beaver), (byte, nasty, nasty), (chat_tokenizer, nasty, nasty)]
    for make, given, text in cases:
        cdpo.load_tokenizer(make(), given).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # as of an exported policy
        plain = functools.partial(tokenizer.encode, add_special_tokens=False)
        head, [y] = cdpo.encode(tokenizer, prompt, ["bé"])
        assert head == plain(text.replace("{prompt}", prompt))
        assert y == [*plain("bé"), tokenizer.eos_token_id]
        turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "How?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        chat = tokenizer.apply_chat_template(messages, tokenize=False)
        assert f"Hello.{tokenizer.eos_token}" in chat  # as one who chats with the policy sends it


def test_a_response_is_encoded_as_read_behind_its_prompt_and_cut_without_its_end():
    tokenizer = cdpo.load_tokenizer(transformers.ByT5Tokenizer(), "Q {prompt}:")
    counts = Counter()
    head, ys = cdpo.encode(tokenizer, "a", ["bé", "b" * 50], 9, counts)
    assert [chr(i - 3) for i in head] == list("Q a:")
    assert ys == [[101, 0xC3 + 3, 0xA9 + 3, 1], [101] * 5]
    assert counts == {"responses cut to --max_length": 1}
    tokenizer = cdpo.load_tokenizer(chat_tokenizer())
    _, [y] = cdpo.encode(tokenizer, "Q", ["\n\nHi"], counts=counts)  # its newlines merge
    assert counts.total() == 2 and tokenizer.decode(y) == "\n\nHi<|im_end|>"


def test_score_models_read_an_answer_at_its_end_though_it_was_cut_off(tmp_path, monkeypatch):
    cdpo.load_tokenizer(transformers.ByT5Tokenizer()).save_pretrained(tmp_path)
    monkeypatch.setattr(cdpo, "infer", lambda cfg, source, flag, rows, title: rows)
    cfg = cdpo.Config(max_length=9, max_new_tokens=1)  # in the policy's tokens: theirs may be more
    run = cdpo.Run(cfg, tmp_path, None, [], [], [], "", tmp_path, "")
    cut, ended = cdpo.Row("x", ["ab"], ([7], [[5]]), []), cdpo.Row("x", ["ab"], ([7], [[5, 1]]), [])
    for row in cdpo.score_texts(run, "reward_model", [cut, ended]):
        assert row.ids[1] == [[ord("a") + 3, ord("b") + 3, 1]]  # its own tokens, and the end


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    entries = cdpo.tiny_rows(40, 0)
    entries.append({**entries[0], "response_1": None})  # an empty one: skipped and counted
    data = datasets.Dataset.from_list(entries)
    (tmp_path / "a.json").write_text(json.dumps(entries))
    data.to_parquet(tmp_path / "a.parquet")
    data.to_csv(tmp_path / "a.csv")
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    expected = rows_from(written(tmp_path / "a.jsonl", entries))
    for name in ("a.json", "a.parquet", "a.csv", "one", "splits/train"):
        assert repr(rows_from(tmp_path / name)) == repr(expected), name


def test_prompts_of_the_table_of_lambda_and_of_training_are_different_ones(tmp_path):
    entries = [{**GOOD, "prompt": f"prompt {i % 100}", "response_0": f"a{i}"} for i in range(300)]
    table = written(tmp_path / "eval.jsonl", [{"prompt": "prompt 7"}, {"prompt": "new"}])
    data = written(tmp_path / "d.jsonl", entries)
    for given in (None, table):
        cfg = cdpo.Config(dataset=data, model=SMALL, lambda_prompts=9, eval_dataset=given)
        run = cdpo.load_run(cfg, tmp_path)
        train, table = ({row.prompt for row in part} for part in (run.train, run.table))
        parts = [table, run.lambda_prompts, train]
        different = {i for part in parts for i in part}
        assert len(different) == sum(map(len, parts)) and len(parts[1]) == 9
        assert given is None or table == {"prompt 7", "new"}


# ---- Score models, and decoders that rows would get wrong ----------------------------------------


def write_classifier(folder, kind, labels=1, **settings):
    """A sequence-classification checkpoint as transformers itself writes it."""
    torch.manual_seed(0)
    config = config_for(kind, num_labels=labels, **{"pad_token_id": 0, **settings})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    return model


IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
IN_ROWS = [([3, 4, 5], [[9], [6, 7]]), ([8, 9], [[10]])]  # the same ones, beside another


@DTYPES
@KINDS
def test_a_classification_checkpoint_scores_as_by_its_own_forward_pass(tmp_path, kind, dtype):
    theirs = write_classifier(tmp_path, kind).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = cdpo.ScoreModel.from_pretrained(tmp_path)
    own = theirs(IDS, attention_mask=MASK).logits[:, 0].float()
    close = functools.partial(torch.allclose, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert own.abs().max() > 0.1 and ours(IDS, MASK).dtype == torch.float32
    assert close(ours(IDS, MASK), own)
    assert close(cdpo.response_scores(ours, cdpo.collate_rows(IN_ROWS))[1:], own)


def write_beaver(folder, bias=True, normalize=False, kind="cost", buffers=True):
    """A score checkpoint written by hand, as safe-rlhf writes them."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=40, **DECODER)
    decoder, weight = transformers.LlamaModel(config), torch.randn(1, 32)
    tensors = {f"model.{name}": value.clone() for name, value in decoder.state_dict().items()}
    tensors["score_head.weight"] = weight
    if bias:
        tensors["score_head.bias"] = torch.tensor([0.7])
    if normalize and buffers:
        moments = {"mean": [0.5], "var": [4.0], "count": [10]}
        tensors |= {f"normalizer.{name}": torch.tensor(value) for name, value in moments.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"architectures": ["LlamaForScore"], "score_type": kind, "score_dim": 1}
    settings |= {"score_bias": bias, "do_normalize": normalize}
    if not buffers:
        settings |= {"mean": 0.5, "var": 4.0}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **settings}))
    return decoder, weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize, buffers", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_beaver_checkpoints_give_hand_computed_scores(tmp_path, bias, normalize, buffers, kind):
    decoder, weight = write_beaver(tmp_path, bias, normalize, kind, buffers=buffers)
    hidden = decoder(IDS, attention_mask=MASK).last_hidden_state
    score = torch.stack([hidden[0, 4], hidden[1, 2]]) @ weight[0] + 0.7 * bias
    if normalize:
        score = score / 2 if kind == "cost" else (score - 0.5) / 2
    model = cdpo.ScoreModel.from_pretrained(tmp_path)
    assert torch.allclose(model(IDS, MASK), score, atol=1e-4)
    in_rows = cdpo.response_scores(model, cdpo.collate_rows(IN_ROWS))[1:]
    assert torch.allclose(in_rows, score, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = cdpo.ScoreModel.from_pretrained(tmp_path / "again")
    assert torch.allclose(again(IDS, MASK), score, atol=1e-4)


@KINDS
def test_a_new_head_draws_no_other_random_number_and_is_written_as_it_is_read(tmp_path, kind):
    lm = tiny_model(kind)
    lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no score_head.weight"):  # unless one is asked for
        cdpo.ScoreModel.from_pretrained(tmp_path)
    torch.manual_seed(5)
    model = cdpo.ScoreModel.from_pretrained(tmp_path, new_head=True)
    after = torch.rand(4)
    torch.manual_seed(5)
    head = torch.empty(1, 32).normal_(0.0, lm.config.initializer_range)
    assert torch.equal(torch.rand(4), after)  # the generator stands where the head's draw left it
    assert torch.equal(model.score_head.weight, head) and model.score_head.bias.item() == 0
    torch.testing.assert_close(model.model.state_dict(), lm.base_model.state_dict(), rtol=0, atol=0)
    tokenizer = cdpo.load_tokenizer(transformers.ByT5Tokenizer())
    run = cdpo.Run(cdpo.Config(), tmp_path, tokenizer, [], [], [], *"rrc")
    again = cdpo.ScoreModel.from_pretrained(cdpo.export(run, model, tmp_path / "reward_model"))
    torch.testing.assert_close(again(IDS, MASK), model(IDS, MASK))


def test_a_harmlessness_reward_given_as_a_cost_is_told_by_what_labels_there_are(
    capsys, monkeypatch
):
    pairs = [(0, 1, 0, 1, 1, -1), (1, 0, 0, 1, 0, 0)]  # nobody said which of the second is harmful
    run = cdpo.Run(cdpo.Config(), Path(), None, [], [], [row_of([1, 1], pairs)], *"rrc")
    for costs, accuracy in (([1.0, 0.0], "100.0%, 1 pairs"), ([0.0, 1.0], "0.0%, 1 pairs")):
        monkeypatch.setattr(cdpo, "score_texts", lambda *_, costs=costs: [torch.tensor(costs)])
        cdpo.try_score_model(run, "cost_model", cdpo.harm_loss)
        said = capsys.readouterr().out
        assert accuracy in said and ("ranks most the wrong way" in said) == (costs[1] > costs[0])


def test_a_model_may_have_more_tokens_than_its_tokenizer(tmp_path, monkeypatch):
    def scored(run, rows):
        return [cdpo.replace(row, reward=zero, cost=zero, ref_logps=zero) for row in rows]

    tokenizer, zero = cdpo.load_tokenizer(transformers.ByT5Tokenizer()), torch.zeros(2)
    monkeypatch.setattr(cdpo, "load_model", lambda *_: tiny_model("llama"))
    monkeypatch.setattr(cdpo, "sample_batch", lambda *_: [[[100, 5000, 1], [101]]])
    monkeypatch.setattr(cdpo, "score", scored)
    run = cdpo.Run(cdpo.Config(), tmp_path, tokenizer, [], [], [], *"rrc")
    assert cdpo.measure(run, "r", ["x"], 2, 0).rows[0].responses == ["a", "b"]


LONG_ROW = [([3, 4], [[5, 6, 7]]), ([5, 6, 7, 8], [list(range(8, 20)), list(range(60, 75))])]
LONG_ROW = [cdpo.Row("x", [], ids, []) for ids in LONG_ROW]  # tokens of a larger vocabulary, too


def refuses(folder, flag, kind, dtype, **settings):
    """Whether a checkpoint with random weights is refused as one that rows get wrong."""
    model = tiny_model(kind, **settings)
    if flag != "model":
        model = write_classifier(folder, kind, **settings)
    model.to(dtype).save_pretrained(folder)
    try:
        cdpo.check_decoder(LONG_ROW, folder, flag)
    except SystemExit as refusal:
        return refusal.code == 2
    return False


@DTYPES
def test_only_wrong_decoders_are_refused_in_any_precision(dtype, tmp_path, monkeypatch):
    for kind, layers in itertools.product(("llama", "qwen2", "mistral", "gpt2"), (1, 3)):
        depth = {"n_layer" if kind == "gpt2" else "num_hidden_layers": layers}
        for flag in ("model", "cost_model"):
            assert not refuses(tmp_path / f"{flag}-{kind}-{layers}", flag, kind, dtype, **depth)
    assert refuses(tmp_path, "model", "granite", dtype, logits_scaling=4.0)
    for flag in ("model", "reward_model"):  # a window shorter than the row
        assert refuses(tmp_path, flag, "mistral", dtype, sliding_window=8, initializer_range=0.07)
    collate = cdpo.collate_rows

    def causal(rows):  # a mask by which the second response sees the first
        batch = collate(rows)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"]).tril()}

    monkeypatch.setattr(cdpo, "collate_rows", causal)
    assert refuses(tmp_path, "cost_model", "llama", dtype, initializer_range=0.07)  # by 0.1


def test_samples_are_from_the_policy_whatever_the_checkpoints_generation_config_says(tmp_path):
    model = tiny_model("llama", vocab_size=280)
    settings = {"do_sample": True, "top_k": 3, "temperature": 0.4, "repetition_penalty": 5.0}
    model.generation_config = transformers.GenerationConfig(**settings)
    model.save_pretrained(tmp_path)
    model = cdpo.load_model(tmp_path).float()  # as the program loads it
    prompts, n, end = [[5, 6, 7], [9]], 8000, 279
    generator = torch.Generator().manual_seed(0)
    for prompt, drawn in zip(prompts, cdpo.sample_batch(model, prompts, n, end, 2, generator)):
        assert len(drawn) == n and all(len(ids) == 2 or ids == [end] for ids in drawn)
        first = torch.tensor([ids[0] for ids in drawn])
        token = int(first.mode().values)  # and after the likeliest first token, the second one
        second = torch.tensor([ids[1] for ids in drawn if ids[0] == token != end])
        for ids, tokens in ((prompt, first), (prompt + [token], second)):
            p = model(torch.tensor([ids])).logits[0, -1].softmax(dim=-1)
            frequency, likely = tokens.bincount(minlength=280) / len(tokens), p > 0.01
            deviation = (p * (1 - p) / len(tokens)).sqrt()
            assert likely.sum() > 3 and ((p - frequency).abs() < 5 * deviation)[likely].all()


def test_a_row_gets_the_same_tokens_whatever_the_other_rows_of_its_batch_do():
    model, results, lengths = tiny_model("llama"), [], set()
    for other in ([7], [9] * 11, [11, 12, 13, 14]):  # they end at other times, padded otherwise
        generator, prompts = torch.Generator().manual_seed(0), [[5, 6, 7], other, other]
        answers, *others = cdpo.sample_batch(model, prompts, 4, EOS, 60, generator)
        results.append(answers)
        lengths.add(max(len(ids) for drawn in others for ids in drawn))
    assert results[0] == results[1] == results[2] and len(lengths) > 1
    assert all(EOS not in ids[:-1] for ids in answers)


# ---- The whole program ---------------------------------------------------------------------------

TINY = str(Path(__file__).with_name("tiny_config.json"))
SHORT = f"--config {TINY} --dataset tiny:1500 --max_steps 4 --iterations 2 --lambda_samples 4"
SHORT = [*SHORT.split(), "--eval_samples", "4", "--dual_samples", "8"]
QUICK = [*SHORT, "--lambda_init", "1"]
SMALL = '{"model_type":"llama","hidden_size":8,"num_hidden_layers":1,"num_attention_heads":1}'


def results_of(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def main(folder, *flags):
    cdpo.main([*flags, "--output_dir", str(folder)])
    return results_of(folder)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors_of(folder):
    return load_file(folder / "policy" / "model.safetensors")


def reusing(folder):
    names = {"sft_model": "sft", "reward_model": "reward_model", "cost_model": "cost_model"}
    return [word for flag, name in names.items() for word in (f"--{flag}", str(folder / name))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The README's first command, in this process."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    main(folder, "--config", TINY)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A short run of every stage, the undisturbed one that others are compared with."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    main(folder, *QUICK)
    return folder


def enumerated_world(folder, prompts, given):
    """log π_ref, log π, r, c and truths of all 584 answers of one to three words, (n, 584) each."""
    words, tables = list(cdpo.TINY_WORDS), []
    answers = [" ".join(ws) for n in (1, 2, 3) for ws in itertools.product(words, repeat=n)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = [cdpo.encode(tokenizer, x, answers) for x in prompts]
    parts = [(head, ys[i : i + 73]) for head, ys in rows for i in range(0, 584, 73)]
    rows = [cdpo.Row("x", [""] * 73, ids, []) for ids in parts]
    for name in ("sft", "policy", "reward_model", "cost_model"):
        flag = name if name.endswith("model") else "model"
        source = given.get(name.replace("sft", "sft_model")) or folder / name
        values = cdpo.infer(cdpo.Config(dtype="float32"), source, flag, rows, name)
        tables.append(torch.cat(values).view(len(prompts), 584).double().numpy())
    truth = np.array([[cdpo.tiny_truth(x, y) for y in answers] for x in prompts])
    return *tables, truth[..., 0], truth[..., 1]


def exactness(folder, prompts, given):
    """How far a run's policy is from the exact constrained optimum for its own scores and π_ref."""
    settings = json.loads((folder / "config.json").read_text())
    ref, policy, reward, cost, *_ = enumerated_world(folder, prompts, given)
    beta, limit = settings["beta"], settings["cost_limit"]
    lam = bisected_lambda(reward, cost, beta, limit, log_ref=ref)
    optimum = softmax(ref + (reward - lam * cost) / beta)
    log_policy = policy - np.logaddexp.reduce(policy, axis=1, keepdims=True)
    kl = (np.exp(log_policy) * (log_policy - np.log(optimum))).sum(1).mean()
    found = {"lambda_star": lam, "kl": kl, "mass": np.exp(policy).sum(1).mean()}
    found["best_reward"] = (optimum * reward).sum(1).mean()
    return found | {"cost_over_limit": (np.exp(log_policy) * cost).sum(1).mean() - limit}


def test_the_first_command_finds_the_exact_constrained_optimum_of_its_world(tiny):
    prompts = list({line["prompt"]: 0 for line in json_lines(tiny / "samples.jsonl")})
    ref, _, reward, cost, true_reward, true_cost = enumerated_world(tiny, prompts, {})
    assert np.exp(ref).sum(1).mean() > 0.93  # a twentieth has four words
    for score, truth in ((reward, true_reward), (cost, true_cost)):  # (3) knows no prompt's offset
        score, truth = (x[:, 72:] - x[:, 72:].mean(1, keepdims=True) for x in (score, truth))
        assert np.corrcoef(score.ravel(), truth.ravel())[0, 1] > 0.97
    found, row = exactness(tiny, prompts, {}), results_of(tiny)["C-DPO"]
    beta = json.loads(Path(TINY).read_text())["beta"]
    free, sft = ((softmax(ref + reward * b) * reward).sum(1).mean() for b in (1 / beta, 0))
    assert row["lambda"] == pytest.approx(found["lambda_star"], abs=0.25)
    assert row["reward_mean"] == pytest.approx(found["best_reward"], abs=0.1 * (free - sft))
    assert row["cost_ci95"][0] <= 0  # the limit is met within the interval
    assert found["mass"] > 0.97 and found["kl"] < 0.15  # KL(π ‖ π_λ*), nats


def test_the_papers_ordering_appears_in_the_tiny_world(tiny):
    sft, ours, dpo = (results_of(tiny)[name] for name in ("SFT", "C-DPO", "DPO"))
    assert (sft["lambda"], sft["kl"], sft["cost_win_rate"]) == (None, 0, 0.5)
    for key in ("reward_mean", "true_reward_mean", "reward_win_rate"):
        assert dpo[key] > ours[key] > sft[key], key
    for key in ("cost_mean", "true_cost_mean"):
        assert dpo[key] > sft[key] > ours[key], key
    assert dpo["cost_win_rate"] < 0.5 < ours["cost_win_rate"]


def test_a_run_leaves_what_the_contract_names(tiny):
    both = "lambda cost_mean cost_ci95 reward_mean reward_ci95 kl"
    metric_fields = f"{both} iteration dpo_loss dpo_accuracy pairs_per_second tokens_per_second "
    metric_fields += "seconds peak_memory_gb"
    result_fields = f"{both} name reward_std cost_std safe_rate length_mean true_reward_mean "
    result_fields += "true_cost_mean reward_win_rate cost_win_rate"
    metrics, results = json_lines(tiny / "metrics.jsonl"), list(results_of(tiny).values())
    assert [entry["iteration"] for entry in metrics] == list(range(len(metrics)))
    for fields, entries in ((metric_fields.split(), metrics), (result_fields.split(), results)):
        for entry in entries:
            assert set(fields) <= set(entry)
            values = [x for key, x in entry.items() if key != "name" and x is not None]
            assert np.isfinite(np.hstack(values)).all()
    assert metrics[0]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy is reference
    samples = json_lines(tiny / "samples.jsonl")
    assert set(samples[0]) == {"policy", "prompt", "response", "reward", "cost"}
    cost = [line["cost"] for line in samples if line["policy"] == "C-DPO"]
    mean = results[1]["cost_mean"]
    assert len(cost) == 24 * 100 and np.mean(cost) == pytest.approx(mean, abs=1e-4)


def test_an_exported_chat_model_gives_plain_transformers_the_log_probs_of_training(tmp_path):
    tokenizer, answers = cdpo.load_tokenizer(chat_tokenizer()), ["the answer", " No\n"]
    run = cdpo.Run(cdpo.Config(), tmp_path, tokenizer, [], [], [], *"rrc")
    model = tiny_model("llama", vocab_size=280)
    rows = [cdpo.encode(tokenizer, "How?", answers)]
    logps = cdpo.sequence_logps(model, cdpo.collate_rows(rows)).tolist()
    cdpo.export(run, model, tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    turn = [{"role": "user", "content": "How?"}]
    head = template(turn, add_generation_prompt=True)
    for text, logp in zip(answers, logps):
        ids = template([*turn, {"role": "assistant", "content": text}])
        alone = separate_logps(model, [(head, [ids[len(head) : -1]])])  # less the last "\n"
        assert alone.item() == pytest.approx(logp, abs=1e-4)
    assert model.generation_config.eos_token_id == ids[-2] == tokenizer.eos_token_id


def test_the_table_by_hand(tmp_path, monkeypatch):
    def samples(reward, cost, log_ratio):
        rows = [row_of([1, 2], [], (r, c, [0.0, 0.0])) for r, c in zip(reward, cost)]
        return cdpo.Samples(rows, *map(torch.tensor, (reward, cost, log_ratio)))

    zero = [[0.0, 0.0], [0.0, 0.0]]
    known = {"sft": samples([[2.0, 3.0], [0.0, -1.0]], [[0.0, 1.0], [1.0, 1.0]], zero)}
    reward, cost = [[1.0, 3.0], [0.0, 0.0]], [[-1.0, 1.0], [0.0, 2.0]]
    known["policy"] = samples(reward, cost, [[1.0, 0.5], [0.0, 1.0]])
    monkeypatch.setattr(cdpo, "measure", lambda run, source, *_: known[source])
    run = cdpo.Run(cdpo.Config(dataset="x"), tmp_path, None, [], [], [row_of([1], [])], *"rrc")
    problem = cdpo.Problem([], known["sft"], 0.0)
    cdpo.evaluate(run, problem, {"SFT": ("sft", None), "C-DPO": ("policy", 0.5)})
    row = results_of(tmp_path)["C-DPO"]
    assert row["reward_win_rate"] == (0 + 0 + 1 + 0.5 + 0.5 + 1 + 0.5 + 1) / 8  # couples; ties half
    assert row["cost_win_rate"] == (1 + 1 + 0 + 0.5 + 1 + 1 + 0 + 0) / 8
    assert (row["reward_mean"], row["cost_mean"], row["length_mean"]) == (1.0, 0.5, 1.5)
    assert (row["safe_rate"], row["kl"], row["lambda"]) == (0.5, 0.625, 0.5)  # c ≤ 0 is safe
    assert row["reward_std"] == pytest.approx(math.sqrt((0 + 4 + 1 + 1) / 3))
    assert row["reward_ci95"] == pytest.approx([1 - 1.959964, 1 + 1.959964])  # means 2 and 0


def test_samples_of_the_last_policy_enter_an_iteration_once_beside_the_data():
    rows, seen = [row_of([i + 1, 1], [(0, 1, 0, 1, 1, -1)]) for i in range(7)], []
    samples = cdpo.Samples([row_of([1] * 4, [])] * 3, None, None, None)
    for iteration, recycle, fresh in ((0, True, 0), (1, True, 3), (1, False, 0)):
        cfg = cdpo.Config(batch_size=4, dpo_steps=5, iterations=3, recycle=recycle)
        loop = cdpo.Loop(1.0, [{}] * iteration, [samples] * iteration)
        steps = cdpo.steps_of_iteration(cfg, rows, loop)
        assert [len(step) for step in steps] == [5] * fresh + [4] * (5 - fresh)
        seen += [row.length for step in steps for row in step if len(row.pairs) and not fresh]
    assert all(seen.count(row.length) in (5, 6) for row in rows)  # passes go on over iterations


MARGINS = [("mocan", 0.02), ("pecan", 0.02), ("dpo", 0.5), ("sft", 0.5)]


@pytest.mark.parametrize("method, margin", MARGINS)
def test_every_method_runs_and_respects_the_margin(tmp_path, capsys, method, margin):
    rows = main(tmp_path / "o", *SHORT, "--method", method, "--margin", str(margin))
    row = rows[{"mocan": "MoCAN", "pecan": "PeCAN"}.get(method, method.upper())]
    kept = torch.load(tmp_path / "o" / "reference_samples.pt", weights_only=True)
    limit = float(kept[1].cost.double().mean()) - margin
    printed = re.search(r"E\[cost\] ≤ (\S+)", capsys.readouterr().out)[1]
    assert float(printed) == pytest.approx(limit, rel=1e-3) and tensors_of(tmp_path / "o")
    if method.endswith("can"):
        assert row["lambda"] > 0 and row["predicted_cost"] == pytest.approx(limit, abs=1e-4)
    assert (tmp_path / "o" / "reward_model").exists() == (method != "pecan")


def test_the_papers_letter_and_a_confident_limit_run(tmp_path):
    letter = "--labels sample --no_all_pairs --lambda_step gradient --lambda_init 0 --no_recycle"
    main(tmp_path / "letter", *SHORT, *letter.split())
    first, second = json_lines(tmp_path / "letter" / "metrics.jsonl")
    assert first["lambda"] == 0
    assert second["lambda"] == pytest.approx(max(0, 0.05 * first["cost_mean"]), abs=1e-6)
    main(tmp_path / "sure", *QUICK, "--cost_confidence", "0.95")
    for entry in json_lines(tmp_path / "sure" / "metrics.jsonl"):
        error = (entry["cost_ci95"][1] - entry["cost_mean"]) / 1.959964
        assert entry["cost_bound"] == pytest.approx(entry["cost_mean"] + 1.644854 * error, abs=1e-4)


# ---- Interruptions, many processes, other precisions --------------------------------------------

KILLER = """
import os, random, signal, sys, time
import cdpo, torch
torch.set_num_threads(1)
folder, moments, gone = sys.argv[-1], random.Random(0), 0
os.mkdir(folder)
while not gone:
    before, child = set(os.listdir(folder)), os.fork()
    if child == 0:
        cdpo.main(sys.argv[1:])
        os._exit(0)
    while not gone and set(os.listdir(folder)) <= before:  # until something new is there
        time.sleep(0.002)
        gone, _ = os.waitpid(child, os.WNOHANG)
    time.sleep(moments.uniform(0.0, 0.3))
    if not gone:
        os.kill(child, signal.SIGKILL)
        os.wait()
    print("killed at", sorted(os.listdir(folder)))
"""


def test_a_run_killed_at_any_moment_ends_with_the_same_numbers_and_tensors(quick, tmp_path):
    folder, here = tmp_path / "killed", Path(cdpo.__file__).parent
    command = [sys.executable, "-c", KILLER, *QUICK, "--output_dir", str(folder)]
    killer = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert killer.returncode == 0, killer.stderr
    assert len(set(killer.stdout.splitlines())) > 9, killer.stdout  # in many places
    main(folder, *QUICK)
    for name in ("results.json", "samples.jsonl"):
        assert (folder / name).read_text() == (quick / name).read_text()
    torch.testing.assert_close(tensors_of(folder), tensors_of(quick), rtol=0, atol=0)
    metrics = json_lines(folder / "metrics.jsonl"), json_lines(quick / "metrics.jsonl")
    for one, other in zip(*metrics):
        assert all(one[key] == other[key] for key in ("lambda", "cost_mean", "dpo_loss", "kept"))
    assert {file.name for file in folder.iterdir()} == {file.name for file in quick.iterdir()}


def test_a_loss_that_is_not_finite_stops_and_what_was_finished_stays(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(tmp_path / "o", *QUICK, "--learning_rate", "1e30")
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.count("\n") == 1
    assert re.search(r"policy: the loss or its gradient is not finite at step \d", message)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "sft")


@pytest.mark.parametrize("case", ["even", "odd"])
def test_two_processes_give_the_single_processs_numbers(case, quick, tmp_path):
    flags = QUICK
    if case == "odd":  # three rows a step in micro-batches of one: a process has more to do
        flags = [*QUICK, *reusing(quick), "--batch_size", "3", "--tokens_per_batch", "12"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, cdpo.__file__, *flags, "--output_dir", str(tmp_path / "two")]
    settings = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **settings)
    one, two = tmp_path / "one", tmp_path / "two"
    main(one, *flags)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    first, second = (json_lines(folder / "metrics.jsonl") for folder in (one, two))
    assert second[0]["dpo_loss"] == pytest.approx(first[0]["dpo_loss"], abs=1e-4)
    assert second[0]["cost_mean"] == pytest.approx(first[0]["cost_mean"], abs=0.02)
    assert second[-1]["lambda"] == pytest.approx(first[-1]["lambda"], abs=0.1)
    torch.testing.assert_close(tensors_of(one), tensors_of(two), rtol=0, atol=2e-2)
    if case == "odd":  # the given reference is the same model: so are its samples
        texts = [[line["response"] for line in json_lines(f / "samples.jsonl")] for f in (one, two)]
        assert texts[0][: 24 * 4] == texts[1][: 24 * 4]


def test_bfloat16_reaches_the_same_conclusion(quick, tmp_path):
    rows = main(tmp_path / "o", *QUICK, "--dtype", "bfloat16")
    for name, row in results_of(quick).items():  # another cost model, another policy, a few steps
        assert row["cost_mean"] == pytest.approx(rows[name]["cost_mean"], abs=0.6), name
    first, second = (json_lines(f / "metrics.jsonl")[0] for f in (quick, tmp_path / "o"))
    assert second["dpo_loss"] == pytest.approx(first["dpo_loss"], abs=0.01)
    assert {value.dtype for value in tensors_of(tmp_path / "o").values()} == {torch.bfloat16}


# ---- Refusals ------------------------------------------------------------------------------------


def many(**changes):
    """Forty good rows over twenty prompts, then one with changes; what is ... is left out."""
    rows = [{**GOOD, "prompt": f"mix {i // 2}", "response_0": f"read {i}"} for i in range(40)]
    return rows + [{key: value for key, value in {**GOOD, **changes}.items() if value is not ...}]


BAD_DATA = {  # name of a file: (rows, words of the message)
    "no_prompt": (many(prompt=...), "row 41: column prompt is missing"),
    "label_of_2": (many(safer_response_id=2), "row 41: safer_response_id is 2; it must be 0 or 1"),
    "no_text": ([{**GOOD, "prompt": ["mix"]}] * 40, "row 1: prompt is ['mix']; it must be text"),
    "empty": ([], "nothing is there"),
    "equal": ([{**GOOD, "response_0": "burn"}] * 40, "40 of identical responses"),
    "contrary": ([{**GOOD, "safer_response_id": 1}] * 40, "40 whose safer response is unsafe"),
    "long": ([{**row, "prompt": "mix " * 60} for row in many()], "that fills --max_length"),
    "broken": (None, "--dataset broken.jsonl: cannot be read"),
}
REFUSED = {  # flags: words of the message
    "--lamda 1": "unrecognized arguments: --lamda",
    "--iterations 0": "--iterations is 0; it must be at least 1",
    "--cost_confidence 1": "--cost_confidence is 1.0",
    "--method pecan": "--method pecan needs --margin",
    "--model /nowhere/model": "--model /nowhere/model",
    '--model {"model_type":"llama","vocab_size":20}': "but the model's vocab_size is 20",
    "--cost_model HEADLESS": "no score_head.weight",
    "--cost_model THREE": "THREE: cannot be loaded",
    "--reward_model COST": "calls it a cost",
    "--config UNKNOWN.json": "--lamda",
    "--lambdas 1 nan": "--lambdas must be at least 0, and finite",
    "--dataset tiny:many": "--dataset tiny:many: cannot be read",
    "--max_length 60": "more than the model's 64 positions",
    "--compare nowhere": "--compare nowhere: cannot be loaded",
    "--sft_model COST --tokenizer GRANITE": "it is no causal LM, it has no lm_head.weight",
    "--cost_limit -50": "the lowest cost that the samples can reach",
    "--model GRANITE --dtype bfloat16": "attention or output head this program gets wrong",
}
DATA = f"--max_length 128 --model {SMALL} --dataset"
REFUSED |= {f"{DATA} {name}.jsonl": words for name, (_, words) in BAD_DATA.items()}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, (rows, _) in BAD_DATA.items():
        written(folder / f"{name}.jsonl", rows or [])
    (folder / "UNKNOWN.json").write_text('{"lamda": 1}')
    (folder / "broken.jsonl").write_text(json.dumps(GOOD) + '\n{"prompt": \n')
    tiny_model("llama").save_pretrained(folder / "HEADLESS")
    write_beaver(folder / "COST")
    write_classifier(folder / "THREE", "llama", labels=3)
    tiny_model("granite", logits_scaling=4.0).save_pretrained(folder / "GRANITE")
    cdpo.tiny_tokenizer().save_pretrained(folder / "GRANITE")
    return folder


def refusal_of(capsys, folder, *flags):
    """The one line on standard error with which the program refuses."""
    with pytest.raises(SystemExit) as refusal:
        main(folder, *flags)
    message = capsys.readouterr().err
    assert refusal.value.code == 2 and "Traceback" not in message, message
    assert message.startswith("cdpo: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(flags, bad_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(bad_files)
    message = refusal_of(capsys, tmp_path / "o", *SHORT, *flags.split())
    assert REFUSED[flags] in message, message


def test_other_settings_are_refused_with_the_flags_that_reuse_models(quick, tmp_path, capsys):
    before = {file: file.read_bytes() for file in quick.rglob("*") if file.is_file()}
    message = refusal_of(capsys, quick, *QUICK, "--beta", "0.5", "--seed", "3")
    assert "beta was 1.0, is 0.5" in message and "seed was 0, is 3" in message
    assert {file: file.read_bytes() for file in quick.rglob("*") if file.is_file()} == before
    flags = reusing(quick)
    assert all(f"{flag} {path}" in message for flag, path in zip(flags[::2], flags[1::2]))
    policy, old = str(quick / "policy"), results_of(quick)
    rows = main(tmp_path / "o", *QUICK, "--beta", "0.5", *flags, "--compare", policy)
    assert list(rows) == ["SFT", "C-DPO", "DPO", policy] and not (tmp_path / "o" / "sft").exists()
    assert rows["SFT"] == old["SFT"] and rows[policy]["cost_mean"] == old["C-DPO"]["cost_mean"]
    assert rows[policy]["lambda"] is None and rows[policy]["kl"] == old["C-DPO"]["kl"]


def test_a_refused_folder_keeps_all_and_an_overwritten_one_what_is_yours(quick, tmp_path, capsys):
    for name, text in (("config.json", '{"model_type": "llama"}'), ("notes.txt", "mine")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        for flags in (QUICK, [*QUICK, "--overwrite"]):
            assert "holds no run of this program" in refusal_of(capsys, folder, *flags)
        assert (folder / name).read_text() == text and len(list(folder.iterdir())) == 1
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal_of(capsys, tmp_path / "file", *QUICK)

    folder = shutil.copytree(quick, tmp_path / "run")
    for name in ("notes.txt", "plots.json"):
        (folder / name).write_text("mine")
    again = [*SHORT, "--method", "sft", "--overwrite"]
    given = ["--sft_model", f"{folder}/sft/../sft"]  # in the very folder, by another spelling
    assert "would delete" in refusal_of(capsys, folder, *again, *given)
    refusal_of(capsys, folder, *again, "--dataset", "/nowhere.jsonl")  # nor is anything lost here
    assert (folder / "sft").exists() and (folder / "metrics.jsonl").exists()
    main(folder, *again)
    assert (folder / "notes.txt").exists() and (folder / "plots.json").exists()
    assert (folder / "sft").exists() and not (folder / "metrics.jsonl").exists()


def test_a_run_refused_for_its_data_writes_nothing_and_a_config_can_be_read_back(tmp_path, capsys):
    refusal_of(capsys, tmp_path / "o", *SHORT, "--dataset", "/nowhere.jsonl")
    assert not (tmp_path / "o").exists()
    cfg = cdpo.parse([*SHORT, "--output_dir", str(tmp_path / "o")])
    cdpo.open_folder(cfg)
    kept = cdpo.parse(["--config", str(tmp_path / "o" / "config.json")])  # nulls and lists, too
    assert kept == cfg


if __name__ == "__main__":
    flags = ["--config", TINY, "--output_dir", "tiny_output", *sys.argv[1:]]
    cdpo.main(flags)
    cfg = cdpo.parse(flags)
    run = cdpo.load_run(cfg, Path(cfg.output_dir))
    table = list(dict.fromkeys(row.prompt for row in run.table))
    for name, prompts in (("lambda's", run.lambda_prompts), ("the table's", table)):
        print(f"on {name} prompts:", json.dumps(exactness(run.out, prompts, vars(cfg))))
