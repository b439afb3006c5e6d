"""How a script is run: its command line, its mistakes in one line, its exit codes.
"""

import argparse
import errno
import os
import sys
import warnings

import diffusers
import torch.distributed as dist
import transformers
from safetensors import SafetensorError

from runtime.settings import BadInput, did_you_mean, require


class Stopped(Exception):
    """All ranks end a run before its time. args: the exit code, and the line that rank 0 prints."""


def quiet():
    """For a process whose stderr is its own, as a script's is: of transformers and diffusers only
    errors, and no progress bars."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Nothing here works in place on what a sharded module returns. Student and fake score are two
    # adapters on one network on purpose.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")


def no_such(unknown, parser):
    """A sentence about command-line arguments that the parser does not know."""
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return f"{unknown[0]}: no such argument, all are flags"
    known = [name for name in parser._option_string_actions if "_" not in name]
    return f"{flags[0]}: no such flag{did_you_mean(flags[0].replace('_', '-'), known)}"


def run(main, config_class, argv=None, **about):
    """Parse the command line and call main(config). Bad input, an unknown flag too: one line on stderr, exit code 2. A full disk: one
    line and 1. A run that is stopped: one line and its exit code. config_class.DIGITS are its defaults with --model digits."""
    quiet()
    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False, formatter_class=type(
        "Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}), **about)
    parser.error = lambda message: require(False, message)
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    try:
        asked = [a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")]  # help shows the defaults that hold
        if getattr(parser.parse_known_args(asked)[0], "model", None) == "digits":
            parser.set_defaults(**getattr(config_class, "DIGITS", {}))
        settings, unknown = parser.parse_known_args(argv)
        if unknown:
            raise BadInput(no_such(unknown, parser))
        main(config_class(**vars(settings)))
    except BadInput as e:
        print(f"{parser.prog}{rank}: {e}", file=sys.stderr)
        sys.exit(2)
    except Stopped as e:
        code, line = e.args
        print(f"{parser.prog}: {line}\n" * (os.environ.get("RANK", "0") == "0"), end="", file=sys.stderr)
        sys.exit(code)
    except (OSError, SafetensorError) as e:
        full = [m for m in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) if m in str(e)]  # safetensors' has no errno
        if not full:
            raise
        print(f"{parser.prog}{rank}: {full[0]}. What was whole still is: make room, then go on (training: --resume)", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
