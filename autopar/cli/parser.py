"""The arguments of every command, and help that teaches by example."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from autopar.cli.pin_options import add_pins
from autopar.cli.words import count, names, positive_float, positive_int
from autopar.plan import MESH_AXES, Offload, RecomputeMode
from costmodel import SCHEDULES, optimizer_policies, software_eras

COMMANDS = ("plan", "explain", "evaluate", "compile", "launch", "verify", "hardware", "calibrate")

_DESCRIPTION = """\
Finds the fastest way to train a PyTorch model on a cluster, says why, and writes the parallel program."""

_EXAMPLES = """\
examples:
  autopar hardware                                        what machines are known
  autopar plan llama3-8b 'dgx-h100*8' --global-batch 512 -o plan.json
  autopar explain plan.json --tokens 1e12                 why this plan, and how long a training takes
  autopar evaluate llama3-8b 'dgx-h100*8' --global-batch 512 --tp 8 --pp 2 --zero-stage 1
  autopar compile llama3-8b plan.json -o program          model.py, train.py and what they need
  autopar launch plan.json --target slurm -o program      the script that starts them
  autopar verify program                                  is it the same mathematics as the original?
  autopar calibrate -o profile.json                       what this machine really does

MODEL is a built-in name (llama3-8b), a Hugging Face config.json or its directory, or FILE.py:FUNCTION
where the function returns a module, or a module and its inputs. CLUSTER is NODE*COUNT ('dgx-h100*16'), a
named cluster, or a YAML or JSON file. `autopar COMMAND --help` tells the rest.
"""


def check_command(words: Sequence[str]) -> None:
    """Exit with code 2 and a suggestion when the first word is no command."""
    if not words or words[0].startswith("-") or words[0] in COMMANDS:
        return
    close = difflib.get_close_matches(words[0], COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    print(
        f"autopar: error: unknown command {words[0]!r}{hint} (commands: {', '.join(COMMANDS)})",
        file=sys.stderr,
    )
    raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; a parsed command has `run`, the name of its function."""
    parser = argparse.ArgumentParser(
        prog="autopar",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _plan(commands)
    _explain(commands)
    _evaluate(commands)
    _compile(commands)
    _launch(commands)
    _verify(commands)
    _hardware(commands)
    _calibrate(commands)
    return parser


Subparsers = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def _add(
    commands: Subparsers[argparse.ArgumentParser], name: str, summary: str, epilog: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=name.replace("compile", "compile_program"))
    return command


def _plan(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "plan",
        "find the fastest plan and explain it",
        """\
examples:
  autopar plan llama3-8b 'dgx-h100*8' --global-batch 512 -o plan.json
  autopar plan gpt3-175b 'dgx-a100*128' --global-batch 1536 --pp 8 --tokens 300e9
  autopar plan llama3-8b 'dgx-h100*8' --global-batch 512 --mesh 8x8 --forbid zero-stage=3
  autopar plan llama3-8b 'dgx-h100*8' --global-batch 512 --pins pins.yaml --pin 'lm_head:tp=Shard(0)'
  autopar plan my_model.py:build my-lab.yaml --global-batch 64 --format json

A PATH is that of a module, where * stands for anything but a dot, ** for anything, [0-3,8] for numbers.

Exit code 1 when nothing fits; the message names the limit and what would help.
""",
    )
    _workload(command)
    add_pins(command)
    command.add_argument(
        "--time-limit", type=positive_float, metavar="SECONDS", help="stop searching after this time"
    )
    command.add_argument("-o", "--output", type=Path, metavar="PLAN.json", help="also save the plan here")
    _force(command)
    _report(command, "json prints the plan itself")
    _quiet(command)


def _explain(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "explain",
        "explain a saved plan",
        "example:\n  autopar explain plan.json --tokens 1e12\n",
    )
    command.add_argument("plan", type=Path, metavar="PLAN.json")
    _report(command, "json prints every figure of the report")


def _evaluate(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "evaluate",
        "price a parallelism of your own, or compare with measured runs",
        """\
examples:
  autopar evaluate llama3-8b 'dgx-h100*8' --global-batch 512 --zero-stage 3
  autopar evaluate gpt3-175b 'dgx-a100*128' --global-batch 1536 --tp 8 --pp 16 --recompute full
  autopar evaluate llama3-8b dgx-a100 --global-batch 64 --tp 2 --pp 2 --axis-order dp_replicate,pp,tp
  autopar evaluate llama3-8b dgx-a100 --global-batch 64 --zero-stage 2 --offload optimizer
  autopar evaluate --records runs.json --worst 20           how well measured runs are predicted

Replicas (dp) default to the devices that the other degrees leave. Exit code 1 when it does not fit.
""",
    )
    _workload(command, required=False)
    _records(command)
    degrees = command.add_argument_group("parallelism")
    _parallelism(degrees)
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT.json", help="also save the plan, or the accuracy, here"
    )
    _force(command)
    _report(command, "json prints the plan itself")
    _quiet(command)


def _compile(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "compile",
        "write the parallel program of a plan",
        """\
examples:
  autopar compile llama3-8b plan.json -o program
  autopar compile my_model.py:build 'local-cpu*4' --global-batch 16 -o program

Prints the paths of the files. The program needs torch and nothing else; start it with torchrun.
""",
    )
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "plan_or_cluster", metavar="PLAN.json|CLUSTER", help="a saved plan, or where to plan for"
    )
    command.add_argument(
        "--global-batch", type=positive_int, metavar="N", help="samples of a step; with a CLUSTER only"
    )
    command.add_argument("--seq-len", type=positive_int, metavar="N", help="tokens of a sample")
    command.add_argument("-o", "--output", type=Path, metavar="DIR", required=True)
    _force(command)
    _quiet(command)


def _launch(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "launch",
        "write the files that start a program on a cluster",
        """\
examples:
  autopar launch plan.json                                  print launch.sh
  autopar launch plan.json --target slurm -o program        write program/job.sbatch
  autopar launch plan.json --target slurm --time-limit 86400 --scheduler-option=--partition=train
""",
    )
    command.add_argument("plan", type=Path, metavar="PLAN.json")
    command.add_argument("--target", default="torchrun", help="torchrun or slurm (default: torchrun)")
    command.add_argument(
        "--time-limit", type=positive_int, metavar="SECONDS", help="wall-clock limit of the job"
    )
    command.add_argument(
        "--scheduler-option", action="append", default=[], metavar="OPTION", help="may be repeated"
    )
    command.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="write the files here, print their paths"
    )
    _force(command)


def _verify(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "verify",
        "run a program against the original model on this machine",
        """\
examples:
  autopar verify program                         the program in a directory
  autopar verify llama3-8b --ranks 4             a small sibling of a model, planned for local processes

Compares loss, every gradient, and parameters after three optimizer steps. What is too large for this machine
is replaced by a narrow sibling with every degree of parallelism cut to 2. Exit code 1 when they differ.
""",
    )
    command.add_argument("target", metavar="DIR|MODEL")
    command.add_argument(
        "--model", metavar="MODEL", help="the original of DIR (default: the one its plan names)"
    )
    command.add_argument("--ranks", type=positive_int, default=4, metavar="N", help="at most (default: 4)")
    _quiet(command)


def _hardware(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "hardware",
        "list the machines that are known, or show one with its sources",
        """\
examples:
  autopar hardware
  autopar hardware h100
  autopar hardware 'dgx-h100*16'
  autopar hardware my-lab.yaml --format json
""",
    )
    command.add_argument(
        "id", nargs="?", metavar="ID", help="an accelerator, a node, a cluster, or a cluster file"
    )
    _format(command, "json prints the records")


def _calibrate(commands: Subparsers[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "calibrate",
        "measure this machine, for a cluster file to name",
        """\
examples:
  autopar calibrate -o profile.json
  autopar calibrate --device cpu --dtypes fp32 --quick
  torchrun --nproc-per-node=8 -m autopar calibrate -o profile.json      the links between the ranks, too

A cluster file with the line `profile: profile.json` has the measured rates in place of the published ones.
""",
    )
    command.add_argument("--device", metavar="cuda|cpu", help="default: cuda where torch sees any, else cpu")
    command.add_argument(
        "--dtypes",
        type=names,
        default=(),
        metavar="bf16,fp32",
        help="of bf16, fp16, fp32, fp64; the main one first",
    )
    command.add_argument(
        "--accelerator", metavar="ID", help="what it is called here, where its reported name is unknown"
    )
    command.add_argument("--quick", action="store_true", help="one size of everything, in seconds")
    command.add_argument(
        "--max-seconds",
        type=positive_float,
        default=60.0,
        metavar="N",
        help="begin no further size after this time (default: 60)",
    )
    command.add_argument(
        "-o", "--output", type=Path, metavar="PROFILE.json", help="write it here instead of to stdout"
    )
    _force(command)
    _quiet(command)


def _workload(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    words = None if required else "?"
    command.add_argument("model", metavar="MODEL", nargs=words)
    command.add_argument("cluster", metavar="CLUSTER", nargs=words)
    command.add_argument(
        "--global-batch", type=positive_int, required=required, metavar="N", help="samples of one step"
    )
    command.add_argument("--seq-len", type=positive_int, metavar="N", help="tokens of a sample")
    command.add_argument(
        "--software",
        metavar="ERA",
        help=f"what runs there: {', '.join(software_eras())} (default: the program's)",
    )
    command.add_argument(
        "--policy",
        metavar="NAME",
        help=f"what the optimizer keeps: {', '.join(optimizer_policies())} (default: AdamW's, in the model's "
        "precision)",
    )
    command.add_argument(
        "--precision", choices=("fp8", "fp4"), help="of products in repeated blocks (default: the model's)"
    )
    command.add_argument(
        "--memory-gb", type=positive_float, metavar="GB", help="of each device to be used (default: all)"
    )


def _records(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("measured runs (instead of MODEL and CLUSTER)")
    group.add_argument(
        "--records", type=Path, metavar="FILE", help="predict every run of this file and show the errors"
    )
    group.add_argument("--tiers", type=names, default=("A", "B"), metavar="A,B", help="default: A,B")
    group.add_argument(
        "--group", action="append", default=[], metavar="NAME", help="this group only; may be repeated"
    )
    group.add_argument("--worst", type=count, default=10, metavar="N", help="rows to name (default: 10)")


def _parallelism(group: argparse._ArgumentGroup) -> None:
    degrees = {
        "dp": "data-parallel replicas",
        "tp": "tensor parallel",
        "pp": "pipeline stages",
        "cp": "context parallel",
        "ep": "expert parallel",
    }
    for name, meaning in degrees.items():
        default = None if name == "dp" else 1
        group.add_argument(f"--{name}", type=positive_int, default=default, metavar="N", help=meaning)
    sharding = "replicas among which ZeRO shards (default: all)"
    group.add_argument("--dp-shard", type=positive_int, metavar="N", help=sharding)
    group.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        help="split the sequence between the products of a tensor axis (default: on)",
    )
    group.add_argument("--zero-stage", type=int, choices=range(4), default=0, help="what ZeRO shards")
    group.add_argument(
        "--microbatch-size", type=positive_int, default=1, metavar="N", help="samples of a replica"
    )
    group.add_argument("--recompute", choices=get_args(RecomputeMode), default="none")
    group.add_argument("--schedule", choices=SCHEDULES, help="of the pipeline")
    group.add_argument("--num-virtual-stages", type=positive_int, metavar="N", help="on each pipeline rank")
    group.add_argument("--offload", choices=get_args(Offload), default="none", help="what the host keeps")
    group.add_argument(
        "--axis-order",
        type=names,
        metavar="AXES",
        help=f"axes of the mesh, outermost first (default: {','.join(MESH_AXES)})",
    )


def _report(command: argparse.ArgumentParser, json_help: str) -> None:
    command.add_argument(
        "--tokens", type=positive_float, metavar="N", help="a budget, to tell the training time"
    )
    _format(command, json_help)


def _format(command: argparse.ArgumentParser, json_help: str) -> None:
    command.add_argument(
        "--format", choices=("text", "json"), default="text", help=f"default: text; {json_help}"
    )


def _force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="overwrite what -o names")


def _quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("-q", "--quiet", action="store_true", help="no log and no progress on stderr")
