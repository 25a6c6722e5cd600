"""What cannot be done is one line and status 2."""

import pytest

BAD = {
    "no such model": ("generate {tmp}/none --prompt a", "neither a converted checkpoint nor"),
    "not a model": ("perplexity {tmp} --precision 4 --text {py}", "not a converted checkpoint"),
    "inspect nothing": ("inspect {tmp}", "config.json"),
    "plan for bf16": ("plan {hf} --hbm-budget 1GiB", "is not a converted checkpoint"),
    "bf16 of converted": (
        "perplexity {nano} --precision bf16 --text {py}",
        "does not hold the unquantized experts",
    ),
    "text missing": ("perplexity {nano} --precision 4 --text {tmp}/none", "cannot read text file"),
    "text not UTF-8": ("perplexity {nano} --precision 4 --text {latin}", "is not UTF-8: byte 0xe9"),
    "text missing beside another": (
        "perplexity {nano} --precision 4 --text {py} {tmp}/none",
        "cannot read text file",
    ),
    "text too short": ("perplexity {nano} --precision 4 --text {short}", "512 needs 513: give a"),
    "eval without a model": (
        "eval {hf} --reference {hf} --text {py} --precision 4",
        "not a converted checkpoint",
    ),
    "eval against itself": (
        "eval {nano} --reference {nano} --text {py} --precision 4",
        "so it cannot be the reference; give the directory that the checkpoint was",
    ),
    "eval text missing": (
        "eval {nano} --reference {hf} --text {py} {tmp}/none --precision 4",
        "cannot read text file",
    ),
    "eval text too short": (
        "eval {nano} --reference {hf} --text {short} --precision 4",
        "512 needs 513: give a",
    ),
    "eval window": (
        "eval {nano} --reference {hf} --text {py} --precision 4 --window 0",
        "--window must be positive, got 0",
    ),
    "eval window too long": (
        "eval {nano} --reference {hf} --text {py} --precision 4 --window 5000",
        "lower --window",
    ),
    "eval without a reference": (
        "eval {nano} --text {py} --precision 4",
        "--text needs --reference, the Hugging Face directory that MODEL was converted from",
    ),
    "eval of the reference": (
        "eval {nano} --reference {hf} --text {py} --precision 4 bf16",
        "--precision bf16 with --text is the reference itself; leave it out, or use: dynaexq",
    ),
    "eval text with a limit": (
        "eval {nano} --reference {hf} --text {py} --precision 4 --limit 3",
        "--limit is for --tasks, not for --text; leave it out",
    ),
    "eval tasks with a reference": (
        "eval {nano} --reference {hf} --tasks arc_easy --precision 4",
        "--reference is for --text, not for --tasks; leave it out",
    ),
    "eval tasks in windows": (
        "eval {nano} --tasks arc_easy --precision 4 --max-windows 3",
        "--max-windows is for --text, not for --tasks; leave it out",
    ),
    "eval no items": (
        "eval {nano} --tasks arc_easy --precision 4 --limit 0",
        "--limit must be positive, got 0",
    ),
    "eval shots": (
        "eval {nano} --tasks arc_easy --precision 4 --fewshot -1",
        "--fewshot must be 0 or more, got -1",
    ),
    "eval pages at 4": (
        "eval {nano} --tasks arc_easy --precision 2 4 --pages 3",
        "--pages is for --precision dynamic or static-mixed, got 2, 4",
    ),
    "eval a map at 4": (
        "eval {nano} --reference {hf} --text {py} --precision 4 --map {tmp}/map",
        "--map is for --precision dynamic or static-mixed, got 4",
    ),
    "eval without a map": (
        "eval {nano} --reference {hf} --text {py} --precision 4 static-mixed",
        "static-mixed holds a calibrated map: give one with --map",
    ),
    "eval tasks of no folder": (
        "eval {nano} --tasks arc_easy --precision 4 --include-path {tmp} {tmp}/none",
        "none is not a folder; give one that exists",
    ),
    "text too short after another": (
        "perplexity {nano} --precision 4 --text {py} {short} --json",
        "512 needs 513: give a",
    ),
    "text of a map too short": (
        "calibrate-map {nano} --text {py} {short} -o {tmp}/map",
        "512 needs 513: give a",
    ),
    "window": ("perplexity {nano} --text {py} --window 0", "--window must be positive, got 0"),
    "window too long": ("perplexity {nano} --text {py} --window 5000", "lower --window"),
    "windows": ("perplexity {nano} --text {py} --max-windows 0", "--max-windows must be positive"),
    "pages at 4": (
        "perplexity {nano} --text {py} --precision 4 --pages 3",
        "--pages is for --precision dynamic or static-mixed, got 4",
    ),
    "prompt missing": ("generate {nano} --prompt-file {tmp}/none", "cannot read text file"),
    "prompt not UTF-8": ("generate {nano} --prompt-file {latin}", "is not UTF-8"),
    "budget 0": ("generate {nano} --prompt a --hbm-budget 0", "at least 1 byte, got '0'"),
    "budget in words": ("plan {nano} --hbm-budget lots", "cannot read 'lots' as an amount"),
    "budget below 0": ("plan {nano} --hbm-budget=-1GiB", "cannot read '-1GiB'"),
    "budget and pages": (
        "generate {nano} --prompt a --hbm-budget 1GiB --base-bits 2 --pages 3",
        "give either a budget (1GiB) or pages (3), not both",
    ),
    "pages alone": ("chat {nano} --pages 3", "--pages 3 needs --base-bits"),
    "context": ("plan {nano} --hbm-budget 1GiB --context 9999", "context of 9999 is longer than"),
    "bf16 budget": ("generate {hf} --prompt a --hbm-budget 1GiB", "takes no budget and no base"),
    "batch": (
        "plan {nano} --hbm-budget 1GiB --batch 99999999999",
        "batch must be positive and below 2^31, got 99999999999",
    ),
    "prompt of other bytes": (
        "generate {nano} --prompt a\udcff",
        r"the text is not Unicode: lone surrogate '\udcff' at character 1; give it as UTF-8",
    ),
    "temperature": ("generate {nano} --prompt a --temperature -1", "temperature must be 0 or more"),
    "no place for stats": (
        "generate {nano} --prompt a --stats-json {tmp}/no/stats.json",
        "stats.json: give a file in a directory that exists",
    ),
    "no place for hotness": (
        "generate {nano} --prompt a --base-bits 2 --pages 3 --hotness-profile {tmp}/no/hot.json",
        "hot.json: give a file in a directory that exists",
    ),
    "hotness without pages": (
        "chat {nano} --base-bits 4 --hotness-profile {tmp}/hot.json",
        "every expert stays at 4 bits, for the pool has no pages; give it some, or leave",
    ),
    "hotness of something else": (
        "chat {nano} --base-bits 2 --pages 3 --hotness-profile {short}",
        "generation_config.json: is not a hotness profile; give another file, or delete",
    ),
    "trace exists": (
        "generate {nano} --prompt a --base-bits 2 --pages 3 --routing-trace {latin}",
        "latin.txt: exists already; give another file, or delete it",
    ),
    "trace at 4": (
        "perplexity {nano} --text {py} --precision 4 --routing-trace {tmp}/trace",
        "--routing-trace is for --precision dynamic or static-mixed, got 4",
    ),
    "no trace": ("simulate {tmp}/none", "none: cannot be read (No such file"),
    "trace of something else": ("simulate {short}", "not valid JSON"),
    "share": ("simulate {trace} --pages-share -1", "--pages-share must be 0 or more, like 0.25"),
    "share that is none": ("simulate {trace} --pages-share nan", "--pages-share must be 0 or"),
    "share of more": ("simulate {trace} --pages-share 9", "--pages must be in 0..72"),
    "interval of less": ("simulate {trace} --interval 3", "a multiple of the 4 steps"),
    "hotness to simulate with missing": (
        "simulate {trace} --hotness-profile {tmp}/none",
        "none: cannot be read (No such file",
    ),
    "not a served model": (
        "inspect {llama}",
        "llama: config: unknown architecture ['LlamaForCausalLM']",
    ),
    "convert what is converted": (
        "convert {nano} {tmp}/out",
        "is a converted checkpoint; give the Hugging Face directory that it was converted from",
    ),
    "convert nothing": ("convert {tmp}/none {tmp}/out", "none"),
}


@pytest.fixture
def places(converted, hf_dir, text_dir, tmp_path, recorded):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("été".encode("latin-1"))
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return {
        "nano": converted,
        "hf": hf_dir,
        "py": text_dir / "python.txt",
        "tmp": tmp_path,
        "trace": recorded,
        "latin": latin,
        "short": hf_dir / "generation_config.json",
        "llama": llama,
    }


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(run, places, case):
    command, message = BAD[case]
    result = run(*command.format(**places).split(" "))
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("dynaexq: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a " * 300), "do not fit a context of 256"),
        (("--prompt", "a", "--max-tokens", "0"), "max_tokens must be positive, got 0"),
        (("--prompt", "a", "--stop", ""), "a stop string cannot be empty"),
    ],
)
def test_bad_prompts(run, converted, options, message):
    shapes = ("--base-bits", 8, "--context", 256, "--chunk", 32)
    result = run("generate", converted, *options, *shapes)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert message in result.err


@pytest.mark.parametrize(
    "command",
    [
        "",
        "decode",
        "generate {nano}",
        "generate {nano} --prompt a --prompt-file b",
        "perplexity {nano} --text f --precision 3",
        "eval {nano} --reference {hf} --text f",
        "plan {nano}",
        "plan {nano} --hbm-budget 1GiB --base-bits 3",
        "convert {hf} {tmp}/out --dense-bits 4",
        "simulate {trace} --pages 3 --pages-share 0.25",
        "simulate {trace} --policy static",
        "simulate",
    ],
)
def test_unknown_flags_and_values_are_usage_errors(run, places, command):
    result = run(*command.format(**places).split())
    assert result.status == 2
    assert result.out == ""
    assert "usage: dynaexq" in result.err
