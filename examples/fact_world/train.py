"""Trains the three role adapters with PEFT, one role at a time.

    python -m examples.fact_world.train --model MODEL_DIR --role plan
    python -m examples.fact_world.train --model MODEL_DIR --role action
    python -m examples.fact_world.train --model MODEL_DIR --role reflect

`plan` trains A and B. The other roles take plan's A from its saved adapter, keep it frozen and
train B only. With `--ordinary` each role has an A of its own, on all linear layers, as people train adapters. Every
adapter reads whole trajectories; the loss is on its own role's tokens.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from examples.fact_world.format import PLAN, ROLES
from examples.fact_world.training_data import Example, batches, collate, example_for, tokenizer_of
from examples.fact_world.world import DEFAULT_SEED, build_world, make_tasks

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS = Path(__file__).parent / "adapters"
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Recipe:
    """Settings that determine the outcome of a run."""

    role: str
    steps: int
    learning_rate: float
    tokens_per_step: int = 1200
    warmup: int = 10
    # Share of the steps, at the end, that see entries in full length; earlier ones are cut to a
    # few sentences, which gives more turns a token.
    full_share: float = 0.35
    # Goes on from the adapter saved by an earlier run of this role instead of a fresh one.
    resume: bool = False
    # Keeps A as it is; needed to go on with plan once other roles rest on its A.
    freeze_a: bool = False
    seed: int = 0
    max_minutes: float = 60.0
    rank: int = 8  # alpha is twice the rank
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    # Roles other than plan take plan's A.
    shared_a: bool = True


@dataclass
class HeldOut:
    """Teacher-forced figures on test trajectories."""

    loss: float
    token_accuracy: float
    turn_accuracy: float


@dataclass
class Log:
    """Contents of training_log.json."""

    role: str
    command: str
    recipe: dict[str, Any]
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    trajectories: int = 0
    held_out_before: dict[str, float] = field(default_factory=dict)
    held_out_after: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


def attach_adapter(model: nn.Module, recipe: Recipe, adapters: Path) -> PeftModel:
    """Adds a fresh adapter (or the saved one, to go on); where A is shared, plan's A frozen for the other roles."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    takes_a = recipe.shared_a and recipe.role != PLAN
    shared = load_file(adapters / PLAN / WEIGHTS) if takes_a else {}
    saved = load_file(adapters / recipe.role / WEIGHTS) if recipe.resume else {}
    for name, parameter in peft_model.named_parameters():
        if ".lora_" not in name:
            continue
        key = name.replace(".default.", ".")
        is_a = ".lora_A." in name
        source = shared if is_a and shared else saved
        if key in source:
            parameter.data.copy_(source[key])
        parameter.requires_grad_(not (is_a and (recipe.freeze_a or takes_a)))
    return peft_model


def save_adapter(peft_model: PeftModel, out: Path) -> None:
    """Saves in bf16, without any path of this machine."""
    peft_model.save_pretrained(out, selected_adapters=["default"])
    weights = load_file(out / WEIGHTS)
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()},
        out / WEIGHTS,
        metadata={"format": "pt"},
    )
    config_path = out / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": BASE_MODEL, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    (out / WEIGHTS).chmod(0o644)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / "README.md").unlink(missing_ok=True)


def label_logits(peft_model: PeftModel, batch: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at label positions only, the labels, and the row and turn that each belongs to."""
    packed = collate(batch)
    ids, is_label = packed["input_ids"], packed["is_label"]
    assert ids is not None and is_label is not None
    causal_lm = peft_model.get_base_model()
    hidden = causal_lm.model(
        input_ids=ids,
        position_ids=packed["position_ids"],
        attention_mask=packed["attention_mask"],
        use_cache=False,
    ).last_hidden_state
    # A turn begins after its header, in the trunk and in a branch alike, so the token before a
    # label in the packed order is also the one before it in the trajectory.
    rows, columns = is_label.nonzero(as_tuple=True)
    begins = ~is_label[rows, columns - 1]
    return causal_lm.lm_head(hidden[rows, columns - 1]), ids[rows, columns], begins.cumsum(0) - 1


def evaluate(peft_model: PeftModel, examples: list[Example]) -> HeldOut:
    """Loss, share of tokens and share of whole turns that greedy decoding would get right."""
    losses, hits, turns = [], [], []
    with torch.no_grad():
        for example in examples:
            logits, labels, turn = label_logits(peft_model, [example])
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
            hit = (logits.argmax(-1) == labels).float()
            hits.append(hit)
            turns += [float(hit[turn == index].min()) for index in range(int(turn.max()) + 1)]
    return HeldOut(
        round(float(torch.cat(losses).mean()), 4),
        round(float(torch.cat(hits).mean()), 4),
        round(sum(turns) / len(turns), 4),
    )


def schedule(progress: float, step: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(recipe: Recipe, model_dir: Path, adapters: Path, world_seed: int, command: str) -> Log:
    """Runs one recipe and writes the adapter, also at every evaluation on the way."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenize = tokenizer_of(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False)
    peft_model = attach_adapter(model, recipe, adapters)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    held_out = [
        example_for(task, recipe.role, tokenize, random.Random(1), None)
        for task in make_tasks("test", 8, world_seed, seed=1)
    ]
    log = Log(recipe.role, command, vars(recipe))
    log.held_out_before = vars(evaluate(peft_model, held_out))
    print(f"before: {log.held_out_before}", flush=True)

    progress = 0.0

    def sentences() -> int | None:
        return None if progress >= 1 - recipe.full_share else rng.choice((2, 3, 4, 6))

    tasks = build_world(world_seed, "train").tasks(recipe.seed)
    stream = batches(tasks, recipe.role, tokenize, rng, recipe.tokens_per_step, sentences)
    started = time.monotonic()
    for step in range(recipe.steps):
        batch = next(stream)
        elapsed = time.monotonic() - started
        progress = max(step / recipe.steps, elapsed / (60 * recipe.max_minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(progress, step, recipe.warmup)
        logits, labels, _ = label_logits(peft_model, batch)
        loss = nn.functional.cross_entropy(logits, labels)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.steps, log.seconds = step + 1, round(time.monotonic() - started, 1)
        log.tokens += sum(len(example.ids) for example in batch)
        log.trajectories += len(batch)
        if step % 5 == 0:
            rate = log.tokens / log.seconds
            print(
                f"{recipe.role} step {step} loss {loss.item():.4f} norm {norm.item():.2f} "
                f"{log.seconds:.0f} s {rate:.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % 30 == 0:
            figures = vars(evaluate(peft_model, held_out))
            log.curve.append({"step": step + 1, **figures})
            print(f"held out: {log.curve[-1]}", flush=True)
            save_adapter(peft_model, adapters / recipe.role)
    log.held_out_after = vars(evaluate(peft_model, held_out))
    print(f"after: {log.held_out_after}", flush=True)
    save_adapter(peft_model, adapters / recipe.role)
    path = adapters / recipe.role / "training_log.json"
    stages = json.loads(path.read_text(encoding="utf-8")) if recipe.resume and path.exists() else []
    path.write_text(json.dumps([*stages, vars(log)], indent=2) + "\n", encoding="utf-8")
    return log


RECIPES: dict[str, Callable[[], Recipe]] = {
    "plan": lambda: Recipe("plan", steps=240, learning_rate=2e-3),
    "action": lambda: Recipe("action", steps=80, learning_rate=3e-3),
    "reflect": lambda: Recipe("reflect", steps=150, learning_rate=3e-3),
}
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ordinary_recipe(role: str) -> Recipe:
    """Rank 16 on all linear layers, an A for each role, from a seed of its own."""
    return Recipe(
        role,
        steps=150,
        learning_rate=7e-4,
        seed=ROLES.index(role),
        rank=16,
        targets=ALL_LINEAR,
        shared_a=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line: trains one role."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("--ordinary", action="store_true", help="rank 16, all linear layers, an A of its own")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="where adapters are kept")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--tokens-per-step", type=int)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--full-share", type=float, help="share of the steps with entries in full length")
    parser.add_argument("--resume", action="store_true", help="go on from the saved adapter of this role")
    parser.add_argument("--freeze-a", action="store_true", help="keep A, for plan once other roles exist")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = ordinary_recipe(args.role) if args.ordinary else RECIPES[args.role]()
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in set(given) & set(vars(recipe)):
        setattr(recipe, name, given[name])
    options = {name: given[name] for name in given if name in vars(recipe) or name == "ordinary"}
    command = "python -m examples.fact_world.train --model MODEL_DIR " + " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in options.items()
        if value is not False
    )
    train(recipe, args.model, args.adapters, DEFAULT_SEED, command)


if __name__ == "__main__":
    main()
