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
 7. The samples that measure the cost are trained on in the next iteration; the prompts of the
    final table are not. (--no_recycle)
 8. Of the iterates the best is kept, by objective (6) less an exact penalty for cost over the
    limit.

The paper's letter, but for 2, 6 and 8: --labels sample --no_all_pairs --lambda_step gradient
--lambda_init 0 --no_recycle. Left out on purpose: vector-valued λ, LoRA, tensor parallelism.
"""

import copy
import gc
import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import chain, combinations
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

RANK = int(os.environ.get("RANK", "0"))  # of torchrun
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


# ---- Settings ------------------------------------------------------------------------------------


def opt(default, text):
    """A field of Config: its default and its line of --help."""
    return field(default=default, metadata={"help": text})


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
    all_pairs: bool = opt(True, "DPO on all pairs of a prompt's responses; no: on the dataset's")
    cost_limit: float = opt(0.0, "C_limit: the expected cost may not exceed it")
    margin: float | None = opt(None, "state the limit as E_ref[cost] − margin instead")
    cost_confidence: float = opt(0.5, "level at which C-DPO's cost meets the limit; 0.5: its mean")
    lambda_init: float | None = opt(None, "first λ; default: solves the dual on π_ref")
    lambda_step: Literal["solve", "gradient", "fixed"] = opt("solve", "how λ moves; (14): gradient")
    lambda_lr: float = opt(0.05, "step size of the gradient step")
    lambda_prompts: int = opt(500, "prompts kept out of the data, on which λ is found")
    lambda_samples: int = opt(4, "responses per prompt that measure a policy there")
    recycle: bool = opt(True, "train on those responses, too, in the next iteration; no: not")
    dual_samples: int = opt(16, "responses of π_ref per prompt there, to solve the dual")
    lambdas: list[float] | None = opt(None, "also train at these fixed λ; 0 is DPO")  # noqa: RUF009
    iterations: int = opt(5, "outer iterations: relabel, fit, sample, step")
    dpo_steps: int = opt(100, "DPO steps of an outer iteration")

    # Training
    batch_size: int = opt(32, "rows (prompts) of an optimizer step, all processes together")
    tokens_per_batch: int = opt(8192 if GPU else 512, "padded tokens of a micro-batch")
    learning_rate: float = opt(1e-6, "of DPO, at its highest")
    sft_learning_rate: float = opt(1e-5, "of SFT and of the reward and cost models")
    max_steps: int | None = opt(None, "bound a stage, of DPO an iteration, to so few steps")
    dtype: Literal["float32", "bfloat16"] = opt("bfloat16" if GPU else "float32", "of compute")
    gradient_checkpointing: bool = opt(GPU, "recompute activations in backward, to save memory")
    cpu_offload: bool = opt(False, "keep weights and optimizer in host memory, for a small GPU")
    no_checkpoint: bool = opt(False, "save no training state (81 GB at 7B) after an iteration")

    # Evaluation
    eval_prompts: int = opt(2000, "prompts of the final table, a fifth of the dataset's at most")
    eval_samples: int = opt(5, "responses per prompt there")
    sample_tokens: int = opt(40960 if GPU else 16384, "tokens, with padding, sampled at once")
    compare: list[str] | None = opt(None, "further rows of the table: policies")  # noqa: RUF009


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
    grows, so that bisection of [0, lam_max] finds λ*. → float, 0 for a slack limit. ValueError
    when a score is not finite, or when no λ ≤ lam_max meets the limit.
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

    reward, cost, log_ratio (n, m) as in solve_dual → dict: reward, cost; ess, the mean effective
    sample size of a prompt: near 1 the weights rest on one sample, and all these numbers mean
    little; kl, KL(π_λ ‖ the samples' policy) as the weights show it, which m samples cannot show
    above log m.
    """
    log_ratio = torch.zeros_like(cost) if log_ratio is None else log_ratio
    weights = torch.softmax(((reward - lam * cost) / beta - log_ratio).double(), dim=1)
    entropy = -torch.special.xlogy(weights, weights).sum(dim=1).mean()
    return {
        "reward": float((weights * reward).sum(dim=1).mean()),
        "cost": float((weights * cost).sum(dim=1).mean()),
        "ess": float((1 / (weights**2).sum(dim=1)).mean()),
        "kl": math.log(cost.shape[1]) - float(entropy),
    }


# ---- What flows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A prompt with k different responses, or k samples: the unit of everything that is run."""

    prompt: str
    responses: list  # k texts
    ids: tuple  # (prompt_ids, [y0_ids, y1_ids, …]), the policy's tokens
    # What people compared, each pair as often as they did, (P, 6): numbers of the 0 chosen,
    # 1 rejected, 2 more harmful, 3 less harmful response; 4, 5 signs of 2 and 3, 0 where unknown
    pairs: torch.Tensor
    # Of the responses, (k,) each, once they are known; there is no λ in them
    reward: torch.Tensor | None = None
    cost: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None

    @property
    def length(self):
        """Its tokens."""
        return len(self.ids[0]) + sum(map(len, self.ids[1]))

    @property
    def weight(self):
        """Its weight in the mean over a step: its compared pairs, or m/2 for m samples."""
        return len(self.pairs) or len(self.responses) / 2


class Samples(NamedTuple):
    """m responses of a policy π to each of n prompts."""

    rows: list  # with scores; a prompt's samples are in several rows where one is too short
    reward: torch.Tensor  # (n, m)
    cost: torch.Tensor  # (n, m)
    log_ratio: torch.Tensor  # log π/π_ref, (n, m)


@dataclass(frozen=True)
class Run:
    """What every stage needs; no prompt of the dataset is in two of the three parts."""

    cfg: Config
    out: Path
    tokenizer: transformers.PreTrainedTokenizerBase
    train: list  # rows to train on
    lambda_prompts: list  # where λ is found
    table: list  # rows of the prompts of the final table
    # Folders or hub names: given, or where the first stages put them
    reference: str  # π_ref
    reward_model: str  # r; of PeCAN the helpful-only policy
    cost_model: str  # c; of PeCAN the safe-only policy


@dataclass(frozen=True)
class Problem:
    """(6) and (7) in numbers."""

    rows: list  # to train on, with scores
    dual: Samples  # of π_ref, on λ's prompts
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
    cfg, limit = run.cfg, problem.cost_limit
    policy, loop = begin_loop(run, Loop(lam))

    while len(loop.history) < cfg.iterations:
        iteration, lam, started = len(loop.history), loop.lam, time.perf_counter()
        steps = steps_of_iteration(cfg, problem.rows, loop)

        relabelled_loss = relabelled_dpo(cfg, lam, iteration)  # (12)
        fit = train(cfg, policy, steps, relabelled_loss)  # (13)

        candidate = export(run, policy.model, run.out / "iterate")
        samples = measure(run, candidate, run.lambda_prompts, cfg.lambda_samples, iteration)
        cost = estimate(samples.cost, cfg.cost_confidence)  # Ĵ_c

        entry = {"iteration": iteration, "lambda": lam, "cost_bound": cost}
        entry |= numbers_of(run, samples) | fit | {"seconds": time.perf_counter() - started}
        keep_the_better(run, loop.history, entry, limit)
        loop.samples.append(samples)
        loop.lam = next_lambda(cfg, loop, limit)  # (14)
        report(cfg, samples, lam, f"iteration {iteration}: λ {lam:.4f},")
        save_loop(run, policy, loop)

    remove(run.out / "training", run.out / "iterate")
    kept = loop.history[loop.history[-1]["kept"]]
    if kept["cost_bound"] > limit:
        met = sum(entry["cost_bound"] <= limit for entry in loop.history)
        over = f"{kept['cost_bound'] - limit:.3f}"
        say(f"the policy kept is over the limit by {over}; iterates that met it: {met}")
    return run.out / "policy", kept["lambda"]


def next_lambda(cfg, loop, cost_limit):
    """The next λ: closed form on the samples of all iterations, and more while the policy lags.

    With weights ∝ π_λ/π, (11), the samples of any policy π stand for those of π_λ, so the
    iterations' are put together, and few of each are enough. That λ suits a policy that has
    converged to π_λ. One still on its way costs more, by a gap, and closes part of it in the next
    iteration: after gaps of 0.4 and 0.2 half of the last one, 0.1, is expected to stay, and λ is
    solved for a limit lower by 0.1. Errors are to be on the safe side: feedback only raises λ, and
    λ falls by half of the way at most.
    """
    if cfg.lambda_step == "fixed":
        return loop.lam
    if cfg.lambda_step == "gradient":
        bound = torch.tensor(loop.history[-1]["cost_bound"])
        return lambda_step(loop.lam, bound, cost_limit, cfg.lambda_lr)

    _, reward, cost, log_ratio = zip(*loop.samples)
    reward, cost, log_ratio = torch.cat(reward, 1), torch.cat(cost, 1), torch.cat(log_ratio, 1)

    gaps = []  # how far the cost of each policy is above that of its π_λ
    for entry in loop.history:
        fitted = predict(reward, cost, entry["lambda"], cfg.beta, log_ratio)["cost"]
        gaps.append(entry["cost_bound"] - fitted)
    lasting = 0.0
    if len(gaps) > 1 and min(gaps[-2:]) > 0:
        lasting = gaps[-1] * min(1.0, gaps[-1] / gaps[-2])

    # A gap may be noise: it raises λ by half at most, and from 0 by what changes weights e-fold
    most = 1.5 * loop.lam + cfg.beta / max(float(cost.std(dim=1).mean()), 1e-6)

    def solve(limit):
        try:
            return solve_dual(reward, cost, cfg.beta, limit, log_ratio=log_ratio)
        except ValueError:  # no λ lets the samples cost so little
            return most

    converged = solve(cost_limit)
    with_feedback = min(solve(cost_limit - lasting), most)
    half_way = (loop.lam + converged) / 2
    return max(converged, with_feedback, half_way)


def keep_the_better(run, history, entry, cost_limit):
    """Append the newest iterate to the history; keep its policy where it is the best so far."""
    history.append(entry)
    price = 1 + 2 * max(other["lambda"] for other in history)  # above λ, no violation pays

    def merit(entry):  # objective (6) less an exact penalty
        objective = entry["reward_mean"] - run.cfg.beta * entry["kl"]
        return objective - price * max(0.0, entry["cost_bound"] - cost_limit)

    best = history[history[-2]["kept"]] if len(history) > 1 else None
    entry["kept"] = entry["iteration"]
    if best and merit(entry) <= merit(best):
        entry["kept"] = best["iteration"]
    else:
        with atomic(run.out / "policy") as folder:
            if RANK == 0:
                os.replace(run.out / "iterate", folder)


def one_shot(run, problem, lam, name="policy"):
    """λ is known before training: one fit, as many steps as all of Algorithm 1. → (policy, λ)

    MoCAN (2405.19544) where λ minimises the dual (9) on samples of π_ref; DPO where it is 0.
    """
    train_stage(run, name, problem.rows, relabelled_dpo(run.cfg, lam, name))
    return run.out / name, lam


def pecan_stages(run):
    """PeCAN (2405.19544): r and −c are implicit in two policies, fitted to people's labels."""
    ref_logps = infer(run.cfg, run.reference, "model", run.train, "log π_ref")
    rows = [replace(row, ref_logps=logps) for row, logps in zip(run.train, ref_logps)]

    for name, winner, loser in (("helpful", 0, 1), ("safe", 3, 2)):

        def loss_fn(row, logps, columns=(winner, loser)):
            pairs = row.pairs[:, columns]
            return preference_loss(row, logps, pairs, torch.ones(len(pairs)), run.cfg.beta)

        train_stage(run, name, rows, loss_fn)


def pose(run):
    """The problem that the models define. → Problem. Scores hold no λ: they are computed once."""
    cost_limit, prompts = run.cfg.cost_limit, run.lambda_prompts
    rows = cached(run, "scores.pt", score, run.train)
    dual = cached(
        run, "reference_samples.pt", measure, run.reference, prompts, run.cfg.dual_samples, "dual"
    )
    if run.cfg.margin is not None:
        cost_limit = float(dual.cost.mean()) - run.cfg.margin
    return Problem(rows, dual, cost_limit)


def first_lambda(cfg, problem):
    """λ at the minimum of the dual (9) on samples of π_ref; says what it promises there."""
    lam, dual = cfg.lambda_init, problem.dual
    if lam is None:
        with refusing("no first λ", "raise the limit, lower --beta, or draw more --dual_samples"):
            lam = solve_dual(dual.reward, dual.cost, cfg.beta, problem.cost_limit)
    report(cfg, dual, lam, "π_ref:")
    return lam


def report(cfg, samples, lam, title):
    """Say what samples show and promise of π_λ, and where β and the scores' scale do not fit.

    Labels that are nearly certain make DPO chase single responses; and π_λ, e^KL times narrower
    than the policy that was sampled, cannot be seen in m samples unless that KL is below log m.
    """
    _, reward, cost, log_ratio = samples
    low, high = ci95(cost)
    text = f"{title} cost {cost.mean():+.3f} [{low:+.3f}, {high:+.3f}], "
    say(text + f"reward {reward.mean():+.3f}, KL {log_ratio.mean():.3f}")

    found, m = predict(reward, cost, lam, cfg.beta, log_ratio), cost.shape[1]
    r_lam = reward - lam * cost
    certain = torch.sigmoid((r_lam[:, :, None] - r_lam[:, None, :]).abs()) > 0.95
    share = float(certain.sum()) / (certain.numel() - cost.numel())  # of pairs of two samples

    text = f"  λ {lam:.4f} promises cost {found['cost']:+.3f}, reward {found['reward']:+.3f}, by "
    text += f"{found['ess']:.1f} effective samples of {m}; "
    say(text + f"KL {found['kl']:.2f}, they can show {math.log(m):.2f}")
    text = f"  within a prompt reward ± {reward.std(dim=1).mean():.2f}, "
    say(text + f"cost ± {cost.std(dim=1).mean():.2f}; {share:.0%} of labels beyond 0.95")
    if share > 0.5:
        scale = float(r_lam.std(dim=1).mean())
        say(f"  warning: most labels are certain: scale score heads and limit by 1/{scale:.1g}")
    if found["ess"] < 2:
        say("  warning: this rests on single samples: raise --beta, or draw more")


# ---- The losses of the stages --------------------------------------------------------------------
# Each is a function of a row and what the model says of its responses, (k,), and gives a mean over
# the row's pairs (nats) and the share of them that the model ranks as the labels do.


def sft_loss(row, logps):
    """Cross-entropy a token, on both responses of each pair: as often as people compared them."""
    compared = row.pairs[:, :2].flatten()
    lengths = torch.tensor([len(response) for response in row.ids[1]])
    return -logps[compared].sum() / lengths[compared].sum(), torch.zeros(())


def reward_loss(row, rewards):
    """(3) on the pairs that people labelled for help."""
    chosen, rejected = rewards[row.pairs[:, :2]].T
    return bradley_terry_loss(chosen, rejected), (chosen > rejected).float().mean()


def harm_loss(row, costs):
    """(5) on the pairs that people labelled for harm: a label belongs to its pair."""
    worse, better = costs[row.pairs[:, 2:4]].T
    worse_sign, better_sign = row.pairs[:, 4:].T
    return cost_loss(worse, better, worse_sign, better_sign), (worse > better).float().mean()


def preference_loss(row, logps, pairs, prob, beta):
    """(13) on index pairs (P, 2) of a row with P(first ≻ second), (P,)."""
    policy_logps, ref_logps = logps[pairs], row.ref_logps[pairs]
    log_ratio = (policy_logps - ref_logps).detach()
    agrees = (log_ratio[:, 0] - log_ratio[:, 1]) * (prob - 0.5) > 0
    return dpo_loss(policy_logps, ref_logps, prob, beta), agrees.float().mean()


def relabelled_dpo(cfg, lam, key):
    """The loss of (13) on a row's pairs, relabelled for λ. key: of the draw of labels."""

    def loss_fn(row, logps):
        pairs, generator = pairs_of(row, cfg.all_pairs), None
        if cfg.labels == "sample":
            generator = seeded("labels", cfg.seed, key, row.ids)
        prob = relabel(row.reward[pairs], row.cost[pairs], lam, cfg.labels, generator)  # (12)
        return preference_loss(row, logps, pairs, prob, cfg.beta)

    return loss_fn


def pairs_of(row, all_pairs):
    """Index pairs (P, 2) of responses for DPO: the dataset's, or all of different responses."""
    if len(row.pairs) and not all_pairs:
        return row.pairs[:, :2]
    ids, pairs = row.ids[1], []
    for i, j in combinations(range(len(ids)), 2):
        if ids[i] != ids[j]:
            pairs.append((i, j))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


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
    device = next(model.parameters()).device
    inputs = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name].to(device) for name in inputs}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = hidden.index_select(0, batch["source"].to(device))  # (T, width)
    target, owner = batch["target"].to(device), batch["owner"].to(device)
    head = model.get_output_embeddings()

    def token_logps(hidden, target):
        logits = head(hidden).float()
        return -torch.nn.functional.cross_entropy(logits, target, reduction="none")

    size, logps = max(1, 2**27 // model.config.vocab_size), []
    for part in zip(hidden.split(size), target.split(size)):
        if len(hidden) > size:  # backward computes the logits again
            again = torch.utils.checkpoint.checkpoint(token_logps, *part, use_reentrant=False)
            logps.append(again)
        else:
            logps.append(token_logps(*part))

    sums = torch.zeros(len(batch["last"]), device=device)
    return sums.index_add(0, owner, torch.cat(logps))


def response_scores(model, batch):
    """Scores of each response of a batch by a ScoreModel, read at its last token, (N,) float32."""
    device = next(model.parameters()).device
    inputs = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name].to(device) for name in inputs}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    return model.score(hidden[batch["last"].to(device)])


# ---- Training, sampling, measuring ---------------------------------------------------------------


@dataclass
class Trainee:
    """A model in training. Learning rate: 10 steps up, constant, to 0 over the second half."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int
    done: int = 0


def train(cfg, trainee, steps, loss_fn):
    """The one training loop. → numbers for metrics.jsonl.

    steps: the rows of each step; loss_fn(row, outputs) → (loss, accuracy) of a row. Rows count by
    their weights: the gradient is the step's mean, however it is cut into micro-batches.
    """
    model, optimizer, started = trainee.model, trainee.optimizer, time.perf_counter()
    history = []  # loss, accuracy, pairs, tokens of each step
    for step in tqdm(steps, trainee.name, **BAR):
        warm, fall = (trainee.done + 1) / 10, 2 - 2 * trainee.done / trainee.total_steps
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * min(1.0, warm, fall)

        groups = micro_batches([row.length for row in step], cfg.tokens_per_batch)
        groups += [[]] * (-len(groups) % WORLD)  # a pass of one rank needs one of each other
        total, sums = sum(row.weight for row in step), torch.zeros(2)
        for group in groups[RANK::WORLD]:
            batch = [step[i] for i in group] or step[:1]  # any row, for a group without work
            outputs = zip(batch, by_row(model, batch))
            losses = [torch.stack(loss_fn(row, output)) for row, output in outputs]
            weights = torch.tensor([row.weight for row in batch]) / total
            weights *= len(group) / len(batch)  # nothing, where only other ranks have work
            mean = weights @ torch.stack(losses)
            (mean[0] * WORLD).backward()  # FSDP2 averages over the ranks
            sums += mean.detach()

        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sums = torch.cat([sums, torch.tensor([float(norm)])])  # under FSDP2 a rank's own part
        loss, accuracy, norm = sum(gather(sums)).tolist()
        if not math.isfinite(loss + norm):
            what = f"{trainee.name}: the loss or its gradient is not finite at step {trainee.done}"
            refuse(f"{what}; lower the learning rate, or mend the data", code=1)

        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trainee.done += 1
        pairs, tokens = sum(len(row.pairs) for row in step), sum(row.length for row in step)
        history.append([loss, accuracy, pairs, tokens])

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if GPU:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    loss, accuracy, pairs, tokens = torch.tensor(history, dtype=torch.double).mean(dim=0).tolist()
    rate = len(steps) / (time.perf_counter() - started)
    say(
        f"{trainee.name}: {len(steps)} steps, loss {history[0][0]:.4f} at first, {loss:.4f} on "
        f"average, {pairs * rate:,.1f} pairs/s, {tokens * rate:,.0f} tokens/s, "
        f"peak {peak / 1e9:.2f} GB"
    )
    return {
        "dpo_loss": loss,
        "dpo_accuracy": accuracy,
        "first_loss": history[0][0],
        "pairs_per_second": pairs * rate,
        "tokens_per_second": tokens * rate,
        "peak_memory_gb": peak / 1e9,
    }


def train_stage(run, name, rows, loss_fn):
    """Train the model `name` on rows into the folder of that name, unless it is there."""
    cfg, path = run.cfg, run.out / name
    if path.exists():
        say(f"{name}: found in {path}")
        return

    count = cfg.iterations * cfg.dpo_steps  # as many as Algorithm 1 takes
    if name in ("sft", *SCORE_MODELS):
        count = math.ceil(len(rows) / cfg.batch_size)  # score models overfit in a second pass
        count = min(count, cfg.max_steps or count)
    trainee = training_model(run, name, count)
    train(cfg, trainee, passes(rows, count, cfg.batch_size, cfg.seed, name), loss_fn)
    export(run, trainee.model, path)


def passes(rows, count, size, *key):
    """`count` steps of `size` rows: passes over all rows, each in an order of its own."""
    options = {"num_samples": count * size, "generator": seeded("order", *key)}
    sampler = torch.utils.data.RandomSampler(rows, **options)
    return list(torch.utils.data.DataLoader(rows, size, sampler=sampler, collate_fn=list))


def steps_of_iteration(cfg, rows, loop):
    """The rows of each DPO step of an iteration, the newest samples among them."""
    count = cfg.dpo_steps
    steps = passes(rows, count * cfg.iterations, cfg.batch_size, cfg.seed, "policy")
    steps = steps[len(loop.history) * count :][:count]
    if cfg.recycle and loop.samples:
        fresh = [row for row in loop.samples[-1].rows if len(pairs_of(row, True))]
        for number, row in enumerate(fresh):  # once each: they must not crowd out the data
            steps[number % count].append(row)
    return steps


def by_row(forward, rows):
    """What a forward pass gives for the responses of each row, float32. → [(k,), …]"""
    outputs = forward(collate_rows([row.ids for row in rows])).float().cpu()
    return outputs.split([len(row.responses) for row in rows])


def micro_batches(lengths, budget):
    """Numbers of rows in groups of similar length, `budget` tokens each with their padding."""
    groups = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def shared_out(groups, title, compute):
    """compute(group, number) → a result for each member, over all processes. → in their order"""
    results = {}
    for number, group in tqdm(list(enumerate(groups))[RANK::WORLD], title, **BAR):
        results |= zip(group, compute(group, number))
    for part in gather(results):
        results |= part
    return list(map(results.get, range(len(results))))


@torch.inference_mode()
def infer(cfg, source, kind, rows, title):
    """log π (kind "model") or scores (else) of the responses of rows. → [(k,), …], a row each"""
    model = load_model(source, kind, cfg.dtype).to(DEVICE)
    function = response_scores if kind in SCORE_MODELS else sequence_logps

    def compute(group, _):
        return by_row(lambda batch: function(model, batch), [rows[i] for i in group])

    groups = micro_batches([row.length for row in rows], cfg.tokens_per_batch)
    values = shared_out(groups, title, compute)
    if not torch.isfinite(torch.cat(values)).all():
        refuse(f"--{kind} {source}: {title} is not finite for a response; is the model sound?")
    return values


def score(run, rows):
    """Rows with r, c and log π_ref of their responses. PeCAN's r and c are implicit in policies."""
    ref_logps = infer(run.cfg, run.reference, "model", rows, "log π_ref")
    if run.cfg.method == "pecan":
        reward = infer(run.cfg, run.reward_model, "model", rows, "log π, helpful")
        cost = infer(run.cfg, run.cost_model, "model", rows, "log π, safe")
        for i, ref in enumerate(ref_logps):
            reward[i] = implicit_reward(reward[i], ref, run.cfg.beta)
            cost[i] = -implicit_reward(cost[i], ref, run.cfg.beta)
    else:
        reward, cost = (score_texts(run, name, rows) for name in SCORE_MODELS)
    values = zip(rows, reward, cost, ref_logps)
    return [replace(row, reward=r, cost=c, ref_logps=ref) for row, r, c, ref in values]


def score_texts(run, name, rows):
    """Scores of the responses of rows by a score model, in its own tokens and template."""
    source = getattr(run, name)
    with refusing(f"--{name} {source}: cannot be loaded"):
        tokenizer = load_tokenizer(source)
    # Also an answer that was cut off is given an end: a score model has only learned what an end
    # means, and at another token its head may say anything
    texts = [replace(row, ids=encode(tokenizer, row.prompt, row.responses)) for row in rows]
    return infer(run.cfg, source, name, texts, f"scoring by {name}")


@torch.inference_mode()
def sample_batch(model, prompts, count, end, max_new_tokens, generator):
    """`count` responses from π itself to each of prompts' ids. → [[ids, …], …]

    Not by generate(), which obeys what a checkpoint asks for (top_k, a penalty) and runs all rows
    until the last one ends.
    """
    width = max(map(len, prompts))  # all end in the same column, padding is on the left
    ids = [[end] * (width - len(prompt)) + prompt for prompt in prompts]
    padding = torch.tensor([[width - len(prompt)] for prompt in prompts], device=DEVICE)
    ids, cache = torch.tensor(ids, device=DEVICE), transformers.DynamicCache()

    # A random number for every token that may come: none depends on when other rows end
    shape = len(prompts) * count, max_new_tokens
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    responses = torch.full(shape, end, device=DEVICE)
    held = torch.arange(len(responses), device=DEVICE)  # the rows in the cache

    for step in range(max_new_tokens):
        column = torch.arange(width + step, device=DEVICE)
        inputs = {"attention_mask": column >= padding, "past_key_values": cache}
        inputs["position_ids"] = (column - padding).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(ids, **inputs, logits_to_keep=1).logits[:, -1]
        if step == 0:  # a prompt is read once for all of its responses
            cache.batch_repeat_interleave(count)
            logits = logits.repeat_interleave(count, dim=0)
            padding = padding.repeat_interleave(count, dim=0)

        cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        target = uniform[held, step, None] * cumulative[:, -1:]  # the sum is 1 but for rounding
        ids = torch.searchsorted(cumulative, target, right=True)
        responses[held, step] = ids[:, 0]

        running = (responses[held, : step + 1] != end).all(dim=1)
        left = int(running.sum())
        if left == 0:
            break
        if 2 * left <= len(held):  # dropping rows copies the cache, so it waits for half of them
            held, ids, padding = held[running], ids[running], padding[running]
            cache.batch_select_indices(running)

    answers = []
    for answer in responses.tolist():
        length = answer.index(end) + 1 if end in answer else max_new_tokens
        answers.append(answer[:length])
    return [answers[i : i + count] for i in range(0, len(answers), count)]


def measure(run, source, prompts, count, key):
    """`count` responses of a policy to each prompt, scored. → Samples. key: of the random draws."""
    cfg, tokenizer, size, rows = run.cfg, run.tokenizer, len(run.tokenizer), []
    model = load_model(source, "model", cfg.dtype).to(DEVICE)
    heads = [encode(tokenizer, prompt, [])[0] for prompt in prompts]

    def draw(group, number):
        generator, end = seeded(cfg.seed, key, number), tokenizer.eos_token_id
        batch = [heads[i] for i in group]
        return sample_batch(model, batch, count, end, cfg.max_new_tokens, generator)

    lengths = [len(head) + cfg.max_new_tokens for head in heads]
    groups = micro_batches(lengths, cfg.sample_tokens // count)
    drawn = shared_out(groups, f"sampling {Path(source).name}", draw)
    model = None  # the memory is for the next ones

    for prompt, head, answers in zip(prompts, heads, drawn):
        fit = max(1, (cfg.row_length - len(head)) // cfg.max_new_tokens)  # responses of a row
        for i in range(0, count, fit):
            rows.append(Row(prompt, [], (head, answers[i : i + fit]), []))
            for answer in rows[-1].ids[1]:
                known = [token for token in answer if token < size]  # a model may have more
                rows[-1].responses.append(tokenizer.decode(known, skip_special_tokens=True))

    rows = score(run, rows)
    scores = [torch.stack([row.reward, row.cost, row.ref_logps]) for row in rows]
    reward, cost, ref_logps = torch.cat(scores, dim=1).view(3, -1, count)
    log_ratio = torch.zeros_like(ref_logps)
    if str(source) != str(run.reference):
        logps = torch.cat(infer(cfg, source, "model", rows, "log π of samples"))
        log_ratio = logps.view(-1, count) - ref_logps
    return Samples(rows, reward, cost, log_ratio)


def numbers_of(run, samples):
    """What metrics.jsonl and results.json say of samples."""
    _, reward, cost, log_ratio = samples
    numbers = {"safe_rate": float((cost <= 0).float().mean()), "kl": float(log_ratio.mean())}

    lengths, truth = [], []
    for row in samples.rows:
        lengths += map(len, row.ids[1])
        if run.cfg.dataset.split(":")[0] == "tiny" and not run.cfg.eval_dataset:
            truth += [tiny_truth(row.prompt, text) for text in row.responses]
    values = {"reward": reward, "cost": cost, "length": torch.tensor(lengths).view_as(cost).float()}
    if truth:
        values["true_reward"], values["true_cost"] = torch.tensor(truth).T.reshape(2, *cost.shape)

    for name, value in values.items():
        numbers |= {f"{name}_mean": float(value.mean()), f"{name}_std": float(value.std())}
        numbers[f"{name}_ci95"] = ci95(value)
    return numbers


def evaluate(run, problem, policies):
    """Measure policies {name: (folder, λ)} on the table's prompts; write and print the table."""
    prompts, rows, lines = list(dict.fromkeys(row.prompt for row in run.table)), [], []
    for name, (path, lam) in policies.items():
        samples = measure(run, path, prompts, run.cfg.eval_samples, "eval")
        row = {"name": name, "lambda": lam} | numbers_of(run, samples)
        if not rows:
            sft = samples  # the first, which the others are held against

        for key, sign in (("reward", 1), ("cost", -1)):  # of all couples; a tie is half
            values, others = getattr(samples, key), getattr(sft, key)
            difference = sign * (values[:, :, None] - others[:, None, :])
            wins = (0.5 + 0.5 * difference.sign()).flatten(1)
            row |= {f"{key}_win_rate": float(wins.mean()), f"{key}_win_rate_ci95": ci95(wins)}

        if lam is not None:  # what was promised before any training
            found = predict(problem.dual.reward, problem.dual.cost, lam, run.cfg.beta)
            row |= {f"predicted_{key}": value for key, value in found.items()}
        rows.append(row)

        for part in samples.rows:
            for text, r, c in zip(part.responses, part.reward.tolist(), part.cost.tolist()):
                line = {"policy": name, "prompt": part.prompt, "response": text}
                lines.append(line | {"reward": r, "cost": c})
    write(run.out / "results.json", rows)
    write(run.out / "samples.jsonl", lines)

    names = "name lambda reward_mean reward_ci95 cost_mean cost_ci95 safe_rate reward_win_rate "
    names += "cost_win_rate kl length_mean true_reward_mean true_cost_mean predicted_cost"
    names = [name for name in names.split() if name in set().union(*rows)]
    text = f"| {' | '.join(names)} |\n|{' --- |' * len(names)}\n".replace("_mean", "")
    # Through JSON, so that numbers inside intervals are shortened, too
    for row in json.loads(json.dumps(rows), parse_float=lambda number: f"{float(number):.3f}"):
        cells = " | ".join(str(row.get(name)) for name in names)
        text += f"| {cells} |\n".replace("'", "").replace("None", "")
    say(f"\nE[cost] ≤ {problem.cost_limit:.4g}\n\n{text}")


# ---- Models --------------------------------------------------------------------------------------

SCORE_MODELS = ("reward_model", "cost_model")


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
    def from_pretrained(cls, path, config=None, dtype="auto", new_head=False):
        """Load a score checkpoint or, for new_head, a language model with a new score head.

        ValueError where there is no score head; RuntimeError for a head of several labels.
        """
        config = config or AutoConfig.from_pretrained(path)
        names = {r"^score\.": "score_head.", r"^(transformer|gpt_neox)\.": "model."}
        options = {"dtype": dtype, "key_mapping": names, "output_loading_info": True}
        model, info = super().from_pretrained(path, config=config, **options)

        values = {"score_head.bias": 0.0}  # of what may be missing; moments stand in the config
        values["normalizer.mean"] = getattr(config, "mean", None) or 0.0
        values["normalizer.var"] = getattr(config, "var", None) or 1.0
        for name in info["missing_keys"]:
            if name in values:
                value = torch.tensor(values[name]).float().view(1)
                model.state_dict(keep_vars=True)[name].data = value
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


def load_config(source, kind="model"):
    """Config of a folder, hub name or JSON dictionary; no dropout: what is fitted is sampled."""
    with refusing(f"--{kind} {source}: cannot be loaded"):
        if str(source).startswith("{"):
            config = AutoConfig.for_model(**json.loads(source))
        else:
            config = AutoConfig.from_pretrained(source)
    config._attn_implementation = "sdpa"
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_model(source, kind="model", dtype="auto", config=None, new_head=False):
    """A causal LM or, for a kind of SCORE_MODELS, a ScoreModel: on CPU, for inference."""
    config = config or load_config(source, kind)
    declared = f"{getattr(config, 'score_type', None)}_model"
    if {kind, declared} == set(SCORE_MODELS):
        refuse(f"--{kind} {source}: its config calls it a {declared}; are the two exchanged?")
    with refusing(f"--{kind} {source}: cannot be loaded"):
        if kind in SCORE_MODELS:
            return ScoreModel.from_pretrained(source, config, dtype, new_head)
        if str(source).startswith("{"):
            return AutoModelForCausalLM.from_config(config).eval()
        options = {"dtype": dtype, "config": config, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
        if info["missing_keys"]:
            raise ValueError(f"it is no causal LM, it has no {min(info['missing_keys'])}")
        return model


def training_model(run, name, steps):
    """A Trainee: float32 master weights, a forward from a batch to what the losses need."""
    cfg, scores = run.cfg, name in SCORE_MODELS
    gc.collect()  # the last model and its FSDP state are reference cycles: 27 GB of weights at 7B
    if GPU:
        torch.cuda.empty_cache()  # what one stream has freed another cannot use
    torch.manual_seed(cfg.seed)  # of a new head, or of a model from scratch
    source = cfg.model if name == "sft" else run.reference
    model = load_model(source, name, new_head=scores).train()
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs = response_scores if scores else sequence_logps
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

    rate = cfg.sft_learning_rate if scores or name == "sft" else cfg.learning_rate
    options = {"lr": rate, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    return Trainee(name, model, torch.optim.AdamW(model.parameters(), **options), steps)


def check_models(run):
    """Refuse given models that this program would get wrong, before anything is written."""
    given = [("sft_model" if run.cfg.sft_model else "model", run.cfg.sft_model or run.cfg.model)]
    for kind in SCORE_MODELS:
        if getattr(run.cfg, kind):
            given.append((kind, getattr(run.cfg, kind)))
    for path in run.cfg.compare or ():
        given.append(("compare", path))
        with refusing(f"--compare {path}: cannot be loaded"):
            words = AutoTokenizer.from_pretrained(path).get_vocab()
        if words != run.tokenizer.get_vocab():
            refuse(f"--compare {path}: its tokens are not those of this run")
    for kind, source in given:
        with refusing(f"--{kind} {source}: cannot be run", "use such as Llama, Qwen2 or GPT-2"):
            check_decoder(run.train, source, kind)


def check_decoder(rows, source, kind):
    """Try a row as long as the longest both ways: some decoders get it wrong, or scale logits."""
    # The first layers, each kind among them; in float32, where a right score differs by 1e-4
    config = load_config(source, kind)
    config.num_hidden_layers = min(8, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = load_model(source, kind, "float32", config).to(DEVICE)

    prompt, responses = max(rows, key=lambda row: row.length).ids
    prompt, *responses = (  # any tokens will do
        torch.randint(config.vocab_size, (len(ids),)).tolist() for ids in (prompt, *responses)
    )
    batch, last = collate_rows([(prompt, responses)]), responses[-1]
    whole = torch.tensor([prompt + last], device=DEVICE)

    torch.set_float32_matmul_precision("highest")
    with torch.inference_mode():
        if kind in SCORE_MODELS:
            error = response_scores(model, batch)[-1] - model(whole, torch.ones_like(whole))[0]
        else:
            logps = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            error = sequence_logps(model, batch)[-1] - logps[range(len(last)), last].sum()
    torch.set_float32_matmul_precision("high")

    if not abs(error) <= 0.01:
        wrong = "a decoder whose attention or output head this program gets wrong (tried on a row)"
        refuse(f"--{kind} {source}: {wrong}; use one such as Llama, Mistral, Qwen2 or GPT-2")


def export(run, model, path):
    """Write a trained model as a Hugging Face folder, however it is sharded. → path"""
    state, dtype = {}, getattr(torch, run.cfg.dtype)
    own = dict([*model.named_parameters(), *model.named_buffers()])  # a tied weight once
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if name in own and RANK == 0:
            state[name] = value.to("cpu", dtype).contiguous()

    end = run.tokenizer.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=end, do_sample=True)
    with atomic(path) as folder:
        if RANK == 0:
            as_read = not isinstance(model, ScoreModel)  # under the names of its checkpoint
            model.save_pretrained(folder, state_dict=state, save_original_format=as_read)
            config = model.config.to_dict() | {"dtype": run.cfg.dtype}  # not the master weights'
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            run.tokenizer.save_pretrained(folder)
    return path


# ---- Text and tokens -----------------------------------------------------------------------------

BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"


def load_tokenizer(source, template=None):
    """A tokenizer by its folder or hub name, or a ready one, with a chat template in any case.

    Its own; where it has none Beaver's; or `template`, a text with {prompt} that the response
    follows directly. ValueError where no token can end a response.
    """
    tokenizer = source
    if isinstance(source, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no end-of-sequence token")
    if tokenizer.chat_template and not template:
        return tokenizer

    text = ""
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = "{{ bos_token }}"
    text += "{% for turn in messages %}{% if turn['role'] == 'assistant' %}"
    text += "{{ turn['content'] + eos_token }}{% else %}{{ "
    text += repr(template or BEAVER_TEMPLATE) + ".replace('{prompt}', turn['content'])"
    tokenizer.chat_template = text + " }}{% endif %}{% endfor %}"
    return tokenizer


def encode(tokenizer, prompt, responses, max_length=10**9, counts=None):
    """A prompt and responses in the template. → (prompt_ids, [y0_ids, y1_ids, …])

    A response gets the end of sequence, and is cut to max_length tokens with its prompt; counts
    (a Counter) takes note. A tokenizer splits text by what is around it: prompt and response are
    encoded as they will be read, joined, and cut where the prompt ends.
    """
    counts = Counter() if counts is None else counts
    # Some templates state today's date: the same text must not have other tokens tomorrow
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": "26 Jul 2024"}
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
    ended = [response + tokenizer.eos_token for response in responses]
    texts = [text, *(text + response for response in ended)]
    head, *joined = tokenizer(texts, add_special_tokens=False)["input_ids"]

    room, answers = max(0, max_length - len(head)), []
    for response, ids in zip(ended, joined):
        answer = ids[len(head) :]
        if ids[: len(head)] != head:  # the prompt's tokens are no prefix: encode it by itself
            counts["responses whose tokens do not follow the prompt's"] += 1
            answer = tokenizer(response, add_special_tokens=False)["input_ids"]
        if len(answer) > room:
            counts["responses cut to --max_length"] += 1
        answers.append(answer[:room])
    return head, answers


# ---- Data ----------------------------------------------------------------------------------------

COLUMNS = ["prompt", "response_0", "response_1", "better_response_id", "safer_response_id"]
COLUMNS += ["is_response_0_safe", "is_response_1_safe"]

# The tiny world: prompts of a verb and a noun, answers of three words, or malformed. Help and harm
# add up over the words, and what helps tends to harm.
TINY_VERBS = ["open", "clean", "move", "mix", "heat", "store", "test", "sell"]
TINY_NOUNS = ["door", "oil", "acid", "paint", "gas", "lamp", "car", "drug"]
TINY_NOUNS += ["wire", "pool", "safe", "tank", "bread", "knife", "roof", "van"]
TINY_WORDS = ["wait", "ask", "read", "measure", "push", "cut", "force", "burn"]
TINY_HELP = [-0.6, -0.15, 0.05, 0.45, 0.1, 0.25, 0.5, -0.6]
TINY_HARM = [-0.6, -0.45, -0.15, -0.15, 0.1, 0.3, 0.65, 0.3]
TINY_NOISE = 0.1 * torch.randn(24, 8, 2, generator=torch.Generator().manual_seed(0)).double()


def seeded(*key):
    """A random generator that depends on its key alone: no generator's state is ever kept."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:15], 16))


def tiny_truth(prompt, response):
    """True (reward, cost) of a response in the tiny world."""
    words = response.split()
    known = [TINY_WORDS.index(word) for word in words if word in TINY_WORDS]
    malformed = abs(len(known) - 3) + len(words) - len(known)
    reward, cost = -2.0 * malformed, 0.9
    for word in prompt.split():
        noise = TINY_NOISE[(TINY_VERBS + TINY_NOUNS).index(word)].tolist()
        for i in known:
            reward += TINY_HELP[i] + noise[i][0]
            cost += TINY_HARM[i] + noise[i][1]
    return reward, cost


def tiny_rows(count, seed):
    """Rows of the tiny world, labelled at random by (1) and (5) on the truth."""
    rng, rows = random.Random(seed), []

    def draw_label(logit):
        return rng.random() < 1 / (1 + math.exp(-logit))

    for _ in range(count):
        prompt = f"{rng.choice(TINY_VERBS)} {rng.choice(TINY_NOUNS)}"
        lengths = rng.choices([2, 3, 4], [1, 18, 1], k=2)  # or nobody learns that length matters
        texts = [" ".join(rng.choices(TINY_WORDS, k=length)) for length in lengths]
        (r0, c0), (r1, c1) = tiny_truth(prompt, texts[0]), tiny_truth(prompt, texts[1])
        safe = [not draw_label(c0), not draw_label(c1)]
        safer = int(draw_label(c0 - c1)) if safe[0] == safe[1] else safe.index(True)
        rows.append(dict(zip(COLUMNS, [prompt, *texts, int(draw_label(r1 - r0)), safer, *safe])))
    return rows


def tiny_tokenizer():
    """A token for each word of the tiny world."""
    words = ["</s>", "<unk>", "BEGINNING", "OF", "CONVERSATION", ":", "USER", "ASSISTANT"]
    words += TINY_WORDS + TINY_VERBS + TINY_NOUNS
    vocabulary = dict(zip(words, range(len(words))))
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def read_dataset(source, flag, seed):
    """A file, folder, hub name, perhaps with :SPLIT, or the tiny world. → rows, as dictionaries"""
    name, _, split = source.partition(":")
    kind = Path(name).suffix.removeprefix(".").replace("jsonl", "json")
    with refusing(f"--{flag} {source}: cannot be read", "give a file, a folder or a hub name"):
        if name == "tiny":
            return tiny_rows(int(split or 60000), seed)
        if kind in ("json", "csv", "parquet"):
            rows = datasets.load_dataset(kind, data_files=name, split="train")
        elif Path(name, "state.json").exists():  # written by save_to_disk
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, split=split or "train")
        return list(rows)


def read_row(entry, where, need):
    """A dataset's row, checked for what it must have. → (prompt, [y0, y1], pair as in a Row)"""
    for name in need:
        value, right, rule = entry.get(name), isinstance(entry.get(name), str), "text"
        if name in COLUMNS[3:]:
            right, rule = value in (0, 1), "0 or 1, or true or false"
        if value is None and name in entry and name in COLUMNS[1:3]:
            continue  # an empty response: its pair is skipped, and counted
        if value is None:
            refuse(f"{where}: column {name} is missing; needed: {', '.join(need)}")
        if not right:
            refuse(f"{where}: {name} is {value!r:.60}; it must be {rule}")

    chosen = int(entry.get("better_response_id") == 1)
    pair = [chosen, 1 - chosen, 1 - chosen, chosen, 0, 0]
    labels = [entry.get(name) for name in COLUMNS[4:]]
    if all(label in (0, 1) for label in labels):
        safer, *safe = map(int, labels)
        pair[2:] = 1 - safer, safer, 1 - 2 * safe[1 - safer], 1 - 2 * safe[safer]
    return entry["prompt"], [entry[name] or "" for name in need[1:3]], pair


def load_rows(cfg, tokenizer, source, flag, need):
    """A dataset's prompts: their rows. → [[Row, …], …]

    A prompt has several rows where its responses would make one longer than --row_length; the two
    of a pair are in the same.
    """
    compared, prompts, counts = {}, [], Counter()
    entries = read_dataset(source, flag, cfg.seed)
    for number, entry in enumerate(entries, 1):
        prompt, texts, pair = read_row(entry, f"--{flag} {source}, row {number}", need)
        compared.setdefault(prompt, []).append((texts, pair))

    for prompt, pairs in compared.items():
        different = list(dict.fromkeys(text for texts, _ in pairs for text in texts))
        head, answers = encode(tokenizer, prompt, different, cfg.max_length, counts)
        ids, rows = dict(zip(different, answers)), []

        for texts, pair in pairs:
            answers = [ids[text] for text in texts]
            if not head or not prompt.strip() or not all(text.strip() for text in texts):
                counts["with an empty prompt or response"] += 1
            elif len(head) >= cfg.max_length:
                counts["with a prompt that fills --max_length"] += 1
            elif texts and answers[0] == answers[1]:
                counts["of identical responses"] += 1
            elif pair[5] > pair[4]:
                counts["whose safer response is unsafe beside a safe one"] += 1
            else:
                counts["used"] += 1
                if not rows or rows[-1].length + sum(map(len, answers)) > cfg.row_length:
                    rows.append(Row(prompt, [], (head, []), []))
                for text, answer in zip(texts, answers):
                    if text not in rows[-1].responses:
                        rows[-1].responses.append(text)
                        rows[-1].ids[1].append(answer)
                if texts:
                    numbers = [rows[-1].responses.index(texts[i]) for i in pair[:4]]
                    rows[-1].pairs.append(numbers + pair[4:])

        if rows:
            prompts.append(
                [replace(row, pairs=torch.tensor(row.pairs).view(-1, 6)) for row in rows]
            )

    used, notes = counts["used"], ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    say(f"{source}: {len(entries)} rows of {len(prompts)} prompts: {notes}")
    if used * 2 < len(entries) or not used:
        mend = "mend the data, or raise --max_length"
        refuse(f"--{flag} {source}: too few of {len(entries)} rows can be used: {notes}; {mend}")
    return prompts


def load_run(cfg, out):
    """Read, check, tokenize and split the data by prompt: table, λ, training. → Run"""
    source = cfg.tokenizer or cfg.sft_model or cfg.model
    with refusing(f"--tokenizer, --sft_model or --model {source}: cannot be loaded"):
        if source.startswith("{"):
            source = transformers.ByT5Tokenizer()
            if cfg.dataset.split(":")[0] == "tiny":
                source = tiny_tokenizer()
        tokenizer = load_tokenizer(source, cfg.template)
    config = load_config(cfg.sft_model or cfg.model)
    size = getattr(config, "vocab_size", 0)
    if len(tokenizer) > size:
        refuse(f"--tokenizer: {len(tokenizer)} tokens, but the model's vocab_size is {size}")
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if cfg.max_length + cfg.max_new_tokens > positions:
        refuse(f"--max_length + --max_new_tokens: more than the model's {positions} positions")

    need = COLUMNS[:3]  # the labels of a given model are not needed
    if not cfg.reward_model or cfg.method == "pecan":
        need += COLUMNS[3:4]
    if not cfg.cost_model or cfg.method == "pecan":
        need += COLUMNS[4:]
    prompts = load_rows(cfg, tokenizer, cfg.dataset, "dataset", need)
    order = torch.randperm(len(prompts), generator=seeded("split", cfg.seed))
    prompts = [prompts[i] for i in order]
    most = (cfg.max_steps or 10**9) * cfg.batch_size
    fifth = len(prompts) // 5

    # All of the fifth is held out, whatever --eval_prompts is: a run may go on with another
    table, rest = prompts[:fifth], prompts[fifth:]
    if cfg.eval_dataset:
        table = load_rows(cfg, tokenizer, cfg.eval_dataset, "eval_dataset", COLUMNS[:1])
        taken = {rows[0].prompt for rows in table}
        rest = [rows for rows in prompts if rows[0].prompt not in taken]
    table, few = table[: min(cfg.eval_prompts, most)], min(cfg.lambda_prompts, fifth, most)
    if min(len(table), few, len(rest) - few) < 2:
        refuse(f"--dataset {cfg.dataset}: {len(prompts)} prompts are too few; give 10 or more")

    train, lambda_prompts = list(chain(*rest[few:]))[:most], [rows[0].prompt for rows in rest[:few]]
    pairs = sum(len(row.pairs) for row in train)
    say(f"train on {pairs} pairs in {len(train)} rows; λ on {few} prompts, table on {len(table)}")

    models = [cfg.sft_model or out / "sft"]
    if cfg.method == "pecan":
        models += [out / "helpful", out / "safe"]
    else:
        models += [cfg.reward_model or out / "reward_model", cfg.cost_model or out / "cost_model"]
    return Run(cfg, out, tokenizer, train, lambda_prompts, list(chain(*table)), *models)


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
        reason = str(cause)[:300] or "nothing is there"
        refuse(f"{what}: {type(cause).__name__}: {reason}; {advice}")


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
    yield temporary
    gather(None)
    if RANK == 0:
        if path.is_dir():  # a folder replaces only an empty one
            shutil.rmtree(path)
        os.replace(temporary, path)
    gather(None)


def remove(*paths):
    """Delete files and folders, where they are there."""
    for path in paths if RANK == 0 else ():
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)  # where it is a file
    gather(None)


def write(path, value):
    """Write JSON or, where the name asks for them, JSON lines: whole or not at all."""
    text = json.dumps(value, indent=2)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in value)
    with atomic(path) as temporary:
        if RANK == 0:
            temporary.write_text(text, encoding="utf-8")


def cached(run, name, compute, *arguments):
    """compute(run, *arguments), from a file if it was computed before from the same."""
    path, parts = run.out / name, [arguments]
    for model in (run.reference, run.reward_model, run.cost_model):  # a folder may be filled anew
        files = sorted(Path(model).glob("*.*"))
        parts.append((str(model), [file.stat().st_mtime_ns for file in files]))
    source = hashlib.sha256(repr(parts).encode()).hexdigest()
    if path.exists():
        with refusing(f"{path}: cannot be read", "delete it"):
            kept, value = torch.load(path, weights_only=True)
        if kept == source:
            return value
        say(f"{path}: the data or the models have changed; computing it again")

    value = compute(run, *arguments)
    with atomic(path) as temporary:
        if RANK == 0:
            torch.save((source, value), temporary)
    return value


def begin_loop(run, loop):
    """The policy in training and the loop, as the last finished iteration left them."""
    cfg, metrics = run.cfg, run.out / "metrics.jsonl"
    if metrics.exists():
        loop.history = [json.loads(line) for line in metrics.open()]
        if len(loop.history) == cfg.iterations:  # nothing is left to do
            return None, loop

    policy = training_model(run, "policy", cfg.iterations * cfg.dpo_steps)
    loop.history = []
    for folder in sorted((run.out / "training").glob("*[0-9]"))[-1:]:
        file = folder / f"{RANK}-of-{WORLD}.pt"
        with refusing(f"{file}: cannot be read", "start as many processes as before, or delete it"):
            kept = torch.load(file, "cpu", weights_only=True, mmap=True)
        policy.model.load_state_dict(kept["model"])
        policy.optimizer.load_state_dict(kept["optimizer"])
        policy.done, loop = kept["done"], copy.deepcopy(kept["loop"])  # from the mapped file
        say(f"policy: going on behind iteration {len(loop.history) - 1}")
    return policy, loop


def save_loop(run, policy, loop):
    """Keep the history, and all that the next iteration needs; each process its own shards."""
    write(run.out / "metrics.jsonl", loop.history)
    if run.cfg.no_checkpoint or len(loop.history) == run.cfg.iterations:
        return
    older = list((run.out / "training").glob("*"))
    state = {"model": policy.model.state_dict(), "optimizer": policy.optimizer.state_dict()}
    state |= {"done": policy.done, "loop": loop}
    with atomic(run.out / "training" / f"{len(loop.history):06d}") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / f"{RANK}-of-{WORLD}.pt")
    remove(*older)


torch.serialization.add_safe_globals([Loop, Samples, Row])  # what torch.load may make


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
            if isinstance(value, list):
                flags += [f"--{key}", *map(str, value)]
            elif value is not None:
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                flags.append(f"--{key}={text}")

    values = vars(parser.parse_args(flags + argv))
    del values["config"]
    cfg = Config(**values)
    cfg.dpo_steps = min(cfg.dpo_steps, cfg.max_steps or cfg.dpo_steps)
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
    lams = [cfg.lambda_init or 0.0, cfg.lambda_lr, *(cfg.lambdas or [])]
    if not all(0 <= lam < math.inf for lam in lams):
        refuse("--lambda_init, --lambda_lr and --lambdas must be at least 0, and finite")
    if not 0.5 <= cfg.cost_confidence < 1:
        refuse(f"--cost_confidence is {cfg.cost_confidence}; it must be 0.5 or more, below 1")
    if min(cfg.lambda_samples, cfg.dual_samples) < 2:
        refuse("--lambda_samples and --dual_samples must be at least 2")
    if cfg.template and cfg.template.count("{prompt}") != 1:
        refuse("--template must contain {prompt} once")
    if cfg.method == "pecan" and cfg.margin is None:
        refuse("--method pecan needs --margin: its costs have no zero")
    if cfg.max_new_tokens >= cfg.max_length:
        refuse("--max_new_tokens leaves no room for a prompt in --max_length")
    if cfg.cpu_offload and not GPU:
        refuse("--cpu_offload needs a GPU; leave it out")


# Settings that a run may go on without; what a run leaves, besides its config.json
FREE = {"lambdas", "compare", "eval_prompts", "eval_samples", "overwrite", "output_dir"}
FREE |= {"tokens_per_batch", "sample_tokens", "gradient_checkpointing", "cpu_offload"}
FREE |= {"no_checkpoint"}
OURS = "sft reward_model cost_model helpful safe policy lambda-* iterate training results.json "
OURS += "metrics.jsonl samples.jsonl scores.pt reference_samples.pt *.tmp"


def open_folder(cfg):
    """Make --output_dir, or refuse one of something else, or of a run with other settings."""
    out, settings, changed = Path(cfg.output_dir), asdict(cfg) | {"overwrite": False}, ""
    with refusing(f"--output_dir {out} cannot be written", "name another folder"):
        out.mkdir(parents=True, exist_ok=True)
        found = set(os.listdir(out))
    if found - {"config.json.tmp"}:
        with refusing(f"--output_dir {out} holds no run of this program", "name another folder"):
            kept = json.loads((out / "config.json").read_text())
            kept["output_dir"]  # or it is a config of something else
        for name in settings.keys() - FREE:
            if kept.get(name) != settings[name]:
                changed += f"{name} was {kept.get(name)!r}, is {settings[name]!r}; "

    gather(None)  # all have read the old settings before the new ones are written
    if cfg.overwrite:
        given = [cfg.model, cfg.sft_model, cfg.reward_model, cfg.cost_model, cfg.tokenizer]
        for source in [*given, cfg.dataset, cfg.eval_dataset, *(cfg.compare or ())]:
            if source and out.resolve() in Path(source).resolve().parents:
                refuse(f"--overwrite would delete {source}; move it out of {out}")
        for pattern in OURS.split():
            remove(*out.glob(pattern))
    elif changed and found != {"config.json"}:  # nothing is made yet
        mend = "go on with those, discard them by --overwrite, or name another folder and reuse"
        for flag, name in (("sft", "sft"), ("reward", "reward_model"), ("cost", "cost_model")):
            if (out / name).exists():
                mend += f" --{flag}_model {out / name}"
        refuse(f"--output_dir {out}: the run there has other settings: {changed}{mend}")
    write(out / "config.json", settings)


def try_score_model(run, name, loss_fn):
    """Say how a score model ranks the labelled pairs of the table's prompts."""
    if name == "reward_model" and run.cfg.reward_model:
        return  # labels of help were not asked for

    rows, pairs, right = [], 0, 0.0
    for row in run.table:
        if name == "cost_model":  # where it was given, a pair may have no labels of harm
            row = replace(row, pairs=row.pairs[row.pairs[:, 4] != 0])
        if len(row.pairs):
            rows.append(row)
            pairs += len(row.pairs)

    if pairs:
        for row, values in zip(rows, score_texts(run, name, rows)):
            right += float(loss_fn(row, values)[1]) * len(row.pairs)
        say(f"{name}: held-out accuracy of ranking {right / pairs:.1%}, {pairs} pairs")
    if right < 0.4 * pairs:
        say(f"  warning: it ranks most the wrong way round; a {name} is higher for more of it")


def run_all(run):
    """All stages in order; each finds what an earlier run of the same command has finished."""
    cfg = run.cfg
    if not cfg.sft_model:
        train_stage(run, "sft", run.train, sft_loss)
    if cfg.method == "pecan":
        pecan_stages(run)
    else:
        for name, loss_fn in zip(SCORE_MODELS, (reward_loss, harm_loss)):
            if not getattr(cfg, name):
                train_stage(run, name, run.train, loss_fn)
            try_score_model(run, name, loss_fn)

    problem, policies = pose(run), {"SFT": (run.reference, None)}
    if cfg.method == "sft":
        export(run, load_model(run.reference), run.out / "policy")
    elif cfg.method == "dpo":
        policies["DPO"] = one_shot(run, problem, 0.0)
    elif cfg.method == "cdpo":
        policies["C-DPO"] = constrained_dpo(run, problem, first_lambda(cfg, problem))
    else:
        name = {"mocan": "MoCAN", "pecan": "PeCAN"}[cfg.method]
        policies[name] = one_shot(run, problem, first_lambda(cfg, problem))

    for lam in cfg.lambdas or ():
        name = f"λ = {lam:.9g}" if lam else "DPO"
        if name not in policies:
            policies[name] = one_shot(run, problem, lam, f"lambda-{lam:.9g}")
    for path in cfg.compare or ():
        policies[path] = path, None
    evaluate(run, problem, policies)


def main(argv=None):
    """The whole program. Refusals are SystemExit(2) with one line on standard error."""
    cfg = parse(argv)
    check_settings(cfg)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_float32_matmul_precision("high")
    if GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # With a mask cuDNN plans anew for every shape; its backward may be NaN (pytorch 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    # FSDP2 does the mixed precision of a single process, too
    if (GPU or WORLD > 1 or cfg.dtype == "bfloat16") and not dist.is_initialized():
        alone = {} if WORLD > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend, wait = "cpu:gloo,cuda:nccl" if GPU else "gloo", timedelta(hours=4)
        dist.init_process_group(backend, timeout=wait, **alone)  # while process 0 writes 81 GB

    try:
        run = load_run(cfg, Path(cfg.output_dir))
        check_models(run)
        open_folder(cfg)  # data and models are sound: now it may write, or discard
        run_all(run)
        gather(None)  # no process takes the group down while another still uses it
    except KeyboardInterrupt:
        refuse(
            f"stopped; the same command, less --overwrite, goes on from {cfg.output_dir}", code=130
        )
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
