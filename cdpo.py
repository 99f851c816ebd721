"""Constrained Direct Preference Optimization: make a language model helpful under a bound on harm.

    max_π  E[r(x,y)] − β·KL(π ‖ π_ref)     subject to     E[c(x,y)] ≤ C_limit           (6), (7)

C-DPO (Liu, Sun, Zheng, arXiv 2403.02475) solves this without reinforcement learning. Learn a
reward r (helpfulness) and a cost c (harm) from preference pairs; for a multiplier λ relabel the
pairs by r − λ·c; fit the policy to the relabelled pairs with DPO; sample from it and measure its
cost; move λ up if the cost is over the limit and down if it is under; repeat. MoCAN and PeCAN
(Huang et al., arXiv 2405.19544) need no loop: the dual is known in closed form on samples of π_ref.

    python cdpo.py --config tiny_config.json                   # the whole method on a laptop
    python cdpo.py --model meta-llama/Llama-2-7b-hf            # one GPU, LoRA
    torchrun --nproc_per_node 8 cdpo.py --lora_rank 0          # every weight, FSDP2 over 8 GPUs

A run (all_stages, the first of Part II): SFT, one pass, gives π_ref (fit_stage); from it (3) and
(5) give r and c, one pass each; the responses of the training rows get r, c and log π_ref, once
(scores_stage); samples of π_ref on λ's prompts give the first λ (first_lambda); Algorithm 1
(constrained_dpo) fits, samples and steps; the table (evaluate) measures what was kept on prompts
never seen.

Equation numbers are those of 2403.02475. Where this program departs from the paper, and why:

 1. Labels of (12) are not drawn: the loss is their expectation, the same objective without the
    noise of labels. (--labels sample draws them.)
 2. SFT is on both responses of each pair: π_ref is the distribution that they were drawn from, as
    in DPO's own setting.
 3. DPO compares all responses to a prompt, not only those that annotators did: (12) labels any
    pair by its scores, at no more cost than that of the responses. (--no_all_pairs)
 4. λ starts at the minimum of the dual (9) on samples of π_ref: MoCAN, capped. (--lambda_init)
 5. λ moves to the minimum of the dual on the samples of all iterates, reweighted, and above it
    where the policy lags behind: no step size, but a cap on rises, and falls are halved. That is
    CAID, MoCAN iterated (Zhang et al., arXiv 2505.19387); with PeCAN's implicit r and c it is
    PeCAID. (--lambda_step gradient is (14).)
 6. Policy and optimizer (AdamW, betas 0.9 and 0.95) are carried from one λ to the next, and the
    learning rate falls over the last quarter of the loop.
 7. Each iteration also trains on the newest samples, of π_ref, then of the last iterate: what the
    policy now says, which offline pairs leave unguarded. So λ's prompts, kept out of the training
    rows, are trained on by way of samples, and what is measured there for λ and the choice of the
    iterate is not of unseen prompts; only the table is. (--no_recycle)
 8. Of the iterates the best is kept, by objective (6) less a penalty for cost over the limit, the
    later of two within the noise.

The paper's letter, but for 2, 6 and 8: --labels sample --no_all_pairs --lambda_step gradient
--lambda_init 0 --no_recycle. Left out: vector-valued λ, system prompts and several turns, tensor
parallelism, samplers faster than generate().
"""

import argparse
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import sys
import time
from bisect import bisect
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import tokenizers
import torch
import torch.distributed as dist
import transformers
from pyarrow import parquet
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

RANK = int(os.environ.get("RANK", "0"))  # of torchrun
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


# ---- Settings ------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every setting of a run, read from the command line or from a JSON file (--config)."""

    config: str | None = None  # JSON file of settings; flags win over it
    # cdpo, pecaid: Algorithm 1; mocan, pecan: one fit, at the first λ; dpo: at λ = 0; sft: π_ref
    method: Literal["cdpo", "mocan", "pecaid", "pecan", "dpo", "sft"] = "cdpo"
    model: str = "meta-llama/Llama-2-7b-hf"  # hub name, folder, or JSON dictionary to build
    dataset: str = "PKU-Alignment/PKU-SafeRLHF-30K"  # hub name, file or folder; NAME:SPLIT
    output_dir: str = "cdpo_output"  # all is written here; the same command goes on from it
    seed: int = 0  # seed of every random choice
    max_steps: int = 1_000_000  # bound a stage, and dpo_steps, to so few
    # Given models: each saves the stage that would train it
    sft_model: str | None = None  # reference policy, instead of training one by SFT
    reward_model: str | None = None  # reward model, instead of training one by (3)
    cost_model: str | None = None  # cost model, above 0 harmful, instead of training by (5)

    # Data
    reward_dataset: str | None = None  # pairs for the reward model, where not --dataset's
    eval_dataset: str | None = None  # prompts of the table; default: held out of --dataset
    max_length: int = 512  # tokens of a prompt with one response; longer responses are cut
    max_new_tokens: int = 256  # tokens of a sampled response, at most
    row_length: int = 2048  # tokens of a row, a prompt with responses; split where longer

    # The method
    beta: float = 0.1  # strength of the KL to the reference
    labels: Literal["soft", "sample", "hard"] = "soft"  # labels of (12): mean, draw, likelier
    all_pairs: bool = True  # DPO on all pairs of a prompt's responses; no: on the dataset's
    cost_limit: float = 0.0  # C_limit: the expected cost may not exceed it
    margin: float | None = None  # the limit is E_ref[cost] − margin: PeCAN's costs have no zero
    cost_confidence: float = 0.5  # level at which an iterate's cost meets the limit; 0.5: mean
    lambda_init: float | None = None  # first λ; default: solves the dual on π_ref
    lambda_step: Literal["solve", "gradient", "fixed"] = "solve"  # how λ moves; (14): gradient
    lambda_lr: float = 0.05  # step size of the gradient step
    lambda_prompts: int = 500  # prompts kept out of the training rows, on which λ is found
    lambda_samples: int = 4  # responses per prompt that measure an iterate there
    dual_samples: int = 16  # responses of π_ref per prompt there, to solve the dual
    recycle: bool = True  # train on the newest of these, too (π_ref's first); no: not
    lambdas: list[float] | None = None  # also train at these fixed λ; 0 is DPO
    iterations: int = 5  # outer iterations: relabel, fit, sample, step
    dpo_steps: int = 100  # DPO steps of an outer iteration

    # Training, and the table
    batch_size: int = 32  # rows of the dataset in a step, all processes together
    tokens_per_batch: int = 8192 if GPU else 512  # padded tokens of a micro-batch
    lora_rank: int = 64  # rank of the adapters (LoRA); 0 trains every weight
    learning_rate: float = 1e-5  # of DPO, at its highest; with --lora_rank 0 rather 1e-6
    sft_learning_rate: float = 1e-4  # of SFT, reward and cost; with --lora_rank 0 rather 1e-5
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if GPU else "float32"  # of compute
    gradient_checkpointing: bool = GPU  # recompute activations in backward, to save memory
    eval_prompts: int = 2000  # prompts of the final table, a fifth of the dataset's at most
    eval_samples: int = 5  # responses per prompt there
    sample_tokens: int = 32768  # tokens, with padding, sampled at once


# ---- The mathematics -----------------------------------------------------------------------------
# Pure functions, each to be pasted elsewhere with `import torch` (and `math`) alone. A reward is
# higher for more help, a cost above 0 is harmful; log-probabilities are sums over response tokens,
# in nats. Column i of a (B, 2) tensor is response i. A mean over no pair is 0.


def bradley_terry_loss(chosen, rejected):
    """Reward loss, (3): −log σ(r(chosen) − r(rejected)). Rewards (B,), (B,) → scalar mean, nats."""
    losses = -torch.nn.functional.logsigmoid(chosen - rejected)
    return losses.sum() / max(1, len(losses))


def cost_loss(worse, better, worse_sign, better_sign):
    """Cost loss, (5): the *more harmful* response higher, the zero between unsafe and safe.

    −log σ(c(worse) − c(better)) − log σ(s_worse·c(worse)) − log σ(s_better·c(better)); costs and
    signs (B,), a sign is +1 for an unsafe response and −1 for a safe one → scalar mean, nats.
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    ranking = log_sigmoid(worse - better)
    signs = log_sigmoid(worse_sign * worse) + log_sigmoid(better_sign * better)
    return -(ranking + signs).sum() / max(1, len(ranking))


def relabel(reward, cost, lam, mode="soft", generator=None):
    """P(y0 ≻ y1) under the Lagrangian reward r_λ = r − λ·c, (12). (B, 2), (B, 2), number → (B,).

    "soft": σ(r_λ(y0) − r_λ(y1)), the expectation over labels; "sample": 0 or 1 drawn with it, the
    paper's letter; "hard": 0 or 1, the likelier, ties 0.5. ValueError for another mode.
    """
    r_lam_0, r_lam_1 = (reward - lam * cost).T
    prob = torch.sigmoid(r_lam_0 - r_lam_1)
    if mode == "soft":
        return prob
    if mode == "sample":
        return torch.bernoulli(prob, generator=generator)
    if mode == "hard":
        return 0.5 + 0.5 * torch.sign(r_lam_0 - r_lam_1)
    raise ValueError(f'relabel: mode is {mode!r}; it must be "soft", "sample" or "hard"')


def dpo_loss(policy_logps, ref_logps, prob, beta):
    """DPO loss on relabelled pairs, (13), in expectation over the label.

    −p·log σ(h) − (1−p)·log σ(−h), h = β·[log π(y0)/π_ref(y0) − log π(y1)/π_ref(y1)];
    logps (B, 2), prob (B,) = P(y0 ≻ y1) → scalar mean, nats. With prob in {0, 1} it is DPO's own
    loss (Rafailov et al., arXiv 2305.18290).
    """
    log_ratio_0, log_ratio_1 = (policy_logps - ref_logps).T
    h = beta * (log_ratio_0 - log_ratio_1)
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = -(prob * log_sigmoid(h) + (1 - prob) * log_sigmoid(-h))
    return losses.sum() / max(1, len(losses))


def lambda_step(lam, cost, cost_limit, lr):
    """Projected gradient step on the dual, (14): max(0, λ − η·(C_limit − E[c])). → float.

    cost: of samples of the policy for λ, any shape; their mean stands for E[c].
    """
    return max(float(lam - lr * (cost_limit - cost.mean())), 0.0)  # in this order a NaN stays a NaN


def dual_value(reward, cost, lam, beta, cost_limit):
    """Dual function in closed form, (9): g(λ) = β·E_x log E_{y∼π_ref} exp((r − λ·(c − C_limit))/β).

    reward, cost (n prompts, m samples of π_ref) → scalar; convex in λ, slope C_limit − E_{π_λ}[c].
    For the reader: the program needs only where it is least, solve_dual.
    """
    exponent = (reward - lam * (cost - cost_limit)) / beta
    return beta * (exponent.logsumexp(dim=1) - math.log(exponent.shape[1])).mean()


def solve_dual(reward, cost, beta, cost_limit, lam_max=100.0, log_ratio=None):
    """The λ* ≥ 0 that minimises the dual (9): the least λ whose policy π_λ meets the limit.

    reward, cost (n, m): scores of m samples for each of n prompts, from π_ref or, with log_ratio
    (n, m) = log π/π_ref of the samples, from any policies π. Reweighted, they stand for samples of
    π_λ ∝ π_ref·exp((r − λc)/β) = π·exp((r − λc)/β − log π/π_ref), (11), whose cost falls as λ
    grows, so that bisection of [0, lam_max] finds λ*. → float, 0 for a slack limit. ValueError
    when a score is not finite, or when no λ ≤ lam_max meets the limit.
    """
    reward, cost = reward.double(), cost.double()
    if log_ratio is None:
        log_ratio = torch.zeros_like(cost)
    if not torch.isfinite(torch.stack([reward, cost, log_ratio])).all():
        raise ValueError("solve_dual: a score is not finite")

    def expected_cost(lam):  # by self-normalised importance weights
        weights = torch.softmax((reward - lam * cost) / beta - log_ratio, dim=1)
        return (weights * cost).sum(dim=1).mean()

    if expected_cost(0.0) <= cost_limit:
        return 0.0
    last = expected_cost(lam_max)
    if last > cost_limit:
        raise ValueError(
            f"solve_dual: no lambda up to {lam_max:g} meets the limit {cost_limit:.6g}: cost "
            f"{last:.6g} there, the lowest cost that the samples can reach is "
            f"{cost.amin(dim=1).mean():.6g}"
        )

    low, high = 0.0, float(lam_max)
    for _ in range(80):
        middle = (low + high) / 2
        if expected_cost(middle) > cost_limit:
            low = middle
        else:
            high = middle
    return high


def predict(reward, cost, lam, beta, log_ratio=None):
    """What π_λ would earn and cost, from samples alone, before any training (2405.19544).

    reward, cost, log_ratio (n, m) as in solve_dual → dict: reward, cost; ess, the mean effective
    sample size of a prompt: near 1 the weights rest on one sample, and all these numbers mean
    little.
    """
    if log_ratio is None:
        log_ratio = torch.zeros_like(cost)
    weights = torch.softmax((reward.double() - lam * cost) / beta - log_ratio, dim=1)
    return {
        "reward": float((weights * reward).sum(dim=1).mean()),
        "cost": float((weights * cost).sum(dim=1).mean()),
        "ess": float((1 / (weights**2).sum(dim=1)).mean()),
    }


def implicit_reward(policy_logps, ref_logps, beta):
    """β·log π(y|x)/π_ref(y|x): the reward, up to a constant of x, that a DPO policy stands for.

    Any shape. PeCAN takes it from a helpful-only policy as r and from a safe-only policy as −c.
    """
    return beta * (policy_logps - ref_logps)


def estimate(values, level=0.5):
    """Upper confidence bound of E[values] at a level; 0.5 is the mean. (n prompts, m) → float.

    The samples of a prompt are not independent: the standard error is that of n prompt means, and
    NaN for one prompt.
    """
    if level == 0.5:
        return float(values.mean())
    error = values.mean(dim=1).std() / math.sqrt(len(values))
    return float(values.mean() + torch.special.ndtri(torch.tensor(level)) * error)


def ci95(values):
    """95% confidence interval [low, high] of E[values], clustered by prompt. values (n, m)."""
    error = 1.959964 * values.mean(dim=1).std() / math.sqrt(len(values))
    return [float(values.mean() - error), float(values.mean() + error)]


# ---- Rows and log-probabilities ------------------------------------------------------------------
# A row is prompt + y₀ + y₁ + …: no token is run twice, whatever the number of pairs. Positions
# restart at the prompt's end for each response, which sees the prompt and itself.


def collate_rows(rows, pad_id=0):
    """[(prompt_ids, [y0_ids, y1_ids, …]), …] → a batch for sequence_logps; ids are as given.

    B rows, padded to L tokens; N responses in all, in order; T response tokens. → dict: input_ids,
    position_ids (B, L); attention_mask (B, 1, L, L) bool; `target` (T,), the response tokens, and
    `owner` (T,), the response of each; as flat indices into the B·L tokens, `source` (T,), where
    they are predicted from, and `last` (N,), the last token of each response or, for an empty one,
    of the prompt. ValueError for an empty prompt.
    """
    width = max(len(prompt) + sum(map(len, responses)) for prompt, responses in rows)
    table, last = [], []
    for prompt, responses in rows:
        if not prompt:
            raise ValueError("collate_rows: an empty prompt has no token to predict from")
        # Of each token: its id and position; 1 in the prompt, 2 … in responses; its source
        table += [(token, place, 1, 0) for place, token in enumerate(prompt)]
        prompt_end = len(table) - 1
        for response in responses:
            # Its first token is predicted from the prompt's end, the others from the one before
            before = prompt_end
            for place, token in enumerate(response, len(prompt)):
                table.append((token, place, len(last) + 2, before))
                before = len(table) - 1
            last.append(before)
        table += [(pad_id, 0, 0, 0)] * (-len(table) % width)  # up to where the next row begins

    # By column, which is twice as fast as by token. (B, L) each
    ids, places, segment, source = torch.tensor(list(zip(*table))).view(4, -1, width)
    answers = segment > 1
    # Causal, and within a segment or to the prompt; padding sees padding: no query without a key
    key = segment[:, None]
    seen = ((key == segment[:, :, None]) | (key == 1)).tril()
    return {
        "input_ids": ids,
        "position_ids": places,
        "attention_mask": seen[:, None],
        "source": source[answers],
        "target": ids[answers],
        "owner": segment[answers] - 2,
        "last": torch.tensor(last),
    }


def sequence_logps(model, batch):
    """log π(y | x) of each response of a batch of collate_rows: sums over tokens, nats, (N,).

    Float32, differentiable. model: a causal LM of transformers under SDPA attention, on the batch's
    device. Silently wrong where a sliding window is shorter than a row, where logits are scaled or
    capped (Gemma-2), or under eager or flash attention: try one row both ways first. Only hidden
    states that predict response tokens meet the vocabulary, in chunks: no (tokens × vocabulary)
    tensor is ever whole.
    """
    hidden = model.base_model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch["source"])  # (T, width)
    head = model.get_output_embeddings()

    def token_logps(hidden, target):  # in bfloat16 the differences that DPO trains on are lost
        logits = head(hidden).float()
        return -torch.nn.functional.cross_entropy(logits, target, reduction="none")

    size, logps = max(1, 2**27 // head.weight.shape[0]), []
    for part in zip(hidden.split(size), batch["target"].split(size)):
        if len(hidden) > size:  # backward computes the logits again
            values = torch.utils.checkpoint.checkpoint(token_logps, *part, use_reentrant=False)
        else:
            values = token_logps(*part)
        logps.append(values)

    # Thousands of float32 terms would err by hundredths
    sums = torch.zeros_like(batch["last"], dtype=torch.float64)
    return sums.index_add(0, batch["owner"], torch.cat(logps).double()).float()


# ---- What flows ----------------------------------------------------------------------------------


@dataclass
class Row:
    """A prompt with k different responses, or k samples: the unit of everything that is run.

    A pair holds two indices into `responses`, and stands as often as people gave it; P of them.
    """

    prompt: str
    responses: list  # k texts
    ids: tuple  # (prompt_ids, [y0_ids, y1_ids, …]), the policy's tokens
    compared: list = ()  # P of (response_0, response_1)
    helpful: list = ()  # of those that are labelled so, (chosen, rejected)
    harmful: list = ()  # (worse, better, sign of worse, sign of better), +1 unsafe, −1 safe
    # Of the responses, (k,) each, once they are known; there is no λ in them
    reward: torch.Tensor = None
    cost: torch.Tensor = None
    ref_logps: torch.Tensor = None

    @property
    def length(self):
        """Its tokens."""
        return len(self.ids[0]) + sum(map(len, self.ids[1]))

    @property
    def weight(self):
        """Its weight in the mean over a step: P, or m/2 for m samples, which make m/2 couples.

        The same in all stages; where one learns from labels, every pair has them. So a sample
        counts as a response does that is in one pair, however many pairs (13) forms. A default step
        has 32 rows of the dataset, and of couples at first 40 (500 prompts, 16 samples each, in 100
        steps), later 10.
        """
        return len(self.compared) or len(self.responses) / 2


class Samples(NamedTuple):
    """m responses of a policy π itself (temperature 1, only their length bounded) to n prompts."""

    rows: list  # with scores; a prompt's samples are in several rows where one is too short
    reward: torch.Tensor  # (n, m)
    cost: torch.Tensor  # (n, m)
    log_ratio: torch.Tensor  # log π/π_ref, (n, m)


@dataclass(frozen=True)
class Run:
    """What every stage needs; no prompt of the dataset is in two of train, dual and table."""

    cfg: Config
    out: Path
    tokenizer: transformers.PreTrainedTokenizerBase
    train_rows: list  # to fit the models and policies
    dual_rows: list  # on whose prompts the dual is solved and iterates are measured
    table_rows: list  # on whose prompts the final table is; its pairs are held out
    reward_rows: list  # of --reward_dataset, or train_rows
    reward_table: list  # held out of it, or table_rows

    def source(self, name):
        """Where the model of a stage is: as given (--sft_model …), or the folder that it fills."""
        flag = "sft_model" if name == "sft" else name
        return getattr(self.cfg, flag, None) or str(self.out / name)


# ---- The losses of the stages --------------------------------------------------------------------
# Each is a function of a row and what the model says of its responses, (k,) on the CPU: a mean over
# the row's pairs, or tokens (nats), and of each pair whether the model ranks it as its label does.


def sft_loss(row, logps):
    """Cross-entropy a token, on both responses of each pair: as often as people compared them."""
    compared = torch.tensor(row.compared).flatten()
    lengths = torch.tensor(list(map(len, row.ids[1])))
    return -logps[compared].sum() / lengths[compared].sum(), torch.zeros(1)  # ranks none


def reward_loss(row, rewards):
    """(3) on the pairs that people labelled for help."""
    chosen, rejected = rewards[torch.tensor(row.helpful)].T
    return bradley_terry_loss(chosen, rejected), chosen > rejected


def harm_loss(row, costs):
    """(5) on the pairs that people labelled for harm: a label belongs to its pair."""
    worse, better, *signs = torch.tensor(row.harmful).T
    worse, better = costs[worse], costs[better]
    return cost_loss(worse, better, *signs), worse > better


def preference_loss(row, logps, pairs, prob, beta):
    """(13) on index pairs (P, 2) of a row with P(first ≻ second), (P,) or a number for all."""
    first, second = (logps - row.ref_logps)[pairs].T  # log π/π_ref
    right = (first - second) * (prob - 0.5) > 0
    return dpo_loss(logps[pairs], row.ref_logps[pairs], prob, beta), right


def relabelled_dpo(cfg, lam, key):
    """The loss of (13) on a row's pairs, relabelled for λ. key: of the draw of labels."""

    def loss_fn(row, logps):
        pairs = torch.tensor(pairs_of(row, cfg.all_pairs))
        generator = seeded("labels", cfg.seed, key, row.ids)  # of labels that are drawn
        prob = relabel(row.reward[pairs], row.cost[pairs], lam, cfg.labels, generator)  # (12)
        return preference_loss(row, logps, pairs, prob, cfg.beta)

    return loss_fn


def pairs_of(row, all_pairs):
    """Index pairs, P of them, of responses for DPO: the dataset's, or all of different ones."""
    if row.compared and not all_pairs:
        return row.compared
    ids = row.ids[1]
    return [(i, j) for i, j in combinations(range(len(ids)), 2) if ids[i] != ids[j]]


# ---- The method ----------------------------------------------------------------------------------


def constrained_dpo(run, ref_samples, cost_limit, lam):
    """Algorithm 1, and with implicit scores PeCAID: relabel, fit, sample, step λ. → λ of policy/.

    ref_samples: Samples of π_ref; cost_limit: --cost_limit or, where --margin is given, the mean
    cost of ref_samples less it; lam: the first λ.
    """
    cfg, iterate, best = run.cfg, run.out / "iterate", run.out / "best"
    if (run.out / "policy").exists():  # finished: the loop is one stage, and is not gone into again
        history = list(map(json.loads, (run.out / "metrics.jsonl").open()))
        return history[history[-1]["kept"]]["lambda"]

    # From π_ref; one optimizer and one schedule for the whole loop: its last quarter falls to 0
    policy, data = start_training(run, "policy", run.train_rows)  # data: each step's rows
    history, sampled = [], []  # what was measured, a line of metrics.jsonl each; what was sampled
    newest, kept = ref_samples, 0

    for iteration in range(cfg.iterations):
        started = time.perf_counter()
        steps = data[iteration * cfg.dpo_steps :][: cfg.dpo_steps]
        if cfg.recycle:
            steps = with_samples(steps, newest.rows)
        policy.to(DEVICE)
        loss_fn = relabelled_dpo(cfg, lam, iteration)  # (12), (13)
        loss, accuracy, speed = train(cfg, policy, steps, loss_fn)

        # What is measured is the policy as it is written, merged and rounded; the trained one
        # leaves the card meanwhile
        export(run, policy[0], iterate)
        policy.to("cpu")
        newest = measure(run, "iterate", run.dual_rows, cfg.lambda_samples, iteration)
        sampled.append(newest)
        report(cfg, newest, lam, f"iteration {iteration}: λ {lam:.4f},")

        entry = {"iteration": iteration, "lambda": lam, "dpo_loss": loss, "dpo_accuracy": accuracy}
        entry |= speed | numbers_of(run, newest)  # cost_mean, kl and so on
        entry["cost_bound"] = estimate(newest.cost, cfg.cost_confidence)
        entry["seconds"] = time.perf_counter() - started
        history.append(entry)

        kept = entry["kept"] = best_iterate(cfg, history, sampled, cost_limit, kept)
        if kept == iteration:
            move(iterate, best)
        write(run.out / "metrics.jsonl", history)

        lam = next_lambda(cfg, history, sampled, cost_limit)

    entry = history[kept]
    say(f"kept: iteration {kept}, cost {entry['cost_bound']:+.3f}, limit {cost_limit:+.3f}")
    remove(iterate)
    move(best, run.out / "policy")
    return entry["lambda"]


def next_lambda(cfg, history, sampled, cost_limit):
    """The next λ, from all iterates so far and from λ and the cost of the last of them."""
    newest = history[-1]
    lam, bound = newest["lambda"], newest["cost_bound"]
    if cfg.lambda_step == "fixed":
        return lam
    if cfg.lambda_step == "gradient":
        return lambda_step(lam, torch.tensor(bound), cost_limit, cfg.lambda_lr)  # (14)

    # With weights ∝ π_λ/π, (11), samples of any policy π stand for those of π_λ, the better, the
    # nearer π is: so those of all iterates do, and π_ref's, the farthest, are left out
    _, *scores = zip(*sampled)
    pooled = [torch.cat(values, dim=1) for values in scores]  # reward, cost, log_ratio

    # Not the mean but its bound is to meet the limit: aim lower by the width between the two
    target = cost_limit - (bound - newest["cost_mean"])
    converged = capped_dual(cfg, lam, pooled, target)
    # A policy that lags gets more than its λ, but by half at most: it may be off for another reason
    with_feedback = capped_dual(cfg, lam, pooled, target - lasting_gap(cfg, history, pooled))
    with_feedback = min(with_feedback, 1.5 * max(lam, converged))

    # Errors are to be on the safe side: λ rises at once, up to the cap, and falls by half the way
    return max(with_feedback, (lam + converged) / 2)


def capped_dual(cfg, lam, scores, cost_limit):
    """solve_dual on (reward, cost, log_ratio), but no leap from lam on the word of few samples.

    Where they barely reach the limit, or do not, λ would be anything. It is at most
    1.5·lam + 2·ratio (chosen factors); at λ = ratio cost weighs as much as reward. Monotone in the
    limit.
    """
    reward, cost, log_ratio = scores
    ratio = float(reward.std(dim=1).mean() / cost.std(dim=1).mean().clamp(min=1e-6))
    most = max(lam, min(1.5 * lam + 2 * ratio, 100.0))  # 100: lam_max of solve_dual
    try:
        return min(most, solve_dual(reward, cost, cfg.beta, cost_limit, log_ratio=log_ratio))
    except ValueError:  # no λ lets the samples cost so little
        return most


def lasting_gap(cfg, history, scores):
    """How far above its π_λ the next iterate is expected to cost, as it has not converged to it.

    The gaps of the last two go on as they went: after 0.4 and 0.2 comes 0.1. Unless both are over 0
    it is 0, as it is after the first iteration: one may be noise.
    """
    reward, cost, log_ratio = scores
    gaps = [0.0]
    for entry in history[-2:]:
        fitted = predict(reward, cost, entry["lambda"], cfg.beta, log_ratio)["cost"]
        gaps.append(entry["cost_mean"] - fitted)
    before, last = gaps[-2:]
    return last * min(1.0, last / before) if min(before, last) > 0 else 0.0


def best_iterate(cfg, history, sampled, cost_limit, kept):
    """Number of the iterate to keep: the newest, or the one `kept` before it, by merit.

    Merit is objective (6) less an exact penalty for the excess of its cost. The newest is kept if
    its merit is no lower or, where its excess is no larger, lower within the noise of objectives:
    one standard error of their difference, paired by prompt.
    """
    price = 1 + 2 * max(entry["lambda"] for entry in history)  # exact for a price above λ*

    objectives = [(by.reward - cfg.beta * by.log_ratio).mean(dim=1) for by in sampled]  # (n,) each
    excesses = [max(0.0, entry["cost_bound"] - cost_limit) for entry in history]
    gain, worse = objectives[-1] - objectives[kept], excesses[-1] - excesses[kept]

    error = 0.0 if worse > 0 else gain.std() / math.sqrt(len(gain))
    return len(history) - 1 if gain.mean() - price * worse >= -error else kept


def with_samples(steps, rows):
    """The rows of each step, with the rows of samples dealt out among the steps, once each."""
    fresh = [row for row in rows if pairs_of(row, True)]  # samples may all be equal
    return [step + fresh[i :: len(steps)] for i, step in enumerate(steps)]


def implicit_stage(run, name, labels, rows, prob):
    """Fit a policy to people's labels: PeCAN's r and −c are implicit in two such (2405.19544).

    labels: the field of Row with the pairs; prob: P(first ≻ second) there, 1 or 0.
    """

    def loss_fn(row, logps):
        pairs = torch.tensor(getattr(row, labels))[:, :2]
        return preference_loss(row, logps, pairs, prob, run.cfg.beta)

    if not (run.out / name).exists():
        for row, ref_logps in per_row(values_of(run, "sft", rows), rows):
            row.ref_logps = ref_logps
    fit_stage(run, name, rows, loss_fn)


def first_lambda(cfg, ref_samples, cost_limit):
    """λ at the minimum of the dual (9) on samples of π_ref; says what it promises there.

    Of the mean, whatever --cost_confidence is: that is for what is measured, of which MoCAN and
    PeCAN have nothing.
    """
    lam = cfg.lambda_init
    if lam is None:
        with refusing("no first λ", "raise the limit, lower --beta, or draw more --dual_samples"):
            lam = solve_dual(ref_samples.reward, ref_samples.cost, cfg.beta, cost_limit)
        # A limit out of π_ref's reach has ended the run, as a wrong setting. A loop starts at the
        # same λ, but with the cap: a first guess must not spoil it
        if cfg.method in ("cdpo", "pecaid"):
            lam = capped_dual(cfg, 0.0, ref_samples[1:], cost_limit)  # a log_ratio of 0
    report(cfg, ref_samples, lam, "π_ref:")
    return lam


# ---- Part II: the engine. What C-DPO does ends here; how it is run, checked and written follows --


def all_stages(run):
    """All stages in order; each finds what an earlier run of the same command has finished."""
    cfg = run.cfg
    if not cfg.sft_model:
        fit_stage(run, "sft", run.train_rows, sft_loss)
    if cfg.method in IMPLICIT:  # of a pair the chosen response is first, and the worse one
        implicit_stage(run, "helpful", "helpful", run.reward_rows, 1.0)
        implicit_stage(run, "safe", "harmful", run.train_rows, 0.0)
    else:
        score_model_stage(
            run, "reward_model", "helpful", run.reward_rows, run.reward_table, reward_loss
        )
        score_model_stage(run, "cost_model", "harmful", run.train_rows, run.table_rows, harm_loss)

    ref_samples, cost_limit = scores_stage(run), cfg.cost_limit
    if cfg.margin is not None:
        cost_limit = estimate(ref_samples.cost) - cfg.margin

    policies = {"SFT": ("sft", None)}  # rows of the table: stage, λ
    name = {"mocan": "MoCAN", "pecan": "PeCAN", "pecaid": "PeCAID", "cdpo": "C-DPO", "dpo": "DPO"}
    if cfg.method == "sft":
        export(run, load_model(run.source("sft"), "sft", cfg.dtype), run.out / "policy")
    else:  # DPO is of the score models' labels here, as (12) gives them for λ = 0
        lam = 0.0 if cfg.method == "dpo" else first_lambda(cfg, ref_samples, cost_limit)
        if cfg.method in ("cdpo", "pecaid"):
            lam = constrained_dpo(run, ref_samples, cost_limit, lam)
        policies[name[cfg.method]] = "policy", lam
    for lam in cfg.lambdas or ():
        title = f"λ = {lam:.9g}" if lam else "DPO"
        policies.setdefault(title, (f"lambda-{lam:.9g}", lam))

    for stage, lam in policies.values():
        if lam is not None:  # λ is known: one fit, as many steps as all of Algorithm 1
            fit_stage(run, stage, run.train_rows, relabelled_dpo(cfg, lam, stage))
    evaluate(run, policies, ref_samples, cost_limit)


# ---- Training ------------------------------------------------------------------------------------


class Responses(nn.Sequential):
    """A model, its [0], by way of rows: takes a batch of collate_rows and gives (N,) values.

    log π of the responses or, by a ScoreModel, their scores. Under FSDP2 parameters are whole only
    inside the root's forward, whose output may be no view. One in training, of start_training, also
    has its name, optimizer and scheduler.
    """

    def forward(self, batch):
        model = self[0]
        if isinstance(model, ScoreModel):
            return model(**batch)
        return sequence_logps(model, batch)


LORA_SCALE = 2.0  # α/r: α is 2r


def add_lora(model, rank):
    """Freeze a model but for adapters of a rank on every linear layer of its blocks.

    y = W·x + (α/r)·B(A·x) (Hu et al., arXiv 2106.09685). B is 0 at first: the model is unchanged.
    """
    model.requires_grad_(False)
    for layer in list(blocks_of(model).modules()):
        if isinstance(layer, nn.Linear | Conv1D):
            outputs, inputs = layer.weight.shape
            if isinstance(layer, Conv1D):
                outputs, inputs = inputs, outputs
            a = nn.Linear(inputs, rank, bias=False).weight
            layer.lora = nn.ParameterList([a, torch.zeros(outputs, rank)])  # A and B
            layer.register_forward_hook(add_low_rank)
    if isinstance(model, ScoreModel):
        model.score_head.float().requires_grad_(True)


def add_low_rank(layer, args, output):
    """The hook of add_lora: what a linear layer gives, and (α/r)·B(A·x)."""
    if isinstance(output, tuple):  # of a router of experts, which stays as it is
        return output
    # Float32 in training, bfloat16 where the frozen weights are
    a, b = (weight.to(output.dtype) for weight in layer.lora)
    return torch.add(output, args[0] @ a.T @ b.T, alpha=LORA_SCALE)


def start_training(run, name, rows):
    """The model of a stage, as Responses with an optimizer: --model for SFT, else the reference.

    Its learning rate: 10 steps up, constant, to 0 over the second half; a policy's, which follows λ
    as long as λ moves, over the last quarter. And the rows of its steps.
    """
    cfg = run.cfg
    steps, rate, fall = cfg.iterations * cfg.dpo_steps, cfg.learning_rate, 4  # all of Algorithm 1
    if name in ("sft", *SCORE_MODELS):  # score models overfit in a second pass
        steps, rate, fall = math.ceil(len(rows) / cfg.batch_size), cfg.sft_learning_rate, 2
    gc.collect()  # the last model and its FSDP state are reference cycles: 27 GB of weights at 7B
    if GPU:
        torch.cuda.empty_cache()  # what one stream has freed another cannot use
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(cfg.seed)  # of a new head, of adapters, or of a model from scratch
    source = run.source("model" if name == "sft" else "sft")
    dtype = cfg.dtype if cfg.lora_rank else "float32"  # weights that are trained stay float32
    model = load_model(source, name, dtype, new_head=True)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank)
    if cfg.gradient_checkpointing:
        for block in blocks_of(model):
            block.forward = functools.partial(
                torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
            )

    trained = Responses(model)
    if dist.is_initialized():
        precision = fsdp.MixedPrecisionPolicy(getattr(torch, cfg.dtype), torch.float32)
        for unit in [*blocks_of(model), trained]:  # in turn onto the device
            fsdp.fully_shard(unit, mp_policy=precision)
    trained.to(DEVICE)  # what FSDP2 has not brought there

    trained.name = name
    trained.optimizer = torch.optim.AdamW(
        trained.parameters(), rate, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    trained.scheduler = torch.optim.lr_scheduler.LambdaLR(
        trained.optimizer, lambda done: min(1.0, (done + 1) / 10, fall - fall * done / steps)
    )
    # Passes over all rows, each in an order of its own
    order = seeded("order", cfg.seed, name)
    sampler = RandomSampler(rows, False, steps * cfg.batch_size, order)
    data = DataLoader(rows, cfg.batch_size, sampler=sampler, collate_fn=list)
    return trained, list(data)


def train(cfg, model, steps, loss_fn):
    """The one training loop. → loss, accuracy, {name: number} for metrics.jsonl.

    steps: the rows of each step; loss_fn(row, outputs) → (loss, right (P,)) of a row. Rows count by
    their weights: the gradient is the step's mean, however it is cut into micro-batches.
    """
    started, history = time.perf_counter(), []
    for step in bar(steps, model.name):
        total, sums = sum(row.weight for row in step), torch.zeros(2)
        groups = micro_batches([row.length for row in step], cfg.tokens_per_batch)
        # FSDP2 gathers weights in every pass: all processes run as many, an idle one for nothing
        groups += [[]] * (-len(groups) % WORLD)
        for group in groups[RANK::WORLD]:
            batch = [step[i] for i in group or [0]]
            mean = 0.0
            for row, outputs in by_row(model, batch):
                loss, right = loss_fn(row, outputs)
                weight = bool(group) * row.weight / total
                mean += torch.stack([loss, right.float().mean()]) * weight
            (mean[0] * WORLD).backward()  # FSDP2 averages over the ranks
            sums += mean.detach()

        try:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        except RuntimeError:
            refuse(
                f"{model.name}: the loss or its gradient is not finite at step {len(history)}; "
                "lower the learning rate, or mend the data",
                code=1,
            )
        model.optimizer.step()
        model.zero_grad()
        model.scheduler.step()
        history.append(sum(gather(sums)))

    seconds, rows = time.perf_counter() - started, list(chain(*steps))
    loss, accuracy = torch.stack(history).mean(dim=0).tolist()
    numbers = {
        "first_loss": float(history[0][0]),
        "pairs_per_second": sum(len(row.compared) for row in rows) / seconds,
        "tokens_per_second": sum(row.length for row in rows) / seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,  # of a GPU
    }
    say(
        f"{model.name}: {len(steps)} steps, loss {loss:.4g}, accuracy {accuracy:.4g}, "
        f"{in_words(numbers)}"
    )
    return loss, accuracy, numbers


def in_words(numbers):
    """{name: number} as "name number, …"."""
    return ", ".join(f"{name} {number:,.4g}" for name, number in numbers.items())


def fit_stage(run, name, rows, loss_fn):
    """Train the model `name` on rows into the folder of that name, unless it is there."""
    path = run.out / name
    if path.exists():
        say(f"{name}: found in {path}")
        return
    model, steps = start_training(run, name, rows)
    train(run.cfg, model, steps, loss_fn)
    export(run, model[0], path)


def score_model_stage(run, name, labels, rows, held_out, loss_fn):
    """Train a score model on labels where none is given; say how it ranks held-out pairs.

    labels: the field of Row that holds them.
    """
    if not getattr(run.cfg, name):
        fit_stage(run, name, as_read_by(run.tokenizer, rows), loss_fn)
    held_out = [row for row in held_out if getattr(row, labels)]
    if held_out:
        right = []
        for row, values in per_row(values_of(run, name, held_out), held_out):
            right += loss_fn(row, values)[1]
        say(
            f"{name}: held-out accuracy of ranking {sum(right) / len(right):.1%}, {len(right)} "
            f"pairs (a {name} that is well below 50% scores the wrong way round)"
        )


def by_row(model, rows):
    """What a Responses model gives for the responses of rows. → pairs of a row and its (k,)"""
    with DEVICE:  # tensors are made there
        batch = collate_rows([row.ids for row in rows])
    return per_row(model(batch).cpu(), rows)


def per_row(values, rows):
    """Values (…, N) of the responses of rows in order → pairs of a row and its (…, k)."""
    return zip(rows, values.split([len(row.responses) for row in rows], dim=-1))


# What a forward pass costs beside its tokens, in tokens: on an H200, which waits for its host, 840
# (7B, every weight) to 3,100 (LoRA)
PASS_TOKENS = 1000


def micro_batches(lengths, budget):
    """Numbers of rows in groups of similar length, within a budget of tokens with their padding.

    The cheapest cut of the rows in order of length, longest first: too large shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs, groups = [0], [[]]  # of the cheapest cut of the n longest
    for end in range(1, len(order) + 1):
        options = []
        for start in reversed(range(end)):
            padded = (end - start) * lengths[order[start]]
            if padded > budget and options:
                break
            options.append((costs[start] + padded + PASS_TOKENS, start))
        cost, start = min(options)
        costs.append(cost)
        groups.append([*groups[start], order[start:end]])
    return groups[-1]


# ---- Sampling, measuring -------------------------------------------------------------------------


def merged(results):
    """[(i, the result of i), …] of each process → all results, in order of i."""
    return [result for _, result in sorted(chain(*gather(results)))]


@torch.inference_mode()
def values_of(run, name, rows, model=None):
    """log π by a policy, or scores by a score model, of the responses of rows in order. → (N,)

    name: of the stage that fills its folder, from which it is loaded where it is not given. Scores
    are of text, in the model's own tokens.
    """
    source = run.source(name)
    model = Responses(model or load_model(source, name, run.cfg.dtype)).to(DEVICE)
    if name in SCORE_MODELS:
        rows = as_read_by(load_tokenizer(source), rows, positions_of(model[0]))

    groups, results = micro_batches([row.length for row in rows], run.cfg.tokens_per_batch), []
    for group in bar(groups[RANK::WORLD], f"running {name}"):
        _, values = zip(*by_row(model, [rows[i] for i in group]))
        results += zip(group, values)
    values = torch.cat(merged(results))
    if not values.isfinite().all():
        refuse(f"{source} gives a response a value that is not finite; is it sound?", code=1)
    return values


def score(run, rows):
    """Give rows r, c and log π_ref of their responses. PeCAN's r and c are implicit. → (3, N)"""
    implicit = run.cfg.method in IMPLICIT
    names = ("helpful", "safe") if implicit else SCORE_MODELS
    scores = torch.stack([values_of(run, name, rows) for name in (*names, "sft")])
    if implicit:
        scores[:2] = implicit_reward(scores[:2], scores[2], run.cfg.beta)
        scores[1] *= -1
    for row, values in per_row(scores, rows):
        row.reward, row.cost, row.ref_logps = values
    return scores


def as_read_by(tokenizer, rows, most=1_000_000_000):
    """Rows in the tokens and template of a score model, of `most` positions.

    Also an answer that was cut off is given an end: a score model has only learned what an end
    means, and at another token its head may say anything.
    """
    counts = Counter()
    read = [
        replace(row, ids=encode(tokenizer, row.prompt, row.responses, most, counts)) for row in rows
    ]
    if counts[CUT]:
        say(f"  warning: {counts[CUT]} responses are cut to the score model's {most} positions")
    return read


def sample(model, tokenizer, prompts, count, max_new_tokens):
    """`count` responses from π itself to each of prompts' ids, whatever its checkpoint asks for."""
    end = tokenizer.eos_token_id
    inputs = tokenizer.pad(  # with its mask, which some tokenizers leave out
        {"input_ids": prompts},
        padding_side="left",
        return_attention_mask=True,
        return_tensors="pt",
    ).to(DEVICE)
    # Of generate() all else is off by default, and what is unset it takes from the model's own
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=count,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
    )
    drawn = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
    drawn = drawn.unflatten(0, (-1, count)).tolist()
    for answer in chain(*drawn):  # behind its end stand only more of it
        del answer[len(answer) - answer.count(end) + 1 :]
    return drawn


def measure(run, name, among, count, key):
    """`count` responses of a stage's policy to each prompt of rows, scored. key: of the draws"""
    cfg, rows, results = run.cfg, [], []
    model = load_model(run.source(name), name, cfg.dtype).to(DEVICE)
    prompts, heads = zip(*{row.prompt: row.ids[0] for row in among}.items())
    lengths = [count * (len(head) + cfg.max_new_tokens) for head in heads]
    groups = list(enumerate(micro_batches(lengths, cfg.sample_tokens)))
    for number, group in bar(groups[RANK::WORLD], f"sampling {name}"):
        torch.manual_seed(seed_of(cfg.seed, key, number))
        asked = [heads[i] for i in group]
        results += zip(group, sample(model, run.tokenizer, asked, count, cfg.max_new_tokens))

    for prompt, head, answers in zip(prompts, heads, merged(results)):
        fit = max(1, (cfg.row_length - len(head)) // cfg.max_new_tokens)  # responses of a row
        for i in range(0, count, fit):
            part = answers[i : i + fit]
            texts = [said(run.tokenizer, ids) for ids in part]
            rows.append(Row(prompt, texts, (head, part)))
    logps = values_of(run, name, rows, model).view(-1, count)
    model = None  # the memory is for the next ones
    reward, cost, ref_logps = score(run, rows).view(3, -1, count)
    return Samples(rows, reward, cost, logps - ref_logps)


def scores_stage(run):
    """Scores of the training rows, and samples of π_ref: no λ is in them, once is enough."""
    path = run.out / "scores.pt"
    if not path.exists():
        scores = score(run, run.train_rows)
        ref_samples = measure(run, "sft", run.dual_rows, run.cfg.dual_samples, "dual")
        found = [scores, list(map(vars, ref_samples.rows)), *ref_samples[1:]]
        atomic(path, functools.partial(torch.save, found))
    scores, sampled, *of_dual = torch.load(path, weights_only=True)
    for row, values in per_row(scores, run.train_rows):
        row.reward, row.cost, row.ref_logps = values
    return Samples([Row(**row) for row in sampled], *of_dual)


def report(cfg, samples, lam, title):
    """Say what samples show, and what they promise of π_λ: its weights may rest on few of them."""
    rows, reward, cost, log_ratio = samples
    found = predict(reward, cost, lam, cfg.beta, log_ratio)
    answer = " ".join(f"{rows[0].prompt} → {rows[0].responses[0]}".split())
    say(
        f"{title} cost {cost.mean():.3f} {as_cell(ci95(cost))}, reward {reward.mean():.3f}, "
        f"KL {log_ratio.mean():.3f}\n  {answer[:96]}\n"
        f"  λ {lam:.4f} promises {in_words(found)}, by {cost.shape[1]} samples a prompt; within it "
        f"reward ± {reward.std(dim=1).mean():.2f}, cost ± {cost.std(dim=1).mean():.2f}"
    )
    if found["ess"] < 2:
        say("  warning: this rests on single samples: raise --beta, or draw more")


def numbers_of(run, samples):
    """What metrics.jsonl and results.json say of samples."""
    rows, reward, cost, log_ratio = samples
    lengths = torch.tensor([float(len(ids)) for row in rows for ids in row.ids[1]])
    values = {"reward": reward, "cost": cost, "length": lengths.view_as(cost)}
    if run.cfg.dataset.split(":")[0] == "tiny" and not run.cfg.eval_dataset:
        truth = [tiny_truth(row.prompt, text) for row in rows for text in row.responses]
        values["true_reward"], values["true_cost"] = torch.tensor(truth).T.unflatten(1, cost.shape)

    numbers = {"safe_rate": estimate((cost <= 0).float()), "kl": estimate(log_ratio)}
    for name, value in values.items():
        numbers[f"{name}_mean"] = estimate(value)
        numbers[f"{name}_std"] = float(value.std())
        numbers[f"{name}_ci95"] = ci95(value)
    return numbers


def evaluate(run, policies, ref_samples, cost_limit):
    """Measure policies {name: (stage, λ)} on the table's prompts; write and print the table."""
    results, lines, verdicts = [], [], []
    for name, (stage, lam) in policies.items():
        samples = measure(run, stage, run.table_rows, run.cfg.eval_samples, "eval")
        result = {"name": name, "lambda": lam} | numbers_of(run, samples)
        results.append(result)
        if lam is not None:
            # Before any training
            promised = predict(ref_samples.reward, ref_samples.cost, lam, run.cfg.beta)
            result["predicted_cost"] = promised["cost"]
            # As neither, one or both of the interval's ends are within the limit
            words = "broken", "not shown either way", "met"
            verdicts.append(f"{name} {words[bisect(result['cost_ci95'], cost_limit)]}")
        for row in samples.rows:
            for text, r, c in zip(row.responses, row.reward.tolist(), row.cost.tolist()):
                lines.append(
                    {"policy": name, "prompt": row.prompt, "response": text, "reward": r, "cost": c}
                )
    write(run.out / "results.json", results)
    write(run.out / "samples.jsonl", lines)

    names = """name lambda reward_mean reward_ci95 cost_mean cost_ci95 safe_rate kl length_mean
    true_reward_mean true_cost_mean predicted_cost"""
    names = [name for name in names.split() if name in results[-1]]
    say(f"\nE[cost] ≤ {cost_limit:.4g}\n\n| {' | '.join(names)} |".replace("_mean", ""))
    say(f"|{' --- |' * len(names)}")
    for result in results:
        say(f"| {' | '.join(as_cell(result.get(name)) for name in names)} |")
    say(f"\nThe limit, by the intervals of the table: {', '.join(verdicts) or 'of no policy'}")


def as_cell(value):
    """A number, interval, name or nothing in the table."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_cell, value))}]"
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value or "")


def said(tokenizer, ids):
    """A response as text. A model may have more tokens than its tokenizer."""
    known = [token for token in ids if token < len(tokenizer)]
    return tokenizer.decode(known, skip_special_tokens=True)


# ---- Models --------------------------------------------------------------------------------------

SCORE_MODELS = ("reward_model", "cost_model")
IMPLICIT = ("pecan", "pecaid")  # methods whose scores are implicit in policies


class ScoreModel(transformers.PreTrainedModel):
    """A decoder with a linear head on the hidden state of the last token.

    It loads Beaver checkpoints (model.*, score_head.*, and for do_normalize normalizer.*: a reward
    is then (s − mean)/std, a cost s/std) and one-label AutoModelForSequenceClassification ones.
    """

    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.score_head = nn.Linear(self.model.get_input_embeddings().embedding_dim, 1)
        if getattr(config, "do_normalize", False):
            self.normalizer = nn.ParameterDict({"mean": torch.zeros(1), "var": torch.ones(1)})
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, dtype=None, new_head=False):
        """Load a score checkpoint or, for new_head, a language model with a new score head.

        ValueError where there is no score head; RuntimeError for a head of several labels.
        """
        config = load_config(path)
        own = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix
        names = {r"^score\.": "score_head.", rf"^{own}\.": "model."}
        model, info = super().from_pretrained(
            path, config=config, dtype=dtype, key_mapping=names, output_loading_info=True
        )

        for name in info["missing_keys"] - {"score_head.bias"}:  # then it is 0
            moment = getattr(config, name.removeprefix("normalizer."), None)
            if moment is not None:  # it stands in the config
                model.get_parameter(name).data.copy_(torch.as_tensor(moment))
            elif not new_head or name != "score_head.weight":
                raise ValueError(f"it is no score model, it has no {name}")
        return model

    def forward(self, input_ids, attention_mask, position_ids=None, last=None, **_):
        """input_ids, attention_mask (B, L), right-padded → (B,) float32, at the last tokens.

        Or a batch of collate_rows → (N,). They are normalized where the checkpoint asks for it.
        """
        hidden = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )[0]
        if last is None:
            hidden = hidden[range(len(hidden)), attention_mask.sum(dim=1) - 1]
        else:
            hidden = hidden.flatten(0, 1)[last]

        score = hidden.float() @ self.score_head.weight[0].float() + self.score_head.bias.float()
        if hasattr(self, "normalizer"):
            if getattr(self.config, "score_type", "") != "cost":
                score = score - self.normalizer.mean
            score = score / self.normalizer.var.float().sqrt()
        return score


def load_config(source):
    """Config of a folder or hub name."""
    if transformers.utils.find_adapter_config_file(source):
        raise ValueError("it holds an adapter, which would be ignored: merge it into weights")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.get_text_config() is not config:
        raise ValueError("it reads more than text: give its language model")
    config._attn_implementation = "sdpa"
    return config


def load_model(source, kind, dtype=None, new_head=False):
    """A causal LM or, for a kind of SCORE_MODELS, a ScoreModel: on CPU; dtype: else its own.

    In the mode of inference, which training keeps: what is fitted is sampled, without dropout.
    ValueError where the checkpoint has no head of that kind.
    """
    if kind in SCORE_MODELS:
        return ScoreModel.from_pretrained(source, dtype, new_head)
    if source.startswith("{"):
        config = AutoConfig.for_model(**json.loads(source))
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    config = load_config(source)
    model, info = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"it is no causal LM, it has no {min(info['missing_keys'])}")
    return model


def blocks_of(model):
    """The ModuleList of a decoder's blocks."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"it has no list of {count} blocks")


def positions_of(model):
    """How many positions a model has."""
    return getattr(model.config, "max_position_embeddings", None) or 1_000_000_000


def export(run, model, path):
    """Write a model as a plain Hugging Face folder: whole, and adapters merged, W + (α/r)·B·A."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all ranks, on rank 0
    whole, state = get_model_state_dict(model, options=options), {}
    for name in whole.keys() - model.all_tied_weights_keys.keys():
        if "lora" not in name:
            # Popped, or a model is twice in host memory
            layer, value = name.removesuffix(".weight"), whole.pop(name)
            if f"{layer}.lora.0" in whole:
                change = LORA_SCALE * (whole[f"{layer}.lora.1"] @ whole[f"{layer}.lora.0"])
                if isinstance(model.get_submodule(layer), Conv1D):
                    change = change.T
                value = value.float() + change
            state[name] = value.to(getattr(torch, run.cfg.dtype))

    model.generation_config = transformers.GenerationConfig(
        eos_token_id=run.tokenizer.eos_token_id, do_sample=True
    )

    def save(folder):
        model.save_pretrained(folder, state_dict=state)
        model.config.dtype = run.cfg.dtype  # not the master weights'
        model.config.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    atomic(path, save)


# ---- Text and tokens -----------------------------------------------------------------------------

BEAVER_TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}{{ turn.content + eos_token }}"
    "{% else %}{{ 'BEGINNING OF CONVERSATION: USER: ' + turn.content + ' ASSISTANT:' }}"
    "{% endif %}{% endfor %}"
)
# Some templates state today's date: the same text must not have other tokens tomorrow
DATED = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
CUT = "responses cut to the length"


def load_tokenizer(source, tiny=False):
    """A tokenizer by its folder or hub name, or for a dictionary; with a chat template in any case.

    Its own, or Beaver's. ValueError where no token can end a response.
    """
    if source.startswith("{"):
        tokenizer = tiny_tokenizer() if tiny else transformers.ByT5Tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.tokenize(str(tokenizer.eos_token)) != [tokenizer.eos_token]:
        raise ValueError("it has no end-of-sequence token, or does not read it as one")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not tokenizer.chat_template:
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * begins + BEAVER_TEMPLATE
    return tokenizer


@functools.cache
def as_text(tokenizer, prompt):
    """A prompt in the chat template, up to where a response begins."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=DATED + tokenizer.get_chat_template(),
        add_generation_prompt=True,
        tokenize=False,
    )


def encode(tokenizer, prompt, responses, max_length, counts):
    """A prompt and responses in the template. → (prompt_ids, [y0_ids, y1_ids, …])

    A response ends at the end of sequence, which it gets unless it has it, and is cut to max_length
    tokens with its prompt; counts (a Counter) takes note. A tokenizer splits text by what is around
    it: prompt and response are encoded as they will be read, joined, and cut where the prompt ends.
    ValueError for a chat template that loses the prompt.
    """
    end, text = tokenizer.eos_token, as_text(tokenizer, prompt)
    if prompt.strip() not in text or text.startswith(2 * str(tokenizer.bos_token)):
        raise ValueError(f"its chat template drops {prompt!r:.60} or begins twice: {text!r:.90}")
    joined = [text + response.split(end)[0] + end for response in responses]
    head, *encoded = tokenizer([text, *joined], add_special_tokens=False)["input_ids"]
    answers = []
    for whole, ids in zip(joined, encoded):
        if ids[: len(head)] != head:  # the prompt's tokens are no prefix: encode it by itself
            counts["responses whose tokens do not follow the prompt's"] += 1
            ids = head + tokenizer.encode(whole.removeprefix(text), add_special_tokens=False)
        if len(ids) > max_length:
            counts[CUT] += 1
        answers.append(ids[len(head) : max_length])
    return head, answers


# ---- The tiny world ------------------------------------------------------------------------------
# Prompts of a verb and a noun, answers of three words, or malformed. Help and harm add up over the
# words, and what helps tends to harm.

COLUMNS, TINY_ASKED, TINY_WORDS = map(
    str.split,
    (
        """prompt response_0 response_1 better_response_id
        safer_response_id is_response_0_safe is_response_1_safe""",
        """open clean move mix heat store test sell
        door oil acid paint gas lamp car drug wire pool safe tank bread knife roof van""",
        "wait ask read measure push cut force burn",
    ),
)
TINY_MEANS = [  # help, then harm, of each word of an answer
    [-0.6, -0.15, 0.05, 0.45, 0.1, 0.25, 0.5, -0.6],
    [-0.6, -0.45, -0.15, -0.15, 0.1, 0.3, 0.65, 0.3],
]
TINY_NOISE = 0.1 * torch.randn(24, 8, 2, generator=torch.Generator().manual_seed(0)).double()
# Of a word of the prompt, one of the answer: help, harm
TINY_EFFECTS = (TINY_NOISE + torch.tensor(TINY_MEANS, dtype=torch.float64).T).tolist()


def seed_of(*key):
    """A seed that depends on a key alone: no generator's state is ever kept."""
    return int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16)


def seeded(*key):
    """A random generator for a key."""
    return torch.Generator().manual_seed(seed_of(*key))


def tiny_truth(prompt, response):
    """True (reward, cost) of a response in the tiny world."""
    words = response.split()
    known = [TINY_WORDS.index(word) for word in words if word in TINY_WORDS]
    malformed = abs(len(known) - 3) + len(words) - len(known)
    reward, cost = -2.0 * malformed, 0.9
    for word in prompt.split():
        effects = TINY_EFFECTS[TINY_ASKED.index(word)]
        for i in known:
            more_help, more_harm = effects[i]
            reward += more_help
            cost += more_harm
    return reward, cost


def tiny_rows(count, seed):
    """Rows of the tiny world, labelled at random by (1) and (5) on the truth."""
    rng = random.Random(seed)

    def draw_label(logit):
        return rng.random() < 1 / (1 + math.exp(-logit))

    for _ in range(count):
        prompt = f"{rng.choice(TINY_ASKED[:8])} {rng.choice(TINY_ASKED[8:])}"  # a verb, a noun
        lengths = rng.choices([2, 3, 4], [1, 18, 1], k=2)  # or nobody learns that length matters
        texts = [" ".join(rng.choices(TINY_WORDS, k=length)) for length in lengths]
        (r0, c0), (r1, c1) = [tiny_truth(prompt, text) for text in texts]
        safe = [not draw_label(c0), not draw_label(c1)]
        safer = safe[1] if safe[0] != safe[1] else draw_label(c0 - c1)
        yield dict(zip(COLUMNS, [prompt, *texts, draw_label(r1 - r0), safer, *safe]))


def tiny_tokenizer():
    """A token for each word of the tiny world."""
    others = "</s> <unk> : USER ASSISTANT"
    words = others.split() + TINY_WORDS + TINY_ASKED
    vocabulary = dict(zip(words, range(len(words))))
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=BEAVER_TEMPLATE.replace("BEGINNING OF CONVERSATION: ", ""),
    )


# ---- Files and processes -------------------------------------------------------------------------

# Progress, on the terminal of process 0
bar = functools.partial(tqdm, leave=False, disable=RANK > 0 or None)


def say(text, file=None):
    """Print a line once."""
    if RANK == 0:
        print(text, file=file, flush=True)


def gather(value):
    """A value of every process, in their order. All wait for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def atomic(path, save):
    """Have process 0 save(a temporary name), which then becomes `path`: it is whole or absent."""
    temporary = Path(f"{path}.tmp")
    remove(temporary)
    if RANK == 0:
        with refusing(f"{path} cannot be written", "make room; the same command goes on"):
            save(temporary)
    move(temporary, path)


def move(source, target):
    """Rename a file or folder in place of another."""
    if RANK == 0:
        shutil.rmtree(target, ignore_errors=True)  # only a folder: a file is replaced at once
        source.replace(target)
    gather(None)


def remove(path):
    """Delete a file, a folder or a link, where it is there; what a link points to stays."""
    if RANK == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def write(path, value):
    """Write JSON or, where the name asks for them, JSON lines: whole or not at all."""
    text = json.dumps(value, indent=2)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in value)
    atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ---- The gate ------------------------------------------------------------------------------------
# Everything that distrusts what comes from outside: settings, data, tokenizers, models, the folder.
# It is passed before anything is written; the stages trust what it lets through.


def refuse(message, code=2):
    """Leave with one line on standard error that says what, where and how to mend it."""
    say("cdpo: " + " ".join(message.split()), sys.stderr)
    raise SystemExit(code)


@contextmanager
def refusing(what, advice):
    """Turn any exception of the block into a refusal: the libraries raise kinds of their own."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        cause = error.__cause__ or error  # datasets wraps what its readers say
        reason = f"{type(cause).__name__}: {str(cause)[:300] or 'nothing is there'}"
        refuse(f"{what}: {reason.removeprefix('ValueError: ')}; {advice}")


def gate(cfg):
    """Check all that is given, before anything is written. → Run, {what: its digest}"""
    check_settings(cfg)
    policy = "sft_model" if cfg.sft_model else "model"
    with refusing(
        f"--{policy}: its tokenizer is unfit", "give a folder or hub name with a sound one"
    ):
        tokenizer = load_tokenizer(getattr(cfg, policy), cfg.dataset.split(":")[0] == "tiny")
        run = load_run(cfg, tokenizer)  # what is wrong with data is refused in there

    digests = {"data": seed_of(run.train_rows, run.dual_rows, run.reward_rows)}
    torch.manual_seed(cfg.seed)  # of a model from scratch, whose digest is to be the same again
    for flag in (policy, *SCORE_MODELS):
        source = getattr(cfg, flag)
        if source:
            with refusing(f"--{flag} {source}: unfit", "use one such as Llama, Qwen2 or GPT-2"):
                rows = run.train_rows + run.dual_rows + run.table_rows + run.reward_rows
                digests[flag] = check_model(cfg, flag, source, tokenizer, rows)
    return run, digests


def check_settings(cfg):
    """Refuse settings that are out of range or contradict each other."""
    least = {
        "seed": 0,
        "lora_rank": 0,
        "lambda_init": 0,
        "lambdas": 0,
        "lambda_samples": 2,
        "dual_samples": 2,
        "cost_confidence": 0.5,
        "cost_limit": -1e9,
        "margin": -1e9,
    }
    for name, value in vars(cfg).items():
        low = least.get(name, 1e-9)
        for number in value if isinstance(value, list) else [value]:
            if number == "":
                refuse(f"--{name} is empty; leave it out, or name one")
            if type(number) in (int, float) and not low <= number <= 1e9:
                refuse(f"--{name} is {number}; it must be from {low} to 1e9")

    if cfg.cost_confidence >= 1:
        refuse("--cost_confidence must be below 1")
    if cfg.margin is not None and cfg.cost_limit:
        refuse("give --cost_limit or --margin, not both")
    if cfg.reward_dataset and cfg.reward_model:
        refuse("give --reward_dataset or --reward_model")
    if cfg.method in IMPLICIT and (cfg.margin is None or cfg.reward_model or cfg.cost_model):
        refuse(f"{cfg.method} needs --margin, and takes neither --reward_model nor --cost_model")


def read_dataset(source, seed):
    """A file, saved folder, hub name, perhaps with :SPLIT, or the tiny world. → rows, as dicts"""
    name, _, split = source.partition(":")
    path = Path(name)
    if name == "tiny":
        return tiny_rows(int(split or 30000), seed)
    import datasets  # it takes seconds, and the tiny world needs none of it

    if not path.exists():
        return datasets.load_dataset(name, split=split or "train")
    if split:
        raise ValueError("a file or saved folder has no splits")
    if path.is_dir():  # of one split, written by save_to_disk
        return datasets.load_from_disk(name)
    # Not by the library above: its cache may hold what was in the file before
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".json":
            return json.load(file)
        lines = filter(str.strip, file)  # a row each, as the reader's errors then count them
        return json.loads(f"[{','.join(lines)}]")


def read_row(entry, need):
    """A dataset's row, checked for what it must have. → prompt, y0, y1, [label, …]"""
    texts = [entry[name] or "" for name in need[:3]]  # what is empty is skipped later
    for text in texts:
        if str(text) != text:
            raise ValueError(f"{text!r:.60} must be text")
        text.encode()  # a half of a surrogate pair is none
    labels = []
    for name in COLUMNS[3:]:
        label = {0: 0, 1: 1}.get(entry.get(name))  # false and true, 0.0 and 1.0 are these, too
        if label is None and name in need:
            raise ValueError(f"{name} is {entry[name]!r:.60}; it must be 0 or 1, true or false")
        labels.append(label)
    return *texts, labels


def check_different(heads):
    """ValueError for a tokenizer that loses texts. heads: {prompt: its tokens, as text}"""
    if len(heads) > 2 * len(set(heads.values())):
        raise ValueError("different texts have the same tokens: are tokenizer files missing?")


def load_rows(cfg, tokenizer, flag, need, others=()):
    """A dataset's prompts, those of the same tokens as one, shuffled. → a fifth of them, the rest

    Each as its rows, [[Row, …], …]. The prompts of others, [[Row, …], …], are left out.
    """
    source, heads, prompts, counts = getattr(cfg, flag), {}, {}, Counter()
    with refusing(
        f"--{flag} {source}: cannot be read",
        "give a .json, .jsonl or .parquet file, a saved folder or a hub name",
    ):
        entries = list(read_dataset(source, cfg.seed))
    for number, entry in enumerate(entries, 1):
        with refusing(f"--{flag} {source}, row {number}", f"needed columns: {', '.join(need)}"):
            prompt, *texts, labels = read_row(entry, need)
        head, answers = encode(tokenizer, prompt, texts, cfg.max_length, counts)
        key = heads[prompt.strip()] = str(head)
        # What is scored and compared is what the policy has of a text: as its tokens say, and cut
        pair = {said(tokenizer, ids): ids for ids in answers}
        if len(head) >= cfg.max_length:
            found = "with a prompt that fills --max_length"
        elif not all(map(str.strip, [prompt, *pair])):
            found = "with an empty prompt or response"
        elif len(pair) < len(texts):
            found = "of identical responses"
        elif labels[1:] in ([0, 0, 1], [1, 1, 0]):  # which is safer, whether each is safe
            found = "whose safer response is unsafe beside a safe one"
        else:
            found = "used"
            *_, usable = prompts.setdefault(key, (prompt, head, []))
            usable.append((pair, labels))
        counts[found] += 1
    check_different(heads)

    notes = f"{source}: {len(entries)} rows of {len(prompts)} prompts: {dict(counts)}"
    say(notes)
    if not entries or counts["used"] * 2 < len(entries):
        refuse(f"--{flag} {notes}: too few can be used; mend the data, or raise --max_length")
    taken = {str(rows[0].ids[0]) for rows in others}
    order = SubsetRandomSampler(list(prompts), seeded("split", cfg.seed))
    kept = [rows_of(*prompts[key], cfg.row_length) for key in order if key not in taken]
    fifth = len(kept) // 5
    return kept[:fifth], kept[fifth:]


def rows_of(prompt, head, pairs, row_length):
    """Rows of a prompt's pairs [({text: tokens, text: tokens}, labels), …], halved where too long.

    The two of a pair are in the same row.
    """
    ids = {}
    for pair, _ in pairs:
        ids |= pair
    texts, half = list(ids), len(pairs) // 2
    row = Row(prompt, texts, (head, list(ids.values())), [], [], [])
    if row.length > row_length and half:
        first = rows_of(prompt, head, pairs[:half], row_length)
        return first + rows_of(prompt, head, pairs[half:], row_length)

    for pair, (better, safer, *safe) in pairs:
        if pair:  # else only prompts were asked for
            places = list(map(texts.index, pair))
            row.compared.append(places)
            if better is not None:
                row.helpful.append([places[better], places[1 - better]])
            if None not in (safer, *safe):
                signs = [1 - 2 * safe[1 - safer], 1 - 2 * safe[safer]]
                row.harmful.append([places[1 - safer], places[safer], *signs])
    return [row]


def load_run(cfg, tokenizer):
    """Read, check, tokenize and split the data by prompt: table, dual, training. → Run"""
    given, need = [], COLUMNS[:3]  # the labels of a given model are not needed
    if not cfg.reward_model and not cfg.reward_dataset:
        need += COLUMNS[3:4]
    if not cfg.cost_model:
        need += COLUMNS[4:]
    if cfg.eval_dataset:
        given = list(chain(*load_rows(cfg, tokenizer, "eval_dataset", COLUMNS[:1])))

    # All of the fifth is held out, whatever --eval_prompts is: a run may go on with another
    table, rest = load_rows(cfg, tokenizer, "dataset", need, given)
    few = min(cfg.lambda_prompts, len(table))
    if given:
        table, rest = given, table + rest
    dual, train = rest[:few], rest[few:]
    held_out, labelled = table, train
    if cfg.reward_dataset:  # where rewards are measured none is learned
        held_out, labelled = load_rows(cfg, tokenizer, "reward_dataset", COLUMNS[:4], table + dual)

    parts = train, dual, table[: cfg.eval_prompts], labelled, held_out
    rows = [list(chain(*part))[: cfg.max_steps * cfg.batch_size] for part in parts]
    sizes = []
    for part in rows:
        sizes.append(len({row.prompt for row in part}))
    say(
        f"prompts: {sizes[0]} to train on, {sizes[1]} for λ, {sizes[2]} of the table, {sizes[3]} "
        f"and {sizes[4]} for rewards"
    )
    if min(sizes) < 2:
        refuse(
            f"too few different prompts, {sizes}: give 10 or more, not all the table's; see "
            "--dataset, --reward_dataset, --eval_dataset, --lambda_prompts, --eval_prompts, "
            "--max_steps"
        )
    return Run(cfg, Path(cfg.output_dir), tokenizer, *rows)


def check_model(cfg, kind, source, tokenizer, rows):
    """Try a given model as the run will use it, on a CPU. → digest of its weights, config, words.

    ValueError, or what transformers raises, for one that the run would get wrong.
    """
    if kind in SCORE_MODELS:
        tokenizer = load_tokenizer(source)
        rows = as_read_by(tokenizer, rows)
        check_different({row.prompt: str(row.ids[0]) for row in rows})
    model, vocabulary = load_model(source, kind), tokenizer.get_vocab()
    if getattr(model.config, "score_type", kind) not in kind:
        raise ValueError("its config calls it another score_type: are the two exchanged?")

    parts = [sorted(vocabulary.items()), tokenizer.chat_template, model.config]
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its weight {name} is not finite: the checkpoint is broken")
        values = tensor.flatten().view(torch.uint8).numpy()
        parts.append(hashlib.sha256(values).hexdigest())

    lengths = [(len(row.ids[0]), max([cfg.max_new_tokens, *map(len, row.ids[1])])) for row in rows]
    head, answer = max(lengths, key=sum)  # of the longest text, which may be a sample
    size, positions = model.get_input_embeddings().num_embeddings, positions_of(model)
    largest = max(vocabulary.values())
    # Behind what is cut off comes an end, and half a character may be read as three tokens
    if largest >= size or head + answer + 2 >= positions:
        raise ValueError(
            f"it has {size} tokens and {positions} positions, but its tokenizer has token {largest}"
            f", and texts are of {head + answer}: lower --max_length and --max_new_tokens"
        )
    keep_layers_of_all_kinds(model)
    count = max(2, (cfg.row_length - head) // answer)  # a row as full as any
    if not trial_error(model, head, answer, count, largest) <= 1e-3:
        raise ValueError("its attention or output head is one that this program gets wrong")
    return seed_of(parts)


def keep_layers_of_all_kinds(model):
    """Delete the layers behind which none is of a new kind: in attention, windows, experts."""
    blocks = blocks_of(model)
    listed = [  # settings for each layer
        values
        for values in vars(model.config).values()
        if isinstance(values, list) and len(values) == len(blocks)
    ]
    kinds = list(map(str, zip(blocks, *listed)))
    del blocks[max(map(kinds.index, kinds)) + 1 :]
    model.config.num_hidden_layers = len(blocks)


@torch.inference_mode()
def trial_error(model, head, answer, count, largest):
    """Largest error of a row's values, token by token, beside its last response apart.

    In standard deviations of the values; of a prompt of `head` tokens, `count` responses of
    `answer`, up to token `largest`. In float32, where right ones differ by 1e-5, wrong ones by
    more: attention that does not take our mask, logits that are scaled or capped.
    """
    prompt = torch.randint(largest + 1, (head,))
    answers = torch.randint(largest + 1, (count, answer))
    answers[-1, -1] = largest  # and any other tokens
    batch = collate_rows([(prompt.tolist(), answers.tolist())])
    each = torch.arange(count * answer)  # as if every token were a response
    batch |= {"owner": each, "last": each + head}
    together = Responses(model.float())(batch)[-answer:]

    apart = torch.cat([prompt, answers[-1]])[None]
    if isinstance(model, ScoreModel):
        values = model(apart, None, last=each[:answer] + head)
    else:
        logits = model(apart, use_cache=False).logits[0, head - 1 : -1]
        values = -nn.functional.cross_entropy(logits, answers[-1], reduction="none")
    return (together - values).abs().max() / values.std()


@contextmanager
def claimed(cfg, digests):
    """Hold --output_dir for one run; refuse one of something else, or of a run that differs."""
    out, settings, changed = Path(cfg.output_dir), vars(cfg) | {"digests": digests}, ""
    with refusing(
        f"--output_dir {out} cannot be used",
        "wait for its run or, if it holds none of this program, name another folder",
    ):
        os.makedirs(out, exist_ok=True)
        kept = settings
        if set(os.listdir(out)) - {"config.json.tmp", ".lock"}:
            kept = json.loads((out / "config.json").read_bytes())
        for name, value in settings.items():
            if name not in FREE.split() and kept[name] != value:
                changed += f"{name} was {kept[name]!r}, is {value!r}; "
        lock = filelock.FileLock(out / ".lock", timeout=0)
        if RANK == 0:
            lock.acquire()

    try:
        if changed:
            refuse(
                f"--output_dir {out}: the run there differs: {changed}go on with those, delete it, "
                f"or name another folder and reuse its models, as far as they are there: "
                f"--sft_model {out}/sft --reward_model {out}/reward_model "
                f"--cost_model {out}/cost_model"
            )
        gather(None)  # all have read the old settings before the new ones are written
        write(out / "config.json", settings)
        yield
    finally:
        lock.release()


# Settings that a run may go on without
FREE = """config lambdas eval_prompts eval_samples output_dir tokens_per_batch sample_tokens
gradient_checkpointing"""


# ---- The command ---------------------------------------------------------------------------------


def parse(argv):
    """Command line → Config. Flags win over --config; names and types are checked here."""
    parser = transformers.HfArgumentParser(
        Config,
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
        description=inspect.getsource(Config),
    )
    parser.error = lambda message: refuse(f"{message}; --help lists the flags")

    given, flags = parser.parse_args(argv), []
    if given.config:  # its settings are flags, too: one parser checks names and types
        with refusing(f"--config {given.config}", "it must be one JSON object of settings"):
            settings = json.loads(Path(given.config).read_bytes())
            settings.pop("digests", None)  # of a run's own config.json
            for key, value in settings.items():
                if isinstance(value, dict):
                    value = json.dumps(value)
                if isinstance(value, list):
                    flags += [f"--{key}", *map(str, value)]
                elif value is not None:
                    flags.append(f"--{key}={value}")
        given = parser.parse_args(argv, parser.parse_args(flags))

    cfg = Config(**vars(given))
    cfg.dpo_steps = min(cfg.dpo_steps, cfg.max_steps)
    return cfg


def main(argv=None):
    """The whole program. Refusals are SystemExit(2) with one line on standard error."""
    cfg = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if GPU:
        # Shapes vary; the environment would be read on import
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # With a mask cuDNN plans anew for every shape; its backward may be NaN (pytorch 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    # FSDP2 is also the mixed precision of one process; LoRA on one needs none, its hook casts
    if WORLD > 1 or not cfg.lora_rank and cfg.dtype == "bfloat16":
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if GPU else "gloo",
            rank=RANK,
            world_size=WORLD,
            store=dist.HashStore() if WORLD == 1 else None,
        )

    try:
        run, digests = gate(cfg)
        with claimed(cfg, digests):
            all_stages(run)
            gather(None)  # no process takes the group down while another still uses it
    except KeyboardInterrupt:
        refuse(f"stopped; the same command goes on from {cfg.output_dir}", code=130)
    except torch.OutOfMemoryError:
        say(
            f"cdpo: out of GPU memory; halve --tokens_per_batch {cfg.tokens_per_batch} to train, "
            f"--sample_tokens {cfg.sample_tokens} to sample; weights: --lora_rank 16 or torchrun",
            sys.stderr,
        )
        raise
    finally:
        if dist.is_initialized() and WORLD == 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal or file may have no λ
    main()
    if WORLD > 1:  # all is written; gloo's threads now and then abort the interpreter's way out
        os._exit(0)
