"""A model in this process: the demo model's nonsense, cut prompts, and chat templates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import bred, opened, operators_of, prompt_of, small_space
from tiny import VOCABULARY, tiny_checkpoint
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from flap_export.errors import InputError, ModelError
from flap_export.searching.language.local_model import LocalModel
from flap_export.searching.language.opening import open_proposer
from flap_export.searching.language.prompts import ask_initial
from flap_export.searching.language.proposers import Message, Recorded

DEMO = Path(__file__).parents[2] / "pipelines" / "demo" / "model"
HELLO: list[Message] = [{"role": "user", "content": "The town of"}, {"role": "user", "content": "York"}]


@pytest.fixture(scope="module")
def demo() -> LocalModel:
    return LocalModel(str(DEMO), max_new_tokens=12)


def fed(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens of every prompt that is fed from now on, and how many may follow."""
    found: list[tuple[int, int]] = []
    generate = model._model.generate

    def noting(ids: torch.Tensor, **options: Any) -> Any:
        found.append((ids.shape[1], options["max_new_tokens"]))
        return generate(ids, **options)

    monkeypatch.setattr(model._model, "generate", noting)
    return found


def test_the_same_seed_gives_the_same_answer_and_leaves_other_chance_alone(demo: LocalModel) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, again, other = (demo.answer(HELLO, temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), expected)
    assert one.text == again.text != other.text
    assert one.prompt_tokens == again.prompt_tokens > 3
    assert 0 < one.completion_tokens <= 12
    assert one.seconds > 0


def test_no_temperature_takes_the_most_likely(demo: LocalModel) -> None:
    assert len({demo.answer(HELLO, temperature=0.0, seed=seed).text for seed in range(3)}) == 1


def test_of_a_long_prompt_the_end_is_read(demo: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fed(demo, monkeypatch)
    assert demo.max_positions == 512
    end: Message = {"role": "user", "content": prompt_of(ask_initial(small_space(), 3))[-300:]}
    answers = [
        demo.answer([{"role": "user", "content": start * 700}, end], temperature=0.0, seed=0)
        for start in ("one ", "b ")
    ]
    assert found == [(500, 12), (500, 12)]
    assert answers[0].prompt_tokens == 500
    short, long = LocalModel(str(DEMO), max_new_tokens=4096), "word " * 900
    assert short._fitted(list(range(900))) == (list(range(900 - 256, 900)), 256)
    assert short._fitted(list(range(100))) == (list(range(100)), 412)
    assert len(short._prompt_ids([{"role": "user", "content": long}])) > 512


def test_the_demo_models_nonsense_is_survived_by_all_operators(demo: LocalModel, tmp_path: Path) -> None:
    space = small_space()
    with opened(tmp_path) as journal:
        operators = operators_of(space, demo, journal, max_attempts=1)
        found = bred(operators, generations=1)
    assert len(set(found)) == 11
    assert all(space.contains(one) for one in found)
    assert operators.usage.questions == operators.usage.requests == 4
    assert operators.usage.completion_tokens > 0
    assert operators.usage.filled + operators.usage.valid == 5 + 3 + 3 + 3
    with opened(tmp_path) as journal:
        replayed = operators_of(space, Recorded(), journal, max_attempts=1)
        assert bred(replayed, generations=1) == found
    assert replayed.usage == operators.usage


def test_a_chat_template_is_followed_and_writes_the_special_tokens(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))
    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = LocalModel(str(folder), max_new_tokens=2)
    assert plain._tokenizer.decode(plain._prompt_ids(HELLO)) == "<|begin|>The town of\n\nYork\n\n"
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}!{% endfor %}"
    )
    templated = LocalModel(str(folder), max_new_tokens=2)
    assert templated._tokenizer.decode(templated._prompt_ids(HELLO)) == "<|begin|>The town of!York!"


def test_the_model_that_is_pruned_answers_for_itself() -> None:
    proposer = open_proposer("self", None, pruned_model=DEMO)
    assert isinstance(proposer, LocalModel)
    assert Path(proposer._model.config._name_or_path) == DEMO
    named = open_proposer(f"local:{DEMO}", None, pruned_model="unused")
    assert isinstance(named, LocalModel)
    with pytest.raises(InputError, match="self names its model itself, got the name 'gpt' too; leave it out"):
        open_proposer("self", "gpt", pruned_model=DEMO)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot answer prompts: its weights or its tokenizer"):
        LocalModel(str(tmp_path / "nowhere"))
    # Weights without a tokenizer.
    with pytest.raises(ModelError, match="cannot answer prompts: its weights or its tokenizer"):
        LocalModel(str(tiny_checkpoint("llama", tmp_path / "tiny", vocab_size=VOCABULARY)))
