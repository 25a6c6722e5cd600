"""A small model with random packed experts, and everything around it, without files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from golden import weights
from kernels.experts import random_experts

from dynaexq_jax.bank import ExpertBank, HostPages
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.engine.engine import Engine, EngineConfig
from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.migration import Migration, MigrationConfig
from dynaexq_jax.models.names import dense_shapes
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.residency import Residency
from pallas_kernels.pages import Matrices, PagedExperts

RAW = weights.CONFIGS["plain"]
CONFIG = ModelConfig.from_hf(RAW)
EOS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """One model's parts; banks are made anew for every test."""

    model: Qwen3Moe
    programs: Programs
    source: "RandomSource"

    def bank(self, *, base_bits=2, pool_pages=12) -> ExpertBank:
        return ExpertBank.allocate(self.source, base_bits=base_bits, pool_pages=pool_pages)

    def host(self) -> HostPages:
        return HostPages.read(self.source, (4, 8))

    def engine(self, experts, *, batch=1, context=64, chunk=16, controller=None) -> Engine:
        return Engine(
            programs=self.programs,
            params=split_params(self.model),
            config=EngineConfig(
                batch=batch, context=context, chunk=chunk, dtype=np.dtype("float32")
            ),
            model_config=CONFIG,
            experts=experts,
            controller=controller,
        )


class RandomSource:
    """Stands for a converted checkpoint: random bits at every level."""

    def __init__(self) -> None:
        self.layers = CONFIG.sparse_layers
        self.experts = CONFIG.num_experts
        full = random_experts(
            hidden=CONFIG.hidden_size,
            width=CONFIG.moe_intermediate_size,
            base_bits=8,
            layers=len(self.layers),
            experts=self.experts,
        )
        self.format = full.format
        self._full = jax.tree.map(np.asarray, full)

    def scales(self) -> Matrices:
        return self._full.scales

    def level(self, bits: int) -> tuple[Matrices, ...]:
        return {2: self._full.base[:1], 4: self._full.base[1:2], 8: self._full.base[2:]}[bits]


def make_small() -> Small:
    tensors = weights.tensors(RAW)
    dense = DenseWeights.load(CONFIG, {name: tensors[name] for name in dense_shapes(CONFIG)})
    source = RandomSource()
    bank = ExpertBank.allocate(source, base_bits=8, pool_pages=0)
    model = Qwen3Moe(CONFIG, dense, bank.experts, dtype=jnp.dtype("float32"))
    return Small(model=model, programs=Programs(model, [EOS]), source=source)


def mover(
    small: Small, bank: ExpertBank, *, pool_pages: int, waits: bool = True, **config: int
) -> tuple[Residency, Migration]:
    residency = Residency(
        layers=len(CONFIG.sparse_layers),
        experts=CONFIG.num_experts,
        base_bits=bank.experts.base_bits,
        pool_pages=pool_pages,
    )
    migration = Migration(
        host=small.host(),
        residency=residency,
        bank=bank,
        config=MigrationConfig(**config),
        waits_for_copies=waits,
    )
    return residency, migration


def copy_tree(tree):
    """Fresh buffers: what is donated next is not what was copied."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def held_pages(experts: PagedExperts) -> dict[tuple[int, int, int], bytes]:
    """Bytes in the pool of every page that the table names, by (rung, layer, expert)."""
    table = np.asarray(experts.table)
    pool = [np.asarray(m) for m in experts.pool]
    return {
        tuple(map(int, place)): b"".join(m[table[tuple(place)]].tobytes() for m in pool)
        for place in np.argwhere(table >= 0)
    }
