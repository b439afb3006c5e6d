"""From a dataclass to a command line: a field a flag, in groups, with the defaults that hold."""

import argparse
import types
from dataclasses import MISSING, field, fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

from runtime.settings import flag


def option(default, help, group="settings"):
    """A config's field: default, help text of its flag (`lr_student` is --lr-student), group."""
    return field(default=default, metadata={"help": help, "group": group})


def words(help, metavar, group="settings"):
    """A config's field of the words that stand without a flag: a list."""
    return field(default=(), metadata={"help": help, "metavar": metavar, "group": group})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, each flag's default, and whether that is the paper's.

    A help text that ends with "; default: ..." says what holds where nothing is set.
    """

    def _get_help_string(self, action):
        text, _, otherwise = action.help.partition("; default: ")
        if action.default is argparse.SUPPRESS:
            return text
        value = otherwise if action.default is None else "%(default)s"
        paper = getattr(action, "paper", None)  # (the paper's value,)
        if not paper:
            return f"{text} (default: {value})"
        if paper[0] == action.default:
            return f"{text} (default: {value}, as the paper)"
        said = "none" if paper[0] is None else paper[0]
        return f"{text} (default: {value}; the paper: {said})"


# In this order where there are any, whichever class they come from.
GROUPS = (
    *("what to distil", "what to make", "what to score", "how to score"),
    *("the method", "training", "memory", "output"),
)


def parser_of(config_class, **about):
    """An ArgumentParser with a flag for each field that was made with `option`.

    config_class.PAPER {field: value} is what the paper has.
    """
    about = {"usage": "%(prog)s [flags]", **about}
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=Help, **about)
    hints = get_type_hints(config_class)
    paper = getattr(config_class, "PAPER", {})
    titles = {f.metadata["group"] for f in fields(config_class)}
    known = [title for title in GROUPS if title in titles]
    groups = {title: parser.add_argument_group(title) for title in known}
    for f in fields(config_class):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        assert f.default is not MISSING, f"{f.name} has no default"
        how = {"default": f.default, "help": f.metadata["help"].replace("%", "%%")}
        if "metavar" in f.metadata:
            how |= {"default": argparse.SUPPRESS, "metavar": f.metadata["metavar"]}
            groups[title].add_argument(f.name, nargs="*", **how)
            continue
        action = groups[title].add_argument(
            flag(f.name), dest=f.name, **how, **typed(hints[f.name])
        )
        if f.name in paper:
            action.paper = (paper[f.name],)
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
