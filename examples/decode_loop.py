"""One level below ``dynaexq_jax.load``: build every part by hand and drive the jitted steps.

    python examples/decode_loop.py out/nano-converted --prompt "def main(" --max-tokens 48

Greedy, one sequence. ``engine.Engine`` does the same for a batch and a queue of prompts.
"""

import argparse
import collections
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dynaexq_jax.bank import ExpertBank, HostPages
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.controller import Controller, ControllerConfig
from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.engine.prompt import Prompt, padded_tokens
from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.engine.state import EngineState
from dynaexq_jax.migration import Migration, MigrationConfig
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.policy import POLICY_NAMES, make_policy
from dynaexq_jax.residency import Residency
from dynaexq_jax.text.tokenizer import load_tokenizer
from pallas_kernels.levels import LEVEL_BITS, Bits

BASE_BITS: Bits = 2
CHUNK, CONTEXT, DTYPE = 32, 512, jnp.dtype("float32")
IN_FLIGHT = 2
"""Tokens that may be on their way when the next step is dispatched."""


def build_controller(
    checkpoint: Checkpoint, bank: ExpertBank, policy_name: str, interval: int
) -> Controller:
    """Everything that moves precision: host code, never part of a jitted step."""
    layers, experts, pages = len(checkpoint.layers), checkpoint.experts, bank.experts.pool_pages
    # The master table of who holds which page (numpy). The bank's device table is its snapshot.
    residency = Residency(layers=layers, experts=experts, base_bits=BASE_BITS, pool_pages=pages)
    policy = make_policy(policy_name)
    migration = Migration(
        host=HostPages.read(checkpoint, (4, 8)),  # what promotions copy from
        residency=residency,
        bank=bank,
        config=MigrationConfig.of(page_bytes=bank.experts.format.page_bytes, pool_pages=pages),
        waits_for_copies=policy.waits_for_copies,
    )
    return Controller(
        policy=policy,
        residency=residency,
        pages_of_level=residency.pages_of_level,
        migration=migration,
        benefit=checkpoint.benefit,  # weight error that each step of the ladder takes away
        config=ControllerConfig(interval=interval),
    )


def decode(
    path: Path, prompt: str, *, max_tokens: int, policy: str, pages: int, interval: int
) -> tuple[list[int], str, np.ndarray]:
    """Token ids and text after ``prompt``, and the levels [L, E] of the experts at the end."""
    checkpoint = Checkpoint.open(path)  # reads the header; arrays are read when asked for
    config = checkpoint.config
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    # All experts at the base, an empty pool, and a table that says so.
    bank = ExpertBank.allocate(checkpoint, base_bits=BASE_BITS, pool_pages=pages)
    controller = build_controller(checkpoint, bank, policy, interval)
    # A Flax NNX model. Programs splits it once and merges it inside each jitted function: a call
    # passes three pytrees (dense weights, experts, state) and walks no module graph.
    dense = checkpoint.dense_weights()
    model = Qwen3Moe(config, dense, bank.experts, dtype=DTYPE)
    programs = Programs(model, sorted({*tokenizer.eos_ids, *config.eos_token_ids}))
    params = split_params(model)
    # Cache, batch slots, router statistics: donated to every step, which returns them.
    state = EngineState.allocate(config, batch=1, context=CONTEXT, dtype=DTYPE)
    slot = jnp.int32(0)  # jax.jit takes arrays of the device as they are, and sends nothing

    def after_step(state: EngineState, tokens: int) -> EngineState:
        """After every interval, sends the gathered statistics on their way to the host."""
        if controller.wants_stats(tokens):
            fresh, gathered = programs.take_stats(state.stats)
            state = state._replace(stats=fresh)
            controller.give_stats(gathered)  # an asynchronous copy
        return state

    # Prefill. The prompt is sent whole, and donated to every chunk, which returns it. A chunk has
    # a static shape: what the last one lacks is padding.
    ids = np.asarray(tokenizer.encode(prompt), np.int32)
    on_device = Prompt.send(
        ids,
        padded=padded_tokens(CONTEXT, CHUNK),
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0),
        device=bank.device,
    )
    for start in range(0, ids.size, CHUNK):
        controller.advance()
        # bank.experts is asked for at each step: a commit has donated the pool of the last one.
        state, on_device, logits = programs.prefill(
            params, bank.experts, state, on_device, slot, chunk=CHUNK
        )
        state = after_step(state, min(CHUNK, ids.size - start))
    # Samples the first token and starts the slot. It goes idle at an end-of-sequence token, or
    # after the last token that was asked for, without asking the host.
    state, token = programs.admit(state, logits, on_device, slot, draws=False)

    tokens, in_flight = [], collections.deque([token])
    for _ in range(max_tokens - 1):
        # The token that this step reads is in ``state``: the host does not wait for it.
        # ``draws=False``: no slot has a temperature, so the step need not sort the vocabulary.
        state, token = programs.decode(params, bank.experts, state, draws=False)
        state = after_step(state, 1)
        token.copy_to_host_async()
        in_flight.append(token)
        # Between two steps: read statistics that have arrived, plan, start copies, and commit
        # pages that have arrived in one call with the table that shows them.
        controller.advance()
        if len(in_flight) > IN_FLIGHT:
            tokens.append(in_flight.popleft().item())
    tokens += [token.item() for token in in_flight]
    tokens = [token for token in tokens if token >= 0]  # -1: the slot was idle
    return tokens, tokenizer.decode(tokens), controller.levels()


def main() -> None:
    """Prints the tokens, the text, and how many experts hold how many bits."""
    parser = argparse.ArgumentParser(description="Greedy decoding, built from its parts.")
    parser.add_argument("model", type=Path, help="converted checkpoint")
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--policy", choices=POLICY_NAMES, default="dynamic")
    parser.add_argument("--pages", type=int, default=24, help="of the pool")
    parser.add_argument("--interval", type=int, default=8, help="steps between two plans")
    options = vars(parser.parse_args())
    path, prompt = options.pop("model"), options.pop("prompt")
    tokens, text, levels = decode(path, prompt, **options)
    print("token ids:", *tokens)
    print(prompt + text)
    for level, bits in enumerate(LEVEL_BITS):
        print(f"{(levels == level).sum()} experts at {bits} bits")


if __name__ == "__main__":
    main()
