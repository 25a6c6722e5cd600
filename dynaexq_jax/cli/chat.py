"""``dynaexq chat``: a conversation in the terminal."""

import argparse
import sys
from typing import TYPE_CHECKING

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import (
    add_model,
    add_precision,
    add_shapes,
    add_traffic_files,
    keeping_hotness,
    serve_config,
)
from dynaexq_jax.cli.sampling import add_sampling, sampling_params
from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.errors import InputError

if TYPE_CHECKING:
    from dynaexq_jax.serving.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="message that sets the model's role")
    add_sampling(parser)
    add_precision(parser)
    add_traffic_files(parser)
    add_shapes(parser, batch=False)


def run(arguments: argparse.Namespace) -> int:
    """Reads messages line by line until the end of input; /reset forgets the conversation."""
    sampling = sampling_params(arguments)
    serve = serve_config(arguments)
    prepare_device(serve.budget_bytes)
    from dynaexq_jax.serving.llm import LLM
    from dynaexq_jax.serving.loading import load_served

    llm = LLM(load_served(arguments.model, serve))
    print("End with an empty line or Ctrl-D; /reset starts anew.", file=sys.stderr)
    with keeping_hotness(llm, serve):
        _talk(llm, arguments, sampling)
    return 0


def _talk(llm: "LLM", arguments: argparse.Namespace, sampling: SamplingParams) -> None:
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(system)
    while line := _read_line():
        if line == "/reset":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": line})
        reply = ""
        try:
            pieces = llm.stream_chat(
                messages,
                max_tokens=arguments.max_tokens,
                sampling=sampling,
                stop=arguments.stop,
            )
        except InputError as error:
            messages.pop()
            print(f"dynaexq: {error}; /reset starts anew", file=sys.stderr)
            continue
        for piece in pieces:
            reply += piece.text
            print(piece.text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": reply})


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise InputError(f"the message is not UTF-8 ({error.reason}); give it as UTF-8") from error
