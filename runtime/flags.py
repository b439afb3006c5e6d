"""From a dataclass to a command line: a field a flag, in groups, with the defaults that hold."""

import argparse
import types
from dataclasses import MISSING, field, fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

from runtime.settings import flag


def option(default, help, group="settings"):
    """A config's field: default, help text of its flag (`lr_student` is --lr-student), group."""
    return field(default=default, metadata={"help": help, "group": group})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and each flag's default.

    A help text that ends with "; default: ..." says what holds where nothing is set.
    """

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        text = action.help.split("; default:")[0]
        if action.default is argparse.SUPPRESS or "%(default)" in text:
            return text
        return f"{text} (default: %(default)s)"


def parser_of(config_class, **about):
    """An ArgumentParser with a flag for each field that was made with `option`."""
    about = {"usage": "%(prog)s [flags]", **about}
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=Help, **about)
    hints = get_type_hints(config_class)
    groups = {}
    for f in fields(config_class):
        title = f.metadata.get("group", "settings")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        assert f.default is not MISSING, f"{f.name} has no default"
        how = {"default": f.default, "help": f.metadata.get("help", "").replace("%", "%%")}
        groups[title].add_argument(flag(f.name), dest=f.name, **how, **typed(hints[f.name]))
    return parser


def typed(hint):
    """add_argument's arguments for a field that is a bool, int, float, str or Literal, or None."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [one for one in get_args(hint) if one is not type(None)]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": hint, "metavar": hint.__name__.upper()}
