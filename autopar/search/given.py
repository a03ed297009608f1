"""The programs of parallelisms that a person gives: made once for a model, priced on any cluster.

Nothing here depends on prices. Strategies on the tensor axis are a person's (`autopar.search.pinned`), chosen
once for a degree and carried over to every microbatch size, since they name dimensions and not sizes. What is
left for a cluster is arithmetic, so thousands of parallelisms can be priced a second.
"""

from __future__ import annotations

from typing import NamedTuple

from autopar.errors import InvalidParallelismError
from autopar.kernels import KernelMaker
from autopar.localize import Localized, localize
from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.experts import deal_out_experts
from autopar.search.pinned import Degrees, PinnedStrategies
from autopar.search.replicas import Replica, make_replica
from autopar.search.shallow import Shallow
from autopar.search.units import Chain, build_chain
from costmodel import Software


class _Form(NamedTuple):
    """What the kernels of a chain depend on."""

    microbatch_size: int
    degrees: Degrees
    ep: int
    kernels: tuple[object, ...]
    low_precision: str | None


class GivenPrograms:
    """The unpriced chains of one model.

    Each replica computes on its own samples, so one stands for all: the data axes show in the traffic of
    parameters only.
    """

    def __init__(self, model: Shallow) -> None:
        self.model = model
        self.blocks = tuple(block.path for block in model.capture.graph.blocks)
        self.pinned = PinnedStrategies(model.counts)
        self._replicas: dict[tuple[int, int], Replica] = {}
        self._locals: dict[tuple[int, Degrees], tuple[Replica, Localized]] = {}
        self._chains: dict[_Form, Chain] = {}

    def chain(self, p: Parallelism, era: Software, low_precision: str | None = None) -> Chain:
        """The chain of a parallelism under an era's kernels, without prices."""
        degrees = Degrees.of(p.microbatch_size, 1, p.cp, p.tp, p.sequence_parallel is not False)
        form = _Form(
            p.microbatch_size,
            degrees,
            p.ep,
            (*era.kinds, era.attention_backward_share, era.fragmentation),
            low_precision,
        )
        if form not in self._chains:
            self._chains[form] = self._made(form, era)
        return self._chains[form]

    def _made(self, form: _Form, era: Software) -> Chain:
        replica, local = self._local(form.microbatch_size, form.degrees)
        sizes = {"tp": form.degrees.tp, "cp": form.degrees.cp, "ep": form.ep}
        maker = KernelMaker(era, sizes, form.low_precision, self.blocks)
        chain = build_chain(replica.whole, local, maker, self.model.repeats)
        return chain if form.ep == 1 else deal_out_experts(chain, local.graph, form.ep)

    def _local(self, microbatch_size: int, degrees: Degrees) -> tuple[Replica, Localized]:
        key = (microbatch_size, degrees)
        if key not in self._locals:
            replica = self._replica(microbatch_size, degrees.cp)
            local = replica.local
            if degrees.tp > 1:
                reference = self._replica(degrees.batch, degrees.cp).local.graph
                local = localize(local, self.pinned.solution(reference, degrees).assignment)
            self._locals[key] = replica, local
        return self._locals[key]

    def _replica(self, microbatch_size: int, cp: int) -> Replica:
        key = (microbatch_size, cp)
        if key not in self._replicas:
            self._replicas[key] = make_replica(self.model.capture.at(microbatch_size), None, cp)
        return self._replicas[key]


def evaluate_given(
    programs: GivenPrograms, evaluator: Evaluator, p: Parallelism, low_precision: str | None = None
) -> Evaluated:
    """The price of a parallelism, its blocks dealt out evenly. Raises as `even_cuts`."""
    chain = programs.chain(p, evaluator.era, low_precision)
    cuts = even_cuts(chain, p.pp * p.num_virtual_stages)
    return evaluator.evaluate(evaluator.priced(chain, p), p, cuts)


def even_cuts(chain: Chain, num_stages: int) -> tuple[int, ...]:
    """The units that begin the stages when blocks are dealt out evenly, as trainers do without a planner.

    What comes before the blocks goes with the first, what comes after with the last. Where the blocks do not
    divide but would together with these two, the first and the last stage have a block less. With fewer
    blocks than stages all units are dealt out.

    Raises InvalidParallelismError for more stages than units.
    """
    units = range(len(chain.units))
    pieces = [index for index in units if chain.units[index].is_block]
    if num_stages > len(pieces):
        pieces = [*units]
    if num_stages > len(pieces):
        raise InvalidParallelismError(
            f"{num_stages} pipeline stages are more than the {len(pieces)} pieces that the model can be cut "
            "into; use fewer"
        )
    extra = 1 if len(pieces) % num_stages and (len(pieces) + 2) % num_stages == 0 else 0
    total = len(pieces) + 2 * extra
    # The first piece is always the first stage's.
    starts = (max(1, stage * total // num_stages - extra) for stage in range(1, num_stages))
    return (0, *(pieces[start] for start in starts))
