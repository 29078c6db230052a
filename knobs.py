"""From a dataclass of knobs to a command line: each field is a flag, with its limits and its line in --help."""

import argparse
import dataclasses


def knob(default, text, at_least=None, at_most=None, choices=None, group=None, tried=None):
    """A field with what its flag has to say of it.

    at_least, at_most: what is refused beyond; tried: what was really run; group: the heading above this field and
    those that follow.
    """
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower() or "none"
    tried = f"; tried: {tried}" if tried else ""
    text = f"{text} (default: {shown}{tried})"
    facts = {"text": text, "least": at_least, "most": at_most, "choices": choices, "group": group}
    return dataclasses.field(default=default, metadata=facts)


def parse(Knobs, arguments, description=None):
    """The Knobs that the command line asks for; a sentence and exit status 2 for what it cannot mean."""
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [--knob value …]", allow_abbrev=False)
    flags = parser
    for f in dataclasses.fields(Knobs):
        about = f.metadata
        flags = parser.add_argument_group(about["group"]) if about["group"] else flags
        kind = {bool: boolean, tuple[int, ...]: integers}.get(f.type, f.type)
        name = {boolean: "true|false", integers: "N,N,…", int: "N", float: "X", str: "TEXT"}[kind]
        alone = {"nargs": "?", "const": True} if kind is boolean else {}  # --eval_only says that it is true
        default = float(f.default) if kind is float else f.default  # an edited one may be written as 30
        flags.add_argument(f"--{f.name}", type=kind, default=default, help=about["text"], choices=about["choices"],
                           metavar=None if about["choices"] else name, **alone)  # fmt: skip
    knobs = Knobs(**vars(parser.parse_args(arguments)))
    for f in dataclasses.fields(Knobs):
        if problem := wrong(f, getattr(knobs, f.name)):
            parser.error(problem)
    return knobs


def names_under(heading, knobs):
    """The fields of a group."""
    above, names = None, []
    for f in dataclasses.fields(knobs):
        above = f.metadata["group"] or above
        names += [f.name] if above == heading else []
    return names


def wrong(field, value):
    """A sentence on what is wrong with the value of a field of Knobs, or None."""
    about, several = field.metadata, field.type == tuple[int, ...]
    parts = value if isinstance(value, tuple) else (value,)
    kind = int if several else field.type
    if (
        not parts
        or several != isinstance(value, tuple)
        or any(type(part) is not kind for part in parts)
        or (about["choices"] and value not in about["choices"])
    ):
        return f"{field.name} is {value!r}, which it cannot be; python main.py --help says what it can"
    least, most = about["least"], about["most"]
    if all((least is None or p >= least) and (most is None or p <= most) for p in parts):
        return None
    return f"{field.name} is {value}; it must be {f'at least {least}' if most is None else f'from {least} to {most}'}"


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def integers(text):
    return tuple(int(part) for part in text.split(","))
