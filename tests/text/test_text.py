from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from tiny import tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flap_export.calibration.stage import calibration_windows
from flap_export.errors import InputError, MissingRequirementError, ModelError, TextError
from flap_export.evaluation import evaluate
from flap_export.text.tokenization import load_tokenizer
from flap_export.text.windows import read_windows

SENTENCES = ["the cat sat on the mat", "a dog ran over the hill", "rain fell on the old town, all night"]
TEXT = "\n".join(SENTENCES[i % 3] for i in range(120))
NOWHERE = Path("/nowhere")
"""A directory without a tokenizer, for sources that must not need one."""


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that puts <s> before a text when asked for special tokens, with a short context."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16).save_pretrained(directory)
    return directory


def ids_of(text: str, directory: Path) -> NDArray[np.int64]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids)


def stream_windows(ids: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    return np.array([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])


def save_ids(path: Path, ids: Any) -> str:
    if path.suffix == ".npy":
        np.save(path, ids)
    else:
        safetensors.numpy.save_file({"tokens": np.asarray(ids)}, path)
    return str(path)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".txt", bytes), (".txt.xz", lzma.compress), (".txt.gz", gzip.compress), (".TXT", bytes)],
)
def test_text_becomes_consecutive_windows_without_special_tokens(
    tmp_path: Path, tokenizer_directory: Path, suffix: str, compress: Any
) -> None:
    path = tmp_path / f"source{suffix}"
    path.write_bytes(compress(TEXT.encode()))
    windows = read_windows(str(path), tokenizer_directory, 300, sequence_length=20)
    expected = stream_windows(ids_of(TEXT, tokenizer_directory), 20)
    assert windows.tokens.dtype == np.int64
    np.testing.assert_array_equal(windows.tokens, expected)
    assert windows.source == str(path)
    assert windows.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_text_longer_than_the_context_warns_of_nothing(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = tmp_path / "source.txt"
    path.write_text(TEXT)
    read_windows(str(path), tokenizer_directory, 300)
    assert caplog.messages == []


@pytest.mark.parametrize("length", [2, 20, None])
def test_windows_of_text_begin_with_bos_where_a_family_needs_it(
    length: int | None, tmp_path: Path, tokenizer_directory: Path
) -> None:
    """It is one of a window's tokens; ids that somebody made are taken as they are."""
    path, ids = tmp_path / "text.txt", ids_of(TEXT * 9, tokenizer_directory)
    path.write_text(TEXT * 9)
    windows = read_windows(str(path), tokenizer_directory, 300, sequence_length=length, with_bos=True)
    expected = stream_windows(ids, (length or 128) - 1)
    assert np.array_equal(windows.tokens, np.insert(expected, 0, 0, axis=1))
    own = save_ids(tmp_path / "ids.npy", ids)
    plain, asked = (read_windows(own, NOWHERE, 300, sequence_length=length, with_bos=bos) for bos in (False, True))
    assert np.array_equal(plain.tokens, asked.tokens)


def test_short_windows_with_bos(tmp_path: Path, tokenizer_directory: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("short")
    windows = read_windows(str(path), tokenizer_directory, 300, with_bos=True)
    assert windows.tokens.tolist() == [[0, *ids_of("short", tokenizer_directory)]]
    with pytest.raises(TextError, match=r"begin with BOS for this model and need at least 2 tokens, got 1"):
        read_windows(str(path), tokenizer_directory, 300, sequence_length=1, with_bos=True)


def test_a_bos_outside_the_vocabulary_is_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    """Special tokens may lie there, as long as no text has them."""
    directory = shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(directory, 300)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.save_pretrained(directory)
    assert load_tokenizer(directory, tokenizer.bos_token_id).bos_token == "<begin>"
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ModelError, match=rf"BOS is {tokenizer.bos_token_id}, the model has a vocabulary of"):
        read_windows(str(tmp_path / "text.txt"), directory, tokenizer.bos_token_id, with_bos=True)


def test_where_windows_begin_with_bos_they_are_known_by_it(tmp_path: Path, tokenizer_directory: Path) -> None:
    """What was calibrated without it is another calibration of the same text."""
    (tmp_path / "text.txt").write_text(TEXT)
    plain, begun = (
        read_windows(str(tmp_path / "text.txt"), tokenizer_directory, 300, with_bos=bos) for bos in (False, True)
    )
    assert plain.digest == hashlib.sha256(TEXT.encode()).hexdigest() != begun.digest


@pytest.mark.parametrize(("family", "begins"), [("llama", False), ("gemma", True), ("gemma3_text", True)])
def test_models_that_need_bos_get_it(family: str, begins: bool, tmp_path: Path, tokenizer_directory: Path) -> None:
    """In calibration and in perplexity, whose first prediction is then that of the text's first token."""
    model = tiny_checkpoint(family, tmp_path / "model", vocab_size=300)
    shutil.copytree(tokenizer_directory, model, dirs_exist_ok=True)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    ids = ids_of(TEXT * 3, tokenizer_directory)
    _, windows = calibration_windows(model, str(text), None, 11, 0)
    assert windows.tokens[0].tolist() == ([0, *ids[:10]] if begins else ids[:11].tolist())
    (quality,) = evaluate(model, [str(text)], sequence_length=11).sources
    assert quality.tokens == 10 * (len(ids) // (10 if begins else 11))


def test_a_window_is_128_tokens_by_default(tmp_path: Path, tokenizer_directory: Path) -> None:
    path = tmp_path / "source.txt"
    path.write_text(TEXT)
    windows = read_windows(str(path), tokenizer_directory, 300)
    assert windows.tokens.shape == (len(ids_of(TEXT, tokenizer_directory)) // 128, 128)


def test_a_byte_order_mark_is_not_text(tmp_path: Path, tokenizer_directory: Path) -> None:
    path = tmp_path / "source.txt"
    path.write_text(TEXT, encoding="utf-8-sig")
    windows = read_windows(str(path), tokenizer_directory, 300, sequence_length=5)
    np.testing.assert_array_equal(windows.tokens[0], ids_of(TEXT, tokenizer_directory)[:5])


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".jsonl", bytes), (".jsonl.xz", lzma.compress), (".jsonl.gz", gzip.compress)]
)
def test_jsonl_documents_are_joined_by_an_empty_line(
    tmp_path: Path, tokenizer_directory: Path, suffix: str, compress: Any
) -> None:
    documents = [*SENTENCES, "a line\u2028separator inside"]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(documents)]
    path = tmp_path / f"source{suffix}"
    path.write_bytes(compress("\n\n".join(lines).encode() + b"\n"))
    windows = read_windows(str(path), tokenizer_directory, 300, sequence_length=7)
    expected = stream_windows(ids_of("\n\n".join(documents), tokenizer_directory), 7)
    np.testing.assert_array_equal(windows.tokens, expected)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"content": "x"}', r"fields \['content'\]"),
        ('{"text": 3}', r"fields \['text'\]"),
        ('["text"]', "list"),
        ("{text", "no valid JSON"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_jsonl_line_without_text_is_named(tmp_path: Path, tokenizer_directory: Path, line: str, found: str) -> None:
    path = tmp_path / "source.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(TextError, match=rf"line 3: .*{found}"):
        read_windows(str(path), tokenizer_directory, 300)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t ", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("latin.txt", b"caf\xe9 society", "must be UTF-8, byte 3 "),
        ("plain.txt.xz", b"not compressed", "truncated or damaged"),
        ("cut.txt.xz", lzma.compress(TEXT.encode())[:-9], "truncated or damaged"),
        ("plain.txt.gz", b"not compressed", "truncated or damaged"),
        ("cut.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-9], "truncated or damaged"),
        ("flipped.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:10] + b"\xff" * 20, "truncated or damaged"),
        ("book.pdf", b"%PDF", r"no known kind; known are files \.txt, .*\.safetensors and hf:"),
        ("pickle.npy", b"\x80\x04", "not a valid .npy"),
        ("cut.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': <", "not a valid .npy"),
        ("cut.safetensors", b"\x10\x00", "not a valid .safetensors"),
    ],
)
def test_a_damaged_source_is_refused(
    tmp_path: Path, tokenizer_directory: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_windows(str(tmp_path / name), tokenizer_directory, 300)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no text source at"):
        read_windows(str(tmp_path / "absent.txt"), NOWHERE, 300)
    with pytest.raises(TextError, match="is no file name: embedded null byte"):
        read_windows(str(tmp_path / "a\0b.txt"), NOWHERE, 300)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(TextError, match="cannot be read: Is a directory"):
        read_windows(str(tmp_path / "folder.txt"), NOWHERE, 300)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.uint64])
def test_ids_are_used_as_shaped_and_need_no_tokenizer(tmp_path: Path, suffix: str, dtype: Any) -> None:
    ids = np.arange(33, dtype=dtype).reshape(3, 11)
    source = save_ids(tmp_path / f"ids{suffix}", ids)
    windows = read_windows(source, NOWHERE, 33)
    assert windows.tokens.dtype == np.int64
    np.testing.assert_array_equal(windows.tokens, ids)


def test_rows_give_their_head_to_a_smaller_sequence_length(tmp_path: Path) -> None:
    ids = np.arange(30).reshape(3, 10)
    source = save_ids(tmp_path / "ids.npy", ids)
    np.testing.assert_array_equal(read_windows(source, NOWHERE, 30, sequence_length=4).tokens, ids[:, :4])
    np.testing.assert_array_equal(read_windows(source, NOWHERE, 30, sequence_length=10).tokens, ids)
    with pytest.raises(TextError, match="sequences of 10 tokens, sequence_length asks for 11"):
        read_windows(source, NOWHERE, 30, sequence_length=11)


def test_a_one_dimensional_array_is_cut_and_its_tail_dropped(tmp_path: Path) -> None:
    source = save_ids(tmp_path / "ids.npy", np.arange(300))
    np.testing.assert_array_equal(read_windows(source, NOWHERE, 300).tokens, np.arange(256).reshape(2, 128))
    windows = read_windows(source, NOWHERE, 300, sequence_length=7)
    np.testing.assert_array_equal(windows.tokens, np.arange(294).reshape(42, 7))


def test_shortage_is_an_error_only_where_a_number_was_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = save_ids(tmp_path / "short.npy", np.arange(50))
    assert read_windows(short, NOWHERE, 300, default_samples=4).tokens.shape == (1, 50)
    assert "50 tokens, less than a window of 128" in caplog.text
    with pytest.raises(TextError, match="50 tokens, a window needs 51"):
        read_windows(short, NOWHERE, 300, sequence_length=51)
    with pytest.raises(TextError, match="50 tokens, a window needs 128"):
        read_windows(short, NOWHERE, 300, samples=1)
    rows = save_ids(tmp_path / "rows.npy", np.zeros((3, 5), dtype=np.int64))
    assert read_windows(rows, NOWHERE, 300, default_samples=4).tokens.shape == (3, 5)
    with pytest.raises(TextError, match="3 windows of 5 tokens, 4 samples were asked for"):
        read_windows(rows, NOWHERE, 300, samples=4)


def test_samples_are_chosen_by_seed_and_kept_in_order(tmp_path: Path) -> None:
    source = save_ids(tmp_path / "ids.npy", np.arange(100).reshape(100, 1))

    def chosen(**options: int) -> list[int]:
        return read_windows(source, NOWHERE, 100, **options).tokens[:, 0].tolist()  # type: ignore[arg-type]

    first = chosen(samples=10, seed=3)
    assert len(first) == 10
    assert first == sorted(set(first))
    assert first != list(range(10))
    assert chosen(samples=10, seed=3) == first
    assert chosen(default_samples=10, seed=3) == first
    assert chosen(samples=10, default_samples=50, seed=3) == first
    assert chosen(samples=10, seed=4) != first
    assert set(first) < set(chosen(samples=20, seed=3))
    assert chosen(samples=100, seed=3) == list(range(100))


@pytest.mark.parametrize("bad", [-1, 300])
def test_an_id_outside_the_vocabulary_is_located(tmp_path: Path, bad: int) -> None:
    ids = np.zeros((4, 6), dtype=np.int64)
    ids[2, 5] = bad
    source = save_ids(tmp_path / "ids.npy", ids)
    with pytest.raises(TextError, match=rf"0\.\.299, .*found {bad} at \[2, 5\]"):
        read_windows(source, NOWHERE, 300, samples=1)


def test_an_unsigned_id_does_not_wrap_around(tmp_path: Path) -> None:
    source = save_ids(tmp_path / "ids.npy", np.array([[1, 2**64 - 1]], dtype=np.uint64))
    with pytest.raises(TextError, match="found 18446744073709551615"):
        read_windows(source, NOWHERE, 300)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 3), dtype=np.float32), "must hold integers .* found float32"),
        (np.zeros((2, 3), dtype=bool), "must hold integers .* found bool"),
        (np.zeros((2, 3, 4), dtype=np.int64), r"found \(2, 3, 4\)"),
        (np.zeros((0, 4), dtype=np.int64), "holds no tokens"),
        (np.zeros(0, dtype=np.int64), "holds no tokens"),
    ],
)
def test_an_array_that_holds_no_windows_is_refused(tmp_path: Path, ids: Any, message: str) -> None:
    for suffix in (".npy", ".safetensors"):
        source = save_ids(tmp_path / f"ids{suffix}", ids)
        with pytest.raises(TextError, match=message):
            read_windows(source, NOWHERE, 300)


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    with pytest.raises(TextError, match=r"not a valid \.npy"):
        read_windows(str(tmp_path / "ids.npy"), NOWHERE, 300)


def test_of_several_tensors_input_ids_is_read(tmp_path: Path) -> None:
    path, ids = tmp_path / "ids.safetensors", np.array([[3, 1, 2]])
    safetensors.numpy.save_file({"a": np.zeros(2), "input_ids": ids}, path)
    np.testing.assert_array_equal(read_windows(str(path), NOWHERE, 300).tokens, ids)
    safetensors.numpy.save_file({"a": ids, "b": ids}, path)
    with pytest.raises(TextError, match=r"found \['a', 'b'\]"):
        read_windows(str(path), NOWHERE, 300)
    safetensors.numpy.save_file({}, path)
    with pytest.raises(TextError, match=r"must hold one tensor"):
        read_windows(str(path), NOWHERE, 300)


def test_a_bfloat16_tensor_is_no_ids(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"tokens": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "ids.safetensors")
    with pytest.raises(TextError, match="must hold integers, found dtype BF16"):
        read_windows(str(tmp_path / "ids.safetensors"), NOWHERE, 300)


@pytest.mark.parametrize("options", [{"sequence_length": 0}, {"samples": 0}, {"samples": -3}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    source = save_ids(tmp_path / "ids.npy", np.zeros((3, 5), dtype=np.int64))
    with pytest.raises(InputError, match="must be at least"):
        read_windows(source, NOWHERE, 300, **options)  # type: ignore[arg-type]


class FakeDatasets(ModuleType):
    """Stands for the package `datasets`; remembers what was asked for."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        super().__init__("datasets")
        self.columns = columns
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, name: str, config: str | None, *, split: str) -> Any:
        self.asked.append((name, config, split))
        if name == "absent":
            raise RuntimeError("not on the hub\nlong explanation")
        return FakeDataset(self.columns)


class FakeDataset(dict[str, list[Any]]):
    @property
    def column_names(self) -> list[str]:
        return list(self)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    fake = FakeDatasets({"text": SENTENCES, "body": SENTENCES[::-1], "label": [1, 2, 3]})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "asked", "documents"),
    [
        ("hf:org/name:train", ("org/name", None, "train"), SENTENCES),
        ("hf:name:raw-v1:test", ("name", "raw-v1", "test"), SENTENCES),
        ("hf:name:test:body", ("name", None, "test"), SENTENCES[::-1]),
        ("hf:name::odd:body", ("name", None, "odd"), SENTENCES[::-1]),
        ("hf:name:raw:train[:10%]:body", ("name", "raw", "train[:10%]"), SENTENCES[::-1]),
        ("hf:name:train[5:10]:body", ("name", None, "train[5:10]"), SENTENCES[::-1]),
    ],
)
def test_a_dataset_is_one_joined_text(
    tokenizer_directory: Path,
    datasets: FakeDatasets,
    source: str,
    asked: tuple[str, str | None, str],
    documents: list[str],
) -> None:
    windows = read_windows(source, tokenizer_directory, 300, sequence_length=6)
    text = "\n\n".join(documents)
    assert datasets.asked == [asked]
    np.testing.assert_array_equal(windows.tokens, stream_windows(ids_of(text, tokenizer_directory), 6))
    assert windows.digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:name", "must have the form hf:NAME"),
        ("hf:", "must have the form hf:NAME"),
        ("hf:name:", "must have the form hf:NAME"),
        ("hf:a:b:c:d:e", "must have the form hf:NAME"),
        ("hf:name:test:nothing", "no column 'nothing', it has text, body, label"),
        ("hf:name:test:label", "column 'label' must hold strings"),
        ("hf:absent:test", r"dataset 'absent'.*split 'test' \(RuntimeError: not on the hub\)"),
    ],
)
def test_a_dataset_that_gives_no_text_is_refused(datasets: FakeDatasets, source: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        read_windows(source, NOWHERE, 300)


def test_a_dataset_without_its_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingRequirementError, match="needs the package 'datasets'") as raised:
        read_windows("hf:name:test", NOWHERE, 300)
    assert raised.value.remedy == "pip install datasets"


def test_a_tokenizer_must_be_there_and_readable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer in"):
        load_tokenizer(tmp_path, 300)
    # transformers would build an empty tokenizer from this file alone
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="no tokenizer in"):
        load_tokenizer(tmp_path, 300)
    for damaged in ("{broken", "{}", '{"model": {"type": "none"}, "added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(ModelError, match="cannot be read"):
            load_tokenizer(tmp_path, 300)


def test_a_tokenizer_s_settings_must_be_usable(tmp_path: Path, tokenizer_directory: Path) -> None:
    shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": "x"}')
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer", 300)


def test_a_tokenizer_must_fit_the_vocabulary(tokenizer_directory: Path) -> None:
    size = max(load_tokenizer(tokenizer_directory, 300).get_vocab().values()) + 1
    assert load_tokenizer(tokenizer_directory, size).get_vocab()
    with pytest.raises(ModelError, match=rf"vocabulary of {size} ids, the model has {size - 1};"):
        load_tokenizer(tokenizer_directory, size - 1)


def test_special_tokens_may_lie_outside_the_vocabulary(tmp_path: Path, tokenizer_directory: Path) -> None:
    """As the image token of Gemma 3's text models does; a word that was added may not."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)
    size = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    assert read_windows(str(tmp_path / "text.txt"), tmp_path, size).tokens.max() < size
    (tmp_path / "text.txt").write_text(f"{TEXT}<image>")
    with pytest.raises(TextError, match=rf"ids must lie in 0..{size - 1}"):
        read_windows(str(tmp_path / "text.txt"), tmp_path, size)
    tokenizer.add_tokens("word")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"vocabulary of {size + 2} ids"):
        load_tokenizer(tmp_path, size)


@pytest.mark.parametrize(
    "config",
    [{"model_type": "qwen2"}, {"model_type": "flap_qwen2", "auto_map": {"AutoConfig": "modeling_pruned.PrunedConfig"}}],
)
def test_tokens_do_not_depend_on_the_model_type(
    tmp_path: Path, tokenizer_directory: Path, config: dict[str, Any]
) -> None:
    """Dense and pruned models must see the same tokens; a modelling file is neither run nor asked about."""
    for file in tokenizer_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, 300)
    expected = ids_of(TEXT, tokenizer_directory).tolist()
    assert tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"] == expected
