"""Which causal language models of transformers countdown accepts, and why it refuses the rest.

    python benchmarks/census.py --output benchmarks/results/census.json

Takes every class of the auto mappings for causal, image-text and multimodal language models, with a small random
model each: its default config, with fewer layers, heads and words. Where that runs on text alone, a sparse model
that drops nothing must give the dense logits and count every token. A class that needs a package which is not
installed (timm, scipy) is recorded as not built.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import re
import shlex
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto

from countdown.errors import UnsupportedModelError
from countdown.methods import method
from countdown.modules import SparseModule, running
from countdown.phase import Phases
from countdown.results import meta, write
from countdown.sites.decoder import decoder_of
from countdown.sites.ffn import find_ffns
from countdown.sites.gated import GatedFFN
from documents import commit

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "multimodal-lm": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}
END_TO_END = "end to end"
EACH_FFN = "each FFN against its own forward"

METHOD = method("m-countdown", sparsity=0.5)
SEQUENCES, TOKENS = 2, 7
TOLERANCE = 1e-4
TOWER = re.compile(r"vision|visual|image|audio|speech|encoder")

LAYERS, HEADS = 4, 2
SIZES = {
    "vocab_size": 256,
    "intermediate_size": 104,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of vision and audio towers.
DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "depth", "num_layers")
# A larger model is looked at without weights.
MOST_PARAMETERS = 900_000_000
TIMEOUT = 120

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What a default config lacks or contradicts, and what contradicts `SIZES`.
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "ChameleonConfig": {"vocabulary_map": {}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "DbrxAttentionConfig": {"rope_theta": 10000.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Emu3Config": {"vocabulary_map": {}},
    "Glm4vTextConfig": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "HunYuanVLTextConfig": {"rope_parameters": {**ROPE, "mrope_section": [16, 16, 16, 16]}},
    "KyutaiSpeechToTextConfig": {"vocab_size": 4001},
    "Lfm2MoeConfig": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "ReformerConfig": {"is_decoder": True},
    "xLSTMConfig": {"hidden_size": 256, "num_heads": 2},
}

# The category of a refusal, by what its text says.
CATEGORIES = {
    "mixture of experts": r"mixture of experts",
    "FFN without a gate": r"without a gate",
    "more than the formula": r"does not compute|beside its linears|small inputs only|multiplies|another result",
    "layers without FFN, or with one of another form": r"has no gated FFN that",
    "no single text decoder": r"does not tell which",
}


def main() -> None:
    """Look at every class and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--commit", help="where the checkout has no git history")
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes alone, to try something")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    chosen = {cls: labels for cls, labels in classes().items() if cls.__name__ in (arguments.only or [cls.__name__])}
    records = []
    # A process each: a crash, or what a model leaves behind, is its own.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        pending = {cls: pool.apply_async(examine, (cls,)) for cls in chosen}
        for cls, result in pending.items():
            try:
                found = result.get(2 * TIMEOUT)
            except Exception as error:
                found = record("crashed", reason=said(error))
            records.append({"class": cls.__name__, "mapping": ", ".join(chosen[cls]), **found})
            print(*(str(value) for value in records[-1].values()), sep=" | ", flush=True)
    for outcome, count in Counter((r["outcome"], r["category"] or r["verified"]) for r in records).most_common():
        print(count, *outcome)
    command = shlex.join(["python", "benchmarks/census.py", "--output", arguments.output])
    write(arguments.output, {"meta": meta(command, commit=arguments.commit or commit()), "records": records})


def classes() -> dict[type[PreTrainedModel], list[str]]:
    """Return the classes in alphabetical order, each with the mappings that have it."""
    found: dict[type[PreTrainedModel], list[str]] = {}
    for label, mapping in MAPPINGS.items():
        for entry in getattr(modeling_auto, mapping).values():
            for cls in entry if isinstance(entry, list | tuple) else (entry,):
                found.setdefault(cls, []).append(label)
    return {cls: list(dict.fromkeys(found[cls])) for cls in sorted(found, key=lambda cls: cls.__name__.lower())}


def examine(cls: type[PreTrainedModel]) -> dict[str, Any]:
    """Return the record of a class, but for its name and mapping."""
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(TIMEOUT)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model = build(cls)
    except Exception as error:
        return record("not built", reason=said(error))
    try:
        ffns = find_ffns(model)
        if _has_experts(model.config):
            # Fewer layers may have left only dense ones.
            find_ffns(_skeleton(cls, default(cls)))
    except UnsupportedModelError as error:
        return record("refused", reason=str(error))
    first = ffns[0]
    verified, reason = verify(model, ffns)
    return record(
        "accepted",
        reason=reason,
        verified=verified,
        ffn=type(first.module).__name__,
        activation=first.activation,
        fused=first.gate.child == first.up.child,
        ffns=len(ffns),
    )


def record(outcome: str, *, reason: str | None, verified: str | None = None, **form: Any) -> dict[str, Any]:
    """Return a flat record; `form` says what an accepted class's FFNs are."""
    category = None
    if outcome == "refused":
        category = next((name for name, text in CATEGORIES.items() if re.search(text, reason or "")), "other")
    form = form or dict.fromkeys(("ffn", "activation", "fused", "ffns"))
    return {"outcome": outcome, "category": category, "reason": reason, "verified": verified, **form}


def said(error: Exception) -> str:
    """Return an error's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def build(cls: type[PreTrainedModel]) -> PreTrainedModel:
    """Return a small random model, on the meta device if it cannot be small.

    Raises:
        Exception: What the class said to the first of several configs, if it takes none of them.
    """
    refusals: list[Exception] = []
    attempts = [functools.partial(reduced, cls, width=True), functools.partial(reduced, cls, width=False)]
    for make in [*attempts, functools.partial(default, cls)]:
        try:
            config = make()
            model = _skeleton(cls, config)
            if sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS:
                model = cls(config).float().eval()
            return model
        except Exception as error:
            refusals.append(error)
    raise refusals[0]


def _skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return cls(config).eval()


def default(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return the default config of a class."""
    config: PreTrainedConfig = cls.config_class(**OVERRIDES.get(cls.config_class.__name__, {}))
    return config


def reduced(cls: type[PreTrainedModel], *, width: bool) -> PreTrainedConfig:
    """Return the default config of a class with a smaller text model and two layers in every other part.

    Args:
        cls: The class.
        width: Reduce the hidden size too, which other parts may have to fit.
    """
    whole = default(cls)
    try:
        text = whole.get_text_config(decoder=True)
    except ValueError:
        text = whole
    sizes = _text_sizes(text, width)

    def smaller(config: PreTrainedConfig) -> PreTrainedConfig:
        config.allow_global_per_layer_attribute_access = True
        changes = sizes
        if config is not text:
            changes = dict.fromkeys(DEPTHS, 2)
            if getattr(config, "vocab_size", 0) == getattr(text, "vocab_size", None):
                changes["vocab_size"] = SIZES["vocab_size"]
        known: dict[str, Any] = {
            config.attribute_map.get(name, name): value
            for name, value in changes.items()
            if isinstance(getattr(config, name, ()), int | None)
        }
        if config is text:
            known |= {name: value[:LAYERS] for name, value in vars(config).items() if _for_each_layer(config, value)}
        parts = {name: getattr(config, name, None) for name in config.sub_configs}
        known |= {name: value for name, value in OVERRIDES.get(type(config).__name__, {}).items() if name not in parts}
        known |= {name: smaller(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
        return type(config)(**known)

    return smaller(whole)


def _for_each_layer(config: PreTrainedConfig, value: Any) -> bool:
    return isinstance(value, list) and len(value) == getattr(config, "num_hidden_layers", None)


def _text_sizes(config: PreTrainedConfig, width: bool) -> dict[str, int]:
    config.allow_global_per_layer_attribute_access = True
    sizes = dict(SIZES)
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if width and isinstance(heads, int) and isinstance(hidden, int):
        # Heads of their own size: rotary embeddings and the like fit them.
        groups = HEADS if getattr(config, "num_key_value_heads", None) in (heads, None) else 1
        sizes |= {"hidden_size": HEADS * (hidden // heads), "num_attention_heads": HEADS, "num_key_value_heads": groups}
        if getattr(config, "head_dim", 0) is None:
            sizes["head_dim"] = hidden // heads
    return sizes


def _has_experts(config: PreTrainedConfig) -> bool:
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    return any(
        "experts" in name and isinstance(value, int) and value > 1
        for part in parts
        if isinstance(part, PreTrainedConfig)
        for name, value in vars(part).items()
    )


@torch.inference_mode()
def verify(model: PreTrainedModel, ffns: list[GatedFFN]) -> tuple[str | None, str | None]:
    """Return how the FFNs were verified, None if something is wrong, and what is wrong or stood in the way of more."""
    if outside := [ffn.name for ffn in ffns if TOWER.search(ffn.name)]:
        return None, f"in a tower: {outside[0]}"
    if ffns[0].device.type == "meta":
        return EACH_FFN, "the model is too large to be run"
    for parameter in (p for ffn in ffns for p in ffn.module.parameters()):
        # So that the FFNs make a difference.
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    try:
        run = runner(model)
    except Exception as error:
        return EACH_FFN, f"does not run on text alone: {said(error)}"
    wrong = _wrong(model, ffns, run)
    return None if wrong else END_TO_END, wrong


Run = Callable[[int], Tensor]


def runner(model: PreTrainedModel) -> Run:
    """Return a function from a number of tokens to logits on these tokens, the same at each call.

    Raises:
        Exception: What the model said to the first kind of call, if it takes none.
    """
    special = set(_flat(model.config.to_dict()))
    ids = torch.tensor([i for i in range(3, SIZES["vocab_size"]) if i not in special])
    ids = ids[torch.randperm(len(ids))[: SEQUENCES * TOKENS]].view(SEQUENCES, TOKENS)

    def call(kind: str, tokens: int) -> Tensor:
        some = ids[:, :tokens]
        inputs: dict[str, Any] = {"input_ids" if kind == "decoder" else "decoder_input_ids": some}
        if kind == "encoder and decoder":
            inputs["input_ids"] = some
        if kind == "decoder after encoder":
            width = model.config.get_text_config(decoder=True).hidden_size
            states = torch.randn(SEQUENCES, TOKENS, width, generator=torch.Generator().manual_seed(0))
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    refusals = []
    for kind in ("decoder", "encoder and decoder", "decoder after encoder"):
        try:
            call(kind, TOKENS), call(kind, 1)
            return functools.partial(call, kind)
        except Exception as error:
            refusals.append(error)
    raise refusals[0]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _flat(inner)
    elif isinstance(value, int):
        yield value


def _wrong(model: PreTrainedModel, ffns: list[GatedFFN], run: Run) -> str | None:
    """Return what a sparse model does that it should not, or None."""
    dense = run(TOKENS)
    phases = Phases()
    phases.watch(decoder_of(model)[0])
    _sparsify(model, ffns, phases, tau=math.inf)
    if not (without := _differ(run(TOKENS), dense)) > 100 * TOLERANCE:
        return f"without its FFNs, logits differ by {without:.2g} only: that they agree would show nothing"
    modules = _sparsify(model, ffns, phases, tau=-1.0)
    if not (error := _differ(run(TOKENS), dense)) <= TOLERANCE:
        return f"logits differ by {error:.2g} from dense ones"
    whole = SEQUENCES * TOKENS
    for apply_to, tokens, expected in (("all", TOKENS, whole), ("decode", TOKENS, 0), ("decode", 1, SEQUENCES)):
        for module in modules:
            module.counters.zero_()
        with running(model, apply_to):
            run(tokens)
        if (counts := {int(module.counters[0]) for module in modules}) != {expected}:
            fed = f"{SEQUENCES} sequences of {tokens} tokens" if tokens > 1 else f"{SEQUENCES} sequences of 1 token"
            return f"with apply_to={apply_to}, {fed} count as {' or '.join(map(str, sorted(counts)))}"
    return None


def _sparsify(model: PreTrainedModel, ffns: list[GatedFFN], phases: Phases, tau: float) -> list[SparseModule]:
    modules = [SparseModule(ffn, METHOD, torch.full((ffn.h,), tau), phases=phases, apply_to="all") for ffn in ffns]
    for ffn, module in zip(ffns, modules, strict=True):
        model.set_submodule(ffn.name, module)
    return modules


def _differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _out_of_time(*_: object) -> None:
    raise TimeoutError(f"more than {TIMEOUT} s")


if __name__ == "__main__":
    main()
