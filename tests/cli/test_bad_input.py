"""What others wrote, damaged or surprising, and terminals that lack something: one line each, nothing half-way."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys

import pytest
import torch
from huggingface_hub import constants
from test_cli import run, spawn

from countdown.cli import main
from countdown.errors import UnsupportedModelError
from countdown.loading import foreign

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


def changed(name, **values):
    """A damage: a JSON file of the model has other values."""

    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def written(name, content, *, without=()):
    """A damage: a file of the model has another content, and some are gone."""

    def damage(folder):
        for other in without:
            (folder / other).unlink()
        (folder / name).write_bytes(content)

    return damage


def tokenizer_of_another_version(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"version": "1.0"', '"version": "9.0"'))


def token_beyond_the_embedding(folder):
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["h"] = 9999
    path.write_text(json.dumps(document))


def template(text):
    return written("chat_template.jinja", text.encode())


CONFIG, TOKENIZER = "config.json", "tokenizer.json"
OWN_CODE = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
DAMAGED = {
    "a size that is text": (changed(CONFIG, hidden_size="64"), "m cannot be loaded: .*hidden_size"),
    "heads that do not divide": (changed(CONFIG, num_attention_heads=7), "m cannot be loaded: .*number of attention"),
    "rope": (changed(CONFIG, rope_parameters={"rope_theta": 1e4, "rope_type": "spiral"}), "KeyError: 'spiral'"),
    "activation": (changed(CONFIG, hidden_act="silly"), "KeyError: 'silly'"),
    "float8": (changed(CONFIG, dtype="float8_e4m3fn"), "m cannot be loaded: .*[Ff]loat8_e4m3fn"),
    "model type": (changed(CONFIG, model_type="llama99"), "does not recognize this architecture"),
    "config that is a list": (written(CONFIG, b"[1, 2]"), "m cannot be loaded"),
    "own code": (changed(CONFIG, model_type="mine", auto_map=OWN_CODE), r"give --trust-remote-code \(trust_remote"),
    "empty weights": (written("pytorch_model.bin", b"", without=["model.safetensors"]), "m cannot be loaded: EOFError"),
    "weights not fetched": (
        written("pytorch_model.bin", LFS, without=["model.safetensors"]),
        "pytorch_model.bin is a pointer of git-lfs to a file; run: git lfs pull",
    ),
    "safetensors not fetched": (written("model.safetensors", LFS), "model.safetensors is a pointer of git-lfs"),
    "tokenizer of another version": (tokenizer_of_another_version, "m cannot be loaded: .*version"),
    "tokenizer that is none": (written(TOKENIZER, b"{}"), "m cannot be loaded: KeyError"),
    "token beyond the embedding": (token_beyond_the_embedding, "token 9999, but the model knows 257 tokens"),
    "template that raises": (template("{{ raise_exception('no') }}"), "template fails: TemplateError: no. .*--raw"),
    "template that does not parse": (template("{% for %}"), "chat template fails: TemplateSyntaxError"),
    "template that renders nothing": (
        template("{% if false %}x{% endif %}"),
        "chat template .--raw leaves it out.*makes nothing",
    ),
    "constrained beams": (changed("generation_config.json", force_words_ids=[[1]]), "LlamaForCausalLM.generate fails"),
}


@pytest.mark.parametrize("damage, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_is_one_line(damage, message, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    damage(tmp_path / "m")
    result = run("generate", "m", "hi", "--max-new-tokens", "3", cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


# Some that are no multiples of others transformers itself refuses.
@pytest.mark.parametrize(
    "name, size",
    [
        *(("num_hidden_layers", -1), ("num_hidden_layers", 0), ("hidden_size", -8), ("intermediate_size", 0)),
        *(("vocab_size", -1), ("num_attention_heads", -2), ("head_dim", 0)),
    ],
)
def test_a_size_that_no_model_has_is_named(name, size, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    changed(CONFIG, **{name: size})(tmp_path / "m")
    for command in (["inspect", "m"], ["generate", "m", "hi"]):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: m cannot be loaded: its configuration says {name} {size}, expected 1 or more.\n"
        )


def test_own_code_is_asked_for_by_inspect(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    changed(CONFIG, model_type="mine", auto_map=OWN_CODE)(tmp_path / "m")
    result = run("inspect", "m", cwd=tmp_path)
    assert result.returncode == 2
    assert "give --trust-remote-code" in result.stderr


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_a_checkpoint_that_asks_for_beams_is_decoded_greedily(settings, model_folder, tmp_path):
    plain = run("generate", model_folder, "hi", "--raw", "--max-new-tokens", "6", cwd=tmp_path)
    shutil.copytree(model_folder, tmp_path / "m")
    changed("generation_config.json", **settings)(tmp_path / "m")
    result = run("generate", "m", "hi", "--raw", "--max-new-tokens", "6", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, plain.stdout)


def test_a_checkpoints_stop_strings_stop(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    changed("generation_config.json", stop_strings=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))(
        tmp_path / "m"
    )
    stopped = {}
    for folder in (model_folder, "m"):
        result = run("generate", folder, "hi", "--raw", "--max-new-tokens", "40", "--json", "-", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        stopped[str(folder)] = json.loads(result.stdout)["records"][0]["text"]
    plain, found = stopped.values()
    letter = re.search("[a-zA-Z]", plain)
    assert letter is not None
    assert found == plain[: letter.end()]


def test_export_refuses_adapters_beside_the_weights(model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    from tiny import llama

    shutil.copytree(model_folder, tmp_path / "m")
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "m")
    made = run("calibrate", model_folder, "-o", "p", "--method", "cats", "--tokens", "512", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    result = run("export", "m", "--profile", "p", "-o", "out", cwd=tmp_path)
    assert result.returncode == 2
    assert "m has adapters beside its weights; merge them" in result.stderr
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "seed": (["generate", "{model}", "hi", "--seed", "9" * 30], f"seed is {'9' * 30}, expected 0 to"),
    "negative seed": (["compare", "{model}", "--seed", "-1"], "seed is -1, expected 0 to"),
    "no such device": (["generate", "{model}", "hi", "--device", "tpu"], "device is 'tpu', expected auto, cpu, cuda"),
    "argument that is no text": (["generate", "{model}", "h\udcff"], "the prompt is not text in UTF-8"),
    "method with settings": (["compare", "{model}", "--method", "catz:weighting=rms"], "Did you mean 'cats'"),
    "no room for new tokens": (
        ["generate", "{model}", "hello", "--raw", "--max-new-tokens", "2044"],
        "the prompt has 5 tokens, which with 2044 new ones is longer than the model's context of 2048: "
        "shorten it to 4 or ask for 2043 new ones",
    ),
}
if not torch.cuda.is_available():
    MISTAKES["no GPU"] = (["generate", "{model}", "hi", "--device", "cuda"], "cannot be used: ")


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(arguments, message, model_folder, tmp_path):
    result = run(*(a.replace("{model}", str(model_folder)) for a in arguments), cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_memory_and_pipes_are_not_blamed_on_the_model():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), BrokenPipeError()):
        with pytest.raises(type(error)), foreign("it fails", "Do something."):
            raise error
    told = pytest.raises(UnsupportedModelError, match=r"^it fails: KeyError: 'x'\. Do something\.$")
    with told, foreign("it fails", "Do something."):
        raise KeyError("x")


def test_what_nothing_foresaw_is_one_line_too(monkeypatch, model_folder, tmp_path):
    def break_(*_):
        raise LookupError("a defect")

    monkeypatch.setattr("countdown.loading.load_skeleton", break_)
    result = run("inspect", model_folder, cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "LookupError: a defect (this was not foreseen; --debug shows" in result.stderr


@pytest.mark.parametrize(
    "stdin, message",
    [
        (None, "stdin is closed; give a prompt, or pipe one in"),
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x80"), encoding="utf-8"), "from stdin is not text in utf-8"),
        (io.StringIO("\n"), "the prompt is empty"),
    ],
)
def test_a_stdin_without_a_prompt(stdin, message, monkeypatch, model_folder, tmp_path):
    monkeypatch.setattr(sys, "stdin", stdin)
    result = run("generate", model_folder, "-", cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_prompt_from_stdin_has_no_byte_order_mark(monkeypatch, model_folder, tmp_path):
    spoken = run("generate", model_folder, "hi", "--raw", "--max-new-tokens", "4", cwd=tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffhi"))
    read = run("generate", model_folder, "-", "--raw", "--max-new-tokens", "4", cwd=tmp_path)
    assert read.stdout == spoken.stdout


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_loses_nothing_else(closed, monkeypatch, model_folder, tmp_path):
    streams = {"stdout": io.StringIO(), "stderr": io.StringIO(), closed: None}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    command = ["countdown", "generate", str(model_folder), "hi", "--raw", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "g.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    (record,) = json.loads((tmp_path / "g.json").read_text())["records"]
    kept = {"stdout": "4 tokens", "stderr": record["text"]}[closed]
    other = streams["stderr" if closed == "stdout" else "stdout"]
    assert kept in other.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_an_answer_goes_on_where_stdout_lacks_a_character(encoding, monkeypatch, model_folder, tmp_path):
    monkeypatch.setattr("countdown.engine.streaming.TextStream.add", lambda self, _: "→ é")
    out = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
        command = ["countdown", "generate", str(model_folder), "hi", "--raw", "--max-new-tokens", "2", "-q"]
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        assert out.getvalue().decode(encoding) == "? é? é\n".encode(encoding, "replace").decode(encoding)


def test_a_short_context_is_calibrated_and_evaluated_in_windows_that_fit(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    changed(CONFIG, max_position_embeddings=96)(tmp_path / "m")
    made = run("calibrate", "m", "-o", "p", "--method", "cats", "--tokens", "512", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    calibration = json.loads((tmp_path / "p" / "profile.json").read_text())["calibration"]
    assert (calibration["window"], calibration["tokens"]) == (96, 480)
    for more, expected in ([], 96), (["--window", "32"], 32):
        options = ["--profile", "p", "--windows", "2", *more, "--json", "-"]
        result = run("evaluate", "m", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        (record,) = json.loads(result.stdout)["records"]
        assert (record["window_tokens"], record["tokens"]) == (expected, 2 * (expected - 1))
    result = run("evaluate", "m", "--profile", "p", "--window", "200", cwd=tmp_path)
    assert result.returncode == 2
    assert "window is 200, longer than the model's context of 96" in result.stderr


@pytest.mark.parametrize("name", ["missing.gguf", "org/missing.GGUF"])
def test_of_a_missing_gguf_file_nobody_else_says_anything(name, tmp_path):
    done = spawn("inspect", name, cwd=tmp_path, env={"HF_HUB_OFFLINE": "0"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: model file {name} does not exist.\n"


@pytest.mark.parametrize(
    "command", ["inspect MODEL", "compare MODEL", "generate MODEL hello", "benchmark decode MODEL"]
)
def test_without_the_hub_a_command_says_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = run(*command.replace("MODEL", "org/name").split(), cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: org/name is no local folder, and the hub.*set HF_HUB_OFFLINE=1.*\n", done.stderr)
