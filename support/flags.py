"""From a command line to knobs. Refuses flags that would do nothing."""

from dataclasses import replace

import tyro

from own_data import is_array, is_own
from support import UserError, checkpoint

# Knobs of the network, which --weights brings along
NETWORK = "model", "hidden_channels", "kernel_size", "patch_size", "head_channels", "max_motion"
NETWORK += ("equivariant",)
# Those that a model does not use
UNUSED = {"paper": ("max_motion",), "convlstm": ("head_channels", "max_motion", "equivariant")}
UNUSED["plain"] = (*UNUSED["paper"], "weight_decay")
UNUSED["seq2seq"] = ("hidden_channels", "kernel_size", "patch_size", *UNUSED["convlstm"])


def parse(arguments, Knobs, recipes):
    """The knobs of a command line. A flag wins over recipes, these over Knobs; weights fix the network."""
    without_help = [word for word in arguments if word not in ("-h", "--help")]
    given = tyro.cli(Knobs, args=without_help, use_underscores=True)
    saved = checkpoint.load(given.weights)["knobs"] if given.weights else {}
    names = (*NETWORK, "frames_in", "frames_out", "video") if given.eval_only else NETWORK
    brought = {name: saved[name] for name in names if name in saved}
    model = brought.get("model", given.model)
    recipe = recipes.get(model, {})
    if is_own(given.data):
        unused = UNUSED.get(model, ())
        recipe = recipe | {name: value for name, value in recipes["own data"].items() if name not in unused}
    default = replace(Knobs(), data=given.data, **{"model": model, **recipe, **brought})
    knobs = tyro.cli(Knobs, args=arguments, default=default, use_underscores=True)
    for name in vars(knobs):
        if getattr(knobs, name) != getattr(default, name):
            check_change(name, knobs, default)
    return knobs


def check_change(name, knobs, default):
    """Refuse a flag that would do nothing, or that the weights do not allow. Raises UserError."""
    if name in UNUSED.get(knobs.model, ()):
        raise UserError(f"{knobs.model} does not use {name}; leave it out")
    if name in NETWORK and knobs.weights:
        then, now = getattr(default, name), getattr(knobs, name)
        raise UserError(f"{knobs.weights} has {name} {then}, not {now}; leave out --{name}")
    if name == "value_range" and (knobs.eval_only or not is_own(knobs.data)):
        raise UserError("value_range is for training on data of your own; leave it out")
    if name == "video" and is_array(knobs.data):
        raise UserError(f"video is for data that are videos, and data is {knobs.data}; leave out --video")
