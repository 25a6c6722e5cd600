"""The command line: one file a command, each with ``add_arguments`` and ``run``.

Importing this package imports no JAX: a wrong flag is reported at once, and the memory limit of
the backend can still be set.
"""

import argparse
import contextlib
import errno
import importlib
import io
import sys
from collections.abc import Sequence

from dynaexq_jax.errors import InputError

COMMANDS = {
    "convert": ("convert.cli", "convert a Hugging Face directory to a dynaexq checkpoint"),
    "inspect": ("dynaexq_jax.cli.inspect", "show what a model directory holds"),
    "plan": ("dynaexq_jax.cli.plan", "show how a memory budget would be spent"),
    "generate": ("dynaexq_jax.cli.generate", "continue a prompt"),
    "chat": ("dynaexq_jax.cli.chat", "talk to a model"),
    "bench": ("dynaexq_jax.cli.bench", "measure speed and hit share under several policies"),
    "calibrate-map": ("dynaexq_jax.cli.calibrate_map", "find the best fixed map for given texts"),
    "simulate": ("dynaexq_jax.cli.simulate", "replay recorded routing through a policy"),
    "perplexity": ("dynaexq_jax.cli.perplexity", "measure perplexity on text files"),
    "eval": (
        "dynaexq_jax.cli.eval",
        "compare with the unquantized model, or run benchmarks",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for what the user can mend."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="dynaexq", description="Mixture-of-experts inference with dynamic expert precision."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        # only the command that was named is imported
        subparser = commands.add_parser(name, help=summary, description=f"{summary}.")
        if given and given[0] == name:
            command = importlib.import_module(module)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    parsed = parser.parse_args(given)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text that a terminal cannot show ends nothing
    try:
        status = parsed.run(parsed)
        sys.stdout.flush()  # or what cannot be written would only be noticed when all is over
        return status
    except InputError as error:
        print(f"dynaexq: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; nothing more can be said
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = error.filename or "the output"
        print(f"dynaexq: error: {place}: {error.strerror}; free space there", file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.close()  # or what is left of it is tried once more at the end
        return 2
    except KeyboardInterrupt:
        print("dynaexq: interrupted", file=sys.stderr)
        return 130
