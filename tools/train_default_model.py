"""Train the small default model that ships inside the package.

An inference engine is hard to try when the first step is a download of several gigabytes. This script
makes a model that is small enough to live in the wheel, from a text that every machine with Python
already has: the Python sources of the standard library of the interpreter that runs the script. The
result is an ordinary Hugging Face folder (Llama architecture, byte-level BPE tokenizer), so the engine
loads it by the same code path as any other model, and ``transformers`` can check it independently.

The stages, in the order of the functions below:

1. *Corpus*: find the sources, hash them, hold out every 50th file, and cut each file before its
   top-level functions and classes. Each piece is a document that ends in ``<|endoftext|>``, so the model
   learns to stop after a finished function.
2. *Tokenizer*: a space is always a token of its own, and so is each run of indentation. The usual
   "space glued to the next word" rule saves some tokens but makes the prompt ``def `` end in a lone space
   that the model has hardly ever seen; here a prompt may end anywhere between two words.
3. *Training*: the corpus is one integer tensor on the device, and a batch is one gather from it. There
   are about as many parameters as tokens, so the model could learn the text by heart: dropout on the
   residual branches, a strong weight decay, a cap on the epochs, and keeping the weights with the best
   held-out loss work against that. The learning rate follows a cosine over whichever of the limits
   (seconds, steps) ends first, so a run always ends cooled down.
4. *Card* (``default_model_folder.py``): its losses and samples are those of the files as written.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from default_model_folder import (
    END_OF_TEXT,
    MAX_CONTEXT,
    SPECIAL_TOKENS,
    load,
    model_config,
    write_card,
    write_model,
)

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "nanoflow" / "default_model"
SIZE_LIMIT = 8_000_000
MIN_CORPUS_BYTES = 1_000_000
HOLD_OUT_EVERY = 50
# Tests and installed packages are not the library; code tables and manual pages are data, not programs.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize")  # made per machine, with its local paths
DOCUMENT_START = re.compile(r"\n\n+(?=(?:@|def |async def |class ))")
TOKEN_PATTERN = r"\n| +|\t+|[\p{L}_]+|\p{N}+|[^\s\p{L}\p{N}_]+|\s"
VOCAB_SIZE = 2048
EVAL_CONTEXT = 1024
# Mostly short windows, for many different ones per step; some long ones, so all positions are trained.
LENGTH_CYCLE = (512, 512, 512, 1024, 512, 512, 512, MAX_CONTEXT)
RECORDED_SETTINGS = ("seed", "seconds", "epochs", "batch_tokens", "lr", "weight_decay", "dropout")


class TrainError(Exception):
    """A problem that the user can act on; shown without a traceback."""


@dataclass(frozen=True)
class Corpus:
    """The texts, cut into documents, and what identifies them."""

    train: list[str]
    held_out: list[str]
    files: int
    held_out_files: int
    size: int
    sha256: str


def read_corpus(root: Path) -> Corpus:
    """Read the library's sources under `root` in a fixed order and split them by file."""
    digest = hashlib.sha256()
    splits: tuple[list[str], list[str]] = ([], [])
    counts, size = [0, 0], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a dangling link, or one of the few files in another encoding
        if not text.strip():
            continue
        raw = text.encode("utf-8")
        digest.update("/".join(parts).encode("utf-8") + b"\0" + raw + b"\0")
        held_out = sum(counts) % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2
        splits[held_out].extend(piece for piece in DOCUMENT_START.split(text) if piece.strip())
        counts[held_out] += 1
        size += len(raw)
    if size < MIN_CORPUS_BYTES:
        raise TrainError(
            f"found only {size:,} bytes of Python source in this interpreter's standard library; "
            f"at least {MIN_CORPUS_BYTES:,} are needed (is its source installed, not only a zip file?)"
        )
    return Corpus(splits[0], splits[1], sum(counts), counts[1], size, digest.hexdigest())


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that keeps spaces and indentation apart from words."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> tuple[Tensor, Tensor]:
    """Encode documents into one stream, each closed by end-of-text; also give where each begins."""
    end = SPECIAL_TOKENS.index(END_OF_TEXT)  # the trainer numbers the special tokens first
    stream: list[int] = []
    starts: list[int] = []
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        starts.append(len(stream))
        stream.extend(encoding.ids)
        stream.append(end)
    return torch.tensor(stream), torch.tensor(starts)


def build_model(config: dict[str, Any], dropout: float) -> LlamaForCausalLM:
    """Make a model with fresh weights and with dropout on the embedding and the residual branches."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    branch_scale = (2 * config["num_hidden_layers"]) ** -0.5  # keeps the residual sum's size at the start

    def drop(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, dropout, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            with torch.no_grad():
                module.weight.mul_(branch_scale)
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            module.register_forward_hook(drop)
    return model


def token_loss(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Compute the cross-entropy of the targets, in nats."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.device.type == "cuda"):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


def sample_batch(tokens: Tensor, starts: Tensor, length: int, rows: int) -> tuple[Tensor, Tensor]:
    """Draw random windows; a quarter of them begin where a document does, as most prompts do."""
    device, last = tokens.device, tokens.numel() - length - 1
    anywhere = torch.randint(last + 1, (rows,), device=device)
    aligned = starts[torch.randint(starts.numel(), (rows,), device=device)].clamp(max=last)
    begin = torch.where(torch.rand(rows, device=device) < 0.25, aligned, anywhere)
    window = tokens[begin[:, None] + torch.arange(length + 1, device=device)]
    return window[:, :-1], window[:, 1:]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: Tensor, max_windows: int | None = None) -> float:
    """Give the mean loss over consecutive windows of the stream, in nats per token."""
    padding = -(tokens.numel() - 1) % EVAL_CONTEXT
    inputs = F.pad(tokens[:-1], (0, padding)).view(-1, EVAL_CONTEXT)[:max_windows]
    targets = F.pad(tokens[1:], (0, padding), value=-100).view(-1, EVAL_CONTEXT)[:max_windows]
    was_training = model.training
    model.eval()
    total = 0.0
    for begin in range(0, len(inputs), 16):
        batch = slice(begin, begin + 16)
        total += token_loss(model, inputs[batch], targets[batch], "sum").item()
    model.train(was_training)
    return total / int((targets != -100).sum())


def make_optimizer(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Make AdamW with weight decay on matrices only: a norm's gain has no reason to be small."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")


def train(
    args: argparse.Namespace, config: dict[str, Any], tokens: Tensor, starts: Tensor, held_out: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train until the first limit; return the weights with the best held-out loss and the run's facts."""
    model = build_model(config, args.dropout).to(args.device).train()
    optimizer = make_optimizer(model, args)
    max_steps = args.steps or math.ceil(args.epochs * tokens.numel() / args.batch_tokens)
    on_gpu = args.device == "cuda"
    sync_every, evals, eval_windows = (50, 20, None) if on_gpu else (5, 4, 16)
    best: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    losses: list[Tensor] = []
    step, best_step, seen, progress, best_loss = 0, 0, 0, 0.0, math.inf
    begin = time.perf_counter()
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while progress < 1.0:
            warm_up = min(1.0, progress / 0.02, (step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm_up * 0.5 * (1.0 + math.cos(math.pi * progress))
            length = LENGTH_CYCLE[step % len(LENGTH_CYCLE)]
            rows = args.batch_tokens // length
            loss = token_loss(model, *sample_batch(tokens, starts, length, rows), "mean")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            step, seen = step + 1, seen + rows * length
            progress = min(1.0, max((time.perf_counter() - begin) / args.seconds, step / max_steps))
            evaluating = progress == 1.0 or progress * evals >= len(history) + 1
            if evaluating or len(losses) == sync_every:
                train_loss = torch.stack(losses).mean().item()  # waits for the device, so rarely
                losses.clear()
                if not math.isfinite(train_loss):
                    raise TrainError(f"the loss became {train_loss} by step {step}; try a lower --lr")
                bar.set_postfix(step=step, loss=f"{train_loss:.3f}", val=f"{best_loss:.3f}", refresh=False)
                bar.update(100 * progress - bar.n)
            if evaluating:
                val_loss = evaluate(model, held_out, eval_windows)
                numbers = {"train_loss": round(train_loss, 4), "validation_loss": round(val_loss, 4)}
                history.append({"step": step, **numbers})
                if val_loss < best_loss:
                    best_loss, best_step = val_loss, step
                    best = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    seconds = round(time.perf_counter() - begin, 1)
    facts = {"steps": step, "best_step": best_step, "tokens_seen": seen, "train_seconds": seconds}
    return best, {**facts, "history": history}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and fill in the defaults that depend on the device."""
    parser = argparse.ArgumentParser(description="Train the default model on the standard library's sources.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--seconds", type=float, help="training time (200 on a GPU, 900 on a CPU)")
    parser.add_argument("--steps", type=int, help="step limit (default: from --epochs)")
    parser.add_argument("--epochs", type=float, default=60.0, help="limit on passes over the text")
    parser.add_argument("--batch-tokens", type=int, help="per step (65536 on a GPU, 4096 on a CPU)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("seconds", "steps", "epochs", "batch_tokens", "lr"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above zero, not {value}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    args.seconds = args.seconds or (200.0 if on_gpu else 900.0)
    args.batch_tokens = args.batch_tokens or (65536 if on_gpu else 4096)
    if args.batch_tokens < MAX_CONTEXT:
        parser.error(f"--batch-tokens must be at least {MAX_CONTEXT}, the longest window")
    if not 0.0 <= args.dropout < 1.0 or args.weight_decay < 0.0:
        parser.error("--dropout must be in [0, 1) and --weight-decay not negative")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file, not a folder")
    return args


def run(args: argparse.Namespace) -> None:
    """Do all stages and print what each found and how long it took."""
    begin = time.perf_counter()

    def report(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", flush=True)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    report(f"{corpus.files} files, {corpus.size:,} bytes, sha256 {corpus.sha256}")
    tokenizer = train_tokenizer(corpus.train)
    tokens, starts = (part.to(args.device) for part in encode(tokenizer, corpus.train))
    held_out = encode(tokenizer, corpus.held_out)[0].to(args.device)
    config = model_config(tokenizer.get_vocab_size())
    report(f"{config['vocab_size']} token types, {tokens.numel():,} + {held_out.numel():,} held-out tokens")
    weights, facts = train(args, config, tokens, starts, held_out)
    report(f"{facts['steps']} steps, {facts['tokens_seen']:,} tokens, {facts['train_seconds']} s")
    write_model(args.out, config, tokenizer, weights)

    model = load(args.out, args.device)
    # The training loss over all the text would take long on a CPU; evenly spread windows tell as much.
    windows = tokens[: tokens.numel() // EVAL_CONTEXT * EVAL_CONTEXT].view(-1, EVAL_CONTEXT)
    shown = windows[:: max(1, tokens.numel() // held_out.numel())].flatten()
    losses = {"train_loss": evaluate(model, shown), "validation_loss": evaluate(model, held_out)}
    nats = losses["validation_loss"] * (held_out.numel() - 1)
    held_out_bytes = sum(len(document.encode("utf-8")) for document in corpus.held_out)
    bits_per_byte = nats / math.log(2) / held_out_bytes
    report(f"saved weights: {losses}, {bits_per_byte:.3f} bits/byte held out")
    facts |= {name: round(loss, 4) for name, loss in losses.items()}
    facts |= {
        "validation_bits_per_byte": round(bits_per_byte, 4),
        "epochs": round(facts["tokens_seen"] / tokens.numel(), 2),
        "data": {
            "files": corpus.files,
            "held_out_files": corpus.held_out_files,
            "bytes": corpus.size,
            "sha256": corpus.sha256,
            "train_tokens": tokens.numel(),
            "held_out_tokens": held_out.numel(),
        },
        "settings": {name: getattr(args, name) for name in RECORDED_SETTINGS},
    }
    print(write_card(args.out, model, facts))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    report(f"{size:,} bytes in the folder")
    if size > SIZE_LIMIT:
        raise TrainError(f"the folder has {size:,} bytes; the limit is {SIZE_LIMIT:,}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        run(parse_args(argv))
    except (TrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
