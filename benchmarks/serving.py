"""The engine against the bare loop, and the server against the engine, on a CPU.

    python benchmarks/serving.py MODEL [--profile DIR] [--versus llama.cpp] --output benchmarks/results/serving-X.json

In turn, round by round: the decode loop, the engine greedy and sampled, transformers' prefill and the engine's first
token. Then `countdown serve` in a process of its own: one client, eight, and for --minutes so many as --clients, each
of whose greedy answers must be what it is alone; resident memory is noted each minute. --versus llama.cpp, for a GGUF
file: the server of llama-cpp-python with the same weights in 16 bits, on as many threads, in turn with ours.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch

from countdown.loading import Source, load_model, load_tokenizer
from countdown.profiles.profile import Profile
from countdown.results import meta, write
from countdown.sparsify import sparsify_
from documents import commit, said
from engine import NEW, ROUNDS, SAMPLED, alone

OURS = "server, one client"


def main() -> None:
    """Measure and write."""
    arguments = _arguments()
    source = Source.parse(arguments.model)
    tokenizer, model = load_tokenizer(source), load_model(source, device="cpu")
    if arguments.profile:
        sparsify_(model, Profile.load(arguments.profile))
    ids = tokenizer(" ".join(str(n) for n in range(1000)))["input_ids"]
    header = meta(
        shlex.join(["python", "benchmarks/serving.py", source.label, *said(sys.argv[1:], arguments.model)]),
        commit=arguments.commit or commit(),
    )
    about = {"model": source.label, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    about |= {"profile": str(Profile.load(arguments.profile).recipe) if arguments.profile else "dense"}
    some = {"sampled": SAMPLED["sampled"]}
    records = [about | record for record in (*alone(model, tokenizer, ids, some), *served(arguments))]
    for record in records:
        print(json.dumps(record), file=sys.stderr)
    write(arguments.output, {"meta": header, "records": records})


def served(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what a server does."""
    with _serving(arguments) as (url, process):
        _ask(url, 0, NEW)
        with _others(arguments) as others:
            rates: dict[str, list[float]] = {OURS: [], **{name: [] for name in others}}
            for _ in range(ROUNDS):
                rates[OURS].append(_ask(url, 0, NEW)[1])
                for name, other in others.items():
                    rates[name].append(_ask_other(other, NEW))
        for name, found in rates.items():
            share = statistics.median(ours / one for ours, one in zip(rates[OURS], found, strict=True))
            of = {} if name == OURS else {"ours_to_it": share}
            yield {"arm": name, "new_tokens": NEW, "tokens_per_s": statistics.median(found), **of}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: _ask(url, n, NEW), range(8)))  # every place is traced then
            started = time.perf_counter()
            counts = [tokens for tokens, *_ in pool.map(lambda n: _ask(url, n, NEW), range(24))]
        total = sum(counts) / (time.perf_counter() - started)
        yield {"arm": "server, 8 clients", "new_tokens": NEW, "tokens_per_s": total}
        yield _soak(url, process.pid, arguments)


def _soak(url: str, pid: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask from many clients for some minutes; each answer must be what it is alone."""
    alone = {n: _ask(url, n, 8 + n)[2] for n in range(16)}
    end, lock = time.monotonic() + 60 * arguments.minutes, threading.Lock()
    found = {"requests": 0, "other_answers": 0, "refused": 0}
    memory = [_resident(pid)]

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            turn += 7
            try:
                text = _ask(url, turn % 16, 8 + turn % 16)[2]
                how = "requests" if text == alone[turn % 16] else "other_answers"
            except RuntimeError:
                how = "refused"
            with lock:
                found[how] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(min(60, max(0.1, end - time.monotonic())))
        memory.append(_resident(pid))
    for thread in threads:
        thread.join()
    about = {"arm": "soak", "clients": arguments.clients, "minutes": arguments.minutes}
    return about | found | {"resident_mb": memory}


def _ask(url: str, number: int, tokens: int) -> tuple[int, float, str]:
    """Return how many tokens an answer had, its tokens/s, and its text."""
    body = {"prompt": f"{number}: once upon a time", "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    # Not a client of many features: it would take the cores that the server computes on.
    connection = HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    if response.status != HTTPStatus.OK:
        raise RuntimeError(response.read().decode())
    lines = [(time.perf_counter(), line) for line in response if line.startswith(b"data: {")]
    connection.close()
    chunks = [json.loads(line.removeprefix(b"data: ")) for _, line in lines]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    count = chunks[-1]["usage"]["completion_tokens"]
    return count, (count - 1) / (lines[-2][0] - lines[0][0]), text


def _ask_other(url: str, tokens: int) -> float:
    """Return the tokens/s of llama.cpp's answer to the same prompt: a chunk a token."""
    body = {"prompt": "0: once upon a time", "max_tokens": tokens, "temperature": 0, "stream": True}
    connection = HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    times = [time.perf_counter() for line in connection.getresponse() if line.startswith(b"data: {")]
    connection.close()
    return (len(times) - 1) / (times[-1] - times[0])


@contextmanager
def _others(arguments: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Yield the addresses of other servers, by name, until the context is left."""
    if not arguments.versus:
        yield {}
        return
    from countdown.benchmark.llama_cpp import NAME

    found, processes = {}, []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for kind in ("BF16", "F16"):
                path, port = Path(folder, f"{kind}.gguf"), _free_port()
                in_16_bits(Path(arguments.model), path, kind)
                threads = str(torch.get_num_threads())
                command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port)]
                command += ["--n_ctx", "1024", "--n_threads", threads, "--n_threads_batch", threads]
                command += ["--verbose", "False"]
                processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                found[f"{NAME}'s, {kind}"] = f"http://127.0.0.1:{port}"
            for url in found.values():
                _wait_for(url)
            yield found
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def in_16_bits(path: Path, to: Path, kind: str) -> None:
    """Write a GGUF file again with its matrices in 16 bits: BF16 or F16."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop("general.architecture").contents()
    writer = gguf.GGUFWriter(to, architecture)
    for name, field in fields.items():
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_for(url: str) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        try:
            connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
            connection.request("GET", "/v1/models")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} did not start")


@contextmanager
def _serving(arguments: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    more = ["--profile", str(arguments.profile)] if arguments.profile else []
    command = [sys.executable, "-m", "countdown", "serve", arguments.model, "--port", "0", "--device", "cpu", *more]
    process = subprocess.Popen([*command, "--max-waiting", "100"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"(http://\S+)/v1", line):
            break
    else:
        raise SystemExit("the server did not start")
    try:
        yield found[1], process
    finally:
        process.terminate()
        process.wait()


def _resident(pid: int) -> float:
    """Return the resident memory of a process, in MB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 1e3, 1) if found else 0.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--versus", choices=["llama.cpp"])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
