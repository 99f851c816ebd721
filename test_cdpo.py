"""cdpo.py as claims.

Expected values never come from cdpo.py itself but from a hand calculation, float64 numpy, numerical
differentiation, or the enumeration of a world that is small enough to list.

    python test_cdpo.py --beta 0.1 --seed 3     # one run in the tiny world, measured by enumeration
"""

import builtins
import copy
import dis
import functools
import inspect
import io
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
import filelock
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cdpo
from cdpo import dpo_loss, estimate, relabel, solve_dual

F64 = functools.partial(torch.tensor, dtype=torch.float64)
torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other


# ---- C-DPO in 30 lines ---------------------------------------------------------------------------


def test_the_readmes_c_dpo_in_30_lines_reaches_the_constrained_optimum():
    readme, project = Path(__file__).with_name("README.md").read_text(encoding="utf-8"), {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], project)  # noqa: S102
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


def test_losses_stay_finite_and_linear_at_huge_scores_and_are_zero_of_no_pair():
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
    none = logps[:0]
    losses = [cdpo.bradley_terry_loss(*none.T), cdpo.cost_loss(*none.T, *none.detach().T)]
    for loss in (*losses, dpo_loss(none, none.detach(), none[:, 0].detach(), 0.1)):
        assert loss.item() == 0 and torch.autograd.grad(loss, logps)[0].isfinite().all()


def test_labels_are_the_preference_of_the_lagrangian_reward_or_drawn_from_it_or_the_likelier():
    reward, cost = np.random.default_rng(2).normal(0, 2, (2, 40, 2))
    generator, before = torch.Generator().manual_seed(0), torch.get_rng_state()
    for lam in (0.0, 0.3, 2.0):
        odds = np.exp(reward - lam * cost)  # Bradley–Terry: odds of a win
        p = odds[:, 0] / odds.sum(1)
        assert relabel(F64(reward), F64(cost), lam).numpy() == pytest.approx(p, abs=1e-12)
        often = F64(reward).repeat(10_000, 1), F64(cost).repeat(10_000, 1)
        drawn = relabel(*often, lam, "sample", generator).unflatten(0, (-1, 40))
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        assert drawn.mean(0).numpy() == pytest.approx(p, abs=0.02)  # four standard errors
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert relabel(F64([[1e4, -1e4]]), F64([[0.0, 0.0]]), 1.0).item() == 1.0  # odds beyond a float
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


def test_lambda_step_by_hand_for_costs_of_any_shape():
    for shape in [(6,), (3, 1, 2)]:
        cost = F64([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]).reshape(shape)  # mean 4
        for limit, lam in ((1.5, 0.45), (5.5, 0.05), (4.0, 0.2), (9.0, 0.0)):
            assert cdpo.lambda_step(0.2, cost, limit, 0.1) == pytest.approx(lam, abs=1e-12)
    assert math.isnan(cdpo.lambda_step(0.2, F64([1.0, math.nan]), 0.0, 0.1))  # is no λ of 0


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_dual_value_is_the_highest_lagrangian_and_its_slope_the_slack_of_pi_lambda(scale):
    rng, eps = np.random.default_rng(9), 1e-6
    (reward, cost), lam, beta, limit = scale * rng.normal(0, 1, (2, 6, 9)), 1.7, 0.05, 0.3 * scale

    def lagrangian(z):  # of the policy softmax(z) beside a uniform π_ref
        policy, log_pi = softmax(z), z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        objective = reward - beta * (log_pi + np.log(9)) - lam * (cost - limit)
        return (policy * objective).sum(1).mean()

    best = (reward - lam * cost) / beta  # up to 1e4: its exponential would overflow
    value = cdpo.dual_value(F64(reward), F64(cost), lam, beta, limit).item()
    assert value == pytest.approx(lagrangian(best), rel=1e-9)
    assert value >= max(lagrangian(best + rng.normal(0, 1, (6, 9))) for _ in range(200))
    ends = [cdpo.dual_value(F64(reward), F64(cost), lam + d, beta, limit) for d in (-eps, eps)]
    slack = limit - tilted_cost(reward, cost, lam, beta)  # (14)
    assert float(ends[1] - ends[0]) / (2 * eps) == pytest.approx(slack, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_dual_at_any_scale_is_the_bisected_multiplier_or_0_or_says_what_can_be_reached(dtype):
    for number in range(100):
        rng = np.random.default_rng(number)
        scale, beta = 10 ** rng.uniform([-2, -2], [2, 0])
        cost = scale * (rng.normal(0, 1, (6, 12)) + rng.normal(0, 0.5, (6, 1)))
        reward = scale * 10 ** rng.uniform(-0.5, 0.5) * rng.normal(0, 1, (6, 12))
        scores = torch.tensor(np.stack([reward, cost]), dtype=dtype)
        reward, cost = scores.double().numpy()
        first, some, last = (tilted_cost(reward, cost, lam, beta) for lam in (0.0, 0.5, 100.0))
        limit, lowest = last + rng.uniform(0.05, 0.95) * (first - last), cost.min(1).mean()
        lam = bisected_lambda(reward, cost, beta, limit)
        assert solve_dual(*scores, beta, limit) == pytest.approx(lam, rel=1e-6), number
        assert solve_dual(*scores, beta, first + 0.1 * scale) == 0.0
        with pytest.raises(ValueError) as error:
            solve_dual(*scores, beta, lowest - 0.1 * scale, 0.5)
        named = [*map(float, re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", str(error.value)))]
        for value in (lowest, some):  # to four digits; at lam_max
            assert any(x == pytest.approx(value, rel=5e-4) for x in named), error.value


def test_solve_dual_takes_finite_scores_only_each_by_itself():
    # infinities may cancel in a sum of two; a weight of 0 would hide others
    for values in itertools.product((0.0, math.inf, -math.inf, math.nan), repeat=3):
        reward, cost, log_ratio = scores = F64([[[1.0, 0.0]], [[1.0, -1.0]], [[0.0, 0.0]]])
        scores[:, 0, 0] += F64(values)
        if any(values):  # NaN, too
            with pytest.raises(ValueError, match="not finite"):
                solve_dual(reward, cost, 1.0, 0.0, log_ratio=log_ratio)
    huge = F64([[1.7e308, 0.0]])  # finite, though reward − cost and cost − log_ratio overflow
    assert solve_dual(huge, -huge, 1.0, 0.0) == 0.0
    assert solve_dual(0 * huge, -huge, 1.0, 0.0, log_ratio=huge) == 0.0


def test_predict_and_estimate_which_is_clustered_by_prompt_by_hand():
    # three prompts, two samples; (r − λc)/β − log_ratio is 0 and ln 3, or twice 0; λ = 2, β = 0.5
    cost = F64([[1.0, 2.0], [-1.0, 3.0], [0.5, 0.0]])
    log_ratio = F64([[0.3, 0.1], [-1.0, 0.5], [0.0, 2.0]])
    weights = np.array([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]])
    reward = 2 * cost + 0.5 * F64([[0.0, math.log(3)]] * 2 + [[0.0, 0.0]])
    for r, ratio in ((reward, None), (reward + 0.5 * log_ratio, log_ratio)):
        found = cdpo.predict(r, cost, 2.0, 0.5, ratio)
        assert found["cost"] == pytest.approx((1.75 + 2.0 + 0.25) / 3, abs=1e-12)
        assert found["reward"] == pytest.approx((weights * r.numpy()).sum() / 3, abs=1e-12)
        assert found["ess"] == pytest.approx((1.6 + 1.6 + 2) / 3, abs=1e-12)  # 1/Σw²
    sure = cdpo.predict(F64([[900.0, 0.0, 0.0]]), F64([[1.0, 0.0, 0.0]]), 0.0, 1.0)
    assert (sure["ess"], sure["cost"]) == (1.0, 1.0)
    # prompt means 0, 2, 4: mean 2, std 2, standard error 2/√3; samples within prompts differ
    values = F64([[-5.0, 5.0], [1.0, 3.0], [4.0, 4.0]])
    assert estimate(values) == estimate(values, 0.5) == pytest.approx(2.0, abs=1e-12)
    assert estimate(values, 0.95) == pytest.approx(2 + 1.644854 * 2 / math.sqrt(3), abs=1e-5)
    assert estimate(values[1:2]) == 2.0  # of one prompt


def test_each_public_function_can_be_pasted_beside_torch_and_math_alone():
    names = "bradley_terry_loss cost_loss relabel dpo_loss lambda_step dual_value solve_dual "
    names += "predict implicit_reward estimate ci95 collate_rows sequence_logps"
    for name in names.split():
        codes = [getattr(cdpo, name).__code__]
        for code in codes:  # and of the functions within it
            codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
            used = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
            assert used <= {"torch", "math", *dir(builtins)}, name


# ---- Rows of a prompt and its responses ----------------------------------------------------------

EOS = 2
SHAPE = {"vocab_size": 50, "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": 1}
SHAPE |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
KINDS = pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])


def config_for(kind, **settings):
    return transformers.AutoConfig.for_model(kind, **{**SHAPE, **settings})


def tiny_model(kind, **settings):
    # weights of 0.3: at the usual 0.02 logits hardly depend on the context: a wrong mask would pass
    torch.manual_seed(0)
    config = config_for(kind, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()


def random_rows(lengths=((6, [4]), (1, [1, 1]), (9, [1, 12, 3]), (12, [5, 1, 7, 2, 3, 8]))):
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
    head = functools.partial(model.get_output_embeddings())  # of a vocabulary as it were so large
    head.weight, model.get_output_embeddings = torch.empty(2**27 // chunk, 0), lambda: head
    seen, embeddings = [], model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, _: seen.append(args[0].numel()))
    shared = cdpo.sequence_logps(model, cdpo.collate_rows(rows, pad_id=pad_id))
    handle.remove()
    assert seen == [len(rows) * max(len(x) + sum(map(len, ys)) for x, ys in rows)]  # a prompt once
    separate = separate_logps(model, rows)
    assert shared.shape == (12,) and shared.dtype == torch.float32
    assert (shared - separate).abs().max() < 1e-4
    # weights at random, so that no response's gradient can hide behind another's
    weight = torch.randn(12, generator=torch.Generator().manual_seed(1))
    one = torch.autograd.grad((weight * shared).sum(), list(model.parameters()))
    other = torch.autograd.grad((weight * separate).sum(), list(model.parameters()))
    for (name, _), x, y in zip(model.named_parameters(), one, other):
        assert (x - y).norm() <= 1e-3 * y.norm(), name


def test_an_empty_response_is_scored_at_the_prompts_end_and_an_empty_prompt_refused(tmp_path):
    rows = random_rows([(5, [3, 0, 4]), (2, [0])])
    logps = cdpo.sequence_logps(tiny_model("llama"), cdpo.collate_rows(rows))
    assert (logps == 0).tolist() == [False, True, False, True]
    tiny_classifier("llama").save_pretrained(tmp_path)
    model = cdpo.ScoreModel.from_pretrained(tmp_path).eval()
    scores = cdpo.Responses(model)(cdpo.collate_rows(rows)).tolist()
    for prompt, y in [(prompt, y) for prompt, responses in rows for y in responses]:  # in order
        ids = torch.tensor([prompt + y])
        assert scores.pop(0) == pytest.approx(model(ids, torch.ones_like(ids)).item(), abs=1e-4)
    with pytest.raises(ValueError, match="empty prompt"):
        cdpo.collate_rows([([3], [[4]]), ([], [[4, 5]])])


def test_log_probs_of_a_bfloat16_model_are_taken_in_float32():
    # DPO trains on differences that bfloat16 rounds away; one-token responses show the rounding
    model, rows = tiny_model("llama").bfloat16(), random_rows([(5, [1, 1])] * 16)
    logps = cdpo.sequence_logps(model, cdpo.collate_rows(rows, pad_id=EOS))
    assert (logps != logps.bfloat16().float()).float().mean() > 0.8


# ---- What flows, and the losses of the stages ----------------------------------------------------

HARM = {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}
GOOD = {"prompt": "mix oil", "response_0": "wait", "response_1": "burn", "better_response_id": 1}
GOOD |= HARM
NEED = [*GOOD]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_from(path, tokenizer=None, **settings):
    """The rows of each prompt of a dataset, by the program's reader; in bytes by default."""
    cfg, words = cdpo.Config(dataset=str(path), **settings), tokenizer or cdpo.load_tokenizer("{}")
    return list(itertools.chain(*cdpo.load_rows(cfg, words, "dataset", NEED)))


def row_of(lengths, compared=(), helpful=(), harmful=(), scores=()):
    """A row with a prompt of four tokens and responses that their text tells apart."""
    ids = [[100 + i] * n for i, n in enumerate(lengths)]
    texts, scores = [f"y{i}" for i in range(len(ids))], map(torch.tensor, scores)
    return cdpo.Row("x", texts, ([7] * 4, ids), compared, helpful, harmful, *scores)


def run_of(folder=Path(), tokenizer=None, rows=(), reward_rows=(), **settings):
    return cdpo.Run(cdpo.Config(**settings), folder, tokenizer, rows, [], [], reward_rows, [])


def test_score_losses_are_oriented_as_the_labels_are(tmp_path):
    # y0, y1; which helps more, which is safer, whether each is safe, in any usual way
    pairs = [
        ("a", "b", True, 0, 1, False),  # b helps more, and is the harmful one
        # a is called unsafe here though safe above: a label belongs to its pair, not to a response
        ("c", "a", 0, False, 1.0, 0),
        ("c", "a", 1, 1, False, 0.0),
    ]
    entries = [dict(zip(NEED, ["mix oil", *pair])) for pair in pairs]
    ((row,),) = rows_from(written(tmp_path / "d.jsonl", entries))
    assert row.responses == ["a", "b", "c"] and row.weight == 3
    a, b, c = values = 0.3, 1.0, -2.0
    loss, right = cdpo.reward_loss(row, torch.tensor(values))
    by_hand = -log_sigmoid([b - a, c - a, a - c]).sum() / 3
    assert loss.item() == pytest.approx(by_hand) and right.tolist() == [True, False, True]
    loss, right = cdpo.harm_loss(row, torch.tensor(values))
    first = [b - a, b, -a]  # b worse and unsafe, a better and safe
    second = [a - c, a, -c]  # a worse and unsafe, c better and safe
    third = [c - a, c, a]  # c worse, both unsafe
    by_hand = -log_sigmoid(first + second + third).sum() / 3
    assert loss.item() == pytest.approx(by_hand) and right.tolist() == [True, True, False]


def dpo_by_hand(row, logps, couples, lam, beta):
    """(12) and (13) on couples of a row, their mean."""
    r_lam, ratio, losses = row.reward - lam * row.cost, logps - row.ref_logps, []
    for i, j in couples:
        p, h = np.exp(log_sigmoid(r_lam[i] - r_lam[j])), beta * float(ratio[i] - ratio[j])
        losses.append(-p * log_sigmoid(h) - (1 - p) * log_sigmoid(-h))
    return np.mean(losses)


def test_sft_counts_a_response_as_often_as_it_was_compared_and_dpo_all_pairs_or_the_datasets():
    scores = [1.0, 0.0, 2.0], [0.5, -1.0, 2.0], [-3.0, -4.0, -5.0]
    row, logps = row_of([1, 2, 3], [(0, 1), (0, 1), (2, 0)], scores=scores), F64([-2.0, -5.0, -4.5])
    by_token = (2 + 5 + 2 + 5 + 4.5 + 2) / (1 + 2 + 1 + 2 + 3 + 1)
    assert cdpo.sft_loss(row, logps)[0].item() == pytest.approx(by_token)
    for all_pairs, couples in [(True, [(0, 1), (0, 2), (1, 2)]), (False, row.compared)]:
        cfg = cdpo.Config(beta=0.3, all_pairs=all_pairs)
        loss, _ = cdpo.relabelled_dpo(cfg, 0.8, 0)(row, logps)
        assert loss.item() == pytest.approx(dpo_by_hand(row, logps, couples, 0.8, 0.3))
    samples = cdpo.Row("x", ["a", "b", "a"], ([1], [[5], [6], [5]]))  # two of them are equal
    assert cdpo.pairs_of(samples, True) == [(0, 1), (1, 2)]
    assert (samples.weight, samples.length) == (1.5, 4)  # as of m/2 pairs


# ---- The method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recycle", [True, False])
def test_algorithm_1_relabels_fits_samples_steps_and_keeps_the_best(recycle, tmp_path, monkeypatch):
    scores, logps = ([1.0, 0.0], [0.5, 0.0], [-3.0, -3.0]), F64([-2.0, -4.0])
    rows = [row_of([i + 1, 1], [(0, 1)], scores=scores) for i in range(7)]
    both, spread = torch.ones(3, 2), F64([[-0.1], [0.0], [0.1]])  # three prompts, two samples
    dual, *iterates = [  # of π_ref, and of three iterates
        cdpo.Samples([row_of([9] * 2)] * 3, r * both, c * both + spread, 0 * both)
        for r, c in ((0.0, 0.0), (1.0, 0.4), (2.0, -0.2), (1.0, -0.2))
    ]
    width = 1.644854 * 0.1 / math.sqrt(3)  # from the mean to the bound at 95%
    trained, losses = [], []

    def train(cfg, policy, steps, loss_fn):
        trained.append(steps)
        losses.append(loss_fn(rows[0], logps)[0].item())
        return losses[-1], 1.0, {}

    monkeypatch.setattr(cdpo, "load_model", lambda *_, **__: torch.nn.Linear(1, 1))
    monkeypatch.setattr(cdpo, "train", train)
    monkeypatch.setattr(cdpo, "export", lambda run, _, path: os.makedirs(path / str(len(trained))))
    monkeypatch.setattr(cdpo, "measure", lambda *_: iterates[len(trained) - 1])
    settings = {"beta": 0.5, "batch_size": 4, "dpo_steps": 5, "iterations": 3, "recycle": recycle}
    settings |= {"lambda_step": "gradient", "lambda_lr": 0.5, "cost_confidence": 0.95}
    run, first = run_of(tmp_path, None, rows, lora_rank=0, **settings), 1.0
    second = first + 0.5 * (0.4 + width)  # (14)
    lams = [first, second, second + 0.5 * (width - 0.2)]
    assert cdpo.constrained_dpo(run, dual, 0.0, first) == pytest.approx(second)

    history = json_lines(tmp_path / "metrics.jsonl")
    assert [entry["lambda"] for entry in history] == pytest.approx(lams)
    assert losses == pytest.approx([dpo_by_hand(rows[0], logps, [(0, 1)], x, 0.5) for x in lams])
    assert [entry["kept"] for entry in history] == [0, 1, 1]
    assert os.listdir(tmp_path / "policy") == ["2"]  # the second iterate
    # An iteration has its steps of the dataset and, once, the newest samples: at first π_ref's
    for steps, newest in zip(trained, [dual, *iterates]):
        fresh = [row for step in steps for row in step if not row.compared]
        assert [len(step) - 4 for step in steps] == ([1, 1, 1, 0, 0] if recycle else [0] * 5)
        assert all(any(row is new for new in newest.rows) for row in fresh)
    seen = Counter(row.length for step in itertools.chain(*trained) for row in step)
    assert {seen[row.length] for row in rows} == {8, 9}  # 60 of 7: passes go on over iterations
    assert cdpo.constrained_dpo(run, dual, 0.0, first) == pytest.approx(second)
    assert len(trained) == 3  # found, not trained again


def kept(*iterates, limit=0.0, noise=0.0):
    """The number kept of hand-made iterates (λ, reward, cost, KL), on four prompts, β = 0.1."""
    history, sampled, best = [], [], 0
    for i, (lam, reward, cost, kl) in enumerate(iterates):
        rewards = reward + i * noise * F64([[1.0], [-1.0], [1.0], [-1.0]])
        history.append({"lambda": lam, "cost_bound": cost})
        sampled.append(cdpo.Samples([], rewards, None, torch.full((4, 1), kl)))
        best = cdpo.best_iterate(cdpo.Config(beta=0.1), history, sampled, limit, best)
    return best


def test_the_iterate_kept_has_the_highest_objective_less_an_exact_penalty():
    # a good policy 0.006 over the limit is not given up for a collapsed one under it
    assert kept((1.3, 3.4, 0.006, 5.0), (1.4, 2.4, -0.11, 18.9)) == 0
    # nor one that meets the limit for what breaking it earns: at λ = 1 the price is above 1
    assert kept((1.0, 1.0, 0.0, 0.0), (1.0, 2.0, 1.0, 0.0)) == 0
    # of those that meet it the higher reward − β·KL, slack earns nothing; the limit may be any
    assert kept((1.0, 1.0, -1.0, 0.0), (1.0, 1.1, -0.1, 0.5)) == 1
    assert kept((1.0, 1.0, -0.1, 0.0), (1.0, 1.4, -0.1, 5.0)) == 0
    assert kept((1.0, 1.0, -0.9, 0.0), (1.0, 1.1, -0.1, 0.0), limit=-0.5) == 0
    # of those that break it the one that breaks it less, though it earns a little less
    assert kept((1.0, 1.0, 1.0, 0.0), (1.0, 0.5, 0.5, 0.0), (1.0, 0.4, 0.6, 0.0)) == 1


def test_of_iterates_within_the_noise_of_their_difference_the_later_is_kept():
    better, worse = (1.0, 1.0, -1.0, 0.0), (1.0, 0.9, -1.0, 0.0)
    assert kept(better, better) == 1
    # their difference on four prompts is 0.1 ± noise: a standard error of noise·√(4/3)/2
    assert kept(better, worse, noise=0.16) == 0 and kept(better, worse, noise=0.18) == 1
    # what is common to both is no noise: the difference is paired by prompt
    assert kept((1.0, 0.0, -1.0, 0.0), better, worse, noise=0.16) == 1
    # but none that breaks the limit for one that meets it
    assert kept((1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 0.01, 0.0), noise=9.0) == 0


def scores_of(n, m):
    """Rewards and costs of n prompts × m responses: what helps tends to harm."""
    reward, cost = F64(np.random.default_rng(3).normal(0, 1, (2, n, m)))
    return reward, cost + 0.7 * reward + 0.4


def next_lambda(policies, lams, limit=0.0, width=0.0, m=20_000):
    """λ after iterations that fitted exp(share · (r − λc)/β), share 1 where converged; and λ*.

    width: how far the bound of the cost is above its mean.
    """
    torch.manual_seed(0)
    (reward, cost), log_ref, beta = scores_of(6, 30), torch.randn(6, 30).double(), 0.5
    log_ref, history, sampled = log_ref.log_softmax(1), [], []
    for share, lam in zip(policies, lams):
        log_ratio = (log_ref + share * (reward - lam * cost) / beta).log_softmax(1) - log_ref
        y = torch.multinomial((log_ref + log_ratio).exp(), m, replacement=True)
        sampled.append(cdpo.Samples([], *(x.gather(1, y) for x in (reward, cost, log_ratio))))
        mean = float(sampled[-1].cost.mean())
        history.append({"lambda": lam, "cost_mean": mean, "cost_bound": mean + width})
    world = reward.numpy(), cost.numpy(), beta, limit - width
    star = bisected_lambda(*world, log_ref=log_ref.numpy())
    return cdpo.next_lambda(cdpo.Config(beta=beta), history, sampled, limit), star


def test_the_dual_step_goes_to_the_multiplier_at_once_from_samples_of_any_policy():
    for policies, lams in (([0.0], [0.0]), ([1.0], [0.3]), ([0.5, 1.0], [2.0, 0.5])):
        for width in (0.0, 0.2):  # where a bound is to meet the limit, the mean aims below it
            lam, star = next_lambda(policies, lams, width=width)
            assert lam == pytest.approx(star, abs=0.04) and star > 0.4


def test_a_gap_that_lasts_raises_lambda_boundedly_and_lambda_falls_by_half_of_the_way(monkeypatch):
    lam, star = next_lambda([0.5, 0.5], [0.8, 0.8])  # twice as far behind: over the limit
    half = pytest.approx((0.8 + star) / 2, abs=0.03)
    assert half.expected + 0.02 < lam < 1.6
    monkeypatch.setattr(cdpo, "lasting_gap", lambda *_: 9.0)  # however large: by half at most
    for lam in (0.1, 0.8):
        found, star = next_lambda([0.5, 0.5], [lam, lam])
        assert found == pytest.approx(1.5 * max(lam, star), abs=0.06)
    monkeypatch.undo()
    assert next_lambda([0.5], [0.8])[0] == half  # a gap seen once may be noise
    assert next_lambda([2.0, 2.0], [0.8, 0.8])[0] == half  # beyond π_λ: safer than it must be
    scores = torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 2, 4)  # any π_λ costs 1
    gaps = {(1.4, 1.2): 0.1, (1.5, 1.4, 1.2): 0.1, (1.2, 1.4): 0.4}  # it halves; so; it grows
    for costs, gap in (gaps | {(1.4, 0.9): 0, (0.9, 1.4): 0, (1.4,): 0}).items():
        history = [{"lambda": 0.7, "cost_mean": cost} for cost in costs]
        assert cdpo.lasting_gap(cdpo.Config(), history, scores) == pytest.approx(gap, abs=1e-6)


def test_lambda_never_falls_with_the_limit_nor_leaps_where_it_is_barely_feasible_or_is_not(capsys):
    cfg, (reward, cost) = cdpo.Config(beta=0.1), scores_of(24, 4)
    scores = reward, cost, 0 * cost
    lowest, ratio = float(cost.amin(1).mean()), float(reward.std(1).mean() / cost.std(1).mean())
    above = [2.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, -1e-6, -1e-4, -0.1, -10.0]
    for lam in (0.0, 1.0, 3.0):
        found = [cdpo.capped_dual(cfg, lam, scores, lowest + x) for x in above]
        cap = 1.5 * lam + 2 * ratio  # up by half, and by twice the λ of equal weights
        assert found == sorted(found) and found[-4:] == pytest.approx([cap] * 4)
        exact = [bisected_lambda(reward.numpy(), cost.numpy(), 0.1, lowest + x) for x in above[:3]]
        assert found[:3] == pytest.approx(exact, abs=1e-6) and 0 < exact[1] < exact[2] < cap
    dual, limit = cdpo.Samples([row_of([1])] * 24, *scores), lowest + 1e-4
    exact = bisected_lambda(reward.numpy(), cost.numpy(), 0.1, limit)
    for method, first in (("cdpo", 2 * ratio), ("pecaid", 2 * ratio), ("mocan", exact)):
        found = cdpo.first_lambda(cdpo.Config(beta=0.1, method=method), dual, limit)
        assert found == pytest.approx(first) and exact > 2 * ratio, method
    with pytest.raises(SystemExit):  # a limit that no response meets
        cdpo.first_lambda(cfg, dual, lowest - 1)
    assert f"lowest cost that the samples can reach is {lowest:.5g}"[:-1] in capsys.readouterr().err


def test_pecan_takes_the_help_of_a_helpful_policy_as_r_and_minus_a_safe_ones_as_c(monkeypatch):
    logps = {"sft": [-10.0, -10.0], "helpful": [-8.0, -11.0], "safe": [-12.0, -9.0]}
    monkeypatch.setattr(cdpo, "values_of", lambda run, name, rows: torch.tensor(logps[name]))
    row = row_of([1, 1], [(0, 1)], harmful=[(0, 1, 1, -1)])  # y0 harms more
    other = row_of([1, 1], [(0, 1)], helpful=[(0, 1)])  # and helps more, in another dataset
    for method in ("pecan", "pecaid"):
        settings = {"beta": 0.5, "method": method, "sft_model": "given"}
        run = run_of(Path("/nowhere"), None, [row], [other], **settings)
        assert cdpo.score(run, [row])[2].tolist() == row.ref_logps.tolist() == logps["sft"]
        assert row.reward.tolist() == [1.0, -0.5]  # the helpful policy likes y0
        assert row.cost.tolist() == [1.0, -0.5]  # and the safe one avoids it
    signs = {}

    def fit_stage(run, name, rows, loss_fn):
        logps = torch.tensor([-10.0, -10.0], requires_grad=True)
        loss_fn(rows[0], logps)[0].backward()
        signs[name] = logps.grad.sign().tolist()

    monkeypatch.setattr(cdpo, "fit_stage", fit_stage)
    monkeypatch.setattr(cdpo, "scores_stage", lambda run: sys.exit("what is of interest is over"))
    with pytest.raises(SystemExit, match="over"):
        cdpo.all_stages(run)
    assert signs == {"helpful": [-1, 1], "safe": [1, -1]}  # of a loss: what wins has −1


# ---- Whole runs, which tests share ---------------------------------------------------------------

TINY = str(Path(__file__).with_name("tiny_config.json"))
FEW = f"--config {TINY} --dataset tiny:400 --max_steps 2 --dual_samples 2 --eval_samples 2".split()
SHORT = f"--config {TINY} --dataset tiny:1500 --max_steps 4 --iterations 2 --lambda_samples 4"
SHORT = [*SHORT.split(), "--eval_samples", "4", "--dual_samples", "8"]
QUICK = [*SHORT, "--lambda_init", "1"]


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
    """The README's first command, on less data."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    main(folder, "--config", TINY, "--dataset", "tiny:24000", "--iterations", "4")
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A short run of every stage, the undisturbed one that others are compared with."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    main(folder, *QUICK)
    return folder


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])  # of Conv1D; of a Linear of its own
@pytest.mark.parametrize("stage", ["policy", "reward_model"])
def test_lora_begins_at_its_base_and_adds_a_low_rank_to_each_linear_layer(tmp_path, kind, stage):
    tokenizer, rank, base = cdpo.tiny_tokenizer(), 3, tiny_model(kind)
    rows = list(itertools.chain(*rows_from("tiny:60", tokenizer)))
    base.save_pretrained(tmp_path / "base")
    settings = {"sft_model": str(tmp_path / "base"), "lora_rank": rank, "dtype": "float32"}
    settings |= {"iterations": 1, "dpo_steps": 8, "batch_size": math.ceil(len(rows) / 8)}
    run = run_of(tmp_path, tokenizer, learning_rate=0.01, sft_learning_rate=0.01, **settings)
    trainee, steps = cdpo.start_training(run, stage, rows)
    batch = cdpo.collate_rows([row.ids for row in rows])
    assert len(steps) == 8
    loss_fn = cdpo.sft_loss if stage == "policy" else cdpo.reward_loss
    if stage == "policy":  # bit for bit, in the mode of training
        assert torch.equal(trainee(batch), cdpo.sequence_logps(base, batch))
    start = copy.deepcopy(trainee[0])
    cdpo.train(run.cfg, trainee, [rows[:8], rows[8:16]] * 4, loss_fn)

    cdpo.export(run, trainee[0], tmp_path / stage)
    if stage == "policy":  # of plain transformers
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / stage)
        found = separate_logps(exported, [row.ids for row in rows])
        assert torch.equal(exported.lm_head.weight, base.lm_head.weight)
        assert exported.generation_config.eos_token_id == tokenizer.eos_token_id
    else:  # its head is a new one, trained whole
        exported = cdpo.ScoreModel.from_pretrained(tmp_path / stage)
        found = cdpo.Responses(exported)(batch)
        assert not torch.equal(exported.score_head.weight, start.score_head.weight)
    assert (found - trainee(batch)).abs().max() < 1e-4

    old, layers = dict(base.base_model.named_parameters()), 0
    for name, weight in exported.base_model.named_parameters():
        if weight.dim() == 2 and re.match(r"(layers|h)\.", name):
            values = torch.linalg.svdvals((weight - old[name]).double())
            assert values[0] > 1e-3 and values[rank] < 1e-5 * values[0], name
            layers += 1
        else:
            assert torch.equal(weight, old[name]), name
    assert layers == {"llama": 2 * 7, "gpt2": 2 * 4, "falcon": 2 * 4}[kind]


def test_a_step_is_that_of_a_textbook_loop_however_it_is_cut(tmp_path):
    tokenizer, rate, flat = cdpo.tiny_tokenizer(), 0.01, torch.nn.utils.parameters_to_vector
    rows = list(itertools.chain(*rows_from("tiny:60", tokenizer)))
    tiny_model("llama").save_pretrained(tmp_path)
    settings = {"sft_model": str(tmp_path), "lora_rank": 0, "sft_learning_rate": rate}
    settings["batch_size"] = 1  # 80 rows are 80 steps
    for budget in (10**6, 40, 1):  # all at once; a few rows; one by one
        run = run_of(tmp_path, tokenizer, tokens_per_batch=budget, dtype="float32", **settings)
        trainee, _ = cdpo.start_training(run, "reward_model", (rows * 2)[:80])
        start, plain = copy.deepcopy(trainee), copy.deepcopy(trainee)
        cdpo.train(run.cfg, trainee, [rows[:20], rows[20:30]], cdpo.reward_loss)
        optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        for step, share in ((rows[:20], 0.1), (rows[20:30], 0.2)):
            gaps = [(s, *pair) for x, s in cdpo.by_row(plain, step) for pair in x.helpful]
            losses = [torch.nn.functional.softplus(s[bad] - s[good]) for s, good, bad in gaps]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = share * rate
            optimizer.step()
        first, one, other = (flat(model.parameters()) for model in (start, plain, trainee))
        assert (one - other).norm() < 0.001 * (one - first).norm()
    shares = [trainee.scheduler.lr_lambdas[0](step) for step in (0, 1, 9, 25, 40, 60, 79)]
    assert shares == pytest.approx([0.1, 0.2, 1.0, 1.0, 1.0, 0.5, 0.025])  # falls to 0
    policy, steps = cdpo.start_training(run, "policy", rows)  # later, as λ is to have settled
    shares = [policy.scheduler.lr_lambdas[0](step) for step in (0, 9, 375, 450, 499)]
    assert len(steps) == 500 and shares == pytest.approx([0.1, 1.0, 1.0, 0.4, 0.008])


def test_micro_batches_keep_their_padded_tokens_within_the_budget():
    rng = random.Random(0)
    for size in (1, 3, 64, 200):
        lengths = [int(rng.lognormvariate(5.5, 0.8)) for _ in range(size)]
        groups = cdpo.micro_batches(lengths, 1024)
        assert sorted(i for group in groups for i in group) == list(range(size))
        assert max(lengths) in [lengths[i] for i in groups[0]]  # what is too large shows at once
        padded = [len(group) * max(lengths[i] for i in group) for group in groups if group]
        assert all(n <= 1024 or len(group) == 1 for n, group in zip(padded, groups))
    assert len(cdpo.micro_batches([100] * 64, 800)) == 8


def test_held_out_accuracy_is_of_the_labels_that_there_are_by_hand(capsys, monkeypatch):
    helpful = [(0, 1), (2, 1), (2, 0), (1, 0)]  # the last contradicts the first; y2 scores most
    harm, help_ = row_of([1, 1], harmful=[(0, 1, 1, -1)]), row_of([1] * 3, helpful=helpful)
    monkeypatch.setattr(cdpo, "fit_stage", lambda *_: None)
    for name, loss_fn, scores, found in (
        (("reward_model", "helpful"), cdpo.reward_loss, [1.0, 0.0, 2.0], "75.0%, 4 pairs"),
        (("cost_model", "harmful"), cdpo.harm_loss, [1.0, 0.0], "100.0%, 1 pairs"),
        (("cost_model", "harmful"), cdpo.harm_loss, [0.0, 1.0], "0.0%, 1 pairs"),  # harmlessness
    ):
        monkeypatch.setattr(cdpo, "values_of", lambda *_, scores=scores: torch.tensor(scores))
        cdpo.score_model_stage(run_of(cost_model="given"), *name, [], [harm, help_], loss_fn)
        assert found in capsys.readouterr().out


# ---- Sampling and measuring ----------------------------------------------------------------------


def test_score_models_read_an_answer_at_its_end_though_it_was_cut_off(tmp_path):
    theirs = tiny_classifier("llama", vocab_size=300)
    theirs.save_pretrained(tmp_path)
    cdpo.load_tokenizer("{}").save_pretrained(tmp_path)
    run = run_of(tmp_path, cost_model=str(tmp_path), max_length=9, dtype="float32")
    row = cdpo.Row("x", ["ab", "", "abc"], ([7], [[5], [1], [5, 1]]))  # in the policy's tokens
    prompt = "BEGINNING OF CONVERSATION: USER: x ASSISTANT:"
    scores = cdpo.values_of(run, "cost_model", [row]).tolist()
    for text, found in zip(row.responses, scores):
        ids = torch.tensor([[ord(letter) + 3 for letter in prompt + text] + [1]])  # bytes; the end
        assert theirs(ids).logits.item() == pytest.approx(found, abs=1e-4)


def test_samples_are_from_the_policy_whatever_the_checkpoints_generation_config_says(tmp_path):
    model = tiny_model("llama", vocab_size=280)
    settings = {"do_sample": True, "top_k": 3, "temperature": 0.4, "repetition_penalty": 5.0}
    settings |= {"min_new_tokens": 2, "bad_words_ids": [[5], [6]], "eos_token_id": 7}
    model.generation_config = transformers.GenerationConfig(**settings)
    model.save_pretrained(tmp_path)
    model = cdpo.load_model(str(tmp_path), "sft").float()  # as the program loads it
    tokenizer, prompts, n = cdpo.load_tokenizer("{}"), [[5, 6, 7], [9]], 8000
    end, tokenizer.model_input_names = tokenizer.eos_token_id, ["input_ids"]  # no mask, by default
    torch.manual_seed(0)
    answers = cdpo.sample(model, tokenizer, prompts, n, 2)
    for prompt, drawn in zip(prompts, answers, strict=True):
        assert len(drawn) == n and all(ids == [end] or end != ids[0] and ids[1:] for ids in drawn)
        first = torch.tensor([ids[0] for ids in drawn])
        token = int(first.mode().values)  # and after the likeliest first token, the second one
        second = torch.tensor([ids[1] for ids in drawn if ids[0] == token != end])
        for ids, tokens in ((prompt, first), (prompt + [token], second)):
            p = model(torch.tensor([ids])).logits[0, -1].softmax(dim=-1)
            frequency, likely = tokens.bincount(minlength=280) / len(tokens), p > 0.01
            deviation = (p * (1 - p) / len(tokens)).sqrt()
            assert likely.sum() > 3 and ((p - frequency).abs() < 5 * deviation)[likely].all()


def test_what_a_policy_says_is_shown_in_one_line_with_what_its_samples_promise(capsys):
    row = cdpo.Row("how\n\nto?", ["so:\n" + "word " * 90, "b"], ([7], [[5], [6]]))
    reward, cost = F64([[0, 1, 1], [1, 0, 0]]), F64([[0, 1, 0.5], [0.5, 0.5, 0.5]])
    samples = cdpo.Samples([row, row], reward, cost, 0 * cost)
    for beta in (10.0, 0.01):  # the weights of 0.01 rest on single samples
        cdpo.report(cdpo.Config(beta=beta), samples, 0.0, "title:")
        first, second, *others = capsys.readouterr().out.splitlines()
        assert first.startswith("title: cost 0.500 [0.500, 0.500]") and len(second) < 100
        assert second.strip().startswith("how to? → so: word word")
        assert ("warning" in "".join(others)) == (beta == 0.01)


def test_the_table_by_hand(tmp_path, monkeypatch, capsys):
    def samples(reward, cost, log_ratio=((0.0, 0.0), (0.0, 0.0))):
        rows = [row_of([1, 2], scores=(r, c, [0.0, 0.0])) for r, c in zip(reward, cost)]
        return cdpo.Samples(rows, *map(torch.tensor, (reward, cost, log_ratio)))

    reward, known = [[1.0, 3.0], [0.0, 0.0]], {}
    known["sft"] = samples([[2.0, 3.0], [0.0, -1.0]], [[0.0, 1.0], [1.0, 1.0]])
    known["policy"] = samples(reward, [[-1.0, 1.0], [0.0, 2.0]], [[1.0, 0.5], [0.0, 1.0]])
    known["safe"] = samples(reward, [[-1.0, -3.0], [-1.0, -2.0]])  # −1.75 ± 0.49
    known["harmful"] = samples(reward, [[3.0, 3.0], [2.0, 3.0]])  # 2.75 ± 0.49
    monkeypatch.setattr(cdpo, "measure", lambda run, stage, *_: known[stage])
    policies = {"SFT": ("sft", None), "C-DPO": ("policy", 0.5), "λ = 2": ("safe", 2.0)}
    policies["DPO"] = "harmful", 0.0
    cdpo.evaluate(run_of(tmp_path, dataset="x", beta=1.0), policies, known["sft"], 0.0)
    row = results_of(tmp_path)["C-DPO"]
    assert (row["reward_mean"], row["cost_mean"], row["length_mean"]) == (1.0, 0.5, 1.5)
    assert (row["safe_rate"], row["kl"], row["lambda"]) == (0.5, 0.625, 0.5)  # c ≤ 0 is safe
    assert row["reward_std"] == pytest.approx(math.sqrt((0 + 4 + 1 + 1) / 3))
    assert row["reward_ci95"] == pytest.approx([1 - 1.959964, 1 + 1.959964])  # means 2 and 0
    odds = math.exp(0.5)  # promised: π_ref's second sample of the first prompt by 3 − 0.5 to 2
    assert row["predicted_cost"] == pytest.approx((odds / (1 + odds) + 1) / 2)
    printed = capsys.readouterr().out
    assert "E[cost] ≤ 0" in printed and all(f"\n| {name} |" in printed for name in policies)
    assert printed.strip().endswith(": C-DPO not shown either way, λ = 2 met, DPO broken")
    lines = json_lines(tmp_path / "samples.jsonl")
    assert [line.pop("policy") for line in lines] == [x for x in policies for _ in range(4)]
    assert lines[5] == {"prompt": "x", "response": "y1", "reward": 3.0, "cost": 1.0}


# ---- Models --------------------------------------------------------------------------------------


def tiny_classifier(kind, **settings):
    """A sequence classifier of transformers itself."""
    torch.manual_seed(0)
    config = config_for(kind, **{"num_labels": 1, "pad_token_id": 0, **settings})
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
IN_ROWS = [([3, 4, 5], [[9], [6, 7]]), ([8, 9], [[10]])]  # the same ones, beside another


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@KINDS
def test_a_classification_checkpoint_scores_as_by_its_own_forward_pass(tmp_path, kind, dtype):
    theirs = tiny_classifier(kind).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = cdpo.ScoreModel.from_pretrained(tmp_path)
    own = theirs(IDS, attention_mask=MASK).logits[:, 0].float()
    close = functools.partial(torch.allclose, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert own.abs().max() > 0.1 and ours(IDS, MASK).dtype == torch.float32
    assert close(ours(IDS, MASK), own)
    assert close(cdpo.Responses(ours)(cdpo.collate_rows(IN_ROWS))[1:], own)


def write_beaver(folder, bias=True, normalize=False, kind="cost", buffers=True):
    """A score checkpoint written by hand, as safe-rlhf writes them."""
    torch.manual_seed(1)
    config = config_for("llama", vocab_size=40)
    decoder, weight = transformers.LlamaModel(config), torch.randn(1, 32)
    tensors = {f"model.{name}": value.clone() for name, value in decoder.state_dict().items()}
    tensors["score_head.weight"] = weight
    if bias:
        tensors["score_head.bias"] = torch.tensor([0.7])
    if normalize and buffers:
        moments = {"mean": [0.5], "var": [4.0], "count": [10]}
        tensors |= {f"normalizer.{name}": torch.tensor(value) for name, value in moments.items()}
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
    ours = cdpo.ScoreModel.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    for model in (ours, cdpo.ScoreModel.from_pretrained(tmp_path / "again")):
        in_rows = cdpo.Responses(model)(cdpo.collate_rows(IN_ROWS))[1:]
        assert torch.allclose(torch.stack([model(IDS, MASK), in_rows]), score, atol=1e-4)


# ---- Text and tokens -----------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chat_tokenizer(template=CHATML, **special):
    """Bytes, and a merge of two newlines."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {word: i for i, word in enumerate([*sorted(byte_level.alphabet()), "ĊĊ"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    settings = {"eos_token": "<|im_end|>", "chat_template": template, **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def test_a_prompt_goes_through_the_tokenizers_own_template_and_an_answer_has_one_end(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path)
    tokenizer, answers = cdpo.load_tokenizer(str(tmp_path)), ["Fine.", " spaced out \n"]
    turn, counts = [{"role": "user", "content": "Hi"}], Counter()
    head, ys = cdpo.encode(tokenizer, "Hi", answers, 99, counts)
    template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    assert head == template(turn, add_generation_prompt=True) and not counts
    for text, y in zip(answers, ys):
        assert tokenizer.decode(y) == text + "<|im_end|>"  # nothing is stripped
        assert (head + y) == template([*turn, {"role": "assistant", "content": text}])[:-1]
    for text in ("Fine.<|im_end|>", "Fine.<|im_end|>\n more"):  # nor anything behind an end kept
        assert cdpo.encode(tokenizer, "Hi", [text], 99, counts)[1] == ys[:1]
    clock = "{{ strftime_now('%d %b %Y') }}"
    head, _ = cdpo.encode(chat_tokenizer(clock + CHATML), "How?", [], 99, counts)
    assert re.match(r"\d\d \w{3} 20(1\d|2[0-5])<", tokenizer.decode(head))  # a past year


def test_a_tokenizer_without_a_template_gets_beavers_which_goes_with_the_policy(tmp_path):
    beaver, prompt = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:", "mix {prompt} {{oil}} \\"
    bos = chat_tokenizer(None, bos_token="<|im_start|>")
    texts = {"single": "<|im_start|> $A", "special_tokens": [("<|im_start|>", bos.bos_token_id)]}
    bos.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**texts)
    made = {"byte": transformers.ByT5Tokenizer(), "chat": chat_tokenizer(None), "<|im_start|>": bos}
    for begin, tokenizer in made.items():
        tokenizer.save_pretrained(tmp_path / begin)
        cdpo.load_tokenizer(str(tmp_path / begin)).save_pretrained(tmp_path / begin / "policy")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / begin / "policy")
        plain = functools.partial(tokenizer.encode, add_special_tokens=False)
        head, [y] = cdpo.encode(tokenizer, prompt, ["bé"], 999, Counter())
        assert head == plain(begin * (begin[0] == "<") + beaver.format(prompt))  # a bos, as Llama's
        assert y == [*plain("bé"), tokenizer.eos_token_id]
        turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "How?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        chat = tokenizer.apply_chat_template(messages, tokenize=False)
        assert f"Hello.{tokenizer.eos_token}" in chat  # as one who chats with the policy sends it


def test_a_response_is_encoded_as_read_behind_its_prompt_and_cut_without_its_end():
    tokenizer, counts = cdpo.load_tokenizer("{}"), Counter()
    tokenizer.chat_template = "{{ 'Q ' + messages[0].content + ':' }}"
    head, ys = cdpo.encode(tokenizer, "a", ["bé", "b" * 50], 9, counts)
    assert [chr(i - 3) for i in head] == list("Q a:")
    assert ys == [[101, 0xC3 + 3, 0xA9 + 3, 1], [101] * 5] and counts.total() == 1
    assert cdpo.said(tokenizer, [100, 5000, *ys[0]]) == "abé"  # a model may have more tokens
    tokenizer = chat_tokenizer()
    _, [y] = cdpo.encode(tokenizer, "Q", ["\n\nHi"], 99, counts)  # its newlines merge
    assert counts.total() == 2 and tokenizer.decode(y) == "\n\nHi<|im_end|>"


# ---- Files, and the gate -------------------------------------------------------------------------


def test_a_file_is_whole_or_as_it_was_and_what_a_link_in_its_way_points_to_stays(tmp_path, capsys):
    (tmp_path / "yours").mkdir()
    written(tmp_path / "yours" / "notes.txt", ["mine"])
    (tmp_path / "a.jsonl.tmp").symlink_to(tmp_path / "yours")
    cdpo.write(tmp_path / "a.jsonl", ["é", 1])
    with pytest.raises(SystemExit):
        cdpo.write(tmp_path / "a.jsonl", [2, "\ud800"])  # what UTF-8 cannot hold
    assert "a.jsonl cannot be written" in capsys.readouterr().err
    assert json_lines(tmp_path / "a.jsonl") == ["é", 1]
    assert os.listdir(tmp_path / "yours") == ["notes.txt"]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    entries = list(cdpo.tiny_rows(40, 0))
    entries.append({**entries[0], "response_1": None})  # an empty one: skipped and counted
    entries[1] |= {"response_0": "None", "response_1": "null", "prompt": "NA"}  # answers
    data = datasets.Dataset.from_list(entries)
    (tmp_path / "a.json").write_text(json.dumps(entries))
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "one")
    expected = rows_from(written(tmp_path / "a.jsonl", entries))
    assert sum(len(row.compared) for row in itertools.chain(*expected)) == 40
    assert ["None", "null"] in [rows[0].responses for rows in expected]
    for name in ("a.json", "a.parquet", "one"):
        assert repr(rows_from(tmp_path / name)) == repr(expected), name


def test_a_response_is_scored_and_compared_as_the_text_that_the_policy_has_of_it(tmp_path, capsys):
    one = {**GOOD, "response_0": "wait a long while", "response_1": "burn</s> it all"}
    same = {**GOOD, "response_0": "wait a lot", "response_1": "wait another day"}  # when cut
    prompt = len("BEGINNING OF CONVERSATION: USER: mix oil ASSISTANT:")
    path = written(tmp_path / "d.jsonl", [one, same] * 2)
    ((row,),) = rows_from(path, max_length=prompt + 6)
    assert row.responses == ["wait a", "burn"] and [y[-1] for y in row.ids[1]] == [100, 1]
    assert row.compared == [[0, 1]] * 2 and "'of identical responses': 2" in capsys.readouterr().out


def test_a_long_prompt_gives_several_rows_each_labelled_pair_whole_in_one(tmp_path):
    rng = random.Random(3)
    couples = [tuple(rng.sample("abcdefghijklmnopqrstuvwxyz", 2)) for _ in range(60)]
    couples += couples[:5]  # repeated pairs count each time
    entries = [{**GOOD, "response_0": a, "response_1": b} for a, b in couples]
    ((whole,),) = rows_from(written(tmp_path / "d.jsonl", entries))
    assert len(whole.compared) == whole.weight == 65 and len(whole.responses) == 26
    head, ys = whole.ids
    (parts,), found = rows_from(tmp_path / "d.jsonl", row_length=len(head) + 12), []
    for part in parts:
        assert part.ids[0] == head and part.length <= len(head) + 12
        assert len(part.responses) == len(set(part.responses)) and part.weight == len(part.compared)
        assert part.ids[1] == [ys[whole.responses.index(text)] for text in part.responses]
        for (first, second), helpful, harmful in zip(part.compared, part.helpful, part.harmful):
            assert helpful == [second, first] and harmful == [second, first, 1, -1]
            found.append((part.responses[first], part.responses[second]))
    assert len(parts) > 5 and sorted(found) == sorted(couples)


def parts_of(tokenizer, **settings):
    """Prompts, without blanks, of each part of the data as the program splits it."""
    run = cdpo.load_run(cdpo.Config(lambda_prompts=9, **settings), tokenizer)
    parts = run.table_rows, run.dual_rows, run.train_rows, run.reward_rows, run.reward_table
    return run, [{row.prompt.strip() for row in rows} for rows in parts]


def test_prompts_of_the_table_of_lambda_and_of_training_are_different_ones(tmp_path):
    tokenizer = cdpo.load_tokenizer("{}")  # that trims its prompts, as Llama-3's does
    tokenizer.chat_template = "{{ 'Q: ' + messages[0].content.strip() }}"
    entries = [{**GOOD, "prompt": f"mix {i % 100}" + " " * (i // 100)} for i in range(300)]
    table, data = [{"prompt": " mix 7"}, {"prompt": "new"}], written(tmp_path / "d.jsonl", entries)
    for given in (None, written(tmp_path / "eval.jsonl", table)):
        _, parts = parts_of(tokenizer, dataset=data, eval_dataset=given)
        sizes = [2, 9, 90] if given else [20, 9, 71]
        assert [*map(len, parts[:3])] == sizes and len(set.union(*parts[:3])) == sum(sizes)
        assert parts[3:] == [parts[2], parts[0]]


def test_the_reward_model_learns_from_a_dataset_of_its_own(tmp_path):
    pair = {"response_0": "wait", "response_1": "burn"}
    harm = [{**pair, **HARM, "prompt": f"prompt {i}"} for i in range(100)]
    help_ = [{**pair, "better_response_id": i % 2, "prompt": f"prompt {i}"} for i in range(50, 150)]
    files = {"dataset": written(tmp_path / "harm.jsonl", harm)}
    files["reward_dataset"] = written(tmp_path / "help.jsonl", help_)
    run, (table, dual, train, learned, held_out) = parts_of(cdpo.load_tokenizer("{}"), **files)
    assert train | dual | table == {row["prompt"] for row in harm} and len(table) == 20
    assert all(row.harmful and not row.helpful for row in run.train_rows)
    # where rewards are measured none is learned; a fifth of the others is held out
    others = {row["prompt"] for row in help_} - dual - table
    assert learned | held_out == others and not learned & held_out
    assert len(held_out) == len(others) // 5
    for row in run.reward_rows + run.reward_table:
        better = int(row.prompt.split()[1]) % 2
        assert row.helpful == [[better, 1 - better]]


def many(**changes):
    """Forty good rows over twenty prompts, then one with changes; what is ... is left out."""
    rows = [{**GOOD, "prompt": f"mix {i // 2}", "response_0": f"read {i}"} for i in range(40)]
    return rows + [{key: value for key, value in {**GOOD, **changes}.items() if value is not ...}]


BAD_DATA = {  # name of a file: (rows, words of the message)
    "no_prompt": (many(prompt=...), "row 41: KeyError: 'prompt'; needed columns: prompt, resp"),
    "label_of_2": (many(safer_response_id=2), "row 41: safer_response_id is 2; it must be 0 or 1"),
    "no_text": ([{**GOOD, "prompt": ["mix"]}] * 40, "row 1: ['mix'] must be text"),
    "empty": ([], "empty.jsonl: 0 rows of 0 prompts: {}: too few can be used"),
    "equal": ([{**GOOD, "response_0": "burn"}] * 40, "{'of identical responses': 40}"),
    "contrary": ([{**GOOD, "safer_response_id": 1}] * 40, "unsafe beside a safe one': 40}"),
    "long": ([{**row, "prompt": "mix " * 60} for row in many()], "that fills --max_length"),
}
SMALL = '{"model_type":"llama","hidden_size":8,"num_hidden_layers":1,"num_attention_heads":1}'
DATA = f"--max_length 128 --model {SMALL} --dataset"
LONG = "--max_length 160 --max_new_tokens 100"
REFUSED = {  # flags: words of the message
    "--lamda 1": "unrecognized arguments: --lamda",
    "--config UNKNOWN.json": "--lamda",
    "--sft_model=": "--sft_model is empty",
    "--max_steps -1": "--max_steps is -1; it must be from 1",
    "--lambdas 1 nan": "--lambdas is nan",
    "--beta 1e-40": "--beta is 1e-40",
    "--seed 99999999999999999999": "--seed is 99999999999999999999",
    "--lambda_prompts 1": "too few different prompts, [16, 1,",
    "--cost_confidence 1": "--cost_confidence must be below 1",
    "--cost_limit 1 --margin 1": "--cost_limit or --margin",
    "--method pecan": "pecan needs --margin",
    "--method pecan --margin 1 --reward_model COST": "and takes neither --reward_model nor",
    "--reward_dataset tiny:400 --reward_model COST": "--reward_dataset or --reward_model",
    "--reward_dataset far.jsonl --max_length 160": "64 positions",
    "--reward_dataset harm.jsonl": "--reward_dataset harm.jsonl, row 1: KeyError: 'better_res",
    "--dataset broken.jsonl": "--dataset broken.jsonl: cannot be read: JSONDecodeError",
    "--dataset answers.csv": "give a .json, .jsonl or .parquet file",
    "--dataset good.jsonl:train[:20]": "a file or saved folder has no splits",
    "--eval_dataset tiny:400": "too few different prompts",
    "--model /nowhere/model": "/nowhere/model",
    LONG: "64 positions",
    "--model TWENTY_TOKENS": "it has 20 tokens",
    "--sft_model COST": "it is no causal LM, it has no lm_head.weight",
    "--sft_model NO_TOKENIZER": "have the same tokens",
    "--sft_model ADAPTER": "it holds an adapter",
    "--sft_model NAN": "model.norm.weight is not finite",
    "--sft_model IMAGES": "it reads more than text",
    "--sft_model DROPS": "its chat template drops 'test knife' or",
    "--sft_model RAISES": "no system message",
    "--sft_model SPLIT": "has no end-of-sequence token, or does not read it",
    "--sft_model TWICE": "or begins twice: '<unk><unk>",
    f"--sft_model WINDOW {LONG}": "output head",
    f"--sft_model DEEP {LONG}": "output head",
    "--sft_model GRANITE --dtype bfloat16": "output head",
    "--cost_model FINE": "no score_head.weight",
    "--cost_model THREE": "--cost_model THREE: unfit",
    "--cost_model NO_TOKENIZER_EITHER": "have the same tokens",
    "--cost_model POSITIONS": "it has 50 tokens and 8 positions",
    "--reward_model COST": "are the two exchanged?",
}
REFUSED |= {f"{DATA} {name}.jsonl": words for name, (_, words) in BAD_DATA.items()}


def given(folder, kind="llama", tokenizer=None, make=tiny_model, **settings):
    """A folder with a model for the tiny world's tokens, and its tokenizer."""
    make(kind, **settings).save_pretrained(folder)
    (tokenizer or cdpo.tiny_tokenizer()).save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, (rows, _) in BAD_DATA.items():
        written(folder / f"{name}.jsonl", rows)
    (folder / "broken.jsonl").write_text(json.dumps(GOOD) + '\n{"prompt": \n')
    (folder / "answers.csv").write_text("prompt,response_0,response_1\na,b,c\n")
    written(folder / "good.jsonl", many())
    far = [row | {"response_0": "read " * 80} for row in cdpo.tiny_rows(400, 1)]
    written(folder / "far.jsonl", far)
    written(folder / "harm.jsonl", many(better_response_id=...)[::-1])
    (folder / "UNKNOWN.json").write_text('{"lamda": 1}')

    turn, tiny = "{% for m in messages %}{{ m.content }}{% endfor %}", cdpo.tiny_tokenizer()
    tiny.bos_token = "<unk>"
    for name, template in {
        "DROPS": turn.replace("content", "content[0].text"),  # as of a list of parts
        "RAISES": "{{ raise_exception('no system message') }}",
        "TWICE": turn.replace("m.content", "bos_token + bos_token + m.content"),
    }.items():
        tiny.chat_template = template
        given(folder / name, tokenizer=tiny)
    for name in ("FINE", "ADAPTER", "NAN", "IMAGES"):
        given(folder / name)
    (folder / "ADAPTER" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    tensors = load_file(folder / "NAN" / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folder / "NAN" / "model.safetensors", {"format": "pt"})
    transformers.LlavaConfig().save_pretrained(folder / "IMAGES")
    tiny_model("qwen2").save_pretrained(folder / "NO_TOKENIZER")
    given(folder / "WINDOW", "mistral", sliding_window=96)  # longer than all texts
    deep = {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "num_hidden_layers": 3}
    deep |= {"use_sliding_window": True, "sliding_window": 96, "vocab_size": 280}
    given(folder / "DEEP", "qwen2", chat_tokenizer(), **deep)
    given(folder / "SPLIT", "llama", chat_tokenizer(split_special_tokens=True), vocab_size=280)
    given(folder / "GRANITE", "granite", logits_scaling=4.0)
    given(folder / "TWENTY_TOKENS", vocab_size=20)
    given(folder / "GPT2", "gpt2", dtype="bfloat16")

    cdpo.tiny_tokenizer().save_pretrained(folder / "COST")
    write_beaver(folder / "COST")
    tiny_classifier("gemma").save_pretrained(folder / "NO_TOKENIZER_EITHER")
    given(folder / "THREE", make=tiny_classifier, num_labels=3)
    given(folder / "POSITIONS", make=tiny_classifier, max_position_embeddings=8)
    return folder


def refusal_of(capsys, folder, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as refusal:
        main(folder, *flags)
    message = capsys.readouterr().err
    assert refusal.value.code == 2 and message.startswith("cdpo: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(flags, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    message = refusal_of(capsys, tmp_path / "o", *FEW, *flags.split())
    assert REFUSED[flags] in message, message
    assert not (tmp_path / "o").exists() and sorted(files.rglob("*")) == before


def test_what_is_near_to_that_passes_but_not_if_responses_see_each_other(files, monkeypatch):
    monkeypatch.chdir(files)
    near = [f"{DATA} good.jsonl", "--sft_model GPT2 --cost_model COST"]
    near += [f"--sft_model {x} --max_length 160 --max_new_tokens 50" for x in ("WINDOW", "DEEP")]
    for flags in near:
        cdpo.gate(cdpo.parse([*FEW, *flags.split()]))
    collate = cdpo.collate_rows

    def causal(rows):
        batch = collate(rows)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"]).tril()}

    monkeypatch.setattr(cdpo, "collate_rows", causal)
    for flags in (["--sft_model", "FINE"], ["--sft_model", "GPT2"], ["--cost_model", "COST"]):
        with pytest.raises(SystemExit):
            cdpo.gate(cdpo.parse([*FEW, *flags]))


@pytest.mark.parametrize("kind", ["llama", "t5", "unknown"])  # one decoder
def test_code_that_comes_with_a_model_never_runs(kind, tmp_path, capsys, monkeypatch):
    given(tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig as C"
    (tmp_path / "model" / "code.py").write_text(f"{code}, LlamaForCausalLM as M\n")
    path, names = tmp_path / "model" / "config.json", {"AutoConfig": "code.C"}
    names = {"auto_map": names | {"AutoModelForCausalLM": "code.M"}, "model_type": kind}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # yes to any question
    flags = [*FEW, "--model", str(tmp_path / "model")]
    if kind == "llama":
        cdpo.gate(cdpo.parse(flags))
    else:
        refusal_of(capsys, tmp_path / "o", *flags)
    assert not (tmp_path / "ran").exists()


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_other_settings_are_refused_with_the_flags_that_reuse_models(quick, tmp_path, capsys):
    kept = cdpo.parse(["--config", str(quick / "config.json")])
    kept.config = TINY
    assert kept == cdpo.parse([*QUICK, "--output_dir", str(quick)])  # it can be read back
    before, flags, old = contents(quick), reusing(quick), results_of(quick)
    message = refusal_of(capsys, quick, *QUICK, "--beta", "0.5", "--seed", "3")
    assert "beta was 1.0, is 0.5" in message and "seed was 0, is 3" in message
    assert all(f"{flag} {path}" in message for flag, path in zip(flags[::2], flags[1::2]))
    assert contents(quick) == before
    rows = main(tmp_path / "o", *QUICK, "--beta", "0.5", *flags)
    assert list(rows) == ["SFT", "C-DPO", "DPO"] and not (tmp_path / "o" / "sft").exists()
    assert rows["SFT"] == old["SFT"] and rows["C-DPO"] != old["C-DPO"]
    # a policy of others is a row: of the same prompts, seeds and score models
    theirs = ["--method", "sft", "--sft_model", str(quick / "policy"), *flags[2:]]
    row = main(tmp_path / "theirs", *QUICK, *theirs)["SFT"]
    assert all(row[key] == old["C-DPO"][key] for key in ("reward_mean", "cost_ci95", "length_mean"))


def test_a_finished_run_goes_on_with_what_only_its_table_depends_on(quick, tmp_path, capsys):
    folder = shutil.copytree(quick, tmp_path / "run")
    before = {file: text for file, text in contents(folder).items() if file.parent != folder}
    more = "--lambdas 0.4 0 --eval_prompts 20 --eval_samples 6 --tokens_per_batch 500"
    rows = main(folder, *QUICK, *more.split())
    assert list(rows) == ["SFT", "C-DPO", "λ = 0.4", "DPO"] and rows["λ = 0.4"]["lambda"] == 0.4
    samples = json_lines(folder / "samples.jsonl")
    prompts = {line["prompt"] for line in samples}  # --max_steps bounds the rows: fewer than 20
    assert f", {len(prompts)} of the table" in capsys.readouterr().out
    assert len(samples) == 4 * len(prompts) * 6
    assert contents(folder).items() >= before.items()  # no model was trained again


def test_other_data_or_another_model_under_the_same_name_is_refused(quick, tmp_path, capsys):
    data, sft = list(cdpo.tiny_rows(400, 1)), shutil.copytree(quick / "sft", tmp_path / "sft")
    flags = [*SHORT, "--method", "sft", *reusing(quick), "--sft_model", str(sft)]
    flags += ["--dataset", written(tmp_path / "d.jsonl", data)]
    first = main(tmp_path / "o", *flags)
    flipped = [{**row, "better_response_id": 1 - row["better_response_id"]} for row in data]
    tensors, config = load_file(sft / "model.safetensors"), (sft / "config.json").read_text()
    other = {name: tensor + 1e-3 * (name == "lm_head.weight") for name, tensor in tensors.items()}
    was, theta = (data, tensors, config), config.replace("10000.0", "20000.0")
    for now in ((flipped, tensors, config), (data, other, config), (data, tensors, theta), was):
        written(tmp_path / "d.jsonl", now[0])
        save_file(now[1], sft / "model.safetensors", {"format": "pt"})
        (sft / "config.json").write_text(now[2])
        if now is not was:
            assert "digests was" in refusal_of(capsys, tmp_path / "o", *flags)
    assert main(tmp_path / "o", *flags) == first  # as it was


def test_a_folder_of_something_else_or_of_a_run_under_way_stays_as_it_is(quick, tmp_path, capsys):
    config = json.dumps({"model_type": "llama", "output_dir": "elsewhere"})
    for name, text in (("config.json", config), ("notes.txt", "mine")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        assert "name another folder" in refusal_of(capsys, folder, *FEW)
        assert contents(folder) == {folder / name: text.encode()}
    assert "cannot be used" in refusal_of(capsys, folder / "notes.txt", *FEW)
    before = contents(quick)
    with filelock.FileLock(quick / ".lock"):
        assert "wait for its run" in refusal_of(capsys, quick, *QUICK)
    assert contents(quick) == before


# ---- The command ---------------------------------------------------------------------------------


def enumerated_world(run, prompts):
    """log π_ref, log π, r, c and truths of all 584 answers of one to three words, (n, 584) each."""
    words, rows = cdpo.TINY_WORDS, []
    answers = [" ".join(ws) for n in (1, 2, 3) for ws in itertools.product(words, repeat=n)]
    for x in prompts:
        head, ys = cdpo.encode(run.tokenizer, x, answers, 99, Counter())
        for i in range(0, 584, 73):
            rows.append(cdpo.Row(x, answers[i : i + 73], (head, ys[i : i + 73])))
    names = "sft", "policy", "reward_model", "cost_model"
    tables = [cdpo.values_of(run, name, rows).view(-1, 584).double().numpy() for name in names]
    truth = np.array([[cdpo.tiny_truth(x, y) for y in answers] for x in prompts])
    return *tables, truth[..., 0], truth[..., 1]


def exactness(run, ref, policy, reward, cost, *_):
    """How far a policy in an enumerated_world is from the constrained optimum for its scores."""
    beta, limit = run.cfg.beta, run.cfg.cost_limit
    lam = bisected_lambda(reward, cost, beta, limit, log_ref=ref)
    optimum = softmax(ref + (reward - lam * cost) / beta)
    log_policy = policy - np.logaddexp.reduce(policy, axis=1, keepdims=True)
    kl = (np.exp(log_policy) * (log_policy - np.log(optimum))).sum(1).mean()
    found = {"lambda_star": lam, "kl": kl, "mass": np.exp(policy).sum(1).mean()}
    found["best_reward"] = (optimum * reward).sum(1).mean()
    return found | {"cost_over_limit": (np.exp(log_policy) * cost).sum(1).mean() - limit}


def test_the_first_command_finds_the_exact_constrained_optimum_of_its_world(tiny):
    tokenizer, cfg = cdpo.load_tokenizer(str(tiny / "policy")), cdpo.parse(["--config", TINY])
    run = cdpo.Run(cfg, tiny, tokenizer, *[[]] * 5)
    prompts = dict.fromkeys(line["prompt"] for line in json_lines(tiny / "samples.jsonl"))
    ref, _, reward, cost, true_reward, true_cost = world = enumerated_world(run, prompts)
    assert np.exp(ref).sum(1).mean() > 0.93  # a twentieth has four words
    for score, truth in ((reward, true_reward), (cost, true_cost)):  # (3) knows no prompt's offset
        score, truth = (x[:, 72:] - x[:, 72:].mean(1, keepdims=True) for x in (score, truth))
        assert np.corrcoef(score.ravel(), truth.ravel())[0, 1] > 0.95
    found, row = exactness(run, *world), results_of(tiny)["C-DPO"]
    free, sft = ((softmax(ref + reward * b) * reward).sum(1).mean() for b in (1 / cfg.beta, 0))
    assert row["lambda"] == pytest.approx(found["lambda_star"], abs=0.15)
    assert row["reward_mean"] == pytest.approx(found["best_reward"], abs=0.1 * (free - sft))
    assert found["mass"] > 0.97 and found["kl"] < 0.03  # KL(π ‖ π_λ*), nats
    # and on λ's own prompts, by samples of which the limit was met
    rows = torch.load(tiny / "scores.pt", weights_only=True)[1]
    found = exactness(run, *enumerated_world(run, dict.fromkeys(row["prompt"] for row in rows)))
    assert abs(found["cost_over_limit"]) < 0.1 and found["kl"] < 0.03


def test_a_run_leaves_what_the_contract_names_and_the_papers_ordering(tiny):
    both = "lambda cost_mean cost_ci95 reward_mean reward_ci95 kl "
    metric_fields = both + "dpo_accuracy pairs_per_second tokens_per_second seconds peak_memory_gb"
    result_fields = both + "name reward_std cost_std safe_rate length_mean true_reward_mean"
    metrics, results = json_lines(tiny / "metrics.jsonl"), list(results_of(tiny).values())
    assert [entry["iteration"] for entry in metrics] == list(range(len(metrics)))
    for fields, entries in ((metric_fields.split(), metrics), (result_fields.split(), results)):
        for entry in entries:
            assert set(fields) <= set(entry)
            values = [x for key, x in entry.items() if key != "name" and x is not None]
            assert np.isfinite(np.hstack(values)).all()
    assert ["predicted_cost" in row for row in results] == [False, True, True]  # SFT has no λ
    assert metrics[0]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy is reference
    sft, ours, dpo = results  # and the paper's ordering
    assert (sft["lambda"], sft["kl"], dpo["lambda"]) == (None, 0, 0)
    for reward, cost in (("reward_mean", "cost_mean"), ("true_reward_mean", "true_cost_mean")):
        assert dpo[reward] > ours[reward] > sft[reward], reward
        assert dpo[cost] > sft[cost] > ours[cost], cost
    folders = {file.name for file in tiny.iterdir() if file.is_dir()}
    assert folders == {"sft", "reward_model", "cost_model", "policy", "lambda-0"}


@pytest.mark.parametrize("name", ["MoCAN", "PeCAN", "PeCAID", "DPO", "SFT"])
def test_every_method_runs_and_respects_the_margin(tmp_path, capsys, name):
    method = name.lower()
    row = main(tmp_path / "o", *SHORT, "--method", method, "--margin", "0.02")[name]
    cost = torch.load(tmp_path / "o" / "scores.pt", weights_only=True)[3]
    limit = float(cost.double().mean()) - 0.02
    printed = re.search(r"E\[cost\] ≤ (\S+)", capsys.readouterr().out)[1]
    assert float(printed) == pytest.approx(limit, rel=1e-3) and tensors_of(tmp_path / "o")
    if method in ("mocan", "pecan"):
        assert row["lambda"] > 0 and row["predicted_cost"] == pytest.approx(limit, abs=1e-4)
    assert (tmp_path / "o" / "reward_model").exists() == (method not in ("pecan", "pecaid"))
    assert (tmp_path / "o" / "metrics.jsonl").exists() == (method == "pecaid")


def test_the_papers_letter_runs(quick, tmp_path):
    letter = "--labels sample --no_all_pairs --lambda_step gradient --lambda_init 0 --no_recycle"
    main(tmp_path / "letter", *SHORT, *reusing(quick), *letter.split())
    first, second = json_lines(tmp_path / "letter" / "metrics.jsonl")
    assert first["lambda"] == 0
    assert second["lambda"] == pytest.approx(max(0, 0.05 * first["cost_mean"]), abs=1e-6)


KILLER = """
import os, random, signal, sys, time
import cdpo, torch
torch.set_num_threads(1)
folder, moments, seen, gone = sys.argv[-1], random.Random(0), set(), 0
os.mkdir(folder)
while not gone:
    child = os.fork()
    if child == 0:
        cdpo.main(sys.argv[1:])
        os._exit(0)
    while not gone and set(os.listdir(folder)) <= seen:  # until something new is there
        time.sleep(0.001)
        gone, _ = os.waitpid(child, os.WNOHANG)
    seen |= set(os.listdir(folder))
    time.sleep(moments.uniform(0.0, 0.4))  # inside of a stage
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
    kills = {line for line in killer.stdout.splitlines() if line.startswith("killed at")}
    assert len(kills) > 5, killer.stdout  # in many places: how many is by chance
    main(folder, *QUICK)
    for name in ("results.json", "samples.jsonl"):
        assert (folder / name).read_text() == (quick / name).read_text()
    torch.testing.assert_close(tensors_of(folder), tensors_of(quick), rtol=0, atol=0)
    metrics = json_lines(folder / "metrics.jsonl"), json_lines(quick / "metrics.jsonl")
    for one, other in zip(*metrics):
        assert all(one[key] == other[key] for key in ("lambda", "cost_mean", "dpo_loss", "kept"))
    assert sorted(os.listdir(folder)) == sorted(os.listdir(quick))


def test_a_loss_that_is_not_finite_stops_and_what_was_finished_stays(tmp_path, capsys):
    for _ in range(2):  # and again, in the same process
        with pytest.raises(SystemExit) as stop:
            main(tmp_path / "o", *QUICK, "--learning_rate", "1e6", "--beta", "1e6")
        said, message = capsys.readouterr()
        assert stop.value.code == 1 and message.count("\n") == 1
        assert re.search(r"policy: the loss or its gradient is not finite at step \d", message)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "sft")
    assert "sft: found in" in said


@pytest.mark.parametrize("case", ["lora", "odd"])
def test_two_processes_give_the_single_processs_numbers(case, quick, tmp_path):
    flags = [*QUICK, "--lora_rank", "4", "--learning_rate", "0.01"]
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
    assert first[1]["dpo_loss"] < math.log(2) - 0.03  # it learns
    if case == "odd":  # the given reference is the same model: so are its samples
        texts = [[line["response"] for line in json_lines(f / "samples.jsonl")] for f in (one, two)]
        assert texts[0][: 24 * 4] == texts[1][: 24 * 4]


@pytest.mark.parametrize("rank, rate", [("0", "0.001"), ("4", "0.01")])
def test_bfloat16_fits_the_same_pairs_as_float32(rank, rate, quick, tmp_path):
    flags = [*QUICK, *reusing(quick), "--lambda_step", "fixed", "--no_recycle"]  # the same rows
    flags, histories = [*flags, "--lora_rank", rank, "--learning_rate", rate], []
    for dtype in ("float32", "bfloat16"):
        main(tmp_path / dtype, *flags, "--dtype", dtype)
        assert {str(x.dtype) for x in tensors_of(tmp_path / dtype).values()} == {f"torch.{dtype}"}
        histories.append(json_lines(tmp_path / dtype / "metrics.jsonl"))
    for one, two in zip(*histories):
        assert two["dpo_loss"] == pytest.approx(one["dpo_loss"], abs=0.01)
    assert two["dpo_loss"] < math.log(2) - 0.05  # what was learned is more than they may differ by
    assert histories[1][0]["first_loss"] == pytest.approx(math.log(2), abs=2e-3)


if __name__ == "__main__":
    flags = ["--config", TINY, "--output_dir", "tiny_output", *sys.argv[1:]]
    cdpo.main(flags)
    run, _ = cdpo.gate(cdpo.parse(flags))
    for name, rows in (("λ's", run.dual_rows), ("the table's", run.table_rows)):
        found = exactness(run, *enumerated_world(run, dict.fromkeys(row.prompt for row in rows)))
        print(f"on {name} prompts:", json.dumps(found, ensure_ascii=False))
