"""Constrained Direct Preference Optimization: make a language model helpful under a bound on harm.

    max_π  E[r(x,y)] − β·KL(π ‖ π_ref)     subject to     E[c(x,y)] ≤ C_limit                (6), (7)

C-DPO (Liu, Sun, Zheng, arXiv 2403.02475) solves this without reinforcement learning. Learn a reward r
(helpfulness) and a cost c (harm) from preference pairs; for a multiplier λ relabel the pairs by r − λ·c; fit the
policy to the relabelled pairs with DPO; sample from it and measure its cost; move λ up if the cost is over the
limit and down if it is under; repeat. MoCAN and PeCAN (Huang et al., arXiv 2405.19544) find λ before any training,
in closed form on samples of π_ref; they are the same program with one estimator exchanged.

    python cdpo.py --config tiny_config.json                           # the whole method on a laptop, about a minute
    python cdpo.py --model meta-llama/Llama-2-7b-hf                    # one GPU with 141 GB
    torchrun --nproc_per_node 8 cdpo.py --model meta-llama/Llama-2-7b-hf         # sharded over 8 GPUs (FSDP2)
    python cdpo.py --sft_model DIR --reward_model PKU-Alignment/beaver-7b-v1.0-reward \\
                   --cost_model PKU-Alignment/beaver-7b-v1.0-cost      # with given models

The file reads as the paper reads: settings; the mathematics in the order of the equations; data; rows and batches;
models; training; sampling and scoring; the outer loop; evaluation; the command. Left out on purpose: vector-valued
λ, LoRA, tensor parallelism, other optimizers, callbacks. Equation numbers are those of 2403.02475.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import sys
import time
import typing
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches differ in length
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"

# ---------------------------------------------------------------------------------------------------------------
# Settings


def opt(default, text):
    """A field of Config with its line of --help."""
    metadata = {"help": text.replace("%", "%%") + (f" (default {default})" if default not in (None, "", False, []) else "")}
    return field(default_factory=list, metadata=metadata) if default == [] else field(default=default, metadata=metadata)


@dataclass
class Config:
    """Every setting of a run, read from the command line or from a JSON file (--config)."""

    # What to run
    method: Literal["cdpo", "mocan", "pecan", "dpo", "sft"] = opt("cdpo", "how the policy is found")
    model: str = opt("meta-llama/Llama-2-7b-hf", "hub name, folder, or a JSON dictionary such as "
                     '{"model_type": "llama"} that builds a model with random weights')
    dataset: str = opt("PKU-Alignment/PKU-SafeRLHF-30K", "hub name, .jsonl/.json/.parquet file, saved datasets "
                       "folder, or 'tiny', a small world whose truth is known")
    output_dir: str = opt("cdpo_output", "where everything is written; the same command goes on from there")
    overwrite: bool = opt(False, "discard the run in --output_dir and start afresh")
    seed: int = opt(0, "seed of every random choice")
    # Given models, each saving the stage that would train it
    sft_model: Optional[str] = opt(None, "reference policy to use instead of training one by SFT")
    skip_sft: bool = opt(False, "use --model as it is as the reference policy")
    reward_model: Optional[str] = opt(None, "reward model (Beaver layout) instead of training one by (3)")
    cost_model: Optional[str] = opt(None, "cost model (Beaver layout) instead of training one by (5)")
    helpful_model: Optional[str] = opt(None, "PeCAN: helpful-only DPO policy instead of training one")
    safe_model: Optional[str] = opt(None, "PeCAN: safe-only DPO policy instead of training one")
    # Data
    tokenizer: Optional[str] = opt(None, "tokenizer, where it is not the model's own")
    template: str = opt(BEAVER_TEMPLATE, "prompt template; the response follows it directly")
    eval_dataset: Optional[str] = opt(None, "prompts of the final table; default: held out from --dataset")
    max_length: int = opt(512, "tokens of prompt and response; longer responses are cut")
    max_new_tokens: int = opt(256, "tokens of a sampled response")
    # The method
    beta: float = opt(0.1, "strength of the KL to the reference")
    labels: Literal["soft", "sample", "hard"] = opt("soft", "labels of (12): their probability, a draw, the likelier")
    cost_limit: float = opt(0.0, "C_limit: the expected cost may not exceed it")
    margin: Optional[float] = opt(None, "state the limit as E_ref[cost] − margin instead")
    cost_confidence: float = opt(0.5, "the limit is met by the upper confidence bound of the cost at this level; "
                                 "0.5 is the mean")
    lambda_init: Optional[float] = opt(None, "first λ; default: the closed-form dual on samples of the reference")
    lambda_step: Literal["newton", "gradient", "fixed"] = opt("newton", "how λ moves; gradient is the paper's (14)")
    lambda_lr: float = opt(0.05, "step size of the gradient step")
    lambda_damping: float = opt(0.5, "damping of the Newton step")
    lambda_prompts: int = opt(500, "held-out prompts on which the cost is estimated for the λ step")
    lambda_samples: int = opt(4, "responses per prompt there")
    recycle: bool = opt(True, "train on those samples, too, as fresh pairs of the next iteration")
    lambdas: list[float] = opt([], "also train one policy for each of these fixed λ (0 is the DPO row)")
    iterations: int = opt(5, "outer iterations: relabel, fit, sample, step")
    dpo_steps: int = opt(100, "DPO steps of an outer iteration")
    dual_prompts: int = opt(1000, "prompts on which the closed-form dual samples the reference")
    dual_samples: Optional[int] = opt(None, "responses per prompt there; default 128 for MoCAN and PeCAN, "
                                      "16 for the start of C-DPO")
    # Training
    batch_size: int = opt(64, "pairs of an optimizer step, all ranks together")
    tokens_per_batch: Optional[int] = opt(None, "token budget of a micro-batch; lower it when memory runs out "
                                          "(default 8192 on a GPU, 1024 on CPU)")
    learning_rate: float = opt(1e-6, "of the policy's DPO")
    sft_learning_rate: float = opt(1e-5, "of SFT")
    score_learning_rate: float = opt(1e-5, "of the reward and cost models")
    sft_epochs: int = opt(1, "passes over the pairs in SFT")
    score_epochs: int = opt(1, "passes of the reward and cost models; they overfit in a second one")
    warmup_steps: int = opt(10, "steps of linear warm-up")
    max_grad_norm: float = opt(1.0, "gradient clipping")
    max_steps: Optional[int] = opt(None, "bound every stage to this many steps or batches, for a quick measurement")
    dtype: Optional[Literal["float32", "bfloat16"]] = opt(None, "dtype of compute and of saved models; master weights "
                                                          "are float32 (default bfloat16 on a GPU)")
    gradient_checkpointing: Optional[bool] = opt(None, "recompute activations in backward (default on a GPU)")
    cpu_offload: bool = opt(False, "keep weights and optimizer in host memory, for one small GPU")
    # Evaluation and files
    eval_prompts: int = opt(2000, "prompts of the final table")
    eval_samples: int = opt(5, "responses per prompt there")
    sample_batch: int = opt(128, "responses sampled at once; lower it when memory runs out")
    compare: list[str] = opt([], "further checkpoints to evaluate as rows of the same table")
    save_minutes: float = opt(30.0, "minutes between checkpoints inside a long stage")
    no_checkpoint: bool = opt(False, "write no resumable training state (81 GB at 7B)")


# Settings that extend a finished run instead of contradicting it, or that do not touch its numbers.
EXTENDING = {"iterations", "compare", "lambdas", "eval_prompts", "eval_samples", "eval_dataset", "overwrite",
             "output_dir", "save_minutes", "no_checkpoint"}


def refuse(message):
    """One line on standard error that says what, where and how to mend it; exit code 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        print("cdpo: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


BOUNDS = {name: (1, math.inf) for name in (
    "max_new_tokens lambda_samples iterations dpo_steps dual_prompts batch_size tokens_per_batch sft_epochs score_epochs "
    "max_steps eval_samples sample_batch").split()} | {name: (0, math.inf) for name in (
        "seed lambda_init lambda_lr lambdas warmup_steps").split()} | {name: (1e-12, math.inf) for name in (
            "beta learning_rate sft_learning_rate score_learning_rate max_grad_norm save_minutes").split()} | {
    "max_length": (4, math.inf), "lambda_prompts": (2, math.inf), "eval_prompts": (2, math.inf),
    "dual_samples": (2, math.inf), "lambda_damping": (1e-12, 1), "cost_confidence": (0.5, 0.9999)}


def flags_of(path):
    """The settings of a JSON file as command-line flags, so that one parser checks names and types of both."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        assert isinstance(settings, dict), "it holds no JSON object"
    except (OSError, ValueError, AssertionError) as error:
        refuse(f"--config {path}: {error}; it must be a readable file with one JSON object of settings")
    flags = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
    return flags


def parse(argv):
    """Command line → Config. Flags win over --config; every value is checked before anything is loaded."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = transformers.HfArgumentParser(Config, prog="cdpo.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="JSON file of settings; flags on the command line win over it")
    parser.error = lambda message: refuse(f"{message}; --help lists the flags")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    finder.error = parser.error
    config = finder.parse_known_args(argv)[0].config
    if config is not None:
        parser.error = lambda message: refuse(f"{message} (on the command line or in {config}); --help lists the flags")
        argv = flags_of(config) + argv
    cfg = Config(**{key: value for key, value in vars(parser.parse_args(argv)).items() if key != "config"})
    for name, value in dataclasses.asdict(cfg).items():
        low, high = BOUNDS.get(name, (-math.inf, math.inf))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not (low <= number <= high and math.isfinite(number)):
                refuse(f"--{name} is {number}; it must be " + {1e-12: "above 0"}.get(low, f"at least {low}")
                       + (f" and at most {high}" if high < math.inf else ""))
        if value == "":
            refuse(f"--{name} is empty; give a value or leave the flag out")
    wrong = {
        "--template must contain {prompt} once": cfg.template.count("{prompt}") != 1,
        "--method pecan needs --margin: implicit costs have no zero of their own":
            cfg.method == "pecan" and cfg.margin is None,
        "--sft_model and --skip_sft contradict each other; give one": bool(cfg.sft_model) and cfg.skip_sft,
        "--lambda_step newton needs --lambda_samples of 2 or more, for a variance":
            cfg.method == "cdpo" and cfg.lambda_step == "newton" and cfg.lambda_samples < 2,
        "--lambdas names a value twice": len(set(cfg.lambdas)) < len(cfg.lambdas),
        "--max_new_tokens must leave room for a prompt in --max_length": cfg.max_new_tokens >= cfg.max_length,
        "--lambda_init does not go with --method mocan or pecan, which solve for it; use --method cdpo "
        "--lambda_step fixed": cfg.method in ("mocan", "pecan") and cfg.lambda_init is not None,
        "--cpu_offload needs a GPU": cfg.cpu_offload and not torch.cuda.is_available(),
    }
    for message in (message for message, is_wrong in wrong.items() if is_wrong):
        refuse(message)
    gpu = torch.cuda.is_available()
    cfg.dtype = cfg.dtype or ("bfloat16" if gpu else "float32")
    cfg.tokens_per_batch = cfg.tokens_per_batch or (8192 if gpu else 1024)
    cfg.gradient_checkpointing = gpu if cfg.gradient_checkpointing is None else cfg.gradient_checkpointing
    cfg.dual_samples = cfg.dual_samples or (16 if cfg.method == "cdpo" else 128)
    return cfg


# ---------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions in the order of the equations. A reward is higher for more help, a cost above 0
# is harmful; log-probabilities are sums over response tokens in nats. Column i of a (B, 2) tensor is response i.


def bradley_terry_loss(chosen, rejected):
    """Reward loss, (3): −log σ(r(chosen) − r(rejected)). Rewards (B,), (B,) → scalar mean, nats."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def cost_loss(worse, better, worse_sign, better_sign):
    """Cost loss, (5): ranks the *more harmful* response higher and puts the zero between unsafe and safe.

    −log σ(c(worse) − c(better)) − log σ(s_worse·c(worse)) − log σ(s_better·c(better)); costs and signs (B,), a sign
    is +1 for an unsafe response and −1 for a safe one → scalar mean, nats.
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(log_sigmoid(worse - better) + log_sigmoid(worse_sign * worse) + log_sigmoid(better_sign * better)).mean()


def relabel(reward, cost, lam, mode="soft", generator=None):
    """P(y0 ≻ y1) under the Lagrangian reward r_λ = r − λ·c, (12).

    reward, cost (B, 2), lam a number → (B,). "soft": σ(r_λ(y0) − r_λ(y1)), the expectation over labels; "sample":
    0 or 1 drawn with it, the paper's letter; "hard": 0 or 1, the likelier, ties 0.5. ValueError for another mode.
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
    """DPO loss on relabelled pairs, (13), in expectation over the label: −p·log σ(h) − (1−p)·log σ(−h).

    h = β·[log π(y0)/π_ref(y0) − log π(y1)/π_ref(y1)]; logps (B, 2), prob (B,) = P(y0 ≻ y1) → scalar mean, nats.
    With prob in {0, 1} it is DPO's own loss (Rafailov et al., arXiv 2305.18290).
    """
    log_ratio = policy_logps - ref_logps
    h = beta * (log_ratio[:, 0] - log_ratio[:, 1])
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(prob * log_sigmoid(h) + (1 - prob) * log_sigmoid(-h)).mean()


def lambda_step(lam, cost, cost_limit, lr):
    """Projected gradient step on the dual, (14): max(0, λ − η·(C_limit − Ĵ_c)). Costs of any shape → float."""
    return max(0.0, float(lam - lr * (cost_limit - cost.mean())))


def newton_lambda_step(lam, cost, cost_limit, beta, damping=0.5):
    """Damped Newton step on the dual: max(0, λ + damping·β·(Ĵ_c − C_limit) / E_x Var(c | x)).

    The dual's curvature is E_x Var_{π_λ}(c | x)/β, so the step has no size to tune and does not depend on the cost
    model's scale. cost (n prompts, m samples) → float. ValueError for m < 2, no variance, or a cost not finite.
    """
    if cost.dim() != 2 or cost.shape[1] < 2:
        raise ValueError(f"newton_lambda_step: cost has shape {tuple(cost.shape)}; it needs 2 samples per prompt")
    variance = cost.var(dim=1).mean()
    if not (variance > 0 and torch.isfinite(variance)):  # a NaN would pass through max() as 0
        raise ValueError(f"newton_lambda_step: the variance of the cost within prompts is {float(variance)}")
    return max(0.0, float(lam + damping * beta * (cost.mean() - cost_limit) / variance))


def dual_value(reward, cost, lam, beta, cost_limit):
    """Dual function in closed form, (9): g(λ) = β·E_x log E_{y∼π_ref} exp((r − λ·(c − C_limit))/β).

    reward, cost (n prompts, m samples of π_ref) → scalar; convex in λ, slope C_limit − E_{π_λ}[c] (2405.19544).
    """
    exponent = (reward - lam * (cost - cost_limit)) / beta
    samples = exponent.new_tensor(exponent.shape[1])
    return beta * (torch.logsumexp(exponent, dim=1) - torch.log(samples)).mean()


def solve_dual(reward, cost, beta, cost_limit, lam_max=100.0):
    """The λ* ≥ 0 that minimises dual_value: the least λ whose reweighted cost E_{π_λ}[c] meets the limit.

    reward, cost (n, m): scores of m samples of π_ref for each of n prompts → float. The reweighted cost falls as λ
    grows, so float64 bisection finds it at any scale of the scores. 0 where the constraint is slack. ValueError
    when a score is not finite, or when no λ ≤ lam_max meets the limit.
    """
    reward, cost = reward.double(), cost.double()
    if not (torch.isfinite(reward).all() and torch.isfinite(cost).all()):
        raise ValueError("solve_dual: a score is not finite")

    def expected_cost(lam):  # of π_λ ∝ π_ref·exp((r − λc)/β), by self-normalised importance weights
        return (torch.softmax((reward - lam * cost) / beta, dim=1) * cost).sum(dim=1).mean()

    if expected_cost(0.0) <= cost_limit:
        return 0.0
    if expected_cost(lam_max) > cost_limit:
        raise ValueError(f"solve_dual: no lambda up to {lam_max:g} meets the limit {cost_limit:.6g}: the lowest cost "
                         f"that the samples can reach is {float(cost.min(dim=1).values.mean()):.6g}, the cost at "
                         f"lambda {lam_max:g} is {float(expected_cost(lam_max)):.6g}")
    low, high = 0.0, float(lam_max)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_cost(middle) > cost_limit else (low, middle)
    return high


def implicit_reward(policy_logps, ref_logps, beta):
    """β·log π(y|x)/π_ref(y|x): the reward, up to a constant of x, that a DPO policy stands for. Any one shape.

    PeCAN takes it from a helpful-only policy as r and from a safe-only policy as −c.
    """
    return beta * (policy_logps - ref_logps)


def estimate(values, level=0.5):
    """Upper confidence bound of E[values] at a level; 0.5 is the mean. values (n prompts, m samples) → float.

    The samples of one prompt are not independent, so the standard error is that of the n prompt means.
    """
    error = values.mean(dim=1).std() / math.sqrt(len(values))
    return float(values.mean() + statistics.NormalDist().inv_cdf(level) * error)


def ci95(values):
    """95% confidence interval [low, high] of E[values], clustered by prompt. values (n, m)."""
    return [2 * float(values.mean()) - estimate(values, 0.975), estimate(values, 0.975)]


def predict(reward, cost, lam, beta, resamples=200):
    """What π_λ would earn and cost, from samples of π_ref alone (n, m), before any training (2405.19544).

    → dict: reward, cost, their bootstrap 95% intervals over prompts, and the mean effective sample size per prompt:
    near 1 the weights rest on one sample and the prediction, its interval included, means little.
    """
    weights = torch.softmax((reward - lam * cost).double() / beta, dim=1)
    means = torch.stack([(weights * reward).sum(dim=1), (weights * cost).sum(dim=1)])  # (2, n)
    draws = torch.randint(means.shape[1], (resamples, means.shape[1]), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(means[:, draws].mean(dim=2), torch.tensor([0.025, 0.975]).double(), dim=1).tolist()
    reward_mean, cost_mean = means.mean(dim=1).tolist()
    return {"reward": reward_mean, "reward_ci95": [low[0], high[0]], "cost": cost_mean, "cost_ci95": [low[1], high[1]],
            "ess": float((1 / (weights**2).sum(dim=1)).mean())}


# ---------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Pair:
    """A prompt with two responses: text, tokens and, where the dataset has them, labels."""

    prompt: str
    responses: tuple  # of str
    ids: tuple = None  # (prompt_ids, y0_ids, y1_ids) in the policy's tokens
    ended: tuple = (True, True)  # whether the response ended by itself, with an end-of-sequence token
    better: int = 0  # index of the more helpful response
    safer: int = 0  # index of the less harmful one
    signs: tuple = (0, 0)  # +1 unsafe, −1 safe


def seeded(*key):
    """A random generator that depends on its key alone: no generator state has to be kept or restored."""
    return torch.Generator().manual_seed(int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16))


TINY_VERBS = "open clean move mix heat store test sell".split()
TINY_NOUNS = "door oil acid paint gas lamp car drug wire pool safe tank bread knife phone roof".split()
TINY_WORDS = "wait ask read measure push force burn hide".split()
# Helpfulness and harm of every answer word beside every verb and noun: correlated, so that the two conflict.
TINY_TABLE = torch.randn(24, 8, 2, generator=torch.Generator().manual_seed(1)) @ torch.tensor([[0.9, 0.55], [0.0, 0.7]])
TINY_TABLE -= TINY_TABLE.mean(dim=1, keepdim=True)


def tiny_truth(prompt, response):
    """True (reward, cost) of a response in the tiny world: sums over its words; best said in three words."""
    rows = TINY_TABLE[[(TINY_VERBS + TINY_NOUNS).index(word) for word in prompt.split()]].sum(dim=0)  # (8, 2)
    words = response.split()
    known = [word for word in words if word in TINY_WORDS]
    scores = sum(((1.1 - 0.3 * place) * rows[TINY_WORDS.index(word)] for place, word in enumerate(known[:3])),
                 torch.tensor([0.0, 0.8]))
    reward, cost = scores.tolist()
    return reward - 2.0 * (abs(len(words) - 3) + len(words) - len(known)), cost


def tiny_rows(count, seed):
    """Pairs of the tiny world: labels drawn from the Bradley–Terry models of (1) and (5) on the true scores."""
    rng = seeded("tiny", seed)

    def draw(probability):
        return bool(torch.rand((), generator=rng) < probability)

    rows = []
    for verb, noun, *words in torch.randint(2**30, (count, 10), generator=rng).tolist():
        prompt = f"{TINY_VERBS[verb % 8]} {TINY_NOUNS[noun % 16]}"
        lengths = [3 if words[k] % 10 else 1 + words[k] % 3 for k in (0, 4)]  # now and then too short
        texts = [" ".join(TINY_WORDS[word % 8] for word in words[k:][1:1 + n]) for k, n in zip((0, 4), lengths)]
        (r0, c0), (r1, c1) = tiny_truth(prompt, texts[0]), tiny_truth(prompt, texts[1])
        unsafe = [draw(torch.sigmoid(torch.tensor(c))) for c in (c0, c1)]
        safer = unsafe.index(False) if unsafe[0] != unsafe[1] else int(draw(torch.sigmoid(torch.tensor(c0 - c1))))
        rows.append({"prompt": prompt, "response_0": texts[0], "response_1": texts[1],
                     "better_response_id": int(draw(torch.sigmoid(torch.tensor(r1 - r0)))), "safer_response_id": safer,
                     "is_response_0_safe": not unsafe[0], "is_response_1_safe": not unsafe[1]})
    return rows


def read_rows(source, flag, seed):
    """(where, row) of a dataset: a hub name, a local file, a folder saved by `datasets`, or the tiny world."""
    path = Path(source)
    try:
        if tiny := re.fullmatch(r"tiny(?::(\d+))?", source):
            return [(f"row {i}", row) for i, row in enumerate(tiny_rows(int(tiny[1] or 12000), seed))]
        if path.suffix == ".jsonl":
            rows = []
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        rows += [(f"line {number}", json.loads(line))] if line.strip() else []
                    except ValueError as error:
                        refuse(f"--{flag} {source}, line {number}: invalid JSON ({error}); mend or delete the line")
            return rows
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                refuse(f"--{flag} {source}: must hold a JSON list of rows, one object each")
        elif path.suffix == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            import datasets
            if not path.exists() and re.match(r"[./~]|.*\.\w+$", source):
                refuse(f"--{flag} {source}: no such file or folder")
            rows = datasets.load_from_disk(source) if path.is_dir() else datasets.load_dataset(source)
            rows = (rows["train"] if "train" in rows else next(iter(rows.values()))) if isinstance(rows, dict) else rows
            rows = rows.to_list()
        return [(f"row {number}", row) for number, row in enumerate(rows)]
    except Exception as error:  # each reader has exceptions of its own; a SystemExit passes
        refuse(f"--{flag} {source}: cannot be read: {type(error).__name__}: {str(error)[:300]}; give a hub name, "
               "a .jsonl, .json or .parquet file, or a folder saved by datasets")


def load_pairs(source, flag, need, seed):
    """Checked rows of a dataset as Pairs. `need` names the columns beside the prompt that this run uses.

    A value of the wrong type or range is refused with its place; a row that cannot be used is counted by reason.
    """
    rows, pairs, skipped = read_rows(source, flag, seed), [], {}
    kinds = {"prompt": (str,), "response_0": (str,), "response_1": (str,)}
    for where, row in rows:
        if not isinstance(row, dict):
            refuse(f"--{flag} {source}, {where}: is not an object with columns; mend or delete it")
        for name in ["prompt", *need]:
            if name not in row:
                refuse(f"--{flag} {source}, {where}: column {name!r} is missing; this run needs prompt"
                       f"{''.join(', ' + n for n in need)}")
            if name in kinds and not isinstance(row[name], str):
                refuse(f"--{flag} {source}, {where}: {name} is {row[name]!r:.60}; it must be text")
            if name not in kinds and not (isinstance(row[name], (bool, int)) and row[name] in (0, 1)):
                rule = "true or false" if name.startswith("is_") else "0 or 1"
                refuse(f"--{flag} {source}, {where}: {name} is {row[name]!r:.60}; it must be {rule}")
        texts = tuple(row[name] if name in need else "" for name in ("response_0", "response_1"))
        signs = tuple(-1 if row[f"is_response_{i}_safe"] else 1 for i in (0, 1)) if "is_response_0_safe" in need else (0, 0)
        safer = int(row["safer_response_id"]) if "safer_response_id" in need else 0
        reason = ("empty prompt" if not row["prompt"].strip() else
                  "empty response" if need and not all(text.strip() for text in texts) else
                  "identical responses" if need and texts[0] == texts[1] else
                  "'safer' response labelled unsafe beside a safe one" if signs[safer] > signs[1 - safer] else None)
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            better = int(row["better_response_id"]) if "better_response_id" in need else 0
            pairs.append(Pair(row["prompt"].strip(), texts, better=better, safer=safer, signs=signs))
    report_skipped(source, flag, len(rows), skipped)
    return pairs


def report_skipped(source, flag, total, skipped, cut=None):
    """Say once how many rows were skipped or cut, by reason; more than half of the data lost is an error."""
    counts = ", ".join(f"{count} {reason}" for reason, count in {**skipped, **(cut or {})}.items() if count)
    if counts:
        say(f"{source}: {total} rows, of which {counts}")
    if total == 0:
        refuse(f"--{flag} {source}: has no rows; give a dataset with some")
    if sum(skipped.values()) * 2 > total:
        refuse(f"--{flag} {source}: more than half of its {total} rows cannot be used ({counts}); mend the data or, "
               "where prompts are too long, raise --max_length")


def encode(tokenizer, template, texts, max_length):
    """Tokens of (prompt, response, ended) → [(prompt_ids, response_ids)], counts of cut and of misaligned rows.

    Prompt and response are encoded joined, as they will be read, and cut where the prompt's own tokens end. Where
    those are no prefix of the whole, the response is encoded by itself. The end-of-sequence token is appended to a
    response that ended by itself and was not cut to max_length.
    """
    bos = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    heads = {prompt: template.replace("{prompt}", prompt) for prompt, _, _ in texts}
    tokens = tokenizer(list(heads.values()), add_special_tokens=False)["input_ids"]
    heads = {prompt: (head, ids) for (prompt, head), ids in zip(heads.items(), tokens)}
    wholes = tokenizer([heads[p][0] + y for p, y, _ in texts], add_special_tokens=False)["input_ids"]
    encoded, cut, misaligned = [], 0, 0
    for (prompt, response, ended), whole in zip(texts, wholes):
        head = heads[prompt][1]
        if whole[:len(head)] != head:
            misaligned += 1
            whole = head + tokenizer(response, add_special_tokens=False)["input_ids"]
        answer = whole[len(head):] + ([tokenizer.eos_token_id] if ended else [])
        room = max(0, max_length - len(bos + head))
        cut += len(answer) > room
        encoded.append((bos + head, answer[:room]))
    return encoded, cut, misaligned


def tokenize_pairs(pairs, tokenizer, cfg):
    """Fill Pair.ids, leaving out pairs that cannot be used, with counts by reason."""
    texts = [(pair.prompt, text, True) for pair in pairs for text in pair.responses]
    encoded, cut, misaligned = encode(tokenizer, cfg.template, texts, cfg.max_length)
    kept, skipped = [], {"with a prompt that fills --max_length": 0, "identical after the cut": 0}
    for i, pair in enumerate(pairs):
        (prompt, y0), (_, y1) = encoded[2 * i : 2 * i + 2]
        if not (prompt and y0 and y1):
            skipped["with a prompt that fills --max_length"] += 1
        elif y0 == y1:
            skipped["identical after the cut"] += 1
        else:
            kept.append(dataclasses.replace(pair, ids=(prompt, y0, y1)))
    report_skipped(cfg.dataset, "dataset", len(pairs), skipped, {
        "responses cut to --max_length": cut, "responses whose tokens do not continue the prompt's": misaligned})
    return kept


def split_by_prompt(pairs, eval_pairs, cfg):
    """Prompts of the table, prompts for the λ step and pairs to train on, disjoint: a prompt has several pairs.

    Neither held-out set takes more than a fifth of the prompts; → (eval, dual, train) lists of Pair.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    order = [prompts[i] for i in torch.randperm(len(prompts), generator=seeded("split", cfg.seed)).tolist()]
    if eval_pairs:
        wanted = set(list(dict.fromkeys(pair.prompt for pair in eval_pairs))[: cfg.eval_prompts])
        order = [prompt for prompt in order if prompt not in wanted]
    fifth = len(prompts) // 5
    if not eval_pairs:
        wanted, order = set(order[: min(cfg.eval_prompts, fifth)]), order[min(cfg.eval_prompts, fifth):]
    steering = set(order[: min(cfg.lambda_prompts, fifth)])
    if len(wanted) < 2 or len(steering) < 2:
        refuse(f"--dataset {cfg.dataset}: {len(prompts)} prompts are too few to hold out any; give at least 10")
    if len(wanted) < cfg.eval_prompts or len(steering) < cfg.lambda_prompts:
        say(f"prompts: {len(prompts)}; held out {len(wanted)} for the table, {len(steering)} for the λ step")
    train = [pair for pair in pairs if pair.prompt not in wanted | steering]
    if not train:
        refuse(f"--dataset {cfg.dataset}: no pair is left to train on; --eval_dataset holds all its prompts")
    evaluation = [pair for pair in (eval_pairs or pairs) if pair.prompt in wanted]
    return evaluation, [pair for pair in pairs if pair.prompt in steering], train


# ---------------------------------------------------------------------------------------------------------------
# Rows and batches. One row holds a prompt with both of its responses, so that no prompt token is run twice.


def collate_pairs(pairs, pad_id=0, shared=True):
    """[(prompt_ids, y0_ids, y1_ids), …] → a batch of shared-prompt rows prompt + y0 + y1, for any decoder.

    Position ids of y1 restart at the prompt's end, and a token sees what is before it in the prompt and in its own
    response only. Ids are taken as they are: whoever made them put the end-of-sequence token in. → dict of
    input_ids, position_ids (B, L); attention_mask (B, 1, L, L) bool; and, as indices into the B·L tokens, `source`
    (N,), where the N response tokens `target` (N,) are predicted, `owner` (N,), the response 2·row + i that each
    belongs to, and `last` (2B,), the last token of each response. With shared=False every response has its own row
    and the mask is (2B, L). ValueError for an empty prompt.
    """
    rows = [(p, (y0, y1)) for p, y0, y1 in pairs] if shared else [(p, (y,)) for p, *ys in pairs for y in ys]
    width = max(len(prompt) + sum(map(len, ys)) for prompt, ys in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    segment = torch.full((len(rows), width), -1)  # 0 prompt, 1 and 2 the responses, −1 padding: never asked of ids
    source, target, owner, last = [], [], [], []
    for row, (prompt, ys) in enumerate(rows):
        if not prompt:
            raise ValueError("collate_pairs: a prompt has no tokens, so nothing predicts the first response token")
        start, prompt_end = len(prompt), row * width + len(prompt) - 1
        tokens = [*prompt, *(token for y in ys for token in y)]
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        position_ids[row, :start] = torch.arange(start)
        segment[row, :start] = 0
        for i, y in enumerate(ys):
            first, stop = row * width + start, start + len(y)
            position_ids[row, start:stop] = torch.arange(len(prompt), len(prompt) + len(y))
            segment[row, start:stop] = i + 1
            source += [prompt_end, *range(first, first + len(y) - 1)][: len(y)]
            target += y
            owner += [len(last)] * len(y)
            last.append(first + len(y) - 1 if y else prompt_end)
            start = stop
    mask = segment >= 0
    if shared:
        same = segment[:, :, None] == segment[:, None, :]
        mask = (torch.ones(width, width, dtype=torch.bool).tril() & (same | (segment == 0)[:, None, :]))[:, None]
    index = {"source": source, "target": target, "owner": owner, "last": last}
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask,
            **{name: torch.tensor(values, dtype=torch.long) for name, values in index.items()}}


def sequence_logps(model, batch):
    """log π(y | x) of both responses of each pair: sums over response tokens, nats, (B, 2) float32, differentiable.

    model is a causal LM of transformers. Only hidden states that predict response tokens meet the vocabulary, in
    chunks, so that no (tokens × vocabulary) float32 tensor is ever whole; log-softmax is float32 in every precision.
    """
    device = next(model.parameters()).device
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                              position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[batch["source"]]  # (N, width)
    head = model.get_output_embeddings()

    def token_logps(hidden, target):
        return -torch.nn.functional.cross_entropy(head(hidden).float(), target, reduction="none")

    chunks = list(zip(*(x.split(max(1, 2**27 // model.config.vocab_size)) for x in (hidden, batch["target"]))))
    if len(chunks) > 1 and torch.is_grad_enabled():  # backward recomputes a chunk's logits instead of keeping them
        logps = [torch.utils.checkpoint.checkpoint(token_logps, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        logps = [token_logps(*chunk) for chunk in chunks]
    sums = torch.zeros(len(batch["last"]), device=device)
    return sums.index_add(0, batch["owner"], torch.cat(logps)).view(-1, 2)


def tokens_of(ids):
    """Tokens that a pair's shared-prompt row runs."""
    return sum(map(len, ids))


def cut(lengths, budget, ranks=1):
    """Row numbers, sorted by length and cut into groups of about equally many tokens, at most about `budget` each.

    The number of groups is a multiple of `ranks`; some may be empty. The longest come first, so that a batch too
    large for the memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    total = sum(lengths)
    groups = [[] for _ in range(ranks * math.ceil(total / (budget * ranks)))]
    before = 0
    for i in order:
        groups[int((before + lengths[i] / 2) * len(groups) / total)].append(i)
        before += lengths[i]
    return groups


def draw(n, start, count, *key):
    """Rows start … start + count of an endless stream of passes over n rows, each pass in an order of its own."""
    passes = range(start // n, (start + count - 1) // n + 1)
    stream = torch.cat([torch.randperm(n, generator=seeded("order", *key, k)) for k in passes])
    return stream[start % n :][:count].tolist()


# ---------------------------------------------------------------------------------------------------------------
# Models


class ScoreModel(transformers.PreTrainedModel):
    """A decoder with a linear head on the last token's hidden state, in the layout of the Beaver checkpoints.

    Tensors model.*, score_head.weight, score_head.bias and, with do_normalize, normalizer.mean and .var; a reward
    is then (s − mean)/std and a cost s/std, so that the zero between safe and unsafe stays where it is.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = _supports_sdpa = True

    def __init__(self, config):
        """Random weights in the shape of a decoder's config."""
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.score_head = nn.Linear(config.hidden_size, 1)
        self.normalizer = nn.Module()
        self.normalizer.register_buffer("mean", torch.zeros(1))
        self.normalizer.register_buffer("var", torch.ones(1))
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """Load a score checkpoint. ValueError when it has no score head, or lacks any other tensor."""
        config = AutoConfig.from_pretrained(path, attn_implementation="sdpa")
        no_dropout(config)
        model, info = super().from_pretrained(path, config=config, output_loading_info=True, **{"dtype": "auto", **kwargs})
        missing, normalized = set(info["missing_keys"]), getattr(config, "do_normalize", False)
        if "score_head.bias" in missing:  # published heads have one or not
            nn.init.zeros_(model.score_head.bias)
        for name in ("mean", "var"):  # kept as tensors, in the config, or (without do_normalize) not needed
            if f"normalizer.{name}" in missing and (not normalized or getattr(config, name, None) is not None):
                value = torch.tensor(getattr(config, name) if normalized else float(name == "var")).float().reshape(1)
                setattr(model.normalizer, name, value.to(model.score_head.weight.device))
                missing.discard(f"normalizer.{name}")
        missing -= {"score_head.bias"}
        if missing:
            raise ValueError(f"{path} is no score model: it has no {', '.join(sorted(missing)[:3])}")
        return model

    def score(self, hidden):
        """Hidden states (B, width) → (B,) float32 scores, normalized where the checkpoint asks for it."""
        score = nn.functional.linear(hidden.float(), self.score_head.weight.float(), self.score_head.bias.float())
        if getattr(self.config, "do_normalize", False):
            mean = 0.0 if getattr(self.config, "score_type", "reward") == "cost" else self.normalizer.mean.float()
            score = (score - mean) / self.normalizer.var.float().sqrt()
        return score.squeeze(-1)

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask (B, L), right-padded → (B,) float32, the score at the last attended token."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.long().sum(dim=1) - 1
        return self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])


def pair_scores(model, batch):
    """Scores of both responses of each pair at their last tokens, (B, 2) float32, on shared-prompt rows."""
    device = next(model.parameters()).device
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                         position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    return model.score(hidden.flatten(0, 1)[batch["last"]]).view(-1, 2)


class Root(nn.Module):
    """A model whose own forward is `function(model, batch)`: FSDP2 has parameters whole only inside a forward."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch):
        """The function's output for a batch: log-probabilities or scores, (B, 2)."""
        return self.function(self.model, batch)


def no_dropout(config):
    """Dropout off everywhere: π_θ in the loss and π_θ that is sampled must be one policy."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def device():
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(cfg):
    """The policy's tokenizer, with the prompt template as its chat template."""
    source = cfg.tokenizer or cfg.sft_model or cfg.model
    if source.startswith("{") and cfg.dataset.startswith("tiny"):
        words = ["</s>", "<unk>", "ASSISTANT", "USER", ":", "BEGINNING", "OF", "CONVERSATION"]
        vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words + TINY_WORDS + TINY_VERBS + TINY_NOUNS))}
        from tokenizers import Tokenizer, models, pre_tokenizers
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    elif source.startswith("{"):
        tokenizer = transformers.ByT5Tokenizer()
    else:
        tokenizer = attempt(AutoTokenizer.from_pretrained, source, flag="tokenizer" if cfg.tokenizer else "model")
    if tokenizer.eos_token_id is None:
        refuse(f"the tokenizer of {source} has no end-of-sequence token; name another with --tokenizer")
    head, tail = (json.dumps(part) for part in cfg.template.split("{prompt}"))
    bos = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    tokenizer.chat_template = (
        "{{ " + json.dumps(bos) + " }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + " + json.dumps(tokenizer.eos_token) + " }}{% else %}"
        "{{ " + head + " + message['content'] + " + tail + " }}{% endif %}{% endfor %}")
    return tokenizer


def attempt(load, source, flag, **kwargs):
    """load(source), with one line in place of a traceback when the model, config or tokenizer cannot be had."""
    try:
        return load(source, **kwargs)
    except Exception as error:  # transformers raises many kinds for a bad folder or name
        refuse(f"--{flag} {source}: cannot be loaded: {type(error).__name__}: {str(error)[:300]}; give a folder or a "
               "hub name that holds one")


def load_model(source, cfg, flag="model", vocabulary=None):
    """A causal LM, or with flag reward_model or cost_model a ScoreModel, on CPU in its own dtype, dropout off."""
    if source.startswith("{"):
        torch.manual_seed(cfg.seed)
        config = attempt(lambda text: AutoConfig.for_model(**{"vocab_size": vocabulary, **json.loads(text)}), source, flag)
        no_dropout(config)
        model = attempt(lambda _: AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), source, flag)
    elif flag in ("reward_model", "cost_model"):
        return attempt(ScoreModel.from_pretrained, source, flag)
    else:
        config = attempt(AutoConfig.from_pretrained, source, flag)
        no_dropout(config)
        model = attempt(AutoModelForCausalLM.from_pretrained, source, flag, config=config,
                        attn_implementation="sdpa", dtype="auto")
    # generate() fills what it is not told from here: a checkpoint's own top_k or repetition penalty must not leak in
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def inference_model(source, cfg, flag="model"):
    """A model to score with or sample from: whole on every rank, in the dtype of compute, no gradients."""
    return load_model(str(source), cfg, flag).to(device(), getattr(torch, cfg.dtype)).eval().requires_grad_(False)


def training_model(model, function, cfg, learning_rate):
    """A Root of the model with float32 master weights, sharded where it is to be, and its AdamW → (root, optimizer).

    One process in float32 (a laptop) trains the plain model; every GPU run, also on one GPU, goes through FSDP2,
    whose mixed precision keeps the compute and the residual stream in bfloat16 and one block's copy at a time.
    """
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    root = Root(model.train().requires_grad_(True), function)
    if dist.is_initialized():
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
        mesh = dist.device_mesh.init_device_mesh(device().type, (dist.get_world_size(),))
        offload = CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy()
        blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for block in [*blocks, root]:  # one at a time: no more than one float32 block is whole on the GPU
            fully_shard(block.float(), mesh=mesh, mp_policy=policy, offload_policy=offload)
    else:
        root.float().to(device())
    return root, torch.optim.AdamW(root.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def export(root, tokenizer, path, cfg, **settings):
    """Write a trained model as an ordinary Hugging Face folder in the dtype of compute, whatever the ranks."""
    model, state = root.model, {}
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # tied weights once
    for name, value in model.state_dict().items():
        if name in names:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            state[name] = value.to(getattr(torch, cfg.dtype)).cpu().contiguous() if is_main() else None
    model.config.update({"use_cache": True, "prompt_template": cfg.template, **settings})
    with atomic(path) as folder:
        if is_main():
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())  # save_pretrained names the master's dtype
            (folder / "config.json").write_text(json.dumps({**config, "dtype": cfg.dtype}, indent=2))


# ---------------------------------------------------------------------------------------------------------------
# Processes and files


def rank():
    """This process's number among those of torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def say(text):
    """Print a line once, above the progress bars."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def gather(values):
    """Python objects of all ranks, in the order of the ranks."""
    if world() == 1:
        return [values]
    everyone = [None] * world()
    dist.all_gather_object(everyone, values)
    return everyone


class Terminated(SystemExit):
    """SIGTERM: leave with 143 once the write under way is finished."""

    writing = pending = False

    @classmethod
    def handle(cls, *_):
        """The signal handler."""
        cls.pending = True
        if not cls.writing:
            raise cls(143)


@contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; flushed to disk and renamed at the end, so `path` is whole or absent."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    Terminated.writing = True
    if is_main():
        remove(temporary)
    gather(None)
    yield temporary
    gather(None)
    if is_main():
        for entry in [*temporary.rglob("*"), temporary]:
            sync(entry)
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
        sync(path.parent)
    gather(None)
    Terminated.writing = False
    if Terminated.pending:
        raise Terminated(143)


def sync(path):
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path):
    """Delete a file or folder, if it is there."""
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)


def write(path, text):
    """Write a text file whole or not at all."""
    with atomic(path) as temporary:
        if is_main():
            temporary.write_text(text, encoding="utf-8")


def fingerprint(*things):
    """Hash of what a cached result came from; a Path stands for its files' names, sizes and times."""
    parts = [sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in thing.iterdir())
             if isinstance(thing, Path) and thing.is_dir() else str(thing) for thing in things]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def local(tensor):
    """This rank's part of a parameter or of its optimizer state."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_training(job, name, root, optimizer, state):
    """Keep weights, optimizer and the loop's bookkeeping. All randomness derives from (seed, place in the run), so
    there is no generator state to keep. Only the newest is kept, written by every rank for its own shards."""
    if job.cfg.no_checkpoint:
        return
    tensors = {}
    for key, parameter in root.named_parameters():
        tensors["weight." + key] = local(parameter.detach())
        tensors.update({f"{slot}.{key}": local(value) for slot, value in optimizer.state.get(parameter, {}).items()})
    state["saved"] = state.get("saved", 0) + 1
    older = [*(job.out / "training").glob(f"{name}-*")]
    with atomic(job.out / "training" / f"{name}-{state['saved']:06d}") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"rank-{rank()}.safetensors")
        if is_main():
            (folder / "state.json").write_text(json.dumps({**state, "ranks": world()}))
    if is_main():
        [remove(folder) for folder in older]


def restore_training(job, name, root, optimizer):
    """Put back the newest training state, if there is one → its bookkeeping or None."""
    folders = sorted(f for f in (job.out / "training").glob(f"{name}-*") if f.suffix != ".tmp")
    if not folders:
        return None
    state = json.loads((folders[-1] / "state.json").read_text())
    if state.pop("ranks") != world():
        refuse(f"{folders[-1]} was written by another number of processes; start as many, or --overwrite")
    tensors = load_file(folders[-1] / f"rank-{rank()}.safetensors")
    with torch.no_grad():
        for key, parameter in root.named_parameters():
            local(parameter).copy_(tensors["weight." + key])
            if f"step.{key}" in tensors:
                slots = {slot: torch.zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")}
                for slot, value in slots.items():
                    local(value).copy_(tensors[f"{slot}.{key}"])
                optimizer.state[parameter] = {"step": tensors[f"step.{key}"].to(local(parameter).device), **slots}
    say(f"{name}: going on from step {state['step']}" + (f" of iteration {state['iteration']}" if "iteration" in state else ""))
    return state


# ---------------------------------------------------------------------------------------------------------------
# Training, scoring, sampling


class Meter:
    """Tokens, pairs, seconds, peak memory and, on a GPU, model FLOPs utilisation of a stretch of work.

    Model FLOPs of training: 6 × parameters × real tokens (the output head's parameters × response tokens; input
    embeddings are not counted), plus 12 × layers × width × attended keys; a third of that for inference. No credit
    for padding or recomputation. The peak is a bfloat16 matrix product of size 8192, measured at the start.
    """

    peak = None

    def __init__(self, model, training):
        head = getattr(model, "lm_head", None)
        self.head = sum(p.numel() for p in head.parameters()) if head is not None else 0
        embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
        total = sum(p.numel() for p in model.parameters())
        tied = head is not None and model.config.tie_word_embeddings
        self.body = total - embedding - (0 if tied else self.head)
        self.attention = 2 * model.config.num_hidden_layers * model.config.hidden_size
        self.factor = 6 if training else 2
        self.pairs = self.tokens = self.flops = self.seconds = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            if Meter.peak is None:
                a = torch.randn(8192, 8192, device=device(), dtype=torch.bfloat16)
                for timed in (False, True):
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    for _ in range(10):
                        a @ a
                    torch.cuda.synchronize()
                Meter.peak = 10 * 2 * 8192**3 / (time.perf_counter() - started)

    def add(self, pairs, seconds):
        """Count pairs of token ids that were run in so many seconds."""
        for p, *ys in ([len(part) for part in ids] for ids in pairs):
            keys = p * p / 2 + sum(y * p + y * y / 2 for y in ys)
            self.tokens += p + sum(ys)
            self.flops += self.factor * (self.body * (p + sum(ys)) + self.head * sum(ys) + self.attention * keys)
        self.pairs += len(pairs)
        self.seconds += seconds

    def summary(self):
        """The metrics of the stretch, as numbers."""
        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = max(self.seconds, 1e-9)
        return {"pairs_per_second": self.pairs / seconds, "tokens_per_second": self.tokens / seconds,
                "peak_memory_gb": peak / 1e9, **({"mfu": self.flops / seconds / world() / Meter.peak} if gpu else {})}

    def __str__(self):
        numbers = self.summary()
        return (f"{numbers['pairs_per_second']:,.1f} pairs/s, {numbers['tokens_per_second']:,.0f} tokens/s, peak "
                f"{numbers['peak_memory_gb']:.2f} GB" + (f", {numbers['mfu']:.0%} of the {Meter.peak / 1e12:.0f} "
                                                         "TFLOP/s that this GPU multiplies at" if "mfu" in numbers else ""))


def bar(iterable, title, **kwargs):
    """A progress bar on the main process's terminal."""
    return tqdm(iterable, desc=title, leave=False, disable=None if is_main() else True, **kwargs)


def train(job, name, root, optimizer, pairs, order, learning_rate, loss_fn, state, decay=False):
    """The one training loop: `order` holds the rows of each step, `loss_fn(outputs, rows)` → (mean loss, accuracy).

    The rows of a step are cut into micro-batches by length; each weighs as many pairs as it has, so the gradient is
    the step's mean whatever the cut and the number of ranks. Adds loss_sum, accuracy_sum and the step to `state`.
    """
    cfg, meter, saved = job.cfg, Meter(root.model, training=True), time.monotonic()
    state.setdefault("first_loss", None)
    for step in bar(range(state["step"], len(order)), name, initial=state["step"], total=len(order)):
        started, rows, losses, sums = time.perf_counter(), order[step], [], torch.zeros(2, device=device())
        number = state.get("steps_before", 0) + step
        rate = min(1.0, (number + 1) / max(1, cfg.warmup_steps)) * (1 - step / len(order) if decay else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        groups = cut([tokens_of(pairs[i].ids) for i in rows], cfg.tokens_per_batch, world())
        for group in groups[rank()::world()]:
            weight = len(group) / len(rows)  # 0 for a micro-batch that only keeps the ranks in step
            index = torch.tensor([rows[i] for i in group or [0]])
            batch = collate_pairs([pairs[i].ids for i in index], job.pad_id, job.shared)
            loss, accuracy = loss_fn(root(batch), index)
            (loss * weight * world()).backward()  # FSDP2 averages over ranks
            losses.append((loss.detach(), index.tolist()))
            sums += weight * torch.stack([loss.detach(), accuracy])
        norm = nn.utils.clip_grad_norm_(root.parameters(), cfg.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            bad = [i for loss, index in losses if not torch.isfinite(loss) for i in index] or rows
            bad = sorted({i for part in gather(bad) for i in part})
            if is_main():
                print(f"cdpo: {name}: the loss or its gradient is not finite at step {step}, pairs {bad}, prompts "
                      f"{[pairs[i].prompt[:60] for i in bad[:3]]}; lower the learning rate or mend those rows; the "
                      "last checkpoint is kept", file=sys.stderr)
            raise SystemExit(1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums = torch.tensor(gather(sums.tolist())).sum(dim=0).tolist()
        state["first_loss"] = sums[0] if state["first_loss"] is None else state["first_loss"]
        state.update(step=step + 1, loss_sum=state["loss_sum"] + sums[0], accuracy_sum=state["accuracy_sum"] + sums[1])
        meter.add([pairs[i].ids for i in rows], time.perf_counter() - started)
        if step + 1 < len(order) and gather(time.monotonic() - saved > 60 * cfg.save_minutes)[0]:
            save_training(job, name, root, optimizer, state)
            saved = time.monotonic()
    say(f"{name}: {len(order)} steps, mean loss {state['loss_sum'] / len(order):.4f}, {meter}")
    return meter


def train_stage(job, name, load, function, learning_rate, steps, loss_fn, decay=True):
    """Train a model on the job's pairs into the folder `name`, unless it is there → the folder."""
    path, cfg = job.out / name, job.cfg
    if path.exists():
        say(f"{name}: found in {path}")
        return path
    torch.manual_seed(cfg.seed)  # for a new score head
    root, optimizer = training_model(load(), function, cfg, learning_rate)
    state = restore_training(job, name, root, optimizer) or {"step": 0, "loss_sum": 0.0, "accuracy_sum": 0.0}
    order = draw(len(job.train), 0, steps * cfg.batch_size, cfg.seed, name)
    order = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    train(job, name, root, optimizer, job.train, order, learning_rate, loss_fn, state, decay)
    export(root, job.tokenizer, path, cfg, **({"score_type": name.split("_")[0]} if function is pair_scores else {}))
    if is_main():
        [remove(folder) for folder in (job.out / "training").glob(f"{name}-*")]
    return path


@torch.inference_mode()
def infer(job, function, model, pairs, title):
    """function(model, batch) on every pair of token ids → (N, 2) float32 on CPU, the work split over the ranks."""
    groups, outputs, meter = cut([tokens_of(ids) for ids in pairs], job.cfg.tokens_per_batch), [], Meter(model, False)
    started = time.perf_counter()
    for group in bar(groups[rank()::world()], title):
        if group:
            batch = collate_pairs([pairs[i] for i in group], job.pad_id, job.shared)
            outputs.append((group, function(model, batch).float().cpu()))
    result = torch.zeros(len(pairs), 2)
    for group, values in (entry for part in gather(outputs) for entry in part):
        result[group] = values
    meter.add(pairs, time.perf_counter() - started)
    if time.perf_counter() - started > 5:
        say(f"{title}: {meter}")
    return result


@torch.inference_mode()
def sample(job, path, prompts, count, key, tokenizer):
    """`count` responses from π itself (temperature 1, nothing cut off) to each prompt's ids → [[(ids, ended)]].

    Fixed batches of prompts sorted by length, each seeded from (seed, key, batch): the ranks change nothing. The
    prompts of a batch are prefilled once and their key-value cache repeated for the responses.
    """
    cfg, model, started = job.cfg, inference_model(path, job.cfg), time.perf_counter()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size, results, eos = max(1, cfg.sample_batch // count), {}, tokenizer.eos_token_id
    settings = transformers.GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=eos,
                                             max_new_tokens=cfg.max_new_tokens, pad_token_id=job.pad_id)
    for number in bar(range(rank(), math.ceil(len(order) / size), world()), f"sampling {Path(path).name}"):
        batch = order[number * size : (number + 1) * size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[job.pad_id] * (width - len(prompts[i])) + prompts[i] for i in batch], device=device())
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device())
        torch.manual_seed(int(torch.randint(2**60, (), generator=seeded("sample", cfg.seed, key, number))))
        cache = transformers.DynamicCache(config=model.config)
        if width > 1:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1]
            model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(count)
        ids, mask = ids.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
        output = model.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=settings)
        for row, answer in enumerate(output[:, width:].tolist()):
            ended = eos in answer
            results.setdefault(batch[row // count], []).append((answer[: answer.index(eos) + 1] if ended else answer, ended))
    results = {i: answers for part in gather(results) for i, answers in part.items()}
    tokens = sum(len(answer) for answers in results.values() for answer, _ in answers)
    seconds = time.perf_counter() - started
    say(f"sampling {Path(path).name}: {len(prompts)} × {count} responses, {tokens / seconds:,.0f} tokens/s")
    return [results[i] for i in range(len(prompts))]


def score(job, pairs, implicit, ref_logps=None):
    """Reward and cost (N, 2) of pairs: from the score models, or, for PeCAN, implicit in two policies.

    The score models read text, with their own tokenizer and the template that they were trained with.
    """
    cfg = job.cfg
    if implicit:
        helpful, safe = (infer(job, sequence_logps, inference_model(path, cfg), [p.ids for p in pairs], f"log π {path}")
                         for path in (job.helpful, job.safe))
        return implicit_reward(helpful, ref_logps, cfg.beta), -implicit_reward(safe, ref_logps, cfg.beta)
    scores = []
    for flag, path in (("reward_model", job.reward_model), ("cost_model", job.cost_model)):
        model = inference_model(path, cfg, flag)
        tokenizer = attempt(AutoTokenizer.from_pretrained, str(path), flag)
        template = getattr(model.config, "prompt_template", BEAVER_TEMPLATE)
        texts = [(p.prompt, text, ended) for p in pairs for text, ended in zip(p.responses, p.ended)]
        encoded, _, _ = encode(tokenizer, template, texts, cfg.max_length + cfg.max_new_tokens)
        ids = [(encoded[i][0], encoded[i][1], encoded[i + 1][1]) for i in range(0, len(encoded), 2)]
        scores.append(infer(job, pair_scores, model, ids, f"scoring by {flag}"))
    return scores


def log_pi(job, path, pairs):
    """log π(y|x) of pairs under the policy in a folder, (N, 2)."""
    return infer(job, sequence_logps, inference_model(path, job.cfg), [p.ids for p in pairs], f"log π {Path(path).name}")


def measure(job, path, prompts, count, key, implicit, tokenizer=None):
    """Sample a policy and score it: the estimates behind every step of λ and every row of the table.

    prompts is a list of (text, ids) → namespace of reward, cost, log_ratio to π_ref, length, all (n, count), and the
    samples as pairs with their scores, (N, 2). Another policy's tokenizer: log π_ref is of the text in π_ref's own.
    """
    own = tokenizer or job.tokenizer
    if job.cfg.max_steps:
        prompts = prompts[: max(2, job.cfg.max_steps * job.cfg.sample_batch // count)]
    ids = [i for _, i in prompts] if tokenizer is None else [
        head for head, _ in encode(own, job.cfg.template, [(text, "", False) for text, _ in prompts], 10**6)[0]]
    answers = sample(job, path, ids, count, key, own)
    pairs = []
    for (prompt, _), head, answer in zip(prompts, ids, answers):
        texts = own.batch_decode([y for y, _ in answer], skip_special_tokens=True)
        for i in range(0, count, 2):
            j = min(i + 1, count - 1)  # an odd last one beside itself
            pairs.append(Pair(prompt, (texts[i], texts[j]), (head, answer[i][0], answer[j][0]), (answer[i][1], answer[j][1])))
    logps = log_pi(job, path, pairs)
    if tokenizer is None:
        ref_logps = logps if Path(path) == Path(job.reference) else log_pi(job, job.reference, pairs)
    else:
        texts = [(p.prompt, text, ended) for p in pairs for text, ended in zip(p.responses, p.ended)]
        encoded, _, _ = encode(job.tokenizer, job.cfg.template, texts, 10**6)
        theirs = [(encoded[i][0], encoded[i][1], encoded[i + 1][1]) for i in range(0, len(encoded), 2)]
        ref_logps = infer(job, sequence_logps, inference_model(job.reference, job.cfg), theirs, "log π_ref")
    reward, cost = score(job, pairs, implicit, ref_logps)

    def table(values):  # (N, 2) pairs → (n, count)
        return values.reshape(len(prompts), -1)[:, :count]

    length = torch.tensor([[float(len(y)) for y in p.ids[1:]] for p in pairs])
    return SimpleNamespace(reward=table(reward), cost=table(cost), log_ratio=table(logps - ref_logps), length=table(length),
                           pairs=pairs, pair_scores=(reward, cost, ref_logps))


# ---------------------------------------------------------------------------------------------------------------
# The method


def dpo_fit(ref_logps, prob, beta):
    """The loss of (13) for train(): on the pairs numbered by `index`."""
    def loss_fn(logps, index):
        ref, p = ref_logps[index].to(logps.device), prob[index].to(logps.device)
        log_ratio = logps.detach() - ref
        agrees = (log_ratio[:, 0] > log_ratio[:, 1]) == (p > 0.5)
        return dpo_loss(logps, ref, p, beta), agrees.float().mean()
    return loss_fn


def constrained_dpo(job, lam, lambda_mode, iterations, steps):
    """Algorithm 1 of C-DPO: relabel, fit, sample, step λ. → (folder of the best policy, its λ)."""
    cfg = job.cfg
    policy, optimizer = training_model(load_model(str(job.reference), cfg), sequence_logps, cfg, cfg.learning_rate)
    state = restore_training(job, "policy", policy, optimizer) or {
        "iteration": 0, "lambda": lam, "step": 0, "loss_sum": 0.0, "accuracy_sum": 0.0, "best": None, "history": [],
        "fresh": [], "drawn": 0, "steps_before": 0}
    while state["iteration"] < iterations:
        iteration, lam, started = state["iteration"], state["lambda"], time.perf_counter()
        fresh = [Pair(**{k: tuple(v) if isinstance(v, list) else v for k, v in pair.items()}) for pair in state["fresh"]]
        pairs, scores = job.train + fresh, job.scores
        if fresh:
            scores = [torch.cat([old, torch.tensor(new)]) for old, new in zip(scores, state["fresh_scores"])]
        reward, cost, ref_logps = scores
        prob = relabel(reward, cost, lam, cfg.labels, seeded("labels", cfg.seed, iteration))             # (12)
        count = min(len(fresh), steps * cfg.batch_size // 2)
        offline = draw(len(job.train), state["drawn"], steps * cfg.batch_size - count, cfg.seed, "policy")
        online = draw(len(fresh), 0, count, cfg.seed, "fresh", iteration) if count else []
        rows = offline + [len(job.train) + i for i in online]
        rows = [rows[i] for i in draw(len(rows), 0, len(rows), cfg.seed, "mix", iteration)]
        order = [rows[i : i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size)]
        meter = train(job, "policy", policy, optimizer, pairs, order, cfg.learning_rate,
                      dpo_fit(ref_logps, prob, cfg.beta), state)                                         # (13)
        if iteration == 0 and abs(state["first_loss"] - math.log(2)) > (1e-4 if cfg.dtype == "float32" else 2e-3):
            say(f"warning: the first DPO loss is {state['first_loss']:.5f}, not ln 2: policy and reference differ")
        export(policy, job.tokenizer, job.out / f"iterate-{iteration}", cfg)
        found = measure(job, job.out / f"iterate-{iteration}", job.steering, cfg.lambda_samples, ("step", iteration),
                        job.implicit)
        bound = estimate(found.cost, cfg.cost_confidence)                                                # Ĵ_c
        shifted = found.cost + (bound - found.cost.mean())  # the dual step and the choice use one estimate
        step = lambda_mode
        if step == "newton":
            try:
                state["lambda"] = newton_lambda_step(lam, shifted, job.cost_limit, cfg.beta, cfg.lambda_damping)
            except ValueError as error:
                say(f"{error}; a gradient step instead")
                step = "gradient"
        if step == "gradient":
            state["lambda"] = lambda_step(lam, shifted, job.cost_limit, cfg.lambda_lr)                   # (14)
        reward_mean, cost_mean, kl = (float(v.mean()) for v in (found.reward, found.cost, found.log_ratio))
        feasible = bound <= job.cost_limit
        rank_of = [feasible, reward_mean - cfg.beta * kl if feasible else -bound]  # objective (6), else the lowest
        if state["best"] is None or rank_of > state["best"]["rank"]:
            state["best"] = {"rank": rank_of, "iteration": iteration, "lambda": lam}
        numbers = meter.summary()
        state["history"].append({
            "iteration": iteration, "lambda": lam, "cost_mean": cost_mean, "cost_ci95": ci95(found.cost),
            "reward_mean": reward_mean, "reward_ci95": ci95(found.reward), "dpo_loss": state["loss_sum"] / len(order),
            "dpo_accuracy": state["accuracy_sum"] / len(order), "kl": kl, **numbers,
            "seconds": time.perf_counter() - started})
        say(f"iteration {iteration}: λ {lam:.4f}, cost {cost_mean:+.3f} [{ci95(found.cost)[0]:+.3f}, "
            f"{ci95(found.cost)[1]:+.3f}], reward {reward_mean:+.3f}, KL {kl:.3f} → λ {state['lambda']:.4f}")
        if cfg.recycle and lambda_mode != "fixed":
            state["fresh"] = [vars(pair) for pair in found.pairs if pair.ids[1] != pair.ids[2]]
            keep = [pair.ids[1] != pair.ids[2] for pair in found.pairs]
            state["fresh_scores"] = [values[keep].tolist() for values in found.pair_scores]
        state.update(iteration=iteration + 1, step=0, loss_sum=0.0, accuracy_sum=0.0,
                     drawn=state["drawn"] + len(offline), steps_before=state["steps_before"] + len(order))
        save_training(job, "policy", policy, optimizer, state)
        write(job.out / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in state["history"]))
        if is_main():
            [remove(f) for f in job.out.glob("iterate-*") if f.name != f"iterate-{state['best']['iteration']}"]
    best = job.out / f"iterate-{state['best']['iteration']}"
    if not state["best"]["rank"][0]:
        say(f"no iterate meets the limit {job.cost_limit:.4g}; kept the one with the lowest cost. More --iterations "
            "or --dpo_steps, or a higher --cost_limit, may help")
    if is_main() and best.exists():
        remove(job.out / "policy")
        os.replace(best, job.out / "policy")
    gather(None)
    return job.out / "policy", state["best"]["lambda"]


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(job, name, path, lam, own_tokenizer=False):
    """One row of the table: eval prompts × samples from the policy in a folder, scored. Kept on disk by name."""
    cfg, file = job.cfg, job.out / "rows" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.json"
    source = fingerprint(Path(path), name, lam, job.evaluation, cfg.eval_samples, cfg.max_new_tokens, cfg.seed, job.models)
    if file.exists() and (kept := json.loads(file.read_text()))["source"] == source:
        return kept["row"], kept["samples"]
    tokenizer = attempt(AutoTokenizer.from_pretrained, str(path), "compare") if own_tokenizer else None
    found = measure(job, path, job.evaluation, cfg.eval_samples, "eval", job.reward_model is None, tokenizer)
    samples = [{"policy": name, "prompt": pair.prompt, "response": text} for pair in found.pairs for text in pair.responses]
    per_prompt = len(samples) // len(found.reward)
    samples = [s for i, s in enumerate(samples) if i % per_prompt < cfg.eval_samples]  # without an odd one's double
    columns = {"reward": found.reward, "cost": found.cost}
    if cfg.dataset.startswith("tiny"):
        truth = torch.tensor([tiny_truth(s["prompt"], s["response"]) for s in samples]).view(*found.reward.shape, 2)
        columns |= {"true_reward": truth[..., 0], "true_cost": truth[..., 1]}
    row = {"name": name, "lambda": lam, "safe_rate": float((found.cost <= 0).float().mean()),
           "kl": float(found.log_ratio.mean()), "length_mean": float(found.length.mean())}
    for column, values in columns.items():
        row |= {f"{column}_mean": float(values.mean()), f"{column}_std": float(values.std()), f"{column}_ci95": ci95(values)}
    for s, r, c in zip(samples, found.reward.flatten().tolist(), found.cost.flatten().tolist()):
        s.update(reward=r, cost=c)
    if job.prediction and lam is not None:  # what the closed form said before any training
        predicted = predict(*job.prediction, lam, cfg.beta)
        row |= {"predicted_cost": predicted["cost"], "predicted_reward": predicted["reward"], "predicted_ess": predicted["ess"]}
    write(file, json.dumps({"source": source, "row": row, "samples": samples}))
    return row, samples


def markdown(rows):
    """The rows of results.json as a Markdown table."""
    extra = {"true_reward_mean": "true reward", "true_cost_mean": "true cost", "predicted_cost": "predicted cost"}
    extra = {key: title for key, title in extra.items() if any(key in row for row in rows)}
    head = ["policy", "λ", "reward", "95% interval", "cost", "95% interval", "safe", "KL", "length", *extra.values()]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for row in rows:
        cells = [row["name"], "" if row["lambda"] is None else f"{row['lambda']:.3f}"]
        for key in ("reward", "cost"):
            low, high = row[f"{key}_ci95"]
            cells += [f"{row[f'{key}_mean']:.3f} ± {row[f'{key}_std']:.3f}", f"[{low:.3f}, {high:.3f}]"]
        cells += [f"{row['safe_rate']:.1%}", f"{row['kl']:.3f}", f"{row['length_mean']:.1f}"]
        cells += [f"{row[key]:.3f}" if key in row else "" for key in extra]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# The command


def check_rows(job, source, flag="model"):
    """Try the longest pair both ways: shared-prompt rows against the model's own forward on separate sequences.

    Some decoders take a (B, 1, L, L) mask and get it silently wrong (sliding windows shorter than the row), some scale
    or cap logits after the head. The former fall back to separate rows, the latter are refused.
    """
    model, tolerance = inference_model(source, job.cfg, flag), 2e-2 if job.cfg.dtype == "bfloat16" else 1e-4
    ids = max((pair.ids for pair in job.train), key=tokens_of)
    plain, function = [], sequence_logps if flag == "model" else pair_scores
    with torch.inference_mode():
        for y in ids[1:]:
            whole = torch.tensor([ids[0] + y], device=device())
            if flag != "model":
                plain.append(model(whole, torch.ones_like(whole)))
                continue
            logps = model(whole).logits[0, len(ids[0]) - 1 : -1].float().log_softmax(dim=-1)
            plain.append(logps.gather(1, torch.tensor(y, device=device())[:, None]).sum().reshape(1))
        plain, allowed = torch.cat(plain), tolerance * torch.tensor([max(10, len(y)) for y in ids[1:]], device=device())
        for shared in (True, False) if job.shared else (False,):
            if ((function(model, collate_pairs([ids], job.pad_id, shared))[0] - plain).abs() <= allowed).all():
                if job.shared and not shared:
                    say(f"{source}: does not read shared-prompt rows correctly; each response gets a row of its own, slower")
                job.shared = shared
                return
    refuse(f"--{flag} {source}: its output head or attention is of a kind that this program computes wrongly (checked on "
           "one long pair); use a decoder such as Llama, Mistral, Qwen2 or GPT-2")


def reward_fit(job):
    """The loss of (3) for train()."""
    better = torch.tensor([pair.better for pair in job.train])

    def loss_fn(rewards, index):
        chosen = better[index].to(rewards.device)[:, None]
        chosen, rejected = rewards.gather(1, chosen)[:, 0], rewards.gather(1, 1 - chosen)[:, 0]
        return bradley_terry_loss(chosen, rejected), (chosen > rejected).float().mean()
    return loss_fn


def cost_fit(job):
    """The loss of (5) for train(). The worse response is the one that is not safer."""
    safer = torch.tensor([pair.safer for pair in job.train])
    signs = torch.tensor([pair.signs for pair in job.train]).float()

    def loss_fn(costs, index):
        safe, sign = safer[index].to(costs.device)[:, None], signs[index].to(costs.device)
        worse, better = costs.gather(1, 1 - safe)[:, 0], costs.gather(1, safe)[:, 0]
        worse_sign, better_sign = sign.gather(1, 1 - safe)[:, 0], sign.gather(1, safe)[:, 0]
        return cost_loss(worse, better, worse_sign, better_sign), (worse > better).float().mean()
    return loss_fn


def train_models(job):
    """SFT, reward and cost model, or for PeCAN the two policies, each unless given; sets their folders in `job`."""
    cfg = job.cfg
    passes = math.ceil(len(job.train) / cfg.batch_size)
    bound = cfg.max_steps or 10**9
    if cfg.skip_sft or cfg.sft_model:
        job.reference = job.base if cfg.skip_sft else cfg.sft_model
    else:
        mean_tokens = sum(len(y) for pair in job.train for y in pair.ids[1:]) / len(job.train)

        def sft_loss(logps, _):  # on both responses, so that π_ref is the distribution the pairs were drawn from
            return -logps.sum(dim=1).mean() / mean_tokens, torch.zeros((), device=logps.device)
        job.reference = train_stage(job, "sft", lambda: load_model(str(job.base), cfg), sequence_logps,
                                    cfg.sft_learning_rate, min(bound, cfg.sft_epochs * passes), sft_loss)

    def fresh_score_model():
        config = AutoConfig.from_pretrained(job.reference, attn_implementation="sdpa")
        no_dropout(config)
        model = ScoreModel(config)
        model.model = AutoModel.from_pretrained(job.reference, config=config)
        return model

    job.reward_model, job.cost_model, job.helpful, job.safe = cfg.reward_model, cfg.cost_model, None, None
    if cfg.method != "pecan":
        for name, loss_fn in (("reward_model", reward_fit), ("cost_model", cost_fit)):
            if getattr(cfg, name) is None:
                path = train_stage(job, name, fresh_score_model, pair_scores, cfg.score_learning_rate,
                                   min(bound, cfg.score_epochs * passes), loss_fn(job))
                setattr(job, name, path)
                held_out_accuracy(job, name, path)
            else:
                check_rows(job, getattr(cfg, name), name)


def held_out_accuracy(job, name, path):
    """Say how often a score model ranks held-out pairs as labelled and, for costs, puts them on the right side of 0."""
    pairs = [pair for pair in job.held_out if pair.ids]
    if pairs:
        scores = infer(job, pair_scores, inference_model(path, job.cfg, name), [p.ids for p in pairs], f"{name} held out")
        first_is_higher = torch.tensor([(p.better if name == "reward_model" else 1 - p.safer) == 0 for p in pairs])
        ranking = ((scores[:, 0] > scores[:, 1]) == first_is_higher).float().mean()
        signs = torch.tensor([p.signs for p in pairs])
        sign = "" if name == "reward_model" else f", of sign {((scores > 0) == (signs > 0)).float().mean():.1%}"
        say(f"{name}: held-out accuracy of ranking {ranking:.1%}{sign} on {len(pairs)} pairs")


def score_pairs(job):
    """r, c and log π_ref of every training pair, once; no λ is in them. Kept with a fingerprint of their origin."""
    cfg, file = job.cfg, job.out / "scores.safetensors"
    source = fingerprint([p.ids for p in job.train], cfg.template, job.models, cfg.beta)
    if file.exists():
        with safe_open(file, "pt") as cache:
            if cache.metadata()["source"] == source:
                return [cache.get_tensor(key) for key in ("reward", "cost", "ref_logps")]
        say("scores: data or models changed; computing them again")
    ref_logps = log_pi(job, job.reference, job.train)
    reward, cost = score(job, job.train, job.implicit, ref_logps)
    with atomic(file) as temporary:
        if is_main():
            save_file({"reward": reward, "cost": cost, "ref_logps": ref_logps}, temporary, {"source": source})
    return [reward, cost, ref_logps]


def sample_reference(job):
    """Scores (n, m) of samples of π_ref for the closed-form dual; kept like the pairs' scores."""
    cfg, file = job.cfg, job.out / "reference_samples.safetensors"
    prompts = (job.steering + [(p.prompt, p.ids[0]) for p in {p.prompt: p for p in job.train}.values()])[: cfg.dual_prompts]
    source = fingerprint(prompts, cfg.dual_samples, cfg.template, job.models, cfg.beta)
    if file.exists():
        with safe_open(file, "pt") as cache:
            if cache.metadata()["source"] == source:
                return cache.get_tensor("reward"), cache.get_tensor("cost")
    found = measure(job, job.reference, prompts, cfg.dual_samples, "dual", job.implicit)
    with atomic(file) as temporary:
        if is_main():
            save_file({"reward": found.reward.clone(), "cost": found.cost.clone()}, temporary, {"source": source})
    return found.reward, found.cost


def start_lambda(job):
    """The limit and the first λ: given, or from the closed-form dual on samples of π_ref."""
    cfg, job.cost_limit, job.prediction = job.cfg, job.cfg.cost_limit, None
    if cfg.method == "dpo":
        return 0.0
    if cfg.lambda_init is None or cfg.margin is not None:
        job.prediction = reward, cost = sample_reference(job)
        if cfg.margin is not None:
            job.cost_limit = float(cost.mean()) - cfg.margin
    if cfg.lambda_init is not None:
        return cfg.lambda_init
    try:
        lam = solve_dual(reward, cost, cfg.beta, job.cost_limit)
    except ValueError as error:
        refuse(f"{error}; raise --cost_limit, lower --beta, or draw more --dual_samples")
    say("λ from the dual | predicted cost | 95% interval | predicted reward | effective samples of " + str(cost.shape[1]))
    for value in sorted({0.0, lam / 2, lam, 2 * lam, *cfg.lambdas}):
        p = predict(reward, cost, value, cfg.beta)
        say(f"{value:8.4f}{' *' if value == lam else '  '} | {p['cost']:+.3f} | [{p['cost_ci95'][0]:+.3f}, "
            f"{p['cost_ci95'][1]:+.3f}] | {p['reward']:+.3f} | {p['ess']:.1f}")
    if predict(reward, cost, lam, cfg.beta)["ess"] < 5:
        say("warning: the effective sample size is below 5; the prediction leans on few samples and is not to be trusted")
    return lam


def run(job):
    """All stages in order; each finds what an earlier run of the same command has finished."""
    cfg = job.cfg
    prepare(job)
    train_models(job)
    job.implicit = cfg.method == "pecan"
    total = cfg.iterations * cfg.dpo_steps if not cfg.max_steps else cfg.max_steps
    if job.implicit:
        helpful = torch.tensor([1.0 - p.better for p in job.train])
        safe = torch.tensor([1.0 - p.safer for p in job.train])
        ref_logps = log_pi(job, job.reference, job.train)
        for name, prob in (("helpful", helpful), ("safe", safe)):
            given = getattr(cfg, f"{name}_model")
            setattr(job, name, given or train_stage(
                job, name, lambda: load_model(str(job.reference), cfg), sequence_logps, cfg.learning_rate, total,
                dpo_fit(ref_logps, prob, cfg.beta), decay=False))
    job.models = fingerprint(*(Path(p) for p in (job.reference, job.reward_model, job.cost_model, job.helpful, job.safe) if p))
    rows = [("SFT", job.reference, None)]
    if cfg.method != "sft":
        job.scores = score_pairs(job)
        lam = start_lambda(job)
        once = cfg.method != "cdpo"
        mode = "fixed" if once or cfg.lambda_lr == 0 else cfg.lambda_step
        path, lam = constrained_dpo(job, lam, mode, 1 if once else cfg.iterations,
                                    total if once else min(cfg.dpo_steps, total))
        main_name = {"cdpo": "C-DPO", "mocan": "MoCAN", "pecan": "PeCAN", "dpo": "DPO"}[cfg.method]
        rows.append((main_name, path, lam))
        reward, cost, ref_logps = job.scores
        for fixed in cfg.lambdas:
            prob = relabel(reward, cost, fixed, cfg.labels, seeded("labels", cfg.seed, fixed))
            name = "DPO" if fixed == 0 else f"λ = {fixed:g}"
            if name not in [row[0] for row in rows]:
                rows.append((name, train_stage(job, f"lambda-{fixed:g}", lambda: load_model(str(job.reference), cfg),
                                               sequence_logps, cfg.learning_rate, total,
                                               dpo_fit(ref_logps, prob, cfg.beta), decay=False), fixed))
    else:
        job.prediction = None
        with atomic(job.out / "policy") as folder:
            if is_main():
                shutil.copytree(job.reference, folder)
    rows += [(name, path, None) for name, path in zip(unique([Path(p).name for p in cfg.compare], [r[0] for r in rows]),
                                                      cfg.compare)]
    rows = [evaluate(job, name, path, lam, str(path) in cfg.compare) for name, path, lam in rows]
    write(job.out / "results.json", json.dumps([row for row, _ in rows], indent=2))
    write(job.out / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for _, kept in rows for s in kept))
    say(f"\nlimit: E[cost] ≤ {getattr(job, 'cost_limit', cfg.cost_limit):.4g}\n\n" + markdown([row for row, _ in rows]) + "\n")


def unique(names, taken):
    """Names made unlike each other and unlike those taken."""
    result = []
    for name in names:
        candidates = (name if k == 1 else f"{name} ({k})" for k in range(1, 10**6))
        result.append(next(c for c in candidates if c not in (*taken, *result)))
    return result


def prepare(job):
    """Read, check, tokenize and split the data; make the base model where it is a dictionary."""
    cfg = job.cfg
    better, safer = ["better_response_id"], ["safer_response_id", "is_response_0_safe", "is_response_1_safe"]
    need = ["response_0", "response_1"]
    need += better if cfg.reward_model is None or cfg.method == "pecan" else []
    need += safer if cfg.cost_model is None or cfg.method == "pecan" else []
    pairs = load_pairs(cfg.dataset, "dataset", need, cfg.seed)
    eval_pairs = load_pairs(cfg.eval_dataset, "eval_dataset", [], cfg.seed + 1) if cfg.eval_dataset else None
    job.tokenizer = load_tokenizer(cfg)
    job.pad_id = job.tokenizer.eos_token_id if job.tokenizer.pad_token_id is None else job.tokenizer.pad_token_id
    pairs = tokenize_pairs(pairs, job.tokenizer, cfg)
    job.held_out, steering, job.train = split_by_prompt(pairs, eval_pairs, cfg)
    if cfg.max_steps:
        job.train = job.train[: cfg.max_steps * cfg.batch_size]

    def prompts(pairs):
        texts = list(dict.fromkeys(pair.prompt for pair in pairs))
        heads, _, _ = encode(job.tokenizer, cfg.template, [(text, "", False) for text in texts], 10**6)
        return [(text, ids) for text, (ids, _) in zip(texts, heads)]

    job.evaluation, job.steering, job.shared, job.base = prompts(job.held_out), prompts(steering), True, cfg.model
    say(f"data: {len(job.train)} pairs to train on; prompts: {len(job.evaluation)} for the table, {len(job.steering)} for λ")
    if cfg.model.startswith("{") and not cfg.sft_model:
        job.base = job.out / "base"
        if not job.base.exists():
            model = load_model(cfg.model, cfg, vocabulary=len(job.tokenizer))
            export(Root(model, sequence_logps), job.tokenizer, job.base, cfg)
    check_rows(job, cfg.sft_model or str(job.base))


def open_folder(cfg):
    """Lock and check the output folder: a run goes on only with the settings that it began with."""
    out = Path(cfg.output_dir)
    settings, kept = dataclasses.asdict(cfg), None
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
        if is_main():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"--output_dir {out}: another process is running in it; wait for it or name another folder")
    except OSError as error:
        refuse(f"--output_dir {out}: cannot be written: {error.strerror}; name another folder")
    ours = {"sft", "base", "reward_model", "cost_model", "helpful", "safe", "policy", "training", "rows"}
    if (out / "config.json").exists():
        try:
            kept = json.loads((out / "config.json").read_text())
            assert "output_dir" in kept
        except (ValueError, AssertionError, TypeError):
            refuse(f"--output_dir {out}: its config.json is not of a run of this program; name another folder")
    elif any(f.name != ".lock" for f in out.iterdir()):
        refuse(f"--output_dir {out}: is not empty and holds no run of this program; name another folder")
    if kept and cfg.overwrite and is_main():
        [remove(f) for f in out.iterdir() if f.name in ours or f.suffix in (".json", ".jsonl", ".safetensors", ".tmp")
         or f.name.startswith(("iterate-", "lambda-"))]
    elif kept:
        changed = [f"{key} was {kept.get(key)!r:.80}, is {value!r:.80}" for key, value in settings.items()
                   if key not in EXTENDING and kept.get(key) != value]
        if changed:
            refuse(f"--output_dir {out}: the run there has other settings ({'; '.join(changed)}); restore them, name "
                   "another folder, or start afresh with --overwrite")
    for folder in ("training", "rows"):
        (out / folder).mkdir(exist_ok=True)
    write(out / "config.json", json.dumps(settings, indent=2, ensure_ascii=False))
    return out, lock


def main(argv=None):
    """The whole program. Refusals are SystemExit(2) with one line on standard error."""
    cfg = parse(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    gpu, many = torch.cuda.is_available(), "WORLD_SIZE" in os.environ
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if (gpu or many or cfg.dtype == "bfloat16") and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, **({} if many else {"store": dist.HashStore(), "rank": 0, "world_size": 1}))
    signal.signal(signal.SIGTERM, Terminated.handle)
    out, lock = open_folder(cfg)
    try:
        run(SimpleNamespace(cfg=cfg, out=out))
    except KeyboardInterrupt:
        print(f"\ncdpo: stopped; the same command goes on from {out}", file=sys.stderr)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError:
        print(f"cdpo: out of GPU memory. Activations go down in proportion to --tokens_per_batch (now "
              f"{cfg.tokens_per_batch}), sampling to --sample_batch (now {cfg.sample_batch}); more GPUs under torchrun "
              "divide the 16 bytes per parameter; --cpu_offload moves them to host memory", file=sys.stderr)
        raise
    except OSError as error:
        if "No space left" not in str(error):
            raise
        refuse(f"--output_dir {out}: the disk is full; free some space and run the same command again to go on")
    finally:
        lock.close()
        if dist.is_initialized() and many:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
