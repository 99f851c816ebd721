"""cdpo.py as claims; expected values never come from cdpo.py itself but from a hand calculation, float64 numpy,
numerical differentiation, or enumeration of a world small enough to list.

    python -m pytest -q test_cdpo.py
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
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import cdpo

F64 = functools.partial(torch.tensor, dtype=torch.float64)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are tiny: on a busy machine the threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def log_sigmoid(x):
    return -np.logaddexp(0.0, -np.asarray(x, dtype=np.float64))


def slope(function, x, index, eps=1e-5):
    """Central difference of function(x) along one entry of the numpy array x."""
    up, down = x.copy(), x.copy()
    up[index] += eps
    down[index] -= eps
    return (float(function(up)) - float(function(down))) / (2 * eps)


def tilted_cost(reward, cost, lam, beta, log_ref=0.0):
    """E and Var of c under pi_lam ~ pi_ref exp((r - lam c) / beta), mean over prompts; scores (..., n, m)."""
    z = log_ref + (reward - np.asarray(lam)[..., None, None] * cost) / np.asarray(beta)[..., None, None]
    weight = np.exp(z - z.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    mean = (weight * cost).sum(-1)
    return mean.mean(-1), (weight * (cost - mean[..., None]) ** 2).sum(-1).mean(-1)


def bisected_lambda(reward, cost, beta, limit, lam_max=100.0, log_ref=0.0):
    """The multiplier by bisection on E[c] - limit, which falls in lam; for a stack of problems at once."""
    low, high = np.zeros_like(limit, dtype=np.float64), np.full_like(limit, lam_max, dtype=np.float64)
    for _ in range(100):
        middle = (low + high) / 2
        violated = tilted_cost(reward, cost, middle, beta, log_ref)[0] > limit
        low, high = np.where(violated, middle, low), np.where(violated, high, middle)
    return high


def dual_descent(reward, cost, beta, limit, lam_max=100.0, steps=2000):
    """Projected gradient descent on the dual, lam <- [lam - step (limit - E[c])]+ (CAN's procedure), for a
    stack of problems. The step grows until it overshoots: no fixed one serves curvatures 1e-6 to 1e6."""
    lam, step = np.zeros_like(limit), beta / cost.var((-1, -2))
    gradient = limit - tilted_cost(reward, cost, lam, beta)[0]
    for _ in range(steps):
        trial = np.clip(lam - step * gradient, 0.0, lam_max)
        if np.abs(trial - lam).max() < 1e-10:
            break
        trial_gradient = limit - tilted_cost(reward, cost, trial, beta)[0]
        accept = trial_gradient * gradient >= -0.5 * gradient**2
        lam, gradient = np.where(accept, trial, lam), np.where(accept, trial_gradient, gradient)
        step = np.where(accept, np.minimum(step * 1.5, 1e9), step / 2)
    return lam


# ---- (3), (5): the losses of the reward and cost models ------------------------------------------------


def test_bradley_terry_loss_is_ln2_at_equal_scores_and_agrees_with_numpy():
    assert cdpo.bradley_terry_loss(F64([3.0]), F64([3.0])).item() == pytest.approx(math.log(2), abs=1e-12)
    chosen, rejected = np.random.default_rng(0).normal(0, 3, (2, 50))
    loss = cdpo.bradley_terry_loss(F64(chosen), F64(rejected))
    expected = -log_sigmoid(chosen - rejected).mean()
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-12)


def test_cost_loss_agrees_with_the_three_terms_of_equation_5():
    rng = np.random.default_rng(1)
    worse, better = rng.normal(0, 2, (2, 60))
    s_worse, s_better = np.tile([[1, 1, -1], [1, -1, -1]], 20)  # never a safe one worse than an unsafe one
    expected = -(log_sigmoid(worse - better) + log_sigmoid(s_worse * worse) + log_sigmoid(s_better * better))
    loss = cdpo.cost_loss(F64(worse), F64(better), F64(s_worse), F64(s_better))
    assert loss.shape == () and loss.item() == pytest.approx(expected.mean(), abs=1e-12)


@pytest.mark.parametrize("s_worse, s_better", [(1, -1), (1, 1), (-1, -1)])
def test_descending_the_cost_loss_puts_worse_above_better_and_unsafe_above_zero(s_worse, s_better):
    def loss(costs):
        return cdpo.cost_loss(*F64(costs)[:, None], F64([s_worse]), F64([s_better]))
    costs = np.array([-0.5, 0.5])  # (worse, better), starting the wrong way
    autograd = torch.tensor(costs, requires_grad=True)
    cdpo.cost_loss(*autograd[:, None], F64([s_worse]), F64([s_better])).backward()
    assert autograd.grad.numpy() == pytest.approx([slope(loss, costs, 0), slope(loss, costs, 1)], abs=1e-8)
    for _ in range(200):
        costs = costs - 0.5 * np.array([slope(loss, costs, 0), slope(loss, costs, 1)])
    assert costs[0] > costs[1] and (np.sign(costs) == [s_worse, s_better]).all()


@DTYPES
def test_losses_and_their_gradients_stay_finite_and_linear_at_huge_scores(dtype):
    # exp(1e4) overflows both types; -log sigmoid(-x) is x there, so the values are known by hand
    high, low = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (1e4, -1e4))
    one = torch.ones(1, dtype=dtype)
    policy = torch.cat([low, high])[None]
    for loss, value in [
        (cdpo.bradley_terry_loss(low, high), 2e4), (cdpo.bradley_terry_loss(high, low), 0.0),
        (cdpo.cost_loss(low, high, one, -one), 4e4), (cdpo.cost_loss(high, low, one, -one), 0.0),
        (cdpo.dpo_loss(policy, torch.zeros_like(policy), one, 1.0), 2e4),
        (cdpo.dpo_loss(policy, torch.zeros_like(policy), 0 * one, 1.0), 0.0),  # 0 * log(0) is not nan here
    ]:
        gradients = torch.autograd.grad(loss, (high, low), retain_graph=True)
        assert loss.item() == pytest.approx(value, rel=1e-6) and all(g.isfinite().all() for g in gradients)


# ---- (12): relabelling ---------------------------------------------------------------------------------


def test_soft_labels_are_the_preference_of_the_lagrangian_reward():
    rng = np.random.default_rng(2)
    reward, cost = rng.normal(0, 2, (2, 40, 2))
    for lam in (0.0, 0.3, 2.0):
        odds = np.exp(reward - lam * cost)  # Bradley-Terry: odds of a win
        p = cdpo.relabel(F64(reward), F64(cost), lam)
        assert p.shape == (40,) and p.numpy() == pytest.approx(odds[:, 0] / odds.sum(1), abs=1e-12)
    # two equally helpful responses: only the multiplier on the cost speaks against the harmful one
    p = cdpo.relabel(F64([[1.0, 1.0]]), F64([[2.0, 0.0]]), 1.0)
    assert p.item() == pytest.approx(1 / (1 + math.exp(2)))
    huge = F64([[1e4, -1e4], [-1e4, 1e4]])  # odds beyond any float
    assert cdpo.relabel(huge, 0 * huge, 1.0).tolist() == [1.0, 0.0]


def test_sampled_labels_are_zero_or_one_and_their_mean_is_the_soft_label():
    reward, cost, lam, draws = [1.0, -0.5], [0.7, 0.2], 0.8, 40_000
    p = 1 / (1 + math.exp(-(1.0 - 0.8 * 0.7) + (-0.5 - 0.8 * 0.2)))
    generator = torch.Generator().manual_seed(0)
    labels = cdpo.relabel(F64([reward] * draws), F64([cost] * draws), lam, "sample", generator)
    assert labels.shape == (draws,) and set(labels.tolist()) == {0.0, 1.0}
    assert labels.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))


def test_sampled_labels_depend_on_the_generator_alone():
    reward, cost = torch.zeros(2, 64, 2)  # 64 fair coins
    def draw(seed):
        return cdpo.relabel(reward, cost, 1.0, "sample", torch.Generator().manual_seed(seed)).tolist()
    before = torch.get_rng_state()
    assert draw(5) == draw(5) != draw(6)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used although one was given"


def test_hard_labels_pick_the_higher_lagrangian_reward_and_split_ties():
    reward, cost = F64([[1.0, 0.0]] * 3), F64([[0.0, 0.0], [4.0, 0.0], [2.0, 0.0]])
    assert cdpo.relabel(reward, cost, 0.5, "hard").tolist() == [1.0, 0.0, 0.5]


def test_an_unknown_label_mode_is_a_value_error():
    with pytest.raises(ValueError):
        cdpo.relabel(torch.zeros(1, 2), torch.zeros(1, 2), 0.0, mode="sfot")


# ---- (11), (13): DPO on soft labels, the implicit reward -----------------------------------------------


def random_logps(rng, pairs):
    return rng.normal(-30, 5, (pairs, 2)), rng.normal(-30, 5, (pairs, 2))  # policy, reference


def test_dpo_loss_is_ln2_whatever_the_labels_when_the_policy_is_the_reference():
    logps, _ = random_logps(np.random.default_rng(3), 10)
    for p in (0.0, 0.3, 1.0):
        loss = cdpo.dpo_loss(F64(logps), F64(logps), F64([p] * 10), 0.7)
        assert loss.shape == () and loss.item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("winner", [0, 1])
def test_dpo_loss_with_certain_labels_is_the_plain_dpo_formula(winner):
    policy, ref = random_logps(np.random.default_rng(4), 30)
    w, l, beta = winner, 1 - winner, 0.1
    expected = -log_sigmoid(beta * ((policy[:, w] - ref[:, w]) - (policy[:, l] - ref[:, l]))).mean()
    loss = cdpo.dpo_loss(F64(policy), F64(ref), F64([1.0 - winner] * 30), beta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_soft_dpo_loss_is_the_expectation_over_every_labelling():
    policy, ref = random_logps(np.random.default_rng(5), 4)
    p, beta, expected = np.array([0.1, 0.5, 0.8, 0.97]), 0.2, 0.0
    for code in range(16):  # all 2^4 labellings of 4 pairs
        labels = np.array([code >> i & 1 for i in range(4)], dtype=float)
        chance = np.where(labels == 1, p, 1 - p).prod()
        expected += chance * cdpo.dpo_loss(F64(policy), F64(ref), F64(labels), beta).item()
    assert cdpo.dpo_loss(F64(policy), F64(ref), F64(p), beta).item() == pytest.approx(expected, abs=1e-12)


def fit_policy(logits, log_ref, prompt, pair, prob, beta):
    """Full-batch LBFGS on the logits of a tabular policy: soft labels have no noise, the fit can be exact."""
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-13,
                                  line_search_fn="strong_wolfe")
    ref_logps = log_ref[prompt, pair]

    def closure():
        optimizer.zero_grad()
        loss = cdpo.dpo_loss(logits.log_softmax(-1)[prompt, pair], ref_logps, prob, beta)
        loss.backward()
        return loss
    optimizer.step(closure)


def test_the_minimiser_of_the_soft_dpo_loss_is_the_optimal_policy_of_equation_11():
    rng = np.random.default_rng(6)
    (reward, cost, log_ref), beta, lam = rng.normal(0, 1, (3, 2, 6)), 0.5, 0.8  # 2 prompts, 6 responses
    log_ref = F64(log_ref).log_softmax(-1)
    pair = torch.combinations(torch.arange(6)).repeat(2, 1)  # all 15 pairs, twice
    prompt = torch.arange(2).repeat_interleave(15)[:, None]
    logits = log_ref.clone().requires_grad_()
    prob = cdpo.relabel(F64(reward)[prompt, pair], F64(cost)[prompt, pair], lam)
    fit_policy(logits, log_ref, prompt, pair, prob, beta)
    optimal = np.exp(log_ref.numpy() + (reward - lam * cost) / beta)
    optimal /= optimal.sum(1, keepdims=True)
    assert logits.softmax(-1).detach().numpy() == pytest.approx(optimal, abs=1e-5)


def test_the_implicit_reward_of_an_optimal_policy_is_its_reward_up_to_a_constant():
    reward, ref, beta = np.array([0.3, -1.0, 2.0]), np.array([0.2, 0.5, 0.3]), 0.1
    optimal = ref * np.exp(reward / beta)
    pair = np.array([[0, 1], [2, 1]])
    logps, ref_logps = F64(np.log(optimal / optimal.sum())[pair]), F64(np.log(ref)[pair])
    implicit = cdpo.implicit_reward(logps, ref_logps, beta).numpy()
    assert implicit[:, 0] - implicit[:, 1] == pytest.approx([1.3, 3.0], abs=1e-12)
    assert cdpo.implicit_reward(F64([[-1.0, -2.0]]), F64([[-4.0, -1.0]]), 0.5).tolist() == [[1.5, -0.5]]


# ---- (14): steps on the multiplier ---------------------------------------------------------------------


@pytest.mark.parametrize("name, rate", [("lambda_step", "lr"), ("newton_lambda_step", "beta")])
def test_a_dual_step_rises_when_the_limit_is_broken_falls_when_slack_and_stops_at_zero(name, rate):
    step = functools.partial(getattr(cdpo, name), **{rate: 0.1})
    cost = torch.tensor([[1.0, 3.0], [0.0, 4.0]])  # mean 2
    assert step(0.5, cost, 1.0) > 0.5 > step(0.5, cost, 2.5) > 0.0
    assert step(0.5, cost, 2.0) == pytest.approx(0.5) and step(0.5, cost, 1000.0) == 0.0


def test_lambda_step_by_hand_for_costs_of_any_shape():
    for shape in [(6,), (2, 3), (3, 1, 2)]:
        cost = F64([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]).reshape(shape)  # mean 4
        assert cdpo.lambda_step(0.2, cost, 1.5, 0.1) == pytest.approx(0.45, abs=1e-12)
        assert cdpo.lambda_step(0.2, cost, 5.5, 0.1) == pytest.approx(0.05, abs=1e-12)


def test_newton_step_divides_the_violation_by_the_mean_variance_within_prompts():
    for seed, (n, m) in enumerate([(7, 3), (1, 2), (5, 40), (2, 9)]):
        prompts_far_apart = 10 * np.arange(n)[:, None]  # this variance is none of the policy's
        cost = prompts_far_apart + np.random.default_rng(seed).normal(0, 2, (n, m))
        limit = cost.mean() - 0.4
        # divided by m - 1: E_x Var is estimated without bias (at m = 2 the other choice halves it)
        expected = 0.5 + 0.25 * 0.3 * 0.4 / cost.var(axis=1, ddof=1).mean()
        for view in (F64(cost), F64(cost.T.copy()).T):  # contiguous or not
            assert cdpo.newton_lambda_step(0.5, view, limit, 0.3, damping=0.25) == pytest.approx(expected)
        half_step = 0.5 + 0.5 * 0.3 * 0.4 / cost.var(axis=1, ddof=1).mean()
        assert cdpo.newton_lambda_step(0.5, F64(cost), limit, 0.3) == pytest.approx(half_step)


@pytest.mark.parametrize("scale", [1e-3, 20.0, 1e4])
def test_newton_step_does_not_change_when_the_cost_models_scale_does(scale):
    cost = F64(np.random.default_rng(8).normal(0.5, 1, (8, 4)))
    step = cdpo.newton_lambda_step(0.7, cost, 0.1, 0.1)
    # lam * cost is what the policy sees: the multiplier of a cost k times as large is k times as small
    scaled = cdpo.newton_lambda_step(0.7 / scale, scale * cost, scale * 0.1, 0.1)
    assert step != pytest.approx(0.7, abs=1e-3) and scaled * scale == pytest.approx(step, rel=1e-9)


@DTYPES
@pytest.mark.parametrize("m", [1, 3, 7])
def test_newton_step_refuses_costs_without_variance_within_prompts(m, dtype):
    cost = torch.tensor([[0.1], [1 / 3], [-1000.1]], dtype=dtype).expand(3, m)
    with pytest.raises(ValueError):  # neither a nan that max() turns into 0 nor a division by rounding error
        cdpo.newton_lambda_step(0.5, cost, 5000.0, 0.1)


# ---- (9): the dual function and its solution -----------------------------------------------------------


def test_dual_value_is_the_highest_lagrangian_over_all_policies():
    rng = np.random.default_rng(9)
    (reward, cost), lam, beta, limit = rng.normal(0, 1, (2, 3, 5)), 0.6, 0.4, 0.2
    def lagrangian(z):  # policy softmax(z) beside a uniform pi_ref
        log_pi = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        return (np.exp(log_pi) * (reward - beta * (log_pi + np.log(5)) - lam * (cost - limit))).sum(1).mean()
    value = cdpo.dual_value(F64(reward), F64(cost), lam, beta, limit)
    best = (reward - lam * cost) / beta
    assert value.shape == () and value.item() == pytest.approx(lagrangian(best), abs=1e-12)
    assert all(value.item() > lagrangian(best + rng.normal(0, 0.3, best.shape)) for _ in range(200))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_dual_value_agrees_with_a_float64_logsumexp(scale):
    rng = np.random.default_rng(10)
    (reward, cost), lam, beta, limit = scale * rng.normal(0, 1, (2, 6, 9)), 1.7, 0.05, 0.3 * scale
    z = (reward - lam * (cost - limit)) / beta  # up to 1e4: exp(z) would overflow
    expected = beta * (np.logaddexp.reduce(z, axis=1) - np.log(9)).mean()
    for dtype, accuracy in [(torch.float64, 1e-12), (torch.float32, 1e-4)]:
        value = cdpo.dual_value(F64(reward).to(dtype), F64(cost).to(dtype), lam, beta, limit)
        assert value.item() == pytest.approx(expected, rel=accuracy)


def test_dual_slope_is_the_slack_of_pi_lambda_and_its_curvature_the_variance_over_beta():
    rng = np.random.default_rng(11)
    (reward, cost), beta, limit, eps = rng.normal(0, 1, (2, 8, 12)), 0.3, -0.2, 1e-3
    for lam in (0.05, 0.5, 2.0):
        below, here, above = (cdpo.dual_value(F64(reward), F64(cost), lam + d, beta, limit).item()
                              for d in (-eps, 0.0, eps))
        mean, variance = tilted_cost(reward, cost, lam, beta)
        assert (above - below) / (2 * eps) == pytest.approx(limit - mean, abs=1e-4)
        assert (above - 2 * here + below) / eps**2 == pytest.approx(variance / beta, rel=1e-3)


@functools.lru_cache
def dual_problems(count=240, lam_max=100.0):
    """Stacked problems, scales 0.01 to 100 and beta 0.01 to 1: half have an interior lam*, a quarter are
    slack, a quarter infeasible, some of these for every lam and some only within lam_max."""
    rng = np.random.default_rng(12)
    scale, beta = 10 ** rng.uniform([-2, -2], [2, 0], (count, 2)).T
    cost = scale[:, None, None] * (rng.normal(0, 1, (count, 6, 12)) + rng.normal(0, 0.5, (count, 6, 1)))
    reward = (scale * 10 ** rng.uniform(-0.5, 0.5, count))[:, None, None] * rng.normal(0, 1, (count, 6, 12))
    start, end = (tilted_cost(reward, cost, np.full(count, lam), beta)[0] for lam in (0.0, lam_max))
    lowest, number = cost.min(-1).mean(-1), np.arange(count)
    kind = np.array(["interior", "slack", "interior", "infeasible"])[number % 4]
    interior = end + rng.uniform(0.05, 0.95, count) * (start - end)
    within = (number // 4) % 2 & (end - lowest > 1e-3 * scale)
    infeasible = np.where(within, (end + lowest) / 2, lowest - 0.1 * scale)
    limit = np.where(kind == "interior", interior, np.where(kind == "slack", start + 0.1 * scale, infeasible))
    return reward, cost, beta, limit, kind


def test_solve_dual_agrees_with_bisection_and_with_gradient_descent_on_the_dual():
    reward, cost, beta, limit, kind = dual_problems()
    bisected, descended = bisected_lambda(reward, cost, beta, limit), dual_descent(reward, cost, beta, limit)
    assert np.abs(bisected - descended).max() < 1e-6, "the two routes of this test must agree first"
    for i, problem in enumerate(zip(F64(reward), F64(cost), beta.tolist(), limit.tolist())):
        if kind[i] == "infeasible":
            with pytest.raises(ValueError):
                cdpo.solve_dual(*problem)
        else:
            lam = cdpo.solve_dual(*problem)
            assert lam == pytest.approx(bisected[i], rel=0, abs=1e-6), f"problem {i}, {kind[i]}"
            assert lam == pytest.approx(descended[i], rel=0, abs=1e-6), f"problem {i}, {kind[i]}"
            assert (lam == 0.0) == (kind[i] == "slack"), f"problem {i}, {kind[i]}"


def test_solve_dual_on_float32_scores_is_the_multiplier_of_those_scores():
    reward, cost, beta, limit, _ = (x[dual_problems()[4] == "interior"] for x in dual_problems())
    reward, cost = F64(reward).float(), F64(cost).float()
    expected = bisected_lambda(reward.double().numpy(), cost.double().numpy(), beta, limit)
    for i, problem in enumerate(zip(reward, cost, beta.tolist(), limit.tolist())):
        assert cdpo.solve_dual(*problem) == pytest.approx(expected[i], rel=1e-3), f"problem {i}"


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_solve_dual_names_the_lowest_reachable_cost_and_the_cost_at_lam_max(scale):
    rng = np.random.default_rng(13)
    (reward, cost), lam_max = rng.normal(0, scale, (2, 5, 8)), 0.7
    reachable, at_end = cost.min(1).mean(), tilted_cost(reward, cost, lam_max, scale)[0]
    assert at_end - reachable > 0.1 * scale
    problem = F64(reward), F64(cost), scale, (reachable + at_end) / 2  # beta as large as the scores
    with pytest.raises(ValueError) as error:
        cdpo.solve_dual(*problem, lam_max)
    named = [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", str(error.value).replace("−", "-"))]
    for value in (reachable, at_end):
        assert any(x == pytest.approx(value, rel=5e-4) for x in named), f"{value} to 4 digits: {error.value}"
    assert cdpo.solve_dual(*problem) > lam_max  # the default, 100, reaches far enough


# ---- types and self-containedness ----------------------------------------------------------------------


def a_call_of_each(dtype):
    a, b = torch.randn(2, 5, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    one, within = torch.ones(5, dtype=dtype), (b.min(1).values.mean().item() + b.mean().item()) / 2
    tensors = [("bradley_terry_loss", a[:, 0], b[:, 0]), ("cost_loss", a[:, 0], b[:, 0], one, -one),
               *[("relabel", a, b, 0.3, mode, torch.Generator()) for mode in ("soft", "sample", "hard")],
               ("dpo_loss", a, b, one / 2, 0.1), ("implicit_reward", a, b, 0.1),
               ("dual_value", a, b, 0.3, 0.1, 0.0)]
    floats = [("lambda_step", 0.1, b, 0.0, 0.1), ("newton_lambda_step", 0.1, b, 0.0, 0.1),
              ("solve_dual", a, b, 1.0, within), ("solve_dual", a, b, 1.0, 100.0)]  # the last is slack
    return tensors, floats


@DTYPES
def test_tensors_come_back_in_the_dtype_they_came_in_and_multipliers_as_floats(dtype):
    tensors, floats = a_call_of_each(dtype)
    for name, *arguments in tensors:
        assert getattr(cdpo, name)(*arguments).dtype == dtype, name
    for name, *arguments in floats:
        assert type(getattr(cdpo, name)(*arguments)) is float, name
    for now, fresh in zip(sum(a_call_of_each(dtype), []), tensors + floats):  # and no argument was written to
        assert all(torch.equal(x, y) for x, y in zip(now, fresh) if isinstance(x, torch.Tensor)), now[0]


def test_each_function_works_when_pasted_beside_import_torch_alone():
    for name, *arguments in sum(a_call_of_each(torch.float64), []):
        project = {"torch": torch}
        exec(inspect.getsource(getattr(cdpo, name)), project)
        fresh = [torch.Generator() if isinstance(x, torch.Generator) else x for x in arguments]
        pasted, original = project[name](*arguments), getattr(cdpo, name)(*fresh)
        assert torch.equal(torch.as_tensor(pasted), torch.as_tensor(original)), name


# ---- the loop: relabel, fit, sample, step --------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 3.0], ids=["from_zero", "from_above"])
@pytest.mark.parametrize("step", ["newton", "gradient"])
def test_the_loop_reaches_the_constrained_optimum_of_an_enumerated_world(start, step):
    rng, beta, limit, prompts, responses, pairs = np.random.default_rng(14), 0.5, -0.2, 16, 64, 512
    reward, noise, log_ref = rng.normal(0, 1, (3, prompts, responses))
    cost = 0.7 * reward + 0.7 * noise  # helpful responses tend to be harmful
    log_ref -= np.logaddexp.reduce(log_ref, axis=1, keepdims=True)
    lam_star = bisected_lambda(reward, cost, beta, np.array(limit), log_ref=log_ref)
    optimum = np.exp(log_ref + (reward - lam_star * cost) / beta)
    optimum /= optimum.sum(1, keepdims=True)

    torch.manual_seed(0)
    reward, cost, log_ref = F64(reward), F64(cost), F64(log_ref)
    pair = torch.multinomial(torch.ones(prompts * pairs, responses), 2)  # two different responses
    prompt = torch.arange(prompts).repeat_interleave(pairs)[:, None]
    logits, lam = log_ref.clone().requires_grad_(), start
    for _ in range(12):
        prob = cdpo.relabel(reward[prompt, pair], cost[prompt, pair], lam)
        fit_policy(logits, log_ref, prompt, pair, prob, beta)
        y = torch.multinomial(logits.softmax(-1).detach(), 20_000, replacement=True)
        sampled = cost.gather(1, y)
        if step == "newton":
            lam = cdpo.newton_lambda_step(lam, sampled, limit, beta)
        else:
            lam = cdpo.lambda_step(lam, sampled, limit, lr=0.4)
    policy = logits.softmax(-1).detach()
    best_reward = (optimum * reward.numpy()).sum(1).mean()
    assert lam == pytest.approx(lam_star, abs=0.02)
    assert (policy * reward).sum(1).mean().item() == pytest.approx(best_reward, rel=0.01)
    assert (policy * cost).sum(1).mean().item() == pytest.approx(limit, abs=0.02)


# ---- shared-prompt rows --------------------------------------------------------------------------------

EOS = 2
LENGTHS = [(6, 4, 7), (1, 1, 1), (9, 1, 12), (3, 8, 1), (12, 5, 5)]  # prompt, y0, y1: rows 3 to 22
SHAPE = dict(vocab_size=50, eos_token_id=EOS, pad_token_id=EOS, bos_token_id=1, initializer_range=0.3)
DECODER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, **SHAPE)
CONFIGS = [LlamaConfig(**DECODER), Qwen2Config(**DECODER),
           GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SHAPE)]


def tiny_model(config):
    # weights of 0.3: at the usual 0.02 the logits hardly depend on the context, and a wrong mask would pass
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()


def tiny_pairs(lengths=LENGTHS):
    """Random ids in which the padding id (= eos) also ends every response and turns up inside the text."""
    rng = np.random.default_rng(15)
    pairs = [[rng.integers(0, 50, n).tolist() for n in row] for row in lengths]
    pairs[0][0][-1] = pairs[0][1][0] = EOS
    return [(prompt, y0[:-1] + [EOS], y1[:-1] + [EOS]) for prompt, y0, y1 in pairs]


def separate_logps(model, pairs):
    """The plain way: each prompt + response by itself, unpadded, all logits."""
    def logp(prompt, y):
        logps = model(input_ids=torch.tensor([prompt + y])).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(y))
    return torch.stack([torch.stack([logp(prompt, y0), logp(prompt, y1)]) for prompt, y0, y1 in pairs])


@pytest.mark.parametrize("pad_id", [EOS, 7])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_shared_prompt_rows_equal_separate_rows_in_log_probs_and_gradients(config, pad_id):
    model, pairs = tiny_model(config), tiny_pairs()
    # weights at random, so that no log-prob's gradient can hide behind another's
    weight = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1))
    logps, gradients = {}, {}
    for way, run in [("shared", lambda: cdpo.sequence_logps(model, cdpo.collate_pairs(pairs, pad_id=pad_id))),
                     ("separate", lambda: separate_logps(model, pairs))]:
        logps[way] = run()
        gradients[way] = torch.autograd.grad((weight * logps[way]).sum(), list(model.parameters()))
    assert logps["shared"].shape == (len(pairs), 2) and logps["shared"].dtype == torch.float32
    assert (logps["shared"] - logps["separate"]).abs().max() < 1e-4
    names = [name for name, _ in model.named_parameters()]
    for name, shared, separate in zip(names, gradients["shared"], gradients["separate"]):
        assert (shared - separate).norm() <= 1e-3 * separate.norm(), name


def test_a_prompt_is_run_once_for_both_of_its_responses():
    model, seen = tiny_model(CONFIGS[0]), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    cdpo.sequence_logps(model, cdpo.collate_pairs(tiny_pairs([(40, 6, 6)])))
    assert 40 + 6 + 6 <= sum(seen) < 2 * 40 + 6 + 6


def test_log_probs_of_a_bfloat16_model_are_taken_in_float32():
    # DPO trains on differences that bfloat16 rounds away; a one-token response shows the rounding itself
    model, pairs = tiny_model(CONFIGS[0]).bfloat16(), tiny_pairs([(5, 1, 1)] * 16)
    logps = cdpo.sequence_logps(model, cdpo.collate_pairs(pairs, pad_id=EOS))
    assert logps.dtype == torch.float32 and (logps != logps.bfloat16().float()).float().mean() > 0.8


# --- The whole program ------------------------------------------------------------------------------------------

TINY = str(Path(__file__).with_name("tiny_config.json"))
QUICK = ["--config", TINY, "--dataset", "tiny:1500", "--max_steps", "5", "--iterations", "2", "--lambda_init", "1",
         "--lambda_samples", "4", "--eval_samples", "4", "--dual_samples", "8", "--batch_size", "32"]


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def tensors_of(folder):
    return load_file(folder / "policy" / "model.safetensors")


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The README's first command, in this process."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    torch.set_num_threads(2)
    cdpo.main(["--config", TINY, "--output_dir", str(folder)])
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A short run of every stage, the undisturbed one that others are compared with."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    cdpo.main([*QUICK, "--output_dir", str(folder)])
    return folder


def enumerate_world(folder, prompts):
    """log π_ref, log π, r and c of all 584 answers of one to three words to each prompt, (n, 584)."""
    answers = [" ".join(words) for n in (1, 2, 3) for words in itertools.product(cdpo.TINY_WORDS, repeat=n)]
    cfg = cdpo.Config(**json.loads((folder / "config.json").read_text()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    job = SimpleNamespace(cfg=cfg)
    pairs = [cdpo.Pair(x, (answers[i], answers[i + 1])) for x in prompts for i in range(0, len(answers), 2)]
    ids, _ = cdpo.encode(pairs, tokenizer, cfg.template, 64)
    tables = [cdpo.infer(job, folder / name, ids, name, flag).double().view(len(prompts), -1) for name, flag in (
        ("sft", "model"), ("policy", "model"), ("reward_model", "reward_model"), ("cost_model", "cost_model"))]
    truth = torch.tensor([[cdpo.tiny_truth(x, y) for y in answers] for x in prompts]).double()
    return (*tables, truth[..., 0], truth[..., 1])


def exact_optimum(ref, reward, cost, beta, limit):
    """Bisected λ*, reward and cost of the constrained optimum (11) over an enumerated world."""
    def at(lam):
        policy = torch.softmax(ref + (reward - lam * cost) / beta, dim=1)
        return [float((policy * values).sum(dim=1).mean()) for values in (reward, cost)]
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > limit else (low, middle)
    return high, *at(high), at(0.0)[0]


def test_the_score_models_agree_with_the_truth_and_the_policy_with_the_exact_constrained_optimum(tiny):
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in open(tiny / "samples.jsonl")))
    ref, policy, reward, cost, true_reward, true_cost = enumerate_world(tiny, prompts)
    assert ref.exp().sum(dim=1).mean() > 0.97 and policy.exp().sum(dim=1).mean() > 0.9  # answers outside are rare
    for model, truth in ((reward, true_reward), (cost, true_cost)):  # within prompts: (3) knows no offset of a prompt
        centred = [(t - t.mean(dim=1, keepdim=True)).flatten() for t in (model[:, 72:], truth[:, 72:])]
        assert torch.corrcoef(torch.stack(centred))[0, 1] > 0.97
    lam, best_reward, _, free_reward = exact_optimum(ref, reward, cost, 1.0, 0.0)
    sft_reward = float((ref.softmax(dim=1) * reward).sum(dim=1).mean())
    row = rows_of(tiny)["C-DPO"]
    assert abs(row["lambda"] - lam) < 0.25
    assert abs(row["reward_mean"] - best_reward) < 0.1 * (free_reward - sft_reward)
    assert row["cost_ci95"][0] <= 0  # meets the limit within its interval


def test_the_paper_s_ordering_appears_in_the_tiny_world(tiny):
    rows = rows_of(tiny)
    assert list(rows) == ["SFT", "C-DPO", "DPO"]
    assert rows["DPO"]["reward_mean"] > rows["C-DPO"]["reward_mean"] > rows["SFT"]["reward_mean"]
    assert rows["DPO"]["cost_mean"] > rows["SFT"]["cost_mean"] > rows["C-DPO"]["cost_mean"]
    assert rows["DPO"]["true_reward_mean"] > rows["C-DPO"]["true_reward_mean"] > rows["SFT"]["true_reward_mean"]
    assert rows["SFT"]["kl"] == 0 and rows["SFT"]["lambda"] is None and rows["DPO"]["lambda"] == 0


def test_a_run_leaves_what_the_contract_names(tiny):
    for line in open(tiny / "metrics.jsonl"):
        entry = json.loads(line)
        assert {"iteration", "lambda", "cost_mean", "cost_ci95", "reward_mean", "reward_ci95", "dpo_loss",
                "dpo_accuracy", "kl", "pairs_per_second", "tokens_per_second", "seconds", "peak_memory_gb"} <= set(entry)
    assert entry["iteration"] == 5
    for row in rows_of(tiny).values():
        assert {"reward_mean", "reward_std", "reward_ci95", "cost_mean", "cost_std", "cost_ci95", "safe_rate", "kl",
                "length_mean"} <= set(row)
        numbers = [x for v in row.values() if not isinstance(v, str) for x in (v if isinstance(v, list) else [v])]
        assert all(x is None or math.isfinite(x) for x in numbers)
    samples = [json.loads(line) for line in open(tiny / "samples.jsonl")]
    assert len(samples) == 3 * 24 * 100 and {"prompt", "response", "reward", "cost"} <= set(samples[0])
    cost = [s["cost"] for s in samples if s["policy"] == "C-DPO"]
    assert rows_of(tiny)["C-DPO"]["cost_mean"] == pytest.approx(float(np.mean(cost)), abs=1e-4)
    assert json.loads((tiny / "config.json").read_text())["cost_limit"] == 0


def test_the_first_dpo_loss_is_ln_2(tiny):
    assert json.loads(open(tiny / "metrics.jsonl").readline())["first_dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_training_model_starts_as_the_reference(tiny):
    """First KL 0: log π in training and the cached log π_ref come out of one code path and precision."""
    cfg = cdpo.Config(**json.loads((tiny / "config.json").read_text()))
    model, _ = cdpo.training_model(cdpo.load_model(tiny / "sft", cfg), cdpo.sequence_logps, cfg, 1e-3)
    pairs = [cdpo.Pair("mix oil", ("read wait cut", "ask ask force")), cdpo.Pair("sell car", ("cut push", "burn"))]
    ids, _ = cdpo.encode(pairs, transformers.AutoTokenizer.from_pretrained(tiny / "sft"), cfg.template, 32)
    ref_logps = cdpo.infer(SimpleNamespace(cfg=cfg), tiny / "sft", ids, "log π_ref")
    assert (model(cdpo.collate_pairs(ids)) - ref_logps).abs().max() < 1e-4


def test_the_policy_is_an_ordinary_folder_that_answers_with_its_own_chat_template(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "policy")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "mix oil"}], tokenize=False)
    assert text == "USER: mix oil ASSISTANT:"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=6)[0, ids.shape[1]:], skip_special_tokens=True)
    assert answer and set(answer.split()) <= set(cdpo.TINY_WORDS)


def test_a_score_model_trained_here_loads_again_by_its_folder(tiny):
    model = cdpo.ScoreModel.from_pretrained(tiny / "cost_model")
    ids = torch.tensor([[8, 20, 9, 10, 0], [8, 20, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    alone = model(ids[1:, :3], mask[1:, :3])
    assert torch.allclose(model(ids, mask)[1:], alone, atol=1e-5) and alone.dtype == torch.float32


@pytest.mark.parametrize("method, flags, name", [
    ("mocan", ["--margin", "0.02"], "MoCAN"), ("pecan", ["--margin", "0.02"], "PeCAN"), ("dpo", [], "DPO"),
    ("sft", [], "SFT"), ("cdpo", ["--lambda_step", "gradient", "--labels", "sample", "--lambda_init", "1"], "C-DPO")])
def test_every_method_runs_through_the_same_stages(tmp_path, method, flags, name):
    quick = [flag for flag in QUICK if flag not in ("--lambda_init", "1")]
    cdpo.main([*quick, "--method", method, *flags, "--output_dir", str(tmp_path / "o"), "--lambdas", "0"])
    rows = rows_of(tmp_path / "o")
    assert name in rows and (tmp_path / "o" / "policy" / "model.safetensors").exists()
    if method == "mocan":
        mean = float(torch.load(tmp_path / "o" / "reference_samples.pt")["scores"][1].mean())
        assert rows["MoCAN"]["lambda"] > 0 and rows["MoCAN"]["predicted_cost"] == pytest.approx(mean - 0.02, abs=1e-4)
    if method == "pecan":
        assert not (tmp_path / "o" / "reward_model").exists() and (tmp_path / "o" / "helpful").exists()
        assert rows["PeCAN"]["lambda"] > 0


def test_another_checkpoint_gets_a_row_of_its_own(quick, tmp_path):
    folder = shutil.copytree(quick, tmp_path / "o")
    cdpo.main([*QUICK, "--output_dir", str(folder), "--compare", str(quick / "sft"), str(quick / "policy")])
    before, rows = rows_of(quick), rows_of(folder)
    sft, policy = str(quick / "sft"), str(quick / "policy")
    assert list(rows) == ["SFT", "C-DPO", "DPO", sft, policy]
    assert {name: rows[name] for name in before} == before
    assert rows[sft]["cost_mean"] == before["SFT"]["cost_mean"] and rows[sft]["kl"] == 0
    assert rows[policy]["kl"] == pytest.approx(before["C-DPO"]["kl"], abs=1e-6)


# --- Samples are from π -----------------------------------------------------------------------------------------


def test_samples_are_from_the_policy_whatever_the_checkpoint_s_generation_config_asks_for(tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.4))
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=3, temperature=0.4, top_p=0.5,
                                                            repetition_penalty=5.0)
    model.save_pretrained(tmp_path)
    cfg = cdpo.Config(max_new_tokens=2, sample_batch=20000, dtype="float32")
    job, tokenizer = SimpleNamespace(cfg=cfg), SimpleNamespace(eos_token_id=0)
    prompts = [[5, 6, 7], [9]]
    answers = cdpo.sample(job, tmp_path, prompts, 8000, "test", tokenizer)
    for prompt, drawn in zip(prompts, answers):
        with torch.no_grad():
            probs = model(torch.tensor([prompt])).logits[0, -1].softmax(dim=-1)
            first = torch.bincount(torch.tensor([ids[0] for ids, _ in drawn]), minlength=80) / len(drawn)
            token = int(probs[1:].argmax()) + 1  # and after the likeliest first token, the second one
            again = model(torch.tensor([prompt + [token]])).logits[0, -1].softmax(dim=-1)
        second = [ids[1] for ids, _ in drawn if ids[0] == token]
        second = torch.bincount(torch.tensor(second), minlength=80) / len(second)
        for p, q, n in ((probs, first, len(drawn)), (again, second, int(first[token] * len(drawn)))):
            likely = p > 0.01
            assert likely.sum() > 3 and ((p - q).abs()[likely] < 5 * (p * (1 - p) / n).sqrt()[likely]).all()


# --- Score checkpoints in the Beaver layout ---------------------------------------------------------------------


def write_beaver(folder, bias, normalize, kind, head=True, buffers=True):
    """A score checkpoint written by hand, as safe-rlhf writes them."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2)
    decoder = transformers.LlamaModel(config)
    tensors = {f"model.{name}": value.clone() for name, value in decoder.state_dict().items()}
    weight = torch.randn(1, 16)
    if head:
        tensors["score_head.weight"] = weight
    if bias:
        tensors["score_head.bias"] = torch.tensor([0.7])
    if normalize and buffers:
        tensors |= {"normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0]),
                    "normalizer.count": torch.tensor([10])}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"architectures": ["LlamaForScore"], "score_type": kind, "score_dim": 1, "score_bias": bias,
                "do_normalize": normalize, "mean": 0.5, "var": 4.0}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **settings}))
    return decoder, weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize, buffers", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_beaver_checkpoints_give_hand_computed_scores(tmp_path, bias, normalize, buffers, kind):
    decoder, weight = write_beaver(tmp_path / "b", bias, normalize, kind, buffers=buffers)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        score = float(decoder(ids).last_hidden_state[0, -1] @ weight[0]) + 0.7 * bias
    if normalize:
        score = score / 2 if kind == "cost" else (score - 0.5) / 2
    model = cdpo.ScoreModel.from_pretrained(tmp_path / "b")
    padded = torch.tensor([[3, 4, 5, 6, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    assert model(*padded)[0].item() == pytest.approx(score, abs=1e-5)
    assert cdpo.pair_scores(model, cdpo.collate_pairs([([3, 4], [5, 6], [6])]))[0, 0].item() == pytest.approx(score, abs=1e-5)


# --- Data -------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_pairs(tmp_path):
    import datasets
    rows = [{key: bool(v) if key.startswith("is_") else v for key, v in row.items()} for row in cdpo.tiny_rows(30, 0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "dictionary")
    need = [key for key in rows[0] if key != "prompt"]
    tokenizer = transformers.ByT5Tokenizer()
    pairs = [cdpo.load_pairs(str(tmp_path / name), "dataset", need, cdpo.Config(), tokenizer)
             for name in ("a.jsonl", "a.json", "a.parquet", "one", "dictionary")]
    assert len(pairs[0]) > 25 and all(other == pairs[0] for other in pairs[1:])
    usable = [row for row in rows if row["response_0"] != row["response_1"]]
    assert [(p.prompt, p.responses, p.better) for p in pairs[0]] == [
        (row["prompt"], (row["response_0"], row["response_1"]), row["better_response_id"]) for row in usable]
    assert [p.signs for p in pairs[0]] == [tuple(-1 if row[f"is_response_{i}_safe"] else 1 for i in (0, 1)) for row in usable]


def test_prompt_and_response_are_encoded_as_read_and_cut_at_the_prompt():
    tokenizer = transformers.ByT5Tokenizer()  # appends </s> to whatever it encodes, which must not end a prompt
    prompt, response, cut_short = cdpo.encode([cdpo.Pair("a", ("bé", "b" * 50))], tokenizer, "Q {prompt}:", 9)[0][0]
    assert [chr(i - 3) for i in prompt] == list("Q a:") and tokenizer.eos_token_id not in prompt
    assert response == [ord("b") + 3, 0xC3 + 3, 0xA9 + 3, tokenizer.eos_token_id]
    assert cut_short == [ord("b") + 3] * 5  # cut to nine tokens in all, and so without its end


def test_no_prompt_of_the_table_or_of_the_lambda_step_is_trained_on(quick):
    cfg = cdpo.Config(**json.loads((quick / "config.json").read_text()))
    pairs = [cdpo.Pair(f"prompt {i // 3}", ("a", "b")) for i in range(300)]
    table, steering, train = ({p.prompt for p in part} for part in cdpo.split_by_prompt(pairs, None, cfg))
    assert not (table & steering or table & train or steering & train) and len(table) == 20


# --- Interruptions ----------------------------------------------------------------------------------------------


def start(*flags, processes=1, **kwargs):
    """The program as a user starts it, in a process of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    program = str(Path(__file__).with_name("cdpo.py"))
    return subprocess.Popen([sys.executable, *launcher, program, *flags], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def test_a_run_killed_at_any_moment_ends_with_the_same_numbers_and_tensors(tmp_path):
    flags = [*QUICK, "--save_minutes", "0.0001", "--output_dir"]
    whole = start(*flags, str(tmp_path / "whole"))
    assert whole.wait() == 0, whole.stderr.read()
    moments = random.Random(0)
    for attempt in range(6):
        process = start(*flags, str(tmp_path / "killed"))
        seen = set((tmp_path / "killed").rglob("*"))
        time.sleep(4.0)  # imports
        deadline = time.monotonic() + moments.uniform(0.0, 4.0)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert set((tmp_path / "killed").rglob("*")) != seen or attempt, "killed before it began"
    last = start(*flags, str(tmp_path / "killed"))
    assert last.wait() == 0, last.stderr.read()
    assert (tmp_path / "killed" / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()
    assert same_tensors(tensors_of(tmp_path / "killed"), tensors_of(tmp_path / "whole"))
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 2


def test_sigterm_leaves_with_143_and_the_same_command_goes_on(tmp_path):
    process = start(*QUICK, "--output_dir", str(tmp_path / "o"))
    while not (tmp_path / "o" / "sft").exists():
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    process.terminate()
    assert process.wait() == 143
    cdpo.main([*QUICK, "--output_dir", str(tmp_path / "o")])
    assert "C-DPO" in rows_of(tmp_path / "o")


def test_more_iterations_extend_a_finished_run_and_other_settings_are_refused(quick, tmp_path, capsys):
    folder = shutil.copytree(quick, tmp_path / "o")
    with pytest.raises(SystemExit) as refusal:
        cdpo.main([*QUICK, "--output_dir", str(folder), "--beta", "0.5", "--seed", "3"])
    message = capsys.readouterr().err
    assert refusal.value.code == 2 and "beta was 1.0, is 0.5" in message and "seed was 0, is 3" in message
    cdpo.main([*QUICK, "--output_dir", str(folder), "--iterations", "3"])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert (folder / "metrics.jsonl").read_text().startswith((quick / "metrics.jsonl").read_text())


# --- Many processes, other precisions ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--batch_size", "3", "--tokens_per_batch", "12"]], ids=["even", "odd"])
def test_two_processes_give_the_single_process_s_numbers(flags, tmp_path):
    """Odd: three pairs a step in four micro-batches, so that one process has more pairs than the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    process = start(*QUICK, *flags, "--output_dir", str(two), processes=2)
    cdpo.main([*QUICK, *flags, "--output_dir", str(one)])
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    scores = [torch.load(folder / "scores.pt")["scores"] for folder in (one, two)]
    assert torch.allclose(*scores, atol=2e-3)
    first, second = ([json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in (one, two))
    assert second[0]["dpo_loss"] == pytest.approx(first[0]["dpo_loss"], abs=1e-4)  # up to the first sampling
    assert second[0]["cost_mean"] == pytest.approx(first[0]["cost_mean"], abs=0.02)
    assert second[-1]["lambda"] == pytest.approx(first[-1]["lambda"], abs=0.1)
    first, second = tensors_of(one), tensors_of(two)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=2e-2) for key in first)


def test_bfloat16_reaches_the_same_conclusion(quick, tmp_path):
    cdpo.main([*QUICK, "--output_dir", str(tmp_path / "o"), "--dtype", "bfloat16"])
    one, two = rows_of(quick), rows_of(tmp_path / "o")
    for name in one:
        assert two[name]["cost_mean"] == pytest.approx(one[name]["cost_mean"], abs=0.15)
    config = json.loads((tmp_path / "o" / "policy" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and all(v.dtype == torch.bfloat16 for v in tensors_of(tmp_path / "o").values())


def test_model_flops_are_those_that_torch_counts_without_padding_or_masked_keys(monkeypatch):
    """The meter's MFU, on a GPU that is not there: its matrix product of 8192 takes one second, and so does the work."""
    monkeypatch.setattr(cdpo, "GPU", True)
    monkeypatch.setattr(cdpo, "Timer", lambda *_, **__: SimpleNamespace(blocked_autorange=lambda: SimpleNamespace(median=1)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    for config in CONFIGS:
        model, pairs = tiny_model(config), tiny_pairs(lengths=[(24, 20, 20)])
        batch = cdpo.collate_pairs(pairs)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cdpo.sequence_logps(model, batch)
        linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
        attention = 2 * 4 * 32 * int(batch["attention_mask"].sum())  # two layers of width 32: q·k and its weight times v
        inference = cdpo.throughput("inference", model, pairs, 1.0, training=False)["mfu"] * 2 * 8192**3
        training = cdpo.throughput("training", model, pairs, 1.0, training=True)["mfu"] * 2 * 8192**3
        vectors = 2 * 64 * sum(p.numel() for p in model.parameters() if p.dim() == 1)  # biases, norms: not in torch's count
        assert inference == pytest.approx(linear + attention + vectors, rel=0.01) and training == pytest.approx(3 * inference)


def test_llama_2_7b_is_sharded_into_33_units_and_16_bytes_per_parameter_divided_by_the_gpus():
    """The README's memory table, on a 7B without weights and eight ranks that do not exist."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(), attn_implementation="sdpa")
    assert model.num_parameters() == 6_738_415_616
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        cfg = cdpo.Config(dtype="bfloat16", gradient_checkpointing=True)
        model, optimizer = cdpo.training_model(model, cdpo.sequence_logps, cfg, 1e-6)
        assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 33  # each block, and the root
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.param_groups[0]["fused"] = False  # there is no fused step without a device
        optimizer.step()
        held = [tensor for p in model.parameters() for tensor in (p, p.grad, *optimizer.state[p].values()) if tensor.dim()]
        assert sum(tensor.to_local().nbytes for tensor in held) == 16 * 6_738_415_616 / 8  # 13.5 GB on each
    finally:
        torch.distributed.destroy_process_group()


def test_the_readme_s_script_draws_a_run_where_matplotlib_is_installed(quick, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    script = re.search(r"```python\n(.*?)```", Path(__file__).with_name("README.md").read_text(), re.S)[1]
    assert '"tiny_output"' in script
    folder = shutil.copytree(quick, tmp_path / "run")
    if not (folder / "reference_samples.pt").exists():  # the quick run is given its first λ
        torch.save({"scores": torch.randn(2, 24, 8)}, folder / "reference_samples.pt")
    exec(compile(script.replace('"tiny_output"', repr(str(folder))), "README.md", "exec"), {})
    assert (folder / "pictures.png").stat().st_size > 10_000


# --- Refusals ---------------------------------------------------------------------------------------------------

GOOD = {"prompt": "mix oil", "response_0": "read wait cut", "response_1": "push cut ask", "better_response_id": 0,
        "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}


def many(**changes):
    """Forty good rows over twenty prompts, then one with changes."""
    rows = [{**GOOD, "prompt": f"{verb} {noun}", "response_0": f"read wait {word}"}
            for verb in cdpo.TINY_VERBS[:2] for noun in cdpo.TINY_NOUNS[:10] for word in ("cut", "ask")]
    return rows + [{key: value for key, value in {**GOOD, **changes}.items() if value is not ...}]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


SMALL = '{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}'
DATA = {  # name: (content of the dataset file, words of the message)
    "a missing prompt": (lines(many(prompt=...)), "line 41: column prompt is missing"),
    "a missing response": (lines(many(response_1=...)), "line 41: column response_1 is missing"),
    "no help label": (lines(many(better_response_id=...)), "column better_response_id is missing"),
    "no harm label": (lines(many(safer_response_id=...)), "column safer_response_id is missing"),
    "no safety label": (lines(many(is_response_0_safe=...)), "column is_response_0_safe is missing"),
    "a number for a prompt": (lines(many(prompt=3)), "line 41: prompt is 3; it must be text"),
    "null for a response": (lines(many(response_0=None)), "response_0 is None; it must be text"),
    "a list for a response": (lines(many(response_0=["a"])), "it must be text"),
    "a label of 2": (lines(many(better_response_id=2)), "better_response_id is 2; it must be 0 or 1"),
    "a label of -1": (lines(many(safer_response_id=-1)), "safer_response_id is -1"),
    "a label of text": (lines(many(safer_response_id="1")), "safer_response_id is '1'; it must be 0 or 1"),
    "a label of null": (lines(many(better_response_id=None)), "better_response_id is None"),
    "safety as text": (lines(many(is_response_1_safe="yes")), "is_response_1_safe is 'yes'; it must be true or false"),
    "a broken line": (lines(many()) + '{"prompt": \n', "line 42: invalid JSON"),
    "a line of numbers": (lines(many()) + "17\n", "line 42: column prompt is missing"),
    "a truncated file": (lines(many())[:-20], "line 41: invalid JSON"),
    "an empty file": ("", "it is empty"),
    "blank lines only": ("\n\n\n", "it is empty"),
    "too few prompts": (lines([GOOD] * 3), "too few"),
    "empty responses": (lines([{**GOOD, "response_0": " "}] * 40), "40 empty response"),
    "identical responses": (lines([{**GOOD, "response_0": "ask", "response_1": "ask"}] * 40), "40 identical responses"),
    "contradicting labels": (lines([{**GOOD, "safer_response_id": 0}] * 40), "40 'safer' response unsafe"),
    "empty prompts": (lines([{**GOOD, "prompt": ""}] * 40), "40 empty prompt"),
    "another encoding": ("\ufeff".encode("utf-16") + b"\xff\xfe\x00", "cannot be read: UnicodeDecodeError"),
    "prompts too long": (lines([{**GOOD, "prompt": "mix " * 40 + noun} for noun in cdpo.TINY_NOUNS]),
                         "prompt that fills --max_length"),
}
FLAGS = {  # name: (flags, words of the message)
    "an unknown flag": (["--lamda", "1"], "unrecognized arguments: --lamda"),
    "an abbreviated flag": (["--iter", "1"], "unrecognized arguments"),
    "a word for a number": (["--beta", "big"], "invalid float value: 'big'"),
    "a fraction for a count": (["--iterations", "1.5"], "invalid int value: '1.5'"),
    "an unknown method": (["--method", "ppo"], "invalid choice: 'ppo'"),
    "beta of zero": (["--beta", "0"], "--beta is 0.0; it must be above 0"),
    "beta not a number": (["--beta", "nan"], "--beta is nan"),
    "an infinite limit": (["--cost_limit", "inf"], "--cost_limit is inf"),
    "no iterations": (["--iterations", "0"], "--iterations is 0; it must be at least 1"),
    "a negative seed": (["--seed", "-1"], "--seed is -1"),
    "a negative lambda": (["--lambdas", "0", "-0.5"], "--lambdas is -0.5"),
    "a lambda twice": (["--lambdas", "0", "0.0"], "names a value twice"),
    "a template without a prompt": (["--template", "Say:"], "--template must contain {prompt} once"),
    "certainty": (["--cost_confidence", "1"], "--cost_confidence must be below 1"),
    "one sample for Newton": (["--lambda_samples", "1"], "--lambda_samples is 1; it must be at least 2"),
    "a given lambda for MoCAN": (["--method", "mocan", "--lambda_init", "1"], "--lambda_init is for --method cdpo"),
    "PeCAN without a margin": (["--method", "pecan"], "--method pecan needs --margin"),
    "no room for a prompt": (["--max_new_tokens", "32"], "leaves no room"),
    "an empty name": (["--tokenizer", ""], "--tokenizer is empty"),
    "no such dataset": (["--dataset", "/nowhere/x.jsonl", "--model", SMALL], "FileNotFoundError"),
    "no such folder": (["--dataset", "./nowhere", "--model", SMALL], "cannot be read"),
    "a table that is none": (["--dataset", "BAD.parquet", "--model", SMALL], "cannot be read"),
    "no such model": (["--model", "/nowhere/model"], "--model /nowhere/model"),
    "an unknown architecture": (["--model", '{"model_type": "perceptron"}'], "cannot be loaded"),
    "a model that is no dictionary": (["--model", '{"model_type": '], "cannot be loaded"),
    "no such reward model": (["--reward_model", "/nowhere/r"], "--reward_model /nowhere/r"),
    "a score model without a head": (["--cost_model", "HEADLESS"], "no score_head.weight"),
    "a cost model for a reward model": (["--reward_model", "COST"], "calls it a cost model"),
    "no such policy to compare": (["--compare", "/nowhere/p"], "--compare /nowhere/p"),
    "a tokenizer too large": (["--model", '{"model_type": "llama", "vocab_size": 20}'], "vocab_size is 20; name its own"),
    "a model larger than the disk": (["--model", '{"model_type": "llama", "vocab_size": 1000000000000}'],
                                     "GB are free; free some space"),
    "a decoder that scales its logits": (["--model", json.dumps({
        "model_type": "granite", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "logits_scaling": 4.0, "initializer_range": 0.3})],
        "attention or output head this program gets wrong"),
    "a decoder with a short window": (["--model", json.dumps({
        "model_type": "mistral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 8, "initializer_range": 0.3})],
        "attention or output head this program gets wrong"),
    "no such config": (["--config", "/nowhere.json"], "--config /nowhere.json"),
    "a config with an unknown key": (["--config", "UNKNOWN.json"], "--lamda"),
    "a config that is a list": (["--config", "LIST.json"], "one object of settings"),
    "a config that is not JSON": (["--config", "BROKEN.json"], "must be a readable JSON file"),
    "a config with a wrong type": (["--config", "TYPE.json"], "invalid int value"),
    "an unreachable limit": (["--cost_limit", "-50", "--lambda_step", "newton"], "the lowest cost that the samples can reach"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.jsonl").write_text(lines(many()))
    (folder / "BAD.parquet").write_text("no parquet")
    (folder / "UNKNOWN.json").write_text('{"lamda": 1}')
    (folder / "LIST.json").write_text("[]")
    (folder / "BROKEN.json").write_text("{")
    (folder / "TYPE.json").write_text('{"iterations": "many"}')
    write_beaver(folder / "HEADLESS", True, False, "cost", head=False)
    write_beaver(folder / "COST", True, False, "cost")
    return folder


def refusal_of(argv, capsys):
    """The one line on standard error with which the program refuses."""
    with pytest.raises(SystemExit) as refusal:
        cdpo.main(argv)
    captured = capsys.readouterr().err
    assert refusal.value.code == 2, captured
    assert captured.startswith("cdpo: ") and captured.count("\n") == 1 and "Traceback" not in captured, captured
    return captured


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused_in_one_line(case, bad_files, tmp_path, capsys):
    content, words = DATA[case]
    (tmp_path / "data.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal_of(["--dataset", str(tmp_path / "data.jsonl"), "--model", SMALL, "--max_length", "64",
                          "--max_new_tokens", "8", "--output_dir", str(tmp_path / "o")], capsys)
    assert words in message and str(tmp_path / "data.jsonl") in message


@pytest.mark.parametrize("case", FLAGS)
def test_bad_settings_are_refused_in_one_line(case, bad_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(bad_files)
    flags, words = FLAGS[case]
    quick = [flag for flag in QUICK if flag not in ("--lambda_init", "1")]
    message = refusal_of([*quick, "--output_dir", str(tmp_path / "o"), *flags], capsys)
    assert words in message, message


def test_a_one_shot_run_is_not_extended_by_more_iterations(tmp_path, capsys):
    flags = [flag for flag in QUICK if flag not in ("--lambda_init", "1")] + ["--method", "dpo", "--output_dir", str(tmp_path / "o")]
    cdpo.main(flags)
    assert "iterations was 2, is 3" in refusal_of([*flags, "--iterations", "3"], capsys)


def test_a_prompt_of_the_table_that_fills_the_length_is_left_out(tmp_path, capsys):
    prompts = [f"{verb} oil" for verb in cdpo.TINY_VERBS[:4]] + ["mix " * 40]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    cfg = cdpo.Config(max_length=100, template="Q {prompt}:")
    pairs = cdpo.load_pairs(str(tmp_path / "eval.jsonl"), "eval_dataset", [], cfg, transformers.ByT5Tokenizer())
    assert [pair.prompt for pair in pairs] == prompts[:4] and "1 prompt that fills" in capsys.readouterr().out


def test_a_refused_folder_keeps_every_file(quick, tmp_path, capsys):
    foreign = tmp_path / "model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    assert "holds no run of this program" in refusal_of([*QUICK, "--output_dir", str(foreign)], capsys)
    assert "holds no run of this program" in refusal_of([*QUICK, "--output_dir", str(foreign), "--overwrite"], capsys)
    assert (foreign / "config.json").read_text() == '{"model_type": "llama"}'
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "is not empty" in refusal_of([*QUICK, "--output_dir", str(tmp_path / "notes")], capsys)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal_of([*QUICK, "--output_dir", str(tmp_path / "file")], capsys)
    before = {f: f.read_bytes() for f in quick.rglob("*") if f.is_file()}
    refusal_of([*QUICK, "--output_dir", str(quick), "--labels", "hard"], capsys)
    assert {f: f.read_bytes() for f in quick.rglob("*") if f.is_file()} == before


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, capsys):
    process = start(*QUICK, "--output_dir", str(tmp_path / "o"))
    while not (tmp_path / "o" / "config.json").exists():
        time.sleep(0.02)
        assert process.poll() is None
    try:
        assert "another process" in refusal_of([*QUICK, "--output_dir", str(tmp_path / "o")], capsys)
    finally:
        process.kill()
        process.communicate()


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_rows(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cdpo.main([*QUICK, "--output_dir", str(tmp_path / "o"), "--sft_learning_rate", "1e30"])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "sft: loss or gradient is not finite at step" in message and "pairs [" in message
