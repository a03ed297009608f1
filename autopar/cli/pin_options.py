"""The options that pin or forbid parts of a plan, and the pins that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from autopar.cli.words import positive_int
from autopar.search.pin_values import SETTINGS, choices
from hardware_db.errors import did_you_mean

if TYPE_CHECKING:
    from autopar.search.pins import Pins

_COUNTS = {
    "dp": "data-parallel replicas, such as --dp 8",
    "tp": "tensor parallel, such as --tp 8",
    "pp": "ranks of a pipeline, such as --pp 4; --pp 1 for none",
    "cp": "context parallel, such as --cp 2",
    "ep": "expert parallel, such as --ep 8",
    "dp_shard": "replicas among which ZeRO shards, such as --dp-shard 8",
    "microbatch_size": "samples of a replica at once, such as --microbatch-size 2",
    "num_virtual_stages": "stages of a pipeline rank, such as --num-virtual-stages 2",
}
_CHOICES = {
    "zero_stage": "what ZeRO shards, such as --zero-stage 3",
    "recompute": "what the backward computes again of every block, such as --recompute full",
    "schedule": "of the pipeline, such as --schedule 1F1B",
    "offload": "what the host keeps, such as --offload optimizer",
}


def add_pins(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    settings = command.add_argument_group("settings to keep fixed (what is not pinned is searched)")
    for name, meaning in _COUNTS.items():
        settings.add_argument(_option(name), type=positive_int, metavar="N", help=meaning)
    settings.add_argument(
        "--mesh", metavar="8x8", help="the devices as a mesh, each axis of it for one kind of parallelism"
    )
    for name, meaning in _CHOICES.items():
        values = choices(name)
        settings.add_argument(_option(name), type=type(values[0]), choices=values, help=meaning)
    settings.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        help="split the sequence between the products of a tensor axis, or never do",
    )
    parts = command.add_argument_group("parts to keep fixed, and what may not be (all may be repeated)")
    parts.add_argument(
        "--pins", type=Path, metavar="FILE", help="pins of a YAML or JSON file; options go before it"
    )
    for option, form, meaning in (
        ("--forbid", "SETTING=VALUE", "a value not to use, such as --forbid schedule=GPipe"),
        ("--pin", "PATH:AXIS=PLACEMENT", "how parameters lie, such as --pin 'model.layers.*.mlp.down_proj:"
         "tp=Shard(1)'; also Replicate, a strategy key, and ! before any of them to forbid it; or a setting, "
         "such as --pin tp=8"),
        ("--recompute-module", "PATH=MODE", "what is computed again of some blocks, such as "
         "--recompute-module 'model.layers.[0-3]=full'"),
        ("--cut-before", "PATH", "a module with which a stage begins, such as --cut-before model.layers.16"),
        ("--keep-together", "PATHS", "modules of one stage, such as --keep-together 'model.norm + lm_head'"),
    ):  # fmt: skip
        parts.add_argument(option, action="append", default=[], metavar=form, help=meaning)
    search = command.add_argument_group("search")
    search.add_argument(
        "--space", choices=("programs", "whole"), default="programs",
        help="what is searched: programs, what `autopar compile` can write (default); whole, also what torch "
        "does not run, to be priced and explained",
    )  # fmt: skip
    search.add_argument(
        "--price-pins", action=argparse.BooleanOptionalAction, default=True,
        help="tell what each pin costs, by searching again without it (default: on)",
    )  # fmt: skip


def pins_of(options: argparse.Namespace) -> Pins:
    """The pins of a parsed command. Raises PinConflictError."""
    from autopar.search.pins import Pins

    settings = {name: getattr(options, name) for name in (*SETTINGS, "mesh")}
    forbid: dict[str, list[object]] = {}
    for name, value in _pairs("--forbid", "zero-stage=3", options.forbid):
        forbid.setdefault(name.replace("-", "_"), []).append(_value(value))
    placements: dict[str, dict[str, str]] = {}
    for where, placement in _pairs("--pin", "lm_head:tp=Shard(0)", options.pin):
        path, colon, axis = where.rpartition(":")
        if colon:
            placements.setdefault(path, {})[axis] = placement
        else:
            settings[_setting(where, settings)] = _value(placement)
    return Pins.merged(
        options.pins,
        **settings,
        forbid=forbid,
        placements=placements,
        recompute_modules=dict(_pairs("--recompute-module", "model.layers.0=full", options.recompute_module)),
        cut_before=options.cut_before,
        keep_together=options.keep_together,
    )


def _pairs(option: str, example: str, words: Iterable[str]) -> list[tuple[str, str]]:
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise _malformed(option, word, example)
        found.append((name.strip(), value.strip()))
    return found


def _malformed(option: str, word: str, example: str) -> ValueError:
    from autopar.errors import PinConflictError

    return PinConflictError(f"{option} {word}: expected the form of {option} '{example}'")


def _setting(word: str, known: Mapping[str, object]) -> str:
    """The setting that a word of `--pin` names. Raises PinConflictError for none, and for one that is
    pinned."""
    from autopar.errors import PinConflictError

    name = word.replace("-", "_")
    if name not in known:
        meant = did_you_mean(name, known) or f"; settings are {', '.join(known)}"
        raise PinConflictError(
            f"--pin {word}: no setting, and no PATH:AXIS such as --pin 'lm_head:tp=Shard(0)'{meant}"
        )
    if known[name] is not None:
        raise PinConflictError(f"--pin {word}: is already pinned to {known[name]}; drop either")
    return name


def _value(text: str) -> object:
    """A value as Python knows it: a number, a truth value, or a name."""
    truths = {"true": True, "false": False}
    return int(text) if text.isdigit() else truths.get(text.lower(), text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
