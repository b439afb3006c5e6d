"""How a script is run: its command line, its mistakes in one line, its exit codes."""

import argparse
import errno
import os
import sys
import warnings
from contextlib import contextmanager

import diffusers
import huggingface_hub
import torch.distributed as dist
import transformers
from safetensors import SafetensorError

from runtime.flags import parser_of
from runtime.settings import BadInput, did_you_mean, require


class Stopped(Exception):
    """All ranks end a run before its time. args: the exit code, and the line that rank 0 prints."""


def quiet():
    """Of transformers and diffusers only errors, and no progress bars.

    For a process whose stderr is its own, as a script's is. Of a hub that is not reached its
    library says every attempt, of weights that are missing diffusers says that it looks for
    others: what comes of it, the script says.
    """
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    # Nothing here works in place on what a sharded module returns. Student and fake score are two
    # adapters on one network on purpose.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")


def no_such(unknown, parser):
    """A sentence about command-line arguments that the parser does not know."""
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return f"{unknown[0]}: no such argument, all are flags"
    known = list(parser._option_string_actions)
    return f"{flags[0]}: no such flag{did_you_mean(flags[0].replace('_', '-'), known)}"


def parse(parser, config_class, argv):
    """The config that the words `argv` of a command line ask for; --help exits.

    config_class.RECIPES {model: {field: value}} are the defaults of a model, and config_class.PAPER
    {field: value} those with --paper. Raises BadInput, for an unknown flag too.
    """
    # Which model is asked for comes first, also with --help: that shows the defaults that hold.
    without_help = [word for word in argv if word not in ("-h", "--help")]
    asked, _ = parser.parse_known_args(without_help)
    recipes = getattr(config_class, "RECIPES", {})  # toys have no models
    parser.set_defaults(**recipes.get(getattr(asked, "model", None), {}))
    if getattr(asked, "paper", False):
        parser.set_defaults(**config_class.PAPER)
    settings, unknown = parser.parse_known_args(argv)
    if unknown:
        raise BadInput(no_such(unknown, parser))
    return config_class(**vars(settings))


def plain_parser(description):
    """An ArgumentParser for a script without a Config: to be used inside `in_one_line`."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, formatter_class=as_written, allow_abbrev=False
    )
    parser.error = lambda message: require(False, message)
    return parser


@contextmanager
def in_one_line(who):
    """What ends a script early ends it without a traceback.

    Bad input: one line on stderr, exit code 2. A reader of stdout that has gone, as `| head` does:
    no line, exit code 1.
    """
    try:
        try:
            yield
        finally:  # --help too, which exits
            sys.stdout.flush()
    except BadInput as e:
        print(f"{who}: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Python flushes stdout once more at its exit: what is left then goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def disk_is_full(error):
    """The system's words for it where an error says that a disk is full, otherwise None."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        words = os.strerror(code)
        if words in str(error):  # safetensors' error has no errno
            return words
    return None


def run(main, config_class, argv=None, **about):
    """Parse the command line and call main(config).

    Bad input, an unknown flag too, and a reader that has gone: see `in_one_line`. A full disk: one
    line and 1. A run that is stopped: one line and its exit code.
    """
    quiet()
    parser = parser_of(config_class, **about)
    parser.error = lambda message: require(False, message)
    who = parser.prog
    if "RANK" in os.environ:
        who = f"{parser.prog} (rank {os.environ['RANK']})"
    try:
        with in_one_line(who):
            main(parse(parser, config_class, sys.argv[1:] if argv is None else argv))
    except Stopped as e:
        code, line = e.args
        if os.environ.get("RANK", "0") == "0":  # all ranks stop, one says so
            print(f"{parser.prog}: {line}", file=sys.stderr)
        sys.exit(code)
    except (OSError, SafetensorError) as e:
        full = disk_is_full(e)
        if not full:
            raise
        advice = "What was whole still is: make room, then go on (training: --resume)"
        print(f"{who}: {full}. {advice}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def subcommand(commands, script, description):
    """Run the one of `commands` {name: (function, its config class)} that the command line names.

    For a script that has several.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(description)
        sys.exit(0)
    if name not in commands:
        there = " and ".join(commands)
        near = did_you_mean(name, commands)
        print(f"{script}: {name!r} is no command: there are {there}{near}", file=sys.stderr)
        sys.exit(2)
    function, config_class = commands[name]
    run(function, config_class, sys.argv[2:], prog=f"{script} {name}", description=description)
