"""Any server with OpenAI's completions: vllm serve, llama-server, SGLang, trtllm-serve, Ollama, LM Studio, finial.

Options: url (such as http://127.0.0.1:8000/v1), name (of the model there; the first it lists when absent), key.
`model` is a checkpoint with the server's tokenizer: prompts are sent as token ids, and as text to servers that take
none.  Work is equal when the server's own `usage` says so; a server that does not count cannot be measured.
Runs under finial's interpreter, for its tokenizer; everything else is the standard library.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from serve import serve, top

TOP = 5  # the most that OpenAI's completions give
WAIT_S = 600
# Said beyond OpenAI's own fields; a server that refuses unknown ones is asked again without them.
EXTRAS = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}


class Refused(RuntimeError):
    """The server's own words."""


class Session:
    device = "server"

    def __init__(
        self,
        model: str,
        format: str,
        threads: int,
        context: int,
        sequences: int = 8,
        cache: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not cache:
            raise ValueError("a server keeps its cache")
        options = options or {}
        if "url" not in options:
            raise ValueError("no url: say where the server is, such as http://127.0.0.1:8000/v1")
        self._url = urllib.parse.urlsplit(options["url"].rstrip("/"))
        if not self._url.path:  # as most servers are called
            self._url = self._url._replace(path="/v1")
        self._key = options.get("key", "")
        self._name = options.get("name") or self._get("/models")["data"][0]["id"]
        self._extras = True
        self._tokenizer = _tokenizer(model)
        self._ids = self._takes_ids()
        if not self._ids and self._tokenizer is None:
            raise ValueError(f"{self._name} takes no token ids, and {model} has no tokenizer to make text of them")
        self.precision = (
            f"what {self._name} at {self._url.netloc} is set to; prompts as {'ids' if self._ids else 'text'}"
        )

    # --- the protocol ------------------------------------------------------------------------------------------------

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """All prompts at once, a connection each.  `times` is given when every token came in a piece of its own; else
        `at_first` says how many came in the first, where the server gives ids.
        """
        results: list[Any] = [None] * len(prompts)

        def one(sequence: int) -> None:
            try:
                results[sequence] = self._stream(prompts[sequence], new)
            except Exception as error:  # handed to the caller's thread below
                results[sequence] = error

        self._begin = time.perf_counter()
        others = [threading.Thread(target=one, args=(sequence,)) for sequence in range(1, len(prompts))]
        for thread in others:
            thread.start()
        one(0)
        for thread in others:
            thread.join()
        for result in results:
            if isinstance(result, Exception):
                raise result
        times = [result["times"] for result in results]
        together = [1 if len(result["times"]) == new else result["at_first"] for result in results]
        return {
            "first": [found[0] for found in times],
            "last": [found[-1] for found in times],
            "tokens": [result["tokens"] for result in results],
            "times": times if all(len(found) == new for found in times) else None,
            "at_first": None if None in together else together,
        }

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """The prompt echoed with the most likely tokens of each position; few servers do it."""
        body = {"prompt": self._prompt(ids), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": TOP}
        found = (self._post(body)["choices"][0].get("logprobs") or {}).get("top_logprobs") or []
        if len(found) < len(ids):
            raise Refused(f"{self._name} does not echo a prompt with its log-probabilities")
        return top([self._known(entry) for entry in [*found[1 : len(ids)], None]])

    def greedy(self, ids: list[int], new: int) -> dict[str, Any]:
        """Its own text with the most likely tokens of each position, where their ids can be told; else empty."""
        body = {"prompt": self._prompt(ids), "max_tokens": new, "temperature": 0, "logprobs": TOP}
        reply = self._post(body)
        choice = reply["choices"][0]
        tokens = self._tokens(choice.get("token_ids"), choice["text"], self._count(reply.get("usage"), ids, new))
        found = (choice.get("logprobs") or {}).get("top_logprobs") or []
        return {"tokens": tokens, **top([self._known(entry) for entry in found] if len(found) == len(tokens) else [])}

    def memory(self) -> dict[str, Any]:
        """The server's is its own affair."""
        return {"peak_bytes": None}

    # --- one request -------------------------------------------------------------------------------------------------

    def _stream(self, prompt: list[int], new: int) -> dict[str, Any]:
        body = {"prompt": self._prompt(prompt), "max_tokens": new, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        times: list[float] = []
        ids: list[int] = []
        text, usage, together = "", None, None
        for event in self._events(body):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or []:
                got = choice.get("token_ids") or []
                if choice.get("text") or got:
                    times.append(time.perf_counter() - self._begin)
                    together = len(got) or None if len(times) == 1 else together
                    text += choice.get("text") or ""
                    ids += got
        if not times:
            raise Refused(f"{self._name} ended without a token")
        tokens = self._tokens(ids, text, self._count(usage, prompt, new))
        return {"times": times, "tokens": tokens, "at_first": together}

    def _count(self, usage: dict[str, Any] | None, prompt: list[int], new: int) -> int:
        """Equal work, by the server's own count."""
        if not usage:
            raise Refused(f"{self._name} does not count its tokens (no usage), so its work cannot be checked")
        if usage["prompt_tokens"] != len(prompt):
            raise Refused(f"unequal work: {usage['prompt_tokens']} prompt tokens instead of {len(prompt)}")
        if usage["completion_tokens"] != new:
            raise Refused(f"unequal work: {usage['completion_tokens']} tokens instead of {new}")
        return new

    def _tokens(self, ids: list[int] | None, text: str, count: int) -> list[int]:
        """Ids as the server gave them; else those of its text, when they are as many as it counted."""
        if ids and len(ids) == count:
            return ids
        found = self._tokenizer.encode(text, add_special=False) if self._tokenizer is not None else []
        if len(found) != count:
            raise Refused(f"{self._name} gives no token ids, and its text makes {len(found)} instead of {count}")
        return list(found)

    def _known(self, entry: dict[str, float] | None) -> dict[int, float]:
        """Ids of an entry's tokens: named so, or the only id that such a text makes."""
        found = {}
        for name, logprob in (entry or {}).items():
            if name.startswith("token_id:"):
                found[int(name.removeprefix("token_id:"))] = logprob
            elif self._tokenizer is not None:
                ids = self._tokenizer.encode(name, add_special=False)
                if len(ids) == 1:
                    found[ids[0]] = logprob
        return found

    def _prompt(self, ids: list[int]) -> list[int] | str:
        return ids if self._ids else self._tokenizer.decode(ids, skip_special=False)

    def _takes_ids(self) -> bool:
        try:
            usage = self._post({"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0}).get("usage") or {}
        except Refused:
            return False
        return usage.get("prompt_tokens") == 3  # one that made text of them counts otherwise

    # --- HTTP --------------------------------------------------------------------------------------------------------

    def _get(self, path: str) -> Any:
        return json.loads(self._open("GET", path, None).read())

    def _post(self, body: dict[str, Any]) -> Any:
        return json.loads(self._request(body).read())

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Server-sent events, until [DONE] or the end."""
        for line in self._request(body):
            data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise Refused(str(event["error"]))
                yield event

    def _request(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        body = {"model": self._name, **body}
        if self._extras:
            try:
                return self._open("POST", "/completions", {**body, **EXTRAS})
            except Refused as error:
                plain = self._open("POST", "/completions", body)  # when this fails too, the fields were not the reason
                self._extras = False
                print(f"asks without {', '.join(EXTRAS)}: {error}")
                return plain
        return self._open("POST", "/completions", body)

    def _open(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.netloc, timeout=WAIT_S)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            connection.request(method, self._url.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
        except OSError as error:
            raise ConnectionError(f"no server at {self._url.netloc}: {error}") from error
        if response.status != 200:
            raise Refused(f"{response.status} {response.read(500).decode(errors='replace').strip()}")
        return response


def _tokenizer(model: str) -> Any:
    from finial.errors import FinialError
    from finial.files.checkpoint import open_checkpoint

    try:
        return open_checkpoint(model).text()
    except FinialError:
        return None


if __name__ == "__main__":
    serve(Session, "OpenAI-compatible server", "OpenAI completions")
