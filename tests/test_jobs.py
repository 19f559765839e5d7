"""`finial batch`: every request answered once and in order, whatever happens to the process or its workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from brake import Brake
from finial import LLM
from finial.errors import FileError
from finial.jobs import run_local, run_ray
from finial.jobs_file import MAX_LINE, JobFiles, first_model
from waiting import until


def request(name: object, tokens: int = 8, **body: Any) -> str:
    asked = {"messages": [{"role": "user", "content": f"What says {name}?"}], "temperature": 0, "max_tokens": tokens}
    line = {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "demo", **asked, **body},
    }
    return json.dumps(line)


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(answer: dict[str, Any]) -> str:
    said: str = answer["response"]["body"]["choices"][0]["message"]["content"]
    return said


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM("demo", threads=1, hidden=True) as opened:
        yield opened


def test_answers_are_the_models_and_in_order(llm: LLM, tmp_path: Path) -> None:
    lengths = [40, 1, 17, 3, 25, 2, 9, 30, 1, 12]  # those that end early wait for those before them
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", n) for i, n in enumerate(lengths)])
    counted: list[int] = []
    with JobFiles(source, tmp_path / "out.jsonl") as files:
        assert files.count() == len(lengths)
        run_local(files, llm, report=counted.append)
    got = answers(tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in got] == [f"r{i}" for i in range(len(lengths))]
    assert sum(counted) == len(lengths) and len({line["id"] for line in got}) == len(lengths)
    for i, line in enumerate(got):
        expected = llm.chat([{"role": "user", "content": f"What says r{i}?"}], temperature=0, max_tokens=lengths[i])
        assert content(line) == expected.text and line["error"] is None
        assert line["response"]["body"]["usage"]["completion_tokens"] == len(expected.tokens)


def test_a_line_that_is_wrong_gets_its_error_and_the_rest_their_answers(llm: LLM, tmp_path: Path) -> None:
    lines = [
        request("good"),
        "{torn",
        '"no object"',
        json.dumps({"custom_id": 7, "method": "POST", "url": "/v1/chat/completions", "body": {}}),
        json.dumps({"custom_id": "url", "method": "POST", "url": "/v1/images", "body": {}}),
        request("field", temprature=1),
        request("long", tokens=10**6),
        request("model", model="gpt-9"),
        request("stream", stream=True),
        "[" * 5000,
        json.dumps(
            {
                "custom_id": "text",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": "ROMEO:", "max_tokens": 3},
            }
        ),
        json.dumps({"custom_id": "vector", "method": "POST", "url": "/v1/embeddings", "body": {"input": "ROMEO:"}}),
        "   ",  # blank: no request
        request("huge", user="x" * MAX_LINE),
        request("last"),
    ]
    source = write(tmp_path / "in.jsonl", lines)
    source.write_bytes(source.read_bytes() + b'{"custom_id": "\xff"}')  # not UTF-8, and without a line end
    with JobFiles(source, tmp_path / "out.jsonl") as files:
        run_local(files, llm)
        assert files.done == files.count() == 15
    got = answers(tmp_path / "out.jsonl")
    statuses = [line["response"]["status_code"] if line["response"] else line["error"]["code"] for line in got]
    bad = "invalid_line"
    assert statuses == [200, bad, bad, bad, bad, 400, 400, 404, 400, bad, 200, 200, bad, 200, bad]
    assert "temprature" in got[5]["response"]["body"]["error"]["message"]
    assert [line["custom_id"] for line in got] == [
        "good", None, None, None, "url", "field", "long", "model", "stream", None, "text", "vector", None, "last", None
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [0, 1, 2.5, 4, 4.99])
def test_a_rerun_goes_on_where_the_file_ends(llm: LLM, tmp_path: Path, kept: float) -> None:
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", 4) for i in range(5)])
    target = tmp_path / "out.jsonl"
    with JobFiles(source, target) as files:
        run_local(files, llm)
    lines = target.read_bytes().splitlines(keepends=True)
    whole = b"".join(lines[: int(kept)])
    torn = lines[int(kept)][: int((kept % 1) * len(lines[int(kept)]))]
    target.write_bytes(whole + torn)
    with JobFiles(source, target) as files:
        assert files.done == int(kept) and target.read_bytes() == whole
        assert [line.number for line in files.pending()] == list(range(int(kept), 5))
        run_local(files, llm)
    got = answers(target)
    assert [line["custom_id"] for line in got] == [f"r{i}" for i in range(5)]
    assert target.read_bytes().startswith(whole)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request("a")])
    other = tmp_path / "other.jsonl"
    for text in ('{"custom_id": "b"}\n', '{"custom_id": "a"}\n{"custom_id": "b"}\n', "notes\n", "[" * 5000 + "\n"):
        other.write_text(text)
        with pytest.raises(FileError, match="does not answer"):
            JobFiles(source, other)
        assert other.read_text() == text
    with pytest.raises(FileError, match="no such file"):
        JobFiles(tmp_path / "nowhere", other)
    with pytest.raises(FileError, match="itself"):
        JobFiles(source, source)
    with (
        JobFiles(source, tmp_path / "out.jsonl"),
        pytest.raises(FileError, match="another process"),
    ):
        JobFiles(source, tmp_path / "out.jsonl")


def test_the_model_that_the_first_line_names(tmp_path: Path) -> None:
    assert first_model(write(tmp_path / "a", [request("a", model="x/y")])) == "x/y"
    for line in ("{", "[]", '{"body": 3}', '{"body": {"model": 3}}', "\u00ff"):
        assert first_model(write(tmp_path / "b", [line])) is None


def test_kill_9_in_the_middle_then_a_rerun(tmp_path: Path) -> None:
    count = 60  # requests, which take some 640 steps, two at a time
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", 5 + i % 40, ignore_eos=True) for i in range(count)])
    target, brake = tmp_path / "out.jsonl", Brake(tmp_path)
    arguments = ["batch", str(source), str(target), "--threads", "1", "--max-batch", "2"]
    command = [sys.executable, "-m", "finial.cli", *arguments]
    for lines, steps in ((6, 150), (30, 400)):  # killed twice, before it may be over
        brake.hold(steps)
        braked = [sys.executable, "-c", f"{brake.code}\nfrom finial.cli import main\nmain()", *arguments]
        process = subprocess.Popen(braked, stderr=subprocess.DEVNULL)
        until(lambda lines=lines: target.exists() and target.read_bytes().count(b"\n") > lines)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    before = target.read_bytes()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = answers(target)
    assert [line["custom_id"] for line in got] == [f"r{i}" for i in range(count)]
    assert all(line["response"]["status_code"] == 200 for line in got)
    assert target.read_bytes().startswith(before[: before.rfind(b"\n") + 1])  # what was there stayed
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f"{count} answers there already" in again.stderr


@pytest.mark.timeout(300)  # Ray takes seconds to begin on an idle machine, and minutes on a busy one
def test_a_killed_worker_on_ray_loses_and_doubles_nothing(llm: LLM, tmp_path: Path) -> None:
    if os.environ.get("CI") != "true":
        pytest.importorskip("ray", reason='no ray: pip install "finial[ray]"')
    count = 64
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", 30 + i % 9) for i in range(count)])
    target = tmp_path / "out.jsonl"
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        """One of the two workers, while it computes."""
        while not killed and not over.is_set():
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    title = (folder / "cmdline").read_bytes()
                except OSError:
                    continue
                if title.startswith(b"ray::MapWorker") and b"submit" in title and not killed:
                    killed.append(int(folder.name))
                    os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    with JobFiles(source, target) as files:
        killer.start()
        try:
            options = {"model": "demo", "threads": 1, "max_batch": 2}
            run_ray(files, options, address="local", workers=2, cpus=0.5, rows=4)
        finally:
            over.set()
            killer.join()
    assert killed
    got = answers(target)
    assert [line["custom_id"] for line in got] == [f"r{i}" for i in range(count)]
    with JobFiles(source, tmp_path / "alone.jsonl") as files:
        run_local(files, llm)
    assert [content(line) for line in got] == [content(line) for line in answers(tmp_path / "alone.jsonl")]
