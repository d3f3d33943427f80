"""A call of a sparse op, described once: schema, arguments, checks, and what a fake for torch.compile returns.

Letters: T tokens in a call (all leading dimensions of x taken together), d size of the input, terms as the sum counts
them: neurons h of an FFN, input channels of a linear.

| argument | shape, dtype | meaning |
|---|---|---|
| x | [..., d] | input of the FFN or linear |
| weights | parts of the sum's weights, then of the selector's, of the | see `weights`; their dtype need not be |
|         | compensation's                                             | that of x                              |
| biases | one for each weight of the sum, [rows] or None | added to its product |
| per_term | [terms], float32 | rule threshold: τ_i; rule topk: multipliers m_i |
|          | or [2, terms] | rule threshold, of a selector that sees one of two factors: also those of a second look |
| counters | [2], int64 | incremented by the generated tokens and by the active terms summed over these |
|          | or [3] | (`given`: or None); of two looks, by what is left after each |
| phases | [T], uint8, or None | of each token, see `phase`; None: all are generated. A prompt token is dense and not |
|        |                     | counted; of padding nothing is computed, and the result is the bias alone |
| active | [..., terms], bool | the active set of each token, if it is generated |
| kind | a name of `sums.SUMS` | what is summed |
| formats | names of `weights.FORMATS` | of each weight |
| selector | a name of `selectors.SELECTORS` | what decides |
| rule | `threshold` | term i is inactive iff indicator ≤ τ_i, so a NaN stays active |
|      | `topk` | the `drop` terms of smallest indicator · m_i are inactive, ties by lower index first |
| drop | int, 0 ≤ drop ≤ terms | used by topk; of a threshold, about how many are inactive, for launches |
| activation | a key of `sums.activations.ACTIVATIONS`, "" without one | act |
| compensation | a name of `compensation.COMPENSATIONS`, "" without one | what is added for inactive terms |

A second look is at the terms that the first one leaves: of these, term i is inactive iff |c_i| ≤ τ_i, its coefficient
against the second row. What is left then is the active set.

Of a generated token whose x holds a NaN or an infinity, every term is active: it is computed as in the dense model.
Not so where active sets are given: there they say all.

`sparse` is the op that models run, and `given` where something else than the token decides. `select` is the first half
of `sparse`, for tests and benchmarks, and `given` the second; where a backend sums in another order, an indicator at
its very threshold may fall on its other side. Outputs: y [..., outputs] in the dtype of x, and for `select` the active
sets [..., terms], bool.

Shapes are static and nothing is read back to the host. Arguments that do not fit raise ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from countdown.compensation import COMPENSATIONS, Compensation
from countdown.selectors import SELECTORS, Selector
from countdown.sums import SUMS, Sum
from countdown.weights import FORMATS, Weight

RULES = ("threshold", "topk")
_SUM = "Tensor x, Tensor[] weights, Tensor?[] biases"
_FORM = 'str kind, str[] formats, str activation, str compensation=""'
_DECISION = "str selector, str rule, int drop"
SCHEMAS = {
    "sparse": f"({_SUM}, Tensor per_term, Tensor(a!) counters, Tensor? phases, *, {_DECISION}, {_FORM}) -> Tensor",
    "select": f"({_SUM}, Tensor per_term, Tensor? phases, *, {_DECISION}, {_FORM}) -> Tensor",
    "given": f"({_SUM}, Tensor active, Tensor(a!)? counters, Tensor? phases, *, {_FORM}) -> Tensor",
}
# What an op takes beside x, weights and biases, in order.
TENSORS = {
    "sparse": ("per_term", "counters", "phases"),
    "select": ("per_term", "phases"),
    "given": ("active", "counters", "phases"),
}


class Call:
    """The arguments of one call, put together. Those that an op does not have are None.

    Args:
        op: A key of `SCHEMAS`.
        x: `[..., d]`.
        sum_: What is summed.
        active, per_term, counters, phases, rule, drop: See above.
        selector, parts: What decides, and its weights.
        compensation, added: What is added for inactive terms, and its weights.
    """

    __slots__ = (
        "active", "added", "compensation", "counters", "drop", "op", "parts", "per_term", "phases", "rule", "selector",
        "sum", "terms", "x",
    )  # fmt: skip

    def __init__(
        self,
        op: str,
        x: Tensor,
        sum_: Sum,
        *,
        per_term: Tensor | None = None,
        counters: Tensor | None = None,
        phases: Tensor | None = None,
        active: Tensor | None = None,
        selector: Selector | None = None,
        parts: Sequence[Weight] = (),
        rule: str = "threshold",
        drop: int = 0,
        compensation: type[Compensation] | None = None,
        added: Sequence[Weight] = (),
    ) -> None:
        self.compensation, self.added = compensation, tuple(added)
        self.op, self.x, self.sum, self.terms = op, x, sum_, sum_.terms
        self.per_term, self.counters, self.phases, self.active = per_term, counters, phases, active
        self.selector, self.parts, self.rule, self.drop = selector, tuple(parts), rule, drop

    @classmethod
    def of(
        cls,
        op: str,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *tensors: Tensor | None,
        kind: str,
        formats: Sequence[str],
        activation: str,
        selector: str | None = None,
        rule: str = "threshold",
        drop: int = 0,
        compensation: str = "",
    ) -> Call:
        """Return the call that an op's arguments make, checked.

        Raises:
            ValueError: They do not fit together.
            ConfigError: A name is unknown.
        """
        sum_class, decider = SUMS.get(kind), None if selector is None else SELECTORS.get(selector)
        d, terms = x.shape[-1], tensors[0].shape[-1] if tensors[0] is not None and tensors[0].dim() else 0
        adding = COMPENSATIONS.get(compensation) if compensation else None
        shapes = [source.shapes(d, terms) if source else () for source in (sum_class, decider, adding)]
        built = iter(_put_together(formats, weights, [shape for some in shapes for shape in some]))
        own, parts, added = ([next(built) for _ in some] for some in shapes)
        call = cls(
            op, x, sum_class(own, biases, activation), selector=decider, parts=parts, rule=rule, drop=drop,
            compensation=adding, added=added, **dict(zip(TENSORS[op], tensors, strict=True)),
        )  # fmt: skip
        call.check()
        return call

    @property
    def tokens(self) -> int:
        """T."""
        return self.x.shape[:-1].numel()

    @property
    def looks(self) -> int:
        """How often terms are looked at before their columns are read."""
        return 2 if self.per_term is not None and self.per_term.dim() == 2 else 1

    @property
    def first(self) -> Tensor:
        """Thresholds or multipliers of the first look, `[terms]`."""
        assert self.per_term is not None
        return self.per_term if self.looks == 1 else self.per_term[0]

    @property
    def second(self) -> Tensor | None:
        """Thresholds of the second look, `[terms]`, if there is one."""
        return None if self.looks == 1 or self.per_term is None else self.per_term[1]

    def empty(self) -> Tensor:
        """Return a tensor of the result's shape and dtype, contiguous."""
        if self.op == "select":
            return self.x.new_empty((*self.x.shape[:-1], self.terms), dtype=torch.bool)
        return self.x.new_empty((*self.x.shape[:-1], self.sum.outputs))

    def check(self) -> None:
        """Raise ValueError unless the arguments fit together."""
        self.sum.check(self.x)
        self._check_devices()
        if self.compensation and (problem := self.compensation.problem(self.sum, self.added)):
            raise ValueError(f"of compensation '{self.compensation.name}' {problem}")
        self._check_phases()
        self._check_counters()
        if self.op == "given":
            self._check_active()
        else:
            self._check_decision()
            self._check_parts()

    def _check_devices(self) -> None:
        """The dispatcher takes mixed devices, and the op of one of them would read addresses of another."""
        weights = (part for weight in (*self.sum.weights, *self.parts, *self.added) for part in weight.parts)
        given = (*weights, *self.sum.biases, self.per_term, self.counters, self.phases, self.active)
        elsewhere = {str(tensor.device) for tensor in given if tensor is not None and tensor.device != self.x.device}
        if elsewhere:
            raise ValueError(f"x is on {self.x.device}, other tensors on {', '.join(sorted(elsewhere))}")

    def _check_phases(self) -> None:
        found = self.phases
        if found is None:
            return
        # Not made contiguous here: a captured graph would go on reading the copy.
        if found.shape != (self.tokens,) or found.dtype != torch.uint8 or not found.is_contiguous():
            raise ValueError(
                f"phases is {found.dtype} {tuple(found.shape)}, expected contiguous uint8 {(self.tokens,)}"
            )

    def _check_decision(self) -> None:
        per_term = self.per_term
        assert per_term is not None
        expected = (self.terms,) if self.looks == 1 else (2, self.terms)
        if per_term.shape != expected or per_term.dtype != torch.float32:
            raise ValueError(
                f"thresholds or multipliers are {per_term.dtype} {tuple(per_term.shape)}, expected float32 {expected}"
            )
        if self.looks == 2 and not self._may_look_again():
            raise ValueError(
                f"thresholds are for two looks, and rule '{self.rule}' of selector "
                f"'{self.selector and self.selector.name}' has one: a second is for thresholds on one of two factors"
            )
        if self.rule not in RULES:
            raise ValueError(f"rule is '{self.rule}', expected 'threshold' or 'topk'")
        if not 0 <= self.drop <= self.terms:
            raise ValueError(f"drop is {self.drop}, expected 0 ≤ drop ≤ {self.terms}")

    def _may_look_again(self) -> bool:
        factors = len(self.sum.factors)
        return self.rule == "threshold" and self.selector is not None and 0 < len(self.selector.reads) < factors

    def _check_parts(self) -> None:
        formats = [part.format for part in self.parts]
        if self.selector is not None and not self.selector.accepts(formats):
            raise ValueError(f"parts of selector '{self.selector.name}' have formats {', '.join(formats)}, not its own")
        for part in self.parts:
            if problem := part.problem():
                raise ValueError(f"a part of selector '{self.selector and self.selector.name}' {problem}")

    def _check_counters(self) -> None:
        found = self.counters
        if found is None and self.op != "sparse":
            return
        assert found is not None
        expected = (1 + self.looks,)
        if found.shape != expected or found.dtype != torch.int64 or not found.is_contiguous():
            raise ValueError(f"counters is {found.dtype} {tuple(found.shape)}, expected contiguous int64 {expected}")

    def _check_active(self) -> None:
        shape = (*self.x.shape[:-1], self.terms)
        assert self.active is not None
        if self.active.shape != shape or self.active.dtype != torch.bool:
            raise ValueError(f"active is {self.active.dtype} {tuple(self.active.shape)}, expected bool {shape}")


def _put_together(
    formats: Sequence[str], tensors: Sequence[Tensor], shapes: Sequence[tuple[int | None, int | None]]
) -> list[Weight]:
    """Return the weights that a flat list of parts holds."""
    if len(formats) != len(shapes):
        raise ValueError(f"formats has {len(formats)} entries, expected one for each of {len(shapes)} weights")
    found: list[Weight] = []
    place = 0
    for name, shape in zip(formats, shapes, strict=True):
        cls = FORMATS.get(name)
        parts = tensors[place : place + len(cls.part_names)]
        if len(parts) < len(cls.part_names):
            break
        found.append(cls.of(parts, shape))
        place += len(parts)
    if len(found) < len(formats) or place < len(tensors):
        raise ValueError(f"weights has {len(tensors)} tensors, which are not those of {', '.join(formats)}")
    return found
