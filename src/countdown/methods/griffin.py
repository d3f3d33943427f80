"""GRIFFIN: one set of neurons for a sequence, chosen from its prompt."""

from dataclasses import dataclass

from countdown.methods import Method, register
from countdown.selectors.prompt import PROMPT


@register
@dataclass(frozen=True, kw_only=True)
class Griffin(Method):
    """Keep the neurons that were large, relative to others, over the prompt (GRIFFIN, arXiv 2404.01365).

    A neuron's score is √Σ_t (s_ti / ‖s_t‖₂)² over the tokens t of the prompt, s their coefficients. The ⌊k·h⌋ neurons
    of smallest score are inactive for every generated token of the sequence, ties by lower index first. Reads W_gate,
    W_up and W_down at the active neurons: 3ρ·d·h weights, and nothing to decide. Nothing is calibrated.

    The prompt of a sequence is all tokens of calls that are prompts, see `phase`, since its cache was empty: fed in
    several calls, the scores go on adding up, and so they do when a chat goes on with the cache of its last turn. What
    was generated meanwhile was computed sparsely and is not scored. Padding counts for nothing. A sequence of whose
    prompt nothing could be scored is computed with all neurons.
    """

    name = "griffin"
    summary = "√Σ (s / ‖s‖)² over the prompt's tokens: one set for all that follows"
    source = "GRIFFIN, arXiv 2404.01365"
    selector = PROMPT
    unseen = None
    decisions = {"topk": "(the largest are chosen once, from the prompt)"}  # noqa: RUF012
    weightings = ("none",)

    decision: str = "topk"

    @classmethod
    def allocations(cls) -> tuple[str, ...]:
        """Return `uniform` alone: calibration, which would measure where dropping hurts least, sees no prompts."""
        return ("uniform",)
