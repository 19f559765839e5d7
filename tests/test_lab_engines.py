"""Adapters of engines that cannot run here, on fakes that speak those engines' documented interfaces; servers; and
environments that are installed whole or not at all.

Every fake is the same small language model, so what an adapter must hand on is known to the token.
"""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import finial
from finial.cli import invoke
from finial.lab.engines import environments, setup
from finial.lab.engines.check import check, checkable
from finial.lab.engines.environments import ENVIRONMENTS, EngineError, Environment, install, interpreter, state
from finial.lab.engines.setup import missing
from finial.lab.engines.table import ADAPTERS, ENGINES, Places
from finial.lab.worker import Worker, WorkerError
from finial.machine import Sources

VOCABULARY = 50
SOURCES = str(Path(finial.__file__).parent.parent)

# The model of all fakes: after `token` at position `at` come logits that anyone can compute again.
MODEL = """
import math
VOCABULARY = 50
def logits(token, at):
    return [math.sin(1.7 * token + 0.3 * at + 2.1 * other) * 3 for other in range(VOCABULARY)]
def following(ids, at=None):
    row = logits(ids[-1], len(ids) - 1)
    return row.index(max(row))
def logprobs(token, at):
    row = logits(token, at)
    total = math.log(sum(map(math.exp, row)))
    return [value - total for value in row]
def best(token, at, count):
    row = logprobs(token, at)
    return sorted(((value, other) for other, value in enumerate(row)), reverse=True)[:count]
"""
model: dict[str, Any] = {}
exec(MODEL, model)


def written(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(model["following"](ids))
    return ids[len(prompt) :]


FAKES = {
    # docs.vllm.ai: LLM, SamplingParams, LLMEngine.add_request and step, RequestOutput.prompt_logprobs
    "vllm": """
from toy import *
import os
from types import SimpleNamespace as N
__version__ = "0.0-fake"
platforms = N(current_platform=N(device_type="cpu"))
threads = []
class SamplingParams:
    def __init__(self, temperature=1.0, max_tokens=16, ignore_eos=False, detokenize=True, prompt_logprobs=None):
        assert temperature == 0.0 and not detokenize
        self.max_tokens, self.ignore_eos, self.prompt_logprobs = max_tokens, ignore_eos, prompt_logprobs
class Engine:
    def __init__(self): self.open = {}
    def add_request(self, name, prompt, params):
        assert params.ignore_eos
        self.open[name] = (list(prompt["prompt_token_ids"]), [], params.max_tokens)
    def has_unfinished_requests(self): return bool(self.open)
    def step(self):
        out = []
        for name, (ids, new, most) in list(self.open.items()):
            new.append(following(ids + new))
            out.append(N(request_id=name, outputs=[N(token_ids=list(new))]))
            if len(new) == most: del self.open[name]
        return out
class LLM:
    def __init__(self, model, dtype, max_model_len, max_num_seqs, skip_tokenizer_init, enable_prefix_caching,
                 max_logprobs, disable_log_stats):
        assert skip_tokenizer_init and dtype in ("auto", "bfloat16", "float16", "float32")
        assert threads == [1] and os.environ["OMP_NUM_THREADS"] == "1"
        self.llm_engine, self.most = Engine(), max_logprobs
    def generate(self, prompts, params, use_tqdm=True):
        assert params.prompt_logprobs <= self.most
        out = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            entries = [None]
            for at, (before, token) in enumerate(zip(ids, ids[1:])):
                found = {other: N(logprob=value) for value, other in best(before, at, params.prompt_logprobs)}
                found.setdefault(token, N(logprob=logprobs(before, at)[token]))
                entries.append(found)
            out.append(N(prompt_logprobs=entries))
        return out
""",
    # docs.sglang.io: Engine.generate with input_ids, stream, return_logprob, logprob_start_len, top_logprobs_num
    "sglang": """
from toy import *
__version__ = "0.0-fake"
class Engine:
    def __init__(self, model_path, dtype, context_length, max_running_requests, skip_tokenizer_init, log_level):
        assert skip_tokenizer_init
    def generate(self, input_ids, sampling_params, stream=False, return_logprob=False, logprob_start_len=-1,
                 top_logprobs_num=0):
        assert sampling_params["temperature"] == 0.0
        if not stream:
            assert return_logprob and logprob_start_len == 0
            tops = [None] + [[(v, o, None) for v, o in best(t, at, top_logprobs_num)]
                             for at, t in enumerate(input_ids[:-1])]
            own = [(None, input_ids[0], None)] + [(logprobs(t, at)[n], n, None)
                                                  for at, (t, n) in enumerate(zip(input_ids, input_ids[1:]))]
            return {"output_ids": [0], "meta_info": {"input_top_logprobs": tops, "input_token_logprobs": own}}
        assert sampling_params["ignore_eos"]
        single = isinstance(input_ids[0], int)
        def pieces():
            rows = [[p, []] for p in ([input_ids] if single else input_ids)]
            for count in range(1, sampling_params["max_new_tokens"] + 1):
                for index, (ids, new) in enumerate(rows):
                    new.append(following(ids + new))
                    piece = {"output_ids": list(new) if single else new[-1:], "meta_info": {"completion_tokens": count}}
                    yield piece if single else {**piece, "index": index}
        return pieces()
""",
    # nvidia.github.io/TensorRT-LLM: LLM.generate_async(streaming=True), SamplingParams.return_context_logits
    "tensorrt_llm": """
from toy import *
import torch
from types import SimpleNamespace as N
__version__ = "0.0-fake"
class SamplingParams:
    def __init__(self, max_tokens, end_id, detokenize, top_k=None, ignore_eos=False, return_context_logits=False):
        self.max_tokens, self.context = max_tokens, return_context_logits
        assert not detokenize and (ignore_eos or return_context_logits)
class Result:
    def __init__(self, ids, most): self.ids, self.new, self.most = ids, [], most
    def __aiter__(self): return self
    async def __anext__(self):
        if len(self.new) == self.most: raise StopAsyncIteration
        self.new.append(following(self.ids + self.new))
        return N(outputs=[N(token_ids=list(self.new))])
class LLM:
    def __init__(self, model, dtype, max_batch_size, max_seq_len, skip_tokenizer_init): assert skip_tokenizer_init
    def generate_async(self, ids, params, streaming=False):
        assert streaming
        return Result(list(ids), params.max_tokens)
    def generate(self, ids, params, use_tqdm=True):
        assert params.context
        return N(context_logits=torch.tensor([logits(t, at) for at, t in enumerate(ids)]))
""",
    # turboderp-org/exllamav2, model.py and cache.py: forward over a cache whose current_seq_len is the position
    "exllamav2": """
from toy import *
import torch
__version__ = "0.0-fake"
class ExLlamaV2Config:
    def __init__(self, model): self.vocab_size = VOCABULARY
class ExLlamaV2Cache:
    def __init__(self, model, batch_size=1, max_seq_len=-1, lazy=False):
        self.current_seq_len, self.batch_size = 0, batch_size
class ExLlamaV2:
    def __init__(self, config): self.config = config
    def load_autosplit(self, cache): pass
    def forward(self, ids, cache, last_id_only=False):
        assert ids.shape[0] == cache.batch_size
        begin = cache.current_seq_len
        cache.current_seq_len += ids.shape[1]
        rows = torch.tensor([[logits(t, begin + at) + [99.0] * 0 for at, t in enumerate(row)] for row in ids.tolist()])
        pad = torch.full((*rows.shape[:2], 6), -1000.0)
        rows = torch.cat([rows, pad], -1)  # a padded vocabulary
        return rows[:, -1:] if last_id_only else rows
""",
    # turboderp-org/exllamav3, generator/generator.py and job.py; eval/ppl.py for logits without a cache
    "exllamav3": """
from toy import *
import torch
__version__ = "0.0-fake"
class Config:
    @staticmethod
    def from_directory(model): return Config()
class Cache:
    def __init__(self, model, max_num_tokens): assert max_num_tokens % 256 == 0
class Tokenizer:
    actual_vocab_size = VOCABULARY
    @staticmethod
    def from_config(config): return Tokenizer()
class Model:
    @staticmethod
    def from_config(config): return Model()
    def load(self): pass
    def forward(self, ids, params):
        assert params == {"attn_mode": "flash_attn_nc"}
        rows = torch.tensor([[logits(t, at) for at, t in enumerate(row)] for row in ids.tolist()])
        return torch.cat([rows, torch.full((*rows.shape[:2], 14), -1000.0)], -1)
class GreedySampler: pass
class Job:
    def __init__(self, input_ids, max_new_tokens, sampler, identifier):
        assert isinstance(sampler, GreedySampler) and input_ids.shape[0] == 1
        self.ids, self.most, self.identifier, self.new = input_ids[0].tolist(), max_new_tokens, identifier, []
class Generator:
    def __init__(self, model, cache, tokenizer, max_batch_size): self.jobs = []
    def enqueue(self, job): self.jobs.append(job)
    def num_remaining_jobs(self): return len(self.jobs)
    def iterate(self):
        out = [{"stage": "started", "identifier": job.identifier} for job in self.jobs if not job.new]
        for job in list(self.jobs):
            job.new.append(following(job.ids + job.new))
            token = torch.tensor([job.new[-1:]])
            out.append({"stage": "streaming", "identifier": job.identifier, "token_ids": token})
            if len(job.new) == job.most: self.jobs.remove(job)
        return out
""",
}
ADAPTER = {name: f"run_{name}.py" for name in FAKES}
SCORES = {"vllm": "top", "sglang": "top", "tensorrt_llm": "logits", "exllamav2": "logits", "exllamav3": "logits"}
TOP = 20


@pytest.mark.parametrize("name", FAKES)
def test_adapter_on_a_fake_of_its_engine(name: str, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(MODEL)
    (tmp_path / f"{name}.py").write_text(FAKES[name])
    if name == "vllm":  # which has its threads from torch
        (tmp_path / "torch.py").write_text("def set_num_threads(n): import vllm; vllm.threads.append(n)")
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    worker = Worker([sys.executable, str(ADAPTERS / ADAPTER[name])], {"PYTHONPATH": str(tmp_path)})
    try:
        hello = worker.ask("hello", 60)
        assert {"run", "score"} <= set(hello["operations"]) and "0.0-fake" in hello["version"]
        load = {"model": "toy", "format": "f16", "threads": 1, "context": 64, "sequences": 2, "options": {}}
        loaded = worker.ask("load", 60, cache=True, **load)
        assert loaded["precision"] and loaded["device"]
        single = worker.ask("run", 30, prompts=prompts[:1], new=6, keep=False)
        assert single["tokens"] == [written(prompts[0], 6)]
        (times,) = single["times"]
        assert len(times) == 6 and times == sorted(times) and times[0] == single["first"][0]
        kept = worker.ask("run", 30, prompts=prompts[:1], new=6, keep=True)
        again = worker.ask("run", 30, prompts=prompts[:1], new=6, keep=True)
        assert kept["tokens"] == again["tokens"] == single["tokens"], "a kept cache changes nothing"
        both = worker.ask("run", 30, prompts=prompts, new=4, keep=False)
        assert both["tokens"] == [written(prompt, 4) for prompt in prompts]
        path = tmp_path / "logits.npy"
        scored = worker.ask("score", 30, ids=prompts[0], path=str(path))
        assert scored["kind"] == SCORES[name]
        if scored["kind"] == "logits":
            expected = [model["logits"](token, at) for at, token in enumerate(prompts[0])]
            assert np.load(path) == pytest.approx(np.array(expected), abs=1e-5)
        else:
            assert len(scored["top"]) == 5 and scored["top"][-1] == [], "nobody says what follows the last id"
            for at, entry in enumerate(scored["top"][:-1]):
                known = model["best"](prompts[0][at], at, TOP)
                assert [token for token, _ in entry[:TOP]] == [token for _, token in known]
                assert entry[0][1] == pytest.approx(known[0][0])
                assert prompts[0][at + 1] in dict(map(tuple, entry)), "the text's own token is there for the perplexity"
        with pytest.raises(WorkerError, match="cache"):
            worker.ask("load", 60, cache=False, **load)
    finally:
        worker.close()


# --- servers -----------------------------------------------------------------------------------------------------


class FakeServer(http.server.BaseHTTPRequestHandler):
    """OpenAI's completions, as spoken by the server called `kind`."""

    kind = "vllm"
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "toy-model", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"]
        if self.kind == "strict" and "ignore_eos" in body:
            self.answer({"error": {"message": "unknown field ignore_eos"}}, 400)
        elif self.kind == "text" and not isinstance(prompt, str):
            self.answer({"error": {"message": "prompt must be a string"}}, 400)
        else:
            self.complete(body, prompt)

    def complete(self, body: dict[str, Any], prompt: Any) -> None:
        ids = [ord(letter) - 65 for letter in prompt] if isinstance(prompt, str) else prompt
        count = body["max_tokens"] - (self.kind == "short" and body["max_tokens"] > 1)
        tokens = written(ids, count)
        usage = {"prompt_tokens": len(ids) + (self.kind == "liar" and len(ids) > 3), "completion_tokens": count}
        names = self.kind == "vllm" and body.get("return_token_ids")
        if not body.get("stream"):
            choice: dict[str, Any] = {
                "index": 0,
                "text": "".join(chr(65 + t) for t in tokens),
                "finish_reason": "length",
            }
            if names:
                choice["token_ids"] = tokens
            if body.get("logprobs"):
                echoed = [*ids, *tokens] if body.get("echo") else tokens
                if body.get("echo") and self.kind != "vllm":
                    echoed = tokens  # most servers ignore it
                start = 0 if len(echoed) > len(tokens) else len(ids)
                choice["logprobs"] = {"top_logprobs": self.top([*ids, *tokens], start, body["logprobs"], names)}
            self.answer({"choices": [choice], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        assert body["stream_options"] == {"include_usage": True}
        step = 2 if self.kind == "pairs" else 1
        for at in range(0, count, step):
            piece = {"index": 0, "text": "".join(chr(65 + t) for t in tokens[at : at + step])}
            self.event({"choices": [{**piece, "token_ids": tokens[at : at + step]} if names else piece]})
        if self.kind != "silent":
            self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def top(self, ids: list[int], start: int, count: int, names: Any) -> list[Any]:
        found: list[Any] = []
        for at in range(start, len(ids)):
            entry = model["best"](ids[at - 1], at - 1, count) if at else None
            key = (lambda t: f"token_id:{t}") if names else (lambda t: chr(65 + t))
            found.append(None if entry is None else {key(token): value for value, token in entry})
        return found

    def event(self, data: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def answer(self, data: Any, status: int = 200) -> None:
        payload = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Any]:
    """serving(kind) -> a worker with the adapter on such a server; the tokenizer there is one letter a token."""
    opened: list[Any] = []
    letters = (
        "import sys\nsys.path.insert(0, sys.argv.pop(1))\nimport run_openai\n"
        "class Letters:\n"
        "    def encode(self, text, add_special=True): return [ord(letter) - 65 for letter in text]\n"
        "    def decode(self, ids, skip_special=True): return ''.join(chr(65 + i) for i in ids)\n"
        "run_openai._tokenizer = lambda model: Letters() if model == 'letters' else None\n"
        "run_openai.serve(run_openai.Session, 'server', '1')\n"
    )
    script = tmp_path / "adapter.py"
    script.write_text(letters)

    def start(kind: str, model: str = "letters") -> Worker:
        handler = type("Handler", (FakeServer,), {"kind": kind})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        worker = Worker([sys.executable, str(script), str(ADAPTERS)], {"PYTHONPATH": SOURCES})
        opened.extend([worker, server])
        options = {"url": f"http://127.0.0.1:{server.server_port}/v1"}
        load = {"format": "bf16", "threads": 1, "context": 64, "options": options}
        start.loaded = worker.ask("load", 60, model=model, **load)  # type: ignore[attr-defined]
        return worker

    yield start
    for thing in opened:
        if isinstance(thing, Worker):
            thing.close()
        else:
            thing.shutdown()
            thing.server_close()


PROMPT = [3, 1, 4, 1, 5]


def test_a_server_that_takes_and_gives_ids(serving: Any, tmp_path: Path) -> None:
    worker = serving("vllm")
    assert "toy-model" in serving.loaded["precision"] and "as ids" in serving.loaded["precision"]
    done = worker.ask("run", 30, prompts=[PROMPT, [9, 2, 6]], new=5, keep=False)
    assert done["tokens"] == [written(PROMPT, 5), written([9, 2, 6], 5)]
    assert all(len(times) == 5 and times == sorted(times) for times in done["times"])
    scored = worker.ask("score", 30, ids=PROMPT, path=str(tmp_path / "x"))
    assert scored["kind"] == "top" and scored["top"][-1] == []
    assert scored["top"][1] == [[t, pytest.approx(v)] for v, t in model["best"](1, 1, 5)]
    text = worker.ask("greedy", 30, ids=PROMPT, new=4)
    assert text["tokens"] == written(PROMPT, 4)
    assert text["top"][0] == [[t, pytest.approx(v)] for v, t in model["best"](5, 4, 5)]


def test_a_server_that_takes_text_alone(serving: Any) -> None:
    worker = serving("text")
    assert "as text" in serving.loaded["precision"]
    assert worker.ask("run", 30, prompts=[PROMPT], new=5, keep=False)["tokens"] == [written(PROMPT, 5)]
    with pytest.raises(WorkerError, match="does not echo"):
        worker.ask("score", 30, ids=PROMPT, path="x")
    text = worker.ask("greedy", 30, ids=PROMPT, new=4)
    assert text["tokens"] == written(PROMPT, 4) and [t for t, _ in text["top"][0]] == [
        t for _, t in model["best"](5, 4, 5)
    ]
    with pytest.raises(WorkerError, match="no tokenizer"):
        serving("text", model="none")


def test_a_server_that_refuses_unknown_fields_is_asked_without(serving: Any) -> None:
    worker = serving("strict")
    assert worker.ask("run", 30, prompts=[PROMPT], new=3, keep=False)["tokens"] == [written(PROMPT, 3)]


def test_tokens_that_come_in_pairs_have_no_times_of_their_own(serving: Any) -> None:
    done = serving("pairs").ask("run", 30, prompts=[PROMPT], new=6, keep=False)
    assert done["times"] is None and done["tokens"] == [written(PROMPT, 6)] and done["first"] < done["last"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("short", "5 tokens instead of 6"), ("liar", "6 prompt tokens instead of 5"), ("silent", "no usage")],
)
def test_work_that_a_server_does_not_do_is_no_number(serving: Any, kind: str, words: str) -> None:
    worker = serving(kind)
    with pytest.raises(WorkerError, match=words):
        worker.ask("run", 30, prompts=[PROMPT], new=6, keep=False)


def test_no_server_is_an_error_with_its_address(tmp_path: Path) -> None:
    worker = Worker([sys.executable, str(ADAPTERS / "run_openai.py")], {"PYTHONPATH": SOURCES})
    load = {"model": "x", "format": "bf16", "threads": 1, "context": 64}
    try:
        with pytest.raises(WorkerError, match="no url"):
            worker.ask("load", 60, **load)
        with pytest.raises(WorkerError, match=r"no server at 127\.0\.0\.1:9"):
            worker.ask("load", 60, options={"url": "http://127.0.0.1:9/v1"}, **load)
    finally:
        worker.close()


# --- environments ------------------------------------------------------------------------------------------------


def wheel(folder: Path, code: str, version: str = "1.0") -> Path:
    """A wheel of one module, made by hand (packaging.python.org, binary distribution format)."""
    path = folder / f"toyengine-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = f"toyengine-{version}.dist-info"
        archive.writestr("toyengine.py", code)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toyengine\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """toy(code, **changes): from now on the environment "toy" installs a module of this code."""
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)  # pip, whatever this machine has

    def make(code: str, version: str = "1.0", **changes: Any) -> None:
        step = ("--no-index", "--no-deps", str(wheel(tmp_path, code, version)))
        entry = Environment(
            name="toy",
            module="toyengine",
            distribution="toyengine",
            steps=(step,),
            **{"gigabytes": 0.01, "runs": "nothing", **changes},
        )
        monkeypatch.setattr(environments, "ENVIRONMENTS", {**ENVIRONMENTS, "toy": entry})

    return make


def bare(tmp_path: Path) -> Sources:
    """A machine without anything."""
    folders = {"root": tmp_path, "proc": tmp_path / "proc", "sys": tmp_path / "sys"}
    return Sources(**folders, system="Linux", run=lambda command: None, load=lambda names: None)


def test_an_environment_is_made_whole_or_not_at_all(toy: Any, tmp_path: Path) -> None:
    root, said = tmp_path / "engines", []
    toy("raise RuntimeError('no such kernel')")
    with pytest.raises(EngineError, match="no such kernel"):
        install("toy", root, said.append)
    assert list(root.iterdir()) == [], "what broke is gone"
    toy("answer = 42")
    python = install("toy", root, said.append)
    done = subprocess.run(
        [str(python), "-c", "import toyengine; print(toyengine.answer)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "42" and python == interpreter(root, "toy")
    found = state("toy", root)
    assert found.version == "1.0" and found.python == python and not found.own
    assert any(line.startswith("Successfully") for line in said) and "GB" in said[-1]
    with pytest.raises(EngineError, match="is installed"):
        install("toy", root)
    toy("raise RuntimeError('worse')", "2.0")
    with pytest.raises(EngineError, match="worse"):
        install("toy", root, force=True)
    assert state("toy", root).version == "1.0", "what was there stays"
    assert len(list(root.iterdir())) == 2, "an environment and the link to it"


def test_what_cannot_be_installed_is_said_before_anything_is_made(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "engines"
    with pytest.raises(EngineError, match="NVIDIA GPU"):
        install("tensorrt-llm", root, sources=bare(tmp_path))
    with pytest.raises(EngineError, match="choose from"):
        install("lama", root)
    usage = namedtuple("usage", "total used free")(100, 99, 5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    toy("answer = 42")
    with pytest.raises(EngineError, match=r"0\.0 GB is free"):
        install("toy", root)
    assert not root.exists() or not list(root.iterdir())


def test_states_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "is_here", lambda name: name == "transformers")
    monkeypatch.setattr(environments.importlib.metadata, "version", lambda name: "5.0")
    here = bare(tmp_path)
    assert state("transformers", tmp_path, here).own and state("transformers", tmp_path, here).version == "5.0"
    assert "finial engines install openvino" in state("openvino", tmp_path, here).why
    assert "NVIDIA" in state("sglang", tmp_path, here).why
    assert missing(ENGINES["OpenVINO GenAI"], Places(tmp_path, tmp_path)) == state("openvino", tmp_path, here).why


def test_an_engine_of_a_gpu_is_tried_before_it_gets_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(tmp_path, tmp_path)
    gpus = [engine for engine in ENGINES.values() if engine.device == "cuda"]
    assert {"finial cuda", "transformers CUDA", "transformers CUDA compiled"} == {engine.name for engine in gpus}
    monkeypatch.setattr(setup, "has_nvidia", lambda: False)
    assert all("NVIDIA GPU" in missing(engine, places) for engine in gpus)
    monkeypatch.setattr(setup, "has_nvidia", lambda: True)
    broken = replace(ENGINES["finial cuda"], tried="import sys; sys.exit('no driver for it')")
    assert missing(broken, places) == "no driver for it"
    assert missing(replace(broken, tried="pass"), places) == ""
    assert sys.platform == "darwin" or "Apple" in missing(ENGINES["transformers MPS"], places)


def test_every_engine_has_its_adapter_and_environment() -> None:
    for engine in ENGINES.values():
        assert (ADAPTERS / engine.adapter).exists(), engine.name
        assert not engine.environment or engine.environment in ENVIRONMENTS, engine.name
    used = {engine.environment for engine in ENGINES.values()}
    assert set(ENVIRONMENTS) - used == {"export"}


def test_adapters_import_their_engine_and_what_comes_with_it_alone() -> None:
    allowed = {"serve", "numpy", "torch", "finial", "mlx", *sys.stdlib_module_names}
    for path in ADAPTERS.glob("run_*.py"):
        modules = {e.module.split(".")[0] for e in ENGINES.values() if e.adapter == path.name} | allowed
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and not line.startswith('"'):
                top = words[1].split(".")[0]
                assert top in modules or top == "openvino", f"{path.name} imports {top}"


# --- the commands ------------------------------------------------------------------------------------------------


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["engines", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "not installed" in shown and "finial engines install openvino" in shown and "vLLM" not in shown
    assert all(name in shown for name in ENVIRONMENTS)


def test_a_check_is_a_verdict(tmp_path: Path) -> None:
    found = check("finial", tmp_path, tmp_path / "models", lambda line: None)
    assert found.ok and "KL" in found.text and "100%" in found.text
    absent = check("openvino", tmp_path, tmp_path / "models", lambda line: None)
    assert not absent.ok and "not installed" in absent.text
    assert "export" not in checkable(tmp_path)
    assert invoke(["engines", "--root", str(tmp_path), "check", "openvino"]) == 1
    assert invoke(["engines", "--root", str(tmp_path), "check", "lama"]) == 2
