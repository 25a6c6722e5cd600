"""Records what transformers computes for the models of weights.py and for examples/nano-moe.

Regenerate, in any environment that has the `golden` extra (torch, transformers, ml_dtypes):

    pip install -e '.[golden]' && python tests/golden/make_goldens.py [NAME ...]

Each NAME.npz holds, in float32 with eager attention and experts on the CPU:

    tokens           int32 [B, T]         the prompts
    positions        int32 [P]            the positions whose logits are stored
    logits           float32 [B, P, V]
    greedy           int32 [B, N]         argmax continuation, each token by a full recomputation
    router_layers    int32 [L]            the layers that hold experts
    router_experts   int8 [L, B, T, k]    selected experts of the prompts, ascending (not in nano)
    weights_sha256   str                  weights.digest of the tensors (nano: of model.safetensors)
    prompt_seed      int                  (not in nano)
    versions         str                  of torch, transformers and numpy

Prompts are chosen so that no decision hangs on rounding: at every greedy step the best logit leads
by MARGIN of the largest one, and every selected expert's router logit leads the best one left out
by ROUTER_GAP.
"""

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import weights

HERE = Path(__file__).parent
NANO = HERE.parents[1] / "examples" / "nano-moe"
BATCH, GREEDY, STORED = 2, 16, 32
MARGIN, ROUTER_GAP = 2e-3, 1e-4
NANO_TOKENS, NANO_GREEDY, NANO_STORED = 64, 32, 4
NANO_PROMPTS = (
    'def matrix_product(a, b):\n    """\n    Compute the product of two matrices.\n\n'
    "    Parameters\n    ----------\n    a : array_like\n        First matrix.\n"
    "    b : array_like\n        Second matrix, with as many rows as `a` has columns.\n\n"
    "    Returns\n    -------\n    out : ndarray\n        The product of `a` and `b`.\n",
    "Le lendemain matin, le comte descendit de bonne heure dans le jardin. Il y trouva sa fille "
    "qui cueillait des roses, et qui rougit en l'apercevant. -- Mon père, dit-elle, je ne vous "
    "attendais pas si tôt. -- Ma chère enfant, répondit le vieillard en lui prenant la main, "
    "j'ai une grave question à vous faire.",
)


def load(directory: Path) -> torch.nn.Module:
    """The model of `directory` as transformers loads it, in float32; refuses any key left over."""
    model, info = transformers.Qwen3MoeForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{directory}: transformers reports {kind}: {sorted(info[kind])}")
    return model.eval()


def forward(model: torch.nn.Module, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """tokens [B, T] -> logits [B, T, V] and router logits [L, B, T, E], all float32."""
    out = model(torch.from_numpy(tokens.astype(np.int64)), output_router_logits=True)
    routers = [np.asarray(r).reshape(*tokens.shape, -1) for r in out.router_logits]
    return out.logits.numpy(), np.stack(routers)


def router_gap(routers: np.ndarray, k: int) -> float:
    """The smallest lead of a selected expert over the best one left out."""
    ranked = np.sort(routers, axis=-1)
    return float((ranked[..., -k] - ranked[..., -k - 1]).min())


def greedy(model: torch.nn.Module, tokens: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Argmax continuation [B, count]; the smallest lead over its largest logit, a fraction."""
    start, smallest = tokens.shape[1], np.inf
    for _ in range(count):
        logits = forward(model, tokens)[0][:, -1]
        ranked = np.sort(logits, axis=-1)
        lead = (ranked[:, -1] - ranked[:, -2]) / np.abs(logits).max(axis=-1)
        smallest = min(smallest, float(lead.min()))
        tokens = np.concatenate([tokens, logits.argmax(axis=-1)[:, None].astype(np.int32)], axis=1)
    return tokens[:, start:], smallest


def save(name: str, **arrays: Any) -> None:
    """Writes NAME.npz and says how large it is."""
    versions = " ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, np))
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, versions=versions, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def make(name: str) -> None:
    """One golden file of a model of weights.CONFIGS."""
    config = weights.CONFIGS[name]
    tensors = weights.tensors(config)
    with tempfile.TemporaryDirectory() as directory:
        model = load(weights.write_directory(config, tensors, Path(directory)))
    # Scaled rotary embeddings are only told apart beyond their original 64 positions.
    scaled = model.config.rope_parameters["rope_type"] != "default"
    length = 160 if scaled else 64
    positions = np.arange(length)[:: -(length // STORED)][::-1].astype(np.int32)
    k = config["num_experts_per_tok"]
    for seed in range(50):
        random = np.random.default_rng(seed)
        tokens = random.integers(0, config["vocab_size"], (BATCH, length), dtype=np.int32)
        continuation, lead = greedy(model, tokens, GREEDY)
        gap = router_gap(forward(model, np.concatenate([tokens, continuation], axis=1))[1], k)
        if lead > MARGIN and gap > ROUTER_GAP:
            break
    else:
        raise ValueError(f"{name}: no prompt of 50 decides clearly; change its weights")
    logits, routers = forward(model, tokens)
    experts = np.sort(np.argsort(routers, axis=-1)[..., -k:], axis=-1)
    shares = [np.bincount(layer.ravel(), minlength=8) / layer.size for layer in experts]
    if np.min(shares) == 0:
        raise ValueError(f"{name}: an expert is never used: {np.round(shares, 3)}")
    print(
        f"{name}: seed {seed}, lead {lead:.1e}, router gap {gap:.1e}, logits within "
        f"{np.abs(logits).max():.1f} (std {logits.std():.2f}), expert shares {np.min(shares):.3f} "
        f"to {np.max(shares):.3f}, {len(np.unique(continuation))} different tokens in greedy"
    )
    save(
        name,
        tokens=tokens,
        positions=positions,
        logits=logits[:, positions],
        greedy=continuation,
        router_layers=np.array(weights.sparse_layers(config), np.int32),
        router_experts=experts.astype(np.int8),
        weights_sha256=weights.digest(tensors),
        prompt_seed=seed,
    )


def make_nano() -> None:
    """The golden file of the trained model in examples/."""
    model = load(NANO)
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"][:NANO_TOKENS] for p in NANO_PROMPTS]
    tokens = np.array(ids, np.int32)
    continuation, lead = greedy(model, tokens, NANO_GREEDY)
    k = model.config.num_experts_per_tok
    gap = router_gap(forward(model, np.concatenate([tokens, continuation], axis=1))[1], k)
    print(f"nano: lead {lead:.1e}, router gap {gap:.1e}, continuations:")
    for row in continuation:
        print(f"    {tokenizer.decode(row)!r}")
    if lead <= MARGIN or gap <= ROUTER_GAP:
        raise ValueError(f"nano: lead {lead:.1e}, router gap {gap:.1e} too small: reword a prompt")
    positions = np.arange(NANO_TOKENS - NANO_STORED, NANO_TOKENS, dtype=np.int32)
    save(
        "nano",
        tokens=tokens,
        positions=positions,
        logits=forward(model, tokens)[0][:, positions],
        greedy=continuation,
        router_layers=np.arange(model.config.num_hidden_layers, dtype=np.int32),
        weights_sha256=hashlib.sha256((NANO / "model.safetensors").read_bytes()).hexdigest(),
    )


def main(names: list[str]) -> None:
    """Writes the golden files `names`, by default all."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        for name in names or [*weights.CONFIGS, "nano"]:
            if name == "nano":
                make_nano()
            elif name in weights.CONFIGS:
                make(name)
            else:
                raise ValueError(f"no model {name!r}; there are {', '.join(weights.CONFIGS)}, nano")


if __name__ == "__main__":
    main(sys.argv[1:])
