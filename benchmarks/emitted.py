"""How fast emitted programs run, against the original and against code written by hand.

    .venv/bin/python -m benchmarks.emitted                     both tables
    .venv/bin/python -m benchmarks.emitted overhead gpt2 t5    one rank, these models
    .venv/bin/python -m benchmarks.emitted handwritten tp2     ranks, these forms
    .venv/bin/python -m benchmarks.emitted lines bert          how long the programs are

`overhead`: training steps (forward, backward, AdamW) of the one-rank program and of the original, turn
about in one process of one thread. `handwritten`: the same with the program of a plan for several ranks and
the original made parallel by hand (`benchmarks/by_hand.py`), turn about on the same gloo ranks; processor
time is that of all ranks, wall time of the slowest.

A cell is the median over rounds. The ratio is the median of the ratios within a round, so what else the
machine does at the time counts for both sides; below 1 the program is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import loss_parallel

import autopar
from autopar import models
from autopar.models import ModelSpec
from autopar.plan import Parallelism
from benchmarks.by_hand import FORMS, parallelized
from benchmarks.emitted_lines import table

ROUNDS = 9
WARM_UP = 2
BATCH = 2
SEQ_LEN = 128

_TEXT = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_DECODER = {
    **_TEXT, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
CONFIGS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {
            **_TEXT, "n_embd": 512, "n_layer": 4, "n_head": 8, "attn_pdrop": 0, "embd_pdrop": 0,
            "resid_pdrop": 0,
        },
    ),
    "llama": ("LlamaForCausalLM", _DECODER),
    "bert": (
        "BertForMaskedLM",
        {
            **_TEXT, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
            "intermediate_size": 2048, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            **_TEXT, "d_model": 512, "d_ff": 1024, "num_layers": 3, "num_heads": 8, "dropout_rate": 0,
            "decoder_start_token_id": 2,
        },
    ),
    "resnet": ("ResNetForImageClassification", {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512],
                                                "layer_type": "basic", "num_labels": 100}),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, "num_local_experts": 8, "intermediate_size": 704}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            **_DECODER, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 704,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_DECODER, "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_group": 2, "topk_group": 1, "moe_intermediate_size": 704, "first_k_dense_replace": 1,
            "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048,
            "image_size": 176, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "num_labels": 100,
        },
    ),
    "mamba": ("MambaForCausalLM", {**_TEXT, "hidden_size": 256, "num_hidden_layers": 2}),
}  # fmt: skip
"""Class and configuration of the models: a step takes 0.2 to 1 s on one thread."""


@dataclass(frozen=True)
class Paired:
    """Steps of the program and of its rival: processor and wall seconds of each, by round."""

    program_cpu_s: list[float]
    rival_cpu_s: list[float]
    program_s: list[float]
    rival_s: list[float]

    def row(self) -> str:
        """The cells of a table."""
        cells = [f"{1e3 * median(each):.0f}" for each in (self.rival_cpu_s, self.program_cpu_s)]
        cells += [f"{_ratio(self.program_cpu_s, self.rival_cpu_s):.3f}"]
        cells += [f"{1e3 * median(each):.0f}" for each in (self.rival_s, self.program_s)]
        return " | ".join([*cells, f"{_ratio(self.program_s, self.rival_s):.3f}"])


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def paired(program: Callable[[], object], rival: Callable[[], object], rounds: int) -> Paired:
    """Time both, in turn. A round is program, rival, rival, program: a step after one of the same side finds
    its tensors in the caches, and so each side has one of either kind."""
    took: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(-WARM_UP, rounds):
        spent = {True: (0.0, 0.0), False: (0.0, 0.0)}
        for is_ours in (True, False, False, True):
            if dist.is_initialized():
                dist.barrier()
            began, cpu_began = time.perf_counter(), time.process_time()
            (program if is_ours else rival)()
            cpu_s, wall_s = spent[is_ours]
            cpu_s += (time.process_time() - cpu_began) / 2
            spent[is_ours] = cpu_s, wall_s + (time.perf_counter() - began) / 2
        if number >= 0:
            for is_ours, seconds in spent.items():
                took[is_ours].append(seconds)
    ours, theirs = zip(*took[True], strict=True), zip(*took[False], strict=True)
    (program_cpu_s, program_s), (rival_cpu_s, rival_s) = map(list, ours), map(list, theirs)
    return Paired(list(program_cpu_s), list(rival_cpu_s), list(program_s), list(rival_s))


def spec_of(name: str) -> ModelSpec:
    """The model of a row, in single precision."""
    architecture, settings = CONFIGS[name]
    config_class = getattr(importlib.import_module("transformers"), architecture).config_class
    config = config_class(**settings)
    config.architectures = [architecture]
    length = SEQ_LEN if "vocab_size" in settings else None
    return models.from_hugging_face_config(config, name, seq_len=length, dtype=torch.float32)


@contextmanager
def imported(directory: Path) -> Iterator[ModuleType]:
    """`train.py` of a saved program."""
    sys.path.insert(0, str(directory))
    try:
        yield importlib.import_module("train")
    finally:
        sys.path.remove(str(directory))
        for name in ("train", "model", "autopar_runtime"):
            sys.modules.pop(name, None)


def step_of_program(
    train: ModuleType, weights: Mapping[str, Tensor], batch: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """A training step of this rank of a program."""
    rank = train.build(torch.device("cpu"), weights)
    optimizer = train.OPTIMIZER(dict.fromkeys(rank.parameters().values()), lr=1e-4)

    def step() -> Tensor:
        loss: Tensor = train.forward_backward(rank, batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def step_of_module(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The same step of a module."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def overhead(name: str, rounds: int) -> Paired:
    """The one-rank program of a model against the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = spec_of(name)
    model = spec.build()
    plan = autopar.evaluate(spec, "local-cpu", parallelism=Parallelism(microbatch_size=BATCH))
    batch = dict(spec.inputs(BATCH))
    weights = {key: each.clone() for key, each in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder, imported(autopar.compile(spec, plan).save(folder)) as train:
        dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        program, original = step_of_program(train, weights, batch), step_of_module(model, batch)
        torch.testing.assert_close(program(), original(), rtol=1e-4, atol=1e-5)
        return paired(program, original, rounds)


def step_by_hand(
    form: Mapping[str, object], model: nn.Module, batch: Mapping[str, Tensor]
) -> Callable[[], Tensor]:
    """The same step of the model made parallel by hand."""
    module, loss_of = parallelized(model.train(), form)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> Tensor:
        with loss_parallel() if "tp" in form else nullcontext():
            loss = loss_of(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def rank_of_handwritten(directory: Path, name: str, rounds: int) -> None:
    """One rank of the comparison; the first one writes what all of them took beside the program."""
    form, spec = FORMS[name], spec_of("llama")
    batch = dict(spec.inputs(BATCH))
    with imported(directory) as train:
        importlib.import_module("autopar_runtime").start()
        torch.manual_seed(0)
        model = spec.build()
        weights = {key: each.clone() for key, each in model.state_dict().items()}
        program, by_hand = step_of_program(train, weights, batch), step_by_hand(form, model, batch)
        ours, theirs = program(), by_hand()
        torch.testing.assert_close(
            ours, getattr(theirs, "full_tensor", lambda: theirs)(), rtol=1e-4, atol=1e-5
        )
        mine = paired(program, by_hand, rounds)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, asdict(mine))
    if dist.get_rank() == 0:
        total = {
            key: [
                (sum if "cpu" in key else max)(each)
                for each in zip(*(one[key] for one in found), strict=True)
            ]
            for key in found[0]
        }
        (directory / "paired.json").write_text(json.dumps(total))
    dist.destroy_process_group()


def handwritten(name: str, rounds: int) -> Paired:
    """The program of a form against the same by hand."""
    parallelism = Parallelism.model_validate({"microbatch_size": BATCH, **FORMS[name]})
    num_ranks, spec = parallelism.world_size, spec_of("llama")
    plan = autopar.evaluate(spec, f"local-cpu*{num_ranks}", parallelism=parallelism)
    with tempfile.TemporaryDirectory() as folder:
        directory = autopar.compile(spec, plan).save(folder)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(num_ranks),
        ]
        command += ["-m", "benchmarks.emitted", "rank", str(directory), name, "--rounds", str(rounds)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return Paired(**json.loads((directory / "paired.json").read_text()))


MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Memory that is freed stays with the process: else one side, by chance, gets pages anew at every step."""


def apart(kind: str, name: str, rounds: int) -> str:
    """The row of a model or a form, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.emitted", "row", kind, name, "--rounds", str(rounds)]
    environment = {**os.environ, **MEMORY, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout.splitlines()[-1]


KINDS: Mapping[str, tuple[Callable[[str, int], Paired], Mapping[str, object], str]] = {
    "overhead": (overhead, CONFIGS, "original"),
    "handwritten": (handwritten, FORMS, "by hand"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="overhead, handwritten or lines, then names of rows")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    match options.what:
        case ["rank", directory, name]:
            return rank_of_handwritten(Path(directory), name, options.rounds)
        case ["row", kind, name]:
            return print(KINDS[kind][0](name, options.rounds).row())
        case ["lines", *names]:
            return print(table(names))
        case [kind, *names] if kind in KINDS:
            wanted = {kind: names or list(KINDS[kind][1])}
        case []:
            wanted = {kind: list(rows) for kind, (_, rows, _) in KINDS.items()}
        case _:
            parser.error(f"{options.what[0]!r} is neither {' nor '.join(KINDS)}")
    for kind, names in wanted.items():
        rival = KINDS[kind][2]
        print(f"\n| {kind} | {rival}, CPU ms | program | ratio | {rival}, wall ms | program | ratio |")
        print("| --- |" + " ---: |" * 6)
        for name in names:
            print(f"| {name} | {apart(kind, name, options.rounds)} |", flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, torch {torch.__version__}")


if __name__ == "__main__":
    main()
