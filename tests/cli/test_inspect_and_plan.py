"""``inspect`` and ``plan``."""

import re


def test_inspect_a_converted_checkpoint(run, converted):
    facts = run("inspect", converted, "--json").json()
    assert facts["kind"] == "converted checkpoint"
    assert facts["model"]["experts of a layer"] == 32
    assert facts["levels"]["bits"] == [2, 4, 8]
    errors = facts["levels"]["mean squared error"]
    assert errors["2"] > errors["4"] > errors["8"] > 0
    assert facts["format"]["dense bits"] == 16
    assert facts["bytes"]["page of an expert"] == 16384
    assert facts["bytes"]["all experts at 2 bits"] == 96 * (
        16384 + 2048 + 8
    )  # codes and bases of scales
    result = run("inspect", converted)
    assert result.status == 0
    assert "experts of a layer" in result.out
    assert "16,384" in result.out


def test_inspect_a_hugging_face_directory(run, hf_dir):
    facts = run("inspect", hf_dir, "--json").json()
    assert facts["kind"] == "Hugging Face model directory"
    assert facts["bytes"] == {
        "weights": (hf_dir / "model.safetensors").stat().st_size,
        "files": 1,
    }
    assert "positions" in run("inspect", hf_dir).out


def test_plan_adds_up(run, converted):
    budget = ("--hbm-budget", "13.6MiB", "--base-bits", 4)
    arguments = ("plan", converted, *budget, "--context", 256, "--chunk", 32)
    plan = run(*arguments, "--json").json()
    assert plan["total_bytes"] == sum(plan["bytes"].values()) <= plan["budget_bytes"]
    assert plan["budget_bytes"] == int(13.6 * 2**20)
    assert plan["base_bits"] == 4
    assert plan["bytes"]["page pool"] == plan["pool_pages"] * 16384 > 0
    assert plan["temporaries_of"] == "cpu"

    table = run(*arguments)
    assert table.status == 0
    assert table.out.startswith(f"base 4 bits for every expert, {plan['pool_pages']} pages of 192")
    rows = dict(re.findall(r"^([a-z ]+?) {2,}([\d,]+) ", table.out, re.MULTILINE))
    rows = {name: int(size.replace(",", "")) for name, size in rows.items()}
    assert rows.pop("total") == plan["total_bytes"]
    assert rows.pop("budget") == plan["budget_bytes"]
    assert rows == plan["bytes"]
