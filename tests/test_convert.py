"""Conversion: llama.cpp computes from our GGUF files what transformers computes from the originals, and back again."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from reasoning_from_scratch.qwen3 import Qwen3Model
from safetensors.torch import load_file
from tokenizers import Tokenizer

import finial
import models
from finial.config import ModelConfig
from finial.errors import FileError, ModelError
from finial.files.checkpoint import open_checkpoint
from finial.files.convert import convert
from finial.files.pth import infer_config
from finial.files.synth import synth
from finial.files.synth_tokenizer import LLAMA3, QWEN, Vocabulary, write_tokenizer
from finial.formats import Tensor

SRC = Path(finial.__file__).parents[1]  # the same finial for child processes
TEXT = "The capital of France is Paris.\n\n  def f(x): return x ** 2  # 北京 é́ 👩‍👩‍👧 1234567"
PROMPT = [5, 77, 301, 12, 9, 254, 33]
VOCAB = 384


def _vocabulary(base: Vocabulary) -> Vocabulary:
    """The same kind of tokenizer with its special tokens at the end of a small vocabulary."""
    specials = dict(zip(range(VOCAB - len(base.specials), VOCAB), base.specials.values(), strict=True))
    return dataclasses.replace(base, specials=specials, reserved_from=min(specials))


# name -> (transformers' class, fields, tokenizer); the head sizes of the real families
SHAPES: dict[str, tuple[str, dict[str, Any], Vocabulary]] = {
    "qwen3": ("Qwen3", {"head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1e6}, QWEN),
    "qwen2": ("Qwen2", {"hidden_size": 256, "rope_theta": 1e6}, QWEN),
    "llama": ("Llama", {"head_dim": 64}, LLAMA3),
    "llama3": ("Llama", {"head_dim": 64, "tie_word_embeddings": True, "rope_scaling": models.LLAMA3}, LLAMA3),
}


def _load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Random models whose weights are bf16 values, with a tokenizer: name -> (directory, float32 model)."""
    out = {}
    for name, (kind, fields, base) in SHAPES.items():
        path = tmp_path_factory.mktemp("originals") / name
        vocabulary = _vocabulary(base)
        torch.manual_seed(1)
        end = next(i for i, token in vocabulary.specials.items() if token == vocabulary.eos)
        ids = {"bos_token_id": None, "eos_token_id": end}
        config = getattr(transformers, f"{kind}Config")(
            **{**models.BASE, "hidden_size": 128, "intermediate_size": 256, "vocab_size": VOCAB, **fields, **ids}
        )
        made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        models.vary(made)
        made.to(torch.bfloat16).save_pretrained(path)  # which also rounds the rope frequencies in memory: load again
        write_tokenizer(path, vocabulary, VOCAB)
        out[name] = (path, _load(path))
    return out


# ------------------------------------------------------------------------------------------------ llama.cpp

# In a process of its own: llama.cpp ends its process on a file it cannot take.  One thread, because its threads wait
# spinning; no flash attention, which would round to f16.
_LLAMA_CPP = """
import json, sys
import xllamacpp
jobs, out = json.load(sys.stdin), []
for job in jobs:
    params = xllamacpp.CommonParams()
    params.model.path = job["path"]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity, params.fit_params = 256, 1, False, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": job["prompt"], "n_predict": job["count"], "temperature": 0.0,
        "top_k": 1, "n_probs": 8, "cache_prompt": False, "return_tokens": True, "verbose": True})["__verbose"]
    steps = answer.get("completion_probabilities") or [{"id": None}]  # without tokens that end inside a character
    top = [[t["id"], t["logprob"]] for t in steps[0]["top_logprobs"]] if steps[0]["id"] == answer["tokens"][0] else []
    out.append({"ids": answer["tokens"], "top": top, "prompt_tokens": answer["tokens_evaluated"]})
    del server
print("RESULT" + json.dumps(out))
"""


def _llama_cpp(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _LLAMA_CPP],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.rsplit("RESULT", 1)[1])  # type: ignore[no-any-return]


def _greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """transformers' greedy ids, their log-probabilities [count, vocab], and each step's margin over the second best."""
    ids = list(prompt)
    logprobs = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logprobs.append(torch.log_softmax(logits.double(), -1).numpy())
        ids.append(int(logits.argmax()))
    best = np.sort(np.array(logprobs), axis=-1)
    return ids[len(prompt) :], np.array(logprobs), best[:, -1] - best[:, -2]


def _reference_of(path: Path, folder: Path) -> Any:
    """transformers on exactly the values that are stored in a GGUF file."""
    return _load(convert(path, folder, "f32"))


def test_llama_cpp_continues_as_transformers_does(originals: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    count = 16
    formats = dict.fromkeys(SHAPES, ("f32",)) | {"qwen3": ("f32", "bf16", "q8_0"), "llama": ("f32", "q4_0")}
    jobs, expected = [], []
    for name, (path, model) in originals.items():
        for format in formats[name]:
            file = convert(path, tmp_path / f"{name}-{format}.gguf", format)
            jobs.append({"path": str(file), "prompt": PROMPT, "count": count})
            exact = format in ("f32", "bf16")  # the weights are bf16 values
            reference = model if exact else _reference_of(file, tmp_path / f"{name}-{format}")
            # Logits reach 20.  llama.cpp sums f32 in another order (2^-24 a step, some hundreds of them), rounds the
            # activations to bf16 for bf16 weights (2^-9) and to int8 by blocks for quantised ones (2^-8), 14 times.
            slack = 20 * {"f32": 2**-18, "bf16": 2**-7}.get(format, 2**-5)
            expected.append((f"{name} {format}", slack, *_greedy(reference, PROMPT, count)))
    compared = 0
    for (what, slack, ids, logprobs, margins), got in zip(expected, _llama_cpp(jobs), strict=True):
        assert got["prompt_tokens"] == len(PROMPT)
        assert len(got["top"]) == 8 or "q" in what.split()[1], what
        for token, logprob in got["top"]:
            assert logprob == pytest.approx(logprobs[0, token], abs=slack), what
        near_ties = np.flatnonzero(margins <= 2 * slack)  # from there on it may be another text
        same = int(near_ties[0]) if len(near_ties) else count
        assert got["ids"][:same] == ids[:same], what
        compared += same
    assert compared > 2 * count


def test_llama_cpp_reads_our_tokenizer(originals: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    jobs, want = [], []
    for name in ("qwen3", "llama"):
        path = originals[name][0]
        jobs.append({"path": str(convert(path, tmp_path / f"{name}.gguf", "f32")), "prompt": TEXT, "count": 1})
        want.append(len(Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT).ids))
    assert [got["prompt_tokens"] for got in _llama_cpp(jobs)] == want


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", SHAPES)
def test_back_from_gguf_gives_the_same_model(name: str, originals: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path, model = originals[name]
    back = convert(convert(path, tmp_path / "m.gguf"), tmp_path / "back", "bf16")
    first, again = load_file(path / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)  # bit for bit, reordered rows included
    assert open_checkpoint(back).config == open_checkpoint(path).config
    assert open_checkpoint(back).generation.eos_ids == (model.config.eos_token_id,)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (path, back)]
    assert tokenizers[0](TEXT).input_ids == tokenizers[1](TEXT).input_ids
    chat = [{"role": "user", "content": "Hi"}]
    rendered = [t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for t in tokenizers]
    assert rendered[0] == rendered[1]
    with torch.no_grad():
        assert torch.equal(_load(back)(torch.tensor([PROMPT])).logits, model(torch.tensor([PROMPT])).logits)


@pytest.mark.parametrize("name", models.MODELS)
def test_configurations_survive_gguf(name: str, tmp_path: Path) -> None:
    path = models.save(name, tmp_path / "hf")
    config = open_checkpoint(path).config
    file = convert(path, tmp_path / "m.gguf")
    back = open_checkpoint(convert(file, tmp_path / "back")).config
    if config.rope.attention_scale is not None:  # GGUF keeps its quotient with the paper's value, in float32
        assert back.rope.attention_scale == pytest.approx(config.rope.attention_scale, rel=2**-23)
        back = dataclasses.replace(back, rope=config.rope)
    # A Mistral without a window is a Llama, and GGUF has no other name for it.
    architecture = "llama" if name == "mistral-full" else config.architecture
    assert back == dataclasses.replace(config, architecture=architecture)


def test_formats_on_disk(originals: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path = originals["qwen3"][0]
    for format, file_type in (("f32", 0), ("f16", 1), ("q4_0", 2), ("q8_0", 7), ("bf16", 32)):
        file = convert(path, tmp_path / f"{format}.gguf", format)
        layout = open_checkpoint(file).layout
        assert {row for row, shape in layout.values() if len(shape) == 2} == {format}
        assert {row for row, shape in layout.values() if len(shape) == 1} == {"f32"}
        assert gguf.GGUFReader(file).get_field("general.file_type").contents() == file_type
    for format in ("f32", "f16", "bf16"):
        folder = convert(path, tmp_path / format, format)
        assert {row for row, _ in open_checkpoint(folder).layout.values()} == {format}
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == {
            "f32": "float32", "f16": "float16", "bf16": "bfloat16",
        }[format]  # fmt: skip
    quantised = convert(path, tmp_path / "m.gguf", "q8_0")
    assert {row for row, s in open_checkpoint(convert(quantised, tmp_path / "b")).layout.values() if len(s) == 2} == {
        "bf16"
    }


def test_quantised_values_are_those_of_the_formats(originals: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path, _ = originals["llama"]
    plain, quantised = open_checkpoint(path), open_checkpoint(convert(path, tmp_path / "m.gguf", "q4_0"))
    for key, tensor in quantised.tensors.items():
        want = plain.tensors[key].to("q4_0" if len(tensor.shape) == 2 else "f32")
        np.testing.assert_array_equal(tensor.data, want.data, err_msg=key)


def test_rows_that_are_not_whole_blocks_become_bf16(tmp_path: Path) -> None:
    layout = open_checkpoint(convert(models.save("smollm2", tmp_path / "hf"), tmp_path / "m.gguf", "q8_0")).layout
    assert layout["model.layers.0.mlp.down_proj.weight"] == ("q8_0", (72, 96))
    assert layout["model.layers.0.mlp.up_proj.weight"] == ("bf16", (96, 72))


# ------------------------------------------------------------------------------------------------- behaviour


def test_nothing_is_overwritten_and_nothing_half_done_stays(
    originals: dict[str, tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = originals["llama"][0]
    for out in (tmp_path / "m.gguf", tmp_path / "dir"):
        seen: list[tuple[int, int]] = []
        convert(path, out, progress=lambda *n, seen=seen: seen.append(n))
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
        before = open_checkpoint(out).layout
        with pytest.raises(FileError, match="exists"):
            convert(path, out, "f32")
        assert open_checkpoint(out).layout == before
        convert(path, out, "f32", force=True)
        assert open_checkpoint(out).layout != before
    names = {item.name for item in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for out in (tmp_path / "n.gguf", tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            convert(path, out, progress=fail)
    assert {item.name for item in tmp_path.iterdir()} == names == {"m.gguf", "dir"}


def test_refusals(originals: dict[str, tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = originals["llama"][0]
    with pytest.raises(ModelError, match="not written as q8_0"):
        convert(path, tmp_path / "out", "q8_0")
    with pytest.raises(ModelError, match="not written as q4_k"):
        convert(path, tmp_path / "out.gguf", "q4_k")
    with pytest.raises(ModelError, match="unknown weight format 'q9'"):
        convert(path, tmp_path / "out.gguf", "q9")
    with pytest.raises(FileError, match="states its own configuration"):
        convert(path, tmp_path / "out", arch="qwen3-0.6b")
    with pytest.raises(FileError, match="also what is converted"):
        convert(path, path, force=True)
    free = __import__("shutil").disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    for name in ("out", "out.gguf"):
        with pytest.raises(FileError, match="are needed"):
            convert(path, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_small(tmp_path: Path) -> None:
    path = synth("smollm2-135m", tmp_path / "model", layers=12)
    limit = 150 << 20  # anonymous memory, which maps of files do not count towards
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]),) * 2)\n"
        "from finial.files.convert import convert; convert(sys.argv[1], sys.argv[2], 'q8_0')"
    )
    assert (path / "model.safetensors").stat().st_size > 90e6
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "m.gguf"), str(limit)], check=True, env=environment
    )


# --------------------------------------------------------------------------------------------- pickled PyTorch

SCRATCH: dict[str, Any] = {
    "vocab_size": VOCAB, "context_length": 512, "emb_dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 96,
    "head_dim": 32, "qk_norm": True, "n_kv_groups": 2, "rope_base": 1_000_000.0, "dtype": torch.float32,
}  # fmt: skip


def _scratch(tied: bool, **changes: Any) -> Qwen3Model:
    torch.manual_seed(2)
    model = Qwen3Model({**SCRATCH, **changes}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("scale"):
                parameter.uniform_(0.5, 1.5)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_reasoning_from_scratch_gives_the_same_logits(tied: bool, tmp_path: Path) -> None:
    model = _scratch(tied)
    torch.save(model.state_dict(), tmp_path / "qwen3-base.pth")
    write_tokenizer(tmp_path, _vocabulary(QWEN), VOCAB)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer-base.json")
    out = convert(tmp_path / "qwen3-base.pth", tmp_path / "out")
    config = open_checkpoint(out).config
    assert (config.head_dim, config.num_heads, config.num_kv_heads, config.num_layers) == (32, 4, 2, 2)
    assert config.tie_embeddings is tied and config.rope.theta == 1e6 and config.max_context == 40960
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == VOCAB
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = torch.tensor([PROMPT * 5])
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    if not tied:  # each reading starts a process that imports torch, which takes seconds
        file = convert(tmp_path / "qwen3-base.pth", tmp_path / "m.gguf", "q8_0")
        assert open_checkpoint(file).config == config
    assert {item.name for item in tmp_path.iterdir() if item.name.startswith(".")} == set()


def test_equal_but_separate_heads_are_tied_and_formats_kept(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in _scratch(True, dtype=torch.bfloat16).state_dict().items()}
    torch.save({"model_state_dict": state, "step": 3}, tmp_path / "weights.pt")
    out = open_checkpoint(convert(tmp_path / "weights.pt", tmp_path / "out"))
    assert out.config.tie_embeddings
    assert {row for row, shape in out.layout.values() if len(shape) == 2} == {"bf16"}
    norm = out.tensors["model.layers.1.self_attn.q_norm.weight"]
    np.testing.assert_array_equal(norm.decode(), state["trf_blocks.1.att.q_norm.scale"].float().numpy())
    as_f16 = open_checkpoint(convert(tmp_path / "weights.pt", tmp_path / "f16", "f16"))
    want = Tensor.from_array(state["tok_emb.weight"].float().numpy(), "f16")
    np.testing.assert_array_equal(as_f16.tensors["model.embed_tokens.weight"].data, want.data)


def test_transformers_names_with_a_configuration_beside_and_given(tmp_path: Path) -> None:
    model = models.model("llama-biases")
    source = models.save("llama-biases", tmp_path / "hf")
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save({f"_orig_mod.{key}": value for key, value in model.state_dict().items()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="config asks for"):
        convert(folder / "pytorch_model.bin", tmp_path / "x", arch="llama-3.2-1b")
    out = open_checkpoint(convert(folder / "pytorch_model.bin", tmp_path / "out", config=source))
    for key, tensor in out.tensors.items():
        np.testing.assert_array_equal(tensor.decode(), model.state_dict()[key].numpy(), err_msg=key)


def test_shards_of_pickles(tmp_path: Path) -> None:
    source = models.save("qwen2", tmp_path / "hf")
    folder = tmp_path / "pickles"
    folder.mkdir()
    state = list(models.model("qwen2").state_dict().items())
    torch.save(dict(state[::2]), folder / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(state[1::2]), folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    assert open_checkpoint(convert(folder, tmp_path / "out")).config == open_checkpoint(source).config
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match="is missing"):
        convert(folder, tmp_path / "out2")


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"tok_emb.weight": torch.zeros(2, 2), "more": _Evil(trap)}, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_Evil(trap)))
    with zipfile.ZipFile(tmp_path / "hand.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Evil(trap)))
        archive.writestr("archive/version", "3\n")
    for name in ("zip.pth", "hand.pth"):
        with pytest.raises(FileError, match=rf"{name}: torch refuses") as caught:
            convert(tmp_path / name, tmp_path / "out")
        assert "safetensors" in caught.value.fix
    assert not trap.exists() and not (tmp_path / "out").exists()
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert trap.exists()  # the trap works where pickles are trusted


def test_pickles_that_are_no_model(tmp_path: Path) -> None:
    whole = _scratch(True).state_dict()
    cases: list[tuple[Any, str]] = [
        ([1, 2], "no state dict but list"),
        ({**whole, "trf_blocks.0.moe.weight": torch.zeros(2)}, r"unknown tensor 'trf_blocks\.0\.moe\.weight'"),
        ({key: value for key, value in whole.items() if key != "trf_blocks.1.norm2.scale"}, "is missing"),
    ]
    for number, (content, message) in enumerate(cases):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises((FileError, ModelError), match=message) as caught:
            convert(tmp_path / f"{number}.pth", tmp_path / "out")
        assert caught.value.fix
    (tmp_path / "cut.pth").write_bytes((tmp_path / "2.pth").read_bytes()[:5000])
    with pytest.raises(FileError, match=r"cut\.pth"):
        convert(tmp_path / "cut.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_tell_the_configuration() -> None:
    shapes = {
        "model.embed_tokens.weight": (VOCAB, 64),
        "model.layers.0.self_attn.q_proj.weight": (128, 64),
        "model.layers.0.self_attn.k_proj.weight": (64, 64),
        "model.layers.0.self_attn.q_norm.weight": (32,),
        "model.layers.0.mlp.gate_proj.weight": (96, 64),
    }
    assert infer_config("m.pth", shapes, True)["num_attention_heads"] == 4
    for missing in shapes:
        with pytest.raises(ModelError, match=r"m\.pth") as caught:
            infer_config("m.pth", {name: shape for name, shape in shapes.items() if name != missing}, True)
        assert "--config" in caught.value.fix and "--arch" in caught.value.fix
    with pytest.raises(ModelError, match="no multiple of the head norm's 33"):
        infer_config("m.pth", shapes | {"model.layers.0.self_attn.q_norm.weight": (33,)}, True)


def test_without_torch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, tmp_path / "m.pth")
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    with pytest.raises(FileError, match="needs torch") as caught:
        convert(tmp_path / "m.pth", tmp_path / "out")
    assert 'pip install "finial[convert]"' in caught.value.fix


def test_the_parent_never_imports_torch(tmp_path: Path) -> None:
    torch.save(_scratch(True).state_dict(), tmp_path / "m.pth")
    code = (
        "import sys; from finial.files.convert import convert; convert(*sys.argv[1:]);"
        "print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.pth"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


def test_a_config_of_a_table_that_no_llama_has_keeps_its_gguf(tmp_path: Path) -> None:
    file = convert(models.save("llama-llama3-tied", tmp_path / "hf"), tmp_path / "m.gguf")
    checkpoint = open_checkpoint(file)
    assert checkpoint.config.rope.kind == "table"
    raw = bytearray(file.read_bytes())
    table = np.asarray(checkpoint.config.rope.divisors, np.float32)
    at = bytes(raw).index(table.tobytes())
    raw[at : at + table.nbytes] = np.linspace(1, 3, len(table), dtype=np.float32).tobytes()
    file.write_bytes(raw)
    with pytest.raises(ModelError, match="rope divisors"):
        convert(file, tmp_path / "back")
    assert isinstance(checkpoint.config, ModelConfig)
