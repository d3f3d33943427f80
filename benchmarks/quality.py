"""What sparsity costs in quality, on WikiText-2 and other text, every token sparse.

    python benchmarks/quality.py MODEL --sweep SWEEP --windows 16 --text-dir DIR --output benchmarks/results/NAME.json

Calibrates on 32,768 tokens (--tokens) of WikiText-2's validation split, evaluates on the first windows of its test
split. MODEL is a hub id, folder or GGUF file; DIR holds WikiText-2's valid.txt and test.txt. Sweeps:

    methods     every method, decision and weighting, 0.5 to 0.9; --only NAME for one method
    allocation  uniform against global, and against global by the local output error alone
    linears     teal and wina under every allocation, on all linears; one profile each
    attention   the same on the linears of attention
    low-rank    r-sparse at several α, the same everywhere, on all linears and on those of attention
    chess       the recipe
    ridge       compensation by several λ, calibrated on both texts; and by L of 70% at 80%
    compensation  with what is predicted of dropped neurons, a second look, both and neither, calibrated on WikiText-2
                and on python-docs
    shrinkage   compensation by several shares of its least squares, fitted on half of the validation split and on
                python-docs, scored on the other half and on other python-docs
    budget      d-proxy alone, and with wina on attention on one budget, at equal bytes of a whole token
    texts       realised sparsity on other text than the calibration's; --other FILE for a third kind
    proxy       proxies against the exact coefficient, and against methods that need none
    shipped     proxies of 4 bits against the exact coefficient: without --dither, where weights lie on a grid
    survivors   proxies whose survivors are exact against those whose survivors are the proxy's
    prompt      a set chosen from the prompt against sets of each token's own: --prompt-tokens of a window are a dense
                prompt, and the tokens behind it are scored, for all alike

--dither moves the weights of gate and up off the grid that GGUF files leave them on, by a uniform step of up to half of
its own either way: a proxy of few bits would fit that grid by luck. The dithered model is then the dense one.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from countdown.artifacts import ERRORS, Artifacts
from countdown.calibration.calibrate import calibrate, calibration_sequences
from countdown.calibration.passes import Assignment, Run
from countdown.calibration.passes.errors import ERROR_STRIDE
from countdown.calibration.passes.sketches import sketch_sparse
from countdown.compensation import affine
from countdown.cost import saved_bytes, token_bytes
from countdown.evaluation.evaluate import evaluate
from countdown.loading import Source, load_model, load_tokenizer
from countdown.methods import SECOND_LOOK, Method, method, method_class, method_names
from countdown.modules import SparseModule
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from countdown.results import meta, write
from countdown.sites import find_sites
from countdown.sites.ffn import find_ffns
from countdown.sparsify import restore_, sparsify_, status
from countdown.sums._base import product_of
from countdown.text import WINDOW, Text, load_text, windows
from countdown.weights.symmetric import round_tokens
from documents import commit

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
BUDGET_SPARSITIES = (0.5, 0.6, 0.7)
LINEAR_SPARSITIES = (0.25, 0.4, 0.5)
ALPHAS = (1.0, 0.98, 0.95)
PROXY_SPARSITIES = (0.5, 0.7, 0.8, 0.9)
PROMPT_SPARSITIES = (0.5, 0.7)
RIDGES = (0.1, 1.0, 10.0)
SHRINKAGES = (0.0, 0.5, 0.7, 0.85, 1.0)
COMPENSATED: tuple[tuple[dict[str, Any], tuple[float, ...]], ...] = (
    ({"name": "d-proxy", "sparsity": 0.8}, (0.5, 0.7, 0.8, 0.9)),
    ({"name": "m-countdown", "weighting": "rms", "sparsity": 0.7}, (0.5, 0.7)),
)
TOKENS = 32768
# Groups and steps of a row in the GGUF files at hand: asymmetric, four bits.
SOURCE_GROUP, SOURCE_STEPS = 32, 15


def main() -> None:
    """Run a sweep and write the results file."""
    arguments = _arguments()
    bench = Bench.of(arguments)
    command = shlex.join(["python", "benchmarks/quality.py", bench.source.label, *arguments.public])
    header = meta(command, commit=arguments.commit or commit(), tokens=bench.tokens)
    records = json.loads(arguments.output.read_text())["records"] if arguments.extend else []
    for record in SWEEPS[arguments.sweep](bench, arguments):
        records.append(record)
        shown = ("method", "weighting", "decision", "allocation", "sparsity", "text", "realised_sparsity", "perplexity")
        print(*(record.get(key, "") for key in shown), flush=True)
        # Each time: a sweep that is cut short has what it measured.
        write(arguments.output, {"meta": header, "records": records})


@dataclass(frozen=True)
class Bench:
    """A model and the texts it is measured on."""

    source: Source
    model: nn.Module
    tokenizer: Any
    valid: Text
    test: Text
    windows: int
    tokens: int
    dithered: bool
    prompt_tokens: int | None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Bench:
        """Load what the arguments name."""
        source = Source.parse(arguments.model)
        valid, test = (load_text("wikitext2", s, text_dir=arguments.text_dir) for s in ("calibration", "evaluation"))
        model = load_model(source, dtype="float32" if arguments.dither else "bfloat16", device=arguments.device)
        if arguments.dither:
            _dither(model)
        counts = (arguments.windows, arguments.tokens)
        read = load_tokenizer(source), valid, test
        return cls(source, model, *read, *counts, arguments.dither, arguments.prompt_tokens)

    def calibrated(self, config: Method | Recipe, *texts: Text, tokens: int | None = None) -> Profile:
        """Return a profile of `config`, calibrated on these texts or else on the validation split."""
        tokens = tokens or self.tokens
        found = calibrate(self.model, self.tokenizer, texts or self.valid, config, tokens=tokens, progress=False)
        print("calibrated", config, flush=True)
        return found

    def ids(self, text: Text) -> Tensor:
        """Return the windows of a text that are scored."""
        return windows(self.tokenizer, text.content, count=self.windows)

    def measured(self, profile: Profile, text: Text | None = None, **about: Any) -> dict[str, Any]:
        """Return the record of a profile on a text, or else on the test split."""
        text = text or self.test
        ids = self.ids(text)
        sparsify_(self.model, profile)
        result = evaluate(self.model, ids, prompt_tokens=self.prompt_tokens, progress=False)
        sites = status(self.model)
        restore_(self.model)
        bytes_ = {site.name: site.nbytes for site in find_sites(self.model, profile.kinds)}
        saved = sum(bytes_[site.name] * (1 - (site.weights_read or 0.0)) for site in sites)
        return {
            "model": self.source.label,
            "sites": len(sites),
            "dithered": self.dithered,
            "vocab": self.model.config.get_text_config().vocab_size,  # type: ignore[operator, union-attr]
            "dtype": "bfloat16",
            "device": str(next(self.model.parameters()).device),
            **profile.recipe.record(),
            "text": text.source,
            "calibrated_on": [seen["source"] for seen in profile.calibration["texts"]],
            "windows": len(ids),
            "window_tokens": ids.shape[1],
            **result.record(),
            "token_read": 1 - saved / token_bytes(self.model, ()).total,
            "target_by_layer": [round(layer.target, 5) for layer in result.layers],
            **about,
        }


def _methods(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    # Those that choose from a prompt have none here.
    names = [name for name in method_names() if not method(name).selector.from_prompt]
    for name in [arguments.only] if arguments.only else names:
        for weighting in method_class(name).weightings:
            for sparsity in SPARSITIES:
                profile = bench.calibrated(method(name, weighting=weighting, sparsity=sparsity))
                for decision in method_class(name).decisions:
                    yield bench.measured(profile.with_settings(decision=decision))


def _allocation(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, weighting in (("m-countdown", "rms"), ("d-countdown", "none")):
        for sparsity in (0.7, 0.5, 0.8):
            for decision in method_class(name).decisions:
                config = method(name, weighting=weighting, sparsity=sparsity, decision=decision)
                uniform = bench.calibrated(config)
                yield bench.measured(uniform)
                spread = bench.calibrated(replace(config, allocation="global"))
                yield bench.measured(spread)
                if decision == "topk":
                    yield bench.measured(_by_local_error(bench, spread), allocation="global, local error")


def _by_local_error(bench: Bench, profile: Profile) -> Profile:
    """Return the profile with each site's own output error in place of its effect on the model's output."""
    (entry,) = profile.entries
    sites = find_sites(bench.model, profile.kinds)
    assigned = [Assignment(site, entry.method, dict(entry.sites[site.name])) for site in sites]
    sequences = calibration_sequences(bench.tokenizer, bench.valid, bench.tokens)
    owners = dict.fromkeys(entry.sites, 0)
    run = Run(bench.model, sequences, sequences, profile.recipe, assigned, owners, progress=False)
    levels = repeat({site.name: entry.method.sparsity for site in sites})
    sketches = sketch_sparse(run, sequences[::ERROR_STRIDE], levels, losses=True)
    errors = {site.name: sketches[site.name].errors(site.terms).float() for site in sites}
    changed: dict[str, Artifacts] = {name: {**found, ERRORS.name: errors[name]} for name, found in entry.sites.items()}
    return replace(profile, entries=[replace(entry, sites=changed)])


def _linears(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    pattern = {"linears": "*", "attention": "*.self_attn.*"}[arguments.sweep]
    for name in [arguments.only] if arguments.only else ["teal", "wina"]:
        for allocation in arguments.allocation or method_class(name).allocations():
            entry = RecipeEntry(method(name, sparsity=0.4, allocation=allocation), pattern)
            profile = bench.calibrated(Recipe((entry,)))
            for sparsity in LINEAR_SPARSITIES:
                yield bench.measured(profile.with_settings(sparsity=sparsity))


def _low_rank(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for pattern in ("*", "*.self_attn.*"):
        for alpha in ALPHAS:
            for sparsity in LINEAR_SPARSITIES:
                entry = RecipeEntry(method("r-sparse", sparsity=sparsity, alpha=alpha), pattern)
                yield bench.measured(bench.calibrated(Recipe((entry,))))


def _chess(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    profile = bench.calibrated(Recipe.named("chess", sparsity=0.4))
    for sparsity in LINEAR_SPARSITIES:
        yield bench.measured(profile.with_settings(sparsity=sparsity))


def _budget(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The sparsities of one budget are those at which it saves the bytes that d-proxy alone does at its own."""
    sites = {site.name: site for site in find_sites(bench.model, ["ffn", "linear"])}
    for name in ("d-proxy", "d-proxy+wina"):
        profile = bench.calibrated(Recipe.named(name, sparsity=0.5, allocation="global"))
        saved = {site: saved_bytes(sites[site], entry.method) for entry in profile.entries for site in entry.sites}
        part = sum(bytes_ for site, bytes_ in saved.items() if sites[site].kind == "ffn") / sum(saved.values())
        for sparsity in BUDGET_SPARSITIES:
            for allocation in ("uniform", "global"):
                at = profile.with_settings(sparsity=sparsity * part, allocation=allocation)
                yield bench.measured(at, recipe_name=name, bytes_of_ffn_sparsity=sparsity)


def _compensation(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    docs = load_text("python-docs", "calibration")
    for settings, sparsities in COMPENSATED:
        if arguments.only not in (None, settings["name"]):
            continue
        looks: list[dict[str, Any]] = [{}]
        looks += [{"second_look": SECOND_LOOK}] if method_class(settings["name"]).has("second_look") else []
        for seen, look, compensate in product((bench.valid, docs), looks, ("none", "affine")):
            profile = bench.calibrated(method(**settings, **look, compensate=compensate), seen)
            for sparsity in sparsities:
                yield bench.measured(profile.with_settings(sparsity=sparsity))


def _ridge(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    docs = load_text("python-docs", "calibration")
    for seen in (bench.valid, docs):
        for settings, _sparsities in COMPENSATED:
            for ridge in RIDGES:
                yield bench.measured(bench.calibrated(method(**settings, compensate="affine", ridge=ridge), seen))
    settings = {**COMPENSATED[0][0], "sparsity": 0.7, "compensate": "affine"}
    yield bench.measured(bench.calibrated(method(**settings)).with_settings(sparsity=0.8), fitted_at=0.7)


def _shrinkage(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    docs, other_docs = (load_text("python-docs", split) for split in ("calibration", "evaluation"))
    middle = len(bench.valid.content) // 2
    parts = slice(middle), slice(middle, None)
    half, other_half = (replace(bench.valid, content=bench.valid.content[part]) for part in parts)
    for settings, sparsities in COMPENSATED:
        look: dict[str, Any] = {"second_look": SECOND_LOOK} if method_class(settings["name"]).has("second_look") else {}
        for seen, share in product((half, docs), SHRINKAGES):
            with patch.object(affine, "shrinkage", lambda _, share=share: share):
                config = method(**settings, **look, compensate="affine" if share else "none")
                profile = bench.calibrated(config, seen)
            for sparsity, text in product(sparsities, (other_half, other_docs)):
                yield bench.measured(profile.with_settings(sparsity=sparsity), text, shrinkage=share)


def _texts(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    docs, other_docs = (load_text("python-docs", split) for split in ("calibration", "evaluation"))
    others = [load_text(str(arguments.other), "evaluation")] if arguments.other else []
    for name, weighting in (("m-countdown", "rms"), ("cats", "rms")):
        for sparsity in SPARSITIES:
            config = method(name, weighting=weighting, sparsity=sparsity)
            for seen in ((bench.valid,), (bench.valid, docs)):
                profile = bench.calibrated(config, *seen)
                for text in (bench.test, other_docs, *others):
                    yield bench.measured(profile, text)


def _proxy(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One profile for each method: every sparsity from it."""
    configs = [
        method("d-countdown", sparsity=0.7),
        method("d-proxy", bits=4, sparsity=0.7),
        method("m-countdown", weighting="rms", sparsity=0.7),
        method("m-countdown", weighting="none", sparsity=0.7),
        method("cats", weighting="rms", sparsity=0.7),
        method("d-proxy", bits=3, sparsity=0.7),
    ]
    for config in configs:
        yield from _every_sparsity(bench, config)


def _shipped(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in ("d-countdown", "d-proxy"):
        yield from _every_sparsity(bench, method(name, sparsity=0.7))


def _every_sparsity(bench: Bench, config: Method) -> Iterator[dict[str, Any]]:
    profile = bench.calibrated(config)
    for sparsity in PROXY_SPARSITIES:
        for decision in ("threshold", "topk") if config.name.startswith("d-") else ("threshold",):
            yield bench.measured(profile.with_settings(sparsity=sparsity, decision=decision))


def _survivors(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same active sets, their coefficients computed exactly or taken from the proxy that chose them."""
    for bits in (4, 3):
        profile = bench.calibrated(method("d-proxy", bits=bits, sparsity=0.7))
        for sparsity in (0.0, 0.5, 0.7, 0.9):
            settings = profile.with_settings(sparsity=sparsity, decision="topk")
            yield bench.measured(settings, survivors="exact")
            with patch.object(SparseModule, "sparse", _by_proxy):
                yield bench.measured(settings, survivors="proxy")


def _prompt(bench: Bench, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    unweighted = ((name, "none") for name in ("griffin", "d-countdown", "m-countdown", "cats"))
    for name, weighting in (*unweighted, ("m-countdown", "rms")):
        # Without a weighting, topk takes nothing from calibration.
        config, tokens = method(name, weighting=weighting, decision="topk"), WINDOW if weighting == "none" else TOKENS
        profile = bench.calibrated(config, tokens=tokens)
        for sparsity in PROMPT_SPARSITIES:
            yield bench.measured(profile.with_settings(sparsity=sparsity))


def _by_proxy(module: SparseModule, x: Tensor, _: Tensor | None = None) -> Tensor:
    """A sparse FFN whose survivors have the proxy's coefficients, every token sparse; counts as the op does."""
    sum_, active = module.site.sum, module.active(x)
    coefficients = product_of(sum_.with_weights(module.parts).project(round_tokens(x)))
    module.counters += module.counters.new_tensor([x[..., 0].numel(), int(active.sum())])
    return sum_.combine(torch.where(active, coefficients, 0).to(x.dtype))


@torch.no_grad()
def _dither(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for ffn in find_ffns(model):
        for weight in ffn.sum.weights[:2]:
            groups = weight.values().data.view(weight.shape[0], -1, SOURCE_GROUP)
            step = (groups.amax(dim=-1, keepdim=True) - groups.amin(dim=-1, keepdim=True)) / SOURCE_STEPS
            noise = torch.rand(groups.shape, generator=generator).to(groups) - 0.5
            groups.add_(noise * step)
    model.to(torch.bfloat16)


SWEEPS = {
    "methods": _methods,
    "allocation": _allocation,
    "linears": _linears,
    "attention": _linears,
    "low-rank": _low_rank,
    "chess": _chess,
    "ridge": _ridge,
    "compensation": _compensation,
    "shrinkage": _shrinkage,
    "budget": _budget,
    "texts": _texts,
    "proxy": _proxy,
    "shipped": _shipped,
    "survivors": _survivors,
    "prompt": _prompt,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sweep", choices=list(SWEEPS), default="methods")
    parser.add_argument("--only", choices=[*method_names(), "wina"])
    parser.add_argument("--other", type=Path)
    parser.add_argument("--allocation", nargs="+", help="of linears and attention, only these")
    parser.add_argument("--extend", action="store_true", help="keep the records that the output has")
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--text-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="where the checkout has no git history")
    arguments = parser.parse_args()
    only = ["--only", arguments.only] if arguments.only else []
    other = ["--other", arguments.other.name] if arguments.other else []
    dither = ["--dither"] if arguments.dither else []
    prompt = ["--prompt-tokens", str(arguments.prompt_tokens)] if arguments.prompt_tokens else []
    tokens = ["--tokens", str(arguments.tokens)] if arguments.tokens != TOKENS else []
    counts = ["--windows", str(arguments.windows), *tokens, *prompt]
    arguments.public = ["--sweep", arguments.sweep, *only, *other, *dither, *counts]
    if arguments.sweep == "prompt" and not prompt:
        parser.error("--sweep prompt needs --prompt-tokens")
    return arguments


if __name__ == "__main__":
    main()
