"""Puts a model on the device: checks and plans first, allocates last."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from dynaexq_jax.bank import ExpertBank, HostPages
from dynaexq_jax.budget import MemoryPlan
from dynaexq_jax.checkpoint import Checkpoint, is_converted
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.controller import Controller, ControllerConfig
from dynaexq_jax.engine.engine import Engine, EngineConfig
from dynaexq_jax.engine.programs import Experts, Programs, split_params
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.hf.plain import plain_experts
from dynaexq_jax.migration import Migration, MigrationConfig
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.output_file import check_place
from dynaexq_jax.policy import Hotness, Policy, make_policy
from dynaexq_jax.residency import Residency
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.planning import Planner, engine_config
from dynaexq_jax.serving.source import ModelSource
from dynaexq_jax.text.tokenizer import Tokenizer, load_tokenizer
from dynaexq_jax.traffic import (
    RoutedModel,
    TraceHeader,
    TraceWriter,
    check_new_trace,
    read_map,
    read_profile,
)
from pallas_kernels import implementations
from pallas_kernels.pages import PlainExperts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model that is ready to run."""

    engine: Engine
    tokenizer: Tokenizer
    config: ModelConfig
    plan: MemoryPlan | None
    """None for unquantized experts, which are loaded whole."""


def load_served(path: Path, serve: ServeConfig) -> Served:
    """Loads a converted checkpoint, or a Hugging Face directory with its experts unquantized.

    Raises InputError for everything that is wrong with either, or that cannot run here.
    """
    try:
        implementations.check(serve.implementation)
    except ValueError as error:
        raise InputError(str(error)) from error
    if is_converted(path):
        return _load_converted(Checkpoint.open(path), serve)
    if (path / "config.json").is_file():
        return _load_plain(HfDirectory.open(path), serve)
    raise InputError(
        f"{path}: neither a converted checkpoint nor a Hugging Face model directory; "
        "convert one with: dynaexq convert HF_DIR OUT_DIR"
    )


def build_engine(
    source: ModelSource,
    serve: ServeConfig,
    eos_token_ids: tuple[int, ...] = (),
    *,
    hotness: Hotness | None = None,
    mixed: np.ndarray | None = None,
) -> tuple[Engine, MemoryPlan]:
    """Plans, then puts a model of packed experts on the device; it stops at ``eos_token_ids``.

    ``hotness`` of an earlier run is what the first promotions go by, ``mixed`` [L, E] what
    static-mixed goes by. Raises InputError before anything is allocated.
    """
    shapes = engine_config(source.config, serve)
    planner = Planner(source, serve, eos_token_ids)
    plan = planner.plan()
    if not plan.pool_pages:
        _refuse_files_of_traffic(
            serve,
            f"every expert stays at {plan.base_bits} bits, for the pool has no pages; give it some",
        )
    planner.compile(plan)
    # first, and done with: what making them takes for a while must fit as well, and must not lie
    # between arrays that stay, for a budget leaves no room for holes
    dense = jax.block_until_ready(source.dense_weights())
    bank = ExpertBank.allocate(source, base_bits=plan.base_bits, pool_pages=plan.pool_pages)
    controller = None
    if plan.pool_pages:
        policy = make_policy(serve.policy, mixed)
        controller = _controller(source, serve, plan, bank, policy, hotness)
    engine = _engine(source.config, dense, bank, serve, shapes, planner.programs, controller)
    return engine, plan


def _load_converted(checkpoint: Checkpoint, serve: ServeConfig) -> Served:
    mixed = _mixed(checkpoint.config, serve)
    hotness = _hotness(checkpoint.config, serve)
    if hotness is None and mixed is not None:
        hotness = Hotness.calibrated(mixed)
    if serve.routing_trace is not None:
        check_new_trace(Path(serve.routing_trace))
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    eos = _eos_token_ids(tokenizer, checkpoint.config)
    engine, plan = build_engine(checkpoint, serve, eos, hotness=hotness, mixed=mixed)
    return Served(engine=engine, tokenizer=tokenizer, config=checkpoint.config, plan=plan)


def _load_plain(source: HfDirectory, serve: ServeConfig) -> Served:
    if serve.hbm_budget is not None or serve.base_bits is not None:
        raise InputError(
            f"{source.path}: a Hugging Face directory has one precision and no pages, so it takes "
            "no budget and no base; convert it first: dynaexq convert HF_DIR OUT_DIR"
        )
    _refuse_files_of_traffic(serve, "unquantized experts have one precision; convert the model")
    config = source.config
    shapes = engine_config(config, serve)
    tokenizer = load_tokenizer(source.tokenizer_dir)
    experts = plain_experts(source)
    eos = _eos_token_ids(tokenizer, config)
    dense = DenseWeights.load(config, source.dense())
    engine = _engine(config, dense, experts, serve, shapes, eos)
    return Served(engine=engine, tokenizer=tokenizer, config=config, plan=None)


def _refuse_files_of_traffic(serve: ServeConfig, reason: str) -> None:
    for name in ("map", "hotness_profile", "routing_trace"):
        if getattr(serve, name) is not None:
            raise InputError(f"{name} {getattr(serve, name)}: {reason}, or leave the file out")


def _mixed(config: ModelConfig, serve: ServeConfig) -> np.ndarray | None:
    """Hotness of the calibrated map, if one is given: float64 [L, E]."""
    return None if serve.map is None else read_map(Path(serve.map), RoutedModel.of(config)).hotness


def _hotness(config: ModelConfig, serve: ServeConfig) -> Hotness | None:
    """What the profile holds; None where there is none yet."""
    if serve.hotness_profile is None:
        return None
    path = Path(serve.hotness_profile)
    check_place("hotness_profile", path)
    return read_profile(path, RoutedModel.of(config)) if path.exists() else None


def _eos_token_ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    return tuple(sorted({*tokenizer.eos_ids, *config.eos_token_ids}))


def _engine(
    config: ModelConfig,
    dense: DenseWeights,
    experts: ExpertBank | PlainExperts,
    serve: ServeConfig,
    shapes: EngineConfig,
    programs: Programs | tuple[int, ...],
    controller: Controller | None = None,
) -> Engine:
    """``programs``: those that are compiled already, or the ids of end-of-sequence tokens."""
    arrays: Experts = experts.experts if isinstance(experts, ExpertBank) else experts
    model = Qwen3Moe(
        config,
        dense,
        arrays,
        dtype=shapes.dtype,
        implementation=serve.implementation,
    )
    return Engine(
        programs=programs if isinstance(programs, Programs) else Programs(model, programs),
        params=split_params(model),
        config=shapes,
        model_config=config,
        experts=experts,
        controller=controller,
    )


def _controller(
    source: ModelSource,
    serve: ServeConfig,
    plan: MemoryPlan,
    bank: ExpertBank,
    policy: Policy,
    hotness: Hotness | None,
) -> Controller:
    residency = Residency(
        layers=len(source.layers),
        experts=source.experts,
        base_bits=plan.base_bits,
        pool_pages=plan.pool_pages,
    )
    available = source.available_bits
    config = ControllerConfig(interval=serve.interval)
    record = None
    if serve.routing_trace is not None:
        header = TraceHeader(
            model=RoutedModel.of(source.config),
            bits=available,
            benefit=source.benefit,
            pinned=source.pinned,
            base_bits=plan.base_bits,
            pool_pages=plan.pool_pages,
            interval=config.interval,
            max_transitions=config.max_transitions,
        )
        record = TraceWriter(Path(serve.routing_trace), header).add
    host = HostPages.read(source, available[available.index(plan.base_bits) + 1 :])
    return Controller(
        policy=policy,
        residency=residency,
        pages_of_level=residency.pages_of_level[: len(available)],
        migration=Migration(
            host=host,
            residency=residency,
            bank=bank,
            config=MigrationConfig.of(
                page_bytes=source.format.page_bytes, pool_pages=plan.pool_pages
            ),
            waits_for_copies=policy.waits_for_copies,
        ),
        benefit=source.benefit,
        pinned=source.pinned,
        hotness=hotness,
        record=record,
        config=config,
    )
