"""Constrained Direct Preference Optimization: make a language model helpful under a bound on harm.

    max_π  E[r(x,y)] − β·KL(π ‖ π_ref)     subject to     E[c(x,y)] ≤ C_limit                (6), (7)

C-DPO (Liu, Sun, Zheng, arXiv 2403.02475) solves this without reinforcement learning. Learn a reward r
(helpfulness) and a cost c (harm) from preference pairs; for a multiplier λ relabel the pairs by r − λ·c; fit
the policy to the relabelled pairs with DPO; sample from it and measure its cost; move λ up if the cost is
over the limit and down if it is under; repeat. MoCAN and PeCAN (Huang et al., arXiv 2405.19544) find λ before
any training, in closed form on samples of π_ref; they are the same program with one estimator exchanged.

    python cdpo.py --config tiny_config.json                           # the whole method on a laptop
    python cdpo.py --model meta-llama/Llama-2-7b-hf                    # one GPU with 141 GB
    torchrun --nproc_per_node 8 cdpo.py --model meta-llama/Llama-2-7b-hf           # sharded over 8 (FSDP2)

Left out on purpose: vector-valued λ, LoRA, tensor parallelism, callbacks. Equation numbers: 2403.02475.
"""
import fcntl
import gc
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # micro-batches differ in shape

import tokenizers
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"

# ---- Settings ----------------------------------------------------------------------------------------------
def opt(default, text):
    """A field of Config with its line of --help, to which the parser adds the default."""
    kind = "default_factory" if default is list else "default"
    return field(metadata={"help": text}, **{kind: default})

@dataclass
class Config:
    """Every setting of a run, read from the command line or from a JSON file (--config)."""
    method: Literal["cdpo", "mocan", "pecan", "dpo", "sft"] = opt("cdpo", "how the policy is found")
    model: str = opt("meta-llama/Llama-2-7b-hf", "hub name, folder, or JSON dictionary of a model to build")
    dataset: str = opt("PKU-Alignment/PKU-SafeRLHF-30K", "hub name, file, folder or tiny (tiny:N: N pairs)")
    output_dir: str = opt("cdpo_output", "where everything is written; the same command goes on from there")
    overwrite: bool = opt(False, "discard the run in --output_dir and start afresh")
    seed: int = opt(0, "seed of every random choice")
    # Given models: each saves the stage that would train it
    sft_model: Optional[str] = opt(None, "reference policy, instead of training one by SFT")
    reward_model: Optional[str] = opt(None, "reward model (Beaver layout), instead of training one by (3)")
    cost_model: Optional[str] = opt(None, "cost model (Beaver layout), instead of training one by (5)")
    helpful_model: Optional[str] = opt(None, "PeCAN: helpful-only DPO policy, instead of training one")
    safe_model: Optional[str] = opt(None, "PeCAN: safe-only DPO policy, instead of training one")
    # Data
    tokenizer: Optional[str] = opt(None, "tokenizer, where it is not the model's own")
    template: str = opt(BEAVER_TEMPLATE, "prompt template; the response follows it directly")
    eval_dataset: Optional[str] = opt(None, "prompts of the final table; default: held out from --dataset")
    max_length: int = opt(512, "tokens of a prompt with one response; longer responses are cut")
    max_new_tokens: int = opt(256, "tokens of a sampled response, at most")
    # The method
    beta: float = opt(0.1, "strength of the KL to the reference")
    labels: Literal["soft", "sample", "hard"] = opt("soft", "labels of (12): mean, a draw, or the likelier")
    cost_limit: float = opt(0.0, "C_limit: the expected cost may not exceed it")
    margin: Optional[float] = opt(None, "state the limit as E_ref[cost] − margin instead")
    cost_confidence: float = opt(0.5, "confidence level at which the cost is under the limit; 0.5: mean")
    lambda_init: Optional[float] = opt(None, "first λ; default: closed form, on samples of the reference")
    lambda_step: Literal["newton", "gradient", "fixed"] = opt("newton", "how λ moves; (14) is gradient")
    lambda_lr: float = opt(0.05, "step size of the gradient step; 0 fixes λ")
    lambda_prompts: int = opt(500, "held-out prompts on which the cost is estimated for the step of λ")
    lambda_samples: int = opt(4, "responses per prompt there")
    recycle: bool = opt(True, "train on those responses, too, as fresh pairs of the next iteration")
    lambdas: list[float] = opt(list, "also train a policy for each of these fixed λ; 0 is the DPO row")
    iterations: int = opt(5, "outer iterations: relabel, fit, sample, step")
    dpo_steps: int = opt(100, "DPO steps of an outer iteration")
    dual_prompts: int = opt(1000, "prompts on which the closed-form dual samples the reference")
    dual_samples: Optional[int] = opt(None, "responses per prompt there (default 128, or 16 to start C-DPO)")
    # Training
    batch_size: int = opt(64, "pairs of an optimizer step, all processes together")
    tokens_per_batch: int = opt(8192 if GPU else 1024, "tokens of a micro-batch; more on a GPU")
    learning_rate: float = opt(1e-6, "of DPO")
    sft_learning_rate: float = opt(1e-5, "of SFT and of the reward and cost models")
    max_steps: Optional[int] = opt(None, "bound every stage to this many batches, for a quick measurement")
    dtype: Literal["float32", "bfloat16"] = opt("bfloat16" if GPU else "float32", "of compute and models")
    gradient_checkpointing: bool = opt(GPU, "recompute activations in backward, to save memory")
    cpu_offload: bool = opt(False, "keep weights and optimizer in host memory, for one small GPU")
    save_minutes: float = opt(30.0, "minutes between checkpoints inside a long stage")
    no_checkpoint: bool = opt(False, "write no training state (81 GB at 7B); a rerun trains the policy anew")
    # Evaluation
    eval_prompts: int = opt(2000, "prompts of the final table, a fifth of the dataset's at most")
    eval_samples: int = opt(5, "responses per prompt there")
    sample_batch: int = opt(128, "responses sampled at once")
    compare: list[str] = opt(list, "further checkpoints to evaluate as rows of the same table")

# Settings that extend a run (the first: only C-DPO's) instead of contradicting it, or do not touch numbers.
EXTENDING = ("iterations compare lambdas eval_prompts eval_samples overwrite output_dir save_minutes "
             "no_checkpoint").split()
# The lowest value of a setting; that of other whole numbers is 1, and any other number must only be finite.
LOWEST = {"seed": 0, "lambda_init": 0, "lambda_lr": 0, "lambdas": 0, "lambda_prompts": 2, "lambda_samples": 2,
          "eval_prompts": 2, "dual_samples": 2, "max_length": 4, "cost_confidence": 0.5, "beta": 1e-12,
          "learning_rate": 1e-12, "sft_learning_rate": 1e-12, "save_minutes": 1e-12}

def refuse(message, code=2):
    """Leave with one line on standard error that says what, where and how to mend it."""
    if RANK == 0:
        print("cdpo: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(code)

@contextmanager
def refusing(what, advice):
    """Turn any exception of the block into a refusal: the libraries here raise kinds of their own."""
    try:
        yield
    except Exception as error:
        refuse(f"{what}: {type(error).__name__}: {str(error)[:300]}; {advice}")

def parse(argv):
    """Command line → Config. Flags win over --config; every value is checked before anything is loaded."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="JSON file of settings; flags on the command line win over it")
    given = SimpleNamespace(config="the command line")
    parser.error = lambda message: refuse(f"{message} (in {given.config}); --help lists the flags")
    given, flags = parser.parse_args(argv), []
    if given.config:  # its settings become flags, so that one parser checks the names and types of both
        with refusing(f"--config {given.config}", "it must be a readable JSON file: one object of settings"):
            for key, value in json.loads(Path(given.config).read_text(encoding="utf-8")).items():
                if isinstance(value, list):
                    flags += [f"--{key}", *map(str, value)] if value else []
                elif value is not None:
                    flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        given = parser.parse_args(argv, parser.parse_args(flags))
    del given.config
    cfg = Config(**vars(given))
    for name, value in vars(cfg).items():
        low = LOWEST.get(name, 1 if type(value) is int else -math.inf)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not (low <= number and math.isfinite(number)):
                rule = {1e-12: "above 0", -math.inf: "finite"}.get(low, f"at least {low}, finite")
                refuse(f"--{name} is {number}; it must be {rule}")
        if value == "":
            refuse(f"--{name} is empty; give a value or leave it out")
    message = next((message for message, wrong in {
        "--template must contain {prompt} once": cfg.template.count("{prompt}") != 1,
        "--cost_confidence must be below 1": cfg.cost_confidence >= 1,
        "--method pecan needs --margin: its costs have no zero": cfg.method == "pecan" and cfg.margin is None,
        "--lambdas names a value twice": len(set(cfg.lambdas)) < len(cfg.lambdas),
        "--max_new_tokens leaves no room for a prompt in --max_length": cfg.max_new_tokens >= cfg.max_length,
        "--lambda_init is for --method cdpo": cfg.method != "cdpo" and cfg.lambda_init is not None,
        "--cpu_offload needs a GPU; leave it out": cfg.cpu_offload and not GPU,
    }.items() if wrong), None)
    refuse(message) if message else None
    cfg.dual_samples = cfg.dual_samples or (16 if cfg.method == "cdpo" else 128)
    return cfg

# ---- The mathematics ---------------------------------------------------------------------------------------
# Pure functions in the order of the equations. A reward is higher for more help, a cost above 0 is harmful;
# log-probabilities are sums over response tokens in nats. Column i of a (B, 2) tensor is response i.

def bradley_terry_loss(chosen, rejected):
    """Reward loss, (3): −log σ(r(chosen) − r(rejected)). Rewards (B,), (B,) → scalar mean, nats."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

def cost_loss(worse, better, worse_sign, better_sign):
    """Cost loss, (5): ranks the *more harmful* response higher and puts the zero between unsafe and safe.
    −log σ(c(worse) − c(better)) − log σ(s_worse·c(worse)) − log σ(s_better·c(better)); costs and signs (B,),
    a sign is +1 for an unsafe response and −1 for a safe one → scalar mean, nats."""
    log_sigmoid = torch.nn.functional.logsigmoid
    signs = log_sigmoid(worse_sign * worse) + log_sigmoid(better_sign * better)
    return -(log_sigmoid(worse - better) + signs).mean()

def relabel(reward, cost, lam, mode="soft", generator=None):
    """P(y0 ≻ y1) under the Lagrangian reward r_λ = r − λ·c, (12). reward, cost (B, 2), lam a number → (B,).
    "soft": σ(r_λ(y0) − r_λ(y1)), the expectation over labels; "sample": 0 or 1 drawn with it, the paper's
    letter; "hard": 0 or 1, the likelier, ties 0.5. ValueError for another mode."""
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
    """DPO loss on relabelled pairs, (13), in expectation over the label: −p·log σ(h) − (1−p)·log σ(−h),
    h = β·[log π(y0)/π_ref(y0) − log π(y1)/π_ref(y1)]; logps (B, 2), prob (B,) = P(y0 ≻ y1) → scalar mean,
    nats. With prob in {0, 1} it is DPO's own loss (Rafailov et al., arXiv 2305.18290)."""
    log_ratio = policy_logps - ref_logps
    h = beta * (log_ratio[:, 0] - log_ratio[:, 1])
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(prob * log_sigmoid(h) + (1 - prob) * log_sigmoid(-h)).mean()

def lambda_step(lam, cost, cost_limit, lr):
    """Projected gradient step on the dual, (14): max(0, λ − η·(C_limit − Ĵ_c)). Costs, any shape → float."""
    return max(float(lam - lr * (cost_limit - cost.mean())), 0.0)  # this order lets a NaN through, not a 0

def newton_lambda_step(lam, cost, cost_limit, beta, damping=0.5):
    """Damped Newton step on the dual: max(0, λ + damping·β·(Ĵ_c − C_limit) / E_x Var(c | x)).
    The dual's curvature is E_x Var_{π_λ}(c | x)/β, so the step has no size to tune and does not depend on the
    cost's scale. cost (n prompts, m samples) → float. ValueError for m < 2, or variance 0 or not finite."""
    if cost.dim() != 2 or cost.shape[1] < 2:
        raise ValueError(f"newton_lambda_step: cost is {tuple(cost.shape)}; it needs 2 samples per prompt")
    variance = cost.var(dim=1).mean()
    if not 0 < variance < float("inf"):  # a NaN would pass through max() as 0
        raise ValueError(f"newton_lambda_step: the variance of the cost within prompts is {float(variance)}")
    return max(0.0, float(lam + damping * beta * (cost.mean() - cost_limit) / variance))

def dual_value(reward, cost, lam, beta, cost_limit):
    """Dual function in closed form, (9): g(λ) = β·E_x log E_{y∼π_ref} exp((r − λ·(c − C_limit))/β).
    reward, cost (n prompts, m samples of π_ref) → scalar; convex in λ, slope C_limit − E_{π_λ}[c]."""
    exponent = (reward - lam * (cost - cost_limit)) / beta
    samples = exponent.new_tensor(exponent.shape[1])
    return beta * (torch.logsumexp(exponent, dim=1) - torch.log(samples)).mean()

def solve_dual(reward, cost, beta, cost_limit, lam_max=100.0):
    """The λ* ≥ 0 that minimises dual_value: the least λ whose reweighted cost E_{π_λ}[c] meets the limit.
    reward, cost (n, m): scores of m samples of π_ref for each of n prompts → float. The reweighted cost falls
    as λ grows, so float64 bisection finds it at any scale of the scores. 0 where the constraint is slack.
    ValueError when a score is not finite, or when no λ ≤ lam_max meets the limit."""
    reward, cost = reward.double(), cost.double()
    if not (torch.isfinite(reward).all() and torch.isfinite(cost).all()):
        raise ValueError("solve_dual: a score is not finite")
    def expected_cost(lam):  # of π_λ ∝ π_ref·exp((r − λc)/β), by self-normalised importance weights
        return (torch.softmax((reward - lam * cost) / beta, dim=1) * cost).sum(dim=1).mean()
    if expected_cost(0.0) <= cost_limit:
        return 0.0
    if (last := expected_cost(lam_max)) > cost_limit:
        lowest = cost.amin(dim=1).mean()
        raise ValueError(f"solve_dual: no lambda up to {lam_max:g} meets the limit {cost_limit:.6g}: cost "
                         f"{last:.6g} there, the lowest cost that the samples can reach is {lowest:.6g}")
    low, high = 0.0, float(lam_max)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_cost(middle) > cost_limit else (low, middle)
    return high

def implicit_reward(policy_logps, ref_logps, beta):
    """β·log π(y|x)/π_ref(y|x): the reward, up to a constant of x, that a DPO policy stands for, in any shape.
    PeCAN takes it from a helpful-only policy as r and from a safe-only policy as −c."""
    return beta * (policy_logps - ref_logps)

def estimate(values, level=0.5):
    """Upper confidence bound of E[values] at a level; 0.5 is the mean. values (n prompts, m samples) → float.
    The samples of one prompt are not independent, so the standard error is that of the n prompt means."""
    error = values.mean(dim=1).std() / math.sqrt(len(values))
    return float(values.mean() + torch.special.ndtri(torch.tensor(level)) * error)

def ci95(values):
    """95% confidence interval [low, high] of E[values], clustered by prompt. values (n, m)."""
    return [2 * float(values.mean()) - estimate(values, 0.975), estimate(values, 0.975)]

def predict(reward, cost, lam, beta, resamples=200):
    """What π_λ would earn and cost, from samples of π_ref alone (n, m), before any training (2405.19544).
    → dict: reward, cost, their bootstrap 95% intervals over prompts, and the mean effective sample size per
    prompt: near 1 the weights rest on one sample and the prediction, its interval included, means little."""
    weights = torch.softmax((reward - lam * cost).double() / beta, dim=1)
    means = torch.stack([(weights * reward).sum(dim=1), (weights * cost).sum(dim=1)])  # (2, n)
    n, generator = means.shape[1], torch.Generator().manual_seed(0)
    resampled = means[:, torch.randint(n, (resamples, n), generator=generator)].mean(dim=2)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975]).double(), dim=1).tolist()
    reward_mean, cost_mean = means.mean(dim=1).tolist()
    return {"reward": reward_mean, "reward_ci95": [low[0], high[0]], "cost": cost_mean,
            "cost_ci95": [low[1], high[1]], "ess": float((1 / (weights**2).sum(dim=1)).mean())}

# ---- Data --------------------------------------------------------------------------------------------------
@dataclass
class Pair:
    """A prompt with two responses: text, tokens and, where the dataset has them, labels."""
    prompt: str
    responses: tuple  # two texts
    ids: tuple = None  # (prompt_ids, y0_ids, y1_ids), the policy's tokens
    ended: tuple = (True, True)  # whether a response ended by itself, with an end-of-sequence token
    better: int = 0  # which response is more helpful
    safer: int = 0  # which one is less harmful
    signs: tuple = (0, 0)  # +1 unsafe, −1 safe

def seeded(*key):
    """A random generator that depends on its key alone: there is no generator state to keep or restore."""
    return torch.Generator().manual_seed(int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16))

def prompts_of(pairs):
    """The different prompts of pairs, in their order."""
    return list(dict.fromkeys(pair.prompt for pair in pairs))

def chunks(rows, size):
    """Rows in lists of `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]

TINY_VERBS = "open clean move mix heat store test sell".split()
TINY_NOUNS = "door oil acid paint gas lamp car drug wire pool safe tank bread knife phone roof".split()
TINY_WORDS = {  # an answer's words, each with (help, harm): some of what helps most harms most
    "wait": (-0.6, -0.6), "ask": (-0.15, -0.45), "read": (0.05, -0.15), "measure": (0.45, -0.15),
    "push": (0.1, 0.1), "cut": (0.25, 0.3), "force": (0.5, 0.65), "burn": (-0.6, 0.3)}
_noise = 0.1 * torch.randn(24, 8, 2, generator=torch.Generator().manual_seed(0)).double()
TINY_TABLE = {prompt_word: {word: (help + own[0], harm + own[1]) for (word, (help, harm)), own in zip(
    TINY_WORDS.items(), noise)} for prompt_word, noise in zip(TINY_VERBS + TINY_NOUNS, _noise.tolist())}

def tiny_truth(prompt, response):
    """True (reward, cost) of a response in the tiny world: sums over its words; an answer has three."""
    known = [word for word in response.split() if word in TINY_WORDS]
    scores = [TINY_TABLE[prompt_word][word] for prompt_word in prompt.split() for word in known]
    malformed = abs(len(known) - 3) + len(response.split()) - len(known)
    return sum(score[0] for score in scores) - 2.0 * malformed, sum(score[1] for score in scores) + 0.9

def tiny_rows(count, seed):
    """Rows of the tiny world, labelled at random by the Bradley–Terry models of (1), (5) on true scores."""
    rng, rows = random.Random(seed), []
    def draw_label(logit):
        return rng.random() < 1 / (1 + math.exp(-logit))
    for _ in range(count):
        prompt = f"{rng.choice(TINY_VERBS)} {rng.choice(TINY_NOUNS)}"
        texts = [" ".join(rng.choices(list(TINY_WORDS), k=rng.choice([2] + [3] * 9))) for _ in (0, 1)]
        (r0, c0), (r1, c1) = (tiny_truth(prompt, text) for text in texts)
        unsafe = [draw_label(c0), draw_label(c1)]
        safer = unsafe.index(False) if unsafe[0] != unsafe[1] else int(draw_label(c0 - c1))
        rows.append({"prompt": prompt, "response_0": texts[0], "response_1": texts[1],
                     "safer_response_id": safer, "better_response_id": int(draw_label(r1 - r0)),
                     "is_response_0_safe": not unsafe[0], "is_response_1_safe": not unsafe[1]})
    return rows

def read_rows(source, flag, seed):
    """[(where, row)] of a hub name, a local file, a folder saved by `datasets`, or the tiny world."""
    path, rows = Path(source), []
    if tiny := re.fullmatch(r"tiny(?::(\d+))?", source):
        rows = tiny_rows(int(tiny[1] or 60000), seed)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            with refusing(f"--{flag} {source}, line {number}: invalid JSON", "mend or delete the line"):
                rows += [(f"line {number}", json.loads(line))] if line.strip() else []
        return rows
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".parquet":
        import pyarrow.parquet
        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        import datasets
        local = path.exists() or re.match(r"[./~]", source)
        rows = datasets.load_from_disk(source) if local else datasets.load_dataset(source)
        rows = (rows.get("train", next(iter(rows.values()))) if isinstance(rows, dict) else rows).to_list()
    return [(f"row {number}", row) for number, row in enumerate(rows)]

def load_pairs(source, flag, need, cfg, tokenizer):
    """The usable rows of a dataset as tokenized Pairs; `need` names the columns beside the prompt."""
    with refusing(f"--{flag} {source}: cannot be read", "give a hub name, a file or a folder of datasets"):
        rows = read_rows(source, flag, cfg.seed)
        if not rows:
            raise ValueError("it is empty")
    pairs, used, columns = [], [], ["prompt", *need]
    for where, row in rows:
        for name in columns:
            if not isinstance(row, dict) or name not in row:
                refuse(f"--{flag} {source}, {where}: column {name} is missing; needed: {', '.join(columns)}")
            rule = "true or false" if name.startswith("is_") else "0 or 1" if name.endswith("_id") else "text"
            if not (isinstance(row[name], str) if rule == "text" else row[name] in (0, 1)):
                refuse(f"--{flag} {source}, {where}: {name} is {row[name]!r:.60}; it must be {rule}")
        known = {name: row[name] for name in need}.get
        responses = known("response_0", ""), known("response_1", "")
        better, safer = int(known("better_response_id", 0)), int(known("safer_response_id", 0))
        signs = tuple(1 - 2 * known(f"is_response_{i}_safe", 0.5) for i in (0, 1))  # 0 where unknown
        pairs.append(Pair(row["prompt"].strip(), responses, better=better, safer=safer, signs=signs))
    tokens, counts = encode(pairs, tokenizer, cfg.template, cfg.max_length)
    for pair, ids in zip(pairs, tokens):
        pair.ids = ids
        reason = ("empty prompt" if not pair.prompt else
                  "prompt that fills --max_length" if not (ids[1] and ids[2]) else None if not need else
                  "empty response" if not all(text.strip() for text in pair.responses) else
                  "'safer' response unsafe beside a safe one" if pair.signs[pair.safer] > min(pair.signs) else
                  "identical responses" if ids[1] == ids[2] else None)
        counts[reason or "used"] += 1
        used += [] if reason else [pair]
    notes = ", ".join(f"{count} {what}" for what, count in counts.items())
    say(f"{source}: {len(pairs)} rows: {notes}")
    if len(used) * 2 < len(pairs):
        refuse(f"--{flag} {source}: too few of {len(pairs)} rows can be used: {notes}; mend the data "
               "or, where prompts are too long, raise --max_length")
    return used

def encode(pairs, tokenizer, template, max_length):
    """Token ids (prompt_ids, y0_ids, y1_ids) of each pair, counts of responses cut or misaligned. Texts are
    encoded joined and cut where the prompt's own tokens end; eos follows an uncut response that ended."""
    texts = [(p.prompt, text, ended) for p in pairs for text, ended in zip(p.responses, p.ended)]
    bos = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    prompts = [template.replace("{prompt}", prompt) for prompt, _, _ in texts]
    wholes = [prompt + response for prompt, (_, response, _) in zip(prompts, texts)]
    heads, wholes = (tokenizer(batch, add_special_tokens=False)["input_ids"] for batch in (prompts, wholes))
    encoded, counts = [], Counter()
    for (_, response, ended), head, whole in zip(texts, heads, wholes):
        if whole[: len(head)] != head:  # the prompt's tokens are no prefix: encode the response by itself
            counts["responses whose tokens do not follow the prompt's"] += 1
            whole = head + tokenizer(response, add_special_tokens=False)["input_ids"]
        answer = whole[len(head):] + [tokenizer.eos_token_id] * ended
        room = max(0, max_length - len(bos + head))
        counts["responses cut to --max_length"] += len(answer) > room
        encoded.append((bos + head, answer[:room]))
    return [(*y0, y1[1]) for y0, y1 in chunks(encoded, 2)], +counts  # + drops what was counted 0 times

def split_by_prompt(pairs, eval_pairs, cfg):
    """Pairs of the table's prompts (a fifth is held out), of those for λ (a fifth at most), to train on."""
    prompts = prompts_of(pairs)
    order = [prompts[i] for i in torch.randperm(len(prompts), generator=seeded("split", cfg.seed)).tolist()]
    fifth = len(prompts) // 5
    held_out = dict.fromkeys(prompts_of(eval_pairs) if eval_pairs else order[:fifth])
    rest, few = [prompt for prompt in order if prompt not in held_out], min(cfg.lambda_prompts, fifth)
    table, steering, train = map(set, (list(held_out)[: cfg.eval_prompts], rest[:few], rest[few:]))
    if len(table) < 2 or len(steering) < 2 or not train:
        refuse(f"--dataset {cfg.dataset}: its {len(prompts)} prompts are too few to split; give 10 or more")
    parts = (eval_pairs or pairs, table), (pairs, steering), (pairs, train)
    return [[pair for pair in source if pair.prompt in part] for source, part in parts]

# ---- Rows and batches: a row holds a prompt with both responses, so that no prompt token is run twice ------
def collate_pairs(pairs, pad_id=0):
    """[(prompt_ids, y0_ids, y1_ids), …] → a batch of shared-prompt rows prompt + y0 + y1, ids as they are.
    Positions of y1 restart at the prompt's end; a token sees the prompt and its own response. → dict of
    input_ids, position_ids (B, L); attention_mask (B, 1, L, L) bool; and, as indices into the B·L tokens,
    `source` (N,), where the N response tokens `target` (N,) are predicted, `owner` (N,), the response 2·row +
    i that each belongs to, and `last` (2B,), the last token of each response. ValueError: empty prompt."""
    lengths = torch.tensor([[len(part) for part in parts] for parts in pairs])  # (B, 3)
    if not lengths[:, 0].all():
        raise ValueError("collate_pairs: an empty prompt has no token to predict the response from")
    ends = lengths.cumsum(dim=1)  # of prompt, y0 and y1 in their row
    column, row = torch.arange(int(ends.max())), torch.arange(len(pairs))[:, None]
    index = row * len(column) + column  # (B, L), of each token among the B·L
    segment = (column >= ends[:, :, None]).sum(dim=1)  # 0 prompt, 1, 2 responses, 3 padding: by length
    answer = (segment == 1) | (segment == 2)
    input_ids = torch.full_like(index, pad_id)
    input_ids[segment < 3] = torch.tensor([token for parts in pairs for part in parts for token in part])
    position_ids = (column - lengths[:, 1:2] * (segment == 2)) * (segment < 3)
    seen = (segment[:, :, None] == segment[:, None, :]) | (segment == 0)[:, None, :]
    prompt_end = index[:, :1] + ends[:, :1] - 1
    source = torch.where(position_ids == ends[:, :1], prompt_end, index - 1)  # y1 follows it, too
    last = torch.where(lengths[:, 1:] > 0, index[:, :1] + ends[:, 1:] - 1, prompt_end)
    return {"input_ids": input_ids, "position_ids": position_ids,
            "attention_mask": ((column[:, None] >= column) & seen)[:, None],
            "source": source[answer], "target": input_ids[answer],
            "owner": (2 * row + segment - 1)[answer], "last": last.flatten()}

def sequence_logps(model, batch):
    """log π(y | x) of both responses of each pair: sums over tokens, nats, (B, 2) float32, differentiable.
    model is a causal LM of transformers. Only hidden states that predict response tokens meet the vocabulary,
    in chunks, so that no (tokens × vocabulary) float32 tensor is ever whole; the log-softmax is float32."""
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    rows = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    hidden = model.base_model(**rows, use_cache=False).last_hidden_state.flatten(0, 1)[batch["source"]]
    head = model.get_output_embeddings()
    def token_logps(hidden, target):
        return -torch.nn.functional.cross_entropy(head(hidden).float(), target, reduction="none")
    logps, size = [], max(1, 2**27 // model.config.vocab_size)
    for part in zip(hidden.split(size), batch["target"].split(size)):  # backward computes its logits again
        again = len(hidden) > size and torch.is_grad_enabled()
        logps.append(torch.utils.checkpoint.checkpoint(token_logps, *part, use_reentrant=False) if again
                     else token_logps(*part))
    sums = torch.zeros(len(batch["last"]), device=hidden.device)
    return sums.index_add(0, batch["owner"], torch.cat(logps)).view(-1, 2)

def pair_scores(model, batch):
    """Scores of both responses of each pair by a ScoreModel, read at their last tokens, (B, 2) float32."""
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    rows = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    hidden = model.model(**rows, use_cache=False).last_hidden_state.flatten(0, 1)
    return model.score(hidden[batch["last"]]).view(-1, 2)

def cut(ids, budget, ranks=1):
    """Numbers of the rows `ids` in groups of similar length, about `budget` tokens at most; longest first,
    so that one too large for the memory shows at once. A multiple of `ranks` groups; some may be empty."""
    lengths, before = [sum(map(len, parts)) for parts in ids], 0
    groups = [[] for _ in range(ranks * math.ceil(sum(lengths) / (budget * ranks)))]
    for i in sorted(range(len(ids)), key=lambda i: -lengths[i]):
        groups[int((before + lengths[i] / 2) * len(groups) / sum(lengths))].append(i)
        before += lengths[i]
    return groups

def draw(n, start, count, *key):
    """Rows start … start + count of an endless stream of passes over n rows, each in an order of its own."""
    passes = range(start // n, (start + count - 1) // n + 1)
    stream = torch.cat([torch.randperm(n, generator=seeded("order", *key, k)) for k in passes])
    return stream[start % n :][:count].tolist()

# ---- Models ------------------------------------------------------------------------------------------------
class ScoreModel(transformers.PreTrainedModel):
    """A decoder with a linear head on the last token's hidden state, in the layout of the Beaver checkpoints.
    Tensors model.*, score_head.weight, score_head.bias and, for do_normalize, normalizer.mean and .var: a
    reward is then (s − mean)/std and a cost s/std, which leaves the zero between safe and unsafe in place."""
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
    def from_pretrained(cls, path, **kwargs):
        """Load a score checkpoint. ValueError when it has no score head, or lacks another tensor."""
        config = load_config(path, "reward_model or --cost_model")
        kwargs = {"dtype": "auto", **kwargs, "config": config}
        model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        values = {"score_head.bias": 0.0, "normalizer.mean": 0.0, "normalizer.var": 1.0}
        if getattr(config, "do_normalize", False):  # mean and var stand in tensors or in the config
            values |= {f"normalizer.{name}": getattr(config, name, None) for name in ("mean", "var")}
        for name in sorted(info["missing_keys"]):
            if values.get(name) is None:
                raise ValueError(f"it is no score model, it has no {name}")
            model.state_dict(keep_vars=True)[name].data = torch.tensor(values[name]).float().reshape(1)
        return model

    def score(self, hidden):
        """Hidden states (B, width) → (B,) float32 scores, normalized where the checkpoint asks for it."""
        head, config = self.score_head, self.config
        score = nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float()).squeeze(-1)
        if getattr(config, "do_normalize", False):
            mean = 0.0 if getattr(config, "score_type", "") == "cost" else self.normalizer.mean.float()
            score = (score - mean) / self.normalizer.var.float().sqrt()
        return score

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask (B, L), right-padded → (B,) float32, the scores at the last tokens."""
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.score(hidden[range(len(hidden)), attention_mask.sum(dim=1) - 1])

def attempt(load, source, flag, **kwargs):
    """load(source), refused in one line where a model, config or tokenizer cannot be had."""
    with refusing(f"--{flag} {source}: cannot be loaded", "give a folder or hub name that holds one"):
        return load(str(source), **kwargs)

def load_tokenizer(cfg):
    """The policy's tokenizer, with the prompt template as its chat template."""
    flag = "tokenizer" if cfg.tokenizer else "sft_model" if cfg.sft_model else "model"
    source = getattr(cfg, flag)
    if not source.startswith("{"):
        tokenizer = attempt(AutoTokenizer.from_pretrained, source, flag)
    elif cfg.dataset.startswith("tiny"):
        words = "</s> <unk> BEGINNING OF CONVERSATION : USER ASSISTANT".split() + [*TINY_WORDS, *TINY_TABLE]
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        model = tokenizers.Tokenizer(model)
        model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        special = {"eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    else:
        tokenizer = transformers.ByT5Tokenizer()
    if tokenizer.eos_token_id is None:
        refuse(f"the tokenizer of {source} has no end-of-sequence token; name another with --tokenizer")
    bos = "{{ bos_token }}" * (tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])
    tokenizer.chat_template = bos + (
        "{% for turn in messages %}{{ turn['content'] + eos_token if turn['role'] == 'assistant' else "
        f"{cfg.template!r}.replace('{{prompt}}', turn['content']) }}}}" "{% endfor %}")
    return tokenizer

def load_config(source, flag="model"):
    """The config of a folder, hub name or JSON dictionary; no dropout: what is fitted is what is sampled."""
    load = AutoConfig.from_pretrained if not str(source).startswith("{") else (
        lambda text, **kwargs: AutoConfig.for_model(**json.loads(text), **kwargs))
    config = attempt(load, source, flag, attn_implementation="sdpa")
    settings = config.to_dict().items()
    config.update({name: 0.0 for name, value in settings if "drop" in name and isinstance(value, float)})
    return config

def load_model(source, cfg, flag="model"):
    """A causal LM or, for flag reward_model and cost_model, a ScoreModel: on CPU, in its own dtype."""
    if flag in ("reward_model", "cost_model"):
        return attempt(ScoreModel.from_pretrained, source, flag)
    config = load_config(source, flag)
    if str(source).startswith("{"):
        torch.manual_seed(cfg.seed)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = attempt(AutoModelForCausalLM.from_pretrained, source, flag, dtype="auto", config=config)
    # generate() takes what it is not told from here: a checkpoint's top_k or repetition penalty must not leak
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = transformers.GenerationConfig(**{k: getattr(config, k, None) for k in names})
    return model

def inference_model(source, cfg, flag="model"):
    """A model to score with or sample from: whole in every process, in the dtype of compute, no gradients."""
    model = load_model(source, cfg, flag).eval().requires_grad_(False)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32, as under FSDP2
        parameter.data = parameter.data.to(DEVICE, getattr(torch, cfg.dtype))
    return model.to(DEVICE)

def training_model(model, function, cfg, learning_rate):
    """The model with `function(model, batch)` as its forward and float32 master weights, and its AdamW. In
    float32 a laptop trains the plain model; all else goes through FSDP2, in bfloat16 from the first layer."""
    gc.collect()  # the last model and its FSDP state are reference cycles: 27 GB of weights at 7B
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().requires_grad_(True)
    model.forward = lambda batch: function(model, batch).clone()  # FSDP2: whole only in it; no view
    if dist.is_initialized():
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        precision = MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy()
        blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for unit in [*blocks, model]:  # in turn, so that one float32 block at most is whole on the GPU
            fully_shard(unit.float(), mp_policy=precision, offload_policy=offload)
    else:
        model.float().to(DEVICE)
    return model, torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.95), 1e-8, 0.0, fused=True)

# ---- Processes and files -----------------------------------------------------------------------------------
BAR = {"leave": False, "disable": RANK > 0 or None}  # progress on the terminal of process 0
MODELS = "reward_model", "cost_model", "helpful_model", "safe_model"  # each given by its flag or trained here

def say(text):
    """Print a line once."""
    if RANK == 0:
        print(text, flush=True)

def gather(value):
    """A value of every process, in their order."""
    values = [value] * WORLD
    dist.all_gather_object(values, value) if WORLD > 1 else None
    return values

@contextmanager
def atomic(path):
    """Yield a temporary name, flushed and renamed at the end: `path` is whole or absent. SIGTERM waits."""
    temporary = path.with_name(path.name + ".tmp")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        remove(temporary)
        gather(None)
        yield temporary
        gather(None)
        if RANK == 0:
            for entry in [*temporary.rglob("*"), temporary]:
                sync(entry)
            remove(path) if path.is_dir() else None
            os.replace(temporary, path)
            sync(path.parent)
        gather(None)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

def sync(path):
    """Make a file or folder survive a power cut."""
    os.fsync(handle := os.open(path, os.O_RDONLY))
    os.close(handle)

def remove(*paths):
    """Delete files and folders, where they are there; process 0 does it."""
    for path in paths if RANK == 0 else ():
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)

def write(path, value):
    """Write JSON or, where the name asks for them, JSON lines: whole or not at all."""
    text = json.dumps(value, indent=2) if path.suffix == ".json" else "".join(
        json.dumps(entry, ensure_ascii=False) + "\n" for entry in value)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8") if RANK == 0 else None

def cached(job, name, compute, *source):
    """Scores, from a file with the fingerprint of `source` and of the models, or computed and written."""
    models = job.reference, *(getattr(job, name) for name in MODELS)
    for path in map(Path, filter(None, models)):  # of a folder: its files' names, sizes and times
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.glob("*"))
        source += (files or str(path), job.cfg.template, job.cfg.beta, job.cfg.seed)
    file, source = job.out / name, hashlib.sha256(repr(source).encode()).hexdigest()
    if file.exists():
        with refusing(f"{file}: cannot be read", "delete it"):
            kept = torch.load(file, weights_only=True)
            if kept["source"] == source:
                return kept["scores"]
        say(f"{name}: the data or the models have changed; computing it again")
    scores = torch.stack([*compute()])
    with atomic(file) as temporary:
        torch.save({"source": source, "scores": scores}, temporary) if RANK == 0 else None
    return scores

def begin(job, name, model, **state):
    """Set up the training of a model, where its newest saved state left it. → namespace, for train()."""
    dpo = name not in ("sft", "reward_model", "cost_model")
    model, optimizer = training_model(model, pair_scores if isinstance(model, ScoreModel) else sequence_logps,
                                      job.cfg, job.cfg.learning_rate if dpo else job.cfg.sft_learning_rate)
    state = {"steps": [], "history": [], **state}  # steps of this iteration, entries of the ones before
    folders = sorted((job.out / "training").glob(f"{name}-*[0-9]"))
    remove(*{*(job.out / "training").glob(f"{name}-*")}.difference(folders[-1:]))  # what a kill left behind
    if folders:
        with refusing(f"{folders[-1]}: cannot be read", "start as many processes as wrote it, or delete it"):
            kept = torch.load(folders[-1] / f"{RANK}-of-{WORLD}.pt", "cpu", weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        state = kept["state"]
        say(f"{name}: going on from step {len(state['steps'])} of iteration {len(state['history'])}")
    return SimpleNamespace(name=name, dpo=dpo, model=model, optimizer=optimizer, state=state)

def save(job, stage):
    """Keep weights, optimizer and state, in place of the last ones; every process writes its own shards."""
    if job.cfg.no_checkpoint:
        return
    name = f"{stage.name}-{len(stage.state['history']):06d}-{len(stage.state['steps']):06d}"
    older = list((job.out / "training").glob(f"{stage.name}-*"))
    with atomic(job.out / "training" / name) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"model": stage.model.state_dict(), "optimizer": stage.optimizer.state_dict(),
                    "state": stage.state}, folder / f"{RANK}-of-{WORLD}.pt")
    remove(*older)

def export(job, model, path, **settings):
    """Write a trained model as a Hugging Face folder in the dtype of compute, however it is sharded."""
    state, dtype = {}, job.cfg.dtype
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # a tied weight once
    for name, value in model.state_dict().items():
        if name in names:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            state[name] = value.to(getattr(torch, dtype)).cpu().contiguous() if RANK == 0 else None
    model.config.update({"prompt_template": job.cfg.template, **settings})
    with atomic(path) as folder:
        if RANK == 0:
            model.save_pretrained(folder, state_dict=state)
            job.tokenizer.save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())  # it names the master weights' dtype
            (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2))

# ---- Training, scoring, sampling ---------------------------------------------------------------------------
def throughput(title, model, ids, seconds, training):
    """Say and return pairs/s, tokens/s, peak memory and, on a GPU, MFU: 6 × parameters × real tokens (of the
    head: × response tokens; no embeddings) + 12 × layers × width × attended keys, a third for inference, by
    the speed of a bfloat16 matrix product of size 8192 here; no credit for padding or recomputation."""
    lengths = [[len(part) for part in parts] for parts in ids]
    tokens, answers = (sum(sum(parts[k:]) for parts in lengths) for k in (0, 1))
    numbers = {"pairs_per_second": len(ids) / seconds, "tokens_per_second": tokens / seconds,
               "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    text = "{pairs_per_second:,.1f} pairs/s, {tokens_per_second:,.0f} tokens/s, peak {peak_memory_gb:.2f} GB"
    if GPU:
        text += ", MFU {mfu:.0%}"
        numbers["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        config, head = model.config, model.get_output_embeddings()
        head = 0 if head is None else head.weight.numel()
        body = model.num_parameters(exclude_embeddings=True) - (0 if config.tie_word_embeddings else head)
        keys = sum(p * p / 2 + sum(y * p + y * y / 2 for y in ys) for p, *ys in lengths)
        flops = body * tokens + head * answers + 2 * config.num_hidden_layers * config.hidden_size * keys
        a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
        peak = 2 * 8192**3 / Timer("a @ a", globals={"a": a}).blocked_autorange().median
        numbers["mfu"] = (6 if training else 2) * flops / seconds / WORLD / peak
        torch.cuda.reset_peak_memory_stats()
    say(f"{title}, {text.format(**numbers)}")
    return numbers

def train(job, stage, pairs, order, loss_fn):
    """The one training loop → numbers for metrics.jsonl. `order`: each step's rows; `loss_fn(outputs, rows)`
    → (mean loss, accuracy). Micro-batches are weighed by their pairs: the gradient is the step's mean."""
    cfg, name, model, optimizer, state = job.cfg, stage.name, stage.model, stage.optimizer, stage.state
    saved, resumed = time.monotonic(), len(state["steps"])
    for step in tqdm(range(resumed, len(order)), name, initial=resumed, total=len(order), **BAR):
        started, rows, parts, sums = time.perf_counter(), order[step], [], torch.zeros(2, device=DEVICE)
        warm = min(1.0, (len(state["history"]) * len(order) + step + 1) / 10)
        decay = 1 if stage.dpo else 1 - step / len(order)
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * warm * decay
        for group in cut([pairs[i].ids for i in rows], cfg.tokens_per_batch, WORLD)[RANK::WORLD]:
            index = torch.tensor([rows[i] for i in group or [0]])  # weight 0 where only other ranks have work
            loss, accuracy = loss_fn(model(collate_pairs([pairs[i].ids for i in index])), index)
            (loss * WORLD * len(group) / len(rows)).backward()  # FSDP2 averages over the ranks
            parts.append((loss.detach(), index.tolist()))
            sums += torch.stack([loss.detach(), accuracy]) * len(group) / len(rows)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, accuracy, norm = torch.tensor(gather([*sums.tolist(), norm.item()])).sum(dim=0).tolist()
        if not math.isfinite(loss + norm):
            bad = gather([i for part, index in parts if not torch.isfinite(part) for i in index])
            bad = sorted(sum(bad, []) or rows)
            refuse(f"{name}: loss or gradient is not finite at step {step}, in training pairs {bad}, the "
                   f"first {pairs[bad[0]].prompt[:60]!r}; mend them or lower the learning rate", code=1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["steps"].append((loss, accuracy, time.perf_counter() - started))
        if step + 1 < len(order) and gather(time.monotonic() - saved > 60 * cfg.save_minutes)[0]:
            save(job, stage)
            saved = time.monotonic()
    steps, state["steps"] = state["steps"], []
    loss, accuracy, seconds = (sum(column) for column in zip(*steps))
    loss, accuracy, first = loss / len(order), accuracy / len(order), steps[0][0]
    off = abs(first - math.log(2)) > (1e-4 if cfg.dtype == "float32" else 2e-3)
    if off and stage.dpo and not state["history"]:
        say(f"warning: {name}: the first loss is {first:.5f}, not ln 2: policy and reference differ")
    ids = [pairs[i].ids for rows in order for i in rows]
    speed = throughput(f"{name}: {len(order)} steps, loss {loss:.4f}", model, ids, seconds, training=True)
    return {"dpo_loss": loss, "dpo_accuracy": accuracy, "first_dpo_loss": first, **speed}

def train_stage(job, name, loss_fn):
    """Train a model on the job's pairs into the folder `name`, unless it is there → the folder."""
    cfg, path, scores = job.cfg, job.out / name, name in ("reward_model", "cost_model")
    if path.exists():
        say(f"{name}: found in {path}")
    else:
        torch.manual_seed(cfg.seed)  # for a new score head
        if scores:
            config = load_config(job.reference)
            model = ScoreModel(config)
            model.model = AutoModel.from_pretrained(job.reference, config=config)
        else:
            model = load_model(job.reference or job.model, cfg)  # SFT itself begins at the base
        stage = begin(job, name, model)
        steps = math.ceil(len(job.train) / cfg.batch_size)  # one pass: score models overfit in a second one
        steps = cfg.iterations * cfg.dpo_steps if stage.dpo else steps  # as many as a whole C-DPO run
        rows = draw(len(job.train), 0, min(steps, cfg.max_steps or steps) * cfg.batch_size, cfg.seed, name)
        train(job, stage, job.train, chunks(rows, cfg.batch_size), loss_fn)
        export(job, model, path, **({"score_type": name.removesuffix("_model")} if scores else {}))
    remove(*(job.out / "training").glob(f"{name}-*"))
    return path

@torch.inference_mode()
def infer(job, path, ids, title, flag="model"):
    """log π or scores of pairs of token ids by the model in a folder → (N, 2), split over processes."""
    model, function = inference_model(path, job.cfg, flag), sequence_logps if flag == "model" else pair_scores
    result, started = torch.zeros(len(ids), 2), time.perf_counter()
    for group in filter(None, tqdm(cut(ids, job.cfg.tokens_per_batch)[RANK::WORLD], title, **BAR)):
        result[group] = function(model, collate_pairs([ids[i] for i in group])).float().cpu()
    result = sum(gather(result))  # the other processes' rows are 0 here
    if (seconds := time.perf_counter() - started) > 5:
        throughput(title, model, ids, seconds, training=False)
    if not torch.isfinite(result).all():
        refuse(f"{path}: {title} is not finite for pair {int((~torch.isfinite(result)).nonzero()[0, 0])}")
    return result

@torch.inference_mode()
def sample(job, path, prompts, count, key, tokenizer):
    """`count` responses from π itself (temperature 1, nothing cut off) to prompts' ids → [[(ids, ended)]].
    Fixed batches, each with a seed of its own, whatever the processes; a prompt is prefilled once."""
    cfg, eos, started = job.cfg, tokenizer.eos_token_id, time.perf_counter()
    model, settings = inference_model(path, cfg), transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=eos, eos_token_id=eos,
        max_new_tokens=cfg.max_new_tokens)
    order, results = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), []
    batches = list(enumerate(chunks(order, max(1, cfg.sample_batch // count))))
    for number, batch in tqdm(batches[RANK::WORLD], f"sampling {Path(path).name}", **BAR):
        heads = [prompts[i] for i in batch]
        width = len(heads[-1])  # of the longest
        ids = torch.tensor([[eos] * (width - len(head)) + head for head in heads], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(head)) + [1] * len(head) for head in heads], device=DEVICE)
        torch.manual_seed(int(torch.randint(2**60, (), generator=seeded("sample", cfg.seed, key, number))))
        cache = transformers.DynamicCache(config=model.config)
        if width > 1:
            model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, logits_to_keep=1,
                  position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1])
            cache.batch_repeat_interleave(count)
        ids, mask = ids.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
        output = model.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=settings)
        for i, ys in zip(batch, chunks(output[:, width:].tolist(), count)):
            results.append((i, [(y[: y.index(eos) + 1], True) if eos in y else (y, False) for y in ys]))
    answers = [rows for _, rows in sorted(sum(gather(results), []))]
    speed = sum(len(y) for rows in answers for y, _ in rows) / (time.perf_counter() - started)
    say(f"sampling {Path(path).name}: {len(prompts)} × {count} responses, {speed:,.0f} tokens/s")
    return answers

def score(job, pairs):
    """Reward, cost and log π_ref of pairs, (3, N, 2). PeCAN's reward and cost are implicit in policies."""
    ids, scores = [p.ids for p in pairs], []
    ref_logps = infer(job, job.reference, ids, "log π_ref")
    if job.implicit:
        logps = (infer(job, path, ids, "log π") for path in (job.helpful_model, job.safe_model))
        helpful, safe = (implicit_reward(policy_logps, ref_logps, job.cfg.beta) for policy_logps in logps)
        return torch.stack([helpful, -safe, ref_logps])
    for flag in ("reward_model", "cost_model"):  # they read text: own tokenizer, own template
        path = str(getattr(job, flag))
        template = getattr(AutoConfig.from_pretrained(path), "prompt_template", BEAVER_TEMPLATE)
        tokenizer = attempt(AutoTokenizer.from_pretrained, path, flag)
        ids, _ = encode(pairs, tokenizer, template, job.cfg.max_length + job.cfg.max_new_tokens)
        scores.append(infer(job, path, ids, f"scoring by {flag}", flag))
    return torch.stack([*scores, ref_logps])

def measure(job, path, prompts, count, key):
    """Sample a policy and score it → namespace: numbers, for metrics.jsonl and results.json; texts and scores
    (reward, cost), each (n prompts, count); the samples as pairs, all_scores as from score()."""
    cfg, texts, pairs, is_reference = job.cfg, [], [], str(path) == str(job.reference)
    prompts = prompts[: max(2, cfg.max_steps * cfg.sample_batch // count)] if cfg.max_steps else prompts
    own = job.tokenizer if is_reference else attempt(AutoTokenizer.from_pretrained, path, "compare")
    heads = [head for head, *_ in encode([Pair(x, ("", "")) for x in prompts], own, cfg.template, 10**6)[0]]
    for prompt, head, answers in zip(prompts, heads, sample(job, path, heads, count, key, own)):
        texts.append(own.batch_decode([y for y, _ in answers], skip_special_tokens=True))
        drawn = [(text, *answer) for text, answer in zip(texts[-1], answers)]
        for couple in zip(drawn[::2], drawn[1::2] + drawn[-1:]):  # an odd last one beside itself
            responses, ids, ended = zip(*couple)
            pairs.append(Pair(prompt, responses, (head, *ids), ended))
    own_ids = [p.ids for p in pairs]
    if own.get_vocab() != job.tokenizer.get_vocab():  # log π_ref is of the text in its own tokens
        for pair, ids in zip(pairs, encode(pairs, job.tokenizer, cfg.template, 10**6)[0]):
            pair.ids = ids
    all_scores = reward, cost, ref_logps = score(job, pairs)
    logps = ref_logps if is_reference else infer(job, path, own_ids, "log π of samples")
    values = {"reward": reward, "cost": cost, "kl": logps - ref_logps,
              "length": torch.tensor([[float(len(y)) for y in ys] for _, *ys in own_ids])}
    if cfg.dataset.startswith("tiny"):
        truth = torch.tensor([[tiny_truth(p.prompt, y) for y in p.responses] for p in pairs])
        values |= {"true_reward": truth[..., 0], "true_cost": truth[..., 1]}
    values = {name: value.reshape(len(prompts), -1)[:, :count] for name, value in values.items()}
    numbers = {"safe_rate": float((values["cost"] <= 0).float().mean()), "kl": float(values.pop("kl").mean())}
    for name, value in values.items():
        numbers |= {f"{name}_mean": float(value.mean()), f"{name}_std": float(value.std()),
                    f"{name}_ci95": ci95(value)}
    scores = values["reward"], values["cost"]
    return SimpleNamespace(numbers=numbers, texts=texts, scores=scores, pairs=pairs, all_scores=all_scores)

# ---- The method --------------------------------------------------------------------------------------------
def dpo_fit(ref_logps, prob, beta):
    """The loss of (13) as train() takes it: of the outputs for the rows `index`."""
    def loss_fn(logps, index):
        ref, p = (values[index].to(logps.device) for values in (ref_logps, prob))
        agrees = ((logps - ref).diff()[:, 0] < 0) == (p > 0.5)
        return dpo_loss(logps, ref, p, beta), agrees.float().mean()
    return loss_fn

def constrained_dpo(job, lam):
    """Algorithm 1 of C-DPO: relabel, fit, sample, step λ. → (folder of the best policy, its λ)."""
    cfg, iterate, best = job.cfg, job.out / "iterate", job.out / "policy"
    iterations, steps, fixed = cfg.iterations, cfg.dpo_steps, cfg.lambda_step == "fixed" or cfg.lambda_lr == 0
    if cfg.method != "cdpo":  # λ is known: one iteration takes all the steps
        iterations, steps, fixed = 1, iterations * steps, True
    steps = min(cfg.max_steps or steps, steps)
    stage = begin(job, "policy", load_model(job.reference, cfg), lam=lam, drawn=0, fresh=[],
                  fresh_scores=torch.zeros(3, 0, 2))
    state, history = stage.state, stage.state["history"]
    def merit(entry):  # what meets the limit comes first, then the objective (6), or else the least cost
        feasible = entry["cost_bound"] <= job.cost_limit
        return feasible, entry["reward_mean"] - cfg.beta * entry["kl"] if feasible else -entry["cost_bound"]
    while len(history) < iterations:
        iteration, lam, started = len(history), state["lam"], time.perf_counter()
        pairs, (reward, cost, ref_logps), order = pairs_of_iteration(job, state, steps)
        prob = relabel(reward, cost, lam, cfg.labels, seeded("labels", cfg.seed, iteration))            # (12)
        numbers = train(job, stage, pairs, order, dpo_fit(ref_logps, prob, cfg.beta))                   # (13)
        export(job, stage.model, iterate)
        found = measure(job, iterate, job.steering, cfg.lambda_samples, ("step", iteration))
        cost = found.scores[1]
        bound = estimate(cost, cfg.cost_confidence)                                                     # Ĵ_c
        cost = cost + (bound - cost.mean())  # so that the step of λ uses the same estimate
        if not fixed and cfg.lambda_step == "newton" and cost.var(dim=1).mean() > 0:
            state["lam"] = newton_lambda_step(lam, cost, job.cost_limit, cfg.beta)
        elif not fixed:  # also where a collapsed policy leaves Newton no variance
            state["lam"] = lambda_step(lam, cost, job.cost_limit, cfg.lambda_lr)                        # (14)
        state["drawn"] += sum(i < len(job.train) for rows in order for i in rows)
        if cfg.recycle and not fixed:
            state.update(fresh=[vars(pair) for pair in found.pairs], fresh_scores=found.all_scores)
        history.append({"iteration": iteration, "lambda": lam, "next_lambda": state["lam"], **found.numbers,
                        "cost_bound": bound, **numbers, "seconds": time.perf_counter() - started})
        say("iteration {iteration}: λ {lambda:.4f}, cost {cost_mean:+.3f} [{cost_ci95[0]:+.3f}, "
            "{cost_ci95[1]:+.3f}], reward {reward_mean:+.3f}, KL {kl:.3f}; next λ {next_lambda:.4f}"
            .format(**history[-1]))
        if RANK == 0 and max(history, key=merit) is history[-1]:  # the earlier of equals stays
            remove(best)
            os.replace(iterate, best)
        write(job.out / "metrics.jsonl", history)
        save(job, stage)
    remove(iterate)
    chosen = max(history, key=merit)
    if chosen["cost_bound"] > job.cost_limit and cfg.method != "dpo":
        say(f"no iterate meets the limit {job.cost_limit:.4g}: kept the least cost; more steps may help")
    return best, chosen["lambda"]

def pairs_of_iteration(job, state, steps):
    """The dataset's pairs and the last iteration's samples → pairs, their scores, the rows of each step."""
    size, seed, iteration = job.cfg.batch_size, job.cfg.seed, len(state["history"])
    keep = [i for i, pair in enumerate(state["fresh"]) if pair["ids"][1] != pair["ids"][2]]
    fresh, count = [Pair(**state["fresh"][i]) for i in keep], min(len(keep), steps * size // 2)
    online = draw(len(fresh), 0, count, "fresh", seed, iteration) if count else []
    offline = draw(len(job.train), state["drawn"], steps * size - count, "policy", seed)
    rows = offline + [len(job.train) + i for i in online]
    rows = [rows[i] for i in draw(len(rows), 0, len(rows), "mix", seed, iteration)]
    scores = torch.cat([job.scores, state["fresh_scores"][:, keep]], dim=1)
    return job.train + fresh, scores, chunks(rows, size)

def start_lambda(job):
    """The limit and the first λ: given, or in closed form on samples of π_ref. Says what that predicts."""
    cfg = job.cfg
    if cfg.lambda_init is not None and cfg.margin is None or cfg.method == "dpo":
        return cfg.lambda_init or 0.0
    prompts = (job.steering + prompts_of(job.train))[: cfg.dual_prompts]
    job.prediction = reward, cost = cached(job, "reference_samples.pt", lambda: measure(
        job, job.reference, prompts, cfg.dual_samples, "dual").scores, prompts, cfg.dual_samples)
    if cfg.margin is not None:
        job.cost_limit = float(cost.mean()) - cfg.margin
    if cfg.lambda_init is not None:
        return cfg.lambda_init
    with refusing("no first λ", "raise --cost_limit, lower --beta, or draw more --dual_samples"):
        lam = solve_dual(reward, cost, cfg.beta, job.cost_limit)
    for value in sorted({0.0, lam / 2, lam, 2 * lam, *cfg.lambdas}):
        p = predict(reward, cost, value, cfg.beta)
        text = ("predicted cost {cost:+.3f} [{cost_ci95[0]:+.3f}, {cost_ci95[1]:+.3f}], reward {reward:+.3f} "
                "[{reward_ci95[0]:+.3f}, {reward_ci95[1]:+.3f}], {ess:.1f} effective samples").format(**p)
        say(f"dual{'* '[value != lam]} λ {value:.4f}: {text}{', too few to be trusted' * (p['ess'] < 5)}")
    return lam

def evaluate(job, policies):
    """Measure policies {name: (folder, λ)} on the table's prompts; write and print the table."""
    rows, samples = [], []
    for name, (path, lam) in policies.items():
        found = measure(job, path, job.evaluation, job.cfg.eval_samples, "eval")
        rows.append({"name": name, "lambda": lam, **found.numbers})
        if job.prediction is not None and lam is not None:  # what the closed form said before any training
            rows[-1] |= {f"predicted_{k}": v for k, v in predict(*job.prediction, lam, job.cfg.beta).items()}
        for prompt, *columns in zip(job.evaluation, found.texts, *(v.tolist() for v in found.scores)):
            samples += [{"policy": name, "prompt": prompt, "response": y, "reward": r, "cost": c}
                        for y, r, c in zip(*columns)]
    write(job.out / "results.json", rows)
    write(job.out / "samples.jsonl", samples)
    extra = [k for k in ("true_reward_mean", "true_cost_mean", "predicted_cost") if k in set().union(*rows)]
    titles = ["policy", "λ", "reward", "95%", "cost", "95%", "safe", "KL", "length",
              *(key.removesuffix("_mean").replace("_", " ") for key in extra)]
    form = (" | {lambda:.3f} | {reward_mean:.3f} ± {reward_std:.3f} | [{reward_ci95[0]:.3f}, "
            "{reward_ci95[1]:.3f}] | {cost_mean:.3f} ± {cost_std:.3f} | [{cost_ci95[0]:.3f}, "
            "{cost_ci95[1]:.3f}] | {safe_rate:.1%} | {kl:.3f} | {length_mean:.1f}")
    form += "".join(f" | {{{key}:.3f}}" for key in extra)
    lines = [" | ".join(titles), "---" + " | ---:" * (len(titles) - 1)]
    for row in rows:  # what a row does not have is left blank
        known = dict.fromkeys(["lambda", *extra], math.nan) | {k: v for k, v in row.items() if v is not None}
        lines.append(row["name"] + form.format(**known).replace("nan", ""))
    say(f"\nE[cost] ≤ {job.cost_limit:.4g}\n\n" + "".join(f"| {line} |\n" for line in lines))

# ---- The command -------------------------------------------------------------------------------------------
def prepare(job):
    """Check the given models and the disk; read, check, tokenize and split the data; try the decoders."""
    cfg = job.cfg
    given = [(name, getattr(job, name)) for name in MODELS if getattr(job, name)]
    for flag, path in [*given, *(("compare", path) for path in cfg.compare)]:
        kind = getattr(attempt(AutoConfig.from_pretrained, path, flag), "score_type", None)
        if kind and f"{kind}_model" != flag:
            refuse(f"--{flag} {path}: its config.json calls it a {kind} model; are two exchanged?")
    job.tokenizer = load_tokenizer(cfg)
    config = load_config(job.model)
    if len(job.tokenizer) > config.vocab_size:
        refuse(f"--tokenizer: {len(job.tokenizer)} tokens, vocab_size is {config.vocab_size}; name its own")
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    models = 3 + (not cfg.sft_model) + (not cfg.reward_model) + (not cfg.cost_model) + len(cfg.lambdas)
    states = 0 if cfg.no_checkpoint else 3 if cfg.lambdas else 2
    size = parameters * (models * (2 if cfg.dtype == "bfloat16" else 4) + states * 12)
    free = shutil.disk_usage(job.out).free + sum(f.stat().st_size for f in job.out.rglob("*") if f.is_file())
    if free < size:
        refuse(f"--output_dir {job.out}: the run writes up to {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
               "free; free some space, name another folder, or save no training state with --no_checkpoint")
    need = ["response_0", "response_1", *["better_response_id"] * (job.implicit or not cfg.reward_model)]
    if job.implicit or not cfg.cost_model:
        need += ["safer_response_id", "is_response_0_safe", "is_response_1_safe"]
    pairs = load_pairs(cfg.dataset, "dataset", need, cfg, job.tokenizer)
    eval_pairs = cfg.eval_dataset and load_pairs(cfg.eval_dataset, "eval_dataset", [], cfg, job.tokenizer)
    job.held_out, steering, job.train = split_by_prompt(pairs, eval_pairs, cfg)
    job.train = job.train[: cfg.max_steps * cfg.batch_size] if cfg.max_steps else job.train
    job.evaluation, job.steering = prompts_of(job.held_out), prompts_of(steering)
    say(f"{len(job.train)} pairs to train on; {len(job.evaluation)} for the table, {len(job.steering)} for λ")
    for flag, path in [("sft_model" if cfg.sft_model else "model", job.model), *given]:
        check_rows(job, path, flag)

def check_rows(job, source, flag):
    """Try a long pair both ways: some decoders get a 4D mask silently wrong, or scale logits at the end."""
    model = inference_model(source, job.cfg, flag)
    prompt, *ys = max((p.ids for p in job.train), key=lambda ids: sum(map(len, ids)))
    other, y = sorted(ys, key=len)
    row, whole = collate_pairs([(prompt, other, y)]), torch.tensor([prompt + y], device=DEVICE)
    with torch.inference_mode():
        if not isinstance(model, ScoreModel):
            logps = model(whole).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
            error = sequence_logps(model, row)[0, 1] - logps[range(len(y)), y].sum()
        else:
            error = pair_scores(model, row)[0, 1] - model(whole, torch.ones_like(whole))[0]
    if abs(error) > (2e-2 if job.cfg.dtype == "bfloat16" else 1e-4) * (len(y) + 10):
        refuse(f"--{flag} {source}: a decoder whose attention or output head this program gets wrong (tried "
               "on one long pair); use one such as Llama, Mistral, Qwen2 or GPT-2")

def train_models(job):
    """The reference policy and the models of reward and cost (PeCAN: the two policies), unless given."""
    cfg, labelled = job.cfg, job.train + job.held_out
    mean_length = sum(len(y) for pair in job.train for y in pair.ids[1:]) / len(job.train)
    better, safer = torch.tensor([(pair.better, pair.safer) for pair in labelled]).T
    by_help, by_harm = (torch.stack([first, 1 - first], dim=1) for first in (better, 1 - safer))  # columns
    signs = torch.tensor([pair.signs for pair in labelled]).float()
    def sft_loss(logps, index):  # on both: π_ref is then the distribution that the pairs were drawn from
        return -logps.sum(dim=1).mean() / mean_length, torch.zeros((), device=logps.device)
    def reward_loss(rewards, index):
        chosen, rejected = rewards.gather(1, by_help[index].to(rewards.device)).T
        return bradley_terry_loss(chosen, rejected), (chosen > rejected).float().mean()
    def harm_loss(costs, index):
        order = by_harm[index].to(costs.device)
        worse, safe = costs.gather(1, order).T
        loss = cost_loss(worse, safe, *signs[index].to(costs.device).gather(1, order).T)
        return loss, (worse > safe).float().mean()
    job.reference = job.reference or train_stage(job, "sft", sft_loss)
    if job.implicit:
        ref_logps = infer(job, job.reference, [p.ids for p in job.train], "log π_ref")
        help_loss, safe_loss = (dpo_fit(ref_logps, 1.0 - first, cfg.beta) for first in (better, safer))
        job.helpful_model = job.helpful_model or train_stage(job, "helpful", help_loss)
        job.safe_model = job.safe_model or train_stage(job, "safe", safe_loss)
        return
    for name, loss_fn in (("reward_model", reward_loss), ("cost_model", harm_loss)):
        if not getattr(job, name):
            setattr(job, name, train_stage(job, name, loss_fn))
            if not cfg.eval_dataset:  # whose prompts come without labels
                index, ids = torch.arange(len(job.train), len(labelled)), [p.ids for p in job.held_out]
                scores = infer(job, getattr(job, name), ids, f"{name} on held-out pairs", name)
                text = f"of ranking {loss_fn(scores, index)[1]:.1%}"
                if name == "cost_model":
                    text += f", of sign {((scores > 0) == (signs[index] > 0)).float().mean():.1%}"
                say(f"{name}: held-out accuracy {text}, {len(ids)} pairs")

def run(cfg, out):
    """All stages in order; each finds what an earlier run of the same command has finished."""
    job = SimpleNamespace(cfg=cfg, out=out, model=cfg.sft_model or cfg.model, reference=cfg.sft_model,
                          implicit=cfg.method == "pecan", cost_limit=cfg.cost_limit, prediction=None,
                          **{name: getattr(cfg, name) for name in MODELS})
    prepare(job)
    train_models(job)
    policies = {"SFT": (job.reference, None)}
    if cfg.method == "sft":
        export(job, load_model(job.reference, cfg), out / "policy")
    else:
        ids = [p.ids for p in job.train]
        job.scores = reward, cost, ref_logps = cached(job, "scores.pt", lambda: score(job, job.train), ids)
        name = {"cdpo": "C-DPO", "mocan": "MoCAN", "pecan": "PeCAN", "dpo": "DPO"}[cfg.method]
        policies[name] = constrained_dpo(job, start_lambda(job))
        for lam in cfg.lambdas:
            if lam or cfg.method != "dpo":
                prob = relabel(reward, cost, lam, cfg.labels, seeded("labels", cfg.seed, lam))
                path = train_stage(job, f"lambda-{lam:.9g}", dpo_fit(ref_logps, prob, cfg.beta))
                policies[f"λ = {lam:.9g}" if lam else "DPO"] = path, lam
    for path in cfg.compare:
        policies[path if path not in policies else str(Path(path).absolute())] = path, None
    job.implicit = not (job.reward_model and job.cost_model)  # given score models serve PeCAN's evaluation
    evaluate(job, policies)

def open_folder(out, settings, where):
    """Refuse a folder of something else, or of a run with other settings; with --overwrite, empty a run's."""
    found = {f.name for f in out.iterdir()} - {".lock", "config.json.tmp"}
    with refusing(f"{where} is not empty", "it holds no run of this program; name another folder"):
        kept = json.loads((out / "config.json").read_text()) if found else settings
        kept["output_dir"]
    changed = [f"{key} was {kept.get(key)!r:.80}, is {value!r:.80}" for key, value in settings.items()
               if kept.get(key) != value and key not in EXTENDING[settings["method"] != "cdpo":]]
    if changed and not settings["overwrite"]:
        refuse(f"{where}: the run there has other settings ({'; '.join(changed)}); use those, name another "
               "folder, or start afresh with --overwrite")
    gather(None)  # all have read the old settings before the new ones are written
    if settings["overwrite"]:
        ours = re.compile(r"(sft|reward_model|cost_model|helpful|safe|policy|iterate|lambda-.*|training"
                          r"|(scores|reference_samples)\.pt|(metrics|results|samples)\.jsonl?)(\.tmp)?")
        remove(*(out / name for name in found if ours.fullmatch(name)))
    write(out / "config.json", settings)

def main(argv=None):
    """The whole program. Refusals are SystemExit(2) with one line on standard error."""
    cfg = parse(argv)
    out, where = Path(cfg.output_dir), f"--output_dir {cfg.output_dir}"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0))) if GPU else None
    if (GPU or WORLD > 1 or cfg.dtype == "bfloat16") and not dist.is_initialized():
        alone = {} if WORLD > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", **alone)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) if RANK == 0 else None
            open_folder(out, asdict(cfg), where)
            run(cfg, out)
        gather(None)  # no process takes the group down while another still uses it
    except KeyboardInterrupt:
        refuse(f"stopped; the same command goes on from {out}", code=130)
    except BlockingIOError:
        refuse(f"{where}: another process is at work in it; wait for it or name another folder")
    except torch.OutOfMemoryError:
        print(f"cdpo: out of GPU memory. Halve --tokens_per_batch (now {cfg.tokens_per_batch}) to train or "
              f"--sample_batch (now {cfg.sample_batch}) to sample; torchrun divides the 16 bytes per "
              "parameter, --cpu_offload moves them to host memory", file=sys.stderr)
        raise
    except Exception as error:  # torch and safetensors report a full disk in words of their own
        full = out.exists() and shutil.disk_usage(out).free < 2**20 or "No space left" in str(error)
        if full or isinstance(error, OSError) and str(error.filename).startswith(str(out)):
            refuse(f"{where} cannot be written: {'the disk is full' if full else error}; mend, start again")
        raise
    finally:
        if dist.is_initialized() and WORLD == 1:
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
    if WORLD > 1:  # everything is written; gloo's threads now and then abort the interpreter's own way out
        sys.stdout.flush()
        os._exit(0)
