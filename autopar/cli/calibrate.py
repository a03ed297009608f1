"""`autopar calibrate`: measure this machine, and write the profile that a cluster file may name."""

from __future__ import annotations

import argparse
import os
import sys

from autopar.calibrate import calibrate
from autopar.cli.output import check_new, log, progress, write_new
from autopar.report import units
from autopar.report.table import table
from hardware_db import Profile
from hardware_db.catalog import accelerators, names_of
from hardware_db.errors import did_you_mean


def calibrate_machine(options: argparse.Namespace) -> None:
    """Measure, and print the profile or save it where `--output` says; under torchrun rank 0 alone speaks."""
    speaks = os.environ.get("RANK", "0") == "0"
    quiet = options.quiet or not speaks
    check_new(options.output, force=options.force)
    with progress(quiet=quiet) as on_progress:
        profile = calibrate(
            options.device,
            options.dtypes,
            accelerator=options.accelerator,
            quick=options.quick,
            max_seconds=options.max_seconds,
            progress=on_progress,
        )
    log(_summary(profile), quiet=quiet)
    if not speaks:
        return
    if options.output is None:
        sys.stdout.write(profile.to_json())
    else:
        write_new(options.output, profile.to_json(), force=options.force)
        log(f"saved {options.output}; name it in a cluster file as `profile:`", quiet=quiet)


def _summary(profile: Profile) -> str:
    """The figures that count most, and whose they are."""
    rows = [("memory", units.bytes_per_s(profile.bytes_per_s))]
    rows += [(f"matmul {dtype}", units.flops_per_s(rate)) for dtype, rate in profile.peak_flops_per_s.items()]
    if (attention := profile.best_attention) is not None:
        rows.append((f"attention {attention.dtype}", units.flops_per_s(attention.forward_flops_per_s)))
    rows.append(("small op", units.seconds(profile.launch_overhead.per_kernel_s)))
    for link in profile.links:
        rate, latency = units.bytes_per_s(link.bandwidth_bytes_per_s), units.seconds(link.latency_s)
        rows.append((f"{link.world_size} ranks, {link.stride} apart", f"{rate}, {latency} a step"))
    return "\n".join([f"measured {profile.device} ({_known_as(profile)})", *table(rows)])


def _known_as(profile: Profile) -> str:
    if profile.accelerator is not None:
        return profile.accelerator
    known = names_of(accelerators(), "accelerator")
    guess = did_you_mean(profile.device.lower().replace(" ", "-"), known)
    return f"not in the catalog{guess}" + ("; name it with --accelerator ID" if profile.kind != "cpu" else "")
