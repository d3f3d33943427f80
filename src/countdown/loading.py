"""Loads a model and its tokenizer from a folder, a hub id or a GGUF file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from countdown.config import check_choice
from countdown.errors import ConfigError, UnsupportedModelError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Source:
    """Where a model comes from, in the terms of transformers' `from_pretrained`.

    Args:
        name: Folder or hub id.
        gguf_file: The file in that folder, for GGUF.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the repository ships.
    """

    name: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def parse(cls, model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
        """Tell a folder, a GGUF file and a hub id apart.

        Raises:
            ConfigError: A path that does not exist, or a folder that holds no model.
        """
        path = Path(os.path.expanduser(model))
        if revision and (path.suffix == ".gguf" or path.is_dir()):
            raise ConfigError(f"--revision belongs to models on the hub, but {model} is local.")
        if path.suffix == ".gguf":
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
        return cls(model, None, revision, trust_remote_code)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that every `from_pretrained` takes."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        arguments: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if self.trust_remote_code:
            arguments["trust_remote_code"] = True
        return arguments

    @property
    def label(self) -> str:
        """A short name without the machine's folders."""
        if self.gguf_file:
            return Path(self.gguf_file).stem
        return Path(self.name).resolve().name if os.path.isdir(self.name) else self.name


def resolve_device(device: str) -> torch.device:
    """Return the device named, `auto` being CUDA where there is one.

    Raises:
        ConfigError: No such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


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
        if missing := sorted(found["missing_keys"]):
            raise UnsupportedModelError(
                f"{source.name} lacks {len(missing)} of the model's weights, {missing[0]} among them; the download or "
                "copy may be incomplete."
            )
    result: nn.Module = model.to(place).eval()
    return result


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that hands a model its cache: `cache`, before transformers 5.24 `past_key_values`."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def check_context(model: nn.Module, tokens: int) -> None:
    """Raise ConfigError if a sequence of so many tokens is longer than the model's context."""
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise ConfigError(f"a sequence of {tokens} tokens is longer than the model's context of {context}.")


def load_skeleton(source: Source) -> nn.Module:
    """Return the model on the meta device: its structure, without reading or keeping any weight.

    Raises:
        ConfigError: Nothing loadable under this name.
        UnsupportedModelError: Its weights are quantised: in bytes they are not what its structure says.
    """
    from transformers import AutoConfig

    with explained(source):
        config = AutoConfig.from_pretrained(source.name, **source.arguments())
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


def load_tokenizer(source: Source | str) -> Any:
    """Return the tokenizer of a hub id, folder or GGUF file.

    Raises:
        ConfigError: Nothing loadable under this name.
    """
    from transformers import AutoTokenizer

    source = Source.parse(source) if isinstance(source, str) else source

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


def _auto_class(source: Source) -> Any:
    """Return the auto class that loads this model: models that also see or hear have others."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    if source.gguf_file:
        return AutoModelForCausalLM
    config = AutoConfig.from_pretrained(source.name, **source.arguments())
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


class explained:  # noqa: N801
    """Within the context, turn what from_pretrained raises for a user's mistake into one line."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ImportError):
            raise ConfigError(
                f"{self.source.label} needs a package that is missing: {_first_line(error)} "
                "For GGUF: pip install 'countdown-llm[gguf]'."
            ) from error
        named = self.source.gguf_file or self.source.name
        if isinstance(error, Exception) and _is_damaged(self.source):
            raise ConfigError(f"{named} cannot be loaded: it is cut short or damaged; get it again.") from error
        if isinstance(error, OSError):
            raise ConfigError(f"{named} cannot be loaded: {_first_line(error)}") from error
        if isinstance(error, ValueError | RuntimeError | SafetensorError):
            raise UnsupportedModelError(f"{named} cannot be loaded: {_first_line(error)}") from error


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
