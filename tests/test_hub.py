"""Models of the hub where it cannot be reached: said at once; what is cached is used. No test leaves the machine."""

from __future__ import annotations

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http as client

import countdown
from countdown import hub
from countdown.errors import ConfigError
from countdown.loading import Source
from countdown.modules import sparse_modules

COMMIT = "0" * 40
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A hub that nobody listens at, and an empty cache. No request is made twice."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def slept(seconds):
        raise AssertionError(f"the hub's client waits {seconds} s to try again")

    monkeypatch.setattr(client.time, "sleep", slept)


@pytest.fixture
def cached(unreachable, model_folder, tmp_path):
    """The cache's folder of the model org/tiny, of which all is in the cache, and that it has no profile."""
    repository = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(model_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in ("profile.json", "profile.safetensors"):
        known = repository / ".no_exist" / COMMIT / "countdown" / name
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()
    return repository


@pytest.mark.parametrize("load", [countdown.from_pretrained, countdown.load_tokenizer, Source.parse])
@pytest.mark.parametrize("name", ["org/name", "name", "bad name!!"])
def test_what_is_neither_local_nor_cached_is_refused_with_a_remedy(load, name, unreachable):
    with pytest.raises(ConfigError) as caught:
        load(name)
    told = str(caught.value)
    assert told.startswith(f"{name} is no local folder, and the hub, {NOWHERE}, could not be reached (")
    assert "give a folder or a GGUF file, or set HF_HUB_OFFLINE=1" in told
    assert "\n" not in told


def test_what_is_cached_loads_without_the_hub(cached, caplog):
    assert countdown.load_tokenizer("org/tiny")("abc")["input_ids"]
    assert not sparse_modules(countdown.from_pretrained("org/tiny", device="cpu"))
    assert "of org/tiny, what is cached is used" in caplog.text


def test_a_model_whose_profile_nobody_asked_for_is_not_taken_for_dense(cached):
    shutil.rmtree(cached / ".no_exist")
    with pytest.raises(ConfigError, match=r"whether org/tiny has a profile is not known.*HF_HUB_OFFLINE=1"):
        countdown.from_pretrained("org/tiny", device="cpu")


def test_what_is_cached_in_part_is_refused(cached):
    for path in (cached / "snapshots" / COMMIT).glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="org/tiny cannot be loaded from what of it is cached, and the hub could not"):
        countdown.load_tokenizer("org/tiny")


def test_offline_on_purpose_asks_nobody(cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "unreached", lambda: pytest.fail("the hub was asked for"))
    assert countdown.load_tokenizer("org/tiny")
    with pytest.raises(ConfigError, match=r"org/name cannot be loaded: .* not in the hub's cache, and HF_HUB_OFFLINE"):
        countdown.load_tokenizer("org/name")


class _Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_whatever_the_hub_answers_it_is_there(unreachable, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.unreached() is None
        assert not Source.parse("org/name").cached_only
        server.shutdown()
