import json
import shutil
import subprocess
import sys

import pytest

from dynaexq_jax.errors import InputError
from dynaexq_jax.text import load_tokenizer

BAD = ("", "{", "[]", "\xff")


@pytest.fixture
def copy(nano_dir, tmp_path):
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        shutil.copy(nano_dir / name, tmp_path)
    return tmp_path


def test_ids_and_text(tokenizer):
    assert tokenizer.vocab_size == 8192
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (8189, (8189,))
    ids = tokenizer.encode("def main():<|endoftext|>")
    assert ids[-1] == 8189
    assert tokenizer.decode(ids) == "def main():"


def test_chat_template_opens_the_assistants_turn(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(expected)


def test_chat_text_can_end_inside_the_last_answer(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    begun = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.chat_text(messages[:1]) == begun
    assert tokenizer.chat_text(messages, open_answer=False) == begun + "Well,"


def test_eos_ids_of_the_generation_config_count_too(copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [8191, 8189]}))
    assert load_tokenizer(copy).eos_ids == (8189, 8191)
    (copy / "generation_config.json").unlink()
    assert load_tokenizer(copy).eos_ids == (8189,)


def edit_config(copy, **changes):
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def test_no_chat_template(copy):
    edit_config(copy, chat_template=None)
    with pytest.raises(InputError, match="has no chat template"):
        load_tokenizer(copy).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_template_that_refuses(copy):
    edit_config(copy, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        load_tokenizer(copy).apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("tokenizer.json", "tokenizer_config.json") for damage in BAD),
        ("tokenizer.json", '{"model": 3}'),
    ],
)
def test_damaged_files_are_refused(copy, name, damage):
    (copy / name).write_text(damage)
    with pytest.raises(InputError) as error:
        load_tokenizer(copy)
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [-1]}'])
def test_a_damaged_generation_config_is_refused(copy, damage):
    (copy / "generation_config.json").write_text(damage)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        load_tokenizer(copy)


def test_loading_needs_no_torch_and_says_nothing(nano_dir):
    code = (
        "import sys; from dynaexq_jax.text import load_tokenizer;"
        "load_tokenizer(sys.argv[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(nano_dir)], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_no_eos_token(copy):
    (copy / "special_tokens_map.json").unlink()
    edit_config(copy, eos_token=None)
    with pytest.raises(InputError, match="names no eos_token"):
        load_tokenizer(copy)
