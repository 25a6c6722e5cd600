"""``simulate``, on traces that are written here and by ``generate`` and ``perplexity``."""

import re
import subprocess
import sys

import pytest
from serving.nano import EXAMPLES

from dynaexq_jax.policy import Hotness, make_policy
from dynaexq_jax.traffic import Ladder, Trace, simulate, write_profile


def test_the_table_and_the_json_are_of_one_simulation(run, recorded):
    found = run("simulate", recorded, "--json").json()
    expected = simulate(
        Trace.read(recorded),
        make_policy("dynamic"),
        ladder=Ladder(base_bits=2, max_bits=8, pool_pages=9),
        interval=4,
    )
    for name, value in vars(expected).items():
        assert found[name] == value or name == "seconds"
    assert found["hit_share"] == expected.hit_share
    assert found["of_best"] == expected.of_best
    assert found["plans_per_s"] > 0
    assert found["policy"] == "dynamic"
    assert (found["base_bits"], found["max_bits"], found["pool_pages"]) == (2, 8, 9)
    assert (found["interval"], found["dropped_bytes"]) == (4, 0)

    table = run("simulate", recorded)
    assert (table.status, table.err) == (0, "")
    assert table.out.startswith(
        "policy dynamic, base bits 2, max bits 8, pool pages 9, interval 4\n"
    )
    rows = dict(re.findall(r"^(.+?) {2,}([\d,.]+)", table.out, re.MULTILINE))
    assert int(rows["promotions"]) == expected.promotions
    assert int(rows["pages moved"]) == expected.pages_moved
    assert float(rows["of what the best map would meet"]) == round(100 * expected.of_best, 1)


def test_flags_reach_the_simulation(run, recorded, tmp_path, traffic):
    trace = Trace.read(recorded)
    profile = tmp_path / "hot.json"
    hotness = Hotness.cold(3, 8).update(*traffic[0])
    write_profile(profile, trace.header.model, hotness)
    arguments = ("--policy", "blocking", "--base-bits", 2, "--max-bits", 4, "--interval", 8)
    arguments += ("--pages-share", 0.25, "--hotness-profile", profile)
    found = run("simulate", recorded, "--json", *arguments).json()
    assert (found["policy"], found["pool_pages"], found["interval"]) == ("blocking", 6, 8)
    expected = simulate(
        trace,
        make_policy("blocking"),
        ladder=Ladder(base_bits=2, max_bits=4, pool_pages=6),
        interval=8,
        hotness=hotness,
    )
    assert found["hit_mass"] == expected.hit_mass
    assert found["intervals"] == expected.intervals == 11
    assert found["promotions"] == expected.promotions
    off = run("simulate", recorded, "--json", "--policy", "off", "--pages", 2).json()
    assert (off["promotions"], off["hit_share"], off["pool_pages"]) == (0, 0, 2)


def test_of_the_trace_s_pages_remain_those_that_other_levels_can_use(run, recorded):
    found = run("simulate", recorded, "--json", "--base-bits", 8).json()
    assert (found["pool_pages"], found["promotions"]) == (0, 0)


def test_a_record_that_is_cut_short_is_reported_and_dropped(run, recorded):
    recorded.write_bytes(recorded.read_bytes()[:-30])
    result = run("simulate", recorded, "--json")
    assert result.json()["intervals"] == 21
    assert result.json()["dropped_bytes"] == 8 + 4 * 24 - 30
    assert result.err == (
        f"dynaexq: {recorded}: its last record is cut short, so its last 74 bytes are left out\n"
    )


@pytest.mark.parametrize("command", ["generate", "perplexity"])
def test_what_a_run_records_can_be_simulated(run, converted, text_dir, tmp_path, command):
    trace = tmp_path / "routing.trace"
    arguments = {
        "generate": (
            *("--prompt", "def main(", "--max-tokens", 24, "--base-bits", 2, "--pages", 24),
            *("--interval", 4, "--context", 256, "--chunk", 32),
        ),
        "perplexity": ("--text", text_dir / "go.txt", "--window", 64, "--max-windows", 4),
    }[command]
    assert run(command, converted, *arguments, "--routing-trace", trace).status == 0
    found = run("simulate", trace, "--json").json()
    assert found["pool_pages"] == 24
    assert found["tokens"] > 16
    assert found["mass"] == pytest.approx(3 * found["tokens"], rel=1e-5)
    assert found["promotions"] > 0


def test_it_imports_no_jax(recorded):
    probe = (
        "import sys; from dynaexq_jax.cli import main\n"
        f"assert main(['simulate', {str(recorded)!r}, '--json']) == 0\n"
        "print(sorted({'jax', 'jaxlib', 'flax', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]"
