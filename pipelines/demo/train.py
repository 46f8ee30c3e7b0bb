"""Train the demo model: a 10 M-parameter Llama with grouped-query attention on public-domain books.

    python pipelines/demo/train.py --train train.txt.xz --valid valid.txt.xz --output pipelines/demo

Writes to the output folder:

    model/                 config, bfloat16 weights, byte-level BPE tokenizer of 4096, generation settings
    calibration.txt.xz     passages of the training books, to calibrate pruning on
    heldout.txt.xz         passages of the validation books, never trained or calibrated on
    training.json          settings, versions, loss curve and held-out perplexity

The inputs are plain text in which books stand one after another, three blank lines between two.
Matrices are trained with Muon (Jordan et al., 2024), the rest with AdamW; products run in bfloat16.
An interrupted training goes on from the last saved state when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOOK_SEPARATOR = "\n\n\n\n"
BEGIN, END = "<|begin|>", "<|end|>"


def read_books(path: Path) -> list[str]:
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    return [book.strip() for book in text.split(BOOK_SEPARATOR) if len(book.strip()) > 2000]


def passages(books: list[str], characters: int) -> str:
    """One passage from the middle of every book, the same length of each, cut at paragraph ends."""
    share = characters // len(books)
    cut = []
    for book in books:
        start = book.find("\n\n", len(book) // 3) + 2
        end = book.find("\n\n", start + share, start + 2 * share)
        cut.append(book[start : end if end > 0 else start + share])
    return BOOK_SEPARATOR.join(cut)


def train_tokenizer(books: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Under the class's name that transformers 4 knows, too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    stated.pop("backend", None)
    path.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def encode_books(books: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All books as one stream of token ids, every book closed by the end token. uint16 [tokens]."""
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    return np.concatenate([np.array([*backend.encode(book).ids, end], dtype=np.uint16) for book in books])


def batches(tokens: np.ndarray, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches int64 [batch_size, length + 1]: all windows in a random order, shifted every epoch."""
    random = np.random.default_rng(seed)
    while True:
        shift = int(random.integers(0, length))
        starts = np.arange(shift, len(tokens) - length - 1, length)
        random.shuffle(starts)
        for chunk in range(0, len(starts) - batch_size + 1, batch_size):
            rows = [tokens[s : s + length + 1] for s in starts[chunk : chunk + batch_size]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def build_model(vocabulary_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    residual_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(residual_scale)
    return model


def build_optimizers(model: nn.Module, matrix_rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int, warmup: int = 50, decay_share: float = 0.45) -> float:
    """Linear warm-up, plateau, linear decay to 2 % of the peak."""
    decay_start = steps * (1 - decay_share)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_start:
        return 1.0
    return max(0.02, (steps - step) / (steps - decay_start))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-token cross entropy in nats of rows int64 [batch, length + 1]."""
    with torch.autocast("cpu" if rows.device.type == "cpu" else "cuda", dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, tokens: np.ndarray, length: int, device: str) -> float:
    windows = len(tokens) // length
    rows = torch.from_numpy(tokens[: windows * length].astype(np.int64)).view(windows, length).to(device)
    losses = []
    for chunk in rows.split(16):
        logits = model(input_ids=chunk, use_cache=False).logits.float()
        predicted, expected = logits[:, :-1].flatten(0, 1), chunk[:, 1:].flatten()
        losses.append(nn.functional.cross_entropy(predicted, expected, reduction="sum"))
    return math.exp(float(torch.stack(losses).sum()) / (windows * (length - 1)))


def save_state(path: Path, state: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def fit(model: LlamaForCausalLM, tokens: np.ndarray, arguments: argparse.Namespace) -> list[tuple[int, float]]:
    """Train in place; returns the loss curve as (step, mean loss since the last point)."""
    optimizers = build_optimizers(model, arguments.matrix_rate, arguments.other_rate)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    state_path, first, curve = arguments.output / "training_state.pt", 0, []
    if state_path.exists():
        state = torch.load(state_path, map_location=arguments.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, curve = state["step"], state["curve"]
    stream, recent, started = batches(tokens, arguments.length, arguments.batch_size, arguments.seed), [], time.time()
    for step, rows in zip(range(arguments.steps), stream, strict=False):
        if step < first:
            continue
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_factor(step, arguments.steps)
        loss = loss_of(model, rows.to(arguments.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            curve.append((step + 1, float(np.mean(recent))))
            rate = (step + 1 - first) * rows.shape[0] * arguments.length / (time.time() - started)
            print(f"step {step + 1}/{arguments.steps}  loss {curve[-1][1]:.3f}  {rate:.0f} tokens/s", flush=True)
            recent = []
        if (step + 1) % 200 == 0:
            save_state(
                state_path,
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step + 1,
                    "curve": curve,
                },
            )
    state_path.unlink(missing_ok=True)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of one training window")
    parser.add_argument("--vocabulary-size", type=int, default=4096)
    parser.add_argument("--matrix-rate", type=float, default=3e-3, help="peak learning rate of Muon")
    parser.add_argument("--other-rate", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    train_books, valid_books = read_books(arguments.train), read_books(arguments.valid)
    tokenizer = train_tokenizer(train_books, arguments.vocabulary_size)
    train_tokens, valid_tokens = encode_books(train_books, tokenizer), encode_books(valid_books, tokenizer)
    print(f"{len(train_tokens)} training tokens, {len(valid_tokens)} validation tokens", flush=True)
    model = build_model(arguments.vocabulary_size).to(arguments.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters", flush=True)
    started = time.time()
    curve = fit(model, train_tokens, arguments)
    seconds = time.time() - started

    folder = arguments.output / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    for name, books in (("calibration", train_books), ("heldout", valid_books)):
        text = passages(books, 400_000)
        (arguments.output / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode("utf-8"), preset=9))
    record = {
        "parameters": parameters,
        "training_tokens": len(train_tokens),
        "tokens_seen": arguments.steps * arguments.batch_size * arguments.length,
        "validation_perplexity": {
            str(length): perplexity(model.float(), valid_tokens, length, arguments.device) for length in (128, 256)
        },
        "seconds": round(seconds),
        "settings": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.device}",
        "loss_curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"validation perplexity {record['validation_perplexity']}")


if __name__ == "__main__":
    main()
