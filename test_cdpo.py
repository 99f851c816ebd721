"""The mathematics of cdpo.py as claims; expected values never come from cdpo.py itself but from a hand
calculation, float64 numpy, numerical differentiation, or enumeration of a world small enough to list.

    python -m pytest test_math.py
"""
import functools
import inspect
import math
import re

import numpy as np
import pytest
import torch
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
