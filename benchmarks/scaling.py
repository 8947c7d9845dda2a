"""Tokens per second and cache bytes over concurrent sequences, agents and context; writes figures.json.

    python -m benchmarks.scaling MODEL OUT_DIR [--agents 1,2,4,8,16] [--contexts 512,2048,8192] [--read 512,2048]

The model gets random adapters, r = 8 on `--targets`, each with its own A, and is compiled in bfloat16.

Decode: steps of N sequences at a context, with three agents; wall time, medians. `dense` is the program of non_shared
and full_shared, `split` that of base_lr_shared.
Agents: A agents read one trajectory of a context, one after the other, and generate 16 tokens each: seconds in all,
and cache bytes that the trajectory holds in the end. `benchmarks.scaling_plots` draws both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lragent
from benchmarks.step import runner, step_inputs
from benchmarks.timing import in_turn

SCHEMES_SHOWN = ("non_shared", "base_lr_shared", "full_shared")
LAYOUT_SCHEMES = {"dense": "full_shared", "split": "base_lr_shared"}
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
MOST_CACHED_TOKENS = 1 << 17  # of one step's sequences: what a machine of 24 GB holds with room
NEW_TOKENS = 16
DECODE_AGENTS = 3


@dataclass(frozen=True)
class DecodePoint:
    """Seconds of one kind of decode step, with dense and with split layout."""

    sequences: int
    context: int
    dense: float
    split: float


@dataclass(frozen=True)
class AgentsPoint:
    """Seconds until all agents have answered on one trajectory, and bytes that it then holds."""

    scheme: str
    agents: int
    context: int
    seconds: float
    cache_bytes: int


def write_adapters(model_dir: Path, out: Path, count: int, targets: list[str]) -> dict[str, Path]:
    adapters = {}
    for number in range(count):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, trust_remote_code=False)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        adapters[f"agent{number + 1}"] = out / f"agent{number + 1}"
        model.save_pretrained(adapters[f"agent{number + 1}"])
    return adapters


def decode_points(artifact: Path, agents: list[str], contexts: list[int], repeats: int) -> list[DecodePoint]:
    programs = {
        name: lragent.load(artifact, sharing=scheme, kv_memory="16MiB", agents=agents).program
        for name, scheme in LAYOUT_SCHEMES.items()
    }
    points = []
    for context in contexts:
        for sequences in SEQUENCES:
            if sequences * context > MOST_CACHED_TOKENS:
                continue
            works = {
                name: runner(program, LAYOUT_SCHEMES[name], step_inputs(program, sequences, 1, context))
                for name, program in programs.items()
            }
            times = in_turn(works, repeats, time.perf_counter)
            found = {name: statistics.median(values) for name, values in times.items()}
            points.append(DecodePoint(sequences, context, found["dense"], found["split"]))
            print(f"decode {sequences:3} x {context:5}: dense {found['dense'] * 1e3:8.1f} ms, "
                  f"split {found['split'] * 1e3:8.1f} ms", flush=True)  # fmt: skip
    return points


def agents_point(artifact: Path, scheme: str, agents: list[str], context: int) -> AgentsPoint:
    engine = lragent.load(artifact, sharing=scheme, kv_memory="6GiB", agents=agents)
    numbers = torch.randint(0, engine.program.vocab_size, (context,), generator=torch.Generator().manual_seed(context))
    warm = engine.trajectory(numbers[:64].flip(0).tolist())
    warm.generate(agents[0], max_new_tokens=2, ignore_eos=True)
    warm.close()
    room = len(agents) * NEW_TOKENS + 1
    trajectory = engine.trajectory(numbers[: context - room].tolist())
    started = time.perf_counter()
    for agent in agents:
        trajectory.generate(agent, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    spent = time.perf_counter() - started
    return AgentsPoint(scheme, len(agents), context, spent, engine.stats().held_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--agents", default="1,2,4,8,16")
    parser.add_argument("--contexts", default="512,2048,8192", help="contexts of decode steps")
    parser.add_argument("--read", default="512,2048", help="contexts that agents read")
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--most-read",
        type=int,
        default=40000,
        help="skip cases with more computed tokens than this",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    counts = sorted(map(int, options.agents.split(",")))
    contexts = list(map(int, options.contexts.split(",")))
    artifact = options.out / "scaling.lragent"
    if not artifact.exists():
        adapters = write_adapters(options.model, options.out / "adapters", counts[-1], options.targets.split(","))
        lragent.convert(options.model, adapters, artifact, dtype="bfloat16", layouts=("split", "dense"))
    names = [f"agent{number + 1}" for number in range(counts[-1])]
    decode = decode_points(artifact, names[: min(DECODE_AGENTS, len(names))], contexts, options.repeats)
    read = []
    for context in map(int, options.read.split(",")):
        for count in counts:
            for scheme in SCHEMES_SHOWN:
                computed = context * (count if scheme == "non_shared" else 1)
                if computed > options.most_read:
                    continue
                point = agents_point(artifact, scheme, names[:count], context)
                read.append(point)
                print(f"{scheme:15} {count:3} agents x {context:5}: {point.seconds:7.2f} s, "
                      f"{point.cache_bytes / 2**20:7.1f} MiB", flush=True)  # fmt: skip
    figures = {"decode": [asdict(p) for p in decode], "agents": [asdict(p) for p in read]}
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
