"""`neuronmlp`: compress a model, look at it, judge it, measure it, and find out why it is slow or off."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from neuronmlp_plugin import __version__
from neuronmlp_plugin.errors import NeuronMLPError, printable, reason_of

COMMANDS = {
    "compress": "make a compressed copy of a Hugging Face folder, with low-rank MLPs",
    "refine": "train the factors of a compressed folder on text, to bring it closer to the dense model",
    "quantize": "store a dense or compressed folder's MLPs in int8: one byte a number, half of bf16",
    "inspect": "what a compressed folder holds: forms, ranks and bytes per layer",
    "evaluate": "perplexity, KL divergence and agreement of compressed folders against their dense model",
    "report": "make a folder's HTML report again from its neuronmlp_report.json",
    "convert": "turn published *_v_proj / *_u_proj factors (SVD-LLM, NeuronMM) into a neuronmlp checkpoint",
    "bench": "decode throughput in vLLM (measured); kernels, plans and whole models on Trainium (simulated)",
    "doctor": "say whether the fast path runs here, and if not, why and what to do",
}

# What a plain `pip install neuronmlp` leaves out, and the extra that brings it.
_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "matplotlib", "jinja2"), "neuronmlp[compress]"),
    "huggingface_hub": "neuronmlp[compress]",
    "vllm": "neuronmlp[cpu]",
}


class _Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one sentence, without a page of usage before it."""

    given: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        self.given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        # argparse misses what is required before it sees that a word was misspelt.
        options = [word.partition("=")[0] for word in self.given if word.startswith("--")]
        known = [*self._option_string_actions]
        for option in options if self._subparsers is None else ():
            if not any(name.startswith(option) for name in known):
                near = difflib.get_close_matches(option, known, 1)
                message = f"{option}: no such option{f', did you mean {near[0]}?' if near else ''}"
                break
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="neuronmlp", description=__doc__)
    parser.add_argument("--version", action="version", version=f"neuronmlp {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        module = importlib.import_module(f"neuronmlp_plugin.commands.{name}")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error that is the user's to mend becomes one line and exit code 2."""
    _open_streams()
    name = "neuronmlp"
    try:
        args = build_parser().parse_args(argv)
        name = f"neuronmlp {args.command}"
        return _run(args)
    except NeuronMLPError as error:
        print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        resumes = name.endswith(("compress", "refine"))
        then = "; the same command goes on from what is finished" if resumes else ""
        print(f"{name}: interrupted{then}.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has enough
        _leave_stdout()
        return 141
    except OSError as error:
        where = printable(str(error.filename or "its output"))
        print(f"{name}: {where}: expected to read or write, found: {reason_of(error)}.", file=sys.stderr)
        _leave_stdout()
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(
            f"{name}: expected the package {error.name}, found none; install {_EXTRAS[error.name]}.",
            file=sys.stderr,
        )
    return 2


def _run(args: argparse.Namespace) -> int:
    for option in ("model", "dense"):
        given = getattr(args, option, None)
        if given is not None:
            revision = getattr(args, "revision", None) if option == "model" else None
            setattr(args, option, _folders(given, revision))
    status = int(args.run(args))
    sys.stdout.flush()  # a closed pipe is noticed here, and not where nothing can be said any more
    return status


def _open_streams() -> None:
    """Whoever started us may have closed the streams that we write to."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())


def _leave_stdout() -> None:
    """Python flushes stdout once more as it exits: into something that takes it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _folders(given: Any, revision: str | None) -> Any:
    """The local folder of a path or hub id, or of each in a list, once a model is known to lie there."""
    from neuronmlp_plugin.checkpoint.hub import known_folder

    return (
        [known_folder(name) for name in given] if isinstance(given, list) else known_folder(given, revision)
    )


if __name__ == "__main__":
    sys.exit(main())
