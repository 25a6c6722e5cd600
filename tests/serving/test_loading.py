"""What load() takes and refuses, and whether the plan's bytes are those of the device."""

import gc
import shutil

import jax
import numpy as np
import pytest
from serving.conftest import SHAPES

import dynaexq_jax as dx
from dynaexq_jax import InputError
from dynaexq_jax.bank import _commit, batch_words, page_shapes
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.engine.prompt import Prompt, padded_tokens
from dynaexq_jax.migration import MOST_BATCHES, MigrationConfig
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.planning import Planner
from dynaexq_jax.trees import tree_bytes

EXPERTS = 96
SMALL = 4096
"""Bytes of anything that does not count: scalars and constants."""

BUDGET = {"hbm_budget": "13.6MiB", "base_bits": 4, **SHAPES}
"""Of several tests: their programs are compiled once."""
CASES = {
    "a budget": BUDGET,
    "pages": {"base_bits": 2, "pages": 24, "dtype": "bfloat16", **SHAPES},
    "no pool": {"base_bits": 8, "batch": 3, **SHAPES},
}


def live_bytes():
    """Of the device: what is page-locked memory of the host does not count."""
    gc.collect()
    live = [a for a in jax.live_arrays() if not a.is_deleted()]
    return {id(a): a.nbytes for a in live if a.sharding.memory_kind != "pinned_host"}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_is_allocated(converted, case):
    options = CASES[case]
    before = live_bytes()
    llm = dx.load(converted, **options)
    rows, engine = llm.plan.rows, llm.engine
    experts = engine.experts
    assert rows["dense weights"] == tree_bytes(engine.params)
    assert rows["expert base"] == sum(m.nbytes for page in experts.base for m in page)
    assert rows["expert scales"] == tree_bytes(experts.scales)
    assert rows["page pool"] == sum(m.nbytes for m in experts.pool)
    assert rows["page table"] == experts.table.nbytes
    assert rows["cache and batch"] == tree_bytes(engine.state)
    assert rows["page pool"] == llm.plan.pool_pages * experts.format.page_bytes

    arrays = sum(llm.plan.arrays.values())
    after = live_bytes()
    fresh = sum(size for key, size in after.items() if key not in before)
    assert arrays + rows["staging"] <= fresh <= arrays + rows["staging"] + SMALL
    assert llm.plan.total_bytes == sum(rows.values())
    if "hbm_budget" in options:
        # a page more of the pool may be a page more in each batch that is staged
        more = (1 + MOST_BATCHES) * experts.format.page_bytes
        assert 0 <= llm.plan.budget_bytes - llm.plan.total_bytes < more * 1.01
        assert llm.plan.pool_pages > 0


def test_nothing_more_stays_allocated_once_text_was_made(converted):
    llm = dx.load(converted, base_bits=2, pages=24, interval=2, **SHAPES)
    before = sum(live_bytes().values())
    llm.generate("def main(", max_tokens=40)
    llm.engine.controller.settle()
    assert llm.engine.controller.counters.commits > 0
    assert sum(live_bytes().values()) <= before + SMALL


def test_temporaries_are_those_of_the_programs_that_run(converted):
    """As the compiler says of the very arrays that the engine passes."""
    llm = dx.load(converted, **BUDGET)
    engine = llm.engine
    arguments = (engine.params, engine.experts, engine.state)
    padded = padded_tokens(SHAPES["context"], SHAPES["chunk"])
    prompt, slot = Prompt.abstract(padded), jax.numpy.int32(0)
    found = []
    for lowered in (
        engine.programs.decode.lower(*arguments),
        engine.programs.prefill.lower(*arguments, prompt, slot, chunk=SHAPES["chunk"]),
    ):
        memory = lowered.compile().memory_analysis()
        # the donated state comes back in place: only the rest of the output is new
        assert memory.alias_size_in_bytes >= tree_bytes(engine.state.cache)
        found.append(
            memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
    assert llm.plan.rows["temporaries"] == max(found)


def test_temporaries_of_a_commit_count(converted, monkeypatch):
    for name in ("temporary_bytes", "temporary_bytes_between_steps"):
        monkeypatch.setattr(f"dynaexq_jax.engine.programs.Programs.{name}", lambda *_, **__: 0)
    llm = dx.load(converted, **BUDGET)
    bank, pages = llm.engine.bank, llm.plan.pool_pages
    experts, page_bytes = bank.experts, bank.experts.format.page_bytes
    staged = MigrationConfig.of(page_bytes=page_bytes, pool_pages=pages).staging_pages
    words = batch_words(staged, page_shapes(experts.pool), experts.table.shape)
    batch = jax.device_put(np.zeros(words, np.uint32), bank.device)
    memory = _commit.lower(experts.pool, experts.table, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes == tree_bytes((experts.pool, experts.table))
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert llm.plan.rows["temporaries"] == beside > tree_bytes(experts.table)


def test_a_compiler_without_memory_is_one_clear_error(converted, monkeypatch):
    """As on a GPU whose allocator is held to a budget that has no room for tuning."""

    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("dynaexq_jax.engine.programs.Programs.temporary_bytes", exhausted)
    with pytest.raises(InputError, match="budget of 64MiB leaves the compiler no memory"):
        dx.load(converted, hbm_budget="64MiB", **SHAPES)


def test_the_named_smallest_budget_works(converted):
    options = {"base_bits": 2, **SHAPES}
    checkpoint = Checkpoint.open(converted)
    with pytest.raises(InputError, match=r"a budget of 1\.0 MiB is too small: .* 2 bits") as error:
        Planner(checkpoint, ServeConfig(hbm_budget="1MiB", **options)).plan()
    smallest = int(str(error.value).split("(")[1].split(" bytes")[0])
    plan = Planner(checkpoint, ServeConfig(hbm_budget=smallest, **options)).plan()
    assert plan.total_bytes == smallest


@pytest.fixture
def nothing_allocated(monkeypatch):
    """Arrays of any size that come to life meanwhile fail the test."""
    before = jax.live_arrays()  # held, so that no other gets the id of one
    known = {id(array) for array in before}
    yield
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in known) < SMALL


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("model", ["converted", "hf_dir"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hbm_bugdet": "1GiB"}, "unknown option 'hbm_bugdet'; load takes .*'hbm_budget'"),
        ({"hbm_budget": "1GiB", "base_bits": 2, "pages": 3}, r"either a budget .* not both"),
        ({"pages": 3}, "--pages 3 needs --base-bits"),
        ({"context": 4097}, "a context of 4097 is longer than the 4096 positions"),
        ({"implementation": "cuda"}, "implementation must be one of .* got 'cuda'"),
        ({"implementation": "mosaic"}, "'mosaic' cannot run: .*; use 'auto' or 'xla'"),
        ({"base_bits": 3}, r"base_bits must be one of \(2, 4, 8\), got 3"),
        ({"policy": "static"}, "policy must be one of .* got 'static'"),
        ({"dtype": "float16"}, "dtype must be one of .* got 'float16'"),
        ({"batch": 0}, "batch must be positive and below 2.31, got 0"),
        ({"interval": 0}, "interval must be positive and below 2.31, got 0"),
        ({"context": -1}, "context must be positive and below 2.31, got -1"),
    ],
)
def test_bad_options_are_refused(request, model, options, message, monkeypatch):
    for place in ("ExpertBank.allocate", "plain_experts"):  # not even for a moment
        monkeypatch.setattr(f"dynaexq_jax.serving.loading.{place}", None)
    with pytest.raises(InputError, match=message):
        dx.load(request.getfixturevalue(model), **options)


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("options", [{"hbm_budget": "1GiB"}, {"base_bits": 2}])
def test_unquantized_experts_take_no_budget(hf_dir, options):
    with pytest.raises(InputError, match="takes no budget and no base; convert it first"):
        dx.load(hf_dir, **options)


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hbm_budget": "5MiB"}, r"a budget of 5\.0 MiB is too small: .* raise --hbm-budget"),
        ({"base_bits": 2, "pages": 3 * EXPERTS + 1}, r"--pages must be in 0\.\.288 .* got 289"),
        ({"base_bits": 8, "pages": 1}, r"--pages must be in 0\.\.0 .* got 1"),
    ],
)
def test_what_the_model_does_not_fit_is_refused(converted, options, message, monkeypatch):
    monkeypatch.setattr("dynaexq_jax.serving.loading.ExpertBank.allocate", None)
    with pytest.raises(InputError, match=message):
        dx.load(converted, **options, **SHAPES)


def test_directories_that_are_no_model(tmp_path):
    for path in (tmp_path, tmp_path / "missing", __file__):
        with pytest.raises(InputError, match="neither a converted checkpoint nor a Hugging Face"):
            dx.load(path)


@pytest.fixture(scope="module")
def without_8_bits(converted, tmp_path_factory):
    path = tmp_path_factory.mktemp("partial") / "no-level8"
    shutil.copytree(converted, path, ignore=shutil.ignore_patterns("level8"))
    return path


def test_a_missing_level_matters_only_when_it_is_asked_for(without_8_bits):
    llm = dx.load(without_8_bits, base_bits=2, pages=24, interval=2, **SHAPES)
    assert llm.plan.promotable_pages == EXPERTS
    assert llm.generate("def main(", max_tokens=12)
    llm.engine.controller.settle()
    assert set(np.unique(llm.residency())) == {0, 1}
    for options in ({"base_bits": 8}, {"base_bits": 2, "pages": EXPERTS + 1}):
        with pytest.raises(InputError, match=r"a level that this checkpoint lacks|0\.\.96 "):
            dx.load(without_8_bits, **options, **SHAPES)


def test_the_lowest_level_is_needed_by_all(converted, tmp_path):
    path = tmp_path / "no-level2"
    shutil.copytree(converted, path, ignore=shutil.ignore_patterns("level2"))
    with pytest.raises(InputError, match="level2 is missing, which every expert needs; copy"):
        dx.load(path, **SHAPES)


def test_nothing_is_compiled_after_loading(converted, caplog):
    """Not by a draw, a promotion or a request that ends early, for which others would wait."""
    with jax.log_compiles():
        llm = dx.load(converted, interval=2, **BUDGET)
        assert llm.plan.pool_pages > 0
        assert any("jit(_prefill)" in record.getMessage() for record in caplog.records)
        caplog.clear()
        for temperature in (0.0, 0.7):
            llm.generate("def main(", max_tokens=8, temperature=temperature)
        engine = llm.engine
        number = engine.add([1, 2], max_tokens=8)
        engine.step()
        engine.cancel(number)
        engine.controller.settle()
        assert engine.controller.counters.commits > 0
    assert [record.getMessage() for record in caplog.records] == []


def test_a_plan_stays_within_what_the_allocator_may_use(converted, monkeypatch):
    limit = 14 * 2**20
    monkeypatch.setattr("dynaexq_jax.serving.planning.Planner.temporary_bytes", lambda *_: 2**19)
    monkeypatch.setattr("dynaexq_jax.serving.planning._device_memory_bytes", lambda: limit)
    serve = ServeConfig(hbm_budget="15MiB", base_bits=2, **SHAPES)
    plan = Planner(Checkpoint.open(converted), serve).plan()
    assert plan.total_bytes <= plan.budget_bytes == limit
    fixed = ServeConfig(base_bits=2, pages=4, **SHAPES)
    assert Planner(Checkpoint.open(converted), fixed).plan().budget_bytes is None
