"""Trains the embedded demo model: a small Qwen3 with its own tokenizer, from one plain text of dialogue.

Knows nothing of finial: it uses `tokenizers`, `torch` and `transformers` (float32 on the CPU), and writes what
transformers would save, so that the demo is a checkpoint like any other.  Same seed, text, steps, thread count and
package versions: same model.  On a busy machine OMP_WAIT_POLICY=passive makes it several times faster: otherwise a
thread that waits for the other burns the time that the other needs.
Use: `python tools/train_demo.py --text tinyshakespeare.txt`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

DEMO = Path(__file__).resolve().parent.parent / "src" / "finial" / "demo"
CARD = Path(__file__).resolve().parent / "demo_card.md"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MINIMUM_CHARACTERS = 10_000

# What Qwen2's tokenizer.json splits on, and what GGUF calls pre-tokenizer "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A turn is one speech, "NAME:\nverse".  Whoever gives no name speaks as a citizen; a system message is nobody's speech.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = message['content'] | trim -%}"
    "{%- set citizen = 'Second Citizen:\\n' if message['role'] == 'assistant' else 'First Citizen:\\n' -%}"
    "{%- set named = message['role'] == 'system' or ':\\n' in content -%}"
    "{{ '<|im_start|>' + ('' if named else citizen) + content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>' }}{%- endif -%}"
)

KNOWN_TEXTS = {
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed": (
        "Tiny Shakespeare (40,000 lines from the plays of William Shakespeare, collected by Andrej Karpathy for "
        "char-rnn); public domain"
    ),
}


def fail(what: str, fix: str) -> NoReturn:
    """Ends the program with status 2, saying what is wrong and what to do."""
    print(f"train_demo: {what}\n  fix: {fix}", file=sys.stderr)
    raise SystemExit(2)


@dataclass(frozen=True)
class Data:
    """The text as token streams (int64, 1-D).

    Attributes:
        plain: the training part, speech after speech, each followed by a blank line.
        plain_starts: where each speech begins in `plain`.
        chat: the same speeches as chat turns.
        chat_starts: where each turn begins in `chat`.
        held_out: the last part of the text, plain, never trained on.
        held_out_bytes: its size in UTF-8.
    """

    plain: np.ndarray
    plain_starts: np.ndarray
    chat: np.ndarray
    chat_starts: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


def read_text(path: Path) -> tuple[str, str, int]:
    """Returns (text with "\\n" line ends, sha256 of the file, its size in bytes)."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})", "give --text the path of a plain UTF-8 text")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 at byte {error.start}", "convert it with iconv -t UTF-8")
    text = text.replace("\r\n", "\n").strip()
    if len(text) < MINIMUM_CHARACTERS:
        fail(f"{path}: {len(text):,} characters of text, at least {MINIMUM_CHARACTERS:,} needed", "give a longer text")
    return text, hashlib.sha256(raw).hexdigest(), len(raw)


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` entries, the three special tokens first.

    It is trained with line ends cut off from the punctuation before them, though Qwen2's pattern joins the two: then
    no token contains both, and a prompt that stops at "ROMEO:" has the same tokens as the text it was learnt from.
    """
    tokenizer = Tokenizer(models.BPE())
    qwen2 = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lines = pre_tokenizers.Split(Regex(r"[\r\n]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([qwen2, lines, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([qwen2, bytes_only])
    return tokenizer


def split_text(text: str, share: float) -> tuple[str, str]:
    """Cuts off the last `share` of the text, at a blank line where there is one."""
    cut = int(len(text) * (1 - share))
    blank = text.rfind("\n\n", 0, cut)
    cut = blank + 2 if blank > cut // 2 else cut
    return text[:cut], text[cut:]


def make_data(tokenizer: Tokenizer, train: str, held_out: str) -> Data:
    """Encodes the speeches (the blocks between blank lines) once as running text and once as chat turns."""
    speeches = [speech for speech in re.split(r"\n\n+", train) if speech.strip()]

    def stream(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
        return np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]), starts

    plain, plain_starts = stream([speech + "\n\n" for speech in speeches])
    chat, chat_starts = stream([f"{TURN_START}{speech}{TURN_END}\n" for speech in speeches])
    tail = np.asarray(tokenizer.encode(held_out).ids, dtype=np.int64)
    return Data(plain, plain_starts, chat, chat_starts, tail, len(held_out.encode()))


def draw_row(data: Data, rng: np.random.Generator, length: int, end_of_text: int) -> np.ndarray:
    """One training row of `length` tokens.

    A quarter is chat turns from the first token on, so running text never learns to turn into chat, which would end it.
    Of the rest, half begin at a speech, as prompts do, behind the end-of-text token one time in four.
    """
    kind = rng.random()
    speech = int(rng.integers(len(data.plain_starts)))
    if kind < 0.25:
        start = int(data.chat_starts[speech])
        return np.take(data.chat, np.arange(start, start + length), mode="wrap")
    start = int(data.plain_starts[speech]) if kind < 0.625 else int(rng.integers(len(data.plain)))
    row = np.take(data.plain, np.arange(start, start + length), mode="wrap")
    return np.concatenate([[end_of_text], row])[:length] if kind < 0.34375 else row


def make_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Any:
    """A fresh float32 Qwen3ForCausalLM of the given shape; its dropout acts in training mode only."""
    ids = {token: tokenizer.token_to_id(token) for token in (END_OF_TEXT, TURN_START, TURN_END)}
    config = transformers.Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=ids[TURN_END],
        pad_token_id=ids[END_OF_TEXT],
        attention_dropout=0.0,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[ids[TURN_END], ids[END_OF_TEXT]],
        pad_token_id=ids[END_OF_TEXT],
        do_sample=True,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
    )
    # Dropout on what enters the residual stream. On attention weights it would turn off torch's fused CPU kernel.
    dropout = torch.nn.Dropout(args.dropout)

    def drop(module: Any, inputs: Any, output: Any) -> Any:
        return dropout(output) if module.training else output

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)
    return model


def row_loss(model: Any, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of rows[:, 1:] given what precedes each; rows int64 [N, T + 1]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: Any, tokens: np.ndarray, context: int) -> float:
    """Nats per token over the held-out stream in windows of `context`, each token after the first predicted once."""
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = torch.from_numpy(tokens[start : start + context + 1])
        total += float(row_loss(model, window[None], "sum"))
    model.train(was_training)
    return total / (len(tokens) - 1)


def make_optimizer(model: Any, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as is customary for norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.99))


@dataclass
class Run:
    """What a training run did; the card is written from it."""

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    best: dict[str, torch.Tensor] | None = None
    ended: str = "all steps done"
    timed: bool = False


def train(model: Any, data: Data, args: argparse.Namespace, end_of_text: int, say: Callable[[str, bool], None]) -> Run:
    """Trains until the steps or minutes are used up, or Ctrl-C; keeps the weights that were best on the held-out part.

    Rows have a quarter, half or all of the context (7, 2 and 1 steps of 10): short ones are cheap, long ones teach the
    far positions.  The learning rate falls along a cosine over the steps, or over the minutes when those go faster.
    """
    rng = np.random.default_rng(args.seed)
    optimizer = make_optimizer(model, args)
    run, began, recent = Run(), time.monotonic(), math.nan
    progress, measurements = 0.0, 0
    model.train()
    try:
        while progress < 1.0:
            warm = min(1.0, (run.steps + 1) / max(1, args.warmup))
            rate = args.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            length = int(args.context * rng.choice([0.25, 0.5, 1.0], p=[0.7, 0.2, 0.1]))
            count = max(1, args.batch_tokens // length)
            rows = np.stack([draw_row(data, rng, length + 1, end_of_text) for _ in range(count)])
            loss = row_loss(model, torch.from_numpy(rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            run.steps += 1
            run.tokens += count * length
            now = loss.item()
            recent = now if math.isnan(recent) else 0.95 * recent + 0.05 * now
            if not math.isfinite(now):
                fail(f"the loss is {now} at step {run.steps}", "lower --learning-rate")
            elapsed = time.monotonic() - began
            steps_share, time_share = run.steps / args.steps, elapsed / (args.minutes * 60) if args.minutes else 0.0
            progress, run.timed = max(steps_share, time_share), run.timed or time_share > steps_share
            if progress >= 1.0 and run.steps < args.steps:
                run.ended = "all minutes used"
            measure = progress >= 1.0 or int(progress * args.evaluations) > measurements
            if measure:
                measurements = int(progress * args.evaluations)
                measured = held_out_loss(model, data.held_out, args.context)
                if measured < run.best_loss:
                    best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                    run.best, run.best_loss, run.best_step = best, measured, run.steps
            line = f"step {run.steps}/{args.steps}  loss {recent:.3f}  held-out {run.best_loss:.4f}"
            line += f" (step {run.best_step})  {run.tokens / elapsed:,.0f} tokens/s  {elapsed / 60:.1f} min"
            say(line, measure)
    except KeyboardInterrupt:
        run.ended = f"stopped by Ctrl-C at step {run.steps} of {args.steps}"
    run.wall_s = time.monotonic() - began
    return run


def save(model: Any, tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes the five files of `FILES` into `folder`, weights in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    # Readers older than transformers 5 look for rope_theta at the top level.
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 10000.0
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": context,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def sample(model: Any, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int | None) -> str:
    """Prompt plus its continuation: greedy when seed is None, else with the generation defaults."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    if seed is not None:
        torch.manual_seed(seed)
    options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None} if seed is None else {}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
    return str(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))


def publish(staging: Path, out: Path) -> None:
    """Moves the finished files into place, one atomic rename each, with Ctrl-C held off until all are there."""
    out.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for name in (*FILES, "README.md"):
            (staging / name).replace(out / name)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(args: argparse.Namespace, run: Run, model: Any, tokenizer: Tokenizer, data: Data, source: str) -> str:
    """Saves the best weights, measures the saved files, writes the card, puts all in place; returns a summary."""
    assert run.best is not None
    model.load_state_dict(run.best)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save(model, tokenizer, staging, args.context)
        saved = transformers.Qwen3ForCausalLM.from_pretrained(staging, dtype=torch.float32)
        saved.eval()
        loss = held_out_loss(saved, data.held_out, args.context)
        size = sum((staging / name).stat().st_size for name in FILES)
        text = card(args, run, saved, tokenizer, data, source=source, loss=loss, size=size)
        (staging / "README.md").write_text(text, encoding="utf-8")
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{out}: held-out loss {loss:.4f} nats/token after {run.best_step} of {run.steps} steps"


def card(args: argparse.Namespace, run: Run, model: Any, tokenizer: Tokenizer, data: Data, **known: Any) -> str:
    """The model card: demo_card.md filled in from the run, the saved files and the arguments.

    `known` has source (the text, in words), loss (nats per token) and size (of the saved files, bytes).
    """
    turn = f"{TURN_START}First Citizen:\nGood morrow, sir. What news of the king?{TURN_END}\n{TURN_START}"
    samples = (
        ("Greedy, 200 tokens after `First Citizen:`", sample(model, tokenizer, "First Citizen:", 200, None)),
        ("Sampled, seed 0, 200 tokens after `ROMEO:`", sample(model, tokenizer, "ROMEO:", 200, 0)),
        ("Chat, seed 0, at most 200 tokens (first speech: the user's)", sample(model, tokenizer, turn, 200, 0)),
    )
    held_out, training = len(data.held_out), len(data.plain)
    return CARD.read_text(encoding="utf-8").format(
        **known,
        args=args,
        run=run,
        data=data,
        config=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bits=known["loss"] * (held_out - 1) / math.log(2) / data.held_out_bytes,
        held_out_tokens=held_out,
        training_tokens=training,
        all_tokens=held_out + training,
        passes=run.tokens / training,
        minutes=run.wall_s / 60,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        python=platform.python_version(),
        command=" ".join(["python tools/train_demo.py", *command_words(args, run.timed)]),
        samples="\n".join(f"{title}:\n\n```text\n{text.strip()}\n```\n" for title, text in samples),
    )


def command_words(args: argparse.Namespace, timed: bool) -> list[str]:
    """The arguments of the run, the text by its file name only, a time limit only where it had an effect."""
    words = [f"--text {Path(args.text).name}", f"--steps {args.steps}"]
    defaults = vars(parser().parse_args(["--text", "x"]))
    for name, value in vars(args).items():
        if name not in ("text", "steps", "out") and (timed or name != "minutes") and value != defaults[name]:
            words.append(f"--{name.replace('_', '-')} {value}")
    return words


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Trains the demo model from one text and writes it, card included.")
    result.add_argument("--text", required=True, type=Path, help="plain UTF-8 text, speeches between blank lines")
    result.add_argument("--out", type=Path, default=DEMO, help="directory to write (default: the package's demo/)")
    result.add_argument("--steps", type=int, default=3000, help="optimiser steps (default %(default)s)")
    result.add_argument(
        "--minutes", type=float, default=0.0, help="hurry the schedule to end by then (not reproducible)"
    )
    for name, default in (("layers", 4), ("hidden", 256), ("intermediate", 512), ("heads", 4), ("kv-heads", 2)):
        result.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    for name, default in (("head-dim", 64), ("context", 1024), ("vocab", 1536), ("batch-tokens", 1024)):
        result.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    for name, default in (("evaluations", 15), ("warmup", 60), ("seed", 0)):
        result.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    for name, value in (("learning-rate", 3e-3), ("weight-decay", 0.1), ("dropout", 0.1), ("held-out-share", 0.1)):
        result.add_argument(f"--{name}", type=float, default=value, help="default %(default)s")
    result.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    return result


def check(args: argparse.Namespace) -> None:
    """Ends the program on arguments that cannot work."""
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (0 if name in ("seed", "warmup") else 1):
            fail(f"--{name.replace('_', '-')} is {value}, a positive number needed", "leave it out for the default")
    if args.heads % args.kv_heads:
        fail(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}", "choose a multiple")
    if args.head_dim < 2 or args.head_dim % 2:
        fail(f"--head-dim is {args.head_dim}, an even number needed", "choose 32 or 64")
    if args.context < 16:
        fail(f"--context is {args.context}, at least 16 needed", "choose 1024")
    if args.vocab < 300:
        fail(f"--vocab is {args.vocab}, at least 300 needed (256 bytes and 3 special tokens)", "choose 1024 to 2048")
    if not 0.0 < args.held_out_share <= 0.5:
        fail(f"--held-out-share is {args.held_out_share}, above 0 and at most 0.5 needed", "choose 0.1")
    if not 0.0 <= args.dropout < 1.0 or args.minutes < 0:
        fail(f"--dropout {args.dropout} or --minutes {args.minutes} is out of range", "choose 0.1 and 0")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f"--out {args.out} is a file", "give a directory")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    args = parser().parse_args(argv)
    check(args)
    text, digest, size = read_text(args.text)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        training_text, held_out_text = split_text(text, args.held_out_share)
        tokenizer = train_tokenizer(training_text, args.vocab)
        data = make_data(tokenizer, training_text, held_out_text)
        model = make_model(args, tokenizer)
        terminal = sys.stderr.isatty()

        def say(line: str, keep: bool) -> None:
            if terminal:
                print(f"\r\x1b[2K{line}", end="\n" if keep else "", file=sys.stderr, flush=True)
            elif keep:
                print(line, file=sys.stderr, flush=True)

        count = sum(parameter.numel() for parameter in model.parameters())
        say(f"{count:,} parameters, {len(data.plain):,} training tokens, {len(data.held_out):,} held out", True)
        run = train(model, data, args, tokenizer.token_to_id(END_OF_TEXT), say)
        if run.best is None:
            print(f"train_demo: {run.ended}, before the first measurement; nothing written", file=sys.stderr)
            return 130
        known = KNOWN_TEXTS.get(digest, "licence not known to the script")
        source = f"`{args.text.name}`, {size:,} bytes, sha256 `{digest}`: {known}"
        print(finish(args, run, model, tokenizer, data, source))
    except KeyboardInterrupt:
        print("train_demo: stopped by Ctrl-C; nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
