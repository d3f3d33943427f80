"""Loads a model and its tokenizer from a folder, a hub id or a GGUF file."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from countdown import hub
from countdown.config import check_choice
from countdown.errors import AccidentError, ConfigError, CountdownError, UnsupportedModelError, told
from countdown.memory import ran_out
from countdown.noise import quiet_imports
from countdown.text import WINDOW

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What a configuration cannot have none of.
_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
# How a file begins that git-lfs has not fetched.
_LFS = b"version https://git-lfs"
_LOG = logging.getLogger("countdown")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, in the terms of transformers' `from_pretrained`.

    Args:
        name: Folder or hub id.
        gguf_file: The file in that folder, for GGUF.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the repository ships.
        cached_only: The hub cannot be reached: take what its cache has.
    """

    name: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    cached_only: bool = False

    @classmethod
    def parse(
        cls, model: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
    ) -> Source:
        """Tell a folder, a GGUF file and a hub id apart.

        Raises:
            ConfigError: A path that does not exist, a folder that holds no model, or a model that is on the hub alone
                while the hub cannot be reached.
        """
        if not isinstance(model, str | os.PathLike):
            raise ConfigError(f"the model is of type {type(model).__name__}, expected a hub id or a path.")
        model = os.fspath(model)
        path = Path(os.path.expanduser(model))
        is_gguf = path.suffix.lower() == ".gguf"
        if revision and (is_gguf or path.is_dir()):
            raise ConfigError(f"--revision belongs to models on the hub, but {model} is local.")
        if is_gguf:
            if not path.is_file():
                raise ConfigError(f"model file {model} does not exist.")
            return cls(str(path.parent), path.name, None, trust_remote_code)
        if path.is_dir():
            if not (path / "config.json").is_file():
                inside = sorted(path.glob("*.gguf"))
                hint = f" Did you mean {inside[0]}?" if inside else ""
                raise ConfigError(f"folder {model} has no config.json, so it holds no model.{hint}")
            return cls(str(path), None, None, trust_remote_code)
        looks_like_path = path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
        if looks_like_path:
            what = "is a file" if path.exists() else "does not exist"
            raise ConfigError(
                f"model {model} {what}; expected a folder with config.json, a .gguf file or a hub id such as org/name."
            )
        return cls(model, None, revision, trust_remote_code, cached_only=_cached_only(model, revision))

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that every `from_pretrained` takes."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        arguments: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        # Left out, transformers would ask on the terminal, in the middle of a command.
        return arguments | {"trust_remote_code": self.trust_remote_code}

    @property
    def given(self) -> str:
        """What `parse` makes this of again."""
        return str(Path(self.name) / self.gguf_file) if self.gguf_file else self.name

    @property
    def label(self) -> str:
        """A short name without the machine's folders."""
        if self.gguf_file:
            return Path(self.gguf_file).stem
        return Path(self.name).resolve().name if os.path.isdir(self.name) else self.name


def _cached_only(name: str, revision: str | None) -> bool:
    """Return whether a model of the hub must come from the cache, as the hub cannot be reached.

    Raises:
        ConfigError: And it is not there.
    """
    if hub.offline() or (problem := hub.unreached()) is None:
        return False
    if not hub.is_known(name, "config.json", revision):
        raise ConfigError(
            f"{name} is no local folder, and {problem}: give a folder or a GGUF file, or set HF_HUB_OFFLINE=1 to use "
            "only what is cached."
        )
    _LOG.warning("%s: of %s, what is cached is used.", problem, name)
    return True


def resolve_device(device: str) -> torch.device:
    """Return the device named, `auto` being CUDA where there is one.

    Raises:
        ConfigError: No such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:  # it lists two dozen types of device, most of which no torch has
        raise ConfigError(f"device is '{device}', expected auto, cpu, cuda or another that torch has.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{device}' cannot be used: {_gpus()}; take --device cpu (device='cpu').")
    try:
        torch.empty(0, device=found, dtype=torch.float32)
    except Exception as error:
        raise ConfigError(f"device '{device}' cannot be used: {told(error)}") from error
    return found


def _gpus() -> str:
    count = torch.cuda.device_count()
    if count:
        return f"torch sees {count} GPU{'s' if count > 1 else ''}, cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}"
    return "torch sees no GPU" if torch.backends.cuda.is_built() else "this torch is built without CUDA"


def resolve_dtype(dtype: str, source: Source) -> torch.dtype | str:
    """Return the dtype named; `auto` is the checkpoint's own, and bfloat16 for GGUF.

    Raises:
        ConfigError: No such dtype.
    """
    if dtype == "auto":
        return torch.bfloat16 if source.gguf_file else "auto"
    name = _SHORT.get(dtype, dtype)
    check_choice("dtype", name, ["auto", *_SHORT, *DTYPES])
    return DTYPES[name]


def load_model(source: Source, *, dtype: str = "auto", device: str = "auto") -> nn.Module:
    """Return the causal language model, dense, on its device, in eval mode.

    GGUF weights are dequantised: a sparse FFN gathers rows of plain matrices.

    Raises:
        ConfigError: Unknown dtype or device, or nothing loadable under this name.
    """
    place = resolve_device(device)
    arguments = source.arguments() | {"dtype": resolve_dtype(dtype, source), "output_loading_info": True}
    if source.gguf_file:
        arguments |= _dequantise()
    with _plain_or_said(source):
        with explained(source):
            model, found = _auto_class(source).from_pretrained(source.name, **arguments)
            model = model.to(place).eval()
        if missing := sorted(found["missing_keys"]):
            raise UnsupportedModelError(
                f"{source.name} lacks {len(missing)} of the model's weights, {missing[0]} among them; the download or "
                "copy may be incomplete."
            )
    result: nn.Module = model
    return result


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that hands a model its cache: `cache`, before transformers 5.24 `past_key_values`."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def context_of(config: Any) -> int | None:
    """Return the longest sequence that a model of this configuration takes, in tokens; None if it does not say."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if found is not None and found > 0 else None


def check_context(model: nn.Module, tokens: int) -> None:
    """Raise ConfigError if a sequence of so many tokens is longer than the model's context."""
    context = context_of(model.config)
    if context is not None and tokens > context:
        raise ConfigError(f"a sequence of {tokens} tokens is longer than the model's context of {context}.")


def check_known(model: nn.Module, sequences: Iterable[Tensor]) -> None:
    """Raise ConfigError if a sequence of token ids has one that the model does not know."""
    known = _embeddings(model)
    largest = max(int(ids.max()) for ids in sequences)
    if known is not None and largest >= known:
        raise ConfigError(
            f"the text has token {largest}, but the model knows {known} tokens, from 0 on: tokenizer and model do not "
            "belong together, or tokens were added to the tokenizer alone."
        )


def _embeddings(model: nn.Module) -> int | None:
    """Return how many tokens a model has embeddings for, None if it does not say."""
    try:
        return len(model.get_input_embeddings().weight)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def window_length(context: int | None, window: int | None = None) -> int:
    """Return how many tokens windows of text have: as many as asked for, else 512 or what the context holds.

    Args:
        context: See `context_of`.
        window: What is asked for, if anything.

    Raises:
        ConfigError: A window of fewer than 2 tokens, or longer than the context.
    """
    if window is None:
        return min(WINDOW, context or WINDOW)
    if window < 2:
        raise ConfigError(f"window is {window}, expected at least 2 tokens.")
    if context is not None and window > context:
        raise ConfigError(f"window is {window}, longer than the model's context of {context} tokens.")
    return window


def load_context(source: Source) -> int | None:
    """Return the model's context in tokens without loading it; None if it does not say, or is a GGUF file.

    Raises:
        ConfigError: Nothing loadable under this name.
    """
    if source.gguf_file:  # going through its header takes seconds
        return None
    with explained(source):
        return context_of(_config(source))


def load_skeleton(source: Source) -> nn.Module:
    """Return the model on the meta device: its structure, without reading or keeping any weight.

    Raises:
        ConfigError: Nothing loadable under this name.
        UnsupportedModelError: Its weights are quantised: in bytes they are not what its structure says.
    """
    with explained(source):
        config = _config(source)
        if how := _quantised_by(config):
            raise _quantised(source, how)
        with torch.device("meta"):
            auto = _auto_class(source)
            # A GGUF file's config has no dtype: it is counted as what it is loaded as.
            own = {"dtype": resolve_dtype("auto", source)} if source.gguf_file else {}
            model: nn.Module = auto.from_config(config, trust_remote_code=source.trust_remote_code, **own)
    return model.eval()


@contextmanager
def _plain_or_said(source: Source) -> Iterator[None]:
    """Within the context a model loads: where it cannot and is quantised, that is why, whatever transformers says."""
    try:
        yield
    except (ConfigError, UnsupportedModelError) as error:
        from transformers import AutoConfig

        try:
            how = _quantised_by(AutoConfig.from_pretrained(source.name, **source.arguments()))
        except Exception:  # the config is what cannot be read
            how = None
        if how is None:
            raise
        raise _quantised(source, how) from error


def _quantised(source: Source, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source.label} is quantised ({how}), and countdown computes with plain weights: take the checkpoint that it "
        "was made from, or a GGUF file, which is dequantised as it loads."
    )


def _quantised_by(config: Any) -> str | None:
    """Return how a checkpoint's weights are quantised, as its configuration says (`gptq, 4 bits`), or None."""
    parts = [config, config.get_text_config()]
    names = ("quantization_config", "compression_config")
    found = next((given for part in parts for name in names if (given := getattr(part, name, None))), None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "a method it does not name"
    in_bits = {"load_in_4bit": 4, "load_in_8bit": 8}
    bits = settings.get("bits") or next((n for name, n in in_bits.items() if settings.get(name)), None)
    return f"{method}, {bits} bits" if bits else str(method)


def load_tokenizer(source: Source | str | os.PathLike[str]) -> Any:
    """Return the tokenizer of a hub id, folder or GGUF file.

    Raises:
        ConfigError: Nothing loadable under this name.
    """
    from transformers import AutoTokenizer

    source = source if isinstance(source, Source) else Source.parse(source)
    try:
        with explained(source):
            tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments())
    except (ConfigError, UnsupportedModelError) as error:
        if _lacks_tokenizer(source):
            raise ConfigError(
                f"folder {source.name} has no tokenizer; write it there with tokenizer.save_pretrained."
            ) from error
        raise
    if source.gguf_file:
        _check_bos(source, tokenizer)
    return tokenizer


def _lacks_tokenizer(source: Source) -> bool:
    folder = Path(source.name)
    return not source.gguf_file and folder.is_dir() and not any(folder.glob("tokenizer*"))


def _check_bos(source: Source, tokenizer: Any) -> None:
    """Refuse a tokenizer that leaves out the BOS its GGUF file asks for: a model that expects it is then useless.

    transformers before 5.23 loses it for Gemma, and before 5.18 splits its words wrongly as well.
    """
    import transformers
    from gguf import GGUFReader
    from packaging.version import Version

    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if adds_bos or Version(transformers.__version__) >= Version("5.23"):
        return
    field = GGUFReader(Path(source.name) / str(source.gguf_file)).get_field("tokenizer.ggml.add_bos_token")
    if field is not None and field.contents():
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} misreads the tokenizer of {source.gguf_file} (it drops BOS); "
            "upgrade it: pip install 'transformers>=5.23'."
        )


def _config(source: Source) -> Any:
    """Return a model's configuration, or raise ConfigError for sizes that no model has.

    transformers takes them as they are, and fails wherever it comes to them, or makes a model without layers.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.name, **source.arguments())
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    sizes = [(name, getattr(part, name, None)) for part in parts for name in _SIZES]
    for name, size in sizes:
        if isinstance(size, int) and size < 1:
            raise ConfigError(
                f"{source.label} cannot be loaded: its configuration says {name} {size}, expected 1 or more."
            )
    return config


def _auto_class(source: Source) -> Any:
    """Return the auto class that loads this model: models that also see or hear have others."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    if source.gguf_file:
        return AutoModelForCausalLM
    config = _config(source)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping and type(config) not in AutoModelForCausalLM._model_mapping:
            return auto
    return AutoModelForCausalLM


def _dequantise() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # Before GgufConfig, transformers always dequantised.
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Within the context transformers reads the model's files: whatever it raises is told in one line.

    Raises:
        ConfigError: A file is not there, not whole, or no model's; or a package is missing.
        AccidentError: It does not fit into memory.
        UnsupportedModelError: Anything else.
    """
    try:
        with _quietly(), hub.left_alone() if source.cached_only else nullcontext():
            yield
    except CountdownError:
        raise
    except Exception as error:  # its parsing raises whatever it stumbles over
        raise _explained(source, error) from error


@contextmanager
def foreign(what: str, remedy: str) -> Iterator[None]:
    """Within the context runs code of others on what a user gave: what it stumbles over is told in one line.

    Args:
        what: What failed then, such as "the tokenizer's chat template fails".
        remedy: A sentence that says what to do.

    Raises:
        UnsupportedModelError: Something failed. What says nothing about the model passes as it is: memory that runs
            out, and errors of files and pipes.
    """
    try:
        yield
    except (CountdownError, OSError):
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise UnsupportedModelError(f"{what}: {told(error).rstrip('.')}. {remedy}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Within the context transformers shows its bars in a terminal alone, and says nothing of what it imports."""
    from transformers.utils import logging as bars

    hidden = bars.is_progress_bar_enabled() and not (sys.stderr and sys.stderr.isatty())
    try:
        if hidden:
            bars.disable_progress_bar()
        with quiet_imports():
            yield
    finally:
        if hidden:
            bars.enable_progress_bar()


def _explained(source: Source, error: Exception) -> CountdownError:
    """Return what is known of why transformers could not load a model, and what to do."""
    named = source.gguf_file or source.name
    if isinstance(error, ImportError):
        gguf = " For GGUF: pip install 'countdown-llm[gguf]'." if source.gguf_file else ""
        return ConfigError(f"{source.label} needs a package that is missing: {told(error)}{gguf}")
    if "trust_remote_code" in str(error) and not source.trust_remote_code:
        return ConfigError(
            f"{named} needs code that its repository ships, which runs only if you say so: read it, then give "
            "--trust-remote-code (trust_remote_code=True)."
        )
    if ran_out(error):
        return AccidentError(f"{named} does not fit into memory: {told(error)}")
    if (pointer := _pointer(source)) is not None:
        return ConfigError(f"{named} cannot be loaded: {pointer} is a pointer of git-lfs to a file; run: git lfs pull")
    if _is_damaged(source):
        return ConfigError(f"{named} cannot be loaded: it is cut short or damaged; get it again.")
    if source.cached_only or hub.lacks(error):
        return ConfigError(_not_cached(source, error))
    if isinstance(error, OSError):
        return ConfigError(f"{named} cannot be loaded: {told(error)}")
    return UnsupportedModelError(
        f"{named} cannot be loaded: {told(error).rstrip('.')}. A file of it is damaged, or not for "
        f"transformers {version('transformers')}."
    )


def _not_cached(source: Source, error: Exception) -> str:
    if source.cached_only:  # what transformers says of a cache with holes is misleading, so it comes last
        problem = "cannot be loaded from what of it is cached, and the hub could not be reached"
        return f"{source.name} {problem}: {told(error)}"
    why = "HF_HUB_OFFLINE is set" if hub.offline() else "the hub could not be reached"
    return f"{source.name} cannot be loaded: it, or a file of it, is not in the hub's cache, and {why}."


def _pointer(source: Source) -> str | None:
    """Return the name of a file that git-lfs has not fetched, None if there is none."""
    folder = Path(source.name)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    for path in files:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                return path.name
    return None


def _is_damaged(source: Source) -> bool:
    """Return whether this is a GGUF file that its own package cannot read."""
    if not source.gguf_file:
        return False
    from gguf import GGUFReader

    path = Path(source.name) / source.gguf_file
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return False
    try:
        GGUFReader(path)
    except Exception:  # It raises whatever its parsing stumbles over.
        return True
    return False
