"""Constrained Direct Preference Optimization: make a language model helpful under a bound on harm.

    max_π  E[r(x,y)] − β·KL(π ‖ π_ref)     subject to     E[c(x,y)] ≤ C_limit           (6), (7)

C-DPO (Liu, Sun, Zheng, arXiv 2403.02475) solves this without reinforcement learning. Learn a
reward r (helpfulness) and a cost c (harm) from preference pairs; for a multiplier λ relabel the
pairs by r − λ·c; fit the policy to the relabelled pairs with DPO; sample from it and measure its
cost; move λ up if the cost is over the limit and down if it is under; repeat. MoCAN and PeCAN
(Huang et al., arXiv 2405.19544) find λ before any training, in closed form on samples of π_ref.

    python cdpo.py --config tiny_config.json                          # the whole method on a laptop
    python cdpo.py --model meta-llama/Llama-2-7b-hf                   # one GPU with 141 GB
    torchrun --nproc_per_node 8 cdpo.py --model meta-llama/Llama-2-7b-hf           # FSDP2 over 8

Equation numbers are those of 2403.02475. Where this program departs from the paper, and why:

 1. Labels of (12) are not drawn: the loss is their expectation, the same objective without the
    noise of labels. (--labels sample draws them.)
 2. The reference is fitted to both responses of each pair, so that it is the distribution that
    the pairs were drawn from, as the derivation of DPO assumes.
 3. DPO compares all responses to a prompt, not only those that annotators did: (12) labels any
    pair by its scores, at no more cost than that of the responses. (--no_all_pairs)
 4. λ starts at the minimum of the dual (9) on samples of π_ref, which is MoCAN. (--lambda_init)
 5. λ moves to the minimum of the dual on the samples of all iterations, reweighted, and above it
    where the policy keeps lagging behind: no step size. (--lambda_step gradient is (14).)
 6. The policy and its optimizer are carried from one λ to the next, and the learning rate falls
    over the second half of the loop.
 7. The samples that measure the cost are trained on in the next iteration. (--no_recycle)
 8. Of the iterates the best is kept, by objective (6) less an exact penalty for cost over the
    limit.

The paper's letter: --labels sample --no_all_pairs --lambda_step gradient --lambda_init 0
--no_recycle. Left out on purpose: vector-valued λ, LoRA, tensor parallelism, callbacks.
"""

import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # shapes vary a lot

import datasets
import tokenizers
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

RANK, WORLD = (
    int(os.environ.get("RANK", "0")),
    int(os.environ.get("WORLD_SIZE", "1")),
)  # of torchrun
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


# ---- Settings ------------------------------------------------------------------------------------


def opt(default, text):
    """A field of Config: its default and its line of --help."""
    what = {"default_factory": list} if default is list else {"default": default}
    return field(metadata={"help": text}, **what)


@dataclass
class Config:
    """Every setting of a run, read from the command line or from a JSON file (--config)."""

    method: Literal["cdpo", "mocan", "pecan", "dpo", "sft"] = opt("cdpo", "how the policy is found")
    model: str = opt("meta-llama/Llama-2-7b-hf", "hub name, folder, or JSON dictionary to build")
    dataset: str = opt("PKU-Alignment/PKU-SafeRLHF-30K", "hub name, file or folder; NAME:SPLIT")
    output_dir: str = opt("cdpo_output", "all is written here; the same command goes on from it")
    overwrite: bool = opt(False, "discard the run in --output_dir and start afresh")
    seed: int = opt(0, "seed of every random choice")

    # Given models: each saves the stage that would train it
    sft_model: str | None = opt(None, "reference policy, instead of training one by SFT")
    reward_model: str | None = opt(None, "reward model, instead of training one by (3)")
    cost_model: str | None = opt(None, "cost model, above 0 harmful, instead of training by (5)")

    # Data
    tokenizer: str | None = opt(None, "tokenizer, where it is not the model's own")
    template: str | None = opt(None, "prompt template with {prompt}; default: the tokenizer's")
    eval_dataset: str | None = opt(None, "prompts of the table; default: held out of --dataset")
    max_length: int = opt(512, "tokens of a prompt with one response; longer responses are cut")
    max_new_tokens: int = opt(256, "tokens of a sampled response, at most")
    row_length: int = opt(2048, "tokens of a row, a prompt with responses; split where longer")

    # The method
    beta: float = opt(0.1, "strength of the KL to the reference")
    labels: Literal["soft", "sample", "hard"] = opt("soft", "labels of (12): mean, draw, likelier")
    all_pairs: bool = opt(True, "DPO on all pairs of a prompt's responses, not only the dataset's")
    cost_limit: float = opt(0.0, "C_limit: the expected cost may not exceed it")
    margin: float | None = opt(None, "state the limit as E_ref[cost] − margin instead")
    cost_confidence: float = opt(0.5, "level at which the cost meets the limit; 0.5: its mean")
    lambda_init: float | None = opt(None, "first λ; default: solves the dual on π_ref")
    lambda_step: Literal["solve", "gradient", "fixed"] = opt("solve", "how λ moves; (14): gradient")
    lambda_lr: float = opt(0.05, "step size of the gradient step")
    lambda_prompts: int = opt(500, "held-out prompts on which λ is found")
    lambda_samples: int = opt(4, "responses per prompt that measure a policy there")
    recycle: bool = opt(True, "train on those responses, too, in the next iteration")
    dual_samples: int = opt(16, "responses of π_ref per prompt there, to solve the dual")
    lambdas: list[float] = opt(list, "also train a policy for each of these fixed λ; 0 is DPO")  # noqa: RUF009
    iterations: int = opt(5, "outer iterations: relabel, fit, sample, step")
    dpo_steps: int = opt(100, "DPO steps of an outer iteration")

    # Training
    batch_size: int = opt(32, "rows (prompts) of an optimizer step, all processes together")
    tokens_per_batch: int = opt(8192 if GPU else 2048, "padded tokens of a micro-batch")
    learning_rate: float = opt(1e-6, "of DPO, at its highest")
    sft_learning_rate: float = opt(1e-5, "of SFT and of the reward and cost models")
    max_steps: int | None = opt(None, "bound every stage to this many steps, to try things")
    dtype: Literal["float32", "bfloat16"] = opt("bfloat16" if GPU else "float32", "of compute")
    gradient_checkpointing: bool = opt(GPU, "recompute activations in backward, to save memory")
    cpu_offload: bool = opt(False, "keep weights and optimizer in host memory, for a small GPU")
    no_checkpoint: bool = opt(False, "save no training state (81 GB at 7B) after an iteration")

    # Evaluation
    eval_prompts: int = opt(2000, "prompts of the final table, a fifth of the dataset's at most")
    eval_samples: int = opt(5, "responses per prompt there")
    sample_tokens: int = opt(40960 if GPU else 16384, "tokens, with padding, sampled at once")
    compare: list[str] = opt(list, "further policies, evaluated as rows of the same table")  # noqa: RUF009


# ---- The mathematics -----------------------------------------------------------------------------
# Pure functions in the order of the equations; each can be pasted elsewhere with `import torch`
# (and `math`) alone. A reward is higher for more help, a cost above 0 is harmful; log-probabilities
# are sums over response tokens, in nats. Column i of a (B, 2) tensor is response i.


def bradley_terry_loss(chosen, rejected):
    """Reward loss, (3): −log σ(r(chosen) − r(rejected)). Rewards (B,), (B,) → scalar mean, nats."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def cost_loss(worse, better, worse_sign, better_sign):
    """Cost loss, (5): the *more harmful* response higher, the zero between unsafe and safe.

    −log σ(c(worse) − c(better)) − log σ(s_worse·c(worse)) − log σ(s_better·c(better)); costs and
    signs (B,), a sign is +1 for an unsafe response and −1 for a safe one → scalar mean, nats.
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    ranking = log_sigmoid(worse - better)
    signs = log_sigmoid(worse_sign * worse) + log_sigmoid(better_sign * better)
    return -(ranking + signs).mean()


def relabel(reward, cost, lam, mode="soft", generator=None):
    """P(y0 ≻ y1) under the Lagrangian reward r_λ = r − λ·c, (12). (B, 2), (B, 2), number → (B,).

    "soft": σ(r_λ(y0) − r_λ(y1)), the expectation over labels; "sample": 0 or 1 drawn with it, the
    paper's letter; "hard": 0 or 1, the likelier, ties 0.5. ValueError for another mode.
    """
    r_lam = reward - lam * cost
    prob = torch.sigmoid(r_lam[:, 0] - r_lam[:, 1])
    if mode == "soft":
        return prob
    if mode == "sample":
        return torch.bernoulli(prob, generator=generator)
    if mode == "hard":
        return 0.5 + 0.5 * torch.sign(r_lam[:, 0] - r_lam[:, 1])
    raise ValueError(f'relabel: mode is {mode!r}; it must be "soft", "sample" or "hard"')


def dpo_loss(policy_logps, ref_logps, prob, beta):
    """DPO loss on relabelled pairs, (13), in expectation over the label.

    −p·log σ(h) − (1−p)·log σ(−h), h = β·[log π(y0)/π_ref(y0) − log π(y1)/π_ref(y1)];
    logps (B, 2), prob (B,) = P(y0 ≻ y1) → scalar mean, nats. With prob in {0, 1} it is DPO's own
    loss (Rafailov et al., arXiv 2305.18290).
    """
    log_ratio = policy_logps - ref_logps
    h = beta * (log_ratio[:, 0] - log_ratio[:, 1])
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(prob * log_sigmoid(h) + (1 - prob) * log_sigmoid(-h)).mean()


def lambda_step(lam, cost, cost_limit, lr):
    """Projected gradient step on the dual, (14): max(0, λ − η·(C_limit − Ĵ_c)). → float.

    cost: of samples of the policy for λ, any shape.
    """
    return max(float(lam - lr * (cost_limit - cost.mean())), 0.0)  # in this order a NaN stays a NaN


def dual_value(reward, cost, lam, beta, cost_limit):
    """Dual function in closed form, (9): g(λ) = β·E_x log E_{y∼π_ref} exp((r − λ·(c − C_limit))/β).

    reward, cost (n prompts, m samples of π_ref) → scalar; convex in λ, slope C_limit − E_{π_λ}[c].
    """
    exponent = (reward - lam * (cost - cost_limit)) / beta
    samples = exponent.new_tensor(exponent.shape[1])
    return beta * (torch.logsumexp(exponent, dim=1) - torch.log(samples)).mean()


def solve_dual(reward, cost, beta, cost_limit, lam_max=100.0, log_ratio=None):
    """The λ* ≥ 0 that minimises the dual (9): the least λ whose policy π_λ meets the limit.

    reward, cost (n, m): scores of m samples for each of n prompts, from π_ref or, with log_ratio
    (n, m) = log π/π_ref of the samples, from any policies π. Reweighted, they stand for samples of
    π_λ ∝ π_ref·exp((r − λc)/β) = π·exp((r − λc)/β − log π/π_ref), (11), whose cost falls as λ
    grows, so that bisection finds λ* at any scale of the scores. → float, 0 for a slack limit.
    ValueError when a score is not finite, or when no λ ≤ lam_max meets the limit.
    """
    reward, cost = reward.double(), cost.double()
    log_ratio = torch.zeros_like(cost) if log_ratio is None else log_ratio.double()
    if not torch.isfinite(reward + cost + log_ratio).all():
        raise ValueError("solve_dual: a score is not finite")

    def expected_cost(lam):  # by self-normalised importance weights
        weights = torch.softmax((reward - lam * cost) / beta - log_ratio, dim=1)
        return (weights * cost).sum(dim=1).mean()

    if expected_cost(0.0) <= cost_limit:
        return 0.0
    last, lowest = expected_cost(lam_max), cost.amin(dim=1).mean()
    if last > cost_limit:
        raise ValueError(
            f"solve_dual: no lambda up to {lam_max:g} meets the limit {cost_limit:.6g}: cost "
            f"{last:.6g} there, the lowest cost that the samples can reach is {lowest:.6g}"
        )

    low, high = 0.0, float(lam_max)
    for _ in range(80):
        middle = (low + high) / 2
        if expected_cost(middle) > cost_limit:
            low = middle
        else:
            high = middle
    return high


def implicit_reward(policy_logps, ref_logps, beta):
    """β·log π(y|x)/π_ref(y|x): the reward, up to a constant of x, that a DPO policy stands for.

    Any shape. PeCAN takes it from a helpful-only policy as r and from a safe-only policy as −c.
    """
    return beta * (policy_logps - ref_logps)


def estimate(values, level=0.5):
    """Upper confidence bound of E[values] at a level; 0.5 is the mean. (n prompts, m) → float.

    The samples of a prompt are not independent: the standard error is that of n prompt means.
    """
    error = values.mean(dim=1).std() / math.sqrt(len(values))
    return float(values.mean() + torch.special.ndtri(torch.tensor(level)) * error)


def ci95(values):
    """95% confidence interval [low, high] of E[values], clustered by prompt. values (n, m)."""
    error = values.mean(dim=1).std() / math.sqrt(len(values))
    return [float(values.mean() - 1.959964 * error), float(values.mean() + 1.959964 * error)]


def predict(reward, cost, lam, beta, log_ratio=None):
    """What π_λ would earn and cost, from samples alone, before any training (2405.19544).

    reward, cost, log_ratio (n, m) as in solve_dual → dict: reward, cost, cost_ci95 (clustered by
    prompt); ess, the mean effective sample size of a prompt: near 1 the weights rest on one sample,
    and all these numbers mean little; kl, KL(π_λ ‖ the samples' policy) as the weights show it,
    which m samples cannot show above log m.
    """
    log_ratio = torch.zeros_like(cost) if log_ratio is None else log_ratio
    weights = torch.softmax(((reward - lam * cost) / beta - log_ratio).double(), dim=1)
    costs = (weights * cost).sum(dim=1)  # (n,)
    error = 1.959964 * float(costs.std()) / math.sqrt(len(costs))
    entropy = -torch.special.xlogy(weights, weights).sum(dim=1).mean()
    return {
        "reward": float((weights * reward).sum(dim=1).mean()),
        "cost": float(costs.mean()),
        "cost_ci95": [float(costs.mean()) - error, float(costs.mean()) + error],
        "ess": float((1 / (weights**2).sum(dim=1)).mean()),
        "kl": math.log(cost.shape[1]) - float(entropy),
    }


# ---- What flows ----------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two responses of a row, by number, as people compared them: for help and for harm."""

    chosen: int
    rejected: int
    worse: int  # the more harmful one
    better: int
    worse_sign: int  # +1 unsafe, −1 safe, 0 unknown
    better_sign: int

    def renumbered(self, new):
        """The same pair where response i is new[i]."""
        return Pair(*(new[i] for i in self[:4]), *self[4:])


class Scores(NamedTuple):
    """r, c and log π_ref of responses, in their order. There is no λ in them."""

    reward: torch.Tensor
    cost: torch.Tensor
    ref_logps: torch.Tensor


@dataclass(frozen=True)
class Row:
    """A prompt with k different responses, or k samples: the unit of everything that is run."""

    prompt: object  # text, or a list of {"role": …, "content": …}
    responses: list  # k texts
    ended: list  # k: whether a response ended by itself, as a sample may not have
    ids: tuple  # (prompt_ids, [y0_ids, y1_ids, …]), the policy's tokens
    pairs: list  # those that people compared, each as often as they did; none among samples
    weight: float  # in the mean over a step, in pairs
    scores: Scores | None = None  # (k,) each, once they are known


class Models(NamedTuple):
    """Folders or hub names of π_ref, r and c."""

    reference: str
    reward: str  # a reward model or, implicit, the helpful-only policy
    cost: str  # a cost model or, implicit, the safe-only policy
    implicit: bool = False


@dataclass(frozen=True)
class Run:
    """What every stage needs; no prompt is in two of the three parts of the data."""

    cfg: Config
    out: Path
    tokenizer: transformers.PreTrainedTokenizerBase
    train: list  # rows to train on
    lambda_prompts: list  # where λ is found
    table_prompts: list  # of the final table
    held_out: list  # rows with people's labels for those of the table, to try the score models


@dataclass(frozen=True)
class Samples:
    """m responses of a policy π to each of n prompts."""

    rows: list  # with scores; a prompt's samples are in several rows where one is too short
    scores: Scores  # (n, m) each
    log_ratio: torch.Tensor  # log π/π_ref, (n, m)


@dataclass(frozen=True)
class Problem:
    """(6) and (7) in numbers."""

    models: Models
    rows: list  # to train on, with scores
    dual: Scores | None  # (n, m), of samples of π_ref to λ's prompts, where they are needed
    cost_limit: float


@dataclass
class Loop:
    """Where Algorithm 1 stands between two iterations."""

    lam: float
    history: list = field(default_factory=list)  # an entry of metrics.jsonl for each iteration
    samples: list = field(default_factory=list)  # the Samples of each


# ---- The method ----------------------------------------------------------------------------------


def constrained_dpo(run, problem, lam):
    """Algorithm 1 from a first λ: relabel, fit, sample, step λ. → (best policy, its λ)."""
    cfg, prompts, count = run.cfg, run.lambda_prompts, run.cfg.lambda_samples
    policy, loop = begin_loop(run, problem.models.reference, Loop(lam))

    while len(loop.history) < cfg.iterations:
        iteration, lam, started = len(loop.history), loop.lam, time.perf_counter()
        rows, steps = rows_of_iteration(cfg, problem.rows, loop)

        relabelled_loss = relabelled_dpo(cfg, lam, iteration)  # (12)
        fit = train(cfg, policy, rows, steps, relabelled_loss)  # (13)

        candidate = export(run, policy.model, run.out / "iterate")
        samples = measure(run, problem.models, candidate, prompts, count, iteration)
        cost = estimate(samples.scores.cost, cfg.cost_confidence)  # Ĵ_c

        entry = {"iteration": iteration, "lambda": lam, "cost_bound": cost}
        entry |= numbers_of(run, samples) | fit | {"seconds": time.perf_counter() - started}
        keep_the_better(run, loop.history, entry, problem.cost_limit)
        loop.samples.append(samples)
        loop.lam = next_lambda(cfg, loop, problem.cost_limit)  # (14)
        warn_of_scale(samples.scores, lam, cfg.beta, samples.log_ratio)
        save_loop(run, policy, loop)

    remove(run.out / "training", run.out / "iterate")
    kept = loop.history[loop.history[-1]["kept"]]
    if kept["cost_bound"] > problem.cost_limit and cfg.lambda_step != "fixed":
        say(f"no iterate meets the limit: the policy kept has cost {kept['cost_bound']:.3f}")
    return run.out / "policy", kept["lambda"]


def next_lambda(cfg, loop, cost_limit):
    """The next λ: closed form on the samples of all iterations, and more while the policy lags.

    Weighted by (11), samples of any policy stand for π_λ with one normaliser, so they are put
    together, and few of each are enough. That λ belongs to a policy that has converged; one that
    lags behind costs more, by a gap. Most of it heals by itself: only what lasts is fed back, the
    gap times its share of the last gap. Errors are to be safe ones: feedback only raises λ, and λ
    goes down by half of the way.
    """
    newest = loop.samples[-1].scores.cost
    if cfg.lambda_step == "fixed":
        return loop.lam
    if cfg.lambda_step == "gradient":
        shift = loop.history[-1]["cost_bound"] - newest.mean()  # of the estimate over the mean
        return lambda_step(loop.lam, newest + shift, cost_limit, cfg.lambda_lr)

    reward = torch.cat([samples.scores.reward for samples in loop.samples], dim=1)
    cost = torch.cat([samples.scores.cost for samples in loop.samples], dim=1)
    log_ratio = torch.cat([samples.log_ratio for samples in loop.samples], dim=1)
    gaps = []  # the cost of each policy above that of the π_λ that it was fitted to
    for entry in loop.history:
        fitted = predict(reward, cost, entry["lambda"], cfg.beta, log_ratio)["cost"]
        gaps.append(entry["cost_bound"] - fitted)
    lasting = 0.0
    if len(gaps) > 1 and min(gaps[-2:]) > 0:
        lasting = gaps[-1] * min(1.0, gaps[-1] / gaps[-2])

    # Feedback may raise λ by half, and by what moves a weight by about a nat: 0 must rise, too
    most = 1.5 * loop.lam + cfg.beta / max(float(cost.std(dim=1).mean()), 1e-6)

    def solve(limit):
        try:
            return solve_dual(reward, cost, cfg.beta, limit, log_ratio=log_ratio)
        except ValueError:  # no sample costs so little
            return most

    converged = solve(cost_limit)
    return max(converged, min(solve(cost_limit - lasting), most), (loop.lam + converged) / 2)


def keep_the_better(run, history, entry, cost_limit):
    """Append the newest iterate to the history; keep its policy where it is the best so far."""
    price = 2 * max(e["lambda"] for e in [*history, entry]) + 1  # above λ*: no violation pays

    def merit(entry):  # objective (6) less an exact penalty
        objective = entry["reward_mean"] - run.cfg.beta * entry["kl"]
        return objective - price * max(0.0, entry["cost_bound"] - cost_limit)

    entry["kept"] = entry["iteration"]
    if history and merit(entry) <= merit(history[history[-1]["kept"]]):
        entry["kept"] = history[-1]["kept"]
    else:
        rename(run.out / "iterate", run.out / "policy")
    history.append(entry)

    form = "iteration {iteration}: λ {lambda:.4f}, cost {cost_mean:+.3f} [{cost_ci95[0]:+.3f}, "
    form += "{cost_ci95[1]:+.3f}], reward {reward_mean:+.3f}, KL {kl:.3f}"
    say(form.format(**entry))


def one_shot(run, problem, lam):
    """λ is known: one iteration takes the steps of them all. → (policy, λ)."""
    steps = run.cfg.iterations * run.cfg.dpo_steps
    cfg = replace(run.cfg, iterations=1, dpo_steps=steps, lambda_step="fixed")
    return constrained_dpo(replace(run, cfg=cfg), problem, lam)


def mocan(run, problem):
    """MoCAN (2405.19544): λ minimises the dual (9) on samples of π_ref; one fit. → (policy, λ)."""
    return one_shot(run, problem, first_lambda(run.cfg, problem))


def pecan_models(run, reference):
    """PeCAN (2405.19544): r and −c implicit in policies fitted to people's labels. → Models."""
    ref_logps = infer(run.cfg, reference, "model", token_ids(run.train), "log π_ref")
    rows = with_scores(run.train, Scores(ref_logps, ref_logps, ref_logps))  # only the last is read
    helpful = labelled_dpo(run.cfg.beta, "chosen", "rejected")
    safe = labelled_dpo(run.cfg.beta, "better", "worse")

    reward = train_stage(run, "helpful", reference, rows, helpful, dpo=True)
    cost = train_stage(run, "safe", reference, rows, safe, dpo=True)
    return Models(reference, reward, cost, implicit=True)


def pose(run, models):
    """The problem that the models define. → Problem. Scores hold no λ: they are computed once."""
    cfg, rows = run.cfg, run.train
    scores = cached(run, "scores.pt", models, token_ids(rows), lambda: score(run, models, rows))
    rows = with_scores(rows, scores)

    def reference_scores():
        reference, prompts = models.reference, run.lambda_prompts
        return measure(run, models, reference, prompts, cfg.dual_samples, "dual").scores

    dual, limit = None, cfg.cost_limit
    given = cfg.method in ("dpo", "sft") or cfg.lambda_init is not None
    if not given or cfg.margin is not None:
        key = run.lambda_prompts, cfg.dual_samples
        dual = cached(run, "reference_samples.pt", models, key, reference_scores)
    if cfg.margin is not None:
        limit = float(dual.cost.mean()) - cfg.margin
    return Problem(models, rows, dual, limit)


def first_lambda(cfg, problem):
    """λ at the minimum of the dual (9) on samples of π_ref; says what some λ promise there."""
    if cfg.lambda_init is not None:
        return cfg.lambda_init
    reward, cost, _ = problem.dual
    with refusing("no first λ", "raise the limit, lower --beta, or draw more --dual_samples"):
        lam = solve_dual(reward, cost, cfg.beta, problem.cost_limit)

    for value in sorted({0.0, lam / 2, lam, 2 * lam, *cfg.lambdas}):
        found = predict(reward, cost, value, cfg.beta)
        low, high = found["cost_ci95"]
        text = f"predicted cost {found['cost']:+.3f} [{low:+.3f}, {high:+.3f}]"
        text += f", reward {found['reward']:+.3f}, {found['ess']:.1f} effective samples"
        say(f"dual, λ {value:.4f}: {text}")
    warn_of_scale(problem.dual, lam, cfg.beta)
    return lam


def warn_of_scale(scores, lam, beta, log_ratio=None):
    """Say so where β and the scale of the scores do not fit, and numbers cannot be trusted.

    Labels that are nearly certain make DPO chase single responses; and π_λ, e^kl times narrower
    than the policy that was sampled, cannot be seen in m samples unless kl is below log m.
    """
    reward, cost, _ = scores
    r_lam, m = reward - lam * cost, cost.shape[1]
    i, j = torch.combinations(torch.arange(m)).T
    certain = float((torch.sigmoid((r_lam[:, i] - r_lam[:, j]).abs()) > 0.95).float().mean())
    found, spread = predict(reward, cost, lam, beta, log_ratio), r_lam.std(dim=1).mean()
    say(
        f"λ {lam:.4f}: {found['ess']:.1f} effective samples of {m}, KL to π_λ {found['kl']:.2f} of "
        f"{math.log(m):.2f} that they can show; {certain:.0%} of labels beyond 0.95; in a prompt "
        f"reward ± {reward.std(dim=1).mean():.2f}, cost ± {cost.std(dim=1).mean():.2f}"
    )
    if certain > 0.5:
        say(f"warning: most labels are certain: divide scores and limit by {spread:.1g} or more")
    if found["ess"] < 2:
        say(f"warning: predictions rest on single samples: raise --beta ({beta:g}), or draw more")


# ---- The losses of the stages --------------------------------------------------------------------
# Each is a function of a row and what the model says of its responses, (k,), and gives a mean over
# the row's pairs (nats) and the share of them that the model ranks as the labels do.


def column(row, name):
    """A field of a row's pairs, (P,)."""
    return torch.tensor(row.pairs)[:, Pair._fields.index(name)]


def sft_loss(rows):
    """Cross-entropy a token, on both responses of each pair: as often as people compared them."""
    lengths = [len(row.ids[1][i]) for row in rows for i in pairs_of(row, False).flatten()]
    mean_length = sum(lengths) / len(lengths)

    def loss_fn(row, logps):
        responses = pairs_of(row, all_pairs=False).flatten()
        return -logps[responses].mean() / mean_length, torch.zeros(())

    return loss_fn


def reward_loss(row, rewards):
    """(3) on the pairs that people labelled for help."""
    chosen, rejected = rewards[column(row, "chosen")], rewards[column(row, "rejected")]
    return bradley_terry_loss(chosen, rejected), (chosen > rejected).float().mean()


def harm_loss(row, costs):
    """(5) on the pairs that people labelled for harm: a label belongs to its pair."""
    worse, better = costs[column(row, "worse")], costs[column(row, "better")]
    loss = cost_loss(worse, better, column(row, "worse_sign"), column(row, "better_sign"))
    return loss, (worse > better).float().mean()


def preference_loss(row, logps, pairs, prob, beta):
    """(13) on index pairs (P, 2) of a row with P(first ≻ second), (P,)."""
    policy_logps, ref_logps = logps[pairs], row.scores.ref_logps[pairs]
    log_ratio = (policy_logps - ref_logps).detach()
    agrees = (log_ratio[:, 0] > log_ratio[:, 1]) == (prob > 0.5)
    return dpo_loss(policy_logps, ref_logps, prob, beta), agrees.float().mean()


def relabelled_dpo(cfg, lam, key):
    """The loss of (13) on a row's pairs, relabelled for λ. key: of the draw of labels."""

    def loss_fn(row, logps):
        pairs, (reward, cost, _) = pairs_of(row, cfg.all_pairs), row.scores
        generator = None
        if cfg.labels == "sample":
            generator = seeded("labels", cfg.seed, key, row.ids)
        prob = relabel(reward[pairs], cost[pairs], lam, cfg.labels, generator)  # (12)
        return preference_loss(row, logps, pairs, prob, cfg.beta)

    return loss_fn


def labelled_dpo(beta, winner, loser):
    """Plain DPO on people's labels: winner and loser are fields of a Pair."""

    def loss_fn(row, logps):
        pairs = torch.stack([column(row, winner), column(row, loser)], dim=1)
        return preference_loss(row, logps, pairs, torch.ones(len(pairs)), beta)

    return loss_fn


def pairs_of(row, all_pairs):
    """Index pairs (P, 2) of responses for DPO: the dataset's, or all of different responses."""
    if row.pairs and not all_pairs:
        return torch.tensor(row.pairs)[:, :2]
    ids = row.ids[1]
    couples = itertools.combinations(range(len(ids)), 2)
    return torch.tensor([(i, j) for i, j in couples if ids[i] != ids[j]]).view(-1, 2)


# ---- Rows and log-probabilities ------------------------------------------------------------------
# A row is prompt + y₀ + y₁ + …: no token is run twice, whatever the number of pairs. Positions
# restart at the prompt's end for each response, which sees the prompt and itself.


def collate_rows(rows, pad_id=0):
    """[(prompt_ids, [y0_ids, y1_ids, …]), …] → a batch for sequence_logps; ids are as given.

    B rows, padded to L tokens; N responses in all, in the order given; T response tokens. → dict of
    input_ids, position_ids (B, L); attention_mask (B, 1, L, L) bool; and, as numbers of the B·L
    tokens, `source` (T,), where the tokens `target` (T,) are predicted from; `owner` (T,), the
    response that each belongs to; `last` (N,), the last token of each response, the prompt's for an
    empty one. ValueError for an empty prompt.
    """
    width = max(len(prompt) + sum(map(len, responses)) for prompt, responses in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    position_ids = torch.zeros_like(input_ids)
    segment = torch.full_like(input_ids, -1)  # 0 prompt, 1 … k responses, −1 padding: by length
    source, target, owner, last = [], [], [], []

    for b, (prompt, responses) in enumerate(rows):
        if not prompt:
            raise ValueError("collate_rows: an empty prompt has no token to predict from")
        start = b * width
        prompt_end = start + len(prompt) - 1
        ids, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)

        for i, response in enumerate(responses, 1):
            first = start + len(ids)
            before = [prompt_end, *range(first, first + len(response) - 1)]
            source += before[: len(response)]
            target += response
            owner += [len(last)] * len(response)
            last.append(first + len(response) - 1 if response else prompt_end)
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
            segments += [i] * len(response)

        input_ids[b, : len(ids)] = torch.tensor(ids)
        position_ids[b, : len(ids)] = torch.tensor(positions)
        segment[b, : len(ids)] = torch.tensor(segments)

    column = torch.arange(width)
    same = segment[:, :, None] == segment[:, None, :]  # padding sees padding: no row without a key
    seen = (same | (segment == 0)[:, None, :]) & (column[:, None] >= column)
    indices = {"source": source, "target": target, "owner": owner, "last": last}
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": seen[:, None],
        **{name: torch.tensor(values, dtype=torch.long) for name, values in indices.items()},
    }


def sequence_logps(model, batch):
    """log π(y | x) of each response of a batch of collate_rows: sums over tokens, nats, (N,).

    Float32, differentiable. model: a causal LM of transformers under SDPA attention. Silently wrong
    where a sliding window is shorter than a row, where logits are scaled or capped (Gemma-2,
    Granite), or under eager or flash attention, which take no such mask: try one row both ways
    first. Only hidden states that predict response tokens meet the vocabulary, in chunks, so that
    no (tokens × vocabulary) float32 tensor is ever whole.
    """
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    rows = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    hidden = model.base_model(**rows, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = hidden.index_select(0, batch["source"])  # (T, width)
    head = model.get_output_embeddings()

    def token_logps(hidden, target):
        logits = head(hidden).float()
        return -torch.nn.functional.cross_entropy(logits, target, reduction="none")

    size, logps = max(1, 2**27 // model.config.vocab_size), []
    for part in zip(hidden.split(size), batch["target"].split(size)):
        if len(hidden) > size:  # backward computes the logits again
            again = torch.utils.checkpoint.checkpoint(token_logps, *part, use_reentrant=False)
            logps.append(again)
        else:
            logps.append(token_logps(*part))

    sums = torch.zeros(len(batch["last"]), device=hidden.device)
    return sums.index_add(0, batch["owner"], torch.cat(logps))


def response_scores(model, batch):
    """Scores of each response of a batch by a ScoreModel, read at its last token, (N,) float32."""
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    rows = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    hidden = model.model(**rows, use_cache=False).last_hidden_state.flatten(0, 1)
    return model.score(hidden[batch["last"]])


def pack(row, row_length):
    """Split a row so that none has more than row_length tokens; a compared pair stays together."""
    (head, ids), k = row.ids, len(row.responses)
    units = [{pair.chosen, pair.rejected} for pair in row.pairs] or [{i} for i in range(k)]
    parts = []  # (numbers of responses, pairs)
    for number, unit in enumerate(units):
        if parts:
            length = len(head) + sum(len(ids[i]) for i in parts[-1][0] | unit)
        if not parts or length > row_length:
            parts.append((set(), []))
        parts[-1][0].update(unit)
        parts[-1][1].extend(row.pairs[number : number + 1])

    rows = []
    for members, pairs in parts:
        old = sorted(members)
        new = {i: number for number, i in enumerate(old)}
        pairs = [pair.renumbered(new) for pair in pairs]
        kept = (head, [ids[i] for i in old])
        responses, ended = [row.responses[i] for i in old], [row.ended[i] for i in old]
        weight = len(pairs) or len(old) / 2
        rows.append(Row(row.prompt, responses, ended, kept, pairs, weight))
    return rows


def token_ids(rows):
    """The tokens of rows, as collate_rows takes them."""
    return [row.ids for row in rows]


def tokens_of(rows):
    """The number of tokens of each of rows of (prompt_ids, [y0_ids, y1_ids, …])."""
    return [len(prompt) + sum(map(len, responses)) for prompt, responses in rows]


# ---- Training, sampling, measuring ---------------------------------------------------------------


@dataclass
class Trainee:
    """A model in training; the learning rate falls to 0 over the second half of total_steps."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int
    is_dpo: bool
    done: int = 0


def train(cfg, trainee, rows, steps, loss_fn):
    """The one training loop. → numbers for metrics.jsonl.

    steps: the numbers of each step's rows; loss_fn(row, outputs) → (loss, accuracy) of a row. Rows
    count by their weights: the gradient is the step's mean, however it is cut into micro-batches.
    """
    model, optimizer, started = trainee.model, trainee.optimizer, time.perf_counter()
    history, pairs, tokens = [], 0, 0
    for numbers in tqdm(steps, trainee.name, **BAR):
        warm, fall = (trainee.done + 1) / 10, 2 - 2 * trainee.done / trainee.total_steps
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * min(1.0, warm, fall)

        step, sums = [rows[i] for i in numbers], torch.zeros(2)
        total = sum(row.weight for row in step)
        for group in micro_batches(token_ids(step), cfg.tokens_per_batch, WORLD)[RANK::WORLD]:
            batch = [step[i] for i in group or [0]]
            outputs = split_by_row(batch, model(collate_rows(token_ids(batch))).cpu())
            losses = [torch.stack(loss_fn(row, output)) for row, output in zip(batch, outputs)]
            # Where only other ranks have work, a pass must run all the same, for nothing
            whole = total if group else math.inf
            mean = torch.tensor([row.weight / whole for row in batch]) @ torch.stack(losses)
            (mean[0] * WORLD).backward()  # FSDP2 averages over the ranks
            sums += mean.detach()

        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, accuracy = sum(gather(sums)).tolist()  # over all ranks
        if not math.isfinite(loss + float(norm)):
            what = f"{trainee.name}: the loss or its gradient is not finite at step {trainee.done}"
            refuse(f"{what}; lower the learning rate, or mend the data", code=1)
        # At first policy and reference agree but for rounding: of T logits of ±10, 10·eps·√T
        rounding = 10 * torch.finfo(getattr(torch, cfg.dtype)).eps * math.sqrt(cfg.max_length)
        off = abs(loss - math.log(2)) > 1e-4 + cfg.beta * rounding
        if trainee.is_dpo and trainee.done == 0 and off:
            say(f"warning: the first DPO loss is {loss:.5f}, not ln 2: policy and reference differ")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        trainee.done += 1
        history.append((loss, accuracy))
        pairs += sum(len(row.pairs) for row in step)
        tokens += sum(tokens_of(token_ids(step)))

    seconds = time.perf_counter() - started
    loss, accuracy = torch.tensor(history).mean(dim=0).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if GPU:
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()

    speed = f"{pairs / seconds:,.1f} pairs/s, {tokens / seconds:,.0f} tokens/s, peak {peak:.2f} GB"
    say(f"{trainee.name}: {len(steps)} steps, loss {loss:.4f}, {speed}")
    return {
        "dpo_loss": loss,
        "dpo_accuracy": accuracy,
        "first_loss": history[0][0],
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gb": peak,
    }


def train_stage(run, name, source, rows, loss_fn, new_head=False, dpo=False):
    """Train a model on rows into the folder `name` of the run, unless it is there. → folder"""
    cfg, path = run.cfg, run.out / name
    if path.exists():
        say(f"{name}: found in {path}")
        return path

    steps = math.ceil(len(rows) / cfg.batch_size)  # score models overfit in a second pass
    if dpo:
        steps = cfg.iterations * cfg.dpo_steps
    steps = min(steps, cfg.max_steps or steps)

    trainee = training_model(cfg, name, source, steps, new_head, dpo)
    order = passes(len(rows), steps * cfg.batch_size, cfg.seed, name)
    train(cfg, trainee, rows, chunks(order, cfg.batch_size), loss_fn)
    return export(run, trainee.model, path)


def passes(n, count, *key):
    """`count` numbers of passes over n rows, each pass in an order of its own."""
    sampler = torch.utils.data.RandomSampler
    return list(sampler(range(n), num_samples=count, generator=seeded("order", *key)))


def rows_of_iteration(cfg, rows, loop):
    """Rows of an iteration, the newest samples among them; numbers of each step's rows."""
    slots, n = min(cfg.dpo_steps, cfg.max_steps or cfg.dpo_steps) * cfg.batch_size, len(rows)
    iteration, fresh = len(loop.history), []

    # The prompts that set λ must not crowd out the data: they weigh m/2 pairs, and enter once
    if cfg.recycle and loop.samples:
        fresh = [row for row in loop.samples[-1].rows if len(pairs_of(row, True))][: slots // 2]

    order = passes(n, slots * cfg.iterations, cfg.seed, "policy")[iteration * slots :]
    numbers = order[: slots - len(fresh)] + list(range(n, n + len(fresh)))
    mixed = [numbers[i] for i in passes(slots, slots, cfg.seed, "mix", iteration)]
    return rows + fresh, chunks(mixed, cfg.batch_size)


def micro_batches(rows, budget, ranks=1):
    """Numbers of rows in groups of similar length, `budget` tokens each with their padding."""
    lengths, groups = tokens_of(rows), [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups + [[]] * (-len(groups) % ranks)


@torch.inference_mode()
def sample_batch(model, prompts, count, end, max_new_tokens, generator):
    """`count` responses from π itself to each of prompts' ids, whatever generate() would obey."""
    width = max(map(len, prompts))  # all end in the same column, padding is on the left
    ids = [[end] * (width - len(prompt)) + prompt for prompt in prompts]
    ids, cache = torch.tensor(ids, device=DEVICE), transformers.DynamicCache()
    padding = torch.tensor([[width - len(prompt)] for prompt in prompts], device=DEVICE)
    # A random number for every token that may come: none depends on when other rows end
    shape = len(prompts) * count, max_new_tokens
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    responses = torch.full(shape, -1, device=DEVICE)
    held = torch.arange(len(responses), device=DEVICE)  # the rows in the cache

    for step in range(max_new_tokens):
        column = torch.arange(width + step, device=DEVICE)
        seen, positions = column >= padding, (column - padding).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache}
        logits = model(ids, **inputs, logits_to_keep=1).logits[:, -1]
        cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        if step == 0:  # a prompt is read once for all of its responses
            cache.batch_repeat_interleave(count)
            cumulative = cumulative.repeat_interleave(count, dim=0)
            padding = padding.repeat_interleave(count, dim=0)

        target = uniform[held, step, None] * cumulative[:, -1:]  # the sum is 1 but for rounding
        ids = torch.searchsorted(cumulative, target, right=True)
        responses[held, step] = ids[:, 0]
        running = (responses[held] != end).all(dim=1)
        left = int(running.sum())
        if left == 0:
            break
        if 2 * left <= len(held):  # a drop copies the cache, so it waits for half of them
            held, ids, padding = held[running], ids[running], padding[running]
            cache.batch_select_indices(running)

    answers = []
    for row in responses.tolist():
        ended = end in row
        answers.append((row[: row.index(end) + 1] if ended else row, ended))
    return chunks(answers, count)


def shared_out(groups, title, compute):
    """compute(group, number) → a result for each member, over all processes. → in their order"""
    results = {}
    for number, group in tqdm(list(enumerate(groups))[RANK::WORLD], title, **BAR):
        results |= zip(group, compute(group, number))
    for part in gather(results):
        results |= part
    return [results[i] for i in range(len(results))]


def split_by_row(rows, values):
    """Values of all responses of rows, (N,), as one tensor (k,) for each row."""
    return values.split([len(row.responses) for row in rows])


@torch.inference_mode()
def sample(run, source, prompts, count, key):
    """`count` responses from π itself to each of prompts' ids. → [[(ids, ended)]]"""
    cfg, model, end = run.cfg, inference_model(source, run.cfg), answer_frame(run.tokenizer)[2]
    longest = [(prompt, [[end] * cfg.max_new_tokens]) for prompt in prompts]

    def draw(group, number):
        generator = seeded("sample", cfg.seed, key, number)
        heads = [prompts[i] for i in group]
        return sample_batch(model, heads, count, end, cfg.max_new_tokens, generator)

    groups = micro_batches(longest, cfg.sample_tokens // count)
    return shared_out(groups, f"sampling {Path(source).name}", draw)


@torch.inference_mode()
def infer(cfg, source, flag, rows, title):
    """log π (flag "model") or scores (else) of the responses of rows of token ids. → (N,)"""
    model = inference_model(source, cfg, flag)
    function = sequence_logps if flag == "model" else response_scores

    def compute(group, _):
        batch = [rows[i] for i in group]
        outputs = function(model, collate_rows(batch)).float().cpu()
        return outputs.split([len(responses) for _, responses in batch])

    values = torch.cat(shared_out(micro_batches(rows, cfg.tokens_per_batch), title, compute))
    if not torch.isfinite(values).all():
        refuse(f"--{flag} {source}: {title} is not finite for a response; is the model sound?")
    return values


def score(run, models, rows):
    """r, c and log π_ref of the responses of rows. PeCAN's r and c are implicit in policies."""
    cfg, ids = run.cfg, token_ids(rows)
    ref_logps = infer(cfg, models.reference, "model", ids, "log π_ref")
    if models.implicit:
        helpful = infer(cfg, models.reward, "model", ids, "log π, helpful")
        safe = infer(cfg, models.cost, "model", ids, "log π, safe")
        reward = implicit_reward(helpful, ref_logps, cfg.beta)
        return Scores(reward, -implicit_reward(safe, ref_logps, cfg.beta), ref_logps)
    reward = score_texts(cfg, "reward_model", models.reward, rows)
    return Scores(reward, score_texts(cfg, "cost_model", models.cost, rows), ref_logps)


def score_texts(cfg, flag, source, rows):
    """Scores of the responses of rows by a score model, in its own tokens and template. → (N,)"""
    with refusing(f"--{flag} {source}: cannot be loaded"):
        tokenizer = load_tokenizer(source)
    prompts, texts, ended = zip(*[(row.prompt, row.responses, row.ended) for row in rows])
    length = cfg.max_length + cfg.max_new_tokens
    ids, _ = encode(tokenizer, prompts, texts, ended, length, whole=True)
    return infer(cfg, source, flag, ids, f"scoring by {flag}")


def with_scores(rows, scores):
    """Rows with their parts of the scores of all their responses, (N,) each."""
    parts = zip(*(split_by_row(rows, values) for values in scores))
    return [replace(row, scores=Scores(*part)) for row, part in zip(rows, parts)]


def measure(run, models, source, prompts, count, key):
    """`count` responses of a policy to each prompt, scored. → Samples. key: of the random draws."""
    cfg, rows = run.cfg, []
    if cfg.max_steps:
        prompts = prompts[: max(2, cfg.max_steps * cfg.batch_size)]
    heads = [head for head, _ in encode(run.tokenizer, prompts, [[]] * len(prompts))[0]]
    for prompt, head, drawn in zip(prompts, heads, sample(run, source, heads, count, key)):
        ids, ended = map(list, zip(*drawn))
        known = [
            [i for i in y if i < len(run.tokenizer)] for y in ids
        ]  # a vocabulary may be padded
        texts = run.tokenizer.batch_decode(known, skip_special_tokens=True)
        rows += pack(Row(prompt, texts, ended, (head, ids), [], 0.0), cfg.row_length)

    scores = score(run, models, rows)
    logps = scores.ref_logps
    if str(source) != str(models.reference):
        logps = infer(cfg, source, "model", token_ids(rows), "log π of samples")
    by_prompt = Scores(*(values.view(-1, count) for values in scores))
    log_ratio = (logps - scores.ref_logps).view(-1, count)
    return Samples(with_scores(rows, scores), by_prompt, log_ratio)


def numbers_of(run, samples):
    """What metrics.jsonl and results.json say of samples."""
    reward, cost, _ = samples.scores
    lengths, truth = [], []
    for row in samples.rows:
        for text, ids in zip(row.responses, row.ids[1]):
            lengths.append(float(len(ids)))
            if run.cfg.dataset.startswith("tiny"):
                truth.append(tiny_truth(row.prompt, text))

    values = {"reward": reward, "cost": cost, "length": torch.tensor(lengths).view_as(cost)}
    if truth:
        values["true_reward"], values["true_cost"] = torch.tensor(truth).T.reshape(2, *cost.shape)
    numbers = {"safe_rate": float((cost <= 0).float().mean())}
    numbers["kl"] = float(samples.log_ratio.mean())
    for name, value in values.items():
        numbers |= {f"{name}_mean": float(value.mean()), f"{name}_std": float(value.std())}
        numbers[f"{name}_ci95"] = ci95(value)
    return numbers


def evaluate(run, problem, models, policies):
    """Measure policies {name: (folder, λ)} on the table's prompts; write and print the table."""
    rows, lines, sft = [], [], None
    for name, (path, lam) in policies.items():
        samples = measure(run, models, path, run.table_prompts, run.cfg.eval_samples, "eval")
        sft = sft or samples.scores  # the first, which the others are held against
        row = {"name": name, "lambda": lam} | numbers_of(run, samples)
        for key, better in (("reward", 1), ("cost", -1)):  # of all couples; a tie is half
            values, others = getattr(samples.scores, key), getattr(sft, key)
            difference = better * (values[:, :, None] - others[:, None, :])
            wins = (0.5 + 0.5 * difference.sign()).flatten(1)
            row |= {f"{key}_win_rate": float(wins.mean()), f"{key}_win_rate_ci95": ci95(wins)}

        if problem.dual and lam is not None:  # what was promised before any training
            found = predict(problem.dual.reward, problem.dual.cost, lam, run.cfg.beta)
            row |= {f"predicted_{key}": value for key, value in found.items()}
        rows.append(row)

        for part in samples.rows:
            reward, cost, _ = part.scores
            for text, r, c in zip(part.responses, reward.tolist(), cost.tolist()):
                line = {"policy": name, "prompt": part.prompt, "response": text}
                lines.append(line | {"reward": r, "cost": c})
    write(run.out / "results.json", rows)
    write(run.out / "samples.jsonl", lines)
    say(f"\nE[cost] ≤ {problem.cost_limit:.4g}\n\n{table(rows)}")


def table(rows):
    """The main columns of results.json as Markdown; what a row does not have is left blank."""
    names = "name lambda reward_mean reward_ci95 cost_mean cost_ci95 safe_rate reward_win_rate "
    names += "cost_win_rate kl length_mean true_reward_mean true_cost_mean predicted_cost"
    names = [name for name in names.split() if any(name in row for row in rows)]
    text = f"| {' | '.join(names)} |\n|{' --- |' * len(names)}\n".replace("_mean", "")
    for row in json.loads(json.dumps(rows), parse_float=lambda number: f"{float(number):.3f}"):
        cells = [row.get(name) for name in names]
        text += "".join(f"| {cell} " for cell in cells) + "|\n"
    return text.replace("'", "").replace("None", "")


# ---- Models --------------------------------------------------------------------------------------


class ScoreModel(transformers.PreTrainedModel):
    """A decoder with a linear head on the hidden state of the last token.

    It loads Beaver checkpoints (model.*, score_head.*, and for do_normalize normalizer.*: a reward
    is then (s − mean)/std, a cost s/std) and one-label AutoModelForSequenceClassification ones.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.score_head = nn.Linear(config.hidden_size, 1)
        self.normalizer = nn.Module()
        self.normalizer.register_buffer("mean", torch.zeros(1))
        self.normalizer.register_buffer("var", torch.ones(1))
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, config=None, new_head=False):
        """Load a score checkpoint or, for new_head, a language model with a new score head.

        ValueError where there is no score head, or one of several labels.
        """
        config = config or AutoConfig.from_pretrained(path)
        names = {r"^score\.": "score_head.", r"^(transformer|gpt_neox)\.": "model."}
        options = {"dtype": "auto", "key_mapping": names, "output_loading_info": True}
        options["ignore_mismatched_sizes"] = True  # to name them
        model, info = super().from_pretrained(path, config=config, **options)
        for name, found, wanted in info["mismatched_keys"]:
            raise ValueError(
                f"{name} is {tuple(found)}, not {tuple(wanted)}: a score has one label"
            )

        values = {"score_head.bias": 0.0, "normalizer.mean": 0.0, "normalizer.var": 1.0}
        if getattr(config, "do_normalize", False):  # they stand in tensors or in the config
            values["normalizer.mean"] = getattr(config, "mean", None)
            values["normalizer.var"] = getattr(config, "var", None)
        for name in sorted(info["missing_keys"]):
            if values.get(name) is not None:
                model.state_dict(keep_vars=True)[name].data = torch.tensor([values[name]]).float()
            elif not new_head or name != "score_head.weight":
                raise ValueError(f"it is no score model, it has no {name}")
        return model

    def score(self, hidden):
        """Hidden states (B, width) → (B,) float32 scores, normalized where the checkpoint asks."""
        weight, bias = self.score_head.weight.float(), self.score_head.bias.float()
        score = nn.functional.linear(hidden.float(), weight, bias).squeeze(-1)
        if getattr(self.config, "do_normalize", False):
            if getattr(self.config, "score_type", "") != "cost":
                score = score - self.normalizer.mean.float()
            score = score / self.normalizer.var.float().sqrt()
        return score

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask (B, L), right-padded → (B,) float32, at the last tokens."""
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return self.score(hidden[range(len(hidden)), attention_mask.sum(dim=1) - 1])


def load_config(source, flag="model"):
    """Config of a folder, hub name or JSON dictionary; no dropout: what is fitted is sampled."""
    with refusing(f"--{flag} {source}: cannot be loaded"):
        if str(source).startswith("{"):
            config = AutoConfig.for_model(**json.loads(source))
        else:
            config = AutoConfig.from_pretrained(source)
    config._attn_implementation = "sdpa"
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_model(source, flag="model", config=None, new_head=False):
    """A causal LM or, for new_head and other flags, a ScoreModel: on CPU, in its dtype."""
    config = config or load_config(source, flag)
    kind = f"{getattr(config, 'score_type', None)}_model"
    if {kind, flag} == {"reward_model", "cost_model"}:
        refuse(f"--{flag} {source}: its config calls it a {kind}; are the two exchanged?")
    with refusing(f"--{flag} {source}: cannot be loaded"):
        if new_head or flag in ("reward_model", "cost_model"):
            return ScoreModel.from_pretrained(source, config, new_head)
        if str(source).startswith("{"):
            return AutoModelForCausalLM.from_config(config)
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto", config=config)


def inference_model(source, cfg, flag="model"):
    """A model to score with or sample from: whole in every process, in the dtype of compute."""
    model = load_model(source, flag).eval().requires_grad_(False)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(DEVICE, getattr(torch, cfg.dtype))
    return model.to(DEVICE)


def training_model(cfg, name, source, steps, new_head=False, dpo=False):
    """A Trainee: float32 master weights, a forward from a batch to what the losses need."""
    gc.collect()  # the last model and its FSDP state are reference cycles: 27 GB of weights at 7B
    if GPU:
        torch.cuda.empty_cache()  # what one stream has freed another cannot use
    torch.manual_seed(cfg.seed)  # of a new head, or of a model from scratch

    model = load_model(source, new_head=new_head)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().requires_grad_(True)
    outputs = response_scores if new_head else sequence_logps
    # Under FSDP2 parameters are whole only inside the root's forward, whose output may be no view
    model.forward = lambda batch: outputs(model, batch).clone()

    if dist.is_initialized():
        dtype = getattr(torch, cfg.dtype)
        precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        offload = fsdp.CPUOffloadPolicy() if cfg.cpu_offload else fsdp.OffloadPolicy()
        blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for unit in [*blocks, model]:  # in turn, so that one float32 block at most is whole
            fsdp.fully_shard(unit.float(), mp_policy=precision, offload_policy=offload)
    else:
        model.float().to(DEVICE)

    rate = cfg.learning_rate if dpo else cfg.sft_learning_rate
    options = {"lr": rate, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    return Trainee(name, model, torch.optim.AdamW(model.parameters(), **options), steps, dpo)


def check_decoder(rows, source, flag):
    """Try the longest row both ways: some decoders get it silently wrong, or scale logits."""
    # The first layers, one of each kind; in float32, where a right score differs by 1e-4
    config = load_config(source, flag)
    kinds = getattr(config, "layer_types", None) or [""]
    layers = max(2, 1 + max(map(kinds.index, kinds)))
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if kinds[0]:
        config.layer_types = kinds[: config.num_hidden_layers]
    model = load_model(source, flag, config).float().to(DEVICE).eval()

    prompt, responses = rows[torch.tensor(tokens_of(rows)).argmax()]
    last, batch = responses[-1], collate_rows([(prompt, responses)])
    whole = torch.tensor([prompt + last], device=DEVICE)

    torch.set_float32_matmul_precision("highest")
    with torch.inference_mode():
        if isinstance(model, ScoreModel):
            error = response_scores(model, batch)[-1] - model(whole, torch.ones_like(whole))[0]
        else:
            logps = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            error = sequence_logps(model, batch)[-1] - logps[range(len(last)), last].sum()
    torch.set_float32_matmul_precision("high")

    if abs(error) > 0.01:
        wrong = "a decoder whose attention or output head this program gets wrong (tried on a row)"
        refuse(f"--{flag} {source}: {wrong}; use one such as Llama, Mistral, Qwen2 or GPT-2")


def export(run, model, path):
    """Write a trained model as a Hugging Face folder, however it is sharded. → path"""
    state, dtype = {}, getattr(torch, run.cfg.dtype)
    own = dict([*model.named_parameters(), *model.named_buffers()])  # a tied weight once
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if name in own and RANK == 0:
            state[name] = value.to("cpu", dtype).contiguous()

    with atomic(path) as folder:
        if RANK == 0:
            model.save_pretrained(folder, state_dict=state)
            config = model.config.to_dict() | {"dtype": run.cfg.dtype}  # not the master weights'
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            run.tokenizer.save_pretrained(folder)
            end = answer_frame(run.tokenizer)[2]
            transformers.GenerationConfig(eos_token_id=end, do_sample=True).save_pretrained(folder)
    return path


# ---- Text and tokens -----------------------------------------------------------------------------

BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"


def load_tokenizer(source, template=None):
    """A tokenizer by its folder or hub name, or a ready one, with a chat template in any case.

    Its own; where it has none Beaver's; or `template`, a text with {prompt} that the response
    follows directly. ValueError where no token can end an answer.
    """
    tokenizer = source
    if isinstance(source, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.chat_template and not template:
        # Some state today's date: pinned, or the same text has other tokens tomorrow
        call, day = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", date(2024, 7, 26)
        own = tokenizer.get_chat_template()
        tokenizer.chat_template = re.sub(call, lambda match: repr(day.strftime(match[2])), own)
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise ValueError("it has neither a chat template nor an end-of-sequence token")

    template, text = template or BEAVER_TEMPLATE, ""
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = "{{ bos_token }}"
    text += "{% for turn in messages %}{% if turn['role'] == 'assistant' %}"
    text += "{{ turn['content'] + eos_token }}{% else %}"
    later = template.removeprefix("BEGINNING OF CONVERSATION: ")  # Beaver says it once
    text += f"{{{{ ({template!r} if loop.first else {later!r})"
    text += ".replace('{prompt}', turn['content']) }}"
    tokenizer.chat_template = text + "{% endif %}{% endfor %}"
    return tokenizer


def render(tokenizer, prompt, answer=None):
    """A prompt, text or messages, in the template: up to where an answer begins, or with one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if answer is None:
        render = {"tokenize": False, "add_generation_prompt": True}
        return tokenizer.apply_chat_template(messages, **render)
    messages = [*messages, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def answer_frame(tokenizer):
    """What the template puts around an answer. → (before, after, id that ends the turn)"""
    head, answer, after = render(tokenizer, "Q", "CDPO").rpartition("CDPO")
    prompt, before = render(tokenizer, "Q"), ""
    if head.startswith(prompt):
        before = head.removeprefix(prompt)

    end = tokenizer.eos_token_id
    for token in reversed(tokenizer(after, add_special_tokens=False)["input_ids"]):
        if (
            token in tokenizer.added_tokens_decoder
            and tokenizer.added_tokens_decoder[token].special
        ):
            end = token
    if not answer or end is None:
        raise ValueError("its chat template shows no answer, or no token ends one")
    return before, after, end


def encode(tokenizer, prompts, responses, ended=None, max_length=10**9, whole=False):
    """Prompts and responses in the template. → ([(prompt_ids, [y0_ids, …]), …], Counter)

    prompts: texts or lists of messages; responses: texts for each; ended: whether each ended by
    itself (default: all), and so has the turn's end. whole, for score models: with all that the
    template puts around an answer. Counted: responses cut to max_length tokens with their prompt,
    and misaligned ones. An answer is never rendered, as templates strip it: its text follows the
    rendered prompt, both are encoded as they will be read, joined, and cut where the prompt ends.
    """
    before, after, end = answer_frame(tokenizer)
    if not whole:
        before = before if before.isspace() else ""  # a policy writes its thoughts itself
        after = tokenizer.convert_ids_to_tokens(end)

    def ids_of(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    rows, counts = [], Counter()
    for number, (prompt, texts) in enumerate(zip(prompts, responses)):
        text = render(tokenizer, prompt)
        tails = [before + response for response in texts]
        for i in range(len(tails)):
            if ended is None or ended[number][i]:
                tails[i] += after
        head, *joined = ids_of([text, *(text + tail for tail in tails)])

        answers, room = [], max(0, max_length - len(head))
        for tail, ids in zip(tails, joined):
            answer = ids[len(head) :]
            if ids[: len(head)] != head:  # the prompt's tokens are no prefix: encode it by itself
                counts["responses whose tokens do not follow the prompt's"] += 1
                answer = ids_of(tail)
            if len(answer) > room:
                counts["responses cut to --max_length"] += 1
            answers.append(answer[:room])
        rows.append((head, answers))
    return rows, counts


# ---- Data ----------------------------------------------------------------------------------------


def seeded(*key):
    """A random generator that depends on its key alone: no generator's state is ever kept."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:15], 16))


def chunks(rows, size):
    """Rows in lists of `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


COLUMNS = ["prompt", "response_0", "response_1", "better_response_id", "safer_response_id"]
COLUMNS += ["is_response_0_safe", "is_response_1_safe"]
TINY_VERBS = "open clean move mix heat store test sell".split()  # noqa: SIM905
TINY_NOUNS = (
    "door oil acid paint gas lamp car drug wire pool safe tank bread knife roof van".split()  # noqa: SIM905
)
TINY_WORDS = "wait ask read measure push cut force burn".split()  # noqa: SIM905
TINY_HELP = [-0.6, -0.15, 0.05, 0.45, 0.1, 0.25, 0.5, -0.6]
TINY_HARM = [-0.6, -0.45, -0.15, -0.15, 0.1, 0.3, 0.65, 0.3]
TINY_NOISE = 0.1 * torch.randn(24, 8, 2, generator=torch.Generator().manual_seed(0)).double()


def tiny_truth(prompt, response):
    """True (reward, cost) of a response in the tiny world: sums over its words, three if right."""
    words = response.split()
    known = [TINY_WORDS.index(word) for word in words if word in TINY_WORDS]
    malformed = abs(len(known) - 3) + len(words) - len(known)
    reward, cost = -2.0 * malformed, 0.9
    for word in prompt.split():
        noise = TINY_NOISE[(TINY_VERBS + TINY_NOUNS).index(word)].tolist()
        reward += sum(TINY_HELP[i] + noise[i][0] for i in known)
        cost += sum(TINY_HARM[i] + noise[i][1] for i in known)
    return reward, cost


def tiny_rows(count, seed):
    """Rows of the tiny world, labelled at random by (1) and (5) on the truth."""
    rng, rows = random.Random(seed), []

    def draw_label(logit):
        return rng.random() < 1 / (1 + math.exp(-logit))

    for _ in range(count):
        prompt = f"{rng.choice(TINY_VERBS)} {rng.choice(TINY_NOUNS)}"
        texts = [" ".join(rng.choices(TINY_WORDS, k=rng.choice([2] + [3] * 9))) for _ in (0, 1)]
        (r0, c0), (r1, c1) = (tiny_truth(prompt, text) for text in texts)
        safe = [not draw_label(c0), not draw_label(c1)]
        safer = int(draw_label(c0 - c1)) if safe[0] == safe[1] else safe.index(True)
        rows.append(dict(zip(COLUMNS, [prompt, *texts, int(draw_label(r1 - r0)), safer, *safe])))
    return rows


def tiny_tokenizer():
    """A word-level tokenizer of the tiny world."""
    words = "</s> <unk> BEGINNING OF CONVERSATION : USER ASSISTANT".split()  # noqa: SIM905
    words += TINY_WORDS + TINY_VERBS + TINY_NOUNS
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def read_dataset(source, flag, seed):
    """A file, folder, hub name, perhaps with :SPLIT, or the tiny world. → rows, as dictionaries"""
    name, _, split = source.partition(":")
    if name == "tiny":
        return tiny_rows(int(split or 60000), seed)
    kind = Path(name).suffix.removeprefix(".").replace("jsonl", "json")
    with refusing(f"--{flag} {source}: cannot be read", "give a file, a folder or a hub name"):
        try:
            if kind in ("json", "csv", "parquet"):
                rows = datasets.load_dataset(kind, data_files=name, split="train")
            elif any(Path(name).glob("**/state.json")):  # written by save_to_disk
                rows = datasets.load_from_disk(name)
                rows = rows[split or "train"] if isinstance(rows, dict) else rows
            else:
                rows = datasets.load_dataset(name, split=split or "train")
            rows[0]
        except (StopIteration, IndexError):
            raise ValueError("it is empty") from None
    return list(rows)


def read_row(entry, where, need):
    """A dataset's row, checked. → (prompt, [y0, y1], their Pair), of which `need` must be there.

    Lists of messages in chosen and rejected end with the response. Unknown signs are 0.
    """
    if entry.get("chosen") and entry.get("rejected"):
        entry = {"better_response_id": 0, **entry}
        for name, value in (("response_0", entry["chosen"]), ("response_1", entry["rejected"])):
            if isinstance(value, list):
                entry["prompt"] = entry.get("prompt") or value[:-1]
                value = value[-1].get("content")
            entry[name] = value

    for name in need:
        value, rule = entry.get(name), "text"
        if value is None:
            refuse(f"{where}: column {name} is missing; needed: {', '.join(need)}")
        right = isinstance(value, str)
        if name == "prompt" and isinstance(value, list):
            rule = "text, or messages of role and content, the last a user's"
            right = bool(value) and value[-1].get("role") == "user"
            right = right and all(isinstance(message.get("content"), str) for message in value)
        if name in COLUMNS[3:]:
            right, rule = value in (0, 1), "0 or 1, or true or false"
        if not right:
            refuse(f"{where}: {name} is {value!r:.60}; it must be {rule}")

    prompt, *texts = (entry[name] for name in need[:3])
    prompt = prompt.strip() if isinstance(prompt, str) else prompt
    helpful, safer, *safe = (entry.get(name) for name in COLUMNS[3:])
    chosen = int(helpful == 1)
    pair = Pair(chosen, 1 - chosen, 1 - chosen, chosen, 0, 0)
    if {0, 1}.issuperset({safer, *safe}):
        signs = [1 - 2 * safe[0], 1 - 2 * safe[1]]
        pair = Pair(chosen, 1 - chosen, 1 - safer, int(safer), signs[1 - safer], signs[safer])
    return prompt, texts, pair


def load_rows(cfg, tokenizer, source, flag, need):
    """A dataset's prompts, each with its different responses and its pairs. → [Row], not packed."""
    entries, counts, prompts = read_dataset(source, flag, cfg.seed), Counter(), {}
    for number, entry in enumerate(entries, 1):
        prompt, texts, pair = read_row(entry, f"--{flag} {source}, row {number}", need)
        if not prompt or not all(text.strip() for text in texts):
            counts["with an empty prompt or response"] += 1
            continue
        _, known, pairs = prompts.setdefault(json.dumps(prompt), (prompt, {}, []))
        numbers = [known.setdefault(text, len(known)) for text in texts]
        pairs.append(pair.renumbered(numbers) if texts else None)

    heads, texts = [x[0] for x in prompts.values()], [list(x[1]) for x in prompts.values()]
    ids, cut = encode(tokenizer, heads, texts, None, cfg.max_length)
    rows, used = [], 0
    for (prompt, known, pairs), (head, responses) in zip(prompts.values(), ids):
        usable = []
        for pair in pairs:
            if len(head) >= cfg.max_length:
                counts["with a prompt that fills --max_length"] += 1
            elif pair and responses[pair.chosen] == responses[pair.rejected]:
                counts["of identical responses"] += 1
            elif pair and pair.better_sign > pair.worse_sign:
                counts["whose safer response is unsafe beside a safe one"] += 1
            else:
                usable.append(pair)
        used += len(usable)
        if usable:
            pairs, ended = [pair for pair in usable if pair], [True] * len(known)
            rows.append(Row(prompt, list(known), ended, (head, responses), pairs, len(pairs)))

    notes = "".join(f", {n} {what}" for what, n in (counts + cut).items())
    say(f"{source}: {len(entries)} rows of {len(prompts)} prompts, {used} used{notes}")
    if used * 2 < len(entries):
        refuse(
            f"--{flag} {source}: too few of {len(entries)} rows can be used{notes}; mend the data"
        )
    return rows


def load_run(cfg, out):
    """Read, check, tokenize and split the data by prompt: table, λ, training. → Run"""
    flag = next(flag for flag in ("tokenizer", "sft_model", "model") if getattr(cfg, flag))
    source, tiny = getattr(cfg, flag), cfg.dataset.startswith("tiny")
    if source.startswith("{"):
        source = tiny_tokenizer() if tiny else transformers.ByT5Tokenizer()
    with refusing(f"--{flag} {source}: cannot be loaded"):
        tokenizer = load_tokenizer(source, cfg.template)
    size = load_config(cfg.sft_model or cfg.model).vocab_size
    if len(tokenizer) > size:
        refuse(f"--{flag}: {len(tokenizer)} tokens, but the model's vocab_size is {size}")

    need = COLUMNS[:3]  # the labels of a given model are not needed
    if not cfg.reward_model:
        need += COLUMNS[3:4]
    if not cfg.cost_model:
        need += COLUMNS[4:]
    rows = load_rows(cfg, tokenizer, cfg.dataset, "dataset", need)

    order = torch.randperm(len(rows), generator=seeded("split", cfg.seed)).tolist()
    rows, fifth = [rows[i] for i in order], len(rows) // 5
    table, rest = rows[:fifth], rows[fifth:]
    if cfg.eval_dataset:
        table = load_rows(cfg, tokenizer, cfg.eval_dataset, "eval_dataset", COLUMNS[:1])
        taken = [row.prompt for row in table]
        rest = [row for row in rows if row.prompt not in taken]

    table, few = table[: cfg.eval_prompts], min(cfg.lambda_prompts, fifth)
    if min(len(table), few) < 2:
        refuse(
            f"--dataset {cfg.dataset}: {len(rows)} prompts are too few to split; give 10 or more"
        )

    train = [part for row in rest[few:] for part in pack(row, cfg.row_length)]
    train = train[: cfg.max_steps and cfg.max_steps * cfg.batch_size]
    held_out = [part for row in table for part in pack(row, cfg.row_length) if row.pairs]
    pairs = sum(len(row.pairs) for row in train)
    say(f"train on {pairs} pairs in {len(train)} rows; λ on {few} prompts, table on {len(table)}")
    prompts = [row.prompt for row in rest[:few]], [row.prompt for row in table]
    return Run(cfg, out, tokenizer, train, *prompts, held_out)


# ---- Plumbing: files, processes, resuming (skip on first reading) --------------------------------

BAR = {"leave": False, "disable": RANK > 0 or None}  # progress on the terminal of process 0


def say(text):
    """Print a line once."""
    if RANK == 0:
        print(text, flush=True)


def refuse(message, code=2):
    """Leave with one line on standard error that says what, where and how to mend it."""
    if RANK == 0:
        print("cdpo: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextmanager
def refusing(what, advice="give a folder or hub name that holds one"):
    """Turn any exception of the block into a refusal: the libraries raise kinds of their own."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        cause = error.__cause__ or error  # datasets wraps what its readers say
        refuse(f"{what}: {type(cause).__name__}: {str(cause)[:300]}; {advice}")


def gather(value):
    """A value of every process, in their order. All wait for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def atomic(path):
    """Yield a temporary name that becomes `path` at the end: it is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)
    gather(None)
    yield temporary
    rename(temporary, path)


def rename(source, target):
    """Rename a file or folder, in place of what is there."""
    gather(None)
    if target.is_dir():  # a folder replaces only an empty one
        remove(target)
    if RANK == 0:
        os.replace(source, target)
    gather(None)


def remove(*paths):
    """Delete files and folders, where they are there."""
    for path in paths if RANK == 0 else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write(path, value):
    """Write JSON or, where the name asks for them, JSON lines: whole or not at all."""
    text = json.dumps(value, indent=2)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in value)
    with atomic(path) as temporary:
        if RANK == 0:
            temporary.write_text(text, encoding="utf-8")


def cached(run, name, models, key, compute):
    """Scores that depend on models and a key: from a file, or computed and written."""
    path, parts = run.out / name, [models, key, run.cfg.beta, run.cfg.seed, run.cfg.template]
    for model in models[:3]:  # a folder may be filled anew
        parts += [file.stat().st_mtime_ns for file in sorted(Path(model).glob("*.*"))]
    source = hashlib.sha256(repr(parts).encode()).hexdigest()
    if path.exists():
        with refusing(f"{path}: cannot be read", "delete it"):
            kept = torch.load(path, weights_only=True)
        if kept["source"] == source:
            return Scores(*kept["scores"])
        say(f"{path}: the data or the models have changed; computing it again")

    scores = compute()
    with atomic(path) as temporary:
        if RANK == 0:
            torch.save({"source": source, "scores": list(scores)}, temporary)
    return scores


def begin_loop(run, reference, loop):
    """The policy in training and the loop, as the last finished iteration left them."""
    cfg, metrics = run.cfg, run.out / "metrics.jsonl"
    history = [json.loads(line) for line in metrics.open()] if metrics.exists() else []
    if len(history) == cfg.iterations:  # nothing is left to do
        return None, Loop(loop.lam, history)

    steps = cfg.iterations * min(cfg.dpo_steps, cfg.max_steps or cfg.dpo_steps)
    policy = training_model(cfg, "policy", reference, steps, dpo=True)
    for folder in sorted((run.out / "training").glob("*[0-9]"))[-1:]:
        file = folder / f"{RANK}-of-{WORLD}.pt"
        with refusing(f"{file}: cannot be read", "start as many processes as before, or delete it"):
            kept = torch.load(file, "cpu", weights_only=True, mmap=True)
        policy.model.load_state_dict(kept["model"])
        policy.optimizer.load_state_dict(kept["optimizer"])
        policy.done, loop = kept["done"], kept["loop"]
        say(f"policy: going on behind iteration {len(loop.history) - 1}")
    return policy, loop


def save_loop(run, policy, loop):
    """Keep the history, and all that the next iteration needs; each process its own shards."""
    write(run.out / "metrics.jsonl", loop.history)
    if run.cfg.no_checkpoint:
        return
    older = list((run.out / "training").glob("*"))
    state = {"model": policy.model.state_dict(), "optimizer": policy.optimizer.state_dict()}
    state |= {"done": policy.done, "loop": loop}
    with atomic(run.out / "training" / f"{len(loop.history):06d}") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / f"{RANK}-of-{WORLD}.pt")
    remove(*older)


torch.serialization.add_safe_globals([Loop, Samples, Scores, Row])  # what torch.load may make


# ---- The command ---------------------------------------------------------------------------------


def parse(argv):
    """Command line → Config. Flags win over --config; checked before anything is loaded."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.split("\n")[0])
    parser.allow_abbrev = False
    parser.add_argument("--config", help="JSON file of settings; flags win over it")
    parser.error = lambda message: refuse(f"{message}; --help lists the flags")
    argv = list(sys.argv[1:] if argv is None else argv)

    path, flags = parser.parse_args(argv).config, []
    if path:  # its settings become flags before the others: one parser checks names and types
        with refusing(f"--config {path}", "it must be a JSON file: one object of settings"):
            settings = json.loads(Path(path).read_text(encoding="utf-8")).items()
        for key, value in settings:
            values = value if isinstance(value, list) else [value]
            texts = [json.dumps(x) if isinstance(x, dict) else str(x) for x in values]
            if value is not None:
                flags += [f"--{key}", *texts]

    values = vars(parser.parse_args(flags + argv))
    del values["config"]
    cfg = Config(**values)
    check_settings(cfg)
    return cfg


def check_settings(cfg):
    """Refuse settings that are out of range or contradict each other."""
    for name, value in vars(cfg).items():
        if type(value) is int and value < 1 and name != "seed":
            refuse(f"--{name} is {value}; it must be at least 1")
        if type(value) is float and not math.isfinite(value):
            refuse(f"--{name} is {value}; it must be finite")
    if min(cfg.beta, cfg.learning_rate, cfg.sft_learning_rate) <= 0:
        refuse("--beta and learning rates must be above 0")
    for lam in (cfg.lambda_init or 0.0, cfg.lambda_lr, *cfg.lambdas):
        if not 0 <= lam < math.inf:
            refuse(f"--lambda_init, --lambda_lr and --lambdas must be at least 0, not {lam}")

    if not 0.5 <= cfg.cost_confidence < 1:
        refuse(f"--cost_confidence is {cfg.cost_confidence}; it must be 0.5 or more, below 1")
    if cfg.template and cfg.template.count("{prompt}") != 1:
        refuse("--template must contain {prompt} once")
    if cfg.method == "pecan" and cfg.margin is None:
        refuse("--method pecan needs --margin: its costs have no zero")
    if cfg.method != "cdpo" and cfg.lambda_init is not None:
        refuse("--lambda_init is for --method cdpo; --lambdas fixes others")
    if cfg.max_new_tokens >= cfg.max_length:
        refuse("--max_new_tokens leaves no room for a prompt in --max_length")
    if cfg.cpu_offload and not GPU:
        refuse("--cpu_offload needs a GPU; leave it out")


FREE = "lambdas compare eval_prompts eval_samples overwrite output_dir no_checkpoint".split()  # noqa: SIM905
OURS = "sft reward_model cost_model helpful safe policy lambda-* iterate training results.json "
OURS += "metrics.jsonl samples.jsonl config.json scores.pt reference_samples.pt *.tmp"


def open_folder(cfg):
    """Make --output_dir, or refuse one of something else, or of a run with other settings."""
    out, settings = Path(cfg.output_dir), asdict(cfg)
    with refusing(f"--output_dir {out} cannot be written", "name another folder"):
        out.mkdir(parents=True, exist_ok=True)
        found = [path for path in out.iterdir() if path.name != "config.json.tmp"]
    if found:
        with refusing(f"--output_dir {out} holds no run of this program", "name another folder"):
            kept = json.loads((out / "config.json").read_text())
            kept["output_dir"]
        changed = ""
        for name in settings:
            if name not in FREE and kept.get(name) != settings[name]:
                changed += f"{name} was {kept.get(name)!r}, is {settings[name]!r}; "
        if changed and not cfg.overwrite:
            mend = "go on with those, discard them by --overwrite, or name another folder and reuse"
            for flag in ("sft_model", "reward_model", "cost_model"):
                path = out / flag.replace("sft_model", "sft")
                mend += f" --{flag} {path}" if path.exists() else ""
            refuse(f"--output_dir {out}: the run there has other settings: {changed}{mend}")

    gather(None)  # all have read the old settings before the new ones are written
    if cfg.overwrite:
        given = {cfg.sft_model, cfg.reward_model, cfg.cost_model}
        ours = [path for path in found if any(map(path.match, OURS.split()))]
        remove(*(path for path in ours if str(path) not in given))
    write(out / "config.json", settings)
    return out


def try_score_model(run, flag, source, loss_fn):
    """Say how a score model ranks held-out pairs; refuse a cost that ranks safe above unsafe."""
    rows = [row for row in run.held_out if flag != "cost_model" or row.pairs[0].worse_sign]
    if not rows:
        say(f"{flag}: no labels at hand; what its scores mean is unchecked (a cost: above 0 harms)")
        return

    right, signs = [], []  # a pair each
    for row, values in zip(rows, split_by_row(rows, score_texts(run.cfg, flag, source, rows))):
        right += [float(loss_fn(row, values)[1])] * len(row.pairs)
        for worse_or_better, sign in (("worse", "worse_sign"), ("better", "better_sign")):
            agrees = values[column(row, worse_or_better)] * column(row, sign) > 0
            signs += agrees.tolist()

    ranking, text = sum(right) / len(right), ""
    if flag == "cost_model":
        text = f", of sign {sum(signs) / len(signs):.1%}"
    say(f"{flag}: held-out accuracy of ranking {ranking:.1%}{text}, {len(right)} pairs")
    if flag == "cost_model" and ranking + 0.98 / math.sqrt(len(rows)) < 0.5:  # 95%, rows apart
        refuse(
            f"--{flag} {source}: it ranks {1 - ranking:.0%} of held-out pairs the wrong way round: "
            "a cost is above 0 for harm; is it a harmlessness reward? give one that is negated"
        )


def run_all(run):
    """All stages in order; each finds what an earlier run of the same command has finished."""
    cfg, rows, paths = run.cfg, run.train, []
    first = "sft_model" if cfg.sft_model else "model"
    for flag in (first, "reward_model", "cost_model"):
        if getattr(cfg, flag):
            check_decoder(token_ids(rows), getattr(cfg, flag), flag)

    reference = cfg.sft_model or train_stage(run, "sft", cfg.model, rows, sft_loss(rows))
    if cfg.method == "pecan":
        models = pecan_models(run, reference)
    else:
        for name, loss_fn in (("reward_model", reward_loss), ("cost_model", harm_loss)):
            path = getattr(cfg, name)
            path = path or train_stage(run, name, reference, rows, loss_fn, new_head=True)
            try_score_model(run, name, path, loss_fn)
            paths.append(path)
        models = Models(reference, *paths)

    problem = pose(run, models)
    policies = {"SFT": (models.reference, None)}
    if cfg.method == "sft":
        export(run, load_model(models.reference), run.out / "policy")
    elif cfg.method == "dpo":
        policies["DPO"] = one_shot(run, problem, 0.0)
    elif cfg.method == "cdpo":
        policies["C-DPO"] = constrained_dpo(run, problem, first_lambda(cfg, problem))
    else:
        policies[{"mocan": "MoCAN", "pecan": "PeCAN"}[cfg.method]] = mocan(run, problem)

    for lam in cfg.lambdas if cfg.method != "sft" else ():
        name = f"λ = {lam:.9g}" if lam else "DPO"
        if name not in policies:
            folder, loss_fn = f"lambda-{lam:.9g}", relabelled_dpo(cfg, lam, name)
            path = train_stage(run, folder, models.reference, problem.rows, loss_fn, dpo=True)
            policies[name] = path, lam
    for path in cfg.compare:
        name = str(Path(path).absolute()) if path in policies else path
        policies[name] = path, None
    if cfg.reward_model and cfg.cost_model:  # they judge PeCAN's policy, too
        models = Models(models.reference, cfg.reward_model, cfg.cost_model)
    evaluate(run, problem, models, policies)


def main(argv=None):
    """The whole program. Refusals are SystemExit(2) with one line on standard error."""
    cfg = parse(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_float32_matmul_precision("high")

    if GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # With a mask cuDNN plans anew for every shape; its backward may be NaN (pytorch 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if (GPU or WORLD > 1 or cfg.dtype == "bfloat16") and not dist.is_initialized():
        alone = {} if WORLD > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend, wait = "cpu:gloo,cuda:nccl" if GPU else "gloo", timedelta(hours=4)
        dist.init_process_group(backend, timeout=wait, **alone)  # while process 0 writes 81 GB

    try:
        run_all(load_run(cfg, open_folder(cfg)))
        gather(None)  # no process takes the group down while another still uses it
    except KeyboardInterrupt:
        refuse(f"stopped; the same command goes on from {cfg.output_dir}", code=130)
    except torch.OutOfMemoryError:
        less = f"--tokens_per_batch {cfg.tokens_per_batch // 2} to train, or --sample_tokens "
        less += f"{cfg.sample_tokens // 2} to sample; torchrun or --cpu_offload for the weights"
        print(f"cdpo: out of GPU memory; lower: {less}", file=sys.stderr)
        raise
    finally:
        if dist.is_initialized() and WORLD == 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    from cdpo import main  # so that what is saved names the classes of one module

    main()
    if WORLD > 1:  # all is written; gloo's threads now and then abort the interpreter's way out
        sys.stdout.flush()
        os._exit(0)
