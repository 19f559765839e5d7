"""Checkpoints: every layout of the same model opens to the same tensors, and a directory of another kind says so."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import finial
import models
from finial.errors import FileError, FinialError, ModelError
from finial.files.checkpoint import GenerationDefaults, open_checkpoint
from finial.files.convert import convert
from finial.files.synth import synth
from finial.names import weight_shapes

SRC = Path(finial.__file__).parents[1]  # the same finial for child processes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3 model with tied embeddings as transformers saves it."""
    return models.save("qwen3-tied", tmp_path / "model")


def _assert_same(path: Path, name: str) -> None:
    checkpoint = open_checkpoint(path)
    state = models.model(name).state_dict()
    assert list(checkpoint.tensors) == list(weight_shapes(checkpoint.config))
    for key, tensor in checkpoint.tensors.items():
        assert checkpoint.layout[key] == (tensor.format, tensor.shape)
        np.testing.assert_array_equal(tensor.decode(), state[key].numpy(), err_msg=key)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_family_opens_alike_from_one_file_shards_and_gguf(name: str, tmp_path: Path) -> None:
    _assert_same(models.save(name, tmp_path / "one"), name)
    sharded = models.save(name, tmp_path / "shards", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    _assert_same(sharded, name)
    _assert_same(convert(tmp_path / "one", tmp_path / "model.gguf"), name)


def test_names_without_the_model_prefix(tmp_path: Path) -> None:
    made = copy.deepcopy(models.model("qwen3-tied"))  # casting rounds its rope frequencies for good
    made.model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    _assert_same(tmp_path, "qwen3-tied")


def test_harmless_extra_tensors_are_left_out(folder: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _edit(folder, add)
    _assert_same(folder, "qwen3-tied")


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    convert(models.save("llama", tmp_path / "hf"), tmp_path / "gguf" / "m.gguf")
    (tmp_path / "gguf" / "README.md").touch()
    assert open_checkpoint(tmp_path / "gguf").path.name == "m.gguf"
    _assert_same(tmp_path / "gguf", "llama")


def test_a_gguf_vocabulary_is_its_embedding(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(models.save("qwen2", tmp_path / "hf"), tmp_path / "m.gguf"))
    assert checkpoint.config.vocab_size == checkpoint.tensors["model.embed_tokens.weight"].shape[0] == 160


def test_generation_defaults(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert open_checkpoint(folder).generation == GenerationDefaults()
    values = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "min_p": 0.0,
    }
    _write(folder / "generation_config.json", values | {"eos_token_id": [7, 3], "bos_token_id": 5})
    want = GenerationDefaults(0.6, 20, 0.95, 0.0, 1.1, (7, 3), 5)
    assert open_checkpoint(folder).generation == want
    (folder / "tokenizer.json").unlink(missing_ok=True)
    again = open_checkpoint(convert(folder, folder.parent / "m.gguf"))
    assert dataclasses.replace(again.generation, eos_ids=(7, 3), bos_id=5) == want  # ids go with a tokenizer
    _write(folder / "generation_config.json", {"do_sample": False, "temperature": 0.6, "eos_token_id": 2})
    assert open_checkpoint(folder).generation == GenerationDefaults(temperature=0.0, eos_ids=(2,))
    for bad in ({"temperature": "hot"}, {"top_k": 1.5}, {"eos_token_id": "</s>"}, {"temperature": float("nan")}):
        _write(folder / "generation_config.json", bad)
        with pytest.raises(FileError, match=rf"generation_config.json: {next(iter(bad))}"):
            open_checkpoint(folder)


# -------------------------------------------------------------------------------------------- what is wrong


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_do_not_fit_the_configuration(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    original = load_file(folder / "model.safetensors")

    def drop(tensors: dict[str, Any]) -> None:
        del tensors[name]

    def cut(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    def more(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.router.weight"] = torch.zeros(4)

    for change, message in (
        (drop, rf"{re.escape(repr(name))} of shape \[96, 64\] is missing"),
        (cut, rf"{re.escape(repr(name))} has shape \[95, 64\], config asks for \[96, 64\]"),
        (more, r"unexpected tensor 'model\.layers\.0\.mlp\.router\.weight' of shape \[4\]"),
    ):
        save_file(original, folder / "model.safetensors")
        _edit(folder, change)
        with pytest.raises(ModelError, match=message) as caught:
            open_checkpoint(folder)
        assert str(folder) in caught.value.what and caught.value.fix


def test_a_gguf_file_without_a_tensor_is_named_in_its_own_terms(tmp_path: Path) -> None:
    hf = models.save("qwen3", tmp_path / "hf")
    file = convert(hf, tmp_path / "m.gguf")
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"blk.2.ffn_up.weight", b"blk.2.ffn_zz.weight"))
    with pytest.raises(ModelError, match=r"m\.gguf: tensor 'blk\.2\.ffn_up\.weight' of shape \[96, 64\] is missing"):
        open_checkpoint(file)
    file.write_bytes(raw.replace(b"token_embd.weight", b"token_embx.weight"))
    with pytest.raises(ModelError, match="no language model"):
        open_checkpoint(file)


def test_quantised_checkpoints_are_named(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", fields | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ModelError, match="quantised by 'gptq'"):
        open_checkpoint(folder)


def test_errors_of_the_configuration_name_its_file(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", fields | {"model_type": "mamba"})
    with pytest.raises(ModelError, match=re.escape(f"{folder / 'config.json'}: model_type is 'mamba'")):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN'])
def test_a_damaged_configuration(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(FileError, match=r"config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "it is empty"),
        (["notes.txt"], "it holds notes.txt"),
        (["config.json"], "is not a model"),
        (["model.safetensors"], "no config.json"),
        (["config.json", "pytorch_model.bin"], "finial convert"),
        (["weights.pth"], "finial convert .*weights.pth"),
        (["a.gguf", "b.gguf"], "2 models: a.gguf, b.gguf"),
    ],
)
def test_directories_of_another_kind(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text('{"model_type": "qwen3"}' if name == "config.json" else "")
    if "config.json" in files:
        fields = transformers.Qwen3Config(num_hidden_layers=1, max_window_layers=1).to_dict()
        _write(tmp_path / "config.json", fields)
    with pytest.raises(FileError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.fix


def test_missing_paths_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, certainly")
    for path in (tmp_path / "nowhere", tmp_path / "x.gguf"):
        with pytest.raises(FinialError, match=re.escape(str(path))):
            open_checkpoint(path)


# -------------------------------------------------------------------------------------------------- memory

_MEASURE = """
import sys
from finial.files.checkpoint import open_checkpoint
from finial.machine import peak_bytes

before = peak_bytes()
checkpoint = open_checkpoint(sys.argv[1])
opened = peak_bytes()
held = [tensor.to("bf16") for tensor in checkpoint.tensors.values()]
touched = sum(int(tensor.data[::4096].sum()) for tensor in held)
print(opened - before, peak_bytes() - opened, checkpoint.nbytes)
"""


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_peak_memory_of_a_bf16_load(kind: str, tmp_path: Path) -> None:
    path = synth("smollm2-135m", tmp_path / "model", layers=12)  # llama: the family whose GGUF rows are reordered
    if kind == "gguf":
        path = convert(path, tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SRC)},
    )
    opening, loading, nbytes = map(int, done.stdout.split())
    assert nbytes > 90e6
    assert opening < 20e6 if kind == "directory" else opening < 60e6  # a GGUF header holds the whole vocabulary
    assert loading < 1.15 * nbytes
