"""The whole path on a small trained model: convert, plan, decode, watch precision move, measure.

    python examples/demo.py        (``make demo`` installs what it needs first)

Everything it prints is measured in the run that prints it. Results go to ``out/``.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import dynaexq_jax as dx
from convert import convert
from convert.cli import describe
from dynaexq_jax.budget import MemoryPlan, plan_fixed
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.report.heatmap import heatmap_png, heatmap_text
from dynaexq_jax.report.table import plan_table, text_table
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.perplexity import Precision, load_for_scoring, score_text
from dynaexq_jax.serving.planning import Planner
from dynaexq_jax.text.documents import read_text
from dynaexq_jax.units import format_bytes

EXAMPLES = Path(__file__).resolve().parent
SOURCE = EXAMPLES / "nano-moe"
TEXTS = EXAMPLES / "text"
OUT = EXAMPLES.parent / "out"
CONVERTED = OUT / "nano-converted"
HEAT_MAP = OUT / "levels.png"

PROMOTED_SHARE = 4
"""One expert in so many can be promoted."""
CONTEXT = 320
INTERVAL = 8
MAX_TOKENS = 120
PROMPTS = 3
PROMPT_CHARACTERS = 240
DOMAINS = {"python": "Python code", "fr": "a French novel"}
WINDOW, WINDOWS = 512, 8
LANGUAGES = {"python": "Python", "go": "Go", "fr": "French", "ru": "Russian", "en": "English"}
PRECISIONS: dict[Precision, str] = {
    "2": "2 bits",
    "dynamic": "dynamic",
    "4": "4 bits",
    "8": "8 bits",
    "bf16": "unquantized",
}


def main() -> None:
    """Runs every part in turn."""
    started = time.perf_counter()
    prepare_device(None)

    heading("1. Convert")
    print(f"{SOURCE.relative_to(EXAMPLES.parent)} (bfloat16) to nested planes of 2, 4 and 8 bits")
    print(describe(convert(SOURCE, CONVERTED, force=True)))

    heading("2. Plan a budget")
    print("compiling prefill and decode step to learn what memory they need", flush=True)
    plan = plan_for_a_share()
    budget = plan.total_bytes
    print(f"for {plan.pool_pages} pages above 2 bits, the planner asks for {budget:,} bytes;")
    print(f"now that is the budget: load(..., hbm_budget={budget}, base_bits=2)\n")
    llm = dx.load(CONVERTED, hbm_budget=budget, base_bits=2, context=CONTEXT, interval=INTERVAL)
    assert llm.plan is not None
    print(plan_table(llm.plan))

    panels = {"before: no traffic yet": levels_of(llm)}
    print("\nlevels before any traffic:")
    print(heatmap_text(levels_of(llm)))
    for number, (domain, name) in enumerate(DOMAINS.items(), 3):
        heading(f"{number}. Decode {name}")
        before = levels_of(llm)
        decode(llm, domain)
        panels[f"after {name}"] = levels_of(llm)
        print(f"\nlevels after {name}:")
        print(heatmap_text(levels_of(llm)))
        print(describe_change(before, levels_of(llm)))
    heatmap_png(HEAT_MAP, panels, title="Bits of each expert")
    print(f"all three heat maps: {HEAT_MAP.relative_to(EXAMPLES.parent)}")

    heading("5. Memory and movement")
    print(movement(llm, budget))

    heading("6. Perplexity by domain")
    print(perplexity_table())
    print(f"\ndone in {time.perf_counter() - started:.0f} s")


def heading(title: str) -> None:
    """Starts a section."""
    print(f"\n=== {title} ".ljust(78, "="), flush=True)


def plan_for_a_share() -> MemoryPlan:
    """What memory it takes to promote a quarter of the experts from 2 to 4 bits."""
    checkpoint = Checkpoint.open(CONVERTED)
    pages = len(checkpoint.layers) * checkpoint.experts // PROMOTED_SHARE
    planner = Planner(checkpoint, ServeConfig(base_bits=2, pages=pages, context=CONTEXT))
    return plan_fixed(
        planner.demand, base_bits=2, pool_pages=pages, temporary_bytes=planner.temporary_bytes
    )


def levels_of(llm: dx.LLM) -> np.ndarray:
    """Level of each expert now: int32 [L, E]."""
    levels = llm.residency()
    assert levels is not None
    return levels


def decode(llm: dx.LLM, domain: str) -> None:
    """Continues a few passages of a domain, streaming; ends with the speed."""
    tokens, seconds = 0, 0.0
    for number, prompt in enumerate(prompts_of(domain)):
        print(f"\n--- prompt {number + 1} of {PROMPTS}\n{prompt}\n--- the model goes on")
        stream = llm.stream_generate(
            prompt, max_tokens=MAX_TOKENS, temperature=0.7, top_p=0.9, seed=number
        )
        for piece in stream:
            print(piece.text, end="", flush=True)
        print()
        tokens += piece.stats.tokens - 1
        seconds += piece.stats.elapsed_s - piece.stats.first_token_s
    print(f"\n{tokens / seconds:.0f} tokens/s after each first token")


def prompts_of(domain: str) -> list[str]:
    """Passages of a few lines, spread over the domain's text; each starts with a line."""
    text = read_text(TEXTS / f"{domain}.txt")
    prompts = []
    for part in range(1, PROMPTS + 1):
        start = text.index("\n", len(text) * part // (PROMPTS + 1)) + 1
        passage = text[start : start + PROMPT_CHARACTERS]
        prompts.append(passage[: passage.rindex(" ")].lstrip("\n").rstrip())
    return prompts


def describe_change(before: np.ndarray, after: np.ndarray) -> str:
    """Experts whose level has changed, in words."""
    up, down = int((after > before).sum()), int((after < before).sum())
    both = int(((before > 0) & (after > 0)).sum())
    return f"{up} experts have more bits than before, {down} fewer; {both} kept a page throughout"


def movement(llm: dx.LLM, budget: int) -> str:
    """Pages and bytes moved, and the budget against what is allocated."""
    assert llm.plan is not None
    assert llm.engine.controller is not None
    moved = llm.engine.controller.counters
    owned = sum(llm.plan.arrays.values())
    live = sum(
        array.nbytes
        for array in jax.live_arrays()
        if array.sharding.memory_kind != "pinned_host"  # which is the host's
    )
    return "\n".join(
        [
            f"{moved.promotions} promotions, {moved.demotions} demotions: {moved.pages} pages, "
            f"{format_bytes(moved.bytes)} copied in {moved.commits} commits; "
            f"{moved.failures} failed",
            text_table(
                ("device memory", "bytes", "of the budget"),
                [
                    (name, f"{size:,}", f"{100 * size / budget:.1f} %")
                    for name, size in {
                        "budget given": budget,
                        "planned in all": llm.plan.total_bytes,
                        "of which arrays that stay": owned,
                        "arrays alive in JAX now": live,
                    }.items()
                ],
            ),
        ]
    )


def perplexity_table() -> str:
    """Perplexity of every domain at every precision."""
    rows: dict[str, list[str]] = {name: [] for name in LANGUAGES}
    total = len(PRECISIONS) * len(LANGUAGES) * WINDOWS
    with tqdm(total=total, unit="window", desc="scoring", file=sys.stderr) as bar:
        for precision, label in PRECISIONS.items():
            bar.set_postfix_str(label)
            path = SOURCE if precision == "bf16" else CONVERTED
            served = load_for_scoring(path, precision=precision, window=WINDOW)
            for domain, cells in rows.items():
                score = score_text(
                    served,
                    TEXTS / f"{domain}.txt",
                    window=WINDOW,
                    max_windows=WINDOWS,
                    on_window=bar.update,
                )
                cells.append(f"{score.perplexity:.3f}")
    table = text_table(
        ("perplexity", *PRECISIONS.values()),
        [(LANGUAGES[domain], *cells) for domain, cells in rows.items()],
    )
    return (
        f"{WINDOWS} windows of {WINDOW} tokens each; dynamic: 2 bits and one page for a quarter of "
        "the experts,\neach text starts at the base and every 32 tokens are scored at the levels "
        f"that those before them led to\n\n{table}"
    )


if __name__ == "__main__":
    try:
        main()
    except dx.InputError as error:
        sys.exit(f"demo: error: {error}")
